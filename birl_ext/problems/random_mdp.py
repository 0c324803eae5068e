"""SoBiRL's synthetic problem: a quadratic reward model on a random MDP, with a known optimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from birl_ext.bilevel import BilevelProblem, MSoBiRL
from birl_ext.model.checks import check_memory
from birl_ext.model.mdp import DenseMDP
from birl_ext.runs.settings import check_settings
from birl_ext.solution import Solution
from birl_ext.state import Stateful

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RandomMDPConfig", "RandomMDPJob", "random_mdp_problem", "random_mdps"]


@dataclass(frozen=True)
class RandomMDPConfig:
    """min ½‖x‖² + ½‖π*(x)‖² over x, with reward u·v·(xᵀMx) on a random MDP."""

    states: int = 10
    actions: int = 5
    dimension: int = 100
    """Number of upper-level variables."""
    discount: float = 0.5
    temperature: float = 1.0
    mode: Literal["exact", "published"] = "exact"
    """"published" takes N plain sweeps and one adjoint step per outer step, as in the paper."""
    learning_rate: float | None = None
    """Outer step size; by default 0.008 in the published mode and 0.05 in the exact one."""
    sweeps: int = 10
    tol: float | None = None
    """Certified relative error asked of the value; by default as far as rounding allows."""
    adjoint_rate: float = 0.5
    max_steps: int = 3000
    target: float = 1.0001
    """Stop once the objective is below."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self,
            least=dict.fromkeys(("states", "actions", "dimension", "sweeps", "max_steps"), 1)
            | {"discount": 0, "tol": 0},
            above={"temperature": 0, "learning_rate": 0, "adjoint_rate": 0},
            below={"discount": 1},
            infinite=("target",),
        )
        states, actions, dimension = self.states, self.actions, self.dimension
        check_memory(
            f"a problem of {states} states, {actions} actions and dimension {dimension}",
            2 * states**2 * actions + dimension**2,
            fix="lower states, actions or dimension",
        )


def random_mdp_problem(config: RandomMDPConfig) -> tuple[BilevelProblem, Tensor]:
    """The instance of a seed and the starting point x₀ ~ N(0, I).

        r(s,a) = u_sa v_sa (xᵀMx),  u, v ~ U(0,1),  M ~ N(0,1);  f = ½‖x‖² + ½‖π‖²

    Each (s,a) reaches 1 to S − 1 states with normalised uniform weights. The optimum is x = 0,
    where the policy is uniform: φ = S/(2A).
    """
    *instance, start = _drawn(config, config.seed)
    return _levels(config, *instance), start


def random_mdps(config: RandomMDPConfig, seeds: Sequence[int]) -> tuple[BilevelProblem, Tensor]:
    """Instances of several seeds in one batch, and their starting points, (n, d)."""
    parts = zip(*(_drawn(config, seed) for seed in seeds), strict=True)
    weight, form, transition, start = map(torch.stack, parts)
    return _levels(config, weight, form, transition), start


def _levels(
    config: RandomMDPConfig, weight: Tensor, form: Tensor, transition: Tensor
) -> BilevelProblem:
    """Both levels of an instance, or of a batch (n,) of them."""
    base = DenseMDP(torch.zeros_like(weight), transition, config.discount)

    def lower(x: Tensor) -> DenseMDP:
        size = torch.einsum("...i,...ij,...j->...", x, form, x)
        return base.replace(reward=weight * size[..., None, None], validate="off")

    def upper(x: Tensor, solution: Solution) -> Tensor:
        return (x.square().sum(-1) + solution.policy.square().sum((-1, -2))) / 2

    return BilevelProblem(lower, upper)


def _drawn(config: RandomMDPConfig, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u·v, M, P and x₀ of a seed."""
    generator = torch.Generator().manual_seed(seed)
    states, actions, dimension = config.states, config.actions, config.dimension

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = uniform(states, actions) * uniform(states, actions)
    form = normal(dimension, dimension)
    transition = torch.zeros(states, actions, states, dtype=torch.float64)
    for row in transition.view(-1, states):
        support = int(torch.randint(1, max(states, 2), (1,), generator=generator))
        reached = torch.randperm(states, generator=generator)[:support]
        share = uniform(support)
        row[reached] = share / share.sum()
    return weight, form, transition, normal(dimension)


class RandomMDPJob(Stateful):
    """One run of M-SoBiRL on a random MDP."""

    STATE = ("algorithm", "_objective")

    def __init__(self, config: RandomMDPConfig) -> None:
        self.config = config
        problem, start = random_mdp_problem(config)
        published = config.mode == "published"
        rate = config.learning_rate
        if rate is None:
            rate = 8e-3 if published else 5e-2
        self.algorithm = MSoBiRL(
            problem,
            start,
            temperature=config.temperature,
            optimiser=lambda parameters: torch.optim.SGD(parameters, lr=rate),
            mode=config.mode,
            sweeps=config.sweeps,
            tol=config.tol,
            adjoint_rate=config.adjoint_rate,
            seed=config.seed,
        )
        self._objective = float("inf")

    @property
    def total_steps(self) -> int:
        return self.config.max_steps

    @property
    def done(self) -> bool:
        reached = self._objective <= self.config.target
        return reached or self.algorithm.steps >= self.config.max_steps

    def step(self) -> dict[str, float]:
        outcome = self.algorithm.step()
        self._objective = float(outcome.objective)
        return {
            "objective": self._objective,
            "gradient_norm": float(outcome.gradient_norm),
            "certified_error": float(outcome.relative_error),
            "sweeps": outcome.sweeps,
            "products": outcome.products,
        }

    def summary(self) -> dict[str, Any]:
        # ∂f/∂π = π, so the cotangents move exactly as fast as the policy does
        report = self.algorithm.hypergradient_report(smoothness=1.0)
        return {
            "objective": float(report.objective),
            "known_optimum": self.config.states / (2 * self.config.actions),
            "gradient_norm": float(report.exact.norm()),
            "gradient_error_bound": float(report.bound),
            "adjoint_error": float(report.adjoint_error),
            "hypergradient_error": float(report.relative_error),
            "hypergradient_cosine": float(report.cosine),
            "steps": self.algorithm.steps,
            "params": {"x": self.algorithm.x.detach()},
        }

    def figures(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> dict[str, Callable[[], Figure]]:
        def curve() -> Figure:
            from birl_ext.runs import plots

            optimum = summary["known_optimum"]
            rows = [{**row, "gap": row["objective"] - optimum} for row in history]
            return plots.learning_curve(
                rows,
                {"gap": "φ − φ*", "gradient_norm": "‖∇φ‖"},
                title=f"Random MDP, {self.config.mode} mode",
                log=True,
            )

        return {"learning_curve": curve}
