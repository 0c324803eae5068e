"""SoBiRL's synthetic problem, from samples of the process alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from birl_ext.bilevel import BilevelProblem
from birl_ext.bilevel.stoc_sobirl import SampledProblem
from birl_ext.model.mdp import DenseMDP
from birl_ext.problems.random_mdp import RandomMDPConfig, random_mdp_problem
from birl_ext.simulators.finite import FiniteSimulator, Paths

__all__ = ["sampled_random_mdp"]


def sampled_random_mdp(
    config: RandomMDPConfig, seed: int = 0
) -> tuple[SampledProblem, FiniteSimulator, BilevelProblem, Tensor]:
    """The problem as samples, its simulator, the same problem exactly, and the start.

        ½‖π‖² = (S²/2) P( (s₁,a₁) = (s₂,a₂) ),  s₁, s₂ uniform, a₁ ~ π(·|s₁), a₂ ~ π(·|s₂)

    so that the loss of two paths of one step is l = ½‖x‖² + (S²/2)·1[d₁ = d₂].

    Args:
        config: the instance, as for `random_mdp_problem`.
        seed: of the samples.
    """
    exact, start = random_mdp_problem(config)
    mdp = exact.lower(start)
    assert isinstance(mdp, DenseMDP)
    states = config.states

    def reward(x: Tensor) -> Tensor:
        return exact.lower(x).reward

    def loss(x: Tensor, paths: Sequence[Paths]) -> Tensor:
        first, second = paths
        same = (first.observation == second.observation) & (first.action == second.action)
        return (x.square().sum() + states**2 * same.squeeze(-1).to(x.dtype)) / 2

    simulator = FiniteSimulator(mdp, torch.Generator().manual_seed(seed))
    return SampledProblem(reward, loss, paths=2, steps=1), simulator, exact, start
