"""Any value of any option of any command: no traceback, one line and a status, and where a setting
is refused, no directory.

Values are drawn from what each option's type invites a careless person to give: negative, zero,
huge, not finite, another type, a device or a file that is not there.
BIRL_HYPOTHESIS=nightly tries them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import signal
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import hypothesis
import pytest
import torch
from cases import untyped
from hypothesis import strategies as st

import birl_ext
from birl_ext import cli
from birl_ext.problems import PROBLEMS
from birl_ext.runs import loop
from birl_ext.runs.config import from_plain, to_plain

pytest.importorskip("gymnasium")

SMALL: dict[str, list[str]] = {
    "random-mdp": ["--states=3", "--actions=2", "--dimension=2", "--max-steps=2"],
    "bus": ["--max-steps=2"],
    "four-rooms": ["--starts=2", "--steps=4"],
    "taxes": ["--cells=6", "--steps=1"],
    "arena": [
        *("--contest=random-mdp", "--methods=m-sobirl", "--settings=τ 1", "--switches=plain"),
        *("--seeds=1", "--budget=0.02", "--workers=1"),
    ],
    "adaptation": ["--springs=1", "--steps=1", "--first=1", "--rounds=1", "--paths=8"],
    "preference": [
        *("--env=birl_ext/Gridworld-v0", "--rounds=1", "--environments=2", "--fragment=4"),
        *("--environment-steps=20", "--labels=8", "--initial-labels=4", "--batch-size=8"),
        *("--replay=200", "--pairs=40", "--initial-epochs=1", "--reward-steps=1"),
        *("--evaluation-episodes=1", "--recent=50"),
    ],
}
NUMBERS = ["-1", "0", "2", "x", "", "nan", "1000000000000", "-99999999999999999999"]
INTEGERS = [*NUMBERS, "1.5", "99999999999999999999"]
FLOATS = [*NUMBERS, "inf", "-inf", "1e308", "-1e308", "1e-320", "1e400"]
WORDS = ["", "none_such", "/", "../..", "\udcff", "ü", "\n", "module:Name-v0", "meta", "cuda:99"]
ENDLESS = {"environment_steps", "initial_epochs", "reward_steps", "evaluation_episodes", "replay"}
"""Settings of which a huge value is a long step, or an hour of drawing, but no error."""


def values(name: str, hint: Any) -> list[str]:
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is Literal:
        return [*map(str, kinds), "none_such"]
    if bool in kinds:
        return ["True", "maybe"]
    found = INTEGERS if int in kinds else FLOATS if float in kinds else WORDS
    return [value for value in found if name not in ENDLESS or "000" not in value]


CASES = [
    (problem, f"--{field.name.replace('_', '-')}={value}")
    for problem in PROBLEMS
    for config in (PROBLEMS[problem].config,)
    for field in dataclasses.fields(config)
    for value in values(field.name, typing.get_type_hints(config)[field.name])
]
OPTIONS = [
    f"--{field.name.replace('_', '-')}={value}"
    for field in dataclasses.fields(cli.RunOptions)
    for value in values(field.name, typing.get_type_hints(cli.RunOptions)[field.name])
    if field.name not in ("figures", "tensorboard")
]


class OneStep(list):
    """Signals received: one after the first step."""

    asked = 0

    def __bool__(self) -> bool:
        self.asked += 1
        return self.asked > 1


@contextlib.contextmanager
def stopped_after_a_step() -> Iterator[OneStep]:
    yield OneStep([signal.SIGTERM])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BIRL_DEBUG", raising=False)
    monkeypatch.setattr(loop, "stop_requests", stopped_after_a_step)


def birl(capfd: Any, *words: str) -> tuple[int, str]:
    """Run a command in this process: the exit status, and what it printed on standard error."""
    capfd.readouterr()
    try:
        status = cli.main(list(words))
    except SystemExit as ending:  # of argparse and tyro, with words of their own
        status = untyped(ending.code)
    return status, capfd.readouterr().err


def assert_ends_well(status: int, said: str, *, made: bool) -> None:
    """Done, not converged, refused, or stopped after its first step."""
    assert "Traceback" not in said
    assert status in (0, 1, 2, 128 + signal.SIGTERM), said
    if status == 2 and said.startswith("birl: BIRL-E"):
        assert said.count("\n") == 1, said
        assert ". Fix: " in said, said
        # what the settings decide is decided before the directory; a step may fail later
        assert not made or "BIRL-E8" not in said, said
        assert not made or "BIRL-E2" not in said, said
        assert not made or "BIRL-E3" not in said, said
    elif status == 2:
        assert not made, said


hurried = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    max_examples=untyped(hypothesis.settings.default).max_examples // 2,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("problem", PROBLEMS)
@hurried
@hypothesis.given(data=st.data())
def test_any_setting_of_a_run(problem: str, capfd: Any, data: st.DataObject) -> None:
    word = data.draw(st.sampled_from([word for name, word in CASES if name == problem]))
    shutil.rmtree("out", ignore_errors=True)
    flag = word.partition("=")[0]
    small = [other for other in SMALL[problem] if other.partition("=")[0] != flag]
    status, said = birl(capfd, "run", problem, "--out=out", "--no-figures", *small, word)
    assert_ends_well(status, said, made=Path("out").exists())


@pytest.mark.filterwarnings("ignore")
@hurried
@hypothesis.given(word=st.sampled_from(OPTIONS))
def test_any_option_of_a_run(word: str, capfd: Any) -> None:
    shutil.rmtree("here", ignore_errors=True)
    Path("here").mkdir()
    words = ["run", "random-mdp", *SMALL["random-mdp"], "--no-figures"]
    if not word.startswith("--out="):
        words.append("--out=out")
    with contextlib.chdir("here"):
        status, said = birl(capfd, *words, word)
        assert_ends_well(status, said, made=any(Path().rglob("config.toml")))


SOLVE = [
    f"--{field.name.replace('_', '-')}={value}"
    for field in dataclasses.fields(cli.SolveFile)
    for value in values(field.name, typing.get_type_hints(cli.SolveFile)[field.name])
]


@hurried
@hypothesis.given(word=st.sampled_from(SOLVE))
def test_any_option_of_solve(word: str, capfd: Any) -> None:
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    birl_ext.DenseMDP(torch.ones(3, 2, dtype=torch.float64), transition, 0.9).save("mdp.npz")
    words = ["--mdp=mdp.npz", "--temperature=1", "--out=out.npz"]
    words = [other for other in words if other.partition("=")[0] != word.partition("=")[0]]
    status, said = birl(capfd, "solve", *words, word)
    assert_ends_well(status, said, made=False)


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "--device=bogus"],
        ["bench", "--device=meta"],
        ["bench", "--device=cuda:99"],
        ["bench", "--threads=-1"],
        ["bench", "--threads=99999999999999999999"],
        ["bench", "--seconds=nan"],
        ["bench", "none_such"],
        ["doctor", "more"],
        ["plot"],
        ["plot", "nowhere"],
        ["plot", "/"],
        ["plot", ""],
    ],
    ids=" ".join,
)
def test_any_option_of_the_other_commands(words: list[str], capfd: Any) -> None:
    status, said = birl(capfd, *words)
    assert status == 2
    assert_ends_well(status, said, made=False)


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        ("random-mdp", "--learning-rate=0"),  # not the default
        ("random-mdp", "--temperature=-1"),
        ("random-mdp", "--temperature=0"),
        ("random-mdp", "--states=0"),
        ("random-mdp", "--actions=1000000000000"),
        ("random-mdp", "--dimension=-1"),
        ("random-mdp", "--max-steps=0"),
        ("taxes", "--cells=1000000000000"),
        ("four-rooms", "--spread=1e308"),
        ("bus", "--max-steps=-1"),
        ("bus", "--discount=1"),
        ("preference", "--lead=1000000000000"),
        ("preference", "--labels=1000000000000"),
        ("preference", "--rounds=1000000000000"),
        ("preference", "--replay=1000000000000"),
        ("preference", "--device=bogus"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_made(
    problem: str, word: str, capfd: Any
) -> None:
    status, said = birl(capfd, "run", problem, "--out=out", word)
    assert status == 2
    assert said.startswith("birl: BIRL-E")
    assert not Path("out").exists()
    name = word[2:].partition("=")[0].replace("-", "_")
    assert any(shown in said for shown in (name, name.removesuffix("s"))), said


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_integer_that_no_float_holds_is_refused_in_a_file(problem: str) -> None:
    config = PROBLEMS[problem].config
    plain = to_plain(config())
    name = next(name for name, value in plain.items() if isinstance(value, float))
    with pytest.raises(birl_ext.errors.ConfigError, match=name):
        from_plain(config, {**plain, name: 10**400})
    assert math.isfinite(getattr(from_plain(config, {**plain, name: 1}, check=False), name))
