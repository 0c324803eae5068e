"""Bilevel reinforcement learning: an upper level shapes an MDP, whose soft-optimal policy it is
judged by.
"""

from birl_ext.bilevel.adaptation import AdaptedReward
from birl_ext.bilevel.bias_meter import EstimatorReport, exact_pair_objective, measure_estimator
from birl_ext.bilevel.budget import Budget, BudgetReport
from birl_ext.bilevel.constraints import (
    L1,
    Box,
    ConstraintSet,
    L1Ball,
    Mirror,
    Projected,
    Proximal,
    Simplex,
    stationarity,
)
from birl_ext.bilevel.environment_adaptation import (
    Adaptation,
    AdaptationProblem,
    Practice,
    ZeroOrderAdaptation,
)
from birl_ext.bilevel.hypergradient import HypergradientReport, hypergradient_report
from birl_ext.bilevel.leader_policy import leader_policy_mdp
from birl_ext.bilevel.msobirl import MSoBiRL, MSoBiRLOutcome
from birl_ext.bilevel.newton import DampedNewton, NewtonOutcome
from birl_ext.bilevel.problem import BilevelProblem, geometric
from birl_ext.bilevel.score import FullHorizon, OneStep
from birl_ext.bilevel.sobirl import DRLHFUpdate, SoBiRLOutcome, SoBiRLUpdate, importance
from birl_ext.bilevel.stoc_sobirl import (
    Effort,
    SampledProblem,
    StocSoBiRLDescent,
    StocSoBiRLOutcome,
)
from birl_ext.bilevel.zero_order import ZeroOrder, ZeroOrderOutcome

__all__ = [
    "L1",
    "Adaptation",
    "AdaptationProblem",
    "AdaptedReward",
    "BilevelProblem",
    "Box",
    "Budget",
    "BudgetReport",
    "ConstraintSet",
    "DRLHFUpdate",
    "DampedNewton",
    "Effort",
    "EstimatorReport",
    "FullHorizon",
    "HypergradientReport",
    "L1Ball",
    "MSoBiRL",
    "MSoBiRLOutcome",
    "Mirror",
    "NewtonOutcome",
    "OneStep",
    "Practice",
    "Projected",
    "Proximal",
    "SampledProblem",
    "Simplex",
    "SoBiRLOutcome",
    "SoBiRLUpdate",
    "StocSoBiRLDescent",
    "StocSoBiRLOutcome",
    "ZeroOrder",
    "ZeroOrderAdaptation",
    "ZeroOrderOutcome",
    "exact_pair_objective",
    "geometric",
    "hypergradient_report",
    "importance",
    "leader_policy_mdp",
    "measure_estimator",
    "stationarity",
]
