"""Sample paths of a finite MDP: an environment whose every expectation is known exactly."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from birl_ext.errors import ShapeError
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP
from birl_ext.simulators.paths import Paths, Policy, follow
from birl_ext.state import Stateful

__all__ = ["FiniteFollower", "FiniteSimulator", "Paths"]

Table = TypeVar("Table", Tensor, "np.ndarray[Any, Any]")


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


class FiniteSimulator(Stateful):
    """Draws paths of one finite MDP; any state can be started from.

    Args:
        mdp: no batch axes; its `initial_distribution` is where paths start; its reward is not read.
        generator: source of all randomness, on the CPU.

    Raises:
        ShapeError: the MDP has batch axes.
        InitialDistributionError: no path can start, or the probabilities do not sum to one.

    Attributes:
        mask: (S, A) bool, or None, as the MDP's.
        log_reference: log μ, (S, A), −∞ behind the mask; zero where μ ≡ 1.
        start: ρ, (S,), where paths start.
        samples: transitions drawn so far.
    """

    STATE = ("generator", "samples")

    def __init__(self, mdp: DenseMDP, generator: torch.Generator) -> None:
        if mdp.batch_shape:
            raise ShapeError(
                f"the MDP has batch axes {tuple(mdp.batch_shape)}", allowed="a single MDP"
            )
        self.states, self.actions = mdp.states, mdp.actions
        self.mask = mdp.mask
        plain = torch.zeros(mdp.states, mdp.actions, dtype=torch.float64)
        self.log_reference = mdp.log_reference.detach() if mdp.log_reference.numel() else plain
        self.generator = generator
        self.samples = 0
        self._mdp = mdp
        self._tabulate()
        start = mdp.initial_distribution
        if start is None:
            start = torch.full((mdp.states,), 1 / mdp.states, dtype=torch.float64)
        checks.check_initial_distribution(start)  # which an unvalidated MDP has not seen
        self.start = start.detach().double()
        self._start = self.start.cumsum(-1)

    def adapt(self, transition: Tensor) -> None:
        """Move the process: P, (S, A, S), holds from now on; what ends stays what ends.

        Raises:
            BirlError: as `DenseMDP` does, of a transition that is none.
        """
        self._mdp = self._mdp.replace(transition=transition.detach())
        self._tabulate()

    def _tabulate(self) -> None:
        transition = self._mdp.transition.detach().double()
        mass = transition.sum(-1, keepdim=True)
        self._ends = mass.squeeze(-1) == 0
        self._cumulative = (transition / mass.where(mass > 0, torch.ones_like(mass))).cumsum(-1)

    def rollout(self, follower: Policy, count: int, steps: int) -> Paths:
        """`count` paths of `steps` steps from the initial distribution."""
        first = _draw(self._start.expand(count, -1), self.generator)
        return self.continuations(follower, first, None, steps)

    def continuations(
        self, follower: Policy, observation: Tensor, action: Tensor | None, steps: int
    ) -> Paths:
        """One path from each state, (n,), with the first action given or drawn from the policy."""
        if isinstance(follower, FiniteFollower) and steps >= 1:
            return self._walk(follower, observation, action, steps)

        def advance(here: Tensor, chosen: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
            ended = self._ends[here, chosen]
            on = alive & ~ended
            self.samples += int(on.sum())
            point = _points(len(here), generator=self.generator)  # of all, as if none had ended
            after = here.clone()
            after[on] = _place(self._cumulative[here[on], chosen[on]], point[on])
            return after, ended

        return follow(follower, observation, action, steps, self.generator, advance)

    def _walk(
        self, follower: FiniteFollower, first: Tensor, action: Tensor | None, steps: int
    ) -> Paths:
        """The same paths: all points are drawn first, and nothing is done for a path that has
        ended, as most have long before H. NumPy's calls cost a third of PyTorch's.
        """
        given = action is not None
        points = _points(2 * steps - 1 - given, len(first), generator=self.generator).numpy()
        choosing, leading = points[given::2], points[1 - given :: 2]
        policy, process = follower._cumulative.numpy(), self._cumulative.numpy()
        ends, here, on = self._ends.numpy(), first.numpy(), np.arange(len(first))
        observations = np.empty((len(first), steps), dtype=np.int64)
        actions, present = np.empty_like(observations), np.zeros(observations.shape, dtype=bool)
        for step in range(steps):
            if step == 0 and action is not None:
                chosen = action.numpy()
            else:
                chosen = _place(policy[here], choosing[step - given][on])
            observations[on, step], actions[on, step], present[on, step] = here, chosen, True
            if step + 1 == steps:
                break
            ended = ends[here, chosen]
            if ended.any():
                over, left = on[ended], ~ended
                observations[over, step + 1 :] = here[ended, None]
                actions[over, step + 1 :] = chosen[ended, None]
                on, here, chosen = on[left], here[left], chosen[left]
                if not len(on):
                    break
            self.samples += len(on)
            here = _place(process[here, chosen], leading[step][on])
        return Paths(*map(torch.from_numpy, (observations, actions, present)))

    def successors(self) -> tuple[Tensor, Tensor]:
        """One s' ~ P(·|s, a) for every (s, a), (S, A) int64, and whether the process goes on there,
        (S, A) bool.
        """
        self.samples += self.states * self.actions
        return _draw(self._cumulative, self.generator), ~self._ends


def _draw(cumulative: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row of cumulative probabilities, (*n, k) → (*n)."""
    return _place(cumulative, _points(*cumulative.shape[:-1], generator=generator))


def _points(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, 1, generator=generator, dtype=torch.float64)


def _place(cumulative: Table, point: Table) -> Table:
    """Where each point in [0, 1), (*n, 1), falls among cumulative probabilities, (*n)."""
    # A row's last sum may be below one by rounding, and what follows it in a row is impossible.
    last = cumulative[..., -1:]
    found: Table = ((cumulative <= point * last) & (cumulative < last)).sum(-1)
    return found
