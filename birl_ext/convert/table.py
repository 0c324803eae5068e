"""Rows of a table as an MDP, with its ends closed: what every format ends in."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from birl_ext.errors import (
    DtypeError,
    MissingDependencyError,
    NegativeProbabilityError,
    NonFiniteInputError,
    NonStochasticError,
    OptionError,
    ShapeError,
)
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP, SparseMDP

__all__ = [
    "Continuing",
    "Rows",
    "as_array",
    "as_indices",
    "assemble",
    "continuing",
    "mask_ends",
    "scipy_sparse",
    "single",
]

Array = np.ndarray
M = TypeVar("M", bound=DenseMDP | SparseMDP)


class Rows(NamedTuple):
    """n outcomes of actions, in any order; those of one row that lead to one state add up.

    Args:
        state: (n,) int64.
        action: (n,) int64.
        following: (n,) int64, the next state.
        probability: (n,) float64.
        ended: (n,) bool, where nothing follows the next state.
    """

    state: Array
    action: Array
    following: Array
    probability: Array
    ended: Array


def assemble(
    rows: Rows,
    reward: Array,
    discount: float,
    *,
    mask: Array | None = None,
    inner: Array | None = None,
    initial: Array | None = None,
    dtype: torch.dtype = torch.float64,
) -> SparseMDP:
    """The MDP of a table whose outcomes may end the process, worth zero from there on.

    A state that is entered by outcomes that end, and by no others, is the end itself: terminal,
    without an action. Where other outcomes enter it too, or it is one of `inner`, those that end go
    to a state of their own, number S. A state without an action is an end too.

    Args:
        rows: the outcomes.
        reward: r, (S, A).
        discount: γ.
        mask: (S, A) bool, the actions that there are; None for those that have an outcome.
        inner: (S,) bool, states in which something is done although outcomes that end lead there.
        initial: ρ, (S,).
        dtype: of the numbers.
    """
    states, actions = reward.shape
    refuse_numbers(rows)
    rows = Rows(*(part[rows.probability != 0] for part in rows))
    if mask is None:
        mask = np.zeros(reward.shape, bool)
        mask[rows.state, rows.action] = True
    entered = np.zeros((2, states), bool)
    entered[rows.ended.astype(int), rows.following] = True
    started = entered[0] if inner is None else entered[0] | inner
    if initial is not None:
        started = started | (initial > 0)
    ends = entered[1] & ~started
    apart = rows.ended & ~ends[rows.following]
    following = np.where(apart, states, rows.following)
    mask = mask & ~ends[:, None]
    if apart.any():
        states += 1
        mask = np.concatenate((mask, np.zeros((1, actions), bool)))
        reward = np.concatenate((reward, np.zeros((1, actions))))
        initial = None if initial is None else np.append(initial, 0.0)
    ends = ~mask.any(-1)

    kept = mask[rows.state, rows.action]
    place = (rows.state * actions + rows.action)[kept] * states + following[kept]
    place, which = np.unique(place, return_inverse=True)
    values = np.bincount(which, rows.probability[kept], minlength=len(place))
    row, col = np.divmod(place, states)
    counts = np.bincount(row, minlength=states * actions)
    crow = np.concatenate(([0], counts.cumsum()))

    def numbers(array: Array) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float64).to(dtype)

    return SparseMDP(
        numbers(np.where(mask, reward, 0.0)),
        numbers(values),
        torch.as_tensor(crow),
        torch.as_tensor(col),
        discount,
        mask=None if mask.all() else torch.as_tensor(mask),
        terminal=torch.as_tensor(ends) if ends.any() else None,
        initial_distribution=None if initial is None else numbers(initial),
    )


def refuse_numbers(rows: Rows) -> None:
    """Raise at the first outcome whose probability is none, before outcomes are added up."""
    bad = ~((rows.probability >= 0) & np.isfinite(rows.probability))
    if bad.any():
        first = int(bad.argmax())
        value = rows.probability[first]
        kind = NegativeProbabilityError if value < 0 else NonFiniteInputError
        state, action, following = (int(part[first]) for part in rows[:3])
        raise kind(
            f"a probability is {value:.6g}",
            where=f"state {state}, action {action}, next state {following}",
            allowed="a number from 0 to 1",
            fix="mend the table",
        )


def mask_ends(mdp: M) -> M:
    """The MDP whose ends leave no choice, so that none is worth the entropy of one.

    A state that no action leaves, and in which all actions pay the same r, is worth
    (r + τ log A)/(1−γ), a terminal one r + τ log A: whoever means r/(1−γ) and r has one action
    there. If r = 0 the state becomes terminal without an action, worth 0; else all actions but the
    first are masked. Where actions pay differently the choice is meant, and stays.

    Args:
        mdp: without batch axes; a reference is ignored where it is normalised, and 1 afterwards
            where it was not.

    Raises:
        ShapeError: it has batch axes.

    Gradients: as of the MDP.
    Source: (M2).
    """
    if mdp.batch_shape:
        raise ShapeError(
            f"the MDP has batch axes {tuple(mdp.batch_shape)}",
            allowed="a single MDP",
            fix="close the ends of each, then stack() them",
        )
    mask = torch.ones_like(mdp.reward, dtype=torch.bool) if mdp.mask is None else mdp.mask
    terminal = torch.zeros_like(mask[:, 0]) if mdp.terminal is None else mdp.terminal
    reward = mdp.reward.detach()
    high = reward.masked_fill(~mask, -torch.inf).amax(-1)
    alike = high == reward.masked_fill(~mask, torch.inf).amin(-1)
    free = checks.free_choices(mask, mdp.reference, mdp.actions)
    stands = mdp.stands()
    # one that pays nothing and has one action is an end too, if it is said or not
    closed = (
        alike & (high == 0) & torch.where(terminal, free, stands & (free | (mask.sum(-1) == 1)))
    )
    one_action = alike & free & (terminal | stands) & ~closed
    if not bool((closed | one_action).any()):
        return mdp
    first = mask & (mask.cumsum(-1) == 1)
    changes: dict[str, Any] = {"mask": torch.where(one_action.unsqueeze(-1), first, mask)}
    changes["mask"] = changes["mask"] & ~closed.unsqueeze(-1)
    if bool(closed.any()):
        changes["terminal"] = terminal | closed
    if mdp.reference is not None:
        one = one_action.unsqueeze(-1)
        changes["reference"] = torch.where(one, 1.0, mdp.reference)
    return cast(M, mdp.replace(**changes))


class Continuing(NamedTuple):
    """An MDP in a form that knows no end: every row of P sums to one, an end stays where it is.

    Args:
        transition: P, (S·A, S), scipy.sparse CSR.
        reward: r, (S, A).
        mask: (S, A) bool, the actions that there are.
        ends: (S,) bool.
    """

    transition: Any
    reward: Array
    mask: Array
    ends: Array


def continuing(mdp: DenseMDP | SparseMDP, form: str) -> Continuing:
    """A single MDP without a reference, as a form that knows no end can hold it.

    An end without an action stays where it is, pays nothing and has all actions. If an end has an
    action, which is paid, state S is added, to which it leads.

    Args:
        mdp: without batch axes or a reference.
        form: what the message of a refusal calls it.

    Raises:
        ShapeError, OptionError: as `single`.
        MissingDependencyError: no scipy.
    """
    single(mdp, form)
    sparse = scipy_sparse()
    mdp = mdp.to_sparse() if isinstance(mdp, DenseMDP) else mdp
    mdp = mdp.to("cpu", torch.float64)
    states, actions = mdp.states, mdp.actions
    reward = mdp.reward.detach().numpy().copy()
    mask = np.ones_like(reward, bool) if mdp.mask is None else mdp.mask.numpy().copy()
    ends = np.zeros(states, bool) if mdp.terminal is None else mdp.terminal.numpy().copy()
    shape = (states * actions, states)
    parts = (mdp.values.detach().numpy(), mdp.col.numpy(), mdp.crow.numpy())
    matrix = sparse.csr_array(parts, shape=shape).tocoo()
    kept = matrix.data != 0
    data, row, col = matrix.data[kept], matrix.row[kept], matrix.col[kept]
    paid = ends & mask.any(-1)
    added = int(paid.any())
    reward = np.concatenate((reward, np.zeros((added, actions))))
    mask = np.concatenate((mask, np.zeros((added, actions), bool)))
    ends = np.append(ends & ~paid, np.ones(added, bool))
    where, action = np.nonzero(paid[:, None] & mask[:states])
    still = np.repeat(np.flatnonzero(ends), actions)
    data = np.concatenate((data, np.ones(len(where) + len(still))))
    col = np.concatenate((col, np.full(len(where), states), still))
    choices = np.tile(np.arange(actions), int(ends.sum()))
    row = np.concatenate((row, where * actions + action, still * actions + choices))
    mask[ends] = True
    size = states + added
    transition = sparse.csr_array((data, (row, col)), shape=(size * actions, size))
    return Continuing(transition, reward, mask, ends)


# What is given


def single(mdp: Any, form: str) -> None:
    """Refuse an MDP that has batch axes or a reference.

    Args:
        mdp: what is given as one.
        form: what the message calls the form that has no place for them.

    Raises:
        ShapeError: it has batch axes.
        OptionError: it has a reference, or is no MDP.
    """
    if not isinstance(mdp, DenseMDP | SparseMDP):
        raise OptionError(f"mdp is {checks.kind_of(mdp)}", allowed="a DenseMDP or a SparseMDP")
    if mdp.batch_shape:
        raise ShapeError(
            f"the MDP has batch axes {tuple(mdp.batch_shape)}", allowed=f"a single MDP, in {form}"
        )
    if mdp.reference is not None:
        raise OptionError(
            "the MDP has a reference",
            allowed=f"none, in {form}, which has no place for it",
            fix="keep the reference apart: mdp.replace(reference=None)",
        )


def as_array(name: str, given: Any) -> Array:
    """A table of numbers, float64, of the shape that was given.

    Args:
        name: what the message of a refusal calls it.
        given: what NumPy can make an array of.

    Raises:
        DtypeError: it holds something else than numbers, or rows of unequal length.
    """
    try:
        array = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DtypeError(
            f"{name} is {checks.kind_of(given)} and no table of numbers: {error}",
            allowed="an array of numbers",
            fix="give rows of equal length that hold numbers alone",
        ) from None
    return array


def as_indices(name: str, given: Any, below: int | None = None) -> Array:
    """(n,) int64, each from 0 to `below` − 1.

    Args:
        name: what the message of a refusal calls them.
        given: (n,) whole numbers, of any dtype but bool.
        below: the bound above; None is none.

    Raises:
        DtypeError: they are no whole numbers.
        ShapeError: the shape is another, or a number is out of bounds; its entry is named.
    """
    array = np.asarray(given)
    if array.ndim != 1:
        raise ShapeError(f"{name} has shape {array.shape}", allowed="(n,)")
    whole = array.astype(np.int64) if array.dtype.kind in "iufb" else None
    if array.dtype.kind == "b" or whole is None or not np.array_equal(whole, array):
        raise DtypeError(f"{name} holds {array.dtype}", allowed="whole numbers")
    bad = whole < 0
    if below is not None:
        bad |= whole >= below
    if bad.any():
        first = int(bad.argmax())
        most = "" if below is None else f" to {below - 1}"
        raise ShapeError(
            f"{name} is {whole[first]}",
            where=f"entry {first}",
            allowed=f"0{most}" if most else "0 or more",
            fix="count from zero",
        )
    return whole


def refuse_sums(sums: Array, mask: Array, tolerance: float = 1e-8) -> None:
    """Raise NonStochasticError at the first row of (S, A) whose probabilities do not sum to one."""
    bad = mask & ~(np.abs(sums - 1) <= tolerance)
    if bad.any():
        state, action = (int(i[0]) for i in np.nonzero(bad))
        raise NonStochasticError(
            f"the probabilities sum to {sums[state, action]:.12g}",
            where=f"state {state}, action {action}",
            allowed=f"1 ± {tolerance:.3g}",
        )


def start_of(initial: Any, states: int) -> Array | None:
    """ρ, (S,), from an array, a state, or probabilities by state."""
    if initial is None:
        return None
    start = np.zeros(states)
    if isinstance(initial, Mapping):
        keys = as_indices("initial", list(initial), states)
        start[keys] = as_array("initial", list(initial.values()))
        return start
    array = as_array("initial", initial)
    if array.ndim == 0:
        start[as_indices("initial", [initial], states)] = 1.0
        return start
    if array.shape != (states,):
        raise ShapeError(f"initial has shape {array.shape}", allowed=f"({states},)")
    return array


def scipy_sparse() -> ModuleType:
    """The module scipy.sparse.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        import scipy.sparse
    except ImportError:
        raise MissingDependencyError("scipy is not installed", fix="pip install scipy") from None
    module: ModuleType = scipy.sparse
    return module
