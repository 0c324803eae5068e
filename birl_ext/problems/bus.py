"""Bus engine replacement (Rust 1987): maximum likelihood of a dynamic discrete choice, from real
data.
"""

from __future__ import annotations

import csv
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import BilevelProblem, DampedNewton, hypergradient_report
from birl_ext.errors import (
    ConfigError,
    FileFormatError,
    UndeterminedError,
    UninformativeDataError,
)
from birl_ext.model.checks import check_memory
from birl_ext.model.mdp import DenseMDP
from birl_ext.runs.settings import check_settings
from birl_ext.solution import Solution
from birl_ext.state import Stateful

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BusConfig", "BusData", "BusJob", "bus_problem", "load_bus_data"]

KEEP, REPLACE = 0, 1
_DECREMENT = 1e-12  # of the search's last step, units of φ


class _Cost(NamedTuple):
    """Operating cost c(s; θ₁) per month in bin s, linear in θ₁: one column of `basis` per
    parameter.
    """

    basis: Callable[[Tensor], Tensor]
    label: str


_COSTS = {
    "linear": _Cost(lambda s: 1e-3 * s.unsqueeze(-1), "0.001·θ11·s"),
    "sqrt": _Cost(lambda s: 1e-2 * s.sqrt().unsqueeze(-1), "0.01·θ11·√s"),
    "hyperbolic": _Cost(lambda s: 1e-1 / (len(s) + 1 - s).unsqueeze(-1), "0.1·θ11/(S+1−s)"),
    "quadratic": _Cost(lambda s: 1e-5 * torch.stack((s, s**2), -1), "1e-5·(θ11·s + θ12·s²)"),
    "cubic": _Cost(
        lambda s: 1e-8 * torch.stack((s, s**2, s**3), -1), "1e-8·(θ11·s + θ12·s² + θ13·s³)"
    ),
}


@dataclass(frozen=True)
class BusConfig:
    """Estimate replacement cost and operating cost of bus engines from monthly decisions."""

    counts: str = ""
    """CSV with columns state, keep, replace, and a row for each state, 0, 1, 2, …: as many states
    as rows. By default the 37 GMC buses of 1975 (group 4)."""
    increments: str = ""
    """CSV with columns increment, count: months in which the odometer moved by 0, 1, 2, … states.
    It comes with counts: both tables are of the same buses."""
    discount: float = 0.9999
    """Monthly discount factor."""
    cost: Literal["linear", "sqrt", "hyperbolic", "quadratic", "cubic"] = "linear"
    """Operating cost as a function of the odometer bin."""
    max_steps: int = 200
    """Steps after which the search gives up; the result then says that it has not converged."""
    seed: int = 0
    """Unused: the estimate has no randomness."""

    def __post_init__(self) -> None:
        check_settings(self, least={"discount": 0, "max_steps": 1}, below={"discount": 1 - 1e-12})


class BusData(NamedTuple):
    """Sufficient statistics: decisions per state (S, 2), and months per odometer increment (J,)."""

    decisions: Tensor
    increments: Tensor


_COLUMNS = {"counts": ("state", "keep", "replace"), "increments": ("increment", "count")}
_MOST_BYTES = 1 << 24  # of a file
_MOST_MONTHS = 2.0**53  # of an entry: float64 holds every integer up to here


def load_bus_data(counts: str = "", increments: str = "") -> BusData:
    """Read the two tables; two empty names stand for the files that ship with the package.

    Raises:
        ConfigError: one of the two is given without the other.
        FileFormatError: a file is missing or malformed; names the file and the line.
    """
    found = {}
    for name, path in (("counts", counts), ("increments", increments)):
        shipped = resources.files("birl_ext.problems") / "data" / f"bus_{name}.csv"
        found[name] = _table(path or str(shipped), name)
    months = found["increments"][:, 0]
    if not months.sum() > 0:
        raise FileFormatError(
            "the increments hold no month at all",
            where=increments,
            allowed="one or more counts",
            fix="count the months in which the odometer moved by 0, 1, 2, … states",
        )
    if bool(counts) != bool(increments):
        given, absent = ("counts", "increments") if counts else ("increments", "counts")
        raise ConfigError(
            f"{given} is given without {absent}",
            allowed="both, of the same buses, or neither",
            fix=f"give the other table too, on the command line --{absent} FILE",
        )
    return BusData(found["counts"], months)


def _table(path: str, name: str) -> Tensor:
    """Counts by the number in the first column, 0, 1, 2, …, as a tensor (rows, columns)."""
    columns = _COLUMNS[name]
    lines = [
        (number, [cell.strip() for cell in cells])
        for number, cells in enumerate(csv.reader(_text(path).splitlines()), 1)
    ]
    lines = [(number, cells) for number, cells in lines if any(cells)]
    _require_header(path, name, *(lines[0] if lines else (1, ["nothing"])))
    rows: list[tuple[int, list[float]]] = []  # the line of each, and its numbers
    for number, cells in lines[1:]:
        try:
            values = [float(cell) for cell in cells]
        except ValueError:
            values = []
        whole = all(0 <= value <= _MOST_MONTHS and value.is_integer() for value in values)
        if len(values) != len(columns) or not whole:
            raise FileFormatError(
                f"{path} has {reprlib.repr(','.join(cells))}",
                where=f"line {number}",
                allowed=f"{','.join(columns)} as whole numbers, 0 to 2⁵³",
                fix=f"write {len(columns)} whole numbers there, or take out a line of totals",
            )
        rows.append((number, values))
    _require_numbering(path, columns, rows)
    if len(rows) < 2:
        raise FileFormatError(
            f"{path} has {len(rows)} rows",
            allowed="two or more",
            fix=f"write a row for each {columns[0]}",
        )
    return torch.tensor([values[1:] for _, values in rows], dtype=torch.float64)


def _text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        return data.decode("utf-8-sig")  # Excel opens its files with a byte order mark
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"cannot read {path}: {error}", fix="give the path of a CSV file in UTF-8"
        ) from None


def _require_header(path: str, name: str, line: int, cells: list[str]) -> None:
    columns = _COLUMNS[name]
    if tuple(cells) == columns:
        return
    expected, lower = ",".join(columns), [cell.lower() for cell in cells]
    others = [other for other, header in _COLUMNS.items() if list(header) == lower]
    separator = next((sign for sign in ";\t|" if sign in "".join(cells)), "")
    if lower == list(columns):
        fix = f"write the names in small letters: {expected}"
    elif sorted(lower) == sorted(columns):
        fix = f"put the columns in the order {expected}, the numbers with their names"
    elif others:
        fix = f"give it as {others[0]}, which it is, on the command line --{others[0]}"
    elif separator:
        fix = f"separate the columns by commas, not by {separator!r}"
    elif set(columns) < set(lower):
        fix = f"take out all columns but {expected}, and put these in this order"
    elif all(cell.isdecimal() for cell in cells):
        fix = f"put the line {expected} above the numbers, if this is the order of their columns"
    else:
        fix = f"name the columns {expected}, and put them and their numbers in this order"
    raise FileFormatError(
        f"{path} begins with {','.join(cells)!r}",
        where=f"line {line}",
        allowed=f"the header {expected}",
        fix=fix,
    )


def _require_numbering(
    path: str, columns: tuple[str, ...], rows: Sequence[tuple[int, Sequence[float]]]
) -> None:
    """Refuse rows that are not numbered 0, 1, 2, … in the first column."""
    name, numbers = columns[0], [int(values[0]) for _, values in rows]
    at = next((i for i, number in enumerate(numbers) if number != i), None)
    if at is None:
        return
    zeros = ",0" * (len(columns) - 1)
    twice = next((number for number, count in Counter(numbers).items() if count > 1), None)
    if twice is not None:
        at = numbers.index(twice, numbers.index(twice) + 1)
        fix = f"add up the rows of {name} {twice} into one"
    elif numbers != sorted(numbers):
        at = next(i for i, (one, two) in enumerate(pairwise(numbers), 1) if two < one)
        fix = f"sort the rows by {name}, each with its counts"
    elif numbers[0] == 1:
        fix = f"take 1 off each {name} if they count from 1; otherwise add the row 0{zeros}"
    else:
        absent = (n for one, two in pairwise([-1, *numbers]) for n in range(one + 1, two))
        some = [f"{n}{zeros}" for n in islice(absent, 6)]
        more = numbers[-1] + 1 - len(numbers) - len(some)
        fix = f"add the row{'s' * (len(some) > 1)} {' and '.join(some)}"
        fix += f", and those of {more} more {name}s that are not there" if more else ""
    line, values = rows[at]
    raise FileFormatError(
        f"{path} has {','.join(f'{value:.0f}' for value in values)!r}",
        where=f"line {line}",
        allowed=f"rows numbered 0, 1, 2, … without a gap, here {at}",
        fix=fix,
    )


def _require_information(decisions: Tensor, parameters: int) -> None:
    """Refuse decisions that leave the likelihood without a maximum, or with many.

    Raises:
        UninformativeDataError: they are absent, all alike, foretold by the state, or too few.
    """
    seen = [(s, int(k), int(r)) for s, (k, r) in enumerate(decisions.tolist()) if k or r]
    kept, replaced = [s for s, k, _ in seen if k], [s for s, _, r in seen if r]
    months = sum(k for _, k, _ in seen), sum(r for _, _, r in seen)
    what = allowed = fix = ""
    if not kept or not replaced:
        lacking = "kept or replaced" if not seen else "replaced" if kept else "kept"
        what, allowed = f"the counts hold no month in which an engine was {lacking}", "both kinds"
        fix = f"add the months in which one was {lacking}"
    elif all(k * months[1] == r * months[0] for _, k, r in seen):
        where = f"state {seen[0][0]}, the only one seen" if len(seen) == 1 else "every state seen"
        what = f"the same share of engines is replaced in {where}"
        allowed, fix = "shares that differ", "add months in other states"
    elif kept[-1] <= replaced[0] or replaced[-1] <= kept[0]:
        sides = [(kept[0], kept[-1], "kept"), (replaced[0], replaced[-1], "replaced")]
        (_, last, first), (start, _, then) = sorted(sides)
        what = f"engines are {first} up to state {last} and {then} from state {start} on"
        allowed = "states that overlap: the costs that fit best are infinite otherwise"
        fix = f"add months in which engines are {then} below state {last}"
        fix += f" or {first} above state {start}"
    elif len(seen) < parameters:
        what = f"the counts hold months in {len(seen)} states, for {parameters} parameters"
        allowed, fix = f"{parameters} states or more", "choose a cost of fewer parameters"
        fix += ", on the command line --cost linear"
    if what:
        raise UninformativeDataError(what, allowed=allowed, fix=fix)


def bus_problem(data: BusData, discount: float, cost: str) -> BilevelProblem:
    """Maximum likelihood as a bilevel problem in x = (RC, θ₁): the soft-optimal policy is the
    choice probability.

        r(s, keep) = −c(s; θ₁),  r(s, replace) = −RC − c(0; θ₁),
        φ(x) = −Σ_s [ n_keep(s) log π(keep|s) + n_replace(s) log π(replace|s) ]

    The odometer moves by j bins with its empirical frequency, from s if kept, from 0 if replaced,
    and stops at the last bin.
    """
    states = data.decisions.shape[0]
    odometer = torch.arange(states, dtype=torch.float64)
    basis = _COSTS[cost].basis(odometer)
    frequency = data.increments / data.increments.sum()
    transition = torch.zeros(states, 2, states, dtype=torch.float64)
    for j, share in enumerate(frequency):
        landing = (torch.arange(states) + j).clamp(max=states - 1)
        transition[torch.arange(states), KEEP, landing] += share
        transition[:, REPLACE, landing[0]] += share
    base = DenseMDP(torch.zeros(states, 2, dtype=torch.float64), transition, discount)

    def lower(x: Tensor) -> DenseMDP:
        cost = basis @ x[1:]
        reward = torch.stack((-cost, (-x[0] - cost[0]).expand(states)), -1)
        return base.replace(reward=reward, validate="off")

    def upper(x: Tensor, solution: Solution) -> Tensor:
        return -(data.decisions * solution.log_policy).sum()

    return BilevelProblem(lower, upper)


class BusJob(Stateful):
    """The maximum-likelihood estimate, with standard errors from the Hessian of φ.

    Raises:
        FileFormatError: a table is missing or malformed.
        UninformativeDataError: the likelihood of the tables has no maximum, or many.
        SizeLimitError: there are too many states.
    """

    STATE = ("newton", "_steps")

    def __init__(self, config: BusConfig) -> None:
        self.config = config
        self.data = load_bus_data(config.counts, config.increments)
        width = _COSTS[config.cost].basis(torch.arange(2.0, dtype=torch.float64)).shape[-1]
        _require_information(self.data.decisions, 1 + width)
        states = len(self.data.decisions)
        check_memory(f"a table of {states} states", 8 * states**2, fix="make the states coarser")
        self.problem = bus_problem(self.data, config.discount, config.cost)
        self.names = ("RC", *(f"theta1{i + 1}" for i in range(width)))
        # the estimate if running an engine cost nothing: the log odds of keeping it
        kept, replaced = self.data.decisions.sum(0)
        start = torch.zeros(1 + width, dtype=torch.float64)
        start[0] = torch.log(kept / replaced)
        self.newton = DampedNewton(self.problem, start, temperature=1.0)
        self._steps = 0

    @property
    def total_steps(self) -> int:
        return self.config.max_steps

    @property
    def done(self) -> bool:
        return self.newton.decrement < _DECREMENT or self._steps >= self.config.max_steps

    def step(self) -> dict[str, float]:
        x = self.newton.x
        try:
            outcome = self.newton.step()
        except UndeterminedError as error:
            along = ", ".join(
                f"{v:.3g} in {name}" for name, v in self._named(error.direction).items()
            )
            raise UndeterminedError(
                f"the data leave the costs open: another {along} fits as well",
                where=f"step {self._steps + 1}",
                fix="choose a cost of fewer parameters, or add months in other states",
                direction=error.direction,
            ) from None
        self._steps += 1
        return {
            "objective": outcome.objective,
            "gradient_norm": outcome.gradient_norm,
            "decrement": outcome.decrement,
            "solver_passes": outcome.solver_passes,
            **self._named(x.tolist()),
        }

    def summary(self) -> dict[str, Any]:
        """The estimate; standard errors only if the search converged and the data identify it."""
        x = self.newton.x
        report = hypergradient_report(self.problem, x, 1.0, smoothness="linear")
        covariance, undetermined = self._covariance()
        converged = self._converged(report.exact, covariance)
        errors = None
        if converged and covariance is not None:
            errors = self._named(covariance.diagonal().sqrt().tolist())
        counts = self.data.increments
        frequency = counts / counts.sum()
        travel = torch.xlogy(counts, frequency).sum()
        with torch.no_grad():
            policy = self.problem.evaluate(x, 1.0)[1].policy
        return {
            "objective": float(report.objective),
            "log_likelihood": float(travel - report.objective),
            "gradient_norm": float(report.exact.norm()),
            "gradient_error_bound": float(report.bound),
            "adjoint_error": float(report.adjoint_error),
            "steps": self._steps,
            "states": len(policy),
            "bus_months": int(self.data.decisions.sum()),
            "replacements": int(self.data.decisions[:, REPLACE].sum()),
            "cost": _COSTS[self.config.cost].label,
            "converged": converged,
            "identified": covariance is not None,
            **({"undetermined": undetermined} if undetermined else {}),
            "params": self._named(x.tolist()),
            "standard_errors": errors,
            "increment_probabilities": frequency,
            "replacement_probability": policy[:, REPLACE],
        }

    def _named(self, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.names, values, strict=True))

    def _covariance(self) -> tuple[Tensor | None, dict[str, float]]:
        """H⁻¹ at x; or None, and the direction that the data leave open."""
        try:
            return self.newton.covariance(), {}
        except UndeterminedError as error:
            return None, self._named(error.direction)

    def _converged(self, gradient: Tensor, covariance: Tensor | None) -> bool:
        """Whether one more step would change nothing: neither φ nor any choice.

        Where the likelihood has no maximum it grows by less and less, so that φ alone would end the
        search; but each step still moves the log odds of some choice by about one.
        """
        if covariance is None or not self.newton.decrement < _DECREMENT:
            return False
        x = self.newton.x
        with torch.no_grad():
            here, there = (
                self.problem.evaluate(at, 1.0)[1].log_policy
                for at in (x, x - covariance @ gradient)
            )
        return bool((here - there).abs().max() < 1e-3)

    def figures(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> dict[str, Callable[[], Figure]]:
        return {
            "learning_curve": lambda: self._learning_curve(history),
            "replacement_probability": lambda: self._replacement(summary),
        }

    def _learning_curve(self, history: Sequence[Mapping[str, float]]) -> Figure:
        from birl_ext.runs import plots

        best = min(row["objective"] for row in history)
        rows = [{**row, "gap": max(row["objective"] - best, 1e-13)} for row in history]
        return plots.learning_curve(
            rows,
            {"gap": "φ − best φ", "gradient_norm": "‖∇φ‖"},
            title="Bus engines: negative log likelihood",
            log=True,
        )

    def _replacement(self, summary: Mapping[str, Any]) -> Figure:
        from birl_ext.runs import plots

        figure, axes = plots.new_figure()
        bins = 5
        decisions = self.data.decisions
        parts = [slice(first, first + bins) for first in range(0, len(decisions), bins)]
        grouped = torch.stack([decisions[part].sum(0) for part in parts])
        months = grouped.sum(-1)
        seen = months > 0
        unit = 1 if self.config.counts else 5  # thousand miles of a bin of the shipped data
        odometer = unit * torch.arange(len(decisions), dtype=torch.float64)
        centre = torch.stack([odometer[part].mean() for part in parts])[seen]
        rate = (grouped[:, REPLACE] / months.clamp(min=1))[seen]
        # Wilson's interval: sensible for rates near 0 from few months
        low, high = _wilson(rate, months[seen])
        axes.errorbar(
            centre,
            rate,
            yerr=torch.stack((rate - low, high - rate)).clamp(min=0).numpy(),
            fmt="o",
            markersize=4,
            color=plots.COLOURS[1],
            elinewidth=1.0,
            label=f"data, {bins} bins together, 95 % interval",
        )
        probability = summary["replacement_probability"]
        axes.plot(
            [unit * s for s in range(len(probability))],
            probability,
            color=plots.COLOURS[0],
            label="model",
        )
        what = "state" if self.config.counts else "thousand miles since the last replacement"
        axes.set_xlabel(what)
        axes.set_ylabel("replacements per bus and month")
        axes.set_ylim(bottom=0, top=1.15 * max(*probability, *rate.tolist(), 0.05))
        axes.set_title("Probability of replacing the engine")
        axes.legend(loc="upper left")
        return figure


def _wilson(rate: Tensor, months: Tensor) -> tuple[Tensor, Tensor]:
    z = 1.96
    middle = (rate + z * z / (2 * months)) / (1 + z * z / months)
    spread = (rate * (1 - rate) / months + (z / (2 * months)) ** 2).sqrt()
    spread = z * spread / (1 + z * z / months)
    return (middle - spread).clamp(min=0), (middle + spread).clamp(max=1)
