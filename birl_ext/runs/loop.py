"""The loop of a run: steps, metrics, checkpoints, signals, and the result at the end."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from birl_ext.errors import (
    BirlError,
    CheckpointIncompatibleError,
    CheckpointWriteError,
    ConfigError,
    JobError,
    MissingDependencyError,
    warn,
)
from birl_ext.progress import progress
from birl_ext.runs.checkpoint import Checkpoint, CheckpointStore
from birl_ext.runs.config import differences, places, to_plain
from birl_ext.runs.directory import MetricsWriter, RunDirectory, to_json
from birl_ext.runs.job import Job, Logger, WritesFiles, checked_metrics, require_job
from birl_ext.runs.versions import versions

__all__ = [
    "RunOutcome",
    "Saver",
    "check_pace",
    "draw_figures",
    "of_another_version",
    "restore",
    "run",
    "summarise",
]

SECONDS = 30.0
"""Between checkpoints, if nobody says otherwise and `SHARE` allows it."""

SHARE = 0.05
"""Part of the time that saving may take, if nobody says how often it is due."""


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
    loggers: Sequence[Logger] = (),
    show: bool = True,
    again: str = "",
) -> RunOutcome:
    """Run a job to its end, or until a signal, from its newest checkpoint if it has one.

    A signal ends the run after the step at work, with a checkpoint; a second Ctrl-C ends it at
    once, with the checkpoint before. A job that raises leaves its last checkpoint too, and a note
    on its error says which.

    Args:
        job: built from ``directory.config``.
        directory: where the files go.
        checkpoint_every: outer steps between checkpoints. By default half a minute lies between
            them, and more where saving would take over a twentieth of the time.
        loggers: called with each row of metrics, after it is in metrics.jsonl. A resumed run calls
            them again with the rows since its checkpoint.
        show: the progress, on stderr.
        again: what goes on with the run, for the note; by default the command.

    Returns:
        The outcome; a finished run has its summary.json and its last checkpoint.

    Raises:
        ConfigError: an impossible number of steps between checkpoints.
        CheckpointIncompatibleError: the checkpoint belongs to another configuration.
        CheckpointCorruptError: there are checkpoints and none verifies, or steps and none is there.
        CheckpointWriteError: the last checkpoint could not be written; earlier ones are intact.
        FileFormatError: the metrics before the checkpoint were altered or cut short.
        JobError: the job does not keep its contract.
    """
    require_job(job)
    check_pace(checkpoint_every)
    plain = to_plain(job.config)
    if changed := differences(directory.config, plain, without=places(job.config)):
        raise CheckpointIncompatibleError(
            f"the configuration differs: {'; '.join(changed)}", where=str(directory.config_path)
        )
    store = CheckpointStore(directory.checkpoints)
    with directory.lock(), _attached(job, directory.path):
        directory.keep(plain)
        with of_another_version(directory, store):
            found = restore(job, store) if store.paths() else None
        if found is None:
            directory.check_unstarted()
            step, kept = 0, b""
        else:
            step, kept = found.step, directory.recorded(found.step, found.metrics)
        metrics = MetricsWriter(directory, kept)
        with (
            contextlib.closing(metrics),
            stop_requests() as stop,
            _progress(directory.problem, job.total_steps, step, show) as display,
        ):
            saver = Saver(job, store, metrics, found, checkpoint_every)
            saver.save(step)  # for a first step that fails
            told: list[Logger] = [metrics, *loggers, display]
            while not job.done and not stop:
                with _told_where(saver, again or _resume(directory)):
                    values = checked_metrics(job.step(), job)
                step += 1
                row = {"step": step, **values}
                for log in told:
                    log(row)
                saver.save_if_due(step)
            saver.save(step)
        if not job.done:
            return RunOutcome(step, None, stop[0])

        summary = summarise(job, directory, step=step, seconds=saver.seconds)
        directory.write_summary(summary)
        return RunOutcome(step, summary, None)


def check_pace(every: int | None) -> None:
    """Refuse a number of outer steps between checkpoints that is not positive.

    Raises:
        ConfigError: it is not.
    """
    if every is not None and every < 1:
        raise ConfigError(
            f"--checkpoint-every is {every}",
            allowed="1 or more",
            fix="leave it out for one checkpoint every half minute",
        )


class Saver:
    """Writes the checkpoints of a run, none of them newer than its metrics.

    Args:
        job: whose state is written.
        store: where to.
        metrics: what must be on the disk before; their digest is kept with the state.
        found: the checkpoint that the run goes on from.
        every: outer steps between checkpoints; None for `SECONDS`, or more as `SHARE` says.
    """

    def __init__(
        self,
        job: Job,
        store: CheckpointStore,
        metrics: MetricsWriter,
        found: Checkpoint | None,
        every: int | None,
    ) -> None:
        self._job, self._store, self._metrics, self._every = job, store, metrics, every
        self._zero = time.perf_counter() - (found.seconds if found else 0.0)
        self.saved = found.step if found else None
        """Step of the newest checkpoint."""
        self._tried, self._tried_at, self._cost = self.saved or 0, self.seconds, 0.0

    @property
    def seconds(self) -> float:
        """Those of the run over all its sessions."""
        return time.perf_counter() - self._zero

    def save(self, step: int) -> None:
        """Write one, unless this step has one."""
        if step == self.saved:
            return
        started = self.seconds
        try:
            self._metrics.sync()
            self._store.save(
                self._job.state_dict(),
                step=step,
                config=to_plain(self._job.config),
                versions=versions(),
                seconds=started,
                metrics=self._metrics.digest,
            )
        finally:
            self._tried, self._tried_at = step, self.seconds
            self._cost = self._tried_at - started
        self.saved = step

    def save_if_due(self, step: int) -> None:
        """Write one if it is time to; a failure only warns."""
        if self._every is None:
            due = self.seconds - self._tried_at >= max(SECONDS, self._cost * (1 - SHARE) / SHARE)
        else:
            due = step - self._tried >= self._every
        if due:
            try:
                self.save(step)
            except CheckpointWriteError as error:
                # The disk may have room again later; only the last save must succeed.
                warn(str(error))


@contextlib.contextmanager
def _progress(name: str, total: int, step: int, show: bool) -> Iterator[Logger]:
    if not show:
        yield lambda row: None
        return
    with progress(name, total=total, completed=step, lines=10.0) as display:
        yield display


@contextlib.contextmanager
def _told_where(saver: Saver, again: str) -> Iterator[None]:
    """A step that fails tells of the newest checkpoint; from there it may fail again."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"The newest checkpoint is of step {saver.saved}; what failed is tried again from "
            f"there with: {again}"
        )
        raise


def _resume(directory: RunDirectory) -> str:
    return f"birl run --resume {shlex.quote(str(directory.path))}"


@contextlib.contextmanager
def _attached(job: Job, path: Path) -> Iterator[None]:
    """Let a job that writes files have its directory."""
    if not isinstance(job, WritesFiles):
        yield
        return
    job.attach(path)
    try:
        yield
    finally:
        job.detach()


def restore(job: Job, store: CheckpointStore) -> Checkpoint:
    """Give the job its newest intact checkpoint, and return that."""
    found = store.load(to_plain(job.config), without=places(job.config))
    changed = [
        f"{name} {found.versions.get(name, 'absent')} -> {version}"
        for name, version in versions().items()
        if found.versions.get(name) != version
    ]
    if changed:
        warn(
            f"the checkpoint was written by other versions ({', '.join(changed)}): "
            "the run goes on, but not to the same bits",
        )
    job.load_state_dict(found.state)
    return found


@contextlib.contextmanager
def of_another_version(directory: RunDirectory, store: CheckpointStore) -> Iterator[None]:
    """What does not fit inside is said to be of another version, where the newest checkpoint is."""
    try:
        yield
    except (BirlError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        here = versions()["birl_ext"]
        written = (
            store.load().versions.get("birl_ext", "of another name") if store.paths() else here
        )
        if written == here:
            raise
        raise CheckpointIncompatibleError(
            f"the run was written by birl_ext {written}, and does not fit {here}: {error}",
            where=str(directory.path),
            fix=f"go on with birl_ext {written}; nothing there was changed",
        ) from error


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
    return dict(to_json({**common, **found, **common}))


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
