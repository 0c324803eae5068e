"""SoBiRL and DRLHF as upper levels of preferences."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
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

from birl_ext.agents.categorical import CategoricalPolicy
from birl_ext.bilevel.bias_meter import exact_pair_objective, measure_estimator
from birl_ext.bilevel.score import Critic, FullHorizon, OneStep
from birl_ext.bilevel.sobirl import DRLHFUpdate, SoBiRLUpdate, importance
from birl_ext.errors import GradientError, NonFiniteResultError, OptionError, TemperatureError
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.loss import bradley_terry, margins
from birl_ext.preferences.reward_model import RewardEnsemble, RewardNetwork
from birl_ext.simulators.finite import Paths


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
        reward.body.weight.copy_(table)  # type: ignore[operator]

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
    algorithm = SoBiRLUpdate(reward, optimiser=still, average=0.0, score=score)

    def estimate() -> Tensor:
        pairs = answered(problem, simulator, 10_000)
        algorithm.step(pairs, problem.follower, temperature=TEMPERATURE)
        (parameter,) = algorithm.parameters
        assert parameter.grad is not None
        return parameter.grad.flatten().clone()

    report = measure_estimator(estimate, exact, repetitions=20)
    assert report.noise < 0.06, report
    assert report.relative_error < 4 * report.noise, report
    without = DRLHFUpdate(reward, optimiser=still)
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
    score = Critic(lambda where: ahead[where], lambda: reward.body.weight.flatten())  # type: ignore[operator]

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
        algorithm = SoBiRLUpdate(reward, optimiser=still, average=0.0, score=score, lead=lead)
        algorithm.step(pairs, problem.follower, temperature=TEMPERATURE)
        (parameter,) = algorithm.parameters
        assert parameter.grad is not None
        return parameter.grad.flatten().clone()

    for lead, truth, other in ((2, whole, cut_off), (0, cut_off, whole)):
        report = measure_estimator(lambda lead=lead: estimate(lead), truth, repetitions=10)  # type: ignore[misc]
        assert report.noise < 0.05, report
        assert report.relative_error < 4 * report.noise, report
        assert (report.mean - other).norm() / truth.norm() > 8 * report.noise, report
    with pytest.raises(OptionError, match="lead is -1"):
        SoBiRLUpdate(reward, optimiser=still, score=score, lead=-1)


def test_drlhf_is_the_gradient_of_the_cross_entropy() -> None:
    problem, reward, _ = table_problem()
    pairs = answered(problem, simulator_of(problem), 50)
    algorithm = DRLHFUpdate(reward, optimiser=still, noise=0.1)
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


class LinearPolicy(CategoricalPolicy):
    """π = softmax(s W); counts how many observations it was asked about."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.asked: list[int] = []

    def log_probs(self, observation: Tensor) -> Tensor:
        self.asked.append(len(observation))
        return (observation @ self.weight).log_softmax(-1)


def linear_problem(count: int = 5) -> tuple[RewardNetwork, LinearPolicy, Pairs]:
    """A network's reward, a policy near the one that acted, and pairs of unequal, padded sides."""
    draws = torch.Generator().manual_seed(4)
    reward = RewardNetwork.mlp(3, draws, actions=4, hidden=(5,)).double()
    policy = LinearPolicy(torch.randn(3, 4, generator=draws, dtype=torch.float64))

    def side(steps: int) -> Fragments:
        where = torch.randn(count, steps, 3, generator=draws, dtype=torch.float64)
        chosen = torch.randint(4, (count, steps), generator=draws)
        length = torch.randint(1, steps + 1, (count, 1), generator=draws)
        present = torch.arange(steps) < length
        then = (where @ (policy.weight + 0.2)).log_softmax(-1)
        then = then.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        then = then + 0.3 * torch.randn(count, steps, generator=draws, dtype=torch.float64)
        where[~present], then[~present] = math.nan, math.nan
        version = torch.zeros(count, dtype=torch.int64)
        return Fragments(where, chosen, torch.zeros(count, steps), present, then, version)

    label = torch.rand(count, generator=draws, dtype=torch.float64)
    return reward, policy, Pairs(side(6), side(4), label)


def pair_by_pair(
    reward: RewardNetwork | RewardEnsemble,
    policy: LinearPolicy,
    pairs: Pairs,
    temperature: float,
    limit: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """The two parts of the gradient by (M16) with the first estimator, a step at a time."""
    members = list(reward.members) if isinstance(reward, RewardEnsemble) else [reward]
    losses, scores, weights = [], [], []
    for i in range(len(pairs)):
        margin, score, log_weight = [torch.zeros(())] * len(members), torch.zeros(()), [0.0, 0.0]
        for k, (sign, part) in enumerate(((1, pairs.first), (-1, pairs.second))):
            for h in range(part.present.shape[1]):
                if not part.present[i, h]:
                    continue
                where, chosen = part.observation[i, h], int(part.action[i, h])
                values = [member.body(where.unsqueeze(0)).squeeze(0) for member in members]  # type: ignore[operator]
                shares = (where @ policy.weight).softmax(-1)
                margin = [m + sign * own[chosen] for m, own in zip(margin, values, strict=True)]
                mean = sum(values) / len(values)
                score = score + mean[chosen] - (shares * mean).sum()
                log_weight[k] += float(shares[chosen].log() - part.log_prob[i, h])
        y = pairs.label[i]
        of_each = [-y * m.sigmoid().log() - (1 - y) * (-m).sigmoid().log() for m in margin]
        losses.append(torch.stack(of_each).sum())
        scores.append(score)
        cut = [min(max(math.exp(x), 1 / limit), limit) for x in log_weight]
        weights.append(cut[0] * cut[1])
    count = len(pairs)
    direct, indirect = torch.zeros(()), torch.zeros(())
    for i in range(count):
        others = [j for j in range(count) if j != i]
        mass = sum(weights[j] for j in others)
        baseline = sum(weights[j] * float(losses[j].detach()) for j in others) / mass
        direct = direct + weights[i] * losses[i] / count
        advantage = float(losses[i].detach()) - baseline
        indirect = indirect + weights[i] * advantage * scores[i] / temperature / count
    parameters = list(reward.parameters())
    return tuple(  # type: ignore[return-value]
        list(torch.autograd.grad(part, parameters, retain_graph=True))
        for part in (direct, indirect)
    )


@pytest.mark.parametrize("most", [None, 6])
@pytest.mark.parametrize("shared", [True, False])
def test_a_step_is_the_sum_over_pairs_and_steps(
    most: int | None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps are evaluated at once, and whether or not the tables are shared."""
    reward, policy, pairs = linear_problem()
    direct, indirect = pair_by_pair(reward, policy, pairs, 0.5, 1.5)
    if most:
        monkeypatch.setattr("birl_ext.preferences.loss._NUMBERS", most)
    follower: Any = policy
    if not shared:  # the same policy, of a kind that names no table of logarithms
        follower = SimpleNamespace(probabilities=policy.probabilities, log_prob=policy.log_prob)
    algorithm = SoBiRLUpdate(reward, optimiser=still, average=0.0, score=OneStep(4), limit=1.5)
    outcome = algorithm.step(pairs, follower, temperature=0.5)
    for parameter, one, other in zip(algorithm.parameters, direct, indirect, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, one + other, rtol=1e-10, atol=1e-12)
    norm = torch.cat([(a + b).flatten() for a, b in zip(direct, indirect, strict=True)]).norm()
    share = torch.cat([part.flatten() for part in indirect]).norm() / norm
    assert outcome.gradient_norm == pytest.approx(float(norm), rel=1e-10)
    assert outcome.indirect_share == pytest.approx(float(share), rel=1e-10)
    assert float(share) > 0.1  # so that a part left out would show
    if shared and most:
        assert max(policy.asked) == most // 3


@pytest.mark.parametrize("ensemble", [False, True])
def test_each_network_is_run_once_over_the_steps(ensemble: bool) -> None:
    member, policy, pairs = linear_problem()
    reward = RewardEnsemble([member]) if ensemble else member
    seen: list[int] = []
    member.body.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    SoBiRLUpdate(reward, optimiser=still, average=0.0, score=OneStep(4)).step(
        pairs, policy, temperature=1.0
    )
    steps = int(pairs.first.present.sum() + pairs.second.present.sum())
    assert seen == policy.asked == [steps]


@pytest.mark.parametrize("limit", [0.0, 0.02, 1.0, math.inf])
def test_the_scores_part_is_shortened_to_its_limit(limit: float) -> None:
    """Its direction stays, and so does the loss's part."""
    reward, policy, pairs = linear_problem()
    direct, indirect = pair_by_pair(reward, policy, pairs, 0.5, 5.0)
    one, other = (torch.cat([x.flatten() for x in part]) for part in (direct, indirect))
    factor = min(1.0, limit * float(one.norm() / other.norm()))
    assert (factor < 1) == (limit < 0.5)  # both cases are tried
    algorithm = SoBiRLUpdate(
        reward, optimiser=still, average=0.0, score=OneStep(4), indirect_limit=limit
    )
    outcome = algorithm.step(pairs, policy, temperature=0.5)
    found = torch.cat([p.grad.flatten() for p in algorithm.parameters if p.grad is not None])
    torch.testing.assert_close(found, one + factor * other, rtol=1e-10, atol=1e-12)
    share = factor * float(other.norm() / found.norm())
    assert outcome.indirect_share == pytest.approx(share, rel=1e-10)


def test_the_loss_may_count_all_answers_alike() -> None:
    """Only the score's part is weighed then."""
    reward, policy, pairs = linear_problem()
    _, indirect = pair_by_pair(reward, policy, pairs, 0.5, 5.0)
    loss = bradley_terry(margins(reward, pairs), pairs.label).mean()
    plain = torch.autograd.grad(loss, list(reward.parameters()))
    algorithm = SoBiRLUpdate(
        reward, optimiser=still, average=0.0, score=OneStep(4), weigh_loss=False
    )
    algorithm.step(pairs, policy, temperature=0.5)
    for parameter, one, other in zip(algorithm.parameters, plain, indirect, strict=True):
        torch.testing.assert_close(parameter.grad, one + other, rtol=1e-10, atol=1e-12)


def test_members_of_an_ensemble_are_fitted_one_by_one() -> None:
    """Each by its own loss: by the mean's alone all would have the same gradient."""
    _, policy, pairs = linear_problem()
    members = [
        RewardNetwork.mlp(3, torch.Generator().manual_seed(i), actions=4, hidden=(5,)).double()
        for i in range(3)
    ]
    alone = []
    for member in members:
        SoBiRLUpdate(member, optimiser=still, score=None, stale="keep").step(
            pairs, policy, temperature=1.0
        )
        alone += [p.grad.clone() for p in member.parameters() if p.grad is not None]
    together = SoBiRLUpdate(RewardEnsemble(members), optimiser=still, score=None, stale="keep")
    together.step(pairs, policy, temperature=1.0)
    for parameter, expected in zip(together.parameters, alone, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_the_score_of_an_ensemble_is_that_of_its_mean(shared: bool) -> None:
    _, policy, pairs = linear_problem()
    draws = torch.Generator().manual_seed(7)
    members = [RewardNetwork.mlp(3, draws, actions=4, hidden=(5,)).double() for _ in range(2)]
    ensemble = RewardEnsemble(members)
    direct, indirect = pair_by_pair(ensemble, policy, pairs, 0.5, 1.5)
    follower: Any = policy
    if not shared:
        follower = SimpleNamespace(probabilities=policy.probabilities, log_prob=policy.log_prob)
    algorithm = SoBiRLUpdate(ensemble, optimiser=still, average=0.0, score=OneStep(4), limit=1.5)
    outcome = algorithm.step(pairs, follower, temperature=0.5)
    for parameter, one, other in zip(algorithm.parameters, direct, indirect, strict=True):
        assert parameter.grad is not None
        assert float(other.norm()) > 0.01  # so that a part left out would show
        torch.testing.assert_close(parameter.grad, one + other, rtol=1e-10, atol=1e-12)
    mean = bradley_terry(margins(ensemble, pairs), pairs.label).mean()
    assert outcome.loss == pytest.approx(float(mean.detach()), rel=1e-12)


def test_copies_in_an_ensemble_behave_as_one() -> None:
    reward, policy, pairs = linear_problem()
    copies = [copy.deepcopy(reward) for _ in range(3)]
    grads = []
    for model in (reward, RewardEnsemble(copies)):
        algorithm = SoBiRLUpdate(model, optimiser=still, average=0.0, score=OneStep(4))
        algorithm.step(pairs, policy, temperature=0.5)
        grads.append([parameter.grad for parameter in algorithm.parameters])
    for alone, copied in zip(3 * grads[0], grads[1], strict=True):
        torch.testing.assert_close(copied, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tabulated", [True, False])
def test_the_follower_is_held_fixed(tabulated: bool) -> None:
    """Also one that is computed from the reward itself: no derivative of π is taken twice."""
    reward, _, pairs = linear_problem()

    class Softmax(CategoricalPolicy):
        def log_probs(self, observation: Tensor) -> Tensor:
            return (reward.all_actions(observation) / 0.5).log_softmax(-1)

    class Fixed(Softmax):
        log_probs = torch.no_grad()(Softmax.log_probs)

    found = []
    for policy in (Fixed(), Softmax()):
        follower: Any = policy
        if not tabulated:
            follower = SimpleNamespace(probabilities=policy.probabilities, log_prob=policy.log_prob)
        algorithm = SoBiRLUpdate(reward, optimiser=still, average=0.0, score=OneStep(4))
        algorithm.step(pairs, follower, temperature=0.5)
        found.append([parameter.grad for parameter in algorithm.parameters])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_layers_may_be_frozen_and_released_between_steps() -> None:
    reward, policy, pairs = linear_problem()
    assert isinstance(reward.body, torch.nn.Sequential)
    trunk = list(reward.body[:-1].parameters())
    algorithm = SoBiRLUpdate(
        reward, optimiser=lambda p: torch.optim.SGD(p, lr=0.1), score=OneStep(4), stale="keep"
    )
    for frozen in (True, False):
        reward.body[:-1].requires_grad_(not frozen)
        before = [parameter.detach().clone() for parameter in algorithm.parameters]
        algorithm.step(pairs, policy, temperature=0.5)
        moved = [
            not torch.equal(one, other)
            for one, other in zip(before, algorithm.parameters, strict=True)
        ]
        assert moved == [not frozen] * len(trunk) + [True] * (len(moved) - len(trunk))
    reward.requires_grad_(False)
    with pytest.raises(GradientError, match="loss does not depend on any of the reward's param"):
        algorithm.step(pairs, policy, temperature=0.5)


def test_what_is_not_finite_changes_nothing() -> None:
    reward, policy, pairs = linear_problem()
    label = pairs.label.clone()
    label[2] = math.nan
    algorithm = SoBiRLUpdate(
        reward, optimiser=lambda p: torch.optim.Adam(p, lr=0.1), score=None, stale="keep"
    )
    before = [parameter.detach().clone() for parameter in algorithm.parameters]
    with pytest.raises(NonFiniteResultError, match=r"the loss is nan.*step 0"):
        algorithm.step(Pairs(pairs.first, pairs.second, label), policy, temperature=0.5)
    assert all(map(torch.equal, before, algorithm.parameters))
    assert not algorithm.optimiser.state
    assert algorithm.steps == 0


@pytest.mark.parametrize("score", [None, OneStep(4)], ids=["DRLHF", "SoBiRL"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperatures_are_named(score: Any, temperature: float) -> None:
    reward, policy, pairs = linear_problem()
    algorithm = SoBiRLUpdate(reward, optimiser=still, score=score)
    with pytest.raises(TemperatureError, match="temperature is"):
        algorithm.step(pairs, policy, temperature=temperature)
    assert algorithm.steps == 0


def test_what_has_no_path_to_the_reward_is_refused() -> None:
    """A score that is detached would make plain reward learning of it, in silence."""
    reward, policy, pairs = linear_problem()

    def deaf(*arguments: Any) -> Tensor:
        return OneStep(4)(*arguments).detach()

    algorithm = SoBiRLUpdate(reward, optimiser=torch.optim.SGD, score=deaf)  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in algorithm.parameters]
    with pytest.raises(GradientError, match="score does not depend on any of the reward's param"):
        algorithm.step(pairs, policy, temperature=0.5)
    assert all(map(torch.equal, before, algorithm.parameters))


def test_a_step_to_infinity_is_taken_back() -> None:
    reward, policy, pairs = linear_problem()
    algorithm = SoBiRLUpdate(
        reward, optimiser=lambda p: torch.optim.SGD(p, lr=math.inf), score=None, stale="keep"
    )
    before = [parameter.detach().clone() for parameter in algorithm.parameters]
    with pytest.raises(NonFiniteResultError, match="lower the learning rate"):
        algorithm.step(pairs, policy, temperature=0.5)
    assert all(map(torch.equal, before, algorithm.parameters))
    assert algorithm.steps == 0


def test_options_are_named() -> None:
    reward = RewardNetwork.table(2, 2)
    with pytest.raises(OptionError, match="stale is 'old'"):
        SoBiRLUpdate(reward, optimiser=still, score=None, stale="old")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="noise is 1"):
        DRLHFUpdate(reward, optimiser=still, noise=1)
    with pytest.raises(OptionError, match="indirect_limit is nan"):
        SoBiRLUpdate(reward, optimiser=still, score=None, indirect_limit=math.nan)
    network, policy, pairs = linear_problem()
    with pytest.raises(OptionError, match="an ensemble is inside a RewardEnsemble"):
        DRLHFUpdate(RewardEnsemble([RewardEnsemble([network])]), optimiser=still)
    nobody = pairs.select(torch.arange(0))
    with pytest.raises(OptionError, match="there are no pairs"):
        DRLHFUpdate(network, optimiser=still).step(nobody, policy, temperature=1.0)
    with pytest.raises(OptionError, match=r"lead is 4 \(allowed: 0 to 3, of 4 steps"):
        DRLHFUpdate(network, optimiser=still, lead=4).step(pairs, policy, temperature=1.0)
    problem, _, _ = table_problem()
    one = fragments(problem, simulator_of(problem).rollout(problem.follower, 4, 2))
    with pytest.raises(OptionError, match="limit is 1"):
        importance(one, one.log_prob, stale="weigh", limit=1.0)


@pytest.mark.parametrize("steps", [-1, 2.5, True, None])
def test_a_stored_count_of_steps_is_a_whole_number(steps: Any) -> None:
    reward, _, _ = linear_problem()
    algorithm = SoBiRLUpdate(reward, optimiser=still, score=None)
    with pytest.raises(OptionError, match="steps is"):
        algorithm.load_state_dict({**algorithm.state_dict(), "steps": steps})
    assert algorithm.steps == 0
