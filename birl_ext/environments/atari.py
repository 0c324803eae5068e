"""Atari games as the literature plays them: grey frames, shrunk, skipped and stacked."""

from __future__ import annotations

import re
from typing import Any

from birl_ext.errors import MissingDependencyError, OptionError

try:
    import gymnasium
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TimeLimit
except ImportError:
    raise MissingDependencyError(
        "environments need gymnasium", fix='pip install "birl_ext[rl]"'
    ) from None

__all__ = ["atari_environment", "is_atari", "register_atari"]

_LEGACY = re.compile(r"(?:ALE/)?(\w+?)(?:NoFrameskip|Deterministic)?(?:-ram)?(?:-v\d+)?")


def atari_environment(
    id: str,
    *,
    frame_skip: int = 4,
    stack: int = 4,
    size: int = 84,
    noops: int = 30,
    max_episode_steps: int | None = None,
    **options: Any,
) -> gymnasium.Env[Any, Any]:
    """A game with observations (stack, size, size) uint8, the last frame last.

    Each step repeats its action `frame_skip` times and sums the rewards, unclipped: the return is
    the score. A frame is the maximum over the last two of the console's, in grey. An episode starts
    with 1 to `noops` idle console frames and ends with the game, not with a life; its first
    observation repeats its first frame. Hand it over as
    `make_environments(functools.partial(atari_environment, "ALE/BeamRider-v5"))`.

    Args:
        id: "ALE/<Game>-v5", where the console repeats the last action with probability 1/4
            ("sticky actions"), or "<Game>NoFrameskip-v4", where it does not.
        frame_skip: console frames per step, of which the console shows 60 per second.
        stack: frames per observation.
        size: height and width of a frame, pixels.
        noops: most idle console frames at the start; 0 for none.
        max_episode_steps: after so many steps an episode is cut off; None leaves the console's own
            limit, 108,000 frames.
        options: keyword arguments of ale-py's environment, such as `repeat_action_probability`.

    Raises:
        OptionError: no such game, or a number out of range.
        MissingDependencyError: ale-py or OpenCV is not installed.

    Source: Mnih et al. (2015), methods; Machado et al. (2018), sections 4 and 5.
    """
    for label, value, least in (
        ("frame_skip", frame_skip, 1),
        ("stack", stack, 1),
        ("size", size, 1),
        ("noops", noops, 0),
        ("max_episode_steps", 1 if max_episode_steps is None else max_episode_steps, 1),
    ):
        if value < least:
            raise OptionError(f"{label} is {value!r}", allowed=f"{least} or more")
    register_atari(id)
    spec = gymnasium.registry.get(id)
    if spec is None or not str(spec.entry_point).startswith("ale_py"):
        raise OptionError(
            f"{id!r} is no Atari game",
            allowed='ids of ale-py, such as "ALE/BeamRider-v5"',
            fix=_remedy(id),
        )
    try:
        import cv2  # noqa: F401 (shrinks the frames)
    except ImportError:
        raise MissingDependencyError(
            f"the frames of {id} need OpenCV", fix='pip install "birl_ext[rl]"'
        ) from None
    # The preprocessing reads the screen itself; of the game's own observations, grey ones cost
    # least.
    game = gymnasium.make(id, frameskip=1, obs_type="grayscale", **options)
    frames = AtariPreprocessing(game, noop_max=noops, frame_skip=frame_skip, screen_size=size)
    limited = frames if max_episode_steps is None else TimeLimit(frames, max_episode_steps)
    return FrameStackObservation(limited, stack)


def is_atari(id: str) -> bool:
    """Whether an id can be told to be one of ale-py's before that is imported."""
    return id.startswith("ALE/") or "NoFrameskip" in id


def register_atari(id: str) -> None:
    """Make the ids of ale-py known to gymnasium.

    Args:
        id: that of the game wanted, for the message.

    Raises:
        MissingDependencyError: ale-py is not installed.
    """
    try:
        import ale_py  # noqa: F401 (registers its ids)
    except ImportError:
        raise MissingDependencyError(
            f"{id} needs ale-py", fix='pip install "birl_ext[rl]"'
        ) from None


def _remedy(id: str) -> str:
    """The id that was meant, if there is a game of that name."""
    found = _LEGACY.fullmatch(id)
    meant = f"ALE/{found[1]}-v5" if found else ""
    return f'use "{meant}"' if meant in gymnasium.registry else "check the spelling"
