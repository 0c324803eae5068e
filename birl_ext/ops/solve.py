"""The fixed point V* = TV* (M3) as one op: derivatives by the implicit function theorem
(M10)-(M12), vmap rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from birl_ext.ops import _backends
from birl_ext.ops._registry import (
    LIBRARY,
    Function,
    are_plain,
    fold,
    in_graph,
    is_first_order,
    to_lanes,
)
from birl_ext.ops.bellman import (
    Point,
    backup_tangent,
    fold_cotangents,
    parameter_cotangents,
    policy_tangent,
)
from birl_ext.ops.policy_solve import PolicySolve
from birl_ext.ops.rows import Rows, widened
from birl_ext.solution import INFO, Info

__all__ = ["solve"]

LIBRARY.define(
    "solve(Tensor transition, Tensor crow, Tensor col, Tensor reward, Tensor log_reference, "
    "Tensor discount, Tensor temperature, Tensor initial, SymInt[] batch, int method, "
    "float tol, int max_iterations, int validate, bool strict, int backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("birl_ext::solve")
def _(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    reward: Tensor,
    log_reference: Tensor,
    discount: Tensor,
    temperature: Tensor,
    initial: Tensor,
    batch: Sequence[int],
    method: int,
    tol: float,
    max_iterations: int,
    validate: int,
    strict: bool,
    backend: int,
) -> tuple[Tensor, ...]:
    states, actions = reward.shape[-2:]

    def new(*event: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return reward.new_empty((*batch, *event), dtype=dtype)

    tables = tuple(new(states, actions, dtype=reward.dtype) for _ in range(4))
    return new(states), *tables, new(INFO), new(dtype=torch.int64)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("solve", _backends.solve, _key)


class Solve(Function):
    """(V, Q, Q − V, π, log π, info, status) at the fixed point.

    An element that failed has NaN derivatives, never wrong ones.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        if are_plain(args[:8]):
            return _backends.solve(*args)
        outputs: tuple[Tensor, ...] = torch.ops.birl_ext.solve(*args)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        transition, crow, col, _, _, discount, temperature, _, ctx.batch, *_, ctx.backend = inputs
        value, _, advantage, policy, _, info, status = output
        saved = (
            transition,
            crow,
            col,
            discount,
            temperature,
            value,
            info,
            advantage,
            policy,
            status,
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(info, status)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def _point(ctx: Any) -> tuple[Point, Tensor]:
        transition, crow, col, discount, temperature, value, info, advantage, policy, status = (
            ctx.saved_tensors
        )
        n, g = discount.shape
        s, a = policy.shape[-2:]
        rows = Rows(transition, crow, col, s, a)
        value, offset = value.reshape(n, g, s), info[..., Info.OFFSET].reshape(n, g)
        advantage = advantage.reshape(n, g, s, a).double()
        policy = widened(policy.reshape(n, g, s, a))
        trust = torch.where(status.reshape(n, g) == 0, 1.0, torch.nan).double().unsqueeze(-1)
        relative = value - offset.unsqueeze(-1)  # free of the constant mode, which cancels
        return Point(rows, discount, temperature, relative, offset, advantage, policy), trust

    @staticmethod
    def _linear_solve(ctx: Any, point: Point, rhs: Tensor, transpose: bool) -> Tensor:
        rows = point.rows
        solution, _ = PolicySolve.apply(
            rows.data,
            rows.crow,
            rows.col,
            point.policy,
            point.discount,
            rhs.unsqueeze(2),
            transpose,
            0.0,
            0,
            ctx.backend,
        )
        return solution.squeeze(2)

    @staticmethod
    def _compiled_backward(ctx: Any, bars: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
        """The whole rule in one call, where nothing is to be derived from it again."""
        if not is_first_order():
            return None
        saved = ctx.saved_tensors
        if not are_plain([*saved, *(bar for bar in bars if bar is not None)]):
            return None
        transition, crow, col, discount, temperature, value, info, advantage, policy, status = saved
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4, 5, 6))
        wanted = _backends.solve_vjp(
            transition,
            crow,
            col,
            discount,
            temperature,
            (value, advantage, policy, info, status),
            bars,
            needs,
            ctx.backend,
        )
        if wanted is None:
            return None
        return (wanted[0], None, None, *wanted[1:], *(None,) * 8)

    @staticmethod
    def backward(
        ctx: Any,
        value_bar: Tensor | None,
        q_bar: Tensor | None,
        advantage_bar: Tensor | None,
        policy_bar: Tensor | None,
        log_policy_bar: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Any, ...]:
        bars = (value_bar, q_bar, advantage_bar, policy_bar, log_policy_bar)
        if all(bar is None for bar in bars):
            return (None,) * 15
        compiled = Solve._compiled_backward(ctx, bars)
        if compiled is not None:
            return compiled
        point, trust = Solve._point(ctx)
        table = point.policy.shape
        value_bar = None if value_bar is None else value_bar.reshape(table[:-1])
        q_bar, advantage_bar, policy_bar, log_policy_bar = (
            None if bar is None else bar.reshape(table).double() for bar in bars[1:]
        )
        if q_bar is not None:  # Q = (Q − V) + V
            advantage_bar = q_bar if advantage_bar is None else advantage_bar + q_bar
            inflow = q_bar.sum(-1)
            value_bar = inflow if value_bar is None else value_bar + inflow
        folded = fold_cotangents(point, value_bar, advantage_bar, policy_bar, log_policy_bar)
        source = torch.zeros_like(point.value) if folded.value is None else folded.value
        if folded.q is not None:
            pulled = point.rows.pull(folded.q * point.rows.scale())
            source = source + point.discount.unsqueeze(-1) * pulled
        flow = Solve._linear_solve(ctx, point, source * trust, True)
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 4, 5, 6))
        transition_bar, reference_bar, discount_bar, temperature_bar, weight = parameter_cotangents(
            point, folded, flow, needs
        )
        reward_bar = weight.to(point.rows.data.dtype) if ctx.needs_input_grad[3] else None
        data = (transition_bar, None, None, reward_bar, reference_bar)
        return (*data, discount_bar, temperature_bar, *(None,) * 8)

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        transition_dot, _, _, reward_dot, reference_dot, discount_dot, temperature_dot = inputs[:7]
        point, trust = Solve._point(ctx)
        q_dot, source, scale = backup_tangent(
            point, transition_dot, reward_dot, reference_dot, discount_dot, temperature_dot
        )
        value_dot = Solve._linear_solve(ctx, point, source * trust, False)
        q_dot = q_dot + point.gamma * point.rows.apply(value_dot) * scale
        advantage_dot = q_dot - value_dot.unsqueeze(-1)
        policy_dot, log_policy_dot = policy_tangent(
            point, advantage_dot, reference_dot, temperature_dot
        )
        tables = (q_dot, advantage_dot, policy_dot, log_policy_dot)
        dots = (value_dot, *(dot.to(point.rows.data.dtype) for dot in tables))
        return *(dot.reshape((*ctx.batch, *dot.shape[2:])) for dot in dots), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        lanes, axis = fold(args[:8], in_dims[:8], info.batch_size)
        batch, *options = args[8:]
        merged = Solve.apply(*lanes, tuple(lanes[5].shape), *options)
        outputs, _ = to_lanes(merged, axis, info.batch_size)
        own = tuple(
            x.movedim(axis, 0).reshape((info.batch_size, *batch, *x.shape[3:])) for x in outputs
        )
        return own, (0,) * len(own)


@in_graph
def solve(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    reward: Tensor,
    log_reference: Tensor,
    discount: Tensor,
    temperature: Tensor,
    initial: Tensor,
    batch: Sequence[int],
    method: int,
    tol: float,
    max_iterations: int,
    validate: int,
    strict: bool,
    backend: int,
) -> tuple[Tensor, ...]:
    """V, Q, Q − V, π, log π, info (…, 9) and status, in axes `batch`.

    V and info are float64, the four tables in the dtype of reward and transition.

    The inputs have axes (N, G); `batch` are the caller's axes, of N·G problems in the same order.
    """
    return Solve.apply(
        transition,
        crow,
        col,
        reward,
        log_reference,
        discount,
        temperature,
        initial,
        batch,
        method,
        tol,
        max_iterations,
        validate,
        strict,
        backend,
    )
