"""An episode as a film."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from birl_ext.agents.agent import Actor
from birl_ext.environments.vector import Environments, make_environments
from birl_ext.errors import (
    EnvironmentFailureError,
    MissingDependencyError,
    OptionError,
    RenderError,
)
from birl_ext.files import replacing

if TYPE_CHECKING:
    import gymnasium

__all__ = ["Video", "film_writer", "record_video"]


class Video(NamedTuple):
    """A film that was written.

    Args:
        path: an mp4 file.
        frames: pictures in it, one per step.
        reward: sum of the environment's own over them, undiscounted.
        ended: whether the episode did, or was left at `max_steps`.
    """

    path: Path
    frames: int
    reward: float
    ended: bool


def record_video(
    agent: Actor,
    source: str | Callable[..., gymnasium.Env[Any, Any]],
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    max_steps: int = 10_000,
    fps: float | None = None,
) -> Video:
    """Play one greedy episode and film it: the first of environments with this seed.

    A picture shows what an action answers, so that of the end is missing. Odd heights and widths
    get one more row or column, since most players show no others. The file appears complete or not
    at all: it is written beside its place and renamed.

    Args:
        agent: not changed.
        source: an id, or a function that builds an environment and takes `render_mode`.
        path: ends in ".mp4".
        seed: of the environment.
        options: keyword arguments of the environment.
        max_steps: most pictures.
        fps: pictures per second; None for what the environment asks for.

    Raises:
        RenderError: the environment cannot be drawn or not be built for it, or ffmpeg failed.
        MissingDependencyError: imageio with ffmpeg is not installed, or what the environment needs.
        EnvironmentFailureError: it failed on the way.
        OptionError: an impossible option.
    """
    target = Path(path)
    if target.suffix != ".mp4":
        raise OptionError(f"the film would be {target.name!r}", allowed="names that end in .mp4")
    if not target.parent.is_dir():
        raise OptionError(f"{target.parent} is no directory", fix="make it first")
    if max_steps < 1:
        raise OptionError(f"max_steps is {max_steps!r}", allowed="1 or more")
    if fps is not None and not fps > 0:
        raise OptionError(f"fps is {fps!r}", allowed="more than 0")
    writer = film_writer()
    try:
        environments = make_environments(
            source, seed=seed, options={**(options or {}), "render_mode": "rgb_array"}
        )
    except EnvironmentFailureError as error:
        raise RenderError(
            f'with render_mode="rgb_array", {error.what}',
            where=error.where,
            fix="take one that accepts render_mode; if MuJoCo is at fault, unset MUJOCO_GL",
        ) from error
    with environments, replacing(target) as draft:
        rate = fps if fps is not None else environments.pictures_per_second
        # 1: sizes are left as they are, `_append` sees to them
        film = writer(draft, format="FFMPEG", mode="I", fps=rate, macro_block_size=1)
        with contextlib.closing(film):  # its own `with` leaves ffmpeg running after an error
            frames, reward, ended = _play(agent, environments, film, max_steps)
    return Video(target, frames, reward, ended)


def _play(
    agent: Actor, environments: Environments, film: Any, max_steps: int
) -> tuple[int, float, bool]:
    """Frames, reward, and whether it ended."""
    generator = torch.Generator(agent.device).manual_seed(0)  # a greedy action draws nothing
    reward = 0.0
    for step in range(1, max_steps + 1):
        with _offscreen():
            picture = environments.render()[0]
        _append(film, picture)
        observation = environments.observation.to(agent.device)
        found = environments.step(agent.act(observation, generator, greedy=True).cpu())
        reward += float(found.transitions.reward)
        if bool(found.ended):
            return step, reward, True
    return max_steps, reward, False


def _append(film: Any, picture: NDArray[np.uint8]) -> None:
    """Write a picture, the last row or column repeated where their number is odd."""
    height, width, _ = picture.shape
    even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    try:
        film.append_data(even)
    except (OSError, ValueError) as error:  # ffmpeg died, or the size is not that of the first
        raise RenderError(
            f"the film could not be written: {error}",
            fix="make room on the disk, and keep the pictures' size",
        ) from error


@contextlib.contextmanager
def _offscreen() -> Iterator[None]:
    """Let MuJoCo draw without a screen, unless something else is asked for.

    Where there is none, its first choice fails in a way that keeps gymnasium from trying EGL.
    """
    chosen = any(os.environ.get(name) for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"))
    if chosen:
        yield
        return
    os.environ["MUJOCO_GL"] = "egl"
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]


def film_writer() -> Any:
    """imageio's function that opens a film.

    Raises:
        MissingDependencyError: imageio with ffmpeg is not installed.
    """
    try:
        import imageio.v2
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f"a film needs imageio with ffmpeg: {error}", fix='pip install "birl_ext[rl]"'
        ) from None
    return imageio.v2.get_writer
