"""The benchmarks run, refuse wrong answers, and write what they promise. Nothing here is timed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import house
import numpy as np
import performance_page
import pytest
import torch
import touch_kernels
from birl_bench import (
    families,
    floors,
    harness,
    machine,
    report,
    requirements,
    roofline,
    suite,
    workloads,
)
from birl_bench.cases import grid_sparse, tiny_call
from birl_bench.harness import Answer, Candidate, Case, Plan
from birl_bench.rivals import sparse, torch_dense
from cases import untyped
from oracle import float64

import birl_ext
from birl_ext import cli

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
NATIVE = birl_ext.ops.backends.loader.reason("cpu")
QUICK = Plan(quick=True, seconds=0.0, samples=(1, 1))
CPU = torch.device("cpu")
NO_GARBAGE = SimpleNamespace(collect=int, disable=int, enable=int)
"""Collecting garbage takes half a second in the middle of a test run."""


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Small buffers, few repetitions, and no package beyond those that birl_ext needs."""
    patch.setattr(machine, "caches", lambda: {"L1": 1 << 12})
    patch.setattr(machine, "REPEATS", 1)
    patch.setattr(machine, "missing", lambda *packages: ", ".join(packages))
    patch.setattr(harness, "gc", NO_GARBAGE)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quicken(monkeypatch)
    for cached in (machine._flusher, machine.ceilings, torch_dense.compiled):
        cached.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for cached in (machine._flusher, machine.ceilings):
        cached.cache_clear()


def tiny() -> workloads.DenseProblem:
    return workloads.random(
        families.garnet, (2, 5, 2), torch.float64, discount=0.9, temperature=0.2
    )


def tiny_case(*candidates: Candidate) -> Case:
    problem = tiny()
    truth = workloads.truth(problem)

    def judge(solves: str, found: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return workloads.compare(problem, truth, solves, found)

    allowed = {**dict.fromkeys(truth, 1e-9), "hard value": 1.0}
    return Case("tiny", "Is it right?", problem, judge, allowed, candidates, "")


def answering(key: str, tensors: Mapping[str, torch.Tensor], solves: Any = "soft") -> Candidate:
    return Candidate(key, key, lambda: lambda: Answer(tensors, 1.0), solves=solves)


def right() -> dict[str, torch.Tensor]:
    return dict(workloads.truth(tiny()))


def measured(*candidates: Candidate) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = harness.measure(tiny_case(*candidates), QUICK)["rows"]
    return rows


@pytest.fixture(scope="module")
def everything() -> dict[str, list[dict[str, Any]]]:
    """Every case at a toy size, once."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        for name in suite.CASES:
            if name == "tiny_call" and NATIVE:
                continue
            module = importlib.import_module(f"birl_bench.cases.{name}")
            found[name] = module.run(QUICK)
    return found


# Every case


@pytest.mark.parametrize("name", suite.CASES)
def test_every_row_of_a_case_is_timed_or_says_why_not(name: str, everything: Any) -> None:
    for case in everything.get(name, []):
        ours = next(row for row in case["rows"] if row["key"] == "ours")
        assert ours["status"] == "timed", ours
        assert len(case["rows"]) >= 3
        for row in case["rows"]:
            assert row["status"] in ("timed", "missing", "not run"), row
            assert row["status"] == "timed" or row["reason"], row
        keys = [row["key"] for row in case["rows"]]
        assert len(set(keys)) == len(keys)
        assert case["bytes_of_pass"] > 0
        assert case["operations_of_pass"] > 0
        assert all(gap < 1e-3 for gap in case.get("disagreement", {}).values())
        assert json.loads(json.dumps(case)) == case
        assert len(list(report.lines(case))) == len(case["rows"]) + 1


def test_every_requirement_is_about_rows_that_exist(everything: Any) -> None:
    def stem(name: str) -> str:
        return re.sub(r", γ = .*| of 1e5", "", name)

    keys: dict[str, set[str]] = {}
    for case in (case for cases in everything.values() for case in cases):
        keys.setdefault(stem(case["case"]), set()).update(row["key"] for row in case["rows"])
    for one in requirements.REQUIREMENTS:
        if one.device == "cuda" or (NATIVE and one.case == "tiny call"):
            continue
        assert {one.row, *one.rivals} <= keys[stem(one.case)], one


@pytest.mark.skipif(bool(NATIVE), reason=f"measures the compiled module: {NATIVE}")
def test_the_layers_of_a_tiny_call_start_at_the_arithmetic(everything: Any) -> None:
    (case,) = everything["tiny_call"]
    assert case["rows"][0]["over_the_arithmetic"] == 0
    assert [row["key"] for row in case["rows"]][-1] == "backward"
    assert case["threads"] == 1


@pytest.mark.skipif(bool(NATIVE), reason=f"measures the compiled module: {NATIVE}")
def test_a_wrong_layer_of_a_tiny_call_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = tiny_call._layers

    def bent(problem: Any) -> list[tiny_call.Layer]:
        found = layers(problem)
        return [*found[:-1], found[-1]._replace(read=lambda solution: solution.value + 1)]

    monkeypatch.setattr(tiny_call, "_layers", bent)
    with pytest.raises(harness.Wrong, match="value is off by"):
        tiny_call.run(QUICK)


def test_float32_errors_are_reported_and_ours_are_small(everything: Any) -> None:
    (case,) = everything["float32_truth"]
    by_sweeps, by_newton, *others = case["rows"]
    for ours in (by_sweeps, by_newton):
        assert ours["honest"].startswith("yes")
        assert ours["policy_error"] < 1e-5
        assert ours["grad_error"] < 1e-5
    timed = [row for row in others if row["status"] == "timed"]
    assert len(timed) >= 3
    assert all(row["honest"] == "none given" for row in timed)
    assert all(math.isfinite(row["grad_error"]) for row in timed)


def test_hypergradients_of_implicit_rivals_are_right_too(everything: Any) -> None:
    for case in everything["bilevel_loop"]:
        errors = {row["key"]: row["largest_error"] for row in case["rows"]}
        assert max(errors[key] for key in ("ours", "expert", "newton")) < 1e-6
        assert errors["published"] > errors["ours"]


# Checking


def test_a_wrong_answer_gets_no_time() -> None:
    bent = {**right(), "value": right()["value"] + 1e-6}
    rows = measured(answering("ours", right()), answering("wrong", bent))
    assert [row["status"] for row in rows] == ["timed", "wrong"]
    assert "value is off by" in rows[1]["reason"]
    assert "cold" not in rows[1]


@pytest.mark.parametrize("name", ["value", "grad_reward", "grad_transition"])
def test_nan_is_wrong(name: str) -> None:
    broken = {**right(), name: right()[name] * math.nan}
    assert measured(answering("broken", broken))[0]["status"] == "wrong"


def test_gradients_in_the_transition_are_compared_on_the_simplex() -> None:
    gradient = right()["grad_transition"]
    shifted = {"grad_transition": gradient + 7.0}  # the same on rows that sum to one
    bent = {"grad_transition": gradient * (1 + 1e-6)}
    rows = measured(answering("shifted", shifted), answering("bent", bent))
    assert [row["status"] for row in rows] == ["timed", "wrong"]


def test_a_value_of_the_hard_problem_is_bracketed() -> None:
    problem = tiny()
    scalars = {"discount": problem.discount, "temperature": problem.temperature}
    value = torch.stack(
        [
            torch.from_numpy(float64.hard_bracket(reward, rows, **scalars)[0])
            for reward, rows in zip(problem.reward.numpy(), problem.transition.numpy(), strict=True)
        ]
    )
    bent = value.clone()
    bent[0, 0] += 10
    rows = measured(
        answering("ours", right()),
        answering("hard", {"value": value}, "hard"),
        answering("bent", {"value": bent}, "hard"),
    )
    assert [row["status"] for row in rows] == ["timed", "timed", "wrong"]


def test_a_competitor_that_raises_is_a_row_and_one_of_ours_is_an_error() -> None:
    def broken() -> Any:
        raise RuntimeError("out of luck")

    rows = measured(answering("ours", right()), Candidate("broken", "broken", broken))
    assert rows[1]["status"] == "failed"
    assert "out of luck" in rows[1]["reason"]
    with pytest.raises(RuntimeError, match="out of luck"):
        measured(Candidate("broken", "broken", broken))


def test_what_is_not_installed_is_in_the_table() -> None:
    absent = Candidate("absent", "absent", broken_if_called, needs=("no_such_package",))
    case = harness.measure(tiny_case(answering("ours", right()), absent), QUICK)
    document = {**machine.header("command", CPU, 1, True), "cases": [case]}
    assert "| absent | missing: no_such_package |" in report.markdown(document)


def broken_if_called() -> Any:
    raise AssertionError


def test_a_candidate_that_remembers_is_timed_once() -> None:
    calls = []
    rival = Candidate("once", "once", lambda: lambda: calls.append(1) or Answer({}), once=True)
    row = measured(answering("ours", right()), rival)[1]
    assert len(calls) == row["cold"]["samples"] == 1
    assert row["warm"] is None


def test_a_few_sweeps_are_a_rate_and_marked_as_such() -> None:
    few = Candidate("few", "few", lambda: lambda: Answer({}, passes=10, needed=500))
    case = harness.measure(tiny_case(answering("ours", right()), few), QUICK)
    row = case["rows"][1]
    assert row["extrapolated"]
    assert row["passes"] == 500
    assert row["gigabytes_per_second"] == pytest.approx(
        1e-6 * 500 * case["bytes_of_pass"] / row["cold"]["median"]
    )
    document = {**machine.header("command", CPU, 1, True), "cases": [case]}
    assert re.search(r"\| few \| [\d.e+-]+† ", report.markdown(document))


# Truth and certificates


def test_the_truth_is_the_oracles() -> None:
    problem = tiny()
    truth = workloads.truth(problem)
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
    problem = tiny()
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


@pytest.fixture
def small_grid() -> tuple[workloads.GridProblem, torch.Tensor, torch.Tensor]:
    """A grid with V* and π* from the dense solver."""
    problem = workloads.grid(5, discount=0.95, temperature=0.1)
    rows = problem.csr.to_dense().view(25, 5, 25).double()
    reward = problem.reward.unsqueeze(0)
    value, policy = workloads.newton(reward, rows.unsqueeze(0), problem.discount, 0.1)
    return problem, value[0], policy[0]


def test_the_forms_of_a_grid_are_one_problem(small_grid: Any) -> None:
    problem, value, policy = small_grid
    rows = problem.csr.to_dense().view(25, 5, 25)
    torch.testing.assert_close(rows.sum(-1), torch.ones(25, 5).double())
    torch.testing.assert_close(
        problem.backup(value), problem.reward + problem.discount * rows @ value
    )
    matrix = torch.einsum("sa,sat->st", policy, rows)
    torch.testing.assert_close(problem.policy_matrix(policy) @ value, matrix @ value)
    transposed = problem.policy_matrix(policy, transpose=True)
    torch.testing.assert_close(transposed @ value, matrix.mT @ value)
    solution = birl_ext.solve(problem.mdp(), temperature=0.1)
    torch.testing.assert_close(solution.value, value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["grid", "dense"])
def test_a_certificate_covers_the_error(kind: str, small_grid: Any) -> None:
    if kind == "grid":
        problem, value, _ = small_grid
        value = value.unsqueeze(0)
    else:
        problem = workloads.random(
            families.dense, (1, 300, 2), torch.float64, discount=0.9, temperature=0.1
        )
        value = workloads.truth(problem)["value"]
    moved = value + 1e-3 * torch.rand_like(value)
    error = float((moved - value).abs().max() / moved.abs().max())
    bound = workloads.certify(problem, "soft", {"value": moved})["value"]
    horizon = 1 / (1 - problem.discount)
    assert error <= bound <= 2 * horizon * error
    assert workloads.certify(problem, "soft", {"value": value})["value"] < 1e-11
    assert workloads.certify(problem, "soft", {"value": value * math.nan})["value"] == math.inf


def test_an_adjoint_is_judged_by_its_residual(small_grid: Any) -> None:
    problem, _, policy = small_grid
    rows = problem.csr.to_dense().view(1, 25, 5, 25)
    system = workloads.policy_system(policy.unsqueeze(0), rows, problem.discount)[0]
    flow = torch.linalg.solve(system.mT, problem.weight)

    def judge(flow: torch.Tensor) -> float:
        found = {"grad_reward": flow.unsqueeze(-1) * policy}
        return grid_sparse._judge_adjoint(problem, policy, "soft", found)["grad_reward"]

    assert judge(flow) < 1e-13
    assert judge(1.001 * flow) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("side", [5, 100])  # TV − V of one sign, and of two
def test_extrapolated_sweeps_are_not_more_than_it_takes(side: int) -> None:
    problem = workloads.grid(side, discount=0.95, temperature=0.1)
    goal, gamma = 1e-7, problem.discount
    value, taken, needed = torch.zeros_like(problem.weight), 0, None
    moved = math.inf
    while moved > goal:
        image = 0.1 * torch.logsumexp(problem.backup(value) / 0.1, -1)
        value, change, taken = image, image - value, taken + 1
        moved = float(change.abs().max())
        if taken == sparse.FEW:
            needed = sparse.sweeps_needed(change, gamma, goal, taken)
            mixed = bool(change.min() < 0 < change.max())
    assert needed is not None
    assert mixed == (side == 100)
    assert 0.7 * taken < needed <= taken


def test_a_grid_that_would_take_minutes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_sparse, "PATIENCE", -1.0)
    monkeypatch.setattr(grid_sparse, "LARGE", 0)
    for case in grid_sparse.run(QUICK):
        (row,) = case["rows"]
        assert row["status"] == "not run"
        assert "would take minutes" in "\n".join(report.lines(case))


# Requirements


def judged(ours: dict[str, Any], **others: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [{"key": key, "candidate": key, **row} for key, row in others.items()]
    rows.insert(0, {"key": "ours", "candidate": "ours", **ours})
    return requirements.judge([{"case": "small batch, forward", "rows": rows}], "cpu")


def test_requirements_are_met_not_met_or_not_measured() -> None:
    timed = {"status": "timed"}
    verdicts = judged(
        timed | {"times_ours": 1.0},
        expert=timed | {"times_ours": 5.0},
        compiled=timed | {"times_ours": 11.9},
        newton=timed | {"times_ours": 13.0},
        jax=timed | {"times_ours": 3.4},
        eager={"status": "failed", "reason": "no luck"},
    )
    assert [one["verdict"] for one in verdicts] == ["met", "not met", "not met"]
    assert [one["measured"] for one in verdicts] == [5.0, 11.9, 3.4]
    assert verdicts[2]["detail"] == "jax, without 3 not measured"
    verdicts = judged(timed, compiled={"status": "missing", "reason": "not installed"})
    assert {one["verdict"] for one in verdicts} == {"not measured"}
    verdicts = judged({"status": "wrong", "reason": "off"}, expert=timed | {"times_ours": None})
    assert {one["verdict"] for one in verdicts} == {"not measured"}
    lines = list(report.verdicts(verdicts))
    assert len(lines) == 3
    assert all(line.startswith("not measured") for line in lines)


# The suite


def run(tmp_path: Path, *words: str) -> int:
    return suite.main([*words, "--quick", "--threads", "1", "--out", str(tmp_path)])


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Cases that answer at once: name → what `run` returns, or an exception that it raises."""
    found: dict[str, Any] = {}
    real = suite._load

    def load(name: str) -> Any:
        stub = found.get(name)
        if stub is None:
            return real(name)

        def run(plan: Plan) -> Any:
            if isinstance(stub, BaseException):
                raise stub
            return stub

        return SimpleNamespace(run=run, __doc__="Is it right?\n")

    monkeypatch.setattr(suite, "_load", load)
    return found


def good() -> dict[str, Any]:
    return harness.measure(tiny_case(answering("ours", right())), QUICK)


def test_a_run_writes_json_and_markdown(tmp_path: Path, stubs: Any) -> None:
    stubs["small_batch"] = [good()]
    assert run(tmp_path, "small_batch") == 0
    (out,) = tmp_path.glob("*.json")
    assert out.stem == f"cpu_{machine.today()}_quick"
    document = json.loads(out.read_text())
    assert document["command"] == "birl bench small_batch --quick --threads 1"
    assert document["quick"]
    assert document["threads"] == 1
    assert document["ceilings"]["gigabytes_per_second"]["memory"] > 0
    row = document["cases"][0]["rows"][0]
    assert row["cold"]["least"] <= row["cold"]["median"]
    assert row["times_ours"] == 1
    text = out.with_suffix(".md").read_text()
    assert "## tiny" in text
    for written in (out.read_text(), text):
        assert str(tmp_path) not in written
        assert str(ROOT) not in written


def test_a_busy_machine_is_told_of(
    tmp_path: Path, stubs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs["small_batch"] = [good()]
    for load, told in ((0.0, False), (1000.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        run(tmp_path / str(load), "small_batch")
        (page,) = (tmp_path / str(load)).glob("*.md")
        assert ("are void" in capsys.readouterr().out) == told
        assert ("are void" in page.read_text()) == told


def test_results_are_never_overwritten(tmp_path: Path, stubs: Any) -> None:
    stubs["small_batch"] = [good()]
    run(tmp_path, "small_batch")
    run(tmp_path, "small_batch")
    stem = f"cpu_{machine.today()}_quick"
    assert {path.stem for path in tmp_path.glob("*.json")} == {stem, f"{stem}_2"}


def test_an_interrupted_run_keeps_what_was_measured(tmp_path: Path, stubs: Any) -> None:
    stubs["small_batch"], stubs["micro_batch"] = [good()], KeyboardInterrupt()
    assert run(tmp_path, "small_batch", "micro_batch", "dense_mid") == 130
    (out,) = tmp_path.glob("*.json")
    document = json.loads(out.read_text())
    assert document["interrupted"]
    assert [case["case"] for case in document["cases"]] == ["tiny"]
    assert "Interrupted" in out.with_suffix(".md").read_text()


def test_no_case_is_begun_when_the_time_is_over(
    tmp_path: Path, stubs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs["small_batch"] = [good()]
    assert run(tmp_path, "small_batch", "--seconds", "-1") == 0
    assert "no time left for: small_batch" in capsys.readouterr().out
    (out,) = tmp_path.glob("*.json")
    assert json.loads(out.read_text())["not_begun"] == ["small_batch"]


def test_a_run_with_a_wrong_answer_of_ours_says_so(
    tmp_path: Path, stubs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bent = {**right(), "value": -right()["value"]}
    case = harness.measure(tiny_case(answering("ours", bent), answering("other", right())), QUICK)
    assert case["rows"][1]["times_ours"] is None
    stubs["dense_mid"] = [case]
    assert run(tmp_path, "dense_mid") == 1
    assert "wrong answers of birl_ext in: tiny" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["bench", "tiny_call", "--out", "/dev/null/x"]) == 2
    assert re.search("E801 .* at /dev/null/x.*another --out", capsys.readouterr().err)


def test_the_command(tmp_path: Path, stubs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "birl_ext", "bench", "--list"]  # without pytest's own paths
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(suite.CASES)
    assert all(line.rstrip().endswith("?") for line in listed.splitlines())
    with pytest.raises(SystemExit) as ending:
        cli.main(["bench", "small_bath"])
    assert ending.value.code == 2
    assert "unknown case 'small_bath'" in capsys.readouterr().err
    stubs["small_batch"] = [good()]
    assert cli.main(["bench", "small_batch", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "tiny: Is it right?" in printed
    assert str(tmp_path) in printed
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda"]) == 2


# Figures and floors


def test_the_roofline_is_drawn(tmp_path: Path, everything: Any) -> None:
    pytest.importorskip("matplotlib")
    cases = [case for name in ("small_batch", "grid_sparse") for case in everything[name]]
    found = list(roofline.points(cases))
    assert {point.key for point in found} == {"ours", "compiled", "expert"}
    document = {**machine.header("command", CPU, 1, True), "cases": cases}
    document["ceilings"] = machine.ceilings(CPU, 1, True)
    path = roofline.draw(document, tmp_path / "roofline.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    roofline.draw({**document, "cases": []}, path)  # interrupted before the first one


def test_a_floor_is_bytes_over_bandwidth() -> None:
    shape = floors.SHAPES[0]
    assert shape.bytes == 256 * 32 * 8 * 32 * 4
    found = floors.predict(shape, floors.H200)
    assert found.memory == pytest.approx(shape.bytes / 4.3e12)
    assert found.chip == pytest.approx(shape.bytes / (132 * 128 * 1.755e9))
    assert found.solve == pytest.approx(3e-6 + found.memory + 11 * untyped(found.chip))
    doubled = dataclasses.replace(floors.H200, memory=2 * 4.3e12)
    assert floors.predict(shape, doubled).memory == pytest.approx(found.memory / 2)
    large = floors.predict(floors.SHAPES[4], floors.H200)
    assert large.chip is None
    assert large.solve == pytest.approx(3e-6 + 4 * large.memory + 3 * 1.7e-6)


def test_the_performance_page_is_in_step() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    assert performance_page.filled(text, performance_page.tables()) == text, (
        "run python benchmarks/performance_page.py --write"
    )


def test_the_performance_page_shows_a_stored_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubs: Any
) -> None:
    answer = Candidate("ours", "ours", lambda: lambda: Answer(right(), 3.0))
    stubs["small_batch"] = [harness.measure(tiny_case(answer), QUICK)]
    run(tmp_path, "small_batch")
    (out,) = tmp_path.glob("*.json")
    document = {**json.loads(out.read_text()), "quick": False, "requirements": ["of that day"]}
    (case,) = document["cases"]
    case["case"] = "small batch, forward"
    case["rows"].append({**case["rows"][0], "key": "compiled", "times_ours": 11.0})
    out.write_text(json.dumps(document))
    monkeypatch.setattr(performance_page, "RESULTS", tmp_path)
    found = performance_page.tables()
    claim = "faster than compiled value iteration | ≥ 12 × | 11 | not met |"
    assert f"| small batch, forward | {claim}" in found["requirements"]
    assert "| small batch, forward | " in found["predictions"]
    assert "Not measured on a GPU" in found["gpu"]
    with pytest.raises(ValueError, match="no part 'gpu'"):
        performance_page.filled("", {"gpu": ""})


def test_a_house_is_measured(tmp_path: Path) -> None:
    files = {
        "birl_ext/__init__.py": '__all__ = ["a", "b"]\nfrom birl_ext import low\n',
        "birl_ext/low.py": '"D."\n\ndef f(a, *, b=1):  # c\n    "E."\n    return g(a, b, 1)\n',
        "birl_ext/high/__init__.py": '__all__ = ["c"]\n',
        "birl_ext/high/top.py": "def g():\n    from birl_ext.low import f\n    return f()\n",
        "csrc/b.cpp": '#include "core/a.h"\n',
        "csrc/core/c.h": '#include "a.h"\n',
        "csrc/core/a.h": """#include "core/c.h"
#define ONE(x) \\
  (x)
// void no(int a) {
struct alignas(64) Pair {
  int first(int a, std::map<int, int> b) const {  // {
    if (a) {

      return '{';
    }
    return 0;
  }
};
""",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = house.measure(tmp_path, sys.executable, None)
    assert found["hops"]["solve"][1] > 1
    del found["hops"]
    assert found == {
        "rooms": [2, 2],
        "crowded": [2, "birl_ext"],
        "floors": [2, 0],
        "floors_cpp": [2, 2],
        "files": [4, 3],
        "lines": [10, 14, 24],
        "code": [8, 8, 16],
        "names": [2, 1],
        "longest": (3, "top.py: g"),
        "longest_cpp": (6, "a.h: first"),
        "call": (3, "low.py: g"),
        "width": (2, "low.py: f"),
        "width_cpp": (2, "a.h: first"),
        "wheel": None,
    }


# A machine with a GPU

SHELL = shutil.which("bash")
CHECK = BENCHMARKS / "gpu_check.sh"
needs_bash = pytest.mark.skipif(SHELL is None, reason="needs bash")


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    assert SHELL is not None
    return subprocess.run(
        [SHELL, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@needs_bash
def test_followers_are_judged_from_the_same_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is held is not repeated; a rival that is not there is in the table."""
    pytest.importorskip("gymnasium")
    import followers

    judged: list[Any] = []
    plain = untyped(followers).evaluate_agent

    def evaluate(agent: Any, own: Any, *, episodes: int) -> Any:
        found = plain(agent, own, episodes=episodes)
        judged.append((agent.version, own.count, episodes))
        return found

    short = {"hidden": (8,), "burst": 10, "batch_size": 8}
    task = followers.Task("CartPole-v1", 2000, 1000, 5.0)
    never = followers.Task("CartPole-v1", 2000, 1000, 1e9)
    candidates = {
        "one": followers.Candidate(task, {**short, "n_step": 2}),
        "other": followers.Candidate(never, {**short, "follower": "sac"}),
        "rival": followers.Candidate(task, rival="DQN"),
    }
    monkeypatch.setattr(followers, "evaluate_agent", evaluate)
    monkeypatch.setattr(followers, "CANDIDATES", candidates)
    monkeypatch.setattr(followers, "installed", lambda _: None)
    file = tmp_path / "found.json"
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["followers.py", "--seeds", "1", "--out", str(file)])
        assert followers.main() == 0
    assert judged == 2 * [(0, 20, 20), (500, 20, 20)]  # the first thousand steps are random
    one, other = (run for run in json.loads(file.read_text())["runs"])
    assert one["reached"] == 1000
    assert other["reached"] is None
    shown = capsys.readouterr().out
    assert "| one | 1 of 1 | 1000 |" in shown
    assert "| other | 0 of 1 | – |" in shown
    assert "| rival | not installed |" in shown
    candidates["one"].settings["burst"] = 20
    with pytest.raises(SystemExit):
        followers.main()
    assert "holds one with other settings" in capsys.readouterr().err


def test_without_a_gpu_the_check_refuses_in_one_line(tmp_path: Path) -> None:
    executable(tmp_path / "nvidia-smi", "echo no devices; exit 9")
    done = bash(f'PATH="{tmp_path}:$PATH" bash "{CHECK}"')
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no NVIDIA GPU" in done.stderr


@needs_bash
def test_steps_are_limited_and_none_stops_the_next(tmp_path: Path) -> None:
    done = bash(
        f"""
        source "{CHECK}"; begin "{tmp_path}"
        step good 5 echo fine
        step bad 5 sh -c 'echo why; exit 3'
        FAILURE=skipped step excused 5 false
        step slow 1 sleep 30
        LEAST=2; DEADLINE=$(($(date +%s) + 4)); step squeezed 300 sleep 30
        step late 5 echo never
        """
    )
    assert done.returncode == 1, done.stderr
    rows = [line.split("\t") for line in (tmp_path / "steps.tsv").read_text().splitlines()]
    assert [(row[0], row[1]) for row in rows] == [
        ("good", "ok"),
        ("bad", "failed"),
        ("excused", "skipped"),
        ("slow", "timed out"),
        ("squeezed", "timed out"),
        ("late", "no time"),
    ]
    assert rows[0][3] == "fine"
    assert rows[1][3] == "why"


@needs_bash
@pytest.mark.parametrize(("broken", "status"), [("", 0), ("pytest", 1)])
def test_the_whole_check_with_stand_ins(tmp_path: Path, broken: str, status: int) -> None:
    """Every tool is replaced by one that notes its words; only the report is real."""
    executable(tmp_path / "nvidia-smi", "echo GPU 0: a stand-in")
    executable(tmp_path / "compute-sanitizer", "exit 1")
    executable(
        tmp_path / "python",
        f'echo "$@" >> "{tmp_path}/words"\n'
        f'case "$*" in *gpu_report*) exec {sys.executable} "$@";; esac\n'
        f'case "$*" in *get_device_capability*) echo 90;; esac\n'
        f'[ -n "{broken}" ] && case "$*" in *{broken or "-"}*) echo broken; exit 1;; esac\n'
        "exit 0",
    )
    done = bash(
        f'PATH="{tmp_path}:$PATH" PYTHON="{tmp_path}/python" bash "{CHECK}" --out "{tmp_path}/out"',
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode == status, done.stdout + done.stderr
    words = (tmp_path / "words").read_text()
    assert "CMAKE_CUDA_ARCHITECTURES=90" in words
    assert "birl_ext bench --device cuda --seconds" in words
    (out,) = (tmp_path / "out").glob("gpu_*.json")
    document = json.loads(out.read_text())
    statuses = {entry["step"]: entry["status"] for entry in document["steps"]}
    assert statuses["sanitizer probe"] == "skipped"
    assert statuses["GPU tests"] == ("failed" if broken else "ok")
    assert document["driver"]
    assert str(tmp_path) not in out.read_text()
    assert "benchmarks" in done.stdout.splitlines()[-2]


@pytest.mark.skipif(bool(NATIVE), reason="compares the compiled module with PyTorch")
def test_the_script_for_sanitizers_runs_and_can_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(touch_kernels, "BRIEF", ((1, 1, 1), (2, 5, 2)))
    monkeypatch.setattr(sys, "argv", ["touch_kernels.py", "--device", "cpu", "--brief"])
    monkeypatch.setattr(touch_kernels, "_prefix", lambda device: "NONE_")
    assert touch_kernels.main() == 0, capsys.readouterr().out
    monkeypatch.setattr(touch_kernels, "ALLOWED", dict.fromkeys(touch_kernels.ALLOWED, -1.0))
    assert touch_kernels.main() == 1
    assert "off by" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_compiled_competitors_compile() -> None:
    problem = tiny()
    truth = workloads.truth(problem)["value"]
    for step in (torch_dense.plain, torch_dense.midpoint):
        value = torch.zeros_like(problem.weight)
        for _ in range(60):
            value, _ = torch_dense.compiled(step, sweeps=4)(value, *problem.data)
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=0)
