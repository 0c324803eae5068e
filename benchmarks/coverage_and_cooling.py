"""What decides where a model is learned from samples: the first data, cooling, or many starts?

    python benchmarks/coverage_and_cooling.py [--seeds 3] [--out FILE]

Four Rooms for goal A, κ = 5, by `EstimatedModel`: the exact hyper-gradient on a model that is
learned from the same samples, about 50,000 transitions in all, the follower known. Each line
changes one thing of the first. The value is the true one of the weights that the model says are
best.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from birl_bench.seeds import study

from birl_ext.bilevel import MSoBiRL, geometric
from birl_ext.bilevel.estimated_model import EstimatedModel
from birl_ext.problems.sampled_four_rooms import sampled_four_rooms
from birl_ext.runs.intervals import mean_interval

TEMPERATURES, KAPPA, DISCOUNT = (0.001, 0.005), 5.0, 0.99
ROUNDS = 4
"""One of first data, and three more."""
ALL, CLIMB = 50_000, 100
SETTINGS: dict[str, dict[str, Any]] = {
    "20,000 uniform first, 64 starts, cooled": {},
    "20,000 of hot followers first": {"explorer": "hot"},
    "2,000 uniform first": {"first": 2000},
    "not cooled": {"heat": 1.0},
    "one new start a round, cooled": {"count": 2, "candidates": 1},
    "one new start a round, not cooled": {"count": 2, "candidates": 1, "heat": 1.0},
}


KNOWN = {"the process known, one start cooled": 8.0, "the process known, one start not cooled": 1.0}
"""Where the temperature falls from, in units of λ."""
STEPS, COOLING, RATE = 600, 0.6, 0.1


def known(seed: int) -> Iterator[dict[str, Any]]:
    """The exact hyper-gradient from one flat start, for comparison: no sample is drawn."""
    for temperature in TEMPERATURES:
        found = sampled_four_rooms(temperature, KAPPA)
        for setting, heat in KNOWN.items():
            schedule = geometric(heat * temperature, temperature, round(COOLING * STEPS))
            algorithm = MSoBiRL(
                found.exact,
                found.start(1, torch.Generator().manual_seed(seed)),
                temperature=schedule,
                optimiser=lambda parameters: torch.optim.Adam(parameters, lr=RATE),
            )
            began = time.process_time()
            for step in range(STEPS):
                for group in algorithm.optimiser.param_groups:
                    group["lr"] = RATE * 0.1 ** (step / STEPS)
                algorithm.step()
            yield {
                "seed": seed,
                "temperature": temperature,
                "setting": setting,
                "value": float(found.value(algorithm.x)),
                "samples": 0,
                "seconds": time.process_time() - began,
            }


def measured(seed: int) -> Iterator[dict[str, Any]]:
    """A row for each temperature and setting."""
    yield from known(seed)
    for temperature in TEMPERATURES:
        for setting, options in SETTINGS.items():
            found = sampled_four_rooms(temperature, KAPPA, seed=seed)
            first = options.get("first", 20_000)
            algorithm = EstimatedModel(
                found.problem,
                found.simulator,
                found.start,
                discount=DISCOUNT,
                temperature=temperature,
                climb=CLIMB,
                follower=found.follower,
                **{"first": first, "more": (ALL - first) // (ROUNDS - 1), **options},
            )
            began = time.process_time()
            outcomes, values = [], []
            for _ in range(ROUNDS):
                outcomes.append(algorithm.step())
                values.append(float(found.value(algorithm.x)))
            seconds = time.process_time() - began
            print(f"λ = {temperature:g}, {setting}: {values[-1]:.3f}, {seconds:.1f} s", flush=True)
            yield {
                "seed": seed,
                "temperature": temperature,
                "setting": setting,
                "value": values[-1],
                "after_the_first_data": values[0],
                "on_the_model": -outcomes[-1].objective,
                "samples": found.simulator.samples,
                "seconds": seconds,
            }


def table(report: dict[str, Any]) -> str:
    """A line for each setting: mean and 95 % interval of the value over the seeds."""
    lines = [
        "| setting | " + " | ".join(f"λ = {t:g}" for t in TEMPERATURES) + " | seconds |",
        "|---|" + "---|" * len(TEMPERATURES) + "---|",
    ]
    rows = report["rows"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        cells = [setting]
        for temperature in TEMPERATURES:
            values = [row["value"] for row in own if row["temperature"] == temperature]
            mean, half = mean_interval(values)
            width = "" if math.isnan(float(half)) else f" ± {float(half):.3f}"
            cells.append(f"{float(mean):.3f}{width}")
        cells.append(f"{sum(row['seconds'] for row in own) / len(own):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(study(__file__, __doc__, measured, table, seeds=3))
