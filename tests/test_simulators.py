"""Restarted paths follow the environment's own, end where it ends, and repeat to the same bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

gymnasium = pytest.importorskip("gymnasium")

from birl_ext.bilevel.score import FullHorizon  # noqa: E402
from birl_ext.environments.spaces import Spaces, read_spaces  # noqa: E402
from birl_ext.errors import EnvironmentFailureError, OptionError, ShapeError  # noqa: E402
from birl_ext.simulators.equations import CartPole, DynamicsSimulator, Pendulum  # noqa: E402
from birl_ext.simulators.paths import follow  # noqa: E402
from birl_ext.simulators.restored import (  # noqa: E402
    MUJOCO,
    RestoredSimulator,
    restore_mujoco,
    simulator_for,
)


class Coin:
    """Pushes left or right at random."""

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(2, (len(observation),), generator=generator)


class Uniform:
    """Draws from [−high, high]^d."""

    def __init__(self, size: int, high: float) -> None:
        self.size, self.high = size, high

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        share = torch.rand(len(observation), self.size, generator=generator)
        return (2 * share - 1) * self.high


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spaces_of(env: str, **options: Any) -> Spaces:
    with gymnasium.make(env, **options) as one:
        return read_spaces(one.observation_space, one.action_space, env)


# ---- equations -----------------------------------------------------------------------------------


def test_cart_pole_takes_the_steps_of_gymnasium() -> None:
    """States on both sides of every threshold, in both actions."""
    limits = torch.tensor([2.4, 3.0, 12 * 2 * math.pi / 360, 3.0], dtype=torch.float64)
    share = torch.rand(2000, 4, generator=generator(), dtype=torch.float64)
    state = 1.05 * limits * (2 * share - 1)
    action = torch.arange(2000) % 2
    after, ended = CartPole().step(state, action)
    env: Any = gymnasium.make("CartPole-v1").unwrapped
    for i in range(2000):
        env.reset(seed=0)
        env.state = state[i].numpy()
        _, _, terminated, _, _ = env.step(int(action[i]))
        np.testing.assert_allclose(after[i], env.state, rtol=1e-12, atol=1e-12, err_msg=f"{i}")
        assert bool(ended[i]) == terminated, (i, after[i])
    assert 0.02 < float(ended.double().mean()) < 0.5


def test_cart_pole_ends_beyond_its_thresholds_and_not_on_them() -> None:
    """The next position is x + 0.02 ẋ: on the edge with ẋ = 0, beyond it by one rounding more."""
    steep = 12 * 2 * math.pi / 360
    rows, expected = [], []
    for edge, place in ((2.4, 0), (steep, 2)):
        for sign in (1, -1):
            for factor, ends in ((1.0, False), (1 + 1e-15, True)):
                row = [0.0] * 4
                row[place] = sign * edge * factor
                rows.append(row)
                expected.append(ends)
    state = torch.tensor(rows, dtype=torch.float64)
    _, ended = CartPole().step(state, torch.ones(len(rows), dtype=torch.int64))
    assert ended.tolist() == expected
    env: Any = gymnasium.make("CartPole-v1").unwrapped
    for row, ends in zip(rows, expected, strict=True):
        env.reset(seed=0)
        env.state = np.array(row)
        assert env.step(1)[2] == ends


@pytest.mark.parametrize("gravity", [10.0, 9.81])
def test_pendulum_takes_the_steps_of_gymnasium(gravity: float) -> None:
    """Also where speed and torque are cut; Gymnasium computes the torque in float32."""
    share = torch.rand(500, 3, generator=generator(), dtype=torch.float64)
    angle, spin, torque = ((2 * share - 1) * torch.tensor([9.0, 8.0, 2.6])).unbind(-1)
    dynamics = Pendulum(gravity)
    state = torch.stack([angle, spin], -1)
    after, ended = dynamics.step(state, torque.unsqueeze(-1))
    seen = dynamics.observe(after)
    env: Any = gymnasium.make("Pendulum-v1", g=gravity).unwrapped
    for i in range(500):
        env.reset(seed=0)
        env.state = state[i].numpy()
        observation = env.step(torque[i : i + 1].numpy().astype(np.float32))[0]
        np.testing.assert_allclose(after[i], env.state, rtol=0, atol=1e-6, err_msg=f"{i}")
        np.testing.assert_allclose(seen[i], observation, rtol=0, atol=1e-6, err_msg=f"{i}")
    assert float((after[:, 1].abs() == 8).double().mean()) > 0.02
    assert not ended.any()


def test_the_angle_of_a_pendulum_is_found_in_every_quadrant() -> None:
    angle = torch.linspace(-3.1, 3.1, 25, dtype=torch.float64)
    state = torch.stack([angle, angle.flip(0)], -1)
    dynamics = Pendulum()
    torch.testing.assert_close(dynamics.state_of(dynamics.observe(state)), state, rtol=0, atol=1e-6)


# ---- paths ---------------------------------------------------------------------------------------


def cart_poles(seed: int = 0) -> DynamicsSimulator:
    return DynamicsSimulator(CartPole(), generator(seed))


def test_paths_are_those_of_the_environment_until_it_terminates() -> None:
    start = 0.2 * (torch.rand(50, 4, generator=generator(1)) - 0.5)
    first = torch.arange(50) % 2
    simulator = cart_poles()
    path = simulator.continuations(Coin(), start, first, 60)
    assert path.observation.shape == (50, 60, 4)
    assert path.observation.dtype == torch.float32
    assert torch.equal(path.observation[:, 0], start)
    assert torch.equal(path.action[:, 0], first)
    env: Any = gymnasium.make("CartPole-v1").unwrapped
    for i in range(50):
        env.reset(seed=0)
        env.state = start[i].double().numpy()
        alive = True
        for step in range(60):
            assert bool(path.present[i, step]) == alive, (i, step)
            if not alive:
                assert torch.equal(path.observation[i, step], path.observation[i, step - 1])
                continue
            np.testing.assert_allclose(
                path.observation[i, step], env.state, rtol=1e-6, atol=1e-6, err_msg=f"{i}, {step}"
            )
            alive = not env.step(int(path.action[i, step]))[2]
    assert 0 < int(path.present[:, -1].sum()) < 50  # some have ended, some have not
    assert simulator.samples == int(path.present[:, :-1].sum())


def test_the_first_action_is_drawn_where_none_is_given() -> None:
    path = cart_poles().continuations(Coin(), torch.zeros(1000, 4), None, 2)
    assert abs(float(path.action[:, 0].double().mean()) - 0.5) < 0.08
    right = path.action[:, 0] == 1
    assert torch.equal(path.observation[:, 1, 1] > 0, right)


def test_a_path_outlives_the_time_limit() -> None:
    """A time limit is no end of the process."""
    path = cart_poles().continuations(Balance(), torch.full((2, 4), 0.01), None, 700)
    assert path.present.all()


def test_nothing_follows_an_end() -> None:
    """Not even where the process would say otherwise later."""

    calls = iter(range(3))

    def advance(here: Tensor, chosen: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        return here + 1, here == 1 + 3 * (next(calls) > 1)

    path = follow(Coin(), torch.arange(3), None, 4, generator(), advance)
    assert path.present.tolist() == [
        [True] * 2 + [False] * 2,
        [True] + [False] * 3,
        [True] * 3 + [False],
    ]
    assert path.observation.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [2, 3, 4, 4]]


class Balance:
    """Leans against the fall; the same action every time."""

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        return (observation @ torch.tensor([0.1, 0.3, 3.0, 1.0]) > 0).long()

    def probabilities(self, observation: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.sample(observation, generator()), 2).double()


def test_a_score_sees_what_an_action_leads_to() -> None:
    """A reward of one per step: the score of a fatal action is minus what is lost by it."""
    where = torch.tensor([[0.0, 0.0, 0.2094, 0.5], [0.0, 0.0, 0.12, 0.9]]).unsqueeze(0)
    kept = Balance().sample(where[0], generator())
    x = torch.ones((), dtype=torch.float64, requires_grad=True)

    def reward(observation: Tensor, action: Tensor) -> Tensor:
        return x.expand(len(action))

    score = FullHorizon(cart_poles(), discount=0.9, steps=30)
    present = torch.ones(1, 2, dtype=torch.bool)
    for chosen in (kept, 1 - kept):
        found = score(reward, Balance(), where, chosen.unsqueeze(0), present).sum()
        expected = 0.0
        for start, first in zip(where[0], chosen, strict=True):
            expected += discounted_life(start, int(first)) - discounted_life(start, None)
        (gradient,) = torch.autograd.grad(found, x)
        assert float(gradient) == pytest.approx(expected, abs=1e-12)
        assert (expected == 0) == torch.equal(chosen, kept)


def discounted_life(start: Tensor, first: int | None) -> float:
    """Σ_k 0.9ᵏ over the steps of one path in gymnasium, at most 30."""
    env: Any = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    env.state = start.double().numpy()
    total, seen = 0.0, start
    for step in range(30):
        total += 0.9**step
        own = int(Balance().sample(seen, generator()))
        found, _, terminated, _, _ = env.step(own if step or first is None else first)
        if terminated:
            break
        seen = torch.tensor(found)
    return total


@pytest.mark.parametrize("kind", ["equations", "restored"])
def test_draws_go_on_to_the_same_bits(kind: str) -> None:
    def make() -> Any:
        return cart_poles(3) if kind == "equations" else noisy_walk(3)

    one, other = make(), make()
    start = torch.zeros(10, 4) if kind == "equations" else torch.zeros(10, 1)
    one.continuations(Coin(), start, None, 5)
    other.load_state_dict(one.state_dict())
    ours, theirs = (part.continuations(Coin(), start, None, 8) for part in (one, other))
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)
    assert one.samples == other.samples
    again = one.continuations(Coin(), start, None, 8)
    assert not torch.equal(again.observation, ours.observation)


def test_what_is_no_observation_is_named() -> None:
    with pytest.raises(ShapeError, match=r"\(n, 4\)"):
        cart_poles().continuations(Coin(), torch.zeros(3, 5), None, 2)
    with pytest.raises(OptionError, match="steps is 0"):
        cart_poles().continuations(Coin(), torch.zeros(3, 4), None, 0)


# ---- any environment -----------------------------------------------------------------------------


class Walk(gymnasium.Env):  # type: ignore[misc, name-defined]
    """x moves by ±1 and a noise of its own; it ends at |x| ≥ 3, and raises or breaks when asked."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self.x = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = 0.0
        return np.array([0.0], np.float32), {}

    def step(self, action: Any) -> Any:
        if action == 2:
            raise RuntimeError("no such step")
        self.x += 2 * int(action) - 1 + self.noise * self.np_random.standard_normal()
        found = np.array([self.x if abs(self.x) < 50 else np.nan], np.float32)
        return found, 0.0, bool(3 <= abs(self.x) < 50), False, {}


def restore_walk(environment: Any, observation: Any) -> None:
    environment.unwrapped.x = float(observation[0])


def noisy_walk(seed: int = 0, noise: float = 0.5, copies: int = 4) -> RestoredSimulator:
    return RestoredSimulator(lambda: Walk(noise), restore_walk, generator(seed), copies=copies)


@pytest.mark.parametrize("copies", [1, 4, 64])
def test_restored_paths_start_where_they_are_told_whatever_the_copies(copies: int) -> None:
    start = torch.linspace(-2, 2, 9).unsqueeze(-1)
    simulator = noisy_walk(noise=0.0, copies=copies)
    path = simulator.continuations(Coin(), start, torch.ones(9, dtype=torch.int64), 6)
    for i in range(9):
        x, alive = float(start[i]), True
        for step in range(6):
            assert bool(path.present[i, step]) == alive
            if alive:
                assert float(path.observation[i, step]) == x
                x += 2 * int(path.action[i, step]) - 1
                alive = abs(x) < 3
    assert simulator.samples == int(path.present[:, :-1].sum())


def test_noise_of_the_environment_is_independent_across_paths() -> None:
    path = noisy_walk(noise=0.5).continuations(
        Coin(), torch.zeros(400, 1), torch.ones(400, dtype=torch.int64), 2
    )
    moved = path.observation[:, 1, 0].double()
    assert abs(float(moved.mean()) - 1) < 4 * 0.5 / 20
    assert 0.4 < float(moved.std()) < 0.6
    assert abs(float(moved[1:] @ moved[:-1] / 399 - moved.mean() ** 2)) < 4 * 0.25 / 20


def test_a_failure_of_the_environment_is_named() -> None:
    two = torch.full((1,), 2)
    with pytest.raises(EnvironmentFailureError, match="a step raised RuntimeError: no such step"):
        noisy_walk().continuations(Coin(), torch.zeros(1, 1), two, 3)
    with pytest.raises(EnvironmentFailureError, match=r"nan.*restored from \[60.0\]"):
        noisy_walk().continuations(Coin(), torch.full((1, 1), 60.0), None, 3)
    with pytest.raises(EnvironmentFailureError, match="restoring raised IndexError"):
        noisy_walk().continuations(Coin(), torch.zeros(1, 0), None, 3)
    with pytest.raises(OptionError, match="copies is 0"):
        noisy_walk(copies=0)


@pytest.mark.parametrize("env", MUJOCO)
def test_mujoco_tasks_go_on_from_an_observation(env: str) -> None:
    """A copy restored in the middle of an episode moves as the original does."""
    pytest.importorskip("mujoco")
    with gymnasium.make(env) as original, gymnasium.make(env) as copy:
        original.reset(seed=0)
        original.action_space.seed(0)
        for _ in range(8):
            shown = original.step(0.3 * original.action_space.sample())[0]
        assert np.abs(shown).max() < 10  # velocities are not cut
        copy.reset(seed=1)
        restore_mujoco(copy, shown)
        for _ in range(3):
            action = 0.3 * original.action_space.sample()
            theirs, _, theirs_ended, _, _ = original.step(action)
            ours, _, ours_ended, _, _ = copy.step(action)
            size = copy.unwrapped.model.nq + copy.unwrapped.model.nv - 2
            np.testing.assert_allclose(ours[:size], theirs[:size], rtol=1e-4, atol=1e-4)
            assert ours_ended == theirs_ended


@pytest.mark.parametrize("env", ["Hopper-v5", "InvertedPendulum-v5"])
def test_mujoco_paths_end_where_the_task_does(env: str) -> None:
    pytest.importorskip("mujoco")
    spaces = spaces_of(env)
    simulator = simulator_for(env, spaces, generator(), copies=3)
    assert isinstance(simulator, RestoredSimulator)
    with gymnasium.make(env) as original:
        start = torch.tensor(np.stack([original.reset(seed=i)[0] for i in range(5)])).float()
        assert spaces.high is not None
        policy = Uniform(len(spaces.high), float(spaces.high[0]))
        path = simulator.continuations(policy, start, None, 40)
        again = simulator_for(env, spaces, generator(), copies=5)
        repeated = again.continuations(policy, start[:3], None, 40)
        assert torch.equal(repeated.observation[:, 0], start[:3])
        assert not path.present[:, -1].all()
        for i in range(5):
            original.reset(seed=0)
            restore_mujoco(original, start[i].numpy())
            alive = True
            for step in range(40):
                assert bool(path.present[i, step]) == alive, (i, step)
                if alive:
                    alive = not original.step(path.action[i, step].numpy())[2]
        for part in (simulator, again):
            assert isinstance(part, RestoredSimulator)
            part.close()


# ---- by name -------------------------------------------------------------------------------------


def test_simulators_are_found_by_name() -> None:
    for env, kind in (("CartPole-v1", CartPole), ("Pendulum-v1", Pendulum)):
        simulator = simulator_for(env, spaces_of(env), generator())
        assert isinstance(simulator, DynamicsSimulator)
        assert isinstance(simulator.dynamics, kind)
    heavy = simulator_for("Pendulum-v1", spaces_of("Pendulum-v1"), generator(), options={"g": 5.0})
    assert isinstance(heavy, DynamicsSimulator)
    assert isinstance(heavy.dynamics, Pendulum)
    assert heavy.dynamics.gravity == 5


class Lift(gymnasium.Env):  # type: ignore[misc, name-defined]
    """Goes up by one floor, from one that is drawn; the seventh is the last."""

    observation_space = gymnasium.spaces.Box(0, 7, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    floor: Any

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.restore(self.np_random.integers(7, size=1))
        return self.floor, {}

    def step(self, action: Any) -> Any:
        self.floor = self.floor + 1
        return self.floor, 0.0, bool(self.floor[0] == 7), False, {}

    def restore(self, observation: Any) -> None:
        self.floor = np.array(observation, np.float32)


def test_an_own_environment_is_restarted_by_its_own_method() -> None:
    def build() -> Any:
        return gymnasium.wrappers.TimeLimit(Lift(), 3)  # which a path does not know

    spaces = read_spaces(Lift.observation_space, Lift.action_space, "Lift")
    simulator = simulator_for("<Lift>", spaces, generator(), build=build, copies=2)
    floors = torch.tensor([[1.0], [5.0], [6.0]])
    path = simulator.continuations(Coin(), floors, torch.ones(3, dtype=torch.int64), 5)
    assert path.present.tolist() == [[True] * 5, [True] * 2 + [False] * 3, [True] + [False] * 4]
    assert path.observation[0, :, 0].tolist() == [1, 2, 3, 4, 5]


class Drift(gymnasium.Env):  # type: ignore[misc, name-defined]
    """A place and a speed, which every step writes to in place; `how` restores them."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, how: str = "kept", noise: float = 0.0) -> None:
        self.how, self.noise = how, noise

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.state, {}

    def step(self, action: Any) -> Any:
        self.state[1] += 0.1 * int(action) + self.noise * self.np_random.standard_normal()
        self.state[0] += self.state[1]
        return self.state, 0.0, False, False, {}

    def restore(self, observation: Any) -> None:
        if self.how == "raises":
            raise ValueError("not there")
        if self.how == "half":
            self.state = np.array([observation[0], 0], np.float32)
        elif self.how == "kept":
            self.state = observation


def drifting(build: Any) -> Any:
    spaces = read_spaces(Drift.observation_space, Drift.action_space, "Drift")
    return simulator_for("<Drift>", spaces, generator(), build=build, copies=2)


def test_an_environment_that_keeps_what_it_is_restored_from_does_not_write_to_it() -> None:
    start = torch.ones(3, 2)
    path = drifting(Drift).continuations(Coin(), start, torch.ones(3, dtype=torch.int64), 3)
    assert start.tolist() == path.observation[:, 0].tolist() == [[1.0, 1.0]] * 3


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_restore_that_does_not_do_it_is_warned_of(noise: float) -> None:
    for how in ("nothing", "half") if not noise else ("nothing",):
        with pytest.warns(UserWarning, match="<Drift>: restore.observation. does not put it into"):
            drifting(lambda how=how: Drift(how, noise))
    drifting(lambda: Drift("kept", noise))  # pytest makes an error of a warning
    with pytest.raises(EnvironmentFailureError, match="restoring raised ValueError: not there"):
        drifting(lambda: Drift("raises", noise))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # gymnasium's
def test_a_wrapper_outside_of_restore_that_changes_what_is_seen_is_refused() -> None:
    wrappers = gymnasium.wrappers
    for wrap in (wrappers.NormalizeObservation, lambda e: wrappers.FrameStackObservation(e, 2)):
        words = (
            r"shows what \w+Observation makes of .* restore is inside .*leave \w+Observation out"
        )
        with pytest.raises(OptionError, match=words):
            drifting(lambda wrap=wrap: wrap(Drift()))
    drifting(lambda: wrappers.TransformReward(Drift(), lambda r: r))
    drifting(lambda: wrappers.DtypeObservation(Drift(), np.float64))


def test_closing_that_raises_loses_nothing() -> None:
    class Stuck(Drift):
        def close(self) -> None:
            raise RuntimeError("the window is gone")

    words = "closing raised RuntimeError: the window is gone"
    with pytest.warns(UserWarning, match=f"'<Drift>': {words}"):
        simulator = drifting(Stuck)
    with pytest.warns(UserWarning, match=f"'Stuck': {words}"):
        simulator.close()


def test_an_environment_that_cannot_be_restarted_is_named() -> None:
    with pytest.raises(OptionError, match=r"Acrobot-v1 cannot be restarted.*score=one-step"):
        simulator_for("Acrobot-v1", spaces_of("Acrobot-v1"), generator())
    other = spaces_of("CartPole-v1")._replace(observation_shape=(8,))
    with pytest.raises(ShapeError, match=r"\(8,\) at CartPole-v1 \(allowed: \(4,\)\)"):
        simulator_for("CartPole-v1", other, generator())
