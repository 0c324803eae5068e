"""A leader that is a policy: the three-state leader–follower toy of BC-HG."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from birl_ext.bilevel import BilevelProblem
from birl_ext.bilevel.leader_policy import leader_policy_mdp
from birl_ext.errors import OptionError
from birl_ext.model.checks import check_count, check_number
from birl_ext.model.mdp import DenseMDP
from birl_ext.solution import Solution

__all__ = ["TEMPERATURE", "leader_toy"]

TEMPERATURE = 0.05
"""The follower's τ, as published."""

STATES, MOVES, ACTIONS = 3, 2, 3
S, A, B = range(STATES)
STAY_OR_S, TO_A, TO_B = range(ACTIONS)


def tables(bonus: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """P(s'|s, b, a), and the rewards of the follower and of the leader, each (3, 2, 3).

    Every move is certain, and what is not named stays where it is and pays nothing. From S the
    follower walks to A or to B, for 1 either way, and the leader earns 1 for A. From B it may walk
    back. In A the leader decides: by its move 1 it sends the follower back to S and fines it 1; by
    its move 0 it lets it choose between S and, for a bonus, B.
    """
    there = torch.arange(STATES).reshape(STATES, 1, 1).repeat(1, MOVES, ACTIONS)
    there[S, :, TO_A], there[S, :, TO_B] = A, B
    there[A, 0, STAY_OR_S], there[A, 0, TO_B], there[A, 1] = S, B, S
    there[B, :, STAY_OR_S] = S
    follower = torch.zeros(STATES, MOVES, ACTIONS, dtype=torch.float64)
    follower[S, :, TO_A:] = 1.0
    follower[A, 0, TO_B], follower[A, 1] = bonus, -1.0
    leader = torch.zeros_like(follower)
    leader[S, :, TO_A] = 1.0
    return torch.eye(STATES, dtype=torch.float64)[there], follower, leader


def leader_toy(
    bonus: float = 1.0,
    *,
    discount: float = 0.99,
    leader_discount: float | None = None,
    horizon: int = 150,
) -> tuple[BilevelProblem, Tensor]:
    """max over the leader's policy of its return of `horizon` steps, from the state S.

        φ(x) = −Σ_{t<horizon} γ_Lᵗ E[r_L(s_t, b_t, a_t)],   b_t ~ softmax(x)[s_t], a_t ~ π*(x)

    The leader wants the follower to walk to A again and again. If it always lets it go on to B,
    a third of the steps does that; if it sends it back too often, the follower avoids A. The best
    it can do is to send it back as often as the follower just bears with.

    Args:
        bonus: what the follower is paid for A → B: 1 (toy R1) or 2 (toy R2).
        discount: γ of the follower, who plans for ever: the layer has no γ = 1.
        leader_discount: γ_L; None: the follower's. 1 is allowed, for the horizon is finite.
        horizon: steps that the leader counts.

    Returns:
        The problem, and the start x = 0 (6,): logits of three states and two moves, a leader that
        draws its moves. Many starts are (M, 6). Solve it at `TEMPERATURE`.

    Raises:
        OptionError: an argument, by name and value.

    Source: Kudo, Tanabe, Wachi and Akimoto (2026); the definition in their published code
    (github.com/akimotolab/BC-HG, DiscreteToy4). There the follower's iteration averages Q over the
    leader's next move before it takes the soft maximum; here the soft maximum is averaged, as for
    a follower who will see that move.
    """
    transition, follower, wanted = tables(check_number("bonus", bonus, least=-torch.inf))
    discount = check_number("discount", discount, below=1.0)
    factor = discount if leader_discount is None else leader_discount
    factor = check_number("leader_discount", factor)
    if factor > 1:
        raise OptionError(f"leader_discount is {factor:g}", allowed="a number in [0, 1]")
    horizon = check_count("horizon", horizon)

    def lower(x: Tensor) -> DenseMDP:
        return leader_policy_mdp(transition, follower, logits(x), discount)

    def upper(x: Tensor, solution: Solution) -> Tensor:
        leader = logits(x).softmax(-1)
        policy = solution.policy.reshape(*leader.shape, ACTIONS)
        moves = torch.einsum("...sba,sbat,...sb->...st", policy, transition, leader)
        paid = torch.einsum("...sba,sba,...sb->...s", policy, wanted, leader)
        value = torch.zeros_like(paid)
        for _ in range(horizon):
            value = paid + factor * (moves @ value.unsqueeze(-1)).squeeze(-1)
        return -value[..., S]

    return BilevelProblem(lower, upper), torch.zeros(STATES * MOVES, dtype=torch.float64)


def logits(x: Any) -> Tensor:
    """x, (*M, 6), as logits (*M, 3, 2)."""
    return torch.unflatten(x, -1, (STATES, MOVES))
