"""birl_ext: differentiate through an optimal policy.

Solves entropy-regularised MDPs to a certified tolerance, gives exact derivatives of the solution,
and builds bilevel
reinforcement learning on top.
"""

from birl_ext import nn
from birl_ext.functional import bellman, evaluate, occupancy, solve
from birl_ext.mdp import DenseMDP, SparseMDP
from birl_ext.solution import Solution, Status

__version__ = "0.1.0"

__all__ = [
    "DenseMDP",
    "Solution",
    "SparseMDP",
    "Status",
    "bellman",
    "evaluate",
    "nn",
    "occupancy",
    "solve",
]
