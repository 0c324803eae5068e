"""Calls of the compiled modules: tensors in, integers on, status out.

The wrappers check device, dtype, shape and contiguity of what they are given, allocate what they
return, and pass pointers and sizes. Shapes: N transitions, each shared by G problems, with S states
and A actions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from birl_ext.errors import (
    BackendUnavailableError,
    DeviceError,
    DtypeError,
    IllConditionedWarning,
    ShapeError,
)
from birl_ext.ops.backends import loader
from birl_ext.solution import INFO, Rigour

__all__ = [
    "LARGEST_CONDITION",
    "check_condition",
    "policy_solve",
    "solve",
    "solve_plain",
    "solve_vjp",
]

LARGEST_CONDITION = 1e6  # beyond it a derivative has fewer than ten digits
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""V, Q, Q − V, π, log π, info, status, and V without the constant in `info`."""


class Call:
    """The checks of one call: every tensor passes through `at` once and becomes a pointer."""

    def __init__(self, transition: Tensor) -> None:
        if transition.dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"transition has dtype {transition.dtype}")
        self.device, self.storage = transition.device, transition.dtype

    def at(
        self,
        name: str,
        tensor: Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
    ) -> int:
        if tensor is None:
            return 0
        if (
            tensor.shape == shape
            and tensor.dtype is dtype
            and tensor.device == self.device
            and tensor.is_contiguous()
        ):
            return tensor.data_ptr()
        if tensor.device != self.device:
            raise DeviceError(f"{name} is on {tensor.device}, transition on {self.device}")
        if tensor.dtype is not dtype:
            raise DtypeError(f"{name} has dtype {tensor.dtype}", allowed=str(dtype))
        if tensor.shape != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}", allowed=str(shape))
        raise ShapeError(f"{name} is not contiguous", fix="call .contiguous() on it")

    def model(
        self,
        transition: Tensor,
        crow: Tensor | None,
        col: Tensor | None,
        models: tuple[int, ...],
        s: int,
        a: int,
    ) -> tuple[int, int, int, int]:
        """Pointers to transition, crow, col, and the number of entries; zeros if dense."""
        if (crow is None) != (col is None):
            raise ShapeError("crow and col belong together", fix="give both or neither")
        if crow is None or col is None:
            return self.at("transition", transition, (*models, s, a, s), self.storage), 0, 0, 0
        entries = col.numel()
        return (
            self.at("transition", transition, (*models, entries), self.storage),
            self.at("crow", crow, (s * a + 1,), torch.int64),
            self.at("col", col, (entries,), torch.int64),
            entries,
        )

    def problem(
        self,
        transition: Tensor,
        crow: Tensor | None,
        col: Tensor | None,
        reward: Tensor,
        log_reference: Tensor | None,
        discount: Tensor,
        temperature: Tensor,
    ) -> tuple[int, ...]:
        """The integers that `sweep` and `solve` of every module begin with."""
        pairs = n, g, s, a = sizes("reward", reward)
        return (
            self.dtype,
            *pairs,
            *self.model(transition, crow, col, (n,), s, a),
            self.at("reward", reward, pairs, self.storage),
            self.at("log_reference", log_reference, pairs),
            self.at("discount", discount, (n, g)),
            self.at("temperature", temperature, (n, g)),
        )

    def solve(
        self,
        problem: tuple[int, ...],
        initial: Tensor | None,
        batch: Sequence[int] | None,
        method: int,
        tol: float,
        max_iterations: int,
        validate: int,
    ) -> tuple[tuple[float, ...], Outputs]:
        """The numbers that every module's `solve` begins with, and the outputs it writes."""
        n, g, s, a = problem[1:5]
        axes = (n, g) if batch is None else tuple(batch)
        value = self.new(*axes, s)
        relative = torch.empty_like(value)
        q = torch.empty((*axes, s, a), dtype=self.storage, device=self.device)
        advantage, policy, log_policy = (
            torch.empty_like(q),
            torch.empty_like(q),
            torch.empty_like(q),
        )
        info = self.new(*axes, INFO + s)
        status = torch.empty(axes, dtype=torch.int64, device=self.device)
        if status.numel() != n * g:
            raise ShapeError(f"batch is {axes}", allowed=f"axes of {n * g} problems")
        outputs = (value, q, advantage, policy, log_policy, info, status, relative)
        arguments = (
            *problem,
            self.at("initial", initial, (n, g, s)),
            value.data_ptr(),
            relative.data_ptr(),
            *(output.data_ptr() for output in outputs[1:7]),
            method,
            tol,
            max_iterations,
            int(validate),
        )
        return arguments, outputs

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    @property
    def dtype(self) -> int:
        return int(self.storage is torch.float64)


def sizes(name: str, tensor: Tensor) -> tuple[int, int, int, int]:
    if tensor.dim() != 4:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}", allowed="(N, G, S, A)")
    n, g, s, a = tensor.shape
    return n, g, s, a


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
) -> Outputs:
    """The fixed point V* of every problem, with its certificate.

    Args:
        transition: (N, S, A, S), or (N, nnz) with crow (S·A + 1,) and col (nnz,), int64.
        reward: (N, G, S, A) in transition's dtype.
        log_reference: (N, G, S, A) float64, −inf where masked; None is a reference of one.
        discount, temperature: (N, G) float64.
        initial: (N, G, S) float64, a first guess of V*.
        batch: axes *B of the outputs, N·G problems in the same order; by default (N, G).
        method: 0 automatic, 1 value iteration, 2 Newton, 3 Newton-Krylov, 4 modified policy
            iteration.
        tol: relative certified error; 0 goes as far as rounding allows.
        max_iterations: most passes over P; 0 is a default by method.
        validate: a `Rigour`, what to check of the rows of P.

    Returns:
        V (*B, S) float64; Q, Q − V, π and log π (*B, S, A) in transition's dtype; info (*B, 9 + S)
        float64, see `Info`; a `Status` (*B), int64; and V − `Info.OFFSET` (*B, S), which keeps the
        digits that a large constant takes from V.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor is not as above.
        BackendUnavailableError: the module for this device is missing.

    Source: (M3), (M6), (M9).
    """
    call = Call(transition)
    data = (transition, crow, col, reward, log_reference, discount, temperature)
    arguments, outputs = call.solve(
        call.problem(*data), initial, batch, method, tol, max_iterations, validate
    )
    _cpu(call).solve(*arguments, torch.get_num_threads())
    return outputs


def solve_plain(
    reward: Tensor,
    transition: Tensor,
    discount: float,
    temperature: float,
    validate: int,
    *,
    derivable: bool,
) -> tuple[tuple[Any, ...], int]:
    """`solve` without its checks and options, for one reward per transition and numbers γ and τ.

    Args:
        reward: (*B, S, A), float32 or float64, contiguous, on the CPU.
        transition: (*B, S, A, S), as the reward.
        discount, temperature: for all problems.
        validate: a `Rigour`.
        derivable: whether the last output is wanted, which derivatives need; else it is None.

    Returns:
        What `solve` returns, and how many problems failed.
    """
    *batch, states, actions = shape = reward.shape
    double = torch.float64
    value = torch.empty(shape[:-1], dtype=double)
    relative = torch.empty_like(value) if derivable else None
    q, advantage = torch.empty_like(reward), torch.empty_like(reward)
    policy, log_policy = torch.empty_like(reward), torch.empty_like(reward)
    info = torch.empty((*batch, INFO + states), dtype=double)
    status = torch.empty(batch, dtype=torch.int64)
    failed: int = loader.require("cpu").solve(
        reward.dtype is double,
        status.numel(),
        1,
        states,
        actions,
        transition.data_ptr(),
        0,
        0,
        0,
        reward.data_ptr(),
        0,
        discount,
        temperature,
        0,
        value.data_ptr(),
        0 if relative is None else relative.data_ptr(),
        q.data_ptr(),
        advantage.data_ptr(),
        policy.data_ptr(),
        log_policy.data_ptr(),
        info.data_ptr(),
        status.data_ptr(),
        0,
        0.0,
        0,
        validate,
        torch.get_num_threads(),
    )
    return (value, q, advantage, policy, log_policy, info, status, relative), failed


def solve_vjp(
    transition: Tensor,
    crow: Tensor | None,
    col: Tensor | None,
    discount: Tensor | float,
    temperature: Tensor | float,
    solution: Sequence[Tensor],
    bars: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Derivatives at the fixed point that `solve` returned.

    Args:
        transition, crow, col: as for `solve`; with numbers for γ and τ in axes (*B, S, A, S).
        discount, temperature: (N, G) float64; or numbers, and a problem for every transition.
        solution: V − `Info.OFFSET`, advantage, policy, info and status, as `solve` returned them in
            axes *B.
        bars: cotangents of V, Q, Q − V, π and log π, like these; None is zero.
        needs: which derivatives are wanted: of transition, reward, log_reference, discount and
            temperature.

    Returns:
        The cotangents that are wanted, in that order: like transition; (*B, S, A) in its dtype;
        (*B, S, A) float64; (N, G) and (N, G) float64. NaN where status is not zero.

    Raises: as for `solve`. Warns: IllConditionedWarning.

    Source: (M10)-(M12), (M19), (M20).
    """
    relative, advantage, policy, info, status = solution
    axes, table = status.shape, policy.shape
    s, a = table[-2:]
    n, g, models = status.numel(), 1, axes
    if isinstance(discount, Tensor):
        n, g = discount.shape
        models = discount.shape[:1]
    call = Call(transition)
    wanted = (
        torch.empty_like(transition) if needs[0] else None,
        torch.empty_like(policy) if needs[1] else None,
        call.new(*table) if needs[2] else None,
        call.new(n, g) if needs[3] else None,
        call.new(n, g) if needs[4] else None,
    )
    if status.numel() != n * g:
        raise ShapeError(f"status has shape {axes}", allowed=f"axes of {n * g} problems")
    condition, problem = _cpu(call).solve_vjp(
        call.dtype,
        n,
        g,
        s,
        a,
        *call.model(transition, crow, col, models, s, a),
        call.at("discount", discount, (n, g)) if isinstance(discount, Tensor) else discount,
        call.at("temperature", temperature, (n, g))
        if isinstance(temperature, Tensor)
        else temperature,
        call.at("value", relative, table[:-1]),
        call.at("advantage", advantage, table, call.storage),
        call.at("policy", policy, table, call.storage),
        call.at("info", info, (*axes, INFO + s)),
        call.at("status", status, axes, torch.int64),
        call.at("cotangent of V", bars[0], table[:-1]),
        *[0 if bar is None else call.at("cotangent", bar, table, call.storage) for bar in bars[1:]],
        *[0 if tensor is None else tensor.data_ptr() for tensor in wanted],
        torch.get_num_threads(),
    )
    check_condition(condition, problem)
    return wanted


def check_condition(condition: float, problem: int, largest: float = LARGEST_CONDITION) -> None:
    """Warn where rounding costs a derivative more than it may: see IllConditionedWarning."""
    if condition > largest:
        warnings.warn(IllConditionedWarning(condition, problem), stacklevel=2)


def policy_solve(
    transition: Tensor,
    crow: Tensor | None,
    col: Tensor | None,
    policy: Tensor,
    discount: Tensor,
    rhs: Tensor,
    *,
    transpose: bool = False,
    method: int = 0,
    tol: float = 0.0,
    max_iterations: int = 0,
) -> tuple[Tensor, Tensor, int]:
    """Solve (I − γP_π) x = b, or with the transposed matrix, for K right-hand sides each.

    Args:
        transition, crow, col: as for `solve`.
        policy: (N, G, S, A) float64.
        discount: (N, G) float64.
        rhs: (N, G, K, S) float64.
        method: 0 automatic, 2 direct, 3 Krylov, 5 Richardson with exact mass.
        tol: residual relative to ‖b‖; 0 goes as far as rounding allows.
        max_iterations: most products per correction; 0 is a default by method.

    Returns:
        x (N, G, K, S); its residual (N, G, K), ‖b − Ax‖∞, or ‖b − Aᵀx‖₁ if `transpose`; and how
        many systems missed both the tolerance and the rounding level.

    Raises: as for `solve`.

    Source: (M10), (M12), (M13).
    """
    pairs = n, g, s, a = sizes("policy", policy)
    if rhs.dim() != 4:
        raise ShapeError(f"rhs has shape {tuple(rhs.shape)}", allowed="(N, G, K, S)")
    k = rhs.shape[2]
    call = Call(transition)
    out, residual = call.new(n, g, k, s), call.new(n, g, k)
    failed: int = _cpu(call).policy_solve(
        call.dtype,
        n,
        g,
        k,
        s,
        a,
        *call.model(transition, crow, col, (n,), s, a),
        call.at("policy", policy, pairs),
        call.at("discount", discount, (n, g)),
        call.at("rhs", rhs, (n, g, k, s)),
        out.data_ptr(),
        residual.data_ptr(),
        transpose,
        method,
        tol,
        max_iterations,
        torch.get_num_threads(),
    )
    return out, residual, failed


def _cpu(call: Call) -> Any:
    if call.device.type != "cpu":
        raise BackendUnavailableError(
            f"no compiled kernel of this operation for device {call.device}",
            fix='move the tensors to the CPU, or use backend="torch"',
        )
    return loader.require("cpu")
