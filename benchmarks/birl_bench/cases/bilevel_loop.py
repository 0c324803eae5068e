"""What does an outer step of a bilevel loop cost, and how wrong is its hyper-gradient?

200 outer steps of gradient descent on Four Rooms (104 states, γ = .99, τ = .001) and on a random
MDP (10 states, 5 actions). Everyone walks the same path x₀, x₁, …, that of exact gradients in
float64 (Newton's method and a library's linear solve, nothing of ours), and keeps whatever it wants
from one step for the next. The error is that of ∇φ at x_k, relative to ‖∇φ(x_k)‖.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import birl_ext
from birl_bench.harness import Plan, facts
from birl_bench.rivals import torch_dense
from birl_bench.workloads import DenseProblem, newton, policy_system
from birl_ext.bilevel import BilevelProblem, MSoBiRL

__all__ = ["run"]

STEPS = 200
TOL = 1e-10
"""Relative residual at which the rivals' inner loops stop."""
FIXED = 500
"""Sweeps per outer step, from zero, of the published Four Rooms code; γ⁵⁰⁰ is .0066."""
COLUMNS = {
    "candidate": "candidate",
    "ms per outer step": "milliseconds",
    "× ours": "times_ours",
    "error of ∇φ, median": "median_error",
    "error of ∇φ, largest": "largest_error",
    "": "reason",
}
ACCURACY = "birl_ext: to rounding; the others: relative residual 1e-10"


class _Level(NamedTuple):
    """A bilevel problem for everyone: ours, and in plain PyTorch.

    Attributes:
        ours: the two levels for birl_ext.
        reward: x → r (C, S, A); rows: P (C, S, A, S), zero where the process ends.
        upper: (x, π) → φ, in PyTorch alone.
        rate: of the outer descent.
    """

    name: str
    ours: BilevelProblem
    start: Tensor
    reward: Callable[[Tensor], Tensor]
    rows: Tensor
    upper: Callable[[Tensor, Tensor], Tensor]
    discount: float
    temperature: float
    rate: float


Gradient = Callable[[Tensor], Tensor]
"""x_k → ∇φ(x_k); may remember the step before."""


def run(plan: Plan) -> list[dict[str, Any]]:
    return [_measure(level, plan) for level in (_four_rooms(), _random_mdp())]


def _measure(level: _Level, plan: Plan) -> dict[str, Any]:
    steps = 4 if plan.quick else STEPS
    path, gradients = _path(level, steps)
    rows: list[dict[str, Any]] = []
    for key, name, gradient in _ways(level, plan):
        plan.tell(f"bilevel loop, {level.name}: {name}")
        seconds, errors = [], []
        for x, right in zip(path, gradients, strict=True):
            start = time.perf_counter()
            found = gradient(x)
            seconds.append(time.perf_counter() - start)
            errors.append(float((found - right).norm() / right.norm()))
        milliseconds = 1e3 * statistics.mean(seconds[1:])  # the first one compiles, or starts cold
        row = {"key": key, "candidate": name, "solves": "soft", "status": "timed"}
        rows.append(
            row
            | {"milliseconds": milliseconds, "times_ours": None}
            | {"median_error": statistics.median(errors), "largest_error": max(errors)}
        )
    for row in rows:
        row["times_ours"] = row["milliseconds"] / rows[0]["milliseconds"]
    if not rows[0]["largest_error"] < 1e-6:
        rows[0] |= {"status": "wrong", "reason": "the hyper-gradient is not that of the truth"}
    problem = _problem(level, level.reward(level.start))
    return {
        **facts(
            f"bilevel loop, {level.name}",
            (__doc__ or "").splitlines()[0],
            problem,
            f"{steps} outer steps; {ACCURACY}",
            plan,
        ),
        "columns": COLUMNS,
        "rows": rows,
    }


def _path(level: _Level, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """x_k and ∇φ(x_k) of exact gradient descent."""
    exact = _differentiable(level, lambda problem, _: _newton_from_zero(problem))
    path, gradients = [level.start], []
    for _ in range(steps):
        gradients.append(exact(path[-1]))
        path.append(path[-1] - level.rate * gradients[-1])
    return path[:-1], gradients


def _ways(level: _Level, plan: Plan) -> list[tuple[str, str, Gradient]]:
    midpoint = functools.partial(_sweep_on, step=torch_dense.midpoint, sweeps=4, plan=plan)
    return [
        ("ours", "birl_ext.solve and backward, warm start", _ours(level)),
        (
            "published",
            "SoBiRL as published: ten sweeps, one adjoint step",
            _single_loop(level),
        ),
        (
            "expert",
            "expert: torch.compile, warm start, implicit by hand",
            _differentiable(level, midpoint),
        ),
        (
            "newton",
            "PyTorch Newton, warm start, implicit by hand",
            _differentiable(level, _newton_on),
        ),
        (
            "fixed",
            f"PyTorch, {FIXED} sweeps from zero, implicit by hand",
            _differentiable(level, functools.partial(_sweep_always, sweeps=FIXED)),
        ),
    ]


# Ours


def _ours(level: _Level) -> Gradient:
    value: Tensor | None = None

    def gradient(x: Tensor) -> Tensor:
        nonlocal value
        x = x.clone().requires_grad_()
        phi, solution = level.ours.evaluate(x, level.temperature, value)
        value = solution.value.detach()
        return torch.autograd.grad(phi, x)[0]

    return gradient


def _single_loop(level: _Level) -> Gradient:
    """One step of M-SoBiRL per x, told where x is instead of moving it."""
    algorithm = MSoBiRL(
        level.ours,
        level.start,
        temperature=level.temperature,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        mode="published",
        accuracy=math.inf,  # measured here
    )

    def gradient(x: Tensor) -> Tensor:
        with torch.no_grad():
            algorithm.x.copy_(x)
        algorithm.step()
        assert algorithm.x.grad is not None
        found: Tensor = algorithm.x.grad.clone()
        return found

    return gradient


# Rivals: a solver of the lower level, and the implicit function theorem by hand

Inner = Callable[[DenseProblem, Tensor | None], Tensor]
"""(problem, V of the step before) → V."""


def _problem(level: _Level, reward: Tensor) -> DenseProblem:
    weight = reward.new_zeros(reward.shape[:2])
    return DenseProblem(reward, level.rows, level.discount, level.temperature, weight)


def _differentiable(level: _Level, solve: Inner) -> Gradient:
    memory: list[Tensor] = []

    class FixedPoint(torch.autograd.Function):
        """V*(r), with dr = λπ, (I − γP_π)ᵀ λ = v̄ (M12)."""

        @staticmethod
        def forward(ctx: Any, reward: Tensor) -> Tensor:
            problem = _problem(level, reward)
            value = solve(problem, memory[-1] if memory else None)
            memory[:] = [value]
            _, q = torch_dense.bellman(value, *problem.data)
            ctx.save_for_backward(torch.softmax(q / level.temperature, -1))
            return value.clone()

        @staticmethod
        def backward(ctx: Any, bar: Tensor) -> Tensor:
            policy: Tensor = ctx.saved_tensors[0]
            system = policy_system(policy, level.rows, level.discount)
            flow: Tensor = torch.linalg.solve(system.mT, bar)
            return flow.unsqueeze(-1) * policy

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        reward = level.reward(x)
        value: Tensor = FixedPoint.apply(reward)  # type: ignore[no-untyped-call]
        _, q = torch_dense.bellman(value, *_problem(level, reward).data)
        policy = torch.softmax(q / level.temperature, -1)
        return torch.autograd.grad(level.upper(x, policy), x)[0]

    return gradient


def _newton_from_zero(problem: DenseProblem) -> Tensor:
    return newton(problem.reward, problem.transition, problem.discount, problem.temperature)[0]


def _newton_on(problem: DenseProblem, value: Tensor | None) -> Tensor:
    value = torch.zeros_like(problem.weight) if value is None else value
    for _ in range(torch_dense.STEPS):
        image, q = torch_dense.bellman(value, *problem.data)
        if bool((image - value).abs().max() <= TOL * image.abs().max()):
            return image
        policy = torch.softmax(q / problem.temperature, -1)
        system = policy_system(policy, problem.transition, problem.discount)
        value = value + torch.linalg.solve(system, image - value)
    return value


def _sweep_on(
    problem: DenseProblem,
    value: Tensor | None,
    *,
    step: torch_dense.Step,
    sweeps: int,
    plan: Plan,
) -> Tensor:
    """Midpoint shifts assume that nothing ends: where something does, plain sweeps."""
    ends = bool((problem.transition.sum(-1) == 0).any())
    step = torch_dense.plain if ends else step
    sweeps = torch_dense.BLOCK if ends else sweeps
    value = torch.zeros_like(problem.weight) if value is None else value
    if plan.quick:
        advance: torch_dense.Step = functools.partial(step, sweeps=sweeps)
    else:
        advance = torch_dense.compiled(step, sweeps)
    for _ in range(torch_dense.CAP // sweeps):
        value, residual = advance(value, *problem.data)
        if bool(residual <= TOL * value.abs().max()):
            break
    return value


def _sweep_always(problem: DenseProblem, value: Tensor | None, *, sweeps: int) -> Tensor:
    value = torch.zeros_like(problem.weight)
    for _ in range(sweeps):
        value, _ = torch_dense.bellman(value, *problem.data)
    return value


# Problems


def _four_rooms() -> _Level:
    """Two goals, kappa 1; J of the upper level by a linear solve."""
    from birl_ext.problems.four_rooms import DISCOUNT, FourRooms

    rooms = FourRooms(1.0)
    rows = rooms.mdp.to_dense().transition
    states, actions = rows.shape[-1], rows.shape[-2]
    goals, price = rooms.goals, rooms.kappa

    def reward(w: Tensor) -> Tensor:
        paid = goals + rooms.incentive(w).unsqueeze(-2) * (1 - goals)
        return paid.unsqueeze(-1).expand(*paid.shape, actions)

    def upper(w: Tensor, policy: Tensor) -> Tensor:
        wanted = torch.zeros_like(goals)
        wanted[:, rooms.target] = 1
        gain = wanted + price * rooms.incentive(w).sum() * goals
        values = torch.linalg.solve(policy_system(policy, rows, DISCOUNT), gain)
        value: Tensor = -values[:, rooms.start].mean()
        return value

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(states + 1, generator=generator, dtype=torch.float64)
    return _Level(
        "four rooms", rooms.problem(), start, reward, rows, upper, DISCOUNT, 1e-3, rate=1.0
    )


def _random_mdp() -> _Level:
    from birl_ext.problems.random_mdp import RandomMDPConfig, random_mdp_problem

    config = RandomMDPConfig()
    ours, start = random_mdp_problem(config)
    lower = ours.lower(start)
    assert isinstance(lower, birl_ext.DenseMDP)

    def reward(x: Tensor) -> Tensor:
        return ours.lower(x).reward.unsqueeze(0)

    def upper(x: Tensor, policy: Tensor) -> Tensor:
        return (x.square().sum() + policy.square().sum()) / 2

    return _Level(
        "random MDP",
        ours,
        start,
        reward,
        lower.transition.unsqueeze(0),
        upper,
        config.discount,
        config.temperature,
        rate=5e-3,
    )
