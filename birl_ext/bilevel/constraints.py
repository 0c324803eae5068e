"""A constrained leader: sets with exact projections, and optimisers that stay inside.

They are torch optimisers, so that every algorithm that takes one can be constrained:

    optimiser=lambda p: Projected(torch.optim.SGD(p, lr=0.1), Simplex())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from birl_ext.bilevel import variables
from birl_ext.bilevel.guards import check_kind, check_number
from birl_ext.errors import InfeasibleError, NonFiniteResultError, OptionError, ShapeError
from birl_ext.model import checks

__all__ = [
    "L1",
    "Box",
    "ConstraintSet",
    "L1Ball",
    "Mirror",
    "Penalty",
    "Projected",
    "Proximal",
    "Simplex",
    "stationarity",
]


# Penalties, and sets as the penalties that are 0 inside and ∞ outside


class Penalty(ABC):
    """A convex function ψ of x, of one leaf at a time, whose proximal map is known exactly."""

    separable = False
    """Whether ψ is a sum over the entries of x: each is then moved without a look at the others."""

    @abstractmethod
    def prox(self, x: Tensor, step: float) -> Tensor:
        """argmin over z of ψ(z) + ‖z − x‖²/(2 step), in the shape of x."""

    def check(self, x: Tensor, name: str = "x") -> None:
        """Refuse a leaf that ψ is not defined for.

        Raises:
            DtypeError, ShapeError: by name, and dtype or shape.
        """
        checks.as_floating(name, x)


class L1(Penalty):
    """ψ(x) = weight ‖x‖₁, which makes entries of x exactly zero.

    Args:
        weight: units of φ per unit of x, 0 or more.
    """

    separable = True

    def __init__(self, weight: float) -> None:
        self.weight = check_number("weight", weight)

    def prox(self, x: Tensor, step: float) -> Tensor:
        return x.sign() * (x.abs() - step * self.weight).clamp(min=0.0)

    def __call__(self, x: Tensor) -> Tensor:
        """ψ of each vector along the last axis."""
        return self.weight * x.abs().sum(-1)

    def __repr__(self) -> str:
        return f"L1(weight={self.weight:g})"


class ConstraintSet(Penalty):
    """A closed convex set of vectors along the last axis; leading axes are a batch of them."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set to each vector, in ℓ₂, exactly up to rounding.

        Args:
            x: (*B, d).

        Returns:
            (*B, d), in the dtype of x; NaN where x is not finite or, of a `Box`, NaN.
        """

    def prox(self, x: Tensor, step: float) -> Tensor:
        return self.project(x)

    def distance(self, x: Tensor) -> Tensor:
        """‖x − project(x)‖₂, (*B,): how far outside each vector is."""
        apart: Tensor = torch.linalg.vector_norm(x - self.project(x), dim=-1)
        return apart


class Simplex(ConstraintSet):
    """{x ≥ 0, Σᵢ xᵢ = total}: shares of a budget.

    Args:
        total: more than 0, units of x.

    Raises:
        InfeasibleError: `total` is negative, or 0, which leaves nothing to choose.

    Source: Held, Wolfe and Crowder (1974): subtract the θ that makes Σ max(xᵢ − θ, 0) = total.
    """

    def __init__(self, total: float = 1.0) -> None:
        self.total = _size("total", total, "Simplex")

    def project(self, x: Tensor) -> Tensor:
        return _to_simplex(x, self.total)

    def check(self, x: Tensor, name: str = "x") -> None:
        _check_vectors(self, x, name)

    def __repr__(self) -> str:
        return f"Simplex(total={self.total:g})"


class L1Ball(ConstraintSet):
    """{‖x‖₁ ≤ radius}: few entries, small altogether.

    Args:
        radius: more than 0, units of x.

    Raises:
        InfeasibleError: `radius` is negative, or 0, which leaves nothing to choose.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008), by the projection of |x| onto the
    simplex.
    """

    def __init__(self, radius: float = 1.0) -> None:
        self.radius = _size("radius", radius, "L1Ball")

    def project(self, x: Tensor) -> Tensor:
        inside = x.abs().sum(-1, keepdim=True) <= self.radius
        return torch.where(inside, x, x.sign() * _to_simplex(x.abs(), self.radius))

    def check(self, x: Tensor, name: str = "x") -> None:
        _check_vectors(self, x, name)

    def __repr__(self) -> str:
        return f"L1Ball(radius={self.radius:g})"


class Box(ConstraintSet):
    """{low ≤ x ≤ high}, entry by entry.

    Args:
        low, high: numbers, or tensors that broadcast to x; infinite where there is no bound.

    Raises:
        InfeasibleError: a `low` is above its `high`, with its place.
        OptionError, DtypeError, ShapeError: a bound is NaN or no number, or they do not broadcast.
    """

    separable = True

    def __init__(self, low: float | Tensor, high: float | Tensor) -> None:
        self.low, self.high = _bound("low", low), _bound("high", high)
        try:
            crossed = (self.low > self.high) | (self.low == torch.inf) | (self.high == -torch.inf)
        except RuntimeError:
            shapes = f"low has shape {tuple(self.low.shape)}, high {tuple(self.high.shape)}"
            raise ShapeError(shapes, allowed="shapes that broadcast") from None
        if crossed.any():
            place = tuple(crossed.nonzero()[0].tolist())
            below, above = (part.expand_as(crossed) for part in (self.low, self.high))
            raise InfeasibleError(
                f"the Box is empty: low is {float(below[place]):g}, high {float(above[place]):g}",
                where=f"entry {list(place)}" if place else "",
                allowed="low at or below high",
                fix="exchange the two, or widen the box",
            )

    def project(self, x: Tensor) -> Tensor:
        return x.clamp(self.low.to(x), self.high.to(x))

    def check(self, x: Tensor, name: str = "x") -> None:
        for word, bound in (("low", self.low), ("high", self.high)):
            try:
                bound.expand(x.shape)
            except RuntimeError:
                raise ShapeError(
                    f"`{word}` of the Box has shape {tuple(bound.shape)}, {name} {tuple(x.shape)}",
                    allowed=f"a shape that broadcasts to that of {name}",
                ) from None

    def __repr__(self) -> str:
        words = [
            f"{name}={float(bound):g}" if bound.dim() == 0 else f"{name}: {tuple(bound.shape)}"
            for name, bound in (("low", self.low), ("high", self.high))
        ]
        return f"Box({', '.join(words)})"


def stationarity(x: Tensor, gradient: Tensor, onto: ConstraintSet) -> Tensor:
    """‖x − project(x − ∇φ)‖₂, (*B,): zero exactly where x in the set meets the first-order
    conditions of min φ over it; ‖∇φ‖ where no constraint is active.

    Args:
        x, gradient: (*B, d).
        onto: the set.
    """
    moved: Tensor = torch.linalg.vector_norm(x - onto.project(x - gradient), dim=-1)
    return moved


# Optimisers


class Projected(Optimizer):
    """Steps of another optimiser, each followed by the projection of every leaf of x.

        x_{k+1} = P(x_k − β d_k),   d_k: what the other optimiser steps along

    A start outside the set is projected when the optimiser is made.

    Args:
        inner: the other optimiser, over the leaves of x. For a set that is not `separable` it must
            be SGD, with momentum or without: one that scales each entry by itself, as Adam does,
            stops at points of the simplex that are no optimum. In a `Box` any will do that asks its
            closure once.
        onto: one set for all leaves, or one per leaf in the order of the parameters, None for those
            that are free.

    Raises:
        OptionError: `inner` is no such optimiser, or the sets are not as many as the leaves.
        ShapeError: a leaf does not fit its set.
        NonFiniteResultError: a step of `inner` is not finite, which a projection would hide.

    `state_dict` is that of `inner`. Source: Goldstein (1964), Levitin and Polyak (1966).
    """

    def __init__(
        self, inner: Optimizer, onto: ConstraintSet | Sequence[ConstraintSet | None]
    ) -> None:
        check_kind("inner", inner, Optimizer)
        parameters = [p for group in inner.param_groups for p in group["params"]]
        self.inner = inner
        self.onto = _per_leaf("onto", onto, parameters, ConstraintSet)
        coupled = next((s for s in self.onto if s is not None and not s.separable), None)
        name = type(inner).__name__
        if isinstance(inner, torch.optim.LBFGS):
            raise OptionError(
                "inner is a LBFGS, which asks for gradients at points outside the set",
                allowed="an optimiser that asks its closure once",
                fix="use torch.optim.SGD",
            )
        if coupled is not None and not isinstance(inner, torch.optim.SGD):
            raise OptionError(
                f"inner is {checks.kind_of(inner)}, and {coupled!r} is not separable: {name}, "
                "if it scales each entry by itself, stops there at points that are no optimum",
                allowed="torch.optim.SGD; others for a Box",
                fix="use SGD, on the simplex also Mirror",
            )
        super().__init__(inner.param_groups, inner.defaults)
        self._share()
        self._project()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of `inner`, then the projection."""
        loss = self.inner.step(closure)
        self._project()
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)
        self._share()

    def _project(self) -> None:
        leaves = (p for group in self.param_groups for p in group["params"])
        with torch.no_grad():
            for number, (leaf, own) in enumerate(zip(leaves, self.onto, strict=True)):
                if own is not None:
                    _require_finite(
                        leaf, f"leaf {number} of Projected after a step of its inner one"
                    )
                    leaf.copy_(own.project(leaf))

    def _share(self) -> None:
        """One state and one list of groups for both, whichever of the two is asked or changed."""
        self.state, self.param_groups = self.inner.state, self.inner.param_groups

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inner": self.inner, "onto": self.onto}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()


class Proximal(Optimizer):
    """Proximal gradient descent on φ + ψ.

        x_{k+1} = prox_{βψ}(x_k − β ∇φ)

    With a set for ψ this is plain projected descent. φ in an algorithm's outcomes is without ψ.

    Args:
        params: the leaves of x, or groups of them.
        penalty: ψ, one for all leaves, or one per leaf, None for those that have none. A start
            outside a set is projected when the optimiser is made.
        lr: β, units of x² per unit of φ, below 2 over the Lipschitz constant of ∇φ.

    Raises:
        OptionError: `lr` is out of its range, or the penalties are not as many as the leaves.
        ShapeError: a leaf does not fit its set.
        NonFiniteResultError: a step is not finite.

    Source: Combettes and Wajs (2005); with `L1`, iterative soft thresholding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        penalty: Penalty | Sequence[Penalty | None],
        lr: float,
    ) -> None:
        super().__init__(params, {"lr": check_number("lr", lr, above=True)})
        leaves = [p for group in self.param_groups for p in group["params"]]
        self.penalty = _per_leaf("penalty", penalty, leaves, Penalty)
        with torch.no_grad():
            for leaf, own in zip(leaves, self.penalty, strict=True):
                if isinstance(own, ConstraintSet):
                    leaf.copy_(own.project(leaf))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A gradient step, then the proximal map."""
        loss = _asked(closure)
        number = 0
        with torch.no_grad():
            for group in self.param_groups:
                for leaf in group["params"]:
                    own = self.penalty[number]
                    if leaf.grad is not None:
                        leaf.sub_(float(group["lr"]) * leaf.grad)
                    _require_finite(leaf, f"leaf {number} of Proximal after a gradient step")
                    if own is not None:
                        leaf.copy_(own.prox(leaf, float(group["lr"])))
                    number += 1
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "penalty": self.penalty}


class Mirror(Optimizer):
    """Entropic mirror descent on the simplex: steps are multiplied, not added.

        x_{k+1} ∝ x_k exp(−β ∇φ),   Σᵢ xᵢ = total

    Its steps depend on the number of entries only as log d. An entry may come near 0, not reach it.

    Args:
        params: the leaves of x, or groups of them; each vector along the last axis is on a simplex.
        lr: β, 1 over units of φ per unit of x.
        total: of each vector, more than 0, units of x.

    A positive start of another total is scaled to it when the optimiser is made, which is the
    projection in this geometry.

    Raises:
        OptionError: `lr` is out of its range, or an entry of the start is not positive: it would be
            stuck where it is.
        InfeasibleError: `total` is not positive.
        ShapeError: a leaf is no vector.
        NonFiniteResultError: a gradient is not finite.

    Source: Beck and Teboulle (2003).
    """

    def __init__(self, params: Iterable[Any], lr: float, total: float = 1.0) -> None:
        self.simplex = Simplex(total)
        super().__init__(params, {"lr": check_number("lr", lr, above=True)})
        leaves = [p for group in self.param_groups for p in group["params"]]
        _per_leaf("params", self.simplex, leaves, Simplex)
        for number, leaf in enumerate(leaves):
            least = float(leaf.detach().min())
            if not least > 0:
                raise OptionError(
                    f"an entry of leaf {number} of Mirror is {least:g}",
                    allowed="positive: steps are multiplied, and a zero stays one",
                    fix="start inside of the simplex, or use Projected",
                )
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(self.simplex.total / leaf.sum(-1, keepdim=True))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A gradient step on log x, and the total restored."""
        loss = _asked(closure)
        number = 0
        with torch.no_grad():
            for group in self.param_groups:
                for leaf in group["params"]:
                    if leaf.grad is not None:
                        _require_finite(leaf.grad, f"the gradient of leaf {number} of Mirror")
                        low = torch.finfo(leaf.dtype).tiny  # else an entry could not come back
                        logits = leaf.clamp(min=low).log() - float(group["lr"]) * leaf.grad
                        leaf.copy_(self.simplex.total * logits.softmax(-1).clamp(min=low))
                    number += 1
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "simplex": self.simplex}


# Helpers


def _asked(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _per_leaf(name: str, given: Any, leaves: Sequence[Tensor], kind: Any) -> list[Any]:
    """One penalty per leaf, or None, each of which fits its leaf."""
    found = list(given) if isinstance(given, list | tuple) else [given] * len(leaves)
    if len(found) != len(leaves):
        raise OptionError(
            f"{name} has {len(found)} entries", allowed=f"{len(leaves)}: one per leaf of x"
        )
    for number, (own, leaf) in enumerate(zip(found, leaves, strict=True)):
        if own is None and isinstance(given, list | tuple):
            continue
        if not isinstance(own, kind):
            raise OptionError(
                f"{name} is {checks.kind_of(own)}",
                allowed=f"a {kind.__name__}, or a list of them, one per leaf of x",
                fix="use Simplex(), Box(low, high) or L1Ball(radius)",
            )
        own.check(leaf, f"leaf {number} of x")
    return found


def _require_finite(tensor: Tensor, name: str) -> None:
    """What a projection would hide."""
    variables.require_finite(tensor, name, NonFiniteResultError, fix="lower the learning rate")


def _size(name: str, value: Any, kind: str) -> float:
    """A positive number; one that is not leaves no x to choose."""
    number = check_number(name, value, least=-torch.inf)
    if number <= 0:
        raise InfeasibleError(
            f"the {kind} is empty: {name} is {number:g}", allowed="more than 0", fix=f"raise {name}"
        )
    return number


def _bound(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        number = checks.real(value)
        if number is None:
            raise OptionError(f"{name} is {value!r}", allowed="a number or a tensor")
        value = torch.tensor(number, dtype=torch.float64)
    found = checks.as_floating(name, value).detach()
    if found.isnan().any():
        raise OptionError(f"{name} is nan", allowed="numbers, infinite where there is no bound")
    return found


def _check_vectors(own: ConstraintSet, x: Tensor, name: str) -> None:
    if not x.dim() or not x.shape[-1]:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}", allowed=f"(…, d): vectors, for a {own!r}"
        )


def _to_simplex(x: Tensor, total: float) -> Tensor:
    """The nearest point of {z ≥ 0, Σz = total}, along the last axis."""
    wide = x.double()
    wide = wide - wide.amax(-1, keepdim=True)  # the same projection, with less to cancel
    falling = wide.sort(-1, descending=True).values
    counts = torch.arange(1, x.shape[-1] + 1, dtype=wide.dtype, device=x.device)
    levels = (falling.cumsum(-1) - total) / counts  # θ, if so many entries stay positive
    kept = (falling > levels).sum(-1, keepdim=True).clamp(min=1)
    return (wide - levels.gather(-1, kept - 1)).clamp(min=0.0).to(x.dtype)
