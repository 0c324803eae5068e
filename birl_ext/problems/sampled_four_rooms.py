"""Four Rooms for one goal, from samples of the walk alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import BilevelProblem
from birl_ext.bilevel.sampled import SampledProblem
from birl_ext.errors import ConfigError
from birl_ext.functional import evaluate, solve
from birl_ext.model.checks import check_count, check_number
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.problems.four_rooms import DISCOUNT, FLAT, SPREADS, FourRooms, Noise
from birl_ext.simulators.finite import FiniteSimulator
from birl_ext.solution import Solution

__all__ = ["SampledFourRooms", "sampled_four_rooms"]

SPREAD = 6.0
"""Standard deviation of the widest start."""


class SampledFourRooms(NamedTuple):
    """Four Rooms for one goal: as samples, and exactly."""

    problem: SampledProblem
    """Rewards and costs; what it says of paths is that of the simulator."""
    simulator: FiniteSimulator
    """Draws the walks."""
    exact: BilevelProblem
    """φ under the moves that the follower plans with, for weights (105,) or (M, 105)."""
    start: Callable[[int, torch.Generator], Tensor]
    """(M, generator) → weights to start from, (M, 105), from nearly flat to a few cells each."""
    follower: Callable[[Any, Any], Tensor]
    """(w, τ) → the soft-optimal policy of its plan, (104, 4)."""
    temperature: float
    """λ of the problem."""

    def value(self, w: Tensor) -> Tensor:
        """The true upper value −φ at λ, (*M)."""
        return -self.exact.objective(w.detach(), self.temperature).detach()


def sampled_four_rooms(
    temperature: float,
    kappa: float,
    goal: Literal["A", "B"] = "A",
    noise: Noise = "planner",
    moves: Noise = "planner",
    seed: int = 0,
    steps: int = 200,
) -> SampledFourRooms:
    """Four Rooms for one goal.

        φ(w) = −E[ Σ_t γᵗ ( 1[s_t = target] − κ·1[s_t = goal]·Σ|c| ) ],   γ = .99

    The two readings of the published experiments: with ``moves="planner"``, samples and value are
    of the same moves; with ``moves="simulator"``, as published, walks are drawn by the simulator's
    moves, while the follower plans, and the value is measured, with the planner's.

    Args:
        temperature: λ, units of the walker's reward.
        kappa: κ, price of a unit of incentive.
        goal: the walker's.
        noise: moves of the follower's plan and of the exact value.
        moves: moves of the walks that are drawn.
        seed: of the walks.
        steps: H, steps of a path; what lies beyond is cut off the sampled φ.

    Raises:
        ConfigError: no such goal, or no such moves.

    Source: Thoma et al., NeurIPS 2024, section 5; goal A alone: Kudo et al., ICAPS 2026.
    """
    check_number("temperature", temperature, above=True)
    if goal not in ("A", "B"):
        raise ConfigError(f"goal is {goal!r}", allowed="'A' or 'B'")
    check_count("steps", steps)
    rooms = FourRooms(check_number("kappa", kappa), noise)
    context = "AB".index(goal)
    at_goal = rooms.goals[context]
    at_target = torch.zeros_like(at_goal)
    at_target[rooms.target] = 1
    planned = _walk(rooms, context)
    drawn = _walk(FourRooms(kappa, moves), context)

    def reward(w: Tensor) -> Tensor:
        return _of_state(at_goal + rooms.incentive(w) * (1 - at_goal))

    def cost(w: Tensor) -> Tensor:
        spent = -rooms.incentive(w).sum(-1, keepdim=True)
        return -_of_state(at_target - kappa * spent * at_goal)

    def lower(w: Tensor) -> SparseMDP:
        return planned.replace(reward=reward(w), validate="off")

    def upper(w: Tensor, solution: Solution) -> Tensor:
        paid = planned.replace(reward=cost(w), validate="off")
        return evaluate(solution.policy, paid)[..., rooms.start]

    def follower(w: Tensor, tau: Any) -> Tensor:
        with torch.no_grad():
            return solve(lower(w), temperature=tau).policy

    def start(count: int, generator: torch.Generator) -> Tensor:
        weights = torch.randn(count, len(rooms.cells) + 1, generator=generator, dtype=torch.float64)
        spreads = torch.linspace(FLAT, SPREAD, SPREADS, dtype=torch.float64)
        return weights * spreads[torch.arange(count) % SPREADS, None]

    return SampledFourRooms(
        SampledProblem(reward, cost=cost, steps=steps, discount=DISCOUNT),
        FiniteSimulator(_dense(drawn, rooms.start), torch.Generator().manual_seed(seed)),
        BilevelProblem(lower, upper),
        start,
        follower,
        float(temperature),
    )


def _of_state(values: Tensor) -> Tensor:
    """(*M, S) → (*M, S, 4), the same for each move."""
    return values.unsqueeze(-1).expand(*values.shape, 4)


def _walk(rooms: FourRooms, context: int) -> SparseMDP:
    """The walk to one goal, without rewards."""
    mdp = DenseMDP(
        torch.zeros(len(rooms.cells), 4, dtype=torch.float64),
        rooms.mdp.to_dense().transition[context],
        DISCOUNT,
        terminal=rooms.goals[context].bool(),
        validate="off",
    ).to_sparse()
    mdp._set(free_ends=False)  # the entropy of a choice at a goal is meant
    return mdp


def _dense(walk: SparseMDP, start: int) -> DenseMDP:
    first = torch.nn.functional.one_hot(torch.tensor(start), walk.states).double()
    return walk.to_dense().replace(initial_distribution=first)
