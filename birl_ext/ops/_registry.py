"""The dispatcher library of the package; how a vmapped axis joins the two batch axes of an op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.utils import unwrap_dead_wrappers

__all__ = ["LIBRARY", "Function", "are_plain", "fold", "to_lanes"]

LIBRARY = torch.library.Library("birl_ext", "DEF")


class Function(torch.autograd.Function):
    """An autograd.Function that takes positional arguments only.

    Torch's own `apply` works out the signature of `forward` and binds it at every call, which costs
    more than the rest of the call.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return custom_function_call(cls, *args)
        base: Any = super(torch.autograd.Function, cls)
        return base.apply(*unwrap_dead_wrappers(args))


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether an op may be computed at once: real tensors, and nobody listens to the dispatcher.

    The dispatcher costs more than the arithmetic of a small problem.
    """
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor
    # a lazily negated tensor is resolved by the dispatcher too
    return all(type(t) in _PLAIN and not batched(t) and not t.is_neg() for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def fold(
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
    for tensor, dim in zip(tensors[3:], dims[3:], strict=True):
        if dim is None and tensor.dim() == 1:  # absent
            merged.append(tensor)
            continue
        lane = (
            tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
            if dim is None
            else tensor.movedim(dim, axis)
        )
        merged.append(lane.flatten(axis, axis + 1))
    return merged, axis


def to_lanes(
    outputs: Sequence[Tensor], axis: int, size: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Split the merged axis of every output again."""
    split = tuple(x.unflatten(axis, (size, x.shape[axis] // size)) for x in outputs)
    return split, (axis,) * len(split)
