"""What soft actor-critics share: an update's order, and everything the next one depends on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.learner import Learner
from birl_ext.agents.networks import Twin
from birl_ext.agents.temperature import Temperature
from birl_ext.environments.transitions import Transitions

__all__ = ["ActorCritic"]


class ActorCritic(Learner):
    """An actor, twin critics and the copies of these that they learn from, as `Learner` says.

    Args:
        actor, critics: what they map to what is the subclass's to say.
        optimiser: called for the actor and the critics.
        others: see `Learner`.
    """

    STATE: ClassVar[tuple[str, ...]] = ("actor", "critics", "actor_optimiser", "critic_optimiser")

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
        anneal_over: int | None,
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
        self.actor = actor
        self.actor_optimiser = self._optimiser(actor.parameters())
        self.critic_optimiser = self._optimiser(critics.parameters())
        # What the actor's loss is differentiated in: the critics only pass its gradient on.
        self._learned = [p for p in actor.parameters() if p.requires_grad]

    def update(
        self, batch: Transitions, reward: Tensor, present: Tensor | None = None
    ) -> dict[str, float]:
        """One step of the critics, then one of the actor, then one of τ.

        Args:
            batch, reward, present: see `Agent.update`.

        Returns:
            losses, mean Q and the policy's entropy (nats) over the batch, and τ.
        """
        tau = self.temperature
        self._anneal()
        batch, goal = self.goal(batch, reward, present)
        chosen = self.chosen(self.critics, batch.observation, batch.action)
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
    def _actor_loss(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of what the actor minimises, and the mean entropy, detached; both ()."""
