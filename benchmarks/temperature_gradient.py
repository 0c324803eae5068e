"""How wrong is a hyper-gradient that takes the temperature of an entropy target for fixed?

    python benchmarks/temperature_gradient.py [--seeds 20] [--out FILE]

Random MDPs (5 states, 3 actions, γ = 0.7) whose soft-optimal follower holds an entropy of half of
log 3 over random states. φ is the cross entropy of a table of rewards over all pairs of paths of
two steps. The error of ∂φ/∂x at a fixed τ against the whole derivative, exactly; and SoBiRL's
estimate from 20,000 pairs with `FullHorizon`, with and without `held`.
"""

from __future__ import annotations

import math
import sys
from statistics import median
from typing import Any

import torch
from birl_bench.seeds import study
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import exact_pair_objective
from birl_ext.bilevel.score import FullHorizon
from birl_ext.bilevel.sobirl import SoBiRLUpdate
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.reward_model import RewardNetwork
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator

STATES, ACTIONS, STEPS, DISCOUNT, COUNT = 5, 3, 2, 0.7, 20_000
TARGET = 0.5 * math.log(ACTIONS)


def measured(seed: int) -> dict[str, float]:
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    rows, truth = (1.5 * normal(STATES, ACTIONS, STATES)).softmax(-1), normal(STATES, ACTIONS)
    start, held = normal(STATES).softmax(-1), normal(STATES).softmax(-1)
    table = normal(STATES, ACTIONS).requires_grad_()

    def mdp(table: Tensor) -> birl_ext.DenseMDP:
        return birl_ext.DenseMDP(table, rows, DISCOUNT, initial_distribution=start)

    def loss(s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        gap = (table[s1, a1] - table[s2, a2]).sum(-1)
        share = torch.sigmoid((truth[s1, a1] - truth[s2, a2]).sum(-1))
        return torch.nn.functional.binary_cross_entropy_with_logits(gap, share, reduction="none")

    def gradient(temperature: Any) -> Tensor:
        phi = exact_pair_objective(mdp(table), loss, temperature=temperature, steps=STEPS)
        return torch.autograd.grad(phi, table, retain_graph=True)[0].flatten()

    tau = birl_ext.temperature_for(TARGET, mdp(table), weight=held)
    whole, at_fixed = gradient(tau), gradient(tau.detach())

    temperature = float(tau.detach())
    plain = mdp(table.detach())
    follower = FiniteFollower(birl_ext.solve(plain, temperature=temperature).policy)
    simulator = FiniteSimulator(plain, torch.Generator().manual_seed(seed))
    reward = RewardNetwork.table(STATES, ACTIONS).double()
    (weight,) = reward.parameters()
    with torch.no_grad():
        weight.copy_(table.view_as(weight))

    def side() -> Fragments:
        where, chosen, present = simulator.rollout(follower, COUNT, STEPS)
        log_prob, now = follower.log_prob(where, chosen), torch.zeros(COUNT, dtype=torch.int64)
        return Fragments(where, chosen, truth[where, chosen], present, log_prob, now)

    def estimate(states: Tensor | None) -> float:
        """The relative error against the whole derivative."""
        learner = SoBiRLUpdate(
            reward,
            optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            score=FullHorizon(simulator, discount=DISCOUNT, steps=20),
            average=0.0,
        )
        first, second = side(), side()
        share = torch.sigmoid((first.reward - second.reward).sum(-1))
        pairs = Pairs(first, second, torch.bernoulli(share, generator=simulator.generator))
        learner.step(pairs, follower, temperature=temperature, held=states)
        assert weight.grad is not None
        return float((weight.grad.flatten() - whole).norm() / whole.norm())

    states = torch.multinomial(held, COUNT, replacement=True, generator=simulator.generator)
    return {
        "seed": seed,
        "temperature": temperature,
        "fixed": float((at_fixed - whole).norm() / whole.norm()),
        "sobirl_without": estimate(None),
        "sobirl_with": estimate(states),
    }


NAMES = {
    "fixed": "exact, τ taken for fixed",
    "sobirl_without": "SoBiRL from 20,000 pairs, τ taken for fixed",
    "sobirl_with": "SoBiRL from 20,000 pairs, dτ/dx with it",
}


def table(report: dict[str, Any]) -> str:
    lines = ["| gradient | median error | range |", "|---|---|---|"]
    for name, words in NAMES.items():
        found = sorted(row[name] for row in report["rows"])
        lines.append(f"| {words} | {median(found):.3f} | {found[0]:.3f} to {found[-1]:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(study(__file__, __doc__, lambda seed: [measured(seed)], table, seeds=20))
