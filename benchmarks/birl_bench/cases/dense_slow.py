"""What happens where an MDP mixes slowly, and sweeps hardly help?

Two halves of 500 states, 10 actions, that leak 1e-3 into each other: the difference between the
halves decays by γ(1 − 2·10⁻³) per sweep, whether or not the constant mode is deflated. Newton's
method does not care; its linear solver may.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from birl_bench import workloads
from birl_bench.cases.dense_mid import LISTS
from birl_bench.families import two_cluster
from birl_bench.harness import Case, Plan, measure
from birl_bench.rivals import torch_dense

__all__ = ["run"]

TOL = 1e-8
SWEEPS = ("eager", "compiled", "expert", "jax", "jaxopt", "graph", "graph expert")
"""Rows that sweep."""
HORIZON = "thousands of sweeps; `dense mid` shows what one costs"


def run(plan: Plan) -> list[dict[str, Any]]:
    shape = (1, 12, 3) if plan.quick else (1, 1000, 10)
    found = []
    for discount in (0.9, 0.95) if plan.quick else (0.99, 0.9999):
        problem = workloads.random(
            two_cluster, shape, torch.float64, discount=discount, temperature=0.1
        ).to(plan.device)
        candidates = torch_dense.forward(
            problem, TOL, plan, span_block=1, lists="" if plan.quick else LISTS
        )
        if not plan.quick:
            waited = ("compiled", "expert") if discount < 0.999 else ()
            candidates = [
                replace(one, excuse=HORIZON) if one.key in SWEEPS and one.key not in waited else one
                for one in candidates
            ]
        case = Case(
            name=f"dense slow, γ = {discount:g}",
            question="What happens where an MDP mixes slowly?",
            problem=problem,
            judge=functools.partial(workloads.compare, problem, workloads.truth(problem)),
            # a relative residual of 1e-8 is an error of up to 1e-8/(1 − γ)
            allowed={"value": 2 * TOL / (1 - discount), "hard value": 1.0},
            candidates=candidates,
            accuracy=f"ours: certified relative error {TOL:g}; the others: relative residual "
            f"{TOL:g}",
        )
        found.append(measure(case, plan))
    return found
