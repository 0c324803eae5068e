"""An environment adapted: barriers in four rooms, which change where the walker's moves lead."""

from __future__ import annotations

import torch
from torch import Tensor

from birl_ext.bilevel import BilevelProblem
from birl_ext.functional import evaluate
from birl_ext.model.mdp import DenseMDP
from birl_ext.problems.four_rooms import DISCOUNT, FourRooms
from birl_ext.solution import Solution

__all__ = ["OPEN", "barriers"]

OPEN = -4.0
"""Weight of a cell that is all but open: b = .018."""


def barriers(price: float = 0.02) -> tuple[BilevelProblem, Tensor]:
    """min over barriers of φ(w) = −J(start): the walker should pass T on its way to A.

        P_w(t|s,a) = P(t|s,a)(1 − b_t) + 1[t = s] Σ_u P(u|s,a) b_u,   b = sigmoid(w)

    A move into a cell fails with probability b of that cell, and the walker stays where it was. J
    is the walker's discounted visits of T, less the price of all barriers; the walker earns 1 at A,
    and answers P_w. w moves the process and nothing else.

    Args:
        price: of a barrier that always holds, units of a visit.

    Returns:
        The problem, and the start w = `OPEN` everywhere, (104,); many starts are (M, 104). At A and
        at T barriers do not hold.
    """
    rooms = FourRooms(kappa=0.0)
    goal = rooms.goals[0]
    plain = rooms.mdp.to_dense().transition[0]
    cells = len(goal)
    start = torch.nn.functional.one_hot(torch.tensor(rooms.start), cells).double()
    target = torch.nn.functional.one_hot(torch.tensor(rooms.target), cells).double()
    free = 1 - goal - target
    base = DenseMDP(
        goal.unsqueeze(-1).expand(cells, 4).clone(), plain, DISCOUNT, terminal=goal.bool()
    )
    base._set(free_ends=False)  # as in four rooms: the entropy of a choice at the goal is meant

    def held(w: Tensor) -> Tensor:
        """b, (*M, S)."""
        return torch.sigmoid(w) * free

    def lower(w: Tensor) -> DenseMDP:
        b = held(w)
        let = plain * (1 - b)[..., None, None, :]
        back = torch.einsum("sat,...t->...sa", plain, b)
        moved = let + torch.diag_embed(back.movedim(-1, -2)).movedim(-3, -2)
        return base.replace(transition=moved, validate="off")

    def upper(w: Tensor, solution: Solution) -> Tensor:
        paid = target.unsqueeze(-1).expand(cells, 4)
        value = evaluate(solution.policy, lower(w).replace(reward=paid, validate="off"))
        return price * held(w).sum(-1) - value @ start

    return BilevelProblem(lower, upper), torch.full((cells,), OPEN, dtype=torch.float64)
