"""The command line: ``birl run | arena | solve | plot | bench | doctor``.

Tyro, rich and matplotlib are imported only by the commands that need them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import os
import select
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from birl_ext._version import __version__
from birl_ext.errors import (
    BirlError,
    ConfigError,
    FileFormatError,
    MissingDependencyError,
    SizeLimitError,
)
from birl_ext.options import MethodName

if TYPE_CHECKING:
    from birl_ext.runs.directory import RunDirectory
    from birl_ext.runs.job import Job, Problem
    from birl_ext.runs.loop import RunOutcome

__all__ = ["RunOptions", "SolveFile", "main"]

USAGE = """\
usage: birl COMMAND [OPTIONS]

commands:
  run PROBLEM         run a problem; `birl run --help` lists them
  run --resume DIR    go on with a run that was stopped
  arena CONTEST       compare methods on one problem; `birl arena` lists the problems
  solve --mdp FILE    solve your own MDP, written by DenseMDP.save or SparseMDP.save
  plot DIR            draw the figures of a run again
  bench [CASE …]      in a clone: measure birl_ext against other packages, on this machine
  doctor              versions, compiled modules, devices: what to send with a bug report

`birl COMMAND --help` says more, `birl --version` which version this is. BIRL_DEBUG=1 shows the
traceback of an error.
"""

COMMON = ("problem", "seed", "steps", "seconds", "versions")
"""Entries of the summary that the closing table leaves out."""

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How the run is carried out; none of this changes its result."""

    out: Path | None = None
    """Directory to write; new or empty. Default: runs/PROBLEM-DATE-TIME."""

    config: Path | None = None
    """TOML file with the settings, such as a run's config.toml; flags given here override it."""

    resume: Path | None = None
    """Run directory to go on with."""

    checkpoint_every: int | None = None
    """Outer steps between checkpoints. Default: as many as take half a minute, or more if saving
    takes over 5 % of the time."""

    tensorboard: bool = False
    """Write the metrics for TensorBoard too."""

    figures: bool = True
    """Draw the figures at the end."""

    def __post_init__(self) -> None:
        if self.resume is not None and (self.out or self.config):
            raise ConfigError(
                "--resume excludes --out and --config",
                fix="leave them out: a resumed run keeps its directory and its configuration",
            )


@dataclasses.dataclass(frozen=True)
class SolveFile:
    """Solve an MDP file and write value, policy and their certificate."""

    mdp: Path
    """.npz or .safetensors file written by DenseMDP.save or SparseMDP.save."""

    temperature: float
    """Weight τ of the entropy, in units of the reward."""

    out: Path | None = None
    """.npz or .safetensors file to write. Default: FILE.solution.npz beside the MDP."""

    method: MethodName = "auto"
    """Solver; auto chooses by shape and discount."""

    tol: float | None = None
    """Relative error asked for. Default: as far as rounding allows."""

    max_iterations: int | None = None
    """Limit on the iterations."""

    device: str = "cpu"
    """Where to solve: cpu, cuda, cuda:1, …"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``birl``; by default those of the process.

    Returns:
        The exit status: 0; 1 if a run ended without converging, or its data leave the result
        open; 2 after an error; 128 + signal if a signal stopped the run.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a result is no reason to fail
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"birl_ext {__version__}")
        return 0
    command, *rest = words
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if command not in COMMANDS:
                raise _unknown("command", command, COMMANDS)
            status = COMMANDS[command](rest)
            sys.stdout.flush()
            return status
        except (BirlError, OSError) as error:
            if isinstance(error, BrokenPipeError) and _reader_left():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 128 + signal.SIGPIPE
            if os.environ.get("BIRL_DEBUG"):
                raise
            _say(" ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split()))
            return 2
        except (MemoryError, RuntimeError) as error:
            if os.environ.get("BIRL_DEBUG") or not _out_of_memory(error):
                raise
            _say(str(SizeLimitError("there is too little memory", fix="lower the sizes")))
            return 2
        except KeyboardInterrupt:
            _say("interrupted")
            return 130


def _run(words: list[str]) -> int:
    name, flags = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    early = argparse.ArgumentParser(prog="birl run", add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", type=Path)
    early.add_argument("--module", action="extend", nargs="+")
    files, _ = early.parse_known_args(flags)
    if not name and not (files.config or files.resume):
        return _list_problems(asked=any(flag in ("-h", "--help") for flag in flags))

    from birl_ext.problems.saved import find_problem
    from birl_ext.runs.config import from_plain, to_plain
    from birl_ext.runs.directory import RunDirectory, default_path
    from birl_ext.runs.job import ChecksNew, require_job
    from birl_ext.runs.loop import check_pace

    stored_name, stored, where = _stored(files)
    if name and stored_name not in ("", name):
        raise ConfigError(
            f"the problem is {name!r}",
            where="the command line",
            allowed=f"{stored_name!r}, as in {files.resume or files.config}",
            fix="leave the name out",
        )
    name = name or stored_name
    if files.resume and files.module:  # where the run's own code is now
        stored = {**stored, "module": files.module}
    with _of_another_version(files.resume):
        problem = find_problem(name)
        if files.resume:
            from_plain(problem.config, stored, where=where)
    # Not checked yet: a flag may replace what the rest forbids.
    default = from_plain(problem.config, stored, where=where, check=False)
    config, options = _parse(name, problem, default, flags)
    # Before the directory: what is refused here leaves nothing behind.
    check_pace(options.checkpoint_every)
    board = importlib.import_module("birl_ext.runs.tensorboard") if options.tensorboard else None
    job = problem.job(config)
    require_job(job)
    if options.resume is not None:
        directory = RunDirectory(options.resume)
    else:
        if isinstance(job, ChecksNew):
            job.check_new()
        path = options.out or default_path(name)
        directory = RunDirectory.create(path, name, to_plain(config))
    return _carry_out(job, directory, options, board)


def _of_another_version(resumed: Path | None) -> contextlib.AbstractContextManager[None]:
    if resumed is None:
        return contextlib.nullcontext()
    from birl_ext.runs.checkpoint import CheckpointStore
    from birl_ext.runs.directory import RunDirectory
    from birl_ext.runs.loop import of_another_version

    directory = RunDirectory(resumed)
    return of_another_version(directory, CheckpointStore(directory.checkpoints))


def _list_problems(*, asked: bool) -> int:
    from birl_ext.problems import PROBLEMS

    width = max(map(len, PROBLEMS))
    print("usage: birl run PROBLEM [OPTIONS], birl run --config FILE, birl run --resume DIR")
    print("\nproblems:")
    for name, problem in PROBLEMS.items():
        print(f"  {name:<{width}}  {problem.summary}")
    print("\n`birl run PROBLEM --help` lists its settings.")
    return 0 if asked else 2


def _stored(files: argparse.Namespace) -> tuple[str, dict[str, Any], str]:
    """Problem, settings and file of --resume or --config; one of --config may leave out either."""
    from birl_ext.runs.config import from_plain, read_toml
    from birl_ext.runs.directory import RunDirectory

    if files.resume is not None:
        directory = RunDirectory(files.resume)
        return directory.problem, directory.config, str(directory.config_path)
    if files.config is not None:
        where = str(files.config)
        document = from_plain(_ConfigFile, read_toml(files.config), where=where)
        return document.problem, document.config, where
    return "", {}, "the defaults"


@dataclasses.dataclass(frozen=True)
class _ConfigFile:
    problem: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def _parse(
    name: str, problem: Problem, default: Any, flags: Sequence[str]
) -> tuple[Any, RunOptions]:
    """The config, with flags over the file's or the class's defaults, and the options."""
    tyro = _tyro()
    # Of a flag given twice tyro takes the last; of --module it is all.
    early = argparse.ArgumentParser(prog=f"birl run {name}", add_help=False, allow_abbrev=False)
    early.add_argument("--module", action="extend", nargs="+")
    found, words = early.parse_known_args(flags)
    if found.module:
        words += ["--module", *found.module]
    flat = tyro.conf.arg(name="")
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [
            ("settings", Annotated[problem.config, flat], dataclasses.field(default=default)),
            ("options", Annotated[RunOptions, flat], dataclasses.field(default=RunOptions())),
        ],
        frozen=True,
    )
    parsed: Any = _cli(arguments, f"birl run {name}", problem.summary, words)
    return parsed.settings, parsed.options


def _carry_out(
    job: Job, directory: RunDirectory, options: RunOptions, board: ModuleType | None
) -> int:
    from birl_ext.runs.loop import draw_figures, run

    loggers = [board.TensorBoardWriter(directory.tensorboard)] if board else []
    try:
        with contextlib.ExitStack() as stack:
            for logger in loggers:
                stack.callback(logger.close)
            outcome = run(
                job, directory, checkpoint_every=options.checkpoint_every, loggers=loggers
            )
    except KeyboardInterrupt:
        _say(f"interrupted; go on from the last checkpoint with\n  {_resume_command(directory)}")
        return 130
    if outcome.summary is None:
        assert outcome.stopped_by is not None
        _say(
            f"stopped by {outcome.stopped_by.name} after step {outcome.step}; "
            f"a checkpoint is written. Go on with\n  {_resume_command(directory)}"
        )
        return 128 + outcome.stopped_by
    missing: list[str] = []
    if options.figures:
        _, missing = draw_figures(job, directory, outcome.summary)
    _show_result(directory, outcome)
    if missing:
        _say(_not_drawn(directory, missing))
    lacking = [name for name in ("converged", "identified") if outcome.summary.get(name) is False]
    if lacking:
        _say(f"no result to rely on: not {', not '.join(lacking)}")
    return int(bool(lacking))


def _plot(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="birl plot", description="Draw the figures of a run again, from its files."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="run directory")
    parser.add_argument(
        "--module", action="extend", nargs="+", default=[], help="the run's own code, if it moved"
    )
    given = parser.parse_args(words)

    from birl_ext.problems.saved import load_run
    from birl_ext.runs.loop import draw_figures, summarise

    run = load_run(given.directory, module=given.module)
    job, directory, stored = run.job, run.directory, run.summary
    summary = stored or summarise(job, directory, step=run.step, seconds=run.seconds)
    try:
        written, missing = draw_figures(job, directory, summary)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if not stored or isinstance(error, BirlError) or _out_of_memory(error):
            raise
        raise FileFormatError(
            f"the figures cannot be drawn from the summary: {type(error).__name__} {error}",
            where=str(directory.summary_path),
            fix="remove the file and plot again; it is computed from the checkpoint then",
        ) from error
    if missing:
        raise MissingDependencyError(
            f"figures need matplotlib: {', '.join(missing)}", fix='pip install "birl_ext[viz]"'
        )
    for figure in written:
        print(figure)
    return 0


def _arena(words: list[str]) -> int:
    """`birl run arena`, by the name of its contest; without one, a list of them."""
    if words and not words[0].startswith("-"):
        return _run(["arena", "--contest", words[0], *words[1:]])
    if words and words[0] not in ("-h", "--help"):
        return _run(["arena", *words])

    from birl_ext.problems.contests import CONTESTS

    width = max(map(len, CONTESTS))
    print("usage: birl arena CONTEST [OPTIONS], birl arena --resume DIR\n\ncontests:")
    for name, contest in CONTESTS.items():
        amount = f"{contest.budget:,g} {'steps' if contest.unit == 'samples' else 's'}"
        print(f"  {name:<{width}}  {contest.title}, {amount} a seed; {', '.join(contest.methods)}")
    print("\n`birl run arena --help` lists the options.")
    return 0 if words else 2


def _solve(words: list[str]) -> int:
    options: SolveFile = _cli(SolveFile, "birl solve", SolveFile.__doc__ or "", words)
    # Not with_suffix, which refuses "." and "/" by itself
    target = options.out or options.mdp.parent / f"{options.mdp.stem}.solution.npz"

    import birl_ext
    from birl_ext.model.mdp import load
    from birl_ext.model.tensor_files import write_tensors
    from birl_ext.runs.device import check_device

    device = check_device(options.device)
    if not target.parent.is_dir():
        raise ConfigError(
            f"--out is {target}", allowed="a file in a directory that is there", fix="make it first"
        )
    mdp = load(options.mdp).to(device)
    solution = birl_ext.solve(
        mdp,
        temperature=options.temperature,
        method=options.method,
        tol=options.tol,
        max_iterations=options.max_iterations,
    )
    tables = solution._asdict()
    del tables["info"]
    for name in ("residual", "error_bound", "log_policy_error_bound", "iterations"):
        tables[name] = getattr(solution, name)
    write_tensors(target, tables)
    print(f"{options.mdp}: {mdp}")
    _table(
        {
            "value": f"{solution.value.min():.6g} to {solution.value.max():.6g}",
            "error bound": f"{solution.error_bound.max():.3g}",
            "iterations": f"{solution.iterations.max():.0f}",
            "written": str(target),
        }
    )
    return 0


def _bench(words: list[str]) -> int:
    for clone in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (folder := clone / "benchmarks" / "birl_bench").is_dir():
            sys.path.insert(0, str(folder.parent))
            return int(importlib.import_module("birl_bench.suite").main(words))
    raise ConfigError(
        "the benchmarks are part of the sources, not of the package",
        fix="clone the repository, and run birl bench in its folder",
    )


def _doctor(words: list[str]) -> int:
    from birl_ext import doctor

    argparse.ArgumentParser(prog="birl doctor", description=doctor.__doc__).parse_args(words)
    return doctor.main()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "arena": _arena,
    "solve": _solve,
    "plot": _plot,
    "bench": _bench,
    "doctor": _doctor,
}


def _tyro() -> Any:
    try:
        import tyro
    except ImportError:
        raise MissingDependencyError(
            "the command line needs tyro and rich", fix='pip install "birl_ext[cli]"'
        ) from None
    return tyro


def _cli(cls: type[_T], prog: str, description: str, words: Sequence[str]) -> _T:
    parsed: _T = _tyro().cli(cls, prog=prog, description=description, args=list(words))
    return parsed


def _unknown(kind: str, name: str, known: Mapping[str, Any]) -> ConfigError:
    from birl_ext.errors import suggestion

    return ConfigError(
        f"unknown {kind} {name!r}",
        allowed=", ".join(known),
        fix=suggestion(name, known) or "choose one of them",
    )


def _show_result(directory: RunDirectory, outcome: RunOutcome) -> None:
    summary = outcome.summary or {}
    seconds = summary["seconds"]
    print(f"{directory.problem}: {outcome.step} steps in {seconds:.1f} s, seed {summary['seed']}")
    _table({k: v for k, v in summary.items() if k not in COMMON})
    print(directory.path)


def _table(entries: Mapping[str, Any]) -> None:
    """Print numbers, strings, short lists of numbers, and dicts of numbers; skip the rest."""
    rows: dict[str, str] = {}
    for name, value in entries.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, item in parts:
            if (text := _format(item)) is not None:
                rows[f"{name} {part}".strip().replace("_", " ")] = text
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"  {name:<{width}}  {text}")


def _format(value: Any) -> str | None:
    if value is None:
        return "n/a"
    if isinstance(value, (str, bool, int)):
        return str(value)
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, list) and len(value) <= 6:
        parts = [_format(item) for item in value if not isinstance(item, (list, dict))]
        return ", ".join(filter(None, parts)) if len(parts) == len(value) else None
    return None


def _resume_command(directory: RunDirectory) -> str:
    return f"birl run --resume {shlex.quote(str(directory.path))}"


def _not_drawn(directory: RunDirectory, names: Sequence[str]) -> str:
    return (
        f"figures not drawn, matplotlib is missing: {', '.join(names)}. "
        f'pip install "birl_ext[viz]", then birl plot {shlex.quote(str(directory.path))}'
    )


_NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch says so of a device by a class, of a CPU in words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def _reader_left() -> bool:
    """Whether nothing reads the output any more, such as head that has seen enough."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # it has no descriptor
            poll.register(stream.fileno(), 0)  # 0: of errors alone
    return bool(poll.poll(0))


def _say(text: str) -> None:
    print(f"birl: {text}", file=sys.stderr)


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    _say(f"warning: {message}")
