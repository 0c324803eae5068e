"""The loop of a run: steps, metrics, checkpoints, signals, and the result at the end."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from birl_ext.errors import (
    CheckpointIncompatibleError,
    CheckpointWriteError,
    MissingDependencyError,
)
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.runs.config import differences, to_plain
from birl_ext.runs.directory import MetricsWriter, RunDirectory, plain
from birl_ext.runs.job import Job
from birl_ext.runs.progress import progress
from birl_ext.runs.versions import versions

__all__ = ["Outcome", "draw_figures", "restore", "run", "summarise"]

SECONDS_BETWEEN_CHECKPOINTS = 30.0


class Outcome(NamedTuple):
    """How a run ended.

    Args:
        step: outer steps taken.
        summary: what summary.json holds; None if the run was stopped.
        stopped_by: the signal that stopped it, or None.
    """

    step: int
    summary: dict[str, Any] | None
    stopped_by: signal.Signals | None


def run(job: Job, directory: RunDirectory, *, checkpoint_every: int | None = None) -> Outcome:
    """Run a job to its end, or until a signal, from its newest checkpoint if it has one.

    A signal ends the run after the step at work, with a checkpoint; a second Ctrl-C ends it at
    once, with the checkpoint before. A job that raises leaves its last checkpoint too.

    Args:
        job: built from ``directory.config``.
        directory: where the files go.
        checkpoint_every: steps between checkpoints; None writes one every 30 seconds.

    Returns:
        The outcome; a finished run has its summary.json and its last checkpoint.

    Raises:
        CheckpointIncompatibleError: the checkpoint belongs to another configuration.
        CheckpointCorruptError: there are checkpoints and none verifies.
        CheckpointWriteError: the last checkpoint could not be written; earlier ones are intact.
    """
    if changed := differences(directory.config, to_plain(job.config)):
        raise CheckpointIncompatibleError(
            f"the configuration differs: {'; '.join(changed)}", where=str(directory.config_path)
        )
    store = CheckpointStore(directory.checkpoints)
    with directory.lock():
        step, seconds = restore(job, store) if store.paths() else (0, 0.0)
        clock = _Clock(seconds)
        with (
            MetricsWriter(directory, after=step) as metrics,
            stop_requests() as stop,
            progress(directory.problem, total=job.total_steps, completed=step) as report,
        ):
            saver = _Saver(job, store, metrics, clock, saved=step if store.paths() else None)
            while not job.done and not stop:
                values = {name: float(value) for name, value in job.step().items()}
                step += 1
                metrics.append({"step": step, **values})
                report(step, values)
                saver.save_if_due(step, checkpoint_every)
            saver.save(step)
        if not job.done:
            return Outcome(step, None, stop[0])

        summary = summarise(job, directory, step=step, seconds=clock.seconds)
        directory.write_summary(summary)
        return Outcome(step, summary, None)


class _Clock:
    """Seconds of a run over all its sessions."""

    def __init__(self, before: float) -> None:
        self._zero = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._zero


class _Saver:
    """Writes the checkpoints of a run; `saved` is the step of the one that is there already."""

    def __init__(
        self,
        job: Job,
        store: CheckpointStore,
        metrics: MetricsWriter,
        clock: _Clock,
        *,
        saved: int | None,
    ) -> None:
        self._job, self._store, self._metrics, self._clock = job, store, metrics, clock
        self._saved = saved
        self._tried, self._tried_at = saved or 0, clock.seconds

    def save(self, step: int) -> None:
        """Write one, unless this step has one."""
        if step == self._saved:
            return
        self._tried, self._tried_at = step, self._clock.seconds
        self._metrics.sync()
        self._store.save(
            self._job.state_dict(),
            step=step,
            config=to_plain(self._job.config),
            versions=versions(),
            seconds=self._clock.seconds,
        )
        self._saved = step

    def save_if_due(self, step: int, every: int | None) -> None:
        """Write one if `every` steps, or 30 seconds, have passed; a failure only warns."""
        if every is not None:
            due = step - self._tried >= every
        else:
            due = self._clock.seconds - self._tried_at >= SECONDS_BETWEEN_CHECKPOINTS
        if not due:
            return
        try:
            self.save(step)
        except CheckpointWriteError as error:
            # The disk may have room again later; only the last save must succeed.
            warnings.warn(str(error), stacklevel=2)


def restore(job: Job, store: CheckpointStore) -> tuple[int, float]:
    """Give the job its newest intact checkpoint; return the steps and the seconds behind it."""
    found = store.load(to_plain(job.config))
    changed = [
        f"{name} {found.versions.get(name, 'absent')} -> {version}"
        for name, version in versions().items()
        if found.versions.get(name) != version
    ]
    if changed:
        warnings.warn(
            f"the checkpoint was written by other versions ({', '.join(changed)}): "
            "the run goes on, but not to the same bits",
            stacklevel=2,
        )
    job.load_state_dict(found.state)
    return found.step, found.seconds


def summarise(
    job: Job, directory: RunDirectory, *, step: int, seconds: float | None
) -> dict[str, Any]:
    """The job's summary with what every run reports, as plain values."""
    common = {
        "problem": directory.problem,
        "seed": job.config.seed,
        "steps": step,
        "seconds": seconds,
        "versions": versions(),
    }
    return dict(plain({**common, **job.summary()}))


def draw_figures(
    job: Job, directory: RunDirectory, summary: Mapping[str, Any]
) -> tuple[list[Path], list[str]]:
    """Draw the job's figures from the files of the run.

    Returns:
        The paths written, and the names that could not be drawn because matplotlib is missing.
    """
    figures = job.figures(directory.history(), summary)
    try:
        from birl_ext.runs import plots
    except MissingDependencyError:
        return [], list(figures)
    written = []
    with plots.style():
        for name, draw in figures.items():
            written += plots.save(draw(), directory.figures / name)
    return written, []


@contextlib.contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of acting on them; Ctrl-C again interrupts.

    Signals that the process was started to ignore, as under nohup, stay ignored. Outside the main
    thread signals cannot be handled, and the list stays empty.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if len(received) > 1:
            # Schedulers repeat SIGTERM, a closing terminal SIGHUP: only a person is in a hurry.
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        # The terminal may be gone, or the signal may have cut into another print.
        with contextlib.suppress(OSError, RuntimeError):
            print(
                "birl: stopping after this step (Ctrl-C again: at once, from the last checkpoint)",
                file=sys.stderr,
            )

    handled = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    previous = {number: signal.getsignal(number) for number in handled}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
