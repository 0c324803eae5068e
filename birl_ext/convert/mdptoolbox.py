"""The arrays of pymdptoolbox: one (S, S) matrix per action, dense or sparse."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from birl_ext.convert.table import Array, as_array, continuing, mask_ends, scipy_sparse
from birl_ext.errors import OptionError, ShapeError, SparseFormatError
from birl_ext.model.mdp import DenseMDP, SparseMDP

__all__ = ["ToolboxTables", "from_mdptoolbox", "to_mdptoolbox"]


class ToolboxTables(NamedTuple):
    """What pymdptoolbox's algorithms take, in their order: ``ValueIteration(*tables)``.

    Args:
        transitions: (A, S, S), or a list of A CSR matrices (S, S).
        reward: (S, A).
        discount: γ.
    """

    transitions: Any
    reward: Array
    discount: float


def from_mdptoolbox(transitions: Any, reward: Any, discount: float) -> DenseMDP | SparseMDP:
    """The MDP of pymdptoolbox's tables, P_a(s, t) and r.

        P(t|s, a) = transitions[a][s, t]
        r(s, a) = reward[s], reward[s, a] or Σ_t P(t|s, a) reward[a][s, t]

    Ends: the form has none. A state that no action leaves stands for one: if it pays nothing it
    becomes terminal without an action, worth 0; if all its actions pay the same r it keeps one of
    them, worth r/(1−γ) (`mask_ends`).

    Args:
        transitions: (A, S, S), or A matrices (S, S), dense or of scipy.sparse.
        reward: (S,), (S, A), (A, S, S), or A matrices (S, S), dense or of scipy.sparse.
        discount: γ in [0, 1).

    Returns:
        A DenseMDP in float64; a SparseMDP if the transitions are sparse.

    Raises:
        ShapeError, DtypeError: the tables do not fit together.
        DiscountError: γ outside [0, 1).
        InvalidMDPError: its subclasses name state, action and number.
    """
    several = isinstance(transitions, list | tuple)
    if several and any(hasattr(matrix, "tocsr") for matrix in transitions):
        rows, paid = _sparse(list(transitions), reward)
        mdp: DenseMDP | SparseMDP = SparseMDP.from_scipy(rows, paid, discount)
        return mask_ends(mdp)
    if hasattr(transitions, "tocsr"):
        raise SparseFormatError(
            "transitions is one sparse matrix",
            allowed="a list of A matrices (S, S)",
            fix="give one matrix per action; of rows s·A + a: SparseMDP.from_scipy",
        )
    tensor = as_array("transitions", transitions)
    if tensor.ndim != 3 or tensor.shape[1] != tensor.shape[2]:
        fix = ""
        if tensor.ndim == 3 and tensor.shape[0] == tensor.shape[2]:
            fix = "this is (S, A, S): DenseMDP takes it as it is"
        raise ShapeError(f"transitions has shape {tensor.shape}", allowed="(A, S, S)", fix=fix)
    paid = _paid(reward, list(tensor))
    moved = torch.as_tensor(np.ascontiguousarray(tensor.transpose(1, 0, 2)))
    return mask_ends(DenseMDP(paid, moved, discount))


def to_mdptoolbox(mdp: DenseMDP | SparseMDP) -> ToolboxTables:
    """The tables of an MDP for pymdptoolbox; `from_mdptoolbox(*tables)` reads them back.

    Ends: an end without an action stays where it is and pays nothing; one that is paid leads to
    such a state, which is added. ρ is left out.

    Args:
        mdp: without batch axes, a reference, or a mask on states that go on.

    Returns:
        Dense tables of a DenseMDP, sparse ones of a SparseMDP, float64.

    Raises:
        ShapeError: it has batch axes.
        OptionError: it has a reference, or forbids an action in a state that goes on.
        MissingDependencyError: no scipy.
    """
    form = "pymdptoolbox's tables"
    found = continuing(mdp, form)
    shut = ~found.mask & ~found.ends[:, None]
    if shut.any():
        state, action = (int(i[0]) for i in np.nonzero(shut))
        raise OptionError(
            "the MDP forbids an action where the process goes on",
            where=f"state {state}, action {action}",
            allowed=f"every action there, in {form}, which have no mask",
            fix="let it do what a permitted action does, at a much lower reward",
        )
    actions = found.reward.shape[1]
    each = [found.transition[a::actions] for a in range(actions)]
    tables = each if isinstance(mdp, SparseMDP) else np.stack([m.toarray() for m in each])
    return ToolboxTables(tables, found.reward, float(mdp.discount))


def _sparse(transitions: list[Any], reward: Any) -> tuple[list[Any], torch.Tensor]:
    sparse = scipy_sparse()
    rows = [sparse.csr_array(matrix) for matrix in transitions]
    shape = rows[0].shape
    for action, matrix in enumerate(rows):
        if matrix.shape != shape or shape[0] != shape[1]:
            raise ShapeError(
                f"transitions has shape {tuple(matrix.shape)}",
                where=f"action {action}",
                allowed=f"(S, S), as of action 0, with S = {shape[0]}",
            )
    return rows, _paid(reward, rows)


def _paid(reward: Any, transitions: list[Any]) -> torch.Tensor:
    """r, (S, A), from any of the forms."""
    actions, states = len(transitions), transitions[0].shape[0]
    several = isinstance(reward, list | tuple)
    if several and any(hasattr(matrix, "tocsr") for matrix in reward):
        each = list(reward)
    elif hasattr(reward, "tocsr"):
        return torch.as_tensor(_fitting(reward.toarray(), states, actions))
    else:
        array = as_array("reward", reward)
        if array.shape == (states,):
            return torch.as_tensor(np.repeat(array[:, None], actions, 1))
        if array.ndim != 3:
            return torch.as_tensor(_fitting(array, states, actions))
        each = list(array)
    if len(each) != actions or any(tuple(m.shape) != (states, states) for m in each):
        shapes = [tuple(m.shape) for m in each]
        raise ShapeError(
            f"reward is {len(each)} matrices of shapes {shapes[:3]}",
            allowed=f"{actions} of ({states}, {states}), one per action",
        )
    columns = []
    for matrix, paid in zip(transitions, each, strict=True):
        dense = [x.toarray() if hasattr(x, "tocsr") else None for x in (matrix, paid)]
        if hasattr(matrix, "tocsr"):
            columns.append(np.asarray(matrix.multiply(paid).sum(1)).ravel())
        else:
            columns.append((matrix * (paid if dense[1] is None else dense[1])).sum(1))
    return torch.as_tensor(np.stack(columns, 1))


def _fitting(array: Array, states: int, actions: int) -> Array:
    if array.shape != (states, actions):
        transposed = array.shape == (actions, states)
        raise ShapeError(
            f"reward has shape {array.shape}",
            allowed=f"(S,) = ({states},), (S, A) = ({states}, {actions}) or (A, S, S)",
            fix="transpose it" if transposed else "",
        )
    return array
