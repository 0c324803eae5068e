"""The directory of a run: what it holds and how it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from birl_ext.errors import (
    BirlError,
    CheckpointCorruptError,
    ConfigError,
    FileFormatError,
    JobError,
)
from birl_ext.files import PARTIAL, locked, replacing, tidy
from birl_ext.runs.config import differences, from_plain, read_toml, write_toml
from birl_ext.runs.job import Metrics

__all__ = ["MetricsWriter", "RunDirectory", "default_path", "free_directory", "to_json", "writing"]

CONFIG = "config.toml"
_METRIC = (int, float, type(None))


def default_path(problem: str) -> Path:
    """``runs/<problem>-<date>-<time>``, under the current directory; unused so far."""
    base = Path("runs") / f"{problem}-{datetime.now():%Y%m%d-%H%M%S}"
    candidate, count = base, 1
    while candidate.exists():
        count += 1
        candidate = base.with_name(f"{base.name}-{count}")
    return candidate


def free_directory(path: Path, fix: str = "choose another --out", again: str = "") -> None:
    """Refuse a path that a run cannot be written to.

    Args:
        fix: the remedy; a run that is there can be gone on with, besides.
        again: what goes on with it, by default the option.

    Raises:
        ConfigError: it exists and is not an empty directory.
    """
    # A kill may have left half of a configuration, and with it nothing that could be resumed.
    if path.exists() and (
        not path.is_dir() or any(not p.name.startswith(PARTIAL) for p in path.iterdir())
    ):
        raise ConfigError(
            "the run directory is not empty",
            where=str(path),
            fix=fix
            + (f", or go on with {again or f'--resume {path}'}" * (path / CONFIG).is_file()),
        )


@contextlib.contextmanager
def writing(path: Path, fix: str) -> Iterator[None]:
    """What the system says that cannot write there has a name."""
    try:
        yield
    except BirlError:
        raise
    except (OSError, ValueError) as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        at = getattr(error, "filename", None)
        raise ConfigError(
            f"cannot write there: {getattr(error, 'strerror', None) or reason}"
            + (f", of {str(at)[:200]}" if at and str(at) != str(path) else ""),
            where=repr(str(path))[1:-1],  # whatever is in it
            allowed="a directory that is empty or can be made, where there is room",
            fix=fix,
        ) from error


class RunDirectory:
    """A run's files::

        config.toml     the resolved configuration: ``problem = "…"`` and a table ``[config]``
        metrics.jsonl   one JSON object per outer step
        summary.json    the result; written when the run ends
        checkpoints/    see `birl_ext.runs.checkpoint`
        figures/        PNG and SVG
        tensorboard/    event files, if asked for

    Args:
        path: an existing run directory; `create` makes a new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / CONFIG
        self.metrics_path = path / "metrics.jsonl"
        self.summary_path = path / "summary.json"
        self.checkpoints, self.figures = path / "checkpoints", path / "figures"
        self.tensorboard = path / "tensorboard"
        if not self.config_path.is_file():
            raise ConfigError(
                "not a run directory: it has no config.toml",
                where=str(path),
                fix="name a directory written by `birl run`",
            )
        document = from_plain(_Document, read_toml(self.config_path), where=str(self.config_path))
        self.problem, self.config = document.problem, document.config

    @classmethod
    def create(
        cls,
        path: Path,
        problem: str,
        config: Mapping[str, Any],
        fix: str = "choose another --out",
        again: str = "",
    ) -> RunDirectory:
        """Start a run directory.

        Args:
            fix, again: the remedy where the path is none, see `free_directory`.

        Raises:
            ConfigError: the path exists and is not an empty directory, or none can be made there.
        """
        with writing(path, fix):
            free_directory(path, fix, again)
            path.mkdir(parents=True, exist_ok=True)
            write_toml(path / CONFIG, {"problem": problem, "config": config})
        return cls(path)

    def keep(self, config: Mapping[str, Any]) -> None:
        """Store the settings that the run goes on with, if files that they name have moved."""
        if differences(self.config, config):
            write_toml(self.config_path, {"problem": self.problem, "config": config})
            self.config = dict(config)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from writing here, and remove the drafts that a kill has left.

        Raises:
            ConfigError: another process holds the lock.
        """
        with locked(self.path / ".lock", "is running in this directory"):
            tidy(self.path)
            tidy(self.checkpoints)
            yield

    def history(self) -> list[Metrics]:
        """The rows of metrics.jsonl; a torn last line is left out, null reads as NaN.

        Raises:
            FileFormatError: a line is not the row of its step.
        """
        return [self._row(line, step) for step, line in enumerate(self._lines(), 1)]

    def recorded(self, steps: int, digest: str) -> bytes:
        """The lines of the first steps, which a checkpoint was written after.

        Args:
            steps: how many.
            digest: `MetricsWriter.digest` then.

        Raises:
            FileFormatError: they are not all there, or not as they were written.
        """
        lines = self._lines()[:steps]
        if len(lines) < steps:
            raise self._altered(
                f"the metrics hold {len(lines)} rows, the newest checkpoint is of step {steps}"
            )
        found = b"".join(line + b"\n" for line in lines)
        if hashlib.sha256(found).hexdigest() != digest:
            raise self._altered(f"the metrics of steps 1 to {steps} are not those written")
        return found

    def check_unstarted(self) -> None:
        """Of a run without checkpoints, whose first one is written before its first step.

        Raises:
            CheckpointCorruptError: it has taken steps.
        """
        if rows := len(self._lines()):
            raise CheckpointCorruptError(
                f"the metrics hold {rows} rows, and there is no checkpoint",
                where=str(self.checkpoints),
                fix="restore the checkpoints from a copy, or start the run again in a new "
                f"directory: birl run --config {shlex.quote(str(self.config_path))}",
            )

    def _lines(self) -> list[bytes]:
        if not self.metrics_path.exists():
            return []
        return self.metrics_path.read_bytes().split(b"\n")[:-1]

    def _row(self, line: bytes, step: int) -> Metrics:
        try:
            row = json.loads(line)
            if row["step"] == step and all(isinstance(x, _METRIC) for x in row.values()):
                return {name: math.nan if x is None else x for name, x in row.items()}
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise self._altered(
            f"a line of the metrics is not the row of step {step}", f", line {step}"
        )

    def _altered(self, what: str, line: str = "") -> FileFormatError:
        return FileFormatError(
            what,
            where=f"{self.metrics_path}{line}",
            fix="restore the file from a copy, or start the run again: birl run --config "
            f"{shlex.quote(str(self.config_path))}",
        )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json at one stroke."""
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        with replacing(self.summary_path) as draft:
            draft.write_text(text, "utf-8")

    def read_summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None if the run has not ended."""
        if not self.summary_path.exists():
            return None
        try:
            summary = json.loads(self.summary_path.read_text())
        except ValueError:
            summary = None
        if not isinstance(summary, dict) or summary.get("problem") != self.problem:
            raise FileFormatError(
                f"the summary is not a JSON object of a run of {self.problem!r}",
                where=str(self.summary_path),
                fix="remove the file; it is written again when the run is resumed",
            )
        return summary


@dataclasses.dataclass(frozen=True)
class _Document:
    """What config.toml holds."""

    problem: str
    config: dict[str, Any]


class MetricsWriter:
    """Appends rows to metrics.jsonl, each visible at once.

    Args:
        directory: the run.
        kept: lines to go on from, as `RunDirectory.recorded` returns them; all others are dropped,
            since a resumed run writes them again.
    """

    def __init__(self, directory: RunDirectory, kept: bytes = b"") -> None:
        with replacing(directory.metrics_path) as draft:
            draft.write_bytes(kept)
        self._hash = hashlib.sha256(kept)
        self._file: IO[str] = directory.metrics_path.open("a")

    @property
    def digest(self) -> str:
        """SHA-256 of the rows so far, by which a checkpoint knows them again."""
        return self._hash.hexdigest()

    def __call__(self, row: Metrics) -> None:
        line = json.dumps(to_json(row), allow_nan=False) + "\n"
        self._hash.update(line.encode())
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint must not be newer than its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def to_json(value: Any, where: str = "summary") -> Any:
    """Strict JSON: tensors as lists, numbers that are not finite as null.

    Raises:
        JobError: something has no form in it; names the place.
    """
    if hasattr(value, "tolist"):  # tensors, NumPy arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise JobError(
        f"a summary cannot hold a {type(value).__name__}",
        where=where,
        allowed="numbers, strings, tensors, None, and dicts and lists of them",
        fix="return plain values from summary()",
    )
