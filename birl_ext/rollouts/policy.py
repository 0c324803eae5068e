"""A policy for use outside of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from birl_ext.agents.agent import Actor
from birl_ext.environments.spaces import Spaces
from birl_ext.errors import DtypeError, NonFiniteInputError, OptionError, ShapeError

__all__ = ["Policy"]


class Policy:
    """Actions for observations, as an environment gives the ones and takes the others.

    Args:
        agent: acts.
        spaces: of the environment.
        seed: of actions that are drawn.
    """

    def __init__(self, agent: Actor, spaces: Spaces, *, seed: int = 0) -> None:
        self.agent = agent
        self.spaces = spaces
        self._generator = torch.Generator(agent.device).manual_seed(seed)

    def __call__(self, observation: Any, *, greedy: bool = True) -> Any:
        """The likeliest action, or one drawn from the policy.

        Args:
            observation: *O of one environment, or (n, *O) of n; array, tensor or numbers.
            greedy: the likeliest.

        Returns:
            Of one observation an int, or (d,) float32; of n an array (n,) int64, or (n, d).

        Raises:
            ShapeError, DtypeError: no observation of this environment.
            OptionError: an index out of range.
            NonFiniteInputError: it is NaN or infinite.
        """
        spaces = self.spaces
        shape = spaces.observation_shape
        try:
            given = observation if isinstance(observation, Tensor) else torch.tensor(observation)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise DtypeError(
                f"observation is {type(observation).__name__}",
                allowed="an array, a tensor, or numbers",
                fix="give it as the environment does",
            ) from None
        single = given.shape == shape
        if not single and (given.dim() != len(shape) + 1 or given.shape[1:] != shape):
            raise ShapeError(
                f"observation has shape {tuple(given.shape)}", allowed=f"{shape} or (n, *{shape})"
            )
        floats = spaces.observation_dtype.is_floating_point
        if given.is_complex() or (given.is_floating_point() and not floats):
            raise DtypeError(
                f"observation has dtype {given.dtype}",
                allowed=str(spaces.observation_dtype),
                fix="give it as the environment does",
            )
        count = spaces.observations
        if count is not None and not bool(((given >= 0) & (given < count)).all()):
            raise OptionError("observation is an index out of range", allowed=f"0 to {count - 1}")
        held = given.to(self.agent.device, spaces.observation_dtype)
        if not bool(held.isfinite().all()):
            raise NonFiniteInputError(
                "observation is NaN or infinite",
                allowed=f"numbers that are finite in {held.dtype}",
                fix="mend what it comes from",
            )
        if not floats and not bool((held == given.to(held.device)).all()):
            raise OptionError("observation has a number out of range", allowed=f"{held.dtype}")
        batch = held.reshape(-1, *shape)
        with torch.no_grad():
            action = self.agent.act(batch, self._generator, greedy).cpu()
        if spaces.low is not None:  # its edges in float32 may lie beyond them
            action = action.clamp(spaces.low, spaces.high)
        found = action.numpy()
        if not single:
            return found
        return int(found[0]) if spaces.actions is not None else np.array(found[0])
