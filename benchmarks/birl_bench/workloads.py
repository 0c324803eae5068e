"""The MDPs of the benchmarks, their solution in float64, and certificates where that is too large.

A certificate needs no truth: V* lies in V + [min δ, max δ]/(1 − γ) with δ = TV − V (M5).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from birl_bench import families
from birl_ext.model.mdp import SparseMDP

__all__ = [
    "DenseProblem",
    "GridProblem",
    "Work",
    "Workload",
    "certify",
    "compare",
    "grid",
    "newton",
    "policy_system",
    "random",
    "truth",
]


class Work(NamedTuple):
    """What one pass over a model costs at least.

    Attributes:
        bytes: of P, read once. Rewards and vectors are left out: they are smaller by a factor S, or
            by the number of successors.
        operations: a multiplication and an addition per entry of P, and per (s, a) the addition of
            r, the maximum, the exponential and the sum of the log-sum-exp: 4.
    """

    bytes: int
    operations: int


class Workload(Protocol):
    """What the harness knows of a problem."""

    @property
    def discount(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def work(self) -> Work: ...
    def comparable(self, name: str, tensor: Tensor) -> Tensor:
        """The part of an answer in which right answers agree."""


class _Placed:
    """Data type and device of a problem are those of its reward."""

    reward: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.reward.dtype

    @property
    def device(self) -> torch.device:
        return self.reward.device


@dataclass(frozen=True, eq=False)
class DenseProblem(_Placed):
    """A batch of MDPs with a dense P.

    Attributes:
        reward: r, (B, S, A); transition: P, (B, S, A, S), same dtype.
        weight: w, (B, S): gradients are those of Σ w·V*.
    """

    reward: Tensor
    transition: Tensor
    discount: float
    temperature: float
    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.reward.shape)

    @property
    def data(self) -> tuple[Tensor, Tensor, float, float]:
        """What `bellman` takes behind a value."""
        return self.reward, self.transition, self.discount, self.temperature

    @property
    def work(self) -> Work:
        entries = self.transition.numel()
        size = entries * self.transition.element_size()
        return Work(size, 2 * entries + 4 * self.reward.numel())

    def to(self, device: torch.device) -> Self:
        moved = {name: getattr(self, name).to(device) for name in ("reward", "transition")}
        return replace(self, weight=self.weight.to(device), **moved)

    def exact(self) -> DenseProblem:
        """The same in float64, with the rows of P divided by their sum."""
        rows = self.transition.double()
        rows = rows / rows.sum(-1, keepdim=True)
        weight = self.weight.double()
        return DenseProblem(self.reward.double(), rows, self.discount, self.temperature, weight)

    def comparable(self, name: str, tensor: Tensor) -> Tensor:
        """Gradients in P orthogonal to each row, the derivative of P ↦ f(P/ΣP); a value up to a
        constant without that constant; everything else as it is.
        """
        if name == "grad_transition":
            return tensor - (tensor * self.transition.double()).sum(-1, keepdim=True)
        if name == "value up to a constant":
            return tensor - tensor.mean(-1, keepdim=True)
        return tensor


def random(
    family: Callable[..., Tensor],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    discount: float,
    temperature: float,
    seed: int = 0,
    **options: float,
) -> DenseProblem:
    """(B, S, A) of one of the random families, with a random reward; options are the family's."""
    generator = torch.Generator().manual_seed(seed)
    weights = family(shape, generator, draw=torch.float32, **options).to(dtype)
    reward = torch.rand(shape, generator=generator).to(dtype)
    weight = torch.rand(shape[:2], generator=generator).to(dtype)
    return DenseProblem(reward, families.normalised(weights), discount, temperature, weight)


# The grid

MOVES = ((0, 0), *families.CARDINAL)
"""The actions, and where a step can lead."""


@dataclass(frozen=True, eq=False)
class GridProblem(_Placed):
    """A square grid: five actions, five successors, the same ones for every action.

    Attributes:
        reward: r, (S, A), random step costs; probability: (S, A, 5) of each successor.
        successor: (S, 5) int64, repeated where a wall sends the walker back.
        weight: w, (S,): gradients are those of Σ w·V*.
    """

    reward: Tensor
    probability: Tensor
    successor: Tensor
    discount: float
    temperature: float
    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.reward.shape)

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor, float, float]:
        return self.reward, self.probability, self.successor, self.discount, self.temperature

    @property
    def work(self) -> Work:
        """The values and one 32-bit index per state and successor, shared by the actions: the
        least that must be read, whatever the format of whoever reads it.
        """
        entries = self.probability.numel()
        size = entries * self.probability.element_size() + 4 * self.successor.numel()
        return Work(size, 2 * entries + 4 * self.reward.numel())

    def to(self, device: torch.device) -> Self:
        names = ("reward", "probability", "successor", "weight")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def mdp(self, reward: Tensor | None = None) -> SparseMDP:
        """The problem as birl_ext takes it."""
        matrix = self.csr
        return SparseMDP(
            self.reward if reward is None else reward,
            matrix.values(),
            matrix.crow_indices().long(),
            matrix.col_indices().long(),
            self.discount,
        )

    @functools.cached_property
    def csr(self) -> Tensor:
        """P as a sparse CSR matrix, (S·A, S), with 32-bit indices, which the libraries prefer; the
        K entries of a row stand side by side, those of one successor too.
        """
        states, actions, width = self.probability.shape
        columns = self.successor.unsqueeze(1).expand_as(self.probability)
        crow = torch.arange(0, columns.numel() + 1, width, device=self.device)
        return _csr(crow, columns, self.probability, (states * actions, states))

    @functools.cached_property
    def index(self) -> Tensor:
        """The successors with 32 bits, for gathers."""
        return self.successor.int()

    @functools.cached_property
    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the pattern of P_π: crow and col of the transpose, and where its entries stand."""
        states, width = self.successor.shape
        order = self.successor.flatten().argsort(stable=True)
        count = torch.bincount(self.successor.flatten(), minlength=states)
        return torch.nn.functional.pad(count.cumsum(0), (1, 0)), order // width, order

    def policy_matrix(self, policy: Tensor, *, transpose: bool = False) -> Tensor:
        """P_π or its transpose as a sparse CSR matrix, (S, S); the pattern is known beforehand."""
        states, width = self.successor.shape
        entries = torch.einsum("sa,sak->sk", policy, self.probability)
        if transpose:
            crow, col, order = self._transposed
            return _csr(crow, col, entries.flatten()[order], (states, states))
        crow = torch.arange(0, states * width + 1, width, device=self.device)
        return _csr(crow, self.index, entries, (states, states))

    def backup(self, value: Tensor) -> Tensor:
        """Q at V, (S, A)."""
        ahead = (self.probability * value[self.successor].unsqueeze(1)).sum(-1)
        return self.reward + self.discount * ahead

    def comparable(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


def _csr(crow: Tensor, col: Tensor, entries: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            crow.int(), col.int().flatten(), entries.flatten(), shape, check_invariants=False
        )


def grid(side: int, *, discount: float, temperature: float, seed: int = 0) -> GridProblem:
    """A walk on side × side cells that goes as intended with .8, else to any of the five."""
    generator = torch.Generator().manual_seed(seed)
    states = side * side
    cost = torch.rand(states, len(MOVES), generator=generator, dtype=torch.float64)
    weight = torch.rand(states, generator=generator, dtype=torch.float64)
    probability = families.slipping(len(MOVES)).expand(states, -1, -1).contiguous()
    successor = families.neighbours((side, side), MOVES)
    return GridProblem(-cost, probability, successor, discount, temperature, weight)


# Truth


def truth(problem: DenseProblem) -> dict[str, Tensor]:
    """V*, π* and the gradient of Σ w·V* in float64, for the rows P/ΣP of the stored P.

    dr = λπ and dP = γλπ(V − Σ_t P V) with (I − γP_π)ᵀ λ = w (M12), Σ P dP = 0 in each row.
    """
    exact = problem.exact()
    gamma, rows = exact.discount, exact.transition
    value, policy = newton(exact.reward, rows, gamma, exact.temperature)
    flow = torch.linalg.solve(policy_system(policy, rows, gamma).mT, exact.weight)
    visits = flow.unsqueeze(-1) * policy
    ahead = torch.einsum("bsat,bt->bsa", rows, value)
    moved = value[:, None, None, :] - ahead.unsqueeze(-1)
    return {
        "value": value,
        "policy": policy,
        "grad_reward": visits,
        "grad_transition": gamma * visits.unsqueeze(-1) * moved,
    }


def newton(
    reward: Tensor, rows: Tensor, discount: float, temperature: float, steps: int = 60
) -> tuple[Tensor, Tensor]:
    """V* and π* by Newton's method (M9), until a step changes nothing but rounding."""
    value = torch.zeros_like(reward[..., 0])
    best = torch.inf
    for _ in range(steps):
        q = reward + discount * torch.einsum("bsat,bt->bsa", rows, value)
        image = temperature * torch.logsumexp(q / temperature, -1)
        policy = torch.softmax(q / temperature, -1)
        change = torch.linalg.solve(policy_system(policy, rows, discount), image - value)
        value = value + change
        size = float(change.abs().max() / value.abs().max())
        if size >= best and size < 1e-9:
            break
        best = min(best, size)
    q = reward + discount * torch.einsum("bsat,bt->bsa", rows, value)
    return value, torch.softmax(q / temperature, -1)


def policy_system(policy: Tensor, rows: Tensor, discount: float) -> Tensor:
    """I − γP_π, (B, S, S)."""
    matrix = torch.einsum("bsa,bsat->bst", policy, rows)
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return eye - discount * matrix


# Judges


def compare(
    problem: Workload, known: Mapping[str, Tensor], solves: str, found: Mapping[str, Tensor]
) -> dict[str, float]:
    """max |found − truth| / max |truth| by name; NaN counts as infinite.

    The hard problem's V is checked against V*: V* − V_hard lies in [0, τ log A/(1 − γ)] (M8), up to
    a constant, since a package that stops when a span is small need not return the constant. Its
    "error" is the spread of the difference in units of that width.
    """
    if solves == "hard":
        width = problem.temperature * math.log(problem.shape[-1]) / (1 - problem.discount)
        low, high = (known["value"].double().cpu() - found["value"].double()).aminmax(dim=-1)
        return {"hard value": float((high - low).max() / width)}
    errors = {}
    for name, tensor in found.items():
        right = problem.comparable(name, known[name].double())
        gap = problem.comparable(name, tensor.detach().double()) - right
        error = gap.abs().max() / right.abs().max()
        errors[name] = float(error.nan_to_num(nan=math.inf))
    return errors


def certify(
    problem: GridProblem | DenseProblem, solves: str, found: Mapping[str, Tensor]
) -> dict[str, float]:
    """Certified bounds on the error of V relative to max |V|, by one sweep in float64.

    For the hard problem the bound is up to a constant: half the span of δ over 1 − γ.
    """
    if "value" not in found:
        return {}
    value = found["value"].detach().double().to(problem.reward.device).reshape(problem.shape[:-1])
    if isinstance(problem, GridProblem):
        q = problem.backup(value[0]).unsqueeze(0)
    else:
        rows = []
        for state in range(0, problem.shape[1], 256):  # in parts: P in float64 is twice P
            part = problem.transition[:, state : state + 256].double()
            ahead = torch.einsum("bsat,bt->bsa", part, value) / part.sum(-1)
            rows.append(problem.reward[:, state : state + 256] + problem.discount * ahead)
        q = torch.cat(rows, 1)
    tau = problem.temperature
    image = q.amax(-1) if solves == "hard" else tau * torch.logsumexp(q / tau, -1)
    low, high = (image - value).aminmax()
    largest = (high - low) / 2 if solves == "hard" else torch.maximum(high, -low)
    bound = float((largest / (1 - problem.discount) / value.abs().max()).nan_to_num(nan=math.inf))
    return {"hard value" if solves == "hard" else "value": bound}
