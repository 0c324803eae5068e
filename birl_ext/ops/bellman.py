"""One application of the soft Bellman operator (M1)-(M3): op, derivatives, vmap rule.

With P for P/σ, Q = r + γPV, TV = τ log Σ_a μ exp(Q/τ), A = Q − TV and H = −Σ_a π A/τ,

    dQ = dr + dγ PV + γ (dP − P Σdp) V + γP dV,   dTV = Σ_a π (dQ + τ d log μ) + H dτ         (M10)
    d log π = (dQ − dTV)/τ − A dτ/τ² + d log μ,   dπ = π d log π                              (M11)

and transposed, from cotangents of V, Q − V, π and log π to those of the data:

    s = π π̄ + (log π)‾,   Q̄ = Ā + s/τ,   λ = V̄ − Σ_a Q̄,   w = Q̄ + λπ = r̄                      (M11)
    P̄ = γ w (V − PV)/σ,   γ̄ = Σ w PV,   (log μ)‾ = s + τλπ,   τ̄ = Σ λH − Σ sA/τ²             (M12)

These rules serve the fixed point too: there only λ differs, by one adjoint solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from birl_ext.ops.backends import choice
from birl_ext.ops.policy_solve import System
from birl_ext.ops.request import AUTO, Data, bellman_arguments, derivable
from birl_ext.ops.rows import Rows
from birl_ext.ops.transforms import (
    Function,
    define,
    in_graph,
    join_mapped_axis,
    split_mapped_axis,
)

__all__ = ["Cotangents", "Point", "bellman", "fold", "parameter_cotangents"]


class Point(NamedTuple):
    """Where a derivative is taken: the data, and what the operator gave there."""

    rows: Rows
    discount: Tensor  # (N, G)
    temperature: Tensor  # (N, G)
    value: Tensor  # (N, G, S): V, or W of V = c + W
    carried: (
        Tensor | None
    )  # (N, G, S, A): what c adds to PW as a factor of dγ; None where V is whole
    advantage: Tensor  # Q − TV, (N, G, S, A)
    policy: Tensor  # (N, G, S, A)

    @property
    def gamma(self) -> Tensor:
        return self.discount[..., None, None]

    @property
    def tau(self) -> Tensor:
        return self.temperature[..., None, None]

    @property
    def system(self) -> System:
        """M = I − γP_π."""
        return System(*self.rows[:3], self.policy, self.discount)

    def entropy(self) -> Tensor:
        """H(s) = −Σ_a π log(π/μ) = −Σ_a π·(Q − V)/τ, (N, G, S)."""
        return -(self.policy * self.advantage).sum(-1) / self.temperature.unsqueeze(-1)


class Cotangents(NamedTuple):
    """Cotangents of V, Q, Q − V, π and log π folded onto Q, V, τ and log μ."""

    q: Tensor | None
    value: Tensor | None
    temperature: Tensor | None
    log_reference: Tensor | None
    given: Tensor | None
    """Of V, with what came for Q by way of V: before the actions took theirs."""

    def source(self, point: Point) -> Tensor:
        """v̄ = V̄ − Σ_a Q̄ + γPᵀQ̄, the right-hand side of the adjoint system, (N, G, S)."""
        source = torch.zeros_like(point.value) if self.value is None else self.value
        if self.q is None:
            return source
        return source + point.discount.unsqueeze(-1) * point.rows.pull(self.q * point.rows.scale())


def fold(
    point: Point,
    value_bar: Tensor | None,
    q_bar: Tensor | None,
    advantage_bar: Tensor | None,
    policy_bar: Tensor | None,
    log_policy_bar: Tensor | None,
    relative_bar: Tensor | None = None,
) -> Cotangents:
    """Fold cotangents of the tables into those of Q and V (M11, transposed); `relative_bar` is of
    the W of V = c + W alone.
    """
    if q_bar is not None:  # Q = (Q − V) + V
        advantage_bar = _sum(advantage_bar, q_bar)
        value_bar = _sum(value_bar, q_bar.sum(-1))
    given, value_bar = value_bar, _sum(value_bar, relative_bar)
    score = log_policy_bar
    if policy_bar is not None:
        score = _sum(score, point.policy * policy_bar)
    q_bar, temperature_bar = advantage_bar, None
    if score is not None:
        scaled = score / point.tau
        q_bar = _sum(q_bar, scaled)
        temperature_bar = -(scaled * point.advantage).sum((-1, -2)) / point.temperature
    if q_bar is not None:
        value_bar = _sum(value_bar, -q_bar.sum(-1))
    return Cotangents(q_bar, value_bar, temperature_bar, score, given)


@overload
def _sum(left: Tensor | None, right: Tensor) -> Tensor: ...
@overload
def _sum(left: Tensor | None, right: None) -> Tensor | None: ...
def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Of cotangents, of which None is zero."""
    if left is None:
        return right
    return left if right is None else left + right


def parameter_cotangents(
    point: Point, folded: Cotangents, flow: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Cotangents of P, log μ, γ, τ and Q from the flow λ(s), the cotangent of TV (M12).

    needs: for transition, log_reference, discount, temperature. Returns them in that order, then w
    = Q̄ + λπ, which is r̄.
    """
    needs_transition, needs_reference, needs_discount, needs_temperature = needs
    visits = flow.unsqueeze(-1) * point.policy
    weight = visits if folded.q is None else folded.q + visits
    transition_bar = reference_bar = discount_bar = temperature_bar = None
    if needs_transition or needs_discount:
        scale = point.rows.scale()
        expected = point.rows.apply(point.value) * scale
        if needs_discount:
            ahead = expected if point.carried is None else expected + point.carried
            discount_bar = (weight * ahead).sum((-1, -2))
        if needs_transition:
            scaled = point.gamma * weight * scale
            transition_bar = point.rows.outer(scaled, point.value, (scaled * expected).sum(1))
    if needs_reference:
        reference_bar = point.tau * visits
        if folded.log_reference is not None:
            reference_bar = reference_bar + folded.log_reference
    if needs_temperature:
        temperature_bar = (flow * point.entropy()).sum(-1)
        if folded.temperature is not None:
            temperature_bar = temperature_bar + folded.temperature
    return transition_bar, reference_bar, discount_bar, temperature_bar, weight


def backup_tangent(point: Point, data_dot: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of Q and of TV with V held fixed (M10, right-hand side), and 1/σ, from those of
    `Data`, of which None is zero.
    """
    transition_dot, _, _, reward_dot, log_reference_dot, discount_dot, temperature_dot = data_dot
    scale = point.rows.scale()
    q_dot = torch.zeros_like(point.policy) if reward_dot is None else reward_dot.double()
    if transition_dot is not None or discount_dot is not None:
        expected = point.rows.apply(point.value) * scale
        if transition_dot is not None:
            rows_dot = point.rows.with_data(transition_dot)
            moved = rows_dot.apply(point.value) * scale - expected * (rows_dot.sums() * scale)
            q_dot = q_dot + point.gamma * moved
        if discount_dot is not None:
            ahead = expected if point.carried is None else expected + point.carried
            q_dot = q_dot + discount_dot[..., None, None] * ahead
    inner = q_dot if log_reference_dot is None else q_dot + point.tau * log_reference_dot
    value_dot = (point.policy * inner).sum(-1)
    if temperature_dot is not None:
        value_dot = value_dot + temperature_dot.unsqueeze(-1) * point.entropy()
    return q_dot, value_dot, scale


def policy_tangent(point: Point, advantage_dot: Tensor, data_dot: Any) -> tuple[Tensor, Tensor]:
    """Tangents of π and log π (M11)."""
    *_, log_reference_dot, _, temperature_dot = data_dot
    change = advantage_dot
    if temperature_dot is not None:
        change = change - temperature_dot[..., None, None] * point.advantage / point.tau
    log_policy_dot = change / point.tau
    if log_reference_dot is not None:
        log_policy_dot = log_policy_dot + log_reference_dot
    return point.policy * log_policy_dot, log_policy_dot


class Bellman(Function):
    """(TV, Q − TV, π, log π) at a given V. Shapes as in `bellman`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        data, value, _ = bellman_arguments(inputs)
        _, advantage, policy, _ = output
        saved = (*data[:3], data.discount, data.temperature, value, advantage, policy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def _point(ctx: Any) -> Point:
        transition, crow, col, discount, temperature, value, advantage, policy = ctx.saved_tensors
        rows = Rows(transition, crow, col, policy.shape[-2], policy.shape[-1])
        return Point(rows, discount, temperature, value, None, advantage, policy)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Any, ...]:
        if all(bar is None for bar in bars):
            return (None,) * len(ctx.needs_input_grad)
        point = Bellman._point(ctx)
        value_bar, *tables = bars
        folded = fold(point, value_bar, None, *tables)
        flow = torch.zeros_like(point.value) if folded.value is None else folded.value
        *_, needs_value, _ = ctx.needs_input_grad
        needs_transition, needs_reward, *needs = derivable(ctx.needs_input_grad)
        transition_bar, *others, weight = parameter_cotangents(
            point, folded, flow, (needs_transition, *needs)
        )
        value_bar = None
        if needs_value:
            value_bar = point.discount.unsqueeze(-1) * point.rows.pull(weight * point.rows.scale())
        reward_bar = weight.to(point.rows.data.dtype) if needs_reward else None
        return transition_bar, None, None, reward_bar, *others, value_bar, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Tensor, ...]:
        data_dot, value_dot, _ = bellman_arguments(dots)
        point = Bellman._point(ctx)
        q_dot, next_dot, scale = backup_tangent(point, data_dot)
        if value_dot is not None:
            carried = point.gamma * point.rows.apply(value_dot) * scale
            q_dot = q_dot + carried
            next_dot = next_dot + (point.policy * carried).sum(-1)
        advantage_dot = q_dot - next_dot.unsqueeze(-1)
        return (
            next_dot,
            advantage_dot,
            *policy_tangent(point, advantage_dot, data_dot),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        *tensors, backend = args
        mapped, axis = join_mapped_axis(tensors, in_dims, info.batch_size)
        return split_mapped_axis(Bellman.apply(*mapped, backend), axis, info.batch_size)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    reward = bellman_arguments(args)[0].reward
    tables = [reward.new_empty(reward.shape, dtype=torch.float64) for _ in range(3)]
    return reward.new_empty(reward.shape[:-1], dtype=torch.float64), *tables


define(Bellman, choice.bellman, _fake, Data, {"value": Tensor, "backend": int}, results=4)


@in_graph
def bellman(
    data: Data, value: Tensor, backend: int = AUTO
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TV (N, G, S) and Q − TV, π, log π (N, G, S, A), all float64, at value (N, G, S)."""
    return Bellman.apply(*data, value, backend)
