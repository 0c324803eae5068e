"""Films show the episode that was played, and what cannot be drawn is said so."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from cases import untyped
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from birl_ext.environments.atari import atari_environment
from birl_ext.environments.vector import make_environments
from birl_ext.errors import (
    EnvironmentFailureError,
    MissingDependencyError,
    OptionError,
    RenderError,
)
from birl_ext.rollouts.evaluate import evaluate_agent
from birl_ext.rollouts.video import record_video

imageio = pytest.importorskip("imageio.v3")
# imageio's reader leaves its pipes to the garbage collector
reads_a_film = pytest.mark.filterwarnings("ignore:.*ResourceWarning|.*FileIO")


class Lamp(gymnasium.Env[Any, Any]):
    """Draws a grey that is 20 brighter every step, with a dark last column; ends after 8 steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = Box(0, 1, (1,))
    action_space = Discrete(2)

    def __init__(self, render_mode: str | None = None, fault: str = "") -> None:
        self.render_mode = render_mode
        self.fault = fault

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.seen = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.seen += 1
        if self.fault == "step" and self.seen == 3:
            raise RuntimeError("burnt out")
        return np.zeros(1, np.float32), float(self.seen), self.seen == 8, False, {}

    def render(self) -> Any:
        if self.fault == "draw" and self.seen == 3:
            raise RuntimeError("no screen")
        if self.fault == "size" and self.seen == 3:
            return np.zeros((10, 10, 3), np.uint8)
        if self.fault == "none":
            return None
        if self.fault == "grey":
            return np.zeros((37, 51), np.uint8)
        picture = np.full((37, 51, 3), 40 + 20 * self.seen, np.uint8)
        picture[:, -1] = 0
        return picture


def player(action: Any) -> Any:
    """Plays an action, or what a function makes of an observation; only if asked for its best."""

    def act(observation: Tensor, generator: torch.Generator, greedy: bool = False) -> Tensor:
        assert greedy
        return action(observation) if callable(action) else torch.tensor([action])

    return SimpleNamespace(device=torch.device("cpu"), version=0, act=act)


def pictures(path: Path) -> Any:
    return np.stack(list(imageio.imiter(path))).astype(float)


@reads_a_film
def test_a_film_shows_each_step_in_its_size(tmp_path: Path) -> None:
    path = tmp_path / "lamp.mp4"
    video = record_video(player(0), Lamp, path)
    assert video == (path, 8, sum(range(1, 9)), True)
    found = pictures(path)  # type: ignore[unreachable]
    assert found.shape == (8, 38, 52, 3)  # even
    want = 40 + 20 * np.arange(8.0)
    np.testing.assert_allclose(found[:, 4:32, 4:44].mean((1, 2, 3)), want, atol=3)
    assert found[:, :, -1].mean() < 30  # repeats the dark column: nothing was scaled
    assert imageio.immeta(path)["fps"] == 10
    assert list(tmp_path.iterdir()) == [path]

    video = record_video(player(0), Lamp, path, max_steps=3, fps=25)
    assert (video.frames, video.reward, video.ended) == (3, 6.0, False)
    assert pictures(path).shape == (3, 38, 52, 3)  # over the first one
    assert imageio.immeta(path)["fps"] == 25


@reads_a_film
def test_the_episode_is_the_one_that_is_evaluated(tmp_path: Path) -> None:
    lean = player(lambda state: (state[:, 2] > 0).long())
    video = record_video(lean, "CartPole-v1", tmp_path / "pole.mp4", seed=3)
    with make_environments("CartPole-v1", seed=3) as environments:
        found = evaluate_agent(lean, environments, episodes=1)
    assert video.ended
    assert video.frames == int(found.lengths) > 10
    assert video.reward == float(found.rewards)
    seen = pictures(video.path)
    assert seen.shape == (video.frames, 400, 600, 3)
    assert np.abs(seen[-1] - seen[0]).max() > 100  # the pole has moved


@reads_a_film
def test_a_game_is_filmed_in_colour(tmp_path: Path) -> None:
    source = functools.partial(atari_environment, "ALE/BeamRider-v5", noops=0)
    video = record_video(player(0), source, tmp_path / "game.mp4", max_steps=12)
    found = pictures(video.path)
    assert found.shape == (12, 210, 160, 3)
    assert np.abs(found[0] - found[-1]).max() > 100
    assert np.ptp(found, axis=-1).max() > 50


# EGL complains on the error stream, MuJoCo's contexts while they are deleted
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@reads_a_film
def test_a_robot_is_filmed_or_the_lack_of_opengl_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    before = dict(os.environ)
    path = tmp_path / "hopper.mp4"
    try:
        record_video(player([0.0] * 3), "Hopper-v5", path, max_steps=2)
    except RenderError as error:
        assert "MUJOCO_GL=egl" in str(error)  # noqa: PT017 (either is right)
        assert not list(tmp_path.iterdir())
    else:
        assert pictures(path).shape == (2, 480, 480, 3)
        assert pictures(path).std() > 10
    assert os.environ.get("MUJOCO_GL") == before.get("MUJOCO_GL")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_opengl_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.setenv("MUJOCO_GL", "nowhere")
    with pytest.raises(RenderError, match=r"E902 drawing raised .*nowhere.*at environment 'Hopper"):
        record_video(player([0.0] * 3), "Hopper-v5", tmp_path / "hopper.mp4", max_steps=2)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("draw", RenderError, "drawing raised RuntimeError: no screen at environment 'Lamp"),
        ("grey", RenderError, r"its picture is uint8 \(37, 51\) at .*\(height, width, 3\)"),
        ("size", RenderError, "could not be written.*size"),
        ("step", EnvironmentFailureError, "burnt out at environment 0"),
    ],
)
def test_a_film_that_fails_leaves_the_old_one(
    fault: str, error: type, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "lamp.mp4"
    path.write_bytes(b"old")
    with pytest.raises(error, match=words):
        record_video(player(0), Lamp, path, options={"fault": fault})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"

    def blind() -> Lamp:
        return Lamp()

    with pytest.raises(RenderError, match=r"E902 .*unexpected keyword.* at environment 'blind'"):
        record_video(player(0), blind, path)
    with pytest.raises(RenderError, match=r'picture is None at .*it with render_mode="rgb_array"'):
        record_video(player(0), Lamp, path, options={"fault": "none"})
    with make_environments(Lamp, count=2) as environments:
        shapes = [picture.shape for picture in environments.render()]
    assert shapes == [(37, 51, 3)] * 2


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.mp4"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pygame", None)
        with pytest.raises(MissingDependencyError, match=r"pygame.*birl_ext\[rl\]"):
            record_video(player(0), "CartPole-v1", path)
    for module in ("imageio.v2", "imageio_ffmpeg"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingDependencyError, match=r"imageio with ffmpeg.*birl_ext\[rl"):
                record_video(player(0), Lamp, path)
    assert not list(tmp_path.iterdir())


def test_impossible_films_are_refused(tmp_path: Path) -> None:
    for name, keywords, words in (
        ("x.gif", {}, "x.gif.*mp4"),
        ("nowhere/x.mp4", {}, "nowhere is no directory"),
        ("x.mp4", {"max_steps": 0}, "max_steps is 0"),
        ("x.mp4", {"fps": 0}, "fps is 0"),
    ):
        with pytest.raises(OptionError, match=words):
            record_video(player(0), Lamp, tmp_path / name, **untyped(keywords))
