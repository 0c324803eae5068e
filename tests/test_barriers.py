"""Barriers in four rooms: what they do to a move, and the gradient through the process."""

from __future__ import annotations

import math

import torch

from birl_ext.bilevel import BilevelProblem
from birl_ext.model.mdp import DenseMDP
from birl_ext.problems.barriers import OPEN, barriers
from birl_ext.problems.four_rooms import FourRooms


def _process(problem: BilevelProblem, w: torch.Tensor) -> torch.Tensor:
    mdp = problem.model(w)
    assert isinstance(mdp, DenseMDP)
    return mdp.transition


def test_a_barrier_sends_back_what_it_stops() -> None:
    """By a loop over all moves: each keeps 1 − b of its way into a cell, the rest stays."""
    problem, start = barriers()
    rooms = FourRooms(0.0)
    w = torch.randn(len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _process(problem, w)
    plain = rooms.mdp.to_dense().transition[0]
    goal = int(rooms.goals[0].argmax())
    for s in range(len(start)):
        for a in range(4):
            expected = torch.zeros(len(start), dtype=torch.float64)
            for t in range(len(start)):
                b = 0.0 if t in (goal, rooms.target) else float(1 / (1 + torch.exp(-w[t])))
                expected[t] += plain[s, a, t] * (1 - b)
                expected[s] += plain[s, a, t] * b
            torch.testing.assert_close(found[s, a], expected, rtol=0, atol=1e-15)


def test_the_gradient_goes_through_the_process() -> None:
    problem, start = barriers()
    drawn = torch.Generator().manual_seed(1)
    w, direction = (
        torch.randn(2, len(start), generator=drawn, dtype=torch.float64) for _ in range(2)
    )
    w = (w + start).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.objective(w, 0.03).sum(), w)
    step = 1e-4
    with torch.no_grad():
        ahead, behind = (problem.objective(w + s * step * direction, 0.03) for s in (1, -1))
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(slope, (gradient * direction).sum(-1), rtol=1e-6, atol=1e-10)


def test_the_objective_is_visits_less_the_price() -> None:
    """By 3,000 steps of the walker's own policy."""
    problem, start = barriers(price=0.5)
    w = torch.full_like(start, OPEN + 3)
    phi, solution = problem.evaluate(w, 0.03)
    rooms = FourRooms(0.0)
    transition = _process(problem, w)
    here = torch.zeros(len(start), dtype=torch.float64)
    here[rooms.start] = 1
    visits = 0.0
    for step in range(3000):
        visits += 0.99**step * float(here[rooms.target])
        here = torch.einsum("s,sa,sat->t", here, solution.policy, transition)
    paid = 0.5 * (len(start) - 2) / (1 + math.exp(-OPEN - 3))
    assert abs(float(phi) - (paid - visits)) < 1e-9
