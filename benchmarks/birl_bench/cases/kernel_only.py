"""With the algorithm out of the way, how fast is a sweep?

Everyone makes the same number of sweeps of value iteration, without looking whether they help: ours
through ``solve`` with a limit on the sweeps and tolerance zero, torch.compile as blocks of ten. The
MDPs are two nearly decoupled halves, on which no number of sweeps asked for here suffices. All
start from the same V, which is not zero: a first sweep on zeros needs no P. Ours deflates the
constant mode in each sweep, so values are compared up to a constant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import birl_ext
from birl_bench import workloads
from birl_bench.families import two_cluster
from birl_bench.harness import Answer, Candidate, Case, Plan, measure
from birl_bench.rivals import cuda_graphs, torch_dense
from birl_bench.workloads import DenseProblem

__all__ = ["run"]

SHAPES = {
    "small": ((256, 32, 8), 100),
    "micro": ((4096, 16, 4), 50),
    "dense": ((1, 1000, 10), 20),
}
"""Name → shape and number of sweeps, a multiple of the block."""
NAME = "value up to a constant"


def run(plan: Plan) -> list[dict[str, Any]]:
    found = []
    for name, (shape, sweeps) in SHAPES.items():
        if plan.quick:
            shape, sweeps = (2, 6, 2), torch_dense.BLOCK
        problem = workloads.random(
            two_cluster, shape, torch.float32, discount=0.95, temperature=0.1, leak=1e-4
        ).to(plan.device)
        exact = problem.exact()
        value, _ = torch_dense.plain(exact.weight, *exact.data, sweeps=sweeps)
        case = Case(
            name=f"kernel only, {name}",
            question=f"How fast are {sweeps} sweeps, whatever they are good for?",
            problem=problem,
            judge=functools.partial(workloads.compare, problem, {NAME: value}),
            allowed={NAME: 1e-3},
            candidates=_candidates(problem, sweeps, plan),
            accuracy=f"everyone: {sweeps} sweeps",
        )
        found.append(measure(case, plan))
    return found


def _candidates(problem: DenseProblem, sweeps: int, plan: Plan) -> list[Candidate]:
    def solve() -> birl_ext.Solution:
        return birl_ext.solve(
            problem.reward,
            problem.transition,
            discount=problem.discount,
            temperature=problem.temperature,
            initial=problem.weight,
            method="value-iteration",
            max_iterations=sweeps,
            on_fail="status",
        )

    def read(solution: birl_ext.Solution) -> Answer:
        made = sorted(set(solution.iterations.tolist()))
        if made != [sweeps]:
            raise RuntimeError(f"{sweeps} sweeps were asked for, {made} were made")
        return Answer({NAME: solution.value}, sweeps)

    found = [
        Candidate("ours", "birl_ext.solve, a limit on the sweeps", lambda: solve, read),
        Candidate("eager", "PyTorch", lambda: _sweeps(problem, sweeps, _eager)),
        Candidate(
            "compiled",
            f"torch.compile, {torch_dense.BLOCK} sweeps a call",
            lambda: _sweeps(
                problem,
                sweeps,
                _eager if plan.quick else torch.compile(_eager, dynamic=False),
            ),
            compiles=True,
        ),
    ]
    if plan.cuda:
        found.append(
            Candidate(
                "graph",
                f"CUDA graph, {torch_dense.BLOCK} compiled sweeps a replay",
                lambda: _replays(problem, sweeps),
                compiles=True,
            )
        )
    return found


def _eager(value: Tensor, *data: Any) -> Tensor:
    for _ in range(torch_dense.BLOCK):
        value, _ = torch_dense.bellman(value, *data)
    return value


def _sweeps(
    problem: DenseProblem, sweeps: int, block: Callable[..., Tensor]
) -> Callable[[], Answer]:
    def run() -> Answer:
        value = problem.weight
        for _ in range(sweeps // torch_dense.BLOCK):
            value = block(value, *problem.data)
        return Answer({NAME: value}, sweeps)

    return run


def _replays(problem: DenseProblem, sweeps: int) -> Callable[[], Answer]:
    block = cuda_graphs.capture(problem, torch_dense.plain, torch_dense.BLOCK, True)

    def run() -> Answer:
        block.value.copy_(problem.weight)
        for _ in range(sweeps // torch_dense.BLOCK):
            block.graph.replay()
        return Answer({NAME: block.value}, sweeps)

    return run
