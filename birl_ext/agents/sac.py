"""Soft actor-critic with a box of actions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.actor_critic import ActorCritic
from birl_ext.agents.agent import check_drawn
from birl_ext.agents.networks import Twin
from birl_ext.agents.squashed import SquashedGaussian
from birl_ext.agents.temperature import Temperature
from birl_ext.errors import ShapeError

__all__ = ["SAC"]


class SAC(ActorCritic):
    """A tanh-squashed Gaussian actor and twin critics.

        Q_i(s,a) ← r + γ (1 − terminated) [ min_i Q̄_i(s',a') − τ log p(u') ],   a' ~ π(·|s')
        π: min E[ τ log p(u) − min_i Q_i(s, a(u)) ],
        a(u) = centre + half · u,   u in (−1, 1)^d

    The entropy is that of u, so τ and its target do not depend on the units of the action;
    `log_prob` is the density of a itself, lower by Σ log half. An episode that was cut off is
    continued; one that terminated is not.

    Args:
        actor: observation (n, *O) → (n, 2d): the mean and log σ before the tanh.
        critics: observation (n, *O), action (n, d) → (2, n), units of reward. They see actions as
            u, in (−1, 1).
        low, high: (d,), the box, finite.
        discount: γ in [0, 1).
        temperature: fixed, or with an entropy target.
        optimiser: from parameters to any torch optimiser; called for the actor and the critics.
        target_rate, target_period: of the copies Q̄, see `Target`.
        anneal_over: see `Learner`.
        seed: of the actions drawn in updates.

    Source: Haarnoja et al. (2018).
    """

    STATE = ("_generator",)

    def __init__(
        self,
        actor: nn.Module,
        critics: Twin,
        *,
        low: Tensor,
        high: Tensor,
        discount: float,
        temperature: Temperature,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        target_rate: float = 0.005,
        target_period: int = 1,
        anneal_over: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            actor,
            critics,
            discount=discount,
            temperature=temperature,
            optimiser=optimiser,
            target_rate=target_rate,
            target_period=target_period,
            anneal_over=anneal_over,
        )
        self._generator = torch.Generator(self.device).manual_seed(seed)
        low, high = (edge.to(self.device, torch.float32) for edge in (low, high))
        whole = low.dim() == 1 and low.shape == high.shape
        if not whole or not bool(((low < high) & low.isfinite() & high.isfinite()).all()):
            raise ShapeError(
                f"low is {low.tolist()}, high is {high.tolist()}",
                allowed="(d,) each, finite, low < high",
            )
        self._low, self._high = low, high
        self._centre = (low + high) / 2
        self._half = (high - low) / 2

    @torch.no_grad()
    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """a ~ π(·|s), (n, d).

        Raises:
            NonFiniteResultError: the mean or σ is NaN.
        """
        return self._to_box(self._policy(observation).rsample(generator)[0])

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator, greedy: bool = False) -> Tensor:
        """`sample`, or centre + half · tanh(mean) if `greedy`, (n, d).

        Raises:
            NonFiniteResultError: what acts is NaN: the mean or, unless `greedy`, σ.
        """
        if greedy:
            return self._to_box(self._policy(observation).mode())
        return self.sample(observation, generator)

    @torch.no_grad()
    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), (n,), a density per unit of action."""
        unit = self._to_unit(action)
        return self._policy(observation).log_prob(unit) - self._half.log().sum()

    @torch.no_grad()
    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        """min_i Q_i(s, a), (n,)."""
        values: Tensor = self.critics(observation, self._to_unit(action))
        return values.amin(0)

    def _following(self, observation: Tensor) -> Tensor:
        """min_i Q̄_i(s, a) − τ log p(u) of a drawn action, (n,)."""
        drawn, log_prob = self._policy(observation).rsample(self._generator)
        return self._target(observation, drawn).amin(0) - self.temperature * log_prob

    def _entropy(self, observation: Tensor) -> Tensor:
        """Of u, from one draw."""
        return -self._policy(observation).rsample(self._generator)[1]

    def chosen(self, critics: Callable[..., Tensor], observation: Tensor, action: Tensor) -> Tensor:
        """Q_i(s, a), (2, n)."""
        return critics(observation, self._to_unit(action))

    def _actor_loss(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """E[ τ log p(u) − min_i Q_i(s, a(u)) ], and the entropy of u."""
        drawn, log_prob = self._policy(observation).rsample(self._generator)
        lowest = self.critics(observation, drawn).amin(0)
        loss = (self.temperature * log_prob - lowest).mean()
        return loss, -log_prob.mean().detach()

    def _policy(self, observation: Tensor) -> SquashedGaussian:
        output: Tensor = self.actor(observation)
        if output.shape[-1] != 2 * len(self._half):
            raise ShapeError(
                f"the actor returned shape {tuple(output.shape)}",
                allowed=f"(n, {2 * len(self._half)}): mean and log σ of each action",
            )
        return SquashedGaussian(*output.chunk(2, -1))

    def _to_box(self, unit: Tensor) -> Tensor:
        check_drawn(unit)
        # Rounding may step over the edge by a unit in the last place.
        return (self._centre + self._half * unit).clamp(self._low, self._high)

    def _to_unit(self, action: Tensor) -> Tensor:
        return (action - self._centre) / self._half
