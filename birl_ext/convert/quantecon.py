"""QuantEcon's DiscreteDP, in the product form and as state-action pairs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from birl_ext.convert.table import (
    Array,
    Rows,
    as_array,
    as_indices,
    assemble,
    continuing,
    mask_ends,
)
from birl_ext.errors import EmptyActionSetError, OptionError, ShapeError
from birl_ext.model.mdp import DenseMDP, SparseMDP

__all__ = ["from_quantecon", "to_quantecon"]

Form = Literal["product", "pairs"]


def from_quantecon(problem: Any) -> DenseMDP | SparseMDP:
    """The MDP of a `quantecon.markov.DiscreteDP`, or of anything that has its attributes.

        P(t|s, a) = Q[s, a, t],   r(s, a) = R[s, a];   in pairs: P(t|s_i, a_i) = Q[i, t], r = R[i]

    An action that is not feasible, R = −∞ or no pair, is masked.

    Ends: the form has none. A state that no action leaves stands for one: if it pays nothing it
    becomes terminal without an action, worth 0; if all its actions pay the same r it keeps one of
    them, worth r/(1−γ) (`mask_ends`).

    Args:
        problem: has R, Q, beta, and for pairs s_indices and a_indices. Q may be sparse.

    Returns:
        A DenseMDP of the product form, a SparseMDP of pairs; float64.

    Raises:
        OptionError: an attribute is missing, or a pair is given twice.
        ShapeError, DtypeError: R, Q and the indices do not fit together.
        DiscountError: β is 1, which only finite horizons allow.
        InvalidMDPError: its subclasses name state, action and number.
    """
    for name in ("R", "Q", "beta"):
        if getattr(problem, name, None) is None:
            raise OptionError(
                f"the problem has no {name}",
                allowed="a DiscreteDP, or what has its R, Q and beta",
            )
    reward, beta = as_array("R", problem.R), float(problem.beta)
    states_of = getattr(problem, "s_indices", None)
    actions_of = getattr(problem, "a_indices", None)
    if states_of is not None and actions_of is not None:
        return mask_ends(_pairs(reward, problem.Q, beta, states_of, actions_of))
    transition = as_array("Q", problem.Q)
    if reward.ndim != 2 or transition.shape != (*reward.shape, reward.shape[0]):
        raise ShapeError(
            f"R has shape {reward.shape} and Q {transition.shape}",
            allowed="(S, A) and (S, A, S); pairs (L,) and (L, S) with s_indices and a_indices",
        )
    feasible = reward > -np.inf
    mask = None if feasible.all() else torch.as_tensor(feasible)
    paid = torch.as_tensor(np.where(feasible, reward, 0.0))
    return mask_ends(DenseMDP(paid, torch.as_tensor(transition), beta, mask=mask))


def to_quantecon(mdp: DenseMDP | SparseMDP, form: Form | None = None) -> tuple[Any, ...]:
    """What `DiscreteDP(*arguments)` takes of an MDP; `from_quantecon` reads it back.

    Ends: an end without an action stays where it is and pays nothing; one that is paid leads to
    such a state, which is added. ρ is left out.

    Args:
        mdp: without batch axes or a reference.
        form: "product", (R, Q, beta) with −∞ behind the mask; "pairs", (R, Q, beta, s_indices,
            a_indices) with a sparse Q; None is the product form of a DenseMDP, pairs of a
            SparseMDP.

    Raises:
        ShapeError: it has batch axes.
        OptionError: it has a reference, or the form is none of these.
        MissingDependencyError: no scipy.
    """
    if form is None:
        form = "pairs" if isinstance(mdp, SparseMDP) else "product"
    if form not in ("product", "pairs"):
        raise OptionError(f"form is {form!r}", allowed="'product' or 'pairs'")
    found = continuing(mdp, "a DiscreteDP")
    states, actions = found.reward.shape
    beta = float(mdp.discount)
    if form == "product":
        transition = found.transition.toarray().reshape(states, actions, states)
        transition[~found.mask] = np.eye(states)[np.nonzero(~found.mask)[0]]  # which nobody reads
        return np.where(found.mask, found.reward, -np.inf), transition, beta
    state, action = np.nonzero(found.mask)
    rows = found.transition[state * actions + action]
    return found.reward[state, action], rows, beta, state, action


def _pairs(
    reward: Array, transition: Any, beta: float, states_of: Any, actions_of: Any
) -> SparseMDP:
    if not hasattr(transition, "tocoo"):
        transition = as_array("Q", transition)
    shape = tuple(transition.shape)
    if reward.ndim != 1 or len(shape) != 2 or shape[0] != len(reward):
        raise ShapeError(
            f"R has shape {reward.shape} and Q {shape}", allowed="(L,) and (L, S), of L pairs"
        )
    states = shape[1]
    state = as_indices("s_indices", states_of, states)
    action = as_indices("a_indices", actions_of)
    if not len(state) == len(action) == len(reward):
        raise ShapeError(
            f"s_indices has length {len(state)} and a_indices {len(action)}",
            allowed=f"{len(reward)}, as R",
        )
    actions = int(action.max()) + 1
    counts = np.bincount(state * actions + action, minlength=states * actions)
    if (counts > 1).any():
        first = divmod(int((counts > 1).argmax()), actions)
        raise OptionError(
            "a pair is given twice", where="state {}, action {}".format(*first), allowed="once"
        )
    if hasattr(transition, "tocoo"):
        found = transition.tocoo()
        pair, col, data = found.row, found.col, found.data
    else:
        pair, col = np.nonzero(transition != 0)  # NaN too
        data = transition[pair, col]
    feasible = reward > -np.inf
    mask, paid = np.zeros((2, states, actions))
    mask[state, action], paid[state, action] = feasible, np.where(feasible, reward, 0.0)
    if (empty := ~mask.any(-1)).any():
        raise EmptyActionSetError(
            "no pair is feasible",
            where=f"state {int(empty.argmax())}",
            allowed="at least one in every state, of a DiscreteDP",
            fix="let an end stay where it is, with R = 0",
        )
    keep = feasible[pair]
    pair, col, data = pair[keep], col[keep].astype(np.int64), data[keep].astype(np.float64)
    rows = Rows(state[pair], action[pair], col, data, np.zeros(len(data), bool))
    return assemble(rows, paid, beta, mask=mask.astype(bool))
