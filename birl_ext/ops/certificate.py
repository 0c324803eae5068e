"""The rounding of a sweep made from Python, as csrc/cpu/solvers/certificate.h counts it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from birl_ext.model.layout import Data

__all__ = ["sweep_rounding"]

_EPS = torch.finfo(torch.float64).eps


def sweep_rounding(data: Data, value: Tensor) -> Tensor:
    """Bound on the rounding error of one component of δ = TV − V, (N, G).

    Eight units for the handful of operations after the sums, and half an ulp for each dependent
    addition in those over states and actions, of the size of the numbers that enter.

    Args:
        data: the problem in normal form.
        value: V, (N, G, S).
    """
    states, actions = data.reward.shape[-2:]
    reward = data.reward.double().abs()
    reference: Tensor | float = 0.0
    if data.log_reference.dim() > 1:
        available = data.log_reference > -math.inf
        reward = torch.where(available, reward, 0.0)
        reference = torch.where(available, data.log_reference, 0.0).abs().amax((-1, -2))
    if data.transition.dim() == 4:
        additions = states // 16 + 4 + states % 16
    else:
        additions = int(data.crow.diff().max()) // 4 + 6
    size = reward.amax((-1, -2)) + 2 * value.abs().amax(-1)
    size = size + data.temperature * (1 + math.log(actions) + reference)
    return (8 + additions + min(actions, 64) / 2) * _EPS * size
