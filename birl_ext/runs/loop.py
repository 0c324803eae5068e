"""The loop of a run: steps, metrics, checkpoints, signals, and the result at the end."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from birl_ext.errors import CheckpointIncompatibleError, JobError, MissingDependencyError
from birl_ext.progress import progress
from birl_ext.runs.checkpoint import Checkpoint, CheckpointStore
from birl_ext.runs.config import differences, to_plain
from birl_ext.runs.directory import MetricsWriter, RunDirectory, plain
from birl_ext.runs.job import Job, WritesFiles, checked_metrics, require_job
from birl_ext.runs.logger import OpenLogger, open_loggers
from birl_ext.runs.pace import Pace
from birl_ext.runs.saver import Clock, Saver
from birl_ext.runs.versions import versions

__all__ = ["RunOutcome", "draw_figures", "restore", "run", "summarise"]


class RunOutcome(NamedTuple):
    """How a run ended.

    Args:
        step: outer steps taken.
        summary: what summary.json holds; None if the run was stopped.
        stopped_by: the signal that stopped it, or None.
    """

    step: int
    summary: dict[str, Any] | None
    stopped_by: signal.Signals | None


def run(
    job: Job,
    directory: RunDirectory,
    *,
    checkpoint_every: int | None = None,
    checkpoint_minutes: float | None = None,
    loggers: Sequence[OpenLogger] = (),
) -> RunOutcome:
    """Run a job to its end, or until a signal, from its newest checkpoint if it has one.

    A signal ends the run after the step at work, with a checkpoint; a second Ctrl-C ends it at
    once, with the checkpoint before. A job that raises leaves its last checkpoint too, and a note
    on its error says which.

    Args:
        job: built from ``directory.config``.
        directory: where the files go.
        checkpoint_every: steps between checkpoints.
        checkpoint_minutes: minutes between them, instead. With neither, half a minute, and more
            where saving would take over a twentieth of the time.
        loggers: where the metrics go besides metrics.jsonl.

    Returns:
        The outcome; a finished run has its summary.json and its last checkpoint.

    Raises:
        ConfigError: steps and minutes between checkpoints, or an impossible number of either.
        CheckpointIncompatibleError: the checkpoint belongs to another configuration.
        CheckpointCorruptError: there are checkpoints and none verifies, or steps and none is there.
        CheckpointWriteError: the last checkpoint could not be written; earlier ones are intact.
        FileFormatError: the metrics before the checkpoint were altered or cut short.
        JobError: the job does not keep its contract.
    """
    require_job(job)
    pace = Pace(checkpoint_every, checkpoint_minutes)
    if changed := differences(directory.config, to_plain(job.config)):
        raise CheckpointIncompatibleError(
            f"the configuration differs: {'; '.join(changed)}", where=str(directory.config_path)
        )
    store = CheckpointStore(directory.checkpoints)
    with directory.lock(), _attached(job, directory):
        store.tidy()
        found = restore(job, store) if store.paths() else None
        if found is None:
            directory.check_unstarted()
        step, seconds, digest = (
            (found.step, found.seconds, found.metrics) if found else (0, 0.0, "")
        )
        clock = Clock(seconds)
        metrics = MetricsWriter(directory, after=step, digest=digest)
        with (
            open_loggers(metrics, loggers, directory, after=step) as logger,
            stop_requests() as stop,
            progress(directory.problem, total=job.total_steps, completed=step) as report,
        ):
            saved = step if found else None
            saver = Saver(job, store, logger, metrics, clock, pace, saved=saved)
            saver.save(step)  # for a first step that fails
            while not job.done and not stop:
                with _told_where(saver, directory):
                    values = checked_metrics(job.step(), job)
                step += 1
                logger.append({"step": step, **values})
                report(step, values)
                saver.save_if_due(step)
            saver.save(step)
        if not job.done:
            return RunOutcome(step, None, stop[0])

        summary = summarise(job, directory, step=step, seconds=clock.seconds)
        directory.write_summary(summary)
        return RunOutcome(step, summary, None)


@contextlib.contextmanager
def _told_where(saver: Saver, directory: RunDirectory) -> Iterator[None]:
    """A step that fails tells of the newest checkpoint; from there it may fail again."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"The newest checkpoint is of step {saver.saved}; what failed is tried again from "
            f"there with: birl run --resume {shlex.quote(str(directory.path))}"
        )
        raise


@contextlib.contextmanager
def _attached(job: Job, directory: RunDirectory) -> Iterator[None]:
    """Let a job that writes files have its directory."""
    if not isinstance(job, WritesFiles):
        yield
        return
    job.attach(directory)
    try:
        yield
    finally:
        job.detach()


def restore(job: Job, store: CheckpointStore) -> Checkpoint:
    """Give the job its newest intact checkpoint, and return that."""
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
    return found


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
    found = job.summary()
    if not isinstance(found, Mapping):
        raise JobError(
            f"{type(job).__name__}.summary returned {type(found).__name__}",
            allowed="a mapping from names to values",
            fix="return a dict",
        )
    return dict(plain({**common, **found, **common}))


def draw_figures(
    job: Job, directory: RunDirectory, summary: Mapping[str, Any]
) -> tuple[list[Path], list[str]]:
    """Draw the job's figures from the files of the run.

    Returns:
        The paths written, and the names that could not be drawn because matplotlib is missing.
    """
    figures = job.figures(directory.history(), summary)
    if not isinstance(figures, Mapping) or not all(map(callable, figures.values())):
        raise JobError(
            f"{type(job).__name__}.figures returned {figures!r:.200}",
            allowed="a mapping from names to functions that draw",
            fix="return a dict of functions without arguments; {} for no figures",
        )
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
