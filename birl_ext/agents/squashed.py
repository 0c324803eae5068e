"""The tanh-squashed Gaussian: a density over a box of actions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["SquashedGaussian", "log_slope"]

# log σ outside this range is either noise that no critic can follow, or a density that overflows.
_LOG_STD_RANGE = (-20.0, 2.0)


class SquashedGaussian:
    """u = tanh(z) in (−1, 1)^d with z ~ N(mean, σ²), independent entries.

        log p(u) = Σ_i [ log N(z_i; mean_i, σ_i²) − log(1 − tanh² z_i) ]

    Args:
        mean: (n, d).
        log_std: log σ, (n, d), clipped to [−20, 2].
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean
        self.log_std = log_std.clamp(*_LOG_STD_RANGE)

    def rsample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """u and log p(u), (n, d) and (n,), differentiable in mean and σ."""
        noise = torch.randn(
            self.mean.shape,
            generator=generator,
            dtype=self.mean.dtype,
            device=self.mean.device,
        )
        z = self.mean + self.log_std.exp() * noise
        return z.tanh(), self._log_prob(z, noise)

    def mode(self) -> Tensor:
        """tanh(mean), (n, d): the image of the most likely z."""
        return self.mean.tanh()

    def log_prob(self, u: Tensor) -> Tensor:
        """log p(u), (n,); u is taken as the nearest point inside the box that has a finite z."""
        most = 1 - torch.finfo(u.dtype).eps
        z = u.clamp(-most, most).atanh()
        return self._log_prob(z, (z - self.mean) / self.log_std.exp())

    def _log_prob(self, z: Tensor, noise: Tensor) -> Tensor:
        gaussian = -0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return (gaussian - log_slope(z)).sum(-1)


def log_slope(z: Tensor) -> Tensor:
    """log(1 − tanh² z) = 2 (log 2 − z − log(1 + e^−2z)), which does not cancel at large |z|."""
    return 2 * (math.log(2) - z - torch.nn.functional.softplus(-2 * z))
