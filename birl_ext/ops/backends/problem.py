"""The operator T in PyTorch, and what its solvers have in common: the definition that compiled code
is held to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.model.layout import Data
from birl_ext.ops.rows import Rows

__all__ = ["EPS", "LEAST", "Problem", "Sweep", "one_by_one"]

EPS = torch.finfo(torch.float64).eps
LEAST = 5e-324  # no smaller number is positive


class Sweep(NamedTuple):
    """One application of T in relative form: V = c + W, TV − γc = `image`."""

    image: Tensor  # (N, G, S)
    advantage: Tensor  # (N, G, S, A)
    policy: Tensor
    log_policy: Tensor


class Problem(NamedTuple):
    """The data of one solve, with P in float64 and what does not change between sweeps."""

    rows: Rows
    scale: Tensor  # 1/σ, 0 where nothing continues, (N, 1, S, A)
    ends: Tensor  # 1.0 there, else 0.0
    reward: Tensor  # float64
    log_reference: Tensor | None
    available: Tensor | None  # (N, G, S, A); None is everywhere
    discount: Tensor
    temperature: Tensor

    @classmethod
    def of(cls, data: Data) -> Problem:
        reward, reference = data.reward, data.log_reference
        rows = Rows(data.transition.double(), data.crow, data.col, *reward.shape[-2:])
        given = None if reference.numel() == 0 and reference.dim() == 1 else reference
        scale = rows.scale()
        return cls(
            rows,
            scale,
            torch.where(scale > 0, 0.0, 1.0),
            reward.double(),
            given,
            None if given is None else given != -math.inf,
            data.discount,
            data.temperature,
        )

    @property
    def continues(self) -> Tensor:
        return self.scale > 0

    def one(self, n: int, g: int) -> Problem:
        own = slice(n, n + 1), slice(g, g + 1)
        reference = None if self.log_reference is None else self.log_reference[own]
        return Problem(
            self.rows.with_data(self.rows.data[own[0]]),
            self.scale[own[0]],
            self.ends[own[0]],
            self.reward[own],
            reference,
            None if self.available is None else self.available[own],
            self.discount[own],
            self.temperature[own],
        )

    def sweep(self, value: Tensor, offset: Tensor) -> Sweep:
        gamma, tau = self.discount[..., None, None], self.temperature[..., None, None]
        ahead = self.ahead(value) * self.scale
        q = self.reward + gamma * (ahead - self.ends * offset[..., None, None])
        available = self.available
        if available is None or self.log_reference is None:
            top = q.amax(-1, keepdim=True)
            logits = (q - top) / tau
        else:
            top = torch.where(available, q, -math.inf).amax(-1, keepdim=True)
            logits = torch.where(available, (q - top) / tau + self.log_reference, -math.inf)
        log_total = torch.logsumexp(logits, -1, keepdim=True)
        log_policy = logits - log_total
        policy = torch.softmax(logits, -1)
        image = top + tau * log_total
        advantage = q - image
        if available is not None:
            advantage = torch.where(available, advantage, 0.0)
        return Sweep(image.squeeze(-1), advantage, policy, log_policy)

    def policy_product(self, weight: Tensor, vector: Tensor) -> Tensor:
        """P_π v with weight = π/σ, (N, G, S)."""
        return (weight * self.ahead(vector)).sum(-1)

    def ahead(self, vector: Tensor) -> Tensor:
        """Σ_t P(t|s,a) v(t), (N, G, S, A)."""
        return one_by_one(self.rows.apply, vector)


def one_by_one(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The same for the problems (N, G) of a batch one after the other where they share P: BLAS adds
    up several in another order than one, and one would hang on its neighbours.
    """
    if batch.shape[1] == 1 or not batch.is_cpu:
        return function(batch)
    return torch.cat([function(one) for one in batch.split(1, 1)], 1)
