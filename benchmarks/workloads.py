"""The random MDPs of the benchmarks and their solution in float64."""

from __future__ import annotations

import torch
from harness import Problem
from torch import Tensor

__all__ = ["dense", "garnet", "newton", "policy_system", "truth"]


def garnet(
    batch: int,
    states: int,
    actions: int,
    dtype: torch.dtype,
    *,
    discount: float,
    temperature: float,
    branching: int = 4,
    seed: int = 0,
) -> Problem:
    """`branching` random successors with random weights for each state and action, stored dense."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, states, actions, states)
    rank = torch.rand(shape, generator=generator).argsort(-1)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) + 1e-3
    return _problem(weights * (rank < branching), dtype, discount, temperature, generator)


def dense(
    batch: int,
    states: int,
    actions: int,
    dtype: torch.dtype,
    *,
    discount: float,
    temperature: float,
    seed: int = 0,
) -> Problem:
    """Every state is reached from everywhere."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch, states, actions, states, generator=generator, dtype=torch.float64)
    return _problem(weights, dtype, discount, temperature, generator)


def _problem(
    weights: Tensor,
    dtype: torch.dtype,
    discount: float,
    temperature: float,
    generator: torch.Generator,
) -> Problem:
    transition = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    reward = torch.rand(weights.shape[:-1], generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.rand(weights.shape[:2], generator=generator, dtype=torch.float64).to(dtype)
    return Problem(reward, transition, discount, temperature, weight)


def truth(problem: Problem) -> dict[str, Tensor]:
    """V*, π* and the gradient of Σ w·V* in float64, for the rows P/ΣP of the stored P.

    dr = λπ and dP = γλπ(V − Σ_t P V) with (I − γP_π)ᵀ λ = w (M12), on the tangent of the simplex.
    """
    reward, rows = problem.reward.double(), problem.transition.double()
    rows = rows / rows.sum(-1, keepdim=True)
    gamma, tau = problem.discount, problem.temperature
    value, policy = newton(reward, rows, gamma, tau)
    flow = torch.linalg.solve(policy_system(policy, rows, gamma).mT, problem.weight.double())
    visits = flow.unsqueeze(-1) * policy
    ahead = torch.einsum("bsat,bt->bsa", rows, value)
    moved = value[:, None, None, :] - ahead.unsqueeze(-1)
    return {
        "value": value,
        "policy": policy,
        "grad_reward": visits,
        "grad_transition": gamma * visits.unsqueeze(-1) * moved,
    }


def newton(
    reward: Tensor, rows: Tensor, discount: float, temperature: float, steps: int = 60
) -> tuple[Tensor, Tensor]:
    """V* and π* by Newton's method (M9), until a step changes nothing but rounding."""
    value = torch.zeros_like(reward[..., 0])
    best = torch.inf
    for _ in range(steps):
        q = reward + discount * torch.einsum("bsat,bt->bsa", rows, value)
        image = temperature * torch.logsumexp(q / temperature, -1)
        policy = torch.softmax(q / temperature, -1)
        change = torch.linalg.solve(policy_system(policy, rows, discount), image - value)
        value = value + change
        size = float(change.abs().max() / value.abs().max())
        if size >= best and size < 1e-9:
            break
        best = min(best, size)
    q = reward + discount * torch.einsum("bsat,bt->bsa", rows, value)
    return value, torch.softmax(q / temperature, -1)


def policy_system(policy: Tensor, rows: Tensor, discount: float) -> Tensor:
    """I − γP_π, (B, S, S)."""
    matrix = torch.einsum("bsa,bsat->bst", policy, rows)
    return torch.eye(rows.shape[-1], dtype=rows.dtype) - discount * matrix
