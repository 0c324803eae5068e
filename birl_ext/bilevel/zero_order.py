"""Zero-order descent: what a bilevel method has to beat, for it needs no derivative at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from birl_ext.bilevel.problem import BilevelProblem
from birl_ext.errors import OptionError

__all__ = ["Outcome", "ZeroOrder"]


class Outcome(NamedTuple):
    """One outer step, taken at the x before it; tensors are scalars, or (M,) with many starts."""

    objective: Tensor
    gradient_norm: Tensor
    """Of the estimate: about √d times too large, by the length of Z."""


class ZeroOrder:
    """Two exact solves per outer step, in one Gaussian direction.

        ∇φ̂ = (φ(x + uZ) − φ(x)) Z/u,   Z ~ N(0, I)

    Its mean is the gradient of φ smoothed by N(0, u²I), its variance grows with the number of
    variables.

    Args:
        problem: the two levels.
        x: start, (d,), or (M, d) for many starts at once; copied.
        temperature: τ, units of reward.
        optimiser: from a list of parameters to any torch optimiser that asks once per step.
        radius: u, units of x.
        seed: of the directions.

    Source: Nesterov and Spokoiny (2017).
    """

    def __init__(
        self,
        problem: BilevelProblem,
        x: Tensor,
        *,
        temperature: float | Tensor,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        radius: float,
        seed: int = 0,
    ) -> None:
        if not radius > 0:
            raise OptionError(f"radius is {radius!r}", allowed="more than 0")
        self.problem = problem
        self.x = x.detach().clone().requires_grad_()
        self.temperature = temperature
        self.optimiser = optimiser([self.x])
        self.radius = radius
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def step(self) -> Outcome:
        """One outer step on x."""
        objective, gradient = self.estimate()
        self.x.grad = gradient
        self.optimiser.step()
        self.steps += 1
        return Outcome(objective, gradient.norm(dim=-1))

    def estimate(self) -> tuple[Tensor, Tensor]:
        """φ, exactly, and ∇φ̂ at the present x."""
        x = self.x.detach()
        direction = torch.randn(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)
        with torch.no_grad():
            here, solution = self.problem.evaluate(x, self.temperature)
            there = self.problem.objective(
                x + self.radius * direction, self.temperature, solution.value
            )
        return here, ((there - here) / self.radius).unsqueeze(-1) * direction

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as a snapshot."""
        return {
            "x": self.x.detach().clone(),
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "generator": self.generator.get_state(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.x.copy_(state["x"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.generator.set_state(state["generator"])
        self.steps = int(state["steps"])
