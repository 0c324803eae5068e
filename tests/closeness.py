"""The assertions about numbers: they name the worst entry, both values and the bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def assert_close(got: Tensor, want: Any, *, bound: Any, label: object) -> None:
    """Fail unless |got − want| ≤ bound at every entry.

    Args:
        got: the tensor under test.
        want: a tensor of the same dtype, or an oracle's answer as a NumPy array of any precision.
        bound: absolute; a number, or an array or tensor that broadcasts to `got`.
        label: what is compared; opens the message.

    NaN never passes, on either side; an infinity passes only against itself. Shapes never
    broadcast, so that a forgotten axis cannot hide.
    """
    assert isinstance(got, Tensor), f"{label}: got a {type(got).__name__}, not a tensor"
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype, f"{label}: got {got.dtype}, want {want.dtype}"
    ours, theirs, most = _float64(got), _float64(want), _float64(bound)
    assert ours.shape == theirs.shape, f"{label}: got shape {ours.shape}, want {theirs.shape}"
    most = np.broadcast_to(most, ours.shape)
    assert (most >= 0).all(), f"{label}: the bound is NaN or negative"
    with np.errstate(invalid="ignore"):
        distance = np.abs(ours - theirs)
    distance = np.where(ours == theirs, 0.0, distance)  # equal infinities are no distance apart
    distance = np.where(np.isnan(distance), np.inf, distance)
    outside = ~(distance <= most) | np.isnan(ours) | np.isnan(theirs)
    if not outside.any():
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.where(outside, np.where(most > 0, distance / most, np.inf), -1.0)
    excess = np.where(np.isnan(excess), np.inf, excess)
    ties = excess == excess.max()
    worst = np.unravel_index(int(np.where(ties, distance, -1.0).argmax()), ours.shape)
    index = ", ".join(str(int(i)) for i in worst)
    raise AssertionError(
        f"{label}: {int(outside.sum())} of {ours.size} outside the bound; worst at ({index}): "
        f"got {ours[worst]:.17g}, want {theirs[worst]:.17g}, "
        f"|Δ| {distance[worst]:.3g}, bound {most[worst]:.3g}"
    )


def assert_same_bits(got: Tensor, want: Tensor, *, label: object) -> None:
    """Fail unless both tensors hold the same bits; equal NaNs are equal, 0.0 and −0.0 are not."""
    assert got.dtype == want.dtype, f"{label}: got {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{label}: got {tuple(got.shape)}, want {tuple(want.shape)}"
    ours, theirs = (
        t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (got, want)
    )
    different = (ours != theirs).nonzero()
    if different.numel():
        first = int(different[0]) // got.element_size()
        values = [float(t.detach().cpu().flatten()[first]) for t in (got, want)]
        index = ", ".join(str(int(i)) for i in np.unravel_index(first, got.shape))
        raise AssertionError(
            f"{label}: bits differ first at ({index}): got {values[0]!r}, want {values[1]!r}"
        )


def assert_same_state(got: Any, want: Any, label: str = "state") -> None:
    """Fail unless all tensors of a state hold the same bits, and all else is equal."""
    if isinstance(want, Tensor):
        assert_same_bits(got, want, label=label)
    elif isinstance(want, dict | list | tuple):
        pairs = [*want.items()] if isinstance(want, dict) else [*enumerate(want)]
        assert len(got) == len(pairs), label
        for key, part in pairs:
            assert_same_state(got[key], part, f"{label}[{key!r}]")
    else:
        assert got == want, label


def _float64(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
