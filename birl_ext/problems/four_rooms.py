"""Configurable Four Rooms: incentives that lead a soft-optimal walker past a cell of our choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from birl_ext.bilevel import AdditiveProblem, BilevelProblem, MSoBiRL
from birl_ext.errors import ConfigError
from birl_ext.functional import evaluate, occupancy
from birl_ext.model.checks import check_count, check_memory
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.runs.settings import check_settings
from birl_ext.solution import Solution
from birl_ext.state import Stateful

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PUBLISHED", "FourRooms", "FourRoomsConfig", "FourRoomsJob", "moves"]

MAP = """
#############
#     #  A  #
#     #     #
#           #
#S    #     #
#     #     #
## ####     #
#     ### ###
#   T #     #
#     #     #
#           #
#     #    B#
#############
"""
"""S: start, T: the cell the upper level wants visited, A and B: the walker's goal, drawn afresh for
each episode, #: wall.
"""

STEPS = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""The actions up, right, down, left as (row, column)."""

DISCOUNT = 0.99
BUDGET = 0.2
SLIP = 0.44
FLAT = 0.01
SPREADS = 4
COOLING = 0.6
"""Share of the first rung in which the temperature falls."""

Noise = Literal["planner", "simulator"]
Method = Literal["gradient", "continuation", "starts", "noise", "combined"]

PUBLISHED = {
    (0.001, 1.0): {"HPGD": 0.91, "AMD": 0.58, "zero order": 0.59},
    (0.001, 3.0): {"HPGD": 0.51, "AMD": 0.51, "zero order": 0.50},
    (0.001, 5.0): {"HPGD": 0.46, "AMD": 0.46, "zero order": 0.46},
    (0.003, 1.0): {"HPGD": 0.95, "AMD": 1.00, "zero order": 0.91},
    (0.003, 3.0): {"HPGD": 0.73, "AMD": 0.39, "zero order": 0.40},
    (0.003, 5.0): {"HPGD": 0.29, "AMD": 0.32, "zero order": 0.32},
    (0.005, 1.0): {"HPGD": 1.17, "AMD": 1.28, "zero order": 1.15},
    (0.005, 3.0): {"HPGD": 1.01, "AMD": 1.13, "zero order": 1.02},
    (0.005, 5.0): {"HPGD": 0.87, "AMD": 0.97, "zero order": 0.79},
}
"""(λ, κ) → method → upper value, mean of ten seeds: Thoma et al., NeurIPS 2024, Table 1."""


@dataclass(frozen=True)
class FourRoomsConfig:
    """Place incentives in four rooms so that the walker visits a target on its way to its goal."""

    temperature: float = 0.003
    """λ, the walker's entropy regularisation, units of its reward."""

    kappa: float = 3.0
    """κ, what the upper level pays per unit of incentive when the walker reaches its goal."""

    noise: Noise = "planner"
    """How moves fail: "planner" moves as intended with .56, "simulator" with .67."""

    method: Method = "combined"
    """How local maxima are escaped: "gradient" does nothing about them, from one start;
    "continuation" cools one walker from a higher temperature; "starts" climbs from many random
    incentives in one batch; "noise" perturbs the gradient; "combined" is many starts, each cooled
    from a temperature of its own."""

    starts: int = 128
    """Starts of the methods "starts" and "combined"; a quarter goes on at each thinning."""

    steps: int = 300
    """Outer steps, 4 or more."""

    learning_rate: float = 0.3
    """Of Adam at the beginning; it falls to a tenth."""

    spread: float = 6.0
    """Standard deviation of the widest random start; 0.01 is the flattest."""

    heat: float = 8.0
    """Highest temperature to cool from, in units of λ."""

    gradient_noise: float = 0.01
    """Standard deviation of the method "noise", units of value per unit of weight."""

    seed: int = 0
    """Of the starts and of the noise."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            least={"heat": 1, "gradient_noise": 0, "kappa": 0},
            above={"temperature": 0, "starts": 0, "steps": 3, "learning_rate": 0, "spread": 0},
            most={"spread": 1e6, "heat": 1e6},
        )
        # per start two walkers of 104 cells and 4 moves, in some twenty tables
        check_memory(f"{self.starts} starts", 20 * 2 * 104 * 4 * self.starts, fix="lower starts")


def moves(noise: Noise) -> Tensor:
    """Probability of each move given the intended one, (4, 4).

    The planner slips into one of the other three moves, the simulator into any of the four; both
    with probability .44.
    """
    if noise not in get_args(Noise):
        raise ConfigError(f"noise is {noise!r}", allowed=", ".join(get_args(Noise)))
    intended = torch.eye(4, dtype=torch.float64)
    slipped = (1 - intended) / 3 if noise == "planner" else torch.full_like(intended, 1 / 4)
    return (1 - SLIP) * intended + SLIP * slipped


class FourRooms:
    """The map and both levels; C = 2 contexts (goals), S = 104 cells.

        c(s) = −0.2·softmax(w)_s,   r(s) = 1[s = goal] + 1[s ≠ goal]·c(s),
        φ(w) = −mean over goals of J(start),   J the walker's value under
        g(s) = 1[s = target] − κ·1[s = goal]·Σ|c|

    The last weight is slack: what it takes of the softmax is spent nowhere. The goal pays once and
    ends the walk.

    Args:
        kappa: κ, price of a unit of incentive.
        noise: "planner" or "simulator".

    Attributes:
        cells: (row, column) of each state.
        landmarks: state → its letter on the map.
        goals: (C, S), 1 at the goal of each context.
        mdp: the walker's problem without rewards, batch (C,).

    Source: Thoma et al., NeurIPS 2024, section 5 and Table 1.
    """

    def __init__(self, kappa: float, noise: Noise = "planner") -> None:
        self.kappa = kappa
        self.noise = noise
        self.rows = MAP.split("\n")[1:-1]
        self.cells = [
            (i, j) for i, row in enumerate(self.rows) for j, c in enumerate(row) if c != "#"
        ]
        drawn = {self.rows[i][j]: s for s, (i, j) in enumerate(self.cells)}
        self.landmarks = {drawn[letter]: letter for letter in "STAB"}
        self.start, self.target = drawn["S"], drawn["T"]
        goals = torch.tensor([drawn["A"], drawn["B"]])
        self.goals = torch.nn.functional.one_hot(goals, len(self.cells)).double()
        transition = torch.einsum("ab,sbt->sat", moves(noise), self._landing())
        # each row has at most five successors
        self.mdp: SparseMDP = DenseMDP(
            torch.zeros(2, len(self.cells), 4, dtype=torch.float64),
            transition.expand(2, -1, -1, -1),
            DISCOUNT,
            terminal=self.goals.bool(),
        ).to_sparse()
        self.mdp._set(free_ends=False)  # the entropy of a choice at a goal is meant

    def incentive(self, w: Tensor) -> Tensor:
        """c(s) = −0.2·softmax(w)_s without the slack, (*M, S)."""
        return -BUDGET * torch.softmax(w, -1)[..., :-1]

    def lower(self, w: Tensor) -> SparseMDP:
        """The walker's problem, batch (*M, C), for weights w (*M, S + 1)."""
        paid = self.incentive(w).unsqueeze(-2) * (1 - self.goals)
        return self._paying(self.goals + paid)

    def upper(self, w: Tensor, solution: Solution) -> Tensor:
        """φ, (*M): minus the upper value at the start, mean over the goals."""
        return -self.value(w, solution.policy)

    def value(self, w: Tensor, policy: Tensor) -> Tensor:
        """The upper value at the start of a policy (*M, C, S, A), mean over the goals, (*M)."""
        return self._values(w, policy)[..., self.start].mean(-1)

    def error_bound(self, w: Tensor, solution: Solution) -> float:
        """Certified bound on the error of `value` at weights w (S + 1).

            |J(π̂) − J(π*)| ≤ (e^ε − 1) max |Q| / (1 − γ),   ε ≥ max |log π̂ − log π*|

        It is the performance-difference lemma: Σ_a |π̂ − π*| ≤ e^ε − 1 in every state.
        """
        largest = float(self._values(w, solution.policy).detach().abs().max())
        drift = float(torch.expm1(solution.log_policy_error_bound.detach()).max())
        return drift * (largest + max(1.0, self.kappa * BUDGET)) / (1 - DISCOUNT)

    def visits(self, policy: Tensor) -> Tensor:
        """Expected discounted visits of each cell, (C, S), for a policy (C, S, A)."""
        start = torch.zeros(len(self.cells), dtype=torch.float64)
        start[self.start] = 1
        shares = occupancy(policy, self.mdp, initial_distribution=start)
        return shares / (1 - DISCOUNT)

    def problem(self) -> BilevelProblem:
        """Both levels, as `birl_ext.bilevel` takes them."""
        return BilevelProblem(self.lower, self.upper)

    def additive(self) -> AdditiveProblem:
        """The same, for the methods that need to know that the upper level is a sum over steps."""
        start = torch.zeros(len(self.cells), dtype=torch.float64)
        start[self.start] = 1
        return AdditiveProblem(self.lower, lambda w: self._table(self._gain(w)), start)

    def starts(self, count: int, generator: torch.Generator, spread: float = 6.0) -> Tensor:
        """Weights to start from, (count, S + 1): N(0, s²), s from `FLAT` to `spread` in turns."""
        shape = count, len(self.cells) + 1
        weights = torch.randn(shape, generator=generator, dtype=torch.float64)
        spreads = torch.linspace(FLAT, spread, SPREADS).double()
        return weights * spreads[torch.arange(count) % SPREADS, None]

    def picture(self, values: Tensor) -> Tensor:
        """Values (S,) laid out on the map, NaN at the walls."""
        image = torch.full((len(self.rows), len(self.rows[0])), torch.nan, dtype=values.dtype)
        rows, columns = zip(*self.cells, strict=True)
        image[rows, columns] = values
        return image

    def _values(self, w: Tensor, policy: Tensor) -> Tensor:
        """J in every state, (*M, C, S)."""
        return evaluate(policy, self._paying(self._gain(w)))

    def _gain(self, w: Tensor) -> Tensor:
        """g, (*M, C, S)."""
        spent = -self.incentive(w).sum(-1)[..., None, None]
        wanted = torch.zeros_like(self.goals)
        wanted[:, self.target] = 1
        return wanted - self.kappa * spent * self.goals

    def _paying(self, reward: Tensor) -> SparseMDP:
        """The MDP with a reward (*M, C, S) of the state alone."""
        return self.mdp.replace(reward=self._table(reward), validate="off")

    @staticmethod
    def _table(reward: Tensor) -> Tensor:
        """A reward (*B, S) of the state alone, for every move."""
        return reward.unsqueeze(-1).expand(*reward.shape, len(STEPS))

    def _landing(self) -> Tensor:
        """Where each move ends if it does not fail, (S, 4, S): a wall sends the walker back."""
        index = {cell: s for s, cell in enumerate(self.cells)}
        landing = torch.zeros(len(index), 4, len(index), dtype=torch.float64)
        for (i, j), s in index.items():
            for a, (down, right) in enumerate(STEPS):
                landing[s, a, index.get((i + down, j + right), s)] = 1
        return landing


class FourRoomsJob(Stateful):
    """Maximise the upper value by Adam on exact hyper-gradients, all starts in one batch.

    The objective is flat where the walker is nearly deterministic, and full of local maxima (maths
    section 7, "Small temperatures"). A start cools from a temperature of its own to λ within its
    first rung, and at the end of a rung only the best quarter of the starts goes on: most of the
    work is spent on those that lead, most of the steps as well.
    """

    STATE = ("algorithm", "_values", "_heat", "_rung", "_taken", "_best", "_best_weights")

    def __init__(self, config: FourRoomsConfig) -> None:
        self.config = config
        self.rooms = FourRooms(config.kappa, config.noise)
        generator = torch.Generator().manual_seed(config.seed)
        many = config.method in ("starts", "combined")
        count = config.starts if many else 1
        weights = self.rooms.starts(count, generator, config.spread)
        self._ends = [config.steps * part // 4 for part in ((1, 2, 4) if many else (4,))]
        self._heat = self._draw_heat(count, generator)
        self._rung = self._taken = 0
        self._climb(weights)
        self._best, self._best_weights = -torch.inf, self.algorithm.x.detach()[0].clone()

    @property
    def total_steps(self) -> int:
        return self.config.steps

    @property
    def done(self) -> bool:
        return self._taken >= self.config.steps

    def step(self) -> dict[str, float]:
        if self._taken >= self._ends[self._rung]:
            self._thin_out()
        x = self.algorithm.x.detach().clone()
        cold = self._temperatures(self.algorithm.steps).squeeze(-1) == self.config.temperature
        self._set_learning_rate()
        outcome = self.algorithm.step()
        self._taken += 1
        self._values = -outcome.objective
        lead = int(self._values.where(cold, -torch.inf).argmax())
        if cold[lead] and self._values[lead] > self._best:
            self._best, self._best_weights = float(self._values[lead]), x[lead]
        metrics = {
            "median": float(self._values.median()),
            "gradient_norm": float(outcome.gradient_norm[lead]),
            "starts": len(x),
        }
        # a value at a higher temperature is not comparable: nothing to show until a start is cold
        return {"objective": self._best, **metrics} if self._best > -torch.inf else metrics

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self.loaded_whole():
            self._heat = state["heat"]
            self._climb(state["algorithm"]["x"])  # with as many starts
            super().load_state_dict(state)
            check_count("rung", self._rung, 0, below=len(self._ends))

    def summary(self) -> dict[str, Any]:
        """The best weights seen at λ, with a certified error of their value."""
        rooms, tau = self.rooms, self.config.temperature
        seen = torch.cat((self._best_weights.unsqueeze(0), self.algorithm.x.detach()))
        values = -rooms.problem().objective(seen, tau).detach()
        w = seen[int(values.argmax())].clone().requires_grad_()
        phi, solution = rooms.problem().evaluate(w, tau)
        (gradient,) = torch.autograd.grad(phi, w)
        policy = solution.policy.detach()
        incentive = rooms.incentive(w.detach())
        other = FourRooms(self.config.kappa, "simulator" if rooms.noise == "planner" else "planner")
        nothing = torch.zeros_like(w)
        nothing[-1] = 1e3  # all of the softmax to the slack
        return {
            "objective": -float(phi.detach()),
            "error_bound": rooms.error_bound(w, solution),
            "gradient_norm": float(gradient.norm()),
            "no_incentive": -float(rooms.problem().objective(nothing, tau)),
            f"objective_{other.noise}_moves": float(other.value(w.detach(), policy)),
            "spent": -float(incentive.sum()),
            "parameters": {"weights": w.detach()},
            "incentive": incentive,
            "policy": policy,
            "visits": rooms.visits(policy),
        }

    def figures(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> dict[str, Callable[[], Figure]]:
        return {
            "learning_curve": partial(self._learning_curve, history, summary),
            "incentives": partial(self._incentives, summary),
            "policies": partial(self._policies, summary),
        }

    # The climb

    def _climb(self, x: Tensor) -> None:
        """Begin a rung at the weights x (M, S + 1)."""
        config = self.config
        self.algorithm = MSoBiRL(
            self.rooms.problem(),
            x,
            temperature=self._temperatures,
            optimiser=torch.optim.Adam,
            mode="exact",
            noise=config.gradient_noise if config.method == "noise" else 0.0,
            seed=config.seed,
        )
        self._values = torch.full((len(x),), -torch.inf, dtype=torch.float64)

    def _thin_out(self) -> None:
        keep = self._values.topk(max(1, len(self._values) // 4)).indices
        self._rung += 1
        self._heat = torch.ones(len(keep), dtype=torch.float64)
        self._climb(self.algorithm.x.detach()[keep])

    def _draw_heat(self, count: int, generator: torch.Generator) -> Tensor:
        """Where each start cools from, in units of λ, (M,)."""
        if self.config.method == "combined":
            heat = self.config.heat ** torch.rand(count, generator=generator, dtype=torch.float64)
            heat[: count // 4] = 1.0
            return heat
        only = self.config.heat if self.config.method == "continuation" else 1.0
        return torch.full((count,), only, dtype=torch.float64)

    def _temperatures(self, step: int) -> Tensor:
        """Temperature of each start at a step of the rung, (M, 1): falls geometrically to λ."""
        left = 1 - min(step / (COOLING * self._ends[0]), 1.0)
        return self.config.temperature * self._heat.unsqueeze(-1) ** left

    def _set_learning_rate(self) -> None:
        rate = self.config.learning_rate * 0.1 ** (self._taken / self.config.steps)
        for group in self.algorithm.optimiser.param_groups:
            group["lr"] = rate

    # The figures

    def _learning_curve(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> Figure:
        from birl_ext.runs import plots

        published = PUBLISHED.get((self.config.temperature, self.config.kappa), {})
        best = sorted(published.items(), key=lambda entry: entry[1])[-1:]
        return plots.learning_curve(
            history,
            {"objective": "best start so far", "median": "median start, at its own temperature"},
            title=f"Four rooms, λ = {self.config.temperature:g}, κ = {self.config.kappa:g}",
            ylabel="upper value",
            references={
                "no incentive": summary["no_incentive"],
                **{f"published, {method}": value for method, value in best},
            },
        )

    def _incentives(self, summary: Mapping[str, Any]) -> Figure:
        from matplotlib.colors import PowerNorm

        from birl_ext.runs import plots

        figure, axes = plots.new_figure(size=(5.8, 4.6))
        cost = -1000 * torch.tensor(summary["incentive"], dtype=torch.float64)
        picture = self.rooms.picture(cost).numpy()
        # the square root: a few cells take nearly all, and the rest would not be seen
        image = axes.imshow(picture, cmap="YlOrRd", norm=PowerNorm(0.5, vmin=0))
        self._draw_map(axes)
        for s, (i, j) in enumerate(self.rooms.cells):
            if cost[s] >= 1:
                colour = "white" if cost[s] > 0.4 * cost.max() else plots.INK
                axes.text(j, i, f"{cost[s]:.0f}", ha="center", va="center", size=7, color=colour)
        bar = figure.colorbar(image, ax=axes, shrink=0.85)
        bar.set_label("penalty per step, thousandths of the goal's reward")
        axes.set_title(f"Incentives: {summary['spent']:.3f} of {BUDGET} spent")
        return figure

    def _policies(self, summary: Mapping[str, Any]) -> Figure:
        from birl_ext.runs import plots

        figure, panels = plots.new_figure(1, 2, size=(10.4, 4.6))
        policy = torch.tensor(summary["policy"], dtype=torch.float64)
        visits = torch.tensor(summary["visits"], dtype=torch.float64)
        top = float(visits.max())
        rows, columns = torch.tensor(self.rooms.cells).T
        for context, (goal, axes) in enumerate(zip("AB", panels, strict=True)):
            picture = self.rooms.picture(visits[context]).numpy()
            image = axes.imshow(picture, cmap="YlOrBr", vmin=0, vmax=top)
            self._draw_map(axes, goal)
            moving = self.rooms.goals[context] == 0
            mean = policy[context] @ torch.tensor(STEPS, dtype=torch.float64)
            arrows = (columns[moving], rows[moving], mean[moving, 1], mean[moving, 0])
            axes.quiver(
                *(part.numpy() for part in arrows),
                angles="xy",
                scale_units="xy",
                scale=1.2,
                pivot="mid",
                width=0.005,
                color=plots.INK,
            )
            axes.set_title(f"The walker on its way to {goal}")
        figure.colorbar(image, ax=panels, shrink=0.8, label="expected discounted visits")
        return figure

    def _draw_map(self, axes: Axes, goals: str = "AB") -> None:
        """Walls and letters, on axes that show an image of the map."""
        from birl_ext.runs import plots

        axes.set_facecolor(plots.MUTED)
        axes.spines[:].set_visible(False)
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([])
        for s, letter in self.rooms.landmarks.items():
            if letter in "ST" + goals:
                i, j = self.rooms.cells[s]
                axes.annotate(
                    letter,
                    (j - 0.45, i - 0.45),
                    ha="left",
                    va="top",
                    size=8,
                    weight="bold",
                    color=plots.COLOURS[0],
                )
