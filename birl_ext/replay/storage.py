"""Room for many rows, reserved at once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from birl_ext.model.checks import check_memory

__all__ = ["reserve"]


def reserve(
    what: str, count: int, like: Iterable[Tensor], device: torch.device, *, fix: str
) -> list[Tensor]:
    """Tensors of `count` rows that are not written yet, one for each of `like`.

    Args:
        what: subject of the message, e.g. "a replay of 1000 transitions".
        count: n.
        like: (m, *shape) each, any m; what comes back is (n, *shape), of the same dtype.
        device: where.
        fix: what to do instead.

    Raises:
        SizeLimitError: all of them together exceed the memory of the machine, or of the GPU.
    """
    like = list(like)
    rows = sum(math.prod(part.shape[1:]) * part.element_size() for part in like)
    check_memory(what, count * rows, fix=fix, width=1, device=device)
    return [torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=device) for part in like]
