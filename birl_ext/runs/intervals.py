"""How far the mean of a few independent runs may be off."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["mean_interval"]

_Z = 1.959963985
_EXACT = {1: 12.706204736, 2: 4.302652730, 3: 3.182446305}


def mean_interval(runs: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the first axis, and half the width of its 95 % interval by Student's t.

    Args:
        runs: (n, …), one independent run in each row.

    Returns:
        Both (…); the width of a single run is NaN.
    """
    values = np.asarray(runs, np.float64)
    mean, n = values.mean(0), len(values)
    if n < 2:
        return mean, np.full_like(mean, math.nan)
    return mean, np.asarray(_student(n - 1) * values.std(0, ddof=1) / math.sqrt(n))


def _student(freedom: int) -> float:
    """The 97.5 % point of Student's t: Abramowitz and Stegun (1964), 26.7.5, to 4e-4."""
    z, n = _Z, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return _EXACT.get(n) or z + sum(term / n**k for k, term in enumerate(terms, 1))
