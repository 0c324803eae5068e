"""Tax design: an income tax and three consumption taxes for households that adapt to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from birl_ext.bilevel import AdditiveProblem, BilevelProblem, MSoBiRL, ZeroOrder
from birl_ext.functional import evaluate, occupancy, solve
from birl_ext.model.checks import check_memory
from birl_ext.model.mdp import DenseMDP
from birl_ext.problems.settings import check_settings
from birl_ext.solution import Solution
from birl_ext.state import Stateful

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TaxEconomy", "TaxesConfig", "TaxesJob"]

DISCOUNT = 0.9
MOST_ASSETS = 100.0  # and the largest debt
NOISE = 5.0
SPREAD = 2.0
HOURS, HOUR = 10, 0.89
GOODS, PIECES, PIECE = 3, 5, 1.25
TASTES = ((0.6, 0.3, 0.1), (0.1, 0.7, 0.2))
"""α of each context."""
START, MOST_TAX = 0.3, 2.0

Method = Literal["gradient", "zero-order"]


@dataclass(frozen=True)
class TaxesConfig:
    """Set an income tax and three consumption taxes for households that adapt to them."""

    temperature: float = 0.1
    """λ, the households' entropy regularisation, units of their utility."""

    method: Method = "gradient"
    """"gradient" follows the exact hyper-gradient, "zero-order" the difference of two exact solves
    in a random direction."""

    steps: int = 100
    """Outer steps."""

    learning_rate: float = 0.1
    """Of Adam."""

    radius: float = 0.1
    """Length of the method "zero-order", units of the logits of the taxes."""

    cells: int = 100
    """Cells of the grid of assets; an even number keeps the kink of the utility on an edge."""

    seed: int = 0
    """Of the random directions."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            above={"temperature": 0, "steps": 0, "learning_rate": 0, "radius": 0, "cells": 1},
        )
        actions = HOURS * (GOODS * (PIECES - 1) + 1)
        # P and as much again while it is made, and the values of every pair
        need = actions * self.cells * (3 * self.cells + 10)
        check_memory(f"an economy of {self.cells} cells", need, fix="lower cells")


class TaxEconomy:
    """Both levels; C = 2 contexts (tastes α), S cells of assets, 10 hours × 13 budgets.

        r = u(a) − h²/10 + Π_i (c_i/(1 + x_i))^{α_i},   u(a) = a if a ≤ 0, log(a/20 + 1) otherwise,
        a' ~ N(clip(a + (1 − x₀)h − Σ_i c_i), 5²), truncated to [−100, 100],
        φ(x) = −mean over contexts of E Σ_t γᵗ g,
        g = 15·mean_i(c_i/(1 + x_i))/5 + 5·log(1 + Σ_i x_i c_i/(1 + x_i) + x₀h)

    A household chooses hours h and pieces c of three goods, 1,250 joint actions. Only the budget
    n = Σ_i c_i moves the assets, and only the last term of r tells the goods apart, so that

        F(n) = λ log Σ_{c: Σc = n} exp(Π_i (c_i/(1 + x_i))^{α_i}/λ)

    takes its place in an MDP of 130 actions (h, n) with the same soft value; given n, the goods are
    chosen with probability w(c|n) ∝ exp(Π_i (…)/λ), whatever the assets. This is exact, the entropy
    included.

    Args:
        temperature: λ.
        cells: S, of equal width on [−100, 100]; the utility and the mean of the next assets are
            taken at their centres, the noise is integrated over each.

    Attributes:
        assets: (S,), centres of the cells.
        start: (S,), initial distribution, N(0, 2²) truncated.
        baskets: (125, 3), pieces of each good, in units of money.
        hours, budgets: (130,), of each action.

    Source: Thoma et al., NeurIPS 2024, tax design; docs/taxes.md says where this differs.
    """

    def __init__(self, temperature: float, cells: int) -> None:
        self.temperature = temperature
        self.edges = torch.linspace(-MOST_ASSETS, MOST_ASSETS, cells + 1, dtype=torch.float64)
        self.assets = (self.edges[1:] + self.edges[:-1]) / 2
        self.start = self._shares(torch.zeros((), dtype=torch.float64), SPREAD)
        pieces = list(itertools.product(range(PIECES), repeat=GOODS))
        self.baskets = PIECE * torch.tensor(pieces, dtype=torch.float64)
        count = torch.tensor([sum(basket) for basket in pieces])
        self._buys = torch.nn.functional.one_hot(count).bool()  # (125, 13)
        choices = torch.cartesian_prod(torch.arange(HOURS), torch.arange(self._buys.shape[1]))
        self.hours = HOUR * choices[:, 0].double()
        self.budgets = PIECE * choices[:, 1].double()
        self._tastes = torch.tensor(TASTES, dtype=torch.float64).unsqueeze(1)

    @staticmethod
    def taxes(w: Tensor) -> Tensor:
        """Logits (4,) → x, (4,), in (0, 2): the tax on income, then those on the goods."""
        return MOST_TAX * torch.sigmoid(w)

    @staticmethod
    def logits(taxes: Tensor) -> Tensor:
        """The inverse of `taxes`."""
        return torch.logit(taxes / MOST_TAX)

    def transition(self, x: Tensor) -> Tensor:
        """P, (S, 130, S), the same in both contexts; differentiable in x₀."""
        mean = self.assets.unsqueeze(-1) + (1 - x[0]) * self.hours - self.budgets
        return self._shares(mean.clamp(-MOST_ASSETS, MOST_ASSETS), NOISE)

    def lower(self, w: Tensor) -> DenseMDP:
        """The households' problem at logits w, batch (C,)."""
        x = self.taxes(w)
        consumed, _ = self._choice(x)
        effort = self.hours.square() / 10
        utility = torch.where(
            self.assets <= 0, self.assets, torch.log1p(self.assets.clamp(min=0) / 20)
        )
        paid = (consumed - effort).unsqueeze(-2) + utility.unsqueeze(-1)
        return DenseMDP(
            paid,
            self.transition(x),
            DISCOUNT,
            initial_distribution=self.start.expand(len(TASTES), -1),
            validate="off",
        )

    def upper(self, w: Tensor, solution: Solution) -> Tensor:
        """φ(w)."""
        return -self.welfare(w, solution.policy).mean()

    def welfare(self, w: Tensor, policy: Tensor) -> Tensor:
        """Discounted social welfare of a policy (C, S, 130), of each context, (C,)."""
        x = self.taxes(w)
        gain = self._gain(x).unsqueeze(-2).expand_as(policy)
        value = evaluate(policy, gain, self.transition(x), discount=DISCOUNT, validate="off")
        return value @ self.start

    def error_bound(self, w: Tensor, solution: Solution) -> float:
        """Certified bound on the error of `welfare`, by the performance-difference lemma.

        |J(π̂) − J(π*)| ≤ (e^ε − 1) max |g| / (1 − γ)²,   ε ≥ max |log π̂ − log π*|
        """
        drift = torch.expm1(solution.log_policy_error_bound.detach()).max()
        return float(drift * self._gain(self.taxes(w)).detach().abs().max() / (1 - DISCOUNT) ** 2)

    def households(self, w: Tensor) -> dict[str, Tensor]:
        """What the households do at logits w.

        Returns:
            `share`, (C, S): of the discounted time spent in each cell; `hours` and `budget`,
            (C, S): means of what is worked and spent there; `goods`, (C, 3): what is spent on each.
        """
        with torch.no_grad():
            mdp = self.lower(w)
            policy = solve(mdp, temperature=self.temperature).policy
            share = occupancy(policy, mdp, validate="off")
            _, choice = self._choice(self.taxes(w))
            spent = torch.einsum("cbn,bi->cni", choice, self.baskets).repeat(1, HOURS, 1)
            return {
                "share": share,
                "hours": policy @ self.hours,
                "budget": policy @ self.budgets,
                "goods": torch.einsum("cs,csa,cai->ci", share, policy, spent),
            }

    def problem(self) -> BilevelProblem:
        """Both levels, as `birl_ext.bilevel` takes them."""
        return BilevelProblem(self.lower, self.upper)

    def additive(self) -> AdditiveProblem:
        """The same, for the methods that need to know that the upper level is a sum over steps."""

        def gain(w: Tensor) -> Tensor:
            return self._gain(self.taxes(w)).unsqueeze(-2).expand(-1, len(self.assets), -1)

        return AdditiveProblem(self.lower, gain)

    def _shares(self, mean: Tensor, deviation: float) -> Tensor:
        """Probability of each cell under truncated normals, (*n) → (*n, S)."""
        below: Tensor = torch.special.ndtr((self.edges - mean.unsqueeze(-1)) / deviation)
        return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])

    def _choice(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F of each action, (C, 130), and w(c|n), (C, 125, 13)."""
        # c^α (1 + x)^−α, so that a good that is not bought has the derivative zero, not 0 · ∞
        joy = (self.baskets**self._tastes * (1 + x[1:]) ** -self._tastes).prod(-1)
        scaled = (joy.unsqueeze(-1) / self.temperature).masked_fill(~self._buys, -torch.inf)
        return self.temperature * scaled.logsumexp(1).repeat(1, HOURS), scaled.softmax(1)

    def _gain(self, x: Tensor) -> Tensor:
        """g in expectation over the goods, of each action, (C, 130)."""
        net = self.baskets / (1 + x[1:])
        revenue = net @ x[1:] + x[0] * self.hours[:: self._buys.shape[1]].unsqueeze(-1)
        gain = 15 * net.mean(-1) / 5 + 5 * torch.log1p(revenue)  # (10, 125)
        return torch.einsum("hb,cbn->chn", gain, self._choice(x)[1]).flatten(1)


class TaxesJob(Stateful):
    """Maximise social welfare from taxes of .3 by Adam."""

    STATE = ("algorithm",)

    def __init__(self, config: TaxesConfig) -> None:
        self.config = config
        self.economy = TaxEconomy(config.temperature, config.cells)
        self.algorithm: MSoBiRL | ZeroOrder
        self._start = self.economy.logits(torch.full((1 + GOODS,), START, dtype=torch.float64))
        adam = partial(torch.optim.Adam, lr=config.learning_rate)
        if config.method == "gradient":
            self.algorithm = MSoBiRL(
                self.economy.problem(),
                self._start,
                temperature=config.temperature,
                optimiser=adam,
                mode="exact",
            )
        else:
            self.algorithm = ZeroOrder(
                self.economy.problem(),
                self._start,
                temperature=config.temperature,
                optimiser=adam,
                radius=config.radius,
                seed=config.seed,
            )

    @property
    def total_steps(self) -> int:
        return self.config.steps

    @property
    def done(self) -> bool:
        return self.algorithm.steps >= self.config.steps

    def step(self) -> dict[str, float]:
        taxes = self.economy.taxes(self.algorithm.x.detach()).tolist()
        outcome = self.algorithm.step()
        return {
            "objective": -float(outcome.objective),
            "gradient_norm": float(outcome.gradient_norm),
            **_named(taxes),
        }

    def summary(self) -> dict[str, Any]:
        """The last taxes, with a certified error of their welfare."""
        economy, tau = self.economy, self.config.temperature
        w = self.algorithm.x.detach().clone().requires_grad_()
        phi, solution = economy.problem().evaluate(w, tau)
        (gradient,) = torch.autograd.grad(phi, w)
        welfare = economy.welfare(w.detach(), solution.policy.detach())
        return {
            "objective": -float(phi.detach()),
            "error_bound": economy.error_bound(w.detach(), solution),
            "gradient_norm": float(gradient.norm()),
            "objective_at_start": -float(economy.problem().objective(self._start, tau)),
            "welfare": welfare,
            "taxes": _named(economy.taxes(w.detach()).tolist()),
            "assets": economy.assets,
            "before": economy.households(self._start),
            "after": economy.households(w.detach()),
            "params": {"logits": w.detach()},
        }

    def figures(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> dict[str, Callable[[], Figure]]:
        return {
            "learning_curve": partial(self._learning_curve, history, summary),
            "taxes": partial(self._taxes, history),
            "households": partial(self._households, summary),
        }

    # The figures

    def _learning_curve(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> Figure:
        from birl_ext.runs import plots

        return plots.learning_curve(
            history,
            {"objective": "social welfare"},
            title=f"Tax design, λ = {self.config.temperature:g}, {self.config.method}",
            references={f"all taxes {START}": summary["objective_at_start"]},
        )

    def _taxes(self, history: Sequence[Mapping[str, float]]) -> Figure:
        from birl_ext.runs import plots

        return plots.learning_curve(
            history,
            {name: name.replace("_", " ") for name in _named([0.0] * (1 + GOODS))},
            title="The taxes",
            ylabel="rate",
        )

    def _households(self, summary: Mapping[str, Any]) -> Figure:
        from birl_ext.runs import plots

        rows = {"share": "share of time", "hours": "hours worked", "budget": "spent on goods"}
        figure, panels = plots.new_figure(3, 2, size=(9.6, 7.2), sharex=True, sharey="row")
        assets = summary["assets"]
        taxed = {f"all taxes {START}": summary["before"], "designed taxes": summary["after"]}
        shares = torch.tensor([case["share"] for case in taxed.values()]).amax((0, 1))
        seen = [a for a, share in zip(assets, shares.tolist(), strict=True) if share > 1e-4]
        for context, column in enumerate(zip(*panels, strict=True)):
            for axes, (name, label) in zip(column, rows.items(), strict=True):
                for (case, found), colour in zip(taxed.items(), plots.COLOURS, strict=False):
                    axes.plot(assets, found[name][context], color=colour, label=case)
                    if name == "share":
                        axes.fill_between(assets, found[name][context], color=colour, alpha=0.2)
                if context == 0:
                    axes.set_ylabel(label)
            column[0].set_title("Tastes α = ({:g}, {:g}, {:g})".format(*TASTES[context]))
            column[-1].set_xlabel("assets")
            column[-1].set_xlim(min(seen), max(seen))
        panels[0][0].legend()
        return figure


def _named(taxes: Sequence[float]) -> dict[str, float]:
    """The rates under the names that metrics and figures use."""
    names = ["income_tax", *(f"tax_on_good_{i + 1}" for i in range(GOODS))]
    return dict(zip(names, taxes, strict=True))
