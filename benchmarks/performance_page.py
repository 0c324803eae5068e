"""Writes the tables of docs/performance.md from constants and from stored results.

    python benchmarks/performance_page.py [--write]

Without --write it prints the tables. Nothing in them is typed by hand: floors come from
`benchmarks/birl_bench/floors.py`, times from the files in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from birl_bench import floors
from birl_bench.report import digits, table
from birl_bench.requirements import judge

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
CACHED = ("small batch", "micro batch", "kernel only, small", "kernel only, micro")
"""Cases whose single MDPs stay in a core's cache from one pass to the next."""


def stored(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of every stored run of a device kind, oldest first; no trials."""
    found = [
        (path.stem, json.loads(path.read_text()))
        for path in sorted(RESULTS.glob(f"{kind}_*"))
        if path.suffix == ".json"
    ]
    return [(name, report) for name, report in found if not report.get("quick")]


def tables() -> dict[str, str]:
    """Name of each part of the page → its text."""
    return {
        "kernels": floors.kernels(),
        "floors of an H200": floors.predictions(floors.H200),
        "floors of an H100": floors.predictions(floors.H100),
        "requirements": requirements(stored("cpu")),
        "predictions": predictions(stored("cpu")),
        "gpu": gpu(stored("gpu")),
    }


def requirements(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What is claimed today, of the last run that measured every case."""
    whole = [(name, run) for name, run in runs if run.get("requirements")]
    if not whole:
        return "No stored run has measured them yet."
    name, run = whole[-1]
    cells = (
        (one["case"], one["claim"], one["wanted"], digits(one["measured"]), one["verdict"])
        for one in judge(run["cases"], "cpu")
    )
    head = "case", "claim", "wanted", "measured", ""
    return f"From `benchmarks/results/{name}.json`:\n\n{table(head, cells)}"


def predictions(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Bytes, operations, floor and outcome of ours, by the last run that measured the ceilings."""
    measured = [(name, run) for name, run in runs if run.get("ceilings")]
    if not measured:
        return "No stored run has measured the ceilings yet."
    name, run = measured[-1]
    rates = run["ceilings"]["gigabytes_per_second"]
    head = ["case", "MB a pass", "million operations", "floor of a pass, ms", "passes"]
    head += ["predicted, ms", "measured, ms", "measured/predicted"]
    rows = []
    for case in run["cases"]:
        ours: dict[str, Any] = next((row for row in case["rows"] if row["key"] == "ours"), {})
        if ours.get("status") != "timed" or not ours.get("passes") or "cold" not in ours:
            continue
        predicted = _predicted(case, float(ours["passes"]), rates)
        took = ours["cold"]["median"]
        numbers = (
            case["bytes_of_pass"] / 1e6,
            case["operations_of_pass"] / 1e6,
            case["floor_milliseconds"],
            ours["passes"],
            predicted,
            took,
            took / predicted,
        )
        rows.append([case["case"], *map(digits, numbers)])
    memory = digits(rates["memory"])
    return f"From `benchmarks/results/{name}.json`; memory {memory} GB/s.\n\n{table(head, rows)}"


def _predicted(case: Mapping[str, Any], passes: float, rates: Mapping[str, float]) -> float:
    """Milliseconds: one pass from memory, the others from the level that P stays in."""
    size = 1e-6 * case["bytes_of_pass"]
    cached = case["case"].startswith(CACHED)
    # a problem beyond the private caches comes from wherever a buffer of its size came from
    again = rates.get("L2") if cached else case["read_gigabytes_per_second"]["this size again"]
    return float(size / rates["memory"] + max(passes - 1, 0) * size / (again or rates["memory"]))


def gpu(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What ran on a GPU, or that nothing has."""
    if not runs:
        return "Not measured on a GPU yet: everything above is a prediction."
    name, run = runs[-1]
    rows = (
        (case["case"], *(digits((ours.get(how) or {}).get("median")) for how in ("cold", "queued")))
        for case in (run.get("suite") or {}).get("cases", ())
        if (ours := case["rows"][0]).get("cold")
    )
    found = table(("case", "ms, cold", "ms, queued"), rows)
    return f"From `benchmarks/results/{name}.json`, {run['device']}:\n\n{found}"


def filled(text: str, parts: Mapping[str, str]) -> str:
    """The page with every part between its two comments replaced."""
    for name, part in parts.items():
        pattern = re.compile(
            rf"(^<!-- {re.escape(name)}: .*-->\n).*?(^<!-- end of {re.escape(name)} -->$)",
            re.M | re.S,
        )
        if not pattern.search(text):
            raise ValueError(f"{PAGE.name} has no part {name!r}")

        def put(found: re.Match[str], part: str = part) -> str:
            return f"{found[1]}{part}\n{found[2]}"

        text = pattern.sub(put, text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace them in docs/performance.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(), tables()))
        return
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main()
