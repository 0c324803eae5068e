"""Zero-order descent: what a bilevel method has to beat, for it needs no derivative at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.follower import Exact, Follower
from birl_ext.bilevel.guards import (
    check_count,
    check_gradient,
    check_kind,
    check_number,
    check_objective,
    no_path,
    reaches,
)
from birl_ext.bilevel.model_descent import ModelDescent
from birl_ext.bilevel.problem import BilevelProblem, Temperature, evaluate_at, temperature_at
from birl_ext.errors import OptionError

__all__ = ["ZeroOrder", "ZeroOrderOutcome"]


class ZeroOrderOutcome(NamedTuple):
    """One outer step, taken at the x before it; tensors are scalars, or (M,) with many starts."""

    objective: Tensor
    gradient_norm: Tensor
    """Of the estimate: about √d times too large, by the length of Z."""
    temperature: float | Tensor


class ZeroOrder(ModelDescent[ZeroOrderOutcome]):
    """Two or more answers of the follower per outer step, in Gaussian directions.

        ∇φ̂ = mean of (φ(x + uZ) − φ(x)) Z/u,   or of (φ(x + uZ) − φ(x − uZ)) Z/2u,   Z ~ N(0, I)

    Its mean is the gradient of φ smoothed by N(0, u²I), its variance grows with the number of
    variables.

    Args:
        problem: the two levels.
        x: start, (d,), or (M, d) for many starts at once; or another of the forms of
            `BilevelProblem`; copied.
        temperature: τ, or a schedule of it (see `geometric`).
        optimiser: from a list of parameters to any torch optimiser; one that asks again gets
            other directions.
        radius: u, units of x; or a schedule of it, from the outer step, as HPGD's
            ``lambda step: 0.1 / (step + 1)``.
        points: 1, the difference to φ(x), or 2, the central one; φ(x) is always known.
        directions: that are averaged.
        batched: whether they go into one solve, stacked along the axis of the starts as so many
            more of them: (K·M, d), or (K, d) where x is (d,). None: where x is (M, d).
        noise: standard deviation of Gaussian noise added to the estimate.
        seed: of the directions and the noise.
        follower: who answers the lower level; None: `Exact()`. What it carries is the value at x.

    Both levels must lead to x in autograd's graph, although nothing is differentiated: that tells
    an objective that ignores x from one that is flat.

    Source: Nesterov and Spokoiny (2017).
    """

    def __init__(
        self,
        problem: BilevelProblem,
        x: variables.Variables,
        *,
        temperature: Temperature,
        optimiser: Maker,
        radius: float | Callable[[int], float],
        points: int = 1,
        directions: int = 1,
        batched: bool | None = None,
        noise: float = 0.0,
        seed: int = 0,
        follower: Follower | None = None,
    ) -> None:
        super().__init__(
            problem,
            x,
            temperature=temperature,
            optimiser=optimiser,
            noise=noise,
            seed=seed,
            follower=follower,
        )
        self.radius = radius if callable(radius) else check_number("radius", radius, above=True)
        self.points = check_count("points", points, 1, below=3)
        self.directions = check_count("directions", directions)
        if batched is None:
            batched = bool(variables.starts(self.x))
        check_kind("batched", batched, bool)
        if batched and not isinstance(self.x, Tensor):
            raise OptionError(
                f"batched is True and x is a {type(x).__name__}",
                allowed="an x that is one tensor",
                fix="leave batched out",
            )
        self.batched = batched
        self._traced = False

    def estimate(self) -> tuple[Tensor, Tensor]:
        """φ and ∇φ̂ at the present x, from fresh directions: in its shape if it is a tensor, else
        (d,).
        """
        objective, gradient = self._drawn(temperature_at(self.temperature, self.steps))
        return objective, gradient.reshape(self.x.shape) if isinstance(self.x, Tensor) else gradient

    def _estimate(self, tau: float | Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self._traced:
            self._check_paths(tau)
        objective, gradient = self._drawn(tau)
        return objective, variables.split(gradient, self.x)

    def _drawn(self, tau: float | Tensor) -> tuple[Tensor, Tensor]:
        """φ, and ∇φ̂, (*starts, d)."""
        radius = self.radius
        if callable(radius):
            radius = check_number(f"radius({self.steps})", radius(self.steps), above=True)
        own = variables.named(self.x)
        drawn: list[list[Tensor]] = []
        for _ in range(self.directions):
            drawn.append([variables.drawn(leaf.detach(), self.generator) for leaf in own.values()])
            for (name, leaf), part in zip(own.items(), drawn[-1], strict=True):
                here = leaf.detach()
                if torch.equal(here + radius * part, here) and here.numel():
                    raise OptionError(
                        f"radius is {radius:g}, which rounding takes off {name}",
                        where=f"outer step {self.steps}",
                        allowed=f"a step that {name} can hold",
                        fix=f"use a radius of {_least_radius(here):.0e} or more",
                    )
        exact = isinstance(self.follower, Exact)  # which gains next to nothing from its last value
        carried = None if exact else self._value
        with torch.no_grad():
            mdp = self.problem.model(self.x)
            solution = self.follower.answer(mdp, tau, carried)
            here = self.problem.judge(self.x, solution)
            check_objective(here, self.steps)
            # sweeps from another value than those at x would measure that, not x
            nearby = solution.value if exact else carried
            axes = solution.value.dim() - 1
            there = self._moved(drawn, radius, tau, axes, nearby)
            other = here if self.points == 1 else self._moved(drawn, -radius, tau, axes, nearby)
        if not exact:
            self._value = solution.value
        slopes = (there - other) / (self.points * radius)  # (K, *starts)
        directions = torch.stack([variables.joined(parts, here.shape) for parts in drawn])
        gradient = (slopes.unsqueeze(-1) * directions).mean(0)
        check_gradient(gradient, self.steps)
        return here, gradient

    def _moved(
        self,
        drawn: list[list[Tensor]],
        radius: float,
        tau: float | Tensor,
        axes: int,
        value: Tensor | None,
    ) -> Tensor:
        """φ at x + uZ for each direction, (K, *starts); `axes`: of the lower level's batch."""
        count, leaves = len(drawn), variables.leaves(self.x)
        moved = [
            [leaf.detach() + radius * part for leaf, part in zip(leaves, parts, strict=True)]
            for parts in drawn
        ]
        own = variables.starts(self.x)
        if not self.batched or count == 1:
            found = [self._at(variables.rebuilt(self.x, parts), tau, value) for parts in moved]
            return torch.stack(found)
        stacked = torch.stack([parts[0] for parts in moved])
        if own:  # each start as often as there are directions
            stacked = stacked.flatten(0, 1)
            if isinstance(tau, Tensor) and tau.dim() == axes and tau.shape[0] == own[0]:
                tau = tau.repeat(count, *[1] * (tau.dim() - 1))
            if value is not None:
                value = value.repeat(count, *[1] * (value.dim() - 1))
        elif value is not None:
            value = value.expand(count, *value.shape)
        return self._at(stacked, tau, value).reshape(count, *own)

    def _at(self, x: variables.Variables, tau: float | Tensor, value: Tensor | None) -> Tensor:
        answer = self.follower.answer(self.problem.model(x), tau, value)
        objective: Tensor = self.problem.judge(x, answer)
        check_objective(objective, self.steps)
        return objective

    def _check_paths(self, tau: float | Tensor) -> None:
        """Refuse an objective that does not depend on x; once, as it costs a solve of its own."""
        objective, _ = evaluate_at(self.problem, self.x, tau, step=self.steps)
        own = variables.named(self.x)
        if not reaches([objective], *own.values()):
            raise no_path()
        for name, leaf in own.items():
            if not reaches([objective], leaf):
                raise no_path(name)
        self._traced = True

    def _outcome(self, phi: Tensor, norm: Tensor, tau: float | Tensor) -> ZeroOrderOutcome:
        return ZeroOrderOutcome(phi, norm, tau)


def _least_radius(x: Tensor) -> float:
    """With half of the digits of x, where a difference has the most."""
    return float(x.abs().amax().clamp(min=1.0)) * math.sqrt(torch.finfo(x.dtype).eps)
