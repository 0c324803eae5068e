"""Meta-Reward-Net: a reward updated through the critic that it teaches (Liu et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from birl_ext.agents.learner import Learner
from birl_ext.bilevel.guards import check_kind, check_number
from birl_ext.bilevel.score_average import ScoreAverage
from birl_ext.bilevel.sobirl import DRLHFUpdate
from birl_ext.environments.transitions import Transitions
from birl_ext.preferences.fragments import Pairs
from birl_ext.preferences.loss import bradley_terry
from birl_ext.preferences.reward_model import RewardModel

__all__ = ["MRNUpdate", "MetaOutcome"]


class MetaOutcome(NamedTuple):
    """One update through the critic.

    Args:
        loss: φ_m.
        gradient_norm: ‖∇φ_m‖₂.
    """

    loss: float
    gradient_norm: float


class MRNUpdate(DRLHFUpdate):
    """The cross entropy of the rewards, and then of the critic one step after it learned from them.

        θ̂(x) = θ − α ∇_θ mean (Q_θ(s, a) − r_x(s, a) − γ V̄(s'))²,
        φ_m(x) = Σ_c E[ l ] with p = σ(Q_θ̂(s₀¹, a₀¹) − Q_θ̂(s₀², a₀²)), of first steps,
        ∇φ_m = (2α/n) Σ_i ∇r_x(s_i, a_i) ∇_θ Q_θ(s_i, a_i) · ∇_θ̂ φ_m

    One step of the critic stands for the follower: nothing is known of what comes after it.

    Args:
        reward, optimiser, noise, lead: as for `SoBiRLUpdate`.
        rate: α, of the critics. The step is a plain one, whatever optimiser the agent has.

    Source: Liu, Bai, Du and Yang (2022); as their code has it, the critic is compared at the first
    step of each fragment, and the fit to the answers goes on beside.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        optimiser: Callable[[Iterable[nn.Parameter]], Optimizer],
        rate: float,
        noise: float = 0.0,
        lead: int = 0,
    ) -> None:
        super().__init__(reward, optimiser=optimiser, noise=noise, lead=lead)
        self.rate = check_number("rate", rate, above=True)

    def through_critic(
        self,
        pairs: Pairs,
        follower: Learner,
        batch: Transitions,
        paid: Tensor,
        *,
        scale: float = 1.0,
    ) -> MetaOutcome:
        """One update of the reward by ∇φ_m.

        Args:
            pairs: n of them, answered.
            follower: the agent, which stays as it is.
            batch: transitions of its replay.
            paid: r as the agent is given it, (n,).
            scale: that the agent's reward is r divided by.

        Raises:
            GradientError, NonFiniteResultError: as for `SoBiRLUpdate.step`.
        """
        check_kind("pairs", pairs, Pairs)
        check_number("scale", scale, above=True)
        return self._take(lambda: self._meta(pairs, follower, batch, paid, scale))

    def _meta(
        self, pairs: Pairs, follower: Learner, batch: Transitions, paid: Tensor, scale: float
    ) -> tuple[float, MetaOutcome, ScoreAverage]:
        names, now = zip(*follower.critics.named_parameters(), strict=True)
        _, goal = follower.goal(batch, paid)
        values = follower.chosen(follower.critics, batch.observation, batch.action)
        weight = (2 / batch.size * (values.detach() - goal)).requires_grad_()
        slope = torch.autograd.grad((weight * values).sum(), now, create_graph=True)
        ahead = [
            (one - self.rate * by).detach().requires_grad_()
            for one, by in zip(now, slope, strict=True)
        ]

        def critics(*inputs: Tensor) -> Tensor:
            named = dict(zip(names, ahead, strict=True))
            found: Tensor = functional_call(follower.critics, named, inputs)
            return found

        pairs = pairs.after(self.lead)
        first, second = (
            follower.chosen(critics, part.observation[:, 0], part.action[:, 0])
            for part in (pairs.first, pairs.second)
        )
        loss = bradley_terry(first - second, pairs.label, self.noise).mean(-1).sum()
        toward = torch.autograd.grad(loss, ahead)
        along = torch.stack([(by * to).sum() for by, to in zip(slope, toward, strict=True)]).sum()
        (each,) = torch.autograd.grad(along, weight)  # ∇_θ Q_c(s_i, a_i) · ∇φ_m, (c, n)
        reward = self.reward(batch.observation, batch.action)
        surrogate = 2 * self.rate / (scale * batch.size) * (each.sum(0).to(reward) * reward).sum()
        gradient = self._gradient("the critic's step", surrogate)
        value = float(loss.detach())
        return value, MetaOutcome(value, self._set(gradient, value, "loss")), self._average
