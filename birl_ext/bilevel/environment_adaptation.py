"""Environment adaptation with a follower that learns: x moves the physics, and an agent, trained in
simulated environments, adapts to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from birl_ext.agents.agent import Agent, DiscreteAgent, check_discount
from birl_ext.agents.target import Target
from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Descent, Maker
from birl_ext.bilevel.guards import (
    check_callable,
    check_count,
    check_gradient,
    check_kind,
    check_lower,
    check_number,
    check_objective,
    check_seed,
    make_optimiser,
)
from birl_ext.bilevel.hypergradient import hypergradient
from birl_ext.bilevel.trajectory import additive_surrogate, filled
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import NonFiniteInputError, NonFiniteResultError, OptionError, ShapeError
from birl_ext.replay.buffer import ReplayBuffer
from birl_ext.simulators.equations import DynamicsSimulator, RandomDynamics
from birl_ext.simulators.noisy import NoisyDynamics
from birl_ext.simulators.paths import Paths
from birl_ext.state import Stateful

__all__ = [
    "Adaptation",
    "AdaptationOutcome",
    "AdaptationProblem",
    "Practice",
    "ZeroOrderAdaptation",
]

Payment = Callable[[Any, Tensor, Tensor], Tensor]
"""(x, observation (m, *O), action (m, *A)) → (m,)."""


@dataclass(frozen=True)
class AdaptationProblem:
    """min over x of φ(x) = E[ Σ_{t<H} γ_uᵗ f(s_t, a_t; x) ] over paths of π*(x) under P_x.

    Args:
        dynamics: x → P_x, such as `NoisyDynamics` of equations that are computed from x by torch.
        reward: r_x of the follower, units of τ.
        cost: f, units of φ.
        start: (n, generator) → first observations, (n, O); x must not move them.
        steps: H, after which an episode is cut off, in the follower's practice too.
        discount: γ_u, [0, 1).
    """

    dynamics: Callable[[Any], RandomDynamics]
    reward: Payment
    cost: Payment
    start: Callable[[int, torch.Generator], Tensor]
    steps: int
    discount: float

    def __post_init__(self) -> None:
        for name in ("dynamics", "reward", "cost", "start"):
            check_callable(name, getattr(self, name))
        check_count("steps", self.steps)
        if not 0.0 <= check_number("discount", self.discount) < 1.0:
            raise OptionError(
                f"discount is {self.discount!r}",
                allowed="[0, 1): the upper level's critic may have no limit else",
            )


@dataclass(frozen=True)
class Practice:
    """What is spent on one outer step.

    Args:
        environments: n, episodes that are played at once.
        rounds: how often n episodes are played, each followed by `updates`.
        updates: of the agent, and of the critics beside it.
        batch: transitions of an update, from those of this outer step: earlier ones are of another
            P_x, whose score is not the present one's.
        paths: that φ and its gradient are averaged over.
        first: rounds before the first outer step, in place of `rounds`; 0: no more than those.
    """

    environments: int = 32
    rounds: int = 4
    updates: int = 30
    batch: int = 256
    paths: int = 128
    first: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_count(name, value, 0 if name == "first" else 1)


class AdaptationOutcome(NamedTuple):
    """One outer step, taken at the x before it."""

    objective: float
    """φ̂, the mean over the paths."""
    gradient_norm: float
    """‖∇φ̂‖₂ of the estimate, noise included."""
    samples: int
    """Steps of an environment, practice and paths."""


class _Adapting(Descent[AdaptationOutcome]):
    """What both leaders do: let an agent practise, and watch it."""

    STATE: ClassVar[tuple[str, ...]] = ("agent", "generator", "samples", "practised")

    def __init__(
        self,
        problem: AdaptationProblem,
        agent: Agent,
        x: variables.Variables,
        *,
        optimiser: Maker,
        practice: Practice,
        seed: int = 0,
    ) -> None:
        check_kind("problem", problem, AdaptationProblem)
        check_kind("practice", practice, Practice)
        self.problem = problem
        self.agent = agent
        self._begin(x, optimiser, vector=True)
        self.practice = practice
        self.generator = torch.Generator().manual_seed(check_seed(seed))
        self.samples = 0
        """Steps of an environment so far."""
        self.practised = 0
        """Times the agent has practised."""

    def step(self) -> AdaptationOutcome:
        """One outer step.

        Raises:
            GradientError: neither level depends on x, or the gradient is not finite; x moves what
                follows where it has no density.
            NonFiniteInputError: reward or cost are not finite.
            NonFiniteResultError: agent, critics or optimiser have diverged. After any error all is
                what it was.
        """
        before = self.samples

        def evaluate() -> tuple[AdaptationOutcome, list[Tensor]]:
            objective, gradient = self.hypergradient()
            outcome = AdaptationOutcome(objective, float(gradient.norm()), 0)
            return outcome, variables.split(gradient, self.x)

        return self._take(evaluate)._replace(samples=self.samples - before)

    def hypergradient(self) -> tuple[float, Tensor]:
        """φ and ∇φ, (d,), estimated at the present x, after the follower's practice."""
        raise NotImplementedError

    def practise(self, x: Any = None, rounds: int | None = None) -> None:
        """Let the agent learn in the environments of an x, the present one if none is given.

        Args:
            rounds: in place of those of `practice`.
        """
        x = self.x if x is None else x
        if rounds is None:
            rounds = max(self.practice.first * (not self.practised), self.practice.rounds)
        self.practised += 1
        problem, effort = self.problem, self.practice
        replay = ReplayBuffer(rounds * effort.environments * problem.steps)
        for _ in range(rounds):
            path = self._paths(x, effort.environments)
            here, there = path.present[:, :-1], path.present[:, 1:]
            replay.append(
                Transitions(
                    path.observation[:, :-1][here],
                    path.action[:, :-1][here],
                    path.observation[:, 1:][here],
                    ~there[here],
                    torch.zeros(int(here.sum())),  # the reward is that of an update's x
                )
            )
            for _ in range(effort.updates):
                batch = replay.sample(effort.batch, self.generator)
                with torch.no_grad():
                    reward = self._paid("reward", x, batch.observation, batch.action)
                self.agent.update(batch, reward)
                self._learn(batch)

    def watch(self, x: Any, count: int) -> Tensor:
        """Σ_t γ_uᵗ f of so many paths of the agent as it is, (count,)."""
        path = self._paths(x, count)
        with torch.no_grad():
            return self._costs(x, path) @ self._powers(x)

    def _learn(self, batch: Transitions) -> None:
        """What is learned beside the agent."""

    def _paths(self, x: Any, count: int) -> Paths:
        """Episodes at x, with what follows their last step, (count, H + 1)."""
        simulator = DynamicsSimulator(self.problem.dynamics(x), self.generator)
        start = self.problem.start(count, self.generator)
        with torch.no_grad():
            path = simulator.continuations(self.agent, start, None, self.problem.steps + 1)
        self.samples += simulator.samples
        return path

    def _costs(self, x: Any, path: Paths) -> Tensor:
        """f along paths, zero after their ends, (n, H)."""
        present = path.present[:, :-1]
        seen = self._paid(
            "cost", x, path.observation[:, :-1][present], path.action[:, :-1][present]
        )
        return filled(present, seen)

    def _powers(self, x: Any) -> Tensor:
        like = variables.leaves(x)[0].detach()
        powers = torch.arange(self.problem.steps, dtype=like.dtype, device=like.device)
        return self.problem.discount**powers

    def _paid(self, name: str, x: Any, observation: Tensor, action: Tensor) -> Tensor:
        """r or f of single steps, in the dtype of x."""
        found: Tensor = getattr(self.problem, name)(x, observation, action)
        if found.shape != (len(observation),):
            raise ShapeError(
                f"{name} has shape {tuple(found.shape)}",
                allowed=f"({len(observation)},), a number for each step",
                fix=f"return one from `{name}`",
            )
        finite = found.detach().isfinite()
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise NonFiniteInputError(
                f"{name} is {float(found.detach()[first])}",
                where=f"row {first} of its steps, outer step {self.steps}",
                fix=f"look in `{name}` for a root, logarithm or quotient outside its domain there",
            )
        return found.to(variables.leaves(x)[0].dtype)


class Adaptation(_Adapting):
    """The hyper-gradient of an adapted environment, from samples, by critics of both levels.

        ∇φ̂ = (1/n) Σ_i Σ_t γ_uᵗ { ∇f_t + Σ_a π A_u (∇Q − ∇V)/τ + γ_u ∇log P_x(s'|s, a)
                                    [ V_u(s') − V_u(s) ] }
        Q_u(s, a) ← f + γ_u E_π Q_u(s', ·),
        ∇Q(s, a) ← ∇r + γ ∇log P_x(s'|s, a) [ V(s') − V(s) ] + γ E_π ∇Q(s', ·)

    Beside the agent, from the same transitions, two more values are learned: what the policy costs
    the upper level, and the derivative of the lower level's own (`AdaptedReward` in expectation).
    No path is continued, so an outer step costs the agent's practice and a few paths. The error of
    both critics, and of the agent's Q and π, is bias, and γ_u^H of what lies beyond the H steps.

    Args:
        problem: both levels.
        agent: π and Q: `SoftQ`, `DiscreteSAC`, `SAC`, at a fixed temperature.
        x: start, (d,), or a list, tuple or dict of tensors, or a module; copied.
        network: of the critics, on the agent's device: observation (n, *O) → (n, A·(1 + d)) with A
            discrete actions; else observation and action → (n, 1 + d). Each learns (1 − γ) times
            its value, so that all are of the size of a step's.
        discount: γ of the agent.
        optimiser: of x, from a list of parameters to any torch optimiser.
        learn: the same for the network.
        practice: what is spent on an outer step.
        actions: draws per state that stand for a sum over actions, where these are continuous.
        target_rate: of the critics' slow copies, see `Target`.
        seed: of everything random but the agent's own.

    Source: (M16), (M17), with the advantages of both levels in place of sampled returns; Thoma et
    al. (2024); Yang, Gao and Yuan (2025).
    """

    STATE: ClassVar[tuple[str, ...]] = ("critics",)

    def __init__(
        self,
        problem: AdaptationProblem,
        agent: Agent,
        x: variables.Variables,
        *,
        network: nn.Module,
        discount: float,
        optimiser: Maker,
        learn: Maker,
        practice: Practice,
        actions: int = 8,
        target_rate: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__(problem, agent, x, optimiser=optimiser, practice=practice, seed=seed)
        self.discount = check_discount(discount)
        self.actions = check_count("actions", actions, 2)
        self.critics = _Critics(network, learn, target_rate)
        self._discrete = cast(DiscreteAgent, agent) if hasattr(agent, "probabilities") else None

    def hypergradient(self) -> tuple[float, Tensor]:
        """φ and ∇φ, (d,), estimated at the present x, after the follower's practice."""
        tau = self.agent.temperature
        self.practise()
        if self.agent.temperature != tau:
            raise OptionError(
                f"the agent's temperature went from {tau:g} to {self.agent.temperature:g}",
                where=f"outer step {self.steps}",
                allowed="one that stays: ∂φ/∂τ is not in this gradient",
                fix="give the agent a Temperature without an entropy target",
            )
        return self.estimate(self.practice.paths)

    def estimate(self, count: int) -> tuple[float, Tensor]:
        """φ and ∇φ, (d,), from so many paths of the agent and the critics as they are."""
        above = self.problem.discount
        path = self._paths(self.x, check_count("count", count))
        present = path.present[:, :-1]
        here, chosen = path.observation[:, :-1][present], path.action[:, :-1][present]
        there, onward = path.observation[:, 1:][present], path.present[:, 1:].clone()
        onward[:, -1] = False  # what lies beyond the last step is not in φ
        dynamics = self.problem.dynamics(self.x)
        if isinstance(dynamics, NoisyDynamics):
            dynamics.require_density(here, chosen, *variables.leaves(self.x))
        with torch.no_grad():
            at, after = self._choices(here), self._choices(there)
            upper, slope = self._critics_at(self.critics.network, here, at)
            base = at.mean(upper)
            gain = after.mean(self._critics_at(self.critics.network, there, after)[0]) - base
            advantage = at.share * (upper - base.unsqueeze(-1))
            if self._discrete is None:  # the mean of A draws has in it the one it is taken from
                advantage = advantage * self.actions / (self.actions - 1)
        moved = above * gain * onward[present] * dynamics.log_prob(here, chosen, there)
        cost = self._paid("cost", self.x, here, chosen) + moved - moved.detach()
        score = slope.to(cost) @ variables.joined(variables.leaves(self.x))
        surrogate = additive_surrogate(
            filled(present, cost),
            filled(present, score),
            temperature=self.agent.temperature,
            discount=above,
            advantage=filled(present, advantage.to(cost)),
        )
        check_objective(surrogate, self.steps, "cost")
        levels = "`dynamics`, `reward` or `cost`"
        gradient = hypergradient(surrogate, self.x, self.steps, levels=levels)
        return float(surrogate.detach()), variables.joined(gradient)

    def _learn(self, batch: Transitions) -> None:
        """One step of both critics on the transitions of the agent's."""
        goes_on = ~batch.terminated
        with torch.no_grad():
            at = self._choices(batch.observation)
            after = self._choices(batch.next_observation)
            gain = self._value(batch.next_observation, after) - self._value(batch.observation, at)
            cost = self._paid("cost", self.x, batch.observation, batch.action)
            upper, slope = self._critics_at(self.critics.target, batch.next_observation, after)
            upper, slope = after.mean(upper) * goes_on, after.mean(slope) * goes_on.unsqueeze(-1)
        reward = self._paid("reward", self.x, batch.observation, batch.action)
        law = self.problem.dynamics(self.x)
        log_prob = law.log_prob(batch.observation, batch.action, batch.next_observation)
        moved = reward + self.discount * gain * goes_on * log_prob
        check_lower([moved], self.x, "`dynamics` and `reward`", "reward or a density")
        upper = cost + self.problem.discount * upper
        slope = self._jacobian(moved) + self.discount * slope
        goal = torch.cat([upper.unsqueeze(-1), slope], -1) * self._scale(cost)
        self.critics.update(goal, batch, self._discrete)

    def _jacobian(self, of: Tensor) -> Tensor:
        """∂/∂x of each of n numbers, (n, d): by one backward that is linear in their weights."""
        leaves = variables.leaves(self.x)
        weight = torch.zeros_like(of, requires_grad=True)
        parts = torch.autograd.grad(
            of, leaves, weight, create_graph=True, allow_unused=True, materialize_grads=True
        )
        total = variables.joined(parts)
        every = torch.eye(len(total), dtype=total.dtype, device=total.device)
        (table,) = torch.autograd.grad(total, weight, every, is_grads_batched=True)
        return table.T

    def _scale(self, like: Tensor) -> Tensor:
        """1 − γ of each critic, (1 + d,)."""
        count = sum(leaf.numel() for leaf in variables.leaves(self.x))
        return like.new_tensor([1 - self.problem.discount, *[1 - self.discount] * count])

    def _critics_at(
        self, network: Callable[..., Tensor], observation: Tensor, at: _Choices
    ) -> tuple[Tensor, Tensor]:
        """Q_u, (m, A), and ∇Q, (m, A, d), of every choice, in the dtype of x."""
        scale = self._scale(variables.leaves(self.x)[0].detach())
        rows, count = len(observation), at.share.shape[-1]
        if self._discrete is not None:
            found = network(observation)
        else:
            spread = observation.repeat_interleave(count, 0)
            found = network(spread, at.action.flatten(0, 1))
        table = _shaped(found, rows, count, len(scale)).to(scale) / scale
        return table[..., 0], table[..., 1:]

    def _choices(self, observation: Tensor) -> _Choices:
        """All actions with their probabilities, or draws of equal ones."""
        if self._discrete is not None:
            share = self._discrete.probabilities(observation)
            return _Choices(share.double(), share.new_empty(0))
        spread = observation.repeat_interleave(self.actions, 0)
        action = self.agent.sample(spread, self.generator)
        share = torch.full((len(observation), self.actions), 1 / self.actions, dtype=torch.float64)
        return _Choices(share.to(action.device), action.view(*share.shape, -1))

    def _value(self, observation: Tensor, at: _Choices) -> Tensor:
        """V(s) = E_π[ Q − τ log π ] of the agent, (m,)."""
        agent: Any = self.agent
        tau = self.agent.temperature
        if self._discrete is not None:
            return at.mean((agent.q(observation) - tau * agent.log_probs(observation)).double())
        spread, drawn = observation.repeat_interleave(self.actions, 0), at.action.flatten(0, 1)
        found = agent.q(spread, drawn) - tau * agent.log_prob(spread, drawn)
        return at.mean(found.double().view_as(at.share))


class _Choices(NamedTuple):
    """What may be done in m states, and how likely it is."""

    share: Tensor  # (m, A) float64
    action: Tensor  # (m, A, *A) where actions are drawn

    def mean(self, table: Tensor) -> Tensor:
        """Σ_a π of a table (m, A, …)."""
        share = self.share.to(table)
        return (share.view(*share.shape, *[1] * (table.dim() - 2)) * table).sum(1)


class _Critics(Stateful):
    """The network, its slow copy and its optimiser."""

    STATE = ("network", "target", "optimiser")

    def __init__(self, network: nn.Module, learn: Maker, rate: float) -> None:
        check_kind("network", network, nn.Module)
        self.network = network
        self.target = Target(network, rate=rate, period=1)
        self.optimiser = make_optimiser(learn, list(network.parameters()))

    def update(self, goal: Tensor, batch: Transitions, discrete: Any) -> None:
        """One step on the mean squared distance from the goal, (n, 1 + d)."""
        count, parts = goal.shape
        if discrete is None:
            found = self.network(batch.observation, batch.action)
            chosen = _shaped(found, count, 1, parts).squeeze(1)
        else:
            table = self.network(batch.observation)
            table = _shaped(table, count, table.numel() // max(1, count * parts), parts)
            chosen = table[torch.arange(count, device=table.device), batch.action]
        loss = (chosen - goal.to(chosen)).square().sum(-1).mean()
        if not bool(loss.isfinite()):
            raise NonFiniteResultError(
                f"the critics' loss is {float(loss.detach())}",
                fix="they have diverged: lower the learning rate of `learn`, or that of the agent",
            )
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.target.follow()


class ZeroOrderAdaptation(_Adapting):
    """The same problem without derivatives: two agents practise, on both sides of x.

        ∇φ̂ = (φ(x + uZ) − φ(x − uZ)) Z/(2u),   Z ~ N(0, I)

    Both start from the agent that there is and see the same random numbers; the second one stays.

    Args:
        problem, agent, x, optimiser, practice, seed: as of `Adaptation`; the practice of each
            agent, so that an outer step costs twice as much.
        radius: u, units of x.

    Source: Nesterov and Spokoiny (2017).
    """

    def __init__(
        self,
        problem: AdaptationProblem,
        agent: Agent,
        x: variables.Variables,
        *,
        optimiser: Maker,
        practice: Practice,
        radius: float,
        seed: int = 0,
    ) -> None:
        super().__init__(problem, agent, x, optimiser=optimiser, practice=practice, seed=seed)
        self.radius = check_number("radius", radius, above=True)

    def hypergradient(self) -> tuple[float, Tensor]:
        """φ, between both sides, and ∇φ̂, (d,), after the practice of two agents."""
        if not self.practised:
            self.practise()
        own = variables.leaves(self.x)
        direction = [variables.drawn(leaf.detach(), self.generator) for leaf in own]
        agent, random = self.agent.state_dict(), self.generator.get_state()
        found = []
        for radius in (self.radius, -self.radius):
            self.agent.load_state_dict(agent)
            self.generator.set_state(random)
            moved = [leaf.detach() + radius * z for leaf, z in zip(own, direction, strict=True)]
            x = variables.rebuilt(self.x, moved)
            self.practise(x)
            found.append(self.watch(x, self.practice.paths).mean())
            check_objective(found[-1], self.steps, "cost")
        gradient = (found[0] - found[1]) / (2 * self.radius) * variables.joined(direction)
        check_gradient(gradient, self.steps)
        return float(found[0] + found[1]) / 2, gradient


def _shaped(found: Tensor, rows: int, count: int, parts: int) -> Tensor:
    """What the network of the critics returned, as (rows, A, 1 + d)."""
    if found.numel() != rows * count * parts or len(found) not in (rows, rows * count):
        raise ShapeError(
            f"the network of the critics returned shape {tuple(found.shape)} for {rows} rows",
            allowed=f"{count} × {parts} numbers for each: of every action Q_u and ∂Q/∂x",
            fix="give it A·(1 + d) outputs, or 1 + d where actions are continuous",
        )
    return found.view(rows, count, parts)
