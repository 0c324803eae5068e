"""The upper-level variable x: a tensor, a list, tuple or dict of tensors, or a module.

The levels are given it in that form, an optimiser its leaves, the tensors that it is made of.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from birl_ext.errors import (
    DeviceError,
    DtypeError,
    GradientError,
    NonFiniteInputError,
    OptionError,
    ShapeError,
)
from birl_ext.model import checks

__all__ = [
    "Variables",
    "check_start",
    "described",
    "drawn",
    "entry",
    "held",
    "joined",
    "leaves",
    "named",
    "rebuilt",
    "require_finite",
    "split",
    "starts",
    "tracked",
]

Variables = Tensor | Sequence[Tensor] | Mapping[Any, Tensor] | nn.Module
"""x: of a module, its parameters that require a gradient."""


def named(x: Variables) -> dict[str, Tensor]:
    """The leaves of x by name: x, x[0], x['a'] or x.weight."""
    if isinstance(x, Tensor):
        return {"x": x}
    if isinstance(x, nn.Module):
        return {f"x.{name}": p for name, p in x.named_parameters() if p.requires_grad}
    parts = x.items() if isinstance(x, Mapping) else enumerate(x)
    return {f"x[{key!r}]": part for key, part in parts}


def leaves(x: Variables) -> list[Tensor]:
    """The tensors that x is made of."""
    return list(named(x).values())


def held(x: Variables) -> list[Tensor]:
    """All tensors of x: of a module also those that are not moved."""
    return [*x.parameters(), *x.buffers()] if isinstance(x, nn.Module) else leaves(x)


def starts(x: Variables) -> torch.Size:
    """(M,) where x is one tensor (M, …) of M starts, else ()."""
    return x.shape[:1] if isinstance(x, Tensor) and x.dim() > 1 else torch.Size()


def joined(parts: Iterable[Tensor], starts: Sequence[int] = ()) -> Tensor:
    """Tensors like the leaves as one of all their numbers, (*starts, d)."""
    return torch.cat([part.reshape(*starts, -1) for part in parts], -1)


def split(vector: Tensor, x: Variables) -> list[Tensor]:
    """The reverse of `joined`."""
    like = leaves(x)
    parts = torch.split(vector.flatten(), [leaf.numel() for leaf in like])
    return [part.reshape(leaf.shape) for part, leaf in zip(parts, like, strict=True)]


def rebuilt(x: Variables, parts: Iterable[Tensor]) -> Any:
    """A copy of x without a graph, in the same form, with other numbers in its leaves."""
    numbers = [part.detach().clone() for part in parts]
    if isinstance(x, nn.Module):
        x = copy.deepcopy(x)
        with torch.no_grad():
            for leaf, number in zip(leaves(x), numbers, strict=True):
                leaf.copy_(number)
        return x
    if isinstance(x, Tensor):
        return numbers[0]
    if isinstance(x, Mapping):
        return dict(zip(x, numbers, strict=True))
    return x._make(numbers) if hasattr(x, "_make") else type(x)(numbers)  # type: ignore[call-arg]


def drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) numbers in the shape of a leaf, from a generator on the CPU."""
    found = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    return found.to(like.device)


def tracked(x: Any) -> Any:
    """x itself, with leaves that require a gradient."""
    for leaf in leaves(x):
        leaf.requires_grad_()
    return x


def check_start(x: Any, *, vector: bool = False) -> Any:
    """A copy of x, without a graph: floating and finite; if `vector`, a tensor is (d,)."""
    module = isinstance(x, nn.Module)
    if isinstance(x, Iterator):  # a module's parameters()
        x = list(x)
    if not (module or isinstance(x, list | tuple | Mapping)):
        checks.as_floating("x", x)
    own = named(x)
    if not own:
        raise OptionError(
            "x has no " + ("parameter that requires a gradient" if module else "tensors"),
            allowed="one or more",
            fix="release some by requires_grad_()" if module else "put a tensor into it",
        )
    first = next(iter(own))
    for name, leaf in own.items():
        if checks.as_floating(name, leaf) is not leaf and module:
            raise DtypeError(
                f"{name} is {leaf.dtype}", allowed="float32 or float64", fix="float() it"
            )
        if not leaf.is_leaf:
            raise GradientError(
                f"{name} is no leaf: it was computed from tensors that require a gradient",
                allowed="a tensor that stands by itself",
                fix="detach() it",
            )
        if leaf.dtype != own[first].dtype:
            kinds = f"{name} is {leaf.dtype}, {first} {own[first].dtype}"
            raise DtypeError(kinds, allowed="one dtype for all of x")
        if leaf.device != own[first].device:
            places = f"{name} is on {leaf.device}, {first} on {own[first].device}"
            raise DeviceError(places, allowed="one device for all of x")
        for other, held in own.items():
            if other != name and held is leaf:
                raise OptionError(
                    f"{other} is the same tensor as {name}",
                    allowed="each tensor once",
                    fix="leave it out, and let the levels use the other one twice",
                )
        require_finite(leaf, name, NonFiniteInputError, allowed="finite numbers")
    if vector and isinstance(x, Tensor) and (x.dim() != 1 or not len(x)):
        raise ShapeError(f"x has shape {tuple(x.shape)}", allowed="(d,)")
    return rebuilt(x, map(checks.as_floating, own, own.values()))


def entry(x: Variables, index: int) -> str:
    """The name of a number of x, by its place in `joined`."""
    for name, leaf in named(x).items():
        if index < leaf.numel():
            place = torch.unravel_index(torch.tensor(index), leaf.shape)
            where = ", ".join(str(int(i)) for i in place)
            return f"{name}[{where}]" if where else name
        index -= leaf.numel()
    raise IndexError(index)


def described(x: Variables) -> str:
    """The form of x, and its shapes."""
    if isinstance(x, Tensor):
        return str(tuple(x.shape))
    own = named(x)
    words = ", ".join(f"{name[1:]}: {tuple(leaf.shape)}" for name, leaf in own.items())
    if len(own) > 8:
        words = f"{len(own)} tensors of {sum(leaf.numel() for leaf in own.values())} numbers"
    return f"{type(x).__name__}({words})"


def require_finite(
    tensor: Tensor, name: str, error: type, *, where: str = "", **words: str
) -> None:
    """Refuse a tensor that is not finite, with its first place."""
    finite = torch.isfinite(tensor.detach())
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        value = float(tensor.detach()[place])
        spot = "[" + ", ".join(map(str, place)) + "]" if place else ""
        at = ", ".join(part for part in (where, spot and f"entry {spot}") if part)
        raise error(f"{name} is {value:g}", where=at, **words)
