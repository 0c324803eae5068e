"""What the op `solve` is asked for, by name: with `Data` the one statement of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from birl_ext.model.layout import Data
from birl_ext.solution import Method, Rigour

__all__ = ["AUTO", "NATIVE", "TORCH", "Data", "Settings"]

AUTO, TORCH, NATIVE = 0, 1, 2  # who computes


class Settings(NamedTuple):
    """How the op `solve` solves: its arguments after the data and a start V₀."""

    batch: Sequence[int]
    """Axes *B of the outputs, N·G problems in the same order."""
    method: int = Method.AUTO
    tol: float = 0.0
    """Relative error, certified; 0 goes as far as rounding allows."""
    max_iterations: int = 0
    """Most passes over P; 0 is a default by method."""
    validate: int = Rigour.OR_ENDING
    strict: bool = False
    """Whether the op itself raises for a problem that fails."""
    backend: int = AUTO
