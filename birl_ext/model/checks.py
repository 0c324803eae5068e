"""Every check of an MDP's inputs, in one place; the messages name what, where, value and remedy.

``"cheap"`` checks read shapes, dtypes, devices, discount and temperature. ``"full"`` also reads the
data. A tensor is not read where it holds no numbers: under torch.compile, wrapped by a functorch
transform, a fake tensor, or during CUDA graph capture. There a second line of defence remains. The
op of `solve` checks everything itself; `status_error` turns its status codes into the same errors.
The results of `bellman`, `evaluate` and `occupancy` are NaN where discount or temperature is out of
range; a transition or a policy that is no distribution is not found out there.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from numbers import Real
from typing import Any, Literal, NamedTuple, SupportsFloat, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor
from torch.masked import MaskedTensor

from birl_ext.errors import (
    BirlError,
    DeviceError,
    DiscountError,
    DtypeError,
    EmptyActionSetError,
    InitialDistributionError,
    NegativeProbabilityError,
    NonFiniteInputError,
    NonStochasticError,
    OptionError,
    PolicyError,
    ReferencePolicyError,
    ShapeError,
    SizeLimitError,
    SparseFormatError,
    TemperatureError,
)
from birl_ext.solution import Status
from birl_ext.torch_internals import is_concrete

__all__ = [
    "Defects",
    "Level",
    "as_floating",
    "as_tensor",
    "below_zero",
    "broadcast",
    "broadcast_batches",
    "check_actions",
    "check_callable",
    "check_count",
    "check_crow_col",
    "check_data",
    "check_dense_shapes",
    "check_devices",
    "check_discount",
    "check_flags",
    "check_form",
    "check_initial",
    "check_initial_distribution",
    "check_kind",
    "check_level",
    "check_memory",
    "check_number",
    "check_policy",
    "check_reference",
    "check_reward",
    "check_rows",
    "check_same_dtype",
    "check_seed",
    "check_sparse_rows",
    "check_sparse_shapes",
    "check_state_shapes",
    "check_temperature",
    "common_batch",
    "free_choices",
    "kind_of",
    "pays_alike",
    "promoted",
    "real",
    "reference_defects",
    "required",
    "reward_defects",
    "row_sum_tolerance",
    "scalar_defects",
    "states_and_actions",
    "status_error",
    "transition_defects",
    "within_memory",
]

Level = Literal["full", "cheap", "off"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", Tensor, Tensor | None)

_LEVELS = ("full", "cheap", "off")
_HALF = (torch.float16, torch.bfloat16)
_STORAGE = (torch.float32, torch.float64)
_ROW_SUM_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}


def check_level(validate: str) -> None:
    """Raise OptionError unless `validate` is "full", "cheap" or "off"."""
    if not (isinstance(validate, str) and validate in _LEVELS):
        raise OptionError(
            f"validate is {validate!r}",
            allowed='"full", "cheap", "off"',
            fix='use validate="full" unless the same arrays were checked before',
        )


# Dtypes and devices


def as_tensor(name: str, tensor: T) -> T:
    """The tensor, or None, as it is; DtypeError for anything else, and for tensors that hold their
    numbers in another way.
    """
    if tensor is None:
        return tensor
    if not isinstance(tensor, Tensor):
        known = hasattr(tensor, "__array__") or isinstance(tensor, Sequence | Real)
        kind = "int64" if name in ("crow", "col") else "float64"
        options = "" if hasattr(tensor, "dtype") else f", dtype=torch.{kind}"
        raise DtypeError(
            f"{name} is a {type(tensor).__name__}",
            allowed="a torch.Tensor",
            fix=f"pass torch.as_tensor({name}{options})" if known else f"give {name} as a tensor",
        )
    if isinstance(tensor, MaskedTensor):
        raise DtypeError(
            f"{name} is a MaskedTensor",
            allowed="a dense torch.Tensor",
            fix=f"pass {name}.get_data(), and its mask as the argument `mask`",
        )
    if tensor.is_nested:
        raise DtypeError(
            f"{name} is a nested tensor",
            allowed="a dense torch.Tensor",
            fix="call the function once for each of its parts, or pad them to one size",
        )
    if tensor.layout is not torch.strided:
        sparse = name == "transition"
        raise DtypeError(
            f"{name} has layout {_short(tensor.layout)}",
            allowed="a dense torch.Tensor" + (", or a SparseMDP" if sparse else ""),
            fix=f"pass {name}.to_dense()"
            + (", or build SparseMDP.from_torch of its CSR form (S·A, S)" if sparse else ""),
        )
    return tensor


def real(value: Any) -> float | None:
    """What stands for one number, as a float: ints, Fractions, arrays and tensors without axes.

    None for flags, text and all else, and for what no float is as large as.
    """
    if type(value) is float:
        return value
    kind = getattr(value, "dtype", None)
    if kind is None:
        known = isinstance(value, (SupportsFloat, SupportsIndex)) and not isinstance(value, bool)
    elif isinstance(kind, torch.dtype):
        known = value.ndim == 0 and kind != torch.bool and not kind.is_complex
    else:
        known = value.ndim == 0 and kind.kind in "iufO"
    try:
        return float(value) if known else None
    except (TypeError, ValueError, OverflowError):
        return None


def required(name: str, tensor: Tensor) -> Tensor:
    """`as_tensor` of what may not be left out."""
    if tensor is None:
        raise DtypeError(f"{name} is None", allowed="a torch.Tensor", fix=f"give {name}")
    return as_tensor(name, tensor)


def as_floating(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float32 or float64; half precision is promoted to float32, all else refused."""
    required(name, tensor)
    if tensor.dtype in _STORAGE:
        return tensor
    if tensor.dtype in _HALF:
        return tensor.float()
    raise DtypeError(
        f"{name} has dtype {_short(tensor.dtype)}",
        allowed="float32, float64; float16 and bfloat16 are promoted to float32",
        fix=f"pass {name}.to(torch.float64)",
    )


def check_flags(name: str, flags: Tensor | None) -> None:
    """Raise DtypeError unless `flags` is a tensor of bool, or None."""
    if flags is not None and not isinstance(flags, Tensor):
        raise DtypeError(
            f"{name} is {type(flags).__name__}",
            allowed="a bool tensor",
            fix=f"pass torch.as_tensor({name}, dtype=torch.bool)",
        )
    as_tensor(name, flags)
    if flags is not None and flags.dtype != torch.bool:
        raise DtypeError(
            f"{name} is {_short(flags.dtype)}", allowed="a bool tensor", fix=f"pass {name} != 0"
        )


def check_same_dtype(tensors: Mapping[str, Tensor]) -> None:
    """Raise DtypeError unless all tensors share one dtype."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise DtypeError(
                f"{name} has dtype {_short(tensor.dtype)}",
                allowed=f"{_short(reference.dtype)}, as {first}",
            )


def check_devices(tensors: Mapping[str, Tensor | float | None]) -> None:
    """Raise DeviceError unless all tensors live on one device; numbers and None are skipped."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise DeviceError(
                f"{first[0]} is on {first[1]} but {name} is on {tensor.device}",
                allowed="one device for all",
            )


# Sizes


def check_memory(
    what: str, numbers: int, *, fix: str, width: int = 8, device: torch.device | None = None
) -> None:
    """Raise SizeLimitError if that many numbers exceed the memory of this machine, or of a GPU.

    Args:
        what: subject of the message, e.g. "to_dense() of 100000 states".
        numbers: how many.
        fix: what to do instead.
        width: bytes of each.
        device: where they are to lie, by default on the CPU.
    """
    needed = width * numbers
    if device is not None and device.type == "cuda":
        memory, owner = torch.cuda.get_device_properties(device).total_memory, str(device)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        owner = "this machine"
    if needed > memory:
        raise SizeLimitError(
            f"{what} needs {needed / 2**30:.3g} GiB",
            allowed=f"the {memory / 2**30:.3g} GiB of {owner}",
            fix=fix,
        )


def within_memory(function: F) -> F:
    """Where memory runs out, SizeLimitError says so, with the bytes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            shortage = _shortage(error, [*args, *kwargs.values()])
            if shortage is None:
                raise
            raise shortage from error

    return cast(F, call)


_ASKED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _shortage(error: BaseException, given: list[Any]) -> SizeLimitError | None:
    """The error of the catalogue, if memory could not be had for what was `given`."""
    asked = _ASKED.search(str(error))
    if asked:
        needed = f"{round(float(asked[1]) * _UNITS[asked[2][0].lower()])} bytes more"
    elif isinstance(error, MemoryError):
        given = [x for some in given for x in (some if isinstance(some, tuple) else (some,))]
        for model in [x for x in given if hasattr(x, "__dict__") and not isinstance(x, Tensor)]:
            given = [*given, *vars(model).values()]
        size = sum(x.numel() * x.itemsize for x in given if isinstance(x, Tensor))
        needed = f"more than the {size} bytes of its tensors"
    else:
        return None
    return SizeLimitError(
        f"the problem needs {needed}",
        allowed="what memory is free",
        fix="solve it in smaller batches, in float32, or as a SparseMDP",
    )


# Shapes


def check_dense_shapes(reward: Tensor, transition: Tensor) -> None:
    """Raise ShapeError unless reward is (*B, S, A) and transition (*B, S, A, S), S, A > 0."""
    states, actions = states_and_actions("reward", reward)
    want, found = (states, actions, states), tuple(transition.shape[-3:])
    if found == want:
        return
    if found == (actions, states, actions) and states != actions:
        raise ShapeError(
            f"reward has shape {tuple(reward.shape)}",
            allowed=f"(*B, S, A) = (*B, {actions}, {states}), by the transition",
            fix="pass reward.transpose(-2, -1)",
        )
    fix = "let the last axes of transition agree with reward (*B, S, A)"
    if sorted(found) == sorted(want):
        fix = f"pass {_order(transition, want)}"
    raise ShapeError(
        f"transition has shape {tuple(transition.shape)}",
        allowed=f"(*B, S, A, S) = (*B, {states}, {actions}, {states})",
        fix=fix,
    )


# how P(t|s,a) is read from arrays whose last axes come in another order
_ORDERS = (
    "transpose(-3, -2)",  # (A, S, S): a, s, t
    "transpose(-2, -1)",  # (S, S, A): s, t, a
    "movedim(-3, -1)",  # (S, S, A): t, s, a
    "movedim(-1, -3)",  # (A, S, S): a, t, s
    "transpose(-3, -1)",  # (S, A, S): t, a, s
)


def _order(transition: Tensor, shape: tuple[int, ...]) -> str:
    """The expressions that bring the axes into order: those after which all rows sum to one, else
    the first that gives this shape; empty where none does.
    """
    fitting, stochastic = "", []
    for order in _ORDERS:
        method, axes = order.rstrip(")").split("(")
        moved: Tensor = getattr(transition, method)(*map(int, axes.split(",")))
        if tuple(moved.shape[-3:]) != shape:
            continue
        expression = f"transition.{order}"
        fitting = fitting or expression
        if is_concrete(transition):
            total = moved.sum(-1, dtype=torch.float64)
            tolerance = row_sum_tolerance(transition.dtype, shape[0])
            if ((total - 1).abs() <= tolerance).all():
                stochastic.append(expression)
    if stochastic:  # several where S = A: which axis is the state, the numbers do not tell
        return " or ".join(stochastic)
    return fitting if tuple(transition.shape[-3:]) != shape else ""


def check_sparse_shapes(reward: Tensor, values: Tensor, crow: Tensor, col: Tensor) -> None:
    """Raise ShapeError or SparseFormatError unless the lengths of the CSR arrays fit the reward."""
    states, actions = states_and_actions("reward", reward)
    for name, index in (("crow", crow), ("col", col)):
        if index.dtype not in (torch.int64, torch.int32):
            raise DtypeError(
                f"{name} has dtype {_short(index.dtype)}",
                allowed="int64, or int32 which is widened",
                fix=f"pass {name}.to(torch.int64)",
            )
        if index.ndim != 1:
            raise SparseFormatError(
                f"{name} has shape {tuple(index.shape)}", allowed="one axis: one pattern for all"
            )
    if crow.shape[0] != states * actions + 1:
        raise SparseFormatError(
            f"crow has length {crow.shape[0]}", allowed=f"S·A + 1 = {states * actions + 1}"
        )
    if values.ndim < 1 or values.shape[-1] != col.shape[0]:
        raise SparseFormatError(
            f"values has shape {tuple(values.shape)}", allowed=f"(*B, nnz) = (*B, {col.shape[0]})"
        )


def check_state_shapes(
    states: int,
    actions: int,
    *,
    mask: Tensor | None = None,
    terminal: Tensor | None = None,
    reference: Tensor | None = None,
    initial_distribution: Tensor | None = None,
) -> None:
    """Raise ShapeError or DtypeError for the optional tensors over states and actions."""
    for name, flags, shape, letters in (
        ("mask", mask, (states, actions), "S, A"),
        ("terminal", terminal, (states,), "S"),
    ):
        check_flags(name, flags)
        if flags is not None:
            _check_event_shape(name, flags, shape, letters)
    if reference is not None:
        _check_event_shape("reference", reference, (states, actions), "S, A")
    if initial_distribution is not None:
        _check_event_shape("initial_distribution", initial_distribution, (states,), "S")


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """`torch.broadcast_shapes`, which takes a while, of shapes that are mostly () or equal."""
    longest: tuple[int, ...] = ()  # in words that Dynamo follows: no max by a key, no `not shape`
    for shape in shapes:
        longest = shape if len(shape) > len(longest) else longest
    if all(len(shape) == 0 or shape == longest for shape in shapes):
        return tuple(longest)
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def broadcast_batches(batches: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The common batch shape, or ShapeError naming the tensor whose batch axes do not broadcast."""
    shape: tuple[int, ...] = ()
    for name, batch in batches.items():
        if not batch:
            continue
        try:
            shape = broadcast(shape, tuple(batch))
        except RuntimeError:
            raise ShapeError(
                f"{name} has batch axes {tuple(batch)}",
                allowed=f"axes that broadcast with {shape} of the tensors before it",
                fix="make each batch axis equal to the others' or one",
            ) from None
    return shape


def states_and_actions(name: str, table: Tensor) -> tuple[int, int]:
    """S and A of a table (*B, S, A), a reward or a policy."""
    if table.ndim < 2 or table.shape[-1] == 0 or table.shape[-2] == 0:
        raise ShapeError(
            f"{name} has shape {tuple(table.shape)}",
            allowed="(*B, S, A) with S ≥ 1 and A ≥ 1",
            fix=f"give one {'reward' if name == 'reward' else 'probability'} per state and action",
        )
    return table.shape[-2], table.shape[-1]


def _check_event_shape(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape[-len(shape) :]) != shape:
        sizes = ", ".join(map(str, shape))
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}",
            allowed=f"(*B, {letters}) = (*B, {sizes})",
            fix=f"let the last axes of {name} agree with reward (*B, S, A)",
        )


# Scalars


def check_discount(discount: float | Tensor, *, data: bool = True) -> float | Tensor:
    """A float, or a tensor as it is; DiscountError unless γ ∈ [0, 1), read only if `data`."""
    return _checked_scalar(Status.BAD_DISCOUNT, discount, data)


def check_temperature(temperature: float | Tensor, *, data: bool = True) -> float | Tensor:
    """A float, or a tensor as it is; TemperatureError unless 0 < τ < ∞, read only if `data`."""
    return _checked_scalar(Status.BAD_TEMPERATURE, temperature, data)


def _checked_scalar(status: Status, value: float | Tensor, data: bool) -> float | Tensor:
    name = _INPUTS[status][1]
    if isinstance(value, Tensor):
        as_floating(name, value)
        if data and is_concrete(value):
            _refuse(scalar_defects(status, value))
        return value
    number = _number(name, value)
    if not _RANGES[status](number):
        raise status_error(status, 0, value)
    return number


# Options


def check_count(name: str, value: Any, least: int = 1, *, below: float = math.inf) -> int:
    """A whole number from `least` on."""
    try:
        if not isinstance(value, bool) and least <= operator.index(value) < below:
            return operator.index(value)
    except TypeError:
        pass
    top = "" if below == math.inf else f", below {below}"
    raise OptionError(f"{name} is {value!r}", allowed=f"a whole number, {least} or more{top}")


def check_seed(seed: Any) -> int:
    """A seed that a torch.Generator takes."""
    return check_count("seed", seed, 0, below=2**64)


def check_number(
    name: str,
    value: Any,
    least: float = 0.0,
    *,
    above: bool = False,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """A number in [least, below), without `least` itself if `above`, with inf if `infinite`."""
    number = None
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
        number = real(value.reshape(()) if isinstance(value, Tensor) else value)
    number = math.nan if number is None else number
    low = number > least if above else number >= least
    if low and (number < below or (infinite and number == math.inf)):
        return number
    opening, closing = "(" if above else "[", "]" if infinite else ")"
    raise OptionError(
        f"{name} is {value!r}", allowed=f"a number in {opening}{least:g}, {below:g}{closing}"
    )


def check_callable(name: str, value: Any) -> None:
    """A function."""
    if not callable(value):
        raise OptionError(f"{name} is {kind_of(value)}", allowed="a function")


def check_kind(name: str, value: Any, kind: type) -> None:
    """An instance of the class."""
    if not isinstance(value, kind):
        raise OptionError(
            f"{name} is {kind_of(value)}",
            allowed=f"a {kind.__name__}",
            fix=f"pass {name}={kind.__name__}(...)",
        )


def kind_of(value: Any) -> str:
    """A value in the words of an error: a number or a text as it is, else its type."""
    return f"{value!r}" if isinstance(value, Real | str | None) else f"a {type(value).__name__}"


# Data


def row_sum_tolerance(dtype: torch.dtype, states: int) -> float:
    """How far from one a row of P may sum: the user's own rounding plus that of S additions."""
    return _ROW_SUM_TOLERANCE[dtype] + below_zero(dtype, states)


def below_zero(dtype: torch.dtype, terms: int) -> float:
    """How far below zero a probability may lie: what is left of one after S subtractions."""
    return terms * torch.finfo(dtype).eps


# What can be wrong with data, in the order in which it is told: for the border, and for the ops as
# PyTorch computes them. csrc/core/findings.h says the same.


class Defects(NamedTuple):
    """Where numbers are bad, for each problem of a batch."""

    status: Status
    bad: Tensor  # (*B, k) bool
    values: Tensor  # broadcasts to `bad`


_RANGES: dict[Status, Callable[[Any], Any]] = {
    Status.BAD_DISCOUNT: lambda discount: (discount >= 0) & (discount < 1),
    Status.BAD_TEMPERATURE: lambda temperature: (temperature > 0) & (temperature < math.inf),
}
"""Of a number or of each of a tensor; NaN lies in none."""


def scalar_defects(status: Status, values: Tensor) -> Iterator[Defects]:
    """γ outside [0, 1), or τ that is not positive and finite, (*B), by their status."""
    yield Defects(status, ~_RANGES[status](values).unsqueeze(-1), values.unsqueeze(-1))


def reference_defects(log_reference: Tensor) -> Iterator[Defects]:
    """log μ that is NaN or infinite, (*B, S, A), and states without an action."""
    logs = log_reference.flatten(-2)
    yield Defects(Status.BAD_REFERENCE, ~(logs < math.inf), logs)
    empty = (log_reference == -math.inf).all(-1)
    yield Defects(Status.NO_ACTION, empty, empty)


def reward_defects(reward: Tensor) -> Iterator[Defects]:
    """NaN and infinities of r, (*B, S, A)."""
    rewards = reward.flatten(-2)
    yield Defects(Status.NON_FINITE_REWARD, ~torch.isfinite(rewards), rewards)


def transition_defects(
    transition: Tensor, sums: Tensor, ends: Tensor | None, event: int, dtype: torch.dtype
) -> Iterator[Defects]:
    """Rows of P that are no probability vectors; no more than a look at all is taken if they are.

    Args:
        transition: P, (*B, S, A, S), or its CSR values (*B, nnz).
        sums: of its rows, (*B, S, A) float64.
        ends: (*B, S, A) bool, rows that have been zeroed; None is none.
        event: the axes of P behind *B.
        dtype: in which P is stored.
    """
    states = sums.shape[-2]
    least = -below_zero(dtype, states)
    fine = (sums - 1).abs() <= row_sum_tolerance(dtype, states)
    fine = fine if ends is None else fine | ends
    if fine.all() and (transition.numel() == 0 or (transition.amin(-1) >= least).all()):
        return
    entries = transition.flatten(-event)
    yield Defects(Status.NON_FINITE_TRANSITION, ~torch.isfinite(entries), entries)
    yield Defects(Status.NEGATIVE_PROBABILITY, entries < least, entries)
    yield Defects(Status.ROW_SUM, ~fine.flatten(-2), sums.flatten(-2))


def _refuse(defects: Iterable[Defects], **described: Any) -> None:
    """Raise the error of the first defect that there is."""
    for status, bad, values in defects:
        if bad.any():
            (*batch, place), value = _first(bad, values)
            raise status_error(status, place, value, batch=tuple(batch), **described)


def check_reward(reward: Tensor) -> None:
    """Raise NonFiniteInputError at the first NaN or infinity of r, (*B, S, A)."""
    _refuse(reward_defects(reward), shape=tuple(reward.shape[-2:]))


def check_rows(transition: Tensor, continuing: Tensor | None) -> None:
    """Raise unless every row of P is a probability vector.

    Args:
        transition: P, (*B, S, A, S).
        continuing: (*B, S, A) bool, False for rows that have been zeroed; None means no such row.

    Raises:
        NonFiniteInputError, NegativeProbabilityError, NonStochasticError: in this order.
    """
    dtype, shape = transition.dtype, (transition.shape[-1], transition.shape[-2])
    sums = transition.sum(-1, dtype=torch.float64)
    ends = None if continuing is None else ~continuing
    found = transition_defects(transition, sums, ends, 3, dtype)
    _refuse(found, shape=shape, dtype=dtype, transition=transition)


def check_crow_col(crow: Tensor, col: Tensor, states: int) -> None:
    """Raise SparseFormatError unless crow rises from 0 to nnz and col lies in [0, S).

    Columns within a row may come in any order; duplicates add up.
    """
    nnz = col.shape[0]
    for position, want in ((0, 0), (-1, nnz)):
        if int(crow[position]) != want:
            raise SparseFormatError(
                f"crow is {int(crow[position])}",
                where=f"index {position % crow.shape[0]}",
                allowed=str(want),
            )
    falling = crow[1:] < crow[:-1]
    if falling.any():
        (index,), _ = _first(falling, crow[1:])
        raise SparseFormatError(
            f"crow falls from {int(crow[index])} to {int(crow[index + 1])}",
            where=f"index {index + 1}",
            allowed="row pointers that never fall",
        )
    outside = (col < 0) | (col >= states)
    if outside.any():
        (index,), value = _first(outside, col)
        raise SparseFormatError(
            f"col is {int(value)}", where=f"index {index}", allowed=f"0 to {states - 1}"
        )


def check_sparse_rows(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    shape: tuple[int, int],
    continuing: Tensor | None,
) -> None:
    """`check_rows` for CSR values.

    Args:
        values: (*B, nnz).
        crow: (S·A + 1,) int64.
        col: (nnz,) int64.
        shape: (S, A).
        continuing: (*B, S, A) bool, False for rows that have been zeroed; None means no such row.
    """
    states, actions = shape
    rows = torch.arange(states * actions, device=crow.device).repeat_interleave(crow.diff())
    sums = values.new_zeros((*values.shape[:-1], states * actions), dtype=torch.float64)
    sums = sums.index_add(-1, rows, values.to(torch.float64))
    sums = sums.reshape(*values.shape[:-1], states, actions)
    ends = None if continuing is None else ~continuing
    found = transition_defects(values, sums, ends, 1, values.dtype)
    _refuse(found, shape=shape, dtype=values.dtype, crow=crow, col=col)


def check_actions(mask: Tensor, terminal: Tensor | None) -> None:
    """Raise EmptyActionSetError at the first state that is not terminal and has no action."""
    empty = ~mask.any(-1)
    if terminal is not None:
        empty = empty & ~terminal
    _refuse([Defects(Status.NO_ACTION, empty, empty)], shape=tuple(mask.shape[-2:]))


def check_reference(reference: Tensor, available: Tensor | None) -> None:
    """Raise unless μ is positive and finite wherever an action is available."""
    seen = True if available is None else available
    broken = ~torch.isfinite(reference) & seen
    if broken.any():
        weights = reference.broadcast_to(broken.shape).flatten(-2)
        defects = Defects(Status.BAD_REFERENCE, broken.flatten(-2), weights)
        _refuse([defects], shape=tuple(broken.shape[-2:]))
    bad = (reference <= 0) & seen
    if bad.any():
        (*batch, state, action), value = _first(bad, reference)
        raise ReferencePolicyError(
            f"reference is {value:.6g}",
            where=_place(batch, state=state, action=action),
            allowed="above 0",
        )


def check_initial_distribution(initial: Tensor) -> None:
    """Raise unless ρ, (*B, S), is a probability vector."""
    _check_finite("initial_distribution", initial, allowed="finite numbers in [0, 1]")
    bad = initial < -below_zero(initial.dtype, initial.shape[-1])
    if bad.any():
        (*batch, state), value = _first(bad, initial)
        raise InitialDistributionError(
            f"initial_distribution is {value:.6g}",
            where=_place(batch, state=state),
            allowed="at least 0",
        )
    total = initial.sum(-1, dtype=torch.float64)
    tolerance = row_sum_tolerance(initial.dtype, initial.shape[-1])
    bad = (total - 1).abs() > tolerance
    if bad.any():
        place, value = _first(bad, total)
        raise InitialDistributionError(
            f"initial_distribution sums to {value:.12g}",
            where=_place(place),
            allowed=f"1 ± {tolerance:.3g} for {_short(initial.dtype)}",
        )


def check_initial(initial: Tensor) -> None:
    """Raise NonFiniteInputError at the first NaN or infinity of V₀, (*B, S)."""
    _check_finite("initial", initial, allowed="finite numbers", fix="give a finite start, or none")


def check_policy(policy: Tensor, forbidden: Tensor | None = None) -> None:
    """Raise PolicyError unless π, (*B, S, A), is a probability distribution over the actions of
    every state, with nothing on those that are `forbidden`, (*B, S, A) bool.
    """
    least = -below_zero(policy.dtype, policy.shape[-1])
    bad = ~(policy >= least)  # NaN fails too; an infinity fails the sum
    if bad.any():
        (*batch, state, action), value = _first(bad, policy)
        raise PolicyError(
            f"policy is {value:.6g}",
            where=_place(batch, state=state, action=action),
            allowed="at least 0",
        )
    total = policy.sum(-1, dtype=torch.float64)
    tolerance = row_sum_tolerance(policy.dtype, policy.shape[-1])
    bad = ~((total - 1).abs() <= tolerance)
    if bad.any():
        (*batch, state), value = _first(bad, total)
        raise PolicyError(
            f"policy sums to {value:.12g}",
            where=_place(batch, state=state),
            allowed=f"1 ± {tolerance:.3g} for {_short(policy.dtype)}",
        )
    if forbidden is not None and (bad := (policy > 0) & forbidden).any():
        (*batch, state, action), value = _first(bad, policy)
        raise PolicyError(
            f"policy is {value:.6g} behind the mask",
            where=_place(batch, state=state, action=action),
            allowed="0 there",
            fix="set it to zero there and normalise over the last axis",
        )


# A whole MDP, from its fields by name; `entries` names the tensor that holds P's numbers


def promoted(entries: str, fields: Mapping[str, Any], validate: str) -> dict[str, Any]:
    """The numbers among the fields: half precision as float32; the discount as a float, if it is no
    tensor.
    """
    check_level(validate)
    for name in ("mask", "terminal"):
        check_flags(name, fields[name])
    for name in ("crow", "col") if "crow" in fields else ():
        required(name, fields[name])
    found: dict[str, Any] = {
        name: as_floating(name, fields[name])
        for name in ("reward", entries, "reference", "initial_distribution")
        if fields[name] is not None or name in ("reward", entries)
    }
    found["discount"] = check_discount(fields["discount"], data=False)
    return found


def check_form(entries: str, fields: Mapping[str, Any]) -> None:
    """Shapes, dtypes, devices, numbers: all that can be checked without reading data."""
    reward, transition = fields["reward"], fields[entries]
    if "crow" in fields:
        check_sparse_shapes(reward, transition, fields["crow"], fields["col"])
    else:
        check_dense_shapes(reward, transition)
    check_same_dtype({"reward": reward, entries: transition})
    check_devices(fields)
    optional = {name: fields[name] for name in ("mask", "terminal", "reference")}
    start = fields["initial_distribution"]
    check_state_shapes(*reward.shape[-2:], **optional, initial_distribution=start)
    check_discount(fields["discount"])


def common_batch(entries: str, event: int, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The batch axes of an MDP whose P has so many axes of its own."""
    axes = {entries: event, "reward": 2, "discount": 0, "mask": 2, "terminal": 1, "reference": 2}
    batch = broadcast_batches(
        {
            name: tuple(tensor.shape[: max(tensor.ndim - own, 0)])
            for name, own in axes.items()
            if isinstance(tensor := fields[name], Tensor)
        }
    )
    if (initial := fields["initial_distribution"]) is not None:
        start = tuple(initial.shape[:-1])
        if broadcast_batches({"": batch, "initial_distribution": start}) != batch:
            raise ShapeError(
                f"initial_distribution has batch axes {start}",
                allowed=f"axes that broadcast to {batch} of the MDP",
                fix="expand the reward to the batch that is meant",
            )
    return batch


def check_data(
    entries: str,
    fields: Mapping[str, Any],
    changed: frozenset[str],
    check_its_rows: Callable[[], None],
) -> bool | None:
    """Read the data of the fields that changed, and of those whose meaning they change; each where
    it holds numbers, whatever a transform has made of the others.

    Returns:
        Whether a terminal state has a choice whose entropy counts; None if that was not looked at.
    """
    reward, mask, terminal, reference = (
        fields[name] for name in ("reward", "mask", "terminal", "reference")
    )
    masks, free = changed & {"mask", "terminal"}, None
    if mask is not None and masks and is_concrete(mask, terminal):
        check_actions(mask, terminal)
    seen = reward.shape[-1] > 1 and masks | changed & {"reference"}
    if terminal is not None and seen and is_concrete(mask, terminal, reference):
        choices = terminal & free_choices(mask, reference, reward.shape[-1])
        free = bool(choices.any())
    if "reward" in changed and is_concrete(reward):
        check_reward(reward)
    if masks or entries in changed:
        index = (fields.get(name) for name in ("crow", "col"))
        if is_concrete(fields[entries], mask, terminal, *index):
            check_its_rows()
    weights = reference if changed & {"reference", "mask"} else None
    if weights is not None and is_concrete(weights, mask):
        check_reference(weights, mask)
    start = fields["initial_distribution"]
    if start is not None and "initial_distribution" in changed and is_concrete(start):
        check_initial_distribution(start)
    return free


# Ends that leave a choice


def free_choices(mask: Tensor | None, reference: Tensor | None, actions: int) -> Tensor:
    """(*B, S) bool, or (), where there is more than one action, and V differs from r + γPV if all
    of them do the same: unless μ sums to one over those available.
    """
    count = torch.as_tensor(actions) if mask is None else mask.sum(-1)
    free = count > 1
    if reference is None:
        return free
    weights = reference.detach() if mask is None else torch.where(mask, reference.detach(), 0.0)
    total = weights.sum(-1, dtype=torch.float64)
    return free.to(total.device) & ~((total - 1).abs() <= _ROW_SUM_TOLERANCE[torch.float32])


def pays_alike(reward: Tensor, mask: Tensor | None, states: Tensor) -> bool:
    """Whether in one of these states, (*B, S) bool, every available action pays the same."""
    if not is_concrete(reward, mask, states):
        return False
    paid = reward.detach()
    high, low = (paid, paid)
    if mask is not None:
        high, low = paid.masked_fill(~mask, -math.inf), paid.masked_fill(~mask, math.inf)
    return bool(((high.amax(-1) == low.amin(-1)) & states).any())


# The second line of defence: what the ops found


def status_error(
    status: int,
    location: int,
    value: Any,
    *,
    shape: tuple[int, ...] = (1, 1),
    dtype: torch.dtype = torch.float64,
    transition: Tensor | None = None,
    batch: tuple[int, ...] = (),
    crow: Tensor | None = None,
    col: Tensor | None = None,
) -> BirlError:
    """The error for a number that the border or an op refused.

    Args:
        status: `Status` of one problem, 10 or more.
        location: its info[3], a flat index inside that problem.
        value: its info[4], the offending number.
        shape: (S, A).
        dtype: dtype of reward and transition.
        transition: P, if it is dense: it may tell that its axes come in another order.
        batch: index of the problem in the batch.
        crow: row pointers of a sparse transition.
        col: next states of a sparse transition.
    """
    states, actions = shape
    row = location
    if status in (Status.NEGATIVE_PROBABILITY, Status.NON_FINITE_TRANSITION):
        if crow is not None and col is not None:
            row = int(torch.searchsorted(crow, location, right=True)) - 1
            following = int(col[location])
        else:
            row, following = divmod(location, states)
        pair = _place(batch, state=row // actions, action=row % actions, next_state=following)
    else:
        pair = _place(batch, state=row // actions, action=row % actions)
    if status == Status.ROW_SUM:
        return _row_sum_error(value, pair, dtype, states, transition)
    if status == Status.NO_ACTION:
        state, allowed = _place(batch, state=location), "at least one available action"
        return EmptyActionSetError(
            f"mask forbids all {actions} actions", where=state, allowed=allowed
        )
    if status not in _INPUTS:
        raise ValueError(f"status {status} does not describe an input")
    kind, name, allowed = _INPUTS[status]
    if name in ("discount", "temperature"):
        return kind(f"{name} is {value!r}", where=_place(batch), allowed=allowed)
    return kind(f"{name} is {value:.6g}", where=pair, allowed=allowed)


_INPUTS: dict[int, tuple[type[BirlError], str, str]] = {
    Status.NEGATIVE_PROBABILITY: (NegativeProbabilityError, "transition", "at least 0"),
    Status.NON_FINITE_TRANSITION: (NonFiniteInputError, "transition", "finite numbers in [0, 1]"),
    Status.NON_FINITE_REWARD: (NonFiniteInputError, "reward", "finite numbers"),
    Status.BAD_REFERENCE: (NonFiniteInputError, "reference", "finite numbers above 0"),
    Status.BAD_DISCOUNT: (DiscountError, "discount", "0 ≤ discount < 1"),
    Status.BAD_TEMPERATURE: (TemperatureError, "temperature", "positive and finite"),
}


def _row_sum_error(
    value: float, where: str, dtype: torch.dtype, states: int, dense: Tensor | None
) -> BirlError:
    tolerance = row_sum_tolerance(dtype, states)
    order = "" if dense is None else _order(dense, tuple(dense.shape[-3:]))
    if order:
        fix = f"pass {order}, whose rows sum to one"
    elif abs(value) <= tolerance:
        fix = (
            "if the state lacks this action, set `mask` to False there; "
            "if the process ends there, mark the state in `terminal`"
        )
    elif value < 1:
        fix = (
            "normalise the row if it should sum to one; if the process ends there with the rest, "
            "send the rest to an absorbing state that is True in `terminal` and False in `mask`"
        )
    else:
        fix = "normalise the row"
    return NonStochasticError(
        f"transition row sums to {value:.12g}",
        where=where,
        allowed=f"1 ± {tolerance:.3g} for {_short(dtype)}",
        fix=fix,
    )


# Helpers


def _number(name: str, value: Any) -> float:
    if (number := real(value)) is not None:
        return number
    several = isinstance(value, Sized) and not isinstance(value, str)
    raise DtypeError(
        f"{name} is {value!r}",
        allowed="a number or a tensor",
        fix=f"pass torch.as_tensor({name}, dtype=torch.float64)"
        if several
        else f"pass {name} as a float",
    )


def _check_finite(name: str, vector: Tensor, **remedy: str) -> None:
    """Raise NonFiniteInputError at the first NaN or infinity of a vector over states, (*B, S)."""
    bad = ~torch.isfinite(vector)
    if bad.any():
        (*batch, state), value = _first(bad, vector)
        where = _place(batch, state=state)
        raise NonFiniteInputError(f"{name} is {value:.6g}", where=where, **remedy)


def _first(bad: Tensor, values: Tensor) -> tuple[tuple[int, ...], float]:
    """Index of the first True, and the value there; `values` broadcasts to `bad`."""
    flat = int(bad.flatten().to(torch.uint8).argmax())
    index: list[int] = []
    for size in reversed(bad.shape):
        flat, remainder = divmod(flat, size)
        index.insert(0, remainder)
    return tuple(index), values.broadcast_to(bad.shape)[tuple(index)].item()


def _place(
    batch: tuple[int, ...] | list[int] = (),
    *,
    state: int | None = None,
    action: int | None = None,
    next_state: int | None = None,
) -> str:
    parts = []
    if batch:
        parts.append(f"batch {batch[0] if len(batch) == 1 else tuple(batch)}")
    for name, index in (("state", state), ("action", action), ("next state", next_state)):
        if index is not None:
            parts.append(f"{name} {index}")
    return ", ".join(parts)


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
