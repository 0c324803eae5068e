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
        OptionError: they are not supported. The wrapper that it names works for them.
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
            fix=f"wrap it: {_observation_wrapper(observation)}",
        )
    if isinstance(action, spaces.Discrete) and action.start == 0:
        return Spaces(shape, dtype, count, (), int(action.n), None, None)
    if _is_float_box(action) and len(action.shape) == 1 and action.shape[0]:
        low, high = (torch.tensor(edge, dtype=torch.float32) for edge in (action.low, action.high))
        if bool((low.isfinite() & high.isfinite() & (low < high)).all()):
            return Spaces(shape, dtype, count, action.shape, None, low, high)
    raise OptionError(
        f"the action space of {name!r} is {action}",
        allowed="Discrete from 0, or a Box (d,) of floats with d > 0 and finite edges",
        fix=f"wrap it: {_action_wrapper(action)}",
    )


def _is_float_box(space: Any) -> bool:
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)


def _observation_wrapper(space: Any) -> str:
    """What shows numbers in place of a space that is not supported."""
    if space.is_np_flattenable and spaces.flatdim(space):
        return "gymnasium.wrappers.FlattenObservation(env)"
    return (
        "gymnasium.wrappers.TransformObservation(env, function, gymnasium.spaces.Box(low, high)), "
        "where function makes an array between low and high of an observation"
    )


def _action_wrapper(space: Any) -> str:
    """What takes numbers or indices in place of a space that is not supported.

    Integers are no floats that are rounded: a density over a box says nothing about them.
    """
    if _is_float_box(space) and bool((space.low < space.high).all()) and 0 not in space.shape:
        finite = bool((np.abs([space.low, space.high]) <= np.finfo(np.float32).max).all())
        box = (
            "gymnasium.spaces.flatten_space(env.action_space)), of one axis"
            if finite
            else "gymnasium.spaces.Box(low, high)), where low and high are finite and of one axis"
        )
        flat = "lambda a: gymnasium.spaces.unflatten(env.action_space, a)"
        return f"gymnasium.wrappers.TransformAction(env, {flat}, {box}"
    return (
        "gymnasium.wrappers.TransformAction(env, lambda k: choices[k], "
        "gymnasium.spaces.Discrete(len(choices))), where choices are actions of its own"
    )
