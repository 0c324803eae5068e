"""Puts what gpu_check.sh saw into one JSON file and prints its table.

    python benchmarks/gpu_report.py --steps steps.tsv --logs DIR --suite DIR --out DIR

The file is gpu_DATE_DEVICE.json: device, driver, versions, every step with the end of its log where
it failed, and the report of the benchmarks, as far as they got.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import markdown, store

TAIL = 30
"""Lines of the log of a step that failed."""


def steps(table: Path, logs: Path) -> list[dict[str, Any]]:
    """What happened, from the lines that the shell wrote."""
    found = []
    for line in table.read_text().splitlines():
        name, status, seconds, remark = line.split("\t")
        entry = {"step": name, "status": status, "seconds": int(seconds), "remark": remark}
        log = logs / (re.sub(r"[^a-zA-Z0-9]", "_", name) + ".log")
        if status not in ("ok", "skipped") and log.exists():
            text = log.read_text(errors="replace").replace(str(logs), "LOGS")
            entry["log"] = text.splitlines()[-TAIL:]
        found.append(entry)
    return found


def driver() -> str:
    """The driver's version as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("steps", "logs", "suite", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = machine.header("bash benchmarks/gpu_check.sh", device)
    suites = sorted(options.suite.glob("*.json")) if options.suite.is_dir() else []
    suite = json.loads(suites[-1].read_text()) if suites else None
    report = {**header, "driver": driver(), "steps": steps(options.steps, options.logs)}
    report["suite"] = suite
    name = slug(header["device"].split(",")[0])
    target = options.out / f"gpu_{header['date']}_{name}.json"
    store(report, target)
    if suite is not None:
        target.with_suffix(".md").write_text(markdown(suite))
        print(markdown(suite))
    print(f"\n{header['device']}, driver {report['driver']}, torch {torch.__version__}")
    width = max((len(entry["step"]) for entry in report["steps"]), default=0)
    for entry in report["steps"]:
        seconds = f"{entry['seconds']:>4} s"
        print(f"  {entry['step']:<{width}}  {entry['status']:<9} {seconds}  {entry['remark']}")
    print(target.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
