"""Paths of any environment that can be put back into the state an observation stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from birl_ext.environments.declared import Declared, Misfit
from birl_ext.environments.spaces import Spaces
from birl_ext.environments.vector import close_with_warning
from birl_ext.errors import (
    EnvironmentFailureError,
    MissingDependencyError,
    OptionError,
    ShapeError,
    warn,
)
from birl_ext.simulators.equations import CartPole, DynamicsSimulator, Pendulum
from birl_ext.simulators.paths import Paths, Policy, follow
from birl_ext.state import Stateful

try:
    import gymnasium
except ImportError:
    raise MissingDependencyError(
        "environments need gymnasium", fix='pip install "birl_ext[rl]"'
    ) from None

__all__ = ["MUJOCO", "RestoredSimulator", "restore_mujoco", "simulator_for"]

Environment = gymnasium.Env[Any, Any]
Restore = Callable[[Environment, Any], None]

MUJOCO = (
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "InvertedPendulum-v5",
    "Swimmer-v5",
    "Walker2d-v5",
)
"""Tasks that `restore_mujoco` knows."""

_TRIED = 5
"""Steps of an episode that a `restore` is tried in."""


def restore_mujoco(environment: Environment, observation: Any) -> None:
    """Put a MuJoCo task of `MUJOCO` into the state that an observation shows.

    Where the robot is on the plane is not shown and becomes zero, which nothing depends on. Hopper
    and Walker2d show velocities beyond ±10 as ±10: what exceeds them is lost. Observations are
    float32 in this package, and the solver of contacts starts afresh, so a path leaves the
    environment's own slowly at first.

    Args:
        observation: (d,), its first entries positions, then velocities.
    """
    bare: Any = environment.unwrapped
    count, speeds = bare.model.nq, bare.model.nv
    # What follows the velocities, such as Ant's forces of contact, is a function of the state.
    structure = getattr(bare, "observation_structure", {})
    hidden = int(structure.get("skipped_qpos", 0))
    shown = np.asarray(observation, dtype=np.float64)
    position = np.concatenate([np.zeros(hidden), shown[: count - hidden]])
    bare.set_state(position, shown[count - hidden :][:speeds])


class RestoredSimulator(Stateful):
    """Draws paths of an environment by restoring copies of it, one per path at a time.

    Every path begins with a seeded reset, so that a run resumes to the same bits. Rewards and
    truncation are not read. In one process: slow next to `DynamicsSimulator`.

    Args:
        build: makes a copy.
        restore: (environment, observation (*O) as numpy) → None, puts it into the state of the
            observation; the environment has just been reset.
        generator: source of all randomness, on the policy's device.
        copies: paths drawn side by side.

    Attributes:
        samples: transitions drawn so far.
    """

    STATE = ("generator", "samples")

    def __init__(
        self,
        build: Callable[[], Environment],
        restore: Restore,
        generator: torch.Generator,
        *,
        copies: int = 64,
    ) -> None:
        if copies < 1:
            raise OptionError(f"copies is {copies!r}", allowed="1 or more")
        self.restore = restore
        self.generator = generator
        self.samples = 0
        self._copies = [build() for _ in range(copies)]
        self._declared = Declared(self._copies[0].observation_space)
        self.observation_shape = tuple(self._copies[0].observation_space.shape or ())

    def continuations(
        self, follower: Policy, observation: Tensor, action: Tensor | None, steps: int
    ) -> Paths:
        """One path from each observation, with the first action given or drawn from the policy.

        Args:
            observation: (n, *O).
            action: (n, *A).
            steps: of each path.

        Raises:
            EnvironmentFailureError: an environment raised, or returned what it has not declared.
        """
        size = len(self._copies)
        parts = []
        for at in range(0, max(len(observation), 1), size):
            some = slice(at, at + size)
            first = None if action is None else action[some]
            parts.append(self._together(follower, observation[some], first, steps))
        return Paths(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def close(self) -> None:
        """Close the copies."""
        for environment in self._copies:
            close_with_warning(environment, _name(environment))

    def _together(
        self, follower: Policy, observation: Tensor, action: Tensor | None, steps: int
    ) -> Paths:
        """At most as many paths as there are copies."""
        device = self.generator.device
        seeds = torch.randint(
            2**31, (len(observation),), generator=self.generator, device=device
        ).tolist()
        used = self._copies[: len(observation)]
        for environment, seed, shown in zip(used, seeds, observation.cpu().numpy(), strict=True):
            with _named("restoring", environment):
                environment.reset(seed=seed)
                self.restore(environment, shown.copy())  # it may keep it, and write to it

        def advance(here: Tensor, chosen: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
            after = here.cpu().numpy().copy()
            ended = np.ones(len(after), dtype=bool)
            actions = chosen.cpu().numpy()
            for i in alive.nonzero().squeeze(-1).tolist():
                environment = used[i]
                given = actions[i].astype(environment.action_space.dtype)
                where = f", action {given.tolist()}, restored from {observation[i].tolist()}"
                with _named("a step", environment, where):
                    after[i], _, ended[i], _ = self._declared.step(environment.step(given))
            self.samples += int(alive.sum())
            return torch.from_numpy(after).to(here), torch.from_numpy(ended).to(here.device)

        return follow(follower, observation, action, steps, self.generator, advance)


@contextmanager
def _named(what: str, environment: Environment, where: str = "") -> Iterator[None]:
    """Whatever an environment raises or returns wrongly inside gets a name."""
    try:
        yield
    except Misfit as error:
        wrong, allowed, fix = error.args
        raise EnvironmentFailureError(
            wrong, where=f"{_name(environment)!r}{where}", allowed=allowed, fix=fix
        ) from error
    except (Exception, SystemExit) as error:
        raise EnvironmentFailureError(
            f"{what} raised {type(error).__name__}: {error}",
            where=f"{_name(environment)!r}{where}",
        ) from error


def _name(environment: Environment) -> str:
    return str(environment.spec.id if environment.spec else type(environment).__name__)


def simulator_for(
    env: str,
    spaces: Spaces,
    generator: torch.Generator,
    *,
    options: Mapping[str, Any] | None = None,
    copies: int = 64,
    build: Callable[[], Environment] | None = None,
) -> DynamicsSimulator | RestoredSimulator:
    """The simulator of a Gymnasium environment that can be restarted from any observation: one that
    is known here, or has a method `restore(observation)`, which puts it into the state that the
    observation shows.

    Args:
        env: Gymnasium id, or what messages call the environment.
        spaces: of the environment as the lower level sees it.
        generator: source of all randomness, on the policy's device.
        options: keyword arguments of the environment.
        copies: of an environment that is restored, see `RestoredSimulator`.
        build: makes a copy, in place of the id.

    Raises:
        OptionError: the environment cannot be restarted, or there is none; or what it shows is
            changed by a wrapper, outside of the `restore` that would be given it.
        EnvironmentFailureError: `restore` raised.
        ShapeError: the lower level sees something else than the environment shows: it is wrapped.

    Warns:
        UserWarning: `restore` does not put the environment into the state of an observation.
    """
    given = dict(options or {})
    simulator: DynamicsSimulator | RestoredSimulator
    shape: tuple[int, ...]
    if build is None and env == "CartPole-v1":
        simulator, shape = DynamicsSimulator(CartPole(), generator), (CartPole.observation_size,)
    elif build is None and env == "Pendulum-v1":
        pendulum = Pendulum(given.get("g", 10.0))
        simulator, shape = DynamicsSimulator(pendulum, generator), (pendulum.observation_size,)
    else:
        restore: Restore = restore_mujoco
        if build is None:
            build = _of_registered(env, given)
        if env not in MUJOCO:
            restore = _own_restore(env, build, spaces)
        simulator = RestoredSimulator(build, restore, generator, copies=copies)
        shape = simulator.observation_shape
    if spaces.observation_shape != shape:
        raise ShapeError(
            f"observations have shape {spaces.observation_shape}",
            where=env,
            allowed=str(shape),
            fix="leave out wrappers that change what is seen",
        )
    return simulator


def _of_registered(env: str, options: Mapping[str, Any]) -> Callable[[], Environment]:
    """What makes a copy that has no time limit."""

    def build() -> Environment:
        try:
            return gymnasium.make(env, max_episode_steps=-1, disable_env_checker=True, **options)
        except gymnasium.error.DependencyNotInstalled as error:
            raise MissingDependencyError(
                f"{env} needs {'mujoco' if env in MUJOCO else error}",
                fix='pip install "birl_ext[rl]"',
            ) from error

    return build


def _own_restore(env: str, build: Callable[[], Environment], spaces: Spaces) -> Restore:
    """The environment's own method, of its outermost wrapper that has one."""
    made = build()
    try:
        if made.has_wrapper_attr("restore") and callable(made.get_wrapper_attr("restore")):
            _check_shown(env, made)
            _try_restore(env, made, spaces)
            return _restore_own
    finally:
        close_with_warning(made, env)
    raise OptionError(
        f"{env} cannot be restarted from an observation, as score=full-horizon and "
        "algorithm=stoc-sobirl need it",
        allowed=f"CartPole-v1, Pendulum-v1, {', '.join(MUJOCO)}; one of your own with a method "
        "restore(observation)",
        fix="give it that method, which puts it into the state that an observation shows; or "
        "take algorithm=sobirl with score=one-step or critic",
    )


def _restore_own(environment: Environment, shown: Any) -> None:
    environment.get_wrapper_attr("restore")(shown)


def _check_shown(env: str, outer: Environment) -> None:
    """Refuse a wrapper whose numbers a `restore` further inside would take for its own."""
    while isinstance(outer, gymnasium.Wrapper) and not hasattr(outer, "restore"):
        changes = isinstance(outer, gymnasium.ObservationWrapper)
        if isinstance(outer, gymnasium.wrappers.DtypeObservation):  # the same numbers
            changes = False
        elif outer.observation_space != outer.env.observation_space:
            changes = True
        if changes:
            name = type(outer).__name__
            raise OptionError(
                f"{env} shows what {name} makes of its observations, and restore is inside of it",
                allowed="wrappers that leave observations as they are",
                fix=f"leave {name} out; or give restore to a wrapper outside of it, which undoes "
                "what it does",
            )
        outer = outer.env


def _try_restore(env: str, made: Environment, spaces: Spaces) -> None:
    """Warn of a `restore` that shows within a few steps not to do what it should.

    Where two seeds lead to the same, nothing is drawn, and it is what followed in the episode. One
    that does nothing leads to the same from every observation, where the reset has one seed.
    """
    dtype = torch.empty(0, dtype=spaces.observation_dtype).numpy().dtype

    def given(answer: Any) -> Any:
        return np.array([answer[0]], dtype)[0]

    def after(shown: Any, action: Any, seed: int) -> Any:
        with _named("restoring", made):
            made.reset(seed=seed)
            _restore_own(made, shown.copy())
        with _named("a step", made, f", restored from {shown.tolist()}"):
            return given(made.step(action))

    made.action_space.seed(0)
    actions: list[Any] = []
    with _named("an episode", made):
        seen = [given(made.reset(seed=0))]
        while len(actions) < _TRIED:
            actions.append(made.action_space.sample())
            answer = made.step(actions[-1])
            seen.append(given(answer))
            if answer[2] or answer[3]:
                break
    ends = [after(shown, actions[-1], 1) for shown in seen[:-1]]
    wrong = any(not np.array_equal(shown, seen[0]) for shown in seen[:-1]) and all(
        np.array_equal(end, ends[0]) and not _close(end, seen[-1]) for end in ends
    )
    for shown, action, then in zip(seen, actions, seen[1:], strict=False):
        one, other = (after(shown, action, seed) for seed in (1, 2))
        wrong |= _close(one, other) and not _close(one, then)
    if wrong:
        warn(
            f"{env}: restore(observation) does not put it into the state that the observation "
            "shows: what follows is not what followed in an episode. Paths from there are of "
            "another state; restore all that a step depends on",
        )


def _close(one: Any, other: Any) -> bool:
    """Up to what rounding the state to float32 may make of one step."""
    return bool(np.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True))
