"""The benchmark problems reach their published numbers."""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import torch
from cases import untyped
from closeness import assert_close, assert_same_bits
from processes import digest
from torch import Tensor

from birl_ext.errors import (
    ConfigError,
    FileFormatError,
    GradientError,
    NonFiniteInputError,
    NonFiniteResultError,
    SizeLimitError,
    SolveError,
    UndeterminedError,
    UninformativeDataError,
)
from birl_ext.problems import PROBLEMS
from birl_ext.problems import bus as bus_module
from birl_ext.problems.bus import BusConfig, BusData, BusJob, bus_problem, load_bus_data
from birl_ext.problems.random_mdp import RandomMDPConfig, RandomMDPJob, random_mdp_problem
from birl_ext.runs import loop
from birl_ext.runs.config import to_plain
from birl_ext.runs.directory import RunDirectory


def finished(job: Any) -> list[dict[str, float]]:
    """Every row of a run until the job says that it is done."""
    history = []
    while not job.done:
        history.append(job.step())
    return history


@pytest.mark.parametrize("problem", PROBLEMS)
def test_settings_that_no_problem_has_are_refused(problem: str) -> None:
    """Wherever they are given: the command line and files are not the only way."""
    config = PROBLEMS[problem].config
    wrong: list[tuple[str, Any]] = [("seed", -1), ("seed", 2**64)]
    for name, hint in get_type_hints(config).items():
        if get_origin(hint) is Literal:
            wrong.append((name, "none_such"))
        elif hint in (float, float | None):
            wrong.append((name, math.nan))
    assert len(wrong) > 3
    for name, value in wrong:
        with pytest.raises(ConfigError, match=f"{name} is {value!r} .allowed: "):
            config(**{name: value})
    config(seed=2**64 - 1)


OUT_OF_RANGE: dict[str, dict[str, tuple[float, ...]]] = {
    "random-mdp": {"learning_rate": (0.0, math.inf)},
    "four-rooms": {"temperature": (0.0,), "starts": (0,), "steps": (3,), "heat": (0.5, math.inf)},
    "taxes": {
        **{"temperature": (0.0,), "steps": (0,), "cells": (1,)},
        **{"learning_rate": (0.0, math.inf), "radius": (-1.0, math.inf)},
    },
    "adaptation": {
        **{"temperature": (0.0,), "steps": (0,), "rounds": (0,), "paths": (0,), "springs": (-1,)},
        **{"learning_rate": (0.0, math.inf), "radius": (-1.0, math.inf), "first": (-1,)},
    },
    "preference": {"learning_rate": (math.inf,)},
}


@pytest.mark.parametrize("problem", OUT_OF_RANGE)
def test_a_setting_out_of_its_range_is_refused(problem: str) -> None:
    for name, wrong in OUT_OF_RANGE[problem].items():
        for value in wrong:
            allowed = "finite" if value == math.inf else r"\d or more|more than \d"
            with pytest.raises(ConfigError, match=rf"{name} is {value!r} .allowed: ({allowed})"):
                PROBLEMS[problem].config(**{name: value})


def test_a_choice_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'disagreement'\?"):
        PROBLEMS["preference"].config(query="dissagreement", members=2)


def test_settings_that_may_be_infinite() -> None:
    PROBLEMS["random-mdp"].config(target=-math.inf)  # never stop early
    for name in ("indirect_limit", "limit", "threshold"):
        PROBLEMS["preference"].config(**{name: math.inf})


def test_the_largest_seed_draws_an_instance() -> None:
    random_mdp_problem(RandomMDPConfig(states=3, seed=2**64 - 1))


# Jobs

BRIEF = {"springs": 2, "steps": 4, "first": 1, "rounds": 1, "paths": 8}  # of "adaptation"

RESUMED: list[tuple[str, dict[str, Any], int]] = [
    *(("random-mdp", {"max_steps": 6, "mode": mode}, 3) for mode in ("exact", "published")),
    *(
        ("four-rooms", {"starts": 8, "steps": 12, "method": method}, stop)
        for method in ("combined", "noise", "continuation")
        for stop in (2, 3, 7)  # before, at and after the first thinning
    ),
    *(
        ("taxes", {"cells": 20, "steps": 6, "method": method}, 3)
        for method in ("gradient", "zero-order")
    ),
    *(
        ("adaptation", {**BRIEF, "method": method, "follower": follower}, 2)
        for method in ("gradient", "zero-order")
        for follower in ("soft-q", "discrete-sac", "sac")
    ),
    ("bus", {}, 3),
]


@pytest.mark.filterwarnings("ignore::birl_ext.errors.AccuracyWarning")
@pytest.mark.parametrize(("problem", "settings", "stop"), RESUMED, ids=str)
def test_a_job_goes_on_to_the_same_bits(
    problem: str, settings: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    kind = PROBLEMS[problem]
    whole, first, second = (untyped(kind.job)(kind.config(**settings)) for _ in range(3))
    rows = finished(whole)
    for _ in range(stop):
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert finished(second) == rows[stop:]
    for read in ("state_dict", "summary"):
        assert digest(getattr(second, read)()) == digest(getattr(whole, read)())


FIGURES: dict[str, tuple[dict[str, int], set[str]]] = {
    "random-mdp": ({"max_steps": 3}, {"learning_curve"}),
    "four-rooms": ({"starts": 8, "steps": 12}, {"learning_curve", "incentives", "policies"}),
    "taxes": ({"cells": 20, "steps": 2}, {"learning_curve", "taxes", "households"}),
    "adaptation": (BRIEF, {"learning_curve", "design", "springs"}),
    "bus": ({"max_steps": 3}, {"learning_curve", "replacement_probability"}),
}


@pytest.mark.parametrize("problem", FIGURES)
def test_a_run_directory_has_its_figures(problem: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kind, (settings, names) = PROBLEMS[problem], FIGURES[problem]
    config = kind.config(**settings)
    job, directory = kind.job(config), RunDirectory.create(tmp_path, problem, to_plain(config))
    outcome = loop.run(job, directory)
    written, missing = loop.draw_figures(job, directory, outcome.summary or {})
    assert {path.stem for path in written if path.suffix == ".png"} == names
    assert not missing


# P1, the random MDP of SoBiRL


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::birl_ext.errors.AccuracyWarning")
@pytest.mark.parametrize("seed", range(10))
def test_the_published_mode_reaches_the_known_optimum(seed: int) -> None:
    """φ ≤ 1.0001 within 3,000 outer steps, as the authors' log has it, on every seed."""
    job = RandomMDPJob(RandomMDPConfig(mode="published", seed=seed))
    history = finished(job)
    assert len(history) <= 3000
    assert history[-1]["objective"] <= 1.0001
    assert history[-1]["objective"] >= 1 - 1e-12  # S/(2A) is the minimum
    assert history[0]["objective"] > 10
    assert all(row["sweeps"] <= 10 and row["products"] == 1 for row in history)


@pytest.mark.parametrize("seed", range(10))
def test_the_exact_mode_needs_fewer_steps(seed: int) -> None:
    job = RandomMDPJob(RandomMDPConfig(seed=seed, max_steps=800))
    history = finished(job)
    assert history[-1]["objective"] <= 1.0001
    summary = job.summary()
    assert summary["known_optimum"] == 1.0
    assert summary["hypergradient_error"] < 0.1
    assert summary["steps"] == len(history)


@pytest.mark.filterwarnings("ignore::birl_ext.errors.AccuracyWarning")
@pytest.mark.parametrize("mode", ["published", "exact"])
def test_a_low_temperature_stays_finite(mode: str) -> None:
    """The authors' code overflows at τ = 0.01, where rewards are a thousand temperatures."""
    job = RandomMDPJob(RandomMDPConfig(mode=untyped(mode), temperature=0.01, max_steps=200))
    for row in finished(job):
        assert row.pop("certified_error") > 0  # infinite where nothing is known, never NaN
        assert all(math.isfinite(value) for value in row.values()), row
    assert torch.isfinite(job.algorithm.x).all()


def test_an_instance_belongs_to_its_seed() -> None:
    """The same seed draws the same instance and start, another seed another."""
    parts = []
    for seed in (3, 3, 4):
        problem, start = random_mdp_problem(RandomMDPConfig(seed=seed))
        mdp = problem.lower(start)
        parts.append((mdp.reward, untyped(mdp).transition, start))
    for one, same, other in zip(*parts, strict=True):
        assert_same_bits(same, one, label="same seed")
        assert not torch.equal(other, one)


def test_an_instance_is_as_the_sheet_says() -> None:
    """r = uv·xᵀMx; 1 to S − 1 successors; f = ½‖x‖² + ½‖π‖², with the minimum S/(2A) at zero."""
    config = RandomMDPConfig(states=10, actions=5, dimension=100)
    problem, start = random_mdp_problem(config)
    assert start.shape == (100,)
    zero = torch.zeros_like(start)
    assert float(problem.objective(zero, 1.0)) == pytest.approx(1.0, abs=1e-12)
    mdp = problem.lower(start)
    support = (untyped(mdp).transition > 0).sum(-1)
    assert support.min() >= 1
    assert support.max() <= 9
    doubled = problem.lower(2 * start).reward
    assert_close(doubled, 4 * mdp.reward, bound=1e-11, label="quadratic in x")
    ratio = mdp.reward / mdp.reward[0, 0]
    assert (ratio > 0).all()  # one sign: u, v are positive
    moved = problem.lower(torch.randn(100, dtype=torch.float64)).reward
    assert_close(moved / moved[0, 0], ratio, bound=1e-10, label="rank one in x")


# P2, bus engine replacement


@pytest.fixture(scope="module")
def bus() -> tuple[BusJob, list[dict[str, float]], dict[str, Any]]:
    job = BusJob(BusConfig())
    history = finished(job)
    return job, history, job.summary()


def test_the_bus_estimate_is_the_published_one(bus: Any) -> None:
    """Rust (1987), Table IX, group 4, β = .9999."""
    _, _, summary = bus
    assert summary["params"]["RC"] == pytest.approx(10.075, abs=5e-3)
    assert summary["params"]["theta11"] == pytest.approx(2.293, abs=2e-3)
    assert summary["log_likelihood"] == pytest.approx(-3304.155, abs=5e-3)
    assert summary["objective"] == pytest.approx(163.584, abs=2e-3)
    assert summary["bus_months"] == 4292
    assert summary["replacements"] == 33
    shares = summary["increment_probabilities"].tolist()
    assert shares[:2] == pytest.approx([0.3919, 0.5953], abs=1e-4)
    assert sum(shares) == pytest.approx(1)


def test_a_bus_run_is_a_handful_of_solves_of_a_handful_of_passes(bus: Any) -> None:
    job, history, summary = bus
    assert len(history) <= 30
    assert all(row["solver_passes"] <= 12 for row in history)
    assert history[-1]["objective"] <= history[0]["objective"]
    assert summary["gradient_norm"] < 1e-5
    assert summary["steps"] == len(history)
    assert job.newton.decrement < 1e-12


def test_bus_standard_errors_are_those_of_the_inverse_hessian(bus: Any) -> None:
    """The Hessian by differences of the exact gradient."""
    job, _, summary = bus
    x = job.newton.x

    def slope(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(job.problem.objective(at, 1.0), at)[0]

    h = 1e-4
    steps = h * torch.eye(2, dtype=torch.float64)
    hessian = torch.stack([(slope(x + d) - slope(x - d)) / (2 * h) for d in steps])
    want = torch.linalg.inv((hessian + hessian.mT) / 2).diagonal().sqrt()
    got = torch.tensor(list(summary["standard_errors"].values()), dtype=torch.float64)
    assert (got > 0).all()
    assert_close(got, want, bound=1e-5 * want, label="standard errors")


@pytest.mark.parametrize("cost", ["sqrt", "hyperbolic", "quadratic", "cubic"])
def test_other_costs_reach_a_stationary_point(cost: str) -> None:
    """Costs with more parameters nest the linear one, or come close, so they fit no worse."""
    job = BusJob(BusConfig(cost=untyped(cost)))
    history = finished(job)
    summary = job.summary()
    assert len(history) < 200
    assert summary["gradient_norm"] < 1e-4
    assert all(error > 0 for error in summary["standard_errors"].values())
    assert 160 < summary["objective"] < 167
    if cost == "quadratic":  # its first term is the linear cost
        assert summary["objective"] <= 163.5843


def test_the_myopic_estimate_differs() -> None:
    """Without discounting the future the replacement cost is another: γ reaches the model."""
    job = BusJob(BusConfig(discount=0.0))
    finished(job)
    params = job.summary()["params"]
    assert abs(params["RC"] - 10.075) > 1


COUNTS = "state,keep,replace\n"
INCREMENTS = "increment,count\n"


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_own_tables_are_read(tmp_path: Path) -> None:
    counts = write(tmp_path / "c.csv", COUNTS + "0,5,0\n1,4,1\n\n2,3,2\n")
    moves = write(tmp_path / "i.csv", INCREMENTS + "0,3\n1,7\n")
    data = load_bus_data(counts, moves)
    assert data.decisions.tolist() == [[5, 0], [4, 1], [3, 2]]
    assert data.increments.tolist() == [3, 7]
    job = BusJob(BusConfig(counts=counts, increments=moves, discount=0.9))
    finished(job)
    assert job.summary()["bus_months"] == 15


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [
        ("state,keep\n0,1\n", 1, "state,keep"),
        ("", 1, "nothing"),
        (COUNTS + "0,1,0\n1,2\n", 3, "1,2"),
        (COUNTS + "0,1,0\n1,2,0,9\n", 3, "1,2,0,9"),
        (COUNTS + "0,1,0\n\n\n1,two,0\n", 5, "1,two,0"),
        (COUNTS + "0,1,0\n1,-2,0\n", 3, "1,-2,0"),
        (COUNTS + "0,1,0\n1,2.5,0\n", 3, "1,2.5,0"),
        (COUNTS + "0,1,0\n1,nan,0\n", 3, "1,nan,0"),
        (COUNTS + "0,1,0\n1,inf,0\n", 3, "1,inf,0"),
        (COUNTS + "0,1,0\n2,1,0\n", 3, "2,1,0"),
        (COUNTS + "1,1,0\n2,1,0\n", 2, "1,1,0"),
        (COUNTS + "0,1,0\n0,1,0\n", 3, "0,1,0"),
    ],
    ids=str,
)
def test_a_malformed_line_is_named(text: str, line: int, shown: str, tmp_path: Path) -> None:
    path = write(tmp_path / "counts.csv", text)
    with pytest.raises(FileFormatError, match=rf"BIRL-E701 .*at line {line} ") as caught:
        load_bus_data(path)
    assert path in str(caught.value)
    assert shown in str(caught.value)
    assert caught.value.where == f"line {line}"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("counts", None, "cannot read"),
        ("counts", b"\xff\xfe\x00", "cannot read"),
        ("counts", COUNTS + "0,1,0\n", "has 1 rows"),
        ("increments", INCREMENTS + "0,0\n1,0\n", "no month"),
        ("increments", COUNTS + "0,1,0\n1,1,0\n", "line 1"),
    ],
    ids=["missing", "not text", "one row", "no months", "swapped"],
)
def test_a_table_that_cannot_be_used_is_refused(
    name: str, text: Any, words: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "absent.csv") if text is None else write(tmp_path / "t.csv", text)
    with pytest.raises(FileFormatError, match=words):
        load_bus_data(**{name: path})


def test_one_table_without_the_other_is_refused(tmp_path: Path) -> None:
    """The months of some buses say nothing of others."""
    counts = write(tmp_path / "c.csv", COUNTS + "0,5,1\n1,4,2\n2,3,2\n")
    moves = write(tmp_path / "i.csv", INCREMENTS + "0,3\n1,7\n")
    with pytest.raises(ConfigError, match=r"counts is given without increments.*--increments FILE"):
        BusJob(BusConfig(counts=counts))
    with pytest.raises(ConfigError, match=r"increments is given without counts.*--counts FILE"):
        BusJob(BusConfig(increments=moves))


SHIPPED = load_bus_data()
ROWS = [[s, int(k), int(r)] for s, (k, r) in enumerate(SHIPPED.decisions.tolist())]
MOVES = [[j, int(n)] for j, n in enumerate(SHIPPED.increments.tolist())]


def table(header: str, rows: list[list[Any]], *, sign: str = ",", end: str = "\n") -> str:
    lines = [header.replace(",", sign), *(sign.join(map(str, row)) for row in rows)]
    return end.join(lines) + end


def estimate(tmp_path: Path, counts: str | bytes, moves: str | bytes) -> dict[str, Any]:
    paths = write(tmp_path / "c.csv", counts), write(tmp_path / "i.csv", moves)
    job = BusJob(BusConfig(counts=paths[0], increments=paths[1]))
    finished(job)
    return job.summary()


def assert_published(summary: dict[str, Any]) -> None:
    assert summary["params"]["RC"] == pytest.approx(10.0749, abs=1e-3)
    assert summary["params"]["theta11"] == pytest.approx(2.2931, abs=1e-3)
    assert (summary["states"], summary["bus_months"]) == (90, 4292)
    assert summary["converged"]
    assert summary["identified"]


@pytest.mark.parametrize(
    ("counts", "moves"),
    [
        (b"\xef\xbb\xbf" + table(COUNTS.strip(), ROWS).encode(), None),  # as Excel writes it
        (None, b"\xef\xbb\xbf" + table(INCREMENTS.strip(), MOVES, end="\r\n").encode()),
        (table(COUNTS.strip(), ROWS, end="\r\n"), None),
        (table(COUNTS.strip(), ROWS, end="\r"), None),
        ("\n\n" + table(COUNTS.strip(), ROWS, end="\n\n") + "\n,,\n", None),
        (table("state, keep , replace", ROWS, sign=" , "), None),
        (table(COUNTS.strip(), [[f"{x}.0" for x in row] for row in ROWS]), None),
        (table('"state","keep","replace"', ROWS), None),
    ],
    ids=["BOM", "BOM of moves", "CRLF", "CR", "blank lines", "spaces", "points", "quotes"],
)
def test_tables_as_programs_write_them_are_read(counts: Any, moves: Any, tmp_path: Path) -> None:
    counts, moves = counts or table(COUNTS.strip(), ROWS), moves or table(INCREMENTS.strip(), MOVES)
    assert_published(estimate(tmp_path, counts, moves))


def twice(rows: list[list[Any]], state: int) -> list[list[Any]]:
    """The row of a state as two, in its place."""
    s, kept, replaced = rows[state]
    return [*rows[:state], [s, kept - 3, 0], [s, 3, replaced], *rows[state + 1 :]]


SORTED = table(COUNTS.strip(), ROWS)
WRONG: dict[str, tuple[str, str]] = {
    "reversed": (table(COUNTS.strip(), ROWS[::-1]), r"sort the rows by state"),
    "shuffled": (
        table(COUNTS.strip(), [*ROWS[40:], *ROWS[:40]]),
        r"sort the rows by state",
    ),
    "sorted as words": (
        table(COUNTS.strip(), sorted(ROWS, key=lambda row: str(row[0]))),
        r"sort the rows by state",
    ),
    "two rows of a state": (
        table(COUNTS.strip(), twice(ROWS, 7)),
        r"add up the rows of state 7 into one",
    ),
    "counted from 1": (
        table(COUNTS.strip(), [[s + 1, *rest] for s, *rest in ROWS]),
        r"take 1 off each state if they count from 1; otherwise add the row 0,0,0",
    ),
    "another order": (
        table("state,replace,keep", [[s, r, k] for s, k, r in ROWS]),
        r"put the columns in the order state,keep,replace, the numbers with their names",
    ),
    "capitals": (table("State,Keep,Replace", ROWS), r"names in small letters: state,keep,replace"),
    "other names": (
        table("bin,stay,renew", ROWS),
        r"name the columns state,keep,replace, and put them and their numbers in this order",
    ),
    "more columns": (
        table("state,keep,replace,bus", [[*row, 1] for row in ROWS]),
        r"take out all columns but state,keep,replace, and put these in this order",
    ),
    "no header": (
        SORTED.partition("\n")[2],
        r"put the line state,keep,replace above the numbers",
    ),
    "semicolons": (table(COUNTS.strip(), ROWS, sign=";"), r"by commas, not by ';'"),
    "tabs": (table(COUNTS.strip(), ROWS, sign="\t"), r"by commas, not by '\\t'"),
    "the other table": (table(INCREMENTS.strip(), MOVES), r"give it as increments, which it is"),
    "UTF-16": (SORTED, r"give the path of a CSV file in UTF-8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_says_what_would_make_it_right(name: str, tmp_path: Path) -> None:
    """Each remedy, obeyed, leads to the table that is right: that is `SORTED`."""
    text, remedy = WRONG[name]
    path = write(tmp_path / "c.csv", text.encode("utf-16" if name == "UTF-16" else "utf-8"))
    with pytest.raises(FileFormatError, match=rf"BIRL-E701 .*Fix: .*{remedy}"):
        load_bus_data(path)


def test_the_rows_that_are_missing_are_named_and_adding_them_is_right(tmp_path: Path) -> None:
    """States that nobody saw in the shipped data: a row of zeros each changes nothing."""
    empty = [s for s, k, r in ROWS if not k and not r][:9]
    rows = [row for row in ROWS if row[0] not in empty]
    moves = table(INCREMENTS.strip(), MOVES)
    for _ in range(3):
        with pytest.raises(FileFormatError, match=r"Fix: add the rows? \d") as caught:
            estimate(tmp_path, table(COUNTS.strip(), rows), moves)
        for row in re.findall(r"\d+,0,0", caught.value.fix):
            rows.append([int(cell) for cell in row.split(",")])
        rows.sort()
        if len(rows) == len(ROWS):
            break
    assert_published(estimate(tmp_path, table(COUNTS.strip(), rows), moves))


def test_a_gap_far_beyond_any_memory_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", COUNTS + f"0,1,1\n{2**53},1,2\n")
    with pytest.raises(FileFormatError, match=r"add the rows 1,0,0 and 2,0,0 and .* more states"):
        load_bus_data(path)
    path = write(tmp_path / "c.csv", COUNTS + f"0,1,1\n1,{2**54},2\n")
    with pytest.raises(FileFormatError, match=r"whole numbers, 0 to 2⁵³"):
        load_bus_data(path)


def test_more_states_than_the_memory_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # a megabyte
    with pytest.raises(SizeLimitError, match=r"a table of 300 states needs .* GiB"):
        bus_of(tmp_path, [(2, s % 3) for s in range(300)])


# Tables that determine nothing: (kept, replaced) by state, the words of the error, the cost
UNINFORMATIVE: dict[str, tuple[list[tuple[int, int]], str, str]] = {
    "empty": ([(0, 0)] * 20, "hold no month in which an engine was kept or replaced", "linear"),
    "no replacement": ([(100, 0)] * 20, "no month in which an engine was replaced", "linear"),
    "replacements alone": ([(0, 9)] * 20, "no month in which an engine was kept", "cubic"),
    "one state": ([(90, 10)] + [(0, 0)] * 9, "replaced in state 0, the only one seen", "linear"),
    "ties": ([(90, 10)] * 3, "the same share of engines is replaced in every state", "cubic"),
    "ties of unequal numbers": ([(9, 1), (90, 10), (27, 3)], "the same share", "linear"),
    "separable": (
        [(50, 0)] * 10 + [(0, 5)] * 10,
        "kept up to state 9 and replaced from state 10 on",
        "cubic",
    ),
    "separable with gaps": (
        [(5, 0), (0, 0), (5, 0), (0, 0), (0, 2)],
        "kept up to state 2 and replaced from state 4",
        "sqrt",
    ),
    "separable but for one state": (
        [(50, 0)] * 10 + [(20, 5)] + [(0, 5)] * 9,
        "kept up to state 10 and replaced from state 10",
        "linear",
    ),
    "separable the other way": (
        [(0, 5)] * 10 + [(50, 0)] * 9,
        "replaced up to state 9 and kept from state 10",
        "hyperbolic",
    ),
    "one replacement, in the last state": (
        [(50, 0)] * 9 + [(50, 1)],
        "kept up to state 9",
        "linear",
    ),
    "fewer states than parameters": ([(90, 10), (80, 20)], "in 2 states, for 3 param", "quadratic"),
}


def bus_of(tmp_path: Path, months: list[tuple[int, int]], **settings: Any) -> BusJob:
    rows = [[s, *pair] for s, pair in enumerate(months)]
    counts = write(tmp_path / "c.csv", table(COUNTS.strip(), rows))
    moves = write(tmp_path / "i.csv", table(INCREMENTS.strip(), MOVES))
    return BusJob(BusConfig(counts=counts, increments=moves, **settings))


@pytest.mark.parametrize("name", UNINFORMATIVE)
def test_a_table_that_determines_nothing_is_refused_by_name(name: str, tmp_path: Path) -> None:
    months, words, cost = UNINFORMATIVE[name]
    with pytest.raises(UninformativeDataError, match=rf"BIRL-E707 .*{words}.*Fix: "):
        bus_of(tmp_path, months, cost=cost, discount=0.99)


def test_one_replacement_among_the_kept_is_enough(tmp_path: Path) -> None:
    """It is refused only where nothing was kept above: here the likelihood has a maximum."""
    job = bus_of(tmp_path, [(50, 0)] * 15 + [(50, 1)] + [(50, 0)] * 3, discount=0.99)
    finished(job)
    summary = job.summary()
    assert summary["converged"]
    assert summary["identified"]
    assert summary["gradient_norm"] < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_estimate_that_has_not_converged_says_so(steps: int) -> None:
    job = BusJob(BusConfig(max_steps=steps))
    assert len(finished(job)) == steps
    summary = job.summary()
    assert summary["converged"] is False
    assert summary["standard_errors"] is None


@pytest.mark.parametrize("discount", [0.0, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize(
    ("name", "months", "cost"),
    [
        # replaced at low and high mileage, kept between: a parabola foretells all of it
        ("parabola", [(0, 5)] * 3 + [(50, 0)] * 10 + [(0, 5)] * 5, "quadratic"),
        ("two of three", [(9, 0), (0, 0), (0, 5), (3, 0), (4, 1)] + [(0, 2)] * 2, "cubic"),
        ("far and adjacent", [(0, 0)] * 80 + [(90, 10), (85, 15), (80, 20), (78, 24)], "cubic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_costs_that_the_data_leave_open_have_no_standard_errors(
    name: str, months: list[tuple[int, int]], cost: str, discount: float, tmp_path: Path
) -> None:
    """The search stops with the direction, or ends and says that it found no maximum."""
    job = bus_of(tmp_path, months, cost=cost, discount=discount)
    stopped: UndeterminedError | None = None
    try:
        finished(job)
    except UndeterminedError as error:
        stopped = error
    if stopped is not None:
        assert "in RC, " in str(stopped)
        assert len(stopped.direction) == len(job.names)
        return
    summary = job.summary()
    assert not (summary["converged"] and summary["identified"]), summary["params"]
    assert summary["standard_errors"] is None
    if not summary["identified"]:
        assert summary["undetermined"].keys() == set(job.names)


@pytest.mark.parametrize("discount", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("cost", ["linear", "sqrt", "hyperbolic"])
def test_a_likelihood_that_only_flattens_out_has_not_converged(
    cost: str, discount: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Separable data, had they not been refused: φ falls towards 0 for ever, by less and less."""
    monkeypatch.setattr(bus_module, "_require_information", lambda *given: None)
    job = bus_of(tmp_path, [(50, 0)] * 10 + [(0, 5)] * 10, cost=cost, discount=discount)
    with contextlib.suppress(UndeterminedError):
        finished(job)
        assert job.summary()["objective"] < 1e-6
        assert job.summary()["converged"] is False
        assert job.summary()["standard_errors"] is None


def test_a_decrement_alone_is_no_convergence() -> None:
    """Where one more step would still move the choices, whatever it does to φ."""
    job = BusJob(BusConfig())
    finished(job)
    best = job.newton.x
    for shift, converged in ((1e-6, True), (0.1, False)):
        job.newton.x, job.newton.decrement = best + shift, 0.0
        assert job.summary()["converged"] is converged
        assert job.summary()["identified"]
        assert (job.summary()["standard_errors"] is not None) is converged


@pytest.mark.parametrize("seed", range(8))
def test_estimates_of_data_drawn_from_the_model_are_within_their_errors(
    seed: int, tmp_path: Path
) -> None:
    """9,600 months drawn at known costs: the estimate is within four of its standard errors."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.tensor([3.0, 40.0], dtype=torch.float64)
    problem = bus_problem(BusData(torch.ones(12, 2), SHIPPED.increments), 0.95, "linear")
    policy = problem.evaluate(truth, 1.0)[1].policy
    drawn = torch.rand(12, 800, generator=generator, dtype=torch.float64)
    replaced = (drawn < policy[:, 1:]).sum(1).tolist()
    job = bus_of(tmp_path, [(800 - r, r) for r in replaced], discount=0.95)
    finished(job)
    summary = job.summary()
    assert summary["converged"]
    assert summary["identified"]
    for value, want, name in zip(
        summary["params"].values(), truth.tolist(), job.names, strict=True
    ):
        assert abs(value - want) < 4 * summary["standard_errors"][name]


@pytest.mark.parametrize("states", [2, 4, 5, 7, 12])
def test_figures_of_small_tables_are_drawn(states: int, tmp_path: Path) -> None:
    from birl_ext.runs import plots
    from birl_ext.runs.directory import to_json

    job = bus_of(tmp_path, [(50 - s, 3 + 2 * s) for s in range(states)], discount=0.9)
    history = [{"step": step, **row} for step, row in enumerate(finished(job), 1)]
    figures = job.figures(history, to_json(job.summary()))
    with plots.style():
        for draw in figures.values():
            draw()
        bars = figures["replacement_probability"]().axes[0].containers[0]
    shown = [float(y) for y in untyped(bars).lines[0].get_ydata()]
    assert len(shown) == -(-states // 5)
    months = torch.tensor([[50 - s, 3 + 2 * s] for s in range(states)]).split(5)
    want = [float(part[:, 1].sum() / part.sum()) for part in months]
    assert shown == pytest.approx(want)


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e100},
        {"temperature": 1e-100},
        {"temperature": 1e100, "learning_rate": 1e99},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["exact", "published"])
@pytest.mark.filterwarnings("ignore::birl_ext.errors.AccuracyWarning")
def test_no_row_of_a_run_is_certified_without_a_gradient(settings: Any, mode: Any) -> None:
    """A gradient that is NaN ends the run at its step: it was certified with relative error 0."""
    job = RandomMDPJob(RandomMDPConfig(states=4, dimension=3, max_steps=30, mode=mode, **settings))
    rows = []
    with contextlib.suppress(GradientError, NonFiniteResultError, NonFiniteInputError, SolveError):
        for _ in range(30):
            rows.append(job.step())
    for row in rows:
        assert math.isfinite(row["objective"])
        assert math.isfinite(row["gradient_norm"])
        assert row["certified_error"] > 0
    assert torch.isfinite(job.algorithm.x).all()


def test_every_problem_is_listed_with_a_sentence() -> None:
    assert {"random-mdp", "bus"} <= PROBLEMS.keys()
    for problem in PROBLEMS.values():
        assert problem.config.__doc__
