"""A budget on the induced policy: optima known in closed form or by a fine grid, and refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close, assert_same_state
from torch import Tensor

from birl_ext import DenseMDP, occupancy
from birl_ext.bilevel import (
    BilevelProblem,
    Box,
    Budget,
    BudgetReport,
    MSoBiRL,
    Projected,
    ZeroOrder,
)
from birl_ext.errors import DtypeError, GradientError, InfeasibleError, OptionError, ShapeError

FLOAT = torch.float64
TAU = 0.5
SAME = torch.tensor([0.5, 0.5], dtype=FLOAT).expand(2, 2, 2)  # no action matters for what follows
WANT = 1.5


def lower(x: Tensor) -> DenseMDP:
    """Two states, x (*M, 2) a bonus of action 0 in each: π(0|s) = 1/(1 + exp(−x_s/τ))."""
    return DenseMDP(torch.stack([x, torch.zeros_like(x)], -1), SAME, 0.6)


def upper(x: Tensor, solution: Any) -> Tensor:
    return 0.5 * (x - WANT).square().sum(-1)


def often(x: Tensor, solution: Any) -> Tensor:
    return solution.policy[..., 0].sum(-1)


PROBLEM = BilevelProblem(lower, upper)
START = torch.tensor([0.3, -0.4], dtype=FLOAT)


def adam(p: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(p, lr=0.03)


def lbfgs(p: Any) -> torch.optim.Optimizer:
    tight: Any = {"tolerance_grad": 1e-12, "tolerance_change": 1e-15}
    return torch.optim.LBFGS(p, lr=1.0, max_iter=15, line_search_fn="strong_wolfe", **tight)


def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.2)


def gently(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.05)


def rounds(
    budget: Budget, start: Tensor = START, optimiser: Any = lbfgs, count: int = 20, steps: int = 3
) -> tuple[MSoBiRL, BudgetReport]:
    algorithm = MSoBiRL(budget.problem, start, temperature=TAU, optimiser=optimiser)
    for _ in range(count):
        algorithm.run(steps, progress=False)
        report = budget.update(algorithm.x, TAU)
    return algorithm, report


@pytest.mark.parametrize("limit", [0.6, 1.0, 1.7])
def test_the_optimum_and_its_multiplier_are_those_of_the_closed_form(limit: float) -> None:
    algorithm, report = rounds(Budget(PROBLEM, often, limit))
    share = limit / 2
    x = TAU * math.log(share / (1 - share))
    multiplier = (WANT - x) * TAU / (share * (1 - share))
    assert_close(algorithm.x.detach(), np.full(2, x), bound=1e-6, label="x")
    assert_close(report.multiplier, np.array(multiplier), bound=1e-4, label="λ")
    assert bool(report.feasible)
    assert float(report.stationarity) < 1e-5
    assert float(report.complementarity) < 1e-6
    assert_close(report.cost, np.array(limit), bound=1e-6, label="cost")
    assert_close(report.objective, np.array((x - WANT) ** 2), bound=1e-5, label="φ")
    assert 0 <= float(report.policy_error) < 1e-12


def test_a_multiplier_is_what_more_budget_is_worth() -> None:
    def best(limit: float) -> BudgetReport:
        return rounds(Budget(PROBLEM, often, limit))[1]

    gain = (float(best(0.99).objective) - float(best(1.01).objective)) / 0.02
    assert abs(gain - float(best(1.0).multiplier)) < 1e-3


def test_a_budget_that_does_not_bind_changes_nothing() -> None:
    algorithm, report = rounds(Budget(PROBLEM, often, 1.95), count=4)
    assert_close(algorithm.x.detach(), np.full(2, WANT), bound=1e-6, label="x")
    assert float(report.multiplier) == 0
    assert float(report.complementarity) == 0
    assert bool(report.feasible)


def soft(reward: np.ndarray, rows: np.ndarray, discount: float) -> np.ndarray:
    """Policies of (n, 2, 2) rewards by value iteration, without the package."""
    value = np.zeros(reward.shape[:-1])
    for _ in range(200):
        q = reward + discount * np.einsum("sat,nt->nsa", rows, value)
        top = q.max(-1, keepdims=True)
        value = TAU * np.log(np.exp((q - top) / TAU).sum(-1)) + top[..., 0]
    return np.exp((q - value[..., None]) / TAU)


def test_no_point_of_a_fine_grid_within_the_budget_is_better() -> None:
    """Moves matter here, and the cost is how often state 1 is visited."""
    rows = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.1, 0.9]]])
    start, discount, limit = np.array([1.0, 0.0]), 0.8, 0.35

    def model(x: Tensor) -> DenseMDP:
        reward = torch.stack([x, torch.zeros_like(x)], -1)
        return DenseMDP(reward, torch.tensor(rows), discount)

    def visits(x: Tensor, solution: Any) -> Tensor:
        where = occupancy(solution.policy, model(x), initial_distribution=torch.tensor(start))
        return where[..., 1]

    def cheap(x: Tensor, solution: Any) -> Tensor:  # pays action 1 in state 0
        return x.square().sum() * 0.5 - 2.0 * solution.policy[0, 1]

    budget = Budget(BilevelProblem(model, cheap), visits, limit)
    algorithm = MSoBiRL(budget.problem, START, temperature=TAU, optimiser=lbfgs)
    for _ in range(14):
        algorithm.run(2, progress=False)
        report = budget.update(algorithm.x, TAU)
    assert bool(report.feasible)
    assert float(report.multiplier) > 0.1

    axis = np.linspace(-2.0, 2.0, 161)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    policy = soft(np.stack([grid, 0 * grid], -1), rows, discount)
    moves = np.einsum("nsa,sat->nst", policy, rows)
    visited = (1 - discount) * np.linalg.solve(
        np.eye(2) - discount * moves.transpose(0, 2, 1),
        np.broadcast_to(start, (len(grid), 2))[..., None],
    )[..., 0][:, 1]
    value = 0.5 * (grid**2).sum(-1) - 2.0 * policy[:, 0, 1]
    best = np.where(visited <= limit, value, np.inf).min()
    assert float(report.objective) <= best + 1e-6
    assert float(report.objective) >= best - 0.05  # a cell of the grid
    assert value.min() < best - 0.1  # without the budget


def test_several_constraints_and_several_starts() -> None:
    """Each start, and each constraint, has multipliers of its own."""

    def each(x: Tensor, solution: Any) -> Tensor:
        return solution.policy[..., 0]

    limits = torch.tensor([0.3, 0.8], dtype=FLOAT)
    algorithm, report = rounds(Budget(PROBLEM, each, limits))
    wanted = TAU * (limits / (1 - limits)).log()
    assert_close(algorithm.x.detach(), wanted, bound=1e-6, label="x")
    assert report.multiplier.shape == (2,)
    assert report.feasible.shape == ()

    starts = torch.tensor([[0.0, 0.0], [1.0, -1.0], [3.0, 2.0]], dtype=FLOAT)
    for cost, shape in ((often, (3,)), (each, (3, 2))):
        together, found = rounds(
            Budget(PROBLEM, cost, 0.6), starts, count=4, steps=10, optimiser=sgd
        )
        assert found.multiplier.shape == shape
        for number, start in enumerate(starts):
            one, alone = rounds(Budget(PROBLEM, cost, 0.6), start, count=4, steps=10, optimiser=sgd)
            assert_close(together.x[number].detach(), one.x.detach(), bound=1e-10, label="x")
            for name, part in found._asdict().items():
                assert_close(
                    part[number].double(), getattr(alone, name).double(), bound=1e-8, label=name
                )


def test_it_goes_together_with_a_set_and_with_another_algorithm() -> None:
    budget = Budget(PROBLEM, often, 1.0)
    inside = lambda p: Projected(sgd(p), Box(-3.0, torch.tensor([-0.25, 3.0])))  # noqa: E731
    algorithm, _ = rounds(budget, optimiser=inside, count=12, steps=40)
    x = algorithm.x.detach()
    assert abs(float(x[0]) + 0.25) < 1e-12
    assert abs(float(torch.sigmoid(x / TAU).sum()) - 1.0) < 1e-6

    budget = Budget(PROBLEM, often, 1.0, growth=1.05)
    other = ZeroOrder(budget.problem, START, temperature=TAU, optimiser=gently, radius=1e-5)
    for _ in range(8):
        other.run(60, progress=False)
        budget.update(other.x, TAU)
    assert_close(other.x.detach(), np.zeros(2), bound=1e-2, label="x")


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    def step(budget: Budget, algorithm: MSoBiRL) -> None:
        algorithm.run(7, progress=False)
        budget.update(algorithm.x, TAU)

    def pair() -> tuple[Budget, MSoBiRL]:
        budget = Budget(PROBLEM, often, 0.6, penalty=0.1)
        return budget, MSoBiRL(budget.problem, START, temperature=TAU, optimiser=adam)

    whole, first, second = pair(), pair(), pair()
    for _ in range(6):
        step(*whole)
    for _ in range(3):
        step(*first)
    states = [copy.deepcopy(part.state_dict()) for part in first]
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    for _ in range(3):
        step(*second)
    for got, want in zip(second, whole, strict=True):
        assert_same_state(got.state_dict(), want.state_dict())
    penalty = whole[0].penalty
    assert penalty is not None
    assert float(penalty) > 0.1  # it has grown, and that is saved


# What is refused


def test_a_budget_that_nothing_meets_is_infeasible() -> None:
    """c > 1 whatever x is; the multiplier grows round by round until it is named."""
    budget = Budget(PROBLEM, lambda x, s: 1 + often(x, s), 0.9, most=1e4)
    algorithm = MSoBiRL(budget.problem, START, temperature=TAU, optimiser=adam)
    multipliers, before = [0.0], {}

    def round_() -> None:
        before.update(copy.deepcopy(budget.state_dict()))
        algorithm.run(20, progress=False)
        report = budget.update(algorithm.x, TAU)
        multipliers.append(float(report.multiplier))
        assert not report.feasible

    with pytest.raises(InfeasibleError, match=r"cost exceeds the budget by 0\.\d+ after \d+") as e:
        [round_() for _ in range(40)]
    assert len(multipliers) > 5
    assert multipliers == sorted(multipliers)
    assert multipliers[-1] > 100
    assert_same_state(budget.state_dict(), before)
    assert "BIRL-E204" in str(e.value)
    assert "raise `limit`" in str(e.value)


def test_the_penalty_grows_to_most_before_nothing_helps() -> None:
    stuck = Budget(PROBLEM, lambda x, s: 5.0 + 0 * often(x, s), 1.0, growth=10.0, most=5.0)
    assert stuck.update(START, TAU).multiplier == 4.0  # from a penalty of 1
    stuck.update(START, TAU)
    assert stuck.penalty == 5.0
    with pytest.raises(InfeasibleError, match=r"after 2 rounds, .* a penalty of 5"):
        stuck.update(START, TAU)


def test_one_start_that_meets_it_is_enough() -> None:
    """The other is stuck behind a plateau of the cost."""

    def cost(x: Tensor, solution: Any) -> Tensor:
        return torch.where(x[..., 0] > 0, 5.0 + 0 * x.sum(-1), often(x, solution))

    starts = torch.tensor([[9.0, 9.0], [-1.0, -1.0]], dtype=FLOAT)
    problem = BilevelProblem(lower, lambda x, s: 0.0 * often(x, s) + 0.1 * x[..., 1].square())
    budget = Budget(problem, cost, 1.0, most=100.0)
    _, report = rounds(budget, starts, count=12, steps=3, optimiser=sgd)
    assert report.feasible.tolist() == [False, True]
    with pytest.raises(InfeasibleError, match="exceeds the budget by 4"):
        rounds(Budget(problem, cost, 1.0, most=100.0), starts[:1], count=12, steps=3, optimiser=sgd)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"limit": math.nan}, OptionError, "limit is nan"),
        ({"limit": "much"}, OptionError, "limit is 'much'"),
        ({"limit": torch.tensor([math.nan])}, InfeasibleError, "limit is nan"),
        ({"limit": torch.tensor([1])}, DtypeError, "limit has dtype"),
        ({"penalty": 0.0}, OptionError, "penalty is 0"),
        ({"growth": 1.0}, OptionError, "growth is 1"),
        ({"most": 0.5}, OptionError, "most is 0.5"),
        ({"tolerance": -1e-9}, OptionError, "tolerance is -1e-09"),
        ({"cost": 3}, OptionError, "cost is 3"),
        ({"problem": lower}, OptionError, "problem is"),
        ({"cost": lambda x, s: 1.0}, DtypeError, "cost returned a float"),
        ({"cost": lambda x, s: x.long()}, DtypeError, "cost returned a tensor of torch.int64"),
        ({"cost": lambda x, s: s.policy}, ShapeError, r"cost returned shape \(2, 2\)"),
        ({"cost": lambda x, s: x[:0]}, ShapeError, r"cost returned shape \(0,\)"),
        ({"limit": torch.zeros(3)}, ShapeError, r"limit has shape \(3,\), cost \(\)"),
        (
            {"cost": lambda x, s: s.policy[:, 0], "limit": torch.zeros(3)},
            ShapeError,
            r"limit has shape \(3,\), cost \(2,\)",
        ),
        ({"cost": lambda x, s: x.sum() * math.nan}, GradientError, "`cost` returned is nan"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], kind: Any, words: str) -> None:
    given = {"problem": PROBLEM, "cost": often, "limit": 1.0, **options}
    with pytest.raises(kind, match=words):
        rounds(Budget(given.pop("problem"), given.pop("cost"), given.pop("limit"), **given))


def test_a_cost_that_changes_its_shape_is_refused() -> None:
    budget = Budget(PROBLEM, lambda x, s: often(x, s) if calls else x, 1.0)
    calls: list[int] = []
    budget.report(START, TAU)
    calls.append(1)
    with pytest.raises(ShapeError, match=r"cost returned shape \(\) \(allowed: \(2,\), as before"):
        budget.report(START, TAU)


def test_a_state_of_another_kind_is_refused() -> None:
    budget = Budget(PROBLEM, often, 1.0)
    budget.report(START, TAU)
    state = budget.state_dict()
    with pytest.raises(ShapeError, match="stored multiplier"):
        budget.load_state_dict({**state, "multiplier": torch.zeros(2, dtype=FLOAT)})
    with pytest.raises(OptionError, match="stored rounds"):
        budget.load_state_dict({**state, "rounds": 1.5})
    assert_same_state(budget.state_dict(), state)
