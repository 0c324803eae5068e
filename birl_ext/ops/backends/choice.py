"""Which code computes an op: the compiled module where it loaded and fits, else PyTorch; and what a
failed solve raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from birl_ext import errors
from birl_ext.model import checks
from birl_ext.ops.backends import cuda, loader, native, pytorch
from birl_ext.ops.request import (
    NATIVE,
    TORCH,
    Data,
    PolicySystem,
    Saved,
    Settings,
    bellman_arguments,
    solve_arguments,
)
from birl_ext.ops.rows import Rows
from birl_ext.solution import Info, Method, Rigour, Status

__all__ = [
    "bellman",
    "failure",
    "first_order",
    "policy_solve",
    "solve",
    "solve_vjp",
    "unavailable",
]


def bellman(*arguments: Any) -> tuple[Tensor, ...]:
    """The op `bellman`: one pass of a solve that starts from V."""
    data, value, backend = bellman_arguments(arguments)
    sweep = Settings(
        data.discount.shape,
        method=Method.SWEEP,
        max_iterations=1,
        validate=Rigour.OFF,
        backend=backend,
    )
    outputs = _solve(data, value, sweep)
    if outputs is None:
        return pytorch.bellman(data, value)
    image, q, *tables = outputs[:5]
    advantage, policy, log_policy = (table.double() for table in tables)
    # in float32 the smaller of the two has the digits
    exact = q.double() - image.unsqueeze(-1)
    advantage = torch.where(q.abs() < advantage.abs(), exact, advantage)
    return image, advantage, policy, log_policy


def solve(*arguments: Any) -> tuple[Tensor, ...]:
    """The op `solve`: what `native.solve` returns, and c."""
    data, initial, settings = solve_arguments(arguments)
    if settings.strict and _capturing(data.transition):
        raise errors.OptionError(
            'on_fail="raise" reads the status, and a CUDA graph is being captured',
            fix='use on_fail="status" and look at the status after the replay',
        )
    outputs = _solve(data, initial, settings)
    if outputs is None:
        outputs = pytorch.solve(data, initial, settings)
    if settings.strict and bool(outputs[6].any()):
        raise failure(outputs, data, lambda flat: (flat,))
    return *outputs, outputs[5][..., Info.OFFSET].clone()


def _solve(data: Data, initial: Tensor, settings: Settings) -> tuple[Tensor, ...] | None:
    """By compiled code; None where there is none for it."""
    if not _compiled(data.transition.device, settings.backend):
        return None
    try:
        return native.solve(_contiguous(data), initial.contiguous(), settings)
    except cuda.LaunchError as error:
        _stand_in(error, settings.backend)
        return None


def _contiguous(data: Data) -> Data:
    return Data(*(tensor.contiguous() for tensor in data))


def solve_vjp(
    saved: Saved, bars: Sequence[Tensor | None], needs: Sequence[bool], backend: int
) -> tuple[Tensor | None, ...] | None:
    """`ops.solve.pull_back` by compiled code; None where there is none for it."""
    if not (saved.transition.is_cpu and _compiled(saved.transition.device, backend)):
        return None
    transition_bar, reward_bar, reference_bar, *scalars = native.solve_vjp(
        saved._replace(
            transition=saved.transition.contiguous(),
            discount=saved.discount.contiguous(),
            temperature=saved.temperature.contiguous(),
        ),
        [None if bar is None else bar.contiguous() for bar in bars],
        needs,
    )
    shape = (*saved.discount.shape, *saved.policy.shape[-2:])
    tables = (None if bar is None else bar.view(shape) for bar in (reward_bar, reference_bar))
    return (transition_bar, *tables, *scalars)


def policy_solve(
    system: PolicySystem, rhs: Tensor, transpose: bool, backend: int
) -> tuple[Tensor, Tensor]:
    """(I − γP_π)⁻¹b or its transpose (N, G, K, S), and the residual; NaN where not solved."""
    if _compiled(rhs.device, backend):
        given = PolicySystem(*(tensor.contiguous() for tensor in system))
        try:
            x, residual, failed = native.policy_solve(given, rhs.contiguous(), transpose=transpose)
        except cuda.LaunchError as error:
            _stand_in(error, backend)
        else:
            if failed:
                return pytorch.settle(system, rhs, transpose, x)
            if rhs.is_cpu or _solved(x):
                return x, residual
    return pytorch.policy_solve(system, rhs, transpose)


class _CompiledRows(Rows):
    """`Rows` whose outer product a GPU kernel writes; not differentiable."""

    def outer(self, weight: Tensor, vector: Tensor, shift: Tensor) -> Tensor:
        tables = (table.double().contiguous() for table in (weight, vector, shift))
        try:
            return native.outer(self.model, *tables)
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
        return loader.CPU.module is not None or loader.available("cpu")
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


def unavailable(name: str) -> str:
    """Why a compiled backend cannot be used; empty if it can."""
    return loader.reason(name)


def failure(
    outputs: Sequence[Tensor], data: Data, locate: Callable[[int], tuple[int, ...]]
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
        transition, crow, col, reward, *_ = data
        sparse = transition.dim() == 2
        return checks.status_error(
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
    known = f": certified error {bound:.3g}" if bound == bound else ""
    spent = "" if passes != passes else f" after {passes:.0f} pass{'es' * (passes != 1)}"
    what, fix = f"{story}{known}{spent}", ""
    if code == Status.NON_FINITE and not bool(
        data.transition.isfinite().all() & data.reward.isfinite().all()
    ):
        what, fix = "a number given is not finite", 'use validate="full", which says where'
    others = f"{len(failed)} of {status.numel()} problems, the first in batch {batch}"
    return kind(what, where=others if batch else "", fix=fix)
