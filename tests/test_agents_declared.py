"""What an environment returns is held to what it has declared, also in a process of its own."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from cases import untyped
from gymnasium.spaces import (
    Box,
    Dict,
    Discrete,
    Graph,
    MultiBinary,
    MultiDiscrete,
    Sequence,
    Text,
    Tuple,
)
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from birl_ext.environments.declared import Declared
from birl_ext.environments.vector import Environments, make_environments
from birl_ext.errors import DtypeError, EnvironmentFailureError, OptionError
from birl_ext.simulators.restored import RestoredSimulator

# gymnasium forks its workers beside torch's idle threads
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

FLOATS = Box(-9, 9, (3,), np.float32)
FRAME = Box(0, 255, (1, 2, 2), np.uint8)
WHOLE = Box(-9, 9, (2,), np.int64)
INDEX = Discrete(3)
ANY = Box(-np.inf, np.inf, (1,), np.float64)


class Script(gymnasium.Env[Any, Any]):
    """Episodes of three steps. Step `at`, 0 for the reset, goes as `parts` say: an exception is
    raised, `answer` is all that is returned."""

    action_space: Any = Discrete(2)

    def __init__(self, space: Any, at: int, parts: dict[str, Any]) -> None:
        self.observation_space = space
        self.at, self.parts, self.now = at, parts, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.now = 0
        found = self.answer()
        return (found[0], found[4]) if len(found) == 5 else found[0]

    def step(self, action: Any) -> Any:
        self.now += 1
        found = self.answer()
        return found if len(found) == 5 else found[0]

    def answer(self) -> tuple[Any, ...]:
        space = self.observation_space
        parts = {
            "observation": np.zeros(space.shape or (), space.dtype or float)
            + np.maximum(getattr(space, "low", 0), 0).astype(space.dtype),
            "reward": 1.0,
            "terminated": self.now == 3,
            "truncated": False,
            "info": {},
        }
        given = self.parts if self.now == self.at else {}
        for value in given.values():
            if isinstance(value, BaseException):
                raise value
        return (given["answer"],) if "answer" in given else tuple((parts | given).values())

    def close(self) -> None:
        if "close" in self.parts:
            raise self.parts["close"]


def refusal(space: Any, at: int, parts: dict[str, Any], parallel: bool) -> str:
    """What three steps end with, in step `at`."""

    def script() -> Script:
        return Script(space, at, parts)

    with make_environments(script, count=2, seed=4, parallel=parallel) as environments:
        if at:
            environments.reset()
        for _ in range(at - 1):
            environments.step(torch.tensor([1, 0]))
        with pytest.raises(EnvironmentFailureError) as caught:
            environments.step(torch.tensor([1, 0]))
    return str(caught.value)


OBSERVATIONS: list[tuple[Any, Any, str]] = [
    (FLOATS, 5.0, "has shape ()"),
    (FLOATS, np.array([7.0]), "has shape (1,)"),
    (FLOATS, np.ones((1, 3)), "has shape (1, 3)"),
    (FLOATS, np.zeros(4), "has shape (4,)"),
    (FLOATS, np.zeros((3, 1)), "has shape (3, 1)"),
    (FLOATS, np.array([0, math.nan, 0]), "is nan in entry (1,)"),
    (FLOATS, np.array([0, 0, -math.inf], np.float32), "is -inf in entry (2,)"),
    (FLOATS, np.array([9.5, 0, 0]), "is 9.5 in entry (0,) at"),
    (FLOATS, np.array([0, -10, 0]), "is -10 in entry (1,) at"),
    (FLOATS, np.array([1e300, 0, 0]), "is 1e+300 in entry (0,) at"),
    (FLOATS, None, "is None, a NoneType"),
    (FLOATS, {"a": 1}, "is {'a': 1}, a dict"),
    (FLOATS, ["a", "b", "c"], "is ['a', 'b', 'c'], a list"),
    (FLOATS, np.zeros(3, complex), "is array([0.+0.j"),
    (FLOATS, [[1.0], [1.0, 2.0]], "is no array"),
    (FRAME, np.full((1, 2, 2), 0.5), "is 0.5, float64"),
    (FRAME, np.full((1, 2, 2), 300.7), "is 300.7, float64"),
    (FRAME, np.full((1, 2, 2), math.nan), "is nan, float64"),
    (FRAME, np.full((1, 2, 2), 300), "is 300 in entry (0, 0, 0)"),
    (FRAME, np.full((1, 2, 2), -1), "is -1 in entry (0, 0, 0)"),
    (FRAME, np.zeros((2, 2), np.uint8), "has shape (2, 2)"),
    (WHOLE, np.full(2, 0.7), "is 0.7, float64"),
    (WHOLE, np.full(2, math.inf), "is inf, float64"),
    (WHOLE, np.array([0, 10]), "is 10 in entry (1,)"),
    (INDEX, 7, "is 7 at"),
    (INDEX, -1, "is -1 at"),
    (INDEX, 1.9, "is 1.9, float64"),
    (INDEX, 1.0, "is 1.0, float64"),
    (INDEX, [1], "has shape (1,)"),
]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("at", [0, 2, 3], ids=["reset", "step", "last"])
def test_wrong_observations_are_refused(at: int, parallel: bool) -> None:
    """At a reset, in the middle and at the end of an episode, by name, in the same words."""
    for space, shown, words in OBSERVATIONS:
        found = refusal(space, at, {"observation": shown}, parallel)
        assert f"its observation {words}" in found
        assert "at environment 0 of 'script', seed " in found
        assert ("start of the episode" if at == 0 else f"step {at - 1}, action 1") in found
        assert not parallel or found == refusal(space, at, {"observation": shown}, False)


PARTS: list[tuple[dict[str, Any], str]] = [
    ({"reward": math.nan}, "its reward is nan at"),
    ({"reward": np.float32(-math.inf)}, "its reward is -inf at"),
    ({"reward": -1e39}, "its reward is -1e+39 at"),
    ({"reward": None}, "its reward is None, a NoneType"),
    ({"reward": "1.0"}, "its reward is '1.0', a str"),
    ({"reward": np.array([1.0])}, "its reward has shape (1,)"),
    ({"reward": np.zeros(0)}, "its reward has shape (0,)"),
    ({"reward": 1 + 2j}, "its reward is (1+2j), a complex"),
    ({"reward": 10**39}, "its reward is 1e+39 at"),
    ({"reward": -(10**400)}, "its reward is an integer of 1329 bits at"),
    ({"reward": 10**5000}, "its reward is an integer of 16610 bits at"),
    ({"reward": [10**5000]}, "its reward is too long to print, a list"),
    ({"observation": [10**400, 0.0, 1.0]}, "0...0000000000000000000, 0.0, 1.0], a list"),
    ({"terminated": 1}, "its terminated is 1, a int"),
    ({"terminated": np.array([True])}, "its terminated is array([ True]), a ndarray"),
    ({"terminated": np.array(1)}, "its terminated is array(1), a ndarray"),
    ({"terminated": "False"}, "its terminated is 'False', a str"),
    ({"truncated": None}, "its truncated is None, a NoneType"),
    ({"truncated": math.nan}, "its truncated is nan, a float"),
    ({"info": None}, "its step returned a tuple of 5"),
    ({"reward": ValueError("no way")}, "it raised ValueError: no way"),
    ({"reward": SystemExit(0)}, "it raised SystemExit: 0"),
    ({"answer": (np.zeros(3), 0.0, True, {})}, "its step returned a tuple of 4"),
    ({"answer": None}, "its step returned a NoneType at"),
]


@pytest.mark.parametrize("at", [2, 3])
def test_wrong_rewards_and_ends_are_refused(at: int) -> None:
    for parts, words in PARTS:
        found = refusal(FLOATS, at, parts, parallel=False)
        assert words in found
        assert f"environment 0 of 'script', seed 1490961094, step {at - 1}, action 1" in found
    for parts, _ in PARTS[at::4]:
        assert refusal(FLOATS, at, parts, True) == refusal(FLOATS, at, parts, False)


@pytest.mark.parametrize("parallel", [False, True])
def test_wrong_starts_are_refused(parallel: bool) -> None:
    """An array of two numbers would come apart as an observation and its info."""
    for parts, words in (
        ({"answer": np.zeros(2)}, "its reset returned a ndarray at"),
        ({"info": 3.0}, "its reset returned a tuple of 2 at"),
        ({"observation": ValueError("no")}, "it raised ValueError: no at"),
        ({"observation": SystemExit(3)}, "it raised SystemExit: 3 at"),
    ):
        found = refusal(Box(-9, 9, (2,)), 0, parts, parallel)
        assert words in found
        assert "start of the episode" in found


RIGHT: list[tuple[Any, Any]] = [
    (FLOATS, np.array([0.1, -9, 9])),
    (FLOATS, [1, 2, 3]),
    (FLOATS, np.array([1, 2, 3], np.uint8)),
    (FLOATS, np.array([0.5, 0, 0], np.float16)),
    (Box(np.float32(0.1), np.float32(0.3), (1,)), np.array([0.1])),  # below the edge as float64
    (Box(0, 1, (1,), np.float32), np.array([1 + 1e-7, -1e-7])[:1]),  # rounded, as by a wrapper
    (Box(-9, 9, (1,), np.longdouble), np.array([0.25], np.longdouble)),
    (Box(-9, 9, (1,), np.float16), np.array([0.25])),
    (Box(0, 9, (1,), np.uint16), np.array([7])),
    (Box(-np.inf, np.inf, (2,), np.float64), np.array([1e6 + 0.1, -1e-30])),
    (FRAME, np.full((1, 2, 2), 255)),
    (FRAME, np.full((1, 2, 2), 255, np.uint8)),
    (Box(0, 1, (2,), np.uint8), np.array([True, False])),
    (WHOLE, [9, -9]),
    (INDEX, 2),
    (INDEX, np.array(2)),
    (INDEX, np.uint8(1)),
    (Discrete(2), True),
]


@pytest.mark.parametrize("at", [0, 2, 3], ids=["reset", "step", "last"])
def test_what_fits_is_kept(at: int) -> None:
    for space, shown in RIGHT:
        parts = {"observation": shown, "terminated": np.bool_(at == 3), "reward": np.array(2)}
        seen = []
        for parallel in (False, True) if shown is RIGHT[at][1] else (False,):
            with make_environments(
                untyped(lambda s=space, p=parts: Script(s, at, p)),
                parallel=parallel,
            ) as environments:
                found = environments.observation
                for _ in range(at):
                    step = environments.step(torch.tensor([0]))
                    found = step.transitions.next_observation
            want = torch.from_numpy(np.asarray(shown, np.float64)).to(found.dtype)
            assert torch.equal(found[0], want), (space, shown)
            assert at == 0 or (float(step.transitions.reward), bool(step.ended)) == (2.0, at == 3)
            seen.append(found)
        assert torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize(
    ("number", "becomes"),
    [
        (2**53 + 1, "9007199254740992.0"),
        (-(2**53) - 1, "-9007199254740992.0"),
        (2**63 - 1, "9.223372036854776e+18"),
        (-(2**63), ""),
        (2**64 - 1, "1.8446744073709552e+19"),
        (2**64 + 1, "1.8446744073709552e+19"),
        (10**20, "1.0000000200408773e+20"),
        (2**100, ""),
        (np.longdouble(2) ** 53 + 1, "9007199254740992.0"),
    ],
    ids=str,
)
def test_no_whole_number_is_rounded_in_silence(number: Any, becomes: str) -> None:
    declared = Declared(ANY)
    reward = declared.step((np.zeros(1), number, False, False, {}))[1]
    assert reward == float(number)
    assert declared.rounded == (
        f"its reward {number} becomes {becomes}, in float32" if becomes else ""
    )
    for dtype in (np.int64, np.uint64):
        space: Any = Box(np.iinfo(dtype).min, np.iinfo(dtype).max, (2,), dtype)
        if space.low[0] <= number <= space.high[0] and isinstance(number, int):
            declared = Declared(space)
            assert declared.observation(np.array([0, number], dtype))[1] == number
            assert becomes in declared.rounded
            assert bool(becomes) == bool(declared.rounded)


@contextmanager
def quiet_or(words: str) -> Iterator[None]:
    if words:
        with pytest.warns(UserWarning, match=words):
            yield
    else:
        yield


@pytest.mark.parametrize("parallel", [False, True])
def test_what_float32_does_not_hold_is_said_once(parallel: bool) -> None:
    for number, becomes in (
        (2.0**24 + 1, "16777216.0"),
        (1_700_000_000.5, "1700000000.0"),
        (1e-50, "0.0"),
        (0.1, ""),
        (2.0**24 + 2, ""),
        (2**24 + 1, "16777216.0"),
    ):
        for name in ("observation", "reward"):
            value = np.array([number]) if name == "observation" else number
            # at the last step too, whose info lies elsewhere
            with make_environments(
                untyped(lambda n=name, v=value: Script(ANY, 3, {n: v})),
                parallel=parallel,
            ) as environments:
                words = (
                    f"'<lambda>': its {name} .* becomes ({becomes}), in float32" if becomes else ""
                )
                with quiet_or(words):
                    for _ in range(4):
                        environments.step(torch.tensor([0]))
                for _ in range(4):
                    environments.step(torch.tensor([0]))


class Foreign(SyncVectorEnv):
    """A vector environment of somebody, who replaces parts of an answer."""

    def __init__(self, mode: AutoresetMode, at: int, **parts: Any) -> None:
        build = [lambda: Script(FLOATS, -1, {})] * 2
        super().__init__(build, autoreset_mode=mode)
        self.at, self.parts, self.now = at, parts, 0

    def reset(self, **keywords: Any) -> Any:
        found, info = super().reset(**keywords)
        return (self.parts["found"] if self.now == self.at else found), info

    def step(self, action: Any) -> Any:
        self.now += 1
        names = ("found", "reward", "terminated", "truncated", "info")
        usual = dict(zip(names, super().step(action), strict=True))
        return tuple((usual | self.parts if self.now == self.at else usual).values())


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=str)
def test_foreign_vector_environments_are_held_to_it_too(mode: AutoresetMode) -> None:
    row = np.zeros((2, 3))
    row[1, 2] = 9.5
    wrong: list[tuple[int, dict[str, Any], str]] = [
        (0, {"found": row}, r"its observation is 9\.5 in entry \(2,\) at environment 1 of 'it'"),
        (1, {"found": row}, r"its observation is 9\.5 in entry \(2,\) at environment 1 of 'it'"),
        (1, {"found": np.zeros((2, 1))}, r"has shape \(2, 1\) at one of 2"),
        (1, {"reward": np.array([0, math.nan])}, "its reward is nan at environment 1"),
        (1, {"reward": np.zeros((2, 1))}, r"its reward has shape \(2, 1\)"),
        (1, {"terminated": np.zeros(2)}, "its terminated is .*booleans"),
    ]
    if mode is AutoresetMode.SAME_STEP:
        ends = {"terminated": np.array([False, True])}
        for final, words in (
            (np.array([None, 5.0]), r"has shape \(\) at environment 1"),
            (np.array([None, None]), "is None, a NoneType"),
        ):
            wrong.append((1, {**ends, "info": {"final_obs": final}}, f"its observation {words}"))
        wrong.append((1, {**ends, "info": {}}, "it raised KeyError: 'final_obs'"))
    for at, parts, words in wrong:
        with (
            Environments(Foreign(mode, at, **parts), name="it") as environments,
            pytest.raises(EnvironmentFailureError, match=words),
        ):
            environments.step(torch.tensor([0, 1]))


@pytest.mark.parametrize("parallel", [False, True])
def test_closing_that_raises_is_said_and_loses_nothing(parallel: bool) -> None:
    for error in (ValueError("stuck"), SystemExit(1)):
        environments = make_environments(
            untyped(lambda e=error: Script(FLOATS, -1, {"close": e})),
            count=2,
            parallel=parallel,
        )
        step = environments.step(torch.tensor([0, 1]))
        words = f"'<lambda>': closing raised {type(error).__name__}: "
        with pytest.warns(UserWarning, match=words) as caught:
            environments.close()
        assert len(caught) == 2
        assert step.transitions.size == 2
        environments.close()


@pytest.mark.parametrize("parallel", [False, True])
def test_building_that_goes_wrong_has_a_name(parallel: bool) -> None:
    here = os.getpid()

    def leaves() -> Script:
        raise SystemExit(0)

    def dies() -> Script:
        if os.getpid() != here:
            os._exit(3)
        return Script(FLOATS, -1, {})

    for build in (leaves, dies) if parallel else (leaves,):
        name = build.__name__
        with pytest.raises(EnvironmentFailureError, match=f"building raised .*'{name}'"):
            make_environments(build, parallel=parallel).reset()


def test_a_restored_environment_is_held_to_it_too() -> None:
    for parts, words in (
        ({"observation": 5.0}, r"its observation has shape \(\) at 'Script', action 0, restored"),
        ({"observation": np.full(3, 9.5)}, r"its observation is 9\.5 in entry \(0,\) at 'Script'"),
        ({"terminated": 1}, "its terminated is 1, a int"),
        ({"answer": None}, "its step returned a NoneType"),
    ):
        simulator = RestoredSimulator(
            untyped(lambda p=parts: Script(FLOATS, 1, p)),
            lambda *_: None,
            torch.Generator(),
            copies=2,
        )
        with pytest.raises(EnvironmentFailureError, match=words):
            simulator.continuations(Still(), torch.zeros(2, 3), None, 4)


class Still:
    device = torch.device("cpu")

    def sample(self, observation: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(len(observation), dtype=torch.int64)


# Spaces that are refused: the wrapper that is named works

FINITE = Box(-2, 3, (2, 2))
UNSUPPORTED_OBSERVATIONS = [
    Dict({"a": Discrete(2), "b": Box(-1, 1, (2,))}),
    Tuple((Discrete(2), MultiBinary(2))),
    MultiDiscrete([2, 3]),
    MultiBinary(3),
    Discrete(3, start=1),
    Box(-1, 1, ()),
    Box(-1, 1, (0,)),
    Text(3),
    Sequence(Discrete(2)),
    Graph(Box(-1, 1, (2,)), None),
]
UNSUPPORTED_ACTIONS = [
    Discrete(3, start=-1),
    MultiDiscrete([2, 3]),
    MultiBinary(2),
    Dict({"a": Discrete(2), "b": Box(-1, 1, (2,))}),
    Tuple((Discrete(2), Discrete(2))),
    Text(2),
    Box(-1, 1, (1,), np.int64),
    Box(0, 255, (3,), np.uint8),
    Box(0, 1, (2,), np.int8),
    Box(-1, 1, ()),
    FINITE,
    Box(-np.inf, np.inf, (2,)),
    Box(0, np.inf, (2, 2)),
    Box(-1e300, 1e300, (1,), np.float64),
    Box(np.array([0.0, 1.0], np.float32), np.array([0.0, 2.0], np.float32)),
    Box(-1, 1, (0,)),
]


class Sampled(gymnasium.Env[Any, Any]):
    """Shows what its space holds, and takes what its other one does."""

    def __init__(self, observation: Any, action: Any) -> None:
        self.observation_space, self.action_space = observation, action
        self.taken: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.taken.append(action)
        return self.observation_space.sample(), 0.0, False, False, {}


def named_wrapper(observation: Any, action: Any, parallel: bool) -> str:
    """The expression in the message of the refusal."""
    with pytest.raises(OptionError) as caught:
        make_environments(lambda: Sampled(observation, action), parallel=parallel)
    _, _, wrapper = str(caught.value).partition("Fix: wrap it: ")
    return wrapper.partition(", where ")[0].partition(", of one axis")[0]


@pytest.mark.parametrize("space", UNSUPPORTED_OBSERVATIONS, ids=str)
def test_the_wrapper_that_is_named_for_observations_works(space: Any) -> None:
    wrapper = named_wrapper(space, Discrete(2), False)
    assert wrapper == named_wrapper(space, Discrete(2), True)

    def build() -> Any:
        known = {
            "env": Sampled(space, Discrete(2)),
            "gymnasium": gymnasium,
            "function": lambda shown: np.zeros(2, np.float32),
            "low": np.zeros(2, np.float32),
            "high": np.ones(2, np.float32),
        }
        return eval(wrapper, known)

    with make_environments(build, count=2) as environments:
        for _ in range(5):
            environments.step(torch.tensor([0, 1]))


@pytest.mark.parametrize("space", UNSUPPORTED_ACTIONS, ids=str)
def test_the_wrapper_that_is_named_for_actions_works(space: Any) -> None:
    wrapper = named_wrapper(INDEX, space, False)
    assert wrapper == named_wrapper(INDEX, space, True)
    bare = Sampled(INDEX, space)
    space.seed(0)
    samples = [space.sample() for _ in range(30)]
    known = {
        "env": bare,
        "gymnasium": gymnasium,
        "choices": list({str(action): action for action in samples}.values()),
        "low": np.zeros(math.prod(space.shape or ()), np.float32),
        "high": np.ones(math.prod(space.shape or ()), np.float32),
    }
    with make_environments(lambda: eval(wrapper, known)) as environments:
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            environments.step(environments.spaces.random_action(1, generator))
    assert len({str(action) for action in bare.taken}) >= min(3, len({*map(str, samples)}))


def test_a_wrapper_that_is_named_for_a_dtype_works() -> None:
    parts = {"observation": np.full((1, 2, 2), 0.5)}
    assert "gymnasium.wrappers.DtypeObservation(env, np.float32)" in refusal(FRAME, 2, parts, False)

    def build() -> Any:
        return gymnasium.wrappers.DtypeObservation(Script(FRAME, 2, parts), np.float32)

    with make_environments(build) as environments:
        for _ in range(2):
            shown = environments.step(torch.tensor([0])).transitions.next_observation
    assert shown.flatten().tolist() == [0.5] * 4


@pytest.mark.parametrize("parallel", [False, True])
def test_what_an_environment_does_to_an_action_stays_there(parallel: bool) -> None:
    class Scales(Script):
        action_space = Box(-1, 1, (1,))

        def step(self, action: Any) -> Any:
            action *= 2
            self.shown = action.astype(np.float64)
            return self.shown, 0.0, False, False, {}

    with make_environments(lambda: Scales(ANY, -1, {}), parallel=parallel) as environments:
        step = environments.step(torch.tensor([[0.25]]))
        assert step.transitions.action.tolist() == [[0.25]]
        assert step.transitions.next_observation.tolist() == [[0.5]]
        state = environments.state_dict()
        environments.load_state_dict(state)
        assert state["actions"][0].tolist() == environments.state_dict()["actions"][0].tolist()


def test_actions_are_not_cut_to_indices() -> None:
    with (
        make_environments(lambda: Script(FLOATS, -1, {})) as environments,
        pytest.raises(DtypeError, match="action has dtype torch"),
    ):
        environments.step(torch.tensor([0.9]))
