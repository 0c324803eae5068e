"""What to ask: which of many candidate pairs a teacher should see."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from birl_ext.errors import OptionError
from birl_ext.preferences.fragments import Fragments
from birl_ext.preferences.loss import RewardFunction, fragment_returns, steps_at_once

__all__ = ["Disagreement", "Entropy", "Query", "Uniform"]


class Query(Protocol):
    """Chooses among candidate pairs."""

    def __call__(
        self, first: Fragments, second: Fragments, count: int, generator: torch.Generator
    ) -> Tensor:
        """Distinct indices (count,) int64 of the n pairs, on the fragments' device."""
        ...


class Uniform:
    """Any pair, each equally likely."""

    def __call__(
        self, first: Fragments, second: Fragments, count: int, generator: torch.Generator
    ) -> Tensor:
        _check(first, count)
        chosen = torch.randperm(len(first), generator=generator)[:count]
        return chosen.to(first.reward.device)


class Disagreement:
    """The pairs on which an ensemble disagrees most: largest standard deviation over its members of
    σ(R₁ − R₂).

    Args:
        each: the members' rewards, (observation (m, *O), action (m, *A)) → (E, m):
            `RewardEnsemble.each`.

    Source: Christiano et al. (2017), section 2.2.4.
    """

    def __init__(self, each: RewardFunction) -> None:
        self.each = each

    def __call__(
        self, first: Fragments, second: Fragments, count: int, generator: torch.Generator
    ) -> Tensor:
        _check(first, count)
        share = torch.sigmoid(_margins(self.each, first, second))
        return _largest(share.std(0, correction=0), count)


class Entropy:
    """The pairs whose answer is least certain: largest entropy of σ(R₁ − R₂), meaned over members
    if there are any.

    Args:
        reward: (observation (m, *O), action (m, *A)) → (m,), or (E, m) of members.

    Source: Lee et al. (2021), PEBBLE, section 4.2.
    """

    def __init__(self, reward: RewardFunction) -> None:
        self.reward = reward

    def __call__(
        self, first: Fragments, second: Fragments, count: int, generator: torch.Generator
    ) -> Tensor:
        _check(first, count)
        margin = _margins(self.reward, first, second)
        share = torch.sigmoid(margin)
        # 1 − p is taken as σ(−z): p may have been rounded to one
        entropy = share * functional.softplus(-margin) + torch.sigmoid(-margin) * (
            functional.softplus(margin)
        )
        return _largest(entropy.flatten(0, -2).mean(0) if entropy.dim() > 1 else entropy, count)


def _check(first: Fragments, count: int) -> None:
    if not 0 <= count <= len(first):
        raise OptionError(f"count is {count!r}", allowed=f"0 to {len(first)}, the candidates")


@torch.no_grad()
def _margins(reward: RewardFunction, first: Fragments, second: Fragments) -> Tensor:
    at_once = steps_at_once(first.observation.flatten(0, 1))
    ours, theirs = fragment_returns(reward, first, second, at_once=at_once)
    return (ours - theirs).double()


def _largest(score: Tensor, count: int) -> Tensor:
    """Stable, so that ties are broken the same way on every device."""
    return score.argsort(descending=True, stable=True)[:count]
