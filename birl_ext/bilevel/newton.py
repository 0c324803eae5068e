"""Newton's method for upper levels with few variables: the layer's second derivatives make the
Hessian exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel.problem import BilevelProblem
from birl_ext.errors import GradientError

__all__ = ["DampedNewton", "NewtonOutcome"]


class NewtonOutcome(NamedTuple):
    """One outer step, taken at the x before it."""

    objective: float
    gradient_norm: float
    decrement: float
    """gᵀH⁻¹g: twice the decrease that the quadratic model still promises, units of φ."""
    damping: float
    solver_passes: int
    error_bound: float
    """Certified bound on the error of the lower level's log policy."""


class DampedNewton:
    """min φ(x) by x ← x − (H + μ diag H)⁻¹ g, with μ from the ratio of actual to predicted
    decrease.

    The damping is scaled by the diagonal of H, so badly scaled parameters do no harm.

    Args:
        problem: the two levels; φ is a scalar.
        x: start, (d,); copied.
        temperature: τ.
        damping: first μ.

    Gradients: g and H are exact, by the implicit function theorem, once and twice.

    Source: Levenberg (1944), Marquardt (1963); Hessian by double backward through (M12).
    """

    def __init__(
        self, problem: BilevelProblem, x: Tensor, *, temperature: float, damping: float = 1e-2
    ) -> None:
        self.problem = problem
        self.x = x.detach().clone()
        self.temperature = temperature
        self.damping = damping
        self.decrement = float("inf")
        self._value: Tensor | None = None

    def step(self) -> NewtonOutcome:
        """One accepted step: the damping grows until φ falls, or the model promises nothing."""
        objective, gradient, hessian, passes, bound = self._expand()
        # a tiny curvature must not let its variable run away
        diagonal = hessian.diagonal().abs()
        scale = torch.diag(diagonal.clamp(min=1e-12 * float(diagonal.max()) + 1e-300))
        self.decrement = float("inf")
        if torch.linalg.cholesky_ex(hessian)[1].item() == 0:
            self.decrement = float(gradient @ torch.linalg.solve(hessian, gradient))
        outcome = NewtonOutcome(
            float(objective), float(gradient.norm()), self.decrement, self.damping, passes, bound
        )
        noise = 1e-13 * max(abs(float(objective)), 1.0)
        gain_in_reach = float((gradient.square() / scale.diagonal()).sum())
        for _ in range(60):
            damped = hessian + self.damping * scale
            factor, fault = torch.linalg.cholesky_ex(damped)
            if fault.item() == 0:
                move = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
                promised = -float(gradient @ move + move @ hessian @ move / 2)
                with torch.no_grad():
                    there, _ = self.problem.evaluate(self.x + move, self.temperature, self._value)
                gained = float(objective - there)
                if promised <= noise and gain_in_reach > 1e3 * noise:
                    break  # only a null step is left, though the gradient promises more
                if gained >= 1e-4 * promised - noise:
                    self.x = self.x + move
                    if gained > 0.75 * promised:
                        self.damping = max(self.damping / 10, 1e-12)
                    return outcome
            self.damping = max(self.damping * 4, 1e-8)
        raise GradientError(
            f"no step along the gradient (norm {float(gradient.norm()):.3g}) "
            "decreases the objective",
            fix="check that `upper` is a differentiable function of x and the solution",
        )

    def covariance(self) -> Tensor:
        """H⁻¹ at x, (d, d): the asymptotic covariance of a maximum-likelihood estimate."""
        covariance: Tensor = torch.linalg.inv(self._expand()[2])
        return covariance

    def state_dict(self) -> dict[str, Any]:
        return {
            "x": self.x.clone(),
            "damping": self.damping,
            "decrement": self.decrement,
            "value": None if self._value is None else self._value.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.x = state["x"].clone()
        self.damping, self.decrement = float(state["damping"]), float(state["decrement"])
        self._value = state["value"]

    def _expand(self) -> tuple[Tensor, Tensor, Tensor, int, float]:
        """φ, g and H at x; passes over P and the certified error of the lower level."""
        x = self.x.detach().requires_grad_()
        objective, solution = self.problem.evaluate(x, self.temperature, self._value)
        (gradient,) = torch.autograd.grad(objective, x, create_graph=True)
        rows = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in gradient.unbind()]
        hessian = torch.stack(rows)
        self._value = solution.value.detach()
        return (
            objective.detach(),
            gradient.detach(),
            (hessian + hessian.mT) / 2,
            int(solution.iterations.max()),
            float(solution.log_policy_error_bound.max()),
        )
