"""A bilevel problem as two ordinary differentiable functions, and schedules of its temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from birl_ext.bilevel.guards import (
    check_callable,
    check_count,
    check_lower,
    check_objective,
)
from birl_ext.bilevel.variables import Variables, starts
from birl_ext.errors import BirlError, DtypeError, ShapeError, TemperatureError
from birl_ext.functional import solve
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP, SparseMDP
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

    x is a tensor, a list, tuple or dict of tensors, or a module; both levels are given it as it is.
    Many starts are one batch: let x be one tensor (M, d), the MDP's first batch axis M, and φ (M,).
    """

    lower: Callable[[Any], DenseMDP | SparseMDP]
    upper: Callable[[Any, Solution], Tensor]

    def __post_init__(self) -> None:
        for name, level in vars(self).items():
            check_callable(name, level)

    def objective(
        self, x: Variables, temperature: float | Tensor, initial: Tensor | None = None
    ) -> Tensor:
        """φ(x), exactly: solved as far as rounding allows, differentiable in x to any order."""
        return self.evaluate(x, temperature, initial)[0]

    def evaluate(
        self, x: Variables, temperature: float | Tensor, initial: Tensor | None = None
    ) -> tuple[Tensor, Solution]:
        """φ(x) and the solution of the lower level there."""
        solution = solve(self.model(x), temperature=temperature, initial=initial)
        return self.judge(x, solution), solution

    def model(self, x: Variables) -> DenseMDP | SparseMDP:
        """The lower level at x, if it is one."""
        mdp = self.lower(x)
        if not isinstance(mdp, DenseMDP | SparseMDP):
            raise DtypeError(
                f"lower returned a {type(mdp).__name__}",
                allowed="a DenseMDP or a SparseMDP",
                fix="return DenseMDP(reward, transition, discount)",
            )
        return mdp

    def judge(self, x: Variables, solution: Solution) -> Tensor:
        """The objective, if it is a scalar or has one number per start."""
        objective = self.upper(x, solution)
        if not isinstance(objective, Tensor) or not objective.is_floating_point():
            tensor = isinstance(objective, Tensor)
            kind = f"tensor of {objective.dtype}" if tensor else type(objective).__name__
            raise DtypeError(
                f"upper returned a {kind}",
                allowed="a tensor of floating point",
                fix="compute it by torch from x and the solution, without float() or .item()",
            )
        own = starts(x)
        if objective.shape not in ((), own):
            rest = f", or ({own[0]},): one number per start" if own else ""
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
    ends: tuple[tuple[str, Any], ...] = (("start", start), ("end", end))
    for name, value in ends:
        if not (isinstance(value, Real) and 0 < float(value) < math.inf):
            raise TemperatureError(f"{name} is {value!r}", allowed="positive and finite")
    steps = check_count("steps", steps)

    def schedule(step: int) -> float:
        return float(start * (end / start) ** min(step / steps, 1.0))

    return schedule


def check_schedule(temperature: Temperature) -> Temperature:
    """A temperature as it is given: a number that is one, or a schedule, read step by step."""
    if not callable(temperature):
        checks.check_temperature(temperature)
    return temperature


def temperature_at(temperature: Temperature, step: int) -> float | Tensor:
    """τ at an outer step, positive and finite."""
    if not callable(temperature):
        checks.check_temperature(temperature)
        return temperature
    found = temperature(step)
    try:
        checks.check_temperature(found)
    except BirlError as error:
        raise type(error)(
            error.what,
            where=f"outer step {step} of the schedule" + (error.where and f", {error.where}"),
            allowed=error.allowed,
            fix=error.fix,
        ) from None
    return found


def evaluate_at(
    problem: BilevelProblem,
    x: Variables,
    temperature: float | Tensor,
    initial: Tensor | None = None,
    step: int | None = None,
    tol: float | None = None,
) -> tuple[Tensor, Solution]:
    """φ and the solution at x, refused where φ is not finite or the lower level does not
    depend on x.
    """
    mdp = problem.model(x)
    check_lower(mdp, x)
    solution = solve(mdp, temperature=temperature, initial=initial, tol=tol)
    objective = problem.judge(x, solution)
    check_objective(objective, step)
    return objective, solution
