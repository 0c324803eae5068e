"""A finite MDP to act in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from birl_ext.errors import MissingDependencyError, OptionError, ShapeError
from birl_ext.model.mdp import DenseMDP, SparseMDP

try:
    import gymnasium
except ImportError:
    raise MissingDependencyError(
        "environments need gymnasium", fix='pip install "birl_ext[rl]"'
    ) from None

__all__ = ["FiniteEnvironment"]


class FiniteEnvironment(gymnasium.Env[Any, Any]):
    """A finite MDP as an environment: an observation is a state s, the reward of a step r(s, a).

    An episode starts from the initial distribution, by default any state, and ends with the step
    that is taken in a terminal state, which is paid. A terminal state without an action takes any,
    and pays nothing for it. There is no time limit.

    Args:
        mdp: without batch axes, a mask on states that go on, or a reference: who acts here knows
            of neither. Its discount is not used.

    Raises:
        ShapeError: it has batch axes.
        OptionError: it has a reference, or forbids an action in a state that goes on.
    """

    def __init__(self, mdp: DenseMDP | SparseMDP) -> None:
        if mdp.batch_shape:
            raise ShapeError(
                f"the MDP has batch axes {tuple(mdp.batch_shape)}",
                allowed="a single MDP, as an environment",
            )
        if mdp.reference is not None:
            raise OptionError(
                "the MDP has a reference",
                allowed="none, as an environment: its followers weigh all actions alike",
                fix="leave it out: mdp.replace(reference=None)",
            )
        if mdp.mask is not None:
            ends = torch.zeros_like(mdp.mask[:, 0]) if mdp.terminal is None else mdp.terminal
            forbidden = (~mdp.mask & ~ends.unsqueeze(-1)).nonzero()
            if len(forbidden):
                raise OptionError(
                    "the MDP's mask forbids an action where the process goes on",
                    where="state {}, action {}".format(*forbidden[0].tolist()),
                    allowed="every action there, as an environment: whoever acts does not see it",
                    fix="let it do what a permitted action does, at a lower reward",
                )
        self.mdp = (mdp.to_dense() if isinstance(mdp, SparseMDP) else mdp).to("cpu")
        self.observation_space = gymnasium.spaces.Discrete(mdp.states)
        self.action_space = gymnasium.spaces.Discrete(mdp.actions)
        self._reward = self.mdp.reward.detach().numpy()
        self._transition = self.mdp.transition.detach().numpy()
        start = self.mdp.initial_distribution
        self._start = np.ones(mdp.states) if start is None else start.detach().numpy()
        self._state = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = self._draw(self._start)
        return self._state, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        reward = float(self._reward[self._state, action])
        ahead = self._transition[self._state, action]
        ended = not ahead.any()
        if not ended:
            self._state = self._draw(ahead)
        return self._state, reward, ended, False, {}

    def restore(self, observation: Any) -> None:
        """Go on from this state."""
        self._state = int(observation)

    def _draw(self, weights: Any) -> int:
        sums = np.cumsum(weights, dtype=np.float64)
        below = np.nextafter(sums[-1], 0)  # the product may round up to the whole
        point = min(self.np_random.random() * sums[-1], below)
        return int(np.searchsorted(sums, point, side="right"))
