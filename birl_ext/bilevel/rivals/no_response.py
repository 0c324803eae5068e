"""The naive method: descend as if the follower stayed where it is."""

from __future__ import annotations

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.guards import check_objective
from birl_ext.bilevel.hypergradient import direct_gradient, known
from birl_ext.bilevel.model_descent import ModelDescent, RivalOutcome

__all__ = ["NoResponse"]


class NoResponse(ModelDescent[RivalOutcome]):
    """The gradient of f at the follower's policy, which is taken not to move.

        ∇φ̂ = ∇_x f(x, π)  at  π = π*(x) held fixed

    Where x reaches f through the follower alone that is zero, and no step moves x: it is what the
    method does, and no error. A stationary point of it is performatively stable, not optimal.

    Args: as those of `MSoBiRL` of the same names.

    Source: (M14) without its second term.
    """

    def _estimate(self, tau: float | Tensor) -> tuple[Tensor, list[Tensor]]:
        mdp = self._model()
        with torch.no_grad():
            solution = self.follower.answer(mdp, tau, self._value).detach()
        self._value = solution.value
        phi = self.problem.judge(self.x, solution)
        check_objective(phi, self.steps)
        own = variables.named(self.x)
        found = direct_gradient(phi, list(own.values()))
        direct = [
            torch.zeros_like(leaf) if part is None else part
            for leaf, part in zip(own.values(), found, strict=True)
        ]
        return phi, known(direct, own, self.steps)

    def _outcome(self, phi: Tensor, norm: Tensor, tau: float | Tensor) -> RivalOutcome:
        return RivalOutcome(phi, norm, tau)
