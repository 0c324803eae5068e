"""A study that repeats one measurement over seeds: the same three options, table and report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from birl_bench import machine
from birl_bench.report import store

__all__ = ["study"]


def study(
    script: str,
    question: str | None,
    measured: Callable[[int], Iterable[Mapping[str, Any]]],
    table: Callable[[Mapping[str, Any]], str],
    *,
    seeds: int,
) -> int:
    """Run a script's measurement on seeds 0, 1, …, by its command line; its exit status.

    Args:
        script: `__file__`.
        question: `__doc__`.
        measured: seed → rows of the report.
        table: report → what is printed.
        seeds: how many by default.
    """
    parser = argparse.ArgumentParser(description=(question or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[Mapping[str, Any]] = []
    for seed in range(options.seeds):
        rows += measured(seed)
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    print(table({"rows": rows}))
    if options.out:
        name = Path(script).name
        report = {
            **machine.header(f"python benchmarks/{name} --seeds {options.seeds}"),
            "seconds": time.perf_counter() - began,
            "seeds": options.seeds,
            "rows": rows,
        }
        store(report, options.out)
    return 0
