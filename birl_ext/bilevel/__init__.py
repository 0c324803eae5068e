"""Bilevel reinforcement learning: an upper level shapes an MDP, whose soft-optimal policy it is
judged by.
"""

from birl_ext.bilevel.adaptation import AdaptedReward
from birl_ext.bilevel.additive_problem import AdditiveProblem
from birl_ext.bilevel.bias_meter import EstimatorReport, exact_pair_objective, measure_estimator
from birl_ext.bilevel.environment_adaptation import (
    Adaptation,
    AdaptationProblem,
    Practice,
    ZeroOrderAdaptation,
)
from birl_ext.bilevel.estimated_model import EstimatedModel, EstimatedModelOutcome
from birl_ext.bilevel.fitted import Fitted, action_counts
from birl_ext.bilevel.follower import Exact, Follower, Sweeps
from birl_ext.bilevel.hypergradient import HypergradientReport, hypergradient_report
from birl_ext.bilevel.model_descent import ModelDescent, RivalOutcome
from birl_ext.bilevel.msobirl import MSoBiRL, MSoBiRLOutcome
from birl_ext.bilevel.newton import DampedNewton, NewtonOutcome
from birl_ext.bilevel.problem import BilevelProblem, geometric
from birl_ext.bilevel.rivals import (
    AMD,
    BCHG,
    HPGD,
    BellmanPenalty,
    NoResponse,
    PenaltyOutcome,
    SampledZeroOrder,
    Unrolled,
    ValuePenalty,
)
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
    "AMD",
    "BCHG",
    "HPGD",
    "Adaptation",
    "AdaptationProblem",
    "AdaptedReward",
    "AdditiveProblem",
    "BellmanPenalty",
    "BilevelProblem",
    "DRLHFUpdate",
    "DampedNewton",
    "Effort",
    "EstimatedModel",
    "EstimatedModelOutcome",
    "EstimatorReport",
    "Exact",
    "Fitted",
    "Follower",
    "FullHorizon",
    "HypergradientReport",
    "MSoBiRL",
    "MSoBiRLOutcome",
    "ModelDescent",
    "NewtonOutcome",
    "NoResponse",
    "OneStep",
    "PenaltyOutcome",
    "Practice",
    "RivalOutcome",
    "SampledProblem",
    "SampledZeroOrder",
    "SoBiRLOutcome",
    "SoBiRLUpdate",
    "StocSoBiRLDescent",
    "StocSoBiRLOutcome",
    "Sweeps",
    "Unrolled",
    "ValuePenalty",
    "ZeroOrder",
    "ZeroOrderAdaptation",
    "ZeroOrderOutcome",
    "action_counts",
    "exact_pair_objective",
    "geometric",
    "hypergradient_report",
    "importance",
    "measure_estimator",
]
