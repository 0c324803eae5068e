"""Successor features, learned beside an agent: what the critic estimator of the score needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.agent import check_discount
from birl_ext.agents.target import Target
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import NonFiniteInputError, ShapeError
from birl_ext.state import Stateful

__all__ = ["SuccessorFeatures"]


class DiscretePolicy(Protocol):
    """What acts."""

    def probabilities(self, observation: Tensor, /) -> Tensor:
        """π(·|s), (n, A)."""
        ...


class SuccessorFeatures(Stateful):
    """M(s, a) = E[ Σ_k γᵏ ψ(s_k, a_k) ] from replay, by temporal differences.

        M(s, a) ← ψ(s, a) + γ Σ_a' π(a'|s') M̄(s', a')

    The batch may come from any policy: the expectation over a' is that of the present one. The
    network learns (1 − γ) M, which is as large as ψ, whatever γ.

    Args:
        network: observation (n, *O) → (n, A·F).
        features: observation (n, *O) → ψ(s, ·), (n, A, F); no gradient passes through it. While it
            changes, M follows with a delay.
        discount: γ of the lower level.
        optimiser: from parameters to any torch optimiser.
        target_rate, target_period: of the copy M̄, see `Target`.

    Source: Dayan (1993); Barreto et al. (2017).
    """

    STATE = ("network", "_target", "optimiser")  # the features have one of their own

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[Tensor], Tensor],
        *,
        discount: float,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        target_rate: float = 0.01,
        target_period: int = 1,
    ) -> None:
        self.network = network
        self.features = features
        self.discount = check_discount(discount)
        self.optimiser = optimiser(network.parameters())
        self._target = Target(network, rate=target_rate, period=target_period)

    @torch.no_grad()
    def __call__(self, observation: Tensor) -> Tensor:
        """M(s, ·), (n, A, F), without a gradient."""
        like = self.features(observation)
        return self._shaped(self.network(observation), like) / (1 - self.discount)

    def update(self, batch: Transitions, policy: DiscretePolicy) -> dict[str, float]:
        """One gradient step.

        Args:
            batch: n transitions with discrete actions, from any policy.
            policy: whose successor features are learned, held fixed.

        Returns:
            `features_loss`: mean square of the temporal difference of (1 − γ) M, units of ψ².

        Raises:
            ShapeError: the network's output does not fit the features.
            NonFiniteInputError: a feature is NaN or infinite.
        """
        row = torch.arange(batch.size, device=batch.observation.device)
        with torch.no_grad():
            table = self.features(batch.observation)
            if not bool(table.isfinite().all()):
                first = int((~table.isfinite()).flatten(1).any(-1).nonzero()[0])
                raise NonFiniteInputError(
                    "a feature is not finite",
                    where=f"row {first} of the batch",
                    fix="the reward's parameters have diverged: lower their learning rate",
                )
            after = self._shaped(self._target(batch.next_observation), table)
            share = policy.probabilities(batch.next_observation).to(after)
            ahead = (share.unsqueeze(-1) * after).sum(1) * ~batch.terminated.unsqueeze(-1)
            goal = (1 - self.discount) * table[row, batch.action] + self.discount * ahead
        found = self._shaped(self.network(batch.observation), table)[row, batch.action]
        loss = (found - goal).square().mean()
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self._target.follow()
        return {"features_loss": float(loss.detach())}

    @staticmethod
    def _shaped(output: Tensor, like: Tensor) -> Tensor:
        """(n, A·F) → (n, A, F)."""
        if like.dim() != 3 or output.shape != (len(like), like.shape[1] * like.shape[2]):
            raise ShapeError(
                f"the network returned shape {tuple(output.shape)}, the features "
                f"{tuple(like.shape)}",
                allowed="(n, A·F) and (n, A, F)",
            )
        return output.view(like.shape)
