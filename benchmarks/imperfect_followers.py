"""What does a leader lose whose follower makes K sweeps, not all of them?

    python benchmarks/imperfect_followers.py [--quick] [--out FILE] [--figure FILE]

The follower answers each outer step with K soft-Bellman sweeps, from where it was in the last one
(carried over) or from zero (reset); the leader descends the hyper-gradient (M14) at that policy.

- "random MDP": 20 instances of 8 states and 3 actions, r = ψ·x with 6 features, γ = 0.5 and τ = 1,
  or γ = 0.9 and τ = 0.5; f = ‖x‖²/20 − Σ w π with w ~ N(0, 1): 300 steps of SGD at rate 0.05;
- "four rooms, moves": the walker of Four Rooms at λ = 0.02, f = −(share of cells where it moves
  down), both goals: 60 steps of Adam at rate 0.3;
- "four rooms": the same walker at λ = 0.005, and the leader's own objective with κ = 3; its
  certificate is infinite, as f is no linear function of the policy.

At every outer step the estimate is compared with the exact hyper-gradient, and its error with the
certified bound. The gap is by how much φ at the last x, for a follower that is exact by then, is
above φ after as many steps of the exact hyper-gradient, in units of what those gain.
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
from typing import Any, NamedTuple

import torch
from birl_bench import machine
from birl_bench.report import digits, store
from birl_bench.report import table as markdown
from torch import Tensor

from birl_ext import DenseMDP
from birl_ext.bilevel import BilevelProblem, MSoBiRL
from birl_ext.bilevel.follower import Exact, Follower, Sweeps
from birl_ext.errors import AccuracyWarning
from birl_ext.problems.four_rooms import FourRooms

COUNTS = (1, 2, 5, 10, 20, 50)
DOWN = 2


class Work(NamedTuple):
    problem: BilevelProblem
    start: Tensor
    temperature: float
    optimiser: Callable[..., torch.optim.Optimizer]
    steps: int
    smoothness: Any
    """What is declared of f, for the certificate."""


def random_mdps(discount: float, temperature: float) -> Work:
    draws = torch.Generator().manual_seed(0)
    instances, states, actions, features = 20, 8, 3, 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(instances, *shape, generator=draws, dtype=torch.float64)

    transition = (2 * normal(states, actions, states)).softmax(-1)
    psi, weight = normal(states, actions, features), normal(states, actions)
    base = DenseMDP(weight, transition, discount)
    return Work(
        BilevelProblem(
            lambda x: base.replace(reward=torch.einsum("msad,md->msa", psi, x), validate="off"),
            lambda x, found: x.square().sum(-1) / 20 - (weight * found.policy).sum((-1, -2)),
        ),
        normal(features),
        temperature,
        partial(torch.optim.SGD, lr=0.05),
        300,
        "linear",
    )


def rooms(temperature: float, own: bool) -> Work:
    four, draws = FourRooms(3.0), torch.Generator().manual_seed(0)
    start = torch.randn(len(four.cells) + 1, generator=draws, dtype=torch.float64)
    problem = four.problem()
    if not own:
        problem = BilevelProblem(four.lower, lambda w, found: -found.policy[..., DOWN].mean())
    adam = partial(torch.optim.Adam, lr=0.3)
    return Work(problem, start, temperature, adam, 60, math.inf if own else "linear")


PROBLEMS: dict[str, Callable[[], Work]] = {
    "random MDP, γ = .5": lambda: random_mdps(0.5, 1.0),
    "random MDP, γ = .9": lambda: random_mdps(0.9, 0.5),
    "four rooms, moves": lambda: rooms(0.02, own=False),
    "four rooms": lambda: rooms(0.005, own=True),
}


def descended(work: Work, follower: Follower, steps: int) -> dict[str, Any]:
    """A run: the error of each step, the bound's, and φ of an exact follower at the end."""
    algorithm = MSoBiRL(
        work.problem,
        work.start,
        temperature=work.temperature,
        optimiser=work.optimiser,
        follower=follower,
    )
    errors, tightness = [], []
    checked = violated = telling = 0
    for _ in range(steps):
        if follower != Exact():
            report = algorithm.hypergradient_report(work.smoothness)
            error = (report.estimate - report.exact).norm(dim=-1)
            errors.append(report.relative_error.detach())
            if work.smoothness != math.inf:
                checked += report.bound.numel()
                violated += int((report.bound < error).sum())
                telling += int((report.bound < report.exact.norm(dim=-1)).sum())
                tightness.append((report.bound / error).detach())
        algorithm.step()
    x = algorithm.x.detach()
    found = {"phi": work.problem.objective(x, work.temperature).reshape(-1).tolist()}
    if errors:
        late = torch.stack(errors)[steps // 2 :]
        found |= {
            "errors": [float(one.median()) for one in errors],
            "late_error": float(late.median()),
            "checked": checked,
            "violated": violated,
            "telling": telling,
            "tightness": float(torch.stack(tightness).median()) if tightness else None,
        }
    return found


def measured(name: str, quick: bool) -> list[dict[str, Any]]:
    work = PROBLEMS[name]()
    steps = 4 if quick else work.steps
    best = torch.tensor(descended(work, Exact(), steps)["phi"])
    first = work.problem.objective(work.start, work.temperature).reshape(-1)
    gained = (first - best).mean()
    rows = []
    for carry in (True, False):
        for count in COUNTS:
            began = time.process_time()
            found = descended(work, Sweeps(count, carry=carry), steps)
            gap = (torch.tensor(found.pop("phi")) - best).mean() / gained
            rows.append({"problem": name, "carry": carry, "sweeps": count, **found})
            rows[-1]["gap"] = float(gap)
            print(
                f"{name}, K = {count}, {'carried' if carry else 'reset'}: "
                f"{time.process_time() - began:.0f} s, gap {float(gap):.1e}, "
                f"{found['violated']} of {found['checked']} above the bound",
                flush=True,
            )
    return rows


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a line for each problem and K, carried over and reset."""
    head = ["problem", "K"]
    for way in ("carried", "reset"):
        head += [f"{way}: error of ∇φ", "gap in φ", "bound / error", "bound below ‖∇φ‖"]
    lines = []
    for name in dict.fromkeys(row["problem"] for row in report["rows"]):
        for count in COUNTS:
            cells = [name, str(count)]
            for carry in (True, False):
                (row,) = (
                    row
                    for row in report["rows"]
                    if (row["problem"], row["carry"], row["sweeps"]) == (name, carry, count)
                )
                cells += [f"{row['late_error']:.1e}", f"{100 * row['gap']:.2f} %"]
                if row["tightness"] is None:
                    cells += ["∞", "–"]
                else:
                    large = not row["tightness"] < 1e12
                    cells.append("> 1e12" if large else digits(row["tightness"]))
                    cells.append(f"{row['telling'] / row['checked']:.0%}")
            lines.append(cells)
    return markdown(head, lines)


def figure(report: Mapping[str, Any], path: Path) -> None:
    """The error of ∇φ along the outer steps, by K, carried over and reset."""
    from birl_ext.runs import plots

    names = "random MDP, γ = .9", "four rooms"
    with plots.style():
        drawn, panels = plots.new_figure(1, len(names), size=(11, 4.2))
        for name, axes in zip(names, panels, strict=True):
            for row in report["rows"]:
                if row["problem"] == name:
                    colour = plots.COLOURS[COUNTS.index(row["sweeps"])]
                    axes.semilogy(
                        [max(error, 1e-16) for error in row["errors"]],
                        color=colour,
                        linestyle="-" if row["carry"] else (0, (4, 2)),
                        label=f"K = {row['sweeps']}" if row["carry"] else None,
                    )
            axes.set_title(name)
            axes.set_xlabel("outer step")
        panels[0].set_ylabel("relative error of ∇φ, median")
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(COUNTS),
            title="carried over; dashed: reset",
            title_fontsize=9,
        )
        drawn.savefig(path, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four outer steps: a trial")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", AccuracyWarning)  # what is wrong is what is measured
    began, rows = time.perf_counter(), []
    for name in PROBLEMS:
        rows += measured(name, options.quick)
    report = {
        **machine.header("python benchmarks/imperfect_followers.py", quick=options.quick),
        "seconds": time.perf_counter() - began,
        "checked": sum(row["checked"] for row in rows),
        "violated": sum(row["violated"] for row in rows),
        "rows": rows,
    }
    print(table(report))
    print(f"{report['violated']} of {report['checked']} errors are above their bound")
    if options.out:
        store(report, options.out)
    if options.figure:
        figure(report, options.figure)
    return 1 if report["violated"] else 0


if __name__ == "__main__":
    sys.exit(main())
