"""One look for every figure: light, readable, safe for colour-blind eyes, the same bytes each time.

No figure goes through pyplot, so drawing needs no display and keeps no global state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from birl_ext.errors import MissingDependencyError
from birl_ext.runs.intervals import mean_interval

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise MissingDependencyError(
        "figures need matplotlib", fix='pip install "birl_ext[viz]"'
    ) from None

__all__ = [
    "COLOURS",
    "draw_references",
    "draw_runs",
    "learning_curve",
    "new_figure",
    "save",
    "style",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette without its yellow and black, which are lost on white or in the text."""

INK, MUTED, GRID = "#222222", "#5f6368", "#e3e5e8"

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.figsize": (6.4, 3.8),
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same figure everywhere
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "image.cmap": "cividis",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
    "svg.fonttype": "path",
    "svg.hashsalt": "birl_ext",  # element ids would be random otherwise
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelsize": 9,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw and save inside this; matplotlib's settings are as before afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc must not change the figures
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, as ``pyplot.subplots`` returns them.

    Args:
        rows: panels from top to bottom.
        columns: panels from left to right.
        size: width and height in inches; by default 6.4 × 3.8 per panel, up to two panels wide.
        options: passed to ``Figure.subplots``.
    """
    figure = Figure(figsize=size or (min(6.4 * columns, 11.0), 3.8 * rows))
    return figure, figure.subplots(rows, columns, **options)


def draw_runs(
    axes: Axes, x: Sequence[float], runs: ArrayLike, *, label: str, colour: str | None = None
) -> None:
    """Draw several runs of one kind: their mean, and its 95 % interval (Student's t) as a band.

    Args:
        axes: where to draw.
        x: (K,), e.g. outer steps, or samples.
        runs: (n, K), one independent run (a seed) in each row; a single one has no band.
        label: in the legend.
        colour: of line and band; by default the next one of the axes.
    """
    mean, half = mean_interval(runs)
    (line,) = axes.plot(x, mean, label=label, color=colour)
    axes.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_references(axes: Axes, references: Mapping[str, float]) -> None:
    """Draw label -> level as dashed lines, named beyond the right end, where no curve comes; after
    the curves, whose scale says how far apart the names have to be.
    """
    low, high = axes.get_ylim()
    apart = 0.06 * (high - low) if axes.get_yscale() == "linear" else 0.0
    place = -math.inf
    for label, level in sorted(references.items(), key=lambda entry: entry[1]):
        place = max(level, place + apart)
        axes.axhline(level, color=MUTED, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1.5)
        axes.annotate(
            label,
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=9,
            color=MUTED,
        )


def learning_curve(
    history: Sequence[Mapping[str, float]],
    keys: Sequence[str] | Mapping[str, str],
    *,
    title: str = "",
    ylabel: str = "",
    log: bool = False,
    references: Mapping[str, float] | None = None,
) -> Figure:
    """One panel: metrics against the outer step, with known levels for comparison.

    Args:
        history: rows of metrics.jsonl; a line joins the rows that have its metric.
        keys: metrics, or metric -> label.
        title: what the figure shows, in a few words.
        ylabel: name and unit of the vertical axis; a single curve's label is the default.
        log: logarithmic vertical axis.
        references: label -> level, e.g. a published value or a known optimum.
    """
    figure, axes = new_figure()
    labels = keys if isinstance(keys, Mapping) else {key: key.replace("_", " ") for key in keys}
    for key, label in labels.items():
        points = [(row["step"], row[key]) for row in history if key in row]
        # A run of one or two steps is a point or two, not a line.
        marker = "o" if len(points) < 30 else ""
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3.5)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("outer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(labels) > 1 and any(line.get_xdata().size for line in axes.lines):
        axes.legend()
    axes.set_ylabel(ylabel or (label if len(labels) == 1 else ""))
    draw_references(axes, references or {})
    axes.set_title(title)
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``; the same figure gives the same bytes.

    Returns:
        The two paths.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    figure.savefig(paths[0], metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths
