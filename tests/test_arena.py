"""The arena: what it plays, what it says, and that a run is played once."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from birl_ext import cli
from birl_ext.arena import play as playing
from birl_ext.arena import report
from birl_ext.arena.config import TUNED, ArenaConfig
from birl_ext.arena.contest import Bout, Contest
from birl_ext.arena.job import ArenaJob
from birl_ext.arena.methods import METHODS, Plan
from birl_ext.arena.play import Match, play
from birl_ext.bilevel import BilevelProblem
from birl_ext.bilevel.algorithm import Algorithm
from birl_ext.errors import (
    ConfigError,
    EnvironmentFailureError,
    FileFormatError,
    SizeLimitError,
)
from birl_ext.model.mdp import DenseMDP
from birl_ext.problems.contests import CONTESTS
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.simulators.finite import FiniteFollower
from birl_ext.solution import Solution


def _lower(x: Tensor) -> DenseMDP:
    """Two states; x pays for the second action."""
    zero = torch.zeros(*x.shape[:-1], 2, dtype=torch.float64)
    reward = torch.stack([zero, x[..., :1] + zero], -1)
    move = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]] * 2, dtype=torch.float64)
    return DenseMDP(reward, move, 0.5)


def _upper(x: Tensor, solution: Solution) -> Tensor:
    return (solution.policy[..., 1].mean(-1) - 0.8).square() + 0.1 * x.square().sum(-1)


def toy(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    rows = [
        torch.randn(starts, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    problem = BilevelProblem(_lower, _upper)
    return Bout(torch.cat(rows), setting["temperature"], problem)


TOY = Contest(
    "Toy",
    toy,
    {"warm": {"temperature": 1.0}, "cold": {"temperature": 0.3}, "long": {"temperature": 0.1}},
    unit="seconds",
    budget=0.05,
    methods=("m-sobirl", "zero-order"),
    batched=True,
    full=("long",),
)


def config(**own: Any) -> ArenaConfig:
    chosen: dict[str, Any] = {"contest": "toy", "workers": 1, "seeds": 2, "starts": 3, **own}
    return ArenaConfig(**chosen)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "PACE", 0.005)


def played(job: ArenaJob) -> ArenaJob:
    while not job.done:
        job.step()
    return job


def match(**own: Any) -> Match:
    chosen: dict[str, Any] = {
        "contest": TOY,
        "setting": "warm",
        "method": "m-sobirl",
        "switch": "plain",
        "rate": 0.3,
        "seeds": (0, 1),
        "steps": 30,
        "budget": 1.0,
        "starts": 3,
        "heat": 4.0,
        "noise": 0.01,
        **own,
    }
    return Match(**chosen)


def best(temperature: float) -> float:
    """The least φ of the toy, by a fine grid of exact solves."""
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64).unsqueeze(-1)
    return float(BilevelProblem(_lower, _upper).objective(x, temperature).min())


def test_a_match_ends_at_the_optimum() -> None:
    found = play(match(steps=300))
    assert found["values"] == pytest.approx([-best(1.0)] * 2, abs=1e-4)
    assert found["seeds"] == [0, 1]
    assert found["steps"] == 300
    assert not found["failed"]


def test_values_are_judged_at_the_last_temperature_wherever_the_method_is() -> None:
    found = play(match(switch="cooled", steps=300, heat=50.0))
    first, last = found["curve"][0], found["curve"][-1]
    x = toy(TOY.settings["warm"], (0, 1), 1).start
    at_start = -BilevelProblem(_lower, _upper).objective(x, 1.0)
    assert first != last
    assert last == pytest.approx([-best(1.0)] * 2, abs=1e-3)
    assert min(first) >= float(at_start.min()) - 0.1  # at 50 τ the policy is all but uniform


def test_seeds_and_starts_of_a_batch_are_those_of_their_own() -> None:
    """Two seeds of three starts are one batch; each is what it is alone, and the best start of a
    seed is the one that is shown.
    """
    both = play(match(switch="starts"))
    alone = [play(match(switch="starts", seeds=(seed,))) for seed in (0, 1)]
    assert both["values"] == pytest.approx([one["values"][0] for one in alone], abs=1e-12)
    single = [
        play(replace(match(seeds=(seed,)), contest=replace(TOY, batched=False), starts=3))
        for seed in (0, 1)
    ]
    assert all(
        many >= one["values"][0] - 1e-9 for many, one in zip(both["values"], single, strict=True)
    )


def test_starts_share_the_steps_where_there_is_no_batch() -> None:
    found = play(replace(match(switch="starts", seeds=(0,)), contest=replace(TOY, batched=False)))
    assert found["steps"] == 30  # ten of each start


def test_noise_is_a_switch() -> None:
    plain, noisy, again = (play(match(switch=s))["values"] for s in ("plain", "noise", "noise"))
    assert plain != noisy
    assert noisy == again


def test_a_method_that_fails_is_said_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sound = METHODS["m-sobirl"]

    def make(bout: Bout, x: Tensor, plan: Plan) -> Algorithm[Any]:
        without = BilevelProblem(_lower, lambda x, solution: _upper(x, solution) / 0)
        return sound.make(replace(bout, problem=without), x, plan)

    monkeypatch.setitem(METHODS, "broken", replace(sound, title="broken", make=make))
    contest = replace(TOY, methods=("m-sobirl", "broken"))
    job = ArenaJob(config(settings=("warm",), switches=("plain",)), {"toy": contest})
    job.attach(tmp_path)
    played(job)
    own = {r["method"]: r for r in job.summary()["records"] if r["phase"] == "play"}
    assert own["m-sobirl"]["values"]
    assert own["broken"]["values"] is None
    assert "the objective that `upper` returned is inf" in own["broken"]["failed"]
    assert "play / warm / broken / plain / 0-1 failed: BIRL-E" in capsys.readouterr().err
    assert "| broken | failed |" in (tmp_path / "table.md").read_text()
    rows = [*csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text()))]
    assert [(row["method"], row["upper_value"] == "") for row in rows[::2]] == [
        ("m-sobirl", False),
        ("broken", True),
    ]
    assert job.summary()["failed"] == 5  # its pace, three rates, its seeds


def test_all_is_played_once_and_tuned_on_other_seeds() -> None:
    job = played(ArenaJob(config(), {"toy": TOY}))
    entries = 2 * 2 * 2  # settings that are not long, methods, switches
    rates = len(METHODS["m-sobirl"].rates) + len(METHODS["zero-order"].rates)
    assert job.total_steps == entries + 4 * rates + entries
    records = job.summary()["records"]
    assert [r["phase"] for r in records] == sorted(
        (r["phase"] for r in records), key=["pace", "tune", "play"].index
    )
    tuned = {seed for r in records if r["phase"] == "tune" for seed in r["seeds"]}
    shown = {seed for r in records if r["phase"] == "play" for seed in r["seeds"]}
    assert tuned == {TUNED}
    assert shown == {0, 1}
    assert {r["setting"] for r in records} == {"warm", "cold"}


def test_the_rate_is_the_best_of_those_tuned() -> None:
    job = played(ArenaJob(config(methods=("m-sobirl",), switches=("plain",)), {"toy": TOY}))
    for setting in ("warm", "cold"):
        tuned = {
            r["rate"]: r["values"][0]
            for r in job.summary()["records"]
            if r["phase"] == "tune" and r["setting"] == setting
        }
        (shown,) = (
            r for r in job.summary()["records"] if (r["phase"], r["setting"]) == ("play", setting)
        )
        assert tuned[shown["rate"]] == max(tuned.values())
        assert len(tuned) == 3


def test_budgets_become_steps() -> None:
    job = played(ArenaJob(config(methods=("m-sobirl",), budget=0.1), {"toy": TOY}))
    for record in job.summary()["records"]:
        if record["phase"] == "play":
            assert 0.02 < record["seconds"] < 0.5, record


def test_a_method_too_slow_for_its_budget_is_said_not_played() -> None:
    job = played(ArenaJob(config(methods=("m-sobirl",), budget=1e-5), {"toy": TOY}))
    own = [record for record in job.summary()["records"] if record["phase"] == "play"]
    assert all("4 are the fewest played" in record["failed"] for record in own)
    assert not any(record["values"] for record in own)
    assert "failed" in report.table(TOY, own)


def test_a_resumed_arena_plays_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    job = ArenaJob(config(), {"toy": TOY})
    for _ in range(13):
        job.step()
    state = json.loads(json.dumps(job.state_dict()))
    again = ArenaJob(config(), {"toy": TOY})
    again.load_state_dict(state)
    assert again.state_dict() == state
    seen: list[Match] = []
    monkeypatch.setattr("birl_ext.arena.job.play", lambda m: (seen.append(m), play(m))[1])
    played(again)
    assert len(seen) == again.total_steps - 13
    assert again.summary()["records"][:13] == job.summary()["records"]
    with pytest.raises(FileFormatError, match="none of an arena"):
        again.load_state_dict({"records": "[1]"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"contest": "four-room"}, "did you mean 'four-rooms'"),
        ({"contest": "four-rooms", "methods": ("m-sobrl",)}, "did you mean 'm-sobirl'"),
        ({"contest": "four-rooms", "settings": ("λ 0.003, κ 33",)}, "did you mean 'λ 0.003, κ 3'"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ArenaJob(ArenaConfig(**given), CONTESTS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"switches": ("plane",)}, "did you mean 'plain'"),
        ({"methods": ("m-sobirl", "m-sobirl")}, "each once"),
        ({"seeds": 0}, "seeds is 0"),
        ({"budget": 0.0}, "budget is 0"),
        ({"heat": 0.5}, "heat is 0.5"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_a_setting_that_is_none_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ArenaConfig(**given)


def test_a_start_is_its_seed_s_own_and_tuning_has_others() -> None:
    """A start that all seeds share would be tuned on what is reported."""
    for name, contest in CONTESTS.items():
        setting = next(iter(contest.settings.values()))
        first, second = (contest.make(setting, (seed,), 1).start for seed in (0, TUNED))
        assert not torch.equal(first, second), name


def test_samples_are_counted_in_whole_steps() -> None:
    contest = replace(TOY, unit="samples")
    with pytest.raises(ConfigError, match="1 environment step or more"):
        ArenaJob(config(budget=0.5), {"toy": contest})


def test_the_table_is_the_mean_and_its_interval() -> None:
    def record(method: str, values: list[float]) -> dict[str, Any]:
        return {
            "phase": "play",
            "setting": "warm",
            "method": method,
            "switch": "plain",
            "rate": 0.1,
            "seeds": [0, 1, 2],
            "values": values,
            "cost": [1.0],
            "curve": [values],
            "steps": 10,
            "seconds": 2.0,
            "samples": 0,
            "failed": "",
        }

    records = [record("m-sobirl", [1.0, 2.0, 3.0]), record("zero-order", [-9.0, -9.1, -9.2])]
    lines = report.table(TOY, records).splitlines()
    assert lines[2] == "| M-SoBiRL | **2.000 ± 2.484** | 10 | 2.0 |"  # t₂ = 4.303, s/√3 = .577
    assert lines[3] == "| zero order, one point | -9.100 ± 0.248 | 10 | 2.0 |"
    ((first, *_),) = [list(csv.DictReader(io.StringIO(report.csv_text(TOY, records))))]
    assert (first["seed"], first["upper_value"]) == ("0", "1.0")


@pytest.mark.slow
def test_the_command_plays_in_processes_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    out = tmp_path / "run"
    words = ["--methods", "m-sobirl", "--settings", "τ 1", "--seeds", "2", "--budget", "0.05"]
    words += ["--workers", "2", "--out", str(out)]
    assert cli.main(["arena", "random-mdp", *words]) == 0
    assert "M-SoBiRL" in (out / "table.md").read_text()
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 2 * 2
    assert (out / "figures" / "values.png").exists()
    assert cli.main(["arena", "--resume", str(out), "--workers", "1"]) == 0
    assert cli.main(["arena", "--resume", str(out), "--seeds", "3"]) == 2


def test_the_command_lists_its_contests(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["arena"]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in CONTESTS)


ARENA = ("random-mdp", "--methods", "m-sobirl", "zero-order", "--settings", "τ 1", "--seeds", "2")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes there")
def test_a_killed_arena_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    out = tmp_path / "run"
    words = [*ARENA, "--budget", "0.2", "--workers", "2", "--checkpoint-every", "1"]
    command = [sys.executable, "-m", "birl_ext", "arena", *words, "--out", str(out)]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics, limit = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert child.poll() is None, "it has ended before it was killed"
        assert time.monotonic() < limit
        time.sleep(0.05)
    workers = [
        pid for pid in _alive() if f"PPid:\t{child.pid}\n" in _read(Path(f"/proc/{pid}/status"))
    ]
    assert len(workers) >= 2
    child.kill()
    child.wait()
    before = {tuple(key) for key, _ in _records(out)}
    assert before
    while set(workers) & _alive():
        assert time.monotonic() < limit, "a worker has outlived the arena"
        time.sleep(0.05)
    assert cli.main(["arena", "--resume", str(out), "--workers", "1"]) == 0
    played = [tuple(key) for key, _ in _records(out)]
    assert before <= set(played)
    assert len(played) == len(set(played)) == 4 + 12 + 4
    assert cli.main(["arena", "--resume", str(out), "--budget", "0.3"]) == 2


def _records(out: Path) -> list[Any]:
    return list(json.loads(CheckpointStore(out / "checkpoints").load().state["records"]))


def _alive() -> set[int]:
    every = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return {pid for pid in every if "State:\tZ" not in _read(Path(f"/proc/{pid}/status"), "Z")}


def _read(path: Path, missing: str = "") -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return f"State:\t{missing}"


def test_a_process_that_dies_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    job = ArenaJob(config(workers=2), {"toy": TOY})
    monkeypatch.setattr("birl_ext.arena.job.play", _die)
    with pytest.raises(EnvironmentFailureError, match="a process of the arena has died"):
        job.step()
    job.detach()


def _die(match: Match) -> None:
    os._exit(1)


def test_hours_and_memory_are_foretold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ArenaJob(config(methods=("m-sobirl",), budget=3600.0), {"toy": TOY})
    job.attach(tmp_path)
    for _ in range(4):  # its paces
        job.step()
    said = capsys.readouterr().err
    # of 4 entries 3 rates and the reported seeds: two hours each, as of the batch of both seeds
    assert "arena: 16 runs, about 32.0 h on 1 process" in said
    assert "GiB of memory" in said
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    again = ArenaJob(config(methods=("m-sobirl",)), {"toy": TOY})
    again.attach(tmp_path)
    for _ in range(3):
        again.step()
    with pytest.raises(SizeLimitError, match="lower --workers"):
        again.step()


def test_a_follower_that_learns_costs_samples() -> None:
    rooms = CONTESTS["four-rooms-samples"]
    known, learns = (
        play(
            match(
                contest=rooms,
                setting=f"λ 0.005{how}",
                method="hpgd",
                seeds=(0,),
                steps=9,
                budget=9000.0,
            )
        )
        for how in ("", ", the follower learns")
    )
    assert known["samples"] / known["steps"] < 200
    assert learns["samples"] / learns["steps"] > 10 * 104 * 4  # ten of every state and action


def test_taxes_from_samples_are_those_of_the_model() -> None:
    taxes = CONTESTS["taxes-samples"].make({"temperature": 0.1, "cells": 10}, (0,), 1)
    assert taxes.samples is not None
    x = taxes.start[0]
    phi, solution = taxes.problem.evaluate(x, 0.1)
    problem = taxes.samples.problem
    assert problem.cost is not None
    assert problem.transition is not None
    assert problem.transition(x).sum(-1).sub(1).abs().max() < 1e-12
    taxes.samples.simulator.adapt(problem.transition(x))
    follower = FiniteFollower(solution.policy.flatten(0, 1))
    path = taxes.samples.simulator.rollout(follower, 4000, 80)
    paid = problem.cost(x)[path.observation, path.action]
    total = (paid * 0.9 ** torch.arange(80)).sum(-1)
    assert abs(total.mean() - phi) < 4 * total.std() / 4000**0.5 + 1e-3 * abs(phi)


def test_samples_are_spent_to_the_last_step_that_fits() -> None:
    found = play(
        match(
            contest=CONTESTS["four-rooms-samples"],
            setting="λ 0.005",
            method="hpgd",
            switch="cooled",
            seeds=(0,),
            steps=3,  # what a pace may have thought
            budget=3000.0,
        )
    )
    assert found["steps"] > 3
    assert abs(found["samples"] - 3000) < 200  # a path
    assert found["cost"] == sorted(found["cost"])
    assert found["cost"][-1] == found["samples"]
