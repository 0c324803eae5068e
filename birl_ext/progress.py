"""A progress bar on a terminal, nothing anywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

__all__ = ["Report", "progress"]

Report: TypeAlias = Callable[[int, Mapping[str, float]], None]

SHOWN = 3
"""How many metrics stand beside the bar."""


@contextlib.contextmanager
def progress(description: str, *, total: int, completed: int = 0) -> Iterator[Report]:
    """Show the steps taken, on stderr; silent if it is not a terminal or rich is not installed.

    Args:
        description: the word before the bar.
        total: steps in all.
        completed: steps taken before, by the run that is resumed.

    Returns:
        ``report(step, metrics)``, to be called after each step.
    """
    if not sys.stderr.isatty():
        yield _silent
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
        yield _silent
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
            shown = "  ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:SHOWN])
            bar.update(task, completed=step, metrics=shown)

        yield report


def _silent(step: int, metrics: Mapping[str, float]) -> None:
    """No terminal: no bar."""
