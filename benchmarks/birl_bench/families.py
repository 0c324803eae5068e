"""Families of MDPs, by how they mix: every random or regular P of the benchmarks is built here.

The random ones take (*B, S, A) and give weights of the next state, (*B, S, A, S), which
`normalised` turns into P. They are drawn in `draw`, whatever P is stored in: a seed is one MDP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "CARDINAL",
    "dense",
    "garnet",
    "neighbours",
    "normalised",
    "slipping",
    "two_cluster",
    "walk",
]

CARDINAL = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Up, right, down, left."""
SLIP = 0.2


def dense(shape: tuple[int, ...], generator: torch.Generator, *, draw: torch.dtype) -> Tensor:
    """Every state is reached from everywhere: mixes in one step."""
    return torch.rand(*shape, shape[-2], generator=generator, dtype=draw)


def garnet(
    shape: tuple[int, ...], generator: torch.Generator, *, draw: torch.dtype, branching: int = 4
) -> Tensor:
    """`branching` random successors for each state and action: mixes in a few steps."""
    weights = dense(shape, generator, draw=draw)
    least = weights.topk(min(branching, shape[-2]), -1).values[..., -1:]
    return weights * (weights >= least)


def two_cluster(
    shape: tuple[int, ...], generator: torch.Generator, *, draw: torch.dtype, leak: float = 1e-3
) -> Tensor:
    """Two dense halves that leak into each other: mixes in 1/leak steps."""
    half = torch.arange(shape[-2]) < shape[-2] // 2
    same = torch.where(half[:, None] == half, 1.0, leak).to(draw)
    return dense(shape, generator, draw=draw) * same.unsqueeze(1)


def normalised(weights: Tensor) -> Tensor:
    """P, in the dtype of the weights."""
    return weights / weights.sum(-1, keepdim=True)


def neighbours(board: tuple[int, int], moves: Sequence[tuple[int, int]]) -> Tensor:
    """Where each move leads from every cell of a board, (S, K); one off the board stays."""
    rows, columns = board
    cell = torch.arange(rows * columns)
    row, column = cell // columns, cell % columns
    moved = [
        (row + down).clamp(0, rows - 1) * columns + (column + right).clamp(0, columns - 1)
        for down, right in moves
    ]
    return torch.stack(moved, -1)


def slipping(moves: int) -> Tensor:
    """Action a makes move a, and one time in five any of them: probability of each move, (K, K)."""
    return (1 - SLIP) * torch.eye(moves, dtype=torch.float64) + SLIP / moves


def walk(board: tuple[int, int], moves: Sequence[tuple[int, int]]) -> Tensor:
    """P of the slipping walk on a board, (S, K, S): news travels a cell per step."""
    target = neighbours(board, moves)
    cells, count = target.shape
    share = slipping(count).expand(cells, -1, -1)
    rows = torch.zeros(cells, count, cells, dtype=torch.float64)
    return rows.scatter_add_(-1, target.unsqueeze(1).expand_as(share), share)
