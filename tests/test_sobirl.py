"""SoBiRL and DRLHF as upper levels of preferences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_score import (
    ACTIONS,
    DISCOUNT,
    STATES,
    TEMPERATURE,
    Problem,
    make_problem,
    simulator_of,
    successor_features,
)
from torch import Tensor

from birl_ext.agents.finite import Paths
from birl_ext.bilevel.bias_meter import exact_pair_objective, measure_estimator
from birl_ext.bilevel.score import Critic, FullHorizon
from birl_ext.bilevel.sobirl import DRLHF, SoBiRL, importance
from birl_ext.errors import OptionError
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.loss import bradley_terry, margins
from birl_ext.preferences.reward_model import RewardNetwork


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def fragments(problem: Problem, path: Paths) -> Fragments:
    observation, action, present = path
    return Fragments(
        observation,
        action,
        problem.truth[observation, action],
        present,
        problem.follower.log_prob(observation, action),
        torch.zeros(len(observation), dtype=torch.int64),
    )


def answered(problem: Problem, simulator: Any, count: int, steps: int = 2) -> Pairs:
    first, second = (
        fragments(problem, simulator.rollout(problem.follower, count, steps)) for _ in range(2)
    )
    share = torch.sigmoid((first.reward - second.reward).sum(-1))
    return Pairs(first, second, torch.bernoulli(share, generator=simulator.generator))


def table_problem() -> tuple[Problem, RewardNetwork, Tensor]:
    """A reward with a parameter per state and action, and the exact hyper-gradient in them."""
    problem = make_problem(3)
    reward = RewardNetwork.table(STATES, ACTIONS).double()
    table = (problem.features @ problem.x).detach().requires_grad_()
    with torch.no_grad():
        reward.body.weight.copy_(table)  # type: ignore[operator, union-attr]

    def loss(s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        gap = (table[s1, a1] - table[s2, a2]).sum(-1)
        share = torch.sigmoid((problem.truth[s1, a1] - problem.truth[s2, a2]).sum(-1))
        return torch.nn.functional.binary_cross_entropy_with_logits(gap, share, reduction="none")

    mdp = problem.mdp.replace(reward=table, validate="off")
    objective = exact_pair_objective(mdp, loss, temperature=TEMPERATURE, steps=2)
    (exact,) = torch.autograd.grad(objective, table)
    return problem, reward, exact.flatten()


def test_the_hypergradient_of_preferences_is_the_exact_one() -> None:
    problem, reward, exact = table_problem()
    simulator = simulator_of(problem)
    score = FullHorizon(simulator, discount=DISCOUNT, steps=30)
    algorithm = SoBiRL(reward, optimiser=still, score=score)

    def estimate() -> Tensor:
        pairs = answered(problem, simulator, 10_000)
        algorithm.step(pairs, problem.follower, temperature=TEMPERATURE)
        (parameter,) = algorithm.parameters
        assert parameter.grad is not None
        return parameter.grad.flatten().clone()

    report = measure_estimator(estimate, exact, repetitions=20)
    assert report.noise < 0.06, report
    assert report.relative_error < 4 * report.noise, report
    without = DRLHF(reward, optimiser=still)
    without.step(answered(problem, simulator, 10_000), problem.follower, temperature=1.0)
    (parameter,) = without.parameters
    assert parameter.grad is not None
    gap = (parameter.grad.flatten() - exact).norm() / exact.norm()
    assert gap > 8 * report.noise, (gap, report)


def test_a_lead_scores_the_steps_before_a_fragment() -> None:
    """With it the estimate is the exact gradient of late fragments, without it what is left out is
    missing, and nothing else.
    """
    problem, reward, _ = table_problem()
    table = (problem.features @ problem.x).detach().requires_grad_()
    mdp = problem.mdp.replace(reward=table, validate="off")
    every = problem._replace(
        features=torch.eye(STATES * ACTIONS).double().view(STATES, ACTIONS, -1)
    )
    ahead = successor_features(every)
    score = Critic(lambda where: ahead[where], lambda: reward.body.weight.flatten())  # type: ignore[operator, union-attr]

    def loss(s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        gap = (table[s1, a1] - table[s2, a2]).sum(-1)
        share = torch.sigmoid((problem.truth[s1, a1] - problem.truth[s2, a2]).sum(-1))
        return torch.nn.functional.binary_cross_entropy_with_logits(gap, share, reduction="none")

    def exact(start: Tensor, offset: int) -> Tensor:
        late = mdp.replace(initial_distribution=start, validate="off")
        objective = exact_pair_objective(
            late, loss, temperature=TEMPERATURE, steps=1, offset=offset
        )
        return torch.autograd.grad(objective, table)[0].flatten()

    start = problem.mdp.initial_distribution
    assert start is not None
    moves = torch.einsum("sa,sat->st", problem.follower.policy, problem.mdp.transition)
    whole, cut_off = exact(start, 2), exact(start @ moves @ moves, 0)
    simulator = simulator_of(problem)

    def estimate(lead: int) -> Tensor:
        first, second = (
            fragments(problem, simulator.rollout(problem.follower, 20_000, 3)) for _ in range(2)
        )
        share = torch.sigmoid((first.reward - second.reward)[:, -1])
        label = torch.bernoulli(share, generator=simulator.generator)
        pairs = Pairs(first, second, label).after(2 - lead)
        algorithm = SoBiRL(reward, optimiser=still, score=score, lead=lead)
        algorithm.step(pairs, problem.follower, temperature=TEMPERATURE)
        (parameter,) = algorithm.parameters
        assert parameter.grad is not None
        return parameter.grad.flatten().clone()

    for lead, truth, other in ((2, whole, cut_off), (0, cut_off, whole)):
        report = measure_estimator(lambda lead=lead: estimate(lead), truth, repetitions=10)
        assert report.noise < 0.05, report
        assert report.relative_error < 4 * report.noise, report
        assert (report.mean - other).norm() / truth.norm() > 8 * report.noise, report
    with pytest.raises(OptionError, match="lead is -1"):
        SoBiRL(reward, optimiser=still, score=score, lead=-1)


def test_drlhf_is_the_gradient_of_the_cross_entropy() -> None:
    problem, reward, _ = table_problem()
    pairs = answered(problem, simulator_of(problem), 50)
    algorithm = DRLHF(reward, optimiser=still, noise=0.1)
    outcome = algorithm.step(pairs, None, temperature=1.0)
    loss = bradley_terry(margins(reward, pairs), pairs.label, 0.1).mean()
    (expected,) = torch.autograd.grad(loss, algorithm.parameters)
    assert algorithm.parameters[0].grad is not None
    torch.testing.assert_close(algorithm.parameters[0].grad, expected)
    assert outcome.loss == pytest.approx(float(loss.detach()))
    assert outcome.indirect_share == 0
    assert outcome.used == 50


def test_weights_undo_an_earlier_policy() -> None:
    """Paths of another policy, weighed, have the same means."""
    problem, _, _ = table_problem()
    simulator = simulator_of(problem)
    then = problem.follower.__class__((problem.follower.policy + 0.3).div(1 + 0.3 * ACTIONS))
    path = simulator.rollout(then, 100_000, 2)
    old = fragments(problem, path)
    old = Fragments(*old[:4], then.log_prob(path.observation, path.action), old.version)
    now = problem.follower.log_prob(path.observation, path.action)
    weight = importance(old, now, stale="weigh", limit=1e6)
    fresh = fragments(problem, simulator.rollout(problem.follower, 100_000, 2))
    ours, theirs = ((part.action == 0).double().sum(-1) for part in (old, fresh))
    error = float((weight * ours).std() + theirs.std()) / 100_000**0.5
    assert abs(float((weight * ours).mean() - theirs.mean())) < 4 * error
    assert abs(float(ours.mean() - theirs.mean())) > 8 * error
    cut = importance(old, now, stale="weigh", limit=1.5)
    assert float(cut.min()) >= 1 / 1.5 - 1e-12
    assert float(cut.max()) <= 1.5 + 1e-12
    rejected = importance(old, now, stale="reject", limit=1.5)
    assert set(rejected.unique().tolist()) == {0.0, 1.0}
    assert bool((rejected == (weight.log().abs() <= math.log(1.5))).all())
    assert bool((importance(old, now, stale="keep", limit=2.0) == 1).all())


def test_padding_has_no_weight() -> None:
    problem, _, _ = table_problem()
    one = fragments(problem, simulator_of(problem).rollout(problem.follower, 4, 2))
    present = one.present.clone()
    present[:, 1] = False
    short = Fragments(*one[:3], present, *one[4:])
    now = one.log_prob.clone()
    now[:, 1] = -50.0
    assert bool((importance(short, now, stale="weigh", limit=9.0) == 1).all())


def test_options_are_named() -> None:
    reward = RewardNetwork.table(2, 2)
    with pytest.raises(OptionError, match="stale is 'old'"):
        SoBiRL(reward, optimiser=still, score=None, stale="old")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="noise is 1"):
        DRLHF(reward, optimiser=still, noise=1)
    problem, _, _ = table_problem()
    one = fragments(problem, simulator_of(problem).rollout(problem.follower, 4, 2))
    with pytest.raises(OptionError, match="limit is 1"):
        importance(one, one.log_prob, stale="weigh", limit=1.0)
