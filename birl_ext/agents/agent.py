"""What is asked of a lower-level solver that learns from samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from birl_ext.environments.transitions import Transitions
from birl_ext.errors import DiscountError, NonFiniteInputError, NonFiniteResultError, ShapeError
from birl_ext.model import checks

__all__ = [
    "Actor",
    "Agent",
    "DiscreteAgent",
    "check_discount",
    "check_drawn",
    "checked_reward",
]


class Actor(Protocol):
    """A policy that can be collected from and evaluated; a generator lies on its device."""

    @property
    def device(self) -> torch.device:
        """Where observations go and actions come from."""
        ...

    @property
    def version(self) -> int:
        """How often the policy has been updated."""
        ...

    def act(self, observation: Tensor, generator: torch.Generator, greedy: bool = False) -> Tensor:
        """a ~ π(·|s), or the mode of π if `greedy`: (n, *O) → (n, *A)."""
        ...

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """a ~ π(·|s), (n, *O) → (n, *A)."""
        ...

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), (n,); of continuous actions a density in the environment's units."""
        ...


class Agent(Actor, Protocol):
    """Learns the soft-optimal policy of a reward that is handed over with every batch.

    No method but `update` and `load_state_dict` changes it.
    """

    @property
    def temperature(self) -> float:
        """τ of the moment, units of reward."""
        ...

    def update(
        self, batch: Transitions, reward: Tensor, present: Tensor | None = None
    ) -> dict[str, float]:
        """One gradient step.

        Args:
            batch: n transitions; or, with `present`, n paths of up to K steps, first all first
                steps, then all second ones: K · n rows.
            reward: the learned reward of the rows, of this moment.
            present: (K, n) bool, False after a path's end; see `ReplayBuffer.ahead`.

        Returns:
            metrics.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on, as tensors and plain data, a snapshot."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class DiscreteAgent(Agent, Protocol):
    """An agent that can name the probability of every action."""

    def log_probs(self, observation: Tensor) -> Tensor:
        """log π(·|s), (n, A)."""
        ...

    def probabilities(self, observation: Tensor) -> Tensor:
        """π(·|s), (n, A)."""
        ...


def check_discount(discount: float) -> float:
    """The discount, if it lies in [0, 1)."""
    number = checks.real(discount)
    if number is None or not 0 <= number < 1:
        raise DiscountError(f"discount is {discount!r}", allowed="[0, 1)")
    return number


def check_drawn(found: Tensor) -> None:
    """Refuse what a policy that is NaN draws.

    Args:
        found: (n, …), NaN in the rows where the policy is.

    Raises:
        NonFiniteResultError: it is NaN somewhere.
    """
    wrong = found.isnan()
    if bool(wrong.any()):
        raise NonFiniteResultError(
            "the policy is NaN",
            where=f"row {int(wrong.nonzero()[0, 0])} of the observations",
            fix="the policy's parameters have diverged: lower the learning rate",
        )


def checked_reward(batch: Transitions, reward: Tensor) -> Tensor:
    """The learned reward of a batch, float32 and cut off from the upper level.

    Raises:
        ShapeError: it is not (n,); (n, 1) would broadcast against (n,) silently.
        NonFiniteInputError: it is NaN or infinite.
    """
    if reward.shape != (batch.size,):
        raise ShapeError(f"reward has shape {tuple(reward.shape)}", allowed=f"({batch.size},)")
    plain = reward.detach().float()
    if not bool(plain.isfinite().all()):
        first = int((~plain.isfinite()).nonzero()[0])
        raise NonFiniteInputError(
            f"reward is {float(plain[first])}",
            where=f"row {first} of the batch",
            fix="the reward's parameters have diverged: lower their learning rate",
        )
    return plain
