"""Runs the cases one after the other and keeps what is measured, whatever happens."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from birl_bench import machine, report, requirements
from birl_bench.harness import Plan
from birl_bench.rivals import torch_dense
from birl_ext.errors import ConfigError
from birl_ext.runs.device import check_device

__all__ = ["CASES", "ON_REQUEST", "question", "run"]

CASES = (
    "tiny_call",
    "small_batch",
    "micro_batch",
    "kernel_only",
    "dense_mid",
    "dense_slow",
    "dense_big",
    "float32_truth",
    "multi_rhs",
    "bilevel_loop",
    "grid_sparse",
)
"""In this order: what answers within seconds comes first."""
_MOST_THREADS = 1024
ON_REQUEST = {"cpu": ("dense_big",), "cuda": ("bilevel_loop",)}
"""Cases of a device that run only when named."""


def question(name: str) -> str:
    """The first line of a case's file."""
    return (_load(name).__doc__ or "").splitlines()[0]


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"birl_bench.cases.{name}")


def run(
    names: Sequence[str],
    out: Path,
    *,
    device: str = "cpu",
    threads: int = 0,
    quick: bool = False,
    seconds: float | None = None,
    command: str = "birl bench",
) -> int:
    """Run cases, write the report after each, and judge the requirements.

    Args:
        names: of `CASES`; empty for all that the device runs unasked.
        out: JSON file; Markdown and a roofline are written beside it.
        threads: 0 for as many as torch uses.
        seconds: after which no further case is begun.
        command: as the report quotes it.

    Returns:
        0; 1 if an answer of ours was wrong; 130 if interrupted.

    Raises:
        ConfigError: the folder of `out` cannot be made or written; before anything is measured.
    """
    plan = _plan(device, threads, quick)
    _check_folder(out.parent)
    chosen = list(names) or [one for one in CASES if one not in ON_REQUEST[plan.device.type]]
    document = machine.header(command, plan.device, plan.threads, quick)
    document |= {"ceilings": {}, "requirements": [], "cases": []}
    if warning := machine.busy(document["load_average"]):
        print(f"{warning}\n", flush=True)
    begin, status = time.perf_counter(), 0
    try:
        _tell("measuring this machine")
        document["ceilings"] = machine.ceilings(plan.device, plan.threads, quick)
        for number, name in enumerate(chosen, 1):
            spent = time.perf_counter() - begin
            if seconds is not None and spent > seconds:
                document["not_begun"] = chosen[number - 1 :]
                _tell("")
                print(f"no time left for: {', '.join(chosen[number - 1 :])}", flush=True)
                break
            _run_case(name, f"[{number}/{len(chosen)}] ", plan, document)
            report.write(document, out)
    except KeyboardInterrupt:
        document["interrupted"], status = True, 130
    _tell("")
    document["requirements"] = requirements.judge(document["cases"], plan.device.type)
    document["seconds"] = round(time.perf_counter() - begin, 1)
    report.write(document, out)
    _finish(document, out)
    wrong = [case["case"] for case in document["cases"] if _ours(case) == "wrong"]
    if wrong:
        print(f"wrong answers of birl_ext in: {', '.join(wrong)}", file=sys.stderr)
    return status or int(bool(wrong))


def _plan(device: str, threads: int, quick: bool) -> Plan:
    target = check_device(device)
    if threads:
        torch.set_num_threads(threads)
    plan = Plan(target, torch.get_num_threads(), quick, tell=_tell)
    return dataclasses.replace(plan, seconds=0.01, samples=(1, 2)) if quick else plan


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"the results cannot be written: {error.strerror}",
            where=str(folder),
            fix="choose another --out",
        ) from error


def _run_case(name: str, prefix: str, plan: Plan, document: dict[str, Any]) -> None:
    torch_dense.forget_compilations()
    start = time.perf_counter()
    told = dataclasses.replace(plan, tell=lambda text: _tell(prefix + text))
    for case in _load(name).run(told):
        document["cases"].append(case)
        _tell("")
        print("\n".join(report.lines(case)), flush=True)
    print(f"{prefix}{name}: {time.perf_counter() - start:.0f} s\n", flush=True)


def _finish(document: Mapping[str, Any], out: Path) -> None:
    found = document["requirements"]
    if document["quick"]:
        print("A trial on toy sizes: its times mean nothing, so no requirement is judged.")
    else:
        print("\n".join(report.verdicts(found)))
        met = sum(one["verdict"] == "met" for one in found)
        print(f"{met} of {len(found)} requirements met, in {document['seconds']:.0f} s")
    written = [out, out.with_suffix(".md")]
    try:
        from birl_bench import roofline

        written.append(roofline.draw(document, out.with_suffix(".png")))
    except ImportError:
        print('no roofline: matplotlib is missing. pip install "birl_ext[viz]"')
    print("\n".join(map(str, written)))


def _ours(case: Mapping[str, Any]) -> str:
    return next((row["status"] for row in case["rows"] if row["key"] == "ours"), "missing")


def _tell(text: str) -> None:
    """What is being done now, on a line that the next one overwrites; nothing in a file."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> int:
    """Read a command line and run; see ``birl bench --help``."""
    parser = argparse.ArgumentParser(
        prog="birl bench",
        description="Measure birl_ext against other packages, on this machine. Without CASE, all.",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="see --list")
    parser.add_argument("--list", action="store_true", help="the cases and their questions")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does the suite work?")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …; default: cpu")
    parser.add_argument("--threads", type=int, default=0, help="default: as many as torch uses")
    parser.add_argument("--seconds", type=float, help="begin no further case after this time")
    options = parser.parse_args(words)
    if options.list:
        width = max(map(len, CASES))
        for name in CASES:
            print(f"{name:<{width}}  {question(name)}")
        return 0
    for name in options.cases:
        if name not in CASES:
            parser.error(f"unknown case {name!r}; choose from {', '.join(CASES)}")
    kind = check_device(options.device).type
    if options.threads < 0 or options.threads > _MOST_THREADS:
        parser.error(f"--threads is {options.threads}; give 0 to {_MOST_THREADS}")
    if options.seconds is not None and math.isnan(options.seconds):
        parser.error("--seconds is nan; give a number")
    folder = options.out or Path("benchmarks") / "results"
    stem = f"{kind}_{machine.today()}" + ("_quick" if options.quick else "")
    return run(
        options.cases,
        _unused(folder, stem),
        device=options.device,
        threads=options.threads,
        quick=options.quick,
        seconds=options.seconds,
        command=shlex.join(["birl", "bench", *_without_paths(words)]),
    )


def _unused(folder: Path, stem: str) -> Path:
    """A JSON file that is not there yet: what was measured once is not overwritten."""
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder / f"{name}.json").exists())


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """The command as published: where the results went is nobody's business."""
    kept = list(arguments)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return [word for word in kept if not word.startswith("--out=")]
