"""What an environment shows and takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from birl_ext.errors import MissingDependencyError, OptionError

try:
    from gymnasium import spaces
except ImportError:
    raise MissingDependencyError(
        "environments need gymnasium", fix='pip install "birl_ext[rl]"'
    ) from None

__all__ = ["Spaces", "read_spaces"]


class Spaces(NamedTuple):
    """Shapes and ranges of one environment.

    Args:
        observation_shape: *O.
        observation_dtype: uint8 for pixels, i.e. boxes of uint8 with three axes; int64 for an
            index, float32 for everything else.
        observations: number of different observations, where they are indices.
        action_shape: *A, () where actions are indices.
        actions: A, their number, where they are indices; None otherwise.
        low, high: (d,) float32, the box of actions, where they are not.
    """

    observation_shape: tuple[int, ...]
    observation_dtype: torch.dtype
    observations: int | None
    action_shape: tuple[int, ...]
    actions: int | None
    low: Tensor | None
    high: Tensor | None

    @property
    def action_dtype(self) -> torch.dtype:
        return torch.float32 if self.actions is None else torch.int64

    def random_action(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform actions, (count, *A), on the CPU like the generator."""
        if self.actions is not None:
            return torch.randint(self.actions, (count,), generator=generator)
        assert self.low is not None
        assert self.high is not None
        share = torch.rand(count, *self.action_shape, generator=generator)
        return self.low + (self.high - self.low) * share

    @property
    def random_log_prob(self) -> float:
        """log-probability, or density, of each uniform action."""
        if self.actions is not None:
            return -float(np.log(self.actions))
        assert self.low is not None
        assert self.high is not None
        return -float((self.high - self.low).log().sum())


def read_spaces(observation: Any, action: Any, name: str) -> Spaces:
    """The spaces of an environment.

    Raises:
        OptionError: they are not supported.
    """
    count = None
    if isinstance(observation, spaces.Discrete) and observation.start == 0:
        shape: tuple[int, ...] = ()
        dtype = torch.int64
        count = int(observation.n)
    elif isinstance(observation, spaces.Box) and observation.shape and 0 not in observation.shape:
        shape = observation.shape
        pixels = observation.dtype == np.uint8 and len(shape) == 3
        dtype = torch.uint8 if pixels else torch.float32
    else:
        raise OptionError(
            f"the observation space of {name!r} is {observation}",
            allowed="Box with one or more axes, none of them empty, or Discrete from 0",
            fix="wrap it, e.g. in gymnasium.wrappers.FlattenObservation",
        )
    if isinstance(action, spaces.Discrete) and action.start == 0:
        return Spaces(shape, dtype, count, (), int(action.n), None, None)
    if isinstance(action, spaces.Box) and len(action.shape) == 1 and action.shape[0]:
        low, high = (torch.tensor(edge, dtype=torch.float32) for edge in (action.low, action.high))
        if bool((low.isfinite() & high.isfinite() & (low < high)).all()):
            return Spaces(shape, dtype, count, action.shape, None, low, high)
    raise OptionError(
        f"the action space of {name!r} is {action}",
        allowed="Discrete from 0, or a Box (d,) with d > 0 and finite edges",
        fix="wrap it, e.g. in gymnasium.wrappers.RescaleAction or TransformAction",
    )
