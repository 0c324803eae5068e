"""What all agents share: targets, temperature, learning rates, and everything the next update
depends on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.agent import check_discount, checked_reward
from birl_ext.agents.target import Target
from birl_ext.agents.temperature import Temperature
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import ShapeError
from birl_ext.model import checks
from birl_ext.state import Stateful, put, taken

__all__ = ["Learner"]


class Learner(Stateful, ABC):
    """An agent that learns Q by

        Q(s₀,a₀) ← Σ_{k<m} γᵏ (r_k + τ H(π(·|s_k)) [k > 0]) + γᵐ (1 − terminated) V̄(s_m)

    from paths of m steps, one unless told otherwise. Of more, the actions between are those of the
    policies that acted, taken as the present one's. A path that was cut off is continued by V̄; one
    that terminated is not.

    Args:
        policy: what acts.
        critics: what learns Q; Q̄ is its copy.
        discount: γ in [0, 1).
        temperature: fixed, or with an entropy target.
        optimiser: from parameters to any torch optimiser.
        target_rate, target_period: of the copy, see `Target`.
        anneal_over: updates over which the optimisers' learning rates fall linearly to 0, after
            which nothing is learned any more; None leaves them alone.
    """

    STATE: ClassVar[tuple[str, ...]] = ("_target", "_temperature", "version")

    def __init__(
        self,
        policy: nn.Module,
        critics: nn.Module,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        target_rate: float,
        target_period: int,
        anneal_over: int | None,
    ) -> None:
        self.discount = check_discount(discount)
        if anneal_over is not None:
            checks.check_count("anneal_over", anneal_over)
        self.anneal_over = anneal_over
        self.version = 0
        self._acting = policy
        self.critics = critics
        self._build = optimiser
        self._annealed: list[tuple[Optimizer, list[Any]]] = []
        self._temperature = temperature
        self._target = Target(critics, rate=target_rate, period=target_period)

    @property
    def temperature(self) -> float:
        """τ, units of reward; may be set where it is fixed."""
        return self._temperature.value

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature.set(value)

    @property
    def entropy_target(self) -> float | None:
        """Nats; None where τ is fixed."""
        return self._temperature.entropy_target

    @property
    def device(self) -> torch.device:
        return next(self._acting.parameters()).device

    @abstractmethod
    def chosen(self, critics: Callable[..., Tensor], observation: Tensor, action: Tensor) -> Tensor:
        """Q_i(s, a), (c, n), of each of the agent's c critics or of others in their place."""

    @abstractmethod
    def update(
        self, batch: Transitions, reward: Tensor, present: Tensor | None = None
    ) -> dict[str, float]:
        """One gradient step, see `Agent.update`."""

    def policy_state(self) -> dict[str, Any]:
        """How it acts, a snapshot: a small part of `state_dict`."""
        tau = self._temperature
        return {
            "network": taken(self._acting),
            "log_temperature": taken(tau.log),
            "fixed_temperature": tau.fixed,
        }

    @torch.no_grad()
    def load_policy_state(self, state: Mapping[str, Any]) -> None:
        """Act like that from now on; what learning goes on from stays as it is."""
        put(self._acting, state["network"])
        self._temperature.log.copy_(state["log_temperature"])
        self._temperature.fixed = state["fixed_temperature"]

    def _optimiser(self, parameters: Iterable[Tensor]) -> Optimizer:
        """One whose learning rates are annealed."""
        made = self._build(parameters)
        self._annealed.append((made, [group["lr"] for group in made.param_groups]))
        return made

    def _anneal(self) -> None:
        """Set the learning rates of this update: a function of its number, no state."""
        if self.anneal_over is None:
            return
        share = max(0.0, 1 - self.version / self.anneal_over)
        for optimiser, rates in self._annealed:
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * share

    @torch.no_grad()
    def goal(
        self, batch: Transitions, reward: Tensor, present: Tensor | None = None
    ) -> tuple[Transitions, Tensor]:
        """The transitions whose Q is learned, and what it is drawn to, (n,)."""
        reward = checked_reward(batch, reward)
        if present is None:
            following = self._following(batch.next_observation) * ~batch.terminated
            return batch, reward + self.discount * following
        if present.dim() != 2 or not present.numel() == batch.size or not present[0].all():
            raise ShapeError(
                f"present has shape {tuple(present.shape)}, with a batch of {batch.size}",
                allowed="(steps, n), an entry for each row of the batch, the first steps True",
            )
        steps, count = present.shape
        table = reward.view(steps, count)
        if steps > 1:
            between = self.temperature * self._entropy(batch.observation[count:])
            table = torch.cat([table[:1], table[1:] + between.view(steps - 1, count)])
        powers = self.discount ** torch.arange(steps + 1, device=reward.device)
        length = present.sum(0)
        last = (length - 1) * count + torch.arange(count, device=reward.device)
        following = self._following(batch.next_observation[last]) * ~batch.terminated[last]
        goal = (powers[:-1, None] * table * present).sum(0) + powers[length] * following
        return Transitions(*(part[:count] for part in batch)), goal

    @abstractmethod
    def _following(self, observation: Tensor) -> Tensor:
        """V̄(s), (n,)."""

    @abstractmethod
    def _entropy(self, observation: Tensor) -> Tensor:
        """H(π(·|s)), nats, or an estimate of it, (n,)."""
