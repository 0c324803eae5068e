"""Requests to the compiled modules of both devices, filled and checked by name: tensors in,
addresses and sizes on, status out.

Shapes: N transitions, each shared by G problems, with S states and A actions. What is absent is
None or empty, as in `Data`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from birl_ext.errors import (
    BackendUnavailableError,
    DeviceError,
    DtypeError,
    IllConditionedWarning,
    ShapeError,
    warn,
)
from birl_ext.ops.backends import cuda, loader
from birl_ext.ops.request import Data, PolicySystem, Saved, Settings, derivable
from birl_ext.solution import INFO

__all__ = [
    "LARGEST_CONDITION",
    "check_condition",
    "outer",
    "policy_solve",
    "solve",
    "solve_fast",
    "solve_vjp",
]

LARGEST_CONDITION = 1e6  # beyond it a derivative has fewer than ten digits
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""V, Q, Q − V, π, log π, info, status, and V without the constant in `info`."""
Model = tuple[Tensor, Tensor | None, Tensor | None]
"""A transition (N, S, A, S); or (N, nnz) with crow (S·A + 1,) and col (nnz,), int64."""


class Call:
    """The checks of one call: every tensor passes through `at` once and becomes an address.

    Args:
        model: of N transitions.
        sizes: N, G, S and A.
        models: axes of the transition, if not (N,).

    Attributes:
        problem: what every operation is given, by name; each adds what else it needs.
    """

    def __init__(
        self, model: Model, sizes: Sequence[int], models: Sequence[int] | None = None
    ) -> None:
        transition, *self.pattern = model
        if transition.dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"transition has dtype {transition.dtype}")
        self.device, self.storage = transition.device, transition.dtype
        n, g, s, a = sizes
        axes = (n,) if models is None else tuple(models)
        self.problem: dict[str, float] = {
            "is_double": self.storage is torch.float64,
            "transitions": n,
            "problems": g,
            "states": s,
            "actions": a,
        }
        shape: tuple[int, ...] = (*axes, s, a, s)
        if transition.dim() == 2:
            crow, col = self.pattern
            if crow is None or col is None:
                raise ShapeError("crow and col belong together", fix="give both or neither")
            entries = col.numel()
            shape = (*axes, entries)
            self.problem["crow"] = self.at("crow", crow, (s * a + 1,), torch.int64)
            self.problem["col"] = self.at("col", col, (entries,), torch.int64)
            self.problem["nnz"] = entries
        self.problem["transition"] = self.at("transition", transition, shape, self.storage)

    def at(
        self,
        name: str,
        tensor: Tensor | None,
        shape: Sequence[int],
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
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}", allowed=str(tuple(shape)))
        raise ShapeError(f"{name} is not contiguous", fix="call .contiguous() on it")

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)


def _run(
    operation: str,
    device: torch.device,
    problem: dict[str, float],
    request: dict[str, Any],
    pattern: Sequence[Tensor | None],
) -> Any:
    """What the module of this device says of it; of a GPU, nothing: its host does not wait."""
    if device.type == "cuda":
        return cuda.launch(operation, device, problem, request, pattern)
    if device.type != "cpu":
        raise BackendUnavailableError(
            f"no compiled kernel of this operation for device {device}",
            fix='move the tensors to the CPU, or use backend="torch"',
        )
    request["threads"] = torch.get_num_threads()
    return getattr(_cpu(), operation)(problem, request)


def _cpu() -> ModuleType:
    return loader.CPU.module or loader.require("cpu")


def _sizes(name: str, tensor: Tensor) -> tuple[int, int, int, int]:
    if tensor.dim() != 4:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}", allowed="(N, G, S, A)")
    n, g, s, a = tensor.shape
    return n, g, s, a


def _given(tensor: Tensor | None) -> Tensor | None:
    """A table or a start, unless it is absent."""
    return None if tensor is None or tensor.shape == (0,) else tensor


def _outputs(q: Tensor, derivable: bool) -> tuple[tuple[Any, ...], dict[str, float]]:
    """Where a solve writes, a table for Q given; the last is None unless `derivable`."""
    *batch, states, _ = q.shape  # a list: a torch.Size takes torch twice as long
    value = q.new_empty([*batch, states], dtype=torch.float64)
    advantage, policy, log_policy = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    info = q.new_empty([*batch, INFO + states], dtype=torch.float64)
    status = q.new_empty(batch, dtype=torch.int64)
    relative = torch.empty_like(value) if derivable else None
    return (value, q, advantage, policy, log_policy, info, status, relative), {
        "value": value.data_ptr(),
        "q": q.data_ptr(),
        "advantage": advantage.data_ptr(),
        "policy": policy.data_ptr(),
        "log_policy": log_policy.data_ptr(),
        "info": info.data_ptr(),
        "status": status.data_ptr(),
        "relative": 0 if relative is None else relative.data_ptr(),
    }


def solve(data: Data, initial: Tensor | None, settings: Settings | None = None) -> Outputs:
    """The fixed point V* of every problem, with its certificate.

    Args:
        data: reward in the dtype of the transition, all else float64; contiguous.
        initial: (N, G, S) float64, a first guess of V*.
        settings: of which `strict` and `backend` say nothing here; None is the default, in axes
            (N, G). On a GPU methods 2, 3 and 4 are Newton, with a direct solve where one block
            solves a problem and with products of P_π where the whole device does.

    Returns:
        V (*B, S) float64; Q, Q − V, π and log π (*B, S, A) in transition's dtype; info (*B, 9 + S)
        float64, see `Info`; a `Status` (*B), int64; and V − `Info.OFFSET` (*B, S), which keeps the
        digits that a large constant takes from V.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor is not as above.
        BackendUnavailableError: the module for this device is missing.
        SizeLimitError: more than 2³¹ − 1 rows of P, on a GPU.
        LaunchError: the driver refused.

    Source: (M3), (M6), (M9).
    """
    shape = n, g, s, a = _sizes("reward", data.reward)
    how = settings or Settings((n, g))
    call = Call(data[:3], shape)
    call.problem["reward"] = call.at("reward", data.reward, shape, call.storage)
    call.problem["log_reference"] = call.at("log_reference", _given(data.log_reference), shape)
    call.problem["discount"] = call.at("discount", data.discount, (n, g))
    call.problem["temperature"] = call.at("temperature", data.temperature, (n, g))
    q = torch.empty((*how.batch, s, a), dtype=call.storage, device=call.device)
    outputs, request = _outputs(q, True)
    if outputs[6].numel() != n * g:
        raise ShapeError(f"batch is {tuple(how.batch)}", allowed=f"axes of {n * g} problems")
    request["initial"] = call.at("initial", _given(initial), (n, g, s))
    request.update(zip(_NUMBERS, how[1:5], strict=True))
    _run("solve", call.device, call.problem, request, call.pattern)
    return outputs


_NUMBERS = Settings._fields[1:5]  # method, tol, max_iterations, validate


def solve_fast(
    reward: Tensor,
    transition: Tensor,
    discount: float,
    temperature: float,
    validate: int,
    *,
    derivable: bool,
) -> tuple[tuple[Any, ...], int, array[float]]:
    """`solve` without its checks and settings, for one reward per transition and numbers γ and τ.

    Args:
        reward: (*B, S, A), float32 or float64, contiguous, on the CPU.
        transition: (*B, S, A, S), as the reward.
        discount, temperature: γ and τ of all problems.
        validate: a `Rigour`.
        derivable: whether the last output is wanted, which derivatives need; else it is None.

    Returns:
        What `solve` returns; how many problems failed; and γ for each problem, then τ.
    """
    outputs, request = _outputs(torch.empty_like(reward), derivable)
    *_, states, actions = reward.shape
    count = outputs[6].numel()
    numbers = array("d", (discount, temperature))
    if count > 1:
        numbers = numbers[:1] * count + numbers[1:] * count
    at, _ = numbers.buffer_info()
    request["validate"] = validate
    request["threads"] = torch.get_num_threads()
    problem = {
        "is_double": reward.dtype is torch.float64,
        "transitions": count,
        "problems": 1,
        "states": states,
        "actions": actions,
        "transition": transition.data_ptr(),
        "reward": reward.data_ptr(),
        "discount": at,
        "temperature": at + 8 * count,
    }
    failed: int = _cpu().solve(problem, request)
    return outputs, failed, numbers


def solve_vjp(
    saved: Saved,
    bars: Sequence[Tensor | None],
    needs: Sequence[bool],
    numbers: array[float] | None = None,
) -> tuple[Tensor | None, ...]:
    """Derivatives at the fixed point that `solve` returned, on a CPU.

    Args:
        saved: the data, and what `solve` returned in axes *B.
        bars: cotangents of V, Q, Q − V, π and log π, like these; None is zero.
        needs: which derivatives are wanted: of transition, reward, log_reference, discount and
            temperature.
        numbers: γ and τ as `solve_fast` returns them, for a transition (*B, S, A, S) with a problem
            each; None: those saved, (N, G).

    Returns:
        The cotangents that are wanted, in that order: like transition; (*B, S, A) in its dtype;
        (*B, S, A) float64; (N, G) and (N, G) float64. NaN where status is not zero.

    Raises: as for `solve`. Warns: IllConditionedWarning.

    Source: (M10)-(M12), (M19), (M20).
    """
    model, status, policy = saved[:3], saved.status, saved.policy
    axes, table = status.shape, policy.shape
    if numbers is not None:
        n, g = status.numel(), 1
        call = Call(model, (n, g, *table[-2:]), axes)
        address, _ = numbers.buffer_info()
        call.problem["discount"], call.problem["temperature"] = address, address + 8 * n
    else:
        n, g = saved.discount.shape
        call = Call(model, (n, g, *table[-2:]))
        for name in ("discount", "temperature"):
            call.problem[name] = call.at(name, getattr(saved, name), (n, g))
    if status.numel() != n * g:
        raise ShapeError(f"status has shape {axes}", allowed=f"axes of {n * g} problems")
    wanted = (
        torch.empty_like(model[0]) if needs[0] else None,
        torch.empty_like(policy) if needs[1] else None,
        call.new(*table) if needs[2] else None,
        call.new(n, g) if needs[3] else None,
        call.new(n, g) if needs[4] else None,
    )
    at, kind = call.at, call.storage
    value_bar, q_bar, advantage_bar, policy_bar, log_policy_bar = bars
    request = {
        "relative": at("relative", saved.relative, table[:-1]),
        "advantage": at("advantage", saved.advantage, table, kind),
        "policy": at("policy", policy, table, kind),
        "info": at("info", saved.info, (*axes, INFO + table[-2])),
        "status": at("status", status, axes, torch.int64),
        "value_bar": at("value_bar", value_bar, table[:-1]),
        "q_bar": at("q_bar", q_bar, table, kind),
        "advantage_bar": at("advantage_bar", advantage_bar, table, kind),
        "policy_bar": at("policy_bar", policy_bar, table, kind),
        "log_policy_bar": at("log_policy_bar", log_policy_bar, table, kind),
    }
    for name, tensor in zip(_WANTED, wanted, strict=True):
        if tensor is not None:
            request[name] = tensor.data_ptr()
    worst = _run("solve_vjp", call.device, call.problem, request, call.pattern)
    check_condition(*worst)
    return wanted


_WANTED = tuple(f"{name}_bar" for name in derivable(Data._fields))


def check_condition(condition: float, problem: int, largest: float = LARGEST_CONDITION) -> None:
    """Warn where rounding costs a derivative more than it may: see IllConditionedWarning."""
    if condition > largest:
        warn(IllConditionedWarning(condition, problem))


def policy_solve(
    system: PolicySystem, rhs: Tensor, *, transpose: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Solve (I − γP_π) x = b, or with the transposed matrix, for K right-hand sides each.

    Args:
        system: policy and discount in float64.
        rhs: (N, G, K, S) float64.

    Returns:
        x (N, G, K, S); its residual (N, G, K), ‖b − Ax‖∞, or ‖b − Aᵀx‖₁ if `transpose`; and how
        many systems missed the rounding level. On a GPU that is not known,
        and a system that mixes too slowly for `cuda.policy_solve_fits` is NaN.

    Raises: as for `solve`.

    Source: (M10), (M12), (M13).
    """
    shape = n, g, s, _ = _sizes("policy", system.policy)
    if rhs.dim() != 4:
        raise ShapeError(f"rhs has shape {tuple(rhs.shape)}", allowed="(N, G, K, S)")
    k = rhs.shape[2]
    call = Call(system[:3], shape)
    call.problem["discount"] = call.at("discount", system.discount, (n, g))
    x, residual = call.new(n, g, k, s), call.new(n, g, k)
    request = {
        "right_sides": k,
        "policy": call.at("policy", system.policy, shape),
        "rhs": call.at("rhs", rhs, (n, g, k, s)),
        "out": x.data_ptr(),
        "residual": residual.data_ptr(),
        "transpose": transpose,
    }
    failed = _run("policy_solve", call.device, call.problem, request, call.pattern)
    return x, residual, failed or 0


def outer(model: Model, weight: Tensor, vector: Tensor, shift: Tensor) -> Tensor:
    """Σ_g w(s,a) v(t) − shift(s,a) on the pattern of P, in the dtype of P, on a GPU: `Rows.outer`.

    Args:
        model: as for `solve`; only its shape and pattern are read.
        weight: (N, G, S, A) float64.
        vector: (N, G, S) float64.
        shift: (N, S, A) float64.

    Raises: as `solve`.

    Source: (M12).
    """
    n, g, s, a = _sizes("weight", weight)
    call, out = Call(model, (n, g, s, a)), torch.empty_like(model[0])
    request = {
        "weight": call.at("weight", weight, (n, g, s, a)),
        "vector": call.at("vector", vector, (n, g, s)),
        "shift": call.at("shift", shift, (n, s, a)),
        "out": out.data_ptr(),
    }
    _run("outer", call.device, call.problem, request, call.pattern)
    return out
