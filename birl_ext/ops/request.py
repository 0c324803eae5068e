"""What the ops are asked for, by name: with `Data` the one statement of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from birl_ext.model.layout import Data
from birl_ext.solution import Method, Rigour

__all__ = [
    "AUTO",
    "NATIVE",
    "TORCH",
    "Data",
    "PolicySystem",
    "Saved",
    "Settings",
    "bellman_arguments",
    "derivable",
    "solve_arguments",
]

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


class Saved(NamedTuple):
    """What the derivatives at a fixed point need: the data, and the solution in its axes *B."""

    transition: Tensor
    crow: Tensor
    col: Tensor
    discount: Tensor  # (N, G)
    temperature: Tensor
    relative: Tensor  # W
    advantage: Tensor
    policy: Tensor
    info: Tensor
    status: Tensor
    constant: Tensor  # c: V = c + W


class PolicySystem(NamedTuple):
    """M = I − γP_π of N·G problems, as the ops take it; vectors are (N, G, K, S), numbers for each
    of them (N, G, K).
    """

    transition: Tensor  # as in Rows
    crow: Tensor
    col: Tensor
    policy: Tensor  # (N, G, S, A)
    discount: Tensor  # (N, G)


T = TypeVar("T")


def solve_arguments(given: Sequence[Any]) -> tuple[Data, Tensor, Settings]:
    """What the op `solve` is given: the data, a start V₀, and how to solve."""
    size = len(Data._fields)
    return Data(*given[:size]), given[size], Settings(*given[size + 1 :])


def bellman_arguments(given: Sequence[Any]) -> tuple[Data, Tensor, int]:
    """What the op `bellman` is given: the data, V, and who computes."""
    *data, value, backend = given
    return Data(*data), value, backend


def derivable(data: Sequence[T]) -> tuple[T, ...]:
    """Of something for each field of `Data`, what is not of its pattern."""
    return (data[0], *data[3 : len(Data._fields)])
