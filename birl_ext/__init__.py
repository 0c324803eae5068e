"""birl_ext: differentiate through an optimal policy.

Solves entropy-regularised MDPs to a certified tolerance, gives exact derivatives of the solution,
and builds bilevel reinforcement learning on top.

What is not needed to solve is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from birl_ext import nn
from birl_ext._version import __version__
from birl_ext.entropy import temperature_for
from birl_ext.functional import bellman, evaluate, occupancy, solve
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.nn import SoftPlanner
from birl_ext.solution import Solution, Status

if TYPE_CHECKING:
    from birl_ext import (
        agents,
        bilevel,
        convert,
        environments,
        errors,
        preferences,
        problems,
        replay,
        rollouts,
        runs,
        simulators,
    )
    from birl_ext.agents.sac import SAC
    from birl_ext.agents.sac_discrete import DiscreteSAC
    from birl_ext.agents.soft_q import SoftQ
    from birl_ext.bilevel.adaptation import AdaptedReward
    from birl_ext.bilevel.bias_meter import measure_estimator
    from birl_ext.bilevel.hypergradient import hypergradient_report
    from birl_ext.bilevel.msobirl import MSoBiRL
    from birl_ext.bilevel.newton import DampedNewton
    from birl_ext.bilevel.problem import BilevelProblem, geometric
    from birl_ext.bilevel.score import FullHorizon, OneStep
    from birl_ext.bilevel.sobirl import DRLHFUpdate, SoBiRLUpdate
    from birl_ext.bilevel.stoc_sobirl import Effort, SampledProblem, StocSoBiRLDescent
    from birl_ext.bilevel.zero_order import ZeroOrder
    from birl_ext.environments.vector import make_environments
    from birl_ext.preferences.buffer import PreferenceBuffer
    from birl_ext.preferences.reward_model import RewardEnsemble, RewardNetwork
    from birl_ext.preferences.teachers import TEACHERS, ScriptedTeacher
    from birl_ext.problems.preference.learner import DRLHF, MRN, SoBiRL, StocSoBiRL
    from birl_ext.problems.saved import load_run
    from birl_ext.replay.buffer import ReplayBuffer
    from birl_ext.replay.frames import FrameReplay
    from birl_ext.rollouts.collect import Collector
    from birl_ext.rollouts.evaluate import evaluate_agent
    from birl_ext.rollouts.video import record_video
    from birl_ext.simulators.equations import DynamicsSimulator
    from birl_ext.simulators.finite import FiniteSimulator
    from birl_ext.simulators.restored import RestoredSimulator

_LAZY = {
    "agents": "",
    "bilevel": "",
    "convert": "",
    "environments": "",
    "errors": "",
    "preferences": "",
    "problems": "",
    "replay": "",
    "rollouts": "",
    "runs": "",
    "simulators": "",
    "AdaptedReward": "bilevel.adaptation",
    "BilevelProblem": "bilevel.problem",
    "Collector": "rollouts.collect",
    "DRLHF": "problems.preference.learner",
    "DRLHFUpdate": "bilevel.sobirl",
    "DampedNewton": "bilevel.newton",
    "DiscreteSAC": "agents.sac_discrete",
    "DynamicsSimulator": "simulators.equations",
    "Effort": "bilevel.stoc_sobirl",
    "FiniteSimulator": "simulators.finite",
    "FrameReplay": "replay.frames",
    "FullHorizon": "bilevel.score",
    "MRN": "problems.preference.learner",
    "MSoBiRL": "bilevel.msobirl",
    "OneStep": "bilevel.score",
    "PreferenceBuffer": "preferences.buffer",
    "ReplayBuffer": "replay.buffer",
    "RestoredSimulator": "simulators.restored",
    "RewardEnsemble": "preferences.reward_model",
    "RewardNetwork": "preferences.reward_model",
    "SAC": "agents.sac",
    "SampledProblem": "bilevel.stoc_sobirl",
    "ScriptedTeacher": "preferences.teachers",
    "SoBiRL": "problems.preference.learner",
    "SoBiRLUpdate": "bilevel.sobirl",
    "SoftQ": "agents.soft_q",
    "StocSoBiRL": "problems.preference.learner",
    "StocSoBiRLDescent": "bilevel.stoc_sobirl",
    "TEACHERS": "preferences.teachers",
    "ZeroOrder": "bilevel.zero_order",
    "evaluate_agent": "rollouts.evaluate",
    "geometric": "bilevel.problem",
    "hypergradient_report": "bilevel.hypergradient",
    "load_run": "problems.saved",
    "make_environments": "environments.vector",
    "measure_estimator": "bilevel.bias_meter",
    "record_video": "rollouts.video",
}

__all__ = [
    "DRLHF",
    "MRN",
    "SAC",
    "TEACHERS",
    "AdaptedReward",
    "BilevelProblem",
    "Collector",
    "DRLHFUpdate",
    "DampedNewton",
    "DenseMDP",
    "DiscreteSAC",
    "DynamicsSimulator",
    "Effort",
    "FiniteSimulator",
    "FrameReplay",
    "FullHorizon",
    "MSoBiRL",
    "OneStep",
    "PreferenceBuffer",
    "ReplayBuffer",
    "RestoredSimulator",
    "RewardEnsemble",
    "RewardNetwork",
    "SampledProblem",
    "ScriptedTeacher",
    "SoBiRL",
    "SoBiRLUpdate",
    "SoftPlanner",
    "SoftQ",
    "Solution",
    "SparseMDP",
    "Status",
    "StocSoBiRL",
    "StocSoBiRLDescent",
    "ZeroOrder",
    "__version__",
    "agents",
    "bellman",
    "bilevel",
    "convert",
    "environments",
    "errors",
    "evaluate",
    "evaluate_agent",
    "geometric",
    "hypergradient_report",
    "load_run",
    "make_environments",
    "measure_estimator",
    "nn",
    "occupancy",
    "preferences",
    "problems",
    "record_video",
    "replay",
    "rollouts",
    "runs",
    "simulators",
    "solve",
    "temperature_for",
]


def __getattr__(name: str) -> Any:
    if (room := _LAZY.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not room:
        return importlib.import_module(f"birl_ext.{name}")
    found = globals()[name] = getattr(importlib.import_module(f"birl_ext.{room}"), name)
    return found


def __dir__() -> list[str]:
    return sorted(globals().keys() | _LAZY.keys())
