"""How often a run writes checkpoints."""

from __future__ import annotations

import dataclasses
import math

from birl_ext.errors import ConfigError

__all__ = ["MINUTES", "SHARE", "Pace"]

MINUTES = 0.5
"""Between checkpoints, if nobody says otherwise and `SHARE` allows it."""

SHARE = 0.05
"""Part of the time that saving may take, if nobody says how often it is due."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """When the next checkpoint is due.

    Args:
        every: outer steps between checkpoints.
        minutes: between checkpoints, instead. With neither, `MINUTES` lie between two, and more
            where saving would take over `SHARE` of the time, as it can with gigabytes of replay.

    Raises:
        ConfigError: both are given, or one is not positive.
    """

    every: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.minutes is not None:
            raise ConfigError(
                "--checkpoint-every excludes --checkpoint-minutes",
                fix="leave one of them out: checkpoints are placed by steps or by time",
            )
        if self.every is not None and self.every < 1:
            raise ConfigError(
                f"--checkpoint-every is {self.every}",
                allowed="1 or more",
                fix="leave it out for one checkpoint every half minute",
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(
                f"--checkpoint-minutes is {self.minutes}",
                allowed="more than 0, and finite",
                fix="leave it out for one checkpoint every half minute",
            )

    def due(self, *, steps: int, seconds: float, cost: float) -> bool:
        """Whether it is.

        Args:
            steps: taken since the last one.
            seconds: since the last one was finished.
            cost: seconds that it took.
        """
        if self.every is not None:
            return steps >= self.every
        if self.minutes is not None:
            return seconds >= 60 * self.minutes
        return seconds >= max(60 * MINUTES, cost * (1 - SHARE) / SHARE)
