"""What a run has learned, read back from its directory."""

from __future__ import annotations

import math
import multiprocessing
import re
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from preference_run import make_job

import birl_ext
from birl_ext.cli import main
from birl_ext.errors import (
    BirlError,
    CheckpointIncompatibleError,
    ConfigError,
    DtypeError,
    NonFiniteInputError,
    OptionError,
    ShapeError,
)
from birl_ext.problems.preference.job import PreferenceJob
from birl_ext.problems.random_mdp import RandomMDPConfig, RandomMDPJob
from birl_ext.problems.saved import LoadedRun, load_run
from birl_ext.runs.config import to_plain
from birl_ext.runs.directory import RunDirectory
from birl_ext.runs.loop import run

GRID = "birl_ext/Gridworld-v0"


def finished(path: Path, problem: str, job: Any) -> Any:
    run(job, RunDirectory.create(path, problem, to_plain(job.config)))
    return job


def test_policy_reward_history_and_settings_are_those_at_the_end(tmp_path: Path) -> None:
    job = finished(tmp_path / "run", "preference", make_job(parallel=True, seed=3))
    found = birl_ext.load_run(str(tmp_path / "run"))
    assert isinstance(found, LoadedRun)
    assert not multiprocessing.active_children()  # its environments are closed
    assert found.config == job.config
    assert found.step == len(found.history) == 4
    assert [row["labels"] for row in found.history][-1] == 40.0
    assert found.summary is not None
    returns = [row["true_return"] for row in found.history if "true_return" in row]
    assert found.summary["true_return"] == max(returns)
    assert found.summary["last_return"] == returns[-1]
    seen = torch.randn(50, 4)
    assert found.policy(seen).tolist() == job.agent.act(seen, torch.Generator(), True).tolist()
    with torch.no_grad():
        assert torch.equal(found.reward.all_actions(seen), job.reward.all_actions(seen))
    # as gymnasium gives and takes
    with gymnasium.make("CartPole-v1") as environment:
        start, _ = environment.reset(seed=1)
        environment.step(found.policy(start))


def test_a_policy_draws_and_chooses() -> None:
    policy = make_job().policy
    seen = np.zeros((400, 4), np.float32)
    assert len(set(policy(seen).tolist())) == 1
    drawn = policy(seen, greedy=False)
    assert drawn.dtype == np.int64
    assert drawn.shape == (400,)
    assert 0 < drawn.sum() < 400
    assert type(policy([0.0, 0.0, 0.0, 0.0])) is int


def test_a_policy_of_a_box_stays_inside() -> None:
    policy = make_job(env="Pendulum-v1").policy
    drawn = policy(100 * torch.randn(200, 3), greedy=False)
    assert drawn.shape == (200, 1)
    assert np.abs(drawn).max() <= 2.0
    assert policy(np.ones(3)).shape == (1,)


@pytest.mark.parametrize(
    ("env", "observation", "error", "message"),
    [
        ("CartPole-v1", np.zeros(3), ShapeError, r"shape \(3,\) .allowed: \(4,\) or \(n, \*\(4,"),
        ("CartPole-v1", np.zeros((2, 2, 4)), ShapeError, r"shape \(2, 2, 4\)"),
        ("CartPole-v1", [0.0, math.nan, 0.0, 0.0], NonFiniteInputError, "NaN or infinite"),
        ("CartPole-v1", np.array([1e300, 0, 0, 0]), NonFiniteInputError, "finite in torch.float32"),
        ("CartPole-v1", "left", DtypeError, "observation is str"),
        ("CartPole-v1", None, DtypeError, "observation is NoneType"),
        ("CartPole-v1", {}, DtypeError, "observation is dict"),
        ("CartPole-v1", [10**400, 0.0, 0.0, 0.0], DtypeError, "observation is list"),
        ("CartPole-v1", np.ones(4, complex), DtypeError, "dtype torch.complex128"),
        (GRID, 0.5, DtypeError, "dtype torch.float32"),
        (GRID, 10_000, OptionError, "index out of range"),
        (GRID, [-1], OptionError, "index out of range"),
    ],
)
def test_an_observation_of_something_else_is_refused(
    env: str, observation: Any, error: type[BirlError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_job(env=env).policy(observation)


def test_a_run_without_a_policy_says_so(tmp_path: Path) -> None:
    finished(tmp_path / "run", "random-mdp", RandomMDPJob(RandomMDPConfig(max_steps=2)))
    found = load_run(tmp_path / "run")
    assert len(found.history) == 2
    for name in ("policy", "reward"):
        with pytest.raises(OptionError, match=f"a run of 'random-mdp' has no {name} at .*summary"):
            getattr(found, name)


def test_a_run_that_is_under_way_is_read_up_to_its_checkpoint(tmp_path: Path) -> None:
    job = make_job()
    directory = RunDirectory.create(tmp_path / "run", "preference", to_plain(job.config))
    with pytest.raises(ConfigError, match=r"no checkpoint yet .*birl run --resume"):
        load_run(tmp_path / "run")
    steps = 0

    def step(plain: Any = job.step) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("power cut")
        return plain()

    job.step = step
    with pytest.raises(RuntimeError, match="power cut"):
        run(job, directory, checkpoint_every=1)
    found = load_run(tmp_path / "run")
    assert found.step == len(found.history) == 2
    assert found.summary is None


@pytest.mark.filterwarnings("default:.*other versions:UserWarning")
def test_a_run_of_another_version_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as then:
        then.setattr(birl_ext, "__version__", "0.0.7")
        finished(tmp_path / "run", "preference", make_job())
    with pytest.warns(UserWarning, match=r"other versions .birl_ext 0\.0\.7"):
        load_run(tmp_path / "run")  # it fits
    config = tmp_path / "run" / "config.toml"
    before = config.read_text()
    what = r"BIRL-E703 the run was written by birl_ext 0\.0\.7, and does not fit \S+: BIRL-E801 "
    for text, reason in (
        (before + "\nheat = 3\n", "unknown key 'heat'.*go on with birl_ext 0.0.7"),
        (before.replace('"preference"', '"preferences"', 1), "unknown problem 'preferences'"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointIncompatibleError, match=what + reason):
            load_run(tmp_path / "run")
        assert main(["run", "--resume", str(tmp_path / "run")]) == 2
        assert re.search(what + reason, capsys.readouterr().err)
    config.write_text(before)

    def lacking(self: Any, state: Any) -> None:
        raise KeyError("_heat")

    monkeypatch.setattr(PreferenceJob, "load_state_dict", lacking)
    kept = sorted(path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert main(["run", "--resume", str(tmp_path / "run")]) == 2
    assert "written by birl_ext 0.0.7, and does not fit" in capsys.readouterr().err
    assert kept == sorted(
        path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()
    )


def test_a_fault_of_this_version_s_run_keeps_its_own_name(tmp_path: Path) -> None:
    finished(tmp_path / "run", "preference", make_job())
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text() + "\nheat = 3\n")
    with pytest.raises(ConfigError, match=r"^BIRL-E801 unknown key 'heat'"):
        load_run(tmp_path / "run")
