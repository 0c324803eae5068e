"""The policy system (I − γP_π) x = b and its transpose: op, derivatives, vmap rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from birl_ext.ops import _backends
from birl_ext.ops._registry import (
    LIBRARY,
    Function,
    are_plain,
    below_autograd,
    fold,
    in_graph,
    register_derivative,
    to_lanes,
)
from birl_ext.ops.rows import Rows

__all__ = ["policy_solve"]

LIBRARY.define(
    "policy_solve(Tensor transition, Tensor crow, Tensor col, Tensor policy, Tensor discount, "
    "Tensor rhs, bool transpose, float tol, int method, int backend) -> (Tensor, Tensor)"
)


@torch.library.register_fake("birl_ext::policy_solve")
def _(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    policy: Tensor,
    discount: Tensor,
    rhs: Tensor,
    transpose: bool,
    tol: float,
    method: int,
    backend: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rhs, memory_format=torch.contiguous_format), rhs.new_empty(
        rhs.shape[:-1]
    )


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("policy_solve", _backends.policy_solve, _key)


class PolicySolve(Function):
    """x = (I − γP_π)⁻¹ b, or with the transpose; every derivative is again a solve with the same
    matrix.

    Shapes: transition as in Rows; policy (N, G, S, A); discount (N, G); rhs and x (N, G, K, S).
    With A = I − γP_π and x̄ the cotangent of x: b̄ = A⁻ᵀ x̄ and M̄ = γ u wᵀ for M = P_π, where (u,
    w) = (b̄, x), or (x, b̄) for the transposed system.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        if are_plain(args[:6]):
            return _backends.policy_solve(*args)
        outputs: tuple[Tensor, Tensor] = below_autograd("policy_solve", *args)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        transition, crow, col, policy, discount, _, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(transition, crow, col, policy, discount, output[0])
        ctx.save_for_forward(transition, crow, col, policy, discount, output[0])

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        transition, crow, col, policy, discount, x = ctx.saved_tensors
        transpose, *options = ctx.options
        if x_bar is None:
            return (None,) * 10
        rhs_bar, _ = PolicySolve.apply(
            transition, crow, col, policy, discount, x_bar, not transpose, *options
        )
        needs_transition, needs_policy, needs_discount = (
            ctx.needs_input_grad[i] for i in (0, 3, 4)
        )
        transition_bar = policy_bar = discount_bar = None
        if needs_transition or needs_policy or needs_discount:
            u, w = (x, rhs_bar) if transpose else (rhs_bar, x)
            rows = Rows(transition, crow, col, policy.shape[-2], policy.shape[-1])
            scale = rows.scale()
            expected = _apply(rows, scale, w)  # (N, G, K, S, A)
            flow = u.unsqueeze(-1) * expected
            if needs_policy:
                policy_bar = discount[..., None, None] * flow.sum(2)
            if needs_discount:
                discount_bar = (policy.unsqueeze(2) * flow).sum((2, 3, 4))
            if needs_transition:
                weight = (discount[..., None, None] * policy * scale).unsqueeze(2) * u.unsqueeze(-1)
                transition_bar = rows.outer(
                    _as_group(weight), _as_group(w), (weight * expected).sum((1, 2))
                )
        return (
            transition_bar,
            None,
            None,
            policy_bar,
            discount_bar,
            rhs_bar,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        transition_dot: Tensor | None,
        _crow: None,
        _col: None,
        policy_dot: Tensor | None,
        discount_dot: Tensor | None,
        rhs_dot: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, None]:
        transition, crow, col, policy, discount, x = ctx.saved_tensors
        transpose = ctx.options[0]
        rows = Rows(transition, crow, col, policy.shape[-2], policy.shape[-1])
        rhs = torch.zeros_like(x) if rhs_dot is None else rhs_dot
        if not (transition_dot is None and policy_dot is None and discount_dot is None):
            scale = rows.scale()
            gamma = discount[..., None, None]
            pi = policy.unsqueeze(2)
            if transpose:
                mass = x.unsqueeze(-1)  # enters every row (s, a)
                if policy_dot is not None:
                    rhs = rhs + gamma * _pull(rows, scale, mass * policy_dot.unsqueeze(2))
                if discount_dot is not None:
                    rhs = rhs + discount_dot[..., None, None] * _pull(rows, scale, mass * pi)
                if transition_dot is not None:
                    rows_dot = rows.with_data(transition_dot)
                    drift = (rows_dot.sums() * scale).unsqueeze(2)
                    moved = _pull(rows_dot, scale, mass * pi) - _pull(
                        rows, scale, mass * pi * drift
                    )
                    rhs = rhs + gamma * moved
            else:
                expected = _apply(rows, scale, x)
                if policy_dot is not None:
                    rhs = rhs + gamma * (policy_dot.unsqueeze(2) * expected).sum(-1)
                if discount_dot is not None:
                    rhs = rhs + discount_dot[..., None, None] * (pi * expected).sum(-1)
                if transition_dot is not None:
                    rows_dot = rows.with_data(transition_dot)
                    drift = (rows_dot.sums() * scale).unsqueeze(2)
                    moved = _apply(rows_dot, scale, x) - expected * drift
                    rhs = rhs + gamma * (pi * moved).sum(-1)
        x_dot, _ = PolicySolve.apply(transition, crow, col, policy, discount, rhs, *ctx.options)
        return x_dot, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size, tensors, options = info.batch_size, args[:6], args[6:]
        dims = in_dims[:6]
        if (
            dims[0] is None and dims[3] is None and dims[4] is None
        ):  # only right-hand sides: more columns
            rhs = tensors[5].movedim(dims[5], 2)
            shape = rhs.shape
            x, residual = PolicySolve.apply(*tensors[:5], rhs.flatten(2, 3), *options)
            return (x.unflatten(2, shape[2:4]), residual.unflatten(2, shape[2:4])), (2, 2)
        lanes, axis = fold(tensors, dims, size)
        outputs = PolicySolve.apply(*lanes, *options)
        return to_lanes(outputs, axis, size)


def _apply(rows: Rows, scale: Tensor, vector: Tensor) -> Tensor:
    """Σ_t P v / σ for K vectors per problem: (N, G, K, S) → (N, G, K, S, A)."""
    ahead = rows.apply(_as_group(vector))
    return ahead.reshape(*vector.shape, rows.actions) * scale.unsqueeze(2)


def _pull(rows: Rows, scale: Tensor, weight: Tensor) -> Tensor:
    """Σ_{s,a} w P(t|s,a) / σ for K weights per problem: (N, G, K, S, A) → (N, G, K, S)."""
    return rows.pull(_as_group(weight * scale.unsqueeze(2))).reshape(weight.shape[:-1])


def _as_group(columns: Tensor) -> Tensor:
    """(N, G, K, …) → (N, G·K, …): to the transition, K vectors are K problems."""
    shape = columns.shape
    return columns.reshape(shape[0], shape[1] * shape[2], *shape[3:])


register_derivative("policy_solve", PolicySolve)


@in_graph
def policy_solve(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    policy: Tensor,
    discount: Tensor,
    rhs: Tensor,
    transpose: bool,
    tol: float,
    method: int,
    backend: int,
) -> tuple[Tensor, Tensor]:
    """(I − γP_π) x = b or its transpose: x (N, G, K, S) and its residual (N, G, K)."""
    return PolicySolve.apply(
        transition, crow, col, policy, discount, rhs, transpose, tol, method, backend
    )
