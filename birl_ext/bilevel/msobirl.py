"""M-SoBiRL: one loop, everything warm-started (Yang, Gao and Yuan, AISTATS 2025)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Descent, Maker
from birl_ext.bilevel.follower import Exact, Follower, Sweeps
from birl_ext.bilevel.guards import (
    check_count,
    check_kind,
    check_number,
    check_seed,
)
from birl_ext.bilevel.hypergradient import (
    HypergradientReport,
    Linearisation,
    Smoothness,
    exact_flow,
    hypergradient,
    hypergradient_report,
    linearise,
)
from birl_ext.bilevel.problem import (
    BilevelProblem,
    Temperature,
    check_schedule,
    evaluate_at,
    temperature_at,
)
from birl_ext.errors import AccuracyWarning, OptionError, ShapeError, warn
from birl_ext.model.mdp import DenseMDP, SparseMDP

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
    f hands down as it is). "exact": bound on max |Δ log π|, which without `tol` is rounding.
    """
    sweeps: int
    products: int
    temperature: float | Tensor
    missed: bool
    """Whether `relative_error` is above the accuracy asked for, at any start."""


class MSoBiRL(Descent[MSoBiRLOutcome]):
    """Single-loop bilevel descent, all warm-started: V and its adjoint λ, then one step on x.

        V_k = T^N V_{k−1},   λ_k ≈ (I − γP_π)⁻ᵀ v̄,   x_{k+1} = x_k − β ∇φ̂(x_k, V_k, λ_k)

    Args:
        problem: the two levels.
        x: start, (d,), or (M, d) for many starts at once; or another of the forms of
            `BilevelProblem`; copied.
        temperature: τ, or a schedule of it (see `geometric`).
        optimiser: from a list of parameters to any torch optimiser, e.g. ``lambda p:
            torch.optim.Adam(p, lr=1e-2)``.
        mode: how the inner problems are solved.
            "exact": by `birl_ext.solve` and its gradient, both as far as rounding allows, or the
            value to `tol`.
            "published": N plain sweeps and one step w ← w − ζ(AᵀAw − Aᵀb) per outer step.
        sweeps: N, sweeps per outer step ("published").
        accuracy: of the hyper-gradient, as `MSoBiRLOutcome.relative_error` certifies it. Nothing is
            done to reach it; an outcome that misses it says so, and the first one warns.
        adjoint_rate: ζ, below 2/σ²max(A) ("published").
        tol: certified relative error asked of V, as in `birl_ext.solve`: fewer sweeps do once it is
            met ("published"); None: as far as rounding allows.
        follower: who answers in place of the value that `sweeps` and `tol` describe, such as
            ``Sweeps(5, carry=False)``; its hyper-gradient is that of (M14) at its policy.
        noise: standard deviation of Gaussian noise added to the hyper-gradient, units of φ per unit
            of x.
        seed: of the noise and of the published w₀ ~ N(0, I).

    Raises:
        OptionError, TemperatureError, DtypeError, NonFiniteInputError: an argument, by name and
            value.

    Gradients: ∇φ̂ is the estimate of (M14); `hypergradient_report` says how good it is.

    Source: Yang, Gao and Yuan (2025), Algorithm M-SoBiRL; (M5), (M13), (M14).
    """

    STATE = ("_value", "_flow", "generator")
    OPTIONAL = ("_value", "_flow")

    def __init__(
        self,
        problem: BilevelProblem,
        x: variables.Variables,
        *,
        temperature: Temperature,
        optimiser: Maker,
        mode: Mode = "exact",
        sweeps: int = 10,
        accuracy: float = 0.05,
        adjoint_rate: float = 0.5,
        tol: float | None = None,
        follower: Follower | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        if mode not in _MODES:
            raise OptionError(f"mode is {mode!r}", allowed=", ".join(map(repr, _MODES)))
        check_kind("problem", problem, BilevelProblem)
        self.temperature = check_schedule(temperature)
        self.mode = mode
        self.sweeps = check_count("sweeps", sweeps)
        self.accuracy = check_number("accuracy", accuracy, above=True, infinite=True)
        self.adjoint_rate = check_number("adjoint_rate", adjoint_rate, above=True)
        self.tol = None if tol is None else check_number("tol", tol)
        if follower is None:
            follower = Sweeps(sweeps, tol=tol) if mode == "published" else Exact(tol)
        elif tol is not None:
            raise OptionError(
                f"tol is {tol!r} beside a follower",
                allowed="one of the two",
                fix="give the tolerance to the follower, as in Exact(tol=1e-6)",
            )
        check_kind("follower", follower, Follower)
        self.problem, self.follower = follower.applied(problem)
        self.noise = check_number("noise", noise)
        self.generator = torch.Generator().manual_seed(check_seed(seed))
        self._begin(x, optimiser)
        self._value: Tensor | None = None  # V, (*B, S)
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
        first = self._take(self._evaluated)
        if first.missed and not self._warned:
            self._warned = True
            remedy = 'use mode="exact"' if self.mode == "published" else "raise the temperature"
            warn(
                f"the certified error of the hyper-gradient is {first.relative_error.max():.3g} in "
                f"outer step {self.steps - 1}, and accuracy is {self.accuracy:g}: {remedy}, or ask "
                "for less. Further steps say so in `MSoBiRLOutcome.missed` only",
                AccuracyWarning,
            )
        return first

    def hypergradient_report(self, smoothness: Smoothness = math.inf) -> HypergradientReport:
        """The estimate of the next step against the exact one, with its certified bound, which is
        inf unless the `smoothness` of f is declared. In the exact mode with `tol`, that at the
        policy one sweep further on.
        """
        tau = temperature_at(self.temperature, self.steps)
        estimate = None
        if self.mode == "published":
            with self.taken_back(always=True, without=Descent.STATE):
                estimate = self._estimate(tau)[:2]
        elif self.follower != Exact():
            at = linearise(self.problem, self.x, tau, functools.partial(self._approach, tau))
            estimate = at, exact_flow(at)
        return hypergradient_report(
            self.problem, self.x, tau, estimate=estimate, smoothness=smoothness
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        device = variables.leaves(self.x)[0].device
        for name in ("_value", "_flow"):
            kept: Tensor | None = getattr(self, name)
            setattr(self, name, None if kept is None else kept.to(device))

    def _evaluated(self) -> tuple[MSoBiRLOutcome, list[Tensor]]:
        """What is known at the present x, and ∇φ̂ by leaves of x, with its noise."""
        tau = temperature_at(self.temperature, self.steps)
        if self.mode == "exact":
            if isinstance(self.follower, Exact):
                tol = self.follower.tol
                phi, solution = evaluate_at(self.problem, self.x, tau, self._value, self.steps, tol)
                gradient = hypergradient(phi, self.x, self.steps)
                self._counts[0] = int(solution.iterations.max())
            else:
                at = linearise(
                    self.problem, self.x, tau, functools.partial(self._approach, tau), self.steps
                )
                phi, solution = at.phi, at.solution
                gradient, _ = at.pull(exact_flow(at), self.steps)
            self._value = solution.value.detach()
            self._counts[1] = 1
            error = solution.log_policy_error_bound
        else:
            at, _, gradient, error = self._estimate(tau)
            phi = at.phi
        phi = phi.detach()
        error = error.reshape(*phi.shape, -1).amax(-1)
        norm = variables.joined(gradient, phi.shape).double().norm(dim=-1)
        missed = not bool((error <= self.accuracy).all())
        sweeps, products = self._counts
        if self.noise:
            gradient = [
                part + self.noise * variables.drawn(part, self.generator) for part in gradient
            ]
        return MSoBiRLOutcome(phi, norm, error, sweeps, products, tau, missed), gradient

    def _estimate(self, tau: float | Tensor) -> tuple[Linearisation, Tensor, list[Tensor], Tensor]:
        """The linearisation after N sweeps, λ after one step, ∇φ̂, and the certified relative error
        of the cotangent of the reward.
        """
        self._counts = [0, 0]
        approach = functools.partial(self._approach, tau)
        at = linearise(self.problem, self.x, tau, approach, self.steps)
        self._value = at.solution.value.detach()
        flow = self._flow = self._published_flow(at)
        gradient, reward_bar = at.pull(flow, self.steps)
        error, left = at.flow_error(flow), reward_bar.abs().sum((-1, -2))
        relative = torch.where(error == 0, error, error / left).nan_to_num(torch.inf, torch.inf)
        return at, flow, gradient, at.flat.layout.restore(relative)

    def _approach(self, tau: float | Tensor, mdp: DenseMDP | SparseMDP) -> tuple[Tensor, Tensor]:
        """The follower's value, but for its last sweep, which the linearisation makes; and its
        certified error.
        """
        value, error, self._counts[0] = self.follower.approach(mdp, tau, self._value)
        return value, error

    def _published_flow(self, at: Linearisation) -> Tensor:
        """w ← w − ζ(AᵀAw − Aᵀb) with A = (I − γP_π)ᵀ; here for λ = −w/τ, which obeys the same
        recursion.
        """
        flow = self._flow
        if flow is None:
            shape = at.source.shape
            start = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            flow = -start.to(at.source.device) / at.temperature.unsqueeze(-1)
        elif any(n not in (1, m) for n, m in zip(flow.shape, at.source.shape, strict=True)):
            raise ShapeError(
                f"the flow that the last step left is of shape {tuple(flow.shape)}",
                allowed=f"{tuple(at.source.shape)}, by the MDP of `lower`",
                fix="keep the shape of the MDP, or begin with a new MSoBiRL",
            )
        self._counts[1] += 1
        return flow - self.adjoint_rate * at.forward(at.transposed(flow) - at.source)
