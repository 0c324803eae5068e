"""The fixed point V* = TV* (M3) as one op: derivatives by the implicit function theorem
(M10)-(M12), vmap rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from birl_ext.ops.backends import choice
from birl_ext.ops.bellman import (
    Point,
    backup_tangent,
    fold,
    parameter_cotangents,
    policy_tangent,
)
from birl_ext.ops.policy_solve import Exits, Flow, Push
from birl_ext.ops.request import Data, Saved, Settings, derivable, solve_arguments
from birl_ext.ops.rows import Rows, widened
from birl_ext.ops.transforms import (
    Function,
    define,
    in_graph,
    join_mapped_axis,
    split_mapped_axis,
)
from birl_ext.solution import info_table
from birl_ext.torch_internals import is_first_order

__all__ = ["pull_back", "solve"]


def _point(saved: Saved) -> tuple[Point, Exits, Tensor]:
    """The solution in axes (N, G), its exits, and (N, G, 1) with 1 where it can be trusted,
    else NaN.
    """
    n, g = saved.discount.shape
    s, a = saved.policy.shape[-2:]
    rows = Rows(saved.transition, saved.crow, saved.col, s, a)
    policy = widened(saved.policy.reshape(n, g, s, a))
    exits = Exits.of(rows.scale(), policy, saved.discount)
    trust = torch.where(saved.status.reshape(n, g) == 0, 1.0, torch.nan).double().unsqueeze(-1)
    point = Point(
        rows,
        saved.discount,
        saved.temperature,
        saved.relative.reshape(n, g, s),
        saved.constant.reshape(n, g, 1, 1) * exits.relief(),
        saved.advantage.reshape(n, g, s, a).double(),
        policy,
    )
    return point, exits, trust


def resolved(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Lazily negated tensors as ordinary ones: the compiled code and its bits are for those."""
    return tuple([None if tensor is None else tensor.resolve_neg() for tensor in tensors])


def pull_back(
    saved: Saved, bars: Sequence[Tensor | None], needs: Sequence[bool], backend: int
) -> tuple[Tensor | None, ...]:
    """Cotangents of transition, reward (N, G, S, A), log_reference, discount and temperature.

    Args:
        bars: cotangents of V, Q, Q − V, π, log π, W and c in axes *B; None is zero.
        needs: which of the results are wanted.

    One compiled call where nothing is to be derived from it again, else differentiable operations.

        v̄ = V̄ + W̄ + Σ_a (γPᵀQ̄ − Q̄),   m = (ΣV̄ + c̄)/D − Σ Q̄ (1 − γσ)/D,   Mᵀλ = v̄,   Σκλ = m

    with Q̄ of `fold` and (D, κ) of `Exits`; what λ then gives is (M12), see `ops.bellman`.
    """
    bars, saved = resolved(bars), Saved(*resolved(saved))
    direct = is_first_order([*saved, *(bar for bar in bars if bar is not None)])
    *tables, relative_bar, constant_bar = bars
    if direct and relative_bar is None and constant_bar is None:
        wanted = choice.solve_vjp(saved, tables, needs, backend)
        if wanted is not None:
            return wanted
    point, exits, trust = _point(saved)
    if direct:
        point = point._replace(rows=choice.first_order(point.rows, backend))
    shape = point.policy.shape
    value_bar, relative_bar = (
        None if bar is None else bar.reshape(shape[:-1]) for bar in (bars[0], relative_bar)
    )
    q_bar, advantage_bar, policy_bar, log_policy_bar = (
        None if bar is None else bar.reshape(shape).double() for bar in tables[1:]
    )
    folded = fold(point, value_bar, q_bar, advantage_bar, policy_bar, log_policy_bar, relative_bar)
    asked = torch.zeros_like(point.discount) if folded.given is None else folded.given.sum(-1)
    if constant_bar is not None:
        asked = asked + constant_bar.reshape(asked.shape)
    source, mass = folded.source(point), asked / exits.largest
    if folded.q is not None:
        mass = mass - (folded.q * exits.leave()).sum((-1, -2))
    mass = (mass.unsqueeze(-1) * trust).squeeze(-1)
    flow, _ = Flow.apply(
        *point.system, (source * trust).unsqueeze(2), mass.unsqueeze(2), 1, backend
    )
    transition_bar, reference_bar, discount_bar, temperature_bar, weight = parameter_cotangents(
        point, folded, flow.squeeze(2), (needs[0], needs[2], needs[3], needs[4])
    )
    if discount_bar is not None:
        discount_bar = discount_bar + asked * saved.constant.reshape(asked.shape) / exits.largest
    reward_bar = weight.to(point.rows.data.dtype) if needs[1] else None
    return transition_bar, reward_bar, reference_bar, discount_bar, temperature_bar


class Solve(Function):
    """(V, Q, Q − V, π, log π, info, status, W, c) at the fixed point, V = c + W (M18).

    Derivatives have W and c as unknowns, so that a large constant costs them no digits; the two
    are outputs for the derivatives of derivatives.

    An element that failed has NaN derivatives, never wrong ones.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        data, _, settings = solve_arguments(inputs)
        ctx.batch, ctx.backend = settings.batch, settings.backend
        _, _, advantage, policy, _, info, status, relative, constant = output
        saved = Saved(
            data.transition,
            data.crow,
            data.col,
            data.discount,
            data.temperature,
            relative,
            advantage,
            policy,
            info,
            status,
            constant,
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(info, status)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Any, ...]:
        if all(bar is None for bar in bars):
            return (None,) * len(ctx.needs_input_grad)
        needs = derivable(ctx.needs_input_grad)
        transition_bar, *others = pull_back(
            Saved(*ctx.saved_tensors), (*bars[:5], *bars[7:]), needs, ctx.backend
        )
        return (transition_bar, None, None, *others, None, *(None,) * len(Settings._fields))

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        data_dot, *_ = solve_arguments(inputs)
        saved = Saved(*ctx.saved_tensors)
        point, exits, trust = _point(saved)
        q_dot, source, scale = backup_tangent(point, data_dot)
        columns, gains, _ = Push.apply(*point.system, (source * trust).unsqueeze(2), 1, ctx.backend)
        relative_dot, gain = columns.squeeze(2), gains.squeeze(2)
        ahead = point.gamma * point.rows.apply(relative_dot) * scale
        advantage_dot = q_dot + ahead - relative_dot.unsqueeze(-1)
        advantage_dot = advantage_dot - gain[..., None, None] * exits.leave()
        constant_dot = gain / exits.largest
        if (discount_dot := data_dot.discount) is not None:
            constant = saved.constant.reshape(gain.shape)
            constant_dot = constant_dot + discount_dot * constant / exits.largest
        value_dot = relative_dot + constant_dot.unsqueeze(-1)
        q_dot = advantage_dot + value_dot.unsqueeze(-1)
        policy_dot, log_policy_dot = policy_tangent(point, advantage_dot, data_dot)
        tables = (q_dot, advantage_dot, policy_dot, log_policy_dot)
        dots = (value_dot, *(dot.to(point.rows.data.dtype) for dot in tables))
        dots = (*dots, None, None, relative_dot, constant_dot)
        return tuple(None if x is None else x.reshape((*ctx.batch, *x.shape[2:])) for x in dots)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        data, initial, settings = solve_arguments(args)
        mapped, axis = join_mapped_axis((*data, initial), in_dims, info.batch_size)
        batch = tuple(Data(*mapped[:-1]).discount.shape)
        merged = Solve.apply(*mapped, *settings._replace(batch=batch))
        outputs, _ = split_mapped_axis(merged, axis, info.batch_size)
        own = tuple(
            x.movedim(axis, 0).reshape((info.batch_size, *settings.batch, *x.shape[3:]))
            for x in outputs
        )
        return own, (0,) * len(own)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    data, _, (batch, *_) = solve_arguments(args)
    reward, (states, actions) = data.reward, data.reward.shape[-2:]

    def new(*event: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return reward.new_empty((*batch, *event), dtype=dtype)

    tables = tuple(new(states, actions, dtype=reward.dtype) for _ in range(4))
    info = info_table(batch, states, reward.device)
    return new(states), *tables, info, new(dtype=torch.int64), new(states), new()


define(Solve, choice.solve, _fake, Data, {"initial": Tensor}, Settings, results=9)


@in_graph
def solve(data: Data, initial: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """V, Q, Q − V, π, log π, info (…, 9 + S) and status, in axes `settings.batch`.

    V and info are float64, the four tables in the dtype of reward and transition. `initial` is a
    start V₀ (N, G, S), or absent.
    """
    outputs: tuple[Tensor, ...] = Solve.apply(*data, initial, *settings)
    return outputs[:7]
