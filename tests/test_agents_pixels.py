"""Atari games look as the literature has them, repeat themselves, and fail by name."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_same_bits
from gymnasium.error import DependencyNotInstalled

from birl_ext.agents.networks import NatureCNN, head_network
from birl_ext.environments.atari import atari_environment
from birl_ext.environments.vector import make_environments
from birl_ext.errors import EnvironmentFailureError, MissingDependencyError, OptionError
from birl_ext.replay.buffer import ReplayBuffer
from birl_ext.replay.frames import FrameReplay
from birl_ext.rollouts.collect import Collector

ale_py = pytest.importorskip("ale_py")
cv2 = pytest.importorskip("cv2")

# gymnasium forks its workers beside torch's idle threads
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

BEAM_RIDER = functools.partial(atari_environment, "ALE/BeamRider-v5")


def collector(environments: Any, seed: int = 0) -> Collector:
    """Acts uniformly."""
    nobody: Any = SimpleNamespace(device=torch.device("cpu"), version=0)
    return Collector(environments, nobody, seed=seed, random_steps=10**9)


def console(game: str, seed: int = 0) -> Any:
    """A bare console, without sticky actions."""
    ale = ale_py.ALEInterface()
    ale.setLoggerMode(ale_py.LoggerMode.Error)
    ale.setInt("random_seed", seed)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path(game))
    ale.reset_game()
    return ale


def test_frames_are_those_of_the_console() -> None:
    """Four console frames a step, the maximum of the last two, shrunk, stacked; rewards summed."""
    ale = console("beam_rider")
    actions = ale.getMinimalActionSet()
    environment = atari_environment("BeamRiderNoFrameskip-v4", noops=0)
    seen, _ = environment.reset(seed=0)

    def shrunk(screens: list[Any]) -> Any:
        return cv2.resize(np.maximum.reduce(screens), (84, 84), interpolation=cv2.INTER_AREA)

    frames = [shrunk([ale.getScreenGrayscale()])] * 4
    score = 0.0
    for action in np.random.default_rng(1).integers(len(actions), size=250):
        np.testing.assert_array_equal(seen, np.stack(frames[-4:]))
        screens, earned = [], 0
        for _ in range(4):
            earned += ale.act(actions[action])
            screens.append(ale.getScreenGrayscale())
        frames.append(shrunk(screens[2:]))
        seen, reward, terminated, _, _ = environment.step(action)
        assert reward == earned
        score += float(reward)
        if terminated:
            break
    assert score >= 44  # one hit: rewards are the game's own, not ±1
    environment.close()


def test_a_lost_life_is_not_the_end() -> None:
    environment = atari_environment("BreakoutNoFrameskip-v4", noops=0)
    environment.reset(seed=0)
    lives, step = 5, 0
    while lives == 5:
        _, _, terminated, truncated, info = environment.step(1 if step == 0 else 0)  # serve, wait
        lives, step = info["lives"], step + 1
    assert (lives, terminated, truncated) == (4, False, False)
    environment.close()


def test_observations_are_stacks_of_bytes_for_the_network() -> None:
    with make_environments(BEAM_RIDER, count=2) as environments:
        spaces = environments.spaces
        assert (spaces.observation_shape, spaces.actions) == ((4, 84, 84), 9)
        assert environments.observation.dtype is torch.uint8
        source = torch.Generator().manual_seed(0)
        network = head_network(
            spaces.observation_shape, spaces.observation_dtype, 9, generator=source
        )
        assert isinstance(network, NatureCNN)
        assert network(environments.observation).shape == (2, 9)
    small = atari_environment("ALE/Pong-v5", frame_skip=2, stack=3, size=42)
    assert small.observation_space.shape == (3, 42, 42)
    small.close()


@pytest.mark.parametrize("parallel", [False, True])
def test_a_game_goes_on_where_it_was(parallel: bool) -> None:
    """Sticky actions included: its chance comes from the seed."""

    def fresh(seed: int) -> Collector:
        return collector(make_environments(BEAM_RIDER, count=2, seed=4, parallel=parallel), seed)

    ours, theirs = fresh(0), fresh(1)
    ours.collect(30)
    state = ours.state_dict()
    theirs.collect(3)
    theirs.load_state_dict(state)
    want, got = ours.collect(20), theirs.collect(20)
    for a, b in zip(got.transitions, want.transitions, strict=True):
        assert_same_bits(a, b, label="field")
    assert ours.environments.repeatable
    for one in (ours, theirs):
        one.environments.close()


def test_episodes_differ_by_their_seed() -> None:
    with make_environments(BEAM_RIDER, count=2, seed=4) as environments:
        found = collector(environments).collect(40).transitions.observation
    assert not torch.equal(found[-2], found[-1])


def test_shared_frames_replay_a_game_to_the_bit() -> None:
    """Pong at 400 console frames an episode, so that episodes end and start on the way."""
    source = functools.partial(
        atari_environment, "ALE/Pong-v5", noops=0, max_num_frames_per_episode=400
    )
    ours, plain = FrameReplay(150), ReplayBuffer(150)
    with make_environments(source, count=2) as environments:
        game = collector(environments)
        parts = [game.collect(steps) for steps in (1, 60, 90, 30)]
    assert sum(len(found.episodes) for found in parts) >= 2
    for found in parts:
        ours.record(found)
        plain.record(found)
        draws = [each.sample(200, torch.Generator().manual_seed(1)) for each in (ours, plain)]
        for a, b in zip(*draws, strict=True):
            assert_same_bits(a, b, label="field")
    assert ours.frames <= 150 + 2 * 2 * 4


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, words in (("ale_py", "needs ale-py"), ("cv2", "need OpenCV")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingDependencyError, match=rf"{words}.*birl_ext\[rl\]"):
                make_environments(BEAM_RIDER)
            if module == "ale_py":
                for id in ("ALE/BeamRider-v5", "BeamRiderNoFrameskip-v4"):
                    with pytest.raises(MissingDependencyError, match="ale-py"):
                        make_environments(id)

    def robot() -> Any:  # what gymnasium raises without mujoco, box2d and the like
        raise DependencyNotInstalled("arms are not installed")

    with pytest.raises(MissingDependencyError, match=r"'robot' needs.*arms.*birl_ext\[rl\]"):
        make_environments(robot)


@pytest.mark.parametrize(
    ("id", "words"),
    [
        ("BeamRiderDeterministic-v4", 'use "ALE/BeamRider-v5"'),
        ("BeamRider-v5", 'use "ALE/BeamRider-v5"'),
        ("BeamRider-ram-v4", 'use "ALE/BeamRider-v5"'),
        ("BeamRider", 'use "ALE/BeamRider-v5"'),
        ("ALE/BeamRidder-v5", "check the spelling"),
        ("CartPole-v1", "check the spelling"),
        ("os:BeamRider-v5", "check the spelling"),
    ],
)
def test_an_id_that_is_no_game_is_told_which_one_is(id: str, words: str) -> None:
    with pytest.raises(OptionError, match=f"'{id}' is no Atari game .*{words}"):
        make_environments(functools.partial(atari_environment, id))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"frame_skip": 0}, "frame_skip is 0"),
        ({"stack": 0}, "stack is 0"),
        ({"size": 0}, "size is 0"),
        ({"noops": -1}, "noops is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(keywords: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        atari_environment("ALE/BeamRider-v5", **keywords)


def test_failures_name_the_game() -> None:
    source = functools.partial(atari_environment, "ALE/Pong-v5", stack=2)
    with pytest.raises(
        EnvironmentFailureError,
        match=r"building raised .* at environment \"atari_environment\('ALE/Pong-v5', stack=2\)\"",
    ):
        make_environments(source, options={"wheels": 3})
