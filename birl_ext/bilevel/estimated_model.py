"""The exact hyper-gradient on a model that is learned from the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_ext.agents.agent import check_discount
from birl_ext.bilevel.algorithm import Algorithm
from birl_ext.bilevel.guards import check_callable, check_count, check_kind, check_number
from birl_ext.bilevel.msobirl import MSoBiRL
from birl_ext.bilevel.problem import BilevelProblem
from birl_ext.bilevel.sampled import KnownFollower, SampledProblem
from birl_ext.errors import OptionError, ShapeError
from birl_ext.functional import evaluate, solve
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator
from birl_ext.simulators.paths import Paths
from birl_ext.solution import Solution

__all__ = ["EstimatedModel", "EstimatedModelOutcome", "Starts", "TransitionCounts"]

Starts = Callable[[int, torch.Generator], Tensor]
"""(M, generator) → M points to start from, (M, d)."""
First = Literal["uniform", "hot"]

_IDLE = 100
"""Batches of paths that draw nothing, after which there is nothing to explore."""
COOLING = 0.6
"""Share of the first rung in which the temperature falls."""
RUNGS = (0.25, 0.5, 1.0)
"""Shares of a climb after which a quarter of the points goes on."""


class TransitionCounts:
    """What was seen of a finite process: transitions, (S, A, S), and ends, (S, A)."""

    def __init__(self, states: int, actions: int) -> None:
        self.seen = torch.zeros(states, actions, states, dtype=torch.int64)
        self.ends = torch.zeros(states, actions, dtype=torch.int64)

    def add(self, path: Paths) -> None:
        """Count the steps of paths whose outcome is known, all but each path's last of H."""
        states, actions = self.ends.shape
        row = (path.observation * actions + path.action)[:, :-1]
        here, on = path.present[:, :-1], path.present[:, 1:]
        moved = row[here & on] * states + path.observation[:, 1:][here & on]
        self.seen += torch.bincount(moved, minlength=self.seen.numel()).view_as(self.seen)
        ended = torch.bincount(row[here & ~on], minlength=self.ends.numel())
        self.ends += ended.view_as(self.ends)

    def terminal(self) -> Tensor:
        """(S,) bool, the states in which an end was seen, after whatever action."""
        return self.ends.any(-1)

    def transition(self) -> Tensor:
        """P̂, (S, A, S): shares of what was seen; a row of which nothing was stays where it is."""
        total = self.seen.sum(-1, keepdim=True)
        stay = torch.eye(len(self.seen), dtype=torch.float64).unsqueeze(1)
        return torch.where(total > 0, self.seen.double() / total.clamp(min=1), stay)


class EstimatedModelOutcome(NamedTuple):
    """One round."""

    objective: float
    """Least φ on the model, at λ; of `x`."""
    gradient_norm: float
    """‖∇φ‖₂ there, of the model's φ."""
    samples: int
    """Transitions drawn in this round."""


class EstimatedModel(Algorithm[EstimatedModelOutcome]):
    """M-SoBiRL on a model that is learned from the same samples, from many starts.

        P̂(s'|s, a) = n(s, a, s') / n(s, a),   x ∈ argmin over many starts of φ(x; P̂)

    A step is a round: samples are drawn, first of a policy that goes everywhere, then of the
    follower at the best points so far; and M starts descend along the exact hyper-gradient of φ on
    P̂, each cooled from a temperature of its own to λ, the best quarter going on at each of two
    thinnings. On a model all this costs no sample, and each round's is a new search.

    What was not seen stays where it is, so that the first data must cover the process: a way that
    no path has gone does not exist in the model, and no later round will look for it. A state in
    which an end was seen ends.

    Args:
        problem: reward and `cost`, functions that `torch.vmap` can map, and H, steps of a path.
        simulator: draws the paths; its transition is never read. All randomness is its generator.
        starts: (M, generator) → where to start from, (M, d).
        discount: γ of the lower level.
        temperature: λ, units of reward.
        first: transitions of the first round.
        more: transitions of each later one, under the `candidates` in equal shares.
        explorer: whose paths the first are: "uniform", all actions alike; "hot", those of followers
            of `candidates` random starts at `heat`·λ.
        count: M.
        candidates: best points of a round, which the next one draws under and starts from too;
            None: 8, or M. With M of them a later round goes on from the old points alone, at λ.
        climb: outer steps of a round.
        learning_rate: of Adam at the beginning of a round, units of x; it falls to a tenth.
        heat: highest temperature to cool from, in units of λ: each start from λ·heatᵘ, u ~ U(0, 1),
            the first from λ·heat, a quarter of them, and what the last round found, at λ from the
            beginning. 1: nothing is cooled.
        follower: (x, τ) → its policy, (S, A), where it is known. None: the one that is
            soft-optimal on the model.

    Source: (M14) on the maximum-likelihood model.
    """

    STATE = ("x", "steps", "simulator", "_seen", "_ends", "_points")

    def __init__(
        self,
        problem: SampledProblem,
        simulator: FiniteSimulator,
        starts: Starts,
        *,
        discount: float,
        temperature: float,
        first: int = 20_000,
        more: int = 10_000,
        explorer: First = "uniform",
        count: int = 64,
        candidates: int | None = None,
        climb: int = 150,
        learning_rate: float = 0.3,
        heat: float = 8.0,
        follower: KnownFollower | None = None,
    ) -> None:
        check_kind("problem", problem, SampledProblem)
        check_kind("simulator", simulator, FiniteSimulator)
        check_callable("starts", starts)
        checks.check_temperature(temperature)
        if problem.cost is None or problem.transition is not None or problem.discount == 1.0:
            raise OptionError(
                "the problem has no cost of each step, discounted, in a process that stays",
                allowed="a `cost`, its discount below 1, and no `transition`",
            )
        if explorer not in ("uniform", "hot"):
            raise OptionError(f"explorer is {explorer!r}", allowed="'uniform' or 'hot'")
        if simulator.mask is not None:
            raise OptionError("the process has a mask", allowed="all actions in every state")
        if follower is not None:
            check_callable("follower", follower)
        self.problem, self.simulator, self.starts = problem, simulator, starts
        self.discount = check_discount(discount)
        self.temperature = float(temperature)
        self.first, self.more = check_count("first", first), check_count("more", more)
        self.explorer: First = explorer
        self.count = check_count("count", count)
        if candidates is None:
            candidates = min(8, self.count)
        self.candidates = check_count("candidates", candidates, below=self.count + 1)
        self.climb = check_count("climb", climb, 4)
        self.learning_rate = check_number("learning_rate", learning_rate, above=True)
        self.heat = check_number("heat", heat)
        if self.heat < 1:
            raise OptionError(f"heat is {heat!r}", allowed="1 or more")
        self.follower = follower
        self.steps = 0
        counts = TransitionCounts(simulator.states, simulator.actions)
        self._seen, self._ends = counts.seen, counts.ends
        # of another generator: what is drawn here is only where x stands before the first round
        self.x = self._drawn(1, torch.Generator().manual_seed(0))[0]
        self._points = self.x.expand(self.candidates, -1).clone()

    def step(self) -> EstimatedModelOutcome:
        """One round: samples, then the search on what they show.

        Raises:
            PolicyError: what the follower plays is no policy.
            GradientError: reward and cost do not depend on x, or φ or its gradient is not finite.
            ShapeError: reward or cost is not a number for each state and action. After any error
                the points, the counts and the generator are what they were.
        """
        before = self.simulator.samples
        with self.taken_back():
            if self.steps == 0:
                self._first_samples()
            else:
                shares = _shares(self.more, self.candidates)
                for x, steps in zip(self._points, shares, strict=True):
                    self.explore(self._policy(x, self.temperature), steps)
            objective, norm = self._search()
            self.steps += 1
        return EstimatedModelOutcome(objective, norm, self.simulator.samples - before)

    def explore(self, policy: Tensor, steps: int) -> None:
        """Count so many transitions of a policy, (S, A), along paths from the start; as many paths
        as that makes.
        """
        checks.check_policy(policy)
        follower = FiniteFollower(policy)
        counts = self._counts()
        left = check_count("steps", steps, 0)
        idle = 0
        while left and idle < _IDLE:
            length = min(self.problem.steps, left + 1)  # H steps draw H − 1 transitions
            length = max(length, 2)
            before = self.simulator.samples
            path = self.simulator.rollout(follower, max(1, left // (length - 1)), length)
            counts.add(path)
            drawn = self.simulator.samples - before
            left -= drawn
            idle = 0 if drawn else idle + 1  # paths that end where they start

    def model(self) -> SparseMDP:
        """The learned process, its reward zero."""
        counts = self._counts()
        rows, weights = counts.transition(), self.simulator.log_reference.exp()
        mdp = DenseMDP(
            rows.new_zeros(rows.shape[:2]),
            rows,
            self.discount,
            terminal=counts.terminal(),
            reference=None if bool((weights == 1).all()) else weights,
        ).to_sparse()
        mdp._set(free_ends=False)  # as where the follower plans
        return mdp

    def level(self) -> BilevelProblem:
        """Both levels on the learned process, for x (d,) or (M, d)."""
        process = self.model()
        problem, start = self.problem, self.simulator.start

        def lower(x: Tensor) -> SparseMDP:
            return process.replace(reward=self._tables("reward", x), validate="off")

        def upper(x: Tensor, solution: Solution) -> Tensor:
            paid = process.replace(
                reward=self._tables("cost", x), discount=problem.discount, validate="off"
            )
            return evaluate(solution.policy, paid) @ start

        return BilevelProblem(lower, upper)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self.loaded_whole():
            super().load_state_dict(state)
            check_count("steps", self.steps, 0)

    # A round

    def _first_samples(self) -> None:
        simulator = self.simulator
        if self.explorer == "uniform":
            shape = simulator.states, simulator.actions
            self.explore(torch.full(shape, 1 / shape[1], dtype=torch.float64), self.first)
            return
        for x, steps in zip(
            self._drawn(self.candidates, simulator.generator),
            _shares(self.first, self.candidates),
            strict=True,
        ):
            self.explore(self._policy(x, self.heat * self.temperature), steps)

    def _search(self) -> tuple[float, float]:
        """φ on the model and the norm of its gradient at the best of all points, which `x` is."""
        level = self.level()
        generator = self.simulator.generator
        points = self._drawn(self.count, generator)
        power = torch.rand(self.count, generator=generator, dtype=torch.float64)
        power[0] = 1.0
        cold = self.count // 4
        if self.steps:  # where the last search ended, too, from λ
            points[-self.candidates :] = self._points
            cold = max(cold, self.candidates)
        power[self.count - cold :] = 0.0
        heat = self.heat**power
        begun = 0
        for share in RUNGS:
            last = max(begun + 1, round(share * self.climb))
            values, points = self._descend(level, points, heat, begun, last)
            keep = values.topk(max(self.candidates, len(values) // 4), largest=False).indices
            points, heat, begun = points[keep], torch.ones(len(keep), dtype=torch.float64), last
        at = points.clone().requires_grad_()
        values = level.objective(at, self.temperature)
        (gradient,) = torch.autograd.grad(values.sum(), at)
        order = values.detach().argsort()[: self.candidates]
        self._points = points[order]
        self.x = points[order[0]]
        return float(values[order[0]].detach()), float(gradient[order[0]].norm())

    def _descend(
        self, level: BilevelProblem, points: Tensor, heat: Tensor, begun: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """One rung: where the points end, and φ at λ there, (M,)."""
        cooled = COOLING * RUNGS[0] * self.climb

        def temperatures(step: int) -> Tensor:
            left = 1 - min(step / cooled, 1.0)
            return self.temperature * heat**left

        algorithm = MSoBiRL(level, points, temperature=temperatures, optimiser=torch.optim.Adam)
        for taken in range(begun, last):
            for group in algorithm.optimiser.param_groups:
                group["lr"] = self.learning_rate * 0.1 ** (taken / self.climb)
            outcome = algorithm.step()
        return outcome.objective, algorithm.x.detach()

    # Parts

    def _counts(self) -> TransitionCounts:
        counts = TransitionCounts(self.simulator.states, self.simulator.actions)
        counts.seen, counts.ends = self._seen, self._ends
        return counts

    def _policy(self, x: Tensor, temperature: float) -> Tensor:
        if self.follower is not None:
            return checks.as_floating("follower", self.follower(x, temperature)).detach()
        with torch.no_grad():
            return solve(self.level().lower(x), temperature=temperature).policy

    def _drawn(self, count: int, generator: torch.Generator) -> Tensor:
        points = checks.as_floating("starts", self.starts(count, generator)).detach().clone()
        if points.dim() != 2 or len(points) != count:
            raise ShapeError(
                f"starts returned shape {tuple(points.shape)}", allowed=f"({count}, d)"
            )
        return points

    def _tables(self, name: str, x: Tensor) -> Tensor:
        """Reward or cost at x, (*M, S, A)."""
        function: Callable[[Any], Tensor] = getattr(self.problem, name)
        table = torch.vmap(function)(x) if x.dim() > 1 else function(x)
        shape = (*x.shape[:-1], self.simulator.states, self.simulator.actions)
        if table.shape != shape:
            raise ShapeError(
                f"{name} has shape {tuple(table.shape)}",
                allowed=f"{shape}, those of the simulator",
                fix=f"return a number for each state and action from `{name}`",
            )
        return table


def _shares(whole: int, parts: int) -> list[int]:
    """A whole number in nearly equal parts."""
    return [whole // parts + (part < whole % parts) for part in range(parts)]
