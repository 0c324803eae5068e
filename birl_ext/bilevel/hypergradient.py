"""The hyper-gradient from inexact inner solves (M14), its certificate, and a report against the
exact one.

An estimate needs a value V and a flow λ, neither of them exact: V from a few sweeps, λ from a few
products. The flow is the adjoint of (M12); the w of (M14) is −τλ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel.guards import check_lower, check_objective, check_start, no_path
from birl_ext.bilevel.problem import (
    BilevelProblem,
    direct_gradient,
    evaluate_at,
    hypergradient,
)
from birl_ext.errors import OptionError
from birl_ext.model.layout import Flat
from birl_ext.ops.bellman import Cotangents, Point, fold, parameter_cotangents
from birl_ext.ops.rows import Rows, widened
from birl_ext.solution import Solution, info_table

__all__ = ["HypergradientReport", "Linearisation", "hypergradient_report", "linearise"]

Smoothness = float | Literal["linear"]

_EPS = torch.finfo(torch.float64).eps
_JACOBIAN_ROWS = 20_000  # most rows of ∂P/∂x that the certificate will compute one by one


class HypergradientReport(NamedTuple):
    """How good a hyper-gradient is. Shapes: x as given; the others (M,) per start, or scalars."""

    objective: Tensor
    exact: Tensor
    estimate: Tensor
    relative_error: Tensor
    cosine: Tensor
    bound: Tensor
    """Certified bound on ‖estimate − ∇φ‖₂; inf where none can be given."""
    adjoint_residual: Tensor
    """ρ = ‖v̄ − (I − γP_π)ᵀλ‖₁ of the flow that was used, summed over the problems of a start."""
    adjoint_error: Tensor
    """Certified bound ρ/(1 − γ) on ‖λ − λ*‖₁, with the rounding of ρ itself (M13)."""


@dataclass
class Linearisation:
    """φ and its cotangents at (x, V): all that does not depend on the flow.

    Attributes:
        objective: φ at the policy of V, scalar or (M,).
        solution: the solution handed to the upper level, exact only if V is.
        source: v̄, the right-hand side of (I − γP_π)ᵀλ = v̄, (N, G, S).
        value_error: certified bound on ‖V − V*‖∞, (N, G).
    """

    x: Tensor
    flat: Flat
    point: Point
    objective: Tensor
    solution: Solution
    direct: Tensor
    folded: Cotangents
    policy_bar: Tensor
    source: Tensor
    value_error: Tensor

    def transposed(self, flow: Tensor) -> Tensor:
        """(I − γP_π)ᵀ λ, (N, G, S)."""
        point = self.point
        visits = flow.unsqueeze(-1) * point.policy * self._scale
        return flow - point.discount.unsqueeze(-1) * point.rows.pull(visits)

    def forward(self, vector: Tensor) -> Tensor:
        """(I − γP_π) v, (N, G, S)."""
        point = self.point
        ahead = point.rows.apply(vector) * self._scale
        return vector - point.discount.unsqueeze(-1) * (point.policy * ahead).sum(-1)

    @property
    def _scale(self) -> Tensor:
        return self.point.rows.scale()

    def adjoint_residual(self, flow: Tensor) -> Tensor:
        """ρ = ‖v̄ − (I − γP_π)ᵀλ‖₁ and its own rounding, (N, G)."""
        residual = (self.source - self.transposed(flow)).abs().sum(-1)
        return residual + 4 * _EPS * self.point.rows.states * flow.abs().sum(-1)

    def gradient(self, flow: Tensor) -> Tensor:
        """∇φ̂ = ∇_x f + the cotangents of (M12) carried through the lower level's x-dependence."""
        flat = self.flat
        tensors = (
            flat.transition,
            flat.log_reference,
            flat.discount,
            flat.temperature,
            flat.reward,
        )
        needs = [t.requires_grad for t in tensors]
        first = (needs[0], needs[1], needs[2], needs[3])
        bars = parameter_cotangents(self.point, self.folded, flow, first)
        pairs = [
            (t, bar.to(t.dtype))
            for t, bar, need in zip(tensors, bars, needs, strict=True)
            if need and bar is not None
        ]
        if not pairs:
            return self.direct
        inner = torch.autograd.grad(
            [t for t, _ in pairs],
            self.x,
            [bar for _, bar in pairs],
            retain_graph=True,
            allow_unused=True,
        )[0]
        return self.direct if inner is None else self.direct + inner

    def reward_cotangent(self, flow: Tensor) -> Tensor:
        """r̄ = Q̄ + λπ (M12), (N, G, S, A)."""
        return parameter_cotangents(self.point, self.folded, flow, (False, False, False, False))[4]

    def policy_shift(self) -> Tensor:
        """Certified bound on |π_V − π*| in every entry, (N, G, S, A).

        log π is off by at most ε = 2‖ΔV‖∞/τ (M7), so π by at most (e^ε − 1)π, and never by more
        than one.
        """
        smallest = torch.finfo(torch.float64).tiny  # what underflows to zero may be as large
        drift = self._drift()[..., None, None]
        return ((self.point.policy + smallest) * drift).clamp(max=1.0)

    def _drift(self) -> Tensor:
        """η = e^ε − 1, (N, G): inf where nothing is known."""
        return torch.expm1(2 * self.value_error / self.point.temperature)

    def flow_error(self, flow: Tensor, smoothness: float = 0.0) -> Tensor:
        """Certified bound on ‖Δr̄‖₁, (N, G): what the errors of V and λ do to the cotangent of the
        reward.

        A policy moves by at most η = min(e^ε − 1, 2) in ℓ₁ per state (`policy_shift`), and with ρ
        the residual of λ (M13), ‖Δλ‖₁ ≤ (ρ + γη‖λ‖₁ + ‖Δv̄‖₁)/(1 − γ).

        Args:
            flow: λ, (N, G, S).
            smoothness: how the cotangents that f hands down move with π, see
                `hypergradient_report`; 0 takes them as they are.
        """
        point = self.point
        discount, temperature = point.discount, point.temperature
        residual = self.adjoint_residual(flow)
        mass = flow.abs().sum(-1)
        turned = self._drift().clamp(max=2.0)
        moved = self.policy_shift()
        q_error = (self.policy_bar.abs() * moved).sum((-1, -2)) / temperature
        if smoothness:
            shift = smoothness * moved.amax((-1, -2))
            q_error = q_error + shift * point.rows.states / temperature
        source_error = (1 + discount) * q_error
        flow_error = (residual + discount * turned * mass + source_error) / (1 - discount)
        return q_error + turned * mass + flow_error


def linearise(
    problem: BilevelProblem,
    x: Tensor,
    temperature: float | Tensor,
    sweep: Callable[[Flat], SweptValue],
    step: int | None = None,
) -> Linearisation:
    """Evaluate the upper level at the policy of an approximate value, and collect its cotangents.

    Args:
        problem: the two levels.
        x: upper variable, a leaf that requires grad.
        temperature: τ.
        sweep: brings a warm-started value up to date for the MDP given in normal form.
        step: the outer step, for messages.

    Raises:
        GradientError: either level does not depend on x, or φ is not finite.
    """
    mdp = problem.model(x)
    check_lower(mdp, x)
    flat = mdp.flatten(temperature)
    with torch.no_grad():
        swept = sweep(flat)
    rows = Rows(
        flat.transition.detach(),
        *flat.pattern,
        flat.reward.shape[-2],
        flat.reward.shape[-1],
    )
    point = Point(
        rows,
        flat.discount.detach(),
        flat.temperature.detach(),
        swept.value,
        None,
        swept.advantage,
        swept.policy,
    )
    solution, leaves = _leaves(flat, swept)
    objective = problem.judge(x, solution)
    check_objective(objective, step)
    found = direct_gradient(objective, [x, *leaves], retain=True)
    if all(part is None for part in found):
        raise no_path()
    direct, value_bar, q_bar, policy_bar, log_policy_bar, advantage_bar = found
    grouped = flat.layout.grouped
    q_bar = None if q_bar is None else grouped(q_bar, 2).double()
    value_bar = None if value_bar is None else grouped(value_bar, 1).double()
    advantage_bar = None if advantage_bar is None else grouped(advantage_bar, 2).double()
    policy_bar = None if policy_bar is None else grouped(policy_bar, 2).double()
    log_policy_bar = None if log_policy_bar is None else grouped(log_policy_bar, 2).double()
    folded = fold(point, value_bar, q_bar, advantage_bar, policy_bar, log_policy_bar)
    return Linearisation(
        x=x,
        flat=flat,
        point=point,
        objective=objective.detach(),
        solution=solution,
        direct=torch.zeros_like(x) if direct is None else direct,
        folded=folded,
        policy_bar=torch.zeros_like(swept.policy) if policy_bar is None else policy_bar,
        source=folded.source(point),
        value_error=swept.error,
    )


class SweptValue(NamedTuple):
    """A value after some sweeps, with the policy of the last one; (N, G, S) and (N, G, S, A)."""

    value: Tensor
    advantage: Tensor
    policy: Tensor
    log_policy: Tensor
    error: Tensor  # certified bound on ‖V − V*‖∞, (N, G)


def hypergradient_report(
    problem: BilevelProblem,
    x: Tensor,
    temperature: float | Tensor,
    *,
    estimate: tuple[Linearisation, Tensor] | None = None,
    smoothness: Smoothness = math.inf,
) -> HypergradientReport:
    """Compare a hyper-gradient with the exact one and certify its error.

        ‖∇φ̂ − ∇φ‖₂ ≤ max_{s,a} ‖∂(r + γPV)/∂x‖₂ · ‖Δr̄‖₁ + γ‖r̄‖₁ ‖ΔV‖∞ · max_{s,a} Σ_t
        ‖∂P(t|s,a)/∂x‖₂ + ‖ Σ_y |∂²f/∂x∂y| |Δy| ‖₂,   y = V, Q, A, π, log π

    Args:
        problem: the two levels.
        x: upper variable, (d,) or (M, d).
        temperature: τ.
        estimate: a linearisation and the flow used with it; None: the ones of the solver itself.
        smoothness: what you declare of f at a fixed x, and the bound is certified for: "linear", in
            all entries of the Solution that it uses; or the Lipschitz constant of ∂f/∂π with
            respect to π, entry by entry, more than 0, if f is linear in everything else.

    Returns:
        HypergradientReport. The bound is inf where nothing is declared, if discount or reference
        depend on x, if ∂P/∂x is too large to form, or if ∂f/∂x depends on the policy and f is not
        "linear", or for more than 20,000 entries of x.

    Raises:
        OptionError: `smoothness` is no such declaration.
        GradientError: either level does not depend on x, or φ or its gradient is not finite.

    Source: (M5), (M7), (M13), combined.
    """
    declared = _lipschitz(smoothness)
    x = check_start(x).requires_grad_()
    phi, solution = evaluate_at(problem, x, temperature)
    exact = hypergradient(phi, x)
    if estimate is None:
        point = linearise(problem, x, temperature, lambda flat: exact_value(flat, solution))
        estimate = point, _exact_flow(point)
    at, flow = estimate
    approximate = at.gradient(flow)
    residual = at.adjoint_residual(flow)
    starts = phi.shape
    gap, norm = _norm(approximate - exact, starts), _norm(exact, starts)
    tiny = torch.finfo(torch.float64).tiny
    cosine = (approximate * exact).reshape(*starts, -1).sum(-1)
    cosine = cosine / (_norm(approximate, starts) * norm).clamp(min=tiny)
    return HypergradientReport(
        objective=phi.detach(),
        exact=exact,
        estimate=approximate,
        relative_error=gap / norm.clamp(min=tiny),
        cosine=cosine,
        bound=_bound(at, flow, declared, starts) + _direct_error(problem, at, declared, starts),
        adjoint_residual=_lane_sum(at.flat.layout.restore(residual), starts),
        adjoint_error=_lane_sum(at.flat.layout.restore(residual / (1 - at.point.discount)), starts),
    )


def _lipschitz(smoothness: Any) -> float:
    """The constant declared: 0 of what is linear."""
    if smoothness == "linear":
        return 0.0
    real = isinstance(smoothness, Real) and not isinstance(smoothness, bool)
    if not (real and float(smoothness) > 0):
        raise OptionError(
            f"smoothness is {smoothness!r}",
            allowed='"linear", or a Lipschitz constant, more than 0',
            fix='say smoothness="linear" if f at a fixed x is linear in the Solution',
        )
    return float(smoothness)


def exact_value(flat: Flat, solution: Solution) -> SweptValue:
    """The fixed point as a linearisation point, with its certificate."""
    grouped = flat.layout.grouped
    return SweptValue(
        grouped(solution.value.detach().double(), 1),
        grouped(solution.advantage.detach().double(), 2),
        grouped(widened(solution.policy.detach()), 2),
        grouped(solution.log_policy.detach().double(), 2),
        grouped(solution.log_policy_error_bound, 0) * flat.temperature.detach() / 2,
    )


def _exact_flow(at: Linearisation) -> Tensor:
    flow, _ = at.point.system.solve(at.source.unsqueeze(2), transpose=True)
    return flow.squeeze(2)


def _bound(at: Linearisation, flow: Tensor, smoothness: float, starts: torch.Size) -> Tensor:
    """The right-hand side of the formula in `hypergradient_report`, summed over the problems of
    each start.
    """
    flat, x = at.flat, at.x
    infinite = at.objective.new_full(starts, torch.inf)
    unknown = smoothness == math.inf
    if unknown or flat.log_reference.requires_grad or flat.discount.requires_grad:
        return infinite
    states, actions = flat.reward.shape[-2:]
    transition_too = flat.transition.requires_grad
    if transition_too and flat.transition[0].numel() > _JACOBIAN_ROWS:
        return infinite
    error = at.flow_error(flow, smoothness)
    reward = flat.reward.double()
    if transition_too:
        rows = at.point.rows.with_data(flat.transition)
        ahead = rows.apply(at.point.value) * rows.scale()
        reward = reward + at.point.gamma * ahead
    slope = torch.zeros(starts, dtype=torch.float64, device=x.device)
    if reward.requires_grad:
        table = flat.layout.restore(reward)
        for s in range(states):
            for a in range(actions):
                for entry in _lanes(table[..., s, a], starts):
                    row = direct_gradient(entry, [x], retain=True)[0]
                    if row is not None:
                        slope = torch.maximum(slope, _norm(row, starts))
    per_problem = _lane_sum(flat.layout.restore(error), starts)
    bound = slope * per_problem
    if transition_too:
        weight = at.reward_cotangent(flow)
        mass = at.point.discount * weight.abs().sum((-1, -2)) * at.value_error
        entries = flat.transition.reshape(flat.transition.shape[0], -1)
        norms = torch.zeros((entries.shape[-1], *starts), dtype=torch.float64, device=x.device)
        for i in range(entries.shape[-1]):
            row = direct_gradient(entries[:, i], [x], retain=True)[0]
            if row is not None:
                norms[i] = _norm(row, starts)
        by_row = norms.new_zeros((states * actions, *starts))
        steep = by_row.index_add(0, at.point.rows.entry_rows, norms).amax(0)
        bound = bound + steep * _lane_sum(flat.layout.restore(mass), starts)
    return bound


def _direct_error(
    problem: BilevelProblem, at: Linearisation, smoothness: float, starts: torch.Size
) -> Tensor:
    """What the errors of the solution do to ∂f/∂x itself, per start: zero if f has no terms in both
    x and the solution.
    """
    x, solution = at.x, _closed(at.solution, at.flat)
    none = torch.zeros(starts, dtype=torch.float64, device=x.device)
    objective = problem.judge(x, solution)
    if smoothness == math.inf or not objective.requires_grad:
        return none
    (direct,) = torch.autograd.grad(objective.sum(), x, allow_unused=True, create_graph=True)
    if direct is None or not direct.requires_grad:
        return none
    restore = at.flat.layout.restore
    shift = at.value_error[..., None]
    relative = 2 * shift / at.point.temperature[..., None]  # of log π, (M7)
    moved = {
        "value": shift.expand_as(at.source),
        "q": (3 * shift).unsqueeze(-1).expand_as(at.point.policy),  # V plus A
        "advantage": (2 * shift).unsqueeze(-1).expand_as(at.point.policy),
        "policy": at.policy_shift(),
        "log_policy": relative.unsqueeze(-1).expand_as(at.point.policy),
    }
    leaves = [getattr(at.solution, name) for name in moved]

    def slopes(entry: Tensor) -> list[Tensor | None]:
        if not entry.requires_grad:
            return [None] * len(leaves)
        return list(torch.autograd.grad(entry, leaves, allow_unused=True, retain_graph=True))

    if all(part is None for part in slopes(direct.sum())):
        return none
    entries = direct.reshape(*starts, -1)
    if smoothness or entries.shape[-1] > _JACOBIAN_ROWS:
        return torch.full_like(none, torch.inf)
    errors = torch.zeros_like(entries, dtype=torch.float64)
    for k in range(entries.shape[-1]):
        found = slopes(entries[..., k].sum())
        for slope, amount in zip(found, moved.values(), strict=True):
            if slope is not None:
                errors[..., k] += _lane_sum(slope.double().abs() * restore(amount), starts)
    return _norm(errors, starts)


def _lanes(entry: Tensor, starts: torch.Size) -> list[Tensor]:
    """An entry of every problem, (*B), as tensors that hold one problem per start."""
    if not starts:
        return list(entry.reshape(-1))
    return list(entry.reshape(*starts, -1).unbind(-1))


def _lane_sum(values: Tensor, starts: torch.Size) -> Tensor:
    return values.reshape(*starts, -1).sum(-1)


def _norm(x: Tensor, starts: torch.Size) -> Tensor:
    """ℓ₂ norm per start, or of the whole."""
    norm: Tensor = torch.linalg.vector_norm(x.double().reshape(*starts, -1), dim=-1)
    return norm


def _leaves(flat: Flat, swept: SweptValue) -> tuple[Solution, list[Tensor]]:
    """The solution as leaves of its own graph: what the upper level may differentiate."""
    restore, dtype = flat.layout.restore, flat.reward.dtype

    def leaf(tensor: Tensor) -> Tensor:
        return restore(tensor).to(dtype).detach().requires_grad_()

    value, advantage = leaf(swept.value), leaf(swept.advantage)
    q = leaf(swept.advantage + swept.value.unsqueeze(-1))
    policy, log_policy = leaf(swept.policy), leaf(swept.log_policy)
    error = swept.error
    solution = Solution(
        value=value,
        q=q,
        policy=policy,
        log_policy=log_policy,
        advantage=advantage,
        info=restore(
            info_table(
                error.shape,
                value.shape[-1],
                error.device,
                residual=error,
                error_bound=error,
                temperature=flat.temperature.detach(),
                kernel=torch.nan,
            )
        ),
        status=restore(torch.zeros_like(error, dtype=torch.int64)),
    )
    return _closed(solution, flat), [value, q, policy, log_policy, advantage]


def _closed(solution: Solution, flat: Flat) -> Solution:
    available = flat.available
    return solution if available is None else solution.closed(flat.layout.restore(available))
