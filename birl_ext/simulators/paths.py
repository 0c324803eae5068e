"""Paths of a policy through a process that can be started anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from birl_ext.errors import OptionError

__all__ = ["Advance", "Paths", "Policy", "follow"]


class Paths(NamedTuple):
    """n paths of H steps.

    Args:
        observation: (n, H, *O), of a finite MDP its states, int64 (n, H).
        action: (n, H, *A), int64 (n, H) if discrete.
        present: (n, H) bool, False from where nothing follows on.
    """

    observation: Tensor
    action: Tensor
    present: Tensor


class Policy(Protocol):
    """What acts."""

    def sample(self, observation: Tensor, generator: torch.Generator, /) -> Tensor:
        """a ~ π(·|s), (n, *A)."""
        ...


Advance = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(observation (n, *O), action (n, *A), whether the path still goes on (n,)) → what follows,
(n, *O), and whether nothing does, (n,) bool."""


def follow(
    policy: Policy,
    observation: Tensor,
    action: Tensor | None,
    steps: int,
    generator: torch.Generator,
    advance: Advance,
) -> Paths:
    """One path from each observation, (n, *O); its first action is given, or drawn like the rest.

    Args:
        action: (n, *A).
        steps: H.
        generator: of the actions, on the policy's device.
        advance: one step of the process; it is asked H − 1 times.

    Returns:
        After its end a path repeats its last observation, where it is not `present`.
    """
    if steps < 1:
        raise OptionError(f"steps is {steps!r}", allowed="1 or more")
    observations, actions, present = [], [], []
    here = observation
    alive = torch.ones(len(here), dtype=torch.bool, device=here.device)
    for step in range(steps):
        chosen = action if step == 0 and action is not None else policy.sample(here, generator)
        observations.append(here)
        actions.append(chosen)
        present.append(alive)
        if step + 1 == steps:
            break
        after, ended = advance(here, chosen, alive)
        alive = alive & ~ended
        here = torch.where(alive.view(-1, *[1] * (here.dim() - 1)), after, here)
    return Paths(*(torch.stack(parts, 1) for parts in (observations, actions, present)))
