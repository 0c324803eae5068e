"""An upper level that is a sum over steps: every way of giving credit, against the truth."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import birl_ext
from birl_ext.bilevel.score import Critic
from birl_ext.bilevel.trajectory import additive_surrogate, trajectory_surrogate
from birl_ext.errors import OptionError, ShapeError, TemperatureError
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

STATES, ACTIONS, STEPS, DISCOUNT, UPPER, TEMPERATURE = 4, 3, 30, 0.8, 0.9, 0.5


class Problem(NamedTuple):
    """A reward linear in x, a cost of the upper level, the exact gradient over `STEPS` steps."""

    cost: Tensor  # (S, A)
    x: Tensor
    simulator: FiniteSimulator
    follower: FiniteFollower
    score: Critic
    upper: Critic
    exact: Tensor


def successors(features: Tensor, policy: Tensor, transition: Tensor, discount: float) -> Tensor:
    """E[Σ γᵏ ψ], (S, A, F), by a linear solve."""
    moves = discount * torch.einsum("sa,sat->st", policy, transition)
    mean = torch.einsum("sa,saf->sf", policy, features)
    ahead = torch.linalg.solve(torch.eye(len(policy), dtype=torch.float64) - moves, mean)
    return features + discount * torch.einsum("sat,tf->saf", transition, ahead)


def make_problem(seed: int = 0) -> Problem:
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    transition = (1.5 * normal(STATES, ACTIONS, STATES)).softmax(-1)
    features, cost = normal(STATES, ACTIONS, 4), normal(STATES, ACTIONS)
    x, start = normal(4).requires_grad_(), normal(STATES).softmax(-1)
    mdp = birl_ext.DenseMDP(features @ x, transition, DISCOUNT, initial_distribution=start)
    policy = birl_ext.solve(mdp, temperature=TEMPERATURE).policy
    objective, where = torch.zeros((), dtype=torch.float64), start
    for step in range(STEPS):
        objective = objective + UPPER**step * torch.einsum("s,sa,sa->", where, policy, cost)
        where = torch.einsum("s,sa,sat->t", where, policy, transition)
    (exact,) = torch.autograd.grad(objective, x)
    acts = policy.detach()
    ahead = successors(features, acts, transition, DISCOUNT)
    above = successors(cost.unsqueeze(-1), acts, transition, UPPER)
    return Problem(
        cost,
        x,
        FiniteSimulator(mdp, torch.Generator().manual_seed(seed + 1)),
        FiniteFollower(acts),
        Critic(lambda seen: ahead[seen], lambda: x),
        Critic(lambda seen: above[seen], lambda: torch.ones(1, dtype=torch.float64)),
        exact,
    )


def nothing(observation: Tensor, action: Tensor) -> Tensor:
    raise AssertionError("a critic asks for no reward")


def estimates(problem: Problem, paths: Paths) -> dict[str, Tensor]:
    """∇φ̂ from the same paths, by each way of giving credit."""
    score = problem.score.each(nothing, problem.follower, *paths)
    above = problem.upper.each(nothing, problem.follower, *paths)
    cost = problem.cost[paths.observation, paths.action]
    powers = UPPER ** torch.arange(STEPS, dtype=torch.float64)
    given: dict[str, Any] = {"temperature": TEMPERATURE, "discount": UPPER}
    surrogates = {
        "whole path": trajectory_surrogate(
            (powers * cost).sum(-1), score.sum(-1), temperature=TEMPERATURE
        ),
        "to go": additive_surrogate(cost, score, **given),
        "to go, no baseline": additive_surrogate(cost, score, baseline="none", **given),
        "critic": additive_surrogate(cost, score, advantage=above, **given),
    }
    return {
        name: torch.autograd.grad(surrogate, problem.x, retain_graph=True)[0]
        for name, surrogate in surrogates.items()
    }


def test_every_credit_has_the_exact_gradient_as_its_mean() -> None:
    problem = make_problem()
    draws = [
        estimates(problem, problem.simulator.rollout(problem.follower, 400, STEPS))
        for _ in range(60)
    ]
    noise = {}
    for name in draws[0]:
        found = torch.stack([draw[name] for draw in draws])
        error = found.std(0) / len(found) ** 0.5
        assert bool(((found.mean(0) - problem.exact).abs() < 4.5 * error).all()), name
        noise[name] = float(found.var(0).sum() / problem.exact.square().sum())
    assert noise["to go"] < noise["whole path"] / 3
    assert noise["critic"] < noise["to go"] / 3


def test_the_value_is_the_mean_discounted_sum() -> None:
    cost = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    found = additive_surrogate(cost, torch.zeros_like(cost), temperature=1.0, discount=0.5)
    assert float(found) == (1 + 1 + 3 + 2) / 2


def test_what_x_moves_is_credited_with_what_follows_alone() -> None:
    """∇p_t by γᵗ⁺¹ G_{t+1}: the cost of the step itself is past by then."""
    path = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    cost = torch.tensor([[5.0, 7.0, 11.0]], dtype=torch.float64)
    value = additive_surrogate(
        cost, torch.zeros_like(cost), temperature=1.0, discount=0.5, baseline="none", path=path
    )
    (found,) = torch.autograd.grad(value, path)
    assert found.tolist() == [[3.5 + 2.75, 2.75, 0.0]]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"discount": 1.5}, OptionError),
        ({"discount": -0.1}, OptionError),
        ({"temperature": 0.0}, TemperatureError),
        ({"baseline": "mean"}, OptionError),
        ({"score": torch.zeros(2)}, ShapeError),
        ({"cost": torch.zeros(2)}, ShapeError),
        ({"advantage": torch.zeros(2, 1)}, ShapeError),
        ({"path": torch.zeros(3, 2)}, ShapeError),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], kind: type[Exception]) -> None:
    usual: dict[str, Any] = {
        "cost": torch.zeros(2, 2),
        "score": torch.zeros(2, 2),
        "temperature": 1.0,
        "discount": 0.9,
    }
    with pytest.raises(kind):
        additive_surrogate(**{**usual, **given})
