"""Sparse MDPs: birl_ext, PyTorch's CSR products, compiled gathers, JAX.

What would take minutes is timed for a few sweeps; the time is that rate times the number of sweeps
that a solution takes, estimated from below: the smaller end of δ = TV − V falls by γ per sweep, and
what falls faster is ignored. Where δ has one sign that is a theorem. Where not, it is what full
runs on such grids show: counts come out 5 to 25 per cent too small, in favour of the rival.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import birl_ext
from birl_bench.harness import Answer, Candidate, Plan
from birl_bench.rivals import hard, jax_dense
from birl_bench.workloads import GridProblem

__all__ = ["adjoint", "forward", "sweeps_needed"]

PRODUCTS = 20
"""With P_π between two passes of the expert's modified policy iteration."""
PASSES = 5_000
"""Most of those passes."""
FEW = 10
"""Sweeps that are timed where a full solution would take minutes."""
PROBE = "value after {} sweeps"


def forward(
    problem: GridProblem, goal: float, tol: float, plan: Plan, *, slow: str, lists: str
) -> list[Candidate]:
    """Everyone who finds V*; ours first.

    Args:
        goal: the residual ‖TV − V‖∞, or half its span, at which the others stop: the same certified
            error as ours.
        tol: certified relative error of ours.
        slow, lists: as in `hard.sparse`.
    """
    mdp = problem.mdp()

    def probe(key: str, name: str, sweep: Callable[[Tensor], Tensor]) -> Candidate:
        return Candidate(
            key,
            name,
            lambda: lambda: _few(problem, sweep),
            lambda answer: _extrapolate(problem, answer, goal),
            compiles=True,
        )

    matrix, gather = _csr_sweep(problem), _gather_sweep(problem, plan)
    found = [
        Candidate("ours", "birl_ext.solve", lambda: _ours(mdp, problem, tol), _read_ours),
        *(
            Candidate(
                key,
                f"expert: {name}, modified policy iteration ({PRODUCTS}), span",
                functools.partial(_policy_iteration, problem, goal, plan, products),
                compiles=True,
            )
            for key, name, products in (
                ("expert", "torch CSR", _csr_products),
                ("gather expert", "torch.compile, gather", _gather_products),
            )
        ),
        probe("csr", "torch sparse CSR value iteration", matrix),
        probe("compiled", "torch.compile, gather, value iteration", gather),
    ]
    return [
        *found,
        Candidate(
            "jax",
            "JAX gather value iteration",
            functools.partial(_jax_few, problem),
            lambda values: _extrapolate(problem, _pair(jax_dense.to_torch(values)), goal),
            needs=("jax",),
            excuse="JAX is measured on the CPU only" if plan.cuda else "",
            compiles=True,
        ),
        *hard.sparse(problem, slow=slow, lists=lists),
    ]


def adjoint(
    problem: GridProblem, solution: birl_ext.Solution, reward: Tensor, goal: float, factor: str
) -> list[Candidate]:
    """Everyone who solves (I − γP_π)ᵀ λ = w given π, and returns λπ; ours first.

    Args:
        solution: solved with the graph of `reward`, which requires a gradient.
        goal: ‖w − (I − γP_π)ᵀ λ‖₁ at which the others stop.
        factor: why no LU factorisation is made; empty if one is.
    """
    policy = solution.policy.detach()
    loss = (problem.weight * solution.value).sum()

    def ours() -> Answer:
        (grad,) = torch.autograd.grad(loss, reward, retain_graph=True)
        return Answer({"grad_reward": grad})

    return [
        Candidate("ours", "birl_ext, backward of solve", lambda: ours),
        Candidate(
            "expert",
            "expert: torch CSR, Richardson with exact mass",
            lambda: lambda: _richardson(problem, policy, goal),
        ),
        Candidate(
            "richardson",
            "torch CSR, plain Richardson",
            lambda: lambda: _few_products(problem, policy),
            lambda _: Answer({}, FEW, _products_needed(problem, goal)),
        ),
        Candidate(
            "lu",
            "SciPy, sparse LU",
            lambda: lambda: _sparse_lu(problem, policy),
            needs=("scipy",),
            excuse=factor,
        ),
    ]


# Forward


def _ours(
    mdp: birl_ext.SparseMDP, problem: GridProblem, tol: float
) -> Callable[[], birl_ext.Solution]:
    return lambda: birl_ext.solve(mdp, temperature=problem.temperature, tol=tol)


def _read_ours(solution: birl_ext.Solution) -> Answer:
    return Answer({"value": solution.value}, float(solution.iterations))


def _image(q: Tensor, temperature: float) -> Tensor:
    return temperature * torch.logsumexp(q / temperature, -1)


def _csr_sweep(problem: GridProblem) -> Callable[[Tensor], Tensor]:
    matrix, reward = problem.csr, problem.reward

    def sweep(value: Tensor) -> Tensor:
        ahead = (matrix @ value).view_as(reward)
        return _image(reward + problem.discount * ahead, problem.temperature)

    return sweep


def _gather(
    value: Tensor,
    reward: Tensor,
    probability: Tensor,
    successor: Tensor,
    discount: float,
    temperature: float,
) -> Tensor:
    ahead = (probability * value[successor].unsqueeze(1)).sum(-1)
    return _image(reward + discount * ahead, temperature)


def _gather_sweep(problem: GridProblem, plan: Plan) -> Callable[[Tensor], Tensor]:
    step = _gather if plan.quick else torch.compile(_gather, dynamic=False)
    reward, probability, _, discount, temperature = problem.data
    return lambda value: step(value, reward, probability, problem.index, discount, temperature)


Products = Callable[[GridProblem, Plan], Callable[[Tensor, Tensor, Tensor], Tensor]]
"""Makes (V, entries of P_π (S, K), r_π) → V after `PRODUCTS` times V ← r_π + γP_πV."""


def _csr_products(problem: GridProblem, plan: Plan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    pattern = problem.policy_matrix(torch.zeros_like(problem.reward))
    crow, col = pattern.crow_indices(), pattern.col_indices()

    def products(value: Tensor, entries: Tensor, gain: Tensor) -> Tensor:
        matrix = torch.sparse_csr_tensor(
            crow, col, entries.flatten(), pattern.shape, check_invariants=False
        )
        for _ in range(PRODUCTS):
            value = torch.addmv(gain, matrix, value, alpha=problem.discount)
        return value

    return products


def _gather_products(
    problem: GridProblem, plan: Plan
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    index, gamma = problem.index, problem.discount

    def product(value: Tensor, entries: Tensor, gain: Tensor) -> Tensor:
        return gain + gamma * (entries * value[index]).sum(-1)

    step = product if plan.quick else torch.compile(product, dynamic=False)

    def products(value: Tensor, entries: Tensor, gain: Tensor) -> Tensor:
        for _ in range(PRODUCTS):
            value = step(value, entries, gain)
        return value

    return products


def _policy_iteration(
    problem: GridProblem, goal: float, plan: Plan, products: Products
) -> Callable[[], Answer]:
    """Improve, then products; the midpoint shift and a stop by span. The pass is compiled."""
    reward, probability, _, gamma, tau = problem.data
    index = problem.index

    def improve(value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q = reward + gamma * (probability * value[index].unsqueeze(1)).sum(-1)
        image = tau * torch.logsumexp(q / tau, -1)
        log_policy = (q - image.unsqueeze(-1)) / tau
        policy = log_policy.exp()
        entries = (policy.unsqueeze(-1) * probability).sum(1)
        gain = (policy * (reward - tau * log_policy)).sum(-1)
        low, high = (image - value).aminmax()
        return image, low, high, entries, gain

    step = improve if plan.quick else torch.compile(improve, dynamic=False)
    evaluate = products(problem, plan)

    def run() -> Answer:
        value = torch.zeros_like(problem.weight)
        for done in range(1, PASSES + 1):  # noqa: B007 (the number of passes is the answer)
            image, low, high, entries, gain = step(value)
            if bool((high - low) / 2 <= goal):
                break
            value = evaluate(image, entries, gain)
        return Answer({"value": image + gamma / (1 - gamma) * (low + high) / 2}, done)

    return run


# A few sweeps, and how many it takes


def _few(problem: GridProblem, sweep: Callable[[Tensor], Tensor]) -> Answer:
    value = torch.zeros_like(problem.weight)
    for _ in range(FEW):
        before, value = value, sweep(value)
    return _pair(torch.stack((before, value)))


def _pair(last: Tensor) -> Answer:
    return Answer({"": last}, FEW)


def _extrapolate(problem: GridProblem, answer: Answer, goal: float) -> Answer:
    before, value = answer.tensors[""].to(problem.device)
    needed = sweeps_needed(value - before, problem.discount, goal, FEW)
    return Answer({PROBE.format(FEW): value}, FEW, needed)


def sweeps_needed(moved: Tensor, discount: float, goal: float, done: int) -> float:
    """About the fewest sweeps until ‖TV − V‖∞ ≤ goal, if the last one done moved V by `moved`."""
    least = min(abs(float(end)) for end in moved.aminmax())
    return done + max(0.0, math.log(goal / least) / math.log(discount)) if least else done


def known_sweeps(problem: GridProblem) -> Mapping[str, Tensor]:
    """V after the few sweeps, by an independent way: what the extrapolated rows must reproduce."""
    value = torch.zeros_like(problem.weight)
    for _ in range(FEW):
        value = _image(problem.backup(value), problem.temperature)
    return {PROBE.format(FEW): value}


def _jax_few(problem: GridProblem) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    reward, probability, successor, gamma, tau = (
        jnp.asarray(x.numpy()) if isinstance(x, Tensor) else x for x in problem.data
    )

    def sweep(value: Any, _: Any) -> tuple[Any, Any]:
        q = reward + gamma * (probability * value[successor][:, None]).sum(-1)
        return tau * jax.scipy.special.logsumexp(q / tau, axis=-1), value

    def few(start: Any) -> Any:
        value, before = jax.lax.scan(sweep, start, None, length=FEW)
        return jnp.stack((before[-1], value))

    start, run = jnp.zeros(len(problem.weight)), jax.jit(few)
    return lambda: jax.block_until_ready(run(start))


# Adjoint


def _richardson(problem: GridProblem, policy: Tensor, goal: float) -> Answer:
    """λ ← w + γP_πᵀλ from a start of the exact mass Σw/(1 − γ), until the residual is at the goal.

    The entries of P_πᵀ are computed here, as they are in a backward pass; its pattern is known.
    """
    gamma, weight = problem.discount, problem.weight
    matrix = problem.policy_matrix(policy, transpose=True)
    flow = torch.full_like(weight, float(weight.sum()) / (1 - gamma) / len(weight))
    for _ in range(PASSES * PRODUCTS):
        moved = torch.addmv(weight, matrix, flow, alpha=gamma)
        residual = (moved - flow).abs().sum()
        flow = moved
        if bool(residual <= goal):
            break
    return Answer({"grad_reward": flow.unsqueeze(-1) * policy})


def _few_products(problem: GridProblem, policy: Tensor) -> Answer:
    matrix = problem.policy_matrix(policy, transpose=True)
    flow = problem.weight
    for _ in range(FEW):
        flow = torch.addmv(problem.weight, matrix, flow, alpha=problem.discount)
    return Answer({}, FEW)


def _products_needed(problem: GridProblem, goal: float) -> float:
    """Where all sources are positive, mass is conserved: the residual is Σw·γᵏ exactly."""
    return math.log(goal / float(problem.weight.sum())) / math.log(problem.discount)


def _sparse_lu(problem: GridProblem, policy: Tensor) -> Answer:
    from scipy.sparse import csc_matrix, eye
    from scipy.sparse.linalg import splu

    matrix = problem.policy_matrix(policy)
    parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    # the transpose of a CSR matrix is the same three arrays read as CSC
    transposed = csc_matrix(tuple(part.numpy() for part in parts), shape=tuple(matrix.shape))
    system = eye(len(policy), format="csc") - problem.discount * transposed
    flow = torch.from_numpy(splu(system).solve(problem.weight.numpy()))
    return Answer({"grad_reward": flow.unsqueeze(-1) * policy})
