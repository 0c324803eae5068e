"""Experience of an agent in vector environments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_ext.agents.agent import Actor
from birl_ext.agents.categorical import CategoricalPolicy
from birl_ext.environments.transitions import Transitions
from birl_ext.environments.vector import Environments
from birl_ext.errors import OptionError
from birl_ext.state import Stateful

__all__ = ["Collection", "Collector", "Episode"]


class Episode(NamedTuple):
    """A finished episode.

    Args:
        environment: which of the environments.
        reward: sum of the environment's own, undiscounted.
        length: steps.
    """

    environment: int
    reward: float
    length: int


class Collection(NamedTuple):
    """n transitions in the order of time, those of one moment by environment.

    Args:
        transitions: on the CPU.
        environment: (n,) int64, where each happened.
        ended: (n,) bool, True at the last step of an episode, terminated or cut off.
        log_prob: (n,) log π(a|s) of the policy that acted.
        version: of that policy, see `Actor.version`.
        episodes: those that finished.
    """

    transitions: Transitions
    environment: Tensor
    ended: Tensor
    log_prob: Tensor
    version: int
    episodes: list[Episode]


class Collector(Stateful):
    """Lets an agent act, and keeps what happens.

    Args:
        environments: stepped by nobody else.
        agent: acts; it may be updated between calls.
        seed: of the agent's actions.
        random_steps: this many transitions at the start have uniform actions.
    """

    STATE = ("environments", "_uniform", "_generator", "_sums", "_lengths", "transitions")

    def __init__(
        self, environments: Environments, agent: Actor, *, seed: int = 0, random_steps: int = 0
    ) -> None:
        if random_steps < 0:
            raise OptionError(f"random_steps is {random_steps!r}", allowed="0 or more")
        self.environments = environments
        self.agent = agent
        self.random_steps = random_steps
        self.transitions = 0
        """Transitions seen so far."""
        # Uniform actions come from the CPU, so that they are the same on every device.
        self._uniform = torch.Generator().manual_seed(seed)
        self._generator = torch.Generator(agent.device).manual_seed(seed)
        self._everywhere = torch.arange(environments.count)
        self._sums = [0.0] * environments.count
        self._lengths = [0] * environments.count

    def collect(self, steps: int) -> Collection:
        """Step all environments `steps` times.

        Returns:
            At most steps · n transitions: steps that only start an episode are dropped.

        Raises:
            EnvironmentFailureError: see `Environments.step`.
        """
        if steps < 1:
            raise OptionError(f"steps is {steps!r}", allowed="1 or more")
        parts: list[tuple[Transitions, Tensor, Tensor, Tensor]] = []
        episodes: list[Episode] = []
        for _ in range(steps):
            action, log_prob = self._act()
            step = self.environments.step(action)
            where, kept, ended = self._everywhere, step.transitions, step.ended
            if not all(step.kept.tolist()):
                where = step.kept.nonzero().squeeze(-1)
                kept, ended, log_prob = kept.select(where), ended[where], log_prob[where]
            parts.append((kept, where, ended, log_prob))
            self.transitions += len(where)
            seen = zip(where.tolist(), kept.reward.tolist(), ended.tolist(), strict=True)
            for i, reward, over in seen:
                self._sums[i] += reward
                self._lengths[i] += 1
                if over:
                    episodes.append(Episode(i, self._sums[i], self._lengths[i]))
                    self._sums[i], self._lengths[i] = 0.0, 0
        transitions, where, ended, log_prob = parts[0]
        if len(parts) > 1:
            batches, where_each, ends, log_probs = zip(*parts, strict=True)
            transitions = Transitions(*(torch.cat(rows) for rows in zip(*batches, strict=True)))
            where, ended, log_prob = (torch.cat(rows) for rows in (where_each, ends, log_probs))
        return Collection(transitions, where, ended, log_prob, self.agent.version, episodes)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; see `Environments.load_state_dict` for episodes under way."""
        super().load_state_dict(state)
        if not self.environments.repeatable or state["environments"]["actions"] is None:
            self._sums = [0.0] * self.environments.count  # new episodes have begun
            self._lengths = [0] * self.environments.count

    def _act(self) -> tuple[Tensor, Tensor]:
        """Actions of all environments, and their log-probabilities, on the CPU."""
        spaces, count = self.environments.spaces, self.environments.count
        if self.transitions < self.random_steps:
            action = spaces.random_action(count, self._uniform)
            return action, torch.full((count,), spaces.random_log_prob)
        observation = self.environments.observation.to(self._generator.device)
        if isinstance(self.agent, CategoricalPolicy):
            action, log_prob = self.agent.draw(observation, self._generator)
        else:
            action = self.agent.sample(observation, self._generator)
            log_prob = self.agent.log_prob(observation, action)
        return action.cpu(), log_prob.cpu()
