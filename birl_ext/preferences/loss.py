"""The Bradley–Terry model: how likely a reward makes a teacher's answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from birl_ext.errors import OptionError, ShapeError
from birl_ext.model import checks
from birl_ext.preferences.fragments import Fragments, Pairs

__all__ = [
    "Steps",
    "accuracy",
    "bradley_terry",
    "fragment_returns",
    "in_parts",
    "margins",
    "steps_at_once",
]

RewardFunction = Callable[[Tensor, Tensor], Tensor]
"""(observation (m, *O), action (m, *A)) → r (*E, m)."""


def bradley_terry(margin: Tensor, label: Tensor, noise: float = 0.0) -> Tensor:
    """Cross entropy of each answer, batched.

        p = (1 − ε) σ(R₁ − R₂) + ε/2,   ℓ = −y log p − (1 − y) log(1 − p)

    Args:
        margin: R₁ − R₂, (*E, n).
        label: y, (n,), the probability that the first is preferred.
        noise: ε, the share of answers given by a toss of a coin, in [0, 1).

    Returns:
        ℓ, (*E, n), nats; finite at any finite margin.

    Raises:
        OptionError: the noise is outside [0, 1).
        ShapeError: labels and margins do not match.

    Gradients: any order, through `margin`.

    Source: Bradley and Terry (1952); Christiano et al. (2017), section 2.2.3, for the noise.
    """
    checks.check_number("noise", noise, below=1.0)
    if label.dim() != 1 or margin.shape[-1:] != label.shape:
        raise ShapeError(
            f"margin has shape {tuple(margin.shape)}, label {tuple(label.shape)}",
            allowed="(*E, n) and (n,)",
        )
    label = label.to(margin.dtype)
    first, second = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    if noise:
        # log p must not be taken of a p that has been rounded to zero or one
        rest, coin = math.log1p(-noise), margin.new_tensor(math.log(noise / 2))
        first, second = torch.logaddexp(first + rest, coin), torch.logaddexp(second + rest, coin)
    return -(label * first + (1 - label) * second)


def margins(reward: RewardFunction, pairs: Pairs, *, at_once: int | None = None) -> Tensor:
    """R₁ − R₂ of every pair, from one call of the reward for all steps of all pairs.

    Args:
        reward: (observation (m, *O), action (m, *A)) → (*E, m), as a `RewardNetwork`, or the
            `RewardEnsemble.each` of several.
        at_once: most steps per call; None puts all into one, as a GPU likes it. On a CPU a few
            hundred frames of pixels are faster: arrays of hundreds of megabytes are fetched from
            the system anew in every step. In `fitting`, batch statistics are those of a call.

    Returns:
        (*E, n), units of reward.

    Gradients: any order, through the reward.
    """
    ours, theirs = fragment_returns(reward, pairs.first, pairs.second, at_once=at_once)
    return ours - theirs


def fragment_returns(
    reward: RewardFunction, *fragments: Fragments, at_once: int | None = None
) -> tuple[Tensor, ...]:
    """R = Σ_h r(s_h, a_h) over the present steps, from one call of the reward; or several, see
    `margins`.

    Padding is left out before the call, so that it cannot move the statistics of a batch.

    Returns:
        (*E, n) for each of the arguments.
    """
    steps = Steps.of(*fragments)
    found = in_parts(reward, steps.observation, steps.action, at_once=at_once)
    if found.shape[-1:] != steps.observation.shape[:1]:
        raise ShapeError(
            f"the reward returned shape {tuple(found.shape)}",
            allowed=f"(*E, {steps.observation.shape[0]}): one number per step",
        )
    return steps.sums(found)


class Steps(NamedTuple):
    """The m present steps of one or several `Fragments`, in one row.

    Args:
        observation: (m, *O).
        action: (m, *A).
        present: (Σ n·H,) bool, where they stood.
        shapes: (n, H) of each of the arguments.
    """

    observation: Tensor
    action: Tensor
    present: Tensor
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, *fragments: Fragments) -> Steps:
        """The steps of all of them."""
        present = torch.cat([part.present.flatten() for part in fragments])
        observation = torch.cat([part.observation.flatten(0, 1) for part in fragments])
        action = torch.cat([part.action.flatten(0, 1) for part in fragments])
        if not bool(present.all()):
            observation, action = observation[present], action[present]
        return cls(observation, action, present, tuple(part.present.shape for part in fragments))

    def tables(self, number: Tensor) -> tuple[Tensor, ...]:
        """A number per step, (*E, m), as (*E, n, H) of each of the arguments; zero in padding."""
        lead = number.shape[:-1]
        if number.shape[-1] < len(self.present):
            table = number.new_zeros(*lead, len(self.present))
            number = table.masked_scatter(self.present.expand(*lead, -1), number)
        parts = torch.split(number, [math.prod(shape) for shape in self.shapes], -1)
        return tuple(
            part.reshape(*lead, *shape) for part, shape in zip(parts, self.shapes, strict=True)
        )

    def sums(self, number: Tensor) -> tuple[Tensor, ...]:
        """The sum over each fragment of a number per step, (*E, m) → (*E, n) of each."""
        return tuple(table.sum(-1) for table in self.tables(number))


_STEPS, _NUMBERS = 1024, 2**22


def steps_at_once(observation: Tensor) -> int | None:
    """Steps per call of a network in evaluation mode, where it changes nothing but time, for
    `at_once`: what is larger leaves a CPU's cache, and comes from the system anew, page by page.

    Args:
        observation: (m, *O).
    """
    if observation.device.type != "cpu":
        return None
    return max(1, min(_STEPS, _NUMBERS // max(1, math.prod(observation.shape[1:]))))


def in_parts(
    function: Callable[..., Tensor], *inputs: Tensor, at_once: int | None, dim: int = -1
) -> Tensor:
    """function(*inputs), from calls with at most `at_once` rows of the inputs each.

    Args:
        dim: axis of the result along which rows lie.

    Raises:
        OptionError: `at_once` is below one.
    """
    if at_once is None or len(inputs[0]) <= at_once:
        return function(*inputs)
    if at_once < 1:
        raise OptionError(f"at_once is {at_once!r}", allowed="1 or more, or None")
    parts = zip(*(torch.split(given, at_once) for given in inputs), strict=True)
    return torch.cat([function(*part) for part in parts], dim)


def accuracy(margin: Tensor, label: Tensor) -> Tensor:
    """Share of the strict answers that the larger return explains, (*E); NaN if there are none."""
    strict = label != 0.5
    right = (margin != 0) & ((margin > 0) == (label > 0.5))
    return (right & strict).sum(-1).double() / strict.sum()
