"""How far is each estimator of the hyper-gradient from the exact one, on Four Rooms?

    python benchmarks/estimator_bias.py [--quick] [--out FILE] [--figure FILE]

Goal A, λ = 0.005, κ = 5, samples under the planner's moves, paths of 200 steps. At two points: a
random start, and the same after 50 steps of Adam on the exact hyper-gradient. Each estimator draws
10, 30 and 100 paths an estimate. Critics that are kept from step to step have five estimates to
warm up. The follower is the soft-optimal one, unless "learned" says otherwise; the oracle knows ∇A
and the upper level's A, and draws only the states. For each: the root mean square of
‖∇φ̂ − ∇φ‖/‖∇φ‖ and the mean cosine of single estimates, and the error of their mean with its
standard error, from 10 estimates: bias, if it is well above that.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import digits, store
from birl_bench.report import table as markdown
from torch import Tensor

from birl_ext.bilevel import MSoBiRL
from birl_ext.bilevel.bias_meter import measure_estimator
from birl_ext.bilevel.rivals.bchg import BCHG
from birl_ext.bilevel.rivals.hpgd import HPGD
from birl_ext.bilevel.rivals.sampled_zero_order import SampledZeroOrder
from birl_ext.bilevel.score import OneStep
from birl_ext.bilevel.stoc_sobirl import Effort, StocSoBiRLDescent
from birl_ext.bilevel.trajectory import additive_surrogate
from birl_ext.problems.four_rooms import DISCOUNT
from birl_ext.problems.sampled_four_rooms import SampledFourRooms, sampled_four_rooms
from birl_ext.simulators.finite import FiniteFollower

TEMPERATURE, KAPPA, STEPS = 0.005, 5.0, 200
PATHS = (10, 30, 100)
ESTIMATES, WARM, LATER = 10, 5, 50

Build = Callable[[SampledFourRooms, Tensor, int], Callable[[], Tensor]]
"""(problem, x, paths) → one estimate of ∇φ at x."""


def by(method: Callable[..., Any], *, learned: bool = False, **options: Any) -> Build:
    """Any method that descends along `hypergradient()` from a batch of paths."""

    def build(four: SampledFourRooms, x: Tensor, paths: int) -> Callable[[], Tensor]:
        given = {name: one(four, paths) if callable(one) else one for name, one in options.items()}
        algorithm = method(
            four.problem,
            four.simulator,
            x,
            discount=DISCOUNT,
            temperature=TEMPERATURE,
            optimiser=torch.optim.SGD,
            follower=None if learned else four.follower,
            **given,
        )
        return lambda: algorithm.hypergradient()[1]

    return build


def stoc(horizon: int, sweeps: int, credit: str, learned: bool = False) -> Build:
    return by(
        StocSoBiRLDescent,
        effort=lambda _, paths: Effort(paths, horizon, sweeps),
        credit=credit,
        learned=learned,
    )


def rival(method: Callable[..., Any], **options: Any) -> Build:
    return by(method, batch=lambda _, paths: paths, **options)


def process(four: SampledFourRooms, _: int) -> Any:
    """What the oracle knows."""
    return four.exact.lower(torch.zeros(105, dtype=torch.float64)).to_dense()


def one_step(four: SampledFourRooms, x: Tensor, paths: int) -> Callable[[], Tensor]:
    """The score is ∇r(s, a) − E_π∇r(s, ·), to go."""
    own, score = x.clone().requires_grad_(), OneStep(actions=4)
    follower = FiniteFollower(four.follower(x, TEMPERATURE))

    def estimate() -> Tensor:
        assert four.problem.cost is not None
        reward, cost = four.problem.reward(own), four.problem.cost(own)
        path = four.simulator.rollout(follower, paths, STEPS)
        surrogate = additive_surrogate(
            cost[path.observation, path.action] * path.present,
            score.each(lambda s, a: reward[s, a], follower, *path),
            temperature=TEMPERATURE,
            discount=DISCOUNT,
        )
        return torch.autograd.grad(surrogate, own)[0]

    return estimate


ESTIMATORS: dict[str, Build] = {
    "OneStep": one_step,
    **{f"FullHorizon, K = {k}": stoc(k, 1, "to go") for k in (1, 5, 20)},
    "Stoc-SoBiRL, critic": stoc(20, 100, "critic"),
    "Stoc-SoBiRL, to go, learned": stoc(20, 100, "to go", learned=True),
    "Stoc-SoBiRL, critic, learned": stoc(20, 100, "critic", learned=True),
    "HPGD, on-policy": rival(HPGD),
    "HPGD, uniform": rival(HPGD, sampling="uniform"),
    "HPGD, on-policy, SARSA": rival(HPGD, critic="sarsa"),
    "HPGD, oracle": rival(HPGD, sampling="oracle", model=process),
    "BC-HG": rival(BCHG),
    "zero order": rival(SampledZeroOrder, radius=1.0),
}
"""Another estimator is another line; the slowest draw continuations of 20 steps."""


def points(four: SampledFourRooms) -> dict[str, Tensor]:
    """Where the estimates are made."""
    start = four.start(4, torch.Generator().manual_seed(0))[1]
    leader = MSoBiRL(
        four.exact,
        start,
        temperature=TEMPERATURE,
        optimiser=partial(torch.optim.Adam, lr=0.1),
    )
    leader.run(LATER, progress=False)
    return {"start": start, f"after {LATER} steps": leader.x.detach().clone()}


def measured(
    four: SampledFourRooms, x: Tensor, build: Build, paths: int, quick: bool
) -> dict[str, float]:
    leaf = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(four.exact.objective(leaf, TEMPERATURE), leaf)
    began = time.process_time()
    estimate = build(four, x, paths)
    if build is not one_step and not quick:
        for _ in range(WARM):
            estimate()
    before, cosines = four.simulator.samples, []

    def watched() -> Tensor:
        found = estimate()
        cosines.append(float(torch.nn.functional.cosine_similarity(found, exact, dim=0)))
        return found

    repetitions = 2 if quick else ESTIMATES
    report = measure_estimator(watched, exact, repetitions=repetitions)
    bias_square = max(0.0, report.relative_error**2 - report.noise**2)
    return {
        "paths": paths,
        "samples": (four.simulator.samples - before) / repetitions,
        "error": (bias_square + report.variance) ** 0.5,
        "of_mean": report.relative_error,
        "noise": report.noise,
        "cosine": sum(cosines) / repetitions,
        "cosine_of_mean": report.cosine,
        "seconds": time.process_time() - began,
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a line for each estimator and point."""
    head = ["at", "estimator", "transitions, 100 paths"]
    head += [f"error, {paths} paths" for paths in PATHS]
    head += ["error of the mean, 100 paths", "cosine, 10 paths", "100 paths", "of the mean"]
    lines = []
    for row in report["rows"]:
        few, many = row["found"][0], row["found"][-1]
        lines.append(
            [
                row["point"],
                row["estimator"],
                digits(many["samples"]),
                *(digits(one["error"]) for one in row["found"]),
                f"{digits(many['of_mean'])} ± {digits(many['noise'])}",
                f"{few['cosine']:.2f}",
                f"{many['cosine']:.2f}",
                f"{many['cosine_of_mean']:.2f}",
            ]
        )
    return markdown(head, lines)


def figure(report: Mapping[str, Any], path: Path) -> None:
    """Error and cosine against the transitions that an estimate draws, at the later point."""
    from birl_ext.runs import plots

    rows = [row for row in report["rows"] if row["point"] != "start"]
    palette = (
        *plots.COLOURS,
        plots.MUTED,
        "#000000",
        "#8c564b",
        "#7f7f00",
        "#9467bd",
        "#1f3b73",
        "#b22222",
    )
    colours = [palette[i % len(palette)] for i in range(len(rows))]
    with plots.style():
        drawn, panels = plots.new_figure(1, 2, size=(11, 4.6))
        for row, colour in zip(rows, colours, strict=True):
            for key, axes in zip(("error", "cosine"), panels, strict=True):
                axes.plot(
                    [one["samples"] for one in row["found"]],
                    [one[key] for one in row["found"]],
                    marker="o",
                    markersize=3.5,
                    color=colour,
                    label=row["estimator"],
                )
        for axes in panels:
            axes.set_xscale("log")
            axes.set_xlabel("transitions drawn for one estimate")
        panels[0].set_yscale("log")
        panels[0].set_ylabel("relative error, root mean square")
        panels[1].set_ylabel("cosine with ∇φ, mean")
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
        drawn.savefig(path, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ten paths, two estimates: a trial")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    four = sampled_four_rooms(TEMPERATURE, KAPPA, steps=STEPS)
    for point, x in points(four).items():
        for seed, (name, build) in enumerate(ESTIMATORS.items()):
            found = []
            for paths in PATHS[: 1 if options.quick else None]:
                four.simulator.generator.manual_seed(seed)
                found.append(measured(four, x, build, paths, options.quick))
            rows.append({"point": point, "estimator": name, "found": found})
            seconds = sum(one["seconds"] for one in found)
            last = found[-1]
            print(
                f"{point}, {name}: {seconds:.0f} s, error {last['error']:.3g}, of the mean "
                f"{last['of_mean']:.3g} ± {last['noise']:.2g}, cosine {last['cosine']:.2f}",
                flush=True,
            )
    report = {
        **machine.header("python benchmarks/estimator_bias.py", quick=options.quick),
        "seconds": time.perf_counter() - began,
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
