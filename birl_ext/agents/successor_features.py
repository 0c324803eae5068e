"""Discounted sums under an agent's policy, learned beside it: successor features, what the critic
estimator of the score needs, and the value of an upper level's own reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.agent import check_discount
from birl_ext.agents.target import Target
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import NonFiniteInputError, ShapeError
from birl_ext.state import Stateful

__all__ = ["ActionValue", "SuccessorFeatures"]


class DiscretePolicy(Protocol):
    """What acts."""

    def probabilities(self, observation: Tensor, /) -> Tensor:
        """π(·|s), (n, A)."""
        ...


class _Sums(Stateful):
    """M(s, a) = E[ Σ_k γᵏ ψ_k ], F numbers each, from replay, by temporal differences; the network
    learns (1 − γ) M, which is as large as ψ, whatever γ.
    """

    STATE = ("network", "_target", "optimiser")

    def __init__(
        self,
        network: nn.Module,
        *,
        discount: float,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        target_rate: float = 0.01,
        target_period: int = 1,
    ) -> None:
        self.network = network
        self.discount = check_discount(discount)
        self.optimiser = optimiser(network.parameters())
        self._target = Target(network, rate=target_rate, period=target_period)

    def _learn(self, batch: Transitions, gained: Tensor, policy: DiscretePolicy) -> float:
        """One gradient step on ψ of the batch's steps, (n, F); its mean square error."""
        row = torch.arange(batch.size, device=batch.observation.device)
        with torch.no_grad():
            share = policy.probabilities(batch.next_observation)
            width = (*share.shape, gained.shape[-1])
            after = self._shaped(self._target(batch.next_observation), width)
            ahead = (share.to(after).unsqueeze(-1) * after).sum(1)
            ahead = ahead * ~batch.terminated.unsqueeze(-1)
            goal = (1 - self.discount) * gained + self.discount * ahead
        found = self._shaped(self.network(batch.observation), width)[row, batch.action]
        loss = (found - goal).square().mean()
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self._target.follow()
        return float(loss.detach())

    @staticmethod
    def _shaped(output: Tensor, shape: Sequence[int]) -> Tensor:
        """(n, A·F) → (n, A, F)."""
        if len(shape) != 3 or output.shape != (shape[0], shape[1] * shape[2]):
            raise ShapeError(
                f"the network returned shape {tuple(output.shape)}, where (n, A, F) is "
                f"{tuple(shape)}",
                allowed="(n, A·F)",
            )
        return output.view(*shape)


class SuccessorFeatures(_Sums):
    """M(s, a) = E[ Σ_k γᵏ ψ(s_k, a_k) ] from replay, by temporal differences.

        M(s, a) ← ψ(s, a) + γ Σ_a' π(a'|s') M̄(s', a')

    The batch may come from any policy: the expectation over a' is that of the present one.

    Args:
        network: observation (n, *O) → (n, A·F).
        features: observation (n, *O) → ψ(s, ·), (n, A, F); no gradient passes through it. While it
            changes, M follows with a delay.
        discount: γ of the lower level.
        optimiser: from parameters to any torch optimiser.
        target_rate, target_period: of the copy M̄, see `Target`.

    Source: Dayan (1993); Barreto et al. (2017).
    """

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
        super().__init__(
            network,
            discount=discount,
            optimiser=optimiser,
            target_rate=target_rate,
            target_period=target_period,
        )
        self.features = features  # which have a state of their own

    @torch.no_grad()
    def __call__(self, observation: Tensor) -> Tensor:
        """M(s, ·), (n, A, F), without a gradient."""
        shape = self.features(observation).shape
        return self._shaped(self.network(observation), shape) / (1 - self.discount)

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
        return {"features_loss": self._learn(batch, table[row, batch.action], policy)}


class ActionValue(_Sums):
    """Q(s, a) = E[ Σ_k γᵏ f_k ] of what a policy earns by another reward than its own, without
    entropy.

        Q(s, a) ← f + γ Σ_a' π(a'|s') Q̄(s', a')

    Args:
        network: observation (n, *O) → (n, A).
        discount: γ of the sum.
        optimiser, target_rate, target_period: as for `SuccessorFeatures`.

    Source: expected SARSA: van Seijen et al. (2009).
    """

    @torch.no_grad()
    def advantage(self, observation: Tensor, policy: DiscretePolicy) -> Tensor:
        """π(a|s) (Q(s, a) − Σ_b π(b|s) Q(s, b)), (n, A): it sums to zero over the actions."""
        q: Tensor = self.network(observation) / (1 - self.discount)
        share = policy.probabilities(observation).to(q)
        return share * (q - (share * q).sum(-1, keepdim=True))

    def update(
        self, batch: Transitions, reward: Tensor, policy: DiscretePolicy
    ) -> dict[str, float]:
        """One gradient step.

        Args:
            batch: n transitions with discrete actions, from any policy.
            reward: f of its steps, (n,).
            policy: whose value is learned, held fixed.

        Returns:
            `value_loss`: mean square of the temporal difference of (1 − γ) Q, units of f².

        Raises:
            ShapeError: the network has not one output for each action.
            NonFiniteInputError: f is NaN or infinite.
        """
        if not bool(reward.isfinite().all()):
            raise NonFiniteInputError(
                f"the upper level's reward is {float(reward[~reward.isfinite()][0])}",
                where=f"row {int((~reward.isfinite()).nonzero()[0])} of the batch",
                fix="look for what returns it",
            )
        gained = reward.detach().unsqueeze(-1)
        return {"value_loss": self._learn(batch, gained, policy)}
