"""The score's part of a hyper-gradient: averaged over updates, shrunk by the noise left in it."""

from __future__ import annotations

import torch
from torch import Tensor

from birl_ext.bilevel.guards import check_number
from birl_ext.state import Stateful

__all__ = ["ScoreAverage", "signed"]


class ScoreAverage(Stateful):
    """An average m of noisy gradients g_t, of which no more is used than its noise leaves.

        m_t = Σ_s w_s g_s,   w_s ∝ βᵗ⁻ˢ, Σ w_s = 1,   σ²_t = Σ_s w_s v_s,
        c_t = (1 − ρ) Σ_s w_s² + ρ Σ_k (Σ_{s in k} w_s)²,   ρ_t = Σ_s w_s n_s/N_s,
        used: max(0, 1 − c_t σ²_t/‖m_t‖²) m_t

    v is the variance of g, measured inside its batch (`signed`). Updates whose n data are drawn
    from the same pool k of N, again and again, share an error that no average over them takes away:
    two of them have the covariance v n/N. β = 0 uses every g_t as it is.

    Args:
        size: numbers in g.
        decay: β, [0, 1): an average over about 1/(1 − β) updates.
        like: a tensor of the dtype and device of g.

    Source: the shrinkage: James and Stein (1961), the positive part.
    """

    STATE = ("mean", "_variance", "_mass", "_squares", "_shared", "_closed", "_open")

    def __init__(self, size: int, decay: float, like: Tensor) -> None:
        self.decay = check_number("average", decay, below=1.0)
        self.mean = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._variance = self._shared = 0.0  # Σ w v, Σ w n/N
        self._mass = self._squares = 0.0  # Σ w, Σ w²
        self._closed = self._open = 0.0  # Σ (Σ w)² of the pools before, Σ w of the present one

    def after(
        self, gradient: Tensor, variance: float, *, shared: float = 0.0, renewed: bool = False
    ) -> ScoreAverage:
        """The average with one more gradient, (size,).

        Args:
            variance: of the gradient, the sum over its numbers.
            shared: n/N; zero where all data are new.
            renewed: the pool is another one than that of the gradient before.
        """
        new = ScoreAverage(0, self.decay, self.mean)
        keep, add = self.decay, 1.0 - self.decay
        new._mass = keep * self._mass + add
        new._squares = keep**2 * self._squares + add**2
        new._variance = keep * self._variance + add * variance
        new._shared = keep * self._shared + add * shared
        before = (self._closed + self._open**2, 0.0) if renewed else (self._closed, self._open)
        new._closed, new._open = keep**2 * before[0], keep * before[1] + add
        new.mean = self.mean + (gradient - self.mean) * (add / new._mass)
        return new

    @property
    def kept(self) -> float:
        """max(0, 1 − c σ²/‖m‖²): one where the noise is nothing."""
        if not self.decay:
            return 1.0
        size = float(self.mean.double().square().sum())
        if not size:
            return 0.0
        shared = self._shared / self._mass
        pools = self._closed + self._open**2
        left = ((1 - shared) * self._squares + shared * pools) / self._mass**2
        return max(0.0, 1.0 - left * self._variance / self._mass / size)


def signed(terms: Tensor) -> Tensor:
    """Terms u_i, (n, …), times factors of both signs in turn, so that their sum has the square that
    the variance of Σ_i u_i has in the mean, of independent u_i of one law: it is the difference of
    the two halves of a batch. Of one term nothing is known: all of it counts as noise.
    """
    count = len(terms)
    first = (count + 1) // 2
    if count < 2:
        return terms
    ratio = ((count - first) / first) ** 0.5
    factors = terms.new_full((count,), -1 / ratio)
    factors[::2] = ratio
    return factors.view(-1, *[1] * (terms.dim() - 1)) * terms
