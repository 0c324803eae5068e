"""What does it cost to weigh every step of a path by the whole path's sum?

    python benchmarks/additive_credit.py [--seeds 5] [--out FILE]

φ = E Σ_t γ_uᵗ f(s_t, a_t) over 200 steps of random MDPs (10 states, 3 actions, γ = 0.9, γ_u = 0.95,
τ = 0.5; r = ψ·x with 4 features). The hyper-gradient is estimated from paths by each way of giving
credit, against the exact one. First with exact ∇Q and exact critics of both levels, so that nothing
but the credit differs; then by `StocSoBiRLDescent` as it is, all of it sampled: 100 paths,
continuations of 60 steps, 300 sweeps that learn both critics.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from birl_bench.seeds import study
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import measure_estimator
from birl_ext.bilevel.stoc_sobirl import Effort, SampledProblem, StocSoBiRLDescent
from birl_ext.bilevel.trajectory import additive_surrogate, trajectory_surrogate
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

STATES, ACTIONS, FEATURES, STEPS = 10, 3, 4, 200
DISCOUNT, UPPER, TEMPERATURE = 0.9, 0.95, 0.5
EFFORT = Effort(batch=100, horizon=60, sweeps=300)
POWERS = UPPER ** torch.arange(STEPS, dtype=torch.float64)
WHOLE = "whole path"


class Problem(NamedTuple):
    mdp: birl_ext.DenseMDP
    features: Tensor  # ψ, (S, A, F)
    cost: Tensor  # f, (S, A)
    x: Tensor
    policy: Tensor
    exact: Tensor  # ∇φ over the steps


def make_problem(seed: int) -> Problem:
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    transition = (1.5 * normal(STATES, ACTIONS, STATES)).softmax(-1)
    features, cost = normal(STATES, ACTIONS, FEATURES), normal(STATES, ACTIONS)
    x, start = normal(FEATURES).requires_grad_(), normal(STATES).softmax(-1)
    mdp = birl_ext.DenseMDP(features @ x, transition, DISCOUNT, initial_distribution=start)
    policy = birl_ext.solve(mdp, temperature=TEMPERATURE).policy
    objective, where = torch.zeros((), dtype=torch.float64), start
    for power in POWERS:
        objective = objective + power * torch.einsum("s,sa,sa->", where, policy, cost)
        where = torch.einsum("s,sa,sat->t", where, policy, transition)
    (exact,) = torch.autograd.grad(objective, x)
    mdp = mdp.replace(reward=mdp.reward.detach())
    return Problem(mdp, features, cost, x.detach(), policy.detach(), exact)


def from_exact_critics(problem: Problem, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Estimates from 200 paths each, of exact ∇Q."""
    simulator = FiniteSimulator(problem.mdp, torch.Generator().manual_seed(seed))
    policy, follower = problem.policy, FiniteFollower(problem.policy)
    x = problem.x.clone().requires_grad_()

    def ahead(table: Tensor, discount: float) -> Tensor:
        """E[Σ γᵏ of a table (S, A, F)] from each state and action, less its mean over actions."""
        mdp = problem.mdp
        value = torch.stack(
            [
                birl_ext.evaluate(policy, one, mdp.transition, discount=discount)
                for one in table.unbind(-1)
            ],
            -1,
        )
        q = table + discount * torch.einsum("sat,tf->saf", mdp.transition, value)
        return q - (policy.unsqueeze(-1) * q).sum(1, keepdim=True)

    slope = ahead(problem.features, DISCOUNT)
    gain = ahead(problem.cost.unsqueeze(-1), UPPER).squeeze(-1)

    def draw() -> tuple[Paths, Tensor, Tensor]:
        paths = simulator.rollout(follower, 200, STEPS)
        at = paths.observation, paths.action
        return paths, problem.cost[at], slope[at] @ x

    def gradient(surrogate: Tensor) -> Tensor:
        return torch.autograd.grad(surrogate, x)[0]

    given: dict[str, Any] = {"temperature": TEMPERATURE, "discount": UPPER}

    def whole() -> Tensor:
        _, cost, score = draw()
        total = (POWERS * cost).sum(-1)
        return gradient(trajectory_surrogate(total, score.sum(-1), temperature=TEMPERATURE))

    def to_go() -> Tensor:
        _, cost, score = draw()
        return gradient(additive_surrogate(cost, score, **given))

    def drawn() -> Tensor:
        paths, cost, score = draw()
        advantage = gain[paths.observation, paths.action]
        return gradient(additive_surrogate(cost, score, advantage=advantage, **given))

    def summed() -> Tensor:
        paths, cost, _ = draw()
        score, advantage = slope[paths.observation] @ x, (policy * gain)[paths.observation]
        return gradient(additive_surrogate(cost, score, advantage=advantage, **given))

    return {
        WHOLE: whole,
        "to go": to_go,
        "critic, of the action drawn": drawn,
        "critic, summed over actions": summed,
    }


def by_stoc_sobirl(problem: Problem, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Estimates of Stoc-SoBiRL, for the same φ."""
    cost = problem.cost

    def total(x: Tensor, paths: Any) -> Tensor:
        return (POWERS * cost[paths[0].observation, paths[0].action]).sum(-1)

    def algorithm(credit: Any) -> Callable[[], Tensor]:
        how: dict[str, Any] = {"cost": lambda x: cost, "discount": UPPER}
        if credit == WHOLE:
            how = {"loss": total, "paths": 1}
        stoc = StocSoBiRLDescent(
            SampledProblem(lambda x: problem.features @ x, steps=STEPS, **how),
            FiniteSimulator(problem.mdp, torch.Generator().manual_seed(seed)),
            problem.x,
            discount=DISCOUNT,
            temperature=TEMPERATURE,
            optimiser=torch.optim.Adam,
            effort=EFFORT,
            **({} if credit == WHOLE else {"credit": credit}),
        )
        return lambda: stoc.hypergradient()[1]

    return {WHOLE: algorithm(WHOLE), "to go": algorithm("to go"), "critic": algorithm("critic")}


def measured(seed: int) -> list[dict[str, Any]]:
    problem = make_problem(seed)
    rows = []
    for scores, estimates, paths, repetitions in (
        ("exact", from_exact_critics(problem, seed), 200, 60),
        ("sampled", by_stoc_sobirl(problem, seed), EFFORT.batch, 20),
    ):
        whole = math.nan
        for credit, estimate in estimates.items():
            report = measure_estimator(estimate, problem.exact, repetitions=repetitions)
            variance = paths * report.variance
            whole = (
                variance if credit == WHOLE else rows[-list(estimates).index(credit)]["variance"]
            )
            rows.append(
                {
                    "seed": seed,
                    "scores": scores,
                    "credit": credit,
                    "variance": variance,
                    "times_less": whole / variance,
                    "relative_error": report.relative_error,
                    "noise": report.noise,
                }
            )
    return rows


def table(report: dict[str, Any]) -> str:
    """A line for each credit: the median over seeds, and the range of what is gained."""
    lines = [
        "| scores | credit | variance of one path | times less | relative error | its noise |",
        "|---|---|---|---|---|---|",
    ]
    rows = report["rows"]
    for scores, credit in dict.fromkeys((row["scores"], row["credit"]) for row in rows):
        found = [row for row in rows if (row["scores"], row["credit"]) == (scores, credit)]
        less = [row["times_less"] for row in found]
        cells = [scores, credit, f"{median(row['variance'] for row in found):.3g}"]
        cells.append("" if credit == WHOLE else f"{min(less):.0f} to {max(less):.0f}")
        cells += [f"{median(row[key] for row in found):.3f}" for key in ("relative_error", "noise")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(study(__file__, __doc__, measured, table, seeds=5))
