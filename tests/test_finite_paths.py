"""Paths of a table are those that any policy would be led along, draw by draw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from birl_ext import DenseMDP
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator
from birl_ext.simulators.paths import Policy

STATES, ACTIONS = 6, 3


class Plain:
    """The same policy, which the simulator does not know to be a table."""

    def __init__(self, policy: Tensor) -> None:
        self._table = FiniteFollower(policy)

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        return self._table.sample(observation, generator)


def process(ending: float) -> DenseMDP:
    """Random rows; state 0 is the end, and drawn with the given probability."""
    rows = torch.rand(
        STATES, ACTIONS, STATES, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    rows[..., 0] = 0
    rows = (1 - ending) * rows / rows.sum(-1, keepdim=True)
    rows[..., 0] = ending
    rows[0] = 0
    return DenseMDP(
        torch.zeros(STATES, ACTIONS, dtype=torch.float64),
        rows,
        discount=0.9,
        terminal=torch.arange(STATES) == 0,
        mask=torch.arange(STATES).unsqueeze(-1).expand(STATES, ACTIONS) > 0,
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 40])
@pytest.mark.parametrize("ending", [0.0, 0.05, 0.5])
def test_paths_of_a_table_are_those_of_any_policy(ending: float, steps: int, given: bool) -> None:
    draws = torch.Generator().manual_seed(1)
    policy = torch.rand(STATES, ACTIONS, generator=draws, dtype=torch.float64)
    policy /= policy.sum(-1, keepdim=True)
    first = torch.randint(1, STATES, (7,), generator=draws)
    action = torch.randint(ACTIONS, (7,), generator=draws) if given else None
    simulators = [FiniteSimulator(process(ending), torch.Generator().manual_seed(2)) for _ in "ab"]
    followers: tuple[Policy, ...] = FiniteFollower(policy), Plain(policy)
    for _ in range(2):  # the second begins where the draws of the first have ended
        found, wanted = (
            simulator.continuations(follower, first, action, steps)
            for simulator, follower in zip(simulators, followers, strict=True)
        )
        there = wanted.present
        assert torch.equal(found.present, there)
        assert torch.equal(found.observation, wanted.observation)
        assert torch.equal(found.action[there], wanted.action[there])
        if ending and steps == 40:
            assert not found.present.all()
    assert simulators[0].samples == simulators[1].samples
