"""Logged transitions as an MDP, with the uncertainty of what was estimated."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from birl_ext.convert.table import Array, Rows, as_array, as_indices, assemble
from birl_ext.errors import (
    DtypeError,
    NonFiniteInputError,
    OptionError,
    ShapeError,
    UninformativeDataError,
)
from birl_ext.model import checks
from birl_ext.model.mdp import SparseMDP

__all__ = ["LoggedMDP", "from_logs"]

Unseen = Literal["mask", "refuse"]


class LoggedMDP(NamedTuple):
    """What logged transitions say of an MDP, and how surely; with S the states of `mdp`.

    Args:
        mdp: estimates of P and r.
        counts: n(s, a), (S, A) int64.
        transition_error: standard error of each entry of P, (nnz,), beside `mdp.values`.
        reward_error: standard error of r, (S, A): the spread of what was paid over √n; NaN where
            n(s, a) < 2.
        unseen: (S, A) bool, actions that were never taken in states that go on: they are masked.
        dead_ends: (S,) bool, states that go on in which nothing was ever done, and that count as
            ends, worth 0: what the log was cut off in.
    """

    mdp: SparseMDP
    counts: Tensor
    transition_error: Tensor
    reward_error: Tensor
    unseen: Tensor
    dead_ends: Tensor


def from_logs(
    state: Any,
    action: Any,
    next_state: Any,
    reward: Any,
    terminated: Any | None = None,
    *,
    discount: float,
    states: int | None = None,
    actions: int | None = None,
    unseen: Unseen = "refuse",
    prior: float = 0.0,
    first: Any | None = None,
    dtype: torch.dtype = torch.float64,
) -> LoggedMDP:
    """The MDP that N logged transitions (s, a, t, r, terminated) make likely.

        P(t|s, a) = (n(s, a, t) + α) / (n(s, a) + αK),   r(s, a) = mean of what was paid

    At α = 0 this is the share of what was seen, of greatest likelihood, with the multinomial
    standard error √(P(1 − P)/n); at α > 0 the mean of the posterior from a symmetric Dirichlet
    prior over the K places that were seen anywhere, with its standard deviation
    √(P(1 − P)/(n + αK + 1)).

    Ends: `terminated` belongs to a transition, and nothing follows it: the value behind it is 0. A
    state that is entered by such transitions alone, and in which nothing was done, is the end
    itself: terminal, without an action. If others lead to it too, those that terminate go to a
    state of their own, the last. A transition that was cut off (truncated) has not terminated.

    Args:
        state, action, next_state: (N,) whole numbers from 0.
        reward: (N,).
        terminated: (N,) bool; None is nowhere.
        discount: γ in [0, 1).
        states, actions: S and A; None is one more than the largest number.
        unseen: "refuse" an action that was never taken in a state where others were, or "mask" it.
        prior: α ≥ 0.
        first: (M,) states in which episodes began, whose shares are ρ; None is no ρ.
        dtype: of the MDP, float64 or float32.

    Raises:
        UninformativeDataError: an action was never taken, or nothing was done in a state that was
            entered, and unseen="refuse"; state and action are named.
        ShapeError, DtypeError: the columns do not fit together; entry and value are named.
        NonFiniteInputError: a reward is NaN or infinite.
        OptionError: `unseen` is unknown.

    Source: (M1).
    """
    if unseen not in ("mask", "refuse"):
        raise OptionError(f"unseen is {unseen!r}", allowed="'mask' or 'refuse'")
    alpha = checks.check_number("prior", prior)
    s, a, t = (
        as_indices(name, _host(column), below)
        for name, column, below in (
            ("state", state, states),
            ("action", action, actions),
            ("next_state", next_state, states),
        )
    )
    paid = as_array("reward", _host(reward))
    ended = np.zeros(len(s), bool) if terminated is None else np.asarray(_host(terminated))
    for name, column in (("action", a), ("next_state", t), ("reward", paid), ("terminated", ended)):
        if column.shape != s.shape:
            raise ShapeError(
                f"{name} has shape {column.shape}", allowed=f"{s.shape}, as state", fix=""
            )
    if ended.dtype != bool:
        if ended.dtype.kind not in "iuf" or not np.isin(ended, (0, 1)).all():
            raise DtypeError(
                f"terminated holds {ended.dtype}", allowed="True and False, or 1 and 0"
            )
        ended = ended.astype(bool)
    if not len(s):
        raise UninformativeDataError("the log has no transitions", allowed="one at least")
    if not np.isfinite(paid).all():
        entry = int((~np.isfinite(paid)).argmax())
        raise NonFiniteInputError(
            f"reward is {paid[entry]}", where=f"entry {entry}", fix="leave that transition out"
        )
    size = states or int(max(s.max(), t.max())) + 1
    width = actions or int(a.max()) + 1
    counts = np.zeros((size, width), np.int64)
    np.add.at(counts, (s, a), 1)
    if unseen == "refuse":
        _refuse_gaps(counts, s, t, ended)

    mean, spread = np.zeros((2, size, width))
    n = np.maximum(counts, 1)
    np.add.at(mean, (s, a), paid)
    mean /= n
    np.add.at(spread, (s, a), (paid - mean[s, a]) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(spread / (counts - 1) / counts)
    error[counts < 2] = np.nan

    acted = counts.max(-1) > 0
    start = None
    if first is not None:
        begun = as_indices("first", _host(first), size)
        if not len(begun):
            raise ShapeError("first is empty", allowed="one state at least")
        start = np.bincount(begun, minlength=size) / len(begun)
    rows, places = _shares(s, a, t, ended, counts, alpha)
    mdp = assemble(rows, mean, discount, mask=counts > 0, inner=acted, initial=start, dtype=dtype)
    extra = mdp.states - size
    counts, error = (
        np.concatenate((part, np.full((extra, width), gap, part.dtype)))
        for part, gap in ((counts, 0), (error, np.nan))
    )
    total = torch.as_tensor(counts, dtype=torch.float64).flatten()[mdp.rows()]
    weight = total + alpha * places + (1.0 if alpha else 0.0)
    values = mdp.values.double()
    entered = np.zeros(mdp.states, bool)
    entered[t[~ended]] = True
    entered[:size] |= start > 0 if start is not None else False
    acted = counts.max(-1) > 0
    return LoggedMDP(
        mdp,
        torch.as_tensor(counts),
        (values * (1 - values) / weight).clamp(min=0).sqrt(),
        torch.as_tensor(error),
        torch.as_tensor((counts == 0) & acted[:, None]),
        torch.as_tensor(entered & ~acted),
    )


def _shares(
    s: Array, a: Array, t: Array, ended: Array, counts: Array, alpha: float
) -> tuple[Rows, int]:
    """The rows of P, and K."""
    size, width = counts.shape
    place = t + size * ended
    places = np.unique(place)
    if alpha == 0:
        return Rows(s, a, t, 1 / counts[s, a], ended), len(places)
    state, action = np.nonzero(counts)
    checks.check_memory(
        f"a prior over {len(places)} places in {len(state)} rows",
        3 * len(places) * len(state),
        fix="use prior=0, whose rows hold only what was seen",
    )
    number = np.zeros((size, width), np.int64)
    number[state, action] = np.arange(len(state))
    seen = np.zeros((len(state), len(places)))
    np.add.at(seen, (number[s, a], np.searchsorted(places, place)), 1)
    law = (seen + alpha) / (seen.sum(-1, keepdims=True) + alpha * len(places))
    there = np.tile(places, len(state))
    rows = Rows(
        np.repeat(state, len(places)),
        np.repeat(action, len(places)),
        there % size,
        law.ravel(),
        there >= size,
    )
    return rows, len(places)


def _refuse_gaps(counts: Array, s: Array, t: Array, ended: Array) -> None:
    acted = counts.max(-1) > 0
    gaps = (counts == 0) & acted[:, None]
    if gaps.any():
        state, action = (int(i[0]) for i in np.nonzero(gaps))
        raise UninformativeDataError(
            f"{int(gaps.sum())} actions were never taken where others were, the first",
            where=f"state {state}, action {action}",
            allowed="every action once at least, by unseen='refuse'",
            fix="log more, or mask them: unseen='mask'",
        )
    stuck = ~ended & ~acted[t]
    if stuck.any():
        raise UninformativeDataError(
            "nothing was done in a state that was entered and is no end",
            where=f"state {int(t[stuck][0])}, after entry {int(stuck.argmax())}",
            allowed="a transition from each, by unseen='refuse'",
            fix="log more, or let such states count as ends, worth 0: unseen='mask'",
        )


def _host(column: Any) -> Any:
    """A tensor as an array; all else as it is."""
    return column.detach().cpu().numpy() if isinstance(column, Tensor) else column
