"""Bus engine replacement (Rust 1987): maximum likelihood of a dynamic discrete choice, from real
data.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import BilevelProblem, DampedNewton, hypergradient_report
from birl_ext.errors import FileFormatError
from birl_ext.mdp import DenseMDP
from birl_ext.problems.settings import check_settings
from birl_ext.solution import Solution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BusConfig", "BusData", "BusJob", "bus_problem", "load_bus_data"]

KEEP, REPLACE = 0, 1


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
    """CSV with columns state, keep, replace; by default the 37 GMC buses of 1975 (group 4)."""
    increments: str = ""
    """CSV with columns increment, count: bins travelled in a month."""
    discount: float = 0.9999
    """Monthly discount factor."""
    cost: Literal["linear", "sqrt", "hyperbolic", "quadratic", "cubic"] = "linear"
    """Operating cost as a function of the odometer bin."""
    max_steps: int = 200
    seed: int = 0
    """Unused: the estimate has no randomness."""

    def __post_init__(self) -> None:
        check_settings(self)


class BusData(NamedTuple):
    """Sufficient statistics: decisions per state (S, 2), and months per odometer increment (J,)."""

    decisions: Tensor
    increments: Tensor


def load_bus_data(counts: str = "", increments: str = "") -> BusData:
    """Read the two tables; an empty name stands for the file that ships with the package.

    Raises:
        FileFormatError: a file is missing or malformed; names the file and the line.
    """
    decisions = _table(counts or _shipped("bus_counts.csv"), ("state", "keep", "replace"))
    moves = _table(increments or _shipped("bus_increments.csv"), ("increment", "count"))
    if not moves[:, 0].sum() > 0:
        raise FileFormatError("the increments hold no month at all", allowed="one or more counts")
    return BusData(decisions, moves[:, 0])


def _shipped(name: str) -> str:
    return str(resources.files("birl_ext.problems") / "data" / name)


def _table(path: str, header: tuple[str, ...]) -> Tensor:
    """Rows numbered 0, 1, 2, … in the first column, counts in the others, as a tensor."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"cannot read {path}: {error}", fix="give the path of a CSV file"
        ) from None
    lines = list(csv.reader(text.splitlines()))
    expected = ",".join(header)
    if not lines or tuple(cell.strip() for cell in lines[0]) != header:
        raise FileFormatError(
            f"{path} begins with {','.join(lines[0]) if lines else 'nothing'!r}",
            where="line 1",
            allowed=f"the header {expected}",
            fix=f"make {expected} the first line",
        )
    rows: list[list[float]] = []
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        try:
            values = [float(cell) for cell in cells]
        except ValueError:
            values = []
        whole = len(values) == len(header) and all(v >= 0 and v.is_integer() for v in values)
        if not whole or values[0] != len(rows):
            raise FileFormatError(
                f"{path} has {','.join(cells)!r}",
                where=f"line {number}",
                allowed=f"{expected} as whole numbers ≥ 0, the first one {len(rows)}",
                fix="number the rows 0, 1, 2, … and write counts as whole numbers",
            )
        rows.append(values[1:])
    if len(rows) < 2:
        raise FileFormatError(f"{path} has {len(rows)} rows", allowed="two or more")
    return torch.tensor(rows, dtype=torch.float64)


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


class BusJob:
    """The maximum-likelihood estimate, with standard errors from the Hessian of φ."""

    def __init__(self, config: BusConfig) -> None:
        self.config = config
        self.data = load_bus_data(config.counts, config.increments)
        self.problem = bus_problem(self.data, config.discount, config.cost)
        width = _COSTS[config.cost].basis(torch.arange(2.0, dtype=torch.float64)).shape[-1]
        self.names = ("RC", *(f"theta1{i + 1}" for i in range(width)))
        # the estimate if running an engine cost nothing: the log odds of keeping it
        kept, replaced = self.data.decisions.sum(0).clamp(min=1)
        start = torch.zeros(1 + width, dtype=torch.float64)
        start[0] = torch.log(kept / replaced)
        self.newton = DampedNewton(self.problem, start, temperature=1.0)
        self._steps = 0

    @property
    def total_steps(self) -> int:
        return self.config.max_steps

    @property
    def done(self) -> bool:
        return self.newton.decrement < 1e-12 or self._steps >= self.config.max_steps

    def step(self) -> dict[str, float]:
        x = self.newton.x
        outcome = self.newton.step()
        self._steps += 1
        return {
            "objective": outcome.objective,
            "gradient_norm": outcome.gradient_norm,
            "decrement": outcome.decrement,
            "solver_passes": outcome.solver_passes,
            **dict(zip(self.names, x.tolist(), strict=True)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"newton": self.newton.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.newton.load_state_dict(state["newton"])
        self._steps = int(state["steps"])

    def summary(self) -> dict[str, Any]:
        x = self.newton.x
        report = hypergradient_report(self.problem, x, 1.0, smoothness="linear")
        errors = self.newton.covariance().diagonal().sqrt()
        counts = self.data.increments
        frequency = counts / counts.sum()
        travel = torch.xlogy(counts, frequency).sum()
        with torch.no_grad():
            policy = self.problem.evaluate(x, 1.0)[1].policy
        return {
            "objective": float(report.objective),
            "log_likelihood": float(travel - report.objective),
            "gradient_norm": float(report.exact.norm()),
            "error_bound": float(report.bound),
            "adjoint_error": float(report.adjoint_error),
            "steps": self._steps,
            "bus_months": int(self.data.decisions.sum()),
            "replacements": int(self.data.decisions[:, REPLACE].sum()),
            "cost": _COSTS[self.config.cost].label,
            "params": dict(zip(self.names, x.tolist(), strict=True)),
            "standard_errors": dict(zip(self.names, errors.tolist(), strict=True)),
            "increment_probabilities": frequency,
            "replacement_probability": policy[:, REPLACE],
        }

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
        counts = self.data.decisions[: len(self.data.decisions) // bins * bins]
        grouped = counts.reshape(-1, bins, 2).sum(1)
        months = grouped.sum(-1)
        seen = months > 0
        centre = (torch.arange(len(months)) * bins + (bins - 1) / 2)[seen]
        rate = (grouped[:, REPLACE] / months.clamp(min=1))[seen]
        # Wilson's interval: sensible for rates near 0 from few months
        low, high = _wilson(rate, months[seen])
        axes.errorbar(
            centre * 5,
            rate,
            yerr=torch.stack((rate - low, high - rate)).clamp(min=0).numpy(),
            fmt="o",
            markersize=4,
            color=plots.COLOURS[1],
            elinewidth=1.0,
            label=f"data, {bins} bins together, 95 % interval",
        )
        probability = summary["replacement_probability"]
        miles = [5 * s for s in range(len(probability))]
        axes.plot(miles, probability, color=plots.COLOURS[0], label="model")
        axes.set_xlabel("thousand miles since the last replacement")
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
