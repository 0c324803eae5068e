"""Vector environments at the border: made from an id, spaces checked, failures named.

Every episode is seeded by (seed, environment, episode). So the state of an environment is the
actions of its episode so far, and a run resumes in the middle of one by playing them again.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from birl_ext.environments.atari import is_atari, register_atari
from birl_ext.environments.declared import Declared, Misfit
from birl_ext.environments.spaces import Spaces, read_spaces
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import (
    BirlError,
    DtypeError,
    EnvironmentFailureError,
    MissingDependencyError,
    OptionError,
    RenderError,
    ShapeError,
    warn,
)
from birl_ext.modules import import_own

try:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
except ImportError:
    raise MissingDependencyError(
        "environments need gymnasium", fix='pip install "birl_ext[rl]"'
    ) from None

__all__ = [
    "Environments",
    "Step",
    "check_distinct",
    "close_with_warning",
    "episode_seed",
    "make_environments",
    "registration",
]

_START = "birl_start"  # in `options`
_FAILURE, _ROUNDED = "birl_failure", "birl_rounded"  # in `info`
_CLOSING = "{!r}: closing raised {}"
_GRACE = 5.0  # seconds a killed worker is waited for


class Step(NamedTuple):
    """One step of n environments.

    Args:
        transitions: n rows.
        kept: (n,) bool, False where an environment only started its next episode: such a row is no
            transition.
        ended: (n,) bool, True where the episode terminated or was cut off.
    """

    transitions: Transitions
    kept: Tensor
    ended: Tensor


def episode_seed(seed: int, environment: int, episode: int) -> int:
    """The seed that an episode's reset is given, 32 bits."""
    sequence = np.random.SeedSequence((seed, environment, episode))
    return int(sequence.generate_state(1)[0])


def registration(id: str) -> EnvSpec:
    """What an environment was registered with, such as its time limit and its threshold.

    Args:
        id: with its version, unless it was registered without one.

    Raises:
        OptionError: no such id, or one that would import code.
        MissingDependencyError: a package of the environment is not installed.
    """
    if ":" in id:
        raise _imports_code(id)
    if is_atari(id):
        register_atari(id)
    try:
        return gymnasium.spec(id)
    except gymnasium.error.Error as error:
        # Which one gymnasium.make takes without a version depends on gymnasium's own.
        versions = [known for known in gymnasium.registry if known.rpartition("-v")[0] == id]
        if not versions:
            raise _unknown(id, error) from error
        raise OptionError(
            f"{id!r} has no version", allowed=", ".join(versions), fix=f"take {versions[-1]}"
        ) from error


def make_environments(
    source: str | EnvSpec | Callable[[], gymnasium.Env[Any, Any]],
    *,
    count: int = 1,
    seed: int = 0,
    parallel: bool = False,
    timeout: float = 60.0,
    options: Mapping[str, Any] | None = None,
    allow_entry_points: bool = False,
    context: str | None = None,
    modules: Sequence[str] = (),
) -> Environments:
    """`count` copies of an environment, stepped together.

    Args:
        source: a registered id, or a function that builds an environment, wrappers included. A
            wrapper that carries numbers from one episode to the next, such as a running mean,
            cannot be resumed.
        count: n.
        seed: of everything random in them, 0 or more.
        parallel: one process each; otherwise all in this one, where nothing can end a hang and a
            crash is its own.
        timeout: seconds a worker may take for a step, a reset or closing; building it is not
            covered.
        options: keyword arguments of the environment.
        allow_entry_points: accept an id that names a module to import ("module:Name-v0") or an
            EnvSpec. Either can run any code.
        context: how processes are started: "fork", "spawn", "forkserver", None for the default.
        modules: files or names of modules that each process imports first, see
            `birl_ext.modules.import_own`; they may register the id.

    Raises:
        ConfigError: a module cannot be imported.
        OptionError: no such id, one that would import code, or spaces that are not supported.
        MissingDependencyError: a package of the environment is not installed.
        EnvironmentFailureError: it cannot be built.
    """
    name = _name(source)
    runs_code = not callable(source) and (not isinstance(source, str) or ":" in source)
    if runs_code and not allow_entry_points:
        raise _imports_code(name)
    for label, value, least in (("count", count, 1), ("seed", seed, 0)):
        if value < least:
            raise OptionError(f"{label} is {value!r}", allowed=f"{least} or more")
    if not timeout > 0:
        raise OptionError(f"timeout is {timeout!r}", allowed="more than 0, in seconds")
    builders = [
        functools.partial(
            _build, source, name, dict(options or {}), seed, i, os.getpid(), tuple(modules)
        )
        for i in range(count)
    ]
    mode = AutoresetMode.SAME_STEP
    vector: VectorEnv[Any, Any, Any]
    try:
        # copy: `Environments` makes its own
        if parallel:
            vector = _Workers(builders, autoreset_mode=mode, context=context, copy=False)
        else:
            vector = SyncVectorEnv(builders, autoreset_mode=mode, copy=False)
    except gymnasium.error.UnregisteredEnv as error:
        raise _unknown(name, error) from error
    except BirlError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingDependencyError(
            f"building {name!r} needs a package: {error}",
            fix='pip install "birl_ext[rl]" brings those of Atari, MuJoCo and classic control',
        ) from error
    except (Exception, SystemExit) as error:
        raise EnvironmentFailureError(
            f"building raised {type(error).__name__}: {error}", where=f"environment {name!r}"
        ) from error
    return Environments(vector, name=name, seed=seed, timeout=timeout)


class Environments:
    """n environments in one shape, whatever their way of starting the next episode.

    `make_environments` builds one. A vector environment of one's own works in all three autoreset
    modes, with two limits: a resumed run starts new episodes in it, and the seed in the message of
    a failure is that of the first one. A worker that hangs is noticed in an AsyncVectorEnv only.
    What it returns is checked, not what it made it from: gymnasium's own cast observations first.

    Args:
        vector: a gymnasium vector environment.
        name: opens the messages of failures.
        seed: of everything random in it.
        timeout: seconds a worker may take for a step, a reset or closing.

    Raises:
        OptionError: spaces that are not supported.
    """

    def __init__(
        self,
        vector: VectorEnv[Any, Any, Any],
        *,
        name: str = "environment",
        seed: int = 0,
        timeout: float = 60.0,
    ) -> None:
        self.name = name
        self.seed = seed
        self.timeout = timeout
        self.count = vector.num_envs
        self._vector = vector
        self._workers = vector if isinstance(vector, AsyncVectorEnv) else None
        self.repeatable = isinstance(vector, (AsyncVectorEnv, SyncVectorEnv)) and all(
            isinstance(build, functools.partial) and build.func is _build
            for build in vector.env_fns
        )
        """Whether a resumed run goes on in the middle of an episode."""
        self._mode = AutoresetMode(vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._closed = False
        self._waiting = False  # for workers to answer
        self._observation: Tensor | None = None
        self._rounded = False  # a number was, and that has been said
        self._starting = np.zeros(self.count, dtype=bool)  # NEXT_STEP: where the next step resets
        self.episodes = [0] * self.count
        self._actions: list[list[Any]] = []
        self._lengths: list[int] = []
        try:
            self.spaces: Spaces = read_spaces(
                vector.single_observation_space, vector.single_action_space, name
            )
            if isinstance(bare := vector.unwrapped, SyncVectorEnv):
                check_distinct(bare.envs, name)
        except OptionError:
            self.close()
            raise
        self._dtype = torch.empty(0, dtype=self.spaces.observation_dtype).numpy().dtype
        self._last = Declared(vector.single_observation_space)
        # Ours look at each answer where it is given, before gymnasium casts it.
        count = None if self.repeatable else self.count
        self._every = None if count is None else Declared(vector.single_observation_space, count)

    @property
    def observation(self) -> Tensor:
        """What the next action answers, (n, *O)."""
        if self._observation is None:
            self.reset()
        assert self._observation is not None
        return self._observation

    def reset(self) -> None:
        """Start again from the first episode of every environment.

        Raises:
            EnvironmentFailureError: one of them failed.
        """
        self._begin([0] * self.count, [[] for _ in range(self.count)])

    def step(self, action: Tensor) -> Step:
        """One step of each.

        Args:
            action: (n, *A).

        Raises:
            ShapeError: it is not.
            DtypeError: floats where actions are indices.
            EnvironmentFailureError: one of them raised, died, did not answer in time, or returned
                what it has not declared, see `Declared`. All are closed then.
        """
        before = self.observation
        if action.shape != (self.count, *self.spaces.action_shape):
            raise ShapeError(
                f"action has shape {tuple(action.shape)}",
                allowed=str((self.count, *self.spaces.action_shape)),
            )
        if action.is_floating_point() and self.spaces.actions is not None:
            raise DtypeError(
                f"action has dtype {action.dtype}",
                allowed="integers, where actions are indices",
                fix="convert it",
            )
        space = self._vector.single_action_space
        given = action.detach().cpu().numpy().astype(space.dtype)
        if isinstance(space, gymnasium.spaces.Box):
            given = given.clip(space.low, space.high)  # its edges in float32 may lie beyond them
        # A copy: an environment may scale or clip it in place.
        found, reward, terminated, truncated, info = self._call("step", given.copy())
        kept = ~self._starting
        ended = (terminated | truncated) & kept
        after = np.array(found)  # it may write the next ones into the same array
        if self._mode is AutoresetMode.SAME_STEP and ended.any():
            for i in ended.nonzero()[0].tolist():
                with self._named(given, i):
                    after[i] = self._last.observation(info["final_obs"][i])
        self._count(given, kept, ended)
        if self._mode is AutoresetMode.DISABLED and ended.any():
            fresh, _ = self._call("reset", None, options={"reset_mask": ended})
            found = np.where(ended.reshape(-1, *[1] * (after.ndim - 1)), fresh, found)
        self._starting = ended & (self._mode is AutoresetMode.NEXT_STEP)
        following = self._tensor(after)
        self._observation = following
        if ended.any() and self._mode is not AutoresetMode.NEXT_STEP:
            self._observation = self._tensor(np.array(found))
        transitions = Transitions(
            before,
            torch.from_numpy(given).to(self.spaces.action_dtype),
            following,
            torch.from_numpy(np.array(terminated, dtype=np.bool_)),
            torch.from_numpy(np.array(reward, dtype=np.float32)),
        )
        return Step(transitions, torch.from_numpy(kept), torch.from_numpy(ended))

    def render(self) -> list[NDArray[np.uint8]]:
        """A picture of each as it is now, (H, W, 3) red, green, blue.

        An environment whose episode has just ended shows the start of the next one.

        Raises:
            MissingDependencyError: a package that draws is not installed.
            RenderError: one of them cannot be drawn.
        """
        if self._observation is None:
            self.reset()
        try:
            found = [np.asarray(picture) for picture in self._vector.render() or [None]]
        except gymnasium.error.DependencyNotInstalled as error:
            raise MissingDependencyError(
                f"drawing {self.name!r} needs a package: {error}", fix='pip install "birl_ext[rl]"'
            ) from error
        except Exception as error:
            raise RenderError(
                f"drawing raised {type(error).__name__}: {error}",
                where=f"environment {self.name!r}",
                fix="mend its render(); MuJoCo without a screen needs MUJOCO_GL=egl and a library "
                "of it, such as libegl1 with libegl-mesa0",
            ) from error
        for picture in found:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
                what = f"{picture.dtype} {picture.shape}" if picture.ndim else str(picture)
                raise RenderError(
                    f"its picture is {what}",
                    where=f"environment {self.name!r}",
                    allowed="uint8 (height, width, 3)",
                )
        return found

    @property
    def pictures_per_second(self) -> float:
        """How fast its maker wants it to be shown."""
        return float(self._vector.metadata.get("render_fps") or 30)

    def seed_of(self, environment: int) -> int:
        """The seed of an environment's present episode."""
        return episode_seed(self.seed, environment, self.episodes[environment])

    def state_dict(self) -> dict[str, Any]:
        """The episodes going on, with their actions so far."""
        observation = self.observation  # starts them, if nothing has
        actions = [torch.tensor(np.array(steps)) for steps in self._actions]
        return {
            "episodes": list(self.episodes),
            "actions": actions if self.repeatable else None,
            "observation": observation.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Play the episodes again up to where they were; closed, only keep what is to be played.

        Raises:
            OptionError: the state is none, or of another number of environments.
            EnvironmentFailureError: an environment does not repeat itself.
        """
        self._check_state(state)
        episodes = list(state["episodes"])
        if self._closed:
            self.episodes, self._observation = episodes, state["observation"].clone()
            stored = state["actions"] or [torch.empty(0)] * self.count
            self._actions = [list(steps.numpy()) for steps in stored]
            self._lengths = [len(steps) for steps in self._actions]
            return
        if not self.repeatable or state["actions"] is None:
            self._begin([episode + 1 for episode in episodes], [[] for _ in episodes])
            return
        self._begin(episodes, [list(steps.numpy()) for steps in state["actions"]])
        for i, (ours, stored) in enumerate(
            zip(self.observation, state["observation"], strict=True)
        ):
            if not torch.equal(ours, stored):
                self._abort()
                raise EnvironmentFailureError(
                    "the episode came out differently when repeated",
                    where=f"environment {i} of {self.name!r}, seed {self.seed_of(i)}, "
                    f"after {self._lengths[i]} steps",
                    fix="take out what the seed does not determine, such as the time, or a wrapper "
                    "that remembers earlier episodes",
                )

    def _check_state(self, state: Any, name: str = "environments") -> None:
        """Refuse a state that cannot be put, before anything has changed."""

        def refuse(what: str, found: Any, allowed: str) -> None:
            raise OptionError(
                f"the stored {what} is {str(found)[:200]}",
                allowed=allowed,
                fix="load what `state_dict` gave",
            )

        parts = ("episodes", "actions", "observation")
        if not isinstance(state, Mapping) or state.keys() != set(parts):
            found = list(state) if isinstance(state, Mapping) else type(state).__name__
            refuse(name, found, f"a dict of {', '.join(parts)}")
        spaces, count = self.spaces, self.count
        episodes, actions, observation = (state[part] for part in parts)
        if not isinstance(episodes, list) or any(type(one) is not int for one in episodes):
            refuse("episodes", episodes, "a list of whole numbers")
        if len(episodes) != count:
            raise OptionError(f"{len(episodes)} environments are stored", allowed=str(count))
        if not all(0 <= one < 2**63 for one in episodes):
            refuse("episodes", episodes, "whole numbers, 0 or more")
        kind, shape = spaces.observation_dtype, spaces.observation_shape
        fits = isinstance(observation, Tensor) and observation.shape == (count, *shape)
        if not fits or observation.dtype != kind:
            refuse("observation", type(observation).__name__, f"{(count, *shape)} of {kind}")
        if actions is None:
            return
        if not isinstance(actions, list) or len(actions) != count:
            refuse("actions", type(actions).__name__, f"None, or a list of {count}")
        for taken in actions:
            if not (
                isinstance(taken, Tensor)
                and taken.dim() > 0
                and (len(taken) == 0 or taken.shape[1:] == spaces.action_shape)
                and not taken.requires_grad
            ):
                refuse("actions", type(taken).__name__, f"(steps, *{spaces.action_shape}) each")

    def close(self) -> None:
        """Close the environments and end their processes."""
        if self._waiting:  # interrupted: asking them to close would wait for the answer first
            self._abort()
        if self._closed:
            return
        self._closed = True
        if self._workers is not None:
            said = _end(self._workers, patience=self.timeout)
        elif self.repeatable:
            said = [environment.finish() for environment in cast(Any, self._vector).envs]
            self._vector.close()
        else:
            said = [_said(self._vector.close)]
        for words in filter(None, said):  # the work is done: no reason to lose it
            warn(_CLOSING.format(self.name, words))

    def let_go(self) -> None:
        """Take no more steps; the vector environment stays open."""
        self._closed = True

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self, episodes: list[int], actions: list[list[Any]]) -> None:
        """Start the given episodes, and play the given actions."""
        self.episodes = episodes
        self._actions = actions
        self._lengths = [len(steps) for steps in actions]
        self._starting = np.zeros(self.count, dtype=bool)
        if self.repeatable:
            start = list(zip(episodes, actions, strict=True))
            observation, _ = self._call("reset", None, options={_START: start})
        else:
            observation, _ = self._call("reset", None, seed=self.seed_of(0))
        self._observation = self._tensor(np.array(observation))

    def _count(self, given: Any, kept: Any, ended: Any) -> None:
        for i in range(self.count):
            if ended[i]:
                self.episodes[i] += 1
                self._actions[i] = []
                self._lengths[i] = 0
            elif kept[i]:
                self._lengths[i] += 1
                if self.repeatable:
                    self._actions[i].append(given[i].copy())  # the caller has the array too

    def _tensor(self, observation: Any) -> Tensor:
        return torch.from_numpy(observation.astype(self._dtype, copy=False))

    def _call(self, method: str, given: Any, **keywords: Any) -> Any:
        """`step` or `reset` of the vector environment; whatever goes wrong has a name."""
        if self._closed:
            raise EnvironmentFailureError(
                "the environments are closed", where=f"{self.name!r}", fix="make new ones"
            )
        with self._named(given):
            answer = self._asked(method, given, **keywords)
            if self._every is not None:
                info = answer[-1]
                if method == "step":
                    answer = (*self._every.step(answer), info)
                else:
                    answer = (self._every.reset(answer), info)
        ended = answer[2] | answer[3] if method == "step" else np.zeros(self.count, dtype=bool)
        self._raise_reported(answer[-1], given, ended=ended)
        return answer

    def _asked(self, method: str, given: Any, **keywords: Any) -> Any:
        workers = self._workers
        if workers is None:
            return self._vector.step(given) if method == "step" else self._vector.reset(**keywords)
        with warnings.catch_warnings():
            # gymnasium repeats an error of a worker as a warning, before it raises it
            warnings.simplefilter("ignore")
            self._waiting = True
            if method == "step":
                workers.step_async(given)
                answer: Any = workers.step_wait(timeout=self.timeout)
            else:
                workers.reset_async(**keywords)
                # Steps that are played again take their time: a second each, at most.
                played = max(self._lengths, default=0)
                answer = workers.reset_wait(self.timeout + played * min(self.timeout, 1.0))
            self._waiting = False
            return answer

    @contextlib.contextmanager
    def _named(self, given: Any, index: int | None = None) -> Iterator[None]:
        """Whatever an environment raises or returns wrongly inside has its name."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if isinstance(error, Misfit):
                what, allowed, fix = error.args
                row = index if error.row is None else error.row
                failure = self._failure(what, row, given, allowed, fix)
            else:
                failure = self._diagnose(error, given)
            self._abort()
            raise failure from error

    def _diagnose(self, error: BaseException, given: Any) -> EnvironmentFailureError:
        if self._workers is not None:
            silent = []
            for i, process in enumerate(self._workers.processes):
                pipe = self._workers.parent_pipes[i]
                with contextlib.suppress(OSError):
                    if pipe is not None and not pipe.poll(0):
                        silent.append(i)
                if isinstance(error, (EOFError, OSError)):
                    process.join(0.2)  # its pipe closes a little before it is gone
                code = process.exitcode
                if code is not None:
                    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
                    return self._failure(f"the worker ended with {how}", i, given)
            if isinstance(error, multiprocessing.TimeoutError) and silent:
                what = f"no answer within {self.timeout:g} s"
                return self._failure(what, silent[0], given)
        return self._failure(f"it raised {type(error).__name__}: {error}", None, given)

    def _raise_reported(self, info: Mapping[str, Any], given: Any, *, ended: Any) -> None:
        """Raise what a wrapped environment reported in place of an answer."""
        if _FAILURE in info:
            index = int(np.flatnonzero(info[f"_{_FAILURE}"])[0])
            what, allowed, fix = info[_FAILURE][index]
            if ended[index]:  # it was the start of the next episode that failed
                self.episodes[index] += 1
                given = None
            failure = self._failure(what, index, given, allowed, fix)
            self._abort()
            raise failure
        words = "" if self._every is None else self._every.rounded or self._last.rounded
        if _ROUNDED in info:
            words = next(filter(None, info[_ROUNDED]))
        if words and not self._rounded:
            self._rounded = True
            warn(f"{self.name!r}: {words}")

    def _failure(
        self, what: str, index: int | None, given: Any, allowed: str = "", fix: str = ""
    ) -> EnvironmentFailureError:
        if index is None:
            action = "" if given is None else f", actions {given.tolist()}"
            where = f"one of {self.count} of {self.name!r}, seed {self.seed}{action}"
            return EnvironmentFailureError(what, where=where, allowed=allowed, fix=fix)
        seed = self.seed_of(index) if self.repeatable else self.seed
        where = f"environment {index} of {self.name!r}, seed {seed}, "
        where += (
            "start of the episode"
            if given is None
            else f"step {self._lengths[index]}, action {given[index].tolist()}"
        )
        return EnvironmentFailureError(what, where=where, allowed=allowed, fix=fix)

    def _abort(self) -> None:
        """End everything at once; a worker that hangs is not asked."""
        if self._closed:
            return
        self._closed, self._waiting = True, False
        if self._workers is None:
            _said(self._vector.close)
        else:
            _end(self._workers)


class _Workers(AsyncVectorEnv):
    """Workers that stay at work through SIGTERM, see `_build`.

    That is what gymnasium and multiprocessing would end them with, also when this process ends.
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        try:
            super().__init__(*given, **more)
        except BaseException:
            self.close(terminate=True)
            raise
        Finalize(self, _kill, args=(self.processes,), exitpriority=0)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        _end(self, patience=0.0 if terminate else _GRACE if timeout is None else timeout)


def _end(workers: AsyncVectorEnv, *, patience: float = 0.0) -> list[str | None]:
    """Ask the workers to close, unless `patience` is 0, and kill those not gone by then.

    Returns:
        What ours say about closing, see `_Episodes.finish`.
    """
    # A vector environment that could not be built may have neither.
    pipes = [pipe for pipe in getattr(workers, "parent_pipes", []) if pipe is not None]
    processes = getattr(workers, "processes", [])
    said: list[str | None] = []
    if patience:
        ours = isinstance(workers, _Workers)
        for pipe in pipes:
            with contextlib.suppress(OSError):  # it has died
                if ours:
                    pipe.send(("_call", ("finish", (), {})))
                pipe.send(("close", None))
        ends = time.monotonic() + patience
        for pipe in pipes if ours else []:
            with contextlib.suppress(OSError, EOFError):
                if pipe.poll(max(0.0, ends - time.monotonic())):
                    said.append(pipe.recv()[0])
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
    _kill(processes)
    for pipe in pipes:
        pipe.close()
    if pipes:
        workers.error_queue.close()
    workers.closed = True
    return said


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()  # SIGKILL: a stopped process would keep SIGTERM waiting
            process.join(_GRACE)


def _imports_code(name: str) -> OptionError:
    module, _, id = name.rpartition(":")
    return OptionError(
        f"the id {name!r} names code to import",
        allowed="ids that are registered already",
        fix=f"import the module first, on the command line by --module {module} --env {id}"
        if module
        else "register it and give its id, or pass allow_entry_points=True if you trust it",
    )


def _unknown(name: str, error: gymnasium.error.Error) -> OptionError:
    return OptionError(
        f"no environment {name!r}: {str(error).rstrip('.')}",
        fix="check the id, or import what registers it, on the command line by --module FILE",
    )


def _name(source: str | EnvSpec | Callable[[], gymnasium.Env[Any, Any]]) -> str:
    """What a source is called in messages."""
    if isinstance(source, str):
        return source
    if isinstance(source, functools.partial):
        given = [repr(value) for value in source.args]
        given += [f"{key}={value!r}" for key, value in source.keywords.items()]
        return f"{_name(source.func)}({', '.join(given)})"
    if callable(source):
        return getattr(source, "__name__", repr(source))
    return str(getattr(source, "id", source))


class _Episodes(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Seeds every episode, plays one again, checks answers, and reports what is wrong as data.

    As data because of the road from a worker: gymnasium casts observations, pickles exceptions,
    keeps the last one only, and forgets which environment it was.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int, index: int) -> None:
        super().__init__(env)
        self._declared = Declared(env.observation_space)
        self._seed = seed
        self._index = index
        self._episode = -1
        self._finished = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        actions: list[Any] = []
        self._episode += 1
        if options and _START in options:
            self._episode, actions = options[_START][self._index]
        try:
            drawn = episode_seed(self._seed, self._index, self._episode)
            observation = self._declared.reset(self.env.reset(seed=drawn))
            for action in actions:
                observation = self._declared.step(self.env.step(action.copy()))[0]
        except (Exception, SystemExit) as error:
            return self._blank(), {_FAILURE: _words(error)}
        return observation, self._info()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            return *self._declared.step(self.env.step(action)), self._info()
        except (Exception, SystemExit) as error:
            return self._blank(), 0.0, False, False, {_FAILURE: _words(error)}

    def finish(self) -> str | None:
        """Close it; returns what it raised at that."""
        if self._finished:
            return None
        self._finished = True
        return _said(super().close)

    def close(self) -> None:
        self.finish()

    def _info(self) -> dict[str, Any]:
        # In every step from then on: the last one of an episode has its info elsewhere.
        return {_ROUNDED: self._declared.rounded} if self._declared.rounded else {}

    def _blank(self) -> Any:
        space = self.observation_space
        return np.zeros(space.shape or (), space.dtype)


def _words(error: BaseException) -> tuple[str, str, str]:
    """What went wrong, what is allowed, and a fix, of a failure."""
    if isinstance(error, Misfit):
        what, allowed, fix = error.args
        return what, allowed, fix
    return f"it raised {type(error).__name__}: {error}", "", ""


def check_distinct(environments: Iterable[gymnasium.Env[Any, Any]], name: str) -> None:
    """Refuse one environment in the place of several: each would cut into the others' episodes.

    Raises:
        OptionError: two are the same object.
    """
    bare = [environment.unwrapped for environment in environments]
    if len(set(map(id, bare))) < len(bare):
        raise OptionError(
            f"two copies of {name!r} are one and the same {type(bare[0]).__name__}",
            allowed="a new environment by every call of the function",
            fix=f"build it inside: lambda: {type(bare[0]).__name__}(…)",
        )


def close_with_warning(environment: gymnasium.Env[Any, Any], name: str) -> None:
    """Close it; what that raises is no reason to lose the work."""
    if words := _said(environment.close):
        warn(_CLOSING.format(name, words))


def _said(close: Callable[[], None]) -> str | None:
    """What is raised by closing."""
    try:
        close()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _build(
    source: str | EnvSpec | Callable[[], gymnasium.Env[Any, Any]],
    name: str,
    options: dict[str, Any],
    seed: int,
    index: int,
    maker: int,
    modules: tuple[str, ...],
) -> gymnasium.Env[Any, Any]:
    if os.getpid() != maker:
        # A signal to the whole group, such as Ctrl-C, is for the process that made this one: it
        # finishes its step, and says when to end. Not SIG_IGN, which the programs that an
        # environment starts would inherit.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)
    for module in modules:
        import_own(module)
    if isinstance(source, str) and is_atari(source):
        register_atari(source)
    made = source(**options) if callable(source) else gymnasium.make(source, **options)
    # Here, before gymnasium looks for room for observations that are not supported.
    read_spaces(made.observation_space, made.action_space, name)
    return _Episodes(made, seed, index)


def _leave(number: int, frame: FrameType | None) -> None:
    """Do nothing about a signal."""
