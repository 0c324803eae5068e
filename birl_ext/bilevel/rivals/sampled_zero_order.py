"""Zero order from samples: a difference of returns in one direction, without any derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.guards import check_count, check_gradient, check_number, check_objective
from birl_ext.bilevel.problem import Temperature
from birl_ext.bilevel.sampled import KnownFollower, SampledDescent, SampledProblem
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator

__all__ = ["SampledZeroOrder"]


class SampledZeroOrder(SampledDescent):
    """Two batches of paths per outer step, at two points in one Gaussian direction.

        ∇φ̂ = (J(x + uZ) − J(x)) Z/u,   Z ~ N(0, I),   J a mean over n paths

    Its mean is the gradient of φ smoothed by N(0, u²I). Its variance grows with the number of
    variables, and with the noise of J over u².

    Args:
        problem: reward, and `cost` or `loss`; where x moves the process, each point has its own.
        simulator: draws the paths; all randomness is its generator.
        x: start, (d,), or a list, tuple or dict of tensors, or a module; copied.
        discount: γ of the lower level.
        temperature: τ, units of reward, or a schedule of it.
        optimiser: from a list of parameters to any torch optimiser.
        batch: n, at each point.
        radius: u, units of x.
        noise: standard deviation of Gaussian noise added to the hyper-gradient, units of φ per unit
            of x.
        follower: (x, τ) → its policy, (S, A), where it is known. None: soft Q-learning, at either
            point from the table that the last step left at x.
        sweeps: of that learning at each point, samples of every (s, a).

    Source: Nesterov and Spokoiny (2017); with exact values as a rival in Thoma et al. (2024).
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
        radius: float,
        noise: float = 0.0,
        follower: KnownFollower | None = None,
        sweeps: int = 10,
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
        self.batch = check_count("batch", batch)
        self.radius = check_number("radius", radius, above=True)
        self.sweeps = check_count("sweeps", sweeps)

    def hypergradient(self) -> tuple[float, Tensor]:
        own = variables.leaves(self.x)
        direction = [variables.drawn(leaf, self.simulator.generator) for leaf in own]
        aside = variables.rebuilt(
            self.x, [leaf + self.radius * z for leaf, z in zip(own, direction, strict=True)]
        )
        with torch.no_grad():
            before = self.q.clone()
            there = self._mean_return(aside)
            self.q = before
            here = self._mean_return(self.x)
        for objective in (here, there):
            check_objective(objective, self.steps, "cost" if self.problem.cost else "loss")
        gradient = (there - here) / self.radius * variables.joined(direction)
        check_gradient(gradient, self.steps)
        return float(here), gradient

    def _mean_return(self, x: Any) -> Tensor:
        """J at x, of as many paths."""
        problem = self.problem
        if problem.transition is not None:
            self.simulator.adapt(problem.transition(x))
        if self.follower is None:
            follower = self._learned(self._table("reward", problem.reward, x), self.sweeps)
        else:
            follower = self._played(x)
        return self._sampled_objective(x, follower)

    def _sampled_objective(self, x: Any, follower: FiniteFollower) -> Tensor:
        problem, simulator = self.problem, self.simulator
        if problem.loss is not None:
            paths = [
                simulator.rollout(follower, self.batch, problem.steps) for _ in range(problem.paths)
            ]
            return problem.loss(x, paths).mean()
        assert problem.cost is not None
        path = simulator.rollout(follower, self.batch, problem.steps)
        paid = self._table("cost", problem.cost, x)[path.observation, path.action] * path.present
        powers = problem.discount ** torch.arange(problem.steps, dtype=paid.dtype)
        return (paid @ powers).mean()
