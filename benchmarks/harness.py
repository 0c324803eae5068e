"""How long does each candidate take on the same problem, once its answer is known to be right?

1. Check: every candidate answers once, and is compared with a float64 truth; a wrong one gets no
   time. Two that are within ε of the truth are within 2ε of each other; the largest disagreement
   found is reported.
2. Time: the candidates take turns in a shuffled order, so that a slow minute of the machine hits
   all of them. Before a cold call a buffer is read that overflows every cache; a warm call follows
   a cold one at once.
3. Report: median and quartiles; bytes of P read per second, as a share of what this machine reads
   in the same run. More than 100 % means that P stayed in a cache between passes.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import birl_ext

__all__ = [
    "Answer",
    "Candidate",
    "Case",
    "Problem",
    "Wrong",
    "check",
    "deviation",
    "header",
    "markdown",
    "measure",
    "missing",
    "no_collection",
    "processor_time",
    "read_bandwidth",
    "time_alternately",
    "write",
]

FORMAT = 1
PACKAGES = ("birl_ext", "torch", "numpy", "jax", "optimistix", "jaxopt", "quantecon", "mdpsolver")
SECONDS = 0.6
"""Time given to the samples of one candidate, cold and warm each."""
SAMPLES = 3, 41
"""Fewest and most samples of one candidate."""
SLOW = 4.0
"""Seconds of the checking call from which on that call is the only sample."""
WARM_BELOW = 0.05
"""Seconds of a call above which a warm one tells nothing new."""


class Wrong(AssertionError):
    """An answer is too far from the truth."""


@dataclass(frozen=True)
class Problem:
    """One batch of MDPs.

    Attributes:
        reward: r, (B, S, A); transition: P, (B, S, A, S), same dtype.
        weight: w, (B, S): gradients are those of Σ w·V*.
    """

    reward: Tensor
    transition: Tensor
    discount: float
    temperature: float
    weight: Tensor

    @property
    def bytes_of_transition(self) -> int:
        return self.transition.numel() * self.transition.element_size()


@dataclass(frozen=True)
class Answer:
    """What a candidate found.

    Attributes:
        tensors: any of value (B, S), policy, grad_reward (B, S, A), grad_transition (B, S, A, S).
        passes: reads of the whole of P, where the candidate counts them.
    """

    tensors: Mapping[str, Tensor]
    passes: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to solve the problem.

    Attributes:
        prepare: from a problem to the call that is timed; what it does itself is not timed.
        read: from the call's result to an answer, not timed either.
        solves: "soft"; "hard" is the easier problem with temperature zero, its value is checked
            against (M8); "nothing" only marks a floor.
        needs: packages without which the row says "missing".
        excuse: why this row is not run at all.
        compiles: whether the checking call holds the compilation.
    """

    name: str
    prepare: Callable[[Problem], Callable[[], Any]]
    read: Callable[[Any], Answer] = field(default=lambda answer: answer)
    solves: Literal["soft", "hard", "nothing"] = "soft"
    needs: tuple[str, ...] = ()
    excuse: str = ""
    compiles: bool = False


@dataclass(frozen=True)
class Case:
    """A problem, its truth in float64, and who takes part; the first candidate is ours.

    Attributes:
        allowed: largest deviation of each tensor from the truth, relative to its largest entry.
        accuracy: in words, what each side was asked for.
    """

    name: str
    question: str
    problem: Problem
    truth: Mapping[str, Tensor]
    allowed: Mapping[str, float]
    candidates: Sequence[Candidate]
    accuracy: str


# Checking


def deviation(name: str, found: Tensor, truth: Tensor, problem: Problem) -> float:
    """max |found − truth| / max |truth|; NaN counts as infinite."""
    found, truth = found.detach().double(), truth.double()
    if name == "grad_transition":
        found = _tangent(found, problem.transition.double())
    error = (found - truth).abs().max() / truth.abs().max()
    return float(error.nan_to_num(nan=float("inf")))


def _tangent(grad: Tensor, transition: Tensor) -> Tensor:
    """The derivative of P ↦ f(P/ΣP): two that differ by a constant per row are the same there."""
    return grad - (grad * transition).sum(-1, keepdim=True)


def check(case: Case, candidate: Candidate, answer: Answer) -> dict[str, float]:
    """The deviations from the truth; raises Wrong if one is not allowed."""
    if candidate.solves == "nothing":
        return {}
    if candidate.solves == "hard":
        _check_hard(case, answer.tensors["value"])
        return {}
    errors = {
        name: deviation(name, tensor, case.truth[name], case.problem)
        for name, tensor in answer.tensors.items()
    }
    for name, error in errors.items():
        if not error <= case.allowed[name]:
            raise Wrong(f"{name} is off by {error:.2g}, allowed {case.allowed[name]:.2g}")
    return errors


def _check_hard(case: Case, value: Tensor) -> None:
    """V* − V_hard lies in [0, τ log A/(1 − γ)] (M8); checked up to a constant, since a package
    that stops when a span is small need not return the constant.
    """
    problem, soft = case.problem, case.truth["value"]
    width = problem.temperature * torch.tensor(float(problem.reward.shape[-1])).log()
    width = width / (1 - problem.discount)
    low, high = (soft - value.double()).aminmax(dim=-1)
    spread = (high - low).max()
    if not bool(spread <= width):
        raise Wrong(f"V* − V_hard varies by {spread:.3g}, (M8) allows {width:.3g}")


def _disagreement(answers: Sequence[Answer], problem: Problem) -> dict[str, float]:
    """For each tensor the largest gap between any two answers, relative to its largest entry."""
    names = {name for answer in answers for name in answer.tensors}
    gaps: dict[str, float] = {}
    for name in sorted(names):
        found = [
            answer.tensors[name].detach().double() for answer in answers if name in answer.tensors
        ]
        if name == "grad_transition":
            found = [_tangent(one, problem.transition.double()) for one in found]
        low = high = found[0]
        for one in found[1:]:
            low, high = torch.minimum(low, one), torch.maximum(high, one)
        gaps[name] = float((high - low).max() / high.abs().max())
    return gaps


# Timing


def measure(case: Case, *, seconds: float = SECONDS) -> dict[str, Any]:
    """Check every candidate of a case, then time those that are right."""
    threads = torch.get_num_threads()
    trials = [_try(case, candidate, threads) for candidate in case.candidates]
    right = [trial for trial in trials if trial.call is not None]
    once = {trial.name: [trial.took] for trial in right if trial.slow}
    calls = {trial.name: trial.call for trial in right if trial.call and not trial.slow}
    cold, warm = time_alternately(calls, threads, seconds)
    cold |= once
    size = case.problem.bytes_of_transition
    memory, again = read_bandwidth(threads), read_bandwidth(threads, size)
    ours = cold.get(case.candidates[0].name)  # absent if ours was wrong
    for trial in right:
        row = trial.row
        row["cold"], row["warm"] = _summary(cold[trial.name]), _summary(warm.get(trial.name, []))
        median = statistics.median(cold[trial.name])
        row["times_ours"] = median / statistics.median(ours) if ours else None
        if row["passes"]:
            rate = 1e-9 * row["passes"] * size / median
            row |= {"gigabytes_per_second": rate, "share_of_read": rate / memory}
    answers = [trial.answer for trial in right if trial.answer and trial.row["solves"] == "soft"]
    return {
        "case": case.name,
        "question": case.question,
        "shape": list(case.problem.reward.shape),
        "dtype": str(case.problem.reward.dtype).removeprefix("torch."),
        "discount": case.problem.discount,
        "temperature": case.problem.temperature,
        "accuracy": case.accuracy,
        "threads": threads,
        "bytes_of_transition": size,
        "read_gigabytes_per_second": {"memory": memory, "this size again": again},
        "disagreement": _disagreement(answers, case.problem),
        "rows": [trial.row for trial in trials],
    }


class _Trial(NamedTuple):
    """A candidate's row so far; the call to time unless it is out."""

    name: str
    row: dict[str, Any]
    call: Callable[[], Any] | None = None
    answer: Answer | None = None
    took: float = 0.0
    slow: bool = False


def _try(case: Case, candidate: Candidate, threads: int) -> _Trial:
    """One call, checked; an answer of ours that is wrong, or none, is an error of the run."""
    row: dict[str, Any] = {"candidate": candidate.name, "solves": candidate.solves}
    out = _Trial(candidate.name, row)
    if candidate.excuse or (absent := missing(*candidate.needs)):
        status = "not run" if candidate.excuse else "missing"
        row |= {"status": status, "reason": candidate.excuse or absent}
        return out
    torch.set_num_threads(threads)
    try:
        call = candidate.prepare(case.problem)
        start = time.perf_counter()
        result = call()
        took = time.perf_counter() - start
        answer = candidate.read(result)
        row["errors"] = check(case, candidate, answer)
    except Wrong as wrong:
        row |= {"status": "wrong", "reason": str(wrong)}
        return out
    except Exception as error:  # a competitor that does not run is a result, not the end
        if candidate is case.candidates[0]:
            raise
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}
        return out
    row |= {"status": "timed", "passes": answer.passes}
    slow = took > SLOW and not candidate.compiles
    return out._replace(call=call, answer=answer, took=took, slow=slow)


def time_alternately(
    calls: Mapping[str, Callable[[], Any]], threads: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each call, cold and warm, with the names taking turns in shuffled order."""
    cold: dict[str, list[float]] = {name: [] for name in calls}
    warm: dict[str, list[float]] = {name: [] for name in calls}
    fewest, most = SAMPLES
    wanted = {
        name: min(max(int(seconds / _time(call, threads)), fewest), most)
        for name, call in calls.items()
    }
    rounds = max(wanted.values(), default=0)
    shuffle = random.Random(0)
    with no_collection():
        for number in range(rounds):
            order = list(calls)
            shuffle.shuffle(order)
            for name in order:
                count = wanted[name]
                if (number + 1) * count // rounds == number * count // rounds:
                    continue  # its few samples are spread over all rounds
                _flush()
                cold[name].append(_time(calls[name], threads))
                if cold[name][-1] < WARM_BELOW:
                    warm[name].append(_time(calls[name], threads))
    return cold, warm


def processor_time(call: Callable[[], Any], calls: int) -> float:
    """Mean seconds of a call, in this thread's processor time."""
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, and not while something is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _time(call: Callable[[], Any], threads: int) -> float:
    """Seconds of one call. Packages that set the number of threads set it for everyone."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@functools.cache
def _flusher() -> Tensor:
    return torch.ones(4 * last_cache() // 4)


def _flush() -> None:
    """Read four times what the last cache holds."""
    _flusher().sum()


def _summary(samples: Sequence[float]) -> dict[str, float] | None:
    """Milliseconds: median, quartiles, least, and how many samples."""
    if not samples:
        return None
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    low, _, high = (1e3 * quartile for quartile in quartiles)
    median, least = 1e3 * statistics.median(samples), 1e3 * min(samples)
    return {"median": median, "low": low, "high": high, "least": least, "samples": len(samples)}


# The machine


def read_bandwidth(threads: int, size: int | None = None) -> float:
    """GB/s at which a buffer is read again and again: the better of a sum and a matrix-vector
    product, median of nine. Without a size: one that no cache holds.
    """
    size = size or 8 * last_cache()
    table = torch.ones(max(size // 4096, 1), 1024)
    vector = torch.ones(1024)
    median = min(
        statistics.median(_time(read, threads) for _ in range(9))
        for read in (table.sum, lambda: table.mv(vector))
    )
    return 1e-9 * table.numel() * 4 / median


def last_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes[1:] or sizes)


def missing(*packages: str) -> str:
    """Which of the packages are not installed; empty if none."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def header(command: str) -> dict[str, Any]:
    """Date, machine, versions and command of a run; nothing that names a host or a folder."""
    model = platform.processor() or platform.machine()
    memory = 0.0
    for path, key in (("/proc/cpuinfo", "model name"), ("/proc/meminfo", "MemTotal")):
        for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
            if line.startswith(key):
                text = line.split(":", 1)[1].strip()
                if key == "MemTotal":
                    memory = int(text.split()[0]) / (1 << 20)
                else:
                    model = text
                break
    native = birl_ext._native.report()["_cpu"]
    return {
        "format": FORMAT,
        "date": date.today().isoformat(),
        "command": command,
        "machine": f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"{last_cache() >> 20} MiB of last-level cache, {platform.system()}",
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "compiled_module": native["build_info"] or native["reason"],
    }


def _versions() -> dict[str, str]:
    found = {"birl_ext": birl_ext.__version__}
    for name in PACKAGES[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# Reports


def write(report: Mapping[str, Any], path: Path) -> None:
    """The report as JSON and, beside it, as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


def markdown(report: Mapping[str, Any]) -> str:
    """Every case as a table; who is missing or wrong is in it."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"# CPU benchmarks, {report['date']}\n",
        f"{report['machine']}; {report['threads']} threads; load average "
        f"{report['load_average']} at the start. {versions}.\n",
        f"Made by `{report['command']}`. Medians; quartiles in brackets.\n",
    ]
    for case in report["cases"]:
        parts.append(f"## {case['case']}\n\n{case['question']}\n")
        parts.append(_facts(case))
        parts.append(_special(case) if "columns" in case else _standard(case))
    return "\n".join(parts)


def _facts(case: Mapping[str, Any]) -> str:
    shape = " × ".join(map(str, case["shape"]))
    facts = [
        f"{shape} {case['dtype']}, γ = {case['discount']:g}, τ = {case['temperature']:g}",
        case["accuracy"],
        f"{case['threads']} threads" if case["threads"] > 1 else "1 thread",
    ]
    if bandwidth := case.get("read_gigabytes_per_second"):
        facts.append(
            f"P is {case['bytes_of_transition'] / 1e6:.3g} MB; this machine read "
            f"{bandwidth['memory']:.0f} GB/s from memory and "
            f"{bandwidth['this size again']:.0f} GB/s from a buffer of that size again and again"
        )
    if gaps := case.get("disagreement"):
        worst = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
        facts.append(f"largest relative disagreement among the timed: {worst}")
    return "; ".join(facts) + ".\n"


def _standard(case: Mapping[str, Any]) -> str:
    errors = list(dict.fromkeys(name for row in case["rows"] for name in row.get("errors", {})))
    columns = ["candidate", "ms, cold", "ms, warm", "× ours", "passes", "GB/s of P", "of read"]
    empty = len(columns) + len(errors) - 2
    lines = _head([*columns, *(f"error of {name}" for name in errors)])
    for row in case["rows"]:
        name = row["candidate"] + (" (hard max)" if row["solves"] == "hard" else "")
        if row["status"] != "timed":
            lines.append(f"| {name} | {row['status']}: {row['reason']} |" + " |" * empty)
            continue
        cold, warm = row["cold"], row["warm"]
        cells = [
            name,
            f"{_digits(cold['median'])} ({_digits(cold['low'])} to {_digits(cold['high'])})",
            _digits(warm and warm["median"]),
            _digits(row["times_ours"]),
            _digits(row["passes"]),
            _digits(row.get("gigabytes_per_second")),
            f"{row['share_of_read']:.0%}" if "share_of_read" in row else "",
            *(f"{row['errors'][e]:.1e}" if e in row["errors"] else "" for e in errors),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _special(case: Mapping[str, Any]) -> str:
    """A case that brings its own columns: heading → key of the row."""
    lines = _head(list(case["columns"]))
    for row in case["rows"]:
        cells = [row.get(key, "") for key in case["columns"].values()]
        lines.append(f"| {' | '.join(c if isinstance(c, str) else _digits(c) for c in cells)} |")
    return "\n".join(lines) + "\n"


def _head(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def _digits(number: float | None) -> str:
    """Three significant digits."""
    if number is None:
        return ""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
