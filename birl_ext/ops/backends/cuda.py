"""The compiled CUDA kernels, called with tensors: checks, workspace, stream, and what to do where a
device or a driver refuses.

All memory is torch's, and nothing here waits for the device, so every call can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from birl_ext.errors import SizeLimitError
from birl_ext.ops.backends import loader, native
from birl_ext.solution import Rigour

__all__ = [
    "LaunchError",
    "outer",
    "policy_solve",
    "policy_solve_fits",
    "refusal",
    "solve",
    "solve_fits",
]


class LaunchError(RuntimeError):
    """The driver refused a launch; PyTorch can stand in."""


def refusal(device: torch.device) -> str:
    """Why the compiled kernels do not run on a device; empty if they do."""
    missing = loader.reason("cuda")
    if missing:
        return missing
    index = _index(device)
    if index not in _refusals:
        built = str(loader.build_info("cuda")["architectures"])
        capability = _capability(index)
        _refusals[index] = (
            ""
            if runs_on(built, capability)
            else f"birl_ext._cuda has no code for compute capability "
            f"{capability[0]}.{capability[1]} of cuda:{index}, it was built for {built}"
        )
    return _refusals[index]


_refusals: dict[int, str] = {}  # by device, asked for once


def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these CMake architectures runs on a device of this compute capability.

    Real code runs within its major version, from its own minor version on; PTX on newer ones.
    """
    for architecture in architectures.split():
        number, _, kind = architecture.partition("-")
        if not number.isdigit():  # "native", "all", or a feature set of one chip: the builder knew
            return True
        built = divmod(int(number), 10)
        if kind != "virtual" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind != "real" and built <= capability:
            return True
    return False


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@contextmanager
def _launching(device: torch.device) -> Iterator[tuple[ModuleType, int, int]]:
    """The module, the current stream's handle and the device's index; refusals as LaunchError."""
    module = loader.require("cuda")
    index = _index(device)
    try:
        yield module, _stream(index), index
    except module.LaunchError as error:
        raise LaunchError(str(error)) from error


def _stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def _workspace(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def solve(
    transition: Tensor,
    crow: Tensor | None,
    col: Tensor | None,
    reward: Tensor,
    log_reference: Tensor | None,
    discount: Tensor,
    temperature: Tensor,
    initial: Tensor | None,
    *,
    batch: Sequence[int] | None = None,
    method: int = 0,
    tol: float = 0.0,
    max_iterations: int = 0,
    validate: int = Rigour.OR_ENDING,
) -> native.Outputs:
    """`native.solve` on a GPU; methods 2, 3 and 4 are Newton there, with a direct solve where one
    block solves a problem and with products of P_π where the whole device does.

    Raises: as `native.solve`, and
        SizeLimitError: more than 2³¹ − 1 rows of P.
        LaunchError: the driver refused.
    """
    call, pairs = native.Call(transition), native.sizes("reward", reward)
    states, actions = pairs[2:]
    _check_rows(states, actions)
    large = not solve_fits(*pairs)
    data = (transition, crow, col, reward, log_reference, discount, temperature)
    problem = call.problem(*data)
    arguments, outputs = call.solve(problem, initial, batch, method, tol, max_iterations, validate)
    _, crow_pointer, _, entries = problem[5:9]
    pattern = _policy_pattern(crow, col, states, actions, transpose=False) if large else ()
    with _launching(call.device) as (module, stream, index):
        size = module.solve_workspace(*problem[:5], crow_pointer, entries, large, index)
        workspace = _workspace(size, call.device)
        module.solve(*arguments, large, *_at(pattern), workspace.data_ptr(), stream, index)
    return outputs


def solve_fits(n: int, g: int, s: int, a: int) -> bool:
    """Whether one block per problem is a good way to solve N·G problems of this shape; else the
    whole device works on each.
    """
    return bool(loader.require("cuda").solve_fits(n, g, s, a))


def policy_solve_fits(states: int) -> bool:
    """Whether `policy_solve` keeps the S² numbers of an elimination for so many states; else it
    makes products with P_π only, which may not suffice.
    """
    return states <= int(loader.require("cuda").DIRECT_LIMIT)


def policy_solve(
    transition: Tensor,
    crow: Tensor | None,
    col: Tensor | None,
    policy: Tensor,
    discount: Tensor,
    rhs: Tensor,
    *,
    transpose: bool = False,
    tol: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`native.policy_solve` on a GPU; x and its residual.

    Returns: beyond `policy_solve_fits`, NaN for a system that mixes too slowly.

    Raises: as `solve`.
    """
    call, (n, g, s, a) = native.Call(transition), native.sizes("policy", policy)
    k = rhs.shape[2]
    _check_rows(s, a)
    out, residual = call.new(n, g, k, s), call.new(n, g, k)
    model = call.model(transition, crow, col, (n,), s, a)
    large = not policy_solve_fits(s)
    pattern = _policy_pattern(crow, col, s, a, transpose=transpose) if large else ()
    with _launching(call.device) as (module, stream, index):
        shape = (call.dtype, n, g, k, s, a)
        size = module.policy_solve_workspace(*shape, model[1], model[3], large, index)
        workspace = _workspace(size, call.device)
        module.policy_solve(
            *shape,
            *model,
            call.at("policy", policy, (n, g, s, a)),
            call.at("discount", discount, (n, g)),
            call.at("rhs", rhs, (n, g, k, s)),
            out.data_ptr(),
            residual.data_ptr(),
            transpose,
            tol,
            large,
            *_at(pattern),
            workspace.data_ptr(),
            stream,
            index,
        )
    return out, residual


def outer(
    transition: Tensor,
    crow: Tensor | None,
    col: Tensor | None,
    weight: Tensor,
    vector: Tensor,
    shift: Tensor,
) -> Tensor:
    """Σ_g w(s,a) v(t) − shift(s,a) on the pattern of P, in the dtype of P: `ops.rows.Rows.outer`.

    Args:
        transition, crow, col: as for `native.solve`; only their shape and pattern are read.
        weight: (N, G, S, A) float64.
        vector: (N, G, S) float64.
        shift: (N, S, A) float64.

    Raises: as `solve`.

    Source: (M12).
    """
    call, (n, g, s, a) = native.Call(transition), native.sizes("weight", weight)
    _check_rows(s, a)
    out = torch.empty_like(transition)
    _, *pattern = call.model(transition, crow, col, (n,), s, a)
    with _launching(call.device) as (module, stream, index):
        module.outer(
            call.dtype,
            n,
            g,
            s,
            a,
            *pattern,
            call.at("weight", weight, (n, g, s, a)),
            call.at("vector", vector, (n, g, s)),
            call.at("shift", shift, (n, s, a)),
            out.data_ptr(),
            stream,
            index,
        )
    return out


def _policy_pattern(
    crow: Tensor | None, col: Tensor | None, states: int, actions: int, *, transpose: bool
) -> tuple[Tensor, ...]:
    """The pattern of P_π or of its transpose: `crow`, `col`, and for each entry of P the entry that
    it adds to; nothing if P is dense.

    All sizes are known beforehand, so that nothing waits for the device: `col` is as long as that
    of P, and its end is not used.
    """
    if crow is None or col is None:
        return ()
    entry = torch.arange(col.numel(), device=col.device)
    state = (torch.searchsorted(crow, entry, right=True) - 1) // actions
    row, column = (col, state) if transpose else (state, col)
    ordered, order = (row * states + column).sort()
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    seen = torch.nn.functional.pad(first.cumsum(0), (1, 0))  # different ones before each
    place = seen[1:] - 1
    slot = torch.empty_like(place).scatter_(0, order, place)
    merged = torch.empty_like(place, dtype=torch.int32)
    merged.scatter_(0, place, (ordered % states).to(torch.int32))
    starts = torch.arange(states + 1, device=col.device) * states
    return seen[torch.searchsorted(ordered, starts)], merged, slot


def _at(pattern: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in pattern) or (0, 0, 0)


def _check_rows(states: int, actions: int) -> None:
    most = 2**31 - 1
    if states * actions > most:
        raise SizeLimitError(
            f"the transition has {states * actions} rows (S·A)",
            allowed=f"at most {most} on a GPU",
            fix='use backend="torch", or split the problem',
        )
