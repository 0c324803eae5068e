"""Stoc-SoBiRL on finite MDPs that can only be sampled (Yang, Gao and Yuan, AISTATS 2025).

The published algorithm has no public pseudo-code; what is not fixed by (M16) is a choice made here,
stated in docs/stochastic.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from birl_ext.agents.agent import check_discount
from birl_ext.bilevel import variables
from birl_ext.bilevel.adaptation import AdaptedReward, transition_log_probabilities
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.guards import (
    check_count,
    check_kind,
    check_lower,
    check_number,
    check_objective,
)
from birl_ext.bilevel.hypergradient import hypergradient
from birl_ext.bilevel.problem import Temperature
from birl_ext.bilevel.sampled import (
    KnownFollower,
    SampledDescent,
    SampledProblem,
    StocSoBiRLOutcome,
)
from birl_ext.bilevel.score import FullHorizon
from birl_ext.bilevel.trajectory import (
    Baseline,
    additive_surrogate,
    check_baseline,
    filled,
    trajectory_surrogate,
)
from birl_ext.errors import OptionError
from birl_ext.model import checks
from birl_ext.preferences.loss import RewardFunction
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

__all__ = ["Effort", "SampledProblem", "StocSoBiRLDescent", "StocSoBiRLOutcome"]

Credit = Literal["critic", "to go"]


@dataclass(frozen=True)
class Effort:
    """Samples per outer step.

    Args:
        batch: tuples of paths that the hyper-gradient averages.
        horizon: K, steps of each continuation.
        sweeps: samples of every (s, a) for the soft Q-learning of the lower level.
    """

    batch: int
    horizon: int
    sweeps: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_count(name, value)

    @classmethod
    def for_accuracy(
        cls, epsilon: float, discount: float, *, batch: float = 4.0, sweeps: float = 4.0
    ) -> Effort:
        """What ‖∇φ‖² ≤ ε asks for: noise and the lower level's error fall as 1/samples, the
        truncation as γᴷ.

            B = ⌈batch/ε⌉,  K = ⌈log(1/ε)/(1 − γ)⌉,  N = ⌈sweeps/ε⌉
        """
        check_number("epsilon", epsilon, above=True, below=1.0)
        check_discount(discount)
        horizon = math.ceil(math.log(1 / epsilon) / (1 - discount))
        return cls(math.ceil(batch / epsilon), max(1, horizon), math.ceil(sweeps / epsilon))


class StocSoBiRLDescent(SampledDescent):
    """Single-loop stochastic bilevel descent from samples of the process alone.

        Q ← Q + α_j (r_x + γ τ log Σ_a μ exp(Q(s', ·)/τ) − Q), s' ~ P(·|s, a), N times, warm-started
        d_i ~ π_Q ∝ μ exp(Q/τ),   ∇φ̂ from (M16), (M17) with continuations of K steps,   x ← x − β ∇φ̂

    Args:
        problem: loss and reward.
        simulator: draws the paths; its transition is never read, mask and reference μ are.
        x: start, (d,), or a list, tuple or dict of tensors, or a module; copied.
        discount: γ of the lower level.
        temperature: τ, units of reward, or a schedule of it (see `geometric`).
        optimiser: from a list of parameters to any torch optimiser.
        effort: samples per outer step; may be replaced between steps.
        baseline: of what is not a critic's, see `trajectory_surrogate`, `additive_surrogate`.
        credit: of a problem with a `cost`, what weighs a step's score. "critic": the advantage of
            the upper level's return, of which a Q is learned beside the lower level's from the same
            samples, summed over the actions: its error is bias. "to go": the costs that follow,
            which have none, and several times the variance.
        noise: standard deviation of Gaussian noise added to the hyper-gradient, units of φ per unit
            of x.
        follower: (x, τ) → its policy, (S, A), where it is known: nothing is drawn to learn it, and
            `sweeps` draws only what the upper level's critic learns from. None: soft Q-learning.

    Source: (M16), (M17); Yang, Gao and Yuan (2025), Stoc-SoBiRL; the step sizes
    α_j = 1/(1 + (1 − γ)j) of the lower level: Wainwright (2019).
    """

    STATE = ("upper_q",)

    def __init__(
        self,
        problem: SampledProblem,
        simulator: FiniteSimulator,
        x: variables.Variables,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Maker,
        effort: Effort,
        baseline: Baseline = "others",
        credit: Credit = "critic",
        noise: float = 0.0,
        follower: KnownFollower | None = None,
    ) -> None:
        self._begin_sampled(
            problem,
            simulator,
            x,
            discount=discount,
            temperature=temperature,
            optimiser=optimiser,
            noise=noise,
            follower=follower,
        )
        check_baseline(baseline)
        if credit not in ("critic", "to go"):
            raise OptionError(f"credit is {credit!r}", allowed="'critic' or 'to go'")
        check_kind("effort", effort, Effort)
        self.effort = effort
        self.baseline: Baseline = baseline
        self.credit: Credit = credit
        if problem.cost is not None and credit == "critic" and problem.discount == 1.0:
            raise OptionError(
                "discount of the costs is 1.0, and a critic may have no limit then",
                allowed="below 1",
                fix='lower `discount` of the problem, or say credit="to go"',
            )
        self.upper_q = torch.zeros_like(self.q)

    def hypergradient(self) -> tuple[float, Tensor]:
        """φ and ∇φ, (d,), estimated at the present x, after the lower level's update."""
        effort, problem, simulator = self.effort, self.problem, self.simulator
        check_kind("effort", effort, Effort)  # it may have been replaced
        table = self._table("reward", problem.reward)
        checks.check_reward(table)
        cost = None if problem.cost is None else self._table("cost", problem.cost)
        law = None if problem.transition is None else problem.transition(self.x)
        check_lower([table, law], self.x, "`reward` and `transition`", "reward or transition")
        if law is not None:
            simulator.adapt(law)
        follower = self._learn(table.detach(), None if cost is None else cost.detach())
        paths = [
            simulator.rollout(follower, effort.batch, problem.steps)
            for _ in range(problem.paths if cost is None else 1)
        ]

        def reward(where: Tensor, chosen: Tensor) -> Tensor:
            return table[where, chosen]

        scored: RewardFunction = reward
        moved = None
        if law is not None:
            value = self._value()

            def transition(where: Tensor, chosen: Tensor, there: Tensor) -> Tensor:
                return law[where, chosen, there].log()

            scored = AdaptedReward(
                reward,
                transition,
                simulator,
                follower,
                value=lambda where: value[where],
                discount=self.discount,
            )
            moved = torch.stack([transition_log_probabilities(transition, *path) for path in paths])
        score = FullHorizon(simulator, discount=self.discount, steps=effort.horizon)
        if cost is None:
            assert problem.loss is not None
            scores = torch.stack([score(scored, follower, *path) for path in paths]).sum(0)
            surrogate = trajectory_surrogate(
                problem.loss(self.x, paths),
                scores,
                temperature=self.tau,
                baseline=self.baseline,
                path=None if moved is None else moved.sum((0, -1)),
            )
        else:
            surrogate = self._credited(cost, score, scored, follower, paths[0], moved)
        check_objective(surrogate, self.steps, "loss" if cost is None else "cost")
        gradient = hypergradient(
            surrogate, self.x, self.steps, levels="`loss`, `cost`, `reward` or `transition`"
        )
        return float(surrogate.detach()), variables.joined(gradient)

    def _credited(
        self,
        cost: Tensor,
        score: FullHorizon,
        scored: RewardFunction,
        follower: FiniteFollower,
        path: Paths,
        moved: Tensor | None,
    ) -> Tensor:
        """The surrogate of a sum over steps."""
        where, chosen, present = path
        advantage = None
        if self.credit == "critic":
            policy = follower.policy
            gain = self.upper_q - (policy * self.upper_q).sum(-1, keepdim=True)
            each = score.of_actions(scored, follower, where[present], policy.shape[-1])
            scores = filled(present, each)
            advantage = (policy * gain)[where] * present.unsqueeze(-1)
        else:
            scores = score.each(scored, follower, *path)
        return additive_surrogate(
            cost[where, chosen] * present,
            scores,
            temperature=self.tau,
            discount=self.problem.discount,
            baseline=self.baseline,
            advantage=advantage,
            path=None if moved is None else moved[0],
        )

    def _learn(self, reward: Tensor, cost: Tensor | None) -> FiniteFollower:
        """The follower, and from the same samples what its policy costs the upper level.

        Unless it is known, it learns by synchronous soft Q-learning from the warm start.
        """
        above = self.problem.discount
        if self.credit != "critic":
            cost = None  # nothing is learned of it
        known = None if self.follower is None else self._played()
        if known is not None and cost is None:
            return known
        for j in range(1, self.effort.sweeps + 1):
            ahead, goes_on = self.simulator.successors()
            if cost is not None:
                policy = self._preference().softmax(-1) if known is None else known.policy
                mean = (policy * self.upper_q).sum(-1)
                target = cost + above * mean[ahead] * goes_on
                self.upper_q += (target - self.upper_q) / (1 + (1 - above) * j)
            if known is None:
                self._learn_once(reward, j, ahead, goes_on)
        return FiniteFollower(self._preference().softmax(-1)) if known is None else known
