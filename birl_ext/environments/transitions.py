"""Steps of an environment, as replay and agents see them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Transitions"]


class Transitions(NamedTuple):
    """n steps.

    Args:
        observation: (n, *O).
        action: (n, *A), int64 (n,) if discrete.
        next_observation: (n, *O), what followed; at the end of an episode its last observation,
            never the first of the next.
        terminated: (n,) bool, True where nothing follows. An episode that was only cut off has not
            terminated.
        reward: (n,) float32, the environment's own: for teachers and measurements. An agent never
            reads it.
    """

    observation: Tensor
    action: Tensor
    next_observation: Tensor
    terminated: Tensor
    reward: Tensor

    @property
    def size(self) -> int:
        """n. (`len` is the number of fields, which `_replace` relies on.)"""
        return self.observation.shape[0]

    def select(self, index: Tensor) -> Transitions:
        """Those at `index`, (m,) int64 or (n,) bool."""
        return Transitions(*(part[index] for part in self))

    def to(self, device: torch.device | str) -> Transitions:
        """The same on another device."""
        return Transitions(*(part.to(device) for part in self))
