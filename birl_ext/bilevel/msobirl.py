"""M-SoBiRL: one loop, everything warm-started (Yang, Gao and Yuan, AISTATS 2025)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from birl_ext.bilevel.algorithm import Algorithm
from birl_ext.bilevel.guards import (
    check_count,
    check_gradient,
    check_kind,
    check_number,
    check_seed,
    check_start,
    make_optimiser,
    take_step,
)
from birl_ext.bilevel.hypergradient import (
    HypergradientReport,
    Linearisation,
    Smoothness,
    SweptValue,
    hypergradient_report,
    linearise,
)
from birl_ext.bilevel.problem import (
    BilevelProblem,
    Temperature,
    check_schedule,
    evaluate_at,
    hypergradient,
    temperature_at,
)
from birl_ext.errors import AccuracyWarning, OptionError
from birl_ext.model import checks as validation
from birl_ext.model.layout import Flat
from birl_ext.ops.bellman import bellman
from birl_ext.ops.certificate import sweep_rounding

__all__ = ["MSoBiRL", "MSoBiRLOutcome"]

Mode = Literal["exact", "published"]
_MODES = ("exact", "published")


class MSoBiRLOutcome(NamedTuple):
    """One outer step, taken at the x before it; tensors are scalars, or (M,) with many starts."""

    objective: Tensor
    gradient_norm: Tensor
    relative_error: Tensor
    """Certified; inf where nothing is known. "published": bound on ‖Δr̄‖₁ / ‖r̄‖₁, how well the
    cotangent that reaches the reward is known, if f is linear in the Solution (the bound takes what
    f hands down as it is). "exact": bound on max |Δ log π|, which is rounding.
    """
    sweeps: int
    products: int
    temperature: float | Tensor
    missed: bool
    """Whether `relative_error` is above the accuracy asked for, at any start."""


class MSoBiRL(Algorithm[MSoBiRLOutcome]):
    """Single-loop bilevel descent, all warm-started: V and its adjoint λ, then one step on x.

        V_k = T^N V_{k−1},   λ_k ≈ (I − γP_π)⁻ᵀ v̄,   x_{k+1} = x_k − β ∇φ̂(x_k, V_k, λ_k)

    Args:
        problem: the two levels.
        x: start, (d,), or (M, d) for many starts at once; copied.
        temperature: τ, or a schedule of it (see `geometric`).
        optimiser: from a list of parameters to any torch optimiser, e.g. ``lambda p:
            torch.optim.Adam(p, lr=1e-2)``.
        mode: how the inner problems are solved.
            "exact": both as far as rounding allows, by `birl_ext.solve` and its gradient.
            "published": N plain sweeps and one step w ← w − ζ(AᵀAw − Aᵀb) per outer step.
        sweeps: N, sweeps per outer step ("published").
        accuracy: of the hyper-gradient, as `MSoBiRLOutcome.relative_error` certifies it. Nothing is
            done to reach it; an outcome that misses it says so, and the first one warns.
        adjoint_rate: ζ, below 2/σ²max(A) ("published").
        sweep_tol: stop the sweeps once a sweep moves V by less ("published"), units of reward.
        noise: standard deviation of Gaussian noise added to the hyper-gradient, units of φ per unit
            of x.
        seed: of the noise and of the published w₀ ~ N(0, I).

    Raises:
        OptionError, TemperatureError, DtypeError, NonFiniteInputError: an argument, by name and
            value.

    Gradients: ∇φ̂ is the estimate of (M14); `hypergradient_report` says how good it is.

    Source: Yang, Gao and Yuan (2025), Algorithm M-SoBiRL; (M5), (M13), (M14).
    """

    def __init__(
        self,
        problem: BilevelProblem,
        x: Tensor,
        *,
        temperature: Temperature,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        mode: Mode = "exact",
        sweeps: int = 10,
        accuracy: float = 0.05,
        adjoint_rate: float = 0.5,
        sweep_tol: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
        max_inner: int | None = None,
    ) -> None:
        options: tuple[tuple[str, Any, bool], ...] = (
            ("mode", mode, mode in _MODES),
            ("max_inner", max_inner, max_inner is None),
        )
        for name, value, known in options:
            if not known:
                gone = name == "max_inner" or value == "contracting"
                raise OptionError(
                    f"{name} is {value!r}" + gone * ", of the contracting mode, which is gone",
                    allowed=", ".join(map(repr, _MODES)) if name == "mode" else "nothing",
                    fix='use mode="exact", which is faster, and leave `max_inner` out' * gone,
                )
        check_kind("problem", problem, BilevelProblem)
        self.problem = problem
        self.x = check_start(x).requires_grad_()
        self.temperature = check_schedule(temperature)
        self.mode = mode
        self.sweeps = check_count("sweeps", sweeps)
        self.accuracy = check_number("accuracy", accuracy, above=True, infinite=True)
        self.adjoint_rate = check_number("adjoint_rate", adjoint_rate, above=True)
        self.sweep_tol = check_number("sweep_tol", sweep_tol, infinite=True)
        self.noise = check_number("noise", noise)
        self.generator = torch.Generator().manual_seed(check_seed(seed))
        self.optimiser = make_optimiser(optimiser, [self.x])
        self.steps = 0
        self._value: Tensor | None = None  # V, (N, G, S), or the caller's (*B, S) in mode "exact"
        self._flow: Tensor | None = None  # λ, (N, G, S)
        self._counts = [0, 0]
        self._warned = False

    def step(self) -> MSoBiRLOutcome:
        """One outer step on x; with an optimiser that asks again, such as LBFGS, several
        evaluations.

        Raises:
            TemperatureError: the schedule's τ is not positive and finite.
            GradientError: either level does not depend on x, or φ or its gradient is not finite.
            NonFiniteResultError: the optimiser would make x infinite or NaN.
            BirlError: what else `upper`, `lower` or the optimiser is at fault for. After any error
                x and the warm starts are what they were.
        """
        outcomes: list[MSoBiRLOutcome] = []

        def closure() -> float:
            outcome, gradient = self._evaluated()
            outcomes.append(outcome)
            if self.noise:
                shape, dtype = gradient.shape, gradient.dtype
                shock = torch.randn(shape, generator=self.generator, dtype=dtype)
                gradient = gradient + self.noise * shock.to(gradient.device)
            self.x.grad = gradient
            return float(outcome.objective.sum())

        kept = self._inner()
        try:
            take_step(self.optimiser, [self.x], closure, self.steps)
        except BaseException:
            self._restore_inner(kept)
            raise
        self.steps += 1
        first = outcomes[0]
        if first.missed and not self._warned:
            self._warned = True
            remedy = 'use mode="exact"' if self.mode == "published" else "raise the temperature"
            warnings.warn(
                f"the certified error of the hyper-gradient is {first.relative_error.max():.3g} in "
                f"outer step {self.steps - 1}, and accuracy is {self.accuracy:g}: {remedy}, or ask "
                "for less. Further steps say so in `MSoBiRLOutcome.missed` only",
                AccuracyWarning,
                stacklevel=2,
            )
        return first

    def hypergradient_report(self, smoothness: Smoothness = math.inf) -> HypergradientReport:
        """The estimate of the next step against the exact one, with its certified bound, which is
        inf unless the `smoothness` of f is declared.
        """
        tau = temperature_at(self.temperature, self.steps)
        if self.mode == "exact":
            return hypergradient_report(self.problem, self.x, tau, smoothness=smoothness)
        kept = self._inner()
        try:
            estimate = self._estimate(tau)[:2]
        finally:
            self._restore_inner(kept)
        return hypergradient_report(
            self.problem, self.x, tau, estimate=estimate, smoothness=smoothness
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as a snapshot."""
        return {
            "x": self.x.detach().clone(),
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            **self._inner(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.x.copy_(state["x"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self._restore_inner(state)
        self.steps = int(state["steps"])

    def _inner(self) -> dict[str, Any]:
        """What the inner problems are warm-started from, as a snapshot."""
        return {
            "value": None if self._value is None else self._value.clone(),
            "flow": None if self._flow is None else self._flow.clone(),
            "generator": self.generator.get_state(),
        }

    def _restore_inner(self, state: Mapping[str, Any]) -> None:
        value, flow = state["value"], state["flow"]
        self._value = None if value is None else value.clone()
        self._flow = None if flow is None else flow.clone()
        self.generator.set_state(state["generator"])

    def _evaluated(self) -> tuple[MSoBiRLOutcome, Tensor]:
        """What is known at the present x, and ∇φ̂."""
        tau = temperature_at(self.temperature, self.steps)
        if self.mode == "exact":
            phi, solution = evaluate_at(self.problem, self.x, tau, self._value, self.steps)
            gradient = hypergradient(phi, self.x, self.steps)
            self._value = solution.value.detach()
            self._counts = [int(solution.iterations.max()), 1]
            phi = phi.detach()
            error = solution.log_policy_error_bound.reshape(*phi.shape, -1).amax(-1)
        else:
            at, flow, error = self._estimate(tau)
            phi, gradient = at.objective, at.gradient(flow)
            check_gradient(gradient, self.steps, published=True)
        norm = gradient.double().reshape(*phi.shape, -1).norm(dim=-1)
        missed = not bool((error <= self.accuracy).all())
        sweeps, products = self._counts
        return MSoBiRLOutcome(phi, norm, error, sweeps, products, tau, missed), gradient

    def _estimate(self, tau: float | Tensor) -> tuple[Linearisation, Tensor, Tensor]:
        """The linearisation after N sweeps, λ after one step, and the certified relative error of
        the cotangent of the reward.
        """
        self._counts = [0, 0]
        at = linearise(self.problem, self.x, tau, self._sweep, self.steps)
        flow = self._flow = self._published_flow(at)
        error, left = at.flow_error(flow), at.reward_cotangent(flow).abs().sum((-1, -2))
        relative = torch.where(error == 0, error, error / left).nan_to_num(torch.inf, torch.inf)
        return at, flow, at.flat.layout.restore(relative).reshape(*at.objective.shape, -1).amax(-1)

    def _sweep(self, flat: Flat) -> SweptValue:
        """Bring V up to date: N sweeps, or fewer once they move it by no more than `sweep_tol`."""
        value = self._value
        if value is None:
            value = flat.discount.new_zeros(flat.reward.shape[:-1])
        while True:
            swept = bellman(flat.data, value)
            self._counts[0] += 1
            moved = (swept[0] - value).abs().amax(-1)
            enough = bool((moved <= self.sweep_tol).all())
            if enough or self._counts[0] >= self.sweeps:
                break
            value = swept[0]
        self._value = swept[0]
        # of the V that the policy was taken at (M5), and more than that of its image
        error = (moved + sweep_rounding(flat.data, value)) / (1 - flat.discount)
        if not bool(torch.isfinite(error).all()):
            validation.check_reward(flat.layout.restore(flat.reward))
        image, advantage, policy, log_policy = swept
        return SweptValue(image, advantage, policy, log_policy, error)

    def _published_flow(self, at: Linearisation) -> Tensor:
        """w ← w − ζ(AᵀAw − Aᵀb) with A = (I − γP_π)ᵀ; here for λ = −w/τ, which obeys the same
        recursion.
        """
        flow = self._flow
        if flow is None:
            shape = at.source.shape
            start = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            flow = -start.to(at.source.device) / at.point.temperature.unsqueeze(-1)
        self._counts[1] += 1
        return flow - self.adjoint_rate * at.forward(at.transposed(flow) - at.source)
