"""Four Rooms for one goal or both, from samples of the walk alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

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

Goal = Literal["A", "B", "both"]

SPREAD = 6.0
"""Standard deviation of the widest start."""


class SampledFourRooms(NamedTuple):
    """Four Rooms for one goal or both: as samples, and exactly."""

    problem: SampledProblem
    """Rewards and costs; what it says of paths is that of the simulator."""
    simulator: FiniteSimulator
    """Draws the walks."""
    exact: BilevelProblem
    """φ under the moves that the follower plans with, for weights (105,) or (M, 105)."""
    start: Callable[[int, torch.Generator], Tensor]
    """(M, generator) → weights to start from, (M, 105), from nearly flat to a few cells each."""
    follower: Callable[[Any, Any], Tensor]
    """(w, τ) → the soft-optimal policy of its plan, (104, 4), or (208, 4) of both goals."""
    temperature: float
    """λ of the problem."""

    def value(self, w: Tensor) -> Tensor:
        """The true upper value −φ at λ, (*M)."""
        return -self.exact.objective(w.detach(), self.temperature).detach()


def sampled_four_rooms(
    temperature: float,
    kappa: float,
    goal: Goal = "A",
    noise: Noise = "planner",
    moves: Noise = "planner",
    seed: int = 0,
    steps: int = 200,
) -> SampledFourRooms:
    """Four Rooms for one goal, or for both: then the process has the cells once for each, and a
    path begins at either start alike.

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
    if goal not in get_args(Goal):
        raise ConfigError(f"goal is {goal!r}", allowed="'A', 'B' or 'both'")
    check_count("steps", steps)
    rooms = FourRooms(check_number("kappa", kappa), noise)
    contexts = [0, 1] if goal == "both" else ["AB".index(goal)]
    at_goal = rooms.goals[contexts].flatten()
    first = len(rooms.cells) * torch.arange(len(contexts))
    at_target, begins = torch.zeros_like(at_goal), torch.zeros_like(at_goal)
    at_target[first + rooms.target] = 1
    begins[first + rooms.start] = 1 / len(contexts)
    planned = _walk(rooms, contexts)
    drawn = _walk(FourRooms(kappa, moves), contexts)

    def reward(w: Tensor) -> Tensor:
        paid = rooms.incentive(w)
        return _of_state(at_goal + torch.cat([paid] * len(contexts), -1) * (1 - at_goal))

    def cost(w: Tensor) -> Tensor:
        spent = -rooms.incentive(w).sum(-1, keepdim=True)
        return -_of_state(at_target - kappa * spent * at_goal)

    def lower(w: Tensor) -> SparseMDP:
        return planned.replace(reward=reward(w), validate="off")

    def upper(w: Tensor, solution: Solution) -> Tensor:
        paid = planned.replace(reward=cost(w), validate="off")
        return evaluate(solution.policy, paid) @ begins

    def follower(w: Tensor, tau: Any) -> Tensor:
        with torch.no_grad():
            return solve(lower(w), temperature=tau).policy

    def start(count: int, generator: torch.Generator) -> Tensor:
        weights = torch.randn(count, len(rooms.cells) + 1, generator=generator, dtype=torch.float64)
        spreads = torch.linspace(FLAT, SPREAD, SPREADS, dtype=torch.float64)
        return weights * spreads[torch.arange(count) % SPREADS, None]

    return SampledFourRooms(
        SampledProblem(reward, cost=cost, steps=steps, discount=DISCOUNT),
        FiniteSimulator(
            drawn.to_dense().replace(initial_distribution=begins),
            torch.Generator().manual_seed(seed),
        ),
        BilevelProblem(lower, upper),
        start,
        follower,
        float(temperature),
    )


def _of_state(values: Tensor) -> Tensor:
    """(*M, S) → (*M, S, 4), the same for each move."""
    return values.unsqueeze(-1).expand(*values.shape, 4)


def _walk(rooms: FourRooms, contexts: list[int]) -> SparseMDP:
    """The walk to each of some goals, without rewards."""
    transition = rooms.mdp.to_dense().transition[contexts]
    cells = transition.shape[-1]
    whole = torch.zeros(len(contexts), cells, 4, len(contexts), cells, dtype=torch.float64)
    for k, part in enumerate(transition):
        whole[k, :, :, k] = part
    states = len(contexts) * cells
    mdp = DenseMDP(
        torch.zeros(states, 4, dtype=torch.float64),
        whole.reshape(states, 4, states),
        DISCOUNT,
        terminal=rooms.goals[contexts].flatten().bool(),
        validate="off",
    ).to_sparse()
    mdp._set(free_ends=False)  # the entropy of a choice at a goal is meant
    return mdp
