"""Learning from preferences as a library: the runs of ``birl run preference``, in a program."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from birl_ext.environments.finite import FiniteEnvironment
from birl_ext.errors import ConfigError, MissingDependencyError, OptionError, TeacherError
from birl_ext.files import PARTIAL
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.preferences.reward_model import RewardModel
from birl_ext.preferences.teachers import Teacher, absent, name_of
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.preference.job import PreferenceJob
from birl_ext.problems.preference.parts import FACES, Source, VectorEnv, gymnasium, is_own
from birl_ext.problems.saved import load_run
from birl_ext.rollouts.policy import Policy
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.runs.config import from_plain, to_plain
from birl_ext.runs.directory import RunDirectory, free_directory, writing
from birl_ext.runs.job import Logger, Metrics
from birl_ext.runs.loop import draw_figures, restore, run

__all__ = ["DRLHF", "MRN", "SoBiRL", "StocSoBiRL"]

PROBLEM = "preference"


class SoBiRL:
    """A reward that explains a teacher's comparisons of the behaviour it causes, and the policy
    that maximises it, learned together by the hyper-gradient.

        algorithm = SoBiRL("CartPole-v1", "oracle", labels=200, rounds=20).learn()
        action = algorithm.predict(observation)

    Args:
        environment: a Gymnasium id; a function without arguments, or a class, that builds a
            `gymnasium.Env`; a Gymnasium vector environment, which stays open; or a `DenseMDP` or
            `SparseMDP`, whose reward is the true one, see `FiniteEnvironment`.
        teacher: one of `birl_ext.TEACHERS` by its name, one named by `register_teacher`, or any
            function of two batches of fragments, see `birl_ext.preferences.teachers.Teacher`.
        directory: where the files of the run go, new or empty; None keeps them until the program
            ends, or until `save`.
        settings: those of ``birl run preference``, `PreferenceConfig`: the budget is `rounds` of
            `environment_steps` each, and `labels`.

    Raises:
        ConfigError: a setting is unknown or impossible.
        OptionError, EnvironmentFailureError: no such environment, or it cannot be built.
        TeacherError: the teacher cannot be asked.

    Source: Yang, Gao and Yuan (2025), Algorithm SoBiRL.
    """

    ALGORITHMS: ClassVar[tuple[str, ...]] = ("sobirl",)
    """Values of the setting `algorithm`, the default first."""

    def __init__(
        self,
        environment: str | Source | DenseMDP | SparseMDP,
        teacher: str | Teacher = "noisy",
        *,
        directory: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        if teacher is None:
            raise TeacherError(
                "the teacher is None",
                allowed="a name of `birl_ext.TEACHERS`, or a function of two batches of fragments",
                fix="leave it out for the noisy one",
            )
        if isinstance(teacher, str) and is_own(teacher):
            raise absent(teacher, "give the teacher itself, in place of its name in a file")
        if environment is None or (isinstance(environment, str) and is_own(environment)):
            raise OptionError(
                f"the environment is {environment!r}",
                allowed="an id, a function that builds one, a vector environment, an MDP",
                fix="give the environment itself: names in <…> stand for objects in files",
            )
        self._take(environment, teacher)
        if isinstance(environment, VectorEnv):
            if environment.closed:
                raise OptionError(
                    "the vector environment is closed",
                    where=f"env <{name_of(environment)}>",
                    fix="make a new one",
                )
            settings.setdefault("environments", environment.num_envs)
        if isinstance(environment, DenseMDP | SparseMDP):
            settings.setdefault("discount", float(environment.discount))
        if "env" in settings:
            raise ConfigError("env is a setting here", fix="give it as the environment")
        plain = {
            "algorithm": self.ALGORITHMS[0],
            **settings,
            "env": environment if isinstance(environment, str) else f"<{name_of(environment)}>",
            "teacher": teacher if isinstance(teacher, str) else f"<{name_of(teacher)}>",
        }
        name = type(self).__name__
        self._job = self._made(from_plain(PreferenceConfig, plain, where=f"{name}(…)"))
        self._ended = False
        if directory is None:
            scratch = tempfile.mkdtemp(prefix="birl-")
            weakref.finalize(self, _remove, scratch, os.getpid())
            directory = Path(scratch) / "run"
        path, again = Path(directory), f"{name}.load({str(directory)!r})"
        self._directory = RunDirectory.create(
            path, PROBLEM, to_plain(self.config), "give another directory", again
        )

    def learn(self, *, progress: bool = True, loggers: Sequence[Logger] = ()) -> Self:
        """Run to the end of the budget, from where an earlier call was stopped.

        A signal such as Ctrl-C takes effect after the round at work, with a checkpoint; a second
        one at once. What a round raises leaves all as it was at the last checkpoint, the policy and
        the history too; `learn` goes on from there.

        Args:
            progress: show it on stderr.
            loggers: called with the metrics of each round.

        Returns:
            This object.

        Raises:
            TeacherError: see `Teacher`.
            EnvironmentFailureError: an environment failed.
            KeyboardInterrupt: after Ctrl-C.
        """
        if self._ended:
            if self._job.done and self.summary is not None:
                return self
            self._job = self._made(self.config)
        self._ended = True  # its environments are closed, however it ends
        try:
            found = run(self._job, self._directory, loggers=loggers, show=progress, again="learn()")
        except BaseException:
            # As it was at its checkpoint, where `learn` goes on, and what `save` copies.
            with contextlib.suppress(Exception):
                restore(self._job, CheckpointStore(self._directory.checkpoints))
            raise
        if found.stopped_by is not None:
            signal.raise_signal(found.stopped_by)
        return self

    def predict(self, observation: Any, *, greedy: bool = True) -> Any:
        """Action for one observation, or actions for n of them: `policy` of them."""
        return self.policy(observation, greedy=greedy)

    @property
    def policy(self) -> Policy:
        """What has been learned to do, for observations as the environment gives them.

        Raises:
            ConfigError: nothing has been learned yet.
        """
        self._require_begun()
        return self._job.policy

    @property
    def reward(self) -> RewardModel:
        """The learned reward, r(s, a), a torch module on batches; ConfigError as `policy`."""
        self._require_begun()
        return self._job.reward

    @property
    def config(self) -> PreferenceConfig:
        """The settings, the defaults included."""
        return self._job.config

    @property
    def history(self) -> list[Metrics]:
        """The metrics of each round that led to `policy`, oldest first."""
        return self._directory.history()[: self._job.round]

    @property
    def summary(self) -> dict[str, Any] | None:
        """The result; None until the budget is used."""
        return self._directory.read_summary()

    def plot(self) -> list[Path]:
        """Draw the figures of ``birl plot``: returns and the reward's accuracy, by rounds.

        Returns:
            The files, in the run's directory.

        Raises:
            ConfigError: nothing has been learned yet.
            MissingDependencyError: matplotlib is not installed.
        """
        self._require_learned()
        written, missing = draw_figures(self._job, self._directory, self.summary or {})
        if missing:
            raise MissingDependencyError(
                f"figures need matplotlib: {', '.join(missing)}", fix='pip install "birl_ext[viz]"'
            )
        return written

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Copy the run's directory, which `load` reads; so do ``birl plot`` and
        `birl_ext.load_run` where the environment was given by an id.

        Args:
            path: new or empty.

        Returns:
            The path.

        Raises:
            ConfigError: nothing has been learned yet, or the path is taken or cannot be written.
        """
        self._require_learned()
        target = Path(path)
        again = f"{type(self).__name__}.load({str(target)!r})"
        draft = target.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{target.name}")
        with writing(target, "give another path"):
            free_directory(target, "give another path", again)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                unneeded = shutil.ignore_patterns("*.lock", f"{PARTIAL}*")
                shutil.copytree(self._directory.path, draft, ignore=unneeded)
                draft.replace(target)  # all of it, or nothing
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return target

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        environment: Source | DenseMDP | SparseMDP | None = None,
        teacher: Teacher | None = None,
        module: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    ) -> Self:
        """Read back what `save`, or ``birl run preference``, has written; `learn` goes on there.

        Args:
            path: the directory.
            environment: as it was given, if it was no id.
            teacher: as it was given, if it was no name; only `learn` needs it.
            module: files of the setting `module`, where they are not there any more.

        Raises:
            ConfigError: no such run, one of another algorithm, or its environment is missing.
            CheckpointIncompatibleError: of another version, and does not fit this one.
        """
        made = cls.__new__(cls)
        made._take(environment, teacher)
        found = load_run(path, build=made._made, problem=PROBLEM, module=module)
        assert isinstance(found.job, PreferenceJob)
        made._job, made._directory, made._ended = found.job, found.directory, True
        return made

    def _require_begun(self) -> None:
        if not self._ended:
            self._require_learned()

    def _require_learned(self) -> None:
        if not CheckpointStore(self._directory.checkpoints).paths():
            raise ConfigError("nothing has been learned yet", fix="call learn() first")

    def _take(self, environment: Any, teacher: Any) -> None:
        """What was given as objects."""
        if isinstance(environment, gymnasium.Env):
            raise OptionError(
                f"the environment is one {type(environment).__name__}",
                allowed="an id, a function that builds one, a vector environment, an MDP",
                fix="give a function, since several copies are made: "
                f"lambda: {type(environment).__name__}(…)",
            )
        if isinstance(environment, DenseMDP | SparseMDP):
            FiniteEnvironment(environment)  # refuses what cannot be acted in
            environment = functools.partial(FiniteEnvironment, environment)
        if environment is not None and not isinstance(environment, str | Callable | VectorEnv):
            raise OptionError(
                f"the environment is a {type(environment).__name__}",
                allowed="an id, a function that builds one, a vector environment, an MDP",
            )
        self._own = None if isinstance(environment, str) else environment
        self._teacher = None if isinstance(teacher, str) else teacher

    def _made(self, config: PreferenceConfig) -> PreferenceJob:
        if config.algorithm not in self.ALGORITHMS:
            raise ConfigError(
                f"algorithm is {config.algorithm!r}",
                where=type(self).__name__,
                allowed=", ".join(self.ALGORITHMS),
                fix=f"use birl_ext.{FACES[config.algorithm]}",
            )
        return PreferenceJob(config, environment=self._own, teacher=self._teacher)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            f"a {type(self).__name__} cannot be pickled or copied: it is of a directory",
            fix="save(path) it, and load(path) it there; .policy and .reward can be pickled",
        )

    def __repr__(self) -> str:
        config, done = self.config, len(self.history)
        where = f"{config.env!r}, {config.teacher!r}, algorithm={config.algorithm!r}"
        return f"{type(self).__name__}({where}: {done} of {config.rounds} rounds)"


def _remove(scratch: str, owner: int) -> None:
    """Remove the files of a run; not in a process that was forked from the one they belong to."""
    if os.getpid() == owner:
        shutil.rmtree(scratch, ignore_errors=True)


class StocSoBiRL(SoBiRL):
    """The stochastic algorithm: the whole gradient (M16) from each round's own pairs, by the score
    of two independent continuations of `horizon` steps from every state.

    Args:
        environment: as for `SoBiRL`; it must be one that can be started from any observation, see
            `birl_ext.simulators.restored.simulator_for`.
        teacher, directory, settings: as for `SoBiRL`; those of `score`, `reuse`, `query`,
            `weigh_loss` and `indirect_limit` are the algorithm's own.

    Source: Yang, Gao and Yuan (2025), Algorithm Stoc-SoBiRL.
    """

    ALGORITHMS = ("stoc-sobirl",)


class DRLHF(SoBiRL):
    """The same without the hyper-gradient: the reward is fitted to the answers alone (Christiano
    et al., 2017).

    Args:
        environment, teacher, directory, settings: as for `SoBiRL`.
    """

    ALGORITHMS = ("drlhf",)


class MRN(SoBiRL):
    """Meta-Reward-Net: the reward is fitted to the answers, and then so that the agent's critics
    agree with them after one step on it (Liu et al., 2022), see `birl_ext.bilevel.mrn.MRNUpdate`.

    Args:
        environment, teacher, directory, settings: as for `SoBiRL`.
    """

    ALGORITHMS = ("mrn",)
