"""A bilevel problem whose upper level is a discounted sum over the follower's path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from birl_ext.bilevel.guards import check_callable
from birl_ext.bilevel.problem import BilevelProblem
from birl_ext.bilevel.variables import Variables, starts
from birl_ext.errors import DtypeError, OptionError, ShapeError
from birl_ext.functional import evaluate
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.solution import Solution

__all__ = ["AdditiveProblem"]


@dataclass(frozen=True)
class AdditiveProblem:
    """min over x of φ(x) = −mean over contexts of E[ Σ_t γ_uᵗ g_x(s_t, a_t) ] over the path of
    π*(x).

    Args:
        lower: x → DenseMDP or SparseMDP with batch (*B); its axes after the starts, if there are
            any, are contexts.
        reward: x → g, (S, A), or with batch axes that broadcast to (*B, S, A).
        initial_distribution: of s_0, (S,), or (*B, S); None: that of the lower level.
        discount: γ_u, in [0, 1); None: that of the lower level.
    """

    lower: Callable[[Any], DenseMDP | SparseMDP]
    reward: Callable[[Any], Tensor]
    initial_distribution: Tensor | None = None
    discount: float | None = None

    def __post_init__(self) -> None:
        check_callable("lower", self.lower)
        check_callable("reward", self.reward)
        if self.initial_distribution is not None:
            start = checks.as_floating("initial_distribution", self.initial_distribution)
            checks.check_initial_distribution(start)
        if self.discount is not None:
            checks.check_discount(self.discount)

    def bilevel(self) -> BilevelProblem:
        """The same for the methods that take any upper level."""
        return BilevelProblem(self.lower, self._upper)

    def model(self, x: Variables) -> DenseMDP | SparseMDP:
        """The lower level at x, if it is one."""
        return self.bilevel().model(x)

    def gain(self, x: Variables, mdp: DenseMDP | SparseMDP) -> Tensor:
        """g, if it is a table for the model."""
        gain = self.reward(x)
        if not isinstance(gain, Tensor) or gain.dtype != mdp.dtype:
            kind = f"tensor of {gain.dtype}" if isinstance(gain, Tensor) else type(gain).__name__
            raise DtypeError(f"reward returned a {kind}", allowed=f"a tensor of {mdp.dtype}")
        own = (mdp.states, mdp.actions)
        if tuple(gain.shape[-2:]) != own:
            raise ShapeError(
                f"reward returned shape {tuple(gain.shape)}",
                allowed=f"(S, A) = {own}, or batch axes before it",
            )
        return gain

    def first(self, mdp: DenseMDP | SparseMDP) -> Tensor:
        """The distribution of s_0."""
        start = self.initial_distribution
        if start is None:
            start = mdp.initial_distribution
        if start is None:
            raise OptionError(
                "initial_distribution is None, and the lower level has none",
                allowed="a probability vector, (S,) or (*B, S)",
                fix="give it to one of the two",
            )
        return start.to(mdp.reward)

    def mean(self, values: Tensor, x: Variables) -> Tensor:
        """Mean over contexts, (*B, …) to a scalar or (M,)."""
        return values.reshape(*starts(x), -1).mean(-1)

    def _upper(self, x: Any, solution: Solution) -> Tensor:
        mdp = self.model(x)
        changes: dict[str, Any] = {"reward": self.gain(x, mdp)}
        if self.discount is not None:
            changes["discount"] = self.discount
        value = evaluate(solution.policy, mdp.replace(validate="off", **changes))
        return -self.mean((value * self.first(mdp)).sum(-1), x)


def table_slopes(table: Tensor, x: Variables, parts: list[Tensor]) -> Tensor:
    """∂/∂x of every entry, (*shape, d): one pass for each of the d numbers of x, for all starts at
    once.

    Args:
        table: its leading axis is that of the starts, if x has any.
        x: it tells the starts.
        parts: the leaves of x.
    """
    own, leading = sum(part.numel() for part in parts), starts(x)
    size = own // leading.numel() if leading else own
    zeros = table.new_zeros((*table.shape, size)).detach()
    if not table.requires_grad:
        return zeros
    seed = torch.zeros_like(table, requires_grad=True)
    pulled = torch.autograd.grad(table, parts, seed, create_graph=True, materialize_grads=True)
    joined = torch.cat([part.reshape(*leading, -1) for part in pulled], -1)
    if not joined.requires_grad:
        return zeros
    columns = [
        torch.autograd.grad(entry.sum(), seed, retain_graph=True, materialize_grads=True)[0]
        for entry in joined.unbind(-1)
    ]
    return torch.stack(columns, -1).detach()
