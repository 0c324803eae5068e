"""A progress bar on a terminal, nothing anywhere else."""

from __future__ import annotations

import contextlib
import importlib.util
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
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        yield lambda row: None
        return

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
