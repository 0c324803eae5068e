"""A progress bar on a terminal, nothing anywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from birl_ext.runs.job import Logger, Metrics

__all__ = ["progress"]

SHOWN = 3
"""How many metrics stand beside the bar."""


@contextlib.contextmanager
def progress(description: str, *, total: int, completed: int = 0) -> Iterator[Logger]:
    """Show the steps taken, on stderr; silent if it is not a terminal or rich is not installed.

    Args:
        description: the word before the bar.
        total: steps in all.
        completed: steps taken before, by the run that is resumed.

    Returns:
        What shows a row, to be called after each step.
    """
    with contextlib.ExitStack() as stack:
        show: Logger = lambda row: None  # noqa: E731
        with contextlib.suppress(ImportError):
            if sys.stderr.isatty():
                show = stack.enter_context(_bar(description, total, completed))
        yield show


@contextlib.contextmanager
def _bar(description: str, total: int, completed: int) -> Iterator[Logger]:
    from rich import progress as rich
    from rich.console import Console

    with rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[metrics]}", style="dim"),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(description, total=total, completed=completed, metrics="")

        def show(row: Metrics) -> None:
            metrics = [f"{name} {value:.4g}" for name, value in row.items() if name != "step"]
            bar.update(task, completed=row["step"], metrics="  ".join(metrics[:SHOWN]))

        yield show
