"""Stoc-SoBiRL on finite MDPs that can only be sampled (Yang, Gao and Yuan, AISTATS 2025).

The published algorithm has no public pseudo-code; what is not fixed by (M16) is a choice made here,
stated in docs/stochastic.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_ext.agents.agent import check_discount
from birl_ext.bilevel import variables
from birl_ext.bilevel.adaptation import AdaptedReward, path_log_probability
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
from birl_ext.bilevel.trajectory import Baseline, check_baseline, trajectory_surrogate
from birl_ext.errors import ShapeError
from birl_ext.model import checks
from birl_ext.preferences.loss import RewardFunction
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

__all__ = ["Effort", "SampledProblem", "StocSoBiRL", "StocSoBiRLOutcome"]


@dataclass(frozen=True)
class SampledProblem:
    """min over x of φ(x) = E[ l(d₁, …, d_I; x) ] over independent paths of π*(x).

    Args:
        reward: x → r, (S, A), units of τ.
        loss: (x, the paths) → l, (n,), units of φ; paths[i] holds the n samples' i-th path.
        paths: I.
        steps: H, steps of a path.
        transition: x → P_x, (S, A, S), where x moves the process: the simulator is taken along, and
            ∇log P_x at the transitions that are drawn is used. Which rows end must not depend on x.
    """

    reward: Callable[[Any], Tensor]
    loss: Callable[[Any, Sequence[Paths]], Tensor]
    paths: int = 2
    steps: int = 1
    transition: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("reward", "loss"):
            check_callable(name, getattr(self, name))
        for name in ("paths", "steps"):
            check_count(name, getattr(self, name))


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
    """Mean loss of the batch: an estimate of φ."""
    gradient_norm: float
    """‖∇φ̂‖₂ of the estimate, noise included."""
    samples: int
    """Transitions drawn in this step."""


class StocSoBiRL(Descent[StocSoBiRLOutcome]):
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
        baseline: of the losses, see `trajectory_surrogate`.

    Source: (M16), (M17); Yang, Gao and Yuan (2025), Stoc-SoBiRL; the step sizes
    α_j = 1/(1 + (1 − γ)j) of the lower level: Wainwright (2019).
    """

    STATE = ("q", "simulator")

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
    ) -> None:
        checks.check_temperature(temperature)
        check_baseline(baseline)
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
        self.q = torch.zeros(simulator.states, simulator.actions, dtype=torch.float64)

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
        table = checks.as_floating("reward", problem.reward(self.x))
        shape = (simulator.states, simulator.actions)
        if table.shape != shape:
            raise ShapeError(
                f"reward has shape {tuple(table.shape)}",
                allowed=f"(S, A) = {shape}, those of the simulator",
                fix="return a number for each state and action from `reward`",
            )
        if simulator.mask is not None:
            table = torch.where(simulator.mask, table, 0.0)
        checks.check_reward(table)
        law = None if problem.transition is None else problem.transition(self.x)
        check_lower([table, law], self.x, "`reward` and `transition`", "reward or transition")
        if law is not None:
            simulator.adapt(law)
        self._learn(table.detach())
        follower = FiniteFollower(self._preference().softmax(-1))
        paths = [
            simulator.rollout(follower, effort.batch, problem.steps) for _ in range(problem.paths)
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
            moved = torch.stack([path_log_probability(transition, *path) for path in paths]).sum(0)
        score = FullHorizon(simulator, discount=self.discount, steps=effort.horizon)
        scores = torch.stack([score(scored, follower, *path) for path in paths]).sum(0)
        surrogate = trajectory_surrogate(
            problem.loss(self.x, paths),
            scores,
            temperature=self.temperature,
            baseline=self.baseline,
            path=moved,
        )
        check_objective(surrogate, self.steps, "loss")
        gradient = hypergradient(
            surrogate, self.x, self.steps, levels="`loss`, `reward` or `transition`"
        )
        return float(surrogate.detach()), variables.joined(gradient)

    def _learn(self, reward: Tensor) -> None:
        """Synchronous soft Q-learning from the warm start."""
        gamma = self.discount
        for j in range(1, self.effort.sweeps + 1):
            ahead, goes_on = self.simulator.successors()
            target = reward + gamma * self._value()[ahead] * goes_on
            self.q += (target - self.q) / (1 + (1 - gamma) * j)

    def _preference(self) -> Tensor:
        """Q/τ + log μ, (S, A)."""
        return self.q / self.temperature + self.simulator.log_reference

    def _value(self) -> Tensor:
        """τ log Σ_a μ exp(Q/τ), (S,)."""
        return self.temperature * torch.logsumexp(self._preference(), -1)
