"""What was seen of late, as episodes that fragments can be cut from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from birl_ext.preferences.fragments import Episode
from birl_ext.rollouts.collect import Collection

__all__ = ["Recorder"]


class Recorder:
    """The newest steps of each environment, as episodes that fragments can be cut from.

    Args:
        environments: how many.
        keep: steps kept in whole episodes, the last one whatever its length; and at most as many
            of each episode under way.
    """

    def __init__(self, environments: int, keep: int) -> None:
        self.keep = keep
        # Of one step each: what is open is cut off by their number, also after `load_state_dict`.
        self._open: list[deque[Episode]] = [deque(maxlen=keep) for _ in range(environments)]
        self._closed: deque[Episode] = deque()
        self._steps = 0

    def record(self, found: Collection) -> None:
        """Add what a collector saw."""
        parts = found.transitions
        version = torch.full((1,), found.version)
        for row, where in enumerate(found.environment.tolist()):
            step = Episode(
                parts.observation[row : row + 1],
                parts.action[row : row + 1],
                parts.reward[row : row + 1],
                found.log_prob[row : row + 1],
                version,
            )
            self._open[where].append(step)
            if found.ended[row]:
                self._close(where)

    def _close(self, where: int) -> None:
        whole = _joined(self._open[where])
        self._open[where].clear()
        self._closed.append(whole)
        self._steps += len(whole.reward)
        while len(self._closed) > 1 and self._steps - len(self._closed[0].reward) >= self.keep:
            self._steps -= len(self._closed.popleft().reward)

    def forget(self) -> None:
        """Keep nothing of what was seen; the episodes under way go on from here."""
        self._closed.clear()
        for steps in self._open:
            steps.clear()
        self._steps = 0

    def forget_finished(self) -> None:
        """Keep the episodes under way, from their first steps on, and nothing else."""
        self._closed.clear()
        self._steps = 0

    def cut_off(self) -> None:
        """End the episodes under way: what comes next is not their continuation."""
        for where, steps in enumerate(self._open):
            if steps:
                self._close(where)

    def episodes(self) -> list[Episode]:
        """Finished ones, then those under way."""
        return [*self._closed, *(_joined(steps) for steps in self._open if steps)]

    def discounted(self, discount: float) -> tuple[Episode, Tensor]:
        """All steps, one below the other, and weights by which a sum over them estimates the mean
        of Σ_t γᵗ over episodes: γᵗ S_t over the number of episodes that have a step t, S_t the
        probability of having one. Those under way say nothing of what is still to come: S is the
        product-limit estimate. Of one whose first steps are kept no longer, t counts from the
        oldest that is.

        Source: Kaplan and Meier (1958).
        """
        episodes = self.episodes()
        lengths = torch.tensor([len(one.reward) for one in episodes])
        ended = torch.bincount(lengths[: len(self._closed)], minlength=int(lengths.max()) + 1)
        as_long = torch.bincount(lengths).flip(0).cumsum(0).flip(0)  # of each length or more
        goes_on = (1 - ended.double() / as_long).cumprod(0)
        time = torch.cat([torch.arange(length) for length in lengths.tolist()])
        weight = discount ** time.double() * goes_on[time] / as_long[time + 1]
        return _joined(episodes), weight

    def steps(
        self, count: int, discount: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Observations, actions and true rewards of `count` steps, with replacement, by the weights
        of `discounted`: what happens under the policy, as a discounted sum counts it.
        """
        whole, share = self.discounted(discount)
        index = torch.multinomial(share, count, replacement=True, generator=generator)
        return whole.observation[index], whole.action[index], whole.reward[index]

    def mean_reward(self, *, sign_only: bool = False) -> float:
        """True reward per step of what is kept, or the mean of its sign."""
        rewards = torch.cat([episode.reward for episode in self.episodes()])
        return float((rewards.sign() if sign_only else rewards).mean())

    def state_dict(self) -> dict[str, Any]:
        return {
            "closed": [tuple(episode) for episode in self._closed],
            "open": [tuple(_joined(steps)) if steps else None for steps in self._open],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._closed = deque(Episode(*parts) for parts in state["closed"])
        for steps, parts in zip(self._open, state["open"], strict=True):
            steps.clear()
            if parts is not None:
                rows = zip(*(part.split(1) for part in parts), strict=True)
                steps.extend(Episode(*row) for row in rows)
        self._steps = sum(len(episode.reward) for episode in self._closed)


def _joined(steps: Iterable[Episode]) -> Episode:
    return Episode(*(torch.cat(column) for column in zip(*steps, strict=True)))
