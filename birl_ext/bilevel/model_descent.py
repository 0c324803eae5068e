"""What methods that step along an estimate of ∇φ from a known model have in common."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Descent, Maker
from birl_ext.bilevel.follower import Exact, Follower, Sweeps
from birl_ext.bilevel.guards import check_kind, check_lower, check_number, check_seed
from birl_ext.bilevel.problem import BilevelProblem, Temperature, check_schedule, temperature_at
from birl_ext.errors import OptionError
from birl_ext.model.mdp import DenseMDP, SparseMDP

__all__ = ["ModelDescent", "RivalOutcome"]

_Outcome = TypeVar("_Outcome", bound=tuple[Any, ...])


class RivalOutcome(NamedTuple):
    """One outer step, taken at the x before it; tensors are scalars, or (M,) with many starts."""

    objective: Tensor
    """φ at the policy that the method has of the follower."""
    gradient_norm: Tensor
    """‖∇φ̂‖₂ of its estimate, without the noise."""
    temperature: float | Tensor


class ModelDescent(Descent[_Outcome]):
    """x ← x − β ∇φ̂(x), by an estimate of its own.

    Args:
        problem: the two levels.
        x: start, (d,), or (M, d) for many starts at once; or another of the forms of
            `BilevelProblem`; copied.
        temperature: τ, or a schedule of it (see `geometric`).
        optimiser: from a list of parameters to any torch optimiser.
        noise: standard deviation of Gaussian noise added to the estimate, units of φ over x.
        seed: of the noise.
        follower: who answers the lower level; None: `Exact()`.
    """

    STATE: ClassVar[tuple[str, ...]] = ("_value", "generator")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("_value",)

    FORM: ClassVar[type] = BilevelProblem
    """Of the problem."""
    OWN_SWEEPS: ClassVar[bool] = False
    """Whether the method sweeps by itself, and asks no follower."""

    def __init__(
        self,
        problem: Any,
        x: variables.Variables,
        *,
        temperature: Temperature,
        optimiser: Maker,
        noise: float = 0.0,
        seed: int = 0,
        follower: Follower | None = None,
    ) -> None:
        check_kind("problem", problem, self.FORM)
        self.temperature = check_schedule(temperature)
        self.noise = check_number("noise", noise)
        self.generator = torch.Generator().manual_seed(check_seed(seed))
        follower = Exact() if follower is None else follower
        check_kind("follower", follower, Follower)
        self.problem, self.follower = follower.applied(problem)
        if self.OWN_SWEEPS and isinstance(self.follower, Sweeps):
            raise OptionError(
                f"follower is {self.follower!r}",
                allowed=f"the sweeps of {type(self).__name__} itself",
                fix=f"give sweeps={self.follower.count} in its place",
            )
        self._begin(x, optimiser)
        self._value: Tensor | None = None  # V of the last step, (*B, S)

    def step(self) -> _Outcome:
        """One outer step on x.

        Raises:
            TemperatureError: the schedule's τ is not positive and finite.
            GradientError: a level does not depend on x, or φ or its gradient is not finite.
            NonFiniteResultError: the optimiser would make x infinite or NaN. After any error x and
                all of the state are what they were.
        """
        return self._take(self._evaluated)

    def estimate(self) -> tuple[Tensor, Tensor]:
        """φ and ∇φ̂ of the next step, which is not taken: in the shape of x if that is a tensor,
        else (d,).
        """
        with self.taken_back(always=True, without=Descent.STATE):
            phi, gradient = self._estimate(temperature_at(self.temperature, self.steps))
        vector = variables.joined(gradient)
        return phi.detach(), vector.reshape(self.x.shape) if isinstance(self.x, Tensor) else vector

    @abc.abstractmethod
    def _estimate(self, tau: float | Tensor) -> tuple[Tensor, list[Tensor]]:
        """φ, scalar or (M,), and ∇φ̂ by leaves of x."""

    @abc.abstractmethod
    def _outcome(self, phi: Tensor, norm: Tensor, tau: float | Tensor) -> _Outcome:
        """What a step tells."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        device = variables.leaves(self.x)[0].device
        for name in self.OPTIONAL:
            kept: Tensor | None = getattr(self, name)
            setattr(self, name, None if kept is None else kept.to(device))

    def _evaluated(self) -> tuple[_Outcome, list[Tensor]]:
        tau = temperature_at(self.temperature, self.steps)
        phi, gradient = self._estimate(tau)
        phi = phi.detach()
        norm = variables.joined(gradient, phi.shape).double().norm(dim=-1)
        if self.noise:
            gradient = [
                part + self.noise * variables.drawn(part, self.generator) for part in gradient
            ]
        return self._outcome(phi, norm, tau), gradient

    def _model(self) -> DenseMDP | SparseMDP:
        """The lower level at x, refused where it does not depend on x."""
        mdp: DenseMDP | SparseMDP = self.problem.model(self.x)
        check_lower(mdp, self.x)
        return mdp
