"""How far an estimator of the hyper-gradient is from the exact one, where that is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel.guards import check_count
from birl_ext.errors import OptionError, ShapeError, SizeLimitError
from birl_ext.functional import solve
from birl_ext.model.mdp import DenseMDP

__all__ = ["EstimatorReport", "exact_pair_objective", "measure_estimator"]

_MOST_PATHS = 4096


class EstimatorReport(NamedTuple):
    """An estimator against the truth, from independent repetitions."""

    mean: Tensor
    """Of the repetitions, (d,)."""
    relative_error: float
    """‖mean − ∇φ‖ / ‖∇φ‖: bias, and what is left of the noise."""
    noise: float
    """Standard error of the mean, relative: what of `relative_error` may be chance."""
    cosine: float
    """Between the mean and ∇φ."""
    variance: float
    """E‖∇φ̂ − mean‖² of one repetition, in units of ‖∇φ‖²."""
    repetitions: int


def measure_estimator(
    estimate: Callable[[], Tensor], exact: Tensor, *, repetitions: int
) -> EstimatorReport:
    """Compare independent estimates of a gradient with the exact one.

    Args:
        estimate: makes one estimate, (d,).
        exact: ∇φ, (d,), not zero.
        repetitions: how many are averaged, at least 2.
    """
    check_count("repetitions", repetitions, 2)
    if not bool(exact.any()):
        raise OptionError("the exact gradient is zero", fix="measure at another point")
    found = torch.stack([estimate().detach().double() for _ in range(repetitions)])
    truth = exact.detach().double()
    size = truth.norm()
    mean = found.mean(0)
    variance = (found - mean).square().sum(-1).sum() / (repetitions - 1)
    return EstimatorReport(
        mean=mean,
        relative_error=float((mean - truth).norm() / size),
        noise=float((variance / repetitions).sqrt() / size),
        cosine=float(torch.nn.functional.cosine_similarity(mean, truth, dim=0)),
        variance=float(variance / size.square()),
        repetitions=repetitions,
    )


def exact_pair_objective(
    mdp: DenseMDP,
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    temperature: float,
    steps: int,
    offset: int = 0,
    policy: Tensor | None = None,
) -> Tensor:
    """φ = E[ l(d₁, d₂) ] over two independent paths of π*, by summing over all paths.

    With an offset the paths are fragments: what π* does before them is part of φ and its gradient.

    Args:
        mdp: a single MDP whose reward or transition carries the upper-level variable; every row
            continues.
        loss: (states (n, H), actions (n, H), and the second path's) → l, (n,).
        temperature: τ, units of reward.
        steps: H; (S·A)ᴴ paths at most 4096.
        offset: steps from the initial distribution to the first of the H.
        policy: (S, A), acts in place of π*.

    Raises:
        ShapeError: the MDP has batch axes.
        OptionError: a row ends, or the offset is negative.
        SizeLimitError: there are more paths.

    Gradients: exact, through the policy, the transition, `loss` and the initial distribution.

    Source: (M16), (M17), the left-hand side.
    """
    if mdp.batch_shape:
        raise ShapeError(f"the MDP has batch axes {tuple(mdp.batch_shape)}", allowed="a single MDP")
    if bool((mdp.transition.sum(-1) == 0).any()):
        raise OptionError("the process ends in some rows", allowed="a process that goes on")
    check_count("steps", steps)
    check_count("offset", offset, 0)
    states, actions = mdp.states, mdp.actions
    count = (states * actions) ** steps
    if count > _MOST_PATHS:
        raise SizeLimitError(f"{count} paths", allowed=f"at most {_MOST_PATHS}")
    if policy is None:
        policy = solve(mdp, temperature=temperature).policy
    every = torch.tensor(
        list(itertools.product(range(states), range(actions), repeat=steps)), dtype=torch.int64
    ).view(count, steps, 2)
    where, chosen = every[..., 0], every[..., 1]
    start = mdp.initial_distribution
    first = policy.new_full((states,), 1 / states) if start is None else start
    for _ in range(offset):
        first = torch.einsum("s,sa,sat->t", first, policy, mdp.transition)
    probability = first[where[:, 0]] * policy[where, chosen].prod(-1)
    for step in range(steps - 1):
        moved = mdp.transition[where[:, step], chosen[:, step], where[:, step + 1]]
        probability = probability * moved
    one, other = (
        index.flatten() for index in torch.meshgrid(*[torch.arange(count)] * 2, indexing="ij")
    )
    joint = probability[one] * probability[other]
    return (joint * loss(where[one], chosen[one], where[other], chosen[other])).sum()
