"""The records of an arena as tables, as CSV and as figures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from birl_ext.arena.contest import Contest
from birl_ext.arena.methods import METHODS
from birl_ext.runs.intervals import mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["Standing", "csv_text", "figures", "standings", "table"]

Record = Mapping[str, Any]

POINTS = 40
"""Of a curve in a figure."""


class Standing(NamedTuple):
    """A method under a switch in a setting: values of its seeds, and what one cost."""

    setting: str
    method: str
    switch: str
    rate: float
    seeds: list[int]
    values: list[float]
    cost: list[float]
    curves: list[list[float]]
    """(seeds, POINTS)"""
    steps: float
    seconds: float
    samples: float
    failed: str

    @property
    def name(self) -> str:
        return METHODS[self.method].title + (f", {self.switch}" if self.switch != "plain" else "")

    @property
    def mean(self) -> float:
        return float(mean_interval(self.values)[0]) if self.values else math.nan

    @property
    def half(self) -> float:
        return float(mean_interval(self.values)[1]) if self.values else math.nan


def standings(records: Sequence[Record]) -> list[Standing]:
    """The reported runs, seeds joined, in the order in which they were asked for."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record["phase"] == "play":
            key = record["setting"], record["method"], record["switch"]
            groups.setdefault(key, []).append(record)
    return [_joined(*key, some) for key, some in groups.items()]


def _joined(setting: str, method: str, switch: str, records: Sequence[Record]) -> Standing:
    sound = [record for record in records if record["values"] is not None]
    share = np.linspace(1 / POINTS, 1, POINTS)
    ends = [record["cost"][-1] for record in sound]
    curves = [  # of each seed, at the same shares of what it cost
        np.interp(share * record["cost"][-1], record["cost"], values, left=np.nan)
        for record in sound
        for values in zip(*record["curve"], strict=True)
    ]

    def mean(name: str) -> float:
        return sum(float(record[name]) for record in records) / len(records)

    return Standing(
        setting,
        method,
        switch,
        records[0]["rate"],
        [seed for record in sound for seed in record["seeds"]],
        [value for record in sound for value in record["values"]],
        (share * (sum(ends) / len(ends))).tolist() if ends else [],
        [curve.tolist() for curve in curves],
        mean("steps"),
        mean("seconds"),
        mean("samples"),
        next((record["failed"] for record in records if record["failed"]), ""),
    )


def table(contest: Contest, records: Sequence[Record]) -> str:
    """Markdown: a row for each method and switch, a column for each setting, and costs of a seed,
    means over the settings. The best of a column is bold, and so is what its interval overlaps.
    """
    found = standings(records)
    settings = list(dict.fromkeys(standing.setting for standing in found))
    contestants = list(dict.fromkeys((s.method, s.switch) for s in found))
    cells = {(s.method, s.switch, s.setting): s for s in found}
    bold = {s: _leaders(contest, [c for c in found if c.setting == s]) for s in settings}
    sampled = any(standing.samples for standing in found)
    head = ["method", *settings, "outer steps", "processor s"]
    head += ["environment steps"] * sampled
    lines = []
    for contestant in contestants:
        own = [cells[(*contestant, s)] for s in settings if (*contestant, s) in cells]
        row = [own[0].name]
        for setting in settings:
            standing = cells.get((*contestant, setting))
            row.append(_cell(contest, standing, standing in bold[setting]))
        row += [f"{_mean(s.steps for s in own):.0f}", f"{_mean(s.seconds for s in own):.1f}"]
        row += [f"{_mean(s.samples for s in own):,.0f}"] * sampled
        lines.append(row)
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines]])


def _mean(values: Iterator[float]) -> float:
    own = list(values)
    return sum(own) / len(own)


def _leaders(contest: Contest, found: Sequence[Standing]) -> list[Standing]:
    sound = [standing for standing in found if standing.values]
    if not sound:
        return []

    def loss(standing: Standing) -> float:
        return contest.sign * standing.mean

    best = min(sound, key=loss)
    if math.isnan(best.half):
        return [best]
    reach = loss(best) + best.half
    return [s for s in sound if loss(s) - (0.0 if math.isnan(s.half) else s.half) <= reach]


def _cell(contest: Contest, standing: Standing | None, bold: bool) -> str:
    if standing is None:
        return "–"
    if not standing.values:
        return "failed"
    form = ".3f" if contest.optimum is None else ".1e"
    text = f"{standing.mean:{form}}"
    if not math.isnan(standing.half):
        text += f" ± {standing.half:{form}}"
    return (f"**{text}**" if bold else text) + (" (some failed)" if standing.failed else "")


def csv_text(contest: Contest, records: Sequence[Record]) -> str:
    """One line for each seed; labels are what a teacher was asked for, none here."""
    value = contest.value.replace(" ", "_")
    costs = ("outer_steps", "processor_seconds", "environment_steps", "labels")
    names = ("setting", "method", "switch", "rate", "seed", value, *costs, "failed")
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for record in records:
        if record["phase"] == "play":
            spent = (record["steps"], round(record["seconds"], 3), record["samples"], 0)
            row = {**record, **dict(zip(costs, spent, strict=True))}
            values = record["values"] or [None] * len(record["seeds"])
            for seed, found in zip(record["seeds"], values, strict=True):
                writer.writerow({**row, "seed": seed, value: found})
    return out.getvalue()


def figures(contest: Contest, records: Sequence[Record]) -> Figure:
    """Value against cost, a panel for each setting: each method under its best switch, the mean of
    its seeds with a band of 95 %.
    """
    from matplotlib.ticker import MaxNLocator

    from birl_ext.runs import plots

    found = standings(records)
    settings = list(dict.fromkeys(standing.setting for standing in found))
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    figure, panels = plots.new_figure(
        rows, columns, size=(5.2 * columns, 4.0 * rows), squeeze=False
    )
    methods = list(dict.fromkeys(standing.method for standing in found))
    drawn: dict[str, Line2D] = {}
    for panel in panels.flat[len(settings) :]:
        panel.set_axis_off()
    for panel, setting in zip(panels.flat, settings, strict=False):
        for number, method in enumerate(methods):
            own = [s for s in found if (s.setting, s.method) == (setting, method) and s.values]
            if not own:
                continue
            best = min(own, key=lambda s: contest.sign * s.mean)
            colour = plots.COLOURS[number % len(plots.COLOURS)]
            plots.draw_runs(
                panel, best.cost, best.curves, label=METHODS[method].title, colour=colour
            )
            line = panel.lines[-1]
            line.set_linestyle(("-", "--", ":", "-.")[number // len(plots.COLOURS) % 4])
            drawn.setdefault(method, line)
        if contest.optimum is not None:
            panel.set_yscale("log")
        panel.set_title(setting)
        panel.set_xlabel("environment steps" if contest.unit == "samples" else "processor s")
        panel.set_ylabel(contest.value)
        plots.draw_references(panel, contest.references.get(setting, {}))
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter("{x:,g}")
    lines = list(drawn.values())
    figure.legend(handles=lines, loc="outside lower center", ncols=min(4, max(1, len(lines))))
    figure.suptitle(f"{contest.title}: each method's best switch, mean of seeds and 95 %")
    return figure
