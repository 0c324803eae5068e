"""What a seed stands for: a batch of MDPs, and the options under which it is solved.

Every option of `birl_ext.solve` is drawn, in two kinds of problems: "tame" ones (a reward of about
one, τ from 1 to .01, 1 − γ down to 1e-12), whose derivatives are compared, and "wild" ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from birl_ext.model.mdp import DenseMDP, SparseMDP

Array = np.ndarray
Index = tuple[int, ...]

CHAINS = (
    "dense",  # every state follows every other
    "garnet",  # a few states follow
    "spiky",  # probabilities down to 1e-300
    "deterministic",
    "periodic",  # a cycle through classes of states
    "clusters",  # two halves that hardly know of each other: ill-conditioned
    "walk",  # on a line, slipping
    "absorbing",  # some states keep who comes
    "unreachable",  # states that nobody enters, from where one leaves
)
METHODS = ("auto", "value-iteration", "newton", "newton-krylov", "policy-iteration")


@dataclass(frozen=True)
class Drawn:
    """A batch of problems as arrays, which `dtype` holds exactly, and options.

    Attributes:
        arrays: reward (*B, S, A), transition, and perhaps mask, terminal, reference, discount,
            temperature, initial; each has the batch axes or none.
        form: "tensors", "dense" or "sparse" (an MDP object).
        options: method, tol, max_iterations, validate.
        traits: what is special, for the figures.
        support: (S·A, S) bool, the entries of P that are stored if it is sparse.
    """

    seed: int
    tame: bool
    chain: str
    form: str
    dtype: torch.dtype
    batch: Index
    arrays: dict[str, Array]
    options: dict[str, Any]
    traits: frozenset[str] = frozenset()
    support: Array | None = None

    @property
    def states(self) -> int:
        return int(self.arrays["reward"].shape[-2])

    @property
    def actions(self) -> int:
        return int(self.arrays["reward"].shape[-1])

    def __str__(self) -> str:
        options = " ".join(f"{k}={v}" for k, v in self.options.items() if v is not None)
        dtype = str(self.dtype).removeprefix("torch.")
        discount, temperature = (
            ", ".join(f"{x:.6g}" for x in np.unique(self.arrays[k])) for k in ("gap", "temperature")
        )
        return (
            f"{'tame' if self.tame else 'wild'} {self.chain} {self.form} {dtype} B={self.batch} "
            f"S={self.states} A={self.actions} 1-γ={discount} τ={temperature} "
            f"{' '.join(sorted(self.traits))} {options}"
        )

    def indices(self) -> list[Index]:
        """Every batch index."""
        return list(np.ndindex(*self.batch))

    def element(self, index: Index) -> dict[str, Array]:
        """The arrays of one problem, without batch axes."""
        return {
            name: array[index] if array.ndim > EVENT[name] and index else array
            for name, array in self.arrays.items()
        }

    def alone(self, index: Index) -> Drawn:
        """One problem of the batch as a problem of its own."""
        return replace(self, batch=(), arrays=self.element(index), support=self.stored())

    def stored(self) -> Array:
        """The entries of P that some problem of the batch has."""
        if self.support is not None:
            return self.support
        flat = self.arrays["transition"].reshape(-1, self.states * self.actions, self.states)
        return (flat != 0).any(0)


EVENT = {
    "reward": 2,
    "transition": 3,
    "mask": 2,
    "terminal": 1,
    "reference": 2,
    "discount": 0,
    "gap": 0,
    "temperature": 0,
    "initial": 1,
}
FLOATING = ("reward", "transition", "reference")


def available(arrays: dict[str, Array]) -> Array:
    """(S, A) bool: the actions of one problem; a terminal state without any has the first."""
    states, actions = arrays["reward"].shape
    mask = arrays.get("mask")
    fine = np.ones((states, actions), bool) if mask is None else mask.copy()
    if "terminal" in arrays:
        fine[arrays["terminal"] & ~fine.any(1), 0] = True
    return fine


def tensors(drawn: Drawn) -> dict[str, Any]:
    """The arrays as tensors: float data in the dtype, γ and τ in float64 or ("narrow") in the
    dtype, numbers where there is one for all, unless that is a tensor too ("0-d").
    """
    found: dict[str, Any] = {}
    for name, array in drawn.arrays.items():
        if name == "gap":
            continue
        scalar = name in ("discount", "temperature")
        if scalar and array.ndim == 0 and "0-d" not in drawn.traits:
            found[name] = float(array)
            continue
        tensor = torch.from_numpy(np.array(array))
        narrow = scalar and "narrow" in drawn.traits
        found[name] = tensor.to(drawn.dtype) if name in FLOATING or narrow else tensor
    return found


def problem(drawn: Drawn, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call `solve` with: the MDP in the drawn form, from tensors that may carry a graph."""
    given = dict(given)
    rest: dict[str, Any] = {k: given.pop(k) for k in ("temperature", "initial") if k in given}
    reward, transition, discount = (given.pop(k) for k in ("reward", "transition", "discount"))
    level = drawn.options["validate"]
    if drawn.form == "tensors":
        return (reward, transition), {"discount": discount, "validate": level, **given, **rest}
    if drawn.form == "dense":
        return (DenseMDP(reward, transition, discount, validate=level, **given),), rest
    crow, col, place = pattern(drawn)
    values = transition.flatten(-3)[..., place]
    return (SparseMDP(reward, values, crow, col, discount, validate=level, **given),), rest


def pattern(drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """crow, col and the places in a dense P of what is stored."""
    present = drawn.stored()
    crow = torch.from_numpy(np.concatenate(([0], present.sum(1).cumsum())))
    place = torch.from_numpy(np.flatnonzero(present))
    return crow, place % drawn.states, place


def draw(seed: int) -> Drawn:
    """The problem of a seed; the same on every machine."""
    rng = np.random.default_rng([seed, 20261129])
    tame = bool(rng.random() < 0.5)
    states = _states(rng, tame)
    actions = int(rng.integers(1, 6))
    batch = _batch(rng, states)
    dtype = torch.float32 if rng.random() < (0.3 if tame else 0.45) else torch.float64
    chain = str(rng.choice(CHAINS, p=[0.2, 0.15, 0.1, 0.1, 0.08, 0.12, 0.1, 0.07, 0.08]))
    form = str(rng.choice(["tensors", "dense", "sparse"], p=[0.4, 0.3, 0.3]))
    traits: set[str] = set()
    arrays: dict[str, Array] = {}
    own = batch if rng.random() < 0.7 else ()
    if batch and not own:
        traits.add("shared")
    leak = 10.0 ** -rng.uniform(2, 14)
    arrays["transition"] = _stacked(own, lambda: _rows(rng, chain, states, actions, leak))
    arrays["discount"], arrays["gap"] = _discount(rng, tame, batch)
    arrays["temperature"] = _temperature(rng, tame, batch, traits)
    arrays["reward"] = _reward(rng, tame, batch, (states, actions), traits)
    if chain == "unreachable" and not tame and rng.random() < 0.7:
        traits.add("unreachable pay")
        arrays["reward"][..., -1, :] += 10.0 ** rng.uniform(6, 15)
    _choices(rng, tame, batch, own, (states, actions), arrays, traits)
    if rng.random() < 0.15:
        traits.add("unnormalised")  # by as much as is taken for rounding
        sums = arrays["transition"].shape[:-1]
        arrays["transition"] = arrays["transition"] * (
            1 + rng.uniform(-0.9, 0.9, (*sums, 1)) * (1e-6 if dtype == torch.float32 else 1e-9)
        )
    if rng.random() < 0.2:
        traits.add("0-d")
    if dtype == torch.float32 and rng.random() < 0.2 and not traits & {"subnormal τ", "huge τ"}:
        traits.add("narrow")
        arrays["discount"] = np.minimum(arrays["discount"], 1 - 2.0**-20).astype(np.float32)
        arrays["discount"] = arrays["discount"].astype(np.float64)
        arrays["temperature"] = arrays["temperature"].astype(np.float32).astype(np.float64)
        arrays["gap"] = 1.0 - arrays["discount"]
    for name in FLOATING:
        if name in arrays:
            exact = torch.from_numpy(arrays[name]).to(dtype).double().numpy()
            tiny = torch.finfo(dtype).tiny
            arrays[name] = np.maximum(exact, tiny) if name == "reference" else exact
    options = _options(rng, tame, arrays)
    if not tame and rng.random() < 0.35:
        arrays["initial"] = _start(rng, batch, states, arrays, traits)
    return Drawn(seed, tame, chain, form, dtype, batch, arrays, options, frozenset(traits))


def _states(rng: np.random.Generator, tame: bool) -> int:
    part = rng.random()
    if part < 0.02:
        return int(rng.integers(24, 51 if tame else 71))
    return int(rng.integers(1, 9) if part < 0.75 else rng.integers(9, 18))


def _batch(rng: np.random.Generator, states: int) -> Index:
    if states > 17:
        return () if rng.random() < 0.5 else (2,)
    shapes: list[Index] = [(), (1,), (2,), (3,), (5,), (2, 2), (1, 3), (9,), (17,)]
    chances = [0.4, 0.05, 0.2, 0.12, 0.08, 0.05, 0.04, 0.04, 0.02]
    return shapes[int(rng.choice(len(shapes), p=chances))]


def _stacked(batch: Index, make: Any) -> Array:
    parts = [make() for _ in range(math.prod(batch))]
    return np.reshape(parts, (*batch, *np.shape(parts[0])))


def _rows(rng: np.random.Generator, chain: str, states: int, actions: int, leak: float) -> Array:
    shape = (states, actions)
    following = np.arange(states)
    if chain == "dense":
        return rng.dirichlet(np.ones(states), shape)
    if chain == "spiky":
        # 1e-300 squared away by nobody: logarithms are drawn, not the numbers
        rows = 10.0 ** -(rng.random((*shape, states)) ** 4 * 300)
        return rows / rows.sum(-1, keepdims=True)
    if chain == "deterministic":
        return np.eye(states)[rng.integers(states, size=shape)]
    rows = np.zeros((*shape, states))
    if chain == "garnet":
        for s, a in np.ndindex(shape):
            some = rng.choice(states, min(states, int(rng.integers(1, 4))), replace=False)
            rows[s, a, some] = rng.dirichlet(np.ones(len(some)))
        return rows
    if chain == "periodic":
        period = min(states, int(rng.integers(2, 5)))
        for s, a in np.ndindex(shape):
            rows[s, a] = (following % period == (s + 1) % period) * rng.exponential(size=states)
            if not rows[s, a].any():
                rows[s, a, (s + 1) % states] = 1.0
    elif chain == "clusters":
        side = following < (states + 1) // 2
        rows = rng.dirichlet(np.ones(states), shape)
        rows *= np.where(side[:, None] == side[None, :], 1.0, leak)[:, None, :]
    elif chain == "walk":
        slip = rng.uniform(0.02, 0.3)
        for s, a in np.ndindex(shape):
            rows[s, a, np.clip(s + (-1, 1, 0)[a % 3], 0, states - 1)] += 1 - slip
            for move in (-1, 0, 1):
                rows[s, a, np.clip(s + move, 0, states - 1)] += slip / 3
    elif chain == "absorbing":
        rows = rng.dirichlet(np.ones(states), shape)
        keeps = rng.random(states) < 0.4
        rows[keeps] = np.eye(states)[keeps][:, None]
    else:  # unreachable: the last state, and sometimes others, are never entered
        rows = rng.dirichlet(np.ones(states), shape)
        if states > 1:
            rows[..., -1] = 0.0
            if states > 3 and rng.random() < 0.5:
                rows[..., -2] = 0.0
    return rows / rows.sum(-1, keepdims=True)


def _discount(rng: np.random.Generator, tame: bool, batch: Index) -> tuple[Array, Array]:
    shape = batch if batch and rng.random() < 0.4 else ()
    if rng.random() < (0.1 if tame else 0.3):
        gap = np.where(rng.random(shape) < 0.3, 1.0, rng.uniform(0.01, 1.0, shape))
    else:
        gap = 10.0 ** -rng.uniform(1 if tame else 0, 12, shape)
    discount = np.asarray(1.0 - gap)
    return discount, 1.0 - discount


def _temperature(rng: np.random.Generator, tame: bool, batch: Index, traits: set[str]) -> Array:
    shape = batch if batch and rng.random() < 0.3 else ()
    if tame:
        return np.asarray(10.0 ** rng.uniform(-2, 0, shape))
    part = rng.random()
    if part < 0.02:
        traits.add("subnormal τ")
        return np.asarray(10.0 ** rng.uniform(-322, -305, shape))
    if part < 0.04:
        traits.add("huge τ")
        return np.asarray(10.0 ** rng.uniform(10, 30, shape))
    return np.asarray(10.0 ** rng.uniform(-4, 4, shape))


def _reward(
    rng: np.random.Generator, tame: bool, batch: Index, shape: Index, traits: set[str]
) -> Array:
    reward = rng.normal(size=(*batch, *shape))
    if rng.random() < 0.3:
        reward = rng.random((*batch, *shape))
    if tame:
        return reward
    part = rng.random()
    if part < 0.5:
        reward *= 10.0 ** rng.uniform(-8, 8)
    elif part < 0.55:
        traits.add("zero reward")
        reward *= 0.0
    elif part < 0.6:
        traits.add("offset")
        reward += 10.0 ** rng.uniform(2, 8)
    elif part < 0.75:
        traits.add("penalty")
        walls = rng.random(shape) < rng.choice([0.1, 0.3])
        if rng.random() < 0.5:
            walls[int(rng.integers(shape[0]))] = True  # a state where every action is a wall
        reward = np.where(walls, -(10.0 ** rng.uniform(6, 15)), reward)
    return reward


def _choices(
    rng: np.random.Generator,
    tame: bool,
    batch: Index,
    own: Index,
    shape: Index,
    arrays: dict[str, Array],
    traits: set[str],
) -> None:
    """Mask, terminal states and reference, each in a quarter of the problems."""
    states, actions = shape
    if rng.random() < 0.25:
        traits.add("terminal")
        axes = own if rng.random() < 0.5 else ()
        arrays["terminal"] = rng.random((*axes, states)) < rng.choice([0.15, 0.4])
    if rng.random() < 0.25:
        traits.add("mask")
        axes = batch if rng.random() < 0.5 else ()
        mask = rng.random((*axes, states, actions)) < 0.65
        keep = rng.integers(actions, size=(*axes, states))
        mask |= np.arange(actions) == keep[..., None]
        if "terminal" in arrays and arrays["terminal"].ndim <= len(axes) + 1 and rng.random() < 0.5:
            traits.add("closed")
            mask &= ~arrays["terminal"][..., None]
        arrays["mask"] = mask
    if rng.random() < 0.25:
        traits.add("reference")
        axes = batch if rng.random() < 0.5 else ()
        weights = rng.uniform(0.1, 1.0, (*axes, states, actions))
        if not tame and rng.random() < 0.4:
            traits.add("tiny reference")
            weights = 10.0 ** -(rng.random(weights.shape) * rng.choice([30.0, 300.0]))
        if rng.random() < 0.5:
            weights /= weights.sum(-1, keepdims=True)
        arrays["reference"] = weights


def _options(rng: np.random.Generator, tame: bool, arrays: dict[str, Array]) -> dict[str, Any]:
    method = "auto" if rng.random() < 0.5 else str(rng.choice(METHODS))
    options: dict[str, Any] = {"method": method, "tol": None, "max_iterations": None}
    options["validate"] = str(rng.choice(["full", "cheap", "off"], p=[0.7, 0.15, 0.15]))
    if tame:
        if method in ("value-iteration", "policy-iteration"):
            options["method"] = "auto"
        return options
    if rng.random() < 0.3:
        options["tol"] = float(10.0 ** -rng.uniform(1, 13)) if rng.random() < 0.9 else 0.0
    if rng.random() < 0.2:
        options["max_iterations"] = int(rng.integers(1, 21))
    elif method in ("value-iteration", "policy-iteration") and arrays["gap"].min() < 0.01:
        options["max_iterations"] = int(rng.integers(1, 300))
    return options


def _start(
    rng: np.random.Generator,
    batch: Index,
    states: int,
    arrays: dict[str, Array],
    traits: set[str],
) -> Array:
    """Zero, of the size of the value, or anything that a float64 can be."""
    axes = batch if rng.random() < 0.7 else ()
    start = rng.normal(size=(*axes, states))
    part = rng.random()
    if part < 0.4:
        traits.add("warm")
        return start * float(np.abs(arrays["reward"]).max() / arrays["gap"].min())
    traits.add("wild start")
    if part < 0.6:
        start = np.ones_like(start) * float(rng.choice([-1.0, 1.0]))
    return start * 10.0 ** float(rng.uniform(-10, 30) if part < 0.85 else rng.uniform(30, 300))
