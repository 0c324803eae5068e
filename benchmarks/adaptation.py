"""Is the hyper-gradient right where x moves the physics and the follower learns? What is it worth?

    python benchmarks/adaptation.py [--seeds 5] [--out FILE]

The arm of `birl run adaptation` with 8 springs, 12 variables, and CartPole with noise on its
velocities, whose gravity, mass, length and force are moved; soft Q-learning controls both, discrete
SAC both, and SAC the arm.

First the hyper-gradient by critics of both levels, from 2,000 paths after 1,920 episodes of
practice (CartPole: 3,840), against central differences of φ: controllers trained from scratch by as
many episodes on both sides of each variable, 10,000 paths each, all random numbers the same on both
sides.

Then, for the arm, both leaders at equal environment steps, practice and paths counted. Their
designs are judged by a controller of the judge's own, trained from scratch. Learning rates, and the
radius, are the best of a grid on two seeds that are not among those compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from birl_bench import machine
from birl_bench.report import store
from birl_bench.report import table as markdown
from torch import Tensor
from torch.nn.functional import cosine_similarity

from birl_ext.agents.networks import MLP
from birl_ext.bilevel import Adaptation, AdaptationProblem, Practice, ZeroOrderAdaptation
from birl_ext.problems.adaptation import (
    NAMES,
    AdaptationConfig,
    Follower,
    Method,
    follower,
    leader,
    start,
)
from birl_ext.runs.intervals import mean_interval
from birl_ext.simulators.equations import CartPole
from birl_ext.simulators.noisy import NoisyDynamics

SPRINGS, ROUNDS, PATHS, JUDGED = 8, 60, 2000, 10_000
WIDTH = 0.1  # of the central differences on each side, units of x
BUDGETS = (150_000, 250_000, 400_000)  # environment steps
GRID: dict[Method, list[dict[str, float]]] = {
    "gradient": [{"learning_rate": rate} for rate in (0.02, 0.04, 0.08)],
    "zero-order": [
        {"learning_rate": rate, "radius": radius}
        for rate, radius in itertools.product((0.02, 0.04, 0.08), (0.1, 0.3))
    ],
}
TUNING = (100, 101)


class Place(NamedTuple):
    """Where the gradient is measured, and who controls there."""

    x: Tensor
    follower: Follower = "soft-q"
    cart_pole: bool = False


def places() -> dict[str, Place]:
    """Designs of the arm, and CartPole as Gymnasium has it."""
    unmoved, pole = start(SPRINGS), torch.zeros(4, dtype=torch.float64)
    draws = torch.Generator().manual_seed(0)
    away = 0.3 * torch.randn(len(unmoved), generator=draws, dtype=torch.float64)
    return {
        "the arm's start": Place(unmoved),
        "a design drawn around it": Place(unmoved + away),
        "CartPole": Place(pole, cart_pole=True),
        "the arm's start, SAC": Place(unmoved, "sac"),
        "the arm's start, discrete SAC": Place(unmoved, "discrete-sac"),
        "CartPole, discrete SAC": Place(pole, "discrete-sac", cart_pole=True),
    }


def cart_pole() -> AdaptationProblem:
    """r keeps the pole upright, f the cart slow; x: log of each number over Gymnasium's."""

    def physics(x: Tensor) -> NoisyDynamics:
        gravity, mass, length, force = x.exp().unbind()
        pole = CartPole(
            gravity=9.8 * gravity, cart_mass=mass, half_length=0.5 * length, force=10 * force
        )
        return NoisyDynamics(pole, [0, 0.05, 0, 0.05])

    return AdaptationProblem(
        physics,
        reward=lambda x, s, a: 1 - s[:, 2].abs() / 0.2,
        cost=lambda x, s, a: s[:, 1].square(),
        start=lambda count, draws: 0.05 * torch.randn(count, 4, generator=draws),
        steps=40,
        discount=0.9,
    )


def practised(
    place: Place, seed: int, method: Method = "zero-order"
) -> Adaptation | ZeroOrderAdaptation:
    """A leader whose controller, from scratch, has practised at a place."""
    if place.cart_pole:
        found = on_cart_pole(place, seed, method)
    else:
        config = AdaptationConfig(
            method=method, springs=SPRINGS, seed=seed, follower=place.follower
        )
        found = leader(config, place.x, rounds=ROUNDS, first=0)
    found.practise()
    return found


def on_cart_pole(place: Place, seed: int, method: Method) -> Adaptation | ZeroOrderAdaptation:
    given: dict[str, Any] = {
        "agent": follower(place.follower, 0.2, seed, inputs=4, actions=2),
        "optimiser": torch.optim.Adam,
        "practice": Practice(rounds=2 * ROUNDS),
        "seed": seed,
    }
    if method == "zero-order":
        return ZeroOrderAdaptation(cart_pole(), x=place.x, radius=WIDTH, **given)
    draws = torch.Generator().manual_seed(1000 + seed)
    network = MLP(4, 2 * (1 + len(place.x)), hidden=(64, 64), generator=draws)
    learn = partial(torch.optim.Adam, lr=1e-3)
    return Adaptation(cart_pole(), x=place.x, network=network, discount=0.9, learn=learn, **given)


def judged(place: Place, seed: int) -> Tensor:
    """Costs of 10,000 paths of a controller trained at a place."""
    found = practised(place, seed)
    found.generator.manual_seed(seed)
    return found.watch(place.x, JUDGED)


def compared(place: Place, seed: int) -> dict[str, Any]:
    """The hyper-gradient and the central differences of one seed."""
    found = practised(place, seed, "gradient")
    assert isinstance(found, Adaptation)
    _, gradient = found.estimate(PATHS)
    halves = [found.estimate(PATHS // 8)[1] for _ in range(8)]
    noise = torch.stack(halves).std(0) / math.sqrt(8)
    slopes, errors = [], []
    for aside in WIDTH * torch.eye(len(place.x), dtype=place.x.dtype):
        sides = (place._replace(x=place.x + sign * aside) for sign in (1, -1))
        above, below = (judged(side, seed) for side in sides)
        gap = (above - below) / (2 * WIDTH)
        slopes.append(float(gap.mean()))
        errors.append(float(gap.std()) / math.sqrt(JUDGED))
    return {
        "seed": seed,
        "gradient": gradient.tolist(),
        "noise": noise.tolist(),
        "differences": slopes,
        "errors": errors,
        "cosine": float(cosine_similarity(gradient, torch.tensor(slopes).double(), dim=0)),
    }


def held(place: Place, seed: int) -> dict[str, Any]:
    """The same differences of one agent, which has practised there and does not answer."""
    found, x = practised(place, seed), place.x

    def value(there: Tensor) -> float:
        found.generator.manual_seed(seed)
        return float(found.watch(there, JUDGED).mean())

    steps = WIDTH * torch.eye(len(x), dtype=x.dtype)
    slopes = [(value(x + step) - value(x - step)) / (2 * WIDTH) for step in steps]
    return {"seed": seed, "differences": slopes}


def led(method: Method, seed: int, settings: Mapping[str, float], budgets: Any) -> dict[str, Any]:
    """φ of the designs of one run, at each budget the last that was within it."""
    given: Any = settings
    config = AdaptationConfig(method=method, springs=SPRINGS, seed=seed, **given)
    found, values, steps = leader(config), [], []
    before = found.x.detach().clone()
    for budget in budgets:
        while found.samples <= budget:
            before = found.x.detach().clone()
            found.step()
        # the step that went over it is not taken
        costs = judged(Place(before), 1000 + seed)
        values.append(float(costs.mean()))
        steps.append(found.steps - 1)
    return {"method": method, "seed": seed, **settings, "values": values, "outer_steps": steps}


def agreement(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each place: cosines of the seeds, of their means, and how well these are known."""
    found = []
    for place in dict.fromkeys(row["place"] for row in report["gradients"]):
        rows = [row for row in report["gradients"] if row["place"] == place]
        ours, theirs = (
            torch.tensor([row[key] for row in rows], dtype=torch.float64)
            for key in ("gradient", "differences")
        )
        mean, truth = ours.mean(0), theirs.mean(0)
        errors = theirs.std(0) / math.sqrt(len(rows))
        each = cosine_similarity(ours, truth, dim=-1)
        fixed = torch.tensor(
            [row["differences"] for row in report["held"] if row["place"] == place]
        )
        fixed = fixed.double().mean(0)
        found.append(
            {
                "place": place,
                "own": [row["cosine"] for row in rows],
                "each": each.tolist(),
                "mean": float(cosine_similarity(mean, truth, dim=0)),
                "relative_error": float((mean - truth).norm() / truth.norm()),
                "noise_of_differences": float(errors.norm() / truth.norm()),
                "held": float(cosine_similarity(fixed, truth, dim=0)),
                "held_error": float((fixed - truth).norm() / truth.norm()),
            }
        )
    return found


def table(report: Mapping[str, Any]) -> str:
    """How the gradients agree."""
    rows = []
    for one in agreement(report):
        own, each = (f"{min(one[key]):.3f} to {max(one[key]):.3f}" for key in ("own", "each"))
        error = f"{one['relative_error']:.2f}"
        noise = f"{one['noise_of_differences']:.2f}"
        fixed = f"{one['held']:.3f}, {one['held_error']:.2f}"
        rows.append([one["place"], own, each, f"{one['mean']:.3f}", error, noise, fixed])
    head = [
        "at",
        "cosine, same seed",
        "to the mean of differences",
        "of both means",
        "error of the mean",
        "standard error of the differences",
        "agent held fixed: cosine, error",
    ]
    return markdown(head, rows)


def race(report: Mapping[str, Any]) -> str:
    """Value at equal environment steps."""
    rows = []
    for method in GRID:
        runs = [run for run in report["runs"] if run["method"] == method]
        mean, width = mean_interval([run["values"] for run in runs])
        cells = [f"{m:.2f} ± {w:.2f}" for m, w in zip(mean, width, strict=True)]
        chosen = report["chosen"][method]
        rows.append([method, ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in chosen.items())])
        rows[-1] += cells
    first = [f"{report['start']:.2f}"] * len(BUDGETS)
    rows.append(["the start, untouched", "", *first])
    return markdown(["leader", "chosen", *(f"{b:,} steps" for b in BUDGETS)], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    results = Path(__file__).parent / "results"
    parser.add_argument("--figure", type=Path, help="PNG to draw of what is in the file")
    parser.add_argument("--out", type=Path, default=results / f"adaptation_{machine.today()}.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        **machine.header(f"python benchmarks/adaptation.py --seeds {options.seeds}", threads=1),
        "settings": {
            name: value
            for name, value in asdict(AdaptationConfig(springs=SPRINGS)).items()
            if name in ("follower", "springs", "temperature", "rounds", "first", "paths")
        },
        "seconds": 0.0,
        **{"gradients": [], "held": [], "tuning": [], "runs": []},
    }
    if options.out.exists():
        report = {**report, **json.loads(options.out.read_text())}
    began = time.perf_counter() - report["seconds"]

    def keep(part: str, row: dict[str, Any]) -> None:
        report[part].append(row)
        report["seconds"] = time.perf_counter() - began
        store(report, options.out)
        print(row, flush=True)

    def done(part: str, **which: Any) -> bool:
        return any(which.items() <= row.items() for row in report[part])

    if "start" not in report:
        costs = [judged(Place(start(SPRINGS)), 1000 + seed).mean() for seed in range(options.seeds)]
        report["start"] = float(torch.stack(costs).mean())
    for method, grid in GRID.items():
        for settings, seed in itertools.product(grid, TUNING):
            if not done("tuning", method=method, seed=seed, **settings):
                keep("tuning", led(method, seed, settings, BUDGETS[-1:]))
    report["chosen"] = {method: best(report["tuning"], method) for method in GRID}
    for seed, method in itertools.product(range(options.seeds), GRID):
        if not done("runs", method=method, seed=seed):
            keep("runs", led(method, seed, report["chosen"][method], BUDGETS))
    for seed, (name, place) in itertools.product(range(options.seeds), places().items()):
        if not done("gradients", place=name, seed=seed):
            keep("gradients", {"place": name, **compared(place, seed)})
        if not done("held", place=name, seed=seed):
            keep("held", {"place": name, **held(place, seed)})
    store(report, options.out)
    print(table(report), race(report), sep="\n\n")
    if options.figure:
        figure(report, options.figure)
    return 0


def figure(report: Mapping[str, Any], path: Path) -> None:
    """The gradient at the arm's start, entry by entry, and the value of both leaders' designs."""
    from birl_ext.runs import plots

    with plots.style():
        drawn, (left, right) = plots.new_figure(1, 2)
        rows = [row for row in report["gradients"] if row["place"] == next(iter(places()))]
        for place, (key, label) in enumerate(
            (("gradient", "hyper-gradient"), ("differences", "differences"))
        ):
            mean, width = mean_interval([row[key] for row in rows])
            where = torch.arange(len(mean)) + 0.3 * place - 0.15
            left.errorbar(where, mean, width, fmt="o", markersize=4, label=label)
        left.set_xticks(
            range(len(mean)),
            [*NAMES, *(f"spring {j + 1}" for j in range(len(mean) - len(NAMES)))],
            rotation=60,
            ha="right",
        )
        left.set(title="∂φ/∂x at the arm's start, 5 seeds", ylabel="∂φ/∂x")
        for method in GRID:
            runs = [run["values"] for run in report["runs"] if run["method"] == method]
            plots.draw_runs(right, [b / 1000 for b in BUDGETS], runs, label=method)
        plots.draw_references(right, {"untouched": report["start"]})
        right.set(title="Value at equal environment steps", ylabel="φ of the design")
        right.set_xlabel("environment steps, thousands")
        left.legend()
        right.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
        plots.save(drawn, path.with_suffix(""))
        path.with_suffix(".svg").unlink()


def best(tuning: list[dict[str, Any]], method: Method) -> dict[str, float]:
    """The settings of the lowest φ in the mean over the tuning seeds."""

    def mean(settings: dict[str, float]) -> float:
        rows = [
            row for row in tuning if row["method"] == method and settings.items() <= row.items()
        ]
        return sum(row["values"][-1] for row in rows) / len(rows)

    return min(GRID[method], key=mean)


if __name__ == "__main__":
    sys.exit(main())
