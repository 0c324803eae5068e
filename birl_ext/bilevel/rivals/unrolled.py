"""Unrolled differentiation: backpropagation through the sweeps that solve the lower level."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.follower import Follower, approximate, first_value
from birl_ext.bilevel.guards import check_count, check_kind, check_objective
from birl_ext.bilevel.hypergradient import hypergradient
from birl_ext.bilevel.model_descent import ModelDescent, RivalOutcome
from birl_ext.bilevel.problem import BilevelProblem, Temperature
from birl_ext.errors import OptionError
from birl_ext.ops.bellman import bellman

__all__ = ["Unrolled"]


class Unrolled(ModelDescent[RivalOutcome]):
    """The exact gradient of the objective at a follower of K sweeps, by reverse mode through them.

        ∇φ̂ = d/dx f(x, π_K(x)),   V_k = T_x V_{k−1},   π_K = softmax of Q_K = r_x + γP_x V_{K−1}

    V_0 is a constant. The graph holds π of every sweep: K times S·A numbers and a problem each.

    Args:
        problem, x, temperature, optimiser, noise, seed: as those of `MSoBiRL`.
        sweeps: K.
        carry: V_0 is what the outer step before has left; else, and in the first step, zero.
        depth: the last sweeps only, that the derivative goes through, 1 to K; None: all of them.
        follower: one of a model that had to be fitted; the sweeps are the method's own.

    Raises:
        OptionError: a number out of its range, or a follower of sweeps.

    Source: Franceschi et al. (2017) for reverse mode through an inner solver; Shaban et al. (2019)
    for its truncation.
    """

    OWN_SWEEPS = True

    def __init__(
        self,
        problem: BilevelProblem,
        x: variables.Variables,
        *,
        temperature: Temperature,
        optimiser: Maker,
        sweeps: int = 20,
        carry: bool = True,
        depth: int | None = None,
        noise: float = 0.0,
        seed: int = 0,
        follower: Follower | None = None,
    ) -> None:
        self.sweeps = check_count("sweeps", sweeps)
        check_kind("carry", carry, bool)
        self.carry = carry
        self.depth = self.sweeps if depth is None else check_count("depth", depth)
        if self.depth > self.sweeps:
            raise OptionError(f"depth is {depth}", allowed=f"1 to sweeps, {sweeps}")
        super().__init__(
            problem,
            x,
            temperature=temperature,
            optimiser=optimiser,
            noise=noise,
            seed=seed,
            follower=follower,
        )

    def _estimate(self, tau: float | Tensor) -> tuple[Tensor, list[Tensor]]:
        mdp = self._model()
        flat = mdp.flatten(tau)
        value = first_value(flat, self._value if self.carry else None)
        for left in range(self.sweeps, 0, -1):
            silent = torch.no_grad() if left > self.depth else contextlib.nullcontext()
            with silent:
                value, advantage, policy, log_policy = bellman(flat.data, value)
        error = torch.full(flat.layout.batch_shape, torch.inf, dtype=value.dtype)  # not asked for
        solution = approximate(
            flat, value, advantage, policy, log_policy, error.to(value.device), self.sweeps
        )
        phi = self.problem.judge(self.x, solution)
        check_objective(phi, self.steps)
        gradient = hypergradient(phi, self.x, self.steps)
        self._value = solution.value.detach()
        return phi, gradient

    def _outcome(self, phi: Tensor, norm: Tensor, tau: float | Tensor) -> RivalOutcome:
        return RivalOutcome(phi, norm, tau)
