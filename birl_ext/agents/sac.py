"""Soft actor-critic with a box of actions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.agent import check_discount, checked_reward
from birl_ext.agents.networks import Twin
from birl_ext.agents.squashed import SquashedGaussian
from birl_ext.agents.target import Target, snapshot
from birl_ext.agents.temperature import Temperature
from birl_ext.agents.transitions import Transitions
from birl_ext.errors import ShapeError

__all__ = ["SAC"]


class SAC:
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
        seed: of the actions drawn in updates.

    Source: Haarnoja et al. (2018).
    """

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
        seed: int = 0,
    ) -> None:
        self.actor = actor
        self.critics = critics
        self.discount = check_discount(discount)
        self.actor_optimiser = optimiser(actor.parameters())
        # What the actor's loss is differentiated in: the critics only pass its gradient on.
        self._learned = [p for p in actor.parameters() if p.requires_grad]
        self.critic_optimiser = optimiser(critics.parameters())
        self.version = 0
        self._temperature = temperature
        self._target = Target(critics, rate=target_rate, period=target_period)
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

    @property
    def temperature(self) -> float:
        return self._temperature.value

    @property
    def device(self) -> torch.device:
        return next(self.actor.parameters()).device

    @torch.no_grad()
    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """a ~ π(·|s), (n, d)."""
        return self._to_box(self._policy(observation).rsample(generator)[0])

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator, greedy: bool = False) -> Tensor:
        """`sample`, or centre + half · tanh(mean) if `greedy`, (n, d)."""
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

    def update(self, batch: Transitions, reward: Tensor) -> dict[str, float]:
        """One step of the critics, then one of the actor, then one of τ.

        Args:
            reward: (n,), the learned reward of the batch, of this moment.

        Returns:
            losses, mean Q and the entropy of u (nats) over the batch, and τ.
        """
        tau = self.temperature
        with torch.no_grad():
            after, log_after = self._policy(batch.next_observation).rsample(self._generator)
            following = self._target(batch.next_observation, after).amin(0) - tau * log_after
            goal = checked_reward(batch, reward) + self.discount * following * ~batch.terminated
        chosen: Tensor = self.critics(batch.observation, self._to_unit(batch.action))
        critic_loss = (chosen - goal).square().mean(-1).sum()
        self.critic_optimiser.zero_grad()
        critic_loss.backward()  # type: ignore[no-untyped-call]
        self.critic_optimiser.step()
        self._target.follow()

        drawn, log_drawn = self._policy(batch.observation).rsample(self._generator)
        lowest = self.critics(batch.observation, drawn).amin(0)
        actor_loss = (tau * log_drawn - lowest).mean()
        self.actor_optimiser.zero_grad()
        actor_loss.backward(inputs=self._learned)
        self.actor_optimiser.step()

        entropy = -log_drawn.mean().detach()
        self._temperature.update(entropy)
        self.version += 1
        losses = (critic_loss.detach(), actor_loss.detach(), chosen.detach().mean(), entropy)
        names = ("critic_loss", "actor_loss", "q", "entropy")
        found = torch.stack(losses).tolist()
        return dict(zip(names, found, strict=True)) | {"temperature": tau}

    def state_dict(self) -> dict[str, Any]:
        return {
            "actor": snapshot(self.actor),
            "critics": snapshot(self.critics),
            "target": self._target.state_dict(),
            "actor_optimiser": copy.deepcopy(self.actor_optimiser.state_dict()),
            "critic_optimiser": copy.deepcopy(self.critic_optimiser.state_dict()),
            "temperature": self._temperature.state_dict(),
            "generator": self._generator.get_state(),
            "version": self.version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.actor.load_state_dict(state["actor"])
        self.critics.load_state_dict(state["critics"])
        self._target.load_state_dict(state["target"])
        self.actor_optimiser.load_state_dict(copy.deepcopy(state["actor_optimiser"]))
        self.critic_optimiser.load_state_dict(copy.deepcopy(state["critic_optimiser"]))
        self._temperature.load_state_dict(state["temperature"])
        self._generator.set_state(state["generator"])
        self.version = int(state["version"])

    def _policy(self, observation: Tensor) -> SquashedGaussian:
        output: Tensor = self.actor(observation)
        if output.shape[-1] != 2 * len(self._half):
            raise ShapeError(
                f"the actor returned shape {tuple(output.shape)}",
                allowed=f"(n, {2 * len(self._half)}): mean and log σ of each action",
            )
        return SquashedGaussian(*output.chunk(2, -1))

    def _to_box(self, unit: Tensor) -> Tensor:
        # Rounding may step over the edge by a unit in the last place.
        return (self._centre + self._half * unit).clamp(self._low, self._high)

    def _to_unit(self, action: Tensor) -> Tensor:
        return (action - self._centre) / self._half
