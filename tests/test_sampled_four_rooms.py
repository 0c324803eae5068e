"""Four Rooms for one goal: the samples are those of the walk, and the value that of Four Rooms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor

import birl_ext
from birl_ext.errors import BirlError, ConfigError, OptionError
from birl_ext.problems.four_rooms import FourRooms, moves
from birl_ext.problems.sampled_four_rooms import SampledFourRooms, sampled_four_rooms
from birl_ext.simulators.finite import FiniteFollower

LAMBDA, KAPPA = 0.02, 5.0


def of_one_goal(rooms: FourRooms, w: Tensor, policy: Tensor) -> Tensor:
    """The upper value of both goals at the start, (2,), by a dense linear solve of its own."""
    spent = 0.2 * torch.softmax(w, -1)[:-1].sum()
    gained = torch.zeros(2, 104, dtype=torch.float64)
    gained[:, rooms.target] = 1
    gained = gained - rooms.kappa * spent * rooms.goals
    found = []
    for goal in range(2):
        rows = torch.einsum("ab,sbt->sat", moves(rooms.noise), rooms._landing())
        rows = rows * (1 - rooms.goals[goal])[:, None, None]
        walk = torch.einsum("sa,sat->st", policy[goal], rows)
        value = torch.linalg.solve(torch.eye(104).double() - 0.99 * walk, gained[goal])
        found.append(value[rooms.start])
    return torch.stack(found)


@pytest.mark.parametrize("noise", ["planner", "simulator"])
@pytest.mark.parametrize("goal", ["A", "B"])
def test_the_exact_value_is_that_of_four_rooms_for_its_goal(goal: Any, noise: Any) -> None:
    rooms = FourRooms(KAPPA, noise)
    found = sampled_four_rooms(LAMBDA, KAPPA, goal, noise=noise)
    points = found.start(4, torch.Generator().manual_seed(0))
    values = found.value(points)
    for w, value in zip(points, values, strict=True):
        both = birl_ext.solve(rooms.lower(w), temperature=LAMBDA)
        wanted = of_one_goal(rooms, w, both.policy)["AB".index(goal)]
        assert_close(value, wanted, bound=1e-10, label="value")
        own = found.follower(w, LAMBDA)
        assert_close(own, both.policy["AB".index(goal)], bound=1e-9, label="π")
    there: Any = {"A": "B", "B": "A"}[goal]
    other = sampled_four_rooms(LAMBDA, KAPPA, there, noise=noise)
    half = (values + other.value(points)) / 2
    wanted = -rooms.problem().objective(points, LAMBDA)
    assert_close(half, wanted, bound=1e-10, label="mean over the goals")


def mean_of_paths(found: SampledFourRooms, w: Tensor, count: int) -> tuple[float, float]:
    """The mean of the sampled costs, and its standard error."""
    follower = FiniteFollower(found.follower(w, LAMBDA))
    problem = found.problem
    assert problem.cost is not None
    powers = problem.discount ** torch.arange(problem.steps).double()
    sums = []
    for _ in range(count // 10_000):
        path = found.simulator.rollout(follower, 10_000, problem.steps)
        sums.append((problem.cost(w)[path.observation, path.action] * path.present) @ powers)
    costs = torch.cat(sums)
    return float(costs.mean()), float(costs.std()) / count**0.5


@pytest.mark.slow
@pytest.mark.parametrize("played", ["planner", "simulator"])
@pytest.mark.parametrize("goal", ["A", "B"])
def test_sampled_costs_have_the_exact_mean(goal: Any, played: Any) -> None:
    check_mean(goal, played, 200_000)


@pytest.mark.parametrize("played", ["planner", "simulator"])
def test_sampled_costs_have_nearly_the_exact_mean(played: Any) -> None:
    check_mean("A", played, 10_000)


def check_mean(goal: Any, played: Any, count: int) -> None:
    """As published, the follower plans with other moves than those that are drawn."""
    found = sampled_four_rooms(LAMBDA, KAPPA, goal, moves=played, steps=600)
    w = found.start(4, torch.Generator().manual_seed(1))[2]
    mean, error = mean_of_paths(found, w, count)
    policy = found.follower(w, LAMBDA).expand(2, -1, -1)
    wanted = -of_one_goal(FourRooms(KAPPA, played), w, policy)["AB".index(goal)]
    assert error < 3 / count**0.5
    assert abs(mean - float(wanted)) < 4 * error
    if played == "planner":
        assert abs(mean + float(found.value(w))) < 4 * error


def test_the_two_readings_differ_in_the_walks_alone() -> None:
    same, published = (sampled_four_rooms(LAMBDA, KAPPA, moves=m) for m in ("planner", "simulator"))
    w = same.start(1, torch.Generator().manual_seed(2))
    assert torch.equal(same.value(w), published.value(w))
    assert torch.equal(same.follower(w[0], 0.1), published.follower(w[0], 0.1))
    walks = [found.simulator._mdp.transition for found in (same, published)]
    assert float((walks[0] - walks[1]).abs().max()) == pytest.approx(0.11)


def test_starts_reach_from_flat_to_wide() -> None:
    points = sampled_four_rooms(LAMBDA, KAPPA).start(400, torch.Generator().manual_seed(0))
    spreads = points.view(100, 4, 105).std((0, 2))
    assert_close(spreads, torch.linspace(0.01, 6, 4).double(), bound=0.2, label="spread")


def test_what_is_refused() -> None:
    for wrong, what in (
        ({"goal": "C"}, "goal is 'C'"),
        ({"noise": "none"}, "noise is 'none'"),
        ({"moves": "none"}, "noise is 'none'"),
    ):
        with pytest.raises(ConfigError, match=what):
            sampled_four_rooms(LAMBDA, KAPPA, **wrong)  # type: ignore[arg-type]
    for values, name in (((0.0, 5.0), "temperature"), ((0.1, -1.0), "kappa")):
        with pytest.raises(BirlError, match=name):
            sampled_four_rooms(*values)
    with pytest.raises(OptionError, match="steps is 0"):
        sampled_four_rooms(LAMBDA, KAPPA, steps=0)
