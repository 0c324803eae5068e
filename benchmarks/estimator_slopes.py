"""Does the error of each estimator of ∇φ fall as 1/√n, and where does it stop?

    python benchmarks/estimator_slopes.py [--repetitions 20] [--out FILE] [--figure FILE]

The finite MDP of docs/stochastic.md (3 states, 2 actions, γ = 0.8, τ = 0.5, paths of two steps),
where ∇φ is a sum over all paths. The error is the root of the mean square of ‖∇φ̂ − ∇φ‖/‖∇φ‖ over
repetitions; slopes are of its noise, without the part that repetitions agree on.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import store
from birl_bench.report import table as markdown
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import exact_pair_objective
from birl_ext.bilevel.score import FullHorizon, OneStep, Score
from birl_ext.bilevel.trajectory import trajectory_surrogate
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator

DISCOUNT, TEMPERATURE, STEPS = 0.8, 0.5, 2
PAIRS = (100, 316, 1_000, 3_162, 10_000, 31_623)
HORIZONS = (1, 3, 10, 30)


class Problem:
    """Preferences over pairs of paths, a table as the learned reward."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        transition = torch.randn(3, 2, 3, generator=draws, dtype=torch.float64).mul(2).softmax(-1)
        x = torch.randn(3, 2, generator=draws, dtype=torch.float64)
        self.true = 2 * torch.randn(3, 2, generator=draws, dtype=torch.float64)
        self.x = x.requires_grad_()
        mdp = birl_ext.DenseMDP(self.x, transition, DISCOUNT)
        phi = exact_pair_objective(mdp, self.loss, temperature=TEMPERATURE, steps=STEPS)
        (self.exact,) = torch.autograd.grad(phi, self.x)
        self.follower = FiniteFollower(birl_ext.solve(mdp, temperature=TEMPERATURE).policy)
        self.simulator = FiniteSimulator(mdp, torch.Generator().manual_seed(1))

    def loss(self, s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        gap, true_gap = ((t[s1, a1] - t[s2, a2]).sum(-1) for t in (self.x, self.true))
        return torch.nn.functional.softplus(gap) - true_gap.sigmoid() * gap

    def estimate(self, score: Score, pairs: int) -> Tensor:
        """∇φ̂ from so many pairs, in units of ‖∇φ‖."""
        one, two = (self.simulator.rollout(self.follower, pairs, STEPS) for _ in range(2))
        scores = torch.stack(
            [score(lambda s, a: self.x[s, a], self.follower, *path) for path in (one, two)]
        ).sum(0)
        losses = self.loss(one.observation, one.action, two.observation, two.action)
        surrogate = trajectory_surrogate(losses, scores, temperature=TEMPERATURE)
        (found,) = torch.autograd.grad(surrogate, self.x)
        return (found - self.exact) / self.exact.norm()


def measure(problem: Problem, score: Score, repetitions: int) -> dict[str, Any]:
    """Errors by number of pairs, their slope, and the bias that is left."""
    errors, noises, offsets = [], [], []
    for pairs in PAIRS:
        found = torch.stack([problem.estimate(score, pairs) for _ in range(repetitions)])
        errors.append(float(found.square().sum((-1, -2)).mean().sqrt()))
        noises.append(float(found.std(0).square().sum().sqrt()))
        offsets.append(found.mean(0))
    bias = float(offsets[-1].norm())
    logs = [[math.log(value) for value in values] for values in (PAIRS, noises)]
    return {
        "errors": errors,
        "bias": bias,
        "bias_noise": noises[-1] / math.sqrt(repetitions),
        "slope_of_noise": linear_regression(*logs).slope,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    head = "estimator", "error at n = 1,000", "at n = 31,623", "of it bias", "slope of the noise"
    at = PAIRS.index(1_000)
    rows = (
        (
            name,
            *(f"{row['errors'][i]:.3f}" for i in (at, -1)),
            f"{row['bias']:.3f} ± {row['bias_noise']:.3f}",
            f"{row['slope_of_noise']:.2f}",
        )
        for name, row in report["rows"].items()
    )
    return markdown(head, rows)


def figure(report: dict[str, Any], path: Path) -> None:
    from birl_ext.runs import plots

    with plots.style():
        drawn, axes = plots.new_figure()
        colours = (*plots.COLOURS, "#000000")
        for (name, row), colour in zip(report["rows"].items(), colours, strict=False):
            axes.loglog(PAIRS, row["errors"], marker="o", markersize=3.5, color=colour, label=name)
            if row["bias"] > 3 * row["bias_noise"]:
                axes.axhline(row["bias"], color=colour, linewidth=1.0, linestyle=(0, (1, 2)))
        first = min(row["errors"][0] for row in report["rows"].values()) / 2
        axes.loglog(
            PAIRS,
            [first * math.sqrt(PAIRS[0] / n) for n in PAIRS],
            color=plots.MUTED,
            linestyle=(0, (5, 3)),
            linewidth=1.1,
            label="1/√n",
        )
        axes.set_title("Estimates of ∇φ: error, and (dotted) the bias that is left")
        axes.set_xlabel("pairs of paths")
        axes.set_ylabel("relative error")
        axes.legend(fontsize=8)
        drawn.savefig(path, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    problem = Problem()
    candidates: dict[str, Callable[[], Score]] = {"OneStep": lambda: OneStep(actions=2)}
    for steps in HORIZONS:
        candidates[f"FullHorizon, K = {steps}"] = lambda steps=steps: FullHorizon(  # type: ignore[misc]
            problem.simulator, discount=DISCOUNT, steps=steps
        )
    rows = {
        name: measure(problem, build(), options.repetitions) for name, build in candidates.items()
    }
    report = {
        **machine.header(
            f"python benchmarks/estimator_slopes.py --repetitions {options.repetitions}",
        ),
        "seconds": round(time.perf_counter() - began, 1),
        "pairs": PAIRS,
        "rows": rows,
    }
    print(table(report))
    if options.out:
        store(report, options.out)
    if options.figure:
        figure(report, options.figure)
    slopes = [row["slope_of_noise"] for row in rows.values()]
    return 0 if all(abs(slope + 0.5) < 0.1 for slope in slopes) else 1


if __name__ == "__main__":
    sys.exit(main())
