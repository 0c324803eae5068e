"""What does the k-th derivative direction cost, when the solution is known?

k = 1, 4, 16, 64 cotangents of V* pulled back to r (VJP), and k directions of r pushed to V* (JVP),
on one dense MDP of 1000 states and a grid of 10⁴ cells. Each is one linear system with k right-hand
sides; P_π is formed anew each time, as in a backward pass. Milliseconds per call, cold; in brackets
per right-hand side.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import birl_ext
from birl_bench import machine, workloads
from birl_bench.families import dense
from birl_bench.harness import Plan, facts, time_alternately
from birl_bench.workloads import DenseProblem, GridProblem, Work

__all__ = ["run"]

COUNTS = 1, 4, 16, 64
SIDE = 100, 12
TOL = 1e-8
"""Largest residual of the iterative rivals relative to the right-hand side."""
ALLOWED = 1e-5
PRODUCTS = 20_000
SLOW = 0.7
"""Seconds of the checking call from which on that call is the only sample."""
ACCURACY = f"ours: to rounding; iterative rivals: relative residual {TOL:g}"

Way = Callable[[Tensor], Tensor]
"""k right-hand sides, (k, S), to k derivatives: (k, S, A) for a VJP, (k, S) for a JVP."""


class _System(NamedTuple):
    """One problem, its policy, and everyone who solves with it; ours first, the check second.

    Attributes:
        vjp, jvp: key → name, packages, way.
    """

    name: str
    problem: DenseProblem | GridProblem
    work: Work
    policy: Tensor
    vjp: Mapping[str, tuple[str, tuple[str, ...], Way]]
    jvp: Mapping[str, tuple[str, tuple[str, ...], Way]]


def run(plan: Plan) -> list[dict[str, Any]]:
    return [
        _measure(system, kind, ways, plan)
        for system in (_dense(plan), _grid(plan))
        for kind, ways in (("VJP", system.vjp), ("JVP", system.jvp))
    ]


def _measure(
    system: _System,
    kind: str,
    ways: Mapping[str, tuple[str, tuple[str, ...], Way]],
    plan: Plan,
) -> dict[str, Any]:
    counts = COUNTS[:2] if plan.quick else COUNTS
    generator = torch.Generator().manual_seed(2)
    states, device = system.problem.shape[1], plan.device
    sides = {k: torch.rand(k, states, generator=generator).double().to(device) for k in counts}
    case = f"multi rhs, {system.name}, {kind}"
    rows: list[dict[str, Any]] = []
    known: dict[int, Tensor] = {}
    slow: dict[str, list[float]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for key, (name, needs, way) in ways.items():
        row: dict[str, Any] = {"key": key, "candidate": name, "solves": "soft"}
        rows.append(row)
        if absent := machine.missing(*needs):
            row |= {"status": "missing", "reason": absent}
            continue
        plan.tell(f"{case}: {name}")
        errors, once = [], {}
        try:
            for k, side in sides.items():
                start = time.perf_counter()
                found = way(side)
                machine.wait(device)
                once[k] = time.perf_counter() - start
                right = known.setdefault(k, found)
                errors.append(float((found - right).abs().max() / right.abs().max()))
        except Exception as error:  # a competitor that does not run is a result, not the end
            if key == "ours":
                raise
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}
            continue
        row["disagreement"] = max(errors)
        if not max(errors) <= ALLOWED:
            reason = f"differs from ours by {max(errors):.2g}, allowed {ALLOWED:g}"
            row |= {"status": "wrong", "reason": reason}
            continue
        row["status"] = "timed"
        slow |= {f"{key} {k}": [took] for k, took in once.items() if took > SLOW}
        calls |= {
            f"{key} {k}": functools.partial(way, side)
            for k, side in sides.items()
            if once[k] <= SLOW
        }
    plan.tell(f"{case}: timing")
    cold = slow | time_alternately(calls, plan)[0]
    for row in rows:
        for k in counts if row["status"] == "timed" else ():
            median = 1e3 * statistics.median(cold[f"{row['key']} {k}"])
            row[f"milliseconds_{k}"] = median
            row[f"cell_{k}"] = f"{median:.3g} ({median / k:.3g})"
    question = (__doc__ or "").splitlines()[0]
    return {
        **facts(case, question, system.problem, ACCURACY, plan, system.work),
        "columns": {
            "candidate": "candidate",
            **{f"k = {k}": f"cell_{k}" for k in counts},
            "largest difference from ours": "disagreement",
            "": "reason",
        },
        "rows": rows,
    }


def _dense(plan: Plan) -> _System:
    shape = (1, 12, 3) if plan.quick else (1, 1000, 10)
    problem = workloads.random(dense, shape, torch.float64, discount=0.95, temperature=0.1)
    problem = problem.to(plan.device)
    reward = problem.reward[0].clone().requires_grad_()
    rows, gamma = problem.transition[0], problem.discount
    solution = birl_ext.solve(reward, rows, discount=gamma, temperature=problem.temperature)
    policy = solution.policy.detach()
    states = len(reward)

    def matrix() -> Tensor:
        return torch.einsum("sa,sat->st", policy, rows)

    def factors(system: Tensor, side: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(torch.eye(states).to(system) - gamma * system, side.mT)
        return solved

    def push(directions: Tensor) -> Tensor:
        return torch.func.vmap(
            lambda side: birl_ext.evaluate(
                policy, side.unsqueeze(-1).expand_as(policy), rows, discount=gamma, validate="off"
            )
        )(directions)

    def pull_by_products(side: Tensor) -> Tensor:
        flow = _richardson(matrix().mT, side.mT.contiguous(), gamma, mass=True)
        return flow.mT.unsqueeze(-1) * policy

    return _System(
        "dense mid",
        problem,
        problem.work,
        policy,
        {
            "ours": ("birl_ext, backward of solve", (), _pull(solution.value, reward)),
            "lu": (
                "torch.linalg.solve",
                (),
                lambda side: factors(matrix().mT, side).mT.unsqueeze(-1) * policy,
            ),
            "products": ("torch.mm, Richardson with exact mass", (), pull_by_products),
        },
        {
            "ours": ("birl_ext.evaluate under vmap", (), push),
            "lu": ("torch.linalg.solve", (), lambda side: factors(matrix(), side).mT),
            "products": (
                "torch.mm, Richardson with constants deflated",
                (),
                lambda side: _richardson(matrix(), side.mT.contiguous(), gamma, mass=False).mT,
            ),
        },
    )


def _grid(plan: Plan) -> _System:
    problem = workloads.grid(SIDE[plan.quick], discount=0.99, temperature=0.1)
    problem = problem.to(plan.device)
    gamma = problem.discount
    reward = problem.reward.clone().requires_grad_()
    mdp = problem.mdp(reward)
    solution = birl_ext.solve(mdp, temperature=problem.temperature, tol=TOL)
    policy = solution.policy.detach()
    fixed = problem.mdp()

    def push(directions: Tensor) -> Tensor:
        def one(side: Tensor) -> Tensor:
            gain = side.unsqueeze(-1).expand_as(policy)
            return birl_ext.evaluate(policy, fixed.replace(reward=gain, validate="off"))

        return torch.func.vmap(one)(directions)

    def pull_by_products(side: Tensor) -> Tensor:
        matrix = problem.policy_matrix(policy, transpose=True)
        flow = _richardson(matrix, side.mT.contiguous(), gamma, mass=True)
        return flow.mT.unsqueeze(-1) * policy

    def push_by_products(side: Tensor) -> Tensor:
        matrix = problem.policy_matrix(policy)
        return _richardson(matrix, side.mT.contiguous(), gamma, mass=False).mT

    entries = problem.successor.numel()
    return _System(
        f"grid of {SIDE[plan.quick]}²",
        problem,
        Work(12 * entries, 2 * entries),
        policy,
        {
            "ours": ("birl_ext, backward of solve", (), _pull(solution.value, reward)),
            "products": ("torch CSR mm, Richardson with exact mass", (), pull_by_products),
            "lu": (
                "SciPy, sparse LU",
                ("scipy",),
                lambda side: _sparse_lu(problem, policy, side, True).unsqueeze(-1) * policy,
            ),
        },
        {
            "ours": ("birl_ext.evaluate under vmap", (), push),
            "products": (
                "torch CSR mm, Richardson with constants deflated",
                (),
                push_by_products,
            ),
            "lu": (
                "SciPy, sparse LU",
                ("scipy",),
                lambda side: _sparse_lu(problem, policy, side, False),
            ),
        },
    )


def _pull(value: Tensor, reward: Tensor) -> Way:
    def pull(side: Tensor) -> Tensor:
        if len(side) == 1:
            (grad,) = torch.autograd.grad(value, reward, side[0], retain_graph=True)
            return grad.unsqueeze(0)
        (grad,) = torch.autograd.grad(value, reward, side, retain_graph=True, is_grads_batched=True)
        return grad

    return pull


def _richardson(matrix: Tensor, side: Tensor, gamma: float, *, mass: bool) -> Tensor:
    """x of (I − γM) x = b, (S, k). M is a transposed P_π if `mass`: then the sum of each column is
    made exact first and stays so; else its rows sum to one, and the constant is removed each time.
    """
    tol = TOL * side.abs().sum(0) if mass else TOL * side.abs().amax(0)
    x = side
    if mass:
        x = (side.sum(0) / ((1 - gamma) * len(side))).expand_as(side)
    for _ in range(PRODUCTS):
        if side.shape[1] == 1:  # a CSR matrix times one column is many times slower as a product
            moved = torch.addmv(side[:, 0], matrix, x[:, 0], alpha=gamma).unsqueeze(1)
        else:
            moved = torch.addmm(side, matrix, x, alpha=gamma)
        change = moved - x
        x = moved
        if mass:
            left = change.abs().sum(0)
        else:
            low, high = change.aminmax(dim=0)
            left = (high - low) / 2
            x = x + gamma / (1 - gamma) * (low + high) / 2
        if bool((left <= tol).all()):
            break
    return x


def _sparse_lu(problem: GridProblem, policy: Tensor, side: Tensor, transpose: bool) -> Tensor:
    from scipy.sparse import csr_matrix, eye
    from scipy.sparse.linalg import splu

    matrix = problem.policy_matrix(policy)
    parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    rows = csr_matrix(tuple(part.numpy() for part in parts), shape=tuple(matrix.shape))
    factors = splu((eye(len(policy), format="csr") - problem.discount * rows).tocsc())
    return torch.from_numpy(factors.solve(side.mT.numpy(), trans="T" if transpose else "N").T)
