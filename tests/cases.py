"""Seeded MDPs with readable names, and the oracle's answers to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from oracle import float64

from birl_ext.model.layout import flatten
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.ops.backends import native
from birl_ext.ops.request import Data, PolicySystem, Settings

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOATS = [torch.float32, torch.float64]
KINDS = ("dense", "garnet", "clusters", "chain", "grid")

Array = np.ndarray


def untyped(argument: Any) -> Any:
    """The argument itself, where its type is not known, or wrong on purpose."""
    return argument


@dataclass(frozen=True)
class Case:
    """One batch of random MDPs; the same fields always build the same numbers.

    Attributes:
        kind: "dense" (Dirichlet rows), "garnet" (`branching` next states per row), "clusters" (two
            halves that leak 1e-3 into each other: slow mixing), "chain", "grid" (slipping walks).
        batch: batch axes of the reward.
        shared: whether one transition serves the whole batch.
        mask: forbid a third of the actions, and all of them in the terminal state if there is one.
        terminal: end the process in the last state.
        reference: a random positive μ instead of μ ≡ 1.
    """

    kind: str = "dense"
    states: int = 6
    actions: int = 3
    batch: tuple[int, ...] = ()
    shared: bool = False
    discount: float = 0.9
    temperature: float = 0.5
    dtype: torch.dtype = torch.float64
    branching: int = 3
    mask: bool = False
    terminal: bool = False
    reference: bool = False
    seed: int = 0

    def __str__(self) -> str:
        batch = "x".join(map(str, self.batch)) or "1"
        flags = [f for f in ("shared", "mask", "terminal", "reference") if getattr(self, f)]
        dtype = "f32" if self.dtype == torch.float32 else "f64"
        parts = [self.kind, f"B{batch}", f"S{self.states}", f"A{self.actions}"]
        parts += [f"γ{self.discount:g}", f"τ{self.temperature:g}", dtype, f"seed{self.seed}"]
        return "-".join(parts + flags)

    def mdp(self, device: str = "cpu") -> DenseMDP:
        """The MDP, validated."""
        rng = np.random.default_rng([self.seed, KINDS.index(self.kind), self.states, self.actions])
        count = 1 if self.shared else math.prod(self.batch)
        one_of = _ROWS[self.kind]
        transition = np.zeros((count, self.states, self.actions, self.states))
        for one in transition:
            one[...] = one_of(rng, self)
        if not self.shared:
            transition = transition.reshape(*self.batch, *transition.shape[1:])
        reward = rng.normal(size=(*self.batch, self.states, self.actions))
        options: dict[str, Any] = {}
        if self.terminal:
            options["terminal"] = torch.arange(self.states) == self.states - 1
        if self.mask:
            mask = rng.random(reward.shape) < 2 / 3
            keep = rng.integers(self.actions, size=reward.shape[:-1])
            mask |= np.arange(self.actions) == keep[..., None]
            if self.terminal:
                mask[..., -1, :] = False
            options["mask"] = torch.from_numpy(mask)
        if self.reference:
            weights = rng.uniform(0.1, 1.0, size=reward.shape)
            options["reference"] = torch.from_numpy(weights).to(self.dtype)
        start = rng.dirichlet(np.ones(self.states))
        return DenseMDP(
            torch.from_numpy(reward).to(device, self.dtype),
            torch.from_numpy(transition[0] if self.shared else transition).to(device, self.dtype),
            self.discount,
            **{name: tensor.to(device) for name, tensor in options.items()},
            initial_distribution=torch.from_numpy(start).to(device, self.dtype),
        )


def kernel_arguments(mdp: DenseMDP | SparseMDP, temperature: float) -> dict[str, Any]:
    """The data of a kernel, by name."""
    if isinstance(mdp, DenseMDP):
        model, crow, col = mdp.transition, None, None
    else:
        model, crow, col = mdp.values, mdp.crow, mdp.col
    data = flatten(
        mdp.reward, model, mdp.log_reference, mdp.discount, temperature, crow=crow, col=col
    ).data
    return data._asdict() | {
        "crow": crow,
        "col": col,
        "reward": data.reward.contiguous(),
        "log_reference": data.log_reference.contiguous() if data.log_reference.ndim > 1 else None,
    }


def kernel_solve(arguments: dict[str, Any], initial: Any = None, **options: Any) -> Any:
    """Of the compiled module: V, Q, Q − V, π, log π, info, status and V without its offset."""
    data = Data(**arguments)
    return native.solve(data, initial, Settings(data.reward.shape[:2], **options))


def kernel_policy_solve(
    model: tuple[Any, Any, Any], policy: Any, discount: Any, rhs: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of the compiled module: the solutions, their residuals, and how many were not found."""
    return native.policy_solve(PolicySystem(*model, policy, discount), rhs, **options)


def kernel_model(mdp: DenseMDP | SparseMDP) -> tuple[Any, Any, Any]:
    """transition, crow and col, as the kernels take them."""
    arguments = kernel_arguments(mdp, 1.0)
    return arguments["transition"], arguments["crow"], arguments["col"]


def problems(mdp: DenseMDP, temperature: float) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Every problem of a batch as (batch index, keyword arguments of the oracles)."""

    def expanded(tensor: torch.Tensor | None, event: int) -> Array | None:
        if tensor is None:
            return None
        shape = (*mdp.batch_shape, *tensor.shape[tensor.ndim - event :])
        return tensor.detach().cpu().expand(shape).numpy()

    arrays = {
        "reward": expanded(mdp.reward, 2),
        "transition": expanded(mdp.transition, 3),
        "mask": expanded(mdp.mask, 2),
        "terminal": expanded(mdp.terminal, 1),
        "reference": expanded(mdp.reference, 2),
    }
    discount = np.broadcast_to(np.asarray(mdp.discount, dtype=np.float64), mdp.batch_shape)
    for index in np.ndindex(*mdp.batch_shape):
        own = {name: None if array is None else array[index] for name, array in arrays.items()}
        yield index, {**own, "discount": float(discount[index]), "temperature": temperature}


def oracle(mdp: DenseMDP, temperature: float) -> float64.Oracle:
    """The float64 oracle's answers to a batch, stacked to (*B, …)."""
    answers = [float64.solve(**arguments) for _, arguments in problems(mdp, temperature)]
    return float64.Oracle(
        *(
            np.reshape(parts, (*mdp.batch_shape, *parts[0].shape))
            for parts in zip(*answers, strict=True)
        )
    )


def cases(
    *, max_states: int = 6, max_actions: int = 4, batches: tuple[tuple[int, ...], ...] = ((), (2,))
) -> st.SearchStrategy[Case]:
    """Hypothesis strategy over small cases; shrinks towards one dense, unmasked problem."""
    return st.builds(
        Case,
        kind=st.sampled_from(KINDS),
        states=st.integers(1, max_states),
        actions=st.integers(1, max_actions),
        batch=st.sampled_from(batches),
        shared=st.booleans(),
        discount=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.9999]),
        temperature=st.sampled_from([1.0, 0.1, 0.01, 10.0]),
        dtype=st.sampled_from(FLOATS[::-1]),
        branching=st.integers(1, 3),
        mask=st.booleans(),
        terminal=st.booleans(),
        reference=st.booleans(),
        seed=st.integers(0, 10_000),
    )


# One small problem per feature, then sizes around the warp.
SMALL = (
    Case(),
    Case("garnet", 9, 2, discount=0.99, temperature=0.1, seed=1),
    Case("clusters", 8, 3, discount=0.999, seed=2),
    Case("chain", 7, 3, discount=0.95, temperature=0.05, seed=3, terminal=True),
    Case("grid", 9, 4, discount=0.9, temperature=1.0, seed=4, mask=True),
    Case(reference=True, seed=5),
    Case(mask=True, terminal=True, reference=True, seed=6),
    Case(batch=(3,), seed=7),
    Case(batch=(4,), shared=True, mask=True, seed=8),
    Case(batch=(2, 3), reference=True, seed=9),
    Case(states=1, actions=1, seed=10),
    Case(states=1, actions=4, discount=0.0, seed=11),
    Case(states=5, actions=1, seed=12),
)
# More states than the solver of small problems takes, and what else decides how rows are read.
LARGE = (
    Case(
        "garnet",
        130,
        3,
        batch=(2,),
        discount=0.95,
        temperature=0.1,
        seed=13,
        mask=True,
        terminal=True,
        reference=True,
    ),
    Case("dense", 129, 1, discount=0.99, temperature=10.0, seed=14),
)
WARP = tuple(Case("garnet", states, 4, batch=(2,), seed=states) for states in (1, 31, 32, 33, 65))


def _dense(rng: np.random.Generator, case: Case) -> Array:
    return rng.dirichlet(np.ones(case.states), size=(case.states, case.actions))


def _garnet(rng: np.random.Generator, case: Case) -> Array:
    rows = np.zeros((case.states, case.actions, case.states))
    branches = min(case.branching, case.states)
    for s, a in np.ndindex(case.states, case.actions):
        rows[s, a, rng.choice(case.states, branches, replace=False)] = rng.dirichlet(
            np.ones(branches)
        )
    return rows


def _clusters(rng: np.random.Generator, case: Case) -> Array:
    side = np.arange(case.states) < (case.states + 1) // 2
    rows = _dense(rng, case) * np.where(side[:, None] == side[None, :], 1.0, 1e-3)[:, None, :]
    return rows / rows.sum(-1, keepdims=True)


def _chain(rng: np.random.Generator, case: Case) -> Array:
    return _walk(rng, case, [(-1,), (1,), (0,)], (case.states,))


def _grid(rng: np.random.Generator, case: Case) -> Array:
    width = math.isqrt(case.states - 1) + 1
    return _walk(rng, case, [(-1, 0), (1, 0), (0, -1), (0, 1)], (width, width))


def _walk(
    rng: np.random.Generator, case: Case, moves: list[tuple[int, ...]], shape: tuple[int, ...]
) -> Array:
    """Action a makes move a, and one time in ten a random one; a move off the board stays."""

    def arrive(state: int, move: tuple[int, ...]) -> int:
        place = np.add(np.unravel_index(state, shape), move)
        if (place < 0).any() or (place >= shape).any():
            return state
        target = int(np.ravel_multi_index(tuple(place), shape))
        return target if target < case.states else state

    rows = np.zeros((case.states, case.actions, case.states))
    slip = rng.uniform(0.05, 0.15)
    for s, a in np.ndindex(case.states, case.actions):
        rows[s, a, arrive(s, moves[a % len(moves)])] += 1 - slip
        for move in moves:
            rows[s, a, arrive(s, move)] += slip / len(moves)
    return rows


_ROWS = {"dense": _dense, "garnet": _garnet, "clusters": _clusters, "chain": _chain, "grid": _grid}
