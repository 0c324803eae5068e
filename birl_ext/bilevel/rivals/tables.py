"""Tables that are averaged over the steps of paths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from birl_ext.simulators.finite import Paths

__all__ = ["advantage_from", "longest_of", "mean_of_cells", "returns_to_go"]


def returns_to_go(reward: Tensor, present: Tensor, discount: float) -> Tensor:
    """G_t = Σ_{k≥t} γᵏ⁻ᵗ r_k along paths, (n, H); nothing is paid where a step is not `present`."""
    longest, reach = longest_of(present), 1
    ahead = (reward * present)[:, :longest]
    while reach < longest:  # ahead holds the sums over k < t + reach: twice as far in each turn
        ahead = ahead + discount**reach * pad(ahead[:, reach:], (0, reach))
        reach *= 2
    return pad(ahead, (0, reward.shape[1] - longest))


def longest_of(present: Tensor) -> int:
    """Steps of the longest path: behind them nothing is present, and nothing needs to be done."""
    return int(present.any(0).sum())


def mean_of_cells(cell: Tensor, number: Tensor, cells: int) -> Tensor:
    """The mean of the numbers, (m,), of each cell, (m,) int64, zero where there is none: (cells,).

    Gradients: through the numbers.
    """
    count = torch.bincount(cell, minlength=cells).clamp(min=1)
    return number.new_zeros(cells).index_add(0, cell, number) / count


def advantage_from(path: Paths, to_go: Tensor, states: int, actions: int) -> Tensor:
    """A = Q − V, (S, A), where Q and V are means of the returns to go, (n, H), over every visit of
    (s, a) and of s; zero where (s, a) was not visited.
    """
    where, chosen = path.observation[path.present], path.action[path.present]
    number = to_go[path.present]
    cell = where * actions + chosen
    q = mean_of_cells(cell, number, states * actions).view(states, actions)
    value = mean_of_cells(where, number, states)
    seen = torch.bincount(cell, minlength=states * actions).view(states, actions) > 0
    return torch.where(seen, q - value.unsqueeze(-1), 0.0)
