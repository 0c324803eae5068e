"""Draw problems, solve them every way, compare with 512-bit arithmetic: `checks.py` says what.

    python tests/properties/run.py --seeds 0:20000 --out report.json
    python tests/properties/run.py --seeds 1234

A seed is a problem or a batch of them. Exit code 1 if anything failed; every failure is printed
with the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, [HERE, HERE.parent, HERE.parents[1] / "benchmarks"])
COMMAND = "python tests/properties/run.py"
SHOWN = 5  # failures of one kind that are printed


def seeds(text: str) -> list[int]:
    """`3`, `0:20`, or several of them with commas."""
    found: list[int] = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        found += range(int(first), int(last)) if colon else [int(first)]
    return found


def checked(seed: int) -> Any:
    """In a worker."""
    import checks
    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    outcome = checks.check(seed)
    return outcome, time.perf_counter() - started


def outcomes(chosen: list[int], jobs: int) -> Iterator[Any]:
    if jobs == 1:
        yield from map(checked, chosen)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(checked, chosen, chunksize=4)


def run(chosen: list[int], jobs: int, command: str) -> dict[str, Any]:
    """Check every seed, telling how far it is; the report."""
    import draw
    import torch
    from birl_bench import machine

    started = told = time.perf_counter()
    worst: dict[str, tuple[float, int]] = {}
    counts: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    failures: dict[str, list[dict[str, Any]]] = {}
    slowest = (0.0, -1)
    for done, (outcome, seconds) in enumerate(outcomes(chosen, jobs), 1):
        counts.update(outcome.counts)
        tried.update(outcome.tried)
        slowest = max(slowest, (seconds, outcome.seed))
        for name, ratio in outcome.worst.items():
            worst[name] = max(worst.get(name, (0.0, -1)), (ratio, outcome.seed))
        for kind, words in outcome.failures:
            known = failures.setdefault(kind, [])
            if outcome.seed in (one["seed"] for one in known):
                continue
            known.append({"seed": outcome.seed, "words": words})
            if len(known) <= SHOWN:
                print(f"{kind}: {words}\n  {draw.draw(outcome.seed)}")
                print(f"  again: {COMMAND} --seeds {outcome.seed}", flush=True)
        if time.perf_counter() - told > 10:
            told = time.perf_counter()
            failed = sum(map(len, failures.values()))
            print(f"{done} of {len(chosen)} seeds, {failed} failures", flush=True)
    return {
        **machine.header(command, torch.device("cpu"), jobs, quick=False),
        "commit": commit(),
        "seconds": round(time.perf_counter() - started, 1),
        "slowest": {"seed": slowest[1], "seconds": round(slowest[0], 2)},
        "seeds": len(chosen),
        "counts": dict(sorted(counts.items())),
        "promises": {
            kind: {
                "tried": times,
                "failed": len(failures.get(kind, ())),
                "worst": float(f"{worst[kind][0]:.3g}") if kind in worst else None,
                "seed": worst[kind][1] if kind in worst else None,
            }
            for kind, times in sorted(tried.items())
        },
        "failures": {kind: known for kind, known in sorted(failures.items())},
    }


def commit() -> str:
    """Of the checkout, with a mark if files differ from it; empty outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=HERE, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "HEAD") + changed


def summary(report: dict[str, Any]) -> Iterator[str]:
    """Lines for the terminal."""
    counts = report["counts"]
    yield (
        f"{report['seeds']} seeds, {counts.get('problems', 0)} problems in "
        f"{report['seconds']:.0f} s; slowest: seed {report['slowest']['seed']}, "
        f"{report['slowest']['seconds']:.1f} s"
    )
    kinds = (f"{name[5:]} {count}" for name, count in counts.items() if name.startswith("kind "))
    yield "drawn: " + ", ".join(kinds)
    yield "counted: " + ", ".join(
        f"{k} {v}" for k, v in counts.items() if not k.startswith("kind ")
    )
    yield "worst error over what is allowed, and how often that was compared:"
    for name, one in report["promises"].items():
        worst = "" if one["worst"] is None else f"{one['worst']:.3g} (seed {one['seed']}), "
        yield f"  {name}: {worst}{one['tried']} times"
    for kind, known in report["failures"].items():
        some = ", ".join(str(one["seed"]) for one in known[:SHOWN])
        yield f"FAILED {kind}: {len(known)} seeds, {some}"
    if not report["failures"]:
        yield "nothing failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=seeds, default="0:800", help="a:b, or one, or a,b,c")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    command = " ".join([COMMAND, *sys.argv[1:]])
    report = run(chosen.seeds, min(chosen.jobs, len(chosen.seeds)), command)
    for line in summary(report):
        print(line)
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
