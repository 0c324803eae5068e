"""How many outer steps and samples does Stoc-SoBiRL need for ‖∇φ‖² ≤ ε, and where is φ then?

    python benchmarks/stoc_sobirl_slopes.py [--seeds 3] [--minutes 5] [--quick] [--out FILE]
        [--figure FILE]

Two problems on the process of the synthetic one (10 states, 5 actions, γ = 0.5, τ = 1), from
samples of it alone; each seed is an instance of its own. r = ψ·(c ∘ x), x in R²⁰, so that the noise
does not vanish at the optimum, x = 0, where φ* = 1:

- "strongly convex": φ = ½‖x‖² + ½‖π*‖², c = 1;
- "valley": φ = ½‖π*‖²; the scales c fall from 1 to 1/30, the curvatures from 1 to 1/900 of the
  largest.

Two regimes: a "fixed batch", 1,000 tuples, 40 sweeps and continuations of 6 steps, with the rate
falling as 1/√k; and the "growing batch" of `Effort.for_accuracy`, 4/ε tuples and sweeps, with a
constant rate. The exact gradient is computed beside, only to know when to stop: after the first
step from which on the mean of ‖∇φ‖² over the last tenth of the steps, and ten at least, is at most
ε. Processor time is shared out among the runs beforehand, and what ε is reached in it is told.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import store
from birl_bench.report import table as markdown
from torch import Tensor

from birl_ext import DenseMDP
from birl_ext.bilevel import BilevelProblem
from birl_ext.bilevel.stoc_sobirl import Effort, SampledProblem, StocSoBiRLDescent
from birl_ext.problems.random_mdp import RandomMDPConfig
from birl_ext.problems.sampled_random_mdp import sampled_random_mdp
from birl_ext.runs.intervals import mean_interval
from birl_ext.simulators.finite import FiniteSimulator

LADDER = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
FIXED = Effort(batch=1000, horizon=6, sweeps=40)
GROWS_UNTIL = 0.01
"""Last ε of the growing batch."""
LOWEST, WINDOW = 1.0, 0.1
PROBLEMS = "strongly convex", "valley"
RATES = {
    ("strongly convex", "fixed batch"): 0.03,
    ("valley", "fixed batch"): 0.1,
    ("strongly convex", "growing batch"): 0.05,
    ("valley", "growing batch"): 0.1,
}
"""β; with a fixed batch β/√(1 + k/10)."""
CLAIMED = {"steps": -1.5, "samples": -3.5}

Start = tuple[SampledProblem, FiniteSimulator, BilevelProblem, Tensor]


def make(name: str, config: RandomMDPConfig, seed: int) -> Start:
    """The synthetic problem's process and ½‖π‖², and a reward with 20 weights."""
    sampled, simulator, exact, start = sampled_random_mdp(config, seed)
    base = exact.lower(start)
    assert isinstance(base, DenseMDP)
    draws = torch.Generator().manual_seed(1000 + seed)
    shape = config.states, config.actions, 20
    flat = name == "valley"
    scales = torch.logspace(0, -math.log10(30) if flat else 0.0, 20, dtype=torch.float64)
    features = scales * torch.randn(shape, generator=draws, dtype=torch.float64)
    weight = 0.0 if flat else 0.5

    def lower(x: Tensor) -> DenseMDP:
        return base.replace(reward=features @ x, validate="off")

    def loss(x: Tensor, paths: Any) -> Tensor:
        assert sampled.loss is not None
        same = sampled.loss(torch.zeros(1, dtype=torch.float64), paths)
        return same + weight * x.square().sum()

    return (
        SampledProblem(lambda x: features @ x, loss, paths=2, steps=1),
        simulator,
        BilevelProblem(
            lower,
            lambda x, found: found.policy.square().sum() / 2 + weight * x.square().sum(),
        ),
        torch.randn(20, generator=draws, dtype=torch.float64),
    )


class Run:
    """One descent, watched by the exact gradient."""

    def __init__(self, name: str, seed: int, effort: Effort, rate: float, falls: bool) -> None:
        config = RandomMDPConfig(seed=seed)
        problem, self.simulator, self.exact, start = make(name, config, seed)
        self.algorithm = StocSoBiRLDescent(
            problem,
            self.simulator,
            start,
            discount=config.discount,
            temperature=config.temperature,
            optimiser=lambda parameters: torch.optim.SGD(parameters, lr=rate),
            effort=effort,
        )
        self.rate, self.falls, self.tau = rate, falls, config.temperature
        self.seen: list[tuple[int, float, float]] = []
        """Step, ‖∇φ‖² and φ − φ*."""

    def watch(self) -> None:
        x = self.algorithm.x.detach().clone().requires_grad_()
        phi = self.exact.objective(x, self.tau)
        (gradient,) = torch.autograd.grad(phi, x)
        gap = float(phi.detach()) - LOWEST
        self.seen.append((self.algorithm.steps, float(gradient.square().sum()), gap))

    def recent(self) -> tuple[float, float]:
        """Means over the last tenth of the steps."""
        first = min(self.algorithm.steps * (1 - WINDOW), self.algorithm.steps - 10)
        late = [row for row in self.seen if row[0] > first]
        return fmean(row[1] for row in late), fmean(row[2] for row in late)

    def until(self, ladder: Sequence[float], seconds: float) -> list[dict[str, Any]]:
        """A row for each ε that is reached in so much processor time."""
        found: list[dict[str, Any]] = []
        began = time.process_time()
        while len(found) < len(ladder) and time.process_time() - began < seconds:
            steps = self.algorithm.steps
            if steps < 100 or steps % (steps // 100) == 0:
                self.watch()
                square, gap = self.recent()
                while len(found) < len(ladder) and steps >= 10 and square <= ladder[len(found)]:
                    row = {"epsilon": ladder[len(found)], "steps": steps, "gap": gap}
                    found.append({**row, "square": square, "samples": self.simulator.samples})
            if self.falls:
                for group in self.algorithm.optimiser.param_groups:
                    group["lr"] = self.rate / math.sqrt(1 + steps / 10)
            self.algorithm.step()
        return found


def measured(name: str, regime: str, seed: int, seconds: float) -> dict[str, Any]:
    rate = RATES[name, regime]
    if regime == "fixed batch":
        run = Run(name, seed, FIXED, rate, falls=True)
        found = run.until(LADDER, seconds)
        curve = [row for row in run.seen if row[0] >= 10][:: max(1, len(run.seen) // 300)]
        last = {"steps": run.algorithm.steps, "curve": curve}
        return {"problem": name, "regime": regime, "seed": seed, "found": found, **last}
    found = []
    ladder = [epsilon for epsilon in LADDER if GROWS_UNTIL <= epsilon < 1]
    for epsilon in ladder:
        run = Run(name, seed, Effort.for_accuracy(epsilon, 0.5), rate, falls=False)
        found += run.until([epsilon], seconds / len(ladder))
    return {"problem": name, "regime": regime, "seed": seed, "found": found}


def slopes(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One of each seed, over all ε that it reached."""
    fits = []
    for row in rows:
        points = [(one["epsilon"], one[key]) for one in row["found"]]
        if len(points) > 2:
            x, y = ([math.log(number) for number in column] for column in zip(*points, strict=True))
            fits.append(linear_regression(x, y).slope)
    return fits


def chosen(report: Mapping[str, Any], name: str, regime: str) -> list[Mapping[str, Any]]:
    return [row for row in report["rows"] if (row["problem"], row["regime"]) == (name, regime)]


def table(report: Mapping[str, Any]) -> str:
    """Markdown: means over the seeds, of the ε that all of them reached."""
    head = ["problem", "regime", "ε", "outer steps", "samples", "‖∇φ‖²", "φ − φ*"]
    lines = []
    for name, regime in RATES:
        rows = chosen(report, name, regime)
        for at in range(min((len(row["found"]) for row in rows), default=0)):
            found = [row["found"][at] for row in rows]
            means = {key: fmean(one[key] for one in found) for key in found[0]}
            cells = [f"{means['epsilon']:g}", f"{means['steps']:,.0f}", f"{means['samples']:.1e}"]
            cells += [f"{means['square']:.1e}", f"{means['gap']:.1e}"]
            lines.append([name, regime, *cells])
        exponents = []
        for key in CLAIMED:
            fits = slopes(rows, key)
            if len(fits) < len(rows):
                exponents.append("too few reached")
                continue
            mean, half = mean_interval(fits)
            exponents.append(f"**{mean:.2f} ± {half:.2f}**")
        lines.append([name, regime, "exponent of ε", *exponents, "", ""])
    return markdown(head, lines)


def figure(report: Mapping[str, Any], path: Path) -> None:
    """‖∇φ‖² and φ − φ* along the runs with a fixed batch."""
    from birl_ext.runs import plots

    with plots.style():
        drawn, panels = plots.new_figure(1, 2, size=(11, 3.8), sharey=True)
        for name, axes in zip(PROBLEMS, panels, strict=True):
            for which, row in enumerate(chosen(report, name, "fixed batch")):
                steps, squares, gaps = zip(*row["curve"], strict=True)
                for values, label, colour in (
                    (squares, "‖∇φ‖²", plots.COLOURS[0]),
                    (gaps, "φ − φ*", plots.COLOURS[1]),
                ):
                    axes.loglog(
                        steps,
                        [max(value, 1e-9) for value in values],
                        color=colour,
                        linewidth=0.8,
                        alpha=0.7,
                        label=None if which else label,
                    )
            axes.set_title(f"{name}, fixed batch")
            axes.set_xlabel("outer step")
        panels[0].legend()
        drawn.savefig(path, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="processor time of all runs")
    parser.add_argument("--quick", action="store_true", help="four seconds: a trial")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    seconds = 1.0 if options.quick else 60 * options.minutes / (len(RATES) * options.seeds)
    for name, regime in RATES:
        for seed in range(1 if options.quick else options.seeds):
            rows.append(measured(name, regime, seed, seconds))
            last = rows[-1]["found"][-1] if rows[-1]["found"] else "nothing reached"
            print(f"{name}, {regime}, seed {seed}: {last}", flush=True)
    report = {
        **machine.header(
            "python benchmarks/stoc_sobirl_slopes.py "
            f"--seeds {options.seeds} --minutes {options.minutes:g}",
            quick=options.quick,
        ),
        "seconds": time.perf_counter() - began,
        "seeds": options.seeds,
        "rows": rows,
        "claimed": CLAIMED,
    }
    print(table(report))
    if options.out:
        store(report, options.out)
    if options.figure:
        figure(report, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
