"""Soft actor-critic with a finite number of actions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.agent import check_discount, checked_reward
from birl_ext.agents.categorical import CategoricalPolicy
from birl_ext.agents.networks import Twin
from birl_ext.agents.target import Target, snapshot
from birl_ext.agents.temperature import Temperature
from birl_ext.agents.transitions import Transitions

__all__ = ["DiscreteSAC"]


class DiscreteSAC(CategoricalPolicy):
    """An actor and twin critics; expectations over actions are sums.

        Q_i(s,a) ← r + γ (1 − terminated) V̄(s'),
        V̄(s') = Σ_a π(a|s') [ min_i Q̄_i(s',a) − τ log π(a|s') ]
        π: min Σ_a π(a|s) [ τ log π(a|s) − min_i Q_i(s,a) ]

    An episode that was cut off is continued by V̄; one that terminated is not.

    Args:
        actor: observation (n, *O) → logits (n, A).
        critics: observation (n, *O) → (2, n, A), units of reward.
        discount: γ in [0, 1).
        temperature: fixed, or with an entropy target.
        optimiser: from parameters to any torch optimiser; called for the actor and the critics.
        target_rate, target_period: of the copies Q̄, see `Target`.

    Source: Haarnoja et al. (2018); Christodoulou (2019).
    """

    def __init__(
        self,
        actor: nn.Module,
        critics: Twin,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        target_rate: float = 1.0,
        target_period: int = 2000,
    ) -> None:
        self.actor = actor
        self.critics = critics
        self.discount = check_discount(discount)
        self.actor_optimiser = optimiser(actor.parameters())
        self.critic_optimiser = optimiser(critics.parameters())
        self.version = 0
        self._temperature = temperature
        self._target = Target(critics, rate=target_rate, period=target_period)

    @property
    def temperature(self) -> float:
        return self._temperature.value

    @property
    def device(self) -> torch.device:
        return next(self.actor.parameters()).device

    @torch.no_grad()
    def q(self, observation: Tensor) -> Tensor:
        """min_i Q_i(s, ·), (n, A)."""
        values: Tensor = self.critics(observation)
        return values.amin(0)

    @torch.no_grad()
    def log_probs(self, observation: Tensor) -> Tensor:
        """log π(·|s), (n, A)."""
        return self._log_policy(observation)

    def update(self, batch: Transitions, reward: Tensor) -> dict[str, float]:
        """One step of the critics, then one of the actor, then one of τ.

        Args:
            reward: (n,), the learned reward of the batch, of this moment.

        Returns:
            losses, mean Q and the entropy of π (nats) over the batch, and τ.
        """
        tau = self.temperature
        with torch.no_grad():
            log_next = self._log_policy(batch.next_observation)
            lowest = self._target(batch.next_observation).amin(0)
            following = (log_next.exp() * (lowest - tau * log_next)).sum(-1)
            goal = checked_reward(batch, reward) + self.discount * following * ~batch.terminated
        tables: Tensor = self.critics(batch.observation)
        index = batch.action.expand(2, -1).unsqueeze(-1)
        chosen = tables.gather(-1, index).squeeze(-1)
        critic_loss = (chosen - goal).square().mean(-1).sum()
        self.critic_optimiser.zero_grad()
        critic_loss.backward()  # type: ignore[no-untyped-call]
        self.critic_optimiser.step()
        self._target.follow()

        log_policy = self._log_policy(batch.observation)
        policy = log_policy.exp()
        actor_loss = (policy * (tau * log_policy - self.q(batch.observation))).sum(-1).mean()
        self.actor_optimiser.zero_grad()
        actor_loss.backward()  # type: ignore[no-untyped-call]
        self.actor_optimiser.step()

        entropy = -(policy * log_policy).sum(-1).mean().detach()
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
            "version": self.version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.actor.load_state_dict(state["actor"])
        self.critics.load_state_dict(state["critics"])
        self._target.load_state_dict(state["target"])
        self.actor_optimiser.load_state_dict(copy.deepcopy(state["actor_optimiser"]))
        self.critic_optimiser.load_state_dict(copy.deepcopy(state["critic_optimiser"]))
        self._temperature.load_state_dict(state["temperature"])
        self.version = int(state["version"])

    def _log_policy(self, observation: Tensor) -> Tensor:
        logits: Tensor = self.actor(observation)
        return logits.log_softmax(-1)
