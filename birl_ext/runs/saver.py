"""Writing the checkpoints of a run, none of them newer than its metrics."""

from __future__ import annotations

import time
import warnings

from birl_ext.errors import CheckpointWriteError
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.runs.config import to_plain
from birl_ext.runs.directory import MetricsWriter
from birl_ext.runs.job import Job
from birl_ext.runs.logger import Logger
from birl_ext.runs.pace import Pace
from birl_ext.runs.versions import versions

__all__ = ["Clock", "Saver"]


class Clock:
    """Seconds of a run over all its sessions.

    Args:
        before: those of the sessions before this one.
    """

    def __init__(self, before: float) -> None:
        self._zero = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._zero


class Saver:
    """Writes the checkpoints of a run.

    Args:
        job: whose state is written.
        store: where to.
        logger: what must be on the disk before a checkpoint.
        metrics: whose digest is kept with it.
        clock: of the run.
        pace: when one is due.
        saved: step of the checkpoint that is there already, or None.
    """

    def __init__(
        self,
        job: Job,
        store: CheckpointStore,
        logger: Logger,
        metrics: MetricsWriter,
        clock: Clock,
        pace: Pace,
        *,
        saved: int | None,
    ) -> None:
        self._job, self._store, self._clock = job, store, clock
        self._logger, self._metrics = logger, metrics
        self._pace, self._saved = pace, saved
        self._tried, self._tried_at, self._cost = saved or 0, clock.seconds, 0.0

    @property
    def saved(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._saved

    def save(self, step: int) -> None:
        """Write one, unless this step has one."""
        if step == self._saved:
            return
        started = self._clock.seconds
        try:
            self._logger.sync()
            self._store.save(
                self._job.state_dict(),
                step=step,
                config=to_plain(self._job.config),
                versions=versions(),
                seconds=started,
                metrics=self._metrics.digest,
            )
        finally:
            self._tried, self._tried_at = step, self._clock.seconds
            self._cost = self._tried_at - started
        self._saved = step

    def save_if_due(self, step: int) -> None:
        """Write one if it is time to; a failure only warns."""
        steps, seconds = step - self._tried, self._clock.seconds - self._tried_at
        if not self._pace.due(steps=steps, seconds=seconds, cost=self._cost):
            return
        try:
            self.save(step)
        except CheckpointWriteError as error:
            # The disk may have room again later; only the last save must succeed.
            warnings.warn(str(error), stacklevel=2)
