"""SoBiRL and DRLHF as a program uses them: what they take, learn, save, load and refuse."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import random
import runpy
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from cases import untyped
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from preference_run import SMALL, TIMED, make_job

import birl_ext
from birl_ext.errors import (
    BirlError,
    ConfigError,
    EnvironmentFailureError,
    OptionError,
    TeacherError,
)
from birl_ext.preferences.answer_log import AnswerLog
from birl_ext.preferences.fragments import Fragments
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.preference.job import PreferenceJob
from birl_ext.runs.directory import RunDirectory

DRLHF, MRN = birl_ext.DRLHF, birl_ext.MRN
SoBiRL, StocSoBiRL = birl_ext.SoBiRL, birl_ext.StocSoBiRL


class Counting(gymnasium.Env[Any, Any]):
    """Shows how many steps its episode has taken; the reward is the action."""

    observation_space = Box(0, 1000, (1,))
    action_space = Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.steps = 0
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.seen(), float(action), False, False, {}

    def seen(self) -> Any:
        return np.array([self.steps], np.float32)


class Restorable(Counting):
    """Can be put into the state of any observation."""

    def restore(self, observation: Any) -> None:
        self.steps = int(observation[0])


class Counted:
    """Prefers what acts more, remembers how often it was asked, and may fail."""

    def __init__(self, fails_at: int = -1) -> None:
        self.batches, self.fails_at = 0, fails_at

    def __call__(self, first: Fragments, second: Fragments) -> Any:
        self.batches += 1
        if self.batches == self.fails_at:
            self.fails_at = -1
            raise RuntimeError("gone for lunch")
        ours, theirs = (part.action.sum(-1) for part in (first, second))
        return torch.where(ours == theirs, 0.5, (ours > theirs).float())

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: Any) -> None:
        self.batches = state["batches"]


def short() -> Any:
    return TimeLimit(Counting(), 9)


ONE = short()


def counting_vector(mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> SyncVectorEnv:
    return SyncVectorEnv([short, short], autoreset_mode=mode)


def untimed(history: Any) -> Any:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in history]


def same(one: Any, other: Any) -> None:
    np.testing.assert_equal(untimed(one.history), untimed(other.history))
    seen = torch.arange(20.0)[:, None]
    assert one.policy(seen).tolist() == other.policy(seen).tolist()
    with torch.no_grad():
        assert torch.equal(one.reward.all_actions(seen), other.reward.all_actions(seen))


def test_a_program_and_the_command_line_make_the_same_run(tmp_path: Path) -> None:
    settings = {**SMALL, "seed": 5, "hidden": [16]}
    made = SoBiRL("CartPole-v1", "mistake", directory=tmp_path / "a", **settings).learn()
    job = make_job(teacher="mistake", seed=5)
    rows = []
    while not job.done:
        rows.append({"step": job._round + 1, **job.step()})
    np.testing.assert_equal(untimed(made.history), untimed(rows))
    assert made.config == job.config
    assert birl_ext.load_run(tmp_path / "a").config == job.config
    assert made.summary is not None
    assert made.summary["labels"] == 40
    drawn = [made.predict(np.zeros((99, 4)), greedy=False).tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert repr(made) == "SoBiRL('CartPole-v1', 'mistake', algorithm='sobirl': 4 of 4 rounds)"


@pytest.mark.parametrize("learner", [SoBiRL, StocSoBiRL, DRLHF, MRN])
def test_an_own_environment_and_an_own_teacher(learner: Any, tmp_path: Path) -> None:
    teacher, build = Counted(), Restorable if learner is StocSoBiRL else Counting
    made = learner(build, teacher, episode_steps=9, **SMALL).learn(progress=False)
    assert teacher.batches == 4
    assert max(row["true_return"] for row in made.history if "true_return" in row) <= 9
    assert made.config.algorithm == learner.ALGORITHMS[0]
    path = made.save(tmp_path / "deep" / "saved")
    assert not list(path.rglob("*.lock"))
    found = learner.load(path, environment=build)  # the teacher is not needed
    same(found, made)
    assert found.learn() is found  # nothing is left to do
    assert {drawn.parent for drawn in found.plot()} == {path / "figures"}
    assert (path / "figures" / "true_return.png").stat().st_size > 1000
    call = rf"birl_ext\.{learner.__name__}\.load\(DIR, env"
    with pytest.raises(ConfigError, match=rf"^BIRL-E801 env is <\S+:{build.__name__}>: .*{call}"):
        learner.load(path)
    with pytest.raises(ConfigError, match=r"not empty.*give another path"):
        made.save(path)


def test_the_example_learns_what_its_teacher_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parent.parent / "examples" / "own_environment_and_teacher.py"
    runpy.run_path(str(example), run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()
    returns = [float(word) for word in first.partition(": ")[2].split(", ")]
    assert returns[-1] > -20 > returns[0]  # whoever does nothing has -25 on average
    assert second.endswith("right")


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_when_asked_for(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[float] = []

    @contextlib.contextmanager
    def bar(*given: Any, **more: Any) -> Any:
        yield lambda row: rows.append(row["step"])

    monkeypatch.setattr("birl_ext.runs.loop.progress", bar)
    SoBiRL(short, Counted(), **SMALL).learn(progress=shown)
    assert rows == [1, 2, 3, 4] * shown


def test_what_fails_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = SoBiRL(short, Counted(), **SMALL).learn(progress=False)
    teacher = Counted(fails_at=3)
    broken = SoBiRL(short, teacher, **SMALL)
    with pytest.raises(TeacherError, match="raised RuntimeError: gone for lunch") as caught:
        broken.learn(progress=False)
    (note,) = caught.value.__notes__
    assert note.endswith("there with: learn()")
    assert broken.summary is None
    # What is shown, what acts and what is saved is what learning goes on from.
    assert repr(broken).endswith("0 of 4 rounds)")
    assert broken.history == []
    seen = torch.arange(20.0)[:, None]
    found = SoBiRL.load(broken.save(tmp_path / "saved"), environment=short)
    assert found.policy(seen).tolist() == broken.policy(seen).tolist()
    assert broken._job.agent.version == 0
    same(broken.learn(progress=False), whole)


def test_what_is_loaded_shows_what_it_acts_with(tmp_path: Path) -> None:
    made = SoBiRL(short, Counted(fails_at=3), directory=tmp_path / "run", **SMALL)
    with pytest.raises(TeacherError):
        made.learn(progress=False)
    assert len(RunDirectory(tmp_path / "run").history()) == 2  # the checkpoint is of none
    found = SoBiRL.load(tmp_path / "run", environment=short)
    assert found.history == []
    assert repr(found).endswith("0 of 4 rounds)")


def test_a_signal_stops_after_the_round_and_the_rest_can_be_learned(tmp_path: Path) -> None:
    whole = SoBiRL(short, Counted(), **SMALL).learn(progress=False)
    stopped = SoBiRL(short, Counted(), directory=tmp_path / "run", **SMALL)

    def stop(row: Any) -> None:
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        stopped.learn(progress=False, loggers=[stop])
    assert len(stopped.history) == 2
    # From the disk, the teacher not at hand: it is named, and its memory is kept.
    with pytest.raises(TeacherError, match=r"<\S+:Counted> was given as an object.*teacher=…"):
        SoBiRL.load(tmp_path / "run", environment=short).learn(progress=False)
    teacher = Counted()
    found = SoBiRL.load(tmp_path / "run", environment=short, teacher=teacher)
    assert teacher.batches == 2
    same(found.learn(progress=False), whole)


def test_the_memory_of_a_teacher_that_is_not_at_hand_survives_rounds_without_questions(
    tmp_path: Path,
) -> None:
    """They are learned without it, and written to new checkpoints."""
    settings = {**SMALL, "initial_labels": 20, "labels": 20}
    run = SoBiRL(short, Counted(), directory=tmp_path / "run", **settings)

    def stop(row: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.learn(progress=False, loggers=[stop])
    SoBiRL.load(tmp_path / "run", environment=short).learn(progress=False)
    teacher = Counted()
    SoBiRL.load(tmp_path / "run", environment=short, teacher=teacher)
    assert teacher.batches == 1


class Person:
    """Answers by chance, and counts what it is asked."""

    def __init__(self, seed: int = 0) -> None:
        self.asked, self.chance = 0, random.Random(seed)

    def __call__(self, first: Fragments, second: Fragments) -> Any:
        self.asked += len(first)
        return [self.chance.choice([0, 0.5, 1, None]) for _ in range(len(first))]


class Remembering(Person):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def answers_in(path: Path) -> list[Any]:
    with AnswerLog(path / "answers.sqlite") as log:
        return log.answers


@pytest.mark.filterwarnings("default:.*its first answers hold:UserWarning")
@pytest.mark.parametrize("kind", [Person, Remembering])
def test_a_person_is_not_asked_twice(kind: type[Person], tmp_path: Path) -> None:
    """What was answered after the newest checkpoint is in the log, and holds."""
    stopped = SoBiRL(short, person := kind(), directory=tmp_path / "run", **SMALL)

    def stop(row: Any) -> None:
        if row["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        stopped.learn(progress=False, loggers=[stop])
    before = answers_in(tmp_path / "run")
    assert 20 < len(before) == person.asked < 40
    if kind is Person:
        stopped.learn(progress=False)
        assert person.asked == 40
    else:  # it goes through the questions again, for what it remembers
        with pytest.warns(
            UserWarning, match=r"Remembering answered \d+ of \d+ questions otherwise"
        ):
            stopped.learn(progress=False)
        assert person.asked == 40 + len(before)
    after = answers_in(tmp_path / "run")
    assert after[: len(before)] == before

    told = iter(after)
    whole = SoBiRL(
        short, lambda first, second: [next(told)["label"] for _ in range(len(first))], **SMALL
    )
    same(whole.learn(progress=False), stopped)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_vector_environment_acts_and_is_evaluated(mode: AutoresetMode, tmp_path: Path) -> None:
    vector = counting_vector(mode)
    settings = {**SMALL, "evaluate_every": 1}
    del settings["environments"]
    made = SoBiRL(vector, Counted(), **settings).learn(progress=False)
    assert made.config.environments == 2
    assert all("true_return" in row for row in made.history)
    # What a fragment is cut from is of one episode, although evaluations come in between.
    for episode in made._job._recorder.episodes():
        steps = episode.observation[:, 0].tolist()
        assert steps == list(range(len(steps)))
    assert not vector.closed  # it is the caller's
    found = SoBiRL.load(made.save(tmp_path / "saved"), environment=vector)
    same(found, made)


def test_a_resumed_run_in_a_vector_environment_begins_new_episodes() -> None:
    def job() -> PreferenceJob:
        config = PreferenceConfig(**{**SMALL, "evaluate_every": 100}, env="<vector>")
        return PreferenceJob(config, environment=counting_vector(), teacher=Counted())

    one, other = job(), job()
    one._collector.collect(3)
    one.step()
    other.load_state_dict(one.state_dict())
    other.step()
    for episode in other._recorder.episodes():
        steps = episode.observation[:, 0]
        assert (steps.diff() == 1).all()


def one_action() -> Any:
    made = short()
    made.action_space = Discrete(1)
    return made


def closed_vector() -> SyncVectorEnv:
    vector = counting_vector()
    vector.close()
    return vector


@pytest.mark.parametrize(
    ("environment", "settings", "error", "message"),
    [
        (Counting, {}, ConfigError, r"Counting>, which has no time limit .*episode_steps"),
        (Counting(), {}, OptionError, r"the environment is one Counting .*lambda: Counting\("),
        (
            lambda: ONE,
            {"environments": 1},
            OptionError,
            r"copies of .* the same Counting .*lambda: Counting\(…",
        ),
        (SyncVectorEnv([lambda: ONE] * 2), {}, OptionError, "copies of .* the same Counting"),
        (3, {}, OptionError, "the environment is a int"),
        (None, {}, OptionError, r"the environment is None .*Fix: give the environment itself"),
        ("<a:B>", {}, OptionError, "the environment is '<a:B>' .*Fix: give the environment itself"),
        (
            short,
            {"teacher": "<a:b>"},
            TeacherError,
            r"the teacher <a:b> .*Fix: give the teacher its",
        ),
        (closed_vector(), {}, OptionError, r"is closed at env <\S+>\. Fix: make a new one"),
        (one_action, {}, OptionError, r"env <\S+> has 1 action .*allowed: 2 or more"),
        (lambda: 3, {}, OptionError, "function returned a int at environment"),
        (counting_vector, {}, OptionError, "SyncVectorEnv at .*a vector environment itself"),
        (lambda: 1 // 0, {}, EnvironmentFailureError, "building raised ZeroDivisionError"),
        (counting_vector(), {"environments": 4}, ConfigError, r"environments is 4 .*allowed: 2"),
        (counting_vector(), {"episode_steps": 4}, ConfigError, "episode_steps is 4 at"),
        (short, {"score": "full-horizon"}, OptionError, r"short> cannot .* restore\(obs"),
        (counting_vector(), {"score": "full-horizon"}, OptionError, "a vector .*restore"),
        ("my_code:Mine-v0", {}, OptionError, "names code to import"),
        ("CartPole-v1", {"lables": 3}, ConfigError, "'lables' at SoBiRL.*did you mean 'labels'"),
        ("CartPole-v1", {"labels": "many"}, ConfigError, "'many' is not accepted at .*labels"),
        ("CartPole-v1", {"env": "CartPole-v1"}, ConfigError, "env is a setting"),
        ("CartPole-v1", {"teacher": "orcale"}, ConfigError, "did you mean 'oracle'"),
        ("CartPole-v1", {"teacher": Counted}, TeacherError, "an object of it"),
        ("CartPole-v1", {"teacher": lambda pairs: 1}, TeacherError, "does not take"),
        ("CartPole-v1", {"algorithm": "drlhf"}, ConfigError, "'drlhf' at SoBiRL .*birl_ext.DRLHF$"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_at_once(
    environment: Any, settings: dict[str, Any], error: type[BirlError], message: str
) -> None:
    given = {**SMALL, **settings}
    if not isinstance(environment, str) and "environments" not in settings:
        del given["environments"]
    with pytest.raises(error, match=message):
        SoBiRL(environment, **given)


def test_an_environment_that_raises_when_it_is_closed_is_learned_from_all_the_same() -> None:
    class Stuck(Counting):
        def close(self) -> None:
            raise RuntimeError("the window is gone")

    with pytest.warns(UserWarning, match=r"Stuck>': closing raised RuntimeError: the window is go"):
        made = SoBiRL(Stuck, Counted(), episode_steps=9, **SMALL).learn(progress=False)
    assert made.summary is not None


class Failing(Counting):
    def step(self, action: Any) -> Any:
        if self.steps == 4:
            time.sleep(60)
        return super().step(action)


def test_an_environment_that_hangs_has_its_name() -> None:
    made = SoBiRL(Failing, Counted(), parallel=True, timeout=0.5, episode_steps=9, **SMALL)
    where = r"environment 0 of '<\S+:Failing>', seed \d+, step 4"
    with pytest.raises(EnvironmentFailureError, match=f"no answer within 0.5 s at {where}"):
        made.learn(progress=False)


def full_disk(*given: Any, **more: Any) -> None:
    raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])


def test_a_run_outlives_a_process_that_was_forked() -> None:
    made = SoBiRL(short, Counted(), **SMALL)
    path = made._directory.path
    if not (child := os.fork()):
        del made
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert path.is_dir()
    del made
    gc.collect()
    assert not path.exists()


class Random(Counting):
    """Starts where no seed says."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.steps = random.randrange(100)
        return self.seen(), {}


def test_what_has_been_learned_is_read_without_playing_episodes_again(tmp_path: Path) -> None:
    made = SoBiRL(Random, Counted(), episode_steps=9, **SMALL).learn(progress=False)
    path = made.save(tmp_path / "saved")
    found = SoBiRL.load(path, environment=Random)
    same(found, made)
    read, kept = (one._job.state_dict()["collector"]["environments"] for one in (found, made))
    assert read["episodes"] == kept["episodes"]
    assert torch.equal(read["observation"], kept["observation"])
    assert [part.tolist() for part in read["actions"]] == [p.tolist() for p in kept["actions"]]
    closed = counting_vector()
    path = SoBiRL(closed, Counted(), **SMALL).learn(progress=False).save(tmp_path / "vector")
    closed.close()
    assert SoBiRL.load(path, environment=closed).predict([1.0]) in (0, 1)


def test_what_cannot_be_saved_or_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SoBiRL(short, Counted(), directory=tmp_path / "run", **SMALL)
    with pytest.raises(ConfigError, match=r"nothing has been learned yet\. Fix: call learn"):
        made.save(tmp_path / "saved")
    with pytest.raises(ConfigError, match="nothing has been learned yet"):
        made.plot()
    for learned in (lambda: made.predict([0.0]), lambda: made.policy, lambda: made.reward):
        with pytest.raises(ConfigError, match=r"nothing has been learned yet\. Fix: call learn"):
            learned()
    made.learn(progress=False)
    with pytest.raises(ConfigError, match=r"algorithm is 'sobirl' at DRLHF .*birl_ext\.SoBiRL$"):
        DRLHF.load(tmp_path / "run", environment=short)
    RunDirectory.create(tmp_path / "other", "bus", {})
    with pytest.raises(ConfigError, match=r"a run of 'bus' .*load it with birl_ext\.load_run"):
        SoBiRL.load(tmp_path / "other")
    on = r"not empty at \S+run\. Fix: give another {}, or go on with SoBiRL\.load\('\S+run'\)$"
    with pytest.raises(ConfigError, match=on.format("directory")):
        SoBiRL(short, Counted(), directory=tmp_path / "run", **SMALL)
    with pytest.raises(ConfigError, match=on.format("path")):
        made.save(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"time limit .*give the environment that it was made with"
    ):
        SoBiRL.load(tmp_path / "run", environment=Counting)
    for path in ("x" * 300, "a\0b", str(tmp_path / "file" / "x"), "/proc/x"):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"^BIRL-E801 cannot write there: .*another path$"):
            made.save(path)
        with pytest.raises(ConfigError, match=r"^BIRL-E801 cannot write there: .*r directory$"):
            SoBiRL("CartPole-v1", directory=path, **SMALL)
    with monkeypatch.context() as full:
        full.setattr("shutil.copytree", untyped(full_disk))
        with pytest.raises(ConfigError, match=r"cannot write there: \[Errno 28\] No space left"):
            made.save(tmp_path / "saved")
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ConfigError, match=r"a SoBiRL cannot be pickled or copied.*save\(path"):
            copied(made)
    parts = pickle.loads(pickle.dumps((made.policy, made.reward)))
    assert parts[0]([1.0]) == made.predict([1.0])
    named = SoBiRL("CartPole-v1", directory=tmp_path / "named", **SMALL).learn(progress=False)
    with pytest.raises(ConfigError, match=r"env is CartPole-v1, and an environment is given"):
        SoBiRL.load(tmp_path / "named", environment=untyped(short))
    assert named.summary is not None
