"""Equations of motion with noise: dynamics that have a density, which x may move."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from birl_ext.errors import GradientError, OptionError, ShapeError
from birl_ext.simulators.equations import Dynamics

__all__ = ["NoisyDynamics"]


class NoisyDynamics:
    """Normal noise on some entries of the state, such as the velocities.

        s' = f_x(s, a) + σ ε,   ε ~ N(0, I)

    x may move the entries that have noise, and no others: of those P_x has no density
    (`require_density`). Where an episode ends is what f says; it must not depend on x.

    Args:
        dynamics: f, as `step`; computed from x by torch.
        deviation: σ, (d,), units of each entry of the state; zero where there is no noise. An entry
            with noise must be one that `state_of` finds whole: no angle up to its turns.
    """

    def __init__(self, dynamics: Dynamics, deviation: Sequence[float] | Tensor) -> None:
        self.dynamics = dynamics
        self.observation_size = dynamics.observation_size
        sigma = torch.as_tensor(deviation, dtype=torch.float64)
        if sigma.dim() != 1 or not len(sigma):
            raise ShapeError(f"deviation has shape {tuple(sigma.shape)}", allowed="(d,)")
        if not bool(((sigma >= 0) & sigma.isfinite()).all()) or not bool((sigma > 0).any()):
            raise OptionError(
                f"deviation is {sigma.tolist()}",
                allowed="finite numbers, 0 or more, and one of them more than 0",
                fix="give noise to an entry that x moves",
            )
        self.deviation = sigma
        self._shaken = sigma > 0

    def state_of(self, observation: Tensor) -> Tensor:
        return self.dynamics.state_of(observation)

    def observe(self, state: Tensor) -> Tensor:
        return self.dynamics.observe(state)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """f, the mean of what follows, (n, d), and whether the episode ends with it, (n,) bool."""
        mean, ended = self.dynamics.step(state, action)
        if mean.shape[-1] != len(self.deviation):
            raise ShapeError(
                f"deviation has {len(self.deviation)} entries, a state {mean.shape[-1]}",
                allowed="one for each entry of the state",
            )
        return mean, ended

    def draw(
        self, state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What follows, (n, d), and whether the episode ends with it, (n,) bool."""
        mean, ended = self.step(state, action)
        shock = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.deviation.to(mean) * shock, ended

    def log_prob(self, observation: Tensor, action: Tensor, successor: Tensor) -> Tensor:
        """log P_x(s'|s, a) over the entries with noise, (n,)."""
        mean, _ = self.step(self.state_of(observation), action)
        there = self.state_of(successor)[:, self._shaken]
        sigma = self.deviation[self._shaken].to(mean)
        apart = (there - mean[:, self._shaken]) / sigma
        constant = sigma.log().sum() + len(sigma) * math.log(2 * math.pi) / 2
        return -apart.square().sum(-1) / 2 - constant

    def require_density(self, observation: Tensor, action: Tensor, *x: Tensor) -> None:
        """Raise unless x leaves alone what follows, to first order, where there is no noise.

        Args:
            observation, action: where to look.
            x: tensors that the equations are made from.

        Raises:
            GradientError: it moves an entry without noise.
        """
        mean, _ = self.step(self.state_of(observation), action)
        if not mean.requires_grad:
            return
        for entry in (~self._shaken).nonzero().flatten().tolist():
            # by the first row and by all of them: that both cancel is no accident
            for some in (mean[:1, entry], mean[:, entry]):
                moved = torch.autograd.grad(some.sum(), x, retain_graph=True, allow_unused=True)
                if any(part is not None and bool((part != 0).any()) for part in moved):
                    raise GradientError(
                        f"x moves entry {entry} of the state, which has no noise: "
                        "what follows has no density in x",
                        allowed="x in entries with noise alone",
                        fix="give it noise in `deviation`, or let x move velocities, and positions "
                        "follow from those before the step",
                    )
