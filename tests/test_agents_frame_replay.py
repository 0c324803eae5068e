"""Replay of shared frames is the plain replay in a fraction of its memory, to the bit."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from closeness import assert_same_bits
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import FrameStackObservation
from torch import Tensor

import birl_ext.replay.frames
from birl_ext.environments.vector import make_environments
from birl_ext.errors import DtypeError, OptionError, ShapeError, SizeLimitError
from birl_ext.replay.buffer import ReplayBuffer
from birl_ext.replay.frames import FrameReplay
from birl_ext.rollouts.collect import Collection, Collector

STACK = 3


class Film(gymnasium.Env[Any, Any]):
    """Frames of 2 × 2: all different, or of so few kinds that they often look alike by chance.

    Episodes have 1 to 2 · `length` − 1 steps and end in both ways.
    """

    observation_space = Box(0, 255, (2, 2), np.uint8)
    action_space = Discrete(2)

    def __init__(self, kinds: int | None, length: int = 4) -> None:
        self.kinds, self.length = kinds, length

    def frame(self) -> Any:
        if self.kinds is None:
            return self.np_random.integers(256, size=(2, 2), dtype=np.uint8)
        frame = np.zeros((2, 2), np.uint8)
        frame[1, 0] = self.np_random.integers(self.kinds)
        return frame

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 2 * self.length))
        return self.frame(), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        over, cut = self.left == 0, bool(self.np_random.integers(2))
        return self.frame(), float(self.np_random.normal()), over and not cut, over and cut, {}


@functools.cache
def film(
    parts: tuple[int, ...],
    *,
    count: int = 1,
    kinds: int | None = None,
    length: int = 4,
    padding: str = "reset",
    seed: int = 0,
) -> list[Collection]:
    """What a collector finds in `count` environments, in parts of so many steps."""

    def build() -> Any:
        return FrameStackObservation(Film(kinds, length), STACK, padding_type=padding)

    nobody: Any = SimpleNamespace(device=torch.device("cpu"), version=0)
    with make_environments(build, count=count, seed=seed) as environments:
        source = Collector(environments, nobody, random_steps=10**9)
        return [source.collect(steps) for steps in parts]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_the_same(ours: FrameReplay, plain: ReplayBuffer | FrameReplay, size: int = 300) -> None:
    assert len(ours) == len(plain)
    for name, a, b in zip(
        ("observation", "action", "next_observation", "terminated", "reward"),
        ours.sample(size, generator()),
        plain.sample(size, generator()),
        strict=True,
    ):
        assert_same_bits(a, b, label=name)


def cut(found: Collection, keep: Tensor) -> Collection:
    return found._replace(
        transitions=found.transitions.select(keep),
        environment=found.environment[keep],
        ended=found.ended[keep],
    )


@pytest.mark.parametrize("capacity", [1, 7, 64, 500])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kinds", [None, 2])
@pytest.mark.parametrize("padding", ["reset", "zero"])
def test_it_holds_what_the_plain_replay_holds(
    capacity: int,
    count: int,
    kinds: int | None,
    padding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(birl_ext.replay.frames, "_PIECE", 30)  # several in the longest part
    ours, plain = FrameReplay(capacity), ReplayBuffer(capacity)
    for found in film((1, 1, 6, 2, 40, 3, 70), count=count, kinds=kinds, padding=padding):
        ours.record(found)
        plain.record(found)
        assert_the_same(ours, plain)


def test_rows_left_out_leave_no_wrong_frame() -> None:
    """Streams torn without an end, and environments that pause."""
    ours, plain = FrameReplay(30), ReplayBuffer(30)
    source = generator()
    for found in film((9,) * 12, count=4, kinds=2):
        keep = (torch.rand(len(found.ended), generator=source) < 0.6).nonzero().squeeze(-1)
        ours.record(cut(found, keep))
        plain.record(cut(found, keep))
        assert_the_same(ours, plain)


@pytest.mark.parametrize("parts", [(200,), (1,) * 60, (7,) * 20])
def test_each_frame_is_held_once_and_let_go(parts: tuple[int, ...]) -> None:
    """As many as differ among those that rows show, or that an environment showed last."""
    ours, plain = FrameReplay(40), ReplayBuffer(40)
    latest: dict[Any, Any] = {}
    for found in film(parts, count=2):
        ours.record(found)
        plain.record(found)
        after = found.transitions.next_observation
        latest |= dict(zip(found.environment.tolist(), after, strict=True))
        held = plain.state_dict()["held"]
        shown = [held["observation"], held["next_observation"], torch.stack(list(latest.values()))]
        frames = torch.cat([each.flatten(0, 1) for each in shown])
        assert ours.frames == len(frames.unique(dim=0))


def test_paths_are_those_of_the_plain_replay() -> None:
    ours, plain = FrameReplay(40, linked=True), ReplayBuffer(40, linked=True)
    for found in film((9,) * 6, count=3, kinds=2):
        ours.record(found)
        plain.record(found)
        (paths, present), (want, there) = (one.ahead(100, 4, generator()) for one in (ours, plain))
        assert torch.equal(present, there)
        for a, b in zip(paths, want, strict=True):
            assert_same_bits(a, b, label="path")
    assert bool(present[3].any())
    assert not bool(present[3].all())
    again = FrameReplay(40, linked=True)
    again.load_state_dict(ours.state_dict())
    for a, b in zip(again.ahead(100, 4, generator())[0], paths, strict=True):
        assert_same_bits(a, b, label="resumed")


def test_a_long_episode_takes_a_frame_a_step() -> None:
    (found,) = film((100,), length=10**6)
    ours, small = FrameReplay(500), FrameReplay(20)
    ours.record(found)
    assert ours.frames == 101
    small.record(found)
    assert small.frames == 20 + STACK


def test_a_snapshot_goes_on_like_the_original() -> None:
    parts = film((30, 11, 40, 5), count=3, kinds=3)
    ours, theirs, plain = FrameReplay(50), FrameReplay(50), ReplayBuffer(50)
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(OptionError, match="empty"):
        theirs.sample(1, generator())
    for found in parts[:2]:
        ours.record(found)
        plain.record(found)
    theirs.record(parts[3])  # forgotten below
    state = ours.state_dict()
    assert len(state["frames"]) == ours.frames  # what is held, not what is reserved
    for found in parts[2:]:
        ours.record(found)
    theirs.load_state_dict(state)
    assert_the_same(theirs, plain)
    for found in parts[2:]:
        theirs.record(found)
        plain.record(found)
    assert_the_same(theirs, ours)
    assert_the_same(theirs, plain)
    assert theirs.frames == ours.frames
    with pytest.raises(OptionError, match="stored capacity is 50"):
        FrameReplay(51).load_state_dict(state)
    theirs.load_state_dict(FrameReplay(50).state_dict())
    assert len(theirs) == theirs.frames == 0


def test_memory_grows_for_short_episodes() -> None:
    """Three frames a step: a blank one, the first and the last."""
    ours, theirs, plain = FrameReplay(300), FrameReplay(300), ReplayBuffer(300)
    for found in film((200, 200), count=2, length=1, padding="zero"):
        ours.record(found)
        plain.record(found)
    assert ours.frames == 3 * 300
    assert_the_same(ours, plain)
    theirs.load_state_dict(ours.state_dict())
    assert_the_same(theirs, plain)


def swapped(stack: Tensor) -> Tensor:
    return stack[:, [1, 0, *range(2, STACK)]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda rows: rows._replace(next_observation=rows.observation),
            OptionError,
            r"not the observation moved on by one frame at row \d+, environment \d+ .*FrameStackOb",
        ),
        (
            lambda rows: rows._replace(observation=swapped(rows.observation)),
            OptionError,
            "moved on by one frame",
        ),
        (
            lambda rows: rows._replace(
                observation=rows.observation.flip(1), next_observation=rows.next_observation.flip(1)
            ),
            OptionError,
            "the latest last",
        ),
        (
            lambda rows: rows._replace(
                observation=rows.observation.float(), next_observation=rows.next_observation.float()
            ),
            DtypeError,
            "leave the scaling",
        ),
        (
            lambda rows: rows._replace(
                observation=rows.observation[:, 0, 0], next_observation=rows.observation[:, 0, 0]
            ),
            ShapeError,
            "use ReplayBuffer",
        ),
        (
            lambda rows: rows._replace(
                observation=rows.observation[..., :1],
                next_observation=rows.next_observation[..., :1],
            ),
            ShapeError,
            r"frames have shape \(2, 1\) \(allowed: \(2, 2\)",
        ),
        (
            lambda rows: rows._replace(
                observation=rows.observation[:, 1:], next_observation=rows.next_observation[:, 1:]
            ),
            ShapeError,
            r"observation has shape \(60, 2\) \(allowed: \(60, 3\)",
        ),
        (lambda rows: rows._replace(reward=rows.reward.double()), DtypeError, "reward is"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(change: Any, error: type, words: str) -> None:
    first, second = film((20, 30), count=2)
    ours, plain = FrameReplay(70), ReplayBuffer(70)
    ours.record(first)
    plain.record(first)
    with pytest.raises(error, match=words):
        ours.record(second._replace(transitions=change(second.transitions)))
    assert_the_same(ours, plain)  # nothing was written
    ours.record(second)
    plain.record(second)
    assert_the_same(ours, plain)


def test_environments_need_numbers() -> None:
    (found,) = film((5,))
    with pytest.raises(ShapeError, match="environment has shape"):
        FrameReplay(9).record(found._replace(environment=torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(OptionError, match="capacity is 0"):
        FrameReplay(0)


def test_more_frames_than_fit_into_the_memory_are_named() -> None:
    (found,) = film((5,))
    with pytest.raises(SizeLimitError, match=r"10{14} transitions needs .* GiB of this machine"):
        FrameReplay(10**14).record(found)
