"""How high do the exact-gradient methods climb in Configurable Four Rooms?

Nine rows (temperature λ, price κ) by five methods: the metric is the upper value of the best
weights in the planner's model, solved to rounding, mean over the two goals. Published entries
(Thoma et al., NeurIPS 2024, Table 1) are means over ten seeds of the same metric, averaged over the
last 1,000 of 10,000 outer steps.

    python benchmarks/four_rooms_table.py [--rows 0.003/3 …] [--methods combined …]
        [--budget quick|default|wide] [--seeds N] [--out FILE]

Every finished run is written at once, and a run that the file already holds is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from birl_bench.machine import header, today
from birl_bench.report import store
from birl_bench.report import table as markdown

from birl_ext.problems.four_rooms import PUBLISHED, FourRoomsConfig, FourRoomsJob, Method

BATCH = ("starts", "combined")
BUDGETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "quick": ({"steps": 300, "learning_rate": 0.1}, {"starts": 32, "steps": 100}),
    "default": ({"steps": 1000, "learning_rate": 0.1}, {}),
    "wide": ({"steps": 3000, "learning_rate": 0.1}, {"starts": 512, "steps": 600}),
}
"""Settings of the methods with one start, and of those with many, which differ from the defaults
of FourRoomsConfig: a single start needs more and smaller steps, and they cost it little."""
KEY = ("temperature", "kappa", "method", "seed", "budget")


def measure(config: FourRoomsConfig, budget: str) -> dict[str, Any]:
    """Run a job to its end; seconds include building it and certifying the result."""
    wall, processor = time.perf_counter(), time.process_time()
    job = FourRoomsJob(config)
    while not job.done:
        job.step()
    summary = job.summary()
    return {
        **dataclasses.asdict(config),
        "budget": budget,
        **{name: value for name, value in summary.items() if isinstance(value, float)},
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "weights": [round(x, 4) for x in summary["parameters"]["weights"].tolist()],
    }


def table(report: dict[str, Any], budget: str = "default") -> str:
    """Markdown of a budget: no incentive, published entries, our methods' means over the seeds."""
    ran = {row["method"] for row in report["rows"] if row["budget"] == budget}
    names = {"gradient": "plain gradient", "combined": "combined"}
    shown = {method: name for method, name in names.items() if method in ran}
    published = [name for name in report["published"][0] if name not in ("temperature", "kappa")]
    head = ["λ", "κ", "no incentive", *published, *shown.values(), "bound on the error"]
    lines = []
    for known in report["published"]:
        key = known["temperature"], known["kappa"], budget
        rows = [r for r in report["rows"] if (r["temperature"], r["kappa"], r["budget"]) == key]
        runs = {method: [r for r in rows if r["method"] == method] for method in shown}
        if not shown or not all(runs.values()):
            continue
        means = {method: fmean(run["objective"] for run in some) for method, some in runs.items()}
        lines.append(
            [
                *(f"{number:g}" for number in key[:2]),
                f"{rows[0]['no_incentive']:.3f}",
                *(f"{known[name]:.2f}" for name in published),
                *(
                    f"**{x:.3f}**" if name == "combined" else f"{x:.3f}"
                    for name, x in means.items()
                ),
                f"{max(run['error_bound'] for run in list(runs.values())[-1]):.0e}",
            ]
        )
    return markdown(head, lines) + "\n"


def main() -> None:
    rows = [f"{temperature:g}/{kappa:g}" for temperature, kappa in PUBLISHED]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="λ/κ")
    parser.add_argument("--methods", nargs="+", choices=get_args(Method), default=get_args(Method))
    parser.add_argument("--budget", choices=BUDGETS, default="default")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … per row and method")
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / f"four_rooms_{today()}.json")
    options = parser.parse_args()

    settings = [word for word in sys.argv[1:] if word not in ("--out", str(options.out))]
    command = shlex.join(["python", "benchmarks/four_rooms_table.py", *settings])
    report: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        **header(command),
        "commands": [],
        "published": [
            {"temperature": t, "kappa": k, **known} for (t, k), known in PUBLISHED.items()
        ],
        "rows": [],
    }
    if options.out.exists():
        report = json.loads(options.out.read_text())
    report["commands"].append(command)
    held = {tuple(entry[name] for name in KEY) for entry in report["rows"]}
    for row in options.rows:
        temperature, kappa = map(float, row.split("/"))
        for method in options.methods:
            for seed in range(options.seeds):
                chosen = BUDGETS[options.budget][method in BATCH]
                config = FourRoomsConfig(temperature, kappa, method=method, seed=seed, **chosen)
                if (temperature, kappa, method, seed, options.budget) in held:
                    continue
                entry = measure(config, options.budget)
                report["rows"].append(entry)
                store(report, options.out)
                print(
                    f"λ {temperature:g}  κ {kappa:g}  {method:12} seed {seed}  "
                    f"value {entry['objective']:.4f} ± {entry['error_bound']:.0e}  "
                    f"{entry['processor_seconds']:.1f} s",
                    flush=True,
                )
    print(f"\nBudget {options.budget}\n\n{table(report, options.budget)}")


if __name__ == "__main__":
    main()
