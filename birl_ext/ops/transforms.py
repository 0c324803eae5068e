"""The dispatcher library of the package; how a vmapped axis joins the two batch axes of an op."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor

from birl_ext.torch_internals import (
    BEFORE_TRANSFORMS,
    DYNAMO,
    computes_directly,
    custom_function_call,
    excluding_autograd,
    forward_mode,
    innermost_level,
    is_tracing,
    transforms_active,
    unwrap_dead_wrappers,
    unwrap_level,
    wrap_level,
)

__all__ = [
    "LIBRARY",
    "Function",
    "define",
    "in_graph",
    "join_mapped_axis",
    "split_mapped_axis",
]

F = TypeVar("F", bound=Callable[..., Any])

LIBRARY = torch.library.Library("birl_ext", "DEF")


class Function(torch.autograd.Function):
    """An autograd.Function that takes positional arguments only: tensors, then options.

    Torch's own `apply` works out the signature of `forward` and binds it at every call, which costs
    more than the rest of the call. And torch calls `jvp` with forward mode switched off, so that an
    outer derivative in forward mode would silently be zero: here the rule runs one level below.
    """

    op: ClassVar[str]
    tensors: ClassVar[int]  # how many
    compute: ClassVar[Callable[..., tuple[Tensor, ...]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "jvp" in cls.__dict__:
            cls.jvp = staticmethod(_one_level_below(cls.jvp))  # type: ignore[method-assign]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if transforms_active():
            return custom_function_call(cls, *args)
        if is_tracing():  # the op, which can be saved, at sizes that are numbers
            sizes = (tuple(map(int, x)) if isinstance(x, tuple) else x for x in args)
            return getattr(torch.ops.birl_ext, cls.op)(*sizes)
        base: Any = super(torch.autograd.Function, cls)
        return base.apply(*unwrap_dead_wrappers(args))

    @classmethod
    def forward(cls, *args: Any) -> tuple[Tensor, ...]:
        if computes_directly(args[: cls.tensors]):
            return cls.compute(*args)
        with excluding_autograd():  # or the op would ask for its derivative again
            outputs: tuple[Tensor, ...] = getattr(torch.ops.birl_ext, cls.op)(*args)
        return outputs


_KINDS = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", Sequence[int]: "SymInt[]"}


def define(
    rule: type[Function],
    compute: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    *arguments: type | dict[str, type],
    results: int,
) -> None:
    """Declare an op, named as its Function in lower case: by the fields of named tuples and by
    names with their types, what computes it, and shapes for a compiler.

    The bare op has the derivative too: an exported or traced graph holds it alone. A level of
    functorch is met before the dispatcher has entered it, as by `apply` itself.
    """
    named = [
        (name, kind)
        for group in arguments
        for name, kind in (group if isinstance(group, dict) else get_type_hints(group)).items()
    ]
    op = rule.op = rule.__name__.lower()
    rule.compute, rule.tensors = compute, sum(kind is Tensor for _, kind in named)
    schema = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in named)
    LIBRARY.define(f"{op}({schema}) -> ({', '.join(['Tensor'] * results)})")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(op, compute, key)
    torch.library.register_fake(f"birl_ext::{op}", fake)
    for key in ("Autograd", BEFORE_TRANSFORMS):
        LIBRARY.impl(op, rule.apply, key)


def _one_level_below(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for tangents that outer transforms can follow, as they follow torch's own operators.

    Of a functorch level's tensors only what they wrap is read, under the levels below it.
    """

    @functools.wraps(rule)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if not transforms_active():
            return rule(ctx, *tangents)
        interpreter = innermost_level()
        level = interpreter.level()

        def unwrapped(value: Any) -> Any:
            return unwrap_level(value, level) if isinstance(value, Tensor) else value

        below = _Below(ctx, tuple(map(unwrapped, ctx.saved_tensors)))
        with forward_mode(True), interpreter.lower():
            found = rule(below, *map(unwrapped, tangents))
        return tuple(
            wrap_level(value, level) if isinstance(value, Tensor) else value for value in found
        )

    return jvp


class _Below:
    """A context whose tensors are those of the level below."""

    def __init__(self, ctx: Any, saved_tensors: tuple[Tensor, ...]) -> None:
        self._ctx = ctx
        self.saved_tensors = saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def in_graph(function: F) -> F:
    """`torch.compiler.allow_in_graph`, told to Dynamo when Dynamo is imported.

    Without it Dynamo would trace into the autograd.Function and drop its rules: silent zeros. At
    once it would cost every `import birl_ext` the second that importing Dynamo takes.
    """
    if DYNAMO in sys.modules:
        torch.compiler.allow_in_graph(function)
    else:
        if not _IN_GRAPH:
            sys.meta_path.insert(0, _DynamoWatch())
        _IN_GRAPH.append(function)
    return function


_IN_GRAPH: list[Callable[..., Any]] = []


class _DynamoWatch(importlib.abc.MetaPathFinder):
    """Finds Dynamo as anyone would, and speaks to it as soon as it has been executed."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != DYNAMO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for function in _IN_GRAPH:
                    torch.compiler.allow_in_graph(function)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def join_mapped_axis(
    tensors: Sequence[Tensor], dims: Sequence[int | None], size: int
) -> tuple[list[Tensor], int]:
    """Merge a vmapped axis into N if the transition varies along it, else into G, so that P stays
    shared.

    `tensors` begins with transition, crow, col; empty tensors stand for absent arguments and stay
    so. Returns the merged tensors and the axis (0 or 1) that took the new one.
    """
    if dims[1] is not None or dims[2] is not None:
        raise NotImplementedError("birl_ext: vmap over a sparsity pattern is not supported")
    merged, axis = list(tensors[:3]), 1
    if dims[0] is not None:
        merged[0], axis = tensors[0].movedim(dims[0], 0).flatten(0, 1), 0
    for tensor, dim in zip(tensors[3:], dims[3 : len(tensors)], strict=True):
        if dim is None and tensor.dim() == 1:  # absent
            merged.append(tensor)
            continue
        one = (
            tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
            if dim is None
            else tensor.movedim(dim, axis)
        )
        merged.append(one.flatten(axis, axis + 1))
    return merged, axis


def split_mapped_axis(
    outputs: Sequence[Tensor], axis: int, size: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Split the merged axis of every output again."""
    split = tuple(x.unflatten(axis, (size, x.shape[axis] // size)) for x in outputs)
    return split, (axis,) * len(split)
