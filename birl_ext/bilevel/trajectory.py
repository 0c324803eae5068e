"""The hyper-gradient of a loss of sampled trajectories (M16), (M17)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from birl_ext.errors import OptionError, ShapeError
from birl_ext.model import checks

__all__ = ["Baseline", "check_baseline", "trajectory_surrogate"]

Baseline = Literal["others", "none"]


def trajectory_surrogate(
    loss: Tensor,
    score: Tensor,
    *,
    temperature: float,
    baseline: Baseline = "others",
    weight: Tensor | None = None,
    path: Tensor | None = None,
) -> Tensor:
    """A scalar whose value is the mean of w l, and whose gradient is an estimate of ∇φ.

        ∇φ̂ = (1/n) Σ_i w_i [ ∇l_i + (l_i − b_i)(∇p_i + ∇h_i/τ) ]

    Args:
        loss: l, (n,), of independent samples, units of φ.
        score: h, (n,), the sum of a sample's surrogates (`birl_ext.bilevel.score`): of both
            fragments of a pair. Only its gradient counts.
        temperature: τ of the lower level, units of reward.
        baseline: "others": b_i is the mean loss, weighed by w, of the other samples, which lowers
            the variance and leaves the mean alone because E[w ∇h] = E[w ∇p] = 0, as it is unless w
            was cut; "none": zero.
        weight: w, (n,), importance of samples drawn from another policy; one if absent.
        path: p, (n,), log probability of a sample's transitions where x moves them
            (`birl_ext.bilevel.adaptation`). Only its gradient counts.

    Gradients: first order, through `loss`, `score` and `path`.

    Source: (M16), (M17); Yang, Gao and Yuan (2025), SoBiRL.
    """
    checks.check_temperature(temperature)
    for name, tensor in (("loss", loss), ("score", score)):
        checks.as_floating(name, tensor)
    if loss.dim() != 1 or score.shape != loss.shape:
        raise ShapeError(
            f"loss has shape {tuple(loss.shape)}, score {tuple(score.shape)}",
            allowed="(n,) both",
        )
    if path is not None and path.shape != loss.shape:
        raise ShapeError(f"path has shape {tuple(path.shape)}", allowed=f"{tuple(loss.shape)}")
    check_baseline(baseline)
    share = torch.ones_like(loss) if weight is None else weight.detach()
    fixed = loss.detach()
    if baseline == "others" and len(loss) > 1:
        fixed = fixed - _mean_of_others(fixed, share)
    likelihood = score / temperature if path is None else path + score / temperature
    indirect = share * fixed * (likelihood - likelihood.detach())
    return (share * loss + indirect).mean()


def check_baseline(baseline: Baseline) -> None:
    """Raise OptionError unless it is one of the two."""
    if baseline not in ("others", "none"):
        raise OptionError(f"baseline is {baseline!r}", allowed="'others' or 'none'")


def _mean_of_others(loss: Tensor, weight: Tensor) -> Tensor:
    """Σ_{j≠i} w_j l_j / Σ_{j≠i} w_j, (n,); zero where nothing else has weight.

    Sums from both ends: the whole less one term would leave rounding alone where w_i is most of it.
    """
    terms = torch.stack((weight, weight * loss)).double()
    before = terms.cumsum(-1).roll(1, -1)
    after = terms.flip(-1).cumsum(-1).flip(-1).roll(-1, -1)
    before[:, 0] = after[:, -1] = 0
    mass, sums = before + after
    return torch.where(mass > 0, sums / mass, 0.0).to(loss.dtype)
