"""Soft Q-learning: the policy is the softmax of the critic."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.categorical import CategoricalPolicy, entropy
from birl_ext.agents.learner import Learner
from birl_ext.agents.temperature import Temperature
from birl_ext.environments.transitions import Transitions

__all__ = ["SoftQ"]


class SoftQ(Learner, CategoricalPolicy):
    """Q from samples, and π = softmax(Q/τ).

        Q(s,a) ← r + γ (1 − terminated) V̄(s'),   V̄(s') = τ log Σ_a exp(Q̄(s',a)/τ)

    An episode that was cut off is continued by V̄; one that terminated is not.

    Args:
        network: observation (n, *O) → Q(s, ·), (n, A), units of reward; on the agent's device.
        discount: γ in [0, 1).
        temperature: fixed, or with an entropy target.
        optimiser: from parameters to any torch optimiser.
        target_rate, target_period: of the copy Q̄, see `Target`.
        anneal_over: see `Learner`.

    Source: (M1) to (M3), sampled; Haarnoja et al. (2017).
    """

    STATE = ("network", "optimiser")

    def __init__(
        self,
        network: nn.Module,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        target_rate: float = 1.0,
        target_period: int = 1000,
        anneal_over: int | None = None,
    ) -> None:
        super().__init__(
            network,
            network,
            discount=discount,
            temperature=temperature,
            optimiser=optimiser,
            target_rate=target_rate,
            target_period=target_period,
            anneal_over=anneal_over,
        )
        self.network = network
        self.optimiser = self._optimiser(network.parameters())

    @torch.no_grad()
    def q(self, observation: Tensor) -> Tensor:
        """Q(s, ·), (n, A)."""
        values: Tensor = self.network(observation)
        return values

    def log_probs(self, observation: Tensor) -> Tensor:
        """log π(·|s) = (Q(s,·) − V(s))/τ, (n, A)."""
        return (self.q(observation) / self.temperature).log_softmax(-1)

    def update(
        self, batch: Transitions, reward: Tensor, present: Tensor | None = None
    ) -> dict[str, float]:
        """One step on the mean squared Bellman error.

        Args:
            batch, reward, present: see `Agent.update`.

        Returns:
            loss, mean Q and the entropy of π (nats) over the batch, and τ.
        """
        tau = self.temperature
        self._anneal()
        batch, goal = self.goal(batch, reward, present)
        table: Tensor = self.network(batch.observation)
        chosen = _of(table, batch.action)
        loss = nn.functional.mse_loss(chosen, goal)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self._target.follow()
        log_policy = (table.detach() / tau).log_softmax(-1)
        spread = entropy(log_policy).mean()
        self._temperature.update(spread)
        self.version += 1
        found = torch.stack([loss.detach(), chosen.detach().mean(), spread]).tolist()
        return dict(zip(("loss", "q", "entropy"), found, strict=True)) | {"temperature": tau}

    def chosen(self, critics: Callable[..., Tensor], observation: Tensor, action: Tensor) -> Tensor:
        """Q(s, a), (1, n)."""
        return _of(critics(observation), action).unsqueeze(0)

    def _following(self, observation: Tensor) -> Tensor:
        """V̄(s) = τ log Σ_a exp(Q̄(s,a)/τ), (n,)."""
        tau = self.temperature
        return tau * (self._target(observation) / tau).logsumexp(-1)

    def _entropy(self, observation: Tensor) -> Tensor:
        """Of softmax(Q̄/τ), whose V̄ it is, (n,)."""
        return entropy((self._target(observation) / self.temperature).log_softmax(-1))


def _of(table: Tensor, action: Tensor) -> Tensor:
    """(n, A) → (n,)."""
    return table.gather(-1, action.unsqueeze(-1)).squeeze(-1)
