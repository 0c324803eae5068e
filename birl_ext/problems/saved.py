"""A run read back: what it has learned."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from birl_ext.errors import ConfigError, OptionError, suggestion
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.runs.config import from_plain
from birl_ext.runs.directory import RunDirectory
from birl_ext.runs.job import Job, Metrics, Problem, WritesFiles
from birl_ext.runs.loop import of_another_version, restore

if TYPE_CHECKING:
    from birl_ext.preferences.reward_model import RewardModel
    from birl_ext.rollouts.policy import Policy

__all__ = ["LoadedRun", "find_problem", "load_run"]


class LoadedRun(NamedTuple):
    """A run as it was at its newest checkpoint, the last one if it is finished.

    Args:
        directory: its files.
        config: its settings, the problem's dataclass.
        job: its state; no more steps are taken by it.
        step: outer steps taken.
        seconds: the time that they took.
        history: the metrics of each outer step.
        summary: the result; None of a run that is not finished.
    """

    directory: RunDirectory
    config: Any
    job: Job
    step: int
    seconds: float
    history: list[Metrics]
    summary: dict[str, Any] | None

    @property
    def policy(self) -> Policy:
        """Actions for observations, of a preference run."""
        return self._learned("policy")  # type: ignore[no-any-return]

    @property
    def reward(self) -> RewardModel:
        """The learned reward, r(s, a), of a preference run."""
        return self._learned("reward")  # type: ignore[no-any-return]

    def _learned(self, name: str) -> Any:
        if not hasattr(self.job, name):
            raise OptionError(
                f"a run of {self.directory.problem!r} has no {name}",
                where=str(self.directory.path),
                fix="see .summary and .job",
            )
        return getattr(self.job, name)


def load_run(
    path: str | os.PathLike[str],
    *,
    problem: str | None = None,
    build: Callable[[Any], Job] | None = None,
    module: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
) -> LoadedRun:
    """What a run has learned: ``load_run(DIR).policy(observation)``.

    Args:
        path: a run directory; nothing is changed there.
        problem: the name of the only one wanted.
        build: makes the job from its config, in place of the problem.
        module: the run's own code, where its files have moved: all of ``--module``.

    Raises:
        ConfigError: it is none, has no checkpoint yet, or is of another problem.
        CheckpointIncompatibleError: another version of birl_ext wrote it, and it does not fit this
            one.
        CheckpointCorruptError: no checkpoint is intact.
        FileFormatError: the metrics were altered.

    Warns:
        UserWarning: another version wrote it, and it fits.
    """
    directory = RunDirectory(Path(path))
    if problem not in (None, directory.problem):
        raise ConfigError(
            f"a run of {directory.problem!r}",
            where=str(directory.path),
            allowed=f"runs of {problem!r}",
            fix="load it with birl_ext.load_run",
        )
    store = CheckpointStore(directory.checkpoints)
    if not store.paths():
        directory.check_unstarted()
        raise ConfigError(
            "the run has no checkpoint yet",
            where=str(directory.path),
            fix="wait for its first one, or go on with birl run --resume "
            f"{shlex.quote(str(directory.path))}",
        )
    with of_another_version(directory, store):
        known = find_problem(directory.problem)
        where = str(directory.config_path)
        plain = dict(directory.config)
        if module:
            each = [module] if isinstance(module, str | os.PathLike) else module
            plain["module"] = [os.fspath(path) for path in each]
        job = (build or known.job)(from_plain(known.config, plain, where=where))
        if isinstance(job, WritesFiles):
            job.detach()  # before: episodes under way need not be played again to be looked at
        found = restore(job, store)
    directory.recorded(found.step, found.metrics)
    return LoadedRun(
        directory,
        job.config,
        job,
        found.step,
        found.seconds,
        directory.history()[: found.step],
        directory.read_summary(),
    )


def find_problem(name: str) -> Problem:
    """The problem of that name.

    Raises:
        ConfigError: there is none.
    """
    from birl_ext.problems import PROBLEMS

    if name not in PROBLEMS:
        raise ConfigError(
            f"unknown problem {name!r}",
            allowed=", ".join(PROBLEMS),
            fix=suggestion(name, PROBLEMS) or "choose one of them",
        )
    problem: Problem = PROBLEMS[name]
    return problem
