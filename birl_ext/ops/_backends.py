"""Which code computes an op: the compiled module where it loaded and fits, else PyTorch; and what a failed solve raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from birl_ext import errors, validation
from birl_ext.ops import _torch
from birl_ext.solution import Status

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
    return _torch.bellman(
        transition, crow, col, reward, log_reference, discount, temperature, value
    )


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
    outputs = _torch.solve(
        transition,
        crow,
        col,
        reward,
        log_reference,
        discount,
        temperature,
        initial,
        method,
        tol,
        max_iterations,
        validate,
    )
    if strict and bool(outputs[-1].any()):
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
    return _torch.policy_solve(transition, crow, col, policy, discount, rhs, transpose, tol, method)


def unavailable(name: str) -> str:
    """Why a compiled backend cannot be used; empty if it can."""
    return "not built"


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
    info, status = outputs[5].flatten(0, 1), outputs[6].flatten()
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
