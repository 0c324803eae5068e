"""How many outer steps and samples does Stoc-SoBiRL need for ‖∇φ‖² ≤ ε?

    python benchmarks/stoc_sobirl_slopes.py [--seeds 5] [--out FILE]

The synthetic problem (10 states, 5 actions, x ∈ R¹⁰⁰, γ = 0.5, τ = 1), from samples of the process
alone; the exact gradient is computed beside, only to know when to stop: after the first step from
which on the mean of ‖∇φ‖² over the last `WINDOW` steps is at most ε. Means over seeds, each with an
instance of its own; slopes by least squares of logarithms.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import store

from birl_ext.bilevel.stoc_sobirl import Effort, StocSoBiRLDescent
from birl_ext.problems.random_mdp import RandomMDPConfig
from birl_ext.problems.sampled_random_mdp import sampled_random_mdp

ACCURACIES = (0.3, 0.1, 0.03, 0.01)
RATE, WINDOW, MOST = 0.05, 10, 5000
THEORY = {"outer steps": -1.5, "samples": -3.5}


def run(epsilon: float, seed: int) -> dict[str, float]:
    """Outer steps and samples until ‖∇φ‖² ≤ ε."""
    config = RandomMDPConfig(seed=seed)
    problem, simulator, exact, start = sampled_random_mdp(config, seed)
    algorithm = StocSoBiRLDescent(
        problem,
        simulator,
        start,
        discount=config.discount,
        temperature=config.temperature,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=RATE),
        effort=Effort.for_accuracy(epsilon, config.discount),
    )
    squares: list[float] = []
    while len(squares) < MOST:
        x = algorithm.x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(exact.objective(x, config.temperature), x)
        squares.append(float(gradient.square().sum()))
        if len(squares) >= WINDOW and fmean(squares[-WINDOW:]) <= epsilon:
            return {"outer steps": len(squares), "samples": simulator.samples}
        algorithm.step()
    raise RuntimeError(
        f"epsilon {epsilon}, seed {seed}: ‖∇φ‖² is {squares[-1]:.3g} after {MOST} steps"
    )


def slope(points: list[tuple[float, float]]) -> float:
    x, y = ([math.log(number) for number in numbers] for numbers in zip(*points, strict=True))
    return linear_regression(x, y).slope


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for epsilon in ACCURACIES:
        found = [run(epsilon, seed) for seed in range(options.seeds)]
        row = {name: fmean(one[name] for one in found) for name in THEORY}
        rows.append({"epsilon": epsilon, **row, "runs": found})
        print(f"ε = {epsilon:<5g} {row['outer steps']:8.1f} steps {row['samples']:12.0f} samples")
    slopes = {name: slope([(row["epsilon"], row[name]) for row in rows]) for name in THEORY}
    for name, found in slopes.items():
        print(f"{name}: ε^{found:.2f}, claimed no worse than ε^{THEORY[name]}")
    if options.out:
        report = {
            **machine.header(
                f"python benchmarks/stoc_sobirl_slopes.py --seeds {options.seeds}",
            ),
            "seconds": time.perf_counter() - began,
            "seeds": options.seeds,
            "rate": RATE,
            "rows": rows,
            "slopes": slopes,
            "claimed": THEORY,
        }
        store(report, options.out)
    return 0 if all(slopes[name] >= THEORY[name] - 0.2 for name in THEORY) else 1


if __name__ == "__main__":
    sys.exit(main())
