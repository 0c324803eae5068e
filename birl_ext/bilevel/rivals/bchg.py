"""BC-HG: the Boltzmann covariance hyper-gradient (Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.guards import check_count, check_number
from birl_ext.bilevel.problem import Temperature
from birl_ext.bilevel.rivals.sampled_rival import SampledRival
from birl_ext.bilevel.rivals.tables import returns_to_go
from birl_ext.bilevel.sampled import KnownFollower, SampledProblem
from birl_ext.errors import OptionError
from birl_ext.model.checks import check_memory
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

__all__ = ["BCHG"]

Lower = Literal["paths", "critic"]


class BCHG(SampledRival):
    """The upper level's advantage times what follows of the reward's gradient, along one path.

        ∇φ̂ = (1/n) Σ_i Σ_t γ_uᵗ [ ∇f_t + (1/τ) A_f(s_t, a_t) Σ_{k≥t} γᵏ⁻ᵗ ∇r(s_k, a_k) ]

    Under a Boltzmann policy the derivative of an expectation is a covariance, and A_f has no mean:
    so ∇Q need not have its mean ∇V subtracted, and its one sample on the path will do, since A_f
    is learned from other samples. Summed the other way, ∇r_k is weighed by the advantages up to it.

    A_f = Q_f − Σ_a π Q_f is of a table that is kept from step to step and learns by expected SARSA
    from a replay of every transition drawn so far, of which f and π are the present ones:

        Q_f(s, a) ← Q_f(s, a) + α (f(s, a) + γ_u Σ_a' π(a'|s') Q_f(s', a') − Q_f(s, a))

    Args:
        problem: reward and `cost`.
        simulator: draws the paths; all randomness is its generator.
        x: start, (d,), or a list, tuple or dict of tensors, or a module; copied.
        discount: γ of the lower level.
        temperature: τ, units of reward, or a schedule of it.
        optimiser: from a list of parameters to any torch optimiser.
        batch: n, paths of H steps per outer step.
        replays: minibatches per outer step that the critic learns from; 0: it learns by SARSA from
            the paths of the step alone, as in the published code.
        minibatch: transitions each.
        capacity: transitions that are kept; the latest.
        rate: α, (0, 1].
        lower: where ∇Q comes from. "paths": what follows on the one path, as published. "critic": a
            table of visits M = E[Σ γᵏ 1[s_k, a_k]], (S·A, S·A), so that ∇Q = M ∇r, which learns by
            expected SARSA from the same replay; both critics are then summed over the actions, and
            the noise left is that of the states which are visited. Its error is bias.
        noise: standard deviation of Gaussian noise added to the hyper-gradient, units of φ per unit
            of x.
        follower: (x, τ) → its policy, (S, A), where it is known, as in the published code. None:
            soft Q-learning.
        sweeps: of that learning per outer step, samples of every (s, a).

    Source: Kudo et al. (2026), equation (8); the replay is a choice made here, and the lower critic
    is of Dayan (1993).
    """

    STATE = ("_kept", "_count", "_visits")

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
        replays: int = 20,
        minibatch: int = 1000,
        capacity: int = 100_000,
        rate: float = 0.5,
        lower: Lower = "paths",
        noise: float = 0.0,
        follower: KnownFollower | None = None,
        sweeps: int = 10,
    ) -> None:
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
        self.replays = check_count("replays", replays, 0)
        self.minibatch = check_count("minibatch", minibatch)
        self.capacity = check_count("capacity", capacity)
        self.rate = check_number("rate", rate, above=True, below=1.0 + 1e-12)
        if lower not in ("paths", "critic"):
            raise OptionError(f"lower is {lower!r}", allowed="'paths' or 'critic'")
        if lower == "critic" and not self.replays:
            raise OptionError(
                "lower is 'critic', and replays is 0",
                allowed="1 or more: it learns from the replay",
            )
        self.lower: Lower = lower
        rows = self.q.numel() if lower == "critic" else 0
        check_memory(f"the visits of {rows} pairs", 3 * rows**2, fix='say lower="paths"')
        self._visits = torch.eye(rows, dtype=torch.float64)
        # (s, a) as one number, s' and whether there is one
        self._kept = torch.zeros(self.capacity, 3, dtype=torch.int64)
        self._count = 0

    def _credit(
        self, reward: Tensor, cost: Tensor, follower: FiniteFollower, path: Paths
    ) -> tuple[Tensor, Tensor]:
        here, policy = (path.observation, path.action), follower.policy
        if self.replays:
            self._keep(path)
            advantage = self._learn_critic(cost.detach(), policy)
        else:
            advantage = self._sarsa(cost.detach(), follower, path, self.rate)
        if self.lower == "critic":
            q = (self._visits @ reward.to(self._visits).flatten()).view_as(policy)
            present = path.present.unsqueeze(-1)
            return q[here[0]] * present, (policy * advantage)[here[0]] * present
        score = returns_to_go(reward[here], path.present, self.discount) * path.present
        return score, advantage[here] * path.present

    def _keep(self, path: Paths) -> None:
        """Take the transitions of the paths into the replay, over the oldest."""
        here = path.observation * self.simulator.actions + path.action
        known = path.present[:, :-1]
        rows = torch.stack((here[:, :-1], path.observation[:, 1:], path.present[:, 1:].long()), -1)[
            known
        ][-self.capacity :]
        place = (self._count + torch.arange(len(rows))) % self.capacity
        self._kept = self._kept.index_copy(0, place, rows)
        self._count += len(rows)

    def _learn_critic(self, cost: Tensor, policy: Tensor) -> Tensor:
        """A_f, (S, A), after the minibatches."""
        q, f = self.upper_q.flatten(), cost.flatten()
        size = min(self._count, self.capacity)
        generator = self.simulator.generator
        for _ in range(self.replays if size else 0):
            drawn = torch.randint(size, (self.minibatch,), generator=generator)
            here, there, goes_on = self._kept[drawn].unbind(-1)
            mean = (policy * q.view_as(policy)).sum(-1)
            target = f[here] + self.problem.discount * mean[there] * goes_on
            count = torch.bincount(here, minlength=len(q)).clamp(min=1)
            gap = torch.zeros_like(q).index_add(0, here, target - q[here]) / count
            q = q + self.rate * gap
            if self.lower == "critic":
                self._learn_visits(policy, here, there, goes_on, count)
        self.upper_q = q.view_as(policy)
        return self.upper_q - (policy * self.upper_q).sum(-1, keepdim=True)

    def _learn_visits(
        self, policy: Tensor, here: Tensor, there: Tensor, goes_on: Tensor, count: Tensor
    ) -> None:
        """M(s, a; ·) ← M + α (1[s, a] + γ Σ_a' π(a'|s') M(s', a'; ·) − M), of one minibatch."""
        visits = self._visits
        mean = torch.einsum("sa,sak->sk", policy, visits.view(*policy.shape, -1))
        # of each (s, a) that was drawn, where it led: a mean over its draws
        led = torch.zeros(len(count), len(mean), dtype=torch.float64)
        led = led.index_put((here, there), goes_on.double(), accumulate=True)
        target = torch.eye(len(count), dtype=torch.float64)
        target = target + self.discount * (led / count.unsqueeze(-1)) @ mean
        drawn = torch.zeros(len(count), dtype=torch.bool).index_fill(0, here, True)
        self._visits = torch.where(
            drawn.unsqueeze(-1), visits + self.rate * (target - visits), visits
        )
