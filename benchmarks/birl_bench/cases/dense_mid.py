"""Is one large dense MDP solved at the speed of memory, and who needs the fewest passes over P?

1000 states, 10 actions, random rows: P is 40 MB in float32, 80 MB in float64, beyond the last
cache. A pass costs what reading P costs, whoever makes it; what differs is their number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from birl_bench import workloads
from birl_bench.families import dense
from birl_bench.harness import Case, Plan, measure
from birl_bench.rivals import torch_dense

__all__ = ["LISTS", "run"]

TOL = {torch.float32: 1e-6, torch.float64: 1e-10}
LISTS = "its input is nested Python lists, gigabytes for this P"


def run(plan: Plan) -> list[dict[str, Any]]:
    return [measure(case, plan) for case in cases(plan)]


def cases(plan: Plan) -> Iterator[Case]:
    shape = (1, 12, 3) if plan.quick else (1, 1000, 10)
    for dtype, tol in TOL.items():
        problem = workloads.random(dense, shape, dtype, discount=0.95, temperature=0.1).to(
            plan.device
        )
        allowed = dict.fromkeys(("value", "grad_reward", "grad_transition"), 100 * tol)
        common: dict[str, Any] = {
            "problem": problem,
            "judge": functools.partial(workloads.compare, problem, workloads.truth(problem)),
            "allowed": {**allowed, "hard value": 1.0},
            "accuracy": f"ours: certified relative error {tol:g}; the others: relative residual "
            f"{tol:g}",
        }
        name = f"dense mid, {str(dtype).removeprefix('torch.')}"
        lists = "" if plan.quick else LISTS
        single = dtype == torch.float32  # 400 copies of 80 MB are too many for a tape
        yield Case(
            name=f"{name}, forward",
            question="Is one large dense MDP solved at the speed of memory?",
            candidates=torch_dense.forward(problem, tol, plan, span_block=1, lists=lists),
            **common,
        )
        yield Case(
            name=f"{name}, gradient",
            question="What does its gradient with respect to r and P add?",
            candidates=torch_dense.gradient(problem, tol, plan, span_block=1, unrolled=single),
            **common,
        )
