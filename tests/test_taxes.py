"""Tax design: the economy against all 1,250 joint actions and SciPy, gradients, and the jobs."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import birl_ext
from birl_ext.bilevel import BilevelProblem, ZeroOrder
from birl_ext.errors import OptionError
from birl_ext.problems.taxes import TaxEconomy, TaxesConfig, TaxesJob

TINY = TaxesConfig(cells=20, steps=12)
LOGITS = torch.tensor([-0.8, -2.0, 0.5, -1.2], dtype=torch.float64)


def next_assets(assets: Tensor, drift: float, edges: Tensor) -> Tensor:
    """Probability of each cell after one household's step, from the cell centres, (S, S).

    The normal density is integrated over each cell by Gauss's rule with 40 points.
    """
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(40))
    points = assets.unsqueeze(-1) + nodes * (edges[1] - edges[0]) / 2
    mean = (assets + drift).clamp(-100, 100)
    density = torch.exp(-((points - mean[:, None, None]) ** 2) / 50)
    mass = density @ weights
    return mass / mass.sum(-1, keepdim=True)


class AllActions:
    """The economy as the sheet has it: every joint action on its own, written out in loops."""

    def __init__(self, x: Tensor, cells: int) -> None:
        self.edges = torch.linspace(-100, 100, cells + 1, dtype=torch.float64)
        self.assets = (self.edges[1:] + self.edges[:-1]) / 2
        actions = list(itertools.product(range(10), *[range(5)] * 3))
        self.hours = torch.tensor([0.89 * a[0] for a in actions], dtype=torch.float64)
        self.goods = torch.tensor([[1.25 * i for i in a[1:]] for a in actions], dtype=torch.float64)
        net = self.goods / (1 + x[1:])
        utility = torch.stack([a if a <= 0 else (a / 20 + 1).log() for a in self.assets])
        rewards = []
        for alpha in ([0.6, 0.3, 0.1], [0.1, 0.7, 0.2]):
            joy = torch.stack([(n**power) for n, power in zip(net.T, alpha, strict=True)]).prod(0)
            rewards.append(utility.unsqueeze(-1) + joy - 0.1 * self.hours**2)
        drift = (1 - x[0]) * self.hours - self.goods.sum(-1)
        rows = {d: next_assets(self.assets, d, self.edges) for d in set(drift.tolist())}
        transition = torch.stack([rows[d] for d in drift.tolist()], 1)
        self.mdp = birl_ext.DenseMDP(torch.stack(rewards), transition, 0.9)
        revenue = net @ x[1:] + x[0] * self.hours
        self.gain = 15 * net.mean(-1) / 5 + 5 * (1 + revenue).log()


def budget_of(every: AllActions, economy: TaxEconomy) -> Tensor:
    """Which of the 130 actions each of the 1,250 belongs to."""
    pairs = torch.stack([economy.hours, economy.budgets], -1)
    own = torch.stack([every.hours, every.goods.sum(-1)], -1)
    distance = (own.unsqueeze(1) - pairs).abs().sum(-1)
    assert distance.amin(-1).max() < 1e-12
    return distance.argmin(-1)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_economy_is_that_of_all_joint_actions(temperature: float) -> None:
    economy = TaxEconomy(temperature, 12)
    every = AllActions(economy.taxes(LOGITS), 12)
    full = birl_ext.solve(every.mdp, temperature=temperature)
    small = birl_ext.solve(economy.lower(LOGITS), temperature=temperature)
    torch.testing.assert_close(small.value, full.value, rtol=1e-11, atol=1e-9)
    index = budget_of(every, economy).expand(2, 12, -1)
    grouped = torch.zeros(2, 12, 130, dtype=torch.float64).scatter_add(-1, index, full.policy)
    torch.testing.assert_close(small.policy, grouped, rtol=0, atol=1e-9)
    value = birl_ext.evaluate(
        full.policy, every.mdp.replace(reward=every.gain.expand(2, 12, -1), validate="off")
    )
    torch.testing.assert_close(
        economy.welfare(LOGITS, small.policy), value @ economy.start, rtol=1e-9, atol=0
    )
    found = economy.households(LOGITS)
    share = birl_ext.occupancy(
        full.policy, every.mdp, initial_distribution=economy.start.expand(2, -1)
    )
    spent = torch.einsum("cs,csa,ai->ci", share, full.policy, every.goods)
    torch.testing.assert_close(found["share"], share, rtol=0, atol=1e-9)
    torch.testing.assert_close(found["goods"], spent, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        found["hours"], (full.policy * every.hours).sum(-1), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("tax", [0.0, 0.3, 1.7])
def test_the_transition_is_a_truncated_normal(tax: float) -> None:
    """Against SciPy, at the borders, too."""
    stats = pytest.importorskip("scipy.stats")
    economy = TaxEconomy(0.1, 20)
    x = torch.tensor([tax, 0.0, 0.0, 0.0], dtype=torch.float64)
    transition = economy.transition(x)
    assert transition.shape == (20, 130, 20)
    for s, a in [(0, 12), (0, 0), (10, 60), (19, 117), (19, 12)]:
        drift = float((1 - tax) * economy.hours[a] - economy.budgets[a])
        mean = min(max(float(economy.assets[s]) + drift, -100.0), 100.0)
        law = stats.truncnorm((-100 - mean) / 5, (100 - mean) / 5, loc=mean, scale=5)
        expected = torch.from_numpy(law.cdf(economy.edges.numpy())).diff()
        torch.testing.assert_close(transition[s, a], expected, rtol=0, atol=1e-13)


def test_the_start_is_a_narrow_normal() -> None:
    economy = TaxEconomy(0.1, 100)
    assert economy.start.sum() == pytest.approx(1)
    assert economy.start @ economy.assets == pytest.approx(0, abs=1e-12)
    # a cell is 2 wide: its width adds 2²/12 to the variance
    assert economy.start @ economy.assets.square() == pytest.approx(4 + 1 / 3, rel=1e-3)


def test_taxes_lie_between_nothing_and_two() -> None:
    x = torch.tensor([0.001, 0.3, 1.0, 1.999], dtype=torch.float64)
    torch.testing.assert_close(TaxEconomy.taxes(TaxEconomy.logits(x)), x)
    assert (TaxEconomy.taxes(torch.tensor([-1e3, 1e3])) == torch.tensor([0.0, 2.0])).all()


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_gradient_against_finite_differences(temperature: float) -> None:
    """Income moves the transitions, consumption taxes the reward: each of the four on its own."""
    problem = TaxEconomy(temperature, 30).problem()
    w, h = LOGITS.clone().requires_grad_(), 1e-5
    (gradient,) = torch.autograd.grad(problem.objective(w, temperature), w)
    with torch.no_grad():
        slopes = [
            problem.objective(w + h * d, temperature) - problem.objective(w - h * d, temperature)
            for d in torch.eye(4, dtype=torch.float64)
        ]
    expected = torch.stack(slopes) / (2 * h)
    assert (expected.abs() > 1e-3).all()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_the_income_tax_acts_through_the_transition() -> None:
    """With the welfare held at g = a, all of its derivative is that of P and of the policy."""
    economy = TaxEconomy(0.2, 30)

    def mean_assets(w: Tensor) -> Tensor:
        mdp = economy.lower(w)
        policy = birl_ext.solve(mdp, temperature=0.2).policy
        return (birl_ext.occupancy(policy, mdp, validate="off") @ economy.assets).mean()

    w = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_assets(w), w)
    h = torch.tensor([1e-5, 0.0, 0.0, 0.0], dtype=torch.float64)
    slope = (mean_assets(LOGITS + h) - mean_assets(LOGITS - h)) / 2e-5
    assert slope < -0.1  # the more income is taxed, the less is kept
    assert gradient[0] == pytest.approx(float(slope), rel=1e-6)


def test_error_bound_covers_the_worst_tilt_of_the_policy() -> None:
    economy, epsilon = TaxEconomy(0.2, 20), 1e-3
    exact = birl_ext.solve(economy.lower(LOGITS), temperature=0.2)
    logs = exact.log_policy.clone().requires_grad_()
    (slope,) = torch.autograd.grad(economy.welfare(LOGITS, logs.softmax(-1)).mean(), logs)
    tilted = (exact.log_policy + epsilon / 2 * slope.sign()).log_softmax(-1)
    assert (tilted - exact.log_policy).abs().max() <= epsilon
    info = exact.info.clone()
    info[..., 1] = epsilon * 0.2 / 2
    guess = exact._replace(policy=tilted.exp(), log_policy=tilted, info=info)
    both = [economy.welfare(LOGITS, policy).mean() for policy in (guess.policy, exact.policy)]
    assert 0 < both[0] - both[1] < economy.error_bound(LOGITS, guess) < 1000 * (both[0] - both[1])


# Zero order


def test_zero_order_is_the_gradient_in_the_mean() -> None:
    """Of a quadratic, whose smoothed gradient is its gradient: 4 standard errors."""
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mdp = birl_ext.DenseMDP(torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double(), 0.5)
    problem = BilevelProblem(lambda _: mdp, lambda x, _: (weight * x.square()).sum(-1))
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).expand(4000, 3)
    sgd = torch.optim.SGD
    algorithm = ZeroOrder(problem, x, temperature=1.0, optimiser=sgd, radius=0.1)
    objective, found = algorithm.estimate()
    torch.testing.assert_close(objective, (weight * x.square()).sum(-1))
    error = found.std(0) / 4000**0.5
    assert ((found.mean(0) - 2 * weight * x[0]).abs() < 4 * error).all()
    assert error.norm() < 0.05 * (2 * weight * x[0]).norm()
    with pytest.raises(OptionError, match="radius is 0"):
        ZeroOrder(problem, x, temperature=1.0, optimiser=sgd, radius=0.0)


# The job


def finished(config: TaxesConfig) -> tuple[TaxesJob, list[dict[str, float]]]:
    job, history = TaxesJob(config), []
    while not job.done:
        history.append(job.step())
    return job, history


@pytest.mark.parametrize(("method", "gain"), [("gradient", 15), ("zero-order", 5)])
def test_a_short_run_improves_on_the_start(method: Any, gain: float) -> None:
    job, history = finished(dataclasses.replace(TINY, method=method, steps=25))
    assert [history[0][name] for name in history[0] if "tax" in name] == pytest.approx([0.3] * 4)
    summary = job.summary()
    assert summary["objective_at_start"] == pytest.approx(history[0]["objective"])
    assert summary["objective"] > summary["objective_at_start"] + gain
    assert summary["objective"] == pytest.approx(float(summary["welfare"].mean()))
    assert summary["error_bound"] < 1e-4
