"""birl_ext: differentiate through an optimal policy.

Solves entropy-regularised MDPs to a certified tolerance, gives exact derivatives of the solution,
and builds bilevel reinforcement learning on top.
"""

from birl_ext import nn
from birl_ext._version import __version__
from birl_ext.functional import bellman, evaluate, occupancy, solve
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.solution import Solution, Status

__all__ = [
    "DenseMDP",
    "Solution",
    "SparseMDP",
    "Status",
    "__version__",
    "bellman",
    "evaluate",
    "nn",
    "occupancy",
    "solve",
]
