"""How long does an outer step of HPGD take in JAX, and how long do ours, and how wrong is each?

    python benchmarks/hpgd_speed.py [--published DIR] [--rounds 20] [--out FILE]

Four Rooms at λ = 0.003, κ = 3, both goals. An exact leader descends from 128 nearly flat starts by
gradients cut to 1, at a rate of 0.5; every method then takes a step at the leader's x, all methods
in turn, in a shuffled order, in one process on one thread, warm-started from its last step if it
carries something over. Milliseconds are processor time of a step, medians of the rounds after five
that warm up, over the starts that are stepped at once. The first call, which compiles where there
is something to compile, is shown apart. The error is ‖∇φ̂ − ∇φ‖/‖∇φ‖, mean over rounds and starts,
with ∇φ solved as far as rounding allows, of both goals and the planner's moves; with one set of
moves, the same methods walk by the planner's too, and what is wrong is noise and short walks alone.

HPGD in JAX, of 5 environments for 2,000 steps each, draws one goal for each step and walks by the
simulator's moves, as published: the published code itself, from a checkout of it in DIR, which
needs JAX of its time; and a lean rewrite.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from birl_bench import machine
from birl_bench.harness import no_collection
from birl_bench.report import digits, store
from birl_bench.report import table as markdown
from birl_bench.rivals import hpgd_jax, hpgd_published
from hpgd_table import ClippedSGD, starts
from torch import Tensor

from birl_ext.bilevel import AMD, HPGD, MSoBiRL
from birl_ext.bilevel.algorithm import Descent
from birl_ext.bilevel.problem import evaluate_at
from birl_ext.problems.four_rooms import DISCOUNT, FourRooms, Noise
from birl_ext.problems.sampled_four_rooms import sampled_four_rooms

TEMPERATURE, KAPPA, RATE = 0.003, 3.0, 0.5
MANY = (1, 16, 128)
"""Starts at once of the exact method."""
WARM_UP = 5
DRAWN = 10_000
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

Call = Callable[[Tensor], Callable[[], tuple[Any, float]]]
"""x → the call that is timed, of a step there → its gradient and the environment steps drawn."""


@dataclass(frozen=True)
class Contender:
    """One way to take an outer step.

    Attributes:
        prepare: makes its `Call`.
        matched: makes one that walks by the planner's moves.
        excuse: why it is not timed at all.
    """

    name: str
    starts: int
    prepare: Callable[[], Call]
    excuse: str = ""
    matched: Callable[[], Call] | None = None


def still(parameters: Any) -> ClippedSGD:
    return ClippedSGD(parameters, torch.tensor(0.0))


def ours(make: Callable[[Tensor], Descent[Any]], count: int) -> Call:
    """A class of the package; its optimiser steps by nothing, and x is set to the leader's."""
    algorithm = make(starts(count) if count > 1 else starts(1)[0])

    def at(x: Tensor) -> Callable[[], tuple[Any, float]]:
        with torch.no_grad():
            algorithm.x.copy_(x.view_as(algorithm.x))

        def step() -> tuple[Any, float]:
            outcome = algorithm.step()
            return algorithm.x.grad, getattr(outcome, "samples", 0)

        return step

    return at


def sampled(drawn: int, walks: Noise = "simulator") -> Call:
    """Our HPGD with as many paths as draw so many environment steps."""
    rooms = sampled_four_rooms(TEMPERATURE, KAPPA, goal="both", moves=walks)

    def make(batch: int, x: Tensor) -> HPGD:
        return HPGD(
            rooms.problem,
            rooms.simulator,
            x,
            discount=DISCOUNT,
            temperature=TEMPERATURE,
            optimiser=still,
            batch=batch,
            follower=rooms.follower,
        )

    length = make(300, starts(1)[0]).step().samples / 300
    return ours(partial(make, round(drawn / length)), 1)


def in_jax(step: Callable[[], Any], count: int) -> Call:
    """A function (key, w) of JAX, compiled; many starts at once by its vmap."""
    import jax

    alone = step()
    compiled = jax.jit(jax.vmap(alone) if count > 1 else alone)
    calls = iter(range(sys.maxsize))

    def at(x: Tensor) -> Callable[[], tuple[Any, float]]:
        w = jax.numpy.asarray(x.squeeze(0).numpy(), jax.numpy.float32)
        key = jax.random.PRNGKey(next(calls))
        key = jax.random.split(key, count) if count > 1 else key
        jax.block_until_ready((key, w))

        def once() -> tuple[Any, float]:
            found = jax.block_until_ready(compiled(key, w))
            return found[1], DRAWN

        return once

    return at


def contenders(published: Path | None) -> list[Contender]:
    rooms = FourRooms(KAPPA)
    no_jax = machine.missing("jax")
    no_code = no_jax or ("" if published else "no checkout given: --published DIR")
    theirs = partial(hpgd_published.outer_step, published or Path(), TEMPERATURE, KAPPA, RATE)
    lean = partial(hpgd_jax.outer_step, rooms, TEMPERATURE, RATE)
    exact: dict[str, Any] = {"temperature": TEMPERATURE, "optimiser": still}
    gradient = partial(MSoBiRL, rooms.problem(), **exact)
    amd = partial(AMD, rooms.additive(), **exact)
    field = [
        Contender("HPGD, published JAX code", count, partial(in_jax, theirs, count), no_code)
        for count in (1, 4)
    ]
    for name, step, count in (
        ("HPGD, lean JAX", lean, 1),
        ("HPGD, lean JAX", lean, 16),
        ("HPGD, lean JAX, slopes forward", partial(lean, slopes="forward"), 1),
    ):
        matched = partial(in_jax, partial(step, walks="planner"), count)
        field.append(Contender(name, count, partial(in_jax, step, count), no_jax, matched))
    for name, drawn in (("`HPGD`", DRAWN), ("`HPGD`, fewer samples", DRAWN // 10)):
        matched = partial(sampled, drawn, "planner")
        field.append(Contender(name, 1, partial(sampled, drawn), matched=matched))
    field.append(Contender("`AMD`, 100 sweeps", 1, partial(ours, amd, 1)))
    field += [Contender("`MSoBiRL`", count, partial(ours, gradient, count)) for count in MANY]
    return field


def measured(field: Sequence[Contender], rounds: int) -> list[dict[str, Any]]:
    """A row for each; one that cannot take part says why."""
    problem = FourRooms(KAPPA).problem()
    leader = MSoBiRL(
        problem,
        starts(MANY[-1]),
        temperature=TEMPERATURE,
        optimiser=lambda p: ClippedSGD(p, torch.tensor(RATE)),
    )
    rows: list[dict[str, Any]] = []
    calls: dict[int, Call] = {}
    matched: dict[int, Call] = {}
    x = leader.x.detach().clone()
    for number, one in enumerate(field):
        row: dict[str, Any] = {"name": one.name, "starts": one.starts, "excuse": one.excuse}
        rows.append(row)
        if one.excuse:
            continue
        calls[number] = one.prepare()
        row["first_seconds"] = clock(calls[number](x[: one.starts]))[1]
        row |= {"processor_ms": [], "wall_ms": [], "samples": [], "errors": [], "matched": []}
        if one.matched:
            matched[number] = one.matched()
        print(f"{one.name}, {one.starts}: ready", flush=True)
    shuffle = random.Random(0)
    for turn in range(WARM_UP + rounds):
        x = leader.x.detach().clone().requires_grad_()
        (exact,) = torch.autograd.grad(evaluate_at(problem, x, TEMPERATURE)[0].sum(), x)
        order = list(calls)
        shuffle.shuffle(order)
        with no_collection():
            for number in order:
                row, count = rows[number], field[number].starts
                step = calls[number](x.detach()[:count])
                processor, wall, (gradient, samples) = clock(step)
                if turn < WARM_UP:
                    continue
                row["processor_ms"].append(1e3 * processor / count)
                row["wall_ms"].append(1e3 * wall / count)
                row["samples"].append(samples)
                row["errors"].append(apart(gradient, exact[:count]))
                if number in matched:
                    gradient, _ = matched[number](x.detach()[:count])()
                    row["matched"].append(apart(gradient, exact[:count]))
        leader.step()
    return rows


def apart(gradient: Any, exact: Tensor) -> float:
    """‖∇φ̂ − ∇φ‖/‖∇φ‖, mean over the starts."""
    found = torch.as_tensor(gradient.tolist(), dtype=torch.float64).view(exact.shape)
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


def clock(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor time, wall time and what came back."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    began, wall = time.process_time(), time.perf_counter()
    found = call()
    return time.process_time() - began, time.perf_counter() - wall, found


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    head = (
        *("method", "starts at once", "ms per outer step and start", "environment steps"),
        *("error of ∇φ", "with one set of moves", "first call, s"),
    )
    lines = []
    for row in report["rows"]:
        name = [row["name"], str(row["starts"])]
        if row["excuse"]:
            lines.append([*name, row["excuse"], *[""] * 4])
            continue
        drawn = fmean(row["samples"])
        lines.append(
            [
                *name,
                digits(median(row["processor_ms"])),
                f"{drawn:,.0f}" if drawn else "–",
                f"{fmean(row['errors']):.2g}",
                f"{fmean(row['matched']):.2g}" if row["matched"] else "–",
                digits(row["first_seconds"]),
            ]
        )
    versions = report["versions"]
    by = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch"))
    return (
        f"{markdown(head, lines)}\n\n{report['machine']}; {by}; load average "
        f"{report['load_average']} at the start."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", type=Path, metavar="DIR", help="the authors' code")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each that are timed")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.published and not (options.published / f"{hpgd_published.SCRIPT}.py").exists():
        parser.error(f"--published: no {hpgd_published.SCRIPT}.py in {options.published}")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}"
    torch.set_num_threads(1)
    command = "python benchmarks/hpgd_speed.py" + " --published DIR" * bool(options.published)
    report = machine.header(command, threads=1)
    report["rows"] = measured(contenders(options.published), options.rounds)
    print(table(report))
    if options.out:
        store(report, options.out)


if __name__ == "__main__":
    main()
