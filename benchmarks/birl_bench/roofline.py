"""Where each solver stands between what memory delivers and what the arithmetic units do.

x: operations per byte of P, if every pass read it once; y: operations per second, counting full
passes. The lines are what this machine delivered in the same run: from memory, from each cache, and
in a matrix product. A point above the line of memory kept P in a cache between passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from birl_bench.report import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

__all__ = ["draw", "points", "spread"]

OURS, RIVAL, LINE = "#c8102e", "#5b6770", "#9aa5ad"
TICKS = 0.125, 0.25, 0.5, 1.0
BESIDE = 0.985
"""Rivals stand a little to the left of ours, so that both are seen."""
GAP = 0.043
"""Between two names, as a share of the height."""
KEYS = {"ours": "birl_ext", "compiled": "torch.compile", "expert": "expert"}
MARKERS = {"ours": "o", "compiled": "s", "expert": "D"}


class Point(NamedTuple):
    """One solver on one problem."""

    case: str
    key: str
    intensity: float
    gigaflops: float


def points(cases: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """Ours, compiled sweeps and the expert, wherever passes were counted."""
    for case in cases:
        for row in case["rows"]:
            if row["key"] in KEYS and row["status"] == "timed" and row.get("gigaflops"):
                intensity = case["operations_of_pass"] / case["bytes_of_pass"]
                name = case["case"].removesuffix(", forward")
                yield Point(name, row["key"], intensity, row["gigaflops"])


def draw(document: Mapping[str, Any], path: Path) -> Path:
    """The figure of a run as PNG; ImportError without matplotlib."""
    from birl_ext.runs import plots

    found = list(points(document["cases"]))
    where = "a CPU" if document["device"] == "cpu" else document["device"]
    trial = ": a trial on toy sizes" if document["quick"] else ""
    with plots.style():
        figure, axes = plots.new_figure(size=(10, 5.8))
        axes.set(xscale="log", yscale="log")
        left, right = _limits(axes, document["ceilings"], found)
        slanted = _ceilings(axes, document["ceilings"], left, right)
        _points(axes, found)
        _names(axes, [point for point in found if point.key == "ours"])
        axes.set(xlabel="operations per byte of P", ylabel="billion operations per second")
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.set_xticks([], minor=True)
        axes.set_xlim(left, right)
        axes.set_title(
            f"Full passes over P on {where}, {document['threads']} threads, "
            f"{document['date']}{trial}"
        )
        figure.draw_without_rendering()  # only now the axes have their size
        for words in slanted:
            words.set_rotation(_slope(axes))
        figure.savefig(path, metadata={"Software": None})
    return path


def _limits(
    axes: Axes, ceilings: Mapping[str, Mapping[str, float]], found: Sequence[Point]
) -> tuple[float, float]:
    across = [point.intensity for point in found] or [0.25, 0.5]
    left, right = min(across) / 1.5, max(across) * 1.35
    lowest = min(ceilings["gigabytes_per_second"].values(), default=1.0) * left
    low = min([point.gigaflops for point in found] + [lowest])
    axes.set_ylim(low / 1.6, 1.6 * max(ceilings["gigaflops"].values(), default=10 * lowest))
    return left, right


def _ceilings(
    axes: Axes, ceilings: Mapping[str, Mapping[str, float]], left: float, right: float
) -> list[Text]:
    flat, slanted = ceilings["gigaflops"], []
    for names, rate in _merged(ceilings["gigabytes_per_second"]):
        end = min(right, max(flat.values()) / rate)
        axes.plot([left, end], [left * rate, end * rate], color=LINE, linewidth=1, zorder=1)
        text = f"{', '.join(names)}: {digits(rate)} GB/s"
        slanted.append(_remark(axes, text, (left, left * rate), ha="left"))
    for dtype, rate in flat.items():
        axes.axhline(rate, color=LINE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        text = f"matrix product, {dtype}: {digits(rate)} GFLOP/s"
        _remark(axes, text, (right, rate), ha="right")
    return slanted


def _slope(axes: Axes) -> float:
    """Degrees on paper of a line that rises by one decade per decade."""
    box = axes.get_window_extent()
    wide, high = (math.log(ends[1] / ends[0]) for ends in (axes.get_xlim(), axes.get_ylim()))
    return math.degrees(math.atan2(box.height / high, box.width / wide))


def _merged(rates: Mapping[str, float]) -> Iterator[tuple[list[str], float]]:
    """Levels whose rates differ by less than a tenth share a line."""
    groups: list[tuple[list[str], float]] = []
    for level, rate in sorted(rates.items(), key=lambda pair: pair[1]):
        if groups and rate < 1.1 * groups[-1][1]:
            groups[-1][0].append(level)
        else:
            groups.append(([level], rate))
    yield from groups


def _remark(axes: Axes, text: str, at: tuple[float, float], *, ha: str) -> Text:
    """Words on a line that passes through a point."""
    words: Text = axes.annotate(
        text,
        at,
        (4 if ha == "left" else -4, 4),
        textcoords="offset points",
        ha=ha,
        rotation_mode="anchor",
        fontsize=8,
        color=RIVAL,
        zorder=2,
    )
    return words


def _points(axes: Axes, found: Sequence[Point]) -> None:
    for key, name in KEYS.items():
        mine = [point for point in found if point.key == key]
        ours = key == "ours"
        axes.scatter(
            [point.intensity * (1.0 if ours else BESIDE) for point in mine],
            [point.gigaflops for point in mine],
            color=OURS if ours else "white",
            edgecolor=OURS if ours else RIVAL,
            marker=MARKERS[key],
            s=36 if ours else 24,
            label=name,
            zorder=4 if ours else 3,
        )
    if found:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)


def _names(axes: Axes, mine: Sequence[Point]) -> None:
    """The cases in the right margin, by height, each tied to its point."""
    if not mine:
        return
    mine = sorted(mine, key=lambda point: point.gigaflops)
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = [(math.log(point.gigaflops) - low) / (high - low) for point in mine]
    for point, height in zip(mine, spread(heights, GAP), strict=True):
        axes.annotate(
            point.case,
            (point.intensity, point.gigaflops),
            (1.02, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=OURS,
            arrowprops={"arrowstyle": "-", "color": "#e3b5bb", "linewidth": 0.6, "shrinkB": 3},
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending numbers in [0, 1], moved as little as a gap between neighbours asks for."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    limit = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved
