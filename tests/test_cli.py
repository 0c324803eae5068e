"""The command line: exit codes, messages, files, missing packages, signals."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path
from typing import Any

import fake_problem
import pytest
import torch

import birl_ext
from birl_ext import cli, doctor
from birl_ext.model.tensor_files import read_tensors
from birl_ext.runs.checkpoint import CheckpointStore

ROOT = Path(__file__).parent.parent
BIRL = [sys.executable, str(ROOT / "tests" / "fake_problem.py")]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: Any = types.ModuleType("birl_ext.problems")
    problems.__path__ = [str(Path(birl_ext.__file__).parent / "problems")]
    problems.PROBLEMS = {"fake": fake_problem.PROBLEM}
    monkeypatch.setitem(sys.modules, "birl_ext.problems", problems)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("BIRL_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def birl(capsys):
    """Run a command in this process: exit status, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status: Any = cli.main(list(words))
        except SystemExit as ending:  # tyro and argparse end this way
            status = ending.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def spawn(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*BIRL, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(directory: Path, steps: int, process: subprocess.Popen[str]) -> None:
    path = directory / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


# Help and mistakes


def test_help(birl):
    assert birl("--help") == (0, cli.USAGE, "")
    assert birl() == (2, cli.USAGE, "")
    status, out, _ = birl("run", "--help")
    assert status == 0
    assert "fake  noisy least squares" in out
    assert birl("run")[0] == 2
    status, out, _ = birl("run", "fake", "--help")
    assert status == 0
    for flag in (
        *("--rate", "--seed", "--out", "--resume", "--no-figures", "--tensorboard"),
        "--checkpoint-every",
    ):
        assert flag in out


FORBIDDEN = 'problem = "fake"\n[config]\nsize = 200\nrate = 2\nsteps = 1\n'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], r"unknown command 'rnu' .*did you mean 'run'\?"),
        (["run", "fkae"], r"unknown problem 'fkae' .*did you mean 'fake'\?"),
        (["run", "fake", "--checkpoint-every", "0"], "--checkpoint-every is 0"),
        (["run", "fake", "--resume", "nowhere"], "not a run directory.*nowhere"),
        (["run", "--config", "absent.toml"], "No such file.*absent.toml"),
        (["run", "--config", "typo.toml"], r"unknown key 'rat' at typo\.toml.*'rate'"),
        (["run", "--config", "top.toml"], r"unknown key 'problme' at top\.toml.*'problem'"),
        (["run", "other", "--config", "good.toml"], "the problem is 'other'"),
        (["run", "--config", "forbidden.toml"], "size is 200"),
        (["run", "--config", "forbidden.toml", "--size", "300"], "size is 300"),
        (["run", "--resume", "edited"], r"3 is not accepted at edited/config\.toml\.config"),
        (["plot", "edited"], r"3 is not accepted at edited/config\.toml\.config"),
        (["run", "--resume", "half"], r"'problem' is missing at half/config\.toml"),
        (["run", "--resume", "wrong"], r"'x' is not accepted at wrong/config\.toml\.rate"),
        (["plot", "started"], "no checkpoint yet at started.*birl run --resume started"),
        (["run", "fake", "--out", "full"], "not empty"),
        (["plot", "full"], "not a run directory"),
        (["solve", "--mdp", "absent.npz", "--temperature", "1"], "absent.npz is not a file"),
        *((["solve", "--temperature", "1", "--mdp", mdp], "E701") for mdp in ("", ".", "/", "..")),
        (["run", "fake", "--fail-at", "3"], "did not converge"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_status_2(birl, words, message):
    Path("full").mkdir()
    Path("full/file").touch()
    Path("typo.toml").write_text('problem = "fake"\n[config]\nrat = 1\n')
    Path("top.toml").write_text('problme = "fake"\n')
    Path("good.toml").write_text('problem = "fake"\n')
    Path("forbidden.toml").write_text(FORBIDDEN)
    for name, text in (
        ("edited", 'problem = "fake"\nconfig = 3\n'),
        ("half", "[config]\n"),
        ("wrong", 'problem = "fake"\n[config]\nrate = "x"\n'),
        ("started", 'problem = "fake"\n[config]\n'),
    ):
        Path(name).mkdir()
        Path(name, "config.toml").write_text(text)
    status, out, err = birl(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("birl: BIRL-E")
    assert re.search(message, err)


def test_debug_shows_the_traceback(birl, monkeypatch):
    monkeypatch.setenv("BIRL_DEBUG", "1")
    with pytest.raises(birl_ext.errors.ConfigError):
        birl("run", "fkae")


@pytest.mark.parametrize("words", [["--rate", "x"], ["--noise", "pink"], ["--nose", "none"]])
def test_a_wrong_flag_is_status_2_and_leaves_nothing_behind(birl, words):
    assert birl("run", "fake", *words)[0] == 2
    assert not Path("runs").exists()


def test_a_reader_that_leaves_early_is_no_error():
    command = " ".join([*BIRL, "doctor"])
    shell = f"{command} | true; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(birl, monkeypatch):
    def broken(words: list[str]) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setitem(cli.COMMANDS, "doctor", broken)
    assert birl("doctor") == (2, "", "birl: [Errno 32] Broken pipe\n")


# Runs


def test_a_run_ends_with_its_result_and_its_directory(birl):
    status, out, err = birl("run", "fake", "--steps", "4", "--out", "a", "--seed", "7")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("fake: 4 steps in ")
    assert lines[0].endswith("seed 7")
    assert lines[-1] == "a"
    assert [line.split("  ")[1].strip() for line in lines[1:-1]] == [
        "parameters",
        "objective",
        "gradient norm",
        "error bound",
    ]
    assert sorted(path.name for path in Path("a").iterdir() if path.name[0] != ".") == [
        "checkpoints",
        "config.toml",
        "figures",
        "metrics.jsonl",
        "summary.json",
    ]
    assert len(list(Path("a/figures").iterdir())) == 4


def test_tensorboard_is_written_when_asked_for(birl):
    pytest.importorskip("tensorboard")
    words = ["run", "fake", "--steps", "3", "--no-figures"]
    assert birl(*words, "--tensorboard", "--out", "a")[0] == 0
    assert birl(*words, "--out", "b")[0] == 0
    (file,) = Path("a/tensorboard").iterdir()
    assert b"objective" in file.read_bytes()
    assert not Path("b/tensorboard").exists()
    assert Path("a/metrics.jsonl").read_bytes() == Path("b/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_result_is_printed_whatever_the_terminal_can_show(encoding):
    """The name of the directory here, which is no text."""
    words = ["run", "fake", "--steps", "1", "--no-figures", "--out", "\u03b8\udcff"]
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run([*BIRL, *words], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith("\u03b8\\udcff\n".encode(encoding, "backslashreplace"))


def test_the_default_directory(birl):
    birl("run", "fake", "--steps", "1", "--no-figures")
    (path,) = Path("runs").iterdir()
    assert path.name.startswith("fake-")
    assert not (path / "figures").exists()


def test_flags_override_the_file_which_overrides_the_defaults(birl):
    Path("run.toml").write_text('problem = "fake"\n[config]\nsteps = 2\nrate = 1\nseed = 4\n')
    assert birl("run", "--config", "run.toml", "--seed", "5", "--out", "a", "--no-figures")[0] == 0
    config = tomllib.loads(Path("a/config.toml").read_text())["config"]
    assert (config["steps"], config["rate"], config["seed"], config["size"]) == (2, 1.0, 5, 5)
    # What a run wrote starts the same run again.
    assert birl("run", "fake", "--config=a/config.toml", "--out=b", "--no-figures")[0] == 0
    assert Path("a/config.toml").read_bytes() == Path("b/config.toml").read_bytes()
    assert Path("a/metrics.jsonl").read_bytes() == Path("b/metrics.jsonl").read_bytes()


def test_a_flag_may_mend_what_the_file_forbids(birl):
    Path("run.toml").write_text(FORBIDDEN)
    flags = ["--config", "run.toml", "--size", "3", "--out", "a", "--no-figures"]
    assert birl("run", *flags)[0] == 0
    config = tomllib.loads(Path("a/config.toml").read_text())["config"]
    assert (config["size"], config["rate"], config["pause"]) == (3, 2.0, 0.0)


def test_resume_refuses_another_configuration(birl):
    birl("run", "fake", "--steps", "2", "--out", "a", "--no-figures")
    status, _, err = birl("run", "--resume", "a", "--rate", "0.5")
    assert status == 2
    assert "BIRL-E703 the configuration differs: rate: stored 0.05, given 0.5" in err
    assert birl("run", "fake", "--resume", "a", "--out", "b")[0] == 2
    assert birl("run", "fake", "--resume", "a", "--no-figures")[0] == 0


def test_plot_draws_the_same_figures_again(birl):
    birl("run", "fake", "--steps", "3", "--out", "a")
    paths = sorted(Path("a/figures").iterdir())
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    status, out, _ = birl("plot", "a")
    assert status == 0
    assert sorted(map(Path, out.split())) == paths
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("problem", [{}, {"problem": "fake"}, {"problem": "other"}], ids=str)
def test_a_summary_of_something_else_is_refused_by_name(birl, problem):
    birl("run", "fake", "--steps", "3", "--out", "a", "--no-figures")
    Path("a/summary.json").write_text(json.dumps(problem | {"parameters": 3}))
    status, out, err = birl("plot", "a")
    assert (status, out, err.count("\n")) == (2, "", 1)
    what = "figures cannot be drawn from" if problem.get("problem") == "fake" else "summary is not"
    assert err.startswith(f"birl: BIRL-E701 the {what} ")
    assert "at a/summary.json" in err
    Path("a/summary.json").unlink()  # as it says
    assert birl("plot", "a")[0] == 0


def test_what_a_run_has_lost_is_noticed_and_the_remedy_helps(birl):
    birl("run", "fake", "--steps", "4", "--out", "a", "--no-figures")
    whole, path = Path("a/metrics.jsonl").read_bytes(), Path("a/metrics.jsonl")
    short = whole.partition(b"\n")[0] + b"\n"
    for rows, said in (
        (short, "BIRL-E701 the metrics hold 1 rows, the newest checkpoint is of step 4"),
        (whole, "BIRL-E702 the metrics hold 4 rows, and there is no checkpoint at a/checkpoints"),
    ):
        path.write_bytes(rows)
        for command in (["run", "--resume", "a"], ["plot", "a"]):
            status, out, err = birl(*command)
            assert (status, out, err.count("\n"), said in err) == (2, "", 1, True), err
            assert path.read_bytes() == rows
            assert err.endswith(f"{(remedy := 'birl run --config a/config.toml')}\n")
        shutil.rmtree("a/checkpoints", ignore_errors=True)
    assert birl(*remedy.split()[1:], "--out", "b", "--no-figures")[0] == 0


@pytest.mark.filterwarnings("default")
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on(birl):
    birl("run", "fake", "--steps", "4", "--out", "a", "--no-figures", "--checkpoint-every", "3")
    metrics = Path("a/metrics.jsonl").read_bytes()
    (newest,) = Path("a/checkpoints").glob("step-00000004.0-*")
    newest.write_bytes(newest.read_bytes()[:-1])
    status, _, err = birl("run", "--resume", "a", "--no-figures")
    assert status == 0
    assert err.startswith(
        f"birl: warning: damaged checkpoint passed over: {newest}: it does not match"
    )
    assert Path("a/metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(birl, number, code):
    flags = ["--pause", "0.01", "--steps", "60", "--no-figures"]
    process = spawn("run", "fake", "--out", "a b", *flags)
    wait_for_steps(Path("a b"), 3, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    lines = err.splitlines()
    assert lines[0].startswith("birl: stopping after this step")
    assert lines[1].startswith(f"birl: stopped by {number.name} after step")
    assert lines[2] == "  birl run --resume 'a b'"
    steps = Path("a b/metrics.jsonl").read_text().count("\n")
    assert steps < 60
    assert birl("run", "--resume", "a b", "--no-figures")[0] == 0
    assert birl("run", "fake", "--out", "whole", *flags)[0] == 0
    assert Path("a b/metrics.jsonl").read_bytes() == Path("whole/metrics.jsonl").read_bytes()
    states = [CheckpointStore(Path(run, "checkpoints")).load().state for run in ("a b", "whole")]
    assert str(states[0]) == str(states[1])


def test_a_bar_on_a_terminal_and_silence_elsewhere(birl):
    assert birl("run", "fake", "--steps", "2", "--no-figures", "--out", "a")[2] == ""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*BIRL, "run", "fake", "--steps", "2", "--no-figures", "--out", "b"],
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
    )
    out, _ = process.communicate()
    os.close(slave)
    shown = os.read(master, 1 << 20).decode()
    os.close(master)
    assert "2/2" in shown
    assert "objective" in shown
    assert b"\x1b" not in out


@pytest.mark.parametrize("word", ["converged", "identified"])
def test_a_result_that_is_none_is_status_1_and_said(birl, monkeypatch, word):
    summary = fake_problem.FakeJob.summary
    monkeypatch.setattr(
        fake_problem.FakeJob, "summary", lambda job: {**summary(job), word: job.config.seed > 0}
    )
    words = ["run", "fake", "--steps", "2", "--no-figures", "--out"]
    status, out, err = birl(*words, "a")
    assert (status, err) == (1, f"birl: no result to rely on: not {word}\n")
    assert re.search(rf"^  {word} +False$", out, re.MULTILINE)
    assert birl("run", "--resume", "a", "--no-figures")[0] == 1
    status, out, err = birl(*words, "b", "--seed", "1")
    assert (status, err) == (0, "")
    assert re.search(rf"^  {word} +True$", out, re.MULTILINE)


def test_a_job_that_keeps_no_contract_is_refused_before_it_has_a_directory(birl, monkeypatch):
    monkeypatch.setattr(fake_problem.FakeJob, "figures", None)
    status, out, err = birl("run", "fake", "--steps", "2", "--out", "a")
    assert (status, out) == (2, "")
    assert err == "birl: BIRL-E803 FakeJob.figures is no method. Fix: define it: see Job.figures\n"
    assert not Path("a").exists()


@pytest.mark.parametrize("numbers", [2**50, 2**62])
def test_too_little_memory_is_one_line(birl, monkeypatch, numbers):
    def large(job: fake_problem.FakeJob) -> None:
        torch.empty(numbers, dtype=torch.float64)

    monkeypatch.setattr(fake_problem.FakeJob, "step", large)
    status, out, err = birl("run", "fake", "--out", "a")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("birl: BIRL-E304 there is too little memory")


# Missing packages


def test_without_tyro(monkeypatch, birl):
    monkeypatch.setitem(sys.modules, "tyro", None)
    status, _, err = birl("run", "fake")
    assert status == 2
    assert 'BIRL-E802 the command line needs tyro and rich. Fix: pip install "birl_ext[cli]"' in err


def test_without_tensorboard_a_run_is_refused_before_it_writes(birl, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "birl_ext.runs.tensorboard", raising=False)
    status, _, err = birl("run", "fake", "--tensorboard", "--out", "a")
    assert status == 2
    assert 'BIRL-E802 --tensorboard needs tensorboard. Fix: pip install "birl_ext[log]"' in err
    assert not Path("a").exists()
    assert birl("run", "fake", "--steps", "1", "--no-figures", "--out", "a")[0] == 0


def test_without_matplotlib_a_run_ends_well_and_plot_makes_up_for_it(birl, monkeypatch):
    from birl_ext.runs import plots

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.delitem(sys.modules, plots.__name__)
        patch.delattr(plots.__package__ + ".plots")
        status, out, err = birl("run", "fake", "--steps", "2", "--out", "a")
        plot = birl("plot", "a")
    assert status == 0
    assert out.splitlines()[-1] == "a"
    assert err.count("\n") == 1
    assert "figures not drawn, matplotlib is missing: objective, both." in err
    assert "then birl plot a" in err
    assert plot[0] == 2
    assert 'pip install "birl_ext[viz]"' in plot[2]
    assert birl("plot", "a")[0] == 0


def test_doctor_needs_no_extras():
    code = (
        "import sys, runpy\n"
        "for name in ('tyro', 'rich', 'matplotlib', 'safetensors', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['birl']\n"
        "runpy.run_module('birl_ext', run_name='__main__')\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    for word in (f"birl_ext {birl_ext.__version__}", torch.__version__, "compiled modules", "cpu"):
        assert word in process.stdout


def test_doctor_lists_every_extra(birl, monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "tyro" else "1.0")
    _, out, _ = birl("doctor")
    lines = dict(re.findall(r"^  \[(\w+)\] +(.+)$", out, re.M))
    assert set(lines) == set(declared["optional-dependencies"])
    assert lines["cli"] == 'tyro missing, rich 1.0, tomli-w 1.0: pip install "birl_ext[cli]"'
    assert lines["io"] == "safetensors 1.0"
    assert "birl_ext" not in lines["dev"]


def test_doctor_runs_from_a_folder(birl, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    status, out, _ = birl("doctor")
    assert status == 0
    assert "birl_ext itself is not installed" in out


def test_doctor_says_why_a_module_did_not_load(birl, monkeypatch):
    loader: Any = types.ModuleType("birl_ext.ops.backends.loader")
    loader.report = lambda: {
        "_cpu": {"loaded": True, "reason": "", "build_info": {"version": "1.2", "isa": "avx2"}},
        "_cuda": {"loaded": False, "reason": "the driver is too old", "build_info": {}},
    }
    monkeypatch.setitem(sys.modules, "birl_ext.ops.backends.loader", loader)
    status, out, _ = birl("doctor")
    assert status == 0
    assert "  _cpu   loaded; version 1.2, isa avx2\n" in out
    assert "  _cuda  not loaded: the driver is too old\n" in out


def test_doctor_reports_a_broken_torch_instead_of_failing(birl, monkeypatch):
    monkeypatch.setattr(doctor, "_torch", lambda: OSError("libtorch_cpu.so: not found"))
    status, out, _ = birl("doctor")
    assert status == 1
    assert "torch     does not import: libtorch_cpu.so: not found" in out


# Solving a file


def test_solve_writes_value_policy_and_certificate(birl):
    transition = torch.softmax(torch.randn(4, 2, 4, dtype=torch.float64), -1)
    mdp = birl_ext.DenseMDP(torch.randn(4, 2, dtype=torch.float64), transition, 0.9)
    mdp.save("mdp.npz")
    status, out, err = birl("solve", "--mdp", "mdp.npz", "--temperature", "0.5")
    assert (status, err) == (0, "")
    assert "error bound" in out
    want = birl_ext.solve(mdp, temperature=0.5)
    tables = {"value", "q", "policy", "log_policy", "advantage", "status"}
    certificate = {"residual", "error_bound", "log_policy_error_bound", "iterations"}
    got = read_tensors("mdp.solution.npz", tables | certificate)
    assert set(got) == tables | certificate
    for name in ("value", "policy", "error_bound", "iterations"):
        assert torch.equal(got[name], getattr(want, name)), name
    status, *_ = birl("solve", "--mdp", "mdp.npz", "--temperature", "-1")
    assert status == 2
    words = ["solve", "--mdp", "mdp.npz", "--temperature", "1"]
    for device in ("bogus", "meta", "cuda:99", "cpu:x", ""):
        status, out, err = birl(*words, "--device", device)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"BIRL-E801 device is {device!r}" in err
    status, _, err = birl(*words, "--out", "nowhere/x.npz")
    assert (status, "--out is nowhere/x.npz" in err) == (2, True)
    assert birl("solve", "--mdp", "mdp.npz", "--temperature", "1", "--out", "x.safetensors")[0] == 0
    assert Path("x.safetensors").exists()


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version_is_said(birl, word):
    status, out, _ = birl(word)
    assert (status, out) == (0, f"birl_ext {birl_ext.__version__}\n")
