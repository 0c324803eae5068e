"""What the rivals that learn from samples have in common: paths, and who is given credit."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.guards import check_count, check_lower, check_objective
from birl_ext.bilevel.hypergradient import hypergradient
from birl_ext.bilevel.problem import Temperature
from birl_ext.bilevel.rivals.tables import longest_of
from birl_ext.bilevel.sampled import KnownFollower, SampledDescent, SampledProblem
from birl_ext.bilevel.trajectory import additive_surrogate
from birl_ext.errors import OptionError
from birl_ext.model import checks
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

__all__ = ["SampledRival", "check_additive"]


class SampledRival(SampledDescent):
    """Descent along a sum over the steps of paths, of an advantage times the gradient of a score:

    ∇φ̂ = (1/n) Σ_i Σ_t γ_uᵗ [ ∇f_t + (1/τ) A_t ∇h_t ]
    """

    STATE: ClassVar[tuple[str, ...]] = ("upper_q",)

    def _begin_rival(
        self,
        problem: SampledProblem,
        simulator: FiniteSimulator,
        x: variables.Variables,
        *,
        discount: float,
        temperature: Temperature,
        optimiser: Maker,
        batch: int,
        noise: float,
        follower: KnownFollower | None,
        sweeps: int,
    ) -> None:
        self._begin_sampled(
            problem,
            simulator,
            x,
            discount=discount,
            temperature=temperature,
            optimiser=optimiser,
            noise=noise,
            follower=follower,
        )
        check_additive(problem, type(self).__name__)
        self.batch = check_count("batch", batch)
        self.sweeps = check_count("sweeps", sweeps)
        self.upper_q = torch.zeros_like(self.q)

    def hypergradient(self) -> tuple[float, Tensor]:
        problem = self.problem
        assert problem.cost is not None
        table, cost = self._table("reward", problem.reward), self._table("cost", problem.cost)
        checks.check_reward(table)
        check_lower([table], self.x, "`reward`", "reward")
        follower = (
            self._learned(table.detach(), self.sweeps) if self.follower is None else self._played()
        )
        path = self.simulator.rollout(follower, self.batch, problem.steps)
        score, advantage = self._credit(table, cost, follower, path)
        surrogate = additive_surrogate(
            cost[path.observation, path.action] * path.present,
            score,
            temperature=self.tau,
            discount=problem.discount,
            advantage=advantage,
        )
        check_objective(surrogate, self.steps, "cost")
        gradient = hypergradient(surrogate, self.x, self.steps, levels="`cost` or `reward`")
        return float(surrogate.detach()), variables.joined(gradient)

    @abstractmethod
    def _credit(
        self, reward: Tensor, cost: Tensor, follower: FiniteFollower, path: Paths
    ) -> tuple[Tensor, Tensor]:
        """h, whose gradient counts, and A of each step, (n, H) both, zero where none is present."""

    def _sarsa(self, cost: Tensor, follower: FiniteFollower, path: Paths, rate: float) -> Tensor:
        """A_f = Q_f − Σ_a π Q_f, (S, A), after an update at each step of the paths, from the last
        one back, each towards the mean of what is seen there:

            Q(s, a) ← Q(s, a) + α (f(s, a) + γ_u Q(s', a') − Q(s, a))
        """
        states, actions = self.upper_q.shape
        q, f = self.upper_q.flatten().numpy().copy(), cost.flatten().numpy()
        cells = (path.observation * actions + path.action).numpy()
        present = path.present.numpy()
        last = cells.shape[1] - 1  # what follows it is not known
        for t in reversed(range(min(last, longest_of(path.present)))):
            on = present[:, t]
            here, there = cells[on, t], cells[on, t + 1]
            target = f[here] + self.problem.discount * q[there] * present[on, t + 1]
            count = np.bincount(here, minlength=len(q)).clip(min=1)
            q += rate * np.bincount(here, target - q[here], minlength=len(q)) / count
        self.upper_q = torch.from_numpy(q).view(states, actions)
        return self.upper_q - (follower.policy * self.upper_q).sum(-1, keepdim=True)


def check_additive(problem: SampledProblem, name: str) -> None:
    """Refuse a problem whose upper level is no sum over steps."""
    if problem.cost is None or problem.transition is not None:
        what = "a loss of whole paths" if problem.cost is None else "a process that x moves"
        raise OptionError(
            f"the problem has {what}",
            allowed=f"{name} needs a `cost` of each step, and a process that stays",
            fix="give `cost` in place of `loss`" if problem.cost is None else "use another method",
        )
