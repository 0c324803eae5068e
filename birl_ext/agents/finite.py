"""Sample paths of a finite MDP: an environment whose every expectation is known exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from birl_ext.errors import ShapeError
from birl_ext.mdp import DenseMDP

__all__ = ["FiniteFollower", "FiniteSimulator", "Paths"]


class Paths(NamedTuple):
    """n paths of H steps.

    Args:
        observation: (n, H) int64, states.
        action: (n, H) int64.
        present: (n, H) bool, False from the first state without a continuation on.
    """

    observation: Tensor
    action: Tensor
    present: Tensor


class Policy(Protocol):
    """What acts."""

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """a ~ π(·|s), (*n) int64."""
        ...


class FiniteFollower:
    """A policy given as a table.

    Args:
        policy: (S, A), rows sum to one.
    """

    def __init__(self, policy: Tensor) -> None:
        self.policy = policy.detach().double()
        self._cumulative = self.policy.cumsum(-1)

    def probabilities(self, observation: Tensor) -> Tensor:
        """π(·|s), (*n, A)."""
        return self.policy[observation]

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), (*n)."""
        return self.policy[observation, action].log()

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """a ~ π(·|s), (*n) int64."""
        return _draw(self._cumulative[observation], generator)


class FiniteSimulator:
    """Draws paths of one finite MDP; any state can be started from.

    Args:
        mdp: no batch axes; its `initial_distribution` is where paths start; its reward is not read.
        generator: source of all randomness, on the CPU.

    Attributes:
        samples: transitions drawn so far.
    """

    def __init__(self, mdp: DenseMDP, generator: torch.Generator) -> None:
        if mdp.batch_shape:
            raise ShapeError(
                f"the MDP has batch axes {tuple(mdp.batch_shape)}", allowed="a single MDP"
            )
        self.states, self.actions = mdp.states, mdp.actions
        self.generator = generator
        self.samples = 0
        transition = mdp.transition.double()
        mass = transition.sum(-1, keepdim=True)
        self._ends = mass.squeeze(-1) == 0
        self._cumulative = (transition / mass.where(mass > 0, torch.ones_like(mass))).cumsum(-1)
        start = mdp.initial_distribution
        uniform = torch.full((mdp.states,), 1 / mdp.states, dtype=torch.float64)
        self._start = (uniform if start is None else start.double()).cumsum(-1)

    def rollout(self, follower: Policy, count: int, steps: int) -> Paths:
        """`count` paths of `steps` steps from the initial distribution."""
        first = _draw(self._start.expand(count, -1), self.generator)
        return self.continuations(follower, first, None, steps)

    def continuations(
        self, follower: Policy, observation: Tensor, action: Tensor | None, steps: int
    ) -> Paths:
        """One path from each state, (n,), with the first action given or drawn from the policy."""
        observations, actions, present = [], [], []
        here, alive = observation, torch.ones_like(observation, dtype=torch.bool)
        for step in range(steps):
            given = step == 0 and action is not None
            chosen = action if given else follower.sample(here, self.generator)
            assert chosen is not None
            observations.append(here)
            actions.append(chosen)
            present.append(alive)
            alive = alive & ~self._ends[here, chosen]
            if step + 1 == steps:
                break
            self.samples += int(alive.sum())
            here = torch.where(alive, _draw(self._cumulative[here, chosen], self.generator), here)
        stack = [torch.stack(parts, -1) for parts in (observations, actions, present)]
        return Paths(*stack)

    def successors(self) -> tuple[Tensor, Tensor]:
        """One s' ~ P(·|s, a) for every (s, a), (S, A) int64, and whether the process goes on there,
        (S, A) bool.
        """
        self.samples += self.states * self.actions
        return _draw(self._cumulative, self.generator), ~self._ends

    def state_dict(self) -> dict[str, Any]:
        """What the next draw depends on."""
        return {"generator": self.generator.get_state(), "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.samples = int(state["samples"])


def _draw(cumulative: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row of cumulative probabilities, (n, k) → (n,)."""
    point = torch.rand(*cumulative.shape[:-1], 1, generator=generator, dtype=torch.float64)
    # A row's last sum may be below one by rounding, and what follows it in a row is impossible.
    last = cumulative[..., -1:]
    return ((cumulative <= point * last) & (cumulative < last)).sum(-1)
