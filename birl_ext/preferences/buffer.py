"""The newest answered pairs, first in first out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from birl_ext.errors import DtypeError, OptionError, ShapeError
from birl_ext.model import checks
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.replay.storage import reserve
from birl_ext.solution import as_device

__all__ = ["PreferenceBuffer"]


class PreferenceBuffer:
    """A ring of pairs; uint8 observations stay uint8.

    Args:
        capacity: pairs kept; the oldest make room.
        device: where they lie.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = checks.check_count("capacity", capacity)
        self.device = as_device(device)
        self.added = 0
        """Pairs ever kept, those that have made room included."""
        self._ring: Pairs | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def strict(self) -> int:
        """Pairs of which one side was found better: the others are ties."""
        if self._ring is None:
            return 0
        places = torch.arange(self.added - self._count, self.added) % self.capacity
        return int((self._ring.label[places.to(self.device)] != 0.5).sum())

    def append(self, first: Fragments, second: Fragments, label: Tensor) -> int:
        """Keep the pairs that were answered; those labelled NaN were not.

        Returns:
            How many were kept.

        Raises:
            OptionError: a label lies outside [0, 1].
            ShapeError, DtypeError: the two sides differ in more than their length H, or from those
                stored; or there is not one label per pair.
            SizeLimitError: the capacity does not fit into the memory.
        """
        _check_sides(first, second, label)
        answered = ~label.isnan()
        kept = Pairs(first, second, label).select(answered)
        outside = (kept.label < 0) | (kept.label > 1)
        if bool(outside.any()):
            raise OptionError(f"label is {float(kept.label[outside][0])!r}", allowed="[0, 1], NaN")
        if self._ring is None:
            self._ring = self._blank(kept)
        for stored, given in zip(_tensors(self._ring), _tensors(kept), strict=True):
            _check(stored, given, len(kept))
        count = len(kept)
        newest = torch.arange(max(count - self.capacity, 0), count)
        places = ((self.added + newest) % self.capacity).to(self.device)
        for stored, given in zip(_tensors(self._ring), _tensors(kept), strict=True):
            stored[places] = given[newest.to(given.device)].to(self.device)
        self.added += count
        self._count = min(self._count + count, self.capacity)
        return count

    def select(self, index: Tensor) -> Pairs:
        """Those at `index`, counted from the oldest.

        Args:
            index: (m,) int64 in [0, len(self)), or (len(self),) bool.

        Raises:
            OptionError: the buffer is empty, or an index is out of range.
            ShapeError, DtypeError: the index is neither of the two.
        """
        if self._ring is None:
            raise OptionError("the buffer is empty", fix="append answered pairs first")
        oldest = self.added - self._count
        index = _checked(index, len(self)).to(self.device)
        return self._ring.select((oldest + index) % self.capacity)

    def everything(self) -> Pairs:
        """All pairs, oldest first."""
        return self.select(torch.arange(len(self)))

    def sample(self, size: int, generator: torch.Generator) -> Pairs:
        """Distinct pairs, each equally likely.

        Args:
            generator: on the CPU.
        """
        if not 0 <= size <= len(self):
            raise OptionError(f"size is {size!r}", allowed=f"0 to {len(self)}, the pairs stored")
        return self.select(torch.randperm(len(self), generator=generator)[:size])

    def state_dict(self) -> dict[str, Any]:
        """The pairs, oldest first, as a snapshot."""
        pairs = None
        if self._ring is not None:
            first, second, label = self.everything()
            pairs = {"first": tuple(first), "second": tuple(second), "label": label}
        return {"added": self.added, "pairs": pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, or none of it; more pairs than the capacity are cut at the old end."""
        fresh = PreferenceBuffer(self.capacity, self.device)
        fresh.added = int(state["added"])
        stored = state["pairs"]
        if stored is not None:
            first, second = Fragments(*stored["first"]), Fragments(*stored["second"])
            fresh.added -= len(first)
            fresh.append(first, second, stored["label"])
        vars(self).update(vars(fresh))

    def _blank(self, model: Pairs) -> Pairs:
        parts = reserve(
            f"a buffer of {self.capacity} pairs",
            self.capacity,
            _tensors(model),
            self.device,
            fix="lower the capacity, which a run calls `pairs`",
        )
        width = len(Fragments._fields)
        return Pairs(Fragments(*parts[:width]), Fragments(*parts[width:-1]), parts[-1])


def _tensors(pairs: Pairs) -> tuple[Tensor, ...]:
    return (*pairs.first, *pairs.second, pairs.label)


def _checked(index: Tensor, count: int) -> Tensor:
    """(m,) int64, of an index or a mask."""
    is_mask = index.dtype == torch.bool
    if not is_mask and index.dtype != torch.int64:
        raise DtypeError(f"index has dtype {index.dtype}", allowed="int64 or bool")
    if index.dim() != 1 or (is_mask and len(index) != count):
        raise ShapeError(
            f"index has shape {tuple(index.shape)}",
            allowed=f"({count},), one for each pair stored" if is_mask else "(m,)",
        )
    if is_mask:
        return index.nonzero().squeeze(1)
    outside = (index < 0) | (index >= count)
    if bool(outside.any()):
        raise OptionError(
            f"index is {int(index[outside][0])}", allowed=f"[0, {count}), the pairs stored"
        )
    return index


def _check_sides(first: Fragments, second: Fragments, label: Tensor) -> None:
    """n labels for n and n fragments, which may differ in length alone."""
    for name, one, other in zip(Fragments._fields, first, second, strict=True):
        if (one.shape[0], *one.shape[2:]) != (other.shape[0], *other.shape[2:]):
            raise ShapeError(
                f"{name} has shape {tuple(one.shape)} in the first fragments, "
                f"{tuple(other.shape)} in the second",
                allowed="equal shapes, but for the second axis, H",
            )
        if one.dtype != other.dtype:
            raise DtypeError(
                f"{name} has dtype {one.dtype} in the first fragments, {other.dtype} in the second",
                allowed="one dtype",
                fix="convert it first",
            )
    if label.shape != (len(first),):
        raise ShapeError(f"label has shape {tuple(label.shape)}", allowed=f"({len(first)},)")


def _check(stored: Tensor, given: Tensor, count: int) -> None:
    if given.shape != (count, *stored.shape[1:]):
        raise ShapeError(
            f"a part of the fragments has shape {tuple(given.shape)}",
            allowed=f"{(count, *stored.shape[1:])}, like the pairs stored",
        )
    if given.dtype != stored.dtype:
        raise DtypeError(
            f"a part of the fragments has dtype {given.dtype}",
            allowed=f"{stored.dtype}, like the pairs stored",
            fix="convert it first",
        )
