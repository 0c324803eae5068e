"""A follower whose reward is not known: it is fitted to what the follower did, then used as the
model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from birl_ext.bilevel.follower import Approach, Exact, Follower, _Problem
from birl_ext.bilevel.guards import check_count, check_kind
from birl_ext.bilevel.newton import DampedNewton
from birl_ext.bilevel.problem import BilevelProblem
from birl_ext.errors import NotConvergedError, ShapeError, UninformativeDataError
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.simulators.paths import Paths
from birl_ext.solution import Solution

__all__ = ["Fitted", "action_counts"]

_CONVERGED = 1e-9
"""Decrease of the mean log likelihood that the quadratic model may still promise."""

_STILL = 1e-3
"""What a further step may change of a reward, in units of τ."""


class Fitted(Follower):
    """A follower with the reward r_x(s,a) + Σ_k φ_k(s,a) w_k, of which the model knows r_x alone.

    Args:
        features: φ, (S, A, k).
        weights: w, (k,), units of τ.
        by: who solves the completed model.
        covariance: of w, (k, k), where it was estimated.

    Gradients: as those of `by`.
    """

    def __init__(
        self,
        features: Tensor,
        weights: Tensor,
        *,
        by: Follower | None = None,
        covariance: Tensor | None = None,
    ) -> None:
        features = checks.as_floating("features", features)
        weights = checks.as_floating("weights", weights)
        if features.dim() != 3 or weights.shape != features.shape[-1:]:
            raise ShapeError(
                f"features have shape {tuple(features.shape)}, weights {tuple(weights.shape)}",
                allowed="(S, A, k) and (k,)",
            )
        self.by: Follower = Exact() if by is None else by
        check_kind("by", self.by, Follower)
        self.features, self.weights = features.detach(), weights.detach()
        self.covariance = covariance

    @classmethod
    def of(
        cls,
        features: Tensor,
        model: DenseMDP | SparseMDP,
        behaviour: Tensor | Paths,
        *,
        temperature: float,
        by: Follower | None = None,
        steps: int = 100,
    ) -> Fitted:
        """Maximum likelihood: max over w of Σ n(s,a) log π*(a|s; w), by Newton's method from zero.

        Args:
            features: φ, (S, A, k).
            model: what is known of what it was seen in, `problem.lower(x)`; with batch axes *B, a
                model each.
            behaviour: n, (*B, S, A), how often it was seen to do what; or its paths, in one model.
            temperature: τ of the follower, which only fixes the units of w.
            by: who solves the completed model from now on; the fit itself is exact.
            steps: most steps of Newton's method.

        Raises:
            UndeterminedError: the data do not determine w; the error names the direction.
            UninformativeDataError: there are no data, something impossible was seen, or the
                likelihood rises as w goes to infinity.
            NotConvergedError: `steps` were not enough.

        Source: Rust (1987) for the likelihood; (M10), (M11) for its derivatives.
        """
        features = checks.as_floating("features", features)
        shape = (model.states, model.actions)
        if features.dim() != 3 or tuple(features.shape[:-1]) != shape:
            raise ShapeError(
                f"features have shape {tuple(features.shape)}", allowed=f"(S, A, k), {shape} first"
            )
        check_count("steps", steps)
        counts = behaviour
        if isinstance(counts, Paths):
            counts = action_counts(counts, *shape)
        counts = checks.as_floating("behaviour", torch.as_tensor(counts).to(model.dtype))
        if tuple(counts.shape) != (*model.batch_shape, *shape):
            raise ShapeError(
                f"behaviour has shape {tuple(counts.shape)}",
                allowed=f"(*B, S, A) = {(*model.batch_shape, *shape)}",
            )
        seen, total = counts > 0, counts.sum()
        if not (bool(counts.isfinite().all() & (counts >= 0).all()) and bool(total > 0)):
            raise UninformativeDataError(
                f"behaviour holds {float(total):g} actions", allowed="counts, one or more in all"
            )
        forbidden = model.forbidden()
        if forbidden is not None and bool((forbidden & seen).any()):
            place = (forbidden & seen).nonzero()[0].tolist()
            raise UninformativeDataError(
                "an action was seen that the model forbids",
                where=f"entry {place}",
                fix="open it in the model's mask",
            )

        def lower(w: Tensor) -> DenseMDP | SparseMDP:
            return _completed(model, features, w)

        def upper(_: Tensor, solution: Solution) -> Tensor:
            return -(counts * solution.log_policy.where(seen, 0.0)).sum() / total

        start = features.new_zeros(features.shape[-1])
        newton = DampedNewton(BilevelProblem(lower, upper), start, temperature=temperature)
        newton.run(steps, tol=1e-12, progress=False)
        covariance = newton.covariance(mean_of=max(1, int(total)))
        if not newton.decrement <= _CONVERGED:
            raise NotConvergedError(
                f"after {steps} steps the log likelihood can still rise by {newton.decrement:.2g}",
                allowed=f"at most {_CONVERGED:g}",
                fix="raise `steps`, or scale the features",
            )
        weights = newton.x
        newton.step()
        # what is left to gain falls to nothing on the way to infinity too, where steps do not
        moved = float((features @ (newton.x - weights)).abs().max())
        if moved > _STILL * float(torch.as_tensor(temperature).max()):
            raise UninformativeDataError(
                f"the likelihood has no maximum: weights of up to {float(weights.abs().max()):.3g} "
                "are on their way to infinity",
                fix="add behaviour in which actions vary that the features tell apart",
            )
        return cls(features, weights, by=by, covariance=covariance)

    def model(self, mdp: DenseMDP | SparseMDP) -> DenseMDP | SparseMDP:
        """What is known, with the fitted reward added."""
        return _completed(mdp, self.features, self.weights)

    def applied(self, problem: _Problem) -> tuple[_Problem, Follower]:
        known = problem.lower

        def lower(x: Any) -> DenseMDP | SparseMDP:
            return self.model(known(x))

        return self.by.applied(dataclasses.replace(problem, lower=lower))

    def approach(
        self, mdp: DenseMDP | SparseMDP, temperature: float | Tensor, carried: Tensor | None = None
    ) -> Approach:
        return self.by.approach(self.model(mdp), temperature, carried)

    def answer(
        self, mdp: DenseMDP | SparseMDP, temperature: float | Tensor, carried: Tensor | None = None
    ) -> Solution:
        return self.by.answer(self.model(mdp), temperature, carried)

    def __repr__(self) -> str:
        return f"Fitted(weights={self.weights.tolist()}, by={self.by!r})"


def action_counts(paths: Paths, states: int, actions: int) -> Tensor:
    """How often each action was taken in each state, (S, A) float64."""
    pairs = (paths.observation * actions + paths.action)[paths.present]
    counted = torch.bincount(pairs.flatten(), minlength=states * actions)
    if len(counted) > states * actions:
        raise ShapeError(
            f"paths reach pair {len(counted) - 1}", allowed=f"below S·A = {states * actions}"
        )
    return counted.double().reshape(states, actions)


def _completed(mdp: DenseMDP | SparseMDP, features: Tensor, w: Tensor) -> DenseMDP | SparseMDP:
    return mdp.replace(reward=mdp.reward + (features @ w).to(mdp.reward), validate="cheap")
