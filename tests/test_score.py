"""(M16) against the exact hyper-gradient: every estimator has its stated bias, and no other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from cases import untyped
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import exact_pair_objective, measure_estimator
from birl_ext.bilevel.score import Critic, FullHorizon, OneStep, Score
from birl_ext.bilevel.trajectory import trajectory_surrogate
from birl_ext.errors import OptionError, ShapeError
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator

STATES, ACTIONS, STEPS, DISCOUNT, TEMPERATURE = 3, 2, 2, 0.8, 0.5


class Problem(NamedTuple):
    """A reward linear in x, a hidden true reward, and the exact hyper-gradient of the pair loss."""

    features: Tensor  # (S, A, F)
    x: Tensor
    mdp: birl_ext.DenseMDP
    follower: FiniteFollower
    truth: Tensor  # (S, A), the teacher's reward
    exact: Tensor

    def reward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.features[observation, action] @ self.x


def pair_loss(table: Tensor, truth: Tensor, first: Any, second: Any) -> Tensor:
    """Cross entropy of the Bradley–Terry model against a Boltzmann teacher, in expectation over its
    answer.
    """
    margin = table[first].sum(-1) - table[second].sum(-1)
    share = torch.sigmoid(truth[first].sum(-1) - truth[second].sum(-1))
    return torch.nn.functional.binary_cross_entropy_with_logits(margin, share, reduction="none")


def make_problem(seed: int = 0, *, state_only: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    transition = (1.5 * normal(STATES, ACTIONS, STATES)).softmax(-1)
    features = normal(STATES, 1 if state_only else ACTIONS, 4).expand(-1, ACTIONS, -1)
    truth = 3 * normal(STATES, ACTIONS)
    start = normal(STATES).softmax(-1)
    x = normal(4).requires_grad_()
    base = birl_ext.DenseMDP(
        torch.zeros(STATES, ACTIONS, dtype=torch.float64),
        transition,
        DISCOUNT,
        initial_distribution=start,
    )
    mdp = base.replace(reward=features @ x, validate="off")

    def loss(s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        return pair_loss(features @ x, truth, (s1, a1), (s2, a2))

    objective = exact_pair_objective(mdp, loss, temperature=TEMPERATURE, steps=STEPS)
    (exact,) = torch.autograd.grad(objective, x)
    policy = birl_ext.solve(mdp, temperature=TEMPERATURE).policy
    return Problem(features, x, base, FiniteFollower(policy), truth, exact)


def make_score(name: str, problem: Problem, simulator: FiniteSimulator, steps: int = 25) -> Score:
    if name == "one step":
        return OneStep(ACTIONS)
    if name == "one step, sampled":
        return OneStep(samples=2, generator=simulator.generator)
    if name == "full horizon":
        return FullHorizon(simulator, discount=DISCOUNT, steps=steps)
    return Critic(lambda observation: successor_features(problem)[observation], lambda: problem.x)


def successor_features(problem: Problem) -> Tensor:
    """M(s, a), (S, A, F), by a linear solve."""
    policy, transition = problem.follower.policy, problem.mdp.transition
    moves = DISCOUNT * torch.einsum("sa,sat->st", policy, transition)
    expected = torch.einsum("sa,saf->sf", policy, problem.features)
    ahead = torch.linalg.solve(torch.eye(STATES, dtype=torch.float64) - moves, expected)
    return problem.features + DISCOUNT * torch.einsum("sat,tf->saf", transition, ahead)


def estimates(
    problem: Problem,
    simulator: FiniteSimulator,
    score: Score,
    count: int,
    baselines: Sequence[str] = ("others",),
) -> list[Tensor]:
    """∇φ̂ from the same `count` pairs, with each baseline."""
    paths = [simulator.rollout(problem.follower, count, STEPS) for _ in range(2)]
    table = problem.features @ problem.x
    first, second = ((path.observation, path.action) for path in paths)
    loss = pair_loss(table, problem.truth, first, second)
    scores = sum(score(problem.reward, problem.follower, *path) for path in paths)
    assert isinstance(scores, Tensor)
    found: list[Any] = []
    for baseline in baselines:
        surrogate = trajectory_surrogate(
            loss, scores, temperature=TEMPERATURE, baseline=untyped(baseline)
        )
        found += torch.autograd.grad(surrogate, problem.x, retain_graph=True)
    return found


def estimate(problem: Problem, simulator: FiniteSimulator, score: Score, count: int) -> Tensor:
    """∇φ̂ from `count` pairs."""
    return estimates(problem, simulator, score, count)[0]


def simulator_of(problem: Problem, seed: int = 0) -> FiniteSimulator:
    return FiniteSimulator(problem.mdp, torch.Generator().manual_seed(seed))


BASELINES = ("others", "none")


@pytest.mark.parametrize("name", ["full horizon", "critic"])
def test_estimators_without_bias_agree_with_the_exact_gradient(name: str) -> None:
    problem = make_problem()
    simulator = simulator_of(problem)
    score = make_score(name, problem, simulator)
    found = [estimates(problem, simulator, score, 10_000, BASELINES) for _ in range(30)]
    for gradients in zip(*found, strict=True):
        report = measure_estimator(iter(gradients).__next__, problem.exact, repetitions=30)
        assert report.noise < 0.07, report
        assert report.relative_error < 4 * report.noise, report
        assert report.cosine > 0.999, report


@pytest.mark.parametrize("name", ["one step", "one step, sampled"])
def test_one_step_is_off_by_what_it_leaves_out_and_no_more(name: str) -> None:
    problem = make_problem()
    simulator = simulator_of(problem)
    report = measure_estimator(
        lambda: estimate(problem, simulator, make_score(name, problem, simulator), 10_000),
        problem.exact,
        repetitions=30,
    )
    assert report.relative_error > 10 * report.noise, report
    expected = one_step_limit(problem)
    gap = (report.mean - expected).norm() / problem.exact.norm()
    assert gap < 4 * report.noise, report


def one_step_limit(problem: Problem) -> Tensor:
    """What the one-step estimator's mean is, by summing over all paths: the score of the soft
    policy of r alone, times τ/τ, in place of that of Q.
    """
    log_policy = problem.follower.policy.log()
    table = problem.features @ problem.x
    tilt = (table - table.detach()) / TEMPERATURE

    def policy_of(_: Tensor) -> Tensor:
        return (log_policy + tilt).softmax(-1)

    return enumerated_gradient(problem, policy_of(problem.x))


def enumerated_gradient(problem: Problem, policy: Tensor) -> Tensor:
    """∇ of E[l] where the paths are drawn from `policy`, which depends on x somehow."""
    import itertools

    every = torch.tensor(list(itertools.product(range(STATES), range(ACTIONS), repeat=STEPS)))
    every = every.view(-1, STEPS, 2)
    where, chosen = every[..., 0], every[..., 1]
    start = problem.mdp.initial_distribution
    assert start is not None
    share = start[where[:, 0]] * policy[where, chosen].prod(-1)
    for step in range(STEPS - 1):
        share = share * problem.mdp.transition[where[:, step], chosen[:, step], where[:, step + 1]]
    table = problem.features @ problem.x
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(every)):
        others = (where[i : i + 1].expand_as(where), chosen[i : i + 1].expand_as(chosen))
        loss = pair_loss(table, problem.truth, others, (where, chosen))
        total = total + share[i] * (share * loss).sum()
    (gradient,) = torch.autograd.grad(total, problem.x)
    return gradient


def test_the_truth_is_the_sum_over_paths_and_its_finite_difference() -> None:
    problem = make_problem()
    mdp = problem.mdp.replace(reward=problem.features @ problem.x, validate="off")
    policy = birl_ext.solve(mdp, temperature=TEMPERATURE).policy
    torch.testing.assert_close(enumerated_gradient(problem, policy), problem.exact)


def test_the_truth_is_refused_where_it_would_be_wrong() -> None:
    problem = make_problem()
    ends = torch.tensor([False, False, True])

    def objective(mdp: birl_ext.DenseMDP) -> Tensor:
        return exact_pair_objective(mdp, lambda *_: torch.ones(1), temperature=1.0, steps=1)

    with pytest.raises(OptionError, match="the process ends in some rows"):
        objective(problem.mdp.replace(terminal=ends))
    many = problem.mdp.replace(reward=problem.mdp.reward.expand(2, -1, -1))
    with pytest.raises(ShapeError, match=r"batch axes \(2,\)"):
        objective(many)


def test_what_happens_before_a_fragment_is_part_of_the_truth() -> None:
    """An offset is a longer path whose first steps do not count."""
    problem = make_problem(1)
    mdp = problem.mdp.replace(reward=problem.features @ problem.x, validate="off")

    def loss(s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        table = problem.features @ problem.x
        return pair_loss(table, problem.truth, (s1, a1), (s2, a2))

    def late(s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        return loss(s1[:, 2:], a1[:, 2:], s2[:, 2:], a2[:, 2:])

    found, expected = (
        exact_pair_objective(mdp, of, temperature=TEMPERATURE, **untyped(steps))
        for of, steps in ((loss, {"offset": 2, "steps": 1}), (late, {"steps": 3}))
    )
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad(phi, problem.x, retain_graph=True)[0] for phi in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)
    policy = birl_ext.solve(mdp, temperature=TEMPERATURE).policy
    given = exact_pair_objective(mdp, loss, temperature=TEMPERATURE, steps=2, policy=policy)
    (ours,) = torch.autograd.grad(given, problem.x, retain_graph=True)
    torch.testing.assert_close(ours, problem.exact)
    fixed = policy.detach()
    given = exact_pair_objective(mdp, loss, temperature=TEMPERATURE, steps=2, policy=fixed)
    (ours,) = torch.autograd.grad(given, problem.x)
    torch.testing.assert_close(ours, enumerated_gradient(problem, fixed))
    with pytest.raises(OptionError, match="offset is -1"):
        exact_pair_objective(mdp, loss, temperature=TEMPERATURE, steps=1, offset=-1)


def test_one_step_says_nothing_of_a_reward_of_states_alone() -> None:
    problem = make_problem(state_only=True)
    simulator = simulator_of(problem)
    path = simulator.rollout(problem.follower, 500, STEPS)
    score = OneStep(ACTIONS)(problem.reward, problem.follower, *path)
    (gradient,) = torch.autograd.grad(score.square().sum() + score.sum(), problem.x)
    assert gradient.abs().max() < 1e-9
    full = FullHorizon(simulator, discount=DISCOUNT, steps=30)
    score = full(problem.reward, problem.follower, *path)
    (gradient,) = torch.autograd.grad(score.square().sum(), problem.x)
    assert gradient.abs().max() > 1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_truncation_biases_by_no_more_than_stated(steps: int) -> None:
    """2γᴷ sup‖∇r‖/(1 − γ) per step; one step of it is noticed."""
    problem = make_problem()
    simulator = simulator_of(problem)
    count = 100_000
    where = torch.zeros(count, 1, dtype=torch.int64)
    chosen = torch.ones_like(where)
    present = torch.ones_like(where, dtype=torch.bool)
    score = make_score("full horizon", problem, simulator, steps)
    (found,) = torch.autograd.grad(
        score(problem.reward, problem.follower, where, chosen, present).mean(), problem.x
    )
    features = successor_features(problem)
    mean = (problem.follower.policy[0].unsqueeze(-1) * features[0]).sum(0)
    exact = features[0, 1] - mean
    largest = problem.features.norm(dim=-1).max()
    allowed = 2 * DISCOUNT**steps * largest / (1 - DISCOUNT)
    noise = 2 * largest / (1 - DISCOUNT) / math.sqrt(count)
    assert (found - exact).norm() <= allowed + 4 * noise
    if steps == 1:
        assert (found - exact).norm() > 4 * noise


def test_a_step_that_the_policy_would_repeat_is_not_noise() -> None:
    """A policy that always takes one action has no score, however random the process."""
    problem = make_problem()
    sure = FiniteFollower(torch.tensor([[1.0, 0.0]] * STATES))
    score = FullHorizon(simulator_of(problem), discount=DISCOUNT, steps=20)
    where = torch.arange(STATES).repeat(10).unsqueeze(0)
    present = torch.ones_like(where, dtype=torch.bool)
    for action, quiet in ((0, True), (1, False)):
        found = score(problem.reward, sure, where, torch.full_like(where, action), present)
        (gradient,) = torch.autograd.grad(found.sum(), problem.x)
        assert bool((gradient == 0).all()) == quiet


def test_error_falls_with_the_root_of_the_samples() -> None:
    problem = make_problem()
    simulator = simulator_of(problem)
    score = make_score("full horizon", problem, simulator, steps=20)  # the noise hides the rest
    counts, errors = [100, 400, 1600, 6400], []
    for count in counts:
        found = [estimate(problem, simulator, score, count) for _ in range(40)]
        squares = [(one - problem.exact).square().sum() for one in found]
        errors.append(math.log(float(torch.stack(squares).mean().sqrt())))
    places = torch.tensor([math.log(count) for count in counts])
    heights = torch.tensor(errors)
    centred = places - places.mean()
    slope = float((centred * heights).sum() / centred.square().sum())
    assert abs(slope + 0.5) < 0.08, (slope, errors)


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_baseline_is_the_mean_of_the_others(spread: float, dtype: torch.dtype) -> None:
    """One by one, in exact arithmetic; also where one weight is nearly all there is."""
    draws = torch.Generator().manual_seed(2)
    loss = torch.rand(7, generator=draws).to(dtype)
    weight = (spread * torch.randn(7, generator=draws)).exp().to(dtype)
    if spread > 1:
        weight[3], weight[5] = 1e8, 0.0
    score = torch.zeros(7, dtype=dtype, requires_grad=True)
    surrogate = trajectory_surrogate(loss, score, temperature=1.0, weight=weight)
    (found,) = torch.autograd.grad(surrogate, score)
    exact, w = ([Fraction(float(number)) for number in given] for given in (loss, weight))
    for i in range(7):
        others = [j for j in range(7) if j != i]
        mean = sum(w[j] * exact[j] for j in others) / sum(w[j] for j in others)
        expected = float(w[i] * (exact[i] - mean)) / 7
        scale = float(w[i]) / 7
        assert abs(float(found[i]) - expected) <= 8 * torch.finfo(dtype).eps * scale


def test_weight_that_a_sample_has_alone_leaves_it_without_baseline() -> None:
    score = torch.zeros(2, requires_grad=True)
    loss, weight = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.0])
    surrogate = trajectory_surrogate(loss, score, temperature=1.0, weight=weight)
    assert torch.autograd.grad(surrogate, score)[0].tolist() == [0.75, 0.0]


def test_a_baseline_lowers_the_variance() -> None:
    problem = make_problem()
    simulator = simulator_of(problem)
    score = make_score("full horizon", problem, simulator, steps=20)
    found = [estimates(problem, simulator, score, 100, BASELINES) for _ in range(300)]
    variance = {}
    for baseline, gradients in zip(BASELINES, zip(*found, strict=True), strict=True):
        report = measure_estimator(iter(gradients).__next__, problem.exact, repetitions=300)
        variance[baseline] = report.variance
    assert variance["others"] < 0.8 * variance["none"], variance
