"""With float32 data and a long horizon, whose policy and gradient are right, and who knows it?

γ = 0.9999, τ = 1e-3: values are near 1e4 and the policy turns on differences of 1e-3, which float32
cannot hold beside them. Nobody is refused here: the errors are the result. Truth is float64 on the
same stored numbers, with rows divided by their sum. A certificate is honest where the bound is not
below the error; the tightest and the loosest are shown.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import birl_ext
from birl_bench import machine, workloads
from birl_bench.families import dense
from birl_bench.harness import Answer, Plan, facts
from birl_bench.rivals import jax_dense, torch_dense
from birl_bench.workloads import DenseProblem
from birl_ext.options import MethodName

__all__ = ["run"]

TOL = 1e-6
PATIENCE = 3
"""Calls without a smaller residual after which the expert's loop has stagnated. Plain iteration
gets a horizon of sweeps: its residual stays at one unit in the last place for thousands of them.
"""
SECONDS = 1.0
COLUMNS = {
    "candidate": "candidate",
    "ms, with gradient": "milliseconds",
    "samples": "samples",
    "passes": "passes",
    "error of V, relative": "value_error",
    "error of π, absolute": "policy_error",
    "error of the gradient of Σ u·π, relative": "grad_error",
    "certificate honest": "honest",
    "bound/error, least": "tightest",
    "bound/error, most": "loosest",
}


class Found(NamedTuple):
    """V and π, each (B, S, …), the gradient of Σ u·π* with respect to r, and certified errors."""

    value: Tensor
    policy: Tensor
    grad: Tensor
    bound: Tensor | None = None
    passes: float | None = None


class _Way(NamedTuple):
    key: str
    name: str
    prepare: Callable[[], Callable[[], Found]]
    needs: tuple[str, ...] = ()


def run(plan: Plan) -> list[dict[str, Any]]:
    shape = (2, 6, 2) if plan.quick else (256, 32, 8)
    discount, temperature = (0.99, 0.1) if plan.quick else (0.9999, 1e-3)
    problem = workloads.random(
        dense, shape, torch.float32, discount=discount, temperature=temperature
    )
    problem = problem.to(plan.device)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.rand(shape, generator=generator, dtype=torch.float64).to(plan.device)
    truth = _truth(problem, cotangent)
    accuracy = "ours: as far as rounding allows; the others: until the residual falls no more"
    question = (__doc__ or "").splitlines()[0]
    return [
        {
            **facts("float32 truth", question, problem, accuracy, plan),
            "columns": COLUMNS,
            "rows": [_row(way, truth, plan) for way in _ways(problem, cotangent, plan)],
        }
    ]


def _row(way: _Way, truth: Found, plan: Plan) -> dict[str, Any]:
    row: dict[str, Any] = {"key": way.key, "candidate": way.name, "solves": "soft"}
    if absent := machine.missing(*way.needs):
        return row | {"status": "missing", "reason": absent, "honest": absent}
    plan.tell(f"float32 truth: {way.name}")
    try:
        call = way.prepare()
        seconds: list[float] = []
        while not seconds or (len(seconds) < 9 and sum(seconds) < SECONDS):
            machine.wait(plan.device)
            start = time.perf_counter()
            found = call()
            machine.wait(plan.device)
            seconds.append(time.perf_counter() - start)
    except Exception as failure:  # a competitor that does not run is a result, not the end
        if way.key.startswith("ours"):
            raise
        reason = f"{type(failure).__name__}: {failure}"[:200]
        return row | {"status": "failed", "reason": reason, "honest": reason}
    row |= {"status": "timed", "milliseconds": 1e3 * statistics.median(seconds)}
    row |= {"samples": len(seconds), "passes": found.passes}
    row["value_error"] = _relative(found.value, truth.value)
    row["policy_error"] = float((found.policy.double() - truth.policy).abs().max())
    row["grad_error"] = _relative(found.grad, truth.grad)
    if found.bound is None:
        return row | {"honest": "none given"}
    error = (found.value.double() - truth.value).abs().amax(-1)
    ratio = found.bound.double() / error
    honest = int((found.bound.double() >= error).sum())
    row["dishonest"] = len(error) - honest
    row["honest"] = f"{'yes' if honest == len(error) else 'NO'}: {honest} of {len(error)}"
    if honest < len(error):
        row |= {"status": "wrong", "reason": "a certified bound is below the error"}
    return row | {"tightest": float(ratio.min()), "loosest": float(ratio.max())}


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


def _ways(problem: DenseProblem, cotangent: Tensor, plan: Plan) -> list[_Way]:
    single = cotangent.float()
    horizon = round(1 / (1 - problem.discount)) // torch_dense.BLOCK

    def by_hand(solve: Callable[[], Answer]) -> Callable[[], Found]:
        def run() -> Found:
            answer = solve()
            found = _implicit(problem, answer.tensors["value"], single)
            return found._replace(passes=answer.passes)

        return run

    def loop(step: torch_dense.Step, sweeps: int, patience: int) -> Callable[[], Found]:
        return by_hand(_until_stagnation(problem, step, sweeps, patience, plan))

    plain, midpoint, block = torch_dense.plain, torch_dense.midpoint, torch_dense.BLOCK
    ways = [
        _Way("ours", "birl_ext.solve and backward", lambda: lambda: _ours(problem, single)),
        _Way(
            "ours newton",
            "the same by Newton's method",
            lambda: lambda: _ours(problem, single, "newton"),
        ),
        _Way(
            "compiled",
            f"torch.compile, {block} sweeps a call, implicit by hand",
            lambda: loop(plain, block, horizon),
        ),
        _Way(
            "expert",
            "expert: torch.compile, midpoint and span, implicit by hand",
            lambda: loop(midpoint, 4, PATIENCE),
        ),
        _Way(
            "newton",
            "PyTorch Newton, linalg.solve, implicit by hand",
            lambda: by_hand(torch_dense.newton(problem, TOL)),
        ),
    ]
    if not plan.cuda:
        name, needs = jax_dense.SOLVERS["optimistix"]
        prepare = functools.partial(_optimistix, problem, single)
        ways.append(_Way("optimistix", f"{name} and its adjoint", prepare, needs))
    return ways


def _ours(problem: DenseProblem, cotangent: Tensor, method: MethodName = "auto") -> Found:
    reward = problem.reward.clone().requires_grad_()
    solution = birl_ext.solve(
        reward,
        problem.transition,
        discount=problem.discount,
        temperature=problem.temperature,
        method=method,
    )
    (grad,) = torch.autograd.grad((solution.policy * cotangent).sum(), reward)
    passes = float(solution.iterations.max())
    value, policy = solution.value.detach(), solution.policy.detach()
    return Found(value, policy, grad, solution.error_bound.detach(), passes)


def _until_stagnation(
    problem: DenseProblem, step: torch_dense.Step, sweeps: int, patience: int, plan: Plan
) -> Callable[[], Answer]:
    """Repeat a compiled step until its residual is zero, or has not fallen for `patience` calls."""
    if plan.quick:
        advance: torch_dense.Step = functools.partial(step, sweeps=sweeps)
    else:
        advance = torch_dense.compiled(step, sweeps)
    advance(torch.zeros_like(problem.weight), *problem.data)  # compiles

    def run() -> Answer:
        value = torch.zeros_like(problem.weight)
        best, stale = float("inf"), 0
        for done in itertools.count(sweeps, sweeps):
            value, residual = advance(value, *problem.data)
            stale = 0 if float(residual) < best else stale + 1
            best = min(best, float(residual))
            if best == 0 or stale >= patience or done >= torch_dense.CAP:
                break
        return Answer({"value": value}, done)

    return run


def _implicit(problem: DenseProblem, value: Tensor, cotangent: Tensor) -> Found:
    """π at V, and the gradient of Σ u·π* by the implicit function theorem, in the dtype of V.

    With g = π(u − Σπu)/τ, the cotangent of Q: r̄ = g + λπ, (I − γP_π)ᵀ λ = γ Pᵀg − Σ_a g, where the
    last term is zero (M11), (M12).
    """
    reward, transition, discount, temperature = problem.data
    transition = transition.to(value.dtype)
    _, q = torch_dense.bellman(value, reward.to(value.dtype), transition, discount, temperature)
    policy = torch.softmax(q / temperature, -1)
    mean = (policy * cotangent).sum(-1, keepdim=True)
    grad_q = policy * (cotangent - mean) / temperature
    source = discount * torch.einsum("bsa,bsat->bt", grad_q, transition)
    system = workloads.policy_system(policy, transition, discount)
    flow = torch.linalg.solve(system.mT, source)
    return Found(value, policy, grad_q + flow.unsqueeze(-1) * policy)


def _optimistix(problem: DenseProblem, cotangent: Tensor) -> Callable[[], Found]:
    import jax
    import jax.numpy as jnp

    discount, tau = problem.discount, problem.temperature
    find = functools.partial(jax_dense.solver, "optimistix", discount, tau, TOL)

    def loss(reward: Any, transition: Any, weight: Any) -> Any:
        value = jax.vmap(find)(reward, transition)
        q = reward + discount * jnp.einsum("bsat,bt->bsa", transition, value)
        policy = jax.nn.softmax(q / tau, axis=-1)
        return (policy * weight).sum(), (value, policy)

    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    tensors = problem.reward, problem.transition, cotangent
    arrays = [jnp.asarray(tensor.numpy()) for tensor in tensors]
    jax.block_until_ready(function(*arrays))  # compiles

    def run() -> Found:
        (_, (value, policy)), grad = jax.block_until_ready(function(*arrays))
        value, policy, grad = map(jax_dense.to_torch, (value, policy, grad))
        return Found(value, policy, grad)

    return run


def _truth(problem: DenseProblem, cotangent: Tensor) -> Found:
    exact = problem.exact()
    value, _ = workloads.newton(exact.reward, exact.transition, exact.discount, exact.temperature)
    return _implicit(exact, value, cotangent)
