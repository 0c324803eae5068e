"""Fragments for the tests of preferences."""

from __future__ import annotations

import torch
from torch import Tensor

from birl_ext.preferences.fragments import Episode, Fragments


def fragments_with(reward: Tensor, present: Tensor | None = None, *, size: int = 3) -> Fragments:
    """Random observations and two actions under the given rewards, (n, H)."""
    shape = tuple(reward.shape)
    return Fragments(
        observation=torch.randn(*shape, size),
        action=torch.randint(2, shape),
        reward=reward,
        present=torch.ones(shape, dtype=torch.bool) if present is None else present,
        log_prob=torch.full(shape, -0.5),
        version=torch.arange(shape[0]),
    )


def episode(number: int, steps: int) -> Episode:
    """Each step can be told from all others, by its observation and by its reward."""
    step = torch.arange(steps)
    return Episode(
        observation=torch.stack([torch.full((steps,), number), step], -1).to(torch.uint8),
        action=step % 3,
        reward=(100 * number + step).float(),
        log_prob=-0.01 * step,
        version=10 * number + step // 4,
    )
