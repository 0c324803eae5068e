"""The benchmarks run, refuse wrong answers, and write what they promise. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import birl_ext
from birl_ext.reference import float64

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CASES = ("small_batch", "micro_batch", "dense")
NATIVE = birl_ext._native.reason("cpu")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder on the path; no compilation, small buffers, the fewest samples."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    harness, competitors = module("harness"), module("competitors")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(harness, "SAMPLES", (1, 2))
    monkeypatch.setattr(harness, "last_cache", lambda: 1 << 12)
    monkeypatch.setattr(harness, "missing", lambda *packages: ", ".join(packages))
    competitors.compiled_step.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    competitors.compiled_step.cache_clear()


def module(name: str) -> Any:
    return importlib.import_module(name)


def tiny() -> Any:
    return module("workloads").garnet(2, 5, 2, torch.float64, discount=0.9, temperature=0.2)


def tiny_case(*candidates: Any) -> Any:
    problem = tiny()
    truth = module("workloads").truth(problem)
    allowed = dict.fromkeys(truth, 1e-9)
    return module("harness").Case("tiny", "Is it right?", problem, truth, allowed, candidates, "")


def answering(name: str, tensors: dict[str, torch.Tensor]) -> Any:
    harness = module("harness")
    return harness.Candidate(name, lambda problem: lambda: harness.Answer(tensors, 1.0))


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_a_case_is_timed_or_says_why_not(name: str) -> None:
    for case in module(f"bench_{name}").run(small=True):
        ours, *others = case["rows"]
        assert ours["status"] == "timed", ours
        assert len(others) >= 5
        for row in others:
            assert row["status"] == "timed" or row["reason"], row
            assert row["status"] in ("timed", "missing"), row
        assert all(gap < 1e-3 for gap in case["disagreement"].values())


@pytest.mark.skipif(bool(NATIVE), reason=f"measures the compiled module: {NATIVE}")
def test_the_layers_of_a_tiny_call_agree_and_the_requirement_is_judged() -> None:
    bench = module("bench_tiny_call")
    (case,) = bench.run(small=True)
    judged = [row for row in case["rows"] if row.get("requirement")]
    assert [row["candidate"] for row in judged] == [bench.LIMITED]
    met = judged[0]["over_the_arithmetic"] <= bench.LIMIT
    assert judged[0]["requirement"].endswith("met" if met else "missed")
    assert case["rows"][0]["over_the_arithmetic"] == 0


def test_float32_errors_are_reported_and_ours_are_small() -> None:
    (case,) = module("bench_float32_truth").run(small=True)
    ours, *others = case["rows"]
    assert ours["honest"].startswith("yes")
    assert ours["policy_error"] < 1e-5
    assert ours["grad_error"] < 1e-5
    assert all(row["honest"] == "none given" for row in others)
    assert all(math.isfinite(row["grad_error"]) for row in case["rows"])


def test_a_wrong_answer_gets_no_time() -> None:
    right = dict(module("workloads").truth(tiny()))
    wrong = {**right, "value": right["value"] + 1e-6}
    case = tiny_case(answering("right", right), answering("wrong", wrong))
    rows = module("harness").measure(case)["rows"]
    assert [row["status"] for row in rows] == ["timed", "wrong"]
    assert "value is off by" in rows[1]["reason"]
    assert "cold" not in rows[1]


@pytest.mark.parametrize("name", ["value", "grad_reward", "grad_transition"])
def test_nan_is_wrong(name: str) -> None:
    right = dict(module("workloads").truth(tiny()))
    broken = {**right, name: right[name] * math.nan}
    rows = module("harness").measure(tiny_case(answering("broken", broken)))["rows"]
    assert rows[0]["status"] == "wrong"


def test_gradients_in_the_transition_are_compared_on_the_simplex() -> None:
    right = dict(module("workloads").truth(tiny()))
    shifted = {
        "grad_transition": right["grad_transition"] + 7.0
    }  # the same on rows that sum to one
    bent = {"grad_transition": right["grad_transition"] * (1 + 1e-6)}
    rows = module("harness").measure(
        tiny_case(answering("shifted", shifted), answering("bent", bent))
    )["rows"]
    assert [row["status"] for row in rows] == ["timed", "wrong"]


def test_a_value_of_the_hard_problem_is_bracketed() -> None:
    harness, problem = module("harness"), tiny()
    scalars = {"discount": problem.discount, "temperature": problem.temperature}
    value = torch.stack(
        [
            torch.from_numpy(float64.hard_bracket(reward, rows, **scalars)[0])
            for reward, rows in zip(problem.reward.numpy(), problem.transition.numpy(), strict=True)
        ]
    )
    bent = value.clone()
    bent[0, 0] += 10

    def hard(name: str, tensor: torch.Tensor) -> Any:
        answer = harness.Answer({"value": tensor})
        return harness.Candidate(name, lambda problem: lambda: answer, solves="hard")

    right = answering("ours", dict(module("workloads").truth(problem)))
    rows = harness.measure(tiny_case(right, hard("hard", value), hard("bent", bent)))["rows"]
    assert [row["status"] for row in rows] == ["timed", "timed", "wrong"]


def test_a_competitor_that_raises_is_a_row_and_one_of_ours_is_an_error() -> None:
    harness = module("harness")

    def broken(problem: Any) -> Any:
        raise RuntimeError("out of luck")

    right = answering("ours", dict(module("workloads").truth(tiny())))
    rows = harness.measure(tiny_case(right, harness.Candidate("broken", broken)))["rows"]
    assert rows[1]["status"] == "failed"
    assert "out of luck" in rows[1]["reason"]
    with pytest.raises(RuntimeError, match="out of luck"):
        harness.measure(tiny_case(harness.Candidate("broken", broken)))


def test_what_is_not_installed_is_in_the_table() -> None:
    harness = module("harness")
    right = answering("ours", dict(module("workloads").truth(tiny())))
    absent = harness.Candidate("absent", lambda problem: None, needs=("no_such_package",))
    case = harness.measure(tiny_case(right, absent))
    report = {**harness.header("command"), "cases": [case]}
    assert "| absent | missing: no_such_package |" in harness.markdown(report)


def test_the_truth_is_the_oracles() -> None:
    problem = tiny()
    truth = module("workloads").truth(problem)
    for index, (reward, rows) in enumerate(
        zip(problem.reward.numpy(), problem.transition.numpy(), strict=True)
    ):
        oracle = float64.solve(
            reward, rows, discount=problem.discount, temperature=problem.temperature
        )
        np.testing.assert_allclose(truth["value"][index], oracle.value, rtol=1e-12)
        np.testing.assert_allclose(truth["policy"][index], oracle.policy, rtol=1e-11)


@pytest.mark.parametrize("name", ["reward", "transition"])
def test_the_gradient_of_the_truth_is_a_difference_quotient(name: str) -> None:
    workloads, problem = module("workloads"), tiny()
    data = {"reward": problem.reward, "transition": problem.transition}
    direction = torch.rand_like(data[name]) * (data[name] > 0)
    step = 1e-6

    def loss(move: float) -> torch.Tensor:
        moved = {**data, name: data[name] + move * direction}
        moved["transition"] = moved["transition"] / moved["transition"].sum(-1, keepdim=True)
        value, _ = workloads.newton(
            moved["reward"], moved["transition"], problem.discount, problem.temperature
        )
        return (problem.weight * value).sum()

    quotient = float(loss(step) - loss(-step)) / (2 * step)
    gradient = float((workloads.truth(problem)[f"grad_{name}"] * direction).sum())
    assert gradient == pytest.approx(quotient, rel=1e-7)


def test_a_run_writes_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cpu.json"
    arguments = ["--small", "--only", "small_batch", "--threads", "1", "--out", str(out)]
    assert module("run_all").main(arguments) == 0
    report = json.loads(out.read_text())
    assert set(report) == {
        *("format", "date", "command", "machine", "load_average", "threads", "versions"),
        *("compiled_module", "cases"),
    }
    assert (
        report["command"] == "python benchmarks/run_all.py --small --only small_batch --threads 1"
    )
    assert report["threads"] == 1
    for case in report["cases"]:
        assert case["threads"] == 1
        row = case["rows"][0]
        assert row["cold"]["least"] <= row["cold"]["median"]
        assert row["cold"]["samples"] >= 1
        assert row["times_ours"] == 1
    text = out.with_suffix(".md").read_text()
    assert all(f"## {case['case']}" in text for case in report["cases"])
    for written in (out.read_text(), text):
        assert str(tmp_path) not in written
        assert str(BENCHMARKS) not in written


def test_a_run_with_a_wrong_answer_of_ours_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = dict(module("workloads").truth(tiny()))
    wrong = {**right, "value": -right["value"]}
    case = tiny_case(answering("birl_ext", wrong), answering("another", right))
    measured = module("harness").measure(case)
    monkeypatch.setattr(module("bench_dense"), "run", lambda small: [measured])
    out = tmp_path / "cpu.json"
    assert module("run_all").main(["--only", "dense", "--threads", "1", "--out", str(out)]) == 1
    assert "wrong answers of birl_ext in: tiny" in capsys.readouterr().err
    rows = json.loads(out.read_text())["cases"][0]["rows"]
    assert rows[1]["times_ours"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_compiled_competitors_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    competitors, problem = module("competitors"), tiny()
    monkeypatch.undo()  # the real torch.compile
    truth = module("workloads").truth(problem)["value"]
    for step in (competitors.plain, competitors.midpoint):
        value = torch.zeros_like(problem.weight)
        data = problem.reward, problem.transition, problem.discount, problem.temperature
        for _ in range(60):
            value, _ = competitors.compiled_step(step, sweeps=4)(value, *data)
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=0)
