"""A follower that holds an entropy: what its temperature adds to SoBiRL's gradient."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import exact_pair_objective, measure_estimator
from birl_ext.bilevel.entropy_target import temperature_surrogate
from birl_ext.bilevel.score import Critic, FullHorizon, OneStep, Score
from birl_ext.bilevel.score_average import ScoreAverage
from birl_ext.bilevel.sobirl import SoBiRLUpdate
from birl_ext.errors import OptionError, ShapeError
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.reward_model import RewardNetwork
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator

STATES, ACTIONS, DISCOUNT, TARGET = 3, 3, 0.7, 0.6


def draw(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


START, HELD = draw(STATES, seed=1).softmax(-1), draw(STATES, seed=2).softmax(-1)
TRUTH = draw(STATES, ACTIONS, seed=3)


def mdp(table: Tensor) -> birl_ext.DenseMDP:
    rows = (1.5 * draw(STATES, ACTIONS, STATES, seed=4)).softmax(-1)
    return birl_ext.DenseMDP(table, rows, DISCOUNT, initial_distribution=START)


def loss(table: Tensor, *steps: Tensor) -> Tensor:
    gap = (table[steps[0], steps[1]] - table[steps[2], steps[3]]).sum(-1)
    share = torch.sigmoid((TRUTH[steps[0], steps[1]] - TRUTH[steps[2], steps[3]]).sum(-1))
    return torch.nn.functional.binary_cross_entropy_with_logits(gap, share, reduction="none")


class Setting:
    """A table of rewards, its follower at the entropy's temperature, and ∇φ with and without
    dτ/dx.
    """

    def __init__(self) -> None:
        self.reward = RewardNetwork.table(STATES, ACTIONS).double()
        (self.weight,) = self.reward.parameters()
        table = draw(STATES, ACTIONS, seed=5)
        with torch.no_grad():
            self.weight.copy_(table.view_as(self.weight))
        table.requires_grad_()
        tau = birl_ext.temperature_for(TARGET, mdp(table), weight=HELD)

        def gradient(temperature: Any) -> Tensor:
            objective = exact_pair_objective(
                mdp(table), lambda *steps: loss(table, *steps), temperature=temperature, steps=2
            )
            return torch.autograd.grad(objective, table, retain_graph=True)[0].flatten()

        self.temperature = float(tau.detach())
        self.whole, self.at_fixed = gradient(tau), gradient(self.temperature)
        (self.tau_slope,) = torch.autograd.grad(tau, table)
        solution = birl_ext.solve(mdp(table.detach()), temperature=self.temperature)
        self.follower = FiniteFollower(solution.policy)
        self.simulator = FiniteSimulator(mdp(table.detach()), torch.Generator().manual_seed(0))

    def full_horizon(self) -> FullHorizon:
        return FullHorizon(self.simulator, discount=DISCOUNT, steps=20)

    def pairs(self, count: int) -> Pairs:
        def side() -> Fragments:
            where, chosen, present = self.simulator.rollout(self.follower, count, 2)
            return Fragments(
                where,
                chosen,
                TRUTH[where, chosen],
                present,
                self.follower.log_prob(where, chosen),
                torch.zeros(count, dtype=torch.int64),
            )

        first, second = side(), side()
        share = torch.sigmoid((first.reward - second.reward).sum(-1))
        return Pairs(first, second, torch.bernoulli(share, generator=self.simulator.generator))

    def held(self, count: int) -> Tensor:
        return torch.multinomial(HELD, count, replacement=True, generator=self.simulator.generator)


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def algorithm(setting: Setting, score: Score) -> SoBiRLUpdate:
    return SoBiRLUpdate(setting.reward, optimiser=still, score=score, average=0.0)


def test_the_slope_of_the_temperature_is_the_exact_one() -> None:
    setting = Setting()

    def estimate() -> Tensor:
        surrogate = temperature_surrogate(
            setting.full_horizon(),
            setting.reward,
            setting.follower,
            setting.held(20_000),
            temperature=setting.temperature,
        )
        assert surrogate is not None
        assert not bool(surrogate.detach().any())
        return torch.autograd.grad(surrogate.mean(), setting.weight)[0].flatten()

    report = measure_estimator(estimate, setting.tau_slope.flatten(), repetitions=10)
    assert report.noise < 0.02, report
    assert report.relative_error < 4 * report.noise + 0.005, report


@pytest.mark.parametrize("held", [True, False])
def test_a_step_has_the_temperatures_part_where_an_entropy_is_held(held: bool) -> None:
    setting = Setting()
    learner = algorithm(setting, setting.full_horizon())
    apart = (setting.whole - setting.at_fixed).norm() / setting.whole.norm()
    assert apart > 0.1

    def estimate() -> Tensor:
        learner.step(
            setting.pairs(10_000),
            setting.follower,
            temperature=setting.temperature,
            held=setting.held(4000) if held else None,
        )
        assert setting.weight.grad is not None
        return setting.weight.grad.flatten().clone()

    want = setting.whole if held else setting.at_fixed
    report = measure_estimator(estimate, want, repetitions=20)
    assert report.noise < apart / 6, report
    assert report.relative_error < 4 * report.noise + 0.005, report


@pytest.mark.parametrize(
    ("count", "held", "times"),
    [(41, 0, 400), (41, 101, 400), (2000, 20, 150)],  # the last: most noise is that of dτ/dx
)
def test_the_noise_that_a_step_measures_is_the_spread_of_its_gradients(
    count: int, held: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, seen = Setting(), []
    score = setting.full_horizon() if times > 200 else OneStep(ACTIONS)
    learner = SoBiRLUpdate(setting.reward, optimiser=still, score=score, average=0.5)

    class Watched(ScoreAverage):
        def after(self, gradient: Tensor, variance: float, **more: Any) -> ScoreAverage:
            seen.append((gradient.clone(), variance))
            return self

    watched = Watched(0, 0.5, setting.weight.detach())
    watched.mean = torch.zeros_like(setting.weight.detach().flatten())
    monkeypatch.setattr(learner, "_average", watched)
    for _ in range(times):
        pairs, states = setting.pairs(count), setting.held(held) if held else None
        learner.step(pairs, setting.follower, temperature=setting.temperature, held=states)
    gradients, variances = zip(*seen, strict=True)
    spread = float(torch.stack(gradients).var(0).sum())
    assert abs(sum(variances) / len(variances) - spread) < 0.15 * spread


def test_where_no_entropy_can_be_held_is_named() -> None:
    setting = Setting()
    pairs, tau = setting.pairs(20), setting.temperature
    critic = Critic(lambda where: torch.zeros(len(where), ACTIONS, 9), setting.weight.flatten)
    before = setting.weight.detach().clone()
    with pytest.raises(OptionError, match="asked for by `held`"):
        algorithm(setting, critic).step(
            pairs, setting.follower, temperature=tau, held=setting.held(5)
        )
    learner = algorithm(setting, OneStep(ACTIONS))
    with pytest.raises(ShapeError, match=r"states of the entropy have shape \(0,\)"):
        learner.step(pairs, setting.follower, temperature=tau, held=setting.held(5)[:0])
    uniform = FiniteFollower(torch.full((STATES, ACTIONS), 1 / ACTIONS))
    assert torch.equal(setting.weight.detach(), before)
    with pytest.warns(UserWarning, match="slope of the entropy in log τ is lost in its noise"):
        learner.step(pairs, uniform, temperature=tau, held=setting.held(5))


def test_a_temperature_whose_slope_is_noise_counts_as_fixed() -> None:
    setting = Setting()
    pairs, tau = setting.pairs(50), setting.temperature
    uniform = FiniteFollower(torch.full((STATES, ACTIONS), 1 / ACTIONS))
    gradients = []
    for held in (None, setting.held(100)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            algorithm(setting, OneStep(ACTIONS)).step(pairs, uniform, temperature=tau, held=held)
        assert setting.weight.grad is not None
        gradients.append(setting.weight.grad.clone())
    assert torch.equal(*gradients)
