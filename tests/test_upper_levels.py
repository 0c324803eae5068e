"""Upper levels that judge behaviour: what they are made of, against independent numbers, and at
work in a run."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_same_state
from preference_run import SMALL, make_job
from test_successor_features import GAMMA, A, Process, S
from torch import Tensor, nn

import birl_ext
from birl_ext.agents.successor_features import ActionValue
from birl_ext.agents.temperature import Temperature
from birl_ext.bilevel.additive import AdditiveUpdate, PlannedUpdate
from birl_ext.bilevel.sobirl import DRLHFUpdate
from birl_ext.environments.finite import FiniteEnvironment
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import (
    BirlError,
    ConfigError,
    NonFiniteInputError,
    OptionError,
    ShapeError,
    TemperatureError,
)
from birl_ext.preferences.fit import evaluate
from birl_ext.preferences.fragments import Episode, Fragments, Pairs
from birl_ext.preferences.reward_model import FeatureReward
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.preference.job import PreferenceJob
from birl_ext.problems.preference.recorder import Recorder
from birl_ext.rollouts.evaluate import Evaluation
from birl_ext.simulators.finite import FiniteFollower

GRID = "birl_ext/Gridworld-v0"


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def normal(*shape: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


# What a policy earns by another reward


def action_value(optimiser: Any = None, **options: Any) -> ActionValue:
    """A table, whose step on the whole batch is one application of the Bellman operator."""
    table = nn.Embedding(S, A).double()
    nn.init.zeros_(table.weight)
    exact = functools.partial(torch.optim.SGD, lr=S * A / 2)
    given: dict[str, Any] = {"discount": GAMMA, "target_rate": 1.0, **options}
    return ActionValue(table, optimiser=optimiser or exact, **given)


def test_what_a_policy_earns_solves_the_linear_system() -> None:
    process = Process()
    batch, policy = process.batch(), FiniteFollower(torch.tensor(process.policy))
    worth = torch.tensor(process.features[..., 0])[batch.observation, batch.action]
    found = action_value()
    for _ in range(250):
        found.update(batch, worth, policy)
    exact = process.exact()[..., 0]
    mean = (process.policy * exact).sum(-1, keepdims=True)
    advantage = found.advantage(torch.arange(S), policy).numpy()
    np.testing.assert_allclose(advantage, process.policy * (exact - mean), rtol=1e-8, atol=1e-9)
    assert np.abs(advantage).max() > 0.1
    assert np.abs(advantage.sum(-1)).max() < 1e-12


def test_it_learns_on_to_the_same_bits() -> None:
    process = Process(2)
    batch, policy = process.batch(), FiniteFollower(torch.tensor(process.policy))
    worth = torch.tensor(process.features[..., 0])[batch.observation, batch.action]
    adam = functools.partial(torch.optim.Adam, lr=0.01)
    one, other = (action_value(adam, target_rate=0.1) for _ in range(2))
    for _ in range(3):
        one.update(batch, worth, policy)
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        assert one.update(batch, worth, policy) == other.update(batch, worth, policy)
    assert_same_state(other.state_dict(), one.state_dict())


def test_what_it_cannot_learn_from_is_named() -> None:
    process = Process()
    batch, policy = process.batch(), FiniteFollower(torch.tensor(process.policy))
    worth = torch.zeros(batch.size, dtype=torch.float64)
    worth[7] = torch.nan
    with pytest.raises(NonFiniteInputError, match="upper level's reward is nan at row 7"):
        action_value().update(batch, worth, policy)
    wide = ActionValue(nn.Embedding(S, A + 1), discount=GAMMA, optimiser=torch.optim.Adam)
    with pytest.raises(ShapeError, match=r"\(60, 4\), where .* is \(60, 3, 1\)"):
        wide.update(batch, torch.zeros(batch.size), policy)


def test_steps_are_drawn_as_a_discounted_sum_counts_them() -> None:
    recorder, lengths = Recorder(2, keep=10_000), (5, 2, 3)
    for number, length in enumerate(lengths):
        steps = torch.arange(length)
        place = 10 * number + steps
        recorder._closed.append(
            Episode(place, place + 100, place + 200.0, place * 0.0, torch.zeros(length))
        )
    draws = torch.Generator().manual_seed(0)
    where, chosen, paid = recorder.steps(60_000, 0.7, draws)
    assert torch.equal(chosen, where + 100)
    assert torch.equal(paid, where + 200.0)
    total = sum(0.7**t for length in lengths for t in range(length))
    for number, length in enumerate(lengths):
        for t in range(length):
            share = 0.7**t / total
            found = float((where == 10 * number + t).double().mean())
            assert abs(found - share) < 5 * math.sqrt(share / 60_000)
    first, _, _ = recorder.steps(100, 0.0, draws)
    assert set(first.tolist()) == {0, 10, 20}


def test_episodes_under_way_count_as_far_as_they_have_come() -> None:
    """Each step pays 1 and ends the episode with .1; each is looked at after 1 to 15 steps."""
    draws = torch.Generator().manual_seed(0)
    gamma, ends, most, count = 0.9, 0.1, 15, 4000
    recorder = Recorder(count, keep=10**7)
    lengths = torch.empty(count, dtype=torch.float64).geometric_(ends, generator=draws)
    looked = torch.randint(1, most + 1, (count,), generator=draws)
    for number, (length, end) in enumerate(zip(lengths.tolist(), looked.tolist(), strict=True)):
        seen = Episode(*[torch.ones(min(int(length), end))] * 5)
        rows = recorder._closed if length <= end else recorder._open[number]
        rows.append(seen)
    whole, weight = recorder.discounted(gamma)
    assert len(whole.reward) == len(weight)
    want = sum((gamma * (1 - ends)) ** t for t in range(most))
    assert abs(float(weight.sum()) - want) < 0.03 * want


# Few knobs


def test_a_reward_of_few_knobs_is_linear_in_them() -> None:
    features = normal(4, 3, 2, seed=0)
    reward = FeatureReward(features)
    where, chosen = torch.tensor([3, 0, 3]), torch.tensor([2, 1, 0])
    assert torch.equal(reward(where, chosen), torch.zeros(3, dtype=torch.float64))
    with torch.no_grad():
        reward.weight.copy_(torch.tensor([2.0, -0.5]))
    want = 2 * features[..., 0] - 0.5 * features[..., 1]
    torch.testing.assert_close(reward.all_actions(where), want[where])
    torch.testing.assert_close(reward(where, chosen), want[where, chosen])
    (slope,) = torch.autograd.grad(reward(where, chosen).sum(), list(reward.parameters()))
    torch.testing.assert_close(slope, features[where, chosen].sum(0))
    assert [name for name, _ in reward.named_parameters()] == ["weight"]
    for shape in ((4, 3), (4, 3, 0)):
        with pytest.raises(ShapeError, match=r"allowed: \(S, A, k\)"):
            FeatureReward(torch.zeros(shape))


# Through the planner


class World:
    """Random rows, one of which ends the process, with features of three knobs."""

    STATES, ACTIONS, DISCOUNT, TAU = 5, 3, 0.8, 0.4

    def __init__(self, *, start: bool = True) -> None:
        size = (self.STATES, self.ACTIONS)
        self.rows = (1.5 * normal(*size, self.STATES, seed=1)).softmax(-1)
        self.rows[4] = 0  # what is done there is paid, and the last
        self.features = normal(*size, 3, seed=2)
        self.worth = normal(*size, seed=3)
        self.start = normal(self.STATES, seed=4).softmax(-1) if start else None
        self.x = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64)

    def learner(self, optimiser: Any = still) -> PlannedUpdate:
        process = birl_ext.DenseMDP(
            torch.zeros(self.STATES, self.ACTIONS, dtype=torch.float64),
            self.rows,
            self.DISCOUNT,
            initial_distribution=self.start,
            terminal=self.rows.sum((-1, -2)) == 0,
        )
        reward = FeatureReward(self.features)
        with torch.no_grad():
            reward.weight.copy_(self.x)
        return PlannedUpdate(reward, process, optimiser=optimiser)

    def phi(self, x: Any) -> float:
        """By sweeps of the soft Bellman operator and a linear solve, in numpy."""
        paid, rows, worth = (self.features.numpy() @ x, self.rows.numpy(), self.worth.numpy())
        value = np.zeros(self.STATES)
        for _ in range(300):
            q = paid + self.DISCOUNT * rows @ value
            top = q.max(-1)
            value = top + self.TAU * np.log(np.exp((q - top[:, None]) / self.TAU).sum(-1))
        policy = np.exp((q - value[:, None]) / self.TAU)
        moves = np.einsum("sa,sat->st", policy, rows)
        gained = (policy * worth).sum(-1)
        earned = np.linalg.solve(np.eye(self.STATES) - self.DISCOUNT * moves, gained)
        start = np.full(self.STATES, 1 / self.STATES) if self.start is None else self.start.numpy()
        return -(1 - self.DISCOUNT) * float(start @ earned)


@pytest.mark.parametrize("start", [True, False])
def test_the_planned_gradient_is_that_of_an_independent_solve(start: bool) -> None:
    world = World(start=start)
    learner = world.learner()
    outcome = learner.step(world.worth, temperature=World.TAU)
    x, h = world.x.numpy(), 1e-5
    want = np.array(
        [(world.phi(x + h * unit) - world.phi(x - h * unit)) / (2 * h) for unit in np.eye(len(x))]
    )
    (weight,) = learner.parameters
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), want, rtol=1e-6, atol=1e-9)
    assert outcome.gradient_norm == pytest.approx(float(np.linalg.norm(want)), rel=1e-6)
    assert np.linalg.norm(want) > 0.01
    assert outcome.kept == 1.0


def test_the_planned_update_descends_and_goes_on_to_the_same_bits() -> None:
    world = World()
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    one, other = world.learner(adam), world.learner(adam)
    before = world.phi(world.x.numpy())
    for _ in range(20):
        one.step(world.worth, temperature=World.TAU)
    assert world.phi(one.parameters[0].detach().numpy()) < before - 0.05
    other.load_state_dict(one.state_dict())
    for learner in (one, other):
        learner.step(world.worth, temperature=World.TAU)
    assert_same_state(other.state_dict(), one.state_dict())


def test_what_cannot_be_planned_with_is_named() -> None:
    world = World()
    learner = world.learner(functools.partial(torch.optim.Adam, lr=0.1))
    broken = world.worth.clone()
    broken[2, 1] = torch.nan
    cases: tuple[tuple[Tensor, float, type[BirlError], str], ...] = (
        (world.worth[:2], 0.5, ShapeError, r"\(2, 3\).*allowed: \(S, A\) = \(5, 3\)"),
        (world.worth, 0.0, TemperatureError, "temperature is 0"),
        (broken, 0.5, BirlError, "reward"),
    )
    for worth, temperature, error, match in cases:
        with pytest.raises(error, match=match):
            learner.step(worth, temperature=temperature)
    assert torch.equal(learner.parameters[0].detach(), world.x)
    assert learner.steps == 0


# In a run

EXACT = {"env": GRID, "score": "exact", "reward_features": 3, "entropy_target": False}
WAYS = [
    {"env": GRID, "upper": "critic"},
    {"upper": "critic"},
    {"upper": "return"},
    {"upper": "critic", **EXACT},
    {"upper": "return", **EXACT},
]
ways = pytest.mark.parametrize("changes", WAYS, ids=lambda one: " ".join(map(str, one.values())))


@ways
def test_behaviour_is_judged_by_the_upper_levels_own_reward(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """φ, the critic, and what the reward is moved by; never by the reward itself."""
    job = make_job(**changes, reward_rate=0.03)
    exact, critic = changes.get("score") == "exact", changes["upper"] == "critic"
    assert isinstance(job.learner, PlannedUpdate if exact else AdditiveUpdate)
    assert isinstance(job.judging, DRLHFUpdate) == critic
    assert (job._worth is None) == exact
    job.step()
    drawn: list[Any] = []
    plain = job._recorder.steps

    def steps(count: int, discount: float, generator: Any) -> Any:
        drawn.append((count, plain(count, discount, generator)))
        assert discount == job.config.discount
        return drawn[-1][1]

    learned: list[Any] = []
    monkeypatch.setattr(job._recorder, "steps", steps)
    if not exact:
        monkeypatch.setattr(job._worth, "update", lambda *given: learned.append(given))
        before = copy.deepcopy(job.judging)
    worths: list[Tensor] = []
    stepped = job.learner.step

    def step(*given: Any, **more: Any) -> Any:
        worths.append(given[0])
        assert more["temperature"] == job.agent.temperature
        return stepped(*given, **more)

    monkeypatch.setattr(job.learner, "step", step)
    own = copy.deepcopy(job.reward.state_dict())
    row = job.step()
    assert any(not torch.equal(part, own[key]) for key, part in job.reward.state_dict().items())

    gamma, kept = job.config.discount, job._recorder.episodes()
    ended = len(job._recorder._closed)

    def mean_cost(reward: Any) -> float:
        """−(1 − γ) Σ γᵗ r, at each t the mean over those that have come so far, times their share
        of all, by products.
        """
        paid = []
        for episode in kept:
            with torch.no_grad():
                found = reward(episode.observation, episode.action) if reward else episode.reward
            paid.append(found.tolist())
        total, share = 0.0, 1.0
        for t in range(max(map(len, paid))):
            known = [one[t] for one in paid if t < len(one)]
            total += gamma**t * share * sum(known) / len(known)
            over = sum(len(one) == t + 1 for one in paid[:ended])
            share *= 1 - over / len(known)
        return -(1 - gamma) * total

    judge = job.judging.reward if critic else None
    assert row["phi"] == job.summary()["phi"] == pytest.approx(mean_cost(judge), abs=1e-6)
    assert row["phi"] != pytest.approx(mean_cost(job.reward), abs=1e-4)
    if isinstance(job.learner, PlannedUpdate):
        every = torch.arange(38)
        with torch.no_grad():
            table = job.judging.reward.all_actions(every) if critic else job.learner.process.reward
        assert len(worths) == 3
        assert all(torch.equal(one, table) for one in worths)
        return
    assert len(drawn) == 3
    for states, (asked, at) in zip(worths, drawn, strict=True):
        assert asked == 256
        assert torch.equal(states, at[0])
    assert learned
    for batch, told, agent in learned:
        want = batch.reward
        if critic:
            with torch.no_grad():
                want = before.reward(batch.observation, batch.action)
        assert torch.equal(told, want)
        assert agent is job.agent


@pytest.mark.parametrize("changes", [{"env": GRID, "upper": "critic"}, {"upper": "critic"}])
def test_the_judge_is_what_is_asked_about_and_foretells(changes: dict[str, Any]) -> None:
    job = make_job(**changes, query="entropy", candidates=3, labels=100, reward_rate=0.03)
    assert job._query.reward is job.judging.reward is not job.reward
    asked: list[Pairs] = []
    plain = job.answers.append
    job.answers.append = lambda *given: (asked.append(Pairs(*given)), plain(*given))[1]
    job.step()
    for model in (job.judging.reward, job.reward):  # both were fitted at first
        assert any(bool(part.abs().max() > 0) for part in model.parameters())
    while not job.done:
        before, other = copy.deepcopy((job.judging.reward, job.reward))
        with torch.no_grad():
            for part in job.reward.parameters():
                part.neg_()
        row = job.step()
        found = evaluate(before, asked[-1])
        assert row["foretold"] == pytest.approx(found.accuracy, nan_ok=True)
        assert evaluate(other, asked[-1]).loss != pytest.approx(found.loss, abs=1e-6)


def asked_for_nothing(first: Fragments, second: Fragments) -> Tensor:
    raise AssertionError


def test_nobody_is_asked_about_a_return() -> None:
    with pytest.raises(ConfigError, match=r"a teacher is given, .* which asks nobody"):
        PreferenceJob(make_job(upper="return").config, teacher=asked_for_nothing)
    job = make_job(upper="return", labels=40)
    job.teacher = None  # which would not answer
    rows = [job.step() for _ in range(4)]
    assert all(row["labels"] == row["answers"] == 0 for row in rows)
    assert all("cross_entropy" not in row for row in rows)
    assert job._answering is job.reward


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"upper": "return", "labels": 40, "teacher": "oracle"},
            "teacher oracle, labels 40, ",
        ),
        ({"limit": 9.0, "stale": "keep"}, "limit 9.0:"),
        ({"entropy_target": False, "entropy_share": 0.4}, "entropy_share 0.4:"),
        ({"upper": "critic", "indirect_limit": 0.5}, "indirect_limit 0.5:"),
        ({"upper": "critic", "average": 0.5, **EXACT}, "average 0.5:"),
        ({"algorithm": "drlhf", "score": "critic"}, "score critic:"),
        ({"algorithm": "mrn", "weigh_loss": True}, "weigh_loss True:"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_said_when_a_run_starts(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    plain = {"teacher": "noisy", "labels": 300, "initial_labels": 60} | changes
    job = make_job(**plain)
    with pytest.warns(UserWarning, match=f"^{named}.*not used with"):
        job.attach(tmp_path)
    job.detach()
    used = {"algorithm": "sobirl", "upper": "cross-entropy", "score": "critic"}
    rest = {"weigh_loss": True, "indirect_limit": 0.5, "average": 0.5, "labels": 40}
    assert make_job(**used, **rest).config.idle() == {}


def test_the_figures_say_what_phi_is_of() -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": 1, "phi": 0.1, "cross_entropy": 0.2}]
    for upper, names, label in (
        ("cross-entropy", ["true_return", "phi", "reward_accuracy"], "cross entropy, nats"),
        ("critic", ["true_return", "phi", "reward_accuracy"], "φ: cost per step"),
        ("return", ["true_return", "phi"], "φ: cost per step"),
    ):
        figures = make_job(upper=upper).figures(rows, {})
        assert list(figures) == names
        figure = figures["phi"]()
        (axes,) = figure.axes
        assert axes.get_ylabel().startswith(label)
        assert len(axes.lines) == (3 if upper == "cross-entropy" else 1)


def test_the_behaviour_counts_from_the_second_round_and_when_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for after, rounds in ((0, [2, 3, 4]), (300, [3, 4])):
        job = make_job(upper="return", hypergradient_after=after)
        seen: list[int] = []
        plain = job.learner.step
        monkeypatch.setattr(
            job.learner,
            "step",
            lambda *a, _job=job, _seen=seen, _plain=plain, **k: (
                _seen.append(_job._round + 1),
                _plain(*a, **k),
            )[1],
        )
        while not job.done:
            job.step()
        assert seen == [n for n in rounds for _ in range(3)]


@pytest.mark.parametrize("holds", [True, False])
def test_the_temperature_moves_with_the_reward_where_it_holds_an_entropy(
    holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(upper="critic", entropy_share=0.99 if holds else 0.5)
    seen: list[Any] = []
    plain = job.learner.step
    monkeypatch.setattr(
        job.learner, "step", lambda *a, **k: (seen.append(k["held"]), plain(*a, **k))[1]
    )
    job.step()
    job.step()
    assert len(seen) == 3
    assert all((held is not None) == holds for held in seen)


def test_the_critics_part_of_mrn_comes_after_the_first_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(algorithm="mrn")
    seen: list[int] = []
    plain = job.learner.through_critic

    def through(
        pairs: Any, follower: Any, batch: Transitions, paid: Tensor, *, scale: float
    ) -> Any:
        seen.append(job._round + 1)
        assert follower is job.agent
        with torch.no_grad():
            assert torch.equal(paid, job.reward(batch.observation, batch.action))
        assert scale == 1.0
        return plain(pairs, follower, batch, paid, scale=scale)

    monkeypatch.setattr(job.learner, "through_critic", through)
    while not job.done:
        job.step()
    assert seen == [2] * 3 + [3] * 3 + [4] * 3
    assert job.learner.rate == job.config.learning_rate


def test_an_own_mdp_is_planned_at_the_discount_of_the_run() -> None:
    rows = normal(4, 3, 4, seed=5).softmax(-1)
    mdp = birl_ext.DenseMDP(normal(4, 3, seed=6), rows, 0.9)
    settings = {
        **SMALL,
        "env": "<own>",
        "upper": "return",
        "score": "exact",
        "entropy_target": False,
        "reward_features": 2,
        "episode_steps": 12,
        "discount": 0.6,
    }
    job = PreferenceJob(PreferenceConfig(**settings), environment=lambda: FiniteEnvironment(mdp))
    assert isinstance(job.learner, PlannedUpdate)
    assert job.learner.process.discount == 0.6
    while not job.done:
        row = job.step()
    assert math.isfinite(row["gradient_norm"])


# A temperature that cools

COOLING: dict[str, Any] = {
    "env": GRID,
    "upper": "return",
    "rounds": 10,
    "cool_from": 16.0,
    "temperature": 0.25,
    "entropy_target": False,
    "environment_steps": 20,
    "evaluate_every": 100,
}


def test_a_fixed_temperature_cools_by_equal_factors_within_seven_tenths_of_the_rounds() -> None:
    job, taus = make_job(**COOLING), []
    while not job.done:
        if job._round == 4:
            again = make_job(**COOLING)
            again.load_state_dict(job.state_dict())
        job.step()
        taus.append(job.agent.temperature)
    assert taus[:7] == pytest.approx([0.25 * 16 ** (1 - k / 7) for k in range(7)])
    assert taus[7:] == [0.25] * 3
    found = []
    while not again.done:
        again.step()
        found.append(again.agent.temperature)
    assert found == taus[4:]


def test_the_best_policy_has_the_temperature_it_was_valued_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(**{**COOLING, "evaluate_every": 1, "learning_starts": 0})
    values = iter([0.0, 0.0, 0.0, 9.0] + 6 * [1.0])
    monkeypatch.setattr(
        PreferenceJob,
        "evaluate",
        lambda _: Evaluation(torch.tensor([next(values)]), torch.ones(1)),
    )
    taus = []
    while not job.done:
        job.step()
        taus.append(job.agent.temperature)
    assert taus[-1] == taus[3] == pytest.approx(0.25 * 16 ** (1 - 3 / 7))
    again = make_job(**{**COOLING, "evaluate_every": 1, "learning_starts": 0})
    again.load_state_dict(job.state_dict())
    assert again.agent.temperature == taus[3]


def test_a_temperature_that_follows_an_entropy_cannot_be_set() -> None:
    following = Temperature(0.5, entropy_target=0.3)
    with pytest.raises(OptionError, match=r"follows an entropy target\. Fix: leave it alone"):
        following.set(0.2)
    assert following.value == pytest.approx(0.5)
    with pytest.raises(OptionError, match="follows an entropy target"):
        make_job().agent.temperature = 0.1
    fixed = Temperature(0.5)
    fixed.set(0.2)
    assert fixed.value == 0.2
    for wrong in (0.0, math.nan, math.inf, -1.0):
        with pytest.raises(TemperatureError, match="temperature is"):
            fixed.set(wrong)
    other = Temperature(0.7)
    other.load_state_dict(fixed.state_dict())
    assert other.value == 0.2


@pytest.mark.parametrize(
    ("changes", "value", "allowed", "fix"),
    [
        (
            {"upper": "critic", "algorithm": name, **more},
            rf"upper is critic, algorithm {name}, members {more.get('members', 1)}",
            "algorithm=sobirl and one member",
            "take upper=cross-entropy",
        )
        for name, more in (
            ("drlhf", {}),
            ("stoc-sobirl", {}),
            ("mrn", {}),
            ("sobirl", {"members": 2}),
        )
    ]
    + [
        (
            {"env": GRID, "score": "exact"},
            "score is exact, with upper cross-entropy",
            "upper=critic or upper=return",
            "score=full-horizon",
        ),
        (
            {"upper": "return", "score": "exact"},
            "score is exact, and entropy_target is on",
            "a fixed τ",
            "set entropy_target to false",
        ),
        (
            {"upper": "return", **EXACT, "normalise": "scale"},
            "score is exact, and normalise scale",
            "no: τ would move with the reward's spread",
            "leave normalise out",
        ),
        (
            {"upper": "return", "score": "exact", "entropy_target": False},
            "score is exact, with env CartPole-v1 and device cpu",
            "an MDP of your own, or birl_ext/Gridworld-v0, on the cpu",
            "use score=full-horizon or one-step",
        ),
        (
            {"upper": "critic", "env": "Pendulum-v1"},
            "upper is critic, and env Pendulum-v1 has continuous actions",
            "discrete actions",
            "take upper=cross-entropy",
        ),
        (
            {"reward_features": 8},
            "reward_features is 8, with env CartPole-v1 and 1 members",
            "0, unless observations are indices and actions discrete; one member",
            "leave it out",
        ),
        (
            {"reward_features": 8, "env": GRID, "members": 2},
            "reward_features is 8, with env birl_ext/Gridworld-v0 and 2 members",
            "one member",
            "leave it out",
        ),
        (
            {"cool_from": 50.0},
            "cool_from is 50.0, and entropy_target is on",
            "1, where τ follows the entropy",
            "set entropy_target to false",
        ),
    ],
)
def test_what_contradicts_an_upper_level_is_refused(
    changes: dict[str, Any], value: str, allowed: str, fix: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^BIRL-E801 {value}.*allowed: .*{allowed}.* Fix: .*{fix}"
    ):
        make_job(**changes)


def test_settings_out_of_range_are_named() -> None:
    for changes, match in (
        ({"upper": "retrun"}, "did you mean 'return'"),
        ({"reward_features": -1}, "reward_features is -1"),
        ({"cool_from": 0.2, "entropy_target": False}, "cool_from is 0.2"),
        ({"cool_from": math.inf, "entropy_target": False}, "cool_from is inf"),
    ):
        with pytest.raises(ConfigError, match=match):
            make_job(**changes)
