"""Zero-order descent: what a bilevel method has to beat, for it needs no derivative at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from birl_ext.bilevel.algorithm import Algorithm
from birl_ext.bilevel.guards import (
    check_gradient,
    check_kind,
    check_number,
    check_objective,
    check_seed,
    make_optimiser,
    no_path,
    reaches,
    take_step,
)
from birl_ext.bilevel.problem import BilevelProblem, evaluate_at
from birl_ext.bilevel.variables import (
    Variables,
    check_start,
    drawn,
    give,
    joined,
    leaves,
    named,
    rebuilt,
    split,
    tracked,
)
from birl_ext.errors import OptionError
from birl_ext.model import checks as validation

__all__ = ["ZeroOrder", "ZeroOrderOutcome"]


class ZeroOrderOutcome(NamedTuple):
    """One outer step, taken at the x before it; tensors are scalars, or (M,) with many starts."""

    objective: Tensor
    gradient_norm: Tensor
    """Of the estimate: about √d times too large, by the length of Z."""


class ZeroOrder(Algorithm[ZeroOrderOutcome]):
    """Two exact solves per outer step, in one Gaussian direction.

        ∇φ̂ = (φ(x + uZ) − φ(x)) Z/u,   Z ~ N(0, I)

    Its mean is the gradient of φ smoothed by N(0, u²I), its variance grows with the number of
    variables.

    Args:
        problem: the two levels.
        x: start, (d,), or (M, d) for many starts at once; or another of the forms of
            `BilevelProblem`; copied.
        temperature: τ, units of reward.
        optimiser: from a list of parameters to any torch optimiser; one that asks again gets
            another direction.
        radius: u, units of x.
        seed: of the directions.

    Both levels must lead to x in autograd's graph, although nothing is differentiated: that tells
    an objective that ignores x from one that is flat.

    Source: Nesterov and Spokoiny (2017).
    """

    STATE = ("x", "optimiser", "generator", "steps")

    def __init__(
        self,
        problem: BilevelProblem,
        x: Variables,
        *,
        temperature: float | Tensor,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        radius: float,
        seed: int = 0,
    ) -> None:
        validation.check_temperature(temperature)
        check_kind("problem", problem, BilevelProblem)
        self.problem = problem
        self.x = tracked(check_start(x))
        self.temperature = temperature
        self.radius = check_number("radius", radius, above=True)
        self.generator = torch.Generator().manual_seed(check_seed(seed))
        self.optimiser = make_optimiser(optimiser, leaves(self.x))
        self.steps = 0
        self._traced = False

    def step(self) -> ZeroOrderOutcome:
        """One outer step on x.

        Raises:
            GradientError: either level does not depend on x, or φ is not finite.
            NonFiniteResultError: the optimiser would make x infinite or NaN. After any error x and
                the generator are what they were.
        """
        outcomes: list[ZeroOrderOutcome] = []

        def closure() -> float:
            if not self._traced:
                self._check_paths()
            objective, gradient = self.estimate()
            give(self.x, split(gradient, self.x))
            norm = gradient.reshape(*objective.shape, -1).norm(dim=-1)
            outcomes.append(ZeroOrderOutcome(objective, norm))
            return float(objective.sum())

        kept = self.generator.get_state()
        try:
            take_step(self.optimiser, named(self.x), closure, self.steps)
        except BaseException:
            self.generator.set_state(kept)
            raise
        self.steps += 1
        return outcomes[0]

    def estimate(self) -> tuple[Tensor, Tensor]:
        """φ, exactly, and ∇φ̂ at the present x: in its shape if it is a tensor, else (d,)."""
        direction, moved = [], []
        for name, leaf in named(self.x).items():
            here = leaf.detach()
            direction.append(drawn(here, self.generator))
            moved.append(here + self.radius * direction[-1])
            if torch.equal(moved[-1], here) and here.numel():
                raise OptionError(
                    f"radius is {self.radius:g}, which rounding takes off {name}",
                    where=f"outer step {self.steps}",
                    allowed=f"a step that {name} can hold",
                    fix=f"use a radius of {_least_radius(here):.0e} or more",
                )
        aside = rebuilt(self.x, moved)
        with torch.no_grad():
            here, solution = self.problem.evaluate(self.x, self.temperature)
            there = self.problem.objective(aside, self.temperature, solution.value)
        for objective in (here, there):
            check_objective(objective, self.steps)
        slope = (there - here) / self.radius  # one per start, along the first axis of x
        gradient = slope.unsqueeze(-1) * joined(direction, slope.shape)
        if isinstance(self.x, Tensor):
            gradient = gradient.reshape(self.x.shape)
        check_gradient(gradient, self.steps)
        return here, gradient

    def _check_paths(self) -> None:
        """Refuse an objective that does not depend on x; once, as it costs a solve of its own."""
        objective, _ = evaluate_at(self.problem, self.x, self.temperature, step=self.steps)
        own = named(self.x)
        if not reaches([objective], *own.values()):
            raise no_path()
        for name, leaf in own.items():
            if not reaches([objective], leaf):
                raise no_path(name)
        self._traced = True


def _least_radius(x: Tensor) -> float:
    """With half of the digits of x, where a difference has the most."""
    return float(x.abs().amax().clamp(min=1.0)) * math.sqrt(torch.finfo(x.dtype).eps)
