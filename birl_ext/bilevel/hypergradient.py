"""The hyper-gradient from inexact inner solves (M14), its certificate, and a report against the
exact one.

An estimate needs a value V and a flow λ, neither of them exact: V from a few sweeps, λ from a few
products. The flow is the adjoint of (M12); the w of (M14) is −τλ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.follower import approximate
from birl_ext.bilevel.guards import (
    check_gradient,
    check_kind,
    check_lower,
    check_objective,
    no_path,
)
from birl_ext.bilevel.problem import (
    BilevelProblem,
    evaluate_at,
)
from birl_ext.errors import OptionError
from birl_ext.model.layout import Flat
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.ops.bellman import bellman
from birl_ext.ops.policy_solve import System
from birl_ext.ops.rows import Rows
from birl_ext.solution import Solution

__all__ = [
    "HypergradientReport",
    "Linearisation",
    "hypergradient",
    "hypergradient_report",
    "linearise",
]

Smoothness = float | Literal["linear"]
Sweep = Callable[[DenseMDP | SparseMDP], tuple[Tensor, Tensor]]
"""MDP → (V (*B, S), certified bound on ‖V − V*‖∞ (*B))."""

_EPS = torch.finfo(torch.float64).eps
_JACOBIAN_ROWS = 20_000  # most rows of ∂P/∂x that the certificate will compute one by one


def hypergradient(
    objective: Tensor,
    x: variables.Variables,
    step: int | None = None,
    levels: str = "`upper` or `lower`",
) -> list[Tensor]:
    """∇φ of the sum over starts, by leaves of x, finite; refused where φ does not depend on one."""
    own = variables.named(x)
    return known(direct_gradient(objective, list(own.values())), own, step, levels=levels)


def known(
    gradient: Sequence[Tensor | None], own: Mapping[str, Tensor], step: int | None, **words: Any
) -> list[Tensor]:
    """The gradient by leaves, if none is missing and all are finite."""
    found = []
    for name, part in zip(own, gradient, strict=True):
        if part is None:
            raise no_path("x" if all(other is None for other in gradient) else name)
        what = "the hyper-gradient" + (name != "x") * f" of {name}"
        check_gradient(part, step, what, **words)
        found.append(part)
    check_gradient(variables.joined(found), step, **words)  # whose norm may overflow
    return found


def direct_gradient(
    objective: Tensor, inputs: list[Tensor], *, retain: bool = False
) -> list[Tensor | None]:
    """Gradients of the sum over starts; None where there is no dependence."""
    if not objective.requires_grad:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(objective.sum(), inputs, allow_unused=True, retain_graph=retain)
    )


def slope(entry: Tensor, own: Sequence[Tensor], starts: Sequence[int] = ()) -> Tensor:
    """Its gradient with respect to leaves of x, (*starts, d): zero where it does not depend."""
    if not entry.requires_grad:
        return variables.joined(map(torch.zeros_like, own), starts)
    found = torch.autograd.grad(entry.sum(), own, retain_graph=True, materialize_grads=True)
    return variables.joined(found, starts)


class HypergradientReport(NamedTuple):
    """How good a hyper-gradient is. Shapes: x as given, or (d,) of all its leaves where it is no
    tensor; the others (M,) per start, or scalars.
    """

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
    """φ, TV and π_V as functions of (x, V), and all that does not depend on the flow.

    Attributes:
        flat: the lower level at x; its reward is part of the graph, or a leaf of it.
        value: V, (N, G, S), a leaf.
        image: TV, (N, G, S).
        advantage, policy: Q − TV and π_V, (N, G, S, A).
        phi: φ at the policy of V, scalar or (M,).
        solution: the solution handed to the upper level, exact only if V is.
        source: v̄ = ∂φ/∂V, the right-hand side of (I − γP_π)ᵀλ = v̄, (N, G, S).
        policy_bar: what f itself hands down to π.
        value_error: certified bound on ‖V − V*‖∞, (N, G).
    """

    x: Any
    flat: Flat
    rows: Rows
    value: Tensor
    image: Tensor
    advantage: Tensor
    policy: Tensor
    phi: Tensor
    solution: Solution
    source: Tensor
    policy_bar: Tensor
    value_error: Tensor

    @property
    def discount(self) -> Tensor:
        return self.flat.data.discount.detach()

    @property
    def temperature(self) -> Tensor:
        return self.flat.data.temperature.detach()

    def transposed(self, flow: Tensor) -> Tensor:
        """(I − γP_π)ᵀ λ, (N, G, S)."""
        visits = flow.unsqueeze(-1) * self.policy * self.rows.scale()
        return flow - self.discount.unsqueeze(-1) * self.rows.pull(visits)

    def forward(self, vector: Tensor) -> Tensor:
        """(I − γP_π) v, (N, G, S)."""
        ahead = self.rows.apply(vector) * self.rows.scale()
        return vector - self.discount.unsqueeze(-1) * (self.policy * ahead).sum(-1)

    def adjoint_residual(self, flow: Tensor) -> Tensor:
        """ρ = ‖v̄ − (I − γP_π)ᵀλ‖₁ and its own rounding, (N, G)."""
        residual = (self.source - self.transposed(flow)).abs().sum(-1)
        return residual + 4 * _EPS * self.rows.states * flow.abs().sum(-1)

    def pull(self, flow: Tensor, step: int | None = None) -> tuple[list[Tensor], Tensor]:
        """∇φ̂ = ∂φ/∂x + λᵀ ∂(TV)/∂x at fixed V, by leaves of x, and r̄, (N, G, S, A) (M12).

        Raises:
            GradientError: neither depends on a leaf of x, or the gradient is not finite.
        """
        own = variables.named(self.x)
        *gradient, reward_bar = torch.autograd.grad(
            [self.phi, self.image],
            [*own.values(), self.flat.data.reward],
            [torch.ones_like(self.phi), flow],
            retain_graph=True,
            allow_unused=True,
        )
        return known(gradient, own, step, published=True), reward_bar.double()

    def policy_shift(self) -> Tensor:
        """Certified bound on |π_V − π*| in every entry, (N, G, S, A).

        log π is off by at most ε = 2‖ΔV‖∞/τ (M7), so π by at most (e^ε − 1)π, and never by more
        than one.
        """
        smallest = torch.finfo(torch.float64).tiny  # what underflows to zero may be as large
        drift = self._drift()[..., None, None]
        return ((self.policy + smallest) * drift).clamp(max=1.0)

    def _drift(self) -> Tensor:
        """η = e^ε − 1, (N, G): inf where nothing is known."""
        return torch.expm1(2 * self.value_error / self.temperature)

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
        discount, temperature = self.discount, self.temperature
        residual = self.adjoint_residual(flow)
        mass = flow.abs().sum(-1)
        turned = self._drift().clamp(max=2.0)
        moved = self.policy_shift()
        q_error = (self.policy_bar.abs() * moved).sum((-1, -2)) / temperature
        if smoothness:
            shift = smoothness * moved.amax((-1, -2))
            q_error = q_error + shift * self.rows.states / temperature
        source_error = (1 + discount) * q_error
        flow_error = (residual + discount * turned * mass + source_error) / (1 - discount)
        return q_error + turned * mass + flow_error


def linearise(
    problem: BilevelProblem,
    x: Any,
    temperature: float | Tensor,
    sweep: Sweep,
    step: int | None = None,
) -> Linearisation:
    """Evaluate the upper level at the policy of an approximate value, and collect its cotangents.

    Args:
        problem: the two levels.
        x: upper variable, whose leaves require a gradient.
        temperature: τ.
        sweep: brings a warm-started value up to date, without a graph.
        step: the outer step, for messages.

    Raises:
        GradientError: either level does not depend on x, or φ is not finite.
    """
    mdp = problem.model(x)
    check_lower(mdp, x)
    with torch.no_grad():
        found, error = sweep(mdp)
    flat = mdp.flatten(temperature)
    if not flat.data.reward.requires_grad:  # its cotangent is asked for all the same
        reward = flat.data.reward.detach().requires_grad_()
        flat = flat._replace(data=flat.data._replace(reward=reward))
    grouped = flat.layout.grouped
    value = grouped(found.double(), 1).clone().requires_grad_()
    image, advantage, policy, log_policy = bellman(flat.data, value)
    # Q − V and π are those of V itself (M11): TV in number, to a derivative V
    now = image.detach() + (value - value.detach())
    shift = (image - now).unsqueeze(-1)
    change = shift / flat.data.temperature[..., None, None]
    own = advantage + shift
    handed = policy * change.exp()

    solution = approximate(flat, now, own, handed, log_policy + change, error)
    phi = problem.judge(x, solution)
    check_objective(phi, step)
    *direct, source, policy_bar = direct_gradient(
        phi, [*variables.leaves(x), value, handed], retain=True
    )
    if source is None and all(part is None for part in direct):
        raise no_path()
    return Linearisation(
        x=x,
        flat=flat,
        rows=Rows(flat.data.transition.detach(), *flat.data.pattern, *flat.data.reward.shape[-2:]),
        value=value,
        image=image,
        advantage=advantage,
        policy=policy.detach(),
        phi=phi,
        solution=solution,
        source=torch.zeros_like(value) if source is None else source,
        policy_bar=torch.zeros_like(policy) if policy_bar is None else policy_bar,
        value_error=grouped(error, 0),
    )


def hypergradient_report(
    problem: BilevelProblem,
    x: variables.Variables,
    temperature: float | Tensor,
    *,
    estimate: tuple[Linearisation, Tensor] | None = None,
    smoothness: Smoothness = math.inf,
) -> HypergradientReport:
    """Compare a hyper-gradient with the exact one and certify its error.

        ‖∇φ̂ − ∇φ‖₂ ≤ max_{s,a} ‖∂(r + γPV)/∂x‖₂ · ‖Δr̄‖₁ + γ(‖r̄‖₁ + ‖Δr̄‖₁) ‖ΔV‖∞ · max_{s,a}
        Σ_t ‖∂P(t|s,a)/∂x‖₂ + ‖ Σ_y |∂²f/∂x∂y| |Δy| ‖₂,   y = V, Q, A, π, log π

    Args:
        problem: the two levels.
        x: upper variable: a tensor, (d,) or (M, d), or another of the forms of `BilevelProblem`.
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
    check_kind("problem", problem, BilevelProblem)
    declared = _lipschitz(smoothness)
    x = variables.tracked(variables.check_start(x))
    phi, solution = evaluate_at(problem, x, temperature)
    starts = phi.shape
    exact = variables.joined(hypergradient(phi, x), starts)
    if estimate is None:
        certified = solution.value.detach(), solution.error_bound
        point = linearise(problem, x, temperature, lambda _: certified)
        estimate = point, exact_flow(point)
    at, flow = estimate
    approximate = variables.joined(at.pull(flow)[0], starts)
    residual = at.adjoint_residual(flow)
    gap, norm = _norm(approximate - exact), _norm(exact)
    tiny = torch.finfo(torch.float64).tiny
    cosine = (approximate * exact).sum(-1) / (_norm(approximate) * norm).clamp(min=tiny)
    shape = x.shape if isinstance(x, Tensor) else exact.shape
    restore = at.flat.layout.restore
    return HypergradientReport(
        objective=phi.detach(),
        exact=exact.reshape(shape),
        estimate=approximate.reshape(shape),
        relative_error=gap / norm.clamp(min=tiny),
        cosine=cosine,
        bound=_bound(at, flow, declared, starts) + _direct_error(problem, at, declared, starts),
        adjoint_residual=_start_sum(restore(residual), starts),
        adjoint_error=_start_sum(restore(residual / (1 - at.discount)), starts),
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


def exact_flow(at: Linearisation) -> Tensor:
    """λ = (I − γP_π)⁻ᵀ v̄ as far as rounding allows, (N, G, S)."""
    system = System(*at.rows[:3], at.policy, at.discount)
    flow, _ = system.solve(at.source.unsqueeze(2), transpose=True)
    return flow.squeeze(2)


def _bound(at: Linearisation, flow: Tensor, smoothness: float, starts: torch.Size) -> Tensor:
    """The right-hand side of the formula in `hypergradient_report`, summed over the problems of
    each start.
    """
    flat, own, restore = at.flat, variables.leaves(at.x), at.flat.layout.restore
    infinite = torch.full(starts, torch.inf, dtype=torch.float64, device=flow.device)
    if (
        smoothness == math.inf
        or flat.data.log_reference.requires_grad
        or flat.data.discount.requires_grad
    ):
        return infinite
    states, actions = flat.data.reward.shape[-2:]
    transition_too = flat.data.transition.requires_grad
    if transition_too and flat.data.transition[0].numel() > _JACOBIAN_ROWS:
        return infinite

    reward = flat.data.reward.double()
    if transition_too:  # r + γPV
        reward = at.advantage + at.image.unsqueeze(-1)
    table = restore(reward)
    steepest = torch.zeros(starts, dtype=torch.float64, device=flow.device)
    for s in range(states):
        for a in range(actions):
            for entry in _by_start(table[..., s, a], starts):
                steepest = torch.maximum(steepest, _norm(slope(entry, own, starts)))
    error = at.flow_error(flow, smoothness)
    bound = steepest * _start_sum(restore(error), starts)
    if transition_too:
        weight = at.pull(flow)[1].abs().sum((-1, -2)) + error
        mass = at.discount * weight * at.value_error
        entries = flat.data.transition.reshape(flat.data.transition.shape[0], -1)
        norms = torch.stack([_norm(slope(column, own, starts)) for column in entries.unbind(1)])
        by_row = norms.new_zeros((states * actions, *starts))
        steep = by_row.index_add(0, at.rows.entry_rows, norms).amax(0)
        bound = bound + steep * _start_sum(restore(mass), starts)
    return bound


def _direct_error(
    problem: BilevelProblem, at: Linearisation, smoothness: float, starts: torch.Size
) -> Tensor:
    """What the errors of the solution do to ∂f/∂x itself, per start: zero if f has no terms in both
    x and the solution.
    """
    none = torch.zeros(starts, dtype=torch.float64, device=at.source.device)
    restore, available = at.flat.layout.restore, at.flat.data.available
    value, q, policy, log_policy, advantage, info, status = at.solution.detach()
    tables = [part.requires_grad_() for part in (value, q, policy, log_policy, advantage)]
    frozen = Solution(value, q, policy, log_policy, advantage, info, status)
    if available is not None:
        frozen = frozen.closed(restore(available))
    objective = problem.judge(at.x, frozen)
    if smoothness == math.inf or not objective.requires_grad:
        return none
    parts = torch.autograd.grad(
        objective.sum(), variables.leaves(at.x), allow_unused=True, create_graph=True
    )
    direct = [part for part in parts if part is not None and part.requires_grad]
    if not direct:
        return none
    shift = at.value_error[..., None]
    relative = 2 * shift / at.temperature[..., None]  # of log π, (M7)
    moved = (
        shift.expand_as(at.source),
        (3 * shift).unsqueeze(-1).expand_as(at.policy),  # Q: V plus A
        at.policy_shift(),
        relative.unsqueeze(-1).expand_as(at.policy),
        (2 * shift).unsqueeze(-1).expand_as(at.policy),
    )
    entries = variables.joined(direct, starts)
    if all(part is None for part in direct_gradient(entries, tables, retain=True)):
        return none
    if smoothness or entries.shape[-1] > _JACOBIAN_ROWS:
        return torch.full_like(none, torch.inf)
    errors = torch.zeros_like(entries, dtype=torch.float64)
    for k in range(entries.shape[-1]):
        found = direct_gradient(entries[..., k], tables, retain=True)
        for part, amount in zip(found, moved, strict=True):
            if part is not None:
                errors[..., k] += _start_sum(part.double().abs() * restore(amount), starts)
    return _norm(errors)


def _by_start(entry: Tensor, starts: torch.Size) -> list[Tensor]:
    """An entry of every problem, (*B), as tensors that hold one problem per start."""
    return list(entry.reshape(*starts, -1).unbind(-1))


def _start_sum(values: Tensor, starts: torch.Size) -> Tensor:
    return values.reshape(*starts, -1).sum(-1)


def _norm(vector: Tensor) -> Tensor:
    """ℓ₂ norm of each start's, or of the whole."""
    norm: Tensor = torch.linalg.vector_norm(vector.double(), dim=-1)
    return norm
