"""What does a differentiable call cost beyond the arithmetic?

On an MDP of 4 states and 3 actions the arithmetic is a few microseconds: the compiled kernel,
called through its pybind11 entry with raw pointers. Each row adds a layer to it. The requirement:
`solve` with a reward that requires a gradient costs at most 60 µs more. Best of many, in processor
time of the calling thread, warm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import workloads
from harness import Problem, Wrong, deviation, no_collection, processor_time
from torch import Tensor

import birl_ext
from birl_ext import _native
from birl_ext.ops import solve as ops_solve

LIMIT = 60.0
"""Microseconds that a differentiable call may add to the arithmetic."""
LIMITED = "birl_ext.solve, reward requires a gradient"


def run(small: bool = False) -> list[dict[str, Any]]:
    """The measured case; `small` shrinks it to a test of the benchmark itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure(5 if small else 200, 3 if small else 60)]
    finally:
        torch.set_num_threads(threads)


def _measure(calls: int, rounds: int) -> dict[str, Any]:
    problem = workloads.dense(1, 4, 3, torch.float64, discount=0.95, temperature=0.1)
    truth = workloads.truth(problem)["value"]
    layers = _layers(problem)
    for layer in layers:
        error = deviation("value", layer.read(layer.call()), truth, problem)
        if not error < 1e-12:
            raise Wrong(f"{layer.name}: value is off by {error:.2g}")
    best = [float("inf")] * len(layers)
    with no_collection():
        for _ in range(rounds):  # in turns: a slow moment of the machine hits all of them
            for i, layer in enumerate(layers):
                best[i] = min(best[i], 1e6 * processor_time(layer.call, calls))
    rows: list[dict[str, Any]] = []
    for layer, microseconds in zip(layers, best, strict=True):
        over = microseconds - best[0]
        row = {"candidate": layer.name, "status": "timed", "microseconds": microseconds}
        row["over_the_arithmetic"] = over
        if layer.name == LIMITED:
            row["requirement"] = f"at most {LIMIT:g}: {'met' if over <= LIMIT else 'missed'}"
        rows.append(row)
    return {
        "case": "tiny call",
        "question": "What does a differentiable call cost beyond the arithmetic?",
        "shape": list(problem.reward.shape),
        "dtype": "float64",
        "discount": problem.discount,
        "temperature": problem.temperature,
        "accuracy": "every row checks its input and solves as far as rounding allows",
        "threads": 1,
        "columns": {
            "layer": "candidate",
            "µs": "microseconds",
            "over the arithmetic": "over_the_arithmetic",
            "requirement": "requirement",
        },
        "rows": rows,
    }


class Layer(NamedTuple):
    """A way to solve the problem, and how V is read from what it returns."""

    name: str
    call: Callable[[], Any]
    read: Callable[[Any], Tensor]


def _layers(problem: Problem) -> list[Layer]:
    """From the innermost outwards. The inner ones repeat what one public call passed on."""
    from birl_ext import _cpu  # without the compiled module there is nothing to measure

    reward, transition = problem.reward[0], problem.transition[0]
    wanted = reward.clone().requires_grad_()
    mdp = birl_ext.DenseMDP(wanted, transition, problem.discount)
    scalars = {"discount": problem.discount, "temperature": problem.temperature}
    with (
        _recording(_cpu, "solve") as kernel,
        _recording(_native, "solve") as glue,
        _recording(ops_solve, "solve") as function,
    ):
        # a backend by name takes the general way, whose layers these are
        birl_ext.solve(reward, transition, **scalars, backend="cpu")
        birl_ext.solve(wanted, transition, **scalars, backend="cpu")

    def with_backward() -> birl_ext.Solution:
        solution = birl_ext.solve(wanted, transition, **scalars)
        torch.autograd.grad(solution.value.sum(), wanted)
        return solution

    def value(solution: birl_ext.Solution) -> Tensor:
        return solution.value

    def first(outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]

    return [
        Layer(
            "the arithmetic: compiled kernel, raw pointers",
            lambda: _cpu.solve(*kernel[0].arguments),
            lambda _: first(glue[0].result),  # the memory behind the pointers
        ),
        Layer(
            "with checks and new outputs",
            lambda: _native.solve(*glue[0].arguments, **glue[0].keywords),
            first,
        ),
        Layer("the op", lambda: torch.ops.birl_ext.solve(*function[0].arguments), first),
        Layer("its autograd Function", lambda: ops_solve.solve(*function[1].arguments), first),
        Layer(
            "birl_ext.solve, no gradient",
            lambda: birl_ext.solve(reward, transition, **scalars),
            value,
        ),
        Layer(
            "the general way (a backend by name), reward requires a gradient",
            lambda: birl_ext.solve(wanted, transition, **scalars, backend="cpu"),
            value,
        ),
        Layer(LIMITED, lambda: birl_ext.solve(wanted, transition, **scalars), value),
        Layer(
            "the same from a DenseMDP",
            lambda: birl_ext.solve(mdp, temperature=problem.temperature),
            value,
        ),
        Layer("birl_ext.solve and backward", with_backward, value),
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
