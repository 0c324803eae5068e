"""What updates of a learned reward have in common, whatever the upper level asks of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.bilevel.entropy_target import temperature_surrogate
from birl_ext.bilevel.guards import check_count, check_kind, make_optimiser, take_step
from birl_ext.bilevel.score import Critic, Score
from birl_ext.bilevel.score_average import ScoreAverage, signed
from birl_ext.bilevel.variables import described
from birl_ext.errors import GradientError, NonFiniteResultError, OptionError, warn
from birl_ext.preferences.reward_model import RewardModel, members_of
from birl_ext.state import Stateful

__all__ = ["RewardUpdate", "norm"]

Outcome = TypeVar("Outcome")


def norm(gradient: Iterable[Tensor | None]) -> float:
    """‖·‖₂ of all parts together."""
    squares = [part.double().square().sum() for part in gradient if part is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


class RewardUpdate(Stateful):
    """x ← x − β ∇φ̂, of the parameters x of a reward.

    Args:
        reward: its parameters are x, those frozen in a step apart. It stays in evaluation mode, so
            that the same state and action have one reward wherever they occur.
        optimiser: from parameters to any torch optimiser.
        score: estimator of the policy's derivative (`birl_ext.bilevel.score`).
        average: β, [0, 1), see `birl_ext.bilevel.score_average`.
    """

    STATE = ("reward", "optimiser", "steps", "_average")

    def __init__(
        self,
        reward: RewardModel,
        *,
        optimiser: Callable[[Iterable[nn.Parameter]], Optimizer],
        score: Score | None,
        average: float,
    ) -> None:
        check_kind("reward", reward, RewardModel)
        members_of(reward)  # refuses an ensemble inside another model
        self.reward = reward
        self.parameters = list(reward.parameters())
        self.optimiser = make_optimiser(optimiser, self.parameters)
        self.score = score
        self.steps = 0
        size = sum(parameter.numel() for parameter in self.parameters)
        self._average = ScoreAverage(size, average, self.parameters[0].detach())

    def _take(self, prepare: Callable[[], tuple[float, Outcome, ScoreAverage]]) -> Outcome:
        """One step; after any error the parameters are what they were.

        Args:
            prepare: sets the gradients; the value, what the step returns, and the average after it.
        """
        found: list[tuple[float, Outcome, ScoreAverage]] = []

        def closure() -> float:
            found.append(prepare())
            return found[-1][0]

        take_step(self.optimiser, self.reward, closure, self.steps)
        self.steps += 1
        _, outcome, self._average = found[0]
        return outcome

    def _set(self, gradient: Sequence[Tensor | None], value: float, name: str) -> float:
        """Hand a gradient to the optimiser; its norm."""
        size = norm(gradient)
        if not (math.isfinite(size) and math.isfinite(value)):
            raise NonFiniteResultError(
                f"the {name} is {value}, the norm of its gradient {size}",
                where=f"step {self.steps}",
                fix="lower the learning rate, or look for NaN in what is learned from",
            )
        for parameter, one in zip(self.parameters, gradient, strict=True):
            parameter.grad = one
        return size

    def _moved_temperature(
        self, follower: Any, temperature: float, held: Tensor | None, *, discrete: bool = True
    ) -> Tensor | None:
        """Numbers whose mean has the gradient dτ/dx; None where τ is fixed, and, with a warning,
        where that is lost in noise.
        """
        if held is None:
            return None
        if self.score is None or isinstance(self.score, Critic) or not discrete:
            raise OptionError(
                "the temperature's own derivative was asked for by `held`",
                allowed="discrete actions, and a score that is OneStep or FullHorizon",
                fix="leave `held` out: the temperature then counts as fixed",
            )
        moved = temperature_surrogate(
            self.score, self.reward, follower, held, temperature=temperature
        )
        if moved is None:
            warn(
                "the slope of the entropy in log τ is lost in its noise, so that the temperature "
                "counts as fixed in this update; give more states as `held`"
            )
        return moved

    def _averaged(
        self,
        surrogate: Callable[[Tensor], Tensor],
        score: Tensor,
        of_tau: tuple[Tensor, Tensor] | None,
        *,
        shared: float = 0.0,
        renewed: bool = False,
    ) -> ScoreAverage:
        """The average with one more gradient, ∂φ/∂x + (∂φ/∂τ)(dτ/dx).

        Args:
            surrogate: linear in a score, whose gradient is then the first part.
            score: its terms are independent; with them `signed` the gradient's square is the
                variance.
            of_tau: τ ∂/∂τ of what the score is the derivative of, and numbers whose mean has the
                gradient dτ/dx; None where τ is fixed.
            shared, renewed: see `ScoreAverage.after`.
        """
        whole, apart = surrogate(score), surrogate(signed(score))
        if of_tau is not None:
            slopes, moved = of_tau
            along = torch.zeros((), dtype=score.dtype, device=score.device, requires_grad=True)
            by_tau, noise = (  # ∂φ/∂τ, and how far it is off
                torch.autograd.grad(surrogate(along * each.to(score)), along)[0]
                for each in (slopes, signed(slopes))
            )
            whole = whole + by_tau * moved.mean()
            apart = apart + noise * moved.mean() + by_tau * signed(moved).mean()
        known = self._average.decay > 0  # or else nobody asks for the variance
        part = self._flat(self._gradient("the score", whole, retain_graph=known))
        variance = norm(self._gradient("the score", apart)) ** 2 if known else 0.0
        return self._average.after(part, variance, shared=shared, renewed=renewed)

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Of all parameters one below the other; zero where there is none."""
        pairs = zip(self.parameters, parts, strict=True)
        return torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs]
        )

    def _parts(self, flat: Tensor) -> list[Tensor | None]:
        """Of each parameter; None where it is frozen."""
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return [
            part.view_as(parameter) if parameter.requires_grad else None
            for parameter, part in zip(self.parameters, parts, strict=True)
        ]

    def _gradient(
        self, name: str, value: Tensor, *, retain_graph: bool = False
    ) -> Sequence[Tensor | None]:
        """Of each parameter; None where it is frozen or not in use."""
        live = [p for p in self.parameters if p.requires_grad]
        found: Sequence[Tensor | None] = ()
        if live and value.requires_grad:
            found = torch.autograd.grad(value, live, retain_graph=retain_graph, allow_unused=True)
        if all(part is None for part in found):
            raise GradientError(
                f"{name} does not depend on any of the reward's parameters",
                allowed="a part made by torch from parameters that require a gradient",
                fix="release a layer by requires_grad_(), or compute reward and score without "
                "detach and no_grad",
            )
        parts = iter(found)
        return [next(parts) if p.requires_grad else None for p in self.parameters]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which stays as it is.

        Raises:
            OptionError, ShapeError, DtypeError: it is that of another object; nothing has changed.
        """
        with self.loaded_whole():
            super().load_state_dict(state)

    def _check_state(self, state: Any, name: str = "") -> None:
        super()._check_state(state, name)
        if state["steps"] is not None:  # else `loaded_whole` says so
            check_count("steps", state["steps"], 0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(x={described(self.reward)}, steps={self.steps})"
