"""What have arenas found? Store their runs, with the machine and the command, and print the table.

    birl arena CONTEST [OPTIONS] --out RUN
    python benchmarks/arena.py RUN … [--out FILE] [--figure FILE]

Runs of one contest are put together, such as settings that were played apart; a RUN may also be a
file that was stored before. What is played again later in the list takes the place of the earlier.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from birl_bench.machine import header, today
from birl_bench.report import store
from birl_bench.report import table as markdown
from preference_table import ALGORITHMS, NAMES, TASKS, interval, needed

from birl_ext.arena import report as standings
from birl_ext.problems.contests import CONTESTS
from birl_ext.problems.saved import load_run

RESULTS = Path(__file__).parent / "results"


def stored(runs: list[Path]) -> dict[str, Any]:
    """The reported runs of some directories and files, which must be of one contest."""
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    contests, commands, seconds = set(), [], 0.0
    for path in runs:
        if path.is_file():
            before = json.loads(path.read_text())
            contests.add(before["contest"])
            commands.append(before["command"])
            seconds += 60 * before["minutes"]
            records |= {_entry(record): record for record in before["records"]}
            continue
        run = load_run(path, problem="arena")
        if run.summary is None:
            sys.exit(f"{path} is not finished: birl arena --resume {path}")
        own = run.directory.config
        contests.add(own["contest"])
        flags = [
            word
            for name, value in own.items()
            if name not in ("contest", "workers") and value != []
            for word in (f"--{name.replace('_', '-')}", *map(str, _words(value)))
        ]
        commands.append(shlex.join(["birl", "arena", own["contest"], *flags]))
        seconds += run.summary["seconds"]
        records |= {_entry(r): r for r in run.summary["records"] if r["phase"] == "play"}
    if len(contests) > 1:
        sys.exit(f"these are runs of {' and '.join(sorted(contests))}: store them apart")
    for record in records.values():
        record["values"] = record["values"] and [round(x, 9) for x in record["values"]]
        record["cost"] = [round(x, 3) for x in record["cost"]]
        record["curve"] = [[round(x, 6) for x in row] for row in record["curve"]]
        record["seconds"] = round(record["seconds"], 3)
    return {
        "question": "What does each bilevel method reach at an equal budget?",
        **header("; ".join(commands), threads=1),
        "contest": contests.pop(),
        "minutes": round(seconds / 60, 1),
        "records": list(records.values()),
    }


def _entry(record: dict[str, Any]) -> tuple[Any, ...]:
    return (*(record[name] for name in ("setting", "method", "switch")), *record["seeds"])


def _words(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def table(report: dict[str, Any]) -> str:
    """Markdown: as `birl arena` wrote it into the run's directory."""
    return standings.table(CONTESTS[report["contest"]], report["records"])


def preferences(report: dict[str, Any]) -> str:
    """Markdown of the stored study of preferences, which is not played again: each task and
    algorithm, the mean over its teachers, with an interval over the seeds, which are independent.
    """
    head = ["task", "algorithm", "φ", "labels", "processor s", "runs"]
    lines = []
    for task, name in itertools.product(TASKS, ALGORITHMS):
        own = [r for r in report["runs"] if (r["task"], r["algorithm"]) == (task, name)]
        if own:
            seeds = {r["seed"] for r in own}
            each = [fmean(r["phi"] for r in own if r["seed"] == seed) for seed in seeds]
            cells = [interval(each, 2).lstrip("+")]
            cells += [f"{fmean(map(needed, own)):.0f}"]
            cells += [f"{fmean(r['processor_seconds'] for r in own):.0f}", str(len(own))]
            lines.append([task, NAMES[name], *cells])
    return markdown(head, lines)


def figure(report: dict[str, Any], path: Path) -> None:
    """Values against cost."""
    from birl_ext.runs import plots

    with plots.style():
        drawn = standings.figures(CONTESTS[report["contest"]], report["records"])
        drawn.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = stored(options.runs)
    out = options.out or RESULTS / f"arena_{report['contest'].replace('-', '_')}_{today()}.json"
    store(report, out)
    print(table(report))
    if options.figure:
        figure(report, options.figure)


if __name__ == "__main__":
    main()
