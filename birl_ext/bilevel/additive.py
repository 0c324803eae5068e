"""A reward whose policy is judged by another reward: an upper level that is a sum over steps, from
samples or through the planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.bilevel.entropy_target import action_slopes
from birl_ext.bilevel.reward_update import RewardUpdate
from birl_ext.bilevel.score import Score
from birl_ext.bilevel.score_average import ScoreAverage
from birl_ext.errors import NonFiniteInputError, ShapeError
from birl_ext.functional import evaluate, solve
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP
from birl_ext.preferences.reward_model import RewardModel

__all__ = ["AdditiveOutcome", "AdditiveUpdate", "PlannedUpdate"]


class AdditiveOutcome(NamedTuple):
    """One update of the reward.

    Args:
        gradient_norm: ‖∇φ̂‖₂, as it was used.
        kept: what the noise leaves of it, [0, 1], see `ScoreAverage`.
    """

    gradient_norm: float
    kept: float


class AdditiveUpdate(RewardUpdate):
    """The upper level: the reward whose optimal policy earns most by a reward of the upper level's.

        φ(x) = −E[ Σ_t γ_uᵗ f(s_t, a_t) ],  the path of π*(x);   x ← x − β ∇φ̂,
        ∇φ̂ = −(1/τ) mean over s of Σ_a π(a|s) A_f(s, a) ∇Q(s, a)

    Args:
        reward: its parameters are x; f is another.
        optimiser: from parameters to any torch optimiser.
        score: estimator of ∇Q (`birl_ext.bilevel.score`).
        average: β, [0, 1), of the average over updates that the gradient is, shrunk by its own
            noise (`birl_ext.bilevel.score_average`), that of states drawn independently: what they
            share because they are of the same few paths is not counted.

    Source: (M15), (M16) for a sum over steps; Thoma et al. (2024), whose advantage this is.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        optimiser: Callable[[Iterable[nn.Parameter]], Optimizer],
        score: Score,
        average: float = 0.98,
    ) -> None:
        super().__init__(reward, optimiser=optimiser, score=score, average=average)

    def step(
        self,
        observation: Tensor,
        advantage: Tensor,
        follower: Any,
        *,
        temperature: float,
        held: Tensor | None = None,
    ) -> AdditiveOutcome:
        """One update.

        Args:
            observation: states (m, *O) of the present policy's paths, each drawn in proportion to
                γ_uᵗ: ∇φ̂ is ∇φ divided by the mean of Σ γ_uᵗ over a path, and its direction that of
                ∇φ. Paths of earlier policies bias it.
            advantage: π(a|s) A_f(s, a), (m, A), as `ActionValue.advantage` has it.
            follower: the present policy, of discrete actions, held fixed.
            temperature: its τ, units of the reward held here.
            held: as for `SoBiRLUpdate.step`.

        Raises:
            ShapeError: the advantage has not a number for each state and action.
            NonFiniteInputError: it is NaN or infinite.
            OptionError: no entropy can be held.
            TemperatureError: τ is not positive and finite.
            GradientError: the score does not depend on a parameter that is not frozen.
            NonFiniteResultError: gradient or new parameters are NaN or infinite. After any error
                the parameters are what they were.
        """
        checks.check_temperature(temperature)
        if advantage.dim() != 2 or len(advantage) != len(observation) or not len(advantage):
            raise ShapeError(
                f"advantage has shape {tuple(advantage.shape)}",
                allowed=f"(m, A), with m = {len(observation)} states, 1 or more",
            )
        if not bool(advantage.isfinite().all()):
            raise NonFiniteInputError(
                "the advantage is not finite", fix="lower the learning rate of the upper critic"
            )
        return self._take(
            lambda: self._prepare(observation, -advantage.detach(), follower, temperature, held)
        )

    def _prepare(
        self,
        observation: Tensor,
        weight: Tensor,
        follower: Any,
        temperature: float,
        held: Tensor | None,
    ) -> tuple[float, AdditiveOutcome, ScoreAverage]:
        assert self.score is not None
        found = self.score.of_actions(self.reward, follower, observation, weight.shape[-1])

        def weighed(score: Tensor) -> Tensor:
            return (weight.to(score) * score).sum(-1).mean() / temperature

        moved = self._moved_temperature(follower, temperature, held)
        of_tau = (
            None if moved is None else (action_slopes(self.score, follower, observation), moved)
        )
        average = self._averaged(weighed, found, of_tau)
        gradient = self._parts(average.kept * average.mean)
        size = self._set(gradient, float(weighed(found.detach())), "surrogate")
        return 0.0, AdditiveOutcome(size, average.kept), average


class PlannedUpdate(RewardUpdate):
    """The same where the process is known: the exact gradient, through `birl_ext.solve`.

        φ(x) = −(1 − γ) E[ Σ_t γᵗ f(s_t, a_t) ],  the path of π*(x);   x ← x − β ∇φ

    Args:
        reward: r_x of discrete actions and states that are indices.
        process: P, the first states and γ; its own reward is not used.
        optimiser: from parameters to any torch optimiser.

    Source: (M14).
    """

    def __init__(
        self,
        reward: RewardModel,
        process: DenseMDP,
        *,
        optimiser: Callable[[Iterable[nn.Parameter]], Optimizer],
    ) -> None:
        super().__init__(reward, optimiser=optimiser, score=None, average=0.0)
        self.process = process

    def step(self, worth: Tensor, *, temperature: float) -> AdditiveOutcome:
        """One update.

        Args:
            worth: f, (S, A).
            temperature: τ of the planner, units of the reward held here. From a τ that is large at
                first and falls, the reward finds what single starts at a small one do not
                (maths section 7, "Small temperatures").

        Raises:
            ShapeError: f is not (S, A).
            TemperatureError: τ is not positive and finite.
            NotConvergedError: the planner has not converged.
            GradientError, NonFiniteResultError: as for `AdditiveUpdate.step`.
        """
        checks.check_temperature(temperature)
        shape = tuple(self.process.reward.shape)
        if worth.shape != shape:
            raise ShapeError(f"worth has shape {tuple(worth.shape)}", allowed=f"(S, A) = {shape}")
        return self._take(lambda: self._planned(worth.detach(), temperature))

    def _planned(
        self, worth: Tensor, temperature: float
    ) -> tuple[float, AdditiveOutcome, ScoreAverage]:
        process = self.process
        every = torch.arange(process.reward.shape[-2], device=worth.device)
        paid = self.reward.all_actions(every).to(process.reward)
        policy = solve(process.replace(reward=paid), temperature=temperature).policy
        earned = evaluate(policy, process.replace(reward=worth.to(process.reward)))
        first = process.initial_distribution
        mean = earned.mean() if first is None else first @ earned
        phi = -(1 - process.discount) * mean
        size = self._set(self._gradient("φ", phi), float(phi.detach()), "φ")
        return float(phi.detach()), AdditiveOutcome(size, 1.0), self._average
