"""What every method has in common that learns from paths of a finite process: the problem, the
follower, and a step whose samples are counted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from birl_ext.agents.agent import check_discount
from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Descent, Maker
from birl_ext.bilevel.guards import check_callable, check_count, check_kind, check_number
from birl_ext.bilevel.problem import Temperature, check_schedule, temperature_at
from birl_ext.errors import BirlError, OptionError, ShapeError
from birl_ext.model import checks
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

__all__ = ["KnownFollower", "SampledDescent", "SampledProblem", "StocSoBiRLOutcome"]

KnownFollower = Callable[[Any, Any], Tensor]
"""(x, τ) → the follower's policy, (S, A), which nothing is drawn for."""


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


class StocSoBiRLOutcome(NamedTuple):
    """One outer step, taken at the x before it."""

    objective: float
    """Mean loss, or sum of costs, of the batch: an estimate of φ."""
    gradient_norm: float
    """‖∇φ̂‖₂ of the estimate, the noise of the samples included."""
    samples: int
    """Transitions drawn in this step."""


class SampledDescent(Descent[StocSoBiRLOutcome]):
    """Descent along a hyper-gradient that is estimated from samples of a finite process.

    Who follows is either known, a policy that is asked for, or learns by soft Q-learning from
    samples of every (s, a), which count:

        Q ← Q + α_j (r_x + γ τ log Σ_a μ exp(Q(s', ·)/τ) − Q),  s' ~ P(·|s, a),  π ∝ μ exp(Q/τ)

    All randomness is the simulator's generator.
    """

    STATE: ClassVar[tuple[str, ...]] = ("q", "simulator")

    def _begin_sampled(
        self,
        problem: SampledProblem,
        simulator: FiniteSimulator,
        x: variables.Variables,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Maker,
        noise: float,
        follower: KnownFollower | None,
    ) -> None:
        self.temperature = check_schedule(temperature)
        check_kind("problem", problem, SampledProblem)
        check_kind("simulator", simulator, FiniteSimulator)
        if follower is not None:
            check_callable("follower", follower)
            if problem.transition is not None:
                raise OptionError(
                    "a follower is given, and x moves the process",
                    allowed="one of them",
                    fix="leave out `follower`: its value must be known, which learning it shows",
                )
        self.problem = problem
        self.simulator = simulator
        self.discount = check_discount(discount)
        self.noise = check_number("noise", noise)
        self.follower = follower
        self._begin(x, optimiser, vector=True)
        self.q = torch.zeros(simulator.states, simulator.actions, dtype=torch.float64)

    def step(self) -> StocSoBiRLOutcome:
        """One outer step.

        Raises:
            TemperatureError: the schedule's τ is not positive and finite.
            GradientError: reward and transition do not depend on x, or loss or gradient is not
                finite.
            PolicyError, ShapeError: what the follower plays is no policy.
            NonFiniteResultError: the optimiser would make x infinite or NaN. After any error x, Q
                and the generator are what they were.
        """
        before = self.simulator.samples

        def evaluate() -> tuple[StocSoBiRLOutcome, list[Tensor]]:
            objective, gradient = self.hypergradient()
            outcome = StocSoBiRLOutcome(objective, float(gradient.norm()), 0)
            parts = variables.split(gradient, self.x)
            if self.noise:
                generator = self.simulator.generator
                parts = [part + self.noise * variables.drawn(part, generator) for part in parts]
            return outcome, parts

        return self._take(evaluate)._replace(samples=self.simulator.samples - before)

    @abstractmethod
    def hypergradient(self) -> tuple[float, Tensor]:
        """φ and ∇φ, (d,), estimated at the present x, after the lower level's update."""

    @property
    def tau(self) -> float:
        """τ of the next step."""
        found = temperature_at(self.temperature, self.steps)
        if isinstance(found, Tensor) and found.numel() != 1:
            raise ShapeError(
                f"temperature has shape {tuple(found.shape)}", allowed="one number, of one process"
            )
        return float(found)

    def _table(self, name: str, function: Callable[[Any], Tensor], x: Any = None) -> Tensor:
        """A number for each state and action at x, by default the present one; zero behind the
        mask.
        """
        simulator = self.simulator
        table = checks.as_floating(name, function(self.x if x is None else x))
        shape = (simulator.states, simulator.actions)
        if table.shape != shape:
            raise ShapeError(
                f"{name} has shape {tuple(table.shape)}",
                allowed=f"(S, A) = {shape}, those of the simulator",
                fix=f"return a number for each state and action from `{name}`",
            )
        return table if simulator.mask is None else torch.where(simulator.mask, table, 0.0)

    def _played(self, x: Any = None) -> FiniteFollower:
        """The known follower's policy at x, by default the present one."""
        assert self.follower is not None
        at = self.x if x is None else x
        policy = checks.as_floating("follower", self.follower(at, self.tau)).detach()
        shape = (self.simulator.states, self.simulator.actions)
        if policy.shape != shape:
            raise ShapeError(
                f"follower returned shape {tuple(policy.shape)}",
                allowed=f"(S, A) = {shape}, those of the simulator",
            )
        mask = self.simulator.mask
        try:
            checks.check_policy(policy, None if mask is None else ~mask & mask.any(-1, True))
        except BirlError as error:
            raise type(error)(
                error.what,
                where=", ".join(part for part in ("what `follower` returned", error.where) if part),
                allowed=error.allowed,
                fix=error.fix,
            ) from None
        return FiniteFollower(policy)

    def _learned(self, reward: Tensor, sweeps: int) -> FiniteFollower:
        """The policy after so many sweeps of soft Q-learning, from where the last ones ended."""
        for j in range(1, sweeps + 1):
            self._learn_once(reward, j, *self.simulator.successors())
        return FiniteFollower(self._preference().softmax(-1))

    def _learn_once(self, reward: Tensor, j: int, ahead: Tensor, goes_on: Tensor) -> None:
        """The j-th of some sweeps, α_j = 1/(1 + (1 − γ)j)."""
        target = reward + self.discount * self._value()[ahead] * goes_on
        self.q += (target - self.q) / (1 + (1 - self.discount) * j)

    def _preference(self) -> Tensor:
        """Q/τ + log μ, (S, A)."""
        return self.q / self.tau + self.simulator.log_reference

    def _value(self) -> Tensor:
        """τ log Σ_a μ exp(Q/τ), (S,)."""
        return self.tau * torch.logsumexp(self._preference(), -1)
