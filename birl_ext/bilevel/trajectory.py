"""The hyper-gradient of an upper level of sampled trajectories (M16), (M17): of a loss of whole
paths, or of a cost that is a sum over steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from birl_ext.errors import OptionError, ShapeError
from birl_ext.model import checks

__all__ = ["Baseline", "additive_surrogate", "check_baseline", "filled", "trajectory_surrogate"]

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


def additive_surrogate(
    cost: Tensor,
    score: Tensor,
    *,
    temperature: float,
    discount: float,
    baseline: Baseline = "others",
    advantage: Tensor | None = None,
    path: Tensor | None = None,
) -> Tensor:
    """A scalar whose value is the mean of Σ_t γᵗ f_t, and whose gradient is an estimate of ∇φ.

        φ = E[ Σ_t γᵗ f(s_t, a_t; x) ]
        ∇φ̂ = (1/n) Σ_i Σ_t γᵗ [ ∇f_t + (G_t − b_t) ∇h_t/τ + γ (G_{t+1} − b_{t+1}) ∇p_t ],
        G_t = Σ_{k≥t} γᵏ⁻ᵗ f_k

    A step is given credit for what follows it alone. Weighing every score by the whole path's sum
    (`trajectory_surrogate`) has the same mean, and a variance that grows with the horizon. With an
    `advantage`, A of the upper level's own return, the noise of what follows is gone too: what is
    left is that of the states which are visited, and the advantage's error is bias.

    Args:
        cost: f, (n, H), along independent paths, zero after their ends, units of φ.
        score: h, (n, H), of each step (`each` of `birl_ext.bilevel.score`), or (n, H, A). Only its
            gradient counts.
        temperature: τ of the lower level, units of reward.
        discount: γ of the upper level, [0, 1]: one for paths that are no longer than H.
        baseline: "others": b_t is the mean of the other paths' G_t, without bias because
            E[∇h_t] = E[∇p_t] = 0; "none": zero.
        advantage: A(s_t, a_t) = Q(s_t, a_t) − Σ_a π(a|s_t) Q(s_t, a) of the upper level's return,
            (n, H), as `Critic.each` makes it from an upper critic Q; it takes the place of
            G_t − b_t. Or of every action, π(a|s_t) A(s_t, a), (n, H, A), with a score of every
            action: the sum over them takes the place of the one that was drawn. No gradient.
        path: p_t, (n, H), log probability of what follows each step, where x moves it. Only its
            gradient counts.

    Gradients: first order, through `cost`, `score` and `path`.

    Source: (M16), (M17) for a loss that is a sum over steps; reward to go: Williams (1992), with
    the upper level's advantage: Thoma et al. (2024).
    """
    checks.check_temperature(temperature)
    if not 0.0 <= discount <= 1.0:
        raise OptionError(f"discount is {discount!r}", allowed="[0, 1]")
    checks.as_floating("cost", cost)
    if cost.dim() != 2:
        raise ShapeError(f"cost has shape {tuple(cost.shape)}", allowed="(n, H)")
    of_all = advantage is not None and score.dim() == 3
    steps = tuple(cost.shape)
    wanted = (*steps, score.shape[-1]) if of_all else steps
    for name, tensor, shape in (
        ("score", score, wanted),
        ("advantage", advantage, wanted),
        ("path", path, steps),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}", allowed=f"{shape}")
    check_baseline(baseline)
    powers = discount ** torch.arange(cost.shape[1], dtype=cost.dtype, device=cost.device)
    # γᵗ G_t, which no division by γᵗ is needed for
    ahead = (powers * cost.detach()).flip(1).cumsum(1).flip(1)
    if baseline == "others" and len(cost) > 1:
        ahead = ahead - (ahead.sum(0) - ahead) / (len(cost) - 1)
    if advantage is None:
        indirect = ahead * (score - score.detach()) / temperature
    else:
        moved = advantage.detach() * (score - score.detach())
        indirect = powers * (moved.sum(-1) if of_all else moved) / temperature
    if path is not None:
        indirect[:, :-1] += ahead[:, 1:] * (path - path.detach())[:, :-1]
    return (powers * cost + indirect).sum(1).mean()


def filled(present: Tensor, rows: Tensor) -> Tensor:
    """(m, …) of the steps that are `present`, (n, H), as (n, H, …), zero elsewhere."""
    table = rows.new_zeros((*present.shape, *rows.shape[1:]))
    mask = present.view(*present.shape, *[1] * (rows.dim() - 1))
    return table.masked_scatter(mask, rows)


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
