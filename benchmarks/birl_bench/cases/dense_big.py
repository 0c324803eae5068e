"""Does a dense MDP that fills a gigabyte run at the speed of memory?

4096 states, 16 actions, float32: P is 1.07 GB, beyond every cache of every machine. Answers are
judged by a certificate, one sweep in float64: a factorisation of P_π would take longer than the
run. On a CPU it runs only when asked for by name.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from birl_bench import workloads
from birl_bench.cases.dense_mid import LISTS
from birl_bench.families import dense
from birl_bench.harness import Case, Plan, measure
from birl_bench.rivals import torch_dense

__all__ = ["run"]

TOL = 1e-5
DOUBLE = ("quantecon modified_policy_iteration", "quantecon policy_iteration")


def run(plan: Plan) -> list[dict[str, Any]]:
    shape = (1, 24, 3) if plan.quick else (1, 4096, 16)
    problem = workloads.random(dense, shape, torch.float32, discount=0.95, temperature=0.1)
    problem = problem.to(plan.device)
    candidates = torch_dense.forward(problem, TOL, plan, span_block=1, lists=LISTS)
    candidates = [
        replace(one, excuse="wants P in float64, 2 GB more") if one.key in DOUBLE else one
        for one in candidates
    ]
    case = Case(
        name="dense big",
        question="Does a dense MDP of a gigabyte run at the speed of memory?",
        problem=problem,
        judge=functools.partial(workloads.certify, problem),
        # of float32 values, whose rounding a certificate multiplies by 1/(1 − γ)
        allowed={"value": 100 * TOL, "hard value": 1.0},
        candidates=candidates,
        accuracy=f"ours: certified relative error {TOL:g}; the others: relative residual {TOL:g}",
    )
    return [measure(case, plan)]
