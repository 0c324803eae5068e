"""How good a policy is by the environment's own reward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.agents.agent import Actor
from birl_ext.environments.vector import Environments
from birl_ext.errors import OptionError

__all__ = ["Evaluation", "evaluate_agent"]


class Evaluation(NamedTuple):
    """Finished episodes.

    Args:
        rewards: (episodes,) float64, sums of the environment's own reward, undiscounted.
        lengths: (episodes,) int64, steps.
    """

    rewards: Tensor
    lengths: Tensor

    @property
    def mean(self) -> float:
        return float(self.rewards.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN for a single episode."""
        count = len(self.rewards)
        return float(self.rewards.std() / math.sqrt(count)) if count > 1 else math.nan


def evaluate_agent(
    agent: Actor,
    environments: Environments,
    *,
    episodes: int,
    seed: int = 0,
    greedy: bool = True,
    max_steps: int = 10_000_000,
) -> Evaluation:
    """Let an agent play, and count the true reward.

    The environments start from their first episode and the actions from `seed`, so every call sees
    the same episodes and nothing needs to be stored to resume. Each environment plays a number of
    episodes fixed beforehand: taking whichever finish first would favour short ones.

    Args:
        agent: not changed.
        environments: its own, not those of a collector.
        episodes: how many in all.
        seed: of the actions, where they are drawn.
        greedy: the likeliest action; otherwise drawn from the policy.
        max_steps: most steps of each environment.

    Raises:
        EnvironmentFailureError: see `Environments.step`.
        OptionError: `max_steps` were not enough.
    """
    if episodes < 1:
        raise OptionError(f"episodes is {episodes!r}", allowed="1 or more")
    count = environments.count
    quota = [(episodes - i + count - 1) // count for i in range(count)]
    found: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    sums, lengths = [0.0] * count, [0] * count
    generator = torch.Generator(agent.device).manual_seed(seed)
    environments.reset()
    for _ in range(max_steps):
        observation = environments.observation.to(agent.device)
        step = environments.step(agent.act(observation, generator, greedy).cpu())
        rewards = step.transitions.reward.tolist()
        for i in step.kept.nonzero().squeeze(-1).tolist():
            sums[i] += rewards[i]
            lengths[i] += 1
            if step.ended[i]:
                found[i].append((sums[i], lengths[i]))
                sums[i], lengths[i] = 0.0, 0
        if all(len(rows) >= most for rows, most in zip(found, quota, strict=True)):
            break
    else:
        done = sum(min(len(rows), most) for rows, most in zip(found, quota, strict=True))
        raise OptionError(
            f"{done} of {episodes} episodes finished in {max_steps} steps",
            fix="give the environment a time limit, or raise max_steps",
        )
    rows = [row for i in range(count) for row in found[i][: quota[i]]]
    return Evaluation(
        torch.tensor([row[0] for row in rows], dtype=torch.float64),
        torch.tensor([row[1] for row in rows]),
    )
