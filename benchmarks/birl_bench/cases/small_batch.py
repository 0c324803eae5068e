"""How fast is a batch of small MDPs solved, and its gradient?

256 Garnet MDPs of 32 states and 8 actions, four successors each, stored dense: P is 8 MB, so an
MDP fits the first cache and the batch does not. What a bilevel step over a population solves.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from birl_bench import workloads
from birl_bench.families import garnet
from birl_bench.harness import Case, Plan, measure
from birl_bench.rivals import torch_dense
from birl_bench.workloads import DenseProblem

__all__ = ["cases", "run"]

TOL = 1e-6
ACCURACY = "ours: certified relative error 1e-6; the others: relative residual 1e-6"
ALLOWED = {"value": 5e-5, "grad_reward": 1e-3, "grad_transition": 1e-3, "hard value": 1.0}


def cases(name: str, problem: DenseProblem, plan: Plan, *, unrolled: bool = True) -> list[Case]:
    """Forward, and forward with the gradient of Σ w·V* with respect to r and P."""
    judge = functools.partial(workloads.compare, problem, workloads.truth(problem))
    forward = torch_dense.forward(problem, TOL, plan, span_block=4)
    gradient = torch_dense.gradient(problem, TOL, plan, span_block=4, unrolled=unrolled)
    question = "How fast is a batch of small MDPs solved?"
    with_gradient = "How fast is it solved and differentiated with respect to r and P?"
    common: dict[str, Any] = {
        "problem": problem,
        "judge": judge,
        "allowed": ALLOWED,
        "accuracy": ACCURACY,
    }
    return [
        Case(name=f"{name}, forward", question=question, candidates=forward, **common),
        Case(name=f"{name}, gradient", question=with_gradient, candidates=gradient, **common),
    ]


def run(plan: Plan) -> list[dict[str, Any]]:
    shape = (3, 6, 2) if plan.quick else (256, 32, 8)
    problem = workloads.random(garnet, shape, torch.float32, discount=0.95, temperature=0.1)
    return [measure(case, plan) for case in cases("small batch", problem.to(plan.device), plan)]
