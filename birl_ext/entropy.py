"""The temperature at which an optimal policy has a given entropy, as agents that adjust it seek."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from birl_ext.errors import OptionError, ShapeError
from birl_ext.functional import Given, solve
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.solution import Solution

__all__ = ["temperature_for"]

_REACH = 40.0  # of log τ, from the size of the rewards: e⁴⁰ = 2e17
_STRIDE = 3.0  # of log τ, where nothing bounds the root
_SCAN = torch.arange(-10.0, 6.5, 0.5)
"""Of log τ, from the size of the rewards: where a reference lets the entropy fall again."""
_PASSES = 200
_CLOSE = 1e-12  # relative, of τ


def temperature_for(
    entropy: float | Tensor,
    reward: Tensor | DenseMDP | SparseMDP,
    transition: Tensor | None = None,
    *,
    discount: float | Tensor | None = None,
    weight: Tensor | None = None,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    terminal: Tensor | None = None,
) -> Tensor:
    """The temperature at which the soft-optimal policy has a given mean entropy.

        τ: Σ_s d(s) H(π_τ(·|s)) = entropy,   H(π) = −Σ_a π log π,   π_τ as in `solve`

    Args:
        entropy: nats, a number or (*B); more than zero and less than that of the uniform policy.
        reward, transition, discount, reference, mask, terminal: as in `solve`; a problem is (*B).
        weight: d, (S,) or (*B, S), nowhere negative, divided by its sum: the states over which an
            agent takes the mean. None: all states alike. It is taken as it is: where x moves it,
            give one that depends on x.

    Returns:
        τ, (*B), float64. Where several temperatures have that entropy, one of them.

    Raises:
        OptionError: no temperature has that entropy, or with a reference none is found between e⁻¹⁰
            and e⁶ of the rewards' size; with the problem's place.
        InvalidMDPError, ParameterError, ShapeError, DtypeError, SolveError: as `solve`.

    Gradients: entropy, reward, transition, discount, weight, reference; reverse mode, any order, by
    the implicit function theorem: dτ = −dh/(∂h/∂τ) with h = Σ d H − entropy. NaN where ∂h/∂τ = 0.

    Source: (M21); the entropy target: Haarnoja et al. (2018), section 5.
    """
    given = Given(reward, transition, discount, 1.0, reference, mask, terminal)
    found = given.mdp()
    if found is None:
        table = checks.as_floating("reward", cast(Tensor, reward))
        found = DenseMDP(table, cast(Tensor, transition), cast(float, discount))
    mdp = found.to(torch.float64)
    shape = mdp.batch_shape
    target = torch.as_tensor(entropy, dtype=torch.float64, device=mdp.reward.device)
    share = _share(weight, mdp)
    try:
        target = target + target.new_zeros(shape) + 0 * share[..., 0].detach()
    except RuntimeError as error:
        raise ShapeError(
            f"entropy has shape {tuple(target.shape)}, weight {tuple(share.shape)}",
            allowed=f"axes that go with (*B) = {tuple(shape)}",
        ) from error
    fields = ["reward", "values" if isinstance(mdp, SparseMDP) else "transition", "discount"]
    fields += [] if mdp.reference is None else ["reference"]
    parts = [torch.as_tensor(getattr(mdp, name), dtype=torch.float64) for name in fields]

    def residual(tau: Tensor, target: Tensor, share: Tensor, *parts: Tensor) -> Tensor:
        """h, (*B)."""
        moved = mdp.replace(validate="off", **dict(zip(fields, parts, strict=True)))
        return (share * _entropy(solve(moved, temperature=tau))).sum(-1) - target

    with torch.no_grad():
        _check_target(target, share, mdp)
        root = _root(mdp, target, share)
    tensors = (target, share, *parts)
    if not any(tensor.requires_grad for tensor in tensors):
        return root
    answer: Tensor = _Implicit.apply(residual, root, *tensors)  # type: ignore[no-untyped-call]
    return answer


def _share(weight: Tensor | None, mdp: DenseMDP | SparseMDP) -> Tensor:
    """d, (*B, S) or (S,), which sums to one."""
    if weight is None:
        every, device = 1 / mdp.states, mdp.reward.device
        return torch.full((mdp.states,), every, dtype=torch.float64, device=device)
    checks.as_floating("weight", weight)
    if weight.shape[-1:] != (mdp.states,):
        raise ShapeError(f"weight has shape {tuple(weight.shape)}", allowed=f"(*B, {mdp.states})")
    total: Tensor = weight.double().sum(-1, keepdim=True)
    good = (weight >= 0).all() & (total > 0).all() & total.isfinite().all()
    if not bool(good):
        raise OptionError(
            "weight has a negative number, or no positive one",
            allowed="numbers from 0 on, of which one is positive",
            fix="give how often each state is visited",
        )
    share: Tensor = weight.double() / total
    return share


def _entropy(solution: Solution) -> Tensor:
    """H(π(·|s)), (*B, S)."""
    policy = solution.policy
    chosen = policy > 0
    entropy: Tensor = -(policy * torch.where(chosen, solution.log_policy, 0.0)).sum(-1)
    return entropy


def _check_target(target: Tensor, share: Tensor, mdp: DenseMDP | SparseMDP) -> None:
    actions = torch.full((mdp.states,), float(mdp.actions), device=share.device).double()
    if mdp.mask is not None:
        actions = mdp.mask.sum(-1).double().clamp(min=1)
    most = (share * actions.log()).sum(-1).expand(target.shape)
    bad = ~((target > 0) & (target < most))
    if bool(bad.any()):
        raise _refused(target, bad, f"above 0 and below {float(most[bad][0]):.6g} nats")


def _refused(target: Tensor, bad: Tensor, allowed: str, reason: str = "") -> OptionError:
    place = bad.nonzero()[0].tolist()
    where = f" of problem {place}" if place else ""
    return OptionError(
        f"entropy{where} is {float(target[bad][0]):.6g}{reason}",
        allowed=allowed,
        fix="ask for a share of the logarithm of the number of actions, such as 0.5",
    )


def _root(mdp: DenseMDP | SparseMDP, target: Tensor, share: Tensor) -> Tensor:
    """τ, (*B), by Newton's method in log τ, within a bracket where there is one."""
    reward = mdp.reward if mdp.mask is None else torch.where(mdp.mask, mdp.reward, 0.0)
    size = (reward.amax(-1) - reward.amin(-1)).amax(-1).expand(target.shape)
    start = torch.where(size > 0, size, 1.0).log()
    log_tau, value = start.clone(), None
    low, high = torch.full_like(start, -math.inf), torch.full_like(start, math.inf)
    if mdp.reference is not None:  # by which the entropy may rise with τ and fall again
        low, high = _rising(mdp, target, share, start)
        log_tau = ((low + high) / 2).where(low.isfinite(), log_tau)
    open_ = torch.ones_like(start, dtype=torch.bool)
    for _ in range(_PASSES):
        with torch.enable_grad():
            at = log_tau.detach().requires_grad_()
            solution = solve(mdp, temperature=at.exp(), initial=value)
            over = (share * _entropy(solution)).sum(-1) - target
            (slope,) = torch.autograd.grad(over.sum(), at)
        value, over = solution.value.detach(), over.detach()
        high = torch.where(over >= 0, log_tau, high)
        low = torch.where(over <= 0, log_tau, low)
        step = (-over / slope).nan_to_num(0.0, _STRIDE, -_STRIDE).clamp(-_STRIDE, _STRIDE)
        step = torch.where(slope > 0, step, -_STRIDE * over.sign())
        new = log_tau + step
        middle = (low + high) / 2
        outside = ((new <= low) | (new >= high)) & middle.isfinite() & (step.abs() > _CLOSE)
        new = torch.where(outside, middle, new).where(open_, log_tau)  # what is found stays
        open_ = open_ & (over != 0) & ((new - log_tau).abs() > _CLOSE)
        if not bool(open_.any()):
            return log_tau.where(over == 0, new).exp()
        lost = open_ & ((new - start).abs() > _REACH)
        if bool(lost.any()):
            break
        log_tau = new
    else:
        lost = open_
    tau = float(log_tau[lost][0].exp())
    has = float((over + target)[lost][0])
    reason = f", and at a temperature of {tau:.3g} it is {has:.6g}"
    raise _refused(target, lost, "that of some temperature", reason)


def _rising(
    mdp: DenseMDP | SparseMDP, target: Tensor, share: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The lowest of a row of log τ between which the entropy comes to exceed the target, (*B) both;
    −∞ and ∞ where there are none.
    """
    row = start + _SCAN.to(start).view(-1, *[1] * start.dim())
    over = torch.stack(
        [(share * _entropy(solve(mdp, temperature=at.exp()))).sum(-1) > target for at in row]
    )
    rises = over[1:] & ~over[:-1]
    first = rises.int().argmax(0, keepdim=True)
    found = rises.any(0)
    low, high = (part.gather(0, first).squeeze(0) for part in (row[:-1], row[1:]))
    return low.where(found, -math.inf), high.where(found, math.inf)


class _Implicit(torch.autograd.Function):
    """A root τ of h(τ, θ) = 0, (*B), as a function of θ."""

    @staticmethod
    def forward(
        ctx: Any, residual: Callable[..., Tensor], root: Tensor, *tensors: Tensor
    ) -> Tensor:
        root = root.clone()
        ctx.residual = residual
        ctx.save_for_backward(root, *tensors)
        return root

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Any, ...]:
        root, *tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def residual(tau: Tensor, *moved: Tensor) -> Tensor:
            given = list(tensors)
            for i, tensor in zip(wanted, moved, strict=True):
                given[i] = tensor
            found: Tensor = ctx.residual(tau, *given)
            return found

        pulled: Any = torch.func.vjp(residual, root, *(tensors[i] for i in wanted))
        found, pull = pulled
        slope, *_ = pull(torch.ones_like(found))
        _, *bars = pull(torch.where(slope == 0, torch.nan, -bar / slope))
        answer: list[Tensor | None] = [None] * (2 + len(tensors))
        for i, one in zip(wanted, bars, strict=True):
            answer[2 + i] = one
        return tuple(answer)
