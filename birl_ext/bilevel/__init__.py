"""Bilevel reinforcement learning: an upper level shapes an MDP, whose soft-optimal policy it is
judged by.
"""

from birl_ext.bilevel.hypergradient import HypergradientReport, hypergradient_report
from birl_ext.bilevel.msobirl import MSoBiRL, Outcome
from birl_ext.bilevel.newton import DampedNewton, NewtonOutcome
from birl_ext.bilevel.problem import BilevelProblem, geometric
from birl_ext.bilevel.zero_order import ZeroOrder

__all__ = [
    "BilevelProblem",
    "DampedNewton",
    "HypergradientReport",
    "MSoBiRL",
    "NewtonOutcome",
    "Outcome",
    "ZeroOrder",
    "geometric",
    "hypergradient_report",
]
