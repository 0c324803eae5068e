"""`solve` for tensors that need no preparation: a short way to the same kernel and the same bits.

On a small problem the general way (checks, normal form, dispatcher) takes ten times as long as the
arithmetic. Whatever is unusual returns None here and goes there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from birl_ext.ops.backends import loader, native
from birl_ext.ops.request import AUTO, Saved
from birl_ext.ops.solve import pull_back
from birl_ext.solution import Info
from birl_ext.torch_internals import ORDINARY, is_first_order, nobody_follows

__all__ = ["solve"]

_MOST = 2**24
"""Numbers of P: beyond them the general way costs nothing, and says what memory is missing."""
_ABSENT: Any = (None,) * 4
"""Of a dense model whose γ and τ are numbers."""


class SolveFast(torch.autograd.Function):
    """`ops.solve.Solve` at numbers γ and τ; after the outputs, how many problems failed.

    Never mapped and never dual: it has a backward only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        reward: Tensor,
        transition: Tensor,
        discount: float,
        temperature: float,
        validate: int,
    ) -> tuple[Any, ...]:
        outputs, failed, numbers = native.solve_fast(
            reward, transition, discount, temperature, validate, derivable=True
        )
        _, _, advantage, policy, _, info, status, relative = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(info, status)
        ctx.save_for_backward(transition, relative, advantage, policy, info, status)
        ctx.numbers = numbers
        return (*outputs, failed)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Any, ...]:
        bars = (*bars[:5], bars[7], None)
        given = [bar for bar in bars if bar is not None]
        if not given:
            return (None,) * 5
        saved = ctx.saved_tensors
        wanted, needed = ctx.needs_input_grad[:2]
        needs = (needed, wanted, False, False, False)
        # what was saved was ordinary; what arrives may be mapped, negated lazily, …
        if bars[5] is None and is_first_order(given):
            transition_bar, reward_bar, *_ = native.solve_vjp(
                Saved._make((saved[0], *_ABSENT, *saved[1:], None)),
                [None if bar is None else bar.contiguous() for bar in bars[:5]],
                needs,
                ctx.numbers,
            )
        else:
            transition_bar, reward_bar = _general(saved, ctx.numbers, bars, needs)
        return (reward_bar, transition_bar, None, None, None)


# Past torch's own `apply`, which binds the signature of `forward` at every call.
_apply: Any = super(torch.autograd.Function, SolveFast).apply


def _general(
    tensors: Sequence[Tensor],
    numbers: array[float],
    bars: Sequence[Tensor | None],
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The rule in operations that can be differentiated again, in the normal form (N, 1)."""
    transition, relative, advantage, policy, info, status = tensors
    discount, temperature = (
        torch.full((status.numel(), 1), number, dtype=torch.float64)
        for number in (numbers[0], numbers[-1])
    )
    nothing = torch.empty(0, dtype=torch.int64)
    states, actions = policy.shape[-2:]
    rows = transition.reshape(-1, states, actions, states)
    saved = Saved(
        rows,
        nothing,
        nothing,
        discount,
        temperature,
        relative,
        advantage,
        policy,
        info,
        status,
        info[..., Info.OFFSET],
    )
    transition_bar, reward_bar, *_ = pull_back(saved, bars, needs, AUTO)
    return (
        None if transition_bar is None else transition_bar.reshape(transition.shape),
        None if reward_bar is None else reward_bar.reshape(policy.shape),
    )


def solve(
    reward: Any, transition: Any, discount: Any, temperature: Any, validate: int
) -> tuple[tuple[Tensor, ...], int] | None:
    """V, Q, Q − V, π, log π, info and status, and how many problems failed; None unless everything
    is ordinary.

    Ordinary are: strided, contiguous CPU tensors (*B, S, A) and (*B, S, A, S) of float32 or float64
    with the same batch axes, numbers γ and τ in range, eager mode, and a compiled module.
    """
    if type(temperature) is int and temperature < 2**53:
        temperature = float(temperature)
    if not (
        type(reward) in ORDINARY
        and type(transition) in ORDINARY
        and type(discount) is float
        and type(temperature) is float
        and 0.0 <= discount < 1.0
        and 0.0 < temperature < float("inf")
        and nobody_follows((reward, transition))
        and not (reward.is_nested or transition.is_nested)  # which have no shape
    ):
        return None
    shape, dtype = reward.shape, reward.dtype
    if not (
        len(shape) >= 2
        and transition.shape == (*shape, shape[-2])
        and (dtype is torch.float64 or dtype is torch.float32)
        and dtype is transition.dtype
        and reward.is_cpu
        and transition.is_cpu
        and 0 < transition.numel() <= _MOST
        and reward.layout is torch.strided
        and transition.layout is torch.strided
        and reward.is_contiguous()
        and transition.is_contiguous()
        and loader.CPU.module is not None
    ):
        return None
    given = (reward, transition, discount, temperature, validate)
    if torch.is_grad_enabled() and (reward.requires_grad or transition.requires_grad):
        *outputs, failed = _apply(*given)
        return tuple(outputs[:7]), failed
    outputs, failed, _ = native.solve_fast(*given, derivable=False)
    return outputs[:7], failed
