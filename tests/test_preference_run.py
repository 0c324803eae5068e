"""Preference runs: every part that the settings name is at work, and a stopped run goes on to the
same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_run import SMALL, TIMED, make_job

from birl_ext.errors import AnswerLogCorruptError, ConfigError, OptionError
from birl_ext.preferences.answer_log import AnswerLog
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.runs.config import to_plain
from birl_ext.runs.directory import RunDirectory
from birl_ext.runs.loop import run

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
    shares = [rows[-1][f"share_{name}"] for name in ("environment", "update", "reward")]
    assert sum(shares) == pytest.approx(1)


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
        {"env": "Pendulum-v1", **FULL},
        {"members": 2, "query": "disagreement", "candidates": 3},
        {"query": "entropy", "candidates": 3, "temperature": 0.5, "hypergradient_after": 200},
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


def test_the_algorithms_differ_by_the_hypergradient_alone() -> None:
    """Same seed: same first answers, and the same reward until a score comes in."""
    jobs = {
        name: make_job(algorithm=name, reward_steps=1, stale="keep", pair_batch=40)
        for name in ("sobirl", "drlhf")
    }
    late = make_job(reward_steps=1, stale="keep", pair_batch=40, hypergradient_after=10_000)
    rows = {name: job.step() for name, job in jobs.items()}
    delayed = late.step()
    assert rows["drlhf"]["indirect_share"] == 0 == delayed["indirect_share"]
    assert rows["sobirl"]["indirect_share"] > 0
    assert delayed["objective"] == rows["drlhf"]["objective"] == rows["sobirl"]["objective"]
    for name, part in late.reward.state_dict().items():
        assert torch.equal(part, jobs["drlhf"].reward.state_dict()[name])
    moved = jobs["sobirl"].reward.state_dict()
    assert any(
        not torch.equal(part, moved[name]) for name, part in late.reward.state_dict().items()
    )


def test_the_stochastic_variant_learns_from_the_newest_answers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(algorithm="stoc-sobirl")
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


def test_every_answer_is_logged_before_it_is_used_and_never_twice(tmp_path: Path) -> None:
    job = make_job(teacher="skip")
    directory = directory_of(tmp_path / "run", job)
    run(job, directory, checkpoint_every=1)
    log = tmp_path / "run" / "answers.log"
    job.detach()
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
    again.detach()
    assert log.read_bytes() == before


def test_a_log_of_another_run_is_refused(tmp_path: Path) -> None:
    for seed, name in ((0, "one"), (1, "other")):
        job = make_job(seed=seed)
        run(job, directory_of(tmp_path / name, job), checkpoint_every=1)
        job.detach()
    for file in ("answers.log", "answers.log.head"):
        (tmp_path / "one" / file).replace(tmp_path / "other" / file)
    job = make_job(seed=1)
    with pytest.raises(AnswerLogCorruptError, match="not those of the stored state"):
        run(job, RunDirectory(tmp_path / "other"))
    job.detach()


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
    plain = module.evaluate
    monkeypatch.setattr(
        module, "evaluate", lambda *given: (added.append(job.learner.steps), plain(*given))[1]
    )
    job.step()
    assert added == [0]


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
        ({"env": "Acrobot-v1", **FULL}, OptionError, "Acrobot-v1"),
        ({"env": "Pendulum-v1", "score": "critic"}, ConfigError, "discrete actions"),
        ({"env": GRID, "score": "critic"}, ConfigError, "one-step"),
    ):
        with pytest.raises(error, match=match):
            make_job(**changes)


# From pixels and bodies: minutes of CI that show the whole machinery

ATARI: dict[str, Any] = {
    **SMALL,
    "env": "ALE/Pong-v5",
    "rounds": 3,
    "environment_steps": 160,
    "update_every": 40,
    "evaluate_every": 3,
    "evaluation_episodes": 1,
    "episode_steps": 100,
    "initial_epochs": 2,
    "recent": 400,
    "pair_batch": 8,
    "labels": 24,
    "initial_labels": 16,
    "video_every": 3,
}
MUJOCO: dict[str, Any] = {
    **SMALL,
    "env": "HalfCheetah-v5",
    "teacher": "oracle",
    "rounds": 4,
    "environment_steps": 400,
    "episode_steps": 200,
    "hidden": (32, 32),
    "labels": 300,
    "initial_labels": 200,
    "initial_epochs": 30,
    "fragment": 10,
    "reward_steps": 10,
    "reward_rate": 1e-3,
}
