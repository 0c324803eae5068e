"""Soft actor-critic with a finite number of actions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.actor_critic import ActorCritic
from birl_ext.agents.categorical import CategoricalPolicy, entropy
from birl_ext.agents.networks import Twin
from birl_ext.agents.temperature import Temperature

__all__ = ["DiscreteSAC"]


class DiscreteSAC(ActorCritic, CategoricalPolicy):
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
        anneal_over: see `Learner`.

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
        anneal_over: int | None = None,
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

    @torch.no_grad()
    def q(self, observation: Tensor) -> Tensor:
        """min_i Q_i(s, ·), (n, A)."""
        values: Tensor = self.critics(observation)
        return values.amin(0)

    @torch.no_grad()
    def log_probs(self, observation: Tensor) -> Tensor:
        """log π(·|s), (n, A)."""
        return self._log_policy(observation)

    def _following(self, observation: Tensor) -> Tensor:
        """V̄(s), (n,)."""
        log_policy = self._log_policy(observation)
        lowest = self._target(observation).amin(0)
        return (log_policy.exp() * (lowest - self.temperature * log_policy)).sum(-1)

    def _entropy(self, observation: Tensor) -> Tensor:
        return entropy(self._log_policy(observation))

    def chosen(self, critics: Callable[..., Tensor], observation: Tensor, action: Tensor) -> Tensor:
        """Q_i(s, a), (2, n)."""
        index = action.expand(2, -1).unsqueeze(-1)
        return critics(observation).gather(-1, index).squeeze(-1)

    def _actor_loss(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """E[ Σ_a π(a|s) (τ log π(a|s) − min_i Q_i(s,a)) ], and the entropy of π."""
        log_policy = self._log_policy(observation)
        policy = log_policy.exp()
        gap = self.temperature * log_policy - self.q(observation)
        loss = (policy * gap).sum(-1).mean()
        return loss, entropy(log_policy).mean().detach()

    def _log_policy(self, observation: Tensor) -> Tensor:
        logits: Tensor = self.actor(observation)
        return logits.log_softmax(-1)
