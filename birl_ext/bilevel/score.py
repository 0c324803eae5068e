"""Estimators of the policy's score in (M16): Σ_h (∇Q − ∇V)(s_h, a_h) from samples.

Each is a surrogate: one number per fragment, whose gradient with respect to the reward's parameters
is the estimate, so that no gradient vector is ever stored per step. Its value means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from birl_ext.agents.agent import check_discount
from birl_ext.bilevel.guards import check_count
from birl_ext.bilevel.trajectory import filled
from birl_ext.errors import OptionError
from birl_ext.preferences.loss import RewardFunction
from birl_ext.preferences.reward_model import RewardModel

__all__ = ["Critic", "Follower", "FullHorizon", "OneStep", "Score", "Simulator"]


class Follower(Protocol):
    """The lower level's policy, held fixed."""

    def probabilities(self, observation: Tensor) -> Tensor:
        """π(·|s), (m, A); only of discrete actions."""
        ...

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """a ~ π(·|s), (m, *A)."""
        ...


class Path(Protocol):
    """What a simulator returns: (m, K, …) each, and whether the path still went on, (m, K)."""

    @property
    def observation(self) -> Tensor: ...
    @property
    def action(self) -> Tensor: ...
    @property
    def present(self) -> Tensor: ...


class Simulator(Protocol):
    """An environment that can be started from any state."""

    def continuations(
        self, follower: Follower, observation: Tensor, action: Tensor | None, steps: int, /
    ) -> Path:
        """One path from each state, its first action given or drawn."""
        ...


class Score(Protocol):
    """An estimator of Σ_h (∇Q − ∇V)(s_h, a_h)."""

    def __call__(
        self,
        reward: RewardFunction,
        follower: Follower,
        observation: Tensor,
        action: Tensor,
        present: Tensor,
    ) -> Tensor:
        """A surrogate (n,) from fragments (n, H, …), of which `present` steps count."""
        ...

    def each(
        self,
        reward: RewardFunction,
        follower: Follower,
        observation: Tensor,
        action: Tensor,
        present: Tensor,
    ) -> Tensor:
        """Its terms, of each step, (n, H); zero where a step is not `present`."""
        ...

    def of_actions(
        self, reward: RewardFunction, follower: Follower, where: Tensor, actions: int
    ) -> Tensor:
        """∇Q(s, ·) alone, for weights that sum to zero over the A discrete actions: (m, *O) →
        (m, A).
        """
        ...


class _StepByStep:
    """A sum over the steps of each fragment, of one number per step."""

    def __call__(
        self,
        reward: RewardFunction,
        follower: Follower,
        observation: Tensor,
        action: Tensor,
        present: Tensor,
    ) -> Tensor:
        return self.each(reward, follower, observation, action, present).sum(-1)

    def each(
        self,
        reward: RewardFunction,
        follower: Follower,
        observation: Tensor,
        action: Tensor,
        present: Tensor,
    ) -> Tensor:
        """The surrogate of each step, (n, H)."""
        steps = self.steps_of(reward, follower, observation[present], action[present])
        return filled(present, steps)

    def steps_of(
        self, reward: RewardFunction, follower: Follower, where: Tensor, chosen: Tensor
    ) -> Tensor:
        """The surrogate of single steps, (m, *O) and (m, *A) → (m,)."""
        raise NotImplementedError


class OneStep(_StepByStep):
    """The first term of the score only: what happens after the step is left out.

        h = Σ_h [ r(s_h, a_h) − Σ_a π(a|s_h) r(s_h, a) ]

    Bias at most 2γ sup‖∇r‖/(1 − γ) per step (times E|l|/τ in the hyper-gradient of a loss l).
    Exactly zero where the reward depends on the state alone: use another estimator there.

    Args:
        actions: A, where actions are discrete and the expectation is summed; None draws `samples`
            actions instead.
        samples: draws per step.
        generator: of the draws; needed without `actions`.

    Source: (M16), estimator (i).
    """

    def __init__(
        self,
        actions: int | None = None,
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if actions is None and generator is None:
            raise OptionError("neither actions nor generator is given", fix="give one of them")
        self.actions = None if actions is None else check_count("actions", actions)
        self.samples = check_count("samples", samples)
        self.generator = generator

    def steps_of(
        self, reward: RewardFunction, follower: Follower, where: Tensor, chosen: Tensor
    ) -> Tensor:
        if self.actions is not None and isinstance(reward, RewardModel):
            with torch.no_grad():
                share = follower.probabilities(where)
            return self.of_table(reward.all_actions(where), share, chosen)
        return reward(where, chosen) - self._mean(reward, follower, where)

    def of_actions(
        self, reward: RewardFunction, follower: Follower, where: Tensor, actions: int
    ) -> Tensor:
        if isinstance(reward, RewardModel):
            return reward.all_actions(where)
        every = torch.arange(actions, device=where.device).repeat(len(where))
        return reward(where.repeat_interleave(actions, 0), every).view(-1, actions)

    @staticmethod
    def of_table(table: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        """`steps_of` from r(s, ·) and π(·|s), (m, A) both: what is known already costs nothing."""
        return table.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - (share * table).sum(-1)

    def _mean(self, reward: RewardFunction, follower: Follower, where: Tensor) -> Tensor:
        """E_π r(s, ·), (m,)."""
        if self.actions is not None:
            with torch.no_grad():
                share = follower.probabilities(where)
            return (share * self.of_actions(reward, follower, where, self.actions)).sum(-1)
        assert self.generator is not None
        spread = where.repeat_interleave(self.samples, 0)
        with torch.no_grad():
            drawn = follower.sample(spread, self.generator)
        return reward(spread, drawn).view(-1, self.samples).mean(-1)


class FullHorizon(_StepByStep):
    """Both ∇Q and ∇V from independent continuations of K steps.

        h = Σ_h Σ_{k<K} γᵏ [ r(s⁺_k, a⁺_k) − r(s⁰_k, a⁰_k) ],
        (s⁺_0, a⁺_0) = (s_h, a_h);  s⁰_0 = s_h, a⁰_0 ~ π

    Bias at most 2γᴷ sup‖∇r‖/(1 − γ) per step (times E|l|/τ in the hyper-gradient of a loss l). The
    fragment's own continuation would not do for the first: it is not independent of its loss.
    Where a⁰_0 = a_h, both paths have one law, and their difference is replaced by its mean, zero:
    a step then costs the more variance the less likely its action was.

    Args:
        simulator: starts from any state.
        discount: γ of the lower level.
        steps: K.

    Source: (M16), estimator (ii).
    """

    def __init__(self, simulator: Simulator, *, discount: float, steps: int) -> None:
        self.simulator = simulator
        self.discount = check_discount(discount)
        self.steps = check_count("steps", steps)

    def of_actions(
        self, reward: RewardFunction, follower: Follower, where: Tensor, actions: int
    ) -> Tensor:
        every = torch.arange(actions, device=where.device).repeat(len(where))
        with torch.no_grad():
            path = self.simulator.continuations(
                follower, where.repeat_interleave(actions, 0), every, self.steps
            )
        counts = torch.ones_like(path.present[:, 0])
        return self._discounted(reward, path, counts).view(-1, actions)

    def steps_of(
        self, reward: RewardFunction, follower: Follower, where: Tensor, chosen: Tensor
    ) -> Tensor:
        with torch.no_grad():
            given, drawn = (
                self.simulator.continuations(follower, where, first, self.steps)
                for first in (chosen, None)
            )
        apart = given.action[:, 0] != drawn.action[:, 0]
        if apart.dim() > 1:
            apart = apart.flatten(1).any(-1)
        return self._discounted(reward, given, apart) - self._discounted(reward, drawn, apart)

    def _discounted(self, reward: RewardFunction, path: Path, apart: Tensor) -> Tensor:
        """Σ_k γᵏ r along the paths that count, and zero for the others, (m,)."""
        seen = path.present & apart.unsqueeze(-1)
        found = reward(path.observation[seen], path.action[seen])
        powers = self.discount ** torch.arange(self.steps, dtype=found.dtype, device=found.device)
        return filled(seen, found) @ powers


class Critic(_StepByStep):
    """∇Q from a learned critic of the features in which the reward is linear.

        r_x(s, a) = x·ψ(s, a),   h = x·Σ_h [ M(s_h, a_h) − Σ_a π(a|s_h) M(s_h, a) ],
        M = E[ Σ_k γᵏ ψ(s_k, a_k) ]

    Biased by the critic's error alone; no simulator is needed. Where ψ has parameters of its own,
    M says nothing of their derivative: `trunk` adds its first term, with the bias of `OneStep` in
    these parameters, and the others stay as they are.

    Args:
        features: observation (m, *O) → M(s, ·), (m, A, F): successor features.
        weights: () → x, (F,), differentiable in the upper-level variable.
        trunk: observation (m, *O) → x̄·ψ(s, ·), (m, A), differentiable in the parameters of ψ and
            not in x; absent where ψ is fixed.

    Source: (M16), estimator (iii); successor features: Barreto et al. (2017).
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        weights: Callable[[], Tensor],
        *,
        trunk: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.features = features
        self.weights = weights
        self.trunk = trunk

    def of_actions(
        self, reward: RewardFunction, follower: Follower, where: Tensor, actions: int
    ) -> Tensor:
        with torch.no_grad():
            table = self.features(where)
        weights = self.weights()
        found = table.to(weights) @ weights
        return found if self.trunk is None else found + self.trunk(where)

    def steps_of(
        self, reward: RewardFunction, follower: Follower, where: Tensor, chosen: Tensor
    ) -> Tensor:
        row = torch.arange(len(where), device=where.device)
        with torch.no_grad():
            share = follower.probabilities(where)
            table = self.features(where)
            gap = table[row, chosen] - (share.unsqueeze(-1) * table).sum(1)
        weights = self.weights()
        surrogate = gap.to(weights) @ weights
        if self.trunk is not None:
            every = self.trunk(where)
            surrogate = surrogate + every[row, chosen] - (share.to(every) * every).sum(-1)
        return surrogate
