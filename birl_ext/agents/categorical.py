"""What agents with a finite number of actions share: acting on log π(·|s)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from birl_ext.agents.agent import check_drawn

__all__ = ["CategoricalPolicy", "entropy"]


class CategoricalPolicy(ABC):
    """A policy given by `log_probs`."""

    @abstractmethod
    def log_probs(self, observation: Tensor) -> Tensor:
        """log π(·|s), (n, A), without a gradient."""

    def probabilities(self, observation: Tensor) -> Tensor:
        """π(·|s), (n, A)."""
        return self.log_probs(observation).exp()

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), (n,)."""
        return self.log_probs(observation).gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """a ~ π(·|s), (n,) int64."""
        return self.draw(observation, generator)[0]

    def draw(self, observation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """a ~ π(·|s), (n,) int64, and log π(a|s), (n,), from one pass.

        Raises:
            NonFiniteResultError: a probability is NaN.
        """
        log_policy = self.log_probs(observation)
        # The largest π(a|s)/E_a with E exponential is a draw from π: `torch.multinomial` for one,
        # to the same bits, in a third of its time per call.
        waits = torch.empty_like(log_policy).exponential_(generator=generator)
        action = (log_policy.exp() / waits).argmax(-1, keepdim=True)
        log_prob = log_policy.gather(-1, action).squeeze(-1)
        check_drawn(log_prob)  # a NaN anywhere in a row wins it
        return action.squeeze(-1), log_prob

    def act(self, observation: Tensor, generator: torch.Generator, greedy: bool = False) -> Tensor:
        """`sample`, or the likeliest action if `greedy`, (n,) int64."""
        if greedy:
            return self.log_probs(observation).argmax(-1)
        return self.sample(observation, generator)


def entropy(log_policy: Tensor) -> Tensor:
    """−Σ_a π(a|s) log π(a|s), nats, (n, A) → (n,)."""
    return -(log_policy.exp() * log_policy).sum(-1)
