"""One application of the soft Bellman operator (M1)-(M3): op, derivatives, vmap rule.

Its first-order rules (`fold_cotangents`, `parameter_cotangents`, `backup_tangent`) serve the fixed
point too: there only the cotangent of the value differs, by one adjoint solve.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_ext.ops.backends import choice
from birl_ext.ops.rows import Rows
from birl_ext.ops.transforms import (
    LIBRARY,
    Function,
    are_plain,
    below_autograd,
    fold,
    in_graph,
    register_derivative,
    to_lanes,
)

__all__ = ["bellman"]

LIBRARY.define(
    "bellman(Tensor transition, Tensor crow, Tensor col, Tensor reward, Tensor log_reference, "
    "Tensor discount, Tensor temperature, Tensor value, int backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("birl_ext::bellman")
def _(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    reward: Tensor,
    log_reference: Tensor,
    discount: Tensor,
    temperature: Tensor,
    value: Tensor,
    backend: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantage = reward.new_empty(reward.shape, dtype=torch.float64)
    image = reward.new_empty(reward.shape[:-1], dtype=torch.float64)
    return image, advantage, torch.empty_like(advantage), torch.empty_like(advantage)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("bellman", choice.bellman, _key)


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

    def entropy(self) -> Tensor:
        """H(s) = −Σ_a π log(π/μ) = −Σ_a π·(Q − V)/τ, (N, G, S)."""
        return -(self.policy * self.advantage).sum(-1) / self.temperature.unsqueeze(-1)


class Cotangents(NamedTuple):
    """Cotangents of (advantage, log π) folded onto Q, V, τ and log μ."""

    q: Tensor | None
    value: Tensor | None
    temperature: Tensor | None
    log_reference: Tensor | None


def fold_cotangents(
    point: Point,
    value_bar: Tensor | None,
    advantage_bar: Tensor | None,
    policy_bar: Tensor | None,
    log_policy_bar: Tensor | None,
) -> Cotangents:
    """Fold the cotangents of V, Q − V, π and log π into cotangents of Q and V (M11, transposed)."""
    score = log_policy_bar
    if policy_bar is not None:
        through_log = point.policy * policy_bar
        score = through_log if score is None else score + through_log
    q_bar, temperature_bar = advantage_bar, None
    if score is not None:
        scaled = score / point.tau
        q_bar = scaled if q_bar is None else q_bar + scaled
        temperature_bar = -(scaled * point.advantage).sum((-1, -2)) / point.temperature
    if q_bar is not None:
        outflow = q_bar.sum(-1)
        value_bar = -outflow if value_bar is None else value_bar - outflow
    return Cotangents(q_bar, value_bar, temperature_bar, score)


def parameter_cotangents(
    point: Point, folded: Cotangents, flow: Tensor, needs: tuple[bool, bool, bool, bool]
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


def backup_tangent(
    point: Point,
    transition_dot: Tensor | None,
    reward_dot: Tensor | None,
    log_reference_dot: Tensor | None,
    discount_dot: Tensor | None,
    temperature_dot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of Q and of TV with V held fixed (M10, right-hand side), and 1/σ."""
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


def policy_tangent(
    point: Point,
    advantage_dot: Tensor,
    log_reference_dot: Tensor | None,
    temperature_dot: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tangents of π and log π (M11)."""
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
    def forward(*args: Any) -> tuple[Tensor, ...]:
        if are_plain(args[:8]):
            return choice.bellman(*args)
        outputs: tuple[Tensor, ...] = below_autograd("bellman", *args)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        transition, crow, col, _, _, discount, temperature, value, _ = inputs
        _, advantage, policy, _ = output
        saved = (transition, crow, col, discount, temperature, value, advantage, policy)
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
            return (None,) * 9
        point = Bellman._point(ctx)
        folded = fold_cotangents(point, *bars)
        flow = torch.zeros_like(point.value) if folded.value is None else folded.value
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 4, 5, 6))
        transition_bar, reference_bar, discount_bar, temperature_bar, weight = parameter_cotangents(
            point, folded, flow, needs
        )
        value_bar = None
        if ctx.needs_input_grad[7]:
            value_bar = point.discount.unsqueeze(-1) * point.rows.pull(weight * point.rows.scale())
        reward_bar = weight.to(point.rows.data.dtype) if ctx.needs_input_grad[3] else None
        return (
            transition_bar,
            None,
            None,
            reward_bar,
            reference_bar,
            discount_bar,
            temperature_bar,
            value_bar,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Tensor, ...]:
        (
            transition_dot,
            _,
            _,
            reward_dot,
            reference_dot,
            discount_dot,
            temperature_dot,
            value_dot,
            _,
        ) = dots
        point = Bellman._point(ctx)
        q_dot, next_dot, scale = backup_tangent(
            point, transition_dot, reward_dot, reference_dot, discount_dot, temperature_dot
        )
        if value_dot is not None:
            carried = point.gamma * point.rows.apply(value_dot) * scale
            q_dot = q_dot + carried
            next_dot = next_dot + (point.policy * carried).sum(-1)
        advantage_dot = q_dot - next_dot.unsqueeze(-1)
        return (
            next_dot,
            advantage_dot,
            *policy_tangent(point, advantage_dot, reference_dot, temperature_dot),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        lanes, axis = fold(args[:8], in_dims[:8], info.batch_size)
        return to_lanes(Bellman.apply(*lanes, args[8]), axis, info.batch_size)


register_derivative("bellman", Bellman)


@in_graph
def bellman(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    reward: Tensor,
    log_reference: Tensor,
    discount: Tensor,
    temperature: Tensor,
    value: Tensor,
    backend: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TV (N, G, S) and Q − TV, π, log π (N, G, S, A), all float64, at value (N, G, S)."""
    return Bellman.apply(
        transition, crow, col, reward, log_reference, discount, temperature, value, backend
    )
