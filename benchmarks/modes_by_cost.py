"""Which mode of M-SoBiRL is the cheapest for the accuracy it has?

    python benchmarks/modes_by_cost.py [--quick] [--out FILE]

Each problem's default start is descended by Adam on exact hyper-gradients; every mode then follows
that same path, warm-started from one point to the next, as it would be in a run of its own, all
modes in turn at each point. Milliseconds are processor time of an outer step on one thread, medians
over the path without its first tenth; the error is ‖∇φ̂ − ∇φ‖/‖∇φ‖.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import digits, store
from birl_bench.report import table as markdown
from torch import Tensor

from birl_ext.bilevel import BilevelProblem, MSoBiRL
from birl_ext.bilevel.problem import evaluate_at
from birl_ext.errors import AccuracyWarning
from birl_ext.problems.barriers import barriers
from birl_ext.problems.four_rooms import FourRooms
from birl_ext.problems.leader_toy import TEMPERATURE, leader_toy
from birl_ext.problems.random_mdp import RandomMDPConfig, random_mdp_problem
from birl_ext.problems.taxes import TaxEconomy

DEFAULT = "exact"
MODES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    **{f"exact, tol = {tol:g}": {"tol": tol} for tol in (1e-1, 1e-2, 1e-4, 1e-8)},
    "published, N = 10": {"mode": "published"},
    "published, N = 100": {"mode": "published", "sweeps": 100},
}
ADJOINT_RATE = 0.5
WORTH = 0.05
"""The error that `MSoBiRL` asks for by default: what is worse than that is not compared."""

Start = tuple[BilevelProblem, Tensor, float, float]
"""Problem, x₀, τ and the rate of Adam."""


def random_mdp() -> Start:
    return *random_mdp_problem(RandomMDPConfig()), 1.0, 0.05


def four_rooms() -> Start:
    rooms, draws = FourRooms(3.0), torch.Generator().manual_seed(0)
    start = torch.randn(len(rooms.cells) + 1, generator=draws, dtype=torch.float64)
    return rooms.problem(), start, 0.003, 0.1


def taxes() -> Start:
    economy = TaxEconomy(0.1, 100)
    return economy.problem(), economy.logits(torch.full((4,), 0.3, dtype=torch.float64)), 0.1, 0.1


def adapted() -> Start:
    return *barriers(), 0.05, 0.1


def led() -> Start:
    return *leader_toy(), TEMPERATURE, 0.1


PROBLEMS: dict[str, Callable[[], Start]] = {
    "random MDP": random_mdp,
    "four rooms": four_rooms,
    "taxes": taxes,
    "barriers": adapted,
    "leader toy": led,
}
"""Every problem of the arena whose model is known."""


POINTS = {"random MDP": 300, "four rooms": 200, "taxes": 40, "barriers": 100, "leader toy": 200}


def measured(name: str, points: int) -> list[dict[str, Any]]:
    """A row for each mode."""
    problem, start, tau, rate = PROBLEMS[name]()
    still = partial(torch.optim.SGD, lr=0.0)
    leader = MSoBiRL(problem, start, temperature=tau, optimiser=partial(torch.optim.Adam, lr=rate))
    followers = {
        mode: MSoBiRL(
            problem,
            start,
            temperature=tau,
            optimiser=still,
            adjoint_rate=ADJOINT_RATE,
            **options,
        )
        for mode, options in MODES.items()
    }
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    errors: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(points):
        x = leader.x.detach().clone().requires_grad_()
        (exact,) = torch.autograd.grad(evaluate_at(problem, x, tau)[0], x)
        for mode, follower in followers.items():
            with torch.no_grad():
                follower.x.copy_(x)
            began = time.process_time()
            follower.step()
            seconds[mode].append(time.process_time() - began)
            errors[mode].append(float((follower.x.grad - exact).norm() / exact.norm()))
        leader.step()
    first = max(1, points // 10)
    return [
        {
            "problem": name,
            "mode": mode,
            "milliseconds": 1e3 * median(seconds[mode][first:]),
            "median_error": median(errors[mode][first:]),
            "largest_error": max(errors[mode][first:]),
        }
        for mode in MODES
    ]


def excess(rows: list[Mapping[str, Any]], problem: str) -> float:
    """What the default costs, over the cheapest of all whose median error is at most `WORTH`."""
    cost = {
        row["mode"]: row["milliseconds"]
        for row in rows
        if row["problem"] == problem and row["median_error"] <= WORTH
    }
    return float(cost[DEFAULT] / min(cost.values()))


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    head = "problem", "mode", "ms per outer step", "× default", "error, median", "largest"
    lines, rows = [], report["rows"]
    for row in rows:
        default = next(
            other["milliseconds"]
            for other in rows
            if (other["problem"], other["mode"]) == (row["problem"], DEFAULT)
        )
        cells = [digits(row[key]) for key in ("median_error", "largest_error")]
        times = f"{row['milliseconds'] / default:.2f}"
        lines.append([row["problem"], row["mode"], digits(row["milliseconds"]), times, *cells])
    return markdown(head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five points: a trial")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", AccuracyWarning)  # the table says how accurate they are
    began, rows = time.perf_counter(), []
    for name in PROBLEMS:
        rows += measured(name, 5 if options.quick else POINTS[name])
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    report = {
        **machine.header("python benchmarks/modes_by_cost.py", quick=options.quick),
        "seconds": time.perf_counter() - began,
        "points": POINTS,
        "rows": rows,
        "excess": {name: excess(rows, name) for name in PROBLEMS},
    }
    print(table(report))
    for name, found in report["excess"].items():
        print(f"{name}: the default costs {found:.2f} × the cheapest with an error below {WORTH}")
    if options.out:
        store(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
