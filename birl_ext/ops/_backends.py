"""Which code computes an op: the compiled module where it loaded and fits, else PyTorch; and what a
failed solve raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from birl_ext import _native, errors, validation
from birl_ext.ops import _torch
from birl_ext.solution import Rigour, Status

__all__ = ["AUTO", "NATIVE", "TORCH", "bellman", "failure", "policy_solve", "solve", "unavailable"]

AUTO, TORCH, NATIVE = 0, 1, 2


def bellman(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    reward: Tensor,
    log_reference: Tensor,
    discount: Tensor,
    temperature: Tensor,
    value: Tensor,
    backend: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = (transition, crow, col, reward, log_reference, discount, temperature)
    if not _compiled(transition.device, backend):
        return _torch.bellman(*data, value)
    image = _vector(reward.shape[:-1], reward)
    table = [_vector(reward.shape, reward) for _ in range(3)]
    _native.sweep(
        *_plain(*data),
        value.contiguous(),
        value_out=image,
        advantage_out=table[0],
        policy_out=table[1],
        log_policy_out=table[2],
    )
    return image, table[0], table[1], table[2]


def solve(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    reward: Tensor,
    log_reference: Tensor,
    discount: Tensor,
    temperature: Tensor,
    initial: Tensor,
    method: int,
    tol: float,
    max_iterations: int,
    validate: int,
    strict: bool,
    backend: int,
) -> tuple[Tensor, ...]:
    data = (transition, crow, col, reward, log_reference, discount, temperature)
    if _compiled(transition.device, backend) and transition.is_cpu:
        batch = reward.shape[:2]
        relative = _vector(reward.shape[:-1], reward)
        advantage, policy, log_policy = (_vector(reward.shape, reward) for _ in range(3))
        offset, info = _vector(batch, reward), _vector((*batch, 6), reward)
        status = torch.empty(batch, dtype=torch.int64, device=reward.device)
        _native.solve(
            *_plain(*data),
            None if initial.dim() == 1 else initial.contiguous(),
            relative_value_out=relative,
            offset_out=offset,
            advantage_out=advantage,
            policy_out=policy,
            log_policy_out=log_policy,
            info_out=info,
            status_out=status,
            method=method,
            tol=tol,
            max_iterations=max_iterations,
            validate=Rigour(validate),
        )
    else:
        relative, offset, advantage, policy, log_policy, info, status = _torch.solve(
            *data, initial, method, tol, max_iterations, validate
        )
    value = relative + offset.unsqueeze(-1)
    q = advantage + value.unsqueeze(-1)
    outputs = (value, q, advantage, policy, log_policy, offset, info, status)
    if strict and bool(status.any()):
        raise failure(outputs, transition, crow, col, reward, lambda flat: (flat,))
    return outputs


def policy_solve(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    policy: Tensor,
    discount: Tensor,
    rhs: Tensor,
    transpose: bool,
    tol: float,
    method: int,
    backend: int,
) -> tuple[Tensor, Tensor]:
    if not (_compiled(transition.device, backend) and transition.is_cpu):
        return _torch.policy_solve(
            transition, crow, col, policy, discount, rhs, transpose, tol, method
        )
    out, residual = _vector(rhs.shape, rhs), _vector(rhs.shape[:-1], rhs)
    sparse = transition.dim() == 2
    _native.policy_solve(
        transition.contiguous(),
        crow if sparse else None,
        col if sparse else None,
        policy.contiguous(),
        discount.contiguous(),
        rhs.contiguous(),
        out=out,
        residual_out=residual,
        transpose=transpose,
        method=method,
        tol=tol,
    )
    return out, residual


def _compiled(device: torch.device, backend: int) -> bool:
    """Whether a compiled module computes the op; `available` warns once where it should but cannot."""
    if backend == TORCH or device.type not in ("cpu", "cuda"):
        return False
    return _native.available(device.type)


def _plain(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    reward: Tensor,
    log_reference: Tensor,
    *scalars: Tensor,
) -> tuple[Tensor | None, ...]:
    """Contiguous tensors, and None for what is absent: what the compiled modules take."""
    sparse = transition.dim() == 2
    return (
        transition.contiguous(),
        crow if sparse else None,
        col if sparse else None,
        reward.contiguous(),
        None if log_reference.dim() == 1 else log_reference.contiguous(),
        *(scalar.contiguous() for scalar in scalars),
    )


def _vector(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def unavailable(name: str) -> str:
    """Why a compiled backend cannot be used; empty if it can."""
    return _native.reason(name)


def failure(
    outputs: Sequence[Tensor],
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    reward: Tensor,
    locate: Callable[[int], tuple[int, ...]],
) -> errors.BirlError:
    """The error of the first problem that failed, with how many others did.

    Args:
        outputs: what the op `solve` returned.
        locate: from the flat index n·G + g to the caller's batch index.
    """
    info, status = outputs[6].flatten(0, 1), outputs[7].flatten()
    failed = status.nonzero().flatten()
    first = int(failed[0])
    code = Status(int(status[first]))
    _, bound, passes, place, value, _ = info[first].tolist()
    batch = locate(first)
    if code >= Status.ROW_SUM:
        sparse = transition.dim() == 2
        return validation.status_error(
            int(code),
            int(place),
            value,
            shape=(reward.shape[-2], reward.shape[-1]),
            dtype=transition.dtype,
            batch=batch,
            crow=crow if sparse else None,
            col=col if sparse else None,
        )
    kind, story = {
        Status.STAGNATED: (errors.StagnatedError, "stagnated"),
        Status.NON_FINITE: (errors.NonFiniteResultError, "overflowed"),
    }.get(code, (errors.NotConvergedError, "not converged"))
    others = f"{len(failed)} of {status.numel()} problems, the first in batch {batch}"
    return kind(
        f"{story}: certified error {bound:.3g} after {passes:.0f} passes",
        where=others if batch else "",
    )
