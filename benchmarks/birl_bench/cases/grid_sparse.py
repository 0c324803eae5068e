"""How fast is a large sparse MDP solved, and its adjoint?

A square grid of 10⁵ or 10⁶ cells, five actions, five successors, random step costs, τ = .1. The
best cell drains the rest, so news travels as far as the grid is wide; values of one part are known
long before those of another. Every soft row reaches the same certified relative error, 1e-8. Long
competitors are timed for a few sweeps, see `rivals.sparse`; their rows are marked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import birl_ext
from birl_bench import workloads
from birl_bench.harness import Case, Plan, facts, measure
from birl_bench.rivals import sparse
from birl_bench.workloads import GridProblem, Work

__all__ = ["run"]

TOL = 1e-8
TEMPERATURE = 0.1
QUESTION = "How fast is a large sparse MDP solved?"
PATIENCE = 2.0
"""Seconds of ours on the smaller grid, from which on the larger is left out of the run."""
LARGE = 500_000
"""States from which on competitors of half a minute are measured at one discount only."""
ACCURACY = f"all: certified relative error {TOL:g}, by whichever bound each can compute"


def run(plan: Plan) -> list[dict[str, Any]]:
    sides = (12,) if plan.quick else (316, 1000)
    found, took = [], 0.0
    for side in sides:
        for discount in (0.99, 0.999):
            problem = workloads.grid(side, discount=discount, temperature=TEMPERATURE)
            problem = problem.to(plan.device)
            if side * side > LARGE and took > PATIENCE:
                found.append(_left_out(problem, side, took, plan))
                continue
            pair = _pair(problem, side, plan)
            took = max(took, 1e-3 * pair[0]["rows"][0].get("cold", {}).get("median", 0.0))
            found += pair
    return found


def _left_out(problem: GridProblem, side: int, took: float, plan: Plan) -> dict[str, Any]:
    """A case that would take minutes: a row that says so."""
    name = f"grid of {side}², γ = {problem.discount:g}, forward"
    reason = f"ours took {took:.1f} s on the smaller grid, this one would take minutes"
    row = {"key": "ours", "candidate": "birl_ext.solve", "solves": "soft", "status": "not run"}
    return {
        **facts(name, QUESTION, problem, ACCURACY, plan),
        "columns": {"candidate": "candidate", "": "reason"},
        "rows": [row | {"reason": reason}],
    }


def _pair(problem: GridProblem, side: int, plan: Plan) -> list[dict[str, Any]]:
    discount, large = problem.discount, side * side > LARGE
    reward = problem.reward.clone().requires_grad_()
    plan.tell(f"grid of {side}², γ = {discount:g}: the solution that is differentiated")
    solution = birl_ext.solve(problem.mdp(reward), temperature=TEMPERATURE, tol=TOL)
    known = sparse.known_sweeps(problem)
    (probe,) = known
    largest = float(solution.value.detach().abs().max())
    goal = TOL * (1 - discount) / discount * largest
    name = f"grid of {side}², γ = {discount:g}"
    forward = Case(
        name=f"{name}, forward",
        question=QUESTION,
        problem=problem,
        judge=functools.partial(_judge, problem, known),
        allowed={"value": 3 * TOL, probe: 1e-12, "hard value": 1e-3},
        candidates=sparse.forward(
            problem,
            goal,
            TOL,
            plan,
            slow="half a minute; measured at γ = 0.99 only" if large and discount > 0.99 else "",
            lists="its input is nested Python lists, gigabytes for this P" if large else "",
        ),
        accuracy=ACCURACY,
    )
    flow_goal = TOL * float(problem.weight.sum())
    entries = problem.successor.numel()
    adjoint = Case(
        name=f"{name}, adjoint",
        question="How fast is λ of (I − γP_π)ᵀ λ = w, given V*?",
        problem=problem,
        judge=functools.partial(_judge_adjoint, problem, solution.policy.detach()),
        allowed={"grad_reward": 3 * TOL},
        candidates=sparse.adjoint(
            problem,
            solution,
            reward,
            flow_goal,
            "the factors of 10⁶ unknowns fill gigabytes" if large else "",
        ),
        accuracy=f"ours: to rounding; the others: ‖w − (I − γP_π)ᵀ λ‖₁ ≤ {TOL:g}·‖w‖₁",
        work=Work(12 * entries, 2 * entries),  # P_π: a value and a 32-bit index per successor
    )
    return [measure(forward, plan), measure(adjoint, plan)]


def _judge(
    problem: GridProblem, known: Mapping[str, Tensor], solves: str, found: Mapping[str, Tensor]
) -> dict[str, float]:
    errors = workloads.certify(problem, solves, found)
    probes = {name: tensor for name, tensor in found.items() if name in known}
    return errors | workloads.compare(problem, known, "soft", probes)


def _judge_adjoint(
    problem: GridProblem, policy: Tensor, solves: str, found: Mapping[str, Tensor]
) -> dict[str, float]:
    """‖λ − λ*‖₁ ≤ ‖w − (I − γP_π)ᵀ λ‖₁/(1 − γ) (M13), relative to ‖λ*‖₁ = ‖w‖₁/(1 − γ)."""
    if "grad_reward" not in found:
        return {}
    flow = found["grad_reward"].sum(-1)
    entries = policy.unsqueeze(-1) * problem.probability * flow[:, None, None]
    arriving = flow.new_zeros(len(flow)).index_add_(
        0, problem.successor.unsqueeze(1).expand_as(entries).flatten(), entries.flatten()
    )
    residual = problem.weight + problem.discount * arriving - flow
    return {"grad_reward": float(residual.abs().sum() / problem.weight.sum())}
