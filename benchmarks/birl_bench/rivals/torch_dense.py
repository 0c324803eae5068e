"""Dense MDPs in PyTorch: birl_ext, what a user writes, and what an expert writes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

import birl_ext
from birl_bench.harness import Answer, Candidate, Plan
from birl_bench.rivals import cuda_graphs, hard, jax_dense
from birl_bench.workloads import DenseProblem, policy_system

__all__ = [
    "BLOCK",
    "CAP",
    "Step",
    "bellman",
    "compiled",
    "forget_compilations",
    "forward",
    "gradient",
    "midpoint",
    "newton",
    "plain",
]

CAP = 100_000
"""Most sweeps of a loop."""
STEPS = 60
"""Most steps of Newton's method."""
BLOCK = 10
"""Sweeps of plain value iteration in one compiled call."""

Step = Callable[..., tuple[Tensor, Tensor]]
Solver = Callable[[], Answer]
UNROLLED = "hundreds of copies of P on the tape"


def forward(
    problem: DenseProblem, tol: float, plan: Plan, *, span_block: int, lists: str = ""
) -> list[Candidate]:
    """Everyone who finds V*; ours first.

    Args:
        tol: relative: certified error of ours, residual of the others.
        span_block: sweeps of the expert's loop in one compiled call.
        lists: why P is not handed to a package that takes Python lists; empty if it is.
    """
    expert = functools.partial(_loop, problem, midpoint, span_block, tol)
    found = [
        Candidate("ours", "birl_ext.solve", lambda: _ours(problem, tol), _read_ours),
        Candidate("exact", "the same, to rounding", lambda: _ours(problem, None), _read_ours),
        Candidate("floor", "read P once", lambda: _read(problem), solves="nothing"),
        Candidate(
            "eager", "PyTorch value iteration", lambda: _loop(problem, plain, 1, tol, eager=True)
        ),
        Candidate(
            "compiled",
            f"torch.compile, {BLOCK} sweeps a call",
            lambda: _loop(problem, plain, BLOCK, tol, eager=plan.quick),
            compiles=True,
        ),
        Candidate(
            "expert",
            "expert: torch.compile, midpoint and span",
            lambda: expert(eager=plan.quick),
            compiles=True,
        ),
        Candidate("newton", "PyTorch Newton, linalg.solve", lambda: newton(problem, tol)),
    ]
    if plan.cuda:
        found += cuda_graphs.forward(problem, tol, plain, midpoint, BLOCK, span_block)
    return found + jax_dense.forward(problem, tol) + hard.dense(problem, lists)


def gradient(
    problem: DenseProblem, tol: float, plan: Plan, *, span_block: int, unrolled: bool = True
) -> list[Candidate]:
    """Everyone who finds V* and the gradient of Σ w·V* with respect to r and P; ours first."""
    expert = functools.partial(_loop, problem, midpoint, span_block, tol)
    return [
        Candidate("ours", "birl_ext.solve and backward", lambda: _ours_gradient(problem, tol)),
        Candidate("exact", "the same, to rounding", lambda: _ours_gradient(problem, None)),
        Candidate(
            "unrolled",
            "PyTorch value iteration, unrolled",
            lambda: _unrolled(problem, tol),
            excuse="" if unrolled else UNROLLED,
        ),
        Candidate(
            "eager",
            "PyTorch value iteration, implicit by hand",
            lambda: _implicit(problem, _loop(problem, plain, 1, tol, eager=True)),
        ),
        Candidate(
            "expert",
            "expert: torch.compile, midpoint and span, implicit by hand",
            lambda: _implicit(problem, expert(eager=plan.quick)),
            compiles=True,
        ),
        Candidate(
            "newton",
            "PyTorch Newton, implicit by hand",
            lambda: _implicit(problem, newton(problem, tol)),
        ),
        *jax_dense.gradient(problem, tol),
    ]


# Ours


def _ours(problem: DenseProblem, tol: float | None) -> Callable[[], birl_ext.Solution]:
    return lambda: birl_ext.solve(
        problem.reward,
        problem.transition,
        discount=problem.discount,
        temperature=problem.temperature,
        tol=tol,
    )


def _ours_gradient(problem: DenseProblem, tol: float | None) -> Solver:
    reward = problem.reward.clone().requires_grad_()
    transition = problem.transition.clone().requires_grad_()

    def run() -> Answer:
        solution = birl_ext.solve(
            reward,
            transition,
            discount=problem.discount,
            temperature=problem.temperature,
            tol=tol,
        )
        loss = (problem.weight * solution.value).sum()
        grads = torch.autograd.grad(loss, (reward, transition))
        return _answer(solution.value, grads)

    return run


def _read_ours(solution: birl_ext.Solution) -> Answer:
    return Answer({"value": solution.value}, float(solution.iterations.double().mean()))


def _answer(value: Tensor, gradients: tuple[Tensor, ...]) -> Answer:
    return Answer({"value": value, "grad_reward": gradients[0], "grad_transition": gradients[1]})


def _read(problem: DenseProblem) -> Solver:
    def run() -> Answer:
        problem.transition.sum()
        return Answer({}, 1.0)

    return run


# PyTorch


def bellman(
    value: Tensor, reward: Tensor, transition: Tensor, discount: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """TV and Q."""
    q = reward + discount * torch.einsum("bsat,bt->bsa", transition, value)
    return temperature * torch.logsumexp(q / temperature, -1), q


def plain(value: Tensor, *data: Any, sweeps: int) -> tuple[Tensor, Tensor]:
    """V after some sweeps, and max |TV − V| of the last."""
    image = value
    for _ in range(sweeps):
        value = image
        image, _ = bellman(value, *data)
    return image, (image - value).abs().amax()


def midpoint(
    value: Tensor,
    reward: Tensor,
    transition: Tensor,
    discount: float,
    temperature: float,
    *,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """The same with the constant mode deflated: V ← TV + γ/(1−γ)·mid(TV − V); half-span (M6)."""
    for _ in range(sweeps):
        image, _ = bellman(value, reward, transition, discount, temperature)
        low, high = (image - value).aminmax(dim=-1, keepdim=True)
        value = image + discount / (1 - discount) * (low + high) / 2
    return value, (high - low).amax() / 2


def _loop(
    problem: DenseProblem, step: Step, sweeps: int, tol: float, *, eager: bool = False
) -> Solver:
    """Repeat a step until its residual is at most tol·max |V|."""
    advance = functools.partial(step, sweeps=sweeps) if eager else compiled(step, sweeps)

    def run() -> Answer:
        value = torch.zeros_like(problem.reward[..., 0])
        for done in itertools.count(sweeps, sweeps):
            value, residual = advance(value, *problem.data)
            if done >= CAP or bool(residual <= tol * value.abs().max()):
                return Answer({"value": value}, done)
        raise AssertionError

    return run


@functools.cache
def compiled(step: Step, sweeps: int) -> Step:
    """A step under torch.compile. A shape that is not compiled any more because there were too many
    is an error: otherwise the competitor would run uncompiled, and nobody would know.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return cast(Step, torch.compile(functools.partial(step, sweeps=sweeps), dynamic=False))


def forget_compilations() -> None:
    """Between cases: what was compiled for other shapes only slows the search for the right one."""
    compiled.cache_clear()
    torch.compiler.reset()


def newton(problem: DenseProblem, tol: float) -> Solver:
    """V ← V + (I − γP_π)⁻¹(TV − V) (M9), all of the batch in step."""

    def run() -> Answer:
        value = torch.zeros_like(problem.reward[..., 0])
        for done in range(1, STEPS + 1):  # noqa: B007 (the number of passes is the answer)
            image, q = bellman(value, *problem.data)
            low, high = (image - value).aminmax(dim=-1, keepdim=True)
            if bool((high - low).amax() / 2 <= tol * image.abs().max()):
                break
            policy = torch.softmax(q / problem.temperature, -1)
            system = policy_system(policy, problem.transition, problem.discount)
            value = value + torch.linalg.solve(system, image - value)
        shift = problem.discount / (1 - problem.discount) * (low + high) / 2
        return Answer({"value": image + shift}, done)

    return run


def _implicit(problem: DenseProblem, solve: Solver) -> Solver:
    """A solver and the implicit function theorem by hand (M12), with one linear solve."""

    def run() -> Answer:
        value = solve().tensors["value"]
        _, q = bellman(value, *problem.data)
        policy = torch.softmax(q / problem.temperature, -1)
        system = policy_system(policy, problem.transition, problem.discount)
        visits = torch.linalg.solve(system.mT, problem.weight).unsqueeze(-1) * policy
        outer = problem.discount * visits.unsqueeze(-1) * value[:, None, None, :]
        return _answer(value, (visits, outer))

    return run


def _unrolled(problem: DenseProblem, tol: float) -> Solver:
    """Autograd through every sweep of plain value iteration."""
    reward = problem.reward.clone().requires_grad_()
    transition = problem.transition.clone().requires_grad_()

    def run() -> Answer:
        value = torch.zeros_like(problem.weight)
        for _ in range(CAP):
            image, _ = bellman(value, reward, transition, problem.discount, problem.temperature)
            residual = (image - value).detach().abs().max()
            value = image
            if bool(residual <= tol * value.detach().abs().max()):
                break
        loss = (problem.weight * value).sum()
        return _answer(value, torch.autograd.grad(loss, (reward, transition)))

    return run
