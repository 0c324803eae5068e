"""Zero-order descent: what a bilevel method has to beat, for it needs no derivative at all."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Descent, Maker
from birl_ext.bilevel.guards import (
    check_gradient,
    check_kind,
    check_number,
    check_objective,
    check_seed,
    no_path,
    reaches,
)
from birl_ext.bilevel.problem import BilevelProblem, evaluate_at
from birl_ext.errors import OptionError
from birl_ext.model import checks

__all__ = ["ZeroOrder", "ZeroOrderOutcome"]


class ZeroOrderOutcome(NamedTuple):
    """One outer step, taken at the x before it; tensors are scalars, or (M,) with many starts."""

    objective: Tensor
    gradient_norm: Tensor
    """Of the estimate: about √d times too large, by the length of Z."""


class ZeroOrder(Descent[ZeroOrderOutcome]):
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

    STATE = ("generator",)

    def __init__(
        self,
        problem: BilevelProblem,
        x: variables.Variables,
        *,
        temperature: float | Tensor,
        optimiser: Maker,
        radius: float,
        seed: int = 0,
    ) -> None:
        checks.check_temperature(temperature)
        check_kind("problem", problem, BilevelProblem)
        self.problem = problem
        self.temperature = temperature
        self.radius = check_number("radius", radius, above=True)
        self.generator = torch.Generator().manual_seed(check_seed(seed))
        self._begin(x, optimiser)
        self._traced = False

    def step(self) -> ZeroOrderOutcome:
        """One outer step on x.

        Raises:
            GradientError: either level does not depend on x, or φ is not finite.
            NonFiniteResultError: the optimiser would make x infinite or NaN. After any error x and
                the generator are what they were.
        """

        def evaluate() -> tuple[ZeroOrderOutcome, list[Tensor]]:
            if not self._traced:
                self._check_paths()
            objective, gradient = self.estimate()
            norm = gradient.reshape(*objective.shape, -1).norm(dim=-1)
            return ZeroOrderOutcome(objective, norm), variables.split(gradient, self.x)

        return self._take(evaluate)

    def estimate(self) -> tuple[Tensor, Tensor]:
        """φ, exactly, and ∇φ̂ at the present x: in its shape if it is a tensor, else (d,)."""
        direction, moved = [], []
        for name, leaf in variables.named(self.x).items():
            here = leaf.detach()
            direction.append(variables.drawn(here, self.generator))
            moved.append(here + self.radius * direction[-1])
            if torch.equal(moved[-1], here) and here.numel():
                raise OptionError(
                    f"radius is {self.radius:g}, which rounding takes off {name}",
                    where=f"outer step {self.steps}",
                    allowed=f"a step that {name} can hold",
                    fix=f"use a radius of {_least_radius(here):.0e} or more",
                )
        aside = variables.rebuilt(self.x, moved)
        with torch.no_grad():
            here, solution = self.problem.evaluate(self.x, self.temperature)
            there = self.problem.objective(aside, self.temperature, solution.value)
        for objective in (here, there):
            check_objective(objective, self.steps)
        slope = (there - here) / self.radius  # one per start, along the first axis of x
        gradient = slope.unsqueeze(-1) * variables.joined(direction, slope.shape)
        if isinstance(self.x, Tensor):
            gradient = gradient.reshape(self.x.shape)
        check_gradient(gradient, self.steps)
        return here, gradient

    def _check_paths(self) -> None:
        """Refuse an objective that does not depend on x; once, as it costs a solve of its own."""
        objective, _ = evaluate_at(self.problem, self.x, self.temperature, step=self.steps)
        own = variables.named(self.x)
        if not reaches([objective], *own.values()):
            raise no_path()
        for name, leaf in own.items():
            if not reaches([objective], leaf):
                raise no_path(name)
        self._traced = True


def _least_radius(x: Tensor) -> float:
    """With half of the digits of x, where a difference has the most."""
    return float(x.abs().amax().clamp(min=1.0)) * math.sqrt(torch.finfo(x.dtype).eps)
