"""CUDA graphs: the launch overhead of PyTorch's many small kernels, gone.

A block of sweeps is captured once, on fixed buffers, and replayed; the host reads two numbers per
block. A captured compiled step is the best that PyTorch offers for a loop of sweeps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_bench.harness import Answer, Candidate
from birl_bench.workloads import DenseProblem

__all__ = ["Block", "capture", "forward"]

CAP = 100_000
WARM_UP = 3
Step = Callable[..., tuple[Tensor, Tensor]]


def forward(
    problem: DenseProblem, tol: float, plain: Step, midpoint: Step, sweeps: int, span_block: int
) -> list[Candidate]:
    """Both loops of `torch_dense`, captured, with and without torch.compile inside."""
    loops = (
        ("graph", f"CUDA graph, {sweeps} sweeps a replay", plain, sweeps),
        ("graph expert", "expert: CUDA graph, midpoint and span", midpoint, span_block),
    )
    return [
        Candidate(
            f"compiled {key}" if compiled else key,
            f"{name}, compiled" if compiled else name,
            functools.partial(_loop, problem, step, count, tol, compiled),
            compiles=True,
        )
        for key, name, step, count in loops
        for compiled in (False, True)
    ]


class Block(NamedTuple):
    """A captured block of sweeps.

    Attributes:
        value: the buffer that a replay advances.
        summary: residual and max |V| after it, (2,).
    """

    graph: torch.cuda.CUDAGraph
    value: Tensor
    summary: Tensor


def capture(problem: DenseProblem, step: Step, sweeps: int, compiled: bool) -> Block:
    """Some sweeps of a step as one graph."""

    def advance(value: Tensor, *data: Any) -> tuple[Tensor, Tensor]:
        image, residual = step(value, *data, sweeps=sweeps)
        return image, torch.stack((residual, image.abs().amax()))

    run = torch.compile(advance, dynamic=False) if compiled else advance
    value = torch.zeros_like(problem.reward[..., 0])
    side = torch.cuda.Stream(value.device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(value.device))
    with torch.cuda.stream(side):  # what initialises or compiles itself must do so before
        for _ in range(WARM_UP):
            run(value, *problem.data)
    torch.cuda.current_stream(value.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        image, summary = run(value, *problem.data)
        value.copy_(image)
    return Block(graph, value, summary)


def _loop(
    problem: DenseProblem, step: Step, sweeps: int, tol: float, compiled: bool
) -> Callable[[], Answer]:
    """Replay until the residual is at most tol·max |V|."""
    block = capture(problem, step, sweeps, compiled)

    def run() -> Answer:
        block.value.zero_()
        for done in itertools.count(sweeps, sweeps):
            block.graph.replay()
            residual, largest = block.summary.tolist()
            if done >= CAP or residual <= tol * largest:
                return Answer({"value": block.value}, done)
        raise AssertionError

    return run
