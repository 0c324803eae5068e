"""Stretches of episodes, as a teacher compares them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Fragments", "Pairs"]


class Fragments(NamedTuple):
    """n fragments of H steps; one that ended early is padded.

    Args:
        observation: (n, H, *O).
        action: (n, H, *A), int64 (n, H) if discrete.
        reward: (n, H) float, the environment's own: for teachers and measurements only.
        present: (n, H) bool, False where a fragment had ended.
        log_prob: (n, H) log π(a|s) of the policy that acted, at the time.
        version: (n,) int64, how often that policy had been updated.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    present: Tensor
    log_prob: Tensor
    version: Tensor

    def __len__(self) -> int:
        return self.observation.shape[0]

    def select(self, index: Tensor) -> Fragments:
        """Those at `index`, (m,) int64 or (n,) bool."""
        return Fragments(*(part[index] for part in self))


class Pairs(NamedTuple):
    """n pairs of fragments with a teacher's answers.

    Args:
        label: (n,) float, the probability that `first` is preferred: 1, 0, or 0.5 for a tie.
    """

    first: Fragments
    second: Fragments
    label: Tensor
