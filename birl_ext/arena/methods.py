"""The methods that can take part, each under a name, and how it is made ready for a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from birl_ext.arena.contest import Bout, Samples
from birl_ext.bilevel import (
    AMD,
    BCHG,
    HPGD,
    BellmanPenalty,
    EstimatedModel,
    MSoBiRL,
    NoResponse,
    SampledZeroOrder,
    StocSoBiRLDescent,
    Unrolled,
    ValuePenalty,
    ZeroOrder,
)
from birl_ext.bilevel.algorithm import Algorithm, Maker
from birl_ext.bilevel.problem import Temperature

LEARNED = 64
"""Starts of `EstimatedModel`, where there are several: on a model they cost no sample."""

PENALTY = {"weight": 100.0, "inner_rate": 0.1}
"""Of the inner rates 1, .1 and .01 the best on Four Rooms, a seed that is not reported."""

__all__ = ["METHODS", "Method", "Plan"]


class Plan(NamedTuple):
    """What a run is made with, the same for every method.

    Args:
        temperature: λ, or a schedule that falls to it.
        optimiser: Adam, of the rate that is played.
        noise: standard deviation of what is added to the gradient.
        seed: of the method's own draws.
        starts, heat: of a method that has them in itself.
        budget: of a seed, in the contest's unit.
    """

    temperature: Temperature
    optimiser: Maker
    noise: float
    seed: int
    starts: int
    heat: float
    budget: float


@dataclass(frozen=True)
class Method:
    """A method of the arena.

    Args:
        title: in tables.
        needs: "model", the same upper level as a sum over steps ("additive"), or "samples".
        make: (bout, x, plan) → the algorithm.
        rates: those that tuning chooses from, of Adam, falling to a tenth in a run.
        whole: whether it has starts and cooling in itself; then it has no noise.
    """

    title: str
    needs: Literal["model", "additive", "samples"]
    make: Callable[[Bout, Tensor, Plan], Algorithm[Any]]
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    whole: bool = False


def _common(plan: Plan) -> dict[str, Any]:
    return {
        "temperature": plan.temperature,
        "optimiser": plan.optimiser,
        "noise": plan.noise,
        "seed": plan.seed,
    }


def _known(algorithm: Callable[..., Algorithm[Any]], **own: Any) -> Callable[..., Algorithm[Any]]:
    """A method that is told both levels."""

    def make(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
        return algorithm(bout.problem, x, **_common(plan), **own)

    return make


def _amd(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
    assert bout.additive is not None
    return AMD(bout.additive, x, **_common(plan))


def _central(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
    own: dict[str, Any] = {"radius": 0.1, "points": 2, "directions": 8, "batched": bout.stacks}
    return ZeroOrder(bout.problem, x, **own, **_common(plan))


def _sampled(algorithm: Callable[..., Algorithm[Any]], **own: Any) -> Callable[..., Algorithm[Any]]:
    """A method that is given samples, as many paths in each outer step as all the others."""

    def make(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
        drawn = _drawn(bout)
        return algorithm(
            drawn.problem,
            drawn.simulator,
            x,
            discount=drawn.discount,
            temperature=plan.temperature,
            optimiser=plan.optimiser,
            noise=plan.noise,
            follower=drawn.follower,
            **own,
        )

    return make


def _paths(algorithm: Callable[..., Algorithm[Any]], **own: Any) -> Callable[..., Algorithm[Any]]:
    def make(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
        effort = _drawn(bout).effort
        many = {"batch": effort.batch, "sweeps": effort.sweeps}
        return _sampled(algorithm, **many, **own)(bout, x, plan)

    return make


def _oracle(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
    return _paths(HPGD, sampling="oracle", model=_drawn(bout).model)(bout, x, plan)


def _continued(credit: str) -> Callable[..., Algorithm[Any]]:
    def make(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
        effort = _drawn(bout).effort
        return _sampled(StocSoBiRLDescent, effort=effort, credit=credit)(bout, x, plan)

    return make


def _estimated(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
    """Its first round's samples are a third of the budget, as they decide what it can find."""
    drawn = _drawn(bout)
    first, more = int(plan.budget / 3), int(plan.budget / 6)
    return EstimatedModel(
        drawn.problem,
        drawn.simulator,
        drawn.starts,
        discount=drawn.discount,
        temperature=bout.temperature,
        first=max(1, first),
        more=max(1, more),
        count=LEARNED if plan.starts > 1 else 1,
        candidates=8 if plan.starts > 1 else 1,
        heat=plan.heat,
        follower=drawn.follower,
    )


def _drawn(bout: Bout) -> Samples:
    assert bout.samples is not None
    return bout.samples


METHODS: dict[str, Method] = {
    "m-sobirl": Method("M-SoBiRL", "model", _known(MSoBiRL)),
    "m-sobirl-published": Method(
        "M-SoBiRL, as published", "model", _known(MSoBiRL, mode="published", accuracy=math.inf)
    ),
    "amd": Method("AMD", "additive", _amd),
    "unrolled": Method("unrolled, 20 sweeps", "model", _known(Unrolled, sweeps=20)),
    "value-penalty": Method("value penalty", "model", _known(ValuePenalty, **PENALTY)),
    "bellman-penalty": Method("Bellman penalty", "model", _known(BellmanPenalty, **PENALTY)),
    "zero-order": Method("zero order, one point", "model", _known(ZeroOrder, radius=0.1)),
    "zero-order-central": Method("zero order, two points, 8 directions", "model", _central),
    "no-response": Method("no response", "model", _known(NoResponse)),
    "estimated-model": Method(
        "M-SoBiRL on a learned model", "samples", _estimated, rates=(0.3,), whole=True
    ),
    "stoc-sobirl": Method("Stoc-SoBiRL, critic", "samples", _continued("critic")),
    "stoc-sobirl-to-go": Method("Stoc-SoBiRL, costs to go", "samples", _continued("to go")),
    "hpgd": Method("HPGD", "samples", _paths(HPGD)),
    "hpgd-uniform": Method("HPGD, uniform", "samples", _paths(HPGD, sampling="uniform")),
    "hpgd-sarsa": Method("HPGD, SARSA", "samples", _paths(HPGD, critic="sarsa")),
    "hpgd-oracle": Method("HPGD, told the advantages", "samples", _oracle),
    "bc-hg": Method("BC-HG", "samples", _paths(BCHG)),
    "bc-hg-critics": Method(
        "BC-HG, both critics", "samples", _paths(BCHG, lower="critic", replays=5)
    ),
    "zero-order-samples": Method(
        "zero order, from samples", "samples", _paths(SampledZeroOrder, radius=0.5)
    ),
}
