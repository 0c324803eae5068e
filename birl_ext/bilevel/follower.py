"""Followers: what answers a model with a policy, exactly or after a few sweeps."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from birl_ext.bilevel.guards import check_count, check_kind, check_number
from birl_ext.errors import ShapeError
from birl_ext.functional import solve
from birl_ext.model import checks
from birl_ext.model.layout import Flat
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.ops.bellman import bellman
from birl_ext.solution import Solution, info_table

__all__ = ["Approach", "Exact", "Follower", "Sweeps", "approximate"]

_Problem = TypeVar("_Problem", bound=Any)
"""A BilevelProblem, or another dataclass with a `lower` of x."""


class Approach(NamedTuple):
    """How far a follower has come: its policy is that of one sweep further on."""

    value: Tensor
    """V, (*B, S), without a graph."""
    error_bound: Tensor
    """Certified bound on ‖V − V*‖∞, (*B,), and on that of one sweep further on."""
    sweeps: int
    """Passes over the transition, with the one that is still to come."""


class Follower(abc.ABC):
    """What answers a model with a Solution; it has no state, an algorithm carries its value."""

    def applied(self, problem: _Problem) -> tuple[_Problem, Follower]:
        """The problem whose `lower` is what it really solves, and who solves that."""
        return problem, self

    @abc.abstractmethod
    def approach(
        self, mdp: DenseMDP | SparseMDP, temperature: float | Tensor, carried: Tensor | None = None
    ) -> Approach:
        """The value that the last sweep starts from, without a graph.

        Args:
            mdp: the model.
            temperature: τ, a number or (*B).
            carried: V of the outer step before, (*B, S); None: there was none.
        """

    def answer(
        self, mdp: DenseMDP | SparseMDP, temperature: float | Tensor, carried: Tensor | None = None
    ) -> Solution:
        """Its value and policy, with a certified bound on ‖V − V*‖∞ and by it on log π.

        Args: as in `approach`.

        Raises: as `birl_ext.solve`.

        Gradients: of `Exact` alone; others answer without a graph.
        """
        with torch.no_grad():
            near = self.approach(mdp, temperature, carried)
            flat = mdp.flatten(temperature)
            swept = bellman(flat.data, flat.layout.grouped(near.value.double(), 1))
            return approximate(flat, *swept, near.error_bound, near.sweeps)


@dataclass(frozen=True)
class Exact(Follower):
    """The soft-optimal policy, as `birl_ext.solve` finds it.

    Args:
        tol: certified relative error asked of the value; None: as far as rounding allows.
    """

    tol: float | None = None

    def __post_init__(self) -> None:
        if self.tol is not None:
            check_number("tol", self.tol)

    def approach(
        self, mdp: DenseMDP | SparseMDP, temperature: float | Tensor, carried: Tensor | None = None
    ) -> Approach:
        with torch.no_grad():
            found = self.answer(mdp, temperature, carried)
        return Approach(found.value, found.error_bound, int(found.iterations.max()))

    def answer(
        self, mdp: DenseMDP | SparseMDP, temperature: float | Tensor, carried: Tensor | None = None
    ) -> Solution:
        return solve(mdp, temperature=temperature, initial=carried, tol=self.tol)


@dataclass(frozen=True)
class Sweeps(Follower):
    """K soft-Bellman sweeps (M1)-(M3): V_K = Tᴷ V_0 and the policy of Q_K = r + γPV_{K−1}.

    Args:
        count: K.
        carry: V_0 is the value of the outer step before; else, and in the first one, zero.
        tol: fewer sweeps do once they promise this relative error of the value; None: all K.

    Source: (M5) for its error.
    """

    count: int
    carry: bool = True
    tol: float | None = None

    def __post_init__(self) -> None:
        check_count("count", self.count)
        check_kind("carry", self.carry, bool)
        if self.tol is not None:
            check_number("tol", self.tol)

    def approach(
        self, mdp: DenseMDP | SparseMDP, temperature: float | Tensor, carried: Tensor | None = None
    ) -> Approach:
        flat = mdp.flatten(temperature)
        data, layout = flat
        value = first_value(flat, carried if self.carry else None)
        taken = 1
        with torch.no_grad():
            for _ in range(self.count - 1):
                before, (value, _, _, _) = value, bellman(data, value)
                taken += 1
                if self.tol is None:
                    continue
                moved = (value - before).abs().amax(-1) * data.discount / (1 - data.discount)
                size = torch.maximum(value.abs().amax(-1), data.temperature)
                if bool((moved <= self.tol * size).all()):
                    break
            value = layout.restore(value).to(mdp.reward.dtype)
            near = solve(
                mdp,
                temperature=temperature,
                initial=value,
                method="value-iteration",
                max_iterations=1,
                on_fail="status",
            )
        if not bool(near.error_bound.isfinite().all()):
            checks.check_reward(mdp.reward)
        value = value.expand_as(near.value)
        off = (near.value.double() - value.double()).abs().amax(-1)
        return Approach(value, near.error_bound + off, taken)


def first_value(flat: Flat, carried: Tensor | None) -> Tensor:
    """V_0, (N, G, S): what was carried over, (*B, S), or zero."""
    states, batch = flat.data.reward.shape[-2], flat.layout.batch_shape
    if carried is None:
        carried = flat.data.reward.new_zeros(states)
    elif carried.shape[-1:] != (states,) or _wider(carried.shape[:-1], batch):
        raise ShapeError(
            f"the value that the last step left is of shape {tuple(carried.shape)}",
            allowed=f"{(*batch, states)}, by the MDP of `lower`",
            fix="keep the shape of the MDP, or begin anew",
        )
    return flat.layout.grouped(carried.detach().double(), 1)


def _wider(own: Sequence[int], batch: Sequence[int]) -> bool:
    """Whether a value of batch `own` is none for `batch`; fewer axes, or ones, may have been."""
    return len(own) > len(batch) or any(
        n not in (1, m) for n, m in zip(reversed(own), reversed(batch), strict=False)
    )


def approximate(
    flat: Flat,
    value: Tensor,
    advantage: Tensor,
    policy: Tensor,
    log_policy: Tensor,
    error: Tensor,
    sweeps: int = 0,
) -> Solution:
    """What nothing has solved, as a Solution.

    Args:
        flat: the model.
        value: (N, G, S).
        advantage, policy, log_policy: (N, G, S, A).
        error: certified bound on ‖V − V*‖∞, (*B).
        sweeps: passes over the transition that it took.
    """
    restore, available = flat.layout.restore, flat.data.available

    def out(table: Tensor) -> Tensor:
        return restore(table).to(flat.data.reward.dtype)

    info = info_table(
        error.shape,
        value.shape[-1],
        error.device,
        residual=error,
        error_bound=error,
        passes=sweeps,
        temperature=restore(flat.data.temperature.detach()),
        kernel=torch.nan,
    )
    solution = Solution(
        value=out(value),
        q=out(advantage + value.unsqueeze(-1)),
        policy=out(policy),
        log_policy=out(log_policy),
        advantage=out(advantage),
        info=info,
        status=torch.zeros_like(error, dtype=torch.int64),
    )
    return solution if available is None else solution.closed(restore(available))
