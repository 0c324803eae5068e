"""How far do SoBiRL and DRLHF come on the paper's kind of tasks, within hours on two cores?

Hopper for 200,000 steps, three seeds, and BeamRider from pixels for 50,000, one seed: the published
configurations, with the changes that `CHANGES` names.

    python benchmarks/bodies_and_pixels.py [--tasks …] [--workers N] [--runs DIR] [--out FILE]
        [--figure FILE]

Every run is a directory of `birl run`: a finished one is not repeated, one that was cut goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from birl_bench import machine
from birl_bench.report import store
from birl_bench.report import table as markdown

from birl_ext.runs.intervals import mean_interval

EXAMPLES = Path(__file__).parents[1] / "examples" / "preference"
SEEDS = {"hopper": 3, "beamrider": 1}
CHANGES = {
    "hopper": "--rounds 40 --update-every 2 --batch-size 128 --video-every 0",
    "beamrider": "--rounds 25 --environment-steps 2000 --learning-starts 4000 "
    "--hypergradient-after 10000 --update-every 20 --replay 50000 --teacher oracle --labels 800 "
    "--initial-labels 200 --initial-epochs 8 --pairs 800 --recent 4000 --reward-steps 10 "
    "--evaluate-every 5 --evaluation-episodes 3 --video-every 0",
}
TASKS = {"hopper": "Hopper", "beamrider": "BeamRider"}
NAMES = {"sobirl": "SoBiRL", "drlhf": "DRLHF"}
NEWEST = 10
"""Rounds at the end of a run that φ and what was foretold are averaged over."""


def finish(task: str, algorithm: str, seed: int, runs: Path) -> dict[str, Any]:
    """One run to its end, wherever it stands, and what it recorded."""
    directory = runs / f"{task}-{algorithm}-{seed}"
    if not (directory / "summary.json").exists():
        if (directory / "config.toml").exists():
            words = ["--resume", str(directory)]
        else:
            given = [*CHANGES[task].split(), "--algorithm", algorithm, "--seed", str(seed)]
            words = ["--config", str(EXAMPLES / f"{task}.toml"), *given, "--out", str(directory)]
        print(f"{directory.name}: birl run {' '.join(words)}", flush=True)
        with (runs / f"{directory.name}.log").open("a") as log:
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "birl_ext", "run", *words]
            subprocess.run(command, check=True, stdout=log, stderr=log, env=alone)
    print(f"{directory.name}: done", flush=True)
    history = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    return {"task": task, "algorithm": algorithm, "seed": seed, **recorded(history)}


def recorded(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The curves of a run, and its time."""

    def column(name: str, digits: int) -> list[float | None]:
        found = (row.get(name) for row in history)
        return [None if x is None or math.isnan(x) else round(x, digits) for x in found]

    steps = [int(row["environment_steps"]) for row in history]
    each = steps[1] - steps[0]
    return {
        "environment_steps": steps,
        "answers": int(history[-1]["answers"]),
        "strict_answers": int(history[-1]["strict_answers"]),
        "true_return": column("true_return", 1),
        "training_return": column("training_return", 1),
        "phi": column("phi", 4),
        "foretold": column("foretold", 3),
        "indirect_share": column("indirect_share", 3),
        "hours": round(sum(each / r["environment_steps_per_second"] for r in history) / 3600, 2),
    }


def judged(run: Mapping[str, Any]) -> list[float]:
    """True return of each evaluation."""
    return [x for x in run["true_return"] if x is not None]


def latest(run: Mapping[str, Any], name: str) -> float:
    """Of the newest rounds, the mean."""
    return statistics.fmean(x for x in run[name][-NEWEST:] if x is not None)


def interval(values: Sequence[float], digits: int) -> str:
    mean, half = map(float, mean_interval(values))
    width = f" ± {half:.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{width}"


def table(report: Mapping[str, Any]) -> str:
    """Markdown: the ends of the runs."""
    rows = []
    for task, algorithm in itertools.product(SEEDS, NAMES):
        own = [r for r in report["runs"] if (r["task"], r["algorithm"]) == (task, algorithm)]
        if not own:
            continue
        ends = [judged(run) for run in own]
        cells = [
            interval([end[-1] for end in ends], 0),
            interval([max(end) for end in ends], 0),
            interval([latest(run, "phi") for run in own], 2),
            interval([latest(run, "foretold") for run in own], 2),
            ", ".join(f"{run['hours']:.1f}" for run in own),
        ]
        steps, answers = own[0]["environment_steps"][-1], own[0]["answers"]
        rows.append(
            [TASKS[task], NAMES[algorithm], str(len(own)), f"{steps:,}", f"{answers:,}", *cells]
        )
    head = ["task", "algorithm", "seeds", "steps", "answers", "last return", "best return"]
    return markdown([*head, "φ", "foretold", "hours"], rows)


def figure(report: Mapping[str, Any], path: Path) -> None:
    """True return and φ along the runs."""
    from birl_ext.runs import plots

    tasks = [task for task in SEEDS if any(run["task"] == task for run in report["runs"])]
    with plots.style():
        drawn, axes = plots.new_figure(len(tasks), 2, squeeze=False)
        for panels, task in zip(axes, tasks, strict=True):
            for algorithm, name in NAMES.items():
                own = [
                    r for r in report["runs"] if (r["task"], r["algorithm"]) == (task, algorithm)
                ]
                thousands = [steps / 1000 for steps in own[0]["environment_steps"]]
                seen = [k for k, x in enumerate(own[0]["true_return"]) if x is not None]
                returns, costs = [judged(run) for run in own], [smooth(run["phi"]) for run in own]
                plots.draw_runs(panels[0], [thousands[k] for k in seen], returns, label=name)
                plots.draw_runs(panels[1], thousands[-len(costs[0]) :], costs, label=name)
            for panel, label in zip(panels, ("true return", "φ of the new answers"), strict=True):
                panel.set(title=TASKS[task], xlabel="environment steps, thousands", ylabel=label)
                panel.legend()
        drawn.savefig(path, metadata={"Software": None})


def smooth(values: Sequence[float | None]) -> list[float]:
    """Means over the newest rounds at each but the first, which has no reward yet."""
    ends = range(2, len(values) + 1)
    newest = ([x for x in values[max(0, end - NEWEST) : end] if x is not None] for end in ends)
    return [statistics.fmean(some) for some in newest]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(SEEDS), default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--runs", type=Path, default=Path("runs/bodies_and_pixels"))
    parser.add_argument("--out", type=Path, help="JSON of the curves")
    parser.add_argument("--figure", type=Path, help="PNG of the curves")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    todo = [
        (task, algorithm, seed)
        for task in options.tasks
        for seed in range(SEEDS[task])
        for algorithm in NAMES
    ]
    with ThreadPoolExecutor(options.workers) as pool:
        runs = list(pool.map(lambda one: finish(*one, options.runs), todo))
    report = {
        **machine.header("python benchmarks/bodies_and_pixels.py", threads=1),
        "changes": CHANGES,
        "runs": runs,
    }
    print(table(report))
    if options.out:
        store(report, options.out)
    if options.figure:
        figure(report, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
