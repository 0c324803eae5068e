"""The benchmark problems reach their published numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import torch
from closeness import assert_close, assert_same_bits
from torch import Tensor

from birl_ext.errors import ConfigError, FileFormatError
from birl_ext.problems import PROBLEMS
from birl_ext.problems.bus import BusConfig, BusJob, load_bus_data
from birl_ext.problems.random_mdp import RandomMDPConfig, RandomMDPJob, random_mdp_problem


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


def test_a_choice_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'disagreement'\?"):
        PROBLEMS["preference"].config(query="dissagreement", members=2)


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        ("random-mdp", "learning_rate"),
        ("four-rooms", "heat"),
        ("taxes", "learning_rate"),
        ("taxes", "radius"),
        ("preference", "learning_rate"),
    ],
)
def test_an_infinite_setting_is_refused(problem: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is inf .allowed: finite"):
        PROBLEMS[problem].config(**{name: math.inf})


def test_settings_that_may_be_infinite() -> None:
    PROBLEMS["random-mdp"].config(target=-math.inf)  # never stop early
    for name in ("indirect_limit", "limit", "threshold"):
        PROBLEMS["preference"].config(**{name: math.inf})


def test_the_largest_seed_draws_an_instance() -> None:
    random_mdp_problem(RandomMDPConfig(states=3, seed=2**64 - 1))


# P1, the random MDP of SoBiRL


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
    job = RandomMDPJob(RandomMDPConfig(mode=mode, temperature=0.01, max_steps=200))
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
        parts.append((mdp.reward, mdp.transition, start))
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
    support = (mdp.transition > 0).sum(-1)
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
    job = BusJob(BusConfig(cost=cost))
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


def test_a_bus_run_goes_on_to_the_same_bits(bus: Any) -> None:
    finished_job, _, _ = bus
    job = BusJob(BusConfig())
    for _ in range(3):
        job.step()
    other = BusJob(BusConfig())
    other.load_state_dict(job.state_dict())
    finished(other)
    assert_same_bits(other.newton.x, finished_job.newton.x, label="x")


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
        BusJob(BusConfig(counts=path))
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


def test_every_problem_is_listed_with_a_sentence() -> None:
    assert {"random-mdp", "bus"} <= PROBLEMS.keys()
    for problem in PROBLEMS.values():
        assert problem.config.__doc__
