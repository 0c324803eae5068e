"""What a temperature that follows an entropy target adds to a hyper-gradient from samples (M21)."""

from __future__ import annotations

import torch
from torch import Tensor

from birl_ext.bilevel.score import Follower, Score
from birl_ext.bilevel.trajectory import filled
from birl_ext.errors import ShapeError
from birl_ext.preferences.loss import RewardFunction

__all__ = ["action_slopes", "path_slopes", "temperature_surrogate"]

_LEAST_RISE = 1e-9
"""Nats per unit of log τ: below, it is rounding."""
_LEAST_ERRORS = 2.0
"""Of a slope, in units of its standard error: below, its inverse is noise."""


def path_slopes(
    score: Score, follower: Follower, observation: Tensor, action: Tensor, present: Tensor
) -> Tensor:
    """τ ∂/∂τ Σ_h log π(a_h|s_h) of fragments, (n,).

        Σ_h [ ∂_τ(Q − V)(s_h, a_h) − log π(a_h|s_h) − H(s_h) ],   ∂_τQ(s, a) = γE[Σ_k γᵏ H(s_k)]

    The entropy that is still to come is the score's of a reward H(s): whatever the score leaves out
    of what follows a step, it leaves out here.

    Args:
        score: as of the fragments' rewards; not a critic, which knows its own features only.
        follower: π, of discrete actions.
        observation, action, present: fragments, (n, H, …).

    Source: (M21).
    """
    with torch.no_grad():
        share = follower.probabilities(observation[present])
        chosen = action[present].unsqueeze(-1)
        own = _logs(share)
        entropy = -(share * own).sum(-1)
        now = -own.gather(-1, chosen).squeeze(-1) - entropy
        later = score(_entropy_of(follower), follower, observation, action, present)
    return filled(present, now).sum(-1) + later


def action_slopes(score: Score, follower: Follower, observation: Tensor) -> Tensor:
    """`path_slopes` of each action, (m, *O) → (m, A), for weights that sum to zero over them."""
    with torch.no_grad():
        share = follower.probabilities(observation)
        own = _logs(share)
        later = score.of_actions(_entropy_of(follower), follower, observation, share.shape[-1])
        return later.to(own) - own


def temperature_surrogate(
    score: Score,
    reward: RewardFunction,
    follower: Follower,
    observation: Tensor,
    *,
    temperature: float,
) -> Tensor | None:
    """A number for each state, (m,), whose values are zero, and whose mean has an estimate of dτ/dx
    as its gradient; None where the slope of the entropy is lost in its noise.

        dτ/dx = −(Σ_s d ∂H/∂x)/(Σ_s d ∂H/∂τ),   ∂H/∂z(s) = −Σ_a π(a|s) log π(a|s) ∂_z log π(a|s)

    Args:
        score, reward, follower: as of a step of SoBiRL; discrete actions.
        observation: states that are drawn from d, (m, *O): those over which the agent holds its
            entropy, such as a batch of its replay. A few hundred: the quotient is biased by O(1/m).
        temperature: τ, units of reward.

    Gradients: first order, through `reward`.

    Source: (M21).
    """
    if observation.dim() < 1 or not len(observation):
        raise ShapeError(
            f"the states of the entropy have shape {tuple(observation.shape)}", allowed="(m, *O)"
        )
    with torch.no_grad():
        share = follower.probabilities(observation)
        own = _logs(share)
        surplus = share * (own - (share * own).sum(-1, keepdim=True))  # of every action
    rises = -(surplus * action_slopes(score, follower, observation)).sum(-1)
    rise = rises.mean()  # τ Σ d ∂H/∂τ
    noise = rises.std(correction=0) / len(rises) ** 0.5
    if not bool(rise > torch.clamp(_LEAST_ERRORS * noise, min=_LEAST_RISE)):
        return None
    moved = score.of_actions(reward, follower, observation, share.shape[-1])
    return (surplus * (moved - moved.detach())).sum(-1) / rise


def _logs(share: Tensor) -> Tensor:
    """log π, finite where π has underflowed."""
    return share.clamp(min=torch.finfo(share.dtype).tiny).log()


def _entropy_of(follower: Follower) -> RewardFunction:
    """H(s), as a reward."""

    def entropy(observation: Tensor, action: Tensor) -> Tensor:
        share = follower.probabilities(observation)
        return -(share * _logs(share)).sum(-1)

    return entropy
