"""What does a differentiable call cost beyond the arithmetic?

On an MDP of 4 states and 3 actions the arithmetic is a few microseconds: the compiled kernel,
called through its pybind11 entry with raw pointers. Each row adds a layer to it. Best of many,
warm: on the CPU in processor time of the calling thread, on a GPU by the clock, without waiting for
the device.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import birl_ext
from birl_bench import machine, workloads
from birl_bench.families import dense
from birl_bench.harness import Plan, Wrong, facts, no_collection, processor_time
from birl_bench.workloads import DenseProblem
from birl_ext.ops import solve as ops_solve
from birl_ext.ops.backends import loader, native

__all__ = ["run"]

COLUMNS = {
    "layer": "candidate",
    "µs": "microseconds",
    "over the arithmetic": "over_the_arithmetic",
    "": "reason",
}
ACCURACY = "every row checks its input and solves as far as rounding allows"


def run(plan: Plan) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure(5 if plan.quick else 200, 3 if plan.quick else 60, plan)]
    finally:
        torch.set_num_threads(threads)


def _measure(calls: int, rounds: int, plan: Plan) -> dict[str, Any]:
    problem = workloads.random(dense, (1, 4, 3), torch.float64, discount=0.95, temperature=0.1)
    truth = {"value": workloads.truth(problem)["value"].to(plan.device)}
    problem = problem.to(plan.device)
    question = (__doc__ or "").splitlines()[0]
    case = {
        **facts("tiny call", question, problem, ACCURACY, plan),
        "threads": 1,
        "columns": COLUMNS,
    }
    if reason := loader.reason(plan.device.type):
        row = {"key": "ours", "candidate": "birl_ext.solve", "solves": "soft"}
        return {**case, "rows": [{**row, "status": "missing", "reason": reason}]}
    plan.tell("tiny call")
    layers = _layers(problem)
    for layer in layers:
        found = {"value": layer.read(layer.call())}
        error = workloads.compare(problem, truth, "soft", found)["value"]
        if not error < 1e-12:
            raise Wrong(f"{layer.name}: value is off by {error:.2g}")
    spend = _wall if plan.cuda else processor_time
    best = [float("inf")] * len(layers)
    with no_collection():
        for _ in range(rounds):  # in turns: a slow moment of the machine hits all of them
            for i, layer in enumerate(layers):
                best[i] = min(best[i], 1e6 * spend(layer.call, calls))
                machine.wait(plan.device)
    rows = [
        {
            "key": layer.key,
            "candidate": layer.name,
            "solves": "soft",
            "status": "timed",
            "microseconds": microseconds,
            "over_the_arithmetic": microseconds - best[0],
        }
        for layer, microseconds in zip(layers, best, strict=True)
    ]
    return {**case, "rows": rows}


def _wall(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


class Layer(NamedTuple):
    """A way to solve the problem, and how V is read from what it returns."""

    key: str
    name: str
    call: Callable[[], Any]
    read: Callable[[Any], Tensor]


def _layers(problem: DenseProblem) -> list[Layer]:
    """From the innermost outwards. The inner ones repeat what one public call passed on, whatever
    its form: so nothing here knows the signatures of a compiled module.
    """
    kernel = loader.require(problem.device.type)
    reward, transition = problem.reward[0], problem.transition[0]
    wanted = reward.clone().requires_grad_()
    mdp = birl_ext.DenseMDP(wanted, transition, problem.discount)
    mine = functools.partial(
        birl_ext.solve,
        transition=transition,
        discount=problem.discount,
        temperature=problem.temperature,
    )
    with (
        _recording(kernel, "solve") as raw,
        _recording(native, "solve") as glue,
        _recording(ops_solve, "solve") as function,
    ):
        # a backend by name takes the general way, whose layers these are
        mine(reward, backend=problem.device.type)
        mine(wanted, backend=problem.device.type)

    data, start, settings = function[0].arguments

    def with_backward() -> birl_ext.Solution:
        solution = mine(wanted)
        torch.autograd.grad(solution.value.sum(), wanted)
        return solution

    def value(solution: birl_ext.Solution) -> Tensor:
        return solution.value

    def first(outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]

    return [
        Layer(
            "kernel",
            "the arithmetic: compiled kernel, raw pointers",
            lambda: kernel.solve(*raw[0].arguments),
            lambda _: first(glue[0].result),  # the memory behind the pointers
        ),
        Layer(
            "glue",
            "with checks and new outputs",
            lambda: native.solve(*glue[0].arguments, **glue[0].keywords),
            first,
        ),
        Layer("op", "the op", lambda: torch.ops.birl_ext.solve(*data, start, *settings), first),
        Layer(
            "function",
            "its autograd Function",
            lambda: ops_solve.solve(*function[1].arguments),
            first,
        ),
        Layer(
            "public",
            "birl_ext.solve, no gradient",
            lambda: mine(reward),
            value,
        ),
        Layer(
            "ours",
            "birl_ext.solve, reward requires a gradient",
            lambda: mine(wanted),
            value,
        ),
        Layer(
            "mdp",
            "the same from a DenseMDP",
            lambda: birl_ext.solve(mdp, temperature=problem.temperature),
            value,
        ),
        Layer("backward", "birl_ext.solve and backward", with_backward, value),
    ]


class _Call(NamedTuple):
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any


@contextmanager
def _recording(owner: Any, name: str) -> Iterator[list[_Call]]:
    """Everything that is passed to a function of a module, and keeps alive what it points to."""
    original = getattr(owner, name)
    calls: list[_Call] = []

    def passed_on(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        calls.append(_Call(arguments, keywords, result))
        return result

    with mock.patch.object(owner, name, passed_on):
        yield calls
