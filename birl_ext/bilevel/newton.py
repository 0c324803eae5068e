"""Newton's method for upper levels with few variables: the layer's second derivatives make the
Hessian exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Algorithm
from birl_ext.bilevel.guards import (
    check_count,
    check_gradient,
    check_kind,
    check_number,
    no_path,
)
from birl_ext.bilevel.hypergradient import known, slope
from birl_ext.bilevel.problem import BilevelProblem, evaluate_at
from birl_ext.errors import GradientError, ShapeError, UndeterminedError
from birl_ext.model import checks

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


class DampedNewton(Algorithm[NewtonOutcome]):
    """min φ(x) by x ← x − (H + μ diag H)⁻¹ g, with μ from the ratio of actual to predicted
    decrease.

    The damping is scaled by the diagonal of H, so badly scaled parameters do no harm.

    Args:
        problem: the two levels; φ is a scalar.
        x: start, (d,), or another of the forms of `BilevelProblem`, d numbers in all; copied.
        temperature: τ.
        damping: first μ, 0 or more.

    Gradients: g and H are exact, by the implicit function theorem, once and twice.

    Source: Levenberg (1944), Marquardt (1963); Hessian by double backward through (M12).
    """

    STATE = ("x", "damping", "decrement", "_value")
    OPTIONAL = ("_value",)

    def __init__(
        self,
        problem: BilevelProblem,
        x: variables.Variables,
        *,
        temperature: float,
        damping: float = 1e-2,
    ) -> None:
        check_kind("problem", problem, BilevelProblem)
        self.problem = problem
        self.x = variables.check_start(x, vector=True)
        checks.check_temperature(temperature)
        self.temperature = temperature
        self.damping = check_number("damping", damping)
        self.decrement = float("inf")
        self._value: Tensor | None = None

    def step(self) -> NewtonOutcome:
        """One accepted step: the damping grows until φ falls, or the model promises nothing.

        Raises:
            GradientError: either level does not depend on x, φ or its derivatives are not finite,
                or no step decreases φ.
            UndeterminedError: φ is linear along a direction; or nothing but a direction in which H
                is singular or indefinite is left to step along. After any error the state is what
                it was.
        """
        with self.taken_back(without=("x",)):  # which is replaced in the end
            return self._step()

    def _step(self) -> NewtonOutcome:
        objective, gradient, raw, passes, bound = self._expand()
        undetermined = _undetermined(raw, gradient)
        if undetermined is not None and undetermined.sloping:
            raise undetermined.error(self.x)
        hessian = (raw + raw.mT) / 2
        unit = _units(raw)
        scale = torch.diag(unit.square())
        self.decrement = float("inf")
        if undetermined is None:
            slope = gradient / unit
            self.decrement = float(slope @ torch.linalg.solve(_per_unit(hessian, unit), slope))
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
                parts = zip(variables.leaves(self.x), variables.split(move, self.x), strict=True)
                moved = variables.rebuilt(self.x, (leaf + part for leaf, part in parts))
                with torch.no_grad():
                    there, _ = self.problem.evaluate(moved, self.temperature, self._value)
                gained = float(objective - there)
                if promised <= noise and (undetermined or gain_in_reach > 1e3 * noise):
                    break  # only a null step is left, and this is no minimum
                if gained >= 1e-4 * promised - noise:
                    self.x = moved
                    if gained > 0.75 * promised:
                        self.damping = max(self.damping / 10, 1e-12)
                    return outcome
            self.damping = max(self.damping * 4, 1e-8)
        if undetermined is not None and gain_in_reach <= 1e3 * noise:
            raise undetermined.error(self.x)
        raise GradientError(
            f"no step along the gradient (norm {float(gradient.norm()):.3g}) "
            "decreases the objective",
            fix="check that `upper` is a differentiable function of x and the solution",
        )

    def covariance(self, *, mean_of: int = 1) -> Tensor:
        """(nH)⁻¹ at x, (d, d): the asymptotic covariance of a maximum-likelihood estimate, if the
        model is right and x its minimum (`decrement`).

        Args:
            mean_of: n. φ is the negative log likelihood of all observations, their sum: 1; or its
                mean over n of them: n.

        Raises:
            UndeterminedError: H is singular or indefinite: there is none. The error names the
                direction that the data do not determine.
        """
        count = check_count("mean_of", mean_of)
        _, gradient, hessian, _, _ = self._expand()
        undetermined = _undetermined(hessian, gradient)
        if undetermined is not None:
            raise undetermined.error(self.x)
        unit = _units(hessian)
        inverse: Tensor = torch.linalg.inv(_per_unit((hessian + hessian.mT) / 2, unit))
        return _per_unit(inverse, unit) / count

    def _expand(self) -> tuple[Tensor, Tensor, Tensor, int, float]:
        """φ, g and H at x, H as it was computed; passes over P and the certified error of the lower
        level.
        """
        x = variables.tracked(variables.rebuilt(self.x, variables.leaves(self.x)))
        objective, solution = evaluate_at(self.problem, x, self.temperature, self._value)
        if objective.dim():
            raise ShapeError(f"upper returned shape {tuple(objective.shape)}", allowed="a scalar")
        own = variables.named(x)
        if not objective.requires_grad:
            raise no_path()
        parts = torch.autograd.grad(
            objective, [*own.values()], create_graph=True, allow_unused=True
        )
        gradient = variables.joined(known(parts, own, None))
        hessian = torch.stack([slope(entry, variables.leaves(x)) for entry in gradient.unbind()])
        check_gradient(hessian, name="the Hessian")
        self._value = solution.value.detach()
        return (
            objective.detach(),
            gradient.detach(),
            hessian,
            int(solution.iterations.max()),
            float(solution.log_policy_error_bound.max()),
        )


class _Undetermined(NamedTuple):
    """A direction of x along which φ does not curve upwards."""

    direction: Tensor
    """v, (d,), its largest entry 1."""
    curvature: float
    """vᵀHv."""
    singular: bool
    """Whether that is zero, as far as rounding tells, and not negative."""
    sloping: bool
    """Whether φ has a slope along it all the same: then it has no minimum there."""

    def error(self, x: variables.Variables) -> UndeterminedError:
        size = self.direction.abs()
        order = size.argsort(descending=True)[:4].tolist()
        named = ", ".join(
            f"{self.direction[i]:.3g} in {variables.entry(x, i)}" for i in order if size[i] > 1e-3
        )
        kind = "singular" if self.singular else "indefinite"
        slope = ", and a slope" * self.sloping
        return UndeterminedError(
            f"the Hessian is {kind}: curvature {self.curvature:.3g} along the direction "
            f"{named}{slope}",
            allowed="a positive definite one",
            direction=tuple(self.direction.tolist()),
        )


def _units(hessian: Tensor) -> Tensor:
    """√|diag H|, (d,), the size of a step along each variable, whatever its units are.

    A curvature far below the largest is taken for zero, with the unit of the largest, where it is
    not positive or no larger than what its row misses of symmetry: it would let its variable run
    away. Another one is only of other units.
    """
    diagonal = hessian.diagonal()
    largest = diagonal.abs().max()
    if largest == 0:
        largest = hessian.abs().max()
    if largest == 0:
        largest = torch.ones_like(largest)
    rounding = (hessian - hessian.mT).abs().amax(-1)
    none = (diagonal <= 1e3 * rounding) & (diagonal.abs() <= 1e-15 * largest)
    return torch.where(none, largest, diagonal.abs()).sqrt()


def _per_unit(matrix: Tensor, unit: Tensor) -> Tensor:
    return matrix / unit / unit.unsqueeze(-1)


def _undetermined(hessian: Tensor, gradient: Tensor) -> _Undetermined | None:
    """The direction of least curvature, unless H is positive definite beyond its rounding.

    Read with a unit diagonal, so that the units of x do not matter. How far H misses symmetry says
    how much of it is rounding.
    """
    unit = _units(hessian)
    scaled = _per_unit(hessian, unit)
    values, vectors = torch.linalg.eigh((scaled + scaled.mT) / 2)
    noise = 1e-12 * len(hessian) + 8 * float((scaled - scaled.mT).abs().max())
    least = float(values[0])
    if least > noise:
        return None
    flat = vectors[:, values.abs() <= noise]
    along = flat @ (flat.mT @ (gradient / unit))
    sloping = least >= -noise and bool(along.norm() > 1e-8 * (gradient / unit).norm())
    direction = (along if sloping else vectors[:, 0]) / unit
    direction = direction / direction[direction.abs().argmax()]
    curvature = float(direction @ hessian @ direction)
    return _Undetermined(direction, curvature, least >= -noise, sloping)
