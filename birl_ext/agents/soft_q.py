"""Soft Q-learning: the policy is the softmax of the critic."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.agent import check_discount, checked_reward
from birl_ext.agents.categorical import CategoricalPolicy
from birl_ext.agents.target import Target
from birl_ext.agents.temperature import Temperature
from birl_ext.environments.transitions import Transitions
from birl_ext.state import Stateful

__all__ = ["SoftQ"]


class SoftQ(Stateful, CategoricalPolicy):
    """Q from samples, and π = softmax(Q/τ).

        Q(s,a) ← r + γ (1 − terminated) V̄(s'),   V̄(s') = τ log Σ_a exp(Q̄(s',a)/τ)

    An episode that was cut off is continued by V̄; one that terminated is not.

    Args:
        network: observation (n, *O) → Q(s, ·), (n, A), units of reward; on the agent's device.
        discount: γ in [0, 1).
        temperature: fixed, or with an entropy target.
        optimiser: from parameters to any torch optimiser.
        target_rate, target_period: of the copy Q̄, see `Target`.

    Source: (M1) to (M3), sampled; Haarnoja et al. (2017).
    """

    STATE = ("network", "_target", "optimiser", "_temperature", "version")

    def __init__(
        self,
        network: nn.Module,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        target_rate: float = 1.0,
        target_period: int = 1000,
    ) -> None:
        self.network = network
        self.discount = check_discount(discount)
        self.optimiser = optimiser(network.parameters())
        self.version = 0
        self._temperature = temperature
        self._target = Target(network, rate=target_rate, period=target_period)

    @property
    def temperature(self) -> float:
        return self._temperature.value

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def q(self, observation: Tensor) -> Tensor:
        """Q(s, ·), (n, A)."""
        values: Tensor = self.network(observation)
        return values

    def log_probs(self, observation: Tensor) -> Tensor:
        """log π(·|s) = (Q(s,·) − V(s))/τ, (n, A)."""
        return (self.q(observation) / self.temperature).log_softmax(-1)

    def update(self, batch: Transitions, reward: Tensor) -> dict[str, float]:
        """One step on the mean squared Bellman error.

        Args:
            reward: (n,), the learned reward of the batch, of this moment.

        Returns:
            loss, mean Q and the entropy of π (nats) over the batch, and τ.
        """
        tau = self.temperature
        following = tau * (self._target(batch.next_observation) / tau).logsumexp(-1)
        goal = checked_reward(batch, reward) + self.discount * following * ~batch.terminated
        table: Tensor = self.network(batch.observation)
        chosen = table.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        loss = nn.functional.mse_loss(chosen, goal)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self._target.follow()
        log_policy = (table.detach() / tau).log_softmax(-1)
        entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
        self._temperature.update(entropy)
        self.version += 1
        found = torch.stack([loss.detach(), chosen.detach().mean(), entropy]).tolist()
        return dict(zip(("loss", "q", "entropy"), found, strict=True)) | {"temperature": tau}
