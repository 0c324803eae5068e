"""The fixed point V* = TV* (M3) as one op: derivatives by the implicit function theorem
(M10)-(M12), vmap rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_ext.ops import _backends
from birl_ext.ops._registry import (
    LIBRARY,
    Function,
    are_ordinary,
    are_plain,
    below_autograd,
    fold,
    in_graph,
    is_first_order,
    register_derivative,
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
from birl_ext.solution import Info, info_table

__all__ = ["Saved", "pull_back", "solve"]

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
    return new(states), *tables, info_table(batch, reward.device), new(dtype=torch.int64)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("solve", _backends.solve, _key)


class Saved(NamedTuple):
    """What the derivatives at a fixed point need: the data, and the solution in its axes *B."""

    transition: Tensor
    crow: Tensor
    col: Tensor
    discount: Tensor  # (N, G)
    temperature: Tensor
    value: Tensor
    advantage: Tensor
    policy: Tensor
    info: Tensor
    status: Tensor

    def point(self) -> tuple[Point, Tensor]:
        """The solution in axes (N, G), and (N, G, 1) with 1 where it can be trusted, else NaN."""
        n, g = self.discount.shape
        s, a = self.policy.shape[-2:]
        offset = self.info[..., Info.OFFSET].reshape(n, g)
        trust = torch.where(self.status.reshape(n, g) == 0, 1.0, torch.nan).double().unsqueeze(-1)
        point = Point(
            Rows(self.transition, self.crow, self.col, s, a),
            self.discount,
            self.temperature,
            self.value.reshape(n, g, s) - offset.unsqueeze(-1),  # the constant mode cancels
            offset,
            self.advantage.reshape(n, g, s, a).double(),
            widened(self.policy.reshape(n, g, s, a)),
        )
        return point, trust


def resolved(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Lazily negated tensors as ordinary ones: the compiled code and its bits are for those."""
    return tuple(None if tensor is None else tensor.resolve_neg() for tensor in tensors)


def pull_back(
    saved: Saved, bars: Sequence[Tensor | None], needs: Sequence[bool], backend: int
) -> tuple[Tensor | None, ...]:
    """Cotangents of transition, reward (N, G, S, A), log_reference, discount and temperature.

    Args:
        bars: cotangents of V, Q, Q − V, π and log π in axes *B; None is zero.
        needs: which of the results are wanted.

    One compiled call where nothing is to be derived from it again, else differentiable operations.
    """
    bars, saved = resolved(bars), Saved(*resolved(saved))
    plain = is_first_order() and are_ordinary([*saved, *(bar for bar in bars if bar is not None)])
    if plain:
        wanted = _backends.solve_vjp(saved, bars, needs, backend)
        if wanted is not None:
            return wanted
    point, trust = saved.point()
    if plain:
        point = point._replace(rows=_backends.first_order(point.rows, backend))
    shape = point.policy.shape
    value_bar = None if bars[0] is None else bars[0].reshape(shape[:-1])
    q_bar, advantage_bar, policy_bar, log_policy_bar = (
        None if bar is None else bar.reshape(shape).double() for bar in bars[1:]
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
    flow = _linear_solve(point, source * trust, True, backend)
    transition_bar, *others, weight = parameter_cotangents(
        point, folded, flow, (needs[0], needs[2], needs[3], needs[4])
    )
    reward_bar = weight.to(point.rows.data.dtype) if needs[1] else None
    return (transition_bar, reward_bar, *others)


def _linear_solve(point: Point, rhs: Tensor, transpose: bool, backend: int) -> Tensor:
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
        backend,
    )
    return solution.squeeze(2)


class Solve(Function):
    """(V, Q, Q − V, π, log π, info, status) at the fixed point.

    An element that failed has NaN derivatives, never wrong ones.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        if are_plain(args[:8]):
            return _backends.solve(*args)
        outputs: tuple[Tensor, ...] = below_autograd("solve", *args)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        transition, crow, col, _, _, discount, temperature, _, ctx.batch, *_, ctx.backend = inputs
        value, _, advantage, policy, _, info, status = output
        saved = Saved(
            transition,
            crow,
            col,
            discount,
            temperature,
            value,
            advantage,
            policy,
            info,
            status,
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(info, status)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Any, ...]:
        if all(bar is None for bar in bars):
            return (None,) * 15
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4, 5, 6))
        transition_bar, *others = pull_back(Saved(*ctx.saved_tensors), bars[:5], needs, ctx.backend)
        return (transition_bar, None, None, *others, *(None,) * 8)

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        transition_dot, _, _, reward_dot, reference_dot, discount_dot, temperature_dot = inputs[:7]
        saved = Saved(*ctx.saved_tensors)
        point, trust = saved.point()
        q_dot, source, scale = backup_tangent(
            point, transition_dot, reward_dot, reference_dot, discount_dot, temperature_dot
        )
        value_dot = _linear_solve(point, source * trust, False, ctx.backend)
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


register_derivative("solve", Solve)


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
