"""HPGD: hyper policy gradient descent (Thoma, Pásztor, Krause, Ramponi and Hu, NeurIPS 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.guards import check_kind, check_number
from birl_ext.bilevel.problem import Temperature
from birl_ext.bilevel.rivals.sampled_rival import SampledRival
from birl_ext.bilevel.rivals.tables import advantage_from, returns_to_go
from birl_ext.bilevel.sampled import KnownFollower, SampledProblem
from birl_ext.errors import OptionError
from birl_ext.functional import evaluate, solve
from birl_ext.model.mdp import DenseMDP
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

__all__ = ["HPGD"]

Sampling = Literal["on-policy", "uniform", "oracle"]
UpperCritic = Literal["mc", "sarsa"]


class HPGD(SampledRival):
    """Hyper policy gradient descent, with tables that are averaged over paths.

        ∇φ̂ = (1/n) Σ_i Σ_t γ_uᵗ [ ∇f_t + (1/τ) Â_f(s_t, a_t) ∇Â(s_t, a_t) ],   Â = Q̂ − V̂

    Q̂ and V̂, of the upper level's costs f and of the follower's rewards, are means of discounted
    sums over every visit. The same paths give both advantages, which are not independent then: a
    bias, which more paths make smaller, as they do that of the steps beyond H.

    Args:
        problem: reward and `cost`.
        simulator: draws the paths; all randomness is its generator.
        x: start, (d,), or a list, tuple or dict of tensors, or a module; copied.
        discount: γ of the lower level.
        temperature: τ, units of reward, or a schedule of it.
        optimiser: from a list of parameters to any torch optimiser.
        batch: n, paths of H steps per outer step.
        sampling: where the advantages come from.
            "on-policy": the n paths.
            "uniform": as many more, that start from every state alike.
            "oracle": the exact ones, of `model`; they draw nothing.
        critic: of the upper level: "mc", a mean as above, or "sarsa", a table that is kept from
            step to step and learns from the n paths, A_f = Q_f − Σ_a π Q_f.
        rate: α of that table, (0, 1].
        noise: standard deviation of Gaussian noise added to the hyper-gradient, units of φ per unit
            of x.
        follower: (x, τ) → its policy, (S, A), where it is known, as in the published code. None:
            soft Q-learning.
        sweeps: of that learning per outer step, samples of every (s, a).
        model: the process, for the oracle alone.

    Source: Thoma et al. (2024), equation (6) and Algorithm 1; "sarsa" and the oracle as a reference
    of theirs, from samples there and exact here: Kudo et al. (2026).
    """

    def __init__(
        self,
        problem: SampledProblem,
        simulator: FiniteSimulator,
        x: variables.Variables,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Maker,
        batch: int,
        sampling: Sampling = "on-policy",
        critic: UpperCritic = "mc",
        rate: float = 0.5,
        noise: float = 0.0,
        follower: KnownFollower | None = None,
        sweeps: int = 10,
        model: DenseMDP | None = None,
    ) -> None:
        if sampling not in ("on-policy", "uniform", "oracle"):
            raise OptionError(
                f"sampling is {sampling!r}", allowed="'on-policy', 'uniform' or 'oracle'"
            )
        if critic not in ("mc", "sarsa"):
            raise OptionError(f"critic is {critic!r}", allowed="'mc' or 'sarsa'")
        if (sampling == "oracle") != (model is not None):
            raise OptionError(
                f"sampling is {sampling!r}, and model is {'' if model is None else 'not '}None",
                allowed="a model for the oracle, and for nothing else",
            )
        if model is not None:
            check_kind("model", model, DenseMDP)
        self._begin_rival(
            problem,
            simulator,
            x,
            discount=discount,
            temperature=temperature,
            optimiser=optimiser,
            batch=batch,
            noise=noise,
            follower=follower,
            sweeps=sweeps,
        )
        self.sampling: Sampling = sampling
        self.critic: UpperCritic = critic
        self.rate = check_number("rate", rate, above=True, below=1.0 + 1e-12)
        self.model = model

    def _credit(
        self, reward: Tensor, cost: Tensor, follower: FiniteFollower, path: Paths
    ) -> tuple[Tensor, Tensor]:
        if self.sampling == "oracle":
            score, advantage = self._exact(reward, cost.detach(), follower)
        else:
            simulator = self.simulator
            shape = simulator.states, simulator.actions
            seen = path
            if self.sampling == "uniform":
                first = torch.randint(
                    simulator.states, (self.batch,), generator=simulator.generator
                )
                seen = simulator.continuations(follower, first, None, self.problem.steps)
            index = seen.observation, seen.action
            own = returns_to_go(reward[index], seen.present, self.discount)
            score = advantage_from(seen, own, *shape)
            if self.critic == "mc":
                theirs = cost.detach()[index]
                theirs = returns_to_go(theirs, seen.present, self.problem.discount)
                advantage = advantage_from(seen, theirs, *shape)
        if self.critic == "sarsa" and self.sampling != "oracle":
            advantage = self._sarsa(cost.detach(), follower, path, self.rate)
        here = path.observation, path.action
        return score[here] * path.present, advantage[here] * path.present

    def _exact(
        self, reward: Tensor, cost: Tensor, follower: FiniteFollower
    ) -> tuple[Tensor, Tensor]:
        """∇A of the follower's soft-optimal policy, and A_f of the policy played."""
        assert self.model is not None
        found = solve(self.model.replace(reward=reward, validate="cheap"), temperature=self.tau)
        paid = self.model.replace(reward=cost, discount=self.problem.discount, validate="cheap")
        value = evaluate(follower.policy, paid)
        ahead = torch.einsum("sat,t->sa", self.model.transition, value)
        upper = cost + self.problem.discount * ahead - value.unsqueeze(-1)
        return found.q - found.value.unsqueeze(-1), upper
