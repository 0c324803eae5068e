"""How fast is a batch of small MDPs solved, and its gradient, on two cores?

256 Garnet MDPs of 32 states and 8 actions, four successors each, stored dense: P is 8 MB, so an
MDP fits the first cache and the batch does not. What a bilevel step over a population solves.
"""

from __future__ import annotations

from typing import Any

import competitors
import torch
import workloads
from harness import Case, Problem, measure

TOL = 1e-6
ACCURACY = "ours: certified relative error 1e-6; the others: relative residual 1e-6"
ALLOWED = {"value": 5e-5, "grad_reward": 1e-3, "grad_transition": 1e-3}


def cases(name: str, problem: Problem) -> list[Case]:
    """Forward, and forward with the gradient of Σ w·V* with respect to r and P."""
    truth = workloads.truth(problem)
    forward = competitors.forward(TOL, span_block=4)
    gradient = competitors.gradient(TOL, span_block=4)
    question = "How fast is a batch of small MDPs solved?"
    with_gradient = "How fast is it solved and differentiated with respect to r and P?"
    return [
        Case(f"{name}, forward", question, problem, truth, ALLOWED, forward, ACCURACY),
        Case(f"{name}, gradient", with_gradient, problem, truth, ALLOWED, gradient, ACCURACY),
    ]


def run(small: bool = False) -> list[dict[str, Any]]:
    """The measured cases; `small` shrinks them to a test of the benchmark itself."""
    shape = (3, 6, 2) if small else (256, 32, 8)
    problem = workloads.garnet(*shape, torch.float32, discount=0.95, temperature=0.1)
    return [measure(case) for case in cases("small batch", problem)]
