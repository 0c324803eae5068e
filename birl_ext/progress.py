"""A progress display for terminals."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping

__all__ = ["progress"]

SHOWN = 3
"""How many metrics stand beside the bar."""


@contextlib.contextmanager
def progress(
    description: str, *, total: int, completed: int = 0, lines: float | None = None
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Show the steps taken, on stderr: as a bar if it is a terminal and rich is installed.

    Args:
        description: the word before the bar.
        total: steps in all.
        completed: steps taken before, by the run that is resumed.
        lines: seconds that lie between two lines, at least, where there is no bar; None: no lines.

    Returns:
        What shows a row of metrics, ``step`` among them, to be called after each step.
    """
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        last = time.monotonic()

        def print_line(row: Mapping[str, float]) -> None:
            nonlocal last
            if lines is not None and time.monotonic() - last >= lines:
                last = time.monotonic()
                line = f"{description} {row['step']}/{total}  {_shown(row)}"
                print(line, file=sys.stderr, flush=True)

        yield print_line
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
        yield lambda row: bar.update(task, completed=row["step"], metrics=_shown(row))


def _shown(row: Mapping[str, float]) -> str:
    metrics = [f"{name} {value:.4g}" for name, value in row.items() if name != "step"]
    return "  ".join(metrics[:SHOWN])
