"""Do outer steps grow as 1/ε until ‖∇φ‖² ≤ ε, or more slowly?

    python benchmarks/outer_steps.py [--instances 20] [--quick] [--out FILE] [--figure FILE]

Three bilevel problems on random MDPs (6 states, 3 actions, γ = 0.9, τ = 1), one strongly convex and
two with a flat valley, where the bound of M-SoBiRL says something:

- "strongly convex": r = ψ·x, φ = ½ Σ m_i (x_i − c_i)² + ½‖π*‖², x in R⁶, m from 1 to 1/20;
- "quartic": r = ψ·(x ∘ x), φ = ½‖π*‖², least, and flat to the third order, at x = 0;
- "diminishing returns": the follower is paid log(1 + x_s²)/8 for the action that is wanted in s,
  and φ is the share of states in which it does something else: its infimum, 0, is at infinity.
  While that action is not nearly certain, φ falls as −log x, which takes ~1/ε steps.

Plain gradient steps of constant length, as the bound has them; each method's is the best of a grid
on ten other instances. ε is in units of ‖∇φ(x₀)‖². Steps are counted until the exact gradient is
that small, looked at after 1, 2, …, and then at steps 5 % apart. Slopes are least squares of
logarithms for each instance, over all ε that it reached; intervals are Student's t over instances.
At most 3,000 steps, 600 of penalty methods; a method stops where the least ‖∇φ‖² of no instance has
fallen since a third of its steps, 300 at least. The share of the bound is the largest
K β ε/(2(φ(x₀) − φ_low)), after K steps β to an absolute ε, with φ_low what φ cannot be below: at
most 1 for the exact gradient and β ≤ 1/L.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, NamedTuple

import torch
from birl_bench import machine
from birl_bench.report import digits, store
from birl_bench.report import table as markdown
from torch import Tensor

from birl_ext import DenseMDP
from birl_ext.bilevel import BilevelProblem, MSoBiRL, ZeroOrder
from birl_ext.bilevel.algorithm import Descent
from birl_ext.bilevel.rivals import BellmanPenalty, NoResponse, Unrolled, ValuePenalty
from birl_ext.errors import AccuracyWarning, BirlError
from birl_ext.runs.intervals import mean_interval
from birl_ext.solution import Solution

STATES, ACTIONS, VARIABLES = 6, 3, 6
DISCOUNT, TEMPERATURE = 0.9, 1.0
PAY = 1 / 8
LADDER = 10.0 ** -torch.arange(1, 6.01, 0.5, dtype=torch.float64)
"""ε, in units of ‖∇φ(x₀)‖²."""
MOST, TRIAL, TUNED_ON = 3000, 200, 10
OF_PENALTIES = 600
"""Most steps of a penalty method, which costs several times as much."""
BETWEEN = 1.05
GRID = (1.0, 0.3, 0.1)
"""Steps tried, in units of the problem's own."""


class Work(NamedTuple):
    problem: BilevelProblem
    start: Tensor  # (M, d)
    unit: float
    """Of the step: about 1/L."""
    lowest: float
    """What φ cannot be below."""


def make(name: str, instances: int, seed: int) -> Work:
    """So many instances, as one batch."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(instances, *shape, generator=draws, dtype=torch.float64)

    transition = (2 * normal(STATES, ACTIONS, STATES)).softmax(-1)
    features, centre = normal(STATES, ACTIONS, VARIABLES), normal(VARIABLES)
    base = DenseMDP(features[..., 0], transition, DISCOUNT)
    start = normal(VARIABLES)

    curvature = torch.logspace(0, -math.log10(20), VARIABLES, dtype=torch.float64)
    uniform = STATES / ACTIONS / 2  # ½‖π‖² of the uniform policy

    def paid(reward: Tensor) -> DenseMDP:
        return base.replace(reward=reward, validate="off")

    def half(policy: Tensor) -> Tensor:
        return policy.square().sum((-1, -2)) / 2

    if name == "strongly convex":
        return Work(
            BilevelProblem(
                lambda x: paid(torch.einsum("msad,md->msa", features, x) / 4),
                lambda x, found: (
                    (curvature * (x - centre).square()).sum(-1) / 2 + half(found.policy)
                ),
            ),
            start,
            1.0,
            uniform,
        )
    if name == "quartic":
        return Work(
            BilevelProblem(
                lambda x: paid(torch.einsum("msad,md->msa", features, x.square()) / 4),
                lambda x, found: half(found.policy),
            ),
            start,
            1.0,
            uniform,
        )
    wanted = torch.nn.functional.one_hot(features[..., 0].argmin(-1), ACTIONS)

    def elsewhere(x: Tensor, found: Solution) -> Tensor:
        return 1 - (wanted * found.policy).sum((-1, -2)) / STATES

    return Work(
        BilevelProblem(
            lambda x: paid(
                features[..., 0] / 4 + PAY * torch.log1p(x.square()).unsqueeze(-1) * wanted
            ),
            elsewhere,
        ),
        start,
        200.0,
        0.0,
    )


PROBLEMS = "strongly convex", "quartic", "diminishing returns"
Make = Callable[..., Descent[Any]]


def published(problem: BilevelProblem, x: Tensor, **options: Any) -> Descent[Any]:
    return MSoBiRL(problem, x, mode="published", adjoint_rate=0.3, **options)


METHODS: dict[str, Make] = {
    "M-SoBiRL, exact": MSoBiRL,
    "M-SoBiRL, exact, tol = .01": partial(MSoBiRL, tol=0.01),
    "M-SoBiRL, published": published,
    "unrolled, K = 20": partial(Unrolled, sweeps=20),
    "zero order, one point": partial(ZeroOrder, radius=1e-4),
    "zero order, two points": partial(ZeroOrder, radius=1e-4, points=2),
    "value penalty, λ = 10": partial(ValuePenalty, weight=10.0, inner_steps=5),
    "Bellman penalty, λ = 10": partial(BellmanPenalty, weight=10.0, inner_steps=5),
    "no response": NoResponse,
}


def passages(work: Work, method: Make, step: float, most: int) -> Tensor:
    """Outer steps until ‖∇φ‖² ≤ ε, (ε, M); inf where that is not reached."""
    algorithm = method(
        work.problem,
        work.start,
        temperature=TEMPERATURE,
        optimiser=partial(torch.optim.SGD, lr=step * work.unit),
    )
    found = torch.full((len(LADDER), len(work.start)), torch.inf, dtype=torch.float64)
    first, due = None, 0.0
    least: list[tuple[int, Tensor]] = []
    for taken in range(most + 1):
        if taken >= due:
            due = max(taken + 1, BETWEEN * taken)
            x = algorithm.x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(
                work.problem.objective(x, TEMPERATURE).sum(), x, materialize_grads=True
            )
            square = gradient.square().sum(-1)
            first = square if first is None else first
            met = square / first <= LADDER.unsqueeze(-1)
            found = torch.where(met, found.clamp(max=taken), found)
            if bool(met[-1].all()):
                break
            least.append((taken, torch.minimum(square, least[-1][1]) if least else square))
            early = [one for when, one in least if 3 * when <= taken]
            if taken > 300 and bool((least[-1][1] > 0.999 * early[-1]).all()):
                break
        try:
            outcome = algorithm.step()
        except BirlError:  # it has diverged
            break
        if not bool(outcome.gradient_norm.any()):  # it will never move again
            break
    return found


def share_of_bound(work: Work, found: Tensor, step: float) -> float:
    """The largest over instances and the accuracies that they reached."""
    x = work.start.clone().requires_grad_()
    phi = work.problem.objective(x, TEMPERATURE)
    (gradient,) = torch.autograd.grad(phi.sum(), x)
    absolute = LADDER.unsqueeze(-1) * gradient.square().sum(-1)
    share = (
        torch.where(found.isfinite(), found, 0.0)
        * step
        * work.unit
        * absolute
        / (2 * (phi.detach() - work.lowest))
    )
    return float(share.max())


def best_step(name: str, method: Make) -> float:
    """That which brings most instances furthest, on instances that are not reported."""
    work = make(name, TUNED_ON, seed=1)

    def merit(step: float) -> float:
        return float(passages(work, method, step, TRIAL).clamp(max=2 * TRIAL).log().mean())

    return min(GRID, key=merit)


def fitted(found: Tensor, least: int = 3) -> list[float]:
    """The exponent of each instance that reached three accuracies or more, after ten steps each."""
    slopes = []
    for column in found.unbind(-1):
        use = column.isfinite() & (column >= 10)
        if int(use.sum()) >= least:
            x, y = LADDER[use].log().tolist(), column[use].log().tolist()
            slopes.append(linear_regression(x, y).slope)
    return slopes


def measured(name: str, instances: int, quick: bool) -> list[dict[str, Any]]:
    work, rows = make(name, instances, seed=0), []
    for method, build in METHODS.items():
        began = time.process_time()
        step = GRID[1] if quick else best_step(name, build)
        most = OF_PENALTIES if "penalty" in method else MOST
        found = passages(work, build, step, 200 if quick else most)
        slopes = fitted(found)
        mean, half = mean_interval(slopes) if slopes else (None, None)
        rows.append(
            {
                "problem": name,
                "method": method,
                "step": step * work.unit,
                "share_of_bound": share_of_bound(work, found, step),
                "steps": [
                    [None if math.isinf(one) else int(one) for one in line]
                    for line in found.tolist()
                ],
                "slope": None if mean is None else float(mean),
                "half": None if half is None or math.isnan(half) else float(half),
                "fitted": len(slopes),
                "seconds": time.process_time() - began,
            }
        )
        print(f"{name}, {method}: {rows[-1]['seconds']:.0f} s, {brief(rows[-1])}", flush=True)
    return rows


def reached(row: Mapping[str, Any], at: int) -> list[float]:
    """Steps to one ε, inf where it is not reached."""
    return [math.inf if one is None else one for one in row["steps"][at]]


def brief(row: Mapping[str, Any]) -> str:
    """The slope and its interval."""
    if row["slope"] is None:
        return "none"
    half = "" if row["half"] is None else f" ± {row['half']:.2f}"
    return f"{row['slope']:.2f}{half}"


def table(report: Mapping[str, Any]) -> str:
    """Markdown: median steps to three accuracies, and the exponent."""
    shown = [0, 2, 4, 6, 8]
    head = ["problem", "method", "step"]
    head += [f"ε = {report['ladder'][at]:.0e}" for at in shown]
    head += ["exponent of ε", "instances in it", "of the bound"]
    lines = []
    for row in report["rows"]:
        cells = []
        for at in shown:
            middle = median(reached(row, at))
            cells.append("–" if math.isinf(middle) else digits(middle))
        counted = f"{row['fitted']} of {report['instances']}"
        first = row["problem"], row["method"], digits(row["step"])
        share = f"{row['share_of_bound']:.2f}" if row["share_of_bound"] else "–"
        lines.append([*first, *cells, brief(row), counted, share])
    return markdown(head, lines)


def figure(report: Mapping[str, Any], path: Path) -> None:
    """A panel for each problem: median steps of each method, and the bound's slope."""
    from birl_ext.runs import plots

    with plots.style():
        drawn, panels = plots.new_figure(1, len(PROBLEMS), size=(11, 4.2), sharey=True)
        ladder = report["ladder"]
        for name, axes in zip(PROBLEMS, panels, strict=True):
            rows = [row for row in report["rows"] if row["problem"] == name]
            colours = (*plots.COLOURS, "#000000", "#8c564b", "#7f7f00", "#9467bd")
            for row, colour in zip(rows, colours, strict=False):
                middles = [median(reached(row, at)) for at in range(len(ladder))]
                points = [(e, n) for e, n in zip(ladder, middles, strict=True) if n < math.inf]
                if points:
                    axes.loglog(
                        *zip(*points, strict=True),
                        marker="o",
                        markersize=3,
                        color=colour,
                        label=row["method"],
                    )
            bound = [e for e in ladder if 3 * ladder[0] / e < 2 * report["most"]]
            axes.loglog(
                bound,
                [3 * ladder[0] / e for e in bound],
                color=plots.MUTED,
                linestyle=(0, (5, 3)),
                linewidth=1.1,
                label="slope of 1/ε",
            )
            axes.invert_xaxis()
            axes.set_title(name)
            axes.set_xlabel("ε, in units of ‖∇φ(x₀)‖²")
        panels[0].set_ylabel("outer steps, median")
        handles = dict(
            pair[::-1]
            for axes in panels
            for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        )
        drawn.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8
        )
        drawn.savefig(path, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="200 steps, nothing tuned: a trial")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", AccuracyWarning)  # what an inexact mode costs is the question
    began, rows = time.perf_counter(), []
    for name in PROBLEMS:
        rows += measured(name, options.instances, options.quick)
    report = {
        **machine.header(
            f"python benchmarks/outer_steps.py --instances {options.instances}",
            quick=options.quick,
        ),
        "seconds": time.perf_counter() - began,
        "instances": options.instances,
        "most": MOST,
        "ladder": LADDER.tolist(),
        "rows": rows,
    }
    print(table(report))
    if options.out:
        store(report, options.out)
    if options.figure:
        figure(report, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
