"""M-SoBiRL: one loop, everything warm-started (Yang, Gao and Yuan, AISTATS 2025)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from birl_ext.batching import Flat
from birl_ext.bilevel.hypergradient import (
    HypergradientReport,
    Linearisation,
    SweptValue,
    hypergradient_report,
    linearise,
)
from birl_ext.bilevel.problem import BilevelProblem, Temperature, direct_gradient, temperature_at
from birl_ext.errors import OptionError
from birl_ext.ops._backends import AUTO

__all__ = ["MSoBiRL", "Outcome"]

Mode = Literal["contracting", "published", "exact"]
_MODES = ("contracting", "published", "exact")
_EPS = torch.finfo(torch.float64).eps
_ROUNDS = 12  # of tightening, each tenfold or more: from there to the rounding level


class Outcome(NamedTuple):
    """One outer step, taken at the x before it; tensors are scalars, or (M,) with many starts."""

    objective: Tensor
    gradient_norm: Tensor
    relative_error: Tensor
    """Certified bound on ‖Δr̄‖₁ / ‖r̄‖₁: how well the cotangent that reaches the reward is known."""
    sweeps: int
    products: int
    temperature: float | Tensor


class MSoBiRL:
    """Single-loop bilevel descent: sweeps on V, steps on the adjoint, one step on x, all warm-
    started.

        V_k = T^N V_{k−1},   λ_k ≈ (I − γP_π)⁻ᵀ v̄,   x_{k+1} = x_k − β ∇φ̂(x_k, V_k, λ_k)

    Args:
        problem: the two levels.
        x: start, (d,), or (M, d) for many starts at once; copied.
        temperature: τ, or a schedule of it (see `geometric`).
        optimiser: from a list of parameters to any torch optimiser, e.g. ``lambda p:
            torch.optim.Adam(p, lr=1e-2)``.
        mode: how the inner problems are solved.
            "contracting": deflated sweeps and λ ← v̄ + γP_πᵀλ, which contracts by γ; as many of each
                as `accuracy` needs.
            "published": N plain sweeps and one step w ← w − ζ(AᵀAw − Aᵀb) per outer step.
            "exact": both as far as rounding allows, by `birl_ext.solve` and its gradient.
        sweeps: N, sweeps per outer step ("published").
        accuracy: certified error allowed in the cotangent of the reward, ‖Δr̄‖₁ / ‖r̄‖₁
            ("contracting"). It is missed, and the `Outcome` says so, where rounding or `max_inner`
            leaves no more.
        adjoint_rate: ζ, below 2/σ²max(A) ("published").
        sweep_tol: stop the sweeps once a sweep moves V by less ("published"), units of reward.
        noise: standard deviation of Gaussian noise added to the hyper-gradient, units of φ per unit
            of x.
        seed: of the noise and of the published w₀ ~ N(0, I).
        max_inner: most sweeps, and most products, per outer step ("contracting").

    Gradients: ∇φ̂ is the estimate of (M14); `hypergradient_report` says how good it is.

    Source: Yang, Gao and Yuan (2025), Algorithm M-SoBiRL; (M5), (M6), (M13), (M14).
    """

    def __init__(
        self,
        problem: BilevelProblem,
        x: Tensor,
        *,
        temperature: Temperature,
        optimiser: Callable[[Iterable[Tensor]], Optimizer],
        mode: Mode = "contracting",
        sweeps: int = 10,
        accuracy: float = 0.05,
        adjoint_rate: float = 0.5,
        sweep_tol: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
        max_inner: int = 2000,
    ) -> None:
        if mode not in _MODES:
            raise OptionError(f"mode is {mode!r}", allowed=", ".join(map(repr, _MODES)))
        for name, value in (("sweeps", sweeps), ("accuracy", accuracy), ("max_inner", max_inner)):
            if not value > 0:
                raise OptionError(f"{name} is {value!r}", allowed="more than 0")
        self.problem = problem
        self.x = x.detach().clone().requires_grad_()
        self.temperature = temperature
        self.optimiser = optimiser([self.x])
        self.mode = mode
        self.sweeps = sweeps
        self.accuracy = accuracy
        self.adjoint_rate = adjoint_rate
        self.sweep_tol = sweep_tol
        self.noise = noise
        self.max_inner = max_inner
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self._value: Tensor | None = None  # V, (N, G, S), or the caller's (*B, S) in mode "exact"
        self._flow: Tensor | None = None  # λ, (N, G, S)
        self._counts = [0, 0]
        self._share = 1.0  # of the terms of r̄, what is left of them; of the last step
        self._goal = accuracy  # of the inner loops, relative to these terms

    def step(self) -> Outcome:
        """One outer step on x; with an optimiser that asks again, such as LBFGS, several
        evaluations.
        """
        outcomes: list[Outcome] = []

        def closure() -> float:
            objective, gradient, error = self._hypergradient()
            lanes = objective.shape
            norm = gradient.double().reshape(*lanes, -1).norm(dim=-1)
            sweeps, products = self._counts
            outcomes.append(Outcome(objective, norm, error, sweeps, products, self._temperature))
            if self.noise:
                shape, dtype = gradient.shape, gradient.dtype
                shock = torch.randn(shape, generator=self.generator, dtype=dtype)
                gradient = gradient + self.noise * shock.to(gradient.device)
            self.x.grad = gradient
            return float(objective.sum())

        self.optimiser.step(closure)
        self.steps += 1
        return outcomes[0]

    def hypergradient_report(self, smoothness: float = 0.0) -> HypergradientReport:
        """The estimate of the next step against the exact one, with its certified bound."""
        if self.mode == "exact":
            return hypergradient_report(
                self.problem, self.x, self._temperature, smoothness=smoothness
            )
        kept = self.state_dict()
        at, flow, _ = self._estimate()
        report = hypergradient_report(
            self.problem, self.x, self._temperature, estimate=(at, flow), smoothness=smoothness
        )
        self._restore_inner(kept)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as a snapshot."""
        return {
            "x": self.x.detach().clone(),
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "value": None if self._value is None else self._value.clone(),
            "flow": None if self._flow is None else self._flow.clone(),
            "share": self._share,
            "generator": self.generator.get_state(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.x.copy_(state["x"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self._restore_inner(state)
        self.steps = int(state["steps"])

    def _restore_inner(self, state: Mapping[str, Any]) -> None:
        value, flow = state["value"], state["flow"]
        self._value = None if value is None else value.clone()
        self._flow = None if flow is None else flow.clone()
        self._share = float(state["share"])
        self.generator.set_state(state["generator"])

    @property
    def _temperature(self) -> float | Tensor:
        return temperature_at(self.temperature, self.steps)

    def _hypergradient(self) -> tuple[Tensor, Tensor, Tensor]:
        """φ, ∇φ̂, and the certified relative error of the cotangent of the reward."""
        self._counts = [0, 0]
        if self.mode == "exact":
            phi, solution = self.problem.evaluate(self.x, self._temperature, self._value)
            gradient = direct_gradient(phi, [self.x])[0]
            self._value = solution.value.detach()
            self._counts = [int(solution.iterations.max()), 1]
            gradient = torch.zeros_like(self.x) if gradient is None else gradient
            # rounding is all that is left: the policy's certified error bounds it
            error = solution.log_policy_error_bound.reshape(*phi.shape, -1).amax(-1)
            return phi.detach(), gradient, error
        at, flow, error = self._estimate()
        return at.objective, at.gradient(flow), error

    def _estimate(self) -> tuple[Linearisation, Tensor, Tensor]:
        published = self.mode == "published"
        before = math.inf
        self._goal = self.accuracy * self._share
        for _ in range(_ROUNDS):
            at = linearise(self.problem, self.x, self._temperature, self._sweep)
            flow = self._published_flow(at) if published else self._contract_flow(at)
            self._flow = flow
            error = at.flow_error(flow)
            left = at.reward_cotangent(flow).abs().sum((-1, -2))
            relative = (error / left).where(left > 0, torch.where(error > 0, torch.inf, 0.0))
            worst = float(relative.max())
            if published or worst <= self.accuracy or not worst <= before / 2:
                break  # the last: rounding is all that is left
            before = worst
            self._goal *= max(1e-4, min(0.1, self.accuracy / worst / 2))
        self._share = float((left / self._terms(at, flow)).min().clamp(max=1.0))
        worst_of = at.flat.layout.restore(relative).reshape(*at.objective.shape, -1).amax(-1)
        return at, flow, worst_of

    @staticmethod
    def _terms(at: Linearisation, flow: Tensor) -> Tensor:
        """‖λ‖₁ + ‖Q̄‖₁, (N, G): the terms whose sum is r̄, before they cancel."""
        size = flow.abs().sum(-1)
        if at.folded.q is not None:
            size = size + at.folded.q.abs().sum((-1, -2))
        return size.clamp(min=torch.finfo(torch.float64).tiny)

    def _sweep(self, flat: Flat) -> SweptValue:
        """Bring V up to date: N sweeps, or as many as the policy's certificate asks for."""
        value = self._value
        if value is None:
            value = flat.discount.new_zeros(flat.reward.shape[:-1])
        published = self.mode == "published"
        gap = 1 - flat.discount
        tau = flat.temperature
        continuing = bool((flat.transition.sum(-1) > 0).all()) if flat.crow is None else False
        magnitude = flat.reward.abs().amax((-1, -2)) + tau
        while True:
            swept = torch.ops.birl_ext.bellman(
                flat.transition,
                *flat.pattern,
                flat.reward,
                flat.log_reference,
                flat.discount,
                tau,
                value,
                AUTO,
            )
            self._counts[0] += 1
            delta = swept[0] - value
            low, high = delta.amin(-1), delta.amax(-1)
            if continuing and not published:
                half, middle = (high - low) / 2, (high + low) / 2
            else:
                half, middle = torch.maximum(high, -low), torch.zeros_like(high)
            middle = (flat.discount / gap * middle).unsqueeze(-1)
            rounding = 16 * _EPS * (magnitude + swept[0].abs().amax(-1))
            error = (half + rounding) / gap  # of the V that the policy was taken at, (M5), (M6)
            value = swept[0] + middle
            if published:
                enough = bool((half <= self.sweep_tol).all())
                if enough or self._counts[0] >= self.sweeps:
                    break
            else:
                drift = torch.expm1((2 * error / tau).clamp(max=700.0))
                floor = half <= rounding
                enough = bool(((drift <= self._goal / 8 * gap) | floor).all())
                if enough or self._counts[0] % self.max_inner == 0:
                    break
        self._value = value
        image, advantage, policy, log_policy = swept
        return SweptValue(image + middle, advantage, policy, log_policy, error)

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

    def _contract_flow(self, at: Linearisation) -> Tensor:
        """λ ← v̄ + γP_πᵀλ, from the warm start with its mass made exact: Σλ = Σv̄/(1 − γ) where
        nothing ends.
        """
        flow = self._flow
        if flow is None:
            flow = at.source
        gap = (1 - at.point.discount).unsqueeze(-1)
        if bool((at.point.rows.sums() > 0).all()):
            missing = at.source.sum(-1, keepdim=True) / gap - flow.sum(-1, keepdim=True)
            flow = flow + missing / flow.shape[-1]
        for _ in range(self.max_inner):
            left = at.source - at.transposed(flow)
            flow = flow + left
            self._counts[1] += 1
            # the error of λ is at most γ‖left‖₁/(1 − γ)
            worst = left.abs().sum(-1) / gap.squeeze(-1)
            goal = self._goal / 4 * self._terms(at, flow)
            if bool((worst <= torch.maximum(goal, 64 * _EPS * flow.abs().sum(-1))).all()):
                break
        return flow
