"""Runs: configurations, metrics, resuming to the same bits, signals, figures."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import json
import math
import os
import signal
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from cases import untyped
from fake_problem import FakeConfig, FakeJob
from hypothesis import given
from hypothesis import strategies as st
from processes import digest, fork

from birl_ext.errors import (
    CheckpointIncompatibleError,
    CheckpointWriteError,
    ConfigError,
    FileFormatError,
    JobError,
    MissingDependencyError,
    NotConvergedError,
)
from birl_ext.progress import progress
from birl_ext.runs import loop, plots
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.runs.config import differences, from_plain, read_toml, to_plain, write_toml
from birl_ext.runs.directory import MetricsWriter, RunDirectory, default_path
from birl_ext.runs.intervals import mean_interval
from birl_ext.runs.job import WritesFiles
from birl_ext.runs.loop import Saver

# Configurations


class Cost(enum.Enum):
    LINEAR = 1
    SQRT = 2


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    steps: int = 10
    name: str = "x"
    fast: bool = False
    kind: Literal["a", "b", 3] = "a"
    cost: Cost = Cost.LINEAR
    limit: float | None = None
    goals: tuple[tuple[int, int], ...] = ((1, 2),)
    pair: tuple[int, str] = (1, "x")
    rates: list[float] = dataclasses.field(default_factory=list)
    data: Path | None = None
    inner: Inner = Inner()


@given(st.builds(Config, rate=st.floats(allow_nan=False), kind=st.sampled_from(["a", "b", 3])))
def test_config_round_trip_through_toml(config):
    with tempfile.TemporaryDirectory() as folder:
        write_toml(Path(folder) / "c.toml", to_plain(config))
        assert from_plain(Config, read_toml(Path(folder) / "c.toml")) == config


def test_what_has_no_form_in_toml_is_refused_by_name():
    odd = dataclasses.make_dataclass("Odd", [("a", dict), ("b", "int | None")])
    assert to_plain(odd({"x y": None, "z": (1,)}, None)) == {"a": {"z": [1]}}
    with pytest.raises(ConfigError, match=r"type set has no form in TOML at config\.a\.b\[1\]"):
        to_plain(odd({"b": [1, {2}]}, 3))


def test_without_the_package_that_writes_toml_a_run_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    with pytest.raises(MissingDependencyError, match=r'tomli-w.*pip install "birl_ext\[cli\]"'):
        start(tmp_path / "run")


def test_an_unknown_key_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown key 'step' at config .*did you mean 'steps'\?"):
        from_plain(Config, {"step": 3})
    with pytest.raises(ConfigError, match=r"unknown key 'dept' at config\.inner .*'depth'"):
        from_plain(Config, {"inner": {"dept": 3}})


@pytest.mark.parametrize(
    "plain",
    [
        {"rate": "0.1"},
        {"rate": True},
        {"steps": 1.0},
        {"steps": True},
        {"fast": 1},
        {"name": 3},
        {"kind": "c"},
        {"kind": 3.0},
        {"cost": "CUBIC"},
        {"limit": "none"},
        {"goals": [[1, 2], [3]]},
        {"pair": ["x", 1]},
        {"rates": 3.0},
        {"data": 3},
        {"inner": 3},
    ],
    ids=str,
)
def test_a_wrong_type_is_refused_by_name(plain):
    (key,) = plain
    with pytest.raises(ConfigError, match=rf"at config\.{key}"):
        from_plain(Config, plain)


def test_an_integer_is_a_float_and_absence_is_none():
    config = from_plain(Config, {"rate": 1, "limit": 2})
    assert (type(config.rate), type(config.limit)) == (float, float)
    required = dataclasses.make_dataclass("Required", [("a", int), ("b", "int | None")])
    assert from_plain(required, {"a": 1}).b is None
    with pytest.raises(ConfigError, match="the key 'a' is missing"):
        from_plain(required, {"b": 1})


def test_what_is_not_checked_yet_is_complete():
    """The class's own checks are left out, those of the types are not."""

    @dataclasses.dataclass(frozen=True)
    class Low(Config):
        def __post_init__(self) -> None:
            raise ConfigError("too high")

    with pytest.raises(ConfigError, match="too high"):
        from_plain(Low, {"steps": 3})
    made = from_plain(Low, {"steps": 3}, check=False)
    assert to_plain(made) == to_plain(Config(steps=3))
    made.rates.append(1.0)
    assert from_plain(Low, {}, check=False).rates == []
    with pytest.raises(ConfigError, match=r"at config\.steps"):
        from_plain(Low, {"steps": "3"}, check=False)


def test_differences_name_what_changed():
    old = {"a": 1, "b": {"c": 0.1, "d": math.nan}, "e": True}
    assert differences(old, {"a": 1.0, "b": {"c": 0.1, "d": math.nan}, "e": True}) == []
    assert differences(old, {"b": {"c": 0.2, "d": math.nan}, "e": 1}) == [
        "a: stored 1, given absent",
        "b.c: stored 0.1, given 0.2",
        "e: stored True, given 1",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "not a TOML file"),
        (b"\xff\xfe", "not a TOML file"),
        (b"a = " + b"9" * 5000, "not a TOML file"),
        (b"a = 1\n" + b"#" * (1 << 20), "too large"),
        (b"a = " + b"[" * 50 + b"]" * 50, "nested too deeply"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b".".join([b"a"] * 30) + b" = 1", "nested too deeply"),
    ],
    ids=["syntax", "encoding", "digits", "size", "lists", "recursion", "tables"],
)
def test_a_bad_config_file_is_refused(tmp_path, content, message):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_toml(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_toml(tmp_path / "absent.toml")


# The run directory


def start(path: Path, **settings) -> tuple[Any, RunDirectory]:
    config = FakeConfig(**settings)
    return FakeJob(config), RunDirectory.create(path, "fake", to_plain(config))


def again(path: Path) -> tuple[Any, RunDirectory]:
    directory = RunDirectory(path)
    return FakeJob(from_plain(FakeConfig, directory.config)), directory


def test_a_directory_with_files_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"not empty.*another --out$"):
        start(tmp_path)
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"not empty.*--resume"):
        start(tmp_path)
    (tmp_path / "config.toml").unlink()
    with pytest.raises(ConfigError, match="not empty"):
        start(tmp_path / "file")
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory(tmp_path)


def test_default_paths_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = set()
    for _ in range(3):
        paths.add(path := default_path("bus"))
        path.mkdir(parents=True)
    assert len(paths) == 3
    assert all(path.parts[0] == "runs" and path.name.startswith("bus-2") for path in paths)


def test_metrics_are_strict_json_and_a_torn_line_is_left_out(tmp_path):
    _, directory = start(tmp_path / "run")
    rows = [{"step": 1, "x": 0.1}, {"step": 2, "x": math.nan}, {"step": 3, "x": math.inf}]
    with contextlib.closing(MetricsWriter(directory)) as metrics:
        for row in rows:
            metrics(row)
    lines = directory.metrics_path.read_text().splitlines()
    assert lines[1:] == ['{"step": 2, "x": null}', '{"step": 3, "x": null}']
    with directory.metrics_path.open("a") as file:
        file.write('{"step": 4, "x"')
    history = directory.history()
    assert history[0] == rows[0]
    assert math.isnan(history[1]["x"])
    assert [row["step"] for row in history] == [1, 2, 3]
    MetricsWriter(directory, b"kept\n").close()
    assert directory.metrics_path.read_text() == "kept\n"


DAMAGES = {
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut after a line": lambda data: b"".join(data.splitlines(keepends=True)[:-2]),
    "empty": lambda data: b"",
    "gone": None,
    "without its first line": lambda data: data.partition(b"\n")[2],
    "a space more": lambda data: data.replace(b": ", b":  ", 1),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_are_noticed_at_resume(tmp_path, damage):
    job, directory = start(tmp_path / "run", steps=12)
    loop.run(signal_at(job, 8, signal.SIGTERM), directory)
    whole, change = directory.metrics_path.read_bytes(), DAMAGES[damage]
    directory.metrics_path.unlink()
    if change is not None:
        assert change(whole) != whole
        directory.metrics_path.write_bytes(change(whole))
    job, directory = again(tmp_path / "run")
    before = directory.metrics_path.read_bytes() if change is not None else None
    with pytest.raises(FileFormatError, match=r"BIRL-E701 .*metrics.*Fix: restore the file"):
        loop.run(job, directory)
    assert job.taken == 8, "a step was taken"
    assert before == (directory.metrics_path.read_bytes() if change is not None else None)
    directory.metrics_path.write_bytes(whole)
    assert loop.run(*again(tmp_path / "run")).step == 12


def test_any_byte_of_the_metrics_counts(tmp_path):
    """Flipped one at a time; a line's end may be torn off beyond the checkpoint alone."""
    job, directory = start(tmp_path / "run", steps=4)
    loop.run(signal_at(job, 2, signal.SIGTERM), directory)
    whole = directory.metrics_path.read_bytes()
    digest = CheckpointStore(directory.checkpoints).load().metrics
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        directory.metrics_path.write_bytes(changed)
        with pytest.raises(FileFormatError):
            directory.recorded(2, digest)


@pytest.mark.parametrize(
    "line",
    [
        b'{"x": 1.0}',
        b'{"step": 1, "x": 1.0}',
        b'{"step": "2", "x": 1.0}',
        b'{"step": 2, "x": "1"}',
        b"[1]",
        b'"step": 2, "x": 1.0}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
    ids=lambda line: line[:24].decode(errors="replace"),
)
def test_a_line_that_is_not_the_row_of_its_step_is_refused_by_its_number(tmp_path, line):
    _, directory = start(tmp_path / "run")
    directory.metrics_path.write_bytes(b'{"step": 1, "x": 1.0}\n' + line + b"\n")
    with pytest.raises(FileFormatError, match=r"not the row of step 2 at .*jsonl, line 2\."):
        directory.history()


def test_rows_beyond_the_checkpoint_may_be_anything(tmp_path, uninterrupted):
    """What a power cut left of them is void, as they are written again."""
    path = tmp_path / "run"
    job, directory = start(path, steps=12)
    loop.run(signal_at(job, 5, signal.SIGTERM), directory)
    with directory.metrics_path.open("ab") as file:
        file.write(b'{"step": 9}\nrubbish\n\0\0\0')
    loop.run(*again(path))
    assert fingerprint(path) == uninterrupted


def test_what_a_kill_left_half_written_is_no_run_and_is_removed(tmp_path):
    """Also where the run had ended and nothing is saved any more."""
    path = tmp_path / "run"
    path.mkdir()
    (path / ".partial-0-config.toml").write_text("problem =")
    loop.run(*start(path, steps=2))
    (path / "checkpoints/.partial-0-step.pt").write_bytes(b"half")
    loop.run(*again(path))
    assert not list(path.rglob(".partial-*"))


# The contract of a job


@dataclasses.dataclass(frozen=True)
class Seedless:
    steps: int = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": Seedless()}, r"Broken\.config\.seed is None .*an integer"),
        ({"config": FakeConfig(seed=True)}, r"Broken\.config\.seed is True"),
        ({"config": FakeConfig(seed=untyped("1"))}, r"Broken\.config\.seed is '1'"),
        ({"config": {"seed": 1}}, r"Broken\.config is \{'seed': 1\} .*dataclass"),
        ({"total_steps": "3"}, r"Broken\.total_steps is '3' .*an integer"),
        *(
            ({name: None}, rf"Broken\.{name} is no method.*Fix: define it")
            for name in ("step", "state_dict", "load_state_dict", "summary", "figures")
        ),
    ],
    ids=str,
)
def test_a_job_without_its_parts_is_refused_before_the_first_step(tmp_path, change, message):
    _, directory = start(tmp_path / "run")

    class Broken(FakeJob):
        def __init__(self) -> None:
            super().__init__(FakeConfig())

        def __getattribute__(self, name: str) -> Any:
            return change[name] if name in change else super().__getattribute__(name)

    with pytest.raises(JobError, match=f"BIRL-E803 {message}"):
        loop.run(Broken(), directory)
    assert not directory.metrics_path.exists()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "a step returned NoneType"),
        ([1.0], "a step returned list"),
        ({"x": "1.5"}, "the metric 'x' is '1.5'"),
        ({"x": None}, "the metric 'x' is None"),
        ({"x": torch.zeros(2)}, "the metric 'x' is tensor"),
        ({"x": np.zeros((1, 2))}, "the metric 'x' is array"),
        ({"x": 1 + 2j}, "the metric 'x' is "),
        ({"x": [1.0]}, r"the metric 'x' is \[1\.0\]"),
        ({1: 1.0}, "a metric is called 1"),
        ({"step": 7}, "a metric is called 'step'"),
    ],
    ids=str,
)
def test_metrics_that_are_no_numbers_are_refused_by_name(tmp_path, found, message):
    job, directory = start(tmp_path / "run", steps=3)
    job.step = lambda: found
    with pytest.raises(JobError, match=rf"BIRL-E803 {message}.*at FakeJob\.step .*Fix: "):
        loop.run(job, directory)
    assert directory.history() == []


def test_metrics_may_be_any_number(tmp_path):
    job, directory = start(tmp_path / "run", steps=1)
    take = job.step
    row = {"a": 1, "b": True, "c": torch.ones(1), "d": np.float32(0.5), "e": 10**400, "f": math.nan}
    job.step = lambda: {**take(), **row}
    loop.run(job, directory)
    (kept,) = directory.history()
    assert [kept[name] for name in "abcd"] == [1, 1, 1, 0.5]
    assert math.isnan(kept["e"])
    assert math.isnan(kept["f"])


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        (None, "FakeJob.summary returned NoneType"),
        ({"a": {"b": [1, object()]}}, r"a summary cannot hold a object at summary\.a\.b\[1\]"),
        ({"a": {1, 2}}, r"a summary cannot hold a set at summary\.a"),
    ],
    ids=["none", "object", "set"],
)
def test_a_summary_that_is_no_data_is_refused_by_name(tmp_path, summary, message):
    job, directory = start(tmp_path / "run", steps=1)
    job.summary = lambda: summary
    with pytest.raises(JobError, match=f"BIRL-E803 {message}"):
        loop.run(job, directory)
    assert not directory.summary_path.exists()
    assert CheckpointStore(directory.checkpoints).load().step == 1


def test_a_summary_cannot_replace_what_every_run_reports(tmp_path):
    job, directory = start(tmp_path / "run", steps=1, seed=3)
    job.summary = lambda: {"seed": 9, "seconds": "long", "objective": 1.0}
    found = loop.run(job, directory).summary
    assert found is not None
    assert (found["seed"], found["objective"]) == (3, 1.0)
    assert isinstance(found["seconds"], float)


@pytest.mark.parametrize("figures", [None, ["objective"], {"objective": "a picture"}], ids=str)
def test_figures_that_cannot_be_drawn_are_refused_by_name(tmp_path, figures):
    job, directory = start(tmp_path / "run", steps=1)
    summary = loop.run(job, directory).summary or {}
    job.figures = lambda *_: figures
    with pytest.raises(JobError, match=r"BIRL-E803 FakeJob\.figures returned"):
        loop.draw_figures(job, directory, summary)


def test_the_files_of_a_run(tmp_path):
    job, directory = start(tmp_path / "run", steps=5, seed=3)
    outcome = loop.run(job, directory, checkpoint_every=2)
    assert (outcome.step, outcome.stopped_by) == (5, None)
    assert [row["step"] for row in directory.history()] == [1, 2, 3, 4, 5]
    found = CheckpointStore(directory.checkpoints).paths()
    assert [path.name.partition("-")[2][:8] for path in found] == ["00000005", "00000004"]
    summary = json.loads(directory.summary_path.read_text())
    assert summary == outcome.summary
    assert summary["parameters"] == job.x.tolist()
    assert summary["seed"] == 3
    assert summary["error_bound"] is None
    assert summary["versions"]["torch"] == torch.__version__
    assert read_toml(directory.config_path) == {"problem": "fake", "config": to_plain(job.config)}


class FilingJob(FakeJob):
    """Keeps each x in a file of its own, and all of them in one that grows."""

    path: Any = None
    seen: Any = None
    detached = 0

    def detach(self) -> None:
        self.detached += 1

    def attach(self, path: Path) -> None:
        assert self.path is None
        with pytest.raises(ConfigError, match="another process"), RunDirectory(path).lock():
            pass
        self.path, self.seen = path / "x", []
        self.path.mkdir(exist_ok=True)

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        if self.path is not None:
            self.seen = [int(line) for line in (self.path / "seen").read_text().split()]
            self.seen = self.seen[: self.taken]

    def step(self) -> dict[str, float]:
        metrics = super().step()
        self.seen.append(self.taken)
        (self.path / f"{self.taken}").write_text(str(self.x.tolist()))
        (self.path / "seen").write_text(" ".join(map(str, self.seen)))
        return metrics


def test_a_job_that_raises_lets_go_of_its_files(tmp_path):
    job, directory = start(tmp_path / "run", steps=6)
    job = untyped(FilingJob(job.config))
    job.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError) as raised:
        loop.run(job, directory)
    assert job.detached == 1
    (note,) = raised.value.__notes__
    assert note.startswith("The newest checkpoint is of step 0; ")
    assert note.endswith(f": birl run --resume {directory.path}")
    assert "go on" not in note, "the same step may fail again"
    loop.run(*again(directory.path))  # as it says
    assert len(directory.history()) == 6


def test_a_job_may_write_files_of_its_own(tmp_path):
    """They lie beside those of the run, and a resumed run ends with the same."""

    def filing(arguments: tuple[Any, RunDirectory]) -> tuple[Any, RunDirectory]:
        return FilingJob(arguments[0].config), arguments[1]

    whole, its_directory = filing(start(tmp_path / "whole", steps=6))
    loop.run(whole, its_directory)
    assert whole.detached == 1
    job, directory = filing(start(tmp_path / "cut", steps=6))
    assert isinstance(untyped(job), WritesFiles)
    assert not isinstance(FakeJob(job.config), WritesFiles)

    def work() -> None:
        loop.run(signal_at(job, 5, signal.SIGKILL), directory, checkpoint_every=3)

    os.waitpid(fork(work), 0)
    assert (directory.path / "x/seen").read_text() == "1 2 3 4"
    # A plot reads the state without a directory to write to.
    assert loop.restore(FilingJob(job.config), CheckpointStore(directory.checkpoints)).step == 3
    loop.run(*filing(again(directory.path)))
    for name in ("seen", *"123456"):
        whole, cut = ((tmp_path / run / "x" / name).read_text() for run in ("whole", "cut"))
        assert whole == cut


def test_progress_is_silent_without_a_terminal(capfd):
    with progress("fake", total=3) as show:
        show({"step": 1, "x": 1.0})
    assert capfd.readouterr() == ("", "")


# Resuming


def fingerprint(path: Path) -> dict[str, Any]:
    """Every bit of the state, the metrics and the summary, seconds apart."""
    directory = RunDirectory(path)
    found = CheckpointStore(directory.checkpoints).load()
    return {
        "step": found.step,
        "state": digest(found.state),
        "metrics": directory.metrics_path.read_text(),
        "summary": {**(directory.read_summary() or {}), "seconds": None},
    }


def signal_at(job: Any, step: int, number: int) -> Any:
    """Make the job send its own process a signal in the middle of a step."""
    take = job.step

    def step_with_signal() -> dict[str, float]:
        if job.taken == step - 1:
            os.kill(os.getpid(), number)
        return take()

    job.step = step_with_signal
    return job


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    loop.run(*start(path, steps=12))
    return fingerprint(path)


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, uninterrupted, stop):
    path = tmp_path / "run"
    job, directory = start(path, steps=12)
    outcome = loop.run(signal_at(job, stop, signal.SIGTERM), directory)
    assert outcome == (stop, None, signal.SIGTERM)
    assert not directory.summary_path.exists()
    loop.run(*again(path))
    assert fingerprint(path) == uninterrupted


@pytest.mark.parametrize("kill", range(1, 12, 2))
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, uninterrupted, kill):
    path = tmp_path / "run"

    def work() -> None:
        job, directory = start(path, steps=12)
        loop.run(signal_at(job, kill, signal.SIGKILL), directory, checkpoint_every=4)

    child = fork(work)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(RunDirectory(path).history()) == kill - 1
    loop.run(*again(path))
    assert fingerprint(path) == uninterrupted


def test_the_fingerprint_sees_a_lost_generator(tmp_path, uninterrupted):
    """The comparison above can fail: it does so for a job that forgets its generator."""
    path = tmp_path / "run"
    job, directory = start(path, steps=12)
    loop.run(signal_at(job, 5, signal.SIGTERM), directory)
    job, directory = again(path)
    load = job.load_state_dict
    fresh = job.generator.get_state()
    job.load_state_dict = lambda state: load({**state, "generator": fresh})
    loop.run(job, directory)
    assert fingerprint(path) != uninterrupted


def test_a_finished_run_stays_as_it_is(tmp_path, uninterrupted):
    path = tmp_path / "run"
    loop.run(*start(path, steps=12))
    loop.run(*again(path))
    assert fingerprint(path) == uninterrupted


def test_seconds_add_up_over_sessions(tmp_path):
    path = tmp_path / "run"
    job, directory = start(path, steps=2)
    loop.run(signal_at(job, 1, signal.SIGTERM), directory)
    store = CheckpointStore(directory.checkpoints)
    found = store.load()
    rest: dict[str, Any] = {
        "config": found.config,
        "versions": found.versions,
        "metrics": found.metrics,
    }
    store.save(found.state, step=1, seconds=1000.0, **rest)
    assert (loop.run(*again(path)).summary or {})["seconds"] > 1000.0
    assert store.load().seconds > 1000.0


def test_a_checkpoint_is_never_newer_than_its_metrics(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync

    def logged(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)
        fsync(descriptor)

    job, directory = start(tmp_path / "run", steps=1)
    monkeypatch.setattr(os, "fsync", logged)
    loop.run(job, directory)
    assert [x for x in synced if x] == [".jsonl", ".jsonl", ".pt", ".jsonl", ".pt", ".json"]


def test_another_configuration_is_refused(tmp_path):
    _, directory = start(tmp_path / "run", rate=0.1)
    with pytest.raises(CheckpointIncompatibleError, match=r"rate: stored 0\.1, given 0\.2"):
        loop.run(FakeJob(FakeConfig(rate=0.2)), directory)
    loop.run(FakeJob(FakeConfig(rate=0.1)), directory)
    config = directory.config_path.read_text().replace("rate = 0.1", "rate = 0.2")
    directory.config_path.write_text(config)
    with pytest.raises(CheckpointIncompatibleError, match=r"rate.*step-00000020"):
        loop.run(*again(directory.path))


def test_other_versions_warn(tmp_path, monkeypatch):
    path = tmp_path / "run"
    loop.run(*start(path, steps=2))
    original = CheckpointStore(path / "checkpoints").load().versions
    monkeypatch.setattr(loop, "versions", lambda: {**original, "torch": "9.9"})
    with pytest.warns(UserWarning, match=r"torch .* -> 9\.9.*not to the same bits"):
        loop.run(*again(path))


# When checkpoints are written


class Simulation:
    """A run of one-second steps, whose checkpoints take some seconds each."""

    def __init__(
        self,
        every: int | None,
        cost: float,
        monkeypatch: pytest.MonkeyPatch,
        *,
        steps: int = 50_000,
        full_disk: bool = False,
    ) -> None:
        self.seconds, self.spent, self.full_disk = 0.0, 0.0, full_disk
        self.cost = cost
        self.starts: list[float] = []
        self.config, self.digest = FakeConfig(), ""
        monkeypatch.setattr(untyped(loop).time, "perf_counter", lambda: self.seconds)
        one: Any = self  # job, store and metrics
        saver = Saver(one, one, one, None, every)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if not full_disk else "ignore")
            for step in range(1, steps + 1):
                self.seconds += 1
                saver.save_if_due(step)

    def state_dict(self) -> dict:
        return {}

    def sync(self) -> None:
        """Half of the time goes here, half into the store."""
        self.starts.append(self.seconds)
        self._pass()

    def save(self, state: dict, **rest: Any) -> None:
        self._pass()
        if self.full_disk:
            raise CheckpointWriteError("no room")

    def _pass(self) -> None:
        self.seconds += self.cost / 2
        self.spent += self.cost / 2

    @property
    def gaps(self) -> list[float]:
        """Seconds from the end of each checkpoint to the start of the next."""
        ends = [0.0, *(start + self.cost for start in self.starts)]
        return [start - end for start, end in zip(self.starts, ends[:-1], strict=True)]


@pytest.mark.parametrize("full_disk", [False, True])
@pytest.mark.parametrize("cost", [0.0, 1.0, 2.0, 60.0, 600.0])
def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch, cost, full_disk):
    run = Simulation(None, cost, monkeypatch, full_disk=full_disk)
    assert len(run.starts) >= 4
    assert min(run.gaps) >= 30
    assert run.gaps[0] == 30  # what it costs is not known yet
    after_first = run.seconds - run.starts[0] - cost
    assert run.spent - cost <= 0.05 * after_first
    if cost <= 1:
        assert set(run.gaps) == {30}
    else:
        assert run.spent >= 0.04 * run.seconds, "rarer than it has to be"


@pytest.mark.parametrize("cost", [0.0, 600.0])
def test_a_pace_that_was_asked_for_is_kept(monkeypatch, cost):
    assert Simulation(7, cost, monkeypatch, steps=1000).gaps == [7] * 142


@pytest.mark.parametrize("every", [0, -1])
def test_an_impossible_pace_is_refused(tmp_path, every):
    job, directory = start(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"--checkpoint-every is {every} .*1 or more"):
        loop.run(job, directory, checkpoint_every=every)
    assert not directory.metrics_path.exists()


# Loggers


def test_loggers_are_called_with_each_row_once_it_is_recorded(tmp_path):
    job, directory = start(tmp_path / "run", steps=3)
    seen = []

    def log(row: dict[str, float]) -> None:
        assert directory.history()[-1] == row
        seen.append(row)

    loop.run(job, directory, loggers=[log])
    assert [row["step"] for row in seen] == [1, 2, 3]


# TensorBoard


def scalars(directory: RunDirectory) -> list[dict[str, float]]:
    """The rows that TensorBoard shows, in the order of the files."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(directory.tensorboard), {"scalars": 0})
    events.Reload()
    rows: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            row = rows.setdefault(event.step, {"step": event.step})
            assert name not in row, f"{name} of step {event.step} is there twice"
            row[name] = event.value
    return list(rows.values())


def in_single_precision(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: float(np.float32(value)) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stops", [[2], [8], [4, 4, 5, 11]], ids=str)
def test_tensorboard_shows_each_row_once(tmp_path, uninterrupted, stops, number):
    board = pytest.importorskip("birl_ext.runs.tensorboard")
    path = tmp_path / "run"
    start(path, steps=12)

    def session(stop: int) -> None:
        job, directory = again(path)
        with contextlib.closing(board.TensorBoardWriter(directory.tensorboard)) as writer:
            options: dict[str, Any] = {"checkpoint_every": 3, "loggers": [writer]}
            loop.run(signal_at(job, stop, number), directory, **options)

    for stop in stops:
        if number == signal.SIGKILL:
            os.waitpid(fork(functools.partial(session, stop)), 0)
        else:
            session(stop)
    session(0)
    assert fingerprint(path) == uninterrupted
    directory = RunDirectory(path)
    assert scalars(directory) == in_single_precision(directory.history())


def test_rows_outlive_a_kill_for_tensorboard(tmp_path):
    board = pytest.importorskip("birl_ext.runs.tensorboard")
    _, directory = start(tmp_path / "run")
    rows = [{"step": step, "x": float(step)} for step in range(1, 9)]

    def work() -> None:
        writer = board.TensorBoardWriter(directory.tensorboard)
        for row in rows:
            writer(row)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(work), 0)
    assert scalars(directory) == rows


def test_rows_written_again_are_shown_once_also_behind_a_torn_file(tmp_path):
    board = pytest.importorskip("birl_ext.runs.tensorboard")
    _, directory = start(tmp_path / "run")
    rows = [{"step": step, "x": float(step)} for step in range(1, 9)]
    for after in (0, 4):
        with contextlib.closing(board.TensorBoardWriter(directory.tensorboard)) as writer:
            for row in rows[after : after + 6]:
                writer(row)
        (newest,) = directory.tensorboard.glob("events.*")
        newest.write_bytes(newest.read_bytes()[: -5 if after == 0 else None])
    assert scalars(directory) == rows


# Failures and signals


def test_a_failing_step_keeps_the_last_checkpoint(tmp_path):
    job, directory = start(tmp_path / "run", steps=10, fail_at=5)
    with pytest.raises(NotConvergedError):
        loop.run(job, directory, checkpoint_every=2)
    assert CheckpointStore(directory.checkpoints).load().step == 4


def test_a_checkpoint_that_fails_on_the_way_warns_the_last_one_raises(tmp_path, monkeypatch):
    failing = {2, 4}
    save = CheckpointStore.save

    def sometimes(self, state, *, step, **rest):
        if step in failing:
            raise CheckpointWriteError("no room")
        return save(self, state, step=step, **rest)

    monkeypatch.setattr(CheckpointStore, "save", sometimes)
    with pytest.warns(UserWarning, match="no room") as caught:
        loop.run(*start(tmp_path / "a", steps=9), checkpoint_every=2)
    assert len(caught) == 2
    assert CheckpointStore(tmp_path / "a/checkpoints").load().step == 9

    failing = {6}
    arguments = start(tmp_path / "b", steps=6)
    with pytest.warns(UserWarning, match="no room"), pytest.raises(CheckpointWriteError):
        loop.run(*arguments, checkpoint_every=2)
    # 2 succeeds, 4 succeeds, 6 fails twice: on the way, and as the last one
    assert CheckpointStore(tmp_path / "b/checkpoints").load().step == 4


def test_ctrl_c_twice_interrupts_and_other_signals_do_not():
    with loop.stop_requests() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert stop == [signal.SIGTERM, signal.SIGTERM, signal.SIGHUP]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signals_stay_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_run_in_a_thread(tmp_path):
    outcomes = []
    arguments = start(tmp_path / "run", steps=3)
    thread = threading.Thread(target=lambda: outcomes.append(loop.run(*arguments)))
    thread.start()
    thread.join()
    assert outcomes[0].step == 3


# Figures


def test_figures_are_the_same_bytes_each_time(tmp_path):
    job, directory = start(tmp_path / "run", steps=5)
    summary = loop.run(job, directory).summary or {}
    before = dict(untyped(plots).mpl.rcParams)
    written, missing = loop.draw_figures(job, directory, summary)
    assert missing == []
    assert [path.name for path in written] == [
        "objective.png",
        "objective.svg",
        "both.png",
        "both.svg",
    ]
    first = [path.read_bytes() for path in written]
    assert first[0].startswith(b"\x89PNG")
    assert b"<dc:date>" not in first[1]
    untyped(plots).mpl.rcParams["xtick.major.size"] = 30
    loop.draw_figures(job, directory, directory.read_summary() or {})
    assert [path.read_bytes() for path in written] == first
    untyped(plots).mpl.rcParams["xtick.major.size"] = before["xtick.major.size"]
    assert dict(untyped(plots).mpl.rcParams) == before


def test_a_curve_joins_what_is_there_and_shows_references_and_short_runs():
    history = [
        {"step": 1, "a": 1.0, "b_c": 5.0},
        {"step": 2, "a": math.nan},
        {"step": 3, "a": 2.0, "b_c": 3.0},
    ]
    figure = plots.learning_curve(history, ["a", "b_c"], references={"optimum": 0.5}, log=True)
    axes: Any
    (axes,) = figure.axes
    a, b, reference = axes.lines
    assert list(b.get_xdata()) == [1, 3]  # a line from one to the other
    assert math.isnan(a.get_ydata()[1])  # a gap
    assert (a.get_marker(), reference.get_ydata()[0]) == ("o", 0.5)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b c"]
    assert axes.texts[0].get_text() == "optimum"
    assert axes.get_yscale() == "log"


def test_runs_are_drawn_as_their_mean_and_its_interval():
    stats = pytest.importorskip("scipy.stats")
    for n in (2, 3, 4, 5, 10, 100):
        values = torch.randn(n, 3, dtype=torch.float64).numpy()
        error = values.std(0, ddof=1) / math.sqrt(n)
        mean, half = mean_interval(values)
        assert mean == pytest.approx(values.mean(0))
        assert half == pytest.approx(stats.t.ppf(0.975, n - 1) * error, rel=5e-4)
    _, axes = plots.new_figure()
    plots.draw_runs(axes, [0, 10], [[1.0, 2.0], [3.0, 2.0]], label="two")
    plots.draw_runs(axes, [0, 10], [[1.0, 2.0]], label="one")
    two, one = axes.lines
    assert (list(two.get_ydata()), list(one.get_ydata())) == ([2.0, 2.0], [1.0, 2.0])
    band, _ = axes.collections
    assert band.get_datalim(axes.transData).intervaly == pytest.approx(
        [2 - 12.7062, 2 + 12.7062], rel=1e-4
    )
