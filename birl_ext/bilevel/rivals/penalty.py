"""Penalty methods: the follower's optimality as a price beside the upper level's objective."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.follower import Follower, approximate
from birl_ext.bilevel.guards import check_count, check_number, check_objective
from birl_ext.bilevel.hypergradient import hypergradient
from birl_ext.bilevel.model_descent import ModelDescent
from birl_ext.bilevel.problem import BilevelProblem, Temperature
from birl_ext.errors import NonFiniteResultError, ShapeError
from birl_ext.functional import evaluate
from birl_ext.model.layout import Flat
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.ops.rows import Rows

__all__ = ["BellmanPenalty", "PenaltyOutcome", "ValuePenalty"]

Weight = float | Callable[[int], float]
"""λ, or a schedule of it: outer step → λ."""


class PenaltyOutcome(NamedTuple):
    """One outer step, taken at the x before it; tensors are scalars, or (M,) with many starts."""

    objective: Tensor
    """φ = f at the follower's policy, not at y's."""
    gradient_norm: Tensor
    """Of the penalised objective with respect to x, without the noise."""
    temperature: float | Tensor
    penalised: Tensor
    """f(x, π_y) + λ p(x, y), after the steps on y."""
    gap: Tensor
    """p(x, y), 0 or more."""


class _Policy(NamedTuple):
    """A policy's tables, (N, G, S, A), and its regularised values."""

    policy: Tensor
    log_policy: Tensor
    cost: Tensor
    """τ log(π/μ)."""
    value: Tensor
    """V^π, (N, G, S)."""
    q: Tensor
    """Q^π."""


class _Penalty(ModelDescent[PenaltyOutcome]):
    """min over x and y of f(x, π_y) + λ p(x, y), π_y the softmax of logits y.

    Per outer step: what the follower answers to x, π̂; `inner_steps` steps on y, down the gradient
    of f/λ + p; one step on x, down that of f + λp at this y. The Solution that f is given holds
    π_y and its own regularised values; on the follower's policy they are the follower's.
    """

    STATE = ("_logits",)
    OPTIONAL = (*ModelDescent.OPTIONAL, "_logits")

    def __init__(
        self,
        problem: BilevelProblem,
        x: variables.Variables,
        *,
        temperature: Temperature,
        optimiser: Maker,
        weight: Weight = 10.0,
        inner_steps: int = 1,
        inner_rate: float = 1.0,
        noise: float = 0.0,
        seed: int = 0,
        follower: Follower | None = None,
    ) -> None:
        self.weight = weight if callable(weight) else check_number("weight", weight, above=True)
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.inner_rate = check_number("inner_rate", inner_rate, above=True)
        super().__init__(
            problem,
            x,
            temperature=temperature,
            optimiser=optimiser,
            noise=noise,
            seed=seed,
            follower=follower,
        )
        self._logits: Tensor | None = None  # y, (N, G, S, A)
        self._told = (torch.zeros(()), torch.zeros(()))

    @abc.abstractmethod
    def _gap(self, own: _Policy, best: _Policy) -> Tensor:
        """p of each state, (N, G, S): of y's policy against the follower's."""

    def _estimate(self, tau: float | Tensor) -> tuple[Tensor, list[Tensor]]:
        weight = self.weight
        if callable(weight):
            weight = check_number(f"weight({self.steps})", weight(self.steps), above=True)
        mdp = self._model()
        with torch.no_grad():
            answer = self.follower.answer(mdp, tau, self._value).detach()
        self._value = answer.value
        flat = mdp.flatten(tau)
        log_policy = flat.layout.grouped(answer.log_policy.double(), 2)
        if flat.data.available is not None:
            log_policy = log_policy.where(flat.data.available, 0.0)
        best = _regularised(mdp, flat, log_policy)
        logits = log_policy if self._logits is None else self._logits
        if logits.shape != log_policy.shape:
            raise ShapeError(
                f"the logits that the last step left are of shape {tuple(logits.shape)}",
                allowed=f"{tuple(log_policy.shape)}, by the MDP of `lower`",
                fix=f"keep the shape of the MDP, or begin with a new {type(self).__name__}",
            )
        unit = self.inner_rate * mdp.states / flat.data.temperature[..., None, None]
        for _ in range(self.inner_steps):
            logits = logits.detach().requires_grad_()
            f, gap = self._parts(mdp, flat, logits, best)
            (slope,) = torch.autograd.grad((f / weight + gap).sum(), logits)
            logits = (logits - unit * slope).detach()
            if not bool(logits.isfinite().all()):
                raise NonFiniteResultError(
                    "a step on y has made its logits infinite",
                    where=f"outer step {self.steps}",
                    fix="lower inner_rate",
                )
        f, gap = self._parts(mdp, flat, logits, best)
        check_objective(f, self.steps)
        penalised = f + weight * gap
        gradient = hypergradient(penalised, self.x, self.steps)
        with torch.no_grad():
            phi = self.problem.judge(self.x, answer)
        self._logits, self._told = logits, (penalised.detach(), gap.detach())
        return phi, gradient

    def _parts(
        self, mdp: DenseMDP | SparseMDP, flat: Flat, logits: Tensor, best: _Policy
    ) -> tuple[Tensor, Tensor]:
        """f(x, π_y) and p(x, y), one per start."""
        own = _regularised(mdp, flat, logits)
        unknown = torch.full(flat.layout.batch_shape, math.inf, dtype=torch.float64)
        solution = approximate(
            flat,
            own.value,
            own.q - own.value.unsqueeze(-1),
            own.policy,
            own.log_policy,
            unknown.to(logits.device),
        )
        f = self.problem.judge(self.x, solution)
        gap = flat.layout.restore(self._gap(own, best).mean(-1))
        return f, gap.reshape(*f.shape, -1).mean(-1).to(f.dtype)

    def _outcome(self, phi: Tensor, norm: Tensor, tau: float | Tensor) -> PenaltyOutcome:
        return PenaltyOutcome(phi, norm, tau, *self._told)


class ValuePenalty(_Penalty):
    """The lower level's value gap as the penalty.

        p(x, y) = mean over s of V^{π*(x)}(s) − V^{π_y}(s),   ∇_x p = ∇_x V^{π̂} − ∇_x V^{π_y}

    V^π is the regularised value of π in the lower level at x, and its ∇_x is at a fixed policy.

    Args:
        problem, x, temperature, optimiser, noise, seed, follower: as those of `MSoBiRL`.
        weight: λ, units of φ over reward, or a schedule of it; the bias falls as 1/λ.
        inner_steps: steps on y for each on x.
        inner_rate: of the steps on y, in units of S/τ; try from 1 − γ on, as a state may be visited
            1/(1 − γ) times.

    Raises:
        OptionError: a number out of its range.

    Source: Shen, Yang and Chen (2024), value penalty.
    """

    def _gap(self, own: _Policy, best: _Policy) -> Tensor:
        return best.value - own.value


class BellmanPenalty(_Penalty):
    """The lower level's Bellman gap as the penalty.

        p(x, y) = mean over s of V*(s) − Σ_a π_y (Q* − τ log(π_y/μ)) = τ mean of KL(π_y ‖ π*),
        ∇_x p = mean over s of Σ_a (π* − π_y) ∇_x Q*

    Args:
        problem, x, temperature, optimiser, noise, seed, follower: as those of `MSoBiRL`.
        weight: λ, units of φ over reward, or a schedule of it; the bias falls as 1/λ.
        inner_steps: steps on y for each on x.
        inner_rate: of the steps on y, in units of S/τ.

    Raises:
        OptionError: a number out of its range.

    Source: Shen, Yang and Chen (2024), Bellman penalty.
    """

    def _gap(self, own: _Policy, best: _Policy) -> Tensor:
        chosen = (own.policy * (best.q - own.cost)).sum(-1)
        return (best.policy * (best.q - best.cost)).sum(-1) - chosen


def _regularised(mdp: DenseMDP | SparseMDP, flat: Flat, logits: Tensor) -> _Policy:
    """The softmax policy of logits, and its values in the model, differentiable in both."""
    data, layout = flat.data, flat.layout
    available = data.available
    if available is not None:
        logits = logits.masked_fill(~available, -torch.inf)
    log_policy = logits.log_softmax(-1)
    policy = log_policy.exp()
    finite = log_policy if available is None else log_policy.where(available, 0.0)
    relative = finite
    if available is not None:
        relative = finite - data.log_reference.where(available, 0.0)
    cost = data.temperature[..., None, None] * relative
    reward = data.reward.double()
    paid = layout.restore(reward - cost).to(mdp.dtype)
    value = evaluate(layout.restore(policy).to(mdp.dtype), mdp.replace(reward=paid, validate="off"))
    value = layout.grouped(value.double(), 1)
    rows = Rows(data.transition, *data.pattern, mdp.states, mdp.actions)
    ahead = rows.apply(value) * rows.scale()
    return _Policy(policy, finite, cost, value, reward + data.discount[..., None, None] * ahead)
