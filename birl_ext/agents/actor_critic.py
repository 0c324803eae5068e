"""What soft actor-critics share: an update's order, and everything the next one depends on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.agent import check_discount, checked_reward
from birl_ext.agents.networks import Twin
from birl_ext.agents.target import Target
from birl_ext.agents.temperature import Temperature
from birl_ext.environments.transitions import Transitions
from birl_ext.state import Stateful

__all__ = ["ActorCritic"]


class ActorCritic(Stateful, ABC):
    """An actor, twin critics and the copies of these that they learn from.

        Q_i(s,a) ← r + γ (1 − terminated) V̄(s')

    An episode that was cut off is continued by V̄; one that terminated is not.

    Args:
        actor, critics: what they map to what is the subclass's to say.
        discount: γ in [0, 1).
        temperature: fixed, or with an entropy target.
        optimiser: from parameters to any torch optimiser; called for the actor and the critics.
        target_rate, target_period: of the copies Q̄, see `Target`.
    """

    STATE: ClassVar[tuple[str, ...]] = (
        "actor",
        "critics",
        "_target",
        "actor_optimiser",
        "critic_optimiser",
        "_temperature",
        "version",
    )

    def __init__(
        self,
        actor: nn.Module,
        critics: Twin,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        target_rate: float,
        target_period: int,
    ) -> None:
        self.actor = actor
        self.critics = critics
        self.discount = check_discount(discount)
        self.actor_optimiser = optimiser(actor.parameters())
        self.critic_optimiser = optimiser(critics.parameters())
        self.version = 0
        # What the actor's loss is differentiated in: the critics only pass its gradient on.
        self._learned = [p for p in actor.parameters() if p.requires_grad]
        self._temperature = temperature
        self._target = Target(critics, rate=target_rate, period=target_period)

    @property
    def temperature(self) -> float:
        return self._temperature.value

    @property
    def device(self) -> torch.device:
        return next(self.actor.parameters()).device

    def update(self, batch: Transitions, reward: Tensor) -> dict[str, float]:
        """One step of the critics, then one of the actor, then one of τ.

        Args:
            reward: (n,), the learned reward of the batch, of this moment.

        Returns:
            losses, mean Q and the policy's entropy (nats) over the batch, and τ.
        """
        tau = self.temperature
        with torch.no_grad():
            following = self._following(batch.next_observation)
            goal = checked_reward(batch, reward) + self.discount * following * ~batch.terminated
        chosen = self._chosen(batch)
        critic_loss = (chosen - goal).square().mean(-1).sum()
        self.critic_optimiser.zero_grad()
        critic_loss.backward()  # type: ignore[no-untyped-call]
        self.critic_optimiser.step()
        self._target.follow()

        actor_loss, entropy = self._actor_loss(batch.observation)
        self.actor_optimiser.zero_grad()
        actor_loss.backward(inputs=self._learned)  # type: ignore[no-untyped-call]
        self.actor_optimiser.step()

        self._temperature.update(entropy)
        self.version += 1
        losses = (critic_loss.detach(), actor_loss.detach(), chosen.detach().mean(), entropy)
        names = ("critic_loss", "actor_loss", "q", "entropy")
        found = torch.stack(losses).tolist()
        return dict(zip(names, found, strict=True)) | {"temperature": tau}

    @abstractmethod
    def _following(self, observation: Tensor) -> Tensor:
        """V̄(s), (n,)."""

    @abstractmethod
    def _chosen(self, batch: Transitions) -> Tensor:
        """Q_i(s, a), (2, n)."""

    @abstractmethod
    def _actor_loss(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of what the actor minimises, and the mean entropy, detached; both ()."""
