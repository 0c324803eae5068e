"""The last sweeps of a problem whose values differ much in size, in PyTorch.

The twin of csrc/cpu/solvers/refinement.h.

Each state is rounded, judged and certified by itself, so that the digits of small values do not
drown in the rounding of large ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.ops.backends.problem import EPS, LEAST, Problem, Sweep
from birl_ext.solution import Status

__all__ = ["OUTLIER", "Refined", "drowns", "refine", "typical_size"]

OUTLIER = 100.0  # values that many times the typical one do not set the scale of `tol` for others
DIGITS, FOLD = 1e-12, 16.0
NEAR = 8.0  # units of rounding, where nothing more may be gained
PRODUCTS = 120  # of a step, and 400 for the certificate, where there are too many states for an LU


class Refined(NamedTuple):
    """One problem; the first five as the solver keeps them."""

    sweep: Sweep
    offset: Tensor  # (1, 1)
    residual: Tensor
    bounds: Tensor  # (1, 1, S)
    passes: int
    status: Status


def typical_size(value: Tensor, temperature: Tensor) -> Tensor:
    """What a sixteenth of all |V| do not exceed, but τ where that is more, (N, G)."""
    low = value.abs().kthvalue((value.shape[-1] - 1) // 16 + 1, dim=-1).values
    return torch.maximum(low, temperature)


def drowns(
    value: Tensor, temperature: Tensor, soft: Tensor, scale: Tensor, bound: Tensor, met: Tensor
) -> Tensor:
    """Whether small values lose digits in the rounding of large ones, or would be judged by the
    tolerance of those, (N, G).
    """
    size = value.abs()
    largest = torch.maximum(size.amax(-1), temperature)
    by_tolerance = OUTLIER * typical_size(value, temperature) < largest
    own = size + soft.unsqueeze(-1)
    smallest = own.amin(-1)
    apart = (scale > FOLD * smallest) & (bound > DIGITS * smallest)
    return torch.where(met, by_tolerance, apart)


class _Refinement:
    def __init__(self, problem: Problem, soft: Tensor, units: float, continuing: bool) -> None:
        self.problem, self.soft, self.units, self.continuing = problem, soft, units, continuing
        self.tau = problem.temperature.unsqueeze(-1)
        self.gap = (1 - problem.discount).unsqueeze(-1)
        self.reach = problem.discount[..., None, None] * problem.scale
        self.available = (
            torch.ones_like(problem.reward, dtype=torch.bool)
            if problem.log_reference is None
            else problem.log_reference > -math.inf
        )

    def ahead(self, vector: Tensor) -> Tensor:
        return self.reach * self.problem.ahead(vector)

    def excess(self, step: Sweep, x: Tensor) -> Tensor:
        """τ log Σ_a π exp(x/τ) for x >= 0: exact where it is small, and where it is large."""
        tau = self.tau.unsqueeze(-1)
        weight = step.advantage + x  # τ log (π exp(x/τ))
        if self.problem.log_reference is not None:
            weight = weight + tau * self.problem.log_reference
        weight = torch.where(self.available, weight, -math.inf)
        near = (x < tau) & self.available
        growth = (weight / tau).exp() - step.policy
        total = torch.where(near, step.policy * torch.expm1(x / tau), growth)
        peak = torch.where(near, -math.inf, weight).amax(-1, keepdim=True)
        far = peak + tau * ((weight - peak) / tau).exp().sum(-1, keepdim=True).log()
        close = tau * torch.log1p(total.sum(-1, keepdim=True))
        return torch.where(peak < 700 * tau, close, far).squeeze(-1)

    def inverse(self, step: Sweep) -> Callable[[Tensor], Tensor]:
        """x ↦ (I − γP_π)⁻¹x by the elimination of csrc/cpu/solvers/elimination.h.

        It subtracts nothing: each state's result is as exact as what it reaches.
        """
        problem, states = self.problem, self.problem.rows.states
        weight = step.policy * problem.scale
        ahead = (problem.discount[..., None, None] * problem.rows.policy_matrix(weight))[0, 0]
        stops = torch.where(problem.continues, 0.0, step.policy).sum(-1)[0, 0]
        gap = self.gap[0, 0]
        defect = gap + (1 - gap) * stops
        pivots = []
        for k in range(states):
            pivots.append(defect[k] + ahead[k, k + 1 :].sum())
            lower = ahead[k + 1 :, k] / pivots[k]
            ahead[k + 1 :, k] = lower
            ahead[k + 1 :, k + 1 :] += lower.unsqueeze(1) * ahead[k, k + 1 :]
            defect[k + 1 :] += lower * defect[k]

        def inverse(x: Tensor) -> Tensor:
            x = x.clone()
            flat = x[0, 0]
            for k in range(states):
                flat[k + 1 :] += ahead[k + 1 :, k] * flat[k]
            for k in reversed(range(states)):
                flat[k] = (flat[k] + (ahead[k, k + 1 :] * flat[k + 1 :]).sum()) / pivots[k]
            return x

        return inverse

    def measure(self, step: Sweep, q: Tensor, value: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        """Rounding of q, of δ without that, and of δ."""
        image = step.image.abs()
        blur = EPS * (self.units * self.ahead(value.abs()) + 4 * (q.abs() + image.unsqueeze(-1)))
        own = image + value.abs() + self.gap * offset.abs().unsqueeze(-1) + self.soft.unsqueeze(-1)
        floor = 8 * (EPS * own).clamp(min=LEAST)
        actions = step.policy.shape[-1]
        # the last part is for those that look at a state: so no Q is off by more than its bound
        floor = floor + 0.5 * EPS * actions * self.tau + EPS * self.units * value.abs()
        return blur, floor, floor + self.excess(step, blur)


def refine(
    problem: Problem,
    value: Tensor,
    offset: Tensor,
    *,
    soft: Tensor,
    units: float,
    continuing: bool,
    coarse: float,
    eliminates: bool,
    tol: float,
    underflow: float,
    budget: int,
) -> Refined | None:
    """From V = offset + value of one problem, (1, 1, S), where a solver ended whose rounding was
    `coarse` at every state; None if that is not much more than some state's own.

    Args:
        soft: τ(1 + log A + max |log μ|), (1, 1).
        units: of rounding, in a row's product.
        continuing: whether every available row continues.
        eliminates: whether there are few enough states for that.
        underflow: what a value below the normal numbers loses where it is handed out.
        budget: most passes.
    """
    own = _Refinement(problem, soft, units, continuing)
    gamma, states = problem.discount.unsqueeze(-1), problem.rows.states
    if not continuing:
        value, offset = value + offset.unsqueeze(-1), torch.zeros_like(offset)
    best, since_best, settled, noisy, passes = math.inf, 0, False, False, 0
    while True:
        if continuing:  # the value nearest to zero is the constant
            absolute = value + offset.unsqueeze(-1)
            middle = value.gather(-1, absolute.abs().argmin(-1, keepdim=True))
            value, offset = value - middle, offset + middle.squeeze(-1)
        step = problem.sweep(value, offset)
        delta = step.image - value - own.gap * offset.unsqueeze(-1)
        q = problem.reward + own.ahead(value)
        blur, floor, rounding = own.measure(step, q, value, offset)
        finite = bool(torch.isfinite(delta).all()) and bool(torch.isfinite(offset).all())
        if not passes and not (finite and coarse > 8 * float(rounding.amin())):
            return None
        passes += 1
        if not finite:
            break
        worst = float((delta.abs() / rounding).amax())
        since_best = 0 if worst < 0.5 * best else since_best + 1
        best = min(best, worst)
        if settled or since_best >= (4 if worst <= NEAR else 30 + states) or passes >= budget:
            break
        settled = passes > 1 and worst <= 1  # the start has the rounding of another method
        noisy = noisy or since_best >= 3  # what is only rounding then is left, as in compiled code
        push = torch.where(delta.abs() <= 0.125 * rounding, 0.0, delta) if noisy else delta
        if eliminates:
            value = value + own.inverse(step)(push)
            continue
        weight = step.policy * problem.scale
        # the constant mode at once, as one state sees it whose rounding is least
        clear = rounding.argmin(-1, keepdim=True)
        seen = push.gather(-1, clear)
        seen = torch.where((seen.abs() > rounding.gather(-1, clear)) & own.continuing, seen, 0.0)
        term = total = push - seen
        for _ in range(PRODUCTS):
            term = gamma * problem.policy_product(weight, term)
            total = total + term
        value, offset = value + total, offset + (seen / own.gap).squeeze(-1)
    status = Status.CONVERGED if best <= NEAR else Status.MAX_ITERATIONS
    if not finite:
        status = Status.NON_FINITE
    bounds = _certify(own, step, delta, blur, floor, rounding, eliminates)
    constant = problem.discount * offset
    if tol > 0 and finite:
        size = (step.image + constant.unsqueeze(-1)).abs()
        typical = typical_size(size, problem.temperature).unsqueeze(-1)
        unit = torch.where(size <= OUTLIER * typical, size, 0.0).amax(-1, keepdim=True)
        unit = torch.maximum(unit, typical)
        if bool((bounds + underflow <= tol * torch.maximum(size, unit)).all()):
            status = Status.CONVERGED
        elif status == Status.CONVERGED:
            status = Status.STAGNATED
    low, high = delta.amin(-1), delta.amax(-1)
    residual = (high - low) / 2 if continuing else torch.maximum(-low, high)
    return Refined(step, constant, residual, bounds, passes, status)


def _certify(
    own: _Refinement,
    step: Sweep,
    delta: Tensor,
    blur: Tensor,
    floor: Tensor,
    rounding: Tensor,
    eliminates: bool,
) -> Tensor:
    """e with |δ| + ρ + τ log Σ_a π exp(γPe/τ) <= e, which is then no less than |V − V*|."""
    source = delta.abs() + rounding
    uniform = (source.amax(-1, keepdim=True) / own.gap * (1 + 1e-9)).expand_as(source)
    slack = 1 + 4 * EPS * (8 + own.units)
    if eliminates:
        inverse = own.inverse(step)
        # where most of it comes from afar, twice is no margin for rounding
        guess = inverse(2 * source + 8 * (slack - 1) * inverse(source))
    else:
        guess = _by_products(own, step, source)
    for _ in range(3):
        change = own.excess(step, blur + slack * own.ahead(guess))
        if bool(((delta.abs() + floor + change) * slack <= guess).all()):
            return torch.minimum(uniform, guess)
        guess = 4 * guess
    return uniform


def _by_products(own: _Refinement, step: Sweep, source: Tensor) -> Tensor:
    """With v = Σ_{j<k} (γP_π)^j x and (γP_π)^k x <= ρx, (I − γP_π)⁻¹x is at most v/(1 − ρ)."""
    gamma, weight = own.problem.discount.unsqueeze(-1), step.policy * own.problem.scale
    total = term = source
    expected = 1.0
    for _ in range(400):
        term = gamma * own.problem.policy_product(weight, term)
        ratio = float((term / source).amax())
        expected *= float(gamma)
        if 1 - ratio >= 0.25 * (1 - expected):
            return total * (2 / (1 - ratio))
        total = total + term
    return total
