"""How long does each candidate take on the same problem, once its answer is known to be right?

1. Check: every candidate answers once; the case judges the answer against a float64 truth, or by a
   certificate that needs none. A wrong one gets no time.
2. Time: the candidates take turns in a shuffled order, so that a slow minute of the machine hits
   all of them. Before a cold call a buffer is read that overflows every cache; a warm call follows
   a cold one at once.
3. Report: median and quartiles; bytes of P read per second, as a share of what this machine reads
   in the same run. More than 100 % means that P stayed in a cache between passes.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_bench import machine
from birl_bench.workloads import Work, Workload

__all__ = [
    "Answer",
    "Candidate",
    "Case",
    "Plan",
    "Wrong",
    "disagreement",
    "facts",
    "measure",
    "no_collection",
    "processor_time",
    "time_alternately",
]

SLOW = 4.0
"""Seconds of the checking call from which on that call is the only sample."""
WARM_BELOW = 0.05
"""Seconds of a call above which a warm one tells nothing new."""


class Wrong(AssertionError):
    """An answer is too far from the truth."""


@dataclass(frozen=True)
class Plan:
    """How a run is carried out.

    Attributes:
        quick: toy sizes, and nothing is compiled: proves that the suite works, its times are void.
        seconds: given to the samples of one candidate, cold and warm each.
        samples: fewest and most samples of one candidate.
        tell: hears what is being done.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    quick: bool = False
    seconds: float = 0.6
    samples: tuple[int, int] = (3, 41)
    tell: Callable[[str], None] = field(default=lambda _: None)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Answer:
    """What a candidate found.

    Attributes:
        tensors: any of value (B, S), policy, grad_reward (B, S, A), grad_transition (B, S, A, S),
            or what the case calls them.
        passes: reads of the whole of P, where the candidate counts them.
        needed: passes that a full solution takes, where the call made only the first few: the time
            is then the rate of those times this count.
    """

    tensors: Mapping[str, Tensor]
    passes: float | None = None
    needed: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to solve the problem.

    Attributes:
        key: what requirements call it; "ours" is ours.
        prepare: makes the call that is timed; what it does itself is not timed.
        read: from the call's result to an answer, not timed either.
        solves: "soft"; "hard" is the easier problem with temperature zero; "nothing" only marks a
            floor.
        needs: packages without which the row says "missing".
        excuse: why this row is not run at all.
        compiles: whether the checking call holds a compilation.
        once: whether only the first call is a fair sample, because it leaves something behind.
    """

    key: str
    name: str
    prepare: Callable[[], Callable[[], Any]]
    read: Callable[[Any], Answer] = field(default=lambda answer: answer)
    solves: Literal["soft", "hard", "nothing"] = "soft"
    needs: tuple[str, ...] = ()
    excuse: str = ""
    compiles: bool = False
    once: bool = False


@dataclass(frozen=True)
class Case:
    """A problem, who judges the answers, and who takes part; the first candidate is ours.

    Attributes:
        judge: (what is solved, tensors) → the errors by name, relative.
        allowed: largest error of each name.
        accuracy: in words, what each side was asked for.
        work: bytes and operations of one pass over the model.
    """

    name: str
    question: str
    problem: Workload
    judge: Callable[[str, Mapping[str, Tensor]], dict[str, float]]
    allowed: Mapping[str, float]
    candidates: Sequence[Candidate]
    accuracy: str
    work: Work | None = None


def measure(case: Case, plan: Plan) -> dict[str, Any]:
    """Check every candidate of a case, then time those that are right."""
    plan.tell(case.name)
    trials = [_try(case, candidate, plan) for candidate in case.candidates]
    right = [trial for trial in trials if trial.call is not None]
    once = {trial.key: [trial.took] for trial in right if trial.slow}
    calls = {trial.key: trial.call for trial in right if trial.call and not trial.slow}
    plan.tell(f"{case.name}: timing {len(calls)}")
    cold, warm = time_alternately(calls, plan)
    cold |= once
    work = case.work or case.problem.work
    memory = machine.bandwidth(plan.device, plan.threads)
    again = machine.bandwidth(plan.device, plan.threads, work.bytes)
    first = right[0] if right and right[0].key == case.candidates[0].key else None
    ours = None if first is None else statistics.median(cold[first.key]) * first.multiple
    for trial in right:
        row, multiple = trial.row, trial.multiple
        row["cold"] = _summary(cold[trial.key], multiple)
        row["warm"] = _summary(warm.get(trial.key, []), multiple)
        if plan.cuda and not trial.slow:
            row["queued"] = _queued(trial.call, plan)
        seconds = statistics.median(cold[trial.key]) * multiple
        row["times_ours"] = seconds / ours if ours else None
        if row["passes"]:
            rate = 1e-9 * row["passes"] * work.bytes / seconds
            row |= {"gigabytes_per_second": rate, "share_of_read": rate / memory}
            row["gigaflops"] = 1e-9 * row["passes"] * work.operations / seconds
    answers = [t.answer.tensors for t in right if t.answer and t.row["solves"] == "soft"]
    return {
        **facts(case.name, case.question, case.problem, case.accuracy, plan, work),
        "read_gigabytes_per_second": {"memory": memory, "this size again": again},
        "floor_milliseconds": 1e-6 * work.bytes / memory,
        "disagreement": disagreement(answers, case.problem),
        "rows": [trial.row for trial in trials],
    }


def facts(
    name: str, question: str, problem: Workload, accuracy: str, plan: Plan, work: Work | None = None
) -> dict[str, Any]:
    """What a case says of itself besides its rows."""
    work = work or problem.work
    return {
        "case": name,
        "question": question,
        "shape": list(problem.shape),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "discount": problem.discount,
        "temperature": problem.temperature,
        "accuracy": accuracy,
        "threads": plan.threads,
        "bytes_of_pass": work.bytes,
        "operations_of_pass": work.operations,
    }


def disagreement(answers: Sequence[Mapping[str, Tensor]], problem: Workload) -> dict[str, float]:
    """For each tensor the largest gap between any two answers, relative to its largest entry."""
    names = {name for answer in answers for name in answer}
    gaps: dict[str, float] = {}
    for name in sorted(names):
        found = [answer[name].detach().double() for answer in answers if name in answer]
        found = [problem.comparable(name, one) for one in found]
        low = high = found[0]
        for one in found[1:]:
            low, high = torch.minimum(low, one), torch.maximum(high, one)
        size = high.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        gaps[name] = float((high - low).max() / size)
    return gaps


class _Trial(NamedTuple):
    """A candidate's row so far; the call to time unless it is out."""

    key: str
    row: dict[str, Any]
    call: Callable[[], Any] | None = None
    answer: Answer | None = None
    took: float = 0.0
    slow: bool = False
    multiple: float = 1.0


def _try(case: Case, candidate: Candidate, plan: Plan) -> _Trial:
    """One call, checked; an answer of ours that is wrong, or none, is an error of the run."""
    row: dict[str, Any] = {"key": candidate.key, "candidate": candidate.name}
    row["solves"] = candidate.solves
    out = _Trial(candidate.key, row)
    if candidate.excuse or (absent := machine.missing(*candidate.needs)):
        status = "not run" if candidate.excuse else "missing"
        row |= {"status": status, "reason": candidate.excuse or absent}
        return out
    plan.tell(f"{case.name}: {candidate.name}")
    torch.set_num_threads(plan.threads)
    try:
        call = candidate.prepare()
        machine.wait(plan.device)
        start = time.perf_counter()
        result = call()
        machine.wait(plan.device)
        took = time.perf_counter() - start
        answer = candidate.read(result)
        errors = case.judge(candidate.solves, answer.tensors)
        _require(errors, case.allowed)
        row["errors"] = errors if candidate.solves == "soft" else {}
    except Wrong as wrong:
        row |= {"status": "wrong", "reason": str(wrong)}
        return out
    except Exception as error:  # a competitor that does not run is a result, not the end
        if candidate is case.candidates[0]:
            raise
        first_line = (str(error) or "no message").splitlines()[0]
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {first_line}"[:200]}
        return out
    passes, multiple = answer.passes, 1.0
    if answer.needed is not None and answer.passes:
        passes, multiple = answer.needed, answer.needed / answer.passes
    row |= {"status": "timed", "passes": passes, "extrapolated": multiple != 1.0}
    slow = candidate.once or (took > SLOW and not candidate.compiles)
    return out._replace(call=call, answer=answer, took=took, slow=slow, multiple=multiple)


def _require(errors: Mapping[str, float], allowed: Mapping[str, float]) -> None:
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise Wrong(f"{name} is off by {error:.2g}, allowed {allowed[name]:.2g}")


def time_alternately(
    calls: Mapping[str, Callable[[], Any]], plan: Plan
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each call, cold and warm, with the names taking turns in shuffled order."""
    cold: dict[str, list[float]] = {name: [] for name in calls}
    warm: dict[str, list[float]] = {name: [] for name in calls}
    fewest, most = plan.samples
    once = {name: _once(call, plan) for name, call in calls.items()}
    wanted = {name: min(max(int(plan.seconds / took), fewest), most) for name, took in once.items()}
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
                machine.overflow(plan.device)
                cold[name].append(_once(calls[name], plan))
                if cold[name][-1] < WARM_BELOW:
                    warm[name].append(_once(calls[name], plan))
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


def _once(call: Callable[[], Any], plan: Plan) -> float:
    return machine.clock(call, plan.device, plan.threads)


def _queued(call: Callable[[], Any] | None, plan: Plan, calls: int = 20) -> dict[str, float] | None:
    """Milliseconds of the device per call when calls follow one another without a pause."""
    if call is None:
        return None
    times = []
    for _ in range(plan.samples[0]):
        start, end = _event(), _event()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        machine.wait(plan.device)
        times.append(start.elapsed_time(end) / calls)
    return {"median": statistics.median(times), "least": min(times), "samples": len(times)}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _summary(samples: Sequence[float], multiple: float) -> dict[str, float] | None:
    """Milliseconds: median, quartiles, least, and how many samples."""
    if not samples:
        return None
    milliseconds = [1e3 * multiple * sample for sample in samples]
    quartiles = statistics.quantiles(milliseconds, n=4) if len(samples) > 1 else milliseconds * 3
    return {
        "median": statistics.median(milliseconds),
        "low": quartiles[0],
        "high": quartiles[2],
        "least": min(milliseconds),
        "samples": len(samples),
    }
