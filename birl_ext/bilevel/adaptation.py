"""The hyper-gradient from samples where the upper-level variable moves the transitions (M17).

What the variable does to the environment enters twice: a path itself has another probability
(`path_log_probability`), and the follower, who foresees where its actions lead, another policy
(`AdaptedReward`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from birl_ext.agents.agent import check_discount
from birl_ext.bilevel.guards import check_count
from birl_ext.bilevel.score import Follower, Simulator
from birl_ext.bilevel.trajectory import filled
from birl_ext.preferences.loss import RewardFunction

__all__ = [
    "AdaptedReward",
    "TransitionFunction",
    "path_log_probability",
    "transition_log_probabilities",
]


class TransitionFunction(Protocol):
    """The environment's law, or density, as far as the upper level moves it."""

    def __call__(self, observation: Tensor, action: Tensor, successor: Tensor, /) -> Tensor:
        """log P_x(s'|s, a), (m,), differentiable in x; a constant may be left out."""
        ...


class AdaptedReward:
    """A reward whose gradient also says what x does through the transitions.

        r̂(s, a) = r_x(s, a) + γ (1/n) Σ_i log P_x(s'_i|s, a) [ V(s'_i) − V(s) ],
        s'_i ~ P_x(·|s, a)

    Give it to `OneStep` or `FullHorizon` in place of r: E[∇r̂] = ∇r + γ Σ_t ∇P(t|s, a) V(t), which
    takes the place of ∇r also in the bounds on their bias. V(s) is a baseline. As with every
    surrogate, only the gradient means anything.

    Whether the process ends with a step must not depend on x, unless the state it ends in is seen:
    a successor that is not `present` adds nothing.

    Args:
        reward: r_x, (m, *O) and (m, *A) → (m,).
        transition: log P_x.
        simulator: draws s' at the present x; independently of the paths that are scored.
        follower: π*, held fixed; its actions after s' are not used.
        value: V, (m, *O) → (m,), the lower level's soft value at the present x, with the entropy
            that is still to come; units of reward. No gradient.
        discount: γ of the lower level.
        samples: n, successors per step.

    Source: (M17).
    """

    def __init__(
        self,
        reward: RewardFunction,
        transition: TransitionFunction,
        simulator: Simulator,
        follower: Follower,
        *,
        value: Callable[[Tensor], Tensor],
        discount: float,
        samples: int = 1,
    ) -> None:
        self.reward = reward
        self.transition = transition
        self.simulator = simulator
        self.follower = follower
        self.value = value
        self.discount = check_discount(discount)
        self.samples = check_count("samples", samples)

    def __call__(self, observation: Tensor, action: Tensor) -> Tensor:
        paid = self.reward(observation, action)
        here, chosen = (part.repeat_interleave(self.samples, 0) for part in (observation, action))
        with torch.no_grad():
            path = self.simulator.continuations(self.follower, here, chosen, 2)
        seen = path.present[:, 1]
        here, chosen, there = here[seen], chosen[seen], path.observation[seen, 1]
        with torch.no_grad():
            gain = self.value(there) - self.value(here)
        moved = gain * self.transition(here, chosen, there)
        return paid + self.discount * filled(seen, moved).view(-1, self.samples).mean(-1)


def path_log_probability(
    transition: TransitionFunction, observation: Tensor, action: Tensor, present: Tensor
) -> Tensor:
    """Σ_h log P_x(s_{h+1}|s_h, a_h) of paths, (n,), over the steps that a step follows.

    Args:
        transition: log P_x.
        observation, action: (n, H, …).
        present: (n, H) bool, steps that belong to the path.

    Gradients: x, as far as `transition` has them.

    Source: (M17), the probability of a path.
    """
    return transition_log_probabilities(transition, observation, action, present).sum(-1)


def transition_log_probabilities(
    transition: TransitionFunction, observation: Tensor, action: Tensor, present: Tensor
) -> Tensor:
    """The terms of `path_log_probability`, (n, H): zero where no step follows."""
    onward = torch.zeros_like(present)
    onward[:, :-1] = present[:, :-1] & present[:, 1:]
    found = transition(observation[onward], action[onward], observation.roll(-1, 1)[onward])
    return filled(onward, found)
