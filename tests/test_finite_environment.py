"""A finite MDP as an environment: it draws what the MDP says; what nobody can act in is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_run import SMALL, TIMED

import birl_ext
from birl_ext.environments.finite import FiniteEnvironment
from birl_ext.errors import BirlError, ConfigError, OptionError, ShapeError
from birl_ext.simulators.finite import FiniteSimulator

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*found any fragment better than another:UserWarning"
)
LAST = torch.tensor([False, False, False, True])
START = torch.tensor([0.5, 0.25, 0.25, 0.0])


def chain(**changes: Any) -> birl_ext.DenseMDP:
    """Four states, three actions; the last state is terminal."""
    generator = torch.Generator().manual_seed(1)
    transition = torch.rand(4, 3, 4, generator=generator).pow(3)
    transition[:, :, 1] = 0  # nobody gets there
    transition /= transition.sum(-1, keepdim=True)
    reward = torch.rand(4, 3, generator=generator)
    given = {"terminal": LAST, "initial_distribution": START, **changes}
    return birl_ext.DenseMDP(reward, transition, 0.8, **given)


def test_it_draws_from_the_mdp() -> None:
    mdp = chain()
    world = FiniteEnvironment(mdp)
    world.reset(seed=0)
    generator = np.random.default_rng(0)
    count, starts = torch.zeros_like(mdp.transition), torch.zeros(4)
    for _ in range(6000):
        state, ended = world.reset()[0], False
        starts[state] += 1
        while not ended:
            action = int(generator.integers(3))
            after, reward, ended, truncated, _ = world.step(action)
            assert reward == float(mdp.reward[state, action])
            assert not truncated
            assert ended == bool(LAST[state])
            if not ended:
                count[state, action, after] += 1
            state = after
    visits = count.sum(-1, keepdim=True)
    assert int(visits[:3].min()) > 300
    for found, share, tries in (
        (count[:3], mdp.transition[:3], visits[:3]),
        (starts, START, torch.tensor(6000.0)),
    ):
        gap = (found / tries - share).abs()
        assert bool((gap <= 5 * (share * (1 - share) / tries).sqrt() + 1e-6).all())
        assert bool((found[share == 0] == 0).all())


def test_a_terminal_state_without_an_action_pays_nothing() -> None:
    world = FiniteEnvironment(chain(mask=~LAST.unsqueeze(-1).expand(4, 3)))
    world.restore(3)
    assert world.step(1)[1:4] == (0.0, True, False)


def test_an_episode_may_start_anywhere() -> None:
    world = FiniteEnvironment(chain(initial_distribution=None))
    assert {world.reset(seed=seed)[0] for seed in range(50)} == {0, 1, 2, 3}


def untimed(history: Any) -> Any:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in history]


@pytest.mark.parametrize("learner", [birl_ext.SoBiRL, birl_ext.StocSoBiRL, birl_ext.DRLHF])
def test_a_reward_is_learned_in_it(learner: Any, tmp_path: Path) -> None:
    mdp = chain()
    made = learner(mdp, "oracle", episode_steps=9, **SMALL).learn(progress=False)
    assert made.config.discount == 0.8
    assert learner(mdp, episode_steps=9, discount=0.5, **SMALL).config.discount == 0.5
    if learner is birl_ext.StocSoBiRL:
        assert isinstance(made._job._score.simulator, FiniteSimulator)
    sparse = learner(mdp.to_sparse(), "oracle", episode_steps=9, **SMALL).learn(progress=False)
    np.testing.assert_equal(untimed(sparse.history), untimed(made.history))
    again = learner.load(made.save(tmp_path / "saved"), environment=mdp)
    assert again.predict(range(4)).tolist() == made.predict(range(4)).tolist()


@pytest.mark.parametrize(
    ("changes", "settings", "error", "message"),
    [
        ({}, {}, ConfigError, "DenseMDP>, which has no time limit .*episode_steps"),
        ({"terminal": LAST.expand(2, 4)}, {}, ShapeError, r"batch axes \(2,\)"),
        ({"reference": torch.ones(4, 3)}, {}, OptionError, "a reference .*reference=None"),
        (
            {"mask": torch.arange(12).view(4, 3) != 5},
            {},
            OptionError,
            "forbids an action .*at state 1, action 2 .*lower reward",
        ),
        ({"terminal": None, "mask": torch.arange(12).view(4, 3) != 9}, {}, OptionError, "state 3"),
        ({}, {"episode_steps": 9, "follower": "sac"}, ConfigError, "learned by a table"),
    ],
)
def test_what_nobody_can_act_in_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], error: type[BirlError], message: str
) -> None:
    mdp = chain(**changes)
    with pytest.raises(error, match=message):
        birl_ext.SoBiRL(mdp, **{**SMALL, **settings})
