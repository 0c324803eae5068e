"""Every CPU benchmark, one after the other: JSON and a Markdown table.

    python benchmarks/run_all.py [--threads 2] [--only NAME …] [--small] [--out FILE]

Without --out the results go to benchmarks/results/cpu_DATE.json and .md. The exit status is 1 if an
answer of ours was wrong. --small tries the benchmarks themselves on toy sizes, in seconds.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch

NAMES = ("tiny_call", "small_batch", "micro_batch", "dense", "float32_truth")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else arguments
    report = harness.header(shlex.join(["python", "benchmarks/run_all.py", *_without_paths(given)]))
    report["cases"] = cases = []
    for name in options.only:
        start = time.perf_counter()
        cases += importlib.import_module(f"bench_{name}").run(options.small)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    default = Path(__file__).parent / "results" / f"cpu_{report['date']}.json"
    harness.write(report, options.out or default)
    print(harness.markdown(report))
    wrong = [case["case"] for case in cases if _ours_failed(case)]
    if wrong:
        print(f"wrong answers of birl_ext in: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _ours_failed(case: dict[str, Any]) -> bool:
    return case["rows"][0]["status"] != "timed"


def _without_paths(arguments: list[str]) -> list[str]:
    """The command as published: where the results went is nobody's business."""
    kept = list(arguments)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept


if __name__ == "__main__":
    sys.exit(main())
