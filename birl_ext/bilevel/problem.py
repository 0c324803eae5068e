"""A bilevel problem as two ordinary differentiable functions, and schedules of its temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from birl_ext.errors import OptionError, ShapeError, TemperatureError
from birl_ext.functional import solve
from birl_ext.mdp import DenseMDP, SparseMDP
from birl_ext.solution import Solution

__all__ = ["BilevelProblem", "Temperature", "geometric", "temperature_at"]

Temperature = float | Tensor | Callable[[int], float | Tensor]
"""τ, a number or (*B), or a schedule of it: outer step → τ."""


@dataclass(frozen=True)
class BilevelProblem:
    """min over x of φ(x) = f(x, π*(x)), where π*(x) is the soft-optimal policy of an MDP that x
    shapes.

    Args:
        lower: x → DenseMDP or SparseMDP; reward, transition or reference may depend on x.
        upper: (x, Solution) → φ, a scalar, or one number per start when x has a leading axis of
            starts.

    Many starts are one batch: let x be (M, d), the MDP's first batch axis M, and φ (M,).
    """

    lower: Callable[[Tensor], DenseMDP | SparseMDP]
    upper: Callable[[Tensor, Solution], Tensor]

    def objective(
        self, x: Tensor, temperature: float | Tensor, initial: Tensor | None = None
    ) -> Tensor:
        """φ(x), exactly: solved as far as rounding allows, differentiable in x to any order."""
        return self.evaluate(x, temperature, initial)[0]

    def evaluate(
        self, x: Tensor, temperature: float | Tensor, initial: Tensor | None = None
    ) -> tuple[Tensor, Solution]:
        """φ(x) and the solution of the lower level there."""
        solution = solve(self.lower(x), temperature=temperature, initial=initial)
        return self.checked(self.upper(x, solution), x), solution

    @staticmethod
    def checked(objective: Tensor, x: Tensor) -> Tensor:
        """The objective, if it is a scalar or has one number per start."""
        starts = x.shape[:1] if x.dim() > 1 else ()
        if objective.shape not in ((), starts):
            rest = f", or ({starts[0]},): one number per start" if starts else ""
            raise ShapeError(
                f"upper returned shape {tuple(objective.shape)}",
                allowed=f"a scalar{rest}",
                fix="sum or average over everything but the starts",
            )
        return objective


def geometric(start: float, end: float, steps: int) -> Callable[[int], float]:
    """Temperature continuation: τ falls from `start` to `end` by a constant factor, then stays.

    Args:
        start, end: temperatures, units of reward.
        steps: outer steps until `end` is reached.
    """
    for name, value in (("start", start), ("end", end)):
        if not value > 0:
            raise TemperatureError(f"{name} is {value!r}", allowed="(0, inf)")
    if steps < 1:
        raise OptionError(f"steps is {steps!r}", allowed="1 or more")

    def schedule(step: int) -> float:
        return float(start * (end / start) ** min(step / steps, 1.0))

    return schedule


def temperature_at(temperature: Temperature, step: int) -> float | Tensor:
    return temperature(step) if callable(temperature) else temperature


def direct_gradient(
    objective: Tensor, inputs: list[Tensor], *, retain: bool = False
) -> list[Tensor | None]:
    """Gradients of the sum over starts; None where there is no dependence."""
    if not objective.requires_grad:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(objective.sum(), inputs, allow_unused=True, retain_graph=retain)
    )
