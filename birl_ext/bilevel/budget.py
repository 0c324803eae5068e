"""A budget on what the follower does: c(x, π*(x)) ≤ b, by an augmented Lagrangian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.guards import check_callable, check_kind, check_number, check_objective
from birl_ext.bilevel.hypergradient import hypergradient
from birl_ext.bilevel.problem import BilevelProblem, evaluate_at
from birl_ext.errors import DtypeError, InfeasibleError, ShapeError
from birl_ext.model import checks
from birl_ext.solution import Solution
from birl_ext.state import Stateful

__all__ = ["Budget", "BudgetReport"]

SHRINK = 0.25
"""A round that leaves more than this share of a violation makes the penalty heavier."""


class BudgetReport(NamedTuple):
    """Where x stands; shapes: *M are the starts, () without; k constraints may follow."""

    objective: Tensor
    """φ, (*M,), without multiplier terms."""
    cost: Tensor
    """c, (*M,) or (*M, k)."""
    violation: Tensor
    """max(c − b, 0), in the shape of c."""
    multiplier: Tensor
    """λ ≥ 0, in the shape of c: what φ would gain from one unit more of the budget."""
    stationarity: Tensor
    """‖∇φ + Σ λ ∇c‖₂ at the multipliers above, (*M,): of a free x zero at an optimum."""
    complementarity: Tensor
    """max |min(λ, b − c)|, (*M,), of the two whichever is smaller: zero at an optimum."""
    policy_error: Tensor
    """Certified bound on max |Δ log π| of the policy that both were judged by, (*M,)."""
    feasible: Tensor
    """Whether every violation is at most the tolerance, (*M,)."""


class Budget(Stateful):
    """min over x of φ(x, π*(x)) subject to c(x, π*(x)) ≤ b.

        L(x; λ, ρ) = φ + 1/(2ρ) Σ_i [ max(0, λ_i + ρ (c_i − b_i))² − λ_i² ]
        after each round  λ_i ← max(0, λ_i + ρ (c_i − b_i))

    `problem` is min L, an ordinary `BilevelProblem` for any algorithm; it reads λ and ρ as they are
    at each step, so that an algorithm keeps its warm starts from round to round:

        for _ in range(20):
            algorithm.run(50)
            if budget.update(algorithm.x, temperature).feasible:
                break

    A violation that a round has not brought down to a quarter makes its ρ larger by `growth`.

    Args:
        problem: the two levels.
        cost: c, like `upper`: x and the Solution → a scalar, or (k,) for k constraints; with M
            starts (M,) or (M, k).
        limit: b, a number or a tensor that broadcasts to c, units of c.
        penalty: the first ρ, units of φ per unit of c².
        growth: of ρ, more than 1. The curvature of L grows with ρ: an optimiser of a fixed learning
            rate may need one near 1.
        most: largest ρ: a budget that is still exceeded there is called infeasible.
        tolerance: of a violation, units of c.

    Raises:
        OptionError, DtypeError: an argument, by name and value.

    Source: Rockafellar (1973); Bertsekas (1982), chapter 2.
    """

    STATE = ("_multiplier", "_penalty", "_violation", "rounds")

    def __init__(
        self,
        problem: BilevelProblem,
        cost: Callable[[Any, Solution], Tensor],
        limit: float | Tensor,
        *,
        penalty: float = 1.0,
        growth: float = 2.0,
        most: float = 1e6,
        tolerance: float = 1e-6,
    ) -> None:
        check_kind("problem", problem, BilevelProblem)
        check_callable("cost", cost)
        if isinstance(limit, Tensor):
            self.limit: float | Tensor = checks.as_floating("limit", limit).detach()
            variables.require_finite(self.limit, "limit", InfeasibleError, allowed="finite numbers")
        else:
            self.limit = check_number("limit", limit, least=-math.inf)
        self.inner = problem
        self.cost = cost
        self.start = check_number("penalty", penalty, above=True)
        self.growth = check_number("growth", growth, 1.0, above=True)
        self.most = check_number("most", most, self.start)
        self.tolerance = check_number("tolerance", tolerance)
        self.problem = BilevelProblem(problem.lower, self._augmented)
        self.rounds = 0
        self._multiplier: Tensor | None = None  # λ, in the shape of c
        self._penalty: Tensor | None = None  # ρ, the same
        self._violation: Tensor | None = None  # of the last round

    @property
    def multiplier(self) -> Tensor | None:
        """λ, in the shape of c; None before the first step."""
        return self._multiplier

    @property
    def penalty(self) -> Tensor | None:
        """ρ, in the shape of c; None before the first step."""
        return self._penalty

    def report(self, x: variables.Variables, temperature: float | Tensor) -> BudgetReport:
        """Where x stands at the present multipliers: one solve and its gradient.

        Raises:
            GradientError: φ, c or their gradient is not finite, or does not depend on x.
        """
        at = variables.tracked(variables.check_start(x))
        objective, solution = evaluate_at(self.inner, at, temperature)
        own = objective.shape
        over = self._over(at, solution, own)
        multiplier, _ = self._prepare(over)
        gradient = hypergradient(objective + _each(multiplier * over, own).sum(-1), at)
        over = over.detach()
        violation = over.clamp(min=0.0)
        error = solution.log_policy_error_bound.detach()
        return BudgetReport(
            objective.detach(),
            over + torch.as_tensor(self.limit).to(over),
            violation,
            multiplier.clone(),
            variables.joined(gradient, own).norm(dim=-1),
            _each(torch.minimum(multiplier, -over).abs(), own).amax(-1),
            _each(error, own).amax(-1),
            _each(violation, own).amax(-1) <= self.tolerance,
        )

    def update(self, x: variables.Variables, temperature: float | Tensor) -> BudgetReport:
        """The end of a round: multipliers raised where the budget is exceeded, lowered where it is
        not used; the report is at the new ones.

        Args:
            x: where a round of an algorithm on `problem` has ended.
            temperature: τ there.

        Raises:
            InfeasibleError: no start meets the budget, and the penalty of each has grown to `most`:
                c stays above b while λ diverges. Nothing has changed.
            GradientError: φ or its gradient is not finite.
        """
        with torch.no_grad():
            objective, solution = self.inner.evaluate(x, temperature)
            over = self._over(x, solution, objective.shape)
        multiplier, penalty = self._prepare(over)
        violation = over.clamp(min=0.0)
        slow = torch.zeros_like(over, dtype=torch.bool)
        if self._violation is not None:
            slow = (violation > self.tolerance) & (violation > SHRINK * self._violation.to(over))
        exhausted = slow & (penalty >= self.most)
        if bool(exhausted.reshape(*objective.shape, -1).any(-1).all()):
            place = int((violation * exhausted).argmax())
            worst, raised, most = (
                float(part.flatten()[place]) for part in (violation, multiplier, penalty)
            )
            raise InfeasibleError(
                f"the cost exceeds the budget by {worst:.3g} after {self.rounds} rounds, at a "
                f"multiplier of {raised:.3g} and a penalty of {most:.3g}",
                allowed=f"up to {self.tolerance:g} above the limit",
                fix="raise `limit`; if x has not come to rest, take more steps per round at a "
                "smaller learning rate, or another start",
            )
        with self.taken_back():
            self._multiplier = (multiplier + penalty * over).clamp(min=0.0)
            self._penalty = torch.where(slow, (penalty * self.growth).clamp(max=self.most), penalty)
            self._violation = violation
            self.rounds += 1
            return self.report(x, temperature)

    def _augmented(self, x: Any, solution: Solution) -> Tensor:
        """L, by one solution for both."""
        objective = self.inner.judge(x, solution)
        over = self._over(x, solution, objective.shape)
        multiplier, penalty = self._prepare(over)
        raised = (multiplier + penalty * over).clamp(min=0.0)
        terms = (raised.square() - multiplier.square()) / (2 * penalty)
        return objective + _each(terms, objective.shape).sum(-1)

    def _over(self, x: Any, solution: Solution, own: torch.Size) -> Tensor:
        """c − b, if c is what it may be beside a φ of shape `own`."""
        cost = self.cost(x, solution)
        if not isinstance(cost, Tensor) or not cost.is_floating_point():
            kind = f"tensor of {cost.dtype}" if isinstance(cost, Tensor) else type(cost).__name__
            raise DtypeError(
                f"cost returned a {kind}",
                allowed="a tensor of floating point",
                fix="compute it by torch from x and the solution, without float() or .item()",
            )
        if cost.shape[: len(own)] != own or cost.dim() > len(own) + 1 or not cost.numel():
            allowed = f"({own[0]},) or ({own[0]}, k)" if own else "a scalar, or (k,)"
            raise ShapeError(
                f"cost returned shape {tuple(cost.shape)}",
                allowed=f"{allowed}, beside a φ of shape {tuple(own)}",
            )
        limit = torch.as_tensor(self.limit).to(cost)
        ends = zip(reversed(limit.shape), reversed(cost.shape), strict=False)
        if limit.dim() > cost.dim() or any(n not in (1, m) for n, m in ends):
            raise ShapeError(
                f"limit has shape {tuple(limit.shape)}, cost {tuple(cost.shape)}",
                allowed="a limit that broadcasts to the cost",
            )
        check_objective(cost, upper="cost")
        return cost - limit

    def _prepare(self, over: Tensor) -> tuple[Tensor, Tensor]:
        """λ and ρ, which begin once the shape of c is known."""
        if self._multiplier is None or self._penalty is None:
            self._multiplier = torch.zeros_like(over.detach())
            self._penalty = torch.full_like(self._multiplier, self.start)
        if self._multiplier.shape != over.shape:
            raise ShapeError(
                f"cost returned shape {tuple(over.shape)}",
                allowed=f"{tuple(self._multiplier.shape)}, as before",
                fix="begin with a new Budget",
            )
        return self._multiplier.to(over), self._penalty.to(over)


def _each(found: Tensor, own: torch.Size) -> Tensor:
    """(*M, k): all constraints of a start."""
    return found.reshape(*own, -1)
