"""The methods that can take part, each under a name, and how it is made ready for a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from birl_ext.arena.contest import Bout
from birl_ext.bilevel import MSoBiRL, ZeroOrder
from birl_ext.bilevel.algorithm import Descent, Maker
from birl_ext.bilevel.problem import Temperature

__all__ = ["METHODS", "Method", "Plan"]


class Plan(NamedTuple):
    """What a run is made with, the same for every method.

    Args:
        temperature: λ, or a schedule that falls to it.
        optimiser: Adam, of the rate that is played.
        noise: standard deviation of what is added to the gradient.
        seed: of the method's own draws.
        starts, heat: of a method that has them in itself.
    """

    temperature: Temperature
    optimiser: Maker
    noise: float
    seed: int
    starts: int
    heat: float


@dataclass(frozen=True)
class Method:
    """A method of the arena.

    Args:
        title: in tables.
        needs: "model", the same upper level as a sum over steps ("additive"), or "samples".
        make: (bout, x, plan) → the algorithm.
        rates: those that tuning chooses from, of Adam, falling to a tenth in a run.
        whole: whether it has starts and cooling in itself.
    """

    title: str
    needs: Literal["model", "additive", "samples"]
    make: Callable[[Bout, Tensor, Plan], Descent[Any]]
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    whole: bool = False


def _common(plan: Plan) -> dict[str, Any]:
    return {
        "temperature": plan.temperature,
        "optimiser": plan.optimiser,
        "noise": plan.noise,
        "seed": plan.seed,
    }


def _known(algorithm: Callable[..., Descent[Any]], **own: Any) -> Callable[..., Descent[Any]]:
    """A method that is told both levels."""

    def make(bout: Bout, x: Tensor, plan: Plan) -> Descent[Any]:
        return algorithm(bout.problem, x, **_common(plan), **own)

    return make


METHODS: dict[str, Method] = {
    "m-sobirl": Method("M-SoBiRL", "model", _known(MSoBiRL)),
    "m-sobirl-published": Method(
        "M-SoBiRL, as published", "model", _known(MSoBiRL, mode="published", accuracy=float("inf"))
    ),
    "zero-order": Method("zero order", "model", _known(ZeroOrder, radius=0.1)),
}
