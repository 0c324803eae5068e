"""Tax design from samples of what the households do alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel import BilevelProblem, SampledProblem
from birl_ext.model.mdp import DenseMDP
from birl_ext.problems.taxes import DISCOUNT, TASTES, TaxEconomy
from birl_ext.simulators.finite import FiniteSimulator

__all__ = ["SampledTaxes", "sampled_taxes"]


class SampledTaxes(NamedTuple):
    """Tax design as samples, and exactly."""

    problem: SampledProblem
    simulator: FiniteSimulator
    exact: BilevelProblem
    start: Tensor
    """Logits of taxes of .3, (4,)."""


def sampled_taxes(
    temperature: float, cells: int = 40, seed: int = 0, steps: int = 60
) -> SampledTaxes:
    """The economy of `TaxEconomy` as a process that can only be sampled.

        φ(w) = −E[ Σ_t γᵗ g_w(s_t, a_t) ],  γ = .9,  over assets and tastes: (2·cells) states

    The tastes are drawn with the first assets and stay. The taxes move rewards, the welfare of each
    step, and the process, of which a method uses ∇log P_w at the transitions that it draws.

    Args:
        temperature: λ, units of the households' utility.
        cells: of the grid of assets, for each taste.
        seed: of the samples.
        steps: H, steps of a path; γ⁶⁰ is .0018.

    Source: Thoma et al., NeurIPS 2024, tax design; docs/taxes.md says where this differs.
    """
    economy = TaxEconomy(temperature, cells)
    tastes = len(TASTES)
    start = economy.logits(torch.full((4,), 0.3, dtype=torch.float64))

    def transition(w: Tensor) -> Tensor:
        moved = economy.transition(economy.taxes(w))
        zero = torch.zeros_like(moved)
        rows = [[moved if i == k else zero for i in range(tastes)] for k in range(tastes)]
        return torch.cat([torch.cat(row, -1) for row in rows])

    def reward(w: Tensor) -> Tensor:
        return economy.lower(w).reward.flatten(0, 1)

    def cost(w: Tensor) -> Tensor:
        gain = economy.gain(economy.taxes(w))
        return -gain.unsqueeze(1).expand(-1, cells, -1).flatten(0, 1)

    first = economy.start.repeat(tastes) / tastes
    with torch.no_grad():
        process = DenseMDP(reward(start), transition(start), DISCOUNT, initial_distribution=first)
    return SampledTaxes(
        SampledProblem(reward, cost=cost, transition=transition, steps=steps, discount=DISCOUNT),
        FiniteSimulator(process, torch.Generator().manual_seed(seed)),
        economy.problem(),
        start,
    )
