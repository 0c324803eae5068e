"""Environments and what is collected in them: resets are no transitions, failures have a place."""

from __future__ import annotations

import gc
import importlib
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from cases import untyped
from closeness import assert_same_bits
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from processes import fork
from torch import Tensor

from birl_ext.environments.vector import Environments, episode_seed, make_environments
from birl_ext.errors import EnvironmentFailureError, MissingDependencyError, OptionError, ShapeError
from birl_ext.rollouts.collect import Collector, Episode
from birl_ext.rollouts.evaluate import evaluate_agent
from birl_ext.runs.loop import stop_requests

# gymnasium forks its workers beside torch's idle threads
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Clock(gymnasium.Env[Any, Any]):
    """Shows (draw, t): a number drawn at the reset and the steps since. An episode's length is
    drawn too. `fault` goes wrong at step 3 of an episode, or at the start of the second.

    It shows the same array for ever, as a simulator with a buffer would, unless told to copy.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(3)

    def __init__(
        self,
        fault: str = "",
        terminates: bool = True,
        length: int | None = None,
        copies: bool = False,
    ) -> None:
        self.copies = copies
        self.fault = fault
        self.terminates = terminates
        self.length = length
        self.resets = 0
        self.shown = np.zeros(2, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.resets += 1
        if self.fault == "reset" and self.resets == 2:
            raise ValueError("cannot start")
        self.steps = 0
        self.ends = self.length or int(self.np_random.integers(2, 7))
        self.shown[:] = self.np_random.random(), 0
        if self.fault == "unrepeatable":
            self.shown[0] = time.perf_counter_ns() % 2**24
        return self.show(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.steps += 1
        self.shown[1] = self.steps
        reward = 10.0 + float(action)
        if self.steps == 3:
            reward = self.fail(reward)
        ends = self.steps >= self.ends
        return self.show(), reward, ends and self.terminates, ends and not self.terminates, {}

    def show(self) -> Any:
        return self.shown.copy() if self.copies else self.shown

    def fail(self, reward: float) -> float:
        match self.fault:
            case "step":
                raise RuntimeError("wheel came off")
            case "observation":
                self.shown[0] = math.nan
            case "reward":
                return math.inf
            case "overflow":
                return 1e39  # finite as the environment's float64, not as our float32
            case "exit":
                os._exit(3)
            case "exit 0":
                os._exit(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                time.sleep(60)
        return reward


class Player:
    """Acts at random; enough of an agent to collect with."""

    device = torch.device("cpu")
    version = 7

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(3, (len(observation),), generator=generator)

    def act(self, observation: Tensor, generator: torch.Generator, greedy: bool = False) -> Tensor:
        if greedy:
            return torch.ones(len(observation), dtype=torch.int64)
        return self.sample(observation, generator)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        return torch.full((len(observation),), -math.log(3))


MODES = list(AutoresetMode)


def foreign(mode: AutoresetMode, **options: Any) -> Environments:
    """A vector environment that the package did not make."""
    # gymnasium itself loses the last observation of a buffer that is written over (SAME_STEP)
    build = [lambda: Clock(copies=True, **options)] * 3
    # Its arrays are written over too, unless that would hide a reset whose answer is not looked at.
    copy = mode is AutoresetMode.DISABLED
    vector = SyncVectorEnv(build, autoreset_mode=mode, copy=copy)
    return Environments(vector, name="clock", seed=5)


def collector(environments: Environments, seed: int = 0, **options: Any) -> Collector:
    return Collector(environments, Player(), seed=seed, **options)


# Transitions


@pytest.mark.parametrize("terminates", [True, False])
@pytest.mark.parametrize("mode", [*MODES, "made", "parallel"], ids=str)
def test_transitions_are_those_that_happened(mode: Any, terminates: bool) -> None:
    """Each row goes from (x, t) to (x, t + 1) of one episode, also the last one."""
    if isinstance(mode, AutoresetMode):
        environments = foreign(mode, terminates=terminates)
    else:
        environments = make_environments(
            lambda: Clock(terminates=terminates), count=3, seed=5, parallel=mode == "parallel"
        )
    with environments:
        found = collector(environments).collect(60)
    rows = found.transitions
    assert bool((rows.next_observation[:, 0] == rows.observation[:, 0]).all()), "crosses an end"
    assert bool((rows.next_observation[:, 1] == rows.observation[:, 1] + 1).all())
    assert bool((rows.reward == 10 + rows.action).all())
    assert torch.equal(rows.terminated, found.ended & terminates)
    # Within an environment: an end is followed by a start, anything else by what it led to.
    for i in range(3):
        mine = rows.select(found.environment == i)
        ended = found.ended[found.environment == i]
        assert ended.sum() >= 5
        after = mine.observation[1:]
        assert torch.equal(after[:, 1] == 0, ended[:-1])
        assert torch.equal(after[~ended[:-1]], mine.next_observation[:-1][~ended[:-1]])
    assert len(found.episodes) == int(found.ended.sum())
    assert rows.size < 180 if mode is AutoresetMode.NEXT_STEP else rows.size == 180


def test_every_step_that_only_resets_is_dropped() -> None:
    """Episodes of 4 steps: with the next step as reset, 4 of 5 steps are transitions."""
    with foreign(AutoresetMode.NEXT_STEP, length=4) as environments:
        found = collector(environments).collect(20)
    assert found.transitions.size == 3 * 16
    assert [e.length for e in found.episodes] == [4] * 12
    with make_environments(lambda: Clock(length=4), count=3) as environments:
        found = collector(environments).collect(20)
    assert found.transitions.size == 3 * 20
    assert int(found.ended.sum()) == 15


def test_episodes_add_up() -> None:
    with make_environments(Clock, count=2, seed=1) as environments:
        source = collector(environments)
        parts = [source.collect(7) for _ in range(6)]
    sums, lengths, want = [0.0, 0.0], [0, 0], []
    for found in parts:
        rewards = found.transitions.reward.tolist()
        for i, reward, ended in zip(found.environment.tolist(), rewards, found.ended, strict=True):
            sums[i] += reward
            lengths[i] += 1
            if ended:
                want.append(Episode(i, sums[i], lengths[i]))
                sums[i], lengths[i] = 0.0, 0
    assert [episode for found in parts for episode in found.episodes] == want
    assert len(want) > 10
    assert source.transitions == 84
    assert parts[0].version == 7


def test_uniform_actions_come_first() -> None:
    with make_environments("Pendulum-v1", count=2) as environments:
        found = collector(environments, random_steps=2000).collect(1000)
    action = found.transitions.action
    assert action.shape == (2000, 1)
    assert float(action.min()) < -1.9
    assert float(action.max()) > 1.9
    assert abs(float(action.mean())) < 4 * 4 / math.sqrt(12 * 2000)
    assert_same_bits(found.log_prob, torch.full((2000,), -math.log(4)), label="log-density")


def test_episodes_have_seeds_of_their_own() -> None:
    seeds = {episode_seed(s, e, n) for s in range(5) for e in range(5) for n in range(5)}
    assert len(seeds) == 125
    with make_environments(Clock, count=3, seed=5) as one:
        first = collector(one).collect(30).transitions.observation
    with make_environments(Clock, count=3, seed=5) as same, make_environments(Clock) as other:
        assert_same_bits(collector(same).collect(30).transitions.observation, first, label="same")
        starts = {round(float(x), 6) for x in first[first[:, 1] == 0][:, 0]}
        assert len(starts) == int((first[:, 1] == 0).sum())
        assert not torch.equal(other.observation, first[:1])


def test_processes_see_what_one_process_sees() -> None:
    with make_environments(Clock, count=3, seed=5) as one:
        alone = collector(one).collect(20)
    with make_environments(Clock, count=3, seed=5, parallel=True) as many:
        together = collector(many).collect(20)
    for a, b in zip(alone.transitions, together.transitions, strict=True):
        assert_same_bits(a, b, label="field")


# Resuming


@pytest.mark.parametrize("parallel", [False, True])
def test_an_episode_goes_on_where_it_was(parallel: bool) -> None:
    def fresh(seed: int) -> Collector:
        return collector(
            make_environments(Clock, count=3, seed=2, parallel=parallel), seed, random_steps=10
        )

    ours, theirs = fresh(0), fresh(1)
    ours.collect(9)
    state = ours.state_dict()
    theirs.collect(2)
    theirs.load_state_dict(state)
    want, got = ours.collect(15), theirs.collect(15)
    for a, b in zip(got.transitions, want.transitions, strict=True):
        assert_same_bits(a, b, label="field")
    assert got.episodes == want.episodes
    for one in (ours, theirs):
        one.environments.close()


def test_an_environment_that_does_not_repeat_itself_is_noticed() -> None:
    build = lambda: Clock("unrepeatable", length=9)  # noqa: E731
    with make_environments(build, count=2) as ours, make_environments(build, count=2) as theirs:
        collector(ours).collect(4)
        with pytest.raises(
            EnvironmentFailureError,
            match=r"differently when repeated at environment 0 of .* after 4 steps.*the time",
        ):
            theirs.load_state_dict(ours.state_dict())


def test_foreign_environments_start_new_episodes_when_resumed() -> None:
    with foreign(AutoresetMode.NEXT_STEP) as ours, foreign(AutoresetMode.NEXT_STEP) as theirs:
        first = collector(ours)
        first.collect(8)
        second = collector(theirs)
        second.load_state_dict(first.state_dict())
        assert bool((theirs.observation[:, 1] == 0).all())
        found = second.collect(10)
    assert all(episode.length <= 6 for episode in found.episodes)
    with make_environments(Clock, count=2) as fewer, pytest.raises(OptionError, match="3 environ"):
        fewer.load_state_dict(first.state_dict()["environments"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("episodes", None, "stored episodes is None .*whole numbers"),
        ("episodes", [0, 0.5], "stored episodes is .0, 0.5."),
        ("episodes", [0, True], "stored episodes is "),
        ("episodes", [0, -1], "stored episodes is .*0 or more"),
        ("episodes", [0], "1 environments are stored"),
        ("actions", [1, 2], "stored actions is int"),
        ("actions", [torch.zeros(3)], "stored actions is list .*a list of 2"),
        ("actions", [torch.zeros(3, 7), torch.zeros(0)], "stored actions is Tensor"),
        ("observation", 3, r"stored observation is int .*\(2, "),
        ("observation", torch.zeros(2, 99), "stored observation is Tensor"),
        ("other", 3, "stored environments is .'episodes', 'actions', 'observation', 'other'"),
    ],
)
def test_the_state_of_no_environments_is_refused(key: str, value: Any, words: str) -> None:
    with make_environments(Clock, count=2) as ours:
        state = ours.state_dict()
        before = ours.episodes
        with pytest.raises(OptionError, match=words):
            ours.load_state_dict({**state, key: value})
        with pytest.raises(OptionError, match="stored environments is NoneType"):
            ours.load_state_dict(untyped(None))
        assert ours.episodes == before


# Failures


def provoke(fault: str, *, parallel: bool, timeout: float = 60.0) -> str:
    """The message of the failure of three environments, of which the first one goes first."""

    def faulty() -> Clock:
        return Clock(fault, length=2 if fault == "reset" else 8)

    environments = make_environments(faulty, count=3, seed=4, parallel=parallel, timeout=timeout)
    with pytest.raises(EnvironmentFailureError) as caught:
        collector(environments).collect(10)
    with pytest.raises(EnvironmentFailureError, match="are closed"):
        environments.step(torch.zeros(3, dtype=torch.int64))
    environments.close()
    processes = untyped(environments._vector).processes if parallel else []
    assert not any(process.is_alive() for process in processes)
    return str(caught.value)


FAULTS = {
    "step": "it raised RuntimeError: wheel came off",
    "observation": r"its observation is nan in entry \(0,\)",
    "reward": "its reward is inf",
    "overflow": r"its reward is 1e\+39",  # with float32 it would be infinite
}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_names_environment_seed_step_and_action(fault: str, parallel: bool) -> None:
    message = provoke(fault, parallel=parallel)
    place = re.fullmatch(
        rf"BIRL-E901 {FAULTS[fault]} at environment 0 of 'faulty', "
        r"seed (\d+), step 2, action ([012])( \(allowed: finite in float32\))?\. Fix: .*",
        message,
    )
    assert place, message
    assert int(place[1]) == episode_seed(4, 0, 0)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_failing_start_is_told_from_a_failing_step(parallel: bool) -> None:
    message = provoke("reset", parallel=parallel)
    assert "it raised ValueError: cannot start at environment 0 of" in message
    assert f"seed {episode_seed(4, 0, 1)}, start of the episode" in message


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("exit", "the worker ended with status 3"),
        ("exit 0", "the worker ended with status 0"),
        ("kill", "the worker ended with signal SIGKILL"),
        ("stop", "no answer within 2 s"),
        ("hang", "no answer within 2 s"),
    ],
)
def test_a_worker_that_dies_or_hangs_ends_in_a_named_error(fault: str, words: str) -> None:
    message = provoke(fault, parallel=True, timeout=2.0 if "no answer" in words else 60.0)
    assert f"{words} at environment 0 of" in message
    assert f"seed {episode_seed(4, 0, 0)}, step 2, action " in message


def test_closing_after_an_interrupt_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = make_environments(lambda: Clock("hang", length=9), count=2, parallel=True)
    action = torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        environments.step(action)
    workers = environments._vector

    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "step_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environments.step(action)
    environments.close()
    assert not any(process.is_alive() for process in untyped(workers).processes)


def parallel(**options: Any) -> Environments:
    return make_environments(lambda: Clock(length=9), count=2, parallel=True, **options)


ZEROS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_leaves_workers_at_work(number: int) -> None:
    """Those that a run had before it caught signals, and those that it made afterwards."""

    def work() -> None:
        os.setpgid(0, 0)
        with parallel() as early, stop_requests() as stop, parallel() as late:
            for environments in (early, late):
                environments.step(ZEROS)
            for _ in range(2 if number != signal.SIGINT else 1):
                os.killpg(0, number)
            for environments in (early, late):
                for _ in range(9):
                    environments.step(ZEROS)
            assert set(stop) == {number}
        for environments in (early, late):
            assert [process.exitcode for process in untyped(environments._vector).processes] == [
                0,
                0,
            ]

    assert os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) == 0


def test_workers_end_with_the_process_that_was_killed() -> None:
    ready, made = os.pipe()
    ended, held = os.pipe()  # the workers hold it open

    def work() -> None:
        environments = parallel()
        environments.step(ZEROS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(made, b"1")
        time.sleep(60)

    child = fork(work)
    os.close(held)
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([ended], [], [], 20)[0]
    for end in (ready, made, ended):
        os.close(end)


def test_workers_that_nobody_closed_end_with_the_process() -> None:
    code = (
        "from birl_ext.environments.vector import make_environments\n"
        "environments = make_environments('CartPole-v1', count=2, parallel=True)\n"
        "environments.reset()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    environments = parallel()
    environments.reset()
    processes = untyped(environments._vector).processes
    del environments
    gc.collect()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_between_steps_does_not_keep_the_others_from_closing(number: int) -> None:
    environments = parallel(timeout=1.0)
    environments.step(ZEROS)
    first, second = untyped(environments._vector).processes
    os.kill(first.pid, number)
    if number == signal.SIGKILL:
        first.join()
    environments.close()
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)


def test_only_the_guilty_one_is_named() -> None:
    """The second of two environments runs away."""

    class Late(Clock):
        def step(self, action: Any) -> Any:
            if action == 2:
                raise RuntimeError("not this way")
            return super().step(action)

    with make_environments(Late, count=2, seed=4, parallel=True) as environments:
        environments.step(torch.tensor([0, 1]))
        words = rf"not this way at environment 1 of .*seed {episode_seed(4, 1, 0)}, step 1, act"
        with pytest.raises(EnvironmentFailureError, match=words + "ion 2"):
            environments.step(torch.tensor([0, 2]))


def test_foreign_environments_fail_by_name_too() -> None:
    with (
        foreign(AutoresetMode.NEXT_STEP, fault="step", length=8) as environments,
        pytest.raises(EnvironmentFailureError, match="wheel came off at one of 3 of 'clock', seed"),
    ):
        collector(environments).collect(10)


# Borders


@pytest.mark.parametrize("name", ["os:x", "evil.module:Env-v0"])
def test_an_id_that_would_import_code_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="names code to import"):
        make_environments(name)
    spec = gymnasium.spec("CartPole-v1")
    with pytest.raises(OptionError, match="names code to import"):
        make_environments(spec)
    make_environments(spec, allow_entry_points=True).close()


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(OptionError, match="no environment 'NoSuchThing-v0'"):
        make_environments("NoSuchThing-v0")
    with pytest.raises(OptionError, match="count is 0"):
        make_environments("CartPole-v1", count=0)
    with pytest.raises(OptionError, match="timeout is 0"):
        make_environments("CartPole-v1", timeout=0)
    with pytest.raises(EnvironmentFailureError, match="building raised TypeError"):
        make_environments("CartPole-v1", options={"wheels": 3})
    with (
        make_environments("CartPole-v1", count=2) as environments,
        pytest.raises(ShapeError, match=r"action has shape \(3,\) \(allowed: \(2,\)"),
    ):
        environments.step(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("observation", "action", "words"),
    [
        (Dict({"a": Discrete(2)}), Discrete(2), r"observation space .* is Dict.*FlattenObs"),
        (Discrete(2, start=1), Discrete(2), "observation space .*Discrete from 0"),
        (Discrete(2), Discrete(2, start=1), "action space .*Discrete from 0"),
        (Discrete(2), MultiDiscrete([2, 2]), "action space"),
        (Discrete(2), Box(-np.inf, np.inf, (2,)), "action space .*finite edges"),
        (Discrete(2), Box(-1, 1, (2, 2)), "action space"),
        (Box(-1, 1, ()), Discrete(2), r"observation space .*one or more axes.*FlattenObs"),
        (Box(-1, 1, (0,)), Discrete(2), "observation space .*none of them empty"),
        (Discrete(2), Box(-1, 1, (0,)), "action space .*d > 0"),
    ],
    ids=str,
)
def test_spaces_that_are_not_supported_are_named(observation: Any, action: Any, words: str) -> None:
    class Odd(Clock):
        observation_space = observation
        action_space = action

    with pytest.raises(OptionError, match=words):
        make_environments(Odd)


def test_spaces_are_read() -> None:
    with make_environments("Pendulum-v1") as environments:
        spaces = environments.spaces
        assert (spaces.observation_shape, spaces.action_shape) == ((3,), (1,))
        assert spaces.high is not None
        assert spaces.high.tolist() == [2.0]
        assert environments.observation.dtype is torch.float32
    with make_environments("CliffWalking-v1") as environments:
        assert (environments.spaces.observations, environments.spaces.actions) == (48, 4)
        assert environments.observation.dtype is torch.int64

    class Pixels(Clock):
        observation_space = Box(0, 255, (1, 4, 4), untyped(np.uint8))

        def reset(self, **keywords: Any) -> Any:
            super().reset(**keywords)
            return np.full((1, 4, 4), 200, dtype=np.uint8), {}

    with make_environments(Pixels) as environments:
        assert environments.observation.dtype is torch.uint8
        assert environments.observation.flatten().tolist() == [200] * 16

    class Bytes(Clock):
        observation_space = Box(0, 255, (1,), untyped(np.uint8))

        def reset(self, **keywords: Any) -> Any:
            super().reset(**keywords)
            return np.full(1, 200, dtype=np.uint8), {}

    with make_environments(Bytes) as environments:  # numbers, not pixels
        assert environments.observation.dtype is torch.float32
        assert environments.observation.tolist() == [[200.0]]


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    for module in ("vector", "spaces"):
        monkeypatch.delitem(sys.modules, f"birl_ext.environments.{module}")
        with pytest.raises(MissingDependencyError, match=r"birl_ext\[rl\]"):
            importlib.import_module(f"birl_ext.environments.{module}")


# Evaluation


def test_each_environment_plays_its_share() -> None:
    """Five episodes over two environments: three and two, however long they are."""
    with make_environments(Clock, count=2, seed=3) as environments:
        found = evaluate_agent(Player(), environments, episodes=5)
        again = evaluate_agent(Player(), environments, episodes=5)
        drawn = [
            evaluate_agent(Player(), environments, episodes=5, greedy=False, seed=s)
            for s in (1, 1, 2)
        ]
    want = []
    for i, episodes in ((0, 3), (1, 2)):
        for n in range(episodes):
            environment = Clock()
            environment.reset(seed=episode_seed(3, i, n))
            want.append(environment.ends)
    assert found.lengths.tolist() == want
    assert found.rewards.tolist() == [11.0 * length for length in want]
    assert_same_bits(found.rewards, again.rewards, label="the same episodes each time")
    assert_same_bits(drawn[0].rewards, drawn[1].rewards, label="the same actions")
    assert not torch.equal(drawn[0].rewards, drawn[2].rewards)
    assert found.mean == pytest.approx(11 * sum(want) / 5)
    spread = np.std([11.0 * length for length in want], ddof=1) / math.sqrt(5)
    assert found.standard_error == pytest.approx(spread)


def test_evaluation_that_never_ends_says_so() -> None:
    with (
        make_environments(lambda: Clock(length=10**9)) as environments,
        pytest.raises(OptionError, match="0 of 2 episodes finished in 50 steps"),
    ):
        evaluate_agent(Player(), environments, episodes=2, max_steps=50)


class Slider(gymnasium.Env[Any, Any]):
    """Takes what its box holds and nothing else; 0.4 in float32 lies beyond 0.4."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float64)
    action_space = Box(-0.4, 0.4, (1,), np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return np.asarray(action), 0.0, False, False, {}


def test_an_action_at_the_edge_is_in_the_box() -> None:
    with make_environments(Slider, count=1) as environments:
        edge = environments.spaces.high
        assert edge is not None
        assert float(edge) > 0.4
        step = environments.step(edge.unsqueeze(0))
    assert float(step.transitions.next_observation) == pytest.approx(0.4)


def test_an_observation_beyond_float32_is_not_infinite_in_silence() -> None:
    class Far(Slider):
        def step(self, action: Any) -> Any:
            return np.full(1, 1e39), 0.0, False, False, {}

    with (
        make_environments(Far, count=1) as environments,
        pytest.raises(EnvironmentFailureError, match=r"its observation is 1e\+39"),
    ):
        environments.step(torch.zeros(1, 1))


def test_what_a_caller_does_with_actions_does_not_reach_the_record() -> None:
    with make_environments(Slider, count=1) as environments:
        given = torch.full((1, 1), 0.25)
        environments.step(given).transitions.action.zero_()
        given.zero_()
        (kept,) = environments.state_dict()["actions"]
    assert float(kept) == 0.25


def test_sums_start_anew_where_episodes_do() -> None:
    """A state of environments that cannot resume in mid-episode, taken over by ones that can."""
    theirs = Collector(foreign(AutoresetMode.SAME_STEP, length=50), Player())
    theirs.collect(7)
    state = theirs.state_dict()
    theirs.environments.close()
    with make_environments(lambda: Clock(length=5), count=3) as environments:
        ours = Collector(environments, Player())
        ours.load_state_dict(state)
        found = ours.collect(5)
    assert [episode.length for episode in found.episodes] == [5, 5, 5]
