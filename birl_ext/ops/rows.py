"""Linear algebra over the rows P(·|s,a) of a transition: dense or CSR, differentiable, in plain
PyTorch.

Rows are read as P/σ with σ = Σ_t P(t|s,a), so that the derivative with respect to P is that of
P ↦ f(P/σ), orthogonal to each row; a row with σ = 0 has no continuation. Shapes: dense `data`
(N, S, A, S); CSR `data` (N, nnz) with `crow` (S·A + 1,) and `col` (nnz,). G problems share each of
the N transitions. Vectors are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "widened"]


class Rows(NamedTuple):
    """The rows of N transitions over S states and A actions."""

    data: Tensor
    crow: Tensor
    col: Tensor
    states: int
    actions: int

    @property
    def dense(self) -> bool:
        return self.data.dim() == 4

    @property
    def model(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a compiled module is given of it."""
        return self.data.contiguous(), self.crow, self.col

    @property
    def longest(self) -> int:
        """The most entries of a row that are stored."""
        return self.states if self.dense else int(self.crow.diff().amax())

    @property
    def _row(self) -> Tensor:
        """Row index s·A + a of each stored entry, (nnz,)."""
        rows = torch.arange(self.states * self.actions, device=self.crow.device)
        return torch.repeat_interleave(rows, self.crow.diff(), output_size=self.col.shape[0])

    @property
    def entry_rows(self) -> Tensor:
        """Row index s·A + a of each entry of one `data[n]`, flattened."""
        if not self.dense:
            return self._row
        rows = torch.arange(self.states * self.actions, device=self.data.device)
        return rows.repeat_interleave(self.states)

    def with_data(self, data: Tensor) -> Rows:
        """The same pattern with other entries (a tangent, say)."""
        return self._replace(data=data)

    def sums(self) -> Tensor:
        """σ(s,a) = Σ_t P(t|s,a), (N, 1, S, A)."""
        if self.dense:
            return self.data.sum(-1, dtype=torch.float64).unsqueeze(1)
        return self._scatter_rows(self.data.double().unsqueeze(1))

    def scale(self) -> Tensor:
        """1/σ(s,a), and 0 for a row without continuation, (N, 1, S, A)."""
        sums = self.sums()
        continues = sums > 0
        return torch.where(continues, 1.0, 0.0) / torch.where(continues, sums, 1.0)

    def apply(self, vector: Tensor) -> Tensor:
        """Σ_t P(t|s,a) v(t): (N, G, S) → (N, G, S, A)."""
        if self.dense:
            product = vector @ self._matrix(self.data.double()).mT
            return self._by_action(product)
        entries = self.data.double().unsqueeze(1) * vector.index_select(-1, self.col)
        return self._scatter_rows(entries)

    def pull(self, weight: Tensor) -> Tensor:
        """Σ_{s,a} w(s,a) P(t|s,a): (N, G, S, A) → (N, G, S)."""
        if self.dense:
            return _joined(weight) @ self._matrix(self.data.double())
        entries = self.data.double().unsqueeze(1) * _joined(weight).index_select(-1, self._row)
        zeros = entries.new_zeros((*entries.shape[:-1], self.states))
        return zeros.index_add(-1, self.col, entries)

    def outer(self, weight: Tensor, vector: Tensor, shift: Tensor) -> Tensor:
        """Σ_g w(s,a) v(t) − shift(s,a) on the pattern of P, in the dtype of P.

        weight (N, G, S, A), vector (N, G, S), shift (N, S, A) → shape of `data`.
        """
        dtype = self.data.dtype
        if self.dense:
            product = _full_product(_joined(weight).mT.to(dtype), vector.to(dtype))
            product = product - _joined(shift).unsqueeze(-1).to(dtype)
            return product.reshape(-1, self.states, self.actions, self.states)
        row = self._row
        product = _joined(weight).index_select(-1, row) * vector.index_select(-1, self.col)
        return (product.sum(1) - _joined(shift).index_select(-1, row)).to(dtype)

    def policy_matrix(self, policy: Tensor) -> Tensor:
        """P_π(s,t) = Σ_a π(s,a) P(t|s,a), with P as stored: (N, G, S, A) → (N, G, S, S)."""
        if self.dense:
            by_state = self.data.double()  # (N, S, A, S)
            return (policy.permute(0, 2, 1, 3) @ by_state).permute(0, 2, 1, 3)
        row = self._row
        entries = self.data.double().unsqueeze(1) * _joined(policy).index_select(-1, row)
        cell = torch.div(row, self.actions, rounding_mode="floor") * self.states + self.col
        zeros = entries.new_zeros((*entries.shape[:-1], self.states * self.states))
        return zeros.index_add(-1, cell, entries).reshape(
            *entries.shape[:-1], self.states, self.states
        )

    def _scatter_rows(self, entries: Tensor) -> Tensor:
        """Sum entries (N, G, nnz) into their rows, (N, G, S, A)."""
        zeros = entries.new_zeros((*entries.shape[:-1], self.states * self.actions))
        return self._by_action(zeros.index_add(-1, self._row, entries))

    def _matrix(self, data: Tensor) -> Tensor:
        """Dense rows below each other, (N, S·A, S)."""
        return data.reshape(-1, self.states * self.actions, self.states)

    def _by_action(self, table: Tensor) -> Tensor:
        """(…, S·A) → (…, S, A)."""
        return table.reshape(*table.shape[:-1], self.states, self.actions)


def widened(policy: Tensor) -> Tensor:
    """The policy of a solution in float64, summing to one where a narrower dtype misses that. To a
    derivative the sum is a constant.

    I − γP_π would take what is missing for a leak, and 1/(1 − γ) would magnify it.
    """
    if policy.dtype == torch.float64:
        return policy
    wide = policy.double()
    return wide / wide.detach().sum(-1, keepdim=True)


def _joined(table: Tensor) -> Tensor:
    """(…, S, A) → (…, S·A). Not `flatten`, for which PyTorch's older vmap has no rule."""
    return table.reshape(*table.shape[:-2], table.shape[-2] * table.shape[-1])


def _full_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in their own dtype, in a region of autocast too: it would round float32."""
    if torch.is_autocast_enabled(left.device.type):
        with torch.autocast(left.device.type, enabled=False):
            return left @ right
    return left @ right
