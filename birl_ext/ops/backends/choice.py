"""Which code computes an op: the compiled module where it loaded and fits, else PyTorch; and what a
failed solve raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from birl_ext import errors
from birl_ext.model import checks as validation
from birl_ext.ops.backends import cuda, loader, native, pytorch
from birl_ext.ops.rows import Data, Rows
from birl_ext.solution import Info, Method, Rigour, Status

__all__ = [
    "AUTO",
    "NATIVE",
    "TORCH",
    "bellman",
    "failure",
    "first_order",
    "policy_solve",
    "solve",
    "solve_vjp",
    "unavailable",
]

AUTO, TORCH, NATIVE = 0, 1, 2


def bellman(*arguments: Any) -> tuple[Tensor, ...]:
    """The op `bellman`: one pass of a solve that starts from V; its arguments are those of the
    schema in `ops/bellman.py`.
    """
    data, (value, backend) = Data(*arguments[:7]), arguments[7:]
    outputs = _solve(
        data,
        backend,
        initial=value.contiguous(),
        method=int(Method.SWEEP),
        max_iterations=1,
        validate=int(Rigour.OFF),
    )
    if outputs is None:
        return pytorch.bellman(data, value)
    image, _, *tables = outputs[:5]
    return image, *(table.double() for table in tables)


def solve(*arguments: Any) -> tuple[Tensor, ...]:
    """The op `solve`; its arguments and results are those of the schema in `ops/solve.py`."""
    data, (initial, *options, strict, backend) = Data(*arguments[:7]), arguments[7:]
    if strict and _capturing(data.transition):
        raise errors.OptionError(
            'on_fail="raise" reads the status, and a CUDA graph is being captured',
            fix='use on_fail="status" and look at the status after the replay',
        )
    batch, method, tol, max_iterations, validate = options
    outputs = _solve(
        data,
        backend,
        initial=None if initial.dim() == 1 else initial.contiguous(),
        batch=batch,
        method=method,
        tol=tol,
        max_iterations=max_iterations,
        validate=validate,
    )
    if outputs is None:
        outputs = pytorch.solve(data, initial, *options)
    if strict and bool(outputs[6].any()):
        raise failure(
            outputs, data.transition, data.crow, data.col, data.reward, lambda flat: (flat,)
        )
    return *outputs, outputs[5][..., Info.OFFSET].clone()


def _solve(data: Data, backend: int, **options: Any) -> tuple[Tensor, ...] | None:
    """By compiled code; None where there is none for it."""
    if not _compiled(data.transition.device, backend):
        return None
    try:
        module = native if data.transition.is_cpu else cuda
        return module.solve(**_plain(data), **options)
    except cuda.LaunchError as error:
        _stand_in(error, backend)
        return None


def solve_vjp(
    saved: Any, bars: Sequence[Tensor | None], needs: Sequence[bool], backend: int
) -> tuple[Tensor | None, ...] | None:
    """`ops.solve.pull_back` by compiled code; None where there is none for it."""
    transition, crow, col, discount, temperature, *solution, _ = saved
    if not (transition.is_cpu and _compiled(transition.device, backend)):
        return None
    sparse = transition.dim() == 2
    transition_bar, reward_bar, reference_bar, *scalars = native.solve_vjp(
        transition.contiguous(),
        crow if sparse else None,
        col if sparse else None,
        discount.contiguous(),
        temperature.contiguous(),
        solution,
        [None if bar is None else bar.contiguous() for bar in bars],
        needs,
    )
    shape = (*discount.shape, *solution[2].shape[-2:])
    tables = (None if bar is None else bar.view(shape) for bar in (reward_bar, reference_bar))
    return (transition_bar, *tables, *scalars)


def policy_solve(
    transition: Tensor,
    crow: Tensor,
    col: Tensor,
    policy: Tensor,
    discount: Tensor,
    rhs: Tensor,
    transpose: bool,
    backend: int,
) -> tuple[Tensor, Tensor]:
    """(I − γP_π)⁻¹b or its transpose (N, G, K, S), and the residual; NaN where not solved."""
    sparse = transition.dim() == 2
    data = (
        transition.contiguous(),
        crow if sparse else None,
        col if sparse else None,
        policy.contiguous(),
        discount.contiguous(),
        rhs.contiguous(),
    )
    if _compiled(transition.device, backend):
        if transition.is_cpu:
            x, residual, failed = native.policy_solve(*data, transpose=transpose)
            if not failed:
                return x, residual
            return pytorch.settle(transition, crow, col, policy, discount, rhs, transpose, 0.0, x)
        try:
            x, residual = cuda.policy_solve(*data, transpose=transpose)
        except cuda.LaunchError as error:
            _stand_in(error, backend)
        else:
            if _solved(x):
                return x, residual
    return pytorch.policy_solve(transition, crow, col, policy, discount, rhs, transpose, 0.0, 0)


class _CompiledRows(Rows):
    """`Rows` whose outer product a GPU kernel writes; not differentiable."""

    def outer(self, weight: Tensor, vector: Tensor, shift: Tensor) -> Tensor:
        pattern = (None, None) if self.dense else (self.crow, self.col)
        tables = (table.double().contiguous() for table in (weight, vector, shift))
        try:
            return cuda.outer(self.data.contiguous(), *pattern, *tables)
        except cuda.LaunchError as error:
            loader.stand_in("cuda", str(error))
            return super().outer(weight, vector, shift)


def first_order(rows: Rows, backend: int) -> Rows:
    """The same rows for a derivative that is not derived again."""
    if rows.data.is_cuda and _compiled(rows.data.device, backend):
        return _CompiledRows(*rows)
    return rows


def _compiled(device: torch.device, backend: int) -> bool:
    """Whether a compiled module computes the op; warns once where it should but cannot."""
    if backend == TORCH or device.type not in ("cpu", "cuda"):
        return False
    if device.type == "cpu":
        return loader.available("cpu")
    refusal = cuda.refusal(device)
    if refusal:
        _stand_in(RuntimeError(refusal), backend)
    return not refusal


def _solved(x: Tensor) -> bool:
    """Whether the GPU's kernels solved a policy system. Products alone may not suffice for a large
    one, and then PyTorch goes on; while a graph is being captured its NaN have to tell.
    """
    if cuda.policy_solve_fits(x.shape[-1]) or _capturing(x):
        return True
    return not bool(x.isnan().any())


def _stand_in(error: RuntimeError, backend: int) -> None:
    """PyTorch computes what the GPU's kernels cannot, with one warning; asked for, that is an
    error.
    """
    if backend == NATIVE:
        raise errors.BackendUnavailableError(f'backend="cuda": {error}') from error
    loader.stand_in("cuda", str(error))


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _plain(data: Data) -> dict[str, Any]:
    """Contiguous tensors, and None for what is absent: what the compiled modules take."""
    sparse, reference = data.transition.dim() == 2, data.log_reference
    return {
        "transition": data.transition.contiguous(),
        "crow": data.crow if sparse else None,
        "col": data.col if sparse else None,
        "reward": data.reward.contiguous(),
        "log_reference": None if reference.dim() == 1 else reference.contiguous(),
        "discount": data.discount.contiguous(),
        "temperature": data.temperature.contiguous(),
    }


def unavailable(name: str) -> str:
    """Why a compiled backend cannot be used; empty if it can."""
    return loader.reason(name)


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
    info, status = outputs[5].reshape(-1, outputs[5].shape[-1]), outputs[6].flatten()
    failed = status.nonzero().flatten()
    first = int(failed[0])
    code = Status(int(status[first]))
    _, bound, passes, place, value = info[first, :5].tolist()
    batch = locate(first)
    if code >= Status.ROW_SUM:
        sparse = transition.dim() == 2
        return validation.status_error(
            int(code),
            int(place),
            value,
            shape=(reward.shape[-2], reward.shape[-1]),
            dtype=transition.dtype,
            transition=None if sparse else transition,
            batch=batch,
            crow=crow if sparse else None,
            col=col if sparse else None,
        )
    kind, story = {
        Status.STAGNATED: (errors.StagnatedError, "stagnated"),
        Status.NON_FINITE: (errors.NonFiniteResultError, "overflowed"),
    }.get(code, (errors.NotConvergedError, "not converged"))
    known = f"certified error {bound:.3g} " if bound == bound else ""
    what, fix = f"{story}: {known}after {passes:.0f} passes", ""
    if code == Status.NON_FINITE and not bool(
        transition.isfinite().all() & reward.isfinite().all()
    ):
        what, fix = "a number given is not finite", 'use validate="full", which says where'
    others = f"{len(failed)} of {status.numel()} problems, the first in batch {batch}"
    return kind(what, where=others if batch else "", fix=fix)
