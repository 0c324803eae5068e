"""The score's part of a hyper-gradient: averaged over updates, shrunk by the noise left in it."""

from __future__ import annotations

import torch
from torch import Tensor

from birl_ext.bilevel.guards import check_number
from birl_ext.state import Stateful

__all__ = ["ScoreAverage"]


class ScoreAverage(Stateful):
    """An average m of noisy gradients g_t, of which no more is used than its noise leaves.

        m_t = Σ_s w_s g_s,   w_s ∝ βᵗ⁻ˢ, Σ w_s = 1,
        σ²_t = Σ_s w_s ‖g_s − m_{s−1}‖²/(1 + c_{s−1}),   c_t = Σ w_s²,
        used: max(0, 1 − c_t σ²_t/‖m_t‖²) m_t

    c σ² is the square of the average's standard error, measured from how far each update is from
    the average before it; where the gradient itself moves, that counts as noise. What is made from
    the same data again and again has their error, too: c + n/N in place of c. Before the second
    update nothing is known of it, and nothing is used. β = 0 uses every g_t as it is.

    Args:
        size: numbers in g.
        decay: β, [0, 1): an average over about 1/(1 − β) updates.
        like: a tensor of the dtype and device of g.

    Source: the shrinkage: James and Stein (1961), the positive part.
    """

    STATE = ("mean", "_spread", "_mass", "_squares", "_spread_mass", "_shared")

    def __init__(self, size: int, decay: float, like: Tensor) -> None:
        self.decay = check_number("average", decay, below=1.0)
        self.mean = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._spread = self._mass = self._squares = self._spread_mass = self._shared = 0.0

    def after(self, gradient: Tensor, *, shared: float = 0.0) -> ScoreAverage:
        """The average with one more gradient, (size,).

        Args:
            shared: of its variance, what others share because they are made from the same few
                data: n/N where each is the mean of n of N. No average takes that away.
        """
        new = ScoreAverage(0, self.decay, self.mean)
        new._shared = shared
        keep, add = self.decay, 1.0 - self.decay
        new._mass = keep * self._mass + add
        new._squares = keep**2 * self._squares + add**2
        new._spread, new._spread_mass = keep * self._spread, keep * self._spread_mass
        new.mean = self.mean + (gradient - self.mean) * (add / new._mass)
        if self._mass:
            apart = float((gradient - self.mean).double().square().sum())
            new._spread += add * apart / (1 + self._squares / self._mass**2)
            new._spread_mass += add
        return new

    @property
    def kept(self) -> float:
        """max(0, 1 − c σ²/‖m‖²): one where the noise is nothing."""
        if not self.decay:
            return 1.0
        size = float(self.mean.double().square().sum())
        if not (self._spread_mass and size):
            return 0.0
        share = self._squares / self._mass**2 + self._shared
        noise = share * self._spread / self._spread_mass
        return max(0.0, 1.0 - noise / size)
