"""The directory of a run: what it holds and how it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from birl_ext.errors import ConfigError, FileFormatError
from birl_ext.runs import toml
from birl_ext.runs.config import from_plain, read_toml
from birl_ext.runs.job import Metrics

__all__ = ["MetricsWriter", "RunDirectory", "default_path", "plain"]

CONFIG = "config.toml"


def default_path(problem: str) -> Path:
    """``runs/<problem>-<date>-<time>``, under the current directory; unused so far."""
    base = Path("runs") / f"{problem}-{datetime.now():%Y%m%d-%H%M%S}"
    candidate, count = base, 1
    while candidate.exists():
        count += 1
        candidate = base.with_name(f"{base.name}-{count}")
    return candidate


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
        if not self.config_path.is_file():
            raise ConfigError(
                "not a run directory: it has no config.toml",
                where=str(path),
                fix="name a directory written by `birl run`",
            )
        document = from_plain(_Document, read_toml(self.config_path), where=str(self.config_path))
        self.problem, self.config = document.problem, document.config

    @classmethod
    def create(cls, path: Path, problem: str, config: Mapping[str, Any]) -> RunDirectory:
        """Start a run directory.

        Raises:
            ConfigError: the path exists and is not an empty directory.
        """
        # A kill may have left half of a configuration, and with it nothing that could be resumed.
        half = _partial(path / CONFIG)
        if path.exists() and (not path.is_dir() or any(file != half for file in path.iterdir())):
            raise ConfigError(
                "the run directory is not empty",
                where=str(path),
                fix=f"choose another --out, or go on with --resume {path}",
            )
        path.mkdir(parents=True, exist_ok=True)
        text = toml.dumps({"problem": problem, "config": dict(config)})
        _replace(path / CONFIG, text)
        return cls(path)

    @property
    def config_path(self) -> Path:
        return self.path / CONFIG

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from writing here; released by the system if this one dies.

        Raises:
            ConfigError: another process holds it.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    "another process is running in this directory",
                    where=str(self.path),
                    fix="wait for it or stop it",
                ) from None
            yield

    def history(self) -> list[Metrics]:
        """The rows of metrics.jsonl; a torn last line is left out, null reads as NaN.

        Raises:
            FileFormatError: a line is not a JSON object.
        """
        rows: list[Metrics] = []
        if not self.metrics_path.exists():
            return rows
        for number, line in enumerate(self.metrics_path.read_text().splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                rows.append({k: math.nan if v is None else v for k, v in row.items()})
            except (ValueError, AttributeError):
                raise FileFormatError(
                    "a line of the metrics is not a JSON object",
                    where=f"{self.metrics_path}, line {number}",
                    fix="remove the line",
                ) from None
        return rows

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json at one stroke."""
        _replace(self.summary_path, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None if the run has not ended."""
        if not self.summary_path.exists():
            return None
        try:
            summary = json.loads(self.summary_path.read_text())
        except ValueError:
            summary = None
        if not isinstance(summary, dict):
            raise FileFormatError(
                "the summary is not a JSON object",
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
        after: rows of later steps are dropped first, since a resumed run writes them again.
    """

    def __init__(self, directory: RunDirectory, *, after: int) -> None:
        rows = [row for row in directory.history() if row["step"] <= after]
        _replace(directory.metrics_path, "".join(map(_line, rows)))
        self._file: IO[str] = directory.metrics_path.open("a")

    def append(self, row: Mapping[str, float]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint must not be newer than its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def plain(value: Any) -> Any:
    """Strict JSON: tensors as lists, numbers that are not finite as null."""
    if hasattr(value, "tolist"):  # tensors, NumPy arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(row: Mapping[str, float]) -> str:
    return json.dumps(plain(row), allow_nan=False) + "\n"


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _replace(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old or the new one, never half."""
    temporary = _partial(path)
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
