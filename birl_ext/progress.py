"""A progress bar on a terminal; elsewhere nothing, or a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

__all__ = ["Report", "progress"]

Report: TypeAlias = Callable[[int, Mapping[str, float]], None]

SHOWN = 3
"""How many metrics stand beside the bar."""


@contextlib.contextmanager
def progress(
    description: str, *, total: int, completed: int = 0, lines: float | None = None
) -> Iterator[Report]:
    """Show the steps taken, on stderr: as a bar if it is a terminal and rich is installed.

    Args:
        description: the word before the bar.
        total: steps in all.
        completed: steps taken before, by the run that is resumed.
        lines: seconds that lie between two lines, at least, where there is no bar; None: no lines.

    Returns:
        ``report(step, metrics)``, to be called after each step.
    """
    if not sys.stderr.isatty():
        yield _in_lines(description, total, lines)
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield _in_lines(description, total, lines)
        return

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}", style="dim"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total, completed=completed, metrics="")

        def report(step: int, metrics: Mapping[str, float]) -> None:
            bar.update(task, completed=step, metrics=_shown(metrics))

        yield report


def _in_lines(description: str, total: int, seconds: float | None) -> Report:
    last = time.monotonic()

    def report(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal last
        if seconds is not None and time.monotonic() - last >= seconds:
            last = time.monotonic()
            print(f"{description} {step}/{total}  {_shown(metrics)}", file=sys.stderr, flush=True)

    return report


def _shown(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:SHOWN])
