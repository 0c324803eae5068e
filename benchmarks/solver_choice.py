"""Which solver suits which MDP, and does method="auto" pick it?

Every method solves the same MDPs to the same certified tolerance, through the public API. Before a
time is taken the answers are compared: two values must agree within the sum of their error bounds.
Passes over P and products with P_π are exact and repeatable; seconds are those of this machine, and
only as good as it is idle.

    python benchmarks/solver_choice.py [--quick] [--out FILE]
    python benchmarks/solver_choice.py --table FILE
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from birl_bench import families
from birl_bench.machine import header
from birl_bench.report import store
from birl_bench.report import table as markdown
from torch import Tensor

import birl_ext
from birl_ext import DenseMDP, SparseMDP

TOL = 1e-8
METHODS = ("auto", "value-iteration", "newton", "newton-krylov", "policy-iteration")
BACKENDS = ("cpu", "torch")
DISCOUNTS = (0.9, 0.99, 0.9999)
TEMPERATURES = (0.1, 0.001)
STATES = (64, 1024)
CAPS = {"value-iteration": 5_000, "policy-iteration": 1_000}
"""Most passes; a method that needs more is recorded as not converged."""
SLOWEST = 5.0
"""Seconds after which a case is not repeated."""

MDP = DenseMDP | SparseMDP


def random(family: Callable[..., Tensor], states: int, generator: torch.Generator) -> Tensor:
    shape = (states, 4)
    return families.normalised(family(shape, generator, draw=torch.float64))


FAMILIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "dense": partial(random, families.dense),
    "two-cluster": partial(random, families.two_cluster),
    "garnet": partial(random, families.garnet),
    "grid": lambda states, _: families.walk((isqrt(states),) * 2, families.CARDINAL),
    "chain": lambda states, _: families.walk((1, states), ((0, -1), (0, 1))),
}
"""Family → P; of random families with four actions."""
DENSE = ("dense", "two-cluster")
"""The others are solved as a SparseMDP."""


def problem(family: str, states: int, discount: float) -> MDP:
    generator = torch.Generator().manual_seed(states)
    transition = FAMILIES[family](states, generator)
    shape = transition.shape[:-1]
    reward = torch.rand(shape, generator=generator, dtype=torch.float64)
    mdp = DenseMDP(reward, transition, discount)
    return mdp if family in DENSE else mdp.to_sparse()


def measure(
    mdp: MDP, temperature: float, method: str, backend: str
) -> tuple[dict[str, Any], birl_ext.Solution]:
    def solve() -> birl_ext.Solution:
        return birl_ext.solve(
            mdp,
            temperature=temperature,
            method=method,
            backend=backend,
            tol=TOL,
            max_iterations=CAPS.get(method),
            on_fail="status",
        )

    seconds = []
    while not seconds or (len(seconds) < 5 and sum(seconds) < SLOWEST / 10):
        start = time.perf_counter()
        solution = solve()
        seconds.append(time.perf_counter() - start)
    status = birl_ext.Status(int(solution.status))
    row = {
        "method": method,
        "backend": backend,
        "status": status.name,
        "passes": int(solution.iterations),
        "products": int(solution.info[..., 5]),
        "seconds": min(seconds),
        "error_bound": float(solution.error_bound),
    }
    return row, solution


def agree(one: birl_ext.Solution, other: birl_ext.Solution, what: str) -> None:
    gap = float((one.value - other.value).abs().max())
    allowed = float(one.error_bound + other.error_bound)
    if not gap <= allowed:
        raise AssertionError(
            f"{what}: values differ by {gap:.3g}, their bounds allow {allowed:.3g}"
        )


def cases(quick: bool) -> Iterator[tuple[str, int, float, float]]:
    for family in FAMILIES:
        for states in STATES[:1] if quick else STATES:
            for discount in DISCOUNTS:
                for temperature in TEMPERATURES:
                    yield family, states, discount, temperature


def table(report: dict[str, Any]) -> str:
    """The rows of docs/solvers.md: passes (and products, where there are any) and milliseconds."""

    def cell(row: dict[str, Any]) -> str:
        if row["status"] != "CONVERGED":
            return f"> {row['passes']}"
        products = f" + {row['products']}" if row["products"] and row["backend"] == "cpu" else ""
        return f"{row['passes']}{products}"

    columns = "family, S, γ, τ", *METHODS[1:], "auto", "auto, ms", "auto on PyTorch, ms"
    lines = []
    seen: dict[tuple[Any, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in report["rows"]:
        key = (row["family"], row["states"], row["discount"], row["temperature"])
        seen.setdefault(key, {})[row["backend"], row["method"]] = row
    for (family, states, discount, temperature), rows in seen.items():
        small = states <= STATES[0]
        if temperature != TEMPERATURES[0] or (small and discount != DISCOUNTS[-1]):
            continue
        name = f"{family}, {states}, {discount:g}, {temperature:g}"
        cells = [cell(rows["cpu", method]) for method in (*METHODS[1:], "auto")]
        times = [_milliseconds(rows[backend, "auto"]) for backend in BACKENDS]
        lines.append([name, *cells, *times])
    return markdown(columns, lines)


def _milliseconds(row: dict[str, Any]) -> str:
    number = 1e3 * row["seconds"]
    two_digits = f"{float(f'{number:.2g}'):g}"
    return two_digits if row["status"] == "CONVERGED" else f"fails ({two_digits})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the smallest size only")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=Path, help="print the table of stored results and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        **header(
            f"python benchmarks/solver_choice.py{' --quick' if options.quick else ''}",
            quick=options.quick,
        ),
        "tolerance": TOL,
        "rows": [],
    }
    for family, states, discount, temperature in cases(options.quick):
        mdp = problem(family, states, discount)
        case = {
            "family": family,
            "states": mdp.states,
            "discount": discount,
            "temperature": temperature,
        }
        reference = None
        for backend in BACKENDS:
            # the PyTorch path is a fallback: at the larger size only its own choice is of interest
            for method in METHODS if backend == "cpu" or states <= STATES[0] else METHODS[:1]:
                row, solution = measure(mdp, temperature, method, backend)
                if row["status"] == "CONVERGED":
                    reference = reference or solution
                    agree(solution, reference, f"{case} {backend} {method}")
                report["rows"].append({**case, **row})
                print(
                    f"{family:12}{mdp.states:6}{discount:8}{temperature:7} {backend:6}{method:17}"
                    f"{row['status']:15}{row['passes']:6} passes{row['products']:7} products "
                    f"{1e3 * row['seconds']:10.2f} ms",
                    flush=True,
                )
    if options.out:
        store(report, options.out)


if __name__ == "__main__":
    main()
