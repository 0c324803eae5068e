"""Launches of the compiled CUDA kernels: workspace, stream, and what to do where a device or a
driver refuses.

All memory is torch's, and nothing here waits for the device, so every call can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from birl_ext.errors import SizeLimitError
from birl_ext.ops.backends import loader

__all__ = ["LaunchError", "launch", "policy_solve_fits", "refusal", "solve_fits"]


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


def launch(
    operation: str,
    device: torch.device,
    problem: dict[str, float],
    request: dict[str, Any],
    pattern: Sequence[Tensor | None],
) -> None:
    """Run an operation of the compiled module on the current stream.

    Args:
        operation: "solve", "policy_solve" or "outer".
        problem, request: addresses and sizes, by the names of csrc/core/request.h.
        pattern: crow and col of the transition; empty or None if it is dense.

    Raises:
        SizeLimitError: more than 2³¹ − 1 rows of P.
        LaunchError: the driver refused.
    """
    states, actions = int(problem["states"]), int(problem["actions"])
    _check_rows(states, actions)
    grid = {
        "solve": lambda: not solve_fits(problem),
        "policy_solve": lambda: not policy_solve_fits(states),
        "outer": lambda: False,
    }[operation]()
    where: dict[str, int] = {"grid": grid}
    if grid and "crow" in problem:
        crow, col = pattern
        assert crow is not None
        assert col is not None
        transpose = request.get("transpose", False)
        merged = _policy_pattern(crow, col, states, actions, transpose=transpose)
        names = ("pattern_crow", "pattern_col", "pattern_slot")
        where |= {name: tensor.data_ptr() for name, tensor in zip(names, merged, strict=True)}
    with _launching(device) as (module, where["stream"], where["device"]):
        if operation != "outer":
            size = getattr(module, f"{operation}_workspace")(problem, request, where)
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            where["workspace"] = workspace.data_ptr()
        getattr(module, operation)(problem, request, where)


def solve_fits(problem: dict[str, float]) -> bool:
    """Whether one block per problem is a good way to solve N·G problems of this shape; else the
    whole device works on each.
    """
    return bool(loader.require("cuda").solve_fits(problem))


def policy_solve_fits(states: int) -> bool:
    """Whether `policy_solve` keeps the S² numbers of an elimination for so many states; else it
    makes products with P_π only, which may not suffice.
    """
    return states <= int(loader.require("cuda").DIRECT_LIMIT)


def _policy_pattern(
    crow: Tensor, col: Tensor, states: int, actions: int, *, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The pattern of P_π or of its transpose: `crow`, `col`, and for each entry of P the entry that
    it adds to; nothing if P is dense.

    All sizes are known beforehand, so that nothing waits for the device: `col` is as long as that
    of P, and its end is not used.
    """
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


def _check_rows(states: int, actions: int) -> None:
    most = 2**31 - 1
    if states * actions > most:
        raise SizeLimitError(
            f"the transition has {states * actions} rows (S·A)",
            allowed=f"at most {most} on a GPU",
            fix='use backend="torch", or split the problem',
        )
