"""Stoc-SoBiRL on finite MDPs that can only be sampled (Yang, Gao and Yuan, AISTATS 2025).

The published algorithm has no public pseudo-code; what is not fixed by (M16) is a choice made here,
stated in docs/stochastic.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_ext.agents.agent import check_discount
from birl_ext.bilevel import variables
from birl_ext.bilevel.adaptation import AdaptedReward, transition_log_probabilities
from birl_ext.bilevel.algorithm import Descent, Maker
from birl_ext.bilevel.guards import (
    check_callable,
    check_count,
    check_kind,
    check_lower,
    check_number,
    check_objective,
)
from birl_ext.bilevel.hypergradient import hypergradient
from birl_ext.bilevel.score import FullHorizon
from birl_ext.bilevel.trajectory import (
    Baseline,
    additive_surrogate,
    check_baseline,
    filled,
    trajectory_surrogate,
)
from birl_ext.errors import OptionError, ShapeError
from birl_ext.model import checks
from birl_ext.preferences.loss import RewardFunction
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

__all__ = ["Effort", "SampledProblem", "StocSoBiRLDescent", "StocSoBiRLOutcome"]

Credit = Literal["critic", "to go"]


@dataclass(frozen=True)
class SampledProblem:
    """min over x of φ(x) over paths of π*(x): of independent ones, or of a sum over the steps of
    one.

        φ(x) = E[ l(d₁, …, d_I; x) ],   or   φ(x) = E[ Σ_t γ_uᵗ f(s_t, a_t; x) ]

    Args:
        reward: x → r, (S, A), units of τ.
        loss: (x, the paths) → l, (n,), units of φ; paths[i] holds the n samples' i-th path.
        paths: I.
        steps: H, steps of a path.
        transition: x → P_x, (S, A, S), where x moves the process: the simulator is taken along, and
            ∇log P_x at the transitions that are drawn is used. Which rows end must not depend on x.
        cost: x → f, (S, A), units of φ, in place of `loss`: each step is credited with what
            follows it alone, which a loss of whole paths does not allow.
        discount: γ_u of the sum, [0, 1].
    """

    reward: Callable[[Any], Tensor]
    loss: Callable[[Any, Sequence[Paths]], Tensor] | None = None
    paths: int = 2
    steps: int = 1
    transition: Callable[[Any], Tensor] | None = None
    cost: Callable[[Any], Tensor] | None = None
    discount: float = 1.0

    def __post_init__(self) -> None:
        check_callable("reward", self.reward)
        if (self.loss is None) == (self.cost is None):
            raise OptionError(
                f"{'neither' if self.loss is None else 'both'} loss and cost",
                allowed="one of them",
                fix="give `loss` of whole paths, or `cost` of each step",
            )
        check_callable("loss" if self.cost is None else "cost", self.loss or self.cost)
        for name in ("paths", "steps"):
            check_count(name, getattr(self, name))
        if not 0.0 <= check_number("discount", self.discount) <= 1.0:
            raise OptionError(f"discount is {self.discount!r}", allowed="[0, 1]")


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


class StocSoBiRLOutcome(NamedTuple):
    """One outer step, taken at the x before it."""

    objective: float
    """Mean loss, or sum of costs, of the batch: an estimate of φ."""
    gradient_norm: float
    """‖∇φ̂‖₂ of the estimate, noise included."""
    samples: int
    """Transitions drawn in this step."""


class StocSoBiRLDescent(Descent[StocSoBiRLOutcome]):
    """Single-loop stochastic bilevel descent from samples of the process alone.

        Q ← Q + α_j (r_x + γ τ log Σ_a μ exp(Q(s', ·)/τ) − Q), s' ~ P(·|s, a), N times, warm-started
        d_i ~ π_Q ∝ μ exp(Q/τ),   ∇φ̂ from (M16), (M17) with continuations of K steps,   x ← x − β ∇φ̂

    Args:
        problem: loss and reward.
        simulator: draws the paths; its transition is never read, mask and reference μ are.
        x: start, (d,), or a list, tuple or dict of tensors, or a module; copied.
        discount: γ of the lower level.
        temperature: τ, units of reward.
        optimiser: from a list of parameters to any torch optimiser.
        effort: samples per outer step; may be replaced between steps.
        baseline: of what is not a critic's, see `trajectory_surrogate`, `additive_surrogate`.
        credit: of a problem with a `cost`, what weighs a step's score. "critic": the advantage of
            the upper level's return, of which a Q is learned beside the lower level's from the same
            samples, summed over the actions: its error is bias. "to go": the costs that follow,
            which have none, and several times the variance.

    Source: (M16), (M17); Yang, Gao and Yuan (2025), Stoc-SoBiRL; the step sizes
    α_j = 1/(1 + (1 − γ)j) of the lower level: Wainwright (2019).
    """

    STATE = ("q", "upper_q", "simulator")

    def __init__(
        self,
        problem: SampledProblem,
        simulator: FiniteSimulator,
        x: variables.Variables,
        *,
        discount: float,
        temperature: float,
        optimiser: Maker,
        effort: Effort,
        baseline: Baseline = "others",
        credit: Credit = "critic",
    ) -> None:
        checks.check_temperature(temperature)
        check_baseline(baseline)
        if credit not in ("critic", "to go"):
            raise OptionError(f"credit is {credit!r}", allowed="'critic' or 'to go'")
        check_kind("problem", problem, SampledProblem)
        check_kind("simulator", simulator, FiniteSimulator)
        check_kind("effort", effort, Effort)
        self.problem = problem
        self.simulator = simulator
        self.discount = check_discount(discount)
        self.temperature = temperature
        self._begin(x, optimiser, vector=True)
        self.effort = effort
        self.baseline: Baseline = baseline
        self.credit: Credit = credit
        if problem.cost is not None and credit == "critic" and problem.discount == 1.0:
            raise OptionError(
                "discount of the costs is 1.0, and a critic may have no limit then",
                allowed="below 1",
                fix='lower `discount` of the problem, or say credit="to go"',
            )
        self.q = torch.zeros(simulator.states, simulator.actions, dtype=torch.float64)
        self.upper_q = torch.zeros_like(self.q)

    def step(self) -> StocSoBiRLOutcome:
        """One outer step.

        Raises:
            GradientError: reward and transition do not depend on x, or loss or gradient is not
                finite.
            NonFiniteResultError: the optimiser would make x infinite or NaN. After any error x, Q
                and the generator are what they were.
        """
        before = self.simulator.samples

        def evaluate() -> tuple[StocSoBiRLOutcome, list[Tensor]]:
            objective, gradient = self.hypergradient()
            outcome = StocSoBiRLOutcome(objective, float(gradient.norm()), 0)
            return outcome, variables.split(gradient, self.x)

        return self._take(evaluate)._replace(samples=self.simulator.samples - before)

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
        self._learn(table.detach(), None if cost is None else cost.detach())
        follower = FiniteFollower(self._preference().softmax(-1))
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
                temperature=self.temperature,
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

    def _table(self, name: str, function: Callable[[Any], Tensor]) -> Tensor:
        """A number for each state and action at the present x; zero behind the mask."""
        simulator = self.simulator
        table = checks.as_floating(name, function(self.x))
        shape = (simulator.states, simulator.actions)
        if table.shape != shape:
            raise ShapeError(
                f"{name} has shape {tuple(table.shape)}",
                allowed=f"(S, A) = {shape}, those of the simulator",
                fix=f"return a number for each state and action from `{name}`",
            )
        return table if simulator.mask is None else torch.where(simulator.mask, table, 0.0)

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
            temperature=self.temperature,
            discount=self.problem.discount,
            baseline=self.baseline,
            advantage=advantage,
            path=None if moved is None else moved[0],
        )

    def _learn(self, reward: Tensor, cost: Tensor | None) -> None:
        """Synchronous soft Q-learning from the warm start, and beside it, from the same samples, of
        what the policy costs the upper level.
        """
        gamma, above = self.discount, self.problem.discount
        for j in range(1, self.effort.sweeps + 1):
            ahead, goes_on = self.simulator.successors()
            if cost is not None and self.credit == "critic":
                mean = (self._preference().softmax(-1) * self.upper_q).sum(-1)
                target = cost + above * mean[ahead] * goes_on
                self.upper_q += (target - self.upper_q) / (1 + (1 - above) * j)
            target = reward + gamma * self._value()[ahead] * goes_on
            self.q += (target - self.q) / (1 + (1 - gamma) * j)

    def _preference(self) -> Tensor:
        """Q/τ + log μ, (S, A)."""
        return self.q / self.temperature + self.simulator.log_reference

    def _value(self) -> Tensor:
        """τ log Σ_a μ exp(Q/τ), (S,)."""
        return self.temperature * torch.logsumexp(self._preference(), -1)
