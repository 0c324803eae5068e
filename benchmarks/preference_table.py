"""What does each way of learning a reward from preferences reach: φ, true return, labels?

SoBiRL, Stoc-SoBiRL, DRLHF and Meta-Reward-Net on CartPole and on the gridworld, there with a table
as the reward and with 8 knobs, which an upper level that judges behaviour is for; paired by seed:
the same environment seeds, first networks and teacher. φ is the cross entropy of the last reward
over new answers about the behaviour of the last policy, which nothing learned from. Labels are
counted until the first evaluation (greedy episodes on the true reward) that passes; a run that
never does counts with its whole budget, which is a lower bound, for both algorithms of a pair.
Beside it, because one lucky evaluation can pass: the true return, averaged over all evaluations.

    python benchmarks/preference_table.py [--tasks …] [--teachers …] [--algorithms …] [--seeds N]
        [--workers N] [--out FILE] [--figure FILE]

Every finished run is written at once, and a run that the file already holds is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from birl_bench.machine import header, today
from birl_bench.report import store
from birl_bench.report import table as markdown

from birl_ext.preferences.teachers import TEACHERS
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.runs.config import from_plain, read_toml
from birl_ext.runs.intervals import mean_interval

ALGORITHMS: dict[str, dict[str, Any]] = {
    "sobirl": {"algorithm": "sobirl"},
    "stoc-sobirl": {"algorithm": "stoc-sobirl", "reward_steps": 1},
    "mrn": {"algorithm": "mrn"},
    "drlhf": {"algorithm": "drlhf"},
    "critic": {"upper": "critic", "score": "exact", "cool_from": 50.0, "reward_rate": 0.1},
}
"""Of each candidate, what differs."""
TASKS = ("gridworld", "gridworld-8", "cartpole")
CANDIDATES = {
    "gridworld": ("sobirl", "stoc-sobirl", "mrn", "drlhf"),
    "gridworld-8": tuple(ALGORITHMS),
    "cartpole": ("sobirl", "stoc-sobirl", "mrn", "drlhf"),
}
ASKED = {"cartpole": ("oracle", "mistake", "noisy")}
"""Of a task, the teachers, if not all."""
EXAMPLES = Path(__file__).parents[1] / "examples" / "preference"
NAMES = {
    "sobirl": "SoBiRL",
    "stoc-sobirl": "Stoc-SoBiRL",
    "mrn": "MRN",
    "drlhf": "DRLHF",
    "critic": "a table judges",
}
MEASURED = 500
"""New answers that φ is measured by."""
KEY = ("task", "teacher", "algorithm", "seed")


def settings(task: str) -> dict[str, Any]:
    """What the example of that name holds; of gridworld-8, with a reward of 8 knobs."""
    name, _, knobs = task.partition("-")
    found: dict[str, Any] = read_toml(EXAMPLES / f"{name}.toml")["config"]
    return {**found, "keep_best": False, **({"reward_features": int(knobs)} if knobs else {})}


def measure(task: str, teacher: str, algorithm: str, seed: int) -> dict[str, Any]:
    """One run to its end."""
    from birl_ext.problems.preference.job import PreferenceJob

    torch.set_num_threads(1)
    plain = {**settings(task), "teacher": teacher, "seed": seed, **ALGORITHMS[algorithm]}
    start = time.process_time()
    job = PreferenceJob(from_plain(PreferenceConfig, plain))
    rows = []
    while not job.done:
        rows.append(job.step())
    judged = [row for row in rows if "true_return" in row]
    summary = job.summary()
    return {
        **dict(zip(KEY, (task, teacher, algorithm, seed), strict=True)),
        "labels_to_threshold": summary["labels_to_threshold"],
        "labels": [int(row["labels"]) for row in judged],
        "true_return": [round(row["true_return"], 2) for row in judged],
        "phi": round(objective(job), 4),
        "indirect_share": round(statistics.fmean(r.get("indirect_share", 0.0) for r in rows), 3),
        "processor_seconds": round(time.process_time() - start, 1),
    }


def objective(job: Any) -> float:
    """φ of the last reward at the last policy, by new answers of the same teacher."""
    from birl_ext.preferences.fit import evaluate
    from birl_ext.preferences.fragments import Pairs, draw
    from birl_ext.problems.preference.recorder import Recorder
    from birl_ext.rollouts.collect import Collector

    config, drawn = job.config, torch.Generator().manual_seed(job.config.seed)
    seen = Recorder(config.environments, keep=config.recent)
    with job._make_environments(config.environments, config.seed + MEASURED) as own:
        source = Collector(own, job.agent, seed=config.seed)
        for _ in range(config.recent // config.environments):
            seen.record(source.collect(1))
    first, second = (draw(seen.episodes(), config.fragment, MEASURED, drawn) for _ in range(2))
    label = job.teacher(first, second)
    known = Pairs(first, second, label).select(~label.isnan())
    return evaluate(job.reward, known).loss


def needed(run: dict[str, Any]) -> int:
    """Labels until the threshold, or all there were."""
    reached = run["labels_to_threshold"]
    return int(run["labels"][-1] if reached is None else reached)


def level(run: dict[str, Any]) -> float:
    """True return, mean over the evaluations."""
    return statistics.fmean(run["true_return"])


def interval(values: Sequence[float], digits: int = 0) -> str:
    """Mean and the half-width of its 95 % interval (Student's t)."""
    if not values:
        return "–"
    mean, half = map(float, mean_interval(values))
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def pairs(
    runs: Iterable[dict[str, Any]], algorithm: str, value: Callable[[dict[str, Any]], float]
) -> list[float]:
    """value(algorithm) − value(DRLHF) of each seed, mean over the teachers that both have.

    Seeds are what is independent: the runs of one seed share environments and first networks,
    whoever the teacher is.
    """
    found = {(run["teacher"], run["seed"], run["algorithm"]): value(run) for run in runs}
    gaps: dict[int, list[float]] = {}
    for teacher, seed, name in found:
        if name == algorithm and (teacher, seed, "drlhf") in found:
            gap = found[teacher, seed, algorithm] - found[teacher, seed, "drlhf"]
            gaps.setdefault(seed, []).append(gap)
    return [statistics.fmean(gap) for gap in gaps.values()]


def table(report: dict[str, Any], task: str) -> str:
    """Markdown of one task: φ, labels until the threshold, and paired differences to DRLHF."""
    runs = [run for run in report["runs"] if run["task"] == task]
    held = [name for name in ALGORITHMS if any(run["algorithm"] == name for run in runs)]
    rivals = [name for name in held if name != "drlhf"]
    head = [
        "teacher",
        *(f"{NAMES[name]}: φ" for name in held),
        *(f"{NAMES[name]}: labels (passed)" for name in held),
        *(f"{NAMES[name]} − DRLHF: φ" for name in rivals),
        *(f"{NAMES[name]} − DRLHF: return" for name in rivals),
    ]
    lines = []
    for teacher in [*TEACHERS, None]:
        rows = [run for run in runs if teacher in (None, run["teacher"])]
        if not rows:
            continue
        cells = [teacher or "**all**"]
        own = {name: [run for run in rows if run["algorithm"] == name] for name in held}
        cells += [f"{statistics.fmean(r['phi'] for r in own[name]):.2f}" for name in held]
        for name in held:
            passed = sum(run["labels_to_threshold"] is not None for run in own[name])
            mean = f"{statistics.fmean(map(needed, own[name])):.0f}" if own[name] else "–"
            cells.append(f"{mean} ({passed} of {len(own[name])})")
        cells += [interval(pairs(rows, name, lambda run: run["phi"]), 2) for name in rivals]
        cells += [interval(pairs(rows, name, level), 1) for name in rivals]
        lines.append(cells)
    return markdown(head, lines)


def figure(report: dict[str, Any], path: Path) -> None:
    """True return against labels: mean over teachers, then over seeds, which the bands are of."""
    from birl_ext.runs import plots

    tasks = [task for task in TASKS if any(run["task"] == task for run in report["runs"])]
    with plots.style():
        drawn, axes = plots.new_figure(1, len(tasks), size=(4.6 * len(tasks), 3.8), squeeze=False)
        for panel, task in zip(axes[0], tasks, strict=True):
            for name, colour in zip(ALGORITHMS, plots.COLOURS, strict=False):
                own = [r for r in report["runs"] if (r["task"], r["algorithm"]) == (task, name)]
                if not own:
                    continue
                seeds = sorted({run["seed"] for run in own})
                curves = [
                    torch.tensor([r["true_return"] for r in own if r["seed"] == seed]).mean(0)
                    for seed in seeds
                ]
                labels = own[0]["labels"]
                plots.draw_runs(
                    panel, labels, torch.stack(curves), label=NAMES[name], colour=colour
                )
            plots.draw_references(panel, {"threshold": report["thresholds"][task]})
            panel.set_title(task)
            panel.set_xlabel("labels asked for")
            panel.set_ylabel("true return")
            panel.legend()
        drawn.savefig(path, metadata={"Software": None})


def thresholds() -> dict[str, float]:
    from birl_ext.problems.preference.gridworld import THRESHOLD

    return {task: settings(task).get("threshold", THRESHOLD) for task in TASKS}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--teachers", nargs="+", choices=list(TEACHERS))
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, … of each")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--figure", type=Path, help="PNG to draw of all runs in the file")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / f"preference_{today()}.json")
    options = parser.parse_args()

    report: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        **header("python benchmarks/preference_table.py", threads=1),
        "commands": [],
        "thresholds": thresholds(),
        "settings": {task: settings(task) for task in TASKS},
        "runs": [],
    }
    if options.out.exists():
        held_report = json.loads(options.out.read_text())
        for name in ("settings", "thresholds", "versions"):
            if held_report[name] != report[name]:
                parser.error(f"{options.out} holds runs with other {name}; choose another --out")
        report = held_report
    words = [word for word in sys.argv[1:] if word not in ("--out", str(options.out))]
    report["commands"].append(shlex.join(["python", "benchmarks/preference_table.py", *words]))
    held = {tuple(run[name] for name in KEY) for run in report["runs"]}
    open_runs = [
        key
        for task, seed in itertools.product(options.tasks, range(options.seeds))
        for teacher in options.teachers or ASKED.get(task, TEACHERS)
        for name in CANDIDATES[task]
        if name in (options.algorithms or ALGORITHMS)
        if (key := (task, teacher, name, seed)) not in held
    ]
    failed = 0
    with ProcessPoolExecutor(options.workers) as pool:
        for done in as_completed([pool.submit(measure, *key) for key in open_runs]):
            if (error := done.exception()) is not None:
                failed += 1
                print(f"failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            run = done.result()
            report["runs"].append(run)
            store(report, options.out)
            print(
                f"{run['task']:10} {run['teacher']:8} {run['algorithm']:12} seed {run['seed']}  "
                f"labels {needed(run):4}{'' if run['labels_to_threshold'] else '+'}  "
                f"φ {run['phi']:5.2f}  "
                f"last return {run['true_return'][-1]:6.1f}  {run['processor_seconds']:5.1f} s",
                flush=True,
            )
    for task in options.tasks:
        print(f"\n{task}, threshold {report['thresholds'][task]:g}\n\n{table(report, task)}")
    if options.figure:
        figure(report, options.figure)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
