"""Configurable Four Rooms: the map, both noise models, known values, gradients, and the job."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import untyped
from closeness import assert_same_state

import birl_ext
from birl_ext.errors import ConfigError, OptionError
from birl_ext.problems.four_rooms import (
    PUBLISHED,
    STEPS,
    FourRooms,
    FourRoomsConfig,
    FourRoomsJob,
    moves,
)

UNIFORM = torch.zeros(105, dtype=torch.float64)
NOTHING = torch.where(torch.arange(105) == 104, 1e3, 0.0).double()
WALLS = (
    [(i, j) for i in range(13) for j in range(13) if i in (0, 12) or j in (0, 12)]
    + [(i, 6) for i in (1, 2, 4, 5, 6, 7, 8, 9, 11)]
    + [(6, j) for j in (1, 3, 4, 5)]
    + [(7, j) for j in (7, 8, 10, 11)]
)
TINY = FourRoomsConfig(starts=8, steps=12)


def value(weights, temperature, kappa):
    return -float(FourRooms(kappa).problem().objective(weights, temperature))


# The map


def test_free_cells_walls_and_doors():
    rooms = FourRooms(1.0)
    everything = {(i, j) for i in range(13) for j in range(13)}
    assert set(rooms.cells) == everything - set(WALLS)
    assert len(rooms.cells) == 104
    assert {(3, 6), (10, 6), (6, 2), (7, 9)} < set(rooms.cells)


def test_start_target_and_goals():
    rooms = FourRooms(1.0)
    assert rooms.cells[rooms.start] == (4, 1)
    assert rooms.cells[rooms.target] == (8, 4)
    assert [rooms.cells[s] for s in rooms.goals.argmax(-1)] == [(1, 9), (11, 11)]
    assert rooms.goals.sum() == 2


def test_actions_are_up_right_down_left():
    assert STEPS == ((-1, 0), (0, 1), (1, 0), (0, -1))


# The transition


@pytest.mark.parametrize(
    ("noise", "intended", "other"), [("planner", 0.56, 0.44 / 3), ("simulator", 0.67, 0.11)]
)
def test_noise(noise, intended, other):
    expected = torch.full((4, 4), other, dtype=torch.float64).fill_diagonal_(intended)
    torch.testing.assert_close(moves(noise), expected, rtol=0, atol=1e-15)
    transition = FourRooms(1.0, noise).mdp.to_dense().transition
    rooms = FourRooms(1.0, noise)
    at = {cell: s for s, cell in enumerate(rooms.cells)}
    middle = transition[0, at[3, 3], 1]  # nothing is in the way
    assert middle[at[3, 4]] == pytest.approx(intended, abs=1e-15)
    assert middle[[at[2, 3], at[4, 3], at[3, 2]]].tolist() == pytest.approx([other] * 3, abs=1e-15)
    corner = transition[0, at[1, 1], 0]  # up and left are blocked
    assert corner[at[1, 1]] == pytest.approx(intended + other, abs=1e-15)


@pytest.mark.parametrize("noise", ["planner", "simulator"])
def test_rows_are_stochastic_except_at_the_goal(noise):
    rooms = FourRooms(1.0, noise)
    sums = rooms.mdp.to_dense().transition.sum(-1)
    expected = (1 - rooms.goals).unsqueeze(-1).expand_as(sums)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-15)


def test_starts_share_the_transition():
    rooms = FourRooms(1.0)
    flat = rooms.lower(torch.zeros(5, 105, dtype=torch.float64)).flatten(0.003)
    assert flat.data.transition.shape[0] == 2
    assert flat.data.reward.shape[:2] == (2, 5)


# Known values, computed independently of this package


@pytest.mark.parametrize(
    ("temperature", "nothing", "uniform"),
    [
        (0.001, 0.410, (0.288, 0.013, -0.262)),
        (0.003, 0.321, (0.200, -0.068, -0.336)),
        (0.005, 0.299, (0.182, -0.057, -0.297)),
    ],
)
def test_known_values(temperature, nothing, uniform):
    for kappa, expected in zip((1.0, 3.0, 5.0), uniform, strict=True):
        assert value(NOTHING, temperature, kappa) == pytest.approx(nothing, abs=5.1e-4)
        assert value(UNIFORM, temperature, kappa) == pytest.approx(expected, abs=5.1e-4)


def test_incentive_spends_the_budget_but_for_the_slack():
    rooms = FourRooms(1.0)
    weights = torch.randn(3, 105, dtype=torch.float64)
    spent = -rooms.incentive(weights).sum(-1)
    slack = torch.softmax(weights, -1)[:, -1]
    torch.testing.assert_close(spent, 0.2 * (1 - slack))


def test_value_by_simulation():
    """The metric against episodes walked by hand in the transition: 4 standard errors."""
    rooms = FourRooms(3.0)
    weights = torch.randn(105, dtype=torch.float64)
    policy = birl_ext.solve(rooms.lower(weights), temperature=0.003).policy
    spent = -float(rooms.incentive(weights).sum())
    walk = torch.einsum("csa,csat->cst", policy, rooms.mdp.to_dense().transition).cumsum(-1)
    episodes, returns = 2000, []
    for context in range(2):
        state, total, discount = torch.full((episodes,), rooms.start), torch.zeros(episodes), 1.0
        walking = torch.ones(episodes, dtype=torch.bool)
        while walking.any():
            arrived = rooms.goals[context, state] > 0
            gain = (state == rooms.target).float() - 3.0 * spent * arrived
            total += discount * gain * walking
            walking &= ~arrived
            chance = torch.rand(episodes, 1, dtype=torch.float64)
            state = torch.searchsorted(walk[context, state], chance).squeeze(-1).clamp(max=103)
            discount *= 0.99
        returns.append(total)
    mean = (returns[0].mean() + returns[1].mean()) / 2
    error = (returns[0].var() + returns[1].var()).sqrt() / 2 / episodes**0.5
    exact = float(rooms.value(weights, policy))
    assert abs(float(mean) - exact) < 4 * float(error)


# Gradient and certificate


@pytest.mark.parametrize("temperature", [0.003, 0.05])
def test_gradient_against_finite_differences(temperature):
    problem = FourRooms(3.0).problem()
    weights = torch.randn(2, 105, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.objective(weights, temperature).sum(), weights)
    direction = torch.randn(2, 105, dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        up = problem.objective(weights + h * direction, temperature)
        down = problem.objective(weights - h * direction, temperature)
    slope = (gradient * direction).sum(-1)
    torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-4, atol=1e-8)


def test_error_bound_covers_the_worst_tilt_of_the_policy():
    """Every log probability moved by up to ε in the direction that helps: covered, if loosely."""
    rooms, tau, epsilon = FourRooms(3.0), 0.01, 1e-3
    weights = torch.randn(105, dtype=torch.float64)
    exact = birl_ext.solve(rooms.lower(weights), temperature=tau)
    logs = exact.log_policy.clone().requires_grad_()
    (slope,) = torch.autograd.grad(rooms.value(weights, logs.softmax(-1)), logs)
    tilted = (exact.log_policy + epsilon / 2 * slope.sign()).log_softmax(-1)
    assert (tilted - exact.log_policy).abs().max() <= epsilon
    info = exact.info.clone()
    info[..., 1] = epsilon * tau / 2
    guess = exact._replace(policy=tilted.exp(), log_policy=tilted, info=info)
    error = float(rooms.value(weights, guess.policy) - rooms.value(weights, exact.policy))
    assert error < rooms.error_bound(weights, guess) < 1000 * error


# The job


def test_published_rows():
    assert len(PUBLISHED) == 9
    assert PUBLISHED[0.003, 3.0] == {"HPGD": 0.73, "AMD": 0.39, "zero order": 0.40}


def test_starts_range_from_flat_to_spread_and_from_cold_to_hot():
    job = FourRoomsJob(FourRoomsConfig(starts=64, spread=6.0, heat=8.0))
    first = job.state_dict()
    scale = first["algorithm"]["x"].reshape(16, 4, 105).std((0, 2))
    assert scale.tolist() == pytest.approx([0.01, 2.0, 4.0, 6.0], rel=0.1)
    assert (first["heat"][:16] == 1).all()
    assert 1 <= first["heat"][16:].min() < 2
    assert 6 < first["heat"].max() <= 8


def test_the_best_quarter_goes_on():
    job = FourRoomsJob(dataclasses.replace(TINY, starts=16))
    counts = [job.step()["starts"] for _ in range(TINY.steps)]
    assert counts == [16] * 3 + [4] * 3 + [1] * 6


@pytest.mark.parametrize("method", ["gradient", "continuation", "starts", "noise", "combined"])
def test_short_run_improves_on_no_incentive(method):
    config = FourRoomsConfig(0.005, 1.0, method=method, starts=16, steps=60)
    job = FourRoomsJob(config)
    while not job.done:
        job.step()
    summary = job.summary()
    assert summary["objective"] > summary["no_incentive"] + 0.1
    assert summary["error_bound"] < 1e-5


def test_combined_beats_one_start_and_the_published_entries():
    job = FourRoomsJob(FourRoomsConfig(starts=64, steps=120))
    best = []
    while not job.done:
        best.append(job.step()["objective"])
    assert best == sorted(best)
    assert job.summary()["objective"] > PUBLISHED[0.003, 3.0]["HPGD"]


def test_unknown_noise_is_refused():
    with pytest.raises(ConfigError, match="noise"):
        FourRooms(1.0, untyped("none"))


@pytest.mark.parametrize("key", ["heat", "algorithm", "values", "best"])
@pytest.mark.parametrize("value", ["absent", "x", None])
def test_a_state_that_a_run_cannot_take_changes_nothing(key: str, value: Any) -> None:
    theirs, ours = (FourRoomsJob(FourRoomsConfig(starts=3, steps=6)) for _ in range(2))
    for job in (theirs, ours, theirs):
        job.step()
    state = {**theirs.state_dict(), key: value}
    if value == "absent":
        del state[key]
    before = ours.state_dict()
    with pytest.raises(OptionError, match="stored"):
        ours.load_state_dict(state)
    assert_same_state(ours.state_dict(), before)
    ours.step()


@pytest.mark.parametrize("rung", [-1, 3, 99, 1.0])
def test_a_rung_that_is_none_is_refused(rung: Any) -> None:
    job = FourRoomsJob(FourRoomsConfig(starts=3, steps=6))
    before = job.state_dict()
    with pytest.raises(OptionError, match="rung"):
        job.load_state_dict({**before, "rung": rung})
    assert_same_state(job.state_dict(), before)


def test_a_price_is_not_negative() -> None:
    assert FourRoomsConfig(kappa=0.0).kappa == 0
    with pytest.raises(ConfigError, match="kappa is -1"):
        FourRoomsConfig(kappa=-1.0)
