"""Where the rows of metrics go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from birl_ext.runs.directory import RunDirectory

__all__ = ["Logger", "OpenLogger", "open_loggers"]


class Logger(Protocol):
    """Takes the row of each outer step."""

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; it holds ``step``."""

    def sync(self) -> None:
        """Make the rows so far outlive this process; called before each checkpoint."""

    def close(self) -> None:
        """No row follows."""


class OpenLogger(Protocol):
    """Opens a logger of a run, such as `birl_ext.runs.tensorboard.TensorBoardWriter`."""

    def __call__(self, directory: RunDirectory, *, after: int) -> Logger:
        """Rows of steps later than `after` are void: a resumed run writes them again."""


@contextlib.contextmanager
def open_loggers(
    metrics: Logger, openers: Sequence[OpenLogger], directory: RunDirectory, *, after: int
) -> Iterator[Logger]:
    """`metrics` and those that are opened, as one logger; all are closed in the end."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(contextlib.closing(metrics))]
        for open_logger in openers:
            opened.append(
                stack.enter_context(contextlib.closing(open_logger(directory, after=after)))
            )
        yield _Several(opened)


class _Several:
    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers

    def append(self, row: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.append(row)

    def sync(self) -> None:
        for logger in self._loggers:
            logger.sync()

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
