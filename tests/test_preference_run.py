"""Preference runs: every part that the settings name is at work, and a stopped run goes on to the
same bits."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import signal
import sys
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from cases import untyped
from closeness import assert_same_state
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.spaces import Box, Discrete
from preference_run import SMALL, TIMED, make_job

from birl_ext.agents.sac import SAC
from birl_ext.agents.sac_discrete import DiscreteSAC
from birl_ext.agents.soft_q import SoftQ
from birl_ext.bilevel.score import FullHorizon
from birl_ext.environments.atari import is_atari
from birl_ext.environments.transitions import Transitions
from birl_ext.environments.vector import make_environments
from birl_ext.errors import (
    AnswerLogCorruptError,
    AnswerLogWriteError,
    BirlError,
    ConfigError,
    EnvironmentFailureError,
    MissingDependencyError,
    OptionError,
    RenderError,
    SizeLimitError,
)
from birl_ext.preferences.answer_log import AnswerLog
from birl_ext.preferences.loss import bradley_terry, margins
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.preference.job import PreferenceJob
from birl_ext.problems.preference.parts import environment_source, make_replay
from birl_ext.replay.frames import FrameReplay
from birl_ext.rollouts.evaluate import Evaluation
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.runs.config import from_plain, read_toml, to_plain
from birl_ext.runs.directory import RunDirectory
from birl_ext.runs.loop import run
from birl_ext.runs.versions import versions

# Eight steps of a pole that stands look alike to all teachers but the noisy one.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*found any fragment better than another:UserWarning"
)

CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "preference").glob("*.toml"))
GRID = "birl_ext/Gridworld-v0"
FULL = {"score": "full-horizon"}


def untimed(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in TIMED}


def directory_of(path: Path, job: Any) -> RunDirectory:
    return RunDirectory.create(path, "preference", to_plain(job.config))


@pytest.mark.parametrize("teacher", ["oracle", "mistake", "noisy", "skip", "myopic", "equal"])
def test_a_run_of_each_teacher(teacher: str) -> None:
    job = make_job(teacher=teacher, rounds=2)
    rows = [job.step() for _ in range(2)]
    assert job.done
    assert rows[-1]["environment_steps"] == 240
    assert job.agent.version == 120 // 8  # the first round has no reward to learn from
    assert rows[-1]["labels"] == 40
    assert rows[-1]["answers"] <= 40
    if teacher != "skip":
        assert rows[-1]["answers"] == 40
    assert math.isfinite(rows[-1]["true_return"])
    assert all(rows[-1][f"share_{name}"] > 0 for name in ("environment", "update", "reward"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": "drlhf"},
        {"algorithm": "stoc-sobirl"},
        FULL,
        {"score": "critic"},
        {"env": GRID, **FULL},
        {"env": "Pendulum-v1"},
        {"env": "Pendulum-v1", "recent": 80},  # less than an episode under way, more than a round
        {"env": "Pendulum-v1", **FULL},
        {"members": 2, "query": "disagreement", "candidates": 3},
        {
            "query": "entropy",
            "candidates": 3,
            "temperature": 0.5,
            "entropy_target": False,
            "hypergradient_after": 200,
        },
        {"follower": "sac", "n_step": 3, "normalise": "standard", "anneal": True},
        {"members": 2, "normalise_members": True, "burst": 4, "target_rate": 1.0},
        {"algorithm": "mrn"},
        {"algorithm": "mrn", "env": "Pendulum-v1"},
        {"upper": "critic"},
        {"upper": "return", "score": "critic"},
        {"upper": "critic", "env": GRID, "reward_features": 3, **FULL},
        {
            "upper": "critic",
            "env": GRID,
            "reward_features": 3,
            "score": "exact",
            "entropy_target": False,
            "cool_from": 9.0,
        },
        {"upper": "return", "env": GRID, "score": "exact", "entropy_target": False},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "defaults",
)
def test_a_run_goes_on_to_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    whole, first = make_job(**changes), make_job(**changes)
    for _ in range(2):
        whole.step()
        first.step()
    store = CheckpointStore(tmp_path)
    store.save(first.state_dict(), step=2, config={}, versions={})
    again = make_job(**changes)
    again.load_state_dict(store.load().state)
    for _ in range(2):
        one, other = whole.step(), again.step()
        assert str(untimed(one)) == str(untimed(other))
    for name, part in whole.reward.state_dict().items():
        assert torch.equal(part, again.reward.state_dict()[name]), name
    assert_same_state(again.state_dict()["best"], whole.state_dict()["best"])
    assert_same_state(again.state_dict()["agent"], whole.state_dict()["agent"])


@pytest.mark.parametrize(
    ("changes", "kind", "updates"),
    [
        ({}, SoftQ, 15),
        ({"follower": "soft-q"}, SoftQ, 15),
        ({"follower": "sac"}, DiscreteSAC, 15),
        ({"env": "Pendulum-v1"}, SAC, 15),
        ({"env": GRID}, SoftQ, 15),
        ({"burst": 5}, SoftQ, 15),
        ({"burst": 5, "update_every": 10}, SoftQ, 10),
        ({"burst": 15}, SoftQ, 15),
        ({"burst": 16}, SoftQ, 0),
    ],
)
def test_who_learns_and_how_often(
    changes: dict[str, Any], kind: Any, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bursts after every so many environment steps, of the 120 after the first round."""
    job = make_job(rounds=2, **changes)
    assert isinstance(job.agent, kind)
    job.step()
    assert job.agent.version == 0
    plain, versions = job._collector.collect, set()
    monkeypatch.setattr(
        job._collector, "collect", lambda n: (versions.add(job.agent.version), plain(n))[1]
    )
    row = job.step()
    assert job.agent.version == updates == job.config.updates_due(240)
    assert versions <= set(range(0, updates + 1, changes.get("burst", 1)))
    assert (row["updates_per_second"] > 0) == (updates > 0)


def seen_by_the_agent(job: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What its updates are told."""
    told: list[Any] = []
    plain = job.agent.update
    monkeypatch.setattr(job.agent, "update", lambda *given: (told.append(given), plain(*given))[1])
    return told


def test_the_agent_learning_rate_falls_to_the_end_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(anneal=True, update_every=4)
    rates: list[float] = []
    plain = job.agent.update
    monkeypatch.setattr(
        job.agent,
        "update",
        lambda *given: (
            plain(*given),
            rates.append(job.agent.optimiser.param_groups[0]["lr"]),
            {},
        )[2],
    )
    while not job.done:
        job.step()
    assert len(rates) == 90
    assert rates == pytest.approx([job.config.learning_rate * (1 - k / 90) for k in range(90)])
    assert make_job(anneal=False).agent.anneal_over is None


@pytest.mark.parametrize("n_step", [1, 3])
def test_targets_of_several_steps_see_what_followed(
    n_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(rounds=2, n_step=n_step)
    told = seen_by_the_agent(job, monkeypatch)
    job.step()
    job.step()
    for batch, reward, present in told:
        assert batch.size == 16 * n_step == len(reward)
        if n_step == 1:
            assert present is None
            continue
        there = present[1]
        assert torch.equal(batch.next_observation[:16][there], batch.observation[16:32][there])
    assert n_step == 1 or sum(int(present[2].sum()) for *_, present in told) > 100


@pytest.mark.parametrize("normalise", ["no", "scale", "standard"])
def test_the_agent_is_given_a_normalised_reward(
    normalise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In units that hold for a round; the hyper-gradient has τ in those of the reward itself."""
    job = make_job(
        rounds=2, normalise=normalise, reward_rate=0.01, temperature=0.5, entropy_target=False
    )
    job.step()
    before = copy.deepcopy(job.reward)
    normal = dict(job._normal)
    taus: list[float] = []
    plain = job.learner.step
    monkeypatch.setattr(
        job.learner,
        "step",
        lambda *a, temperature, **more: (
            taus.append(temperature),
            plain(*a, temperature=temperature, **more),
        )[1],
    )
    told = seen_by_the_agent(job, monkeypatch)
    job.step()
    assert set(taus) == {0.5 * normal["scale"]}
    every = Transitions(**job._replay.state_dict()["held"]).select(torch.arange(120))
    with torch.no_grad():
        raw = before(every.observation, every.action)
    if normalise == "no":
        assert normal == {"shift": 0.0, "scale": 1.0}
    else:  # of the 120 transitions of the first round, drawn a thousand times
        assert normal["scale"] == pytest.approx(float(raw.std()), rel=0.15)
        assert abs(normal["shift"] - (float(raw.mean()) if normalise == "standard" else 0)) < 0.1
    batch, reward, _ = told[0]
    with torch.no_grad():
        want = (before(batch.observation, batch.action) - normal["shift"]) / normal["scale"]
    assert torch.allclose(reward, want)


def test_members_are_normalised_for_agent_and_score_alike() -> None:
    job = make_job(rounds=2, members=2, normalise_members=True)
    assert job.reward.scale.tolist() == [1, 1]
    job.step()
    every = Transitions(**job._replay.state_dict()["held"])
    with torch.no_grad():
        each = job.reward.each(every.observation, every.action)
    assert job.reward.scale.tolist() == pytest.approx(each.std(1).tolist(), rel=0.15)
    assert make_job(members=2).reward.scale.tolist() == [1, 1]

    class Plain:
        """The same policy, by the general way."""

        log_prob, probabilities = job.agent.log_prob, job.agent.probabilities

    learner, pairs = copy.deepcopy(job.learner), job.answers.everything()
    for one, follower in ((job.learner, job.agent), (learner, Plain)):
        one.step(pairs, follower, temperature=0.5)
    for ours, theirs in zip(job.reward.parameters(), learner.reward.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_temperature_follows_an_entropy_or_stays() -> None:
    for entropy_target, share in ((False, 0.5), (True, 0.5), (True, 0.9)):
        job = make_job(
            rounds=2, temperature=0.2, entropy_target=entropy_target, entropy_share=share
        )
        assert job.agent.temperature == pytest.approx(0.2)
        job.step()
        job.step()
        assert (job.agent.temperature == 0.2) == (not entropy_target)
        if entropy_target:
            assert job.agent._temperature.entropy_target == pytest.approx(share * math.log(2))
    assert make_job(env="Pendulum-v1").agent._temperature.entropy_target == -1


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"entropy_share": 0.99}, True),
        ({"entropy_share": 0.99, "score": "full-horizon"}, True),
        ({"entropy_share": 0.5}, False),  # an untrained policy is nearly uniform
        ({"entropy_share": 0.99, "entropy_target": False}, False),
        ({"entropy_share": 0.99, "algorithm": "drlhf"}, False),
        ({"entropy_share": 0.99, "score": "critic"}, False),
        ({"env": "Pendulum-v1", "episode_steps": 40}, False),
    ],
)
def test_the_temperature_is_differentiated_where_it_holds_the_entropy(
    changes: dict[str, Any], holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(**changes)
    seen: list[Any] = []
    plain = job.learner.step

    def step(pairs: Any, follower: Any, *, held: Any, **more: Any) -> Any:
        seen.append(held)
        return plain(pairs, follower, held=held, **more)

    monkeypatch.setattr(job.learner, "step", step)
    job.step()
    assert seen
    assert all((held is not None) == holds for held in seen)
    if holds:
        assert len(seen[0]) == 128
        assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("reuse", [True, False])
def test_answers_that_are_used_again_count_as_so_many(
    reuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a round's own answers too: they are used by all updates of the round."""
    job = make_job(reuse=reuse)
    seen: list[tuple[int, bool]] = []
    plain = job.learner.step

    def step(*given: Any, pool: int, renewed: bool, **more: Any) -> Any:
        seen.append((pool, renewed))
        return plain(*given, pool=pool, renewed=renewed, **more)

    monkeypatch.setattr(job.learner, "step", step)
    for _ in range(2):
        seen.clear()
        before = len(job.answers)
        row = job.step()
        pools, renewed = zip(*seen, strict=True)
        assert set(pools) == {len(job.answers) if reuse else len(job.answers) - before}
        assert list(renewed) == [not reuse] + [False] * (len(seen) - 1)
    assert 0 <= row["kept"] <= 1
    assert 0 <= row["capped"] <= 1


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_finished_run_hands_out_its_best_policy(
    keep_best: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(keep_best=keep_best, evaluate_every=1)
    found = iter([1.0, 5.0, math.nan, 3.0])
    states = []

    def evaluate(_: Any) -> Any:
        states.append(job.agent.policy_state())
        return Evaluation(torch.tensor([next(found)]), torch.ones(1))

    monkeypatch.setattr(PreferenceJob, "evaluate", evaluate)
    while not job.done:
        job.step()
    assert_same_state(job.agent.policy_state(), states[1 if keep_best else 3])
    summary = job.summary()
    assert summary["true_return"] == (5.0 if keep_best else 3.0)
    assert (summary["last_return"], summary["best_return"]) == (3.0, 5.0)
    again = make_job(keep_best=keep_best, evaluate_every=1)
    again.load_state_dict(job.state_dict())
    assert_same_state(again.agent.policy_state(), job.agent.policy_state())
    assert again.summary() == summary


def test_the_algorithms_differ_by_the_hypergradient_alone() -> None:
    """Same seed: same first answers, and the same reward until a score comes in."""
    jobs = {
        name: make_job(algorithm=name, reward_steps=1, stale="keep", pair_batch=40, average=0.0)
        for name in ("sobirl", "drlhf")
    }
    late = make_job(reward_steps=1, stale="keep", pair_batch=40, hypergradient_after=10_000)
    rows = {name: job.step() for name, job in jobs.items()}
    delayed = late.step()
    assert rows["drlhf"]["indirect_share"] == 0 == delayed["indirect_share"]
    assert rows["sobirl"]["indirect_share"] > 0
    assert delayed["cross_entropy"] == rows["drlhf"]["cross_entropy"]
    assert delayed["cross_entropy"] == rows["sobirl"]["cross_entropy"]
    for name, part in late.reward.state_dict().items():
        assert torch.equal(part, jobs["drlhf"].reward.state_dict()[name])
    moved = jobs["sobirl"].reward.state_dict()
    assert any(
        not torch.equal(part, moved[name]) for name, part in late.reward.state_dict().items()
    )


@pytest.mark.parametrize(
    "changes",
    [{"algorithm": "stoc-sobirl"}, {"reuse": False}, {"algorithm": "drlhf", "reuse": False}],
    ids=str,
)
def test_without_reuse_the_newest_answers_alone_are_learned_from(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(**changes)
    seen: list[Any] = []
    plain = job.learner.step
    monkeypatch.setattr(
        job.learner,
        "step",
        lambda pairs, *rest, **more: (seen.append(pairs), plain(pairs, *rest, **more))[1],
    )
    while not job.done:
        asked = job.answers.added
        seen.clear()
        job.step()
        own = job.answers.select(
            torch.arange(len(job.answers) - (job.answers.added - asked), len(job.answers))
        )
        marks = {tuple(x.flatten().tolist()) for x in own.first.observation}
        assert seen
        for pairs in seen:
            assert {tuple(x.flatten().tolist()) for x in pairs.first.observation} <= marks


def test_the_stochastic_algorithm_takes_the_whole_gradient_of_the_rounds_own_steps() -> None:
    job = make_job(algorithm="stoc-sobirl", horizon=7)
    learner, score = job.learner, job._score
    assert isinstance(score, FullHorizon)
    assert (score.steps, score.discount) == (7, job.config.discount)
    assert (learner.weigh_loss, learner.indirect_limit) == (True, math.inf)
    while not job.done:
        before = job._recorder.episodes()
        old = {tuple(row) for part in before for row in part.observation.tolist()}
        job.step()
        seen = [row for part in job._recorder.episodes() for row in part.observation.tolist()]
        assert len(seen) == job.config.environment_steps
        assert old.isdisjoint(map(tuple, seen))


def test_what_is_left_to_the_algorithm_is_settled_and_cannot_be_contradicted() -> None:
    usual = {"reuse": True, "score": "one-step", "indirect_limit": 0.3, "weigh_loss": False}
    whole = {
        "reuse": False,
        "score": "full-horizon",
        "indirect_limit": math.inf,
        "weigh_loss": True,
        "query": "uniform",
    }
    for algorithm, settled in (("sobirl", usual), ("drlhf", usual), ("stoc-sobirl", whole)):
        config = PreferenceConfig(algorithm=algorithm)  # type: ignore[arg-type]
        plain = to_plain(config)
        assert {name: plain[name] for name in settled} == settled
        assert from_plain(PreferenceConfig, plain) == config
    assert PreferenceConfig(**untyped(whole)).indirect_limit == math.inf
    for name, value in (usual | {"score": "critic", "query": "entropy"}).items():
        fix = f"Fix: leave {name} out, or take algorithm=sobirl"
        with pytest.raises(ConfigError, match=rf"^BIRL-E801 {name} is {value}, with .*{fix}"):
            PreferenceConfig(**untyped({"algorithm": "stoc-sobirl", name: value}))
    with pytest.raises(ConfigError, match="did you mean 'one-step'"):
        PreferenceConfig(score="one-stap")  # type: ignore[arg-type]


def test_every_answer_is_logged_and_never_twice(tmp_path: Path) -> None:
    job = make_job(teacher="skip")
    directory = directory_of(tmp_path / "run", job)
    run(job, directory, checkpoint_every=1)
    log = tmp_path / "run" / "answers.sqlite"
    with AnswerLog(log) as kept:
        assert len(kept) == 40
        silent = sum(answer["label"] is None for answer in kept.answers)
        assert job.answers.added == 40 - silent
    # From an earlier checkpoint: the same questions, answered already.
    newest = max(CheckpointStore(directory.checkpoints).paths(), key=lambda path: path.name)
    newest.rename(tmp_path / "away")
    before = log.read_bytes()
    again = make_job(teacher="skip")
    run(again, RunDirectory(tmp_path / "run"), checkpoint_every=1)
    assert log.read_bytes() == before


def test_an_answer_that_cannot_be_logged_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(log: AnswerLog, pairs: Any) -> None:
        raise AnswerLogWriteError("no room")

    job = make_job()
    monkeypatch.setattr(AnswerLog, "record", full)
    with pytest.raises(AnswerLogWriteError):
        run(job, directory_of(tmp_path / "run", job))
    assert job.answers.added == 0
    assert job.learner.steps == 0


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_its_log(tmp_path: Path) -> None:
    job = make_job()
    directory = directory_of(tmp_path / "run", job)
    job.attach(directory.path)
    job.step()
    job.detach()
    with AnswerLog(tmp_path / "run" / "answers.sqlite") as log:
        before = log.answers
    again = make_job()
    run(again, directory)
    with AnswerLog(tmp_path / "run" / "answers.sqlite") as log:
        assert log.answers[: len(before)] == before
        assert 20 <= len(before) < len(log) == 40


def test_a_log_of_another_run_is_refused(tmp_path: Path) -> None:
    for seed, name in ((0, "one"), (1, "other")):
        job = make_job(seed=seed)
        run(job, directory_of(tmp_path / name, job), checkpoint_every=1)
    (tmp_path / "one/answers.sqlite").replace(tmp_path / "other/answers.sqlite")
    job = make_job(seed=1)
    with pytest.raises(AnswerLogCorruptError, match="not those of the stored state"):
        run(job, RunDirectory(tmp_path / "other"))


def test_labels_are_counted_until_the_threshold() -> None:
    job = make_job(threshold=1.0)
    job.step()
    assert job.summary()["labels_to_threshold"] is None  # not evaluated yet
    asked = job.step()["labels"]
    assert 20 < asked < 40
    job.step()
    job.step()
    assert job.summary()["labels_to_threshold"] == asked
    never = make_job(threshold=1e9)
    while not never.done:
        never.step()
    assert never.summary()["labels_to_threshold"] is None


def test_reward_accuracy_is_measured_on_answers_not_learned_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from birl_ext.problems.preference import job as module

    added: list[int] = []
    job = make_job()
    plain = untyped(module).evaluate
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda *given, **more: (added.append(job.learner.steps), plain(*given, **more))[1],
    )
    assert math.isnan(job.step()["foretold"])  # there was no reward yet
    assert added == []
    assert 0 <= job.step()["foretold"] <= 1
    assert added == [3]  # updates of the first round: none yet from these answers


def test_phi_is_the_cross_entropy_of_answers_not_learned_from() -> None:
    job = make_job(noise=0.1, labels=80)
    assert math.isnan(job.step()["phi"])
    while not job.done:
        before, known = copy.deepcopy(job.reward), job.answers.added
        row = job.step()
        new = job.answers.select(torch.arange(known, job.answers.added))
        loss = bradley_terry(margins(before, new), new.label, 0.1).mean()
        assert row["phi"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert row["cross_entropy"] != row["phi"] == job.summary()["phi"]
    assert all(name.isidentifier() and name.islower() for name in {**row, **job.summary()})
    assert list(job.figures([], {})) == ["true_return", "phi", "reward_accuracy"]


def test_what_cannot_be_run_is_named() -> None:
    for changes, error, match in (
        ({"environments": 7}, ConfigError, "multiple of environments"),
        ({"learning_starts": 1}, ConfigError, "learning_starts is 1"),
        ({"query": "disagreement"}, ConfigError, "members is 1"),
        ({"entropy_share": 1.0}, ConfigError, "entropy_share is 1"),
        ({"video_every": -1}, ConfigError, "video_every is -1"),
        ({"reward_rate": math.nan}, ConfigError, "reward_rate is nan"),
        ({"env": "NoSuchThing-v0"}, OptionError, "NoSuchThing-v0"),
        ({"env": "os:Thing-v0"}, OptionError, "names code to import"),
        ({"env": "CartPole"}, OptionError, "no version .*CartPole-v1.* take CartPole-v1"),
        ({"env": "CliffWalking-v1"}, ConfigError, "no time limit .*--episode-steps"),
        ({"env": "Acrobot-v1", **FULL}, OptionError, "Acrobot-v1 .*restore.*score=one-step"),
        ({"env": "Acrobot-v1", "algorithm": "stoc-sobirl"}, OptionError, "algorithm=sobirl"),
        ({"seed": -1}, ConfigError, "seed is -1"),
        ({"hidden": (0,)}, ConfigError, r"hidden is \(0,\)"),
        ({"labels": 10}, ConfigError, "labels is 10"),
        ({"learning_starts": -4}, ConfigError, "learning_starts is -4"),
        ({"algorithm": "drlhf", "limit": 0.5}, ConfigError, "limit is 0.5"),
        ({"indirect_limit": -1.0}, ConfigError, "indirect_limit is -1"),
        ({"device": "meta"}, ConfigError, "device is 'meta' .*cpu, cuda"),
        ({"device": "abacus"}, ConfigError, "device is 'abacus'"),
        ({"temperature": 0.0}, ConfigError, "temperature is 0"),
        ({"env": GRID, "members": 2}, ConfigError, "members is 2"),
        ({"env": "Pendulum-v1", "score": "critic"}, ConfigError, "discrete actions"),
        ({"env": GRID, "score": "critic"}, ConfigError, "one-step"),
        ({"env": "Pendulum-v1", "follower": "soft-q"}, ConfigError, "continuous actions .*sac"),
        ({"follower": "ppo"}, ConfigError, "follower is 'ppo'"),
        ({"env": GRID, "follower": "sac"}, ConfigError, "table .*soft-q"),
        ({"burst": 0}, ConfigError, "burst is 0"),
        ({"n_step": 0}, ConfigError, "n_step is 0"),
        ({"n_step": 51, "replay": 50}, ConfigError, r"n_step is 51 .allowed: up to replay, 50:"),
        (
            {"n_step": 50_000, "batch_size": 4096, "hidden": (4096,)},
            SizeLimitError,
            r"n_step 50000 and hidden \(4096,\) needs",
        ),
        ({"normalise": "mean"}, ConfigError, "normalise is 'mean'"),
        ({"normalise_members": True}, ConfigError, "members is 1 .*normalise_members"),
    ):
        with pytest.raises(error, match=match):
            make_job(**changes)


@pytest.mark.parametrize(
    "name", ["pairs", "replay", "rounds", "labels", "candidates", "batch_size", "members", "hidden"]
)
@pytest.mark.parametrize("count", [10**12, 10**14])
def test_more_than_fits_into_the_memory_is_named(name: str, count: int) -> None:
    """Before anything is made."""
    value = (count,) if name == "hidden" else count
    with pytest.raises(SizeLimitError, match=rf"{count}.* GiB of this machine.*lower .*{name}"):
        make_job(**{"query": "entropy", name: value})


def test_reward_accuracy_is_that_of_the_batches_with_a_strict_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job()
    plain, found = job.learner.step, iter([0.25, math.nan, 0.75] + 3 * [math.nan])
    monkeypatch.setattr(
        job.learner, "step", lambda *a, **k: plain(*a, **k)._replace(accuracy=next(found))
    )
    assert job.step()["reward_accuracy"] == 0.5
    assert math.isnan(job.step()["reward_accuracy"])  # ties alone


def test_a_teacher_that_skips_names_the_setting_where_rewards_are_negative() -> None:
    with pytest.raises(ConfigError, match=r"teacher is skip, .*at Pendulum-v1 .*--teacher"):
        make_job(env="Pendulum-v1", teacher="skip")  # before the first step


def test_the_round_that_is_played_in_advance_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean that is judged beforehand is the one that the first questions are asked at, with
    random actions and with those of the agent."""
    told: list[float] = []
    plain = PreferenceJob._mean_reward

    def noted(*given: Any) -> float:
        told.append(plain(*given))
        return told[-1]

    monkeypatch.setattr(PreferenceJob, "_mean_reward", noted)
    for changes in ({"env": GRID}, {"env": GRID, "learning_starts": 400}):
        told.clear()
        make_job(teacher="skip", environment_steps=800, **changes).step()
        assert len(told) == 2
        assert told[0] == told[1] > 0
    told.clear()
    make_job(teacher="skip", env="Pendulum-v1", labels=0, initial_labels=0)  # nobody is asked
    make_job(env="Pendulum-v1")
    assert not told


class Clouded(CartPoleEnv):
    """Its reward is the same everywhere."""

    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 0.0, terminated, truncated, info


@pytest.mark.filterwarnings("default:.*found any fragment better than another:UserWarning")
def test_answers_that_carry_nothing_are_said_to() -> None:
    gymnasium.register("Clouded-v0", untyped(Clouded), max_episode_steps=50)
    words = "Clouded-v0: the oracle teacher has not found any fragment better than another"
    try:
        job = make_job(env="Clouded-v0", teacher="oracle")
        with pytest.warns(UserWarning, match="all 27 answers are ties"):
            row = job.step()
        with pytest.warns(UserWarning, match=words):
            job.step()
        assert (row["answers"], row["strict_answers"]) == (27, 0)
        assert job.summary()["strict_answers"] == 0 < len(job.answers)
        job = make_job(env=GRID, teacher="oracle", fragment=20, environment_steps=800)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            row = job.step()
        label = job.answers.everything().label
        assert row["strict_answers"] == (label != 0.5).sum() > 0
    finally:
        gymnasium.registry.pop("Clouded-v0")


@pytest.mark.parametrize("algorithm", ["sobirl", "drlhf"])
def test_a_lead_is_scored_and_not_compared(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher, and the loss, see the fragment without it."""
    job = make_job(algorithm=algorithm, lead=4, teacher="oracle")
    seen: list[int] = []
    plain = job.teacher.__call__
    monkeypatch.setattr(
        type(job.teacher),
        "__call__",
        lambda teacher, first, second: (
            seen.append(first.present.shape[1]),
            plain.__func__(teacher, first, second),
        )[1],
    )
    job.step()
    assert set(seen) == {8}
    pairs = job.answers.everything()
    assert pairs.first.present.shape[1] == 12
    before = copy.deepcopy(job.reward)
    outcome = job.learner.step(pairs, job.agent, temperature=1.0)
    loss = bradley_terry(margins(before, pairs.after(4)), pairs.label).mean()
    assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-5)


RETURN = {  # what is not used with it as the defaults are
    "upper": "return",
    "labels": 300,
    "initial_labels": 60,
    "fragment": 25,
    "initial_epochs": 100,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 1}, "the agent makes no update: 120 of 120 environment steps"),
        ({"learning_starts": 480}, "no update: 480 of 480"),
        ({"update_every": 10**6}, "no update: 120 of 480 .*, and 1000000 go"),
        ({"burst": 10**5}, "no update: 120 of 480 .*, and 800000 go"),
        ({"labels": 0, "initial_labels": 0}, "the reward stays as it was drawn: labels is 0"),
        ({"reward_steps": 0, "initial_epochs": 0}, "as it was drawn: reward_steps is 0"),
        ({"reward_steps": 0, "initial_labels": 0}, "as it was drawn: reward_steps is 0"),
        ({"reward_steps": 0, **RETURN}, "as it was drawn: reward_steps is 0"),
    ],
)
def test_a_run_that_cannot_learn_says_so(changes: Any, words: str, tmp_path: Path) -> None:
    job = make_job(**changes)
    with pytest.warns(UserWarning, match=rf"CartPole-v1: .*{words}") as said:
        job.attach(tmp_path)
    job.detach()
    assert len(said) == 1
    for fine in ({}, {"reward_steps": 0}, {"initial_epochs": 0}, RETURN):
        assert PreferenceConfig(**{**SMALL, **fine}).unlearned() == []


@pytest.mark.parametrize("query", ["entropy", "disagreement"])
def test_a_round_may_have_no_question(query: str) -> None:
    job = make_job(query=query, members=2, candidates=2, labels=22, rounds=4)
    while not job.done:
        row = job.step()
    assert row["labels"] == 22


def test_one_answer_is_enough_for_the_stochastic_variant() -> None:
    job = make_job(algorithm="stoc-sobirl", labels=23, rounds=4, schedule="constant")
    rows = [job.step() for _ in range(4)]
    assert [row["answers"] for row in rows] == [21, 22, 22, 23]
    assert ["cross_entropy" in row for row in rows] == [True, True, False, True]


def test_a_teacher_of_signs_takes_the_mean_of_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[float] = []
    for sign_only in (False, True):
        job = make_job(env="Pendulum-v1", teacher="equal", sign_only=sign_only)
        monkeypatch.setattr(job.teacher, "observe", lambda mean: observed.append(mean))
        job.teacher.mean_reward = 1.0
        job.step()
    assert observed[0] < -1.5
    assert observed[1] == -1.0


def test_an_environment_without_a_time_limit_takes_that_of_the_settings() -> None:
    job = make_job(env="CliffWalking-v1", episode_steps=30, rounds=2)
    job.step()
    assert job.evaluate().lengths.tolist() == [30, 30]


def test_recent_bounds_episodes_that_never_end() -> None:
    job = make_job(env="Pendulum-v1", recent=40, rounds=1)
    job.step()
    assert [len(episode.reward) for episode in job._recorder.episodes()] == [40, 40]


class Bytes(gymnasium.Env[Any, Any]):
    """Shows bytes drawn at random, for ten steps."""

    def __init__(self, shape: tuple[int, ...], action_space: Any, render_mode: Any = None) -> None:
        self.observation_space = Box(0, 255, shape, np.uint8)
        self.action_space = action_space

    def show(self) -> Any:
        shape = self.observation_space.shape
        return self.np_random.integers(256, size=shape, dtype=np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = 10
        return self.show(), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        return self.show(), float(self.np_random.normal()), self.left == 0, False, {}


@pytest.mark.parametrize(
    ("shape", "action_space"),
    [
        ((6,), Discrete(2)),
        ((6,), Box(-1, 1, (2,))),
        ((8, 8), Discrete(2)),
        ((3, 43, 43), Discrete(2)),
    ],
    ids=["vector", "vector, box of actions", "two axes", "colours"],
)
def test_bytes_are_numbers_or_pixels_that_need_not_be_stacks(
    shape: tuple[int, ...], action_space: Any
) -> None:
    gymnasium.register("Bytes-v0", partial(Bytes, shape, action_space), max_episode_steps=10)
    try:
        job = make_job(
            env="Bytes-v0",
            rounds=2,
            environment_steps=40,
            update_every=20,
            burst=1,
            initial_epochs=1,
        )
        while not job.done:
            row = job.step()
        assert math.isfinite(row["cross_entropy"])
        assert job.agent.version == 2
    finally:
        gymnasium.registry.pop("Bytes-v0")


def test_frames_of_atari_are_held_once() -> None:
    config = PreferenceConfig(env="ALE/BeamRider-v5", replay=10)
    assert isinstance(make_replay(config), FrameReplay)


# Environments that fail


class Fragile(CartPoleEnv):
    """CartPole that goes wrong in its 190th step, counted over all episodes of this copy."""

    def __init__(self, fault: str = "", render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.fault = fault
        self.count = 0

    def step(self, action: Any) -> Any:
        self.count += 1
        observation, reward, *rest = super().step(action)
        if self.count == 190:
            match self.fault:
                case "raises":
                    raise RuntimeError("wheel came off")
                case "NaN":
                    reward = math.nan
                case "unseen":
                    observation = observation * math.nan
                case "reshaped":
                    observation = observation[:3]
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
        return observation, reward, *rest


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raises", "it raised RuntimeError: wheel came off"),
        ("NaN", "its reward is nan"),
        ("unseen", r"its observation is nan in entry \(0,\)"),
        ("reshaped", r"its observation has shape \(3,\)"),
        ("killed", "the worker ended with signal SIGKILL"),
        ("stopped", "no answer within 2 s"),
    ],
)
def test_a_failing_environment_leaves_a_checkpoint_to_go_on_from(
    fault: str, words: str, tmp_path: Path
) -> None:
    """And the run that goes on ends with the bits of one whose environment did not fail."""
    name = f"Fragile{fault}-v0"
    changes = {"env": name, "parallel": fault in ("killed", "stopped"), "timeout": 2.0}
    gymnasium.register(name, partial(Fragile, fault), max_episode_steps=500)
    try:
        broken = make_job(**changes)
        directory = directory_of(tmp_path / "run", broken)
        place = f"{words} at environment 0 of '{name}', seed .*, step .*, action "
        with pytest.raises(EnvironmentFailureError, match=place):
            run(broken, directory, checkpoint_every=1)
        assert CheckpointStore(directory.checkpoints).load().step == 3
        again = make_job(**changes)
        run(again, directory, checkpoint_every=1)
        gymnasium.registry.pop(name)
        gymnasium.register(name, untyped(Fragile), max_episode_steps=500)
        whole = make_job(env=name)
        for row in directory.history():
            expected = {key: value for key, value in untimed(row).items() if key != "step"}
            assert str(untimed(whole.step())) == str(expected)
    finally:
        gymnasium.registry.pop(name)


# From pixels and bodies: the whole machinery, end to end

ATARI: dict[str, Any] = {
    "env": "ALE/BeamRider-v5",
    "teacher": "skip",
    "sign_only": True,
    "rounds": 3,
    "environment_steps": 1200,
    "environments": 4,
    "episode_steps": 600,
    "update_every": 150,
    "burst": 1,
    "batch_size": 16,
    "replay": 2000,
    "recent": 1200,
    "fragment": 10,
    "labels": 900,
    "initial_labels": 300,
    "schedule": "constant",
    "initial_epochs": 4,
    "pair_batch": 8,
    "reward_steps": 3,
    "reward_rate": 1e-3,
    "evaluate_every": 3,
    "evaluation_episodes": 1,
    "video_every": 3,
}
MUJOCO: dict[str, Any] = {
    "env": "HalfCheetah-v5",
    "teacher": "oracle",
    "rounds": 4,
    "environment_steps": 400,
    "environments": 2,
    "episode_steps": 200,
    "update_every": 8,
    "burst": 1,
    "batch_size": 32,
    "hidden": (32, 32),
    "fragment": 10,
    "labels": 300,
    "initial_labels": 200,
    "initial_epochs": 30,
    "reward_steps": 10,
    "reward_rate": 1e-3,
    "evaluate_every": 2,
    "evaluation_episodes": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ATARI, MUJOCO], ids=["Atari", "MuJoCo"])
def test_a_reward_is_learned_from_pixels_and_from_bodies(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers that it had not seen are foretold, far above chance; a run that goes on from the
    checkpoint before the last round has the bits of one that was not stopped, and films it.
    """
    for package in ("ale_py", "cv2", "imageio_ffmpeg", "mujoco"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings where it stands
    config = PreferenceConfig(**settings)
    whole, store = PreferenceJob(config), CheckpointStore(tmp_path / "run" / "checkpoints")
    directory = directory_of(tmp_path / "run", whole)
    rows = [whole.step() for _ in range(config.rounds - 1)]
    step = len(rows)
    lines = "".join(json.dumps({"step": number}) + "\n" for number in range(1, step + 1))
    directory.metrics_path.write_text(lines)
    store.save(
        whole.state_dict(),
        step=step,
        config=to_plain(config),
        versions=versions(),
        metrics=hashlib.sha256(lines.encode()).hexdigest(),
    )
    rows.append(whole.step())

    again = PreferenceJob(config)
    run(again, directory)
    assert str(untimed(directory.history()[-1])) == str(untimed({"step": step + 1, **rows[-1]}))

    answers = [after["answers"] - before["answers"] for before, after in pairwise(rows)]
    right = sum(n * row["foretold"] for n, row in zip(answers, rows[1:], strict=True))
    chance, spread = sum(answers) / 2, math.sqrt(sum(answers)) / 2
    assert right > chance + 3 * spread, (answers, [row["foretold"] for row in rows])
    assert again.agent.version > 0
    assert rows[-1]["share_update"] > 0
    assert math.isfinite(rows[-1]["true_return"])
    films = sorted((directory.path / "videos").glob("*.mp4"))
    if config.video_every:
        assert [film.name for film in films] == [f"round-{config.rounds:05d}.mp4"]
        assert films[0].stat().st_size > 1000


@pytest.mark.parametrize("error", [RenderError, MissingDependencyError])
def test_a_run_whose_environment_cannot_be_filmed_goes_on(
    error: type[BirlError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from birl_ext.problems.preference import job as module

    def refuse(*given: Any, **more: Any) -> None:
        raise error("no pictures here")

    monkeypatch.setattr(module, "record_video", refuse)
    made = make_job(video_every=2)
    with pytest.warns(UserWarning, match="no pictures here"):
        run(made, directory_of(tmp_path / "run", made))
    assert made.done


def test_without_the_film_package_a_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingDependencyError, match=r"imageio with ffmpeg.*birl_ext\[rl\]"):
        make_job(video_every=2)
    make_job()


def test_a_run_on_each_device(device: str) -> None:
    job = make_job(device=device, members=2)
    rows = [job.step() for _ in range(2)]
    assert next(job.reward.parameters()).device.type == torch.device(device).type
    assert math.isfinite(rows[-1]["cross_entropy"])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_an_example_configuration_is_accepted(file: Path) -> None:
    """And names an environment whose spaces a run supports."""
    document = read_toml(file)
    assert document["problem"] == "preference"
    config = from_plain(PreferenceConfig, document["config"])
    assert f"examples/preference/{file.name}" in file.read_text()
    if is_atari(config.env):
        pytest.importorskip("ale_py")
    with make_environments(environment_source(config)[0]) as environments:
        assert environments.spaces.observation_shape is not None
