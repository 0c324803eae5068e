"""Entropy-regularised MDPs as data: frozen, validated once, batched, dense or sparse."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from birl_ext.errors import (
    DtypeError,
    FileFormatError,
    NonStochasticError,
    ShapeError,
    SparseFormatError,
)
from birl_ext.model import checks
from birl_ext.model.checks import Level
from birl_ext.model.layout import Flat, flatten
from birl_ext.model.tensor_files import FOREIGN, MAX_BYTES, read_tensors, write_tensors
from birl_ext.solution import as_device
from birl_ext.torch_internals import is_concrete

__all__ = ["DenseMDP", "SparseMDP", "load"]

_FORMAT = 1
_OPTIONAL = ("mask", "terminal", "reference", "initial_distribution")


@dataclass(frozen=True, eq=False, repr=False)
class _MDP:
    """What dense and sparse MDPs share; `_entries` names the tensor that holds P's numbers."""

    _entries: ClassVar[str]
    _event: ClassVar[int]

    reward: Tensor
    _: KW_ONLY
    mask: Tensor | None = None
    terminal: Tensor | None = None
    reference: Tensor | None = None
    initial_distribution: Tensor | None = None
    validate: InitVar[Level] = "full"
    log_reference: Tensor = field(init=False)
    batch_shape: tuple[int, ...] = field(init=False)
    free_ends = False
    """Whether a terminal state was seen whose choice has an entropy."""
    idle_ends = False
    """Whether a state was seen that no action leaves and in which all pay the same."""
    _standing: ClassVar[Tensor | None] = None  # of each MDP: states that no choice leaves, if any

    # Sizes

    @property
    def states(self) -> int:
        """S."""
        return self.reward.shape[-2]

    @property
    def actions(self) -> int:
        """A."""
        return self.reward.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of reward and transition: float32 or float64."""
        return self.reward.dtype

    @property
    def device(self) -> torch.device:
        """Where every tensor lives."""
        return self.reward.device

    # Changes

    def replace(self, *, validate: Level = "full", **changes: Any) -> Self:
        """A copy with some fields changed; only what changed is validated again.

        Entries behind a former mask or in former terminal rows are zero: give the transition too
        when opening them.
        """
        checks.check_level(validate)
        if validate == "full" and changes.keys() & {"crow", "col"}:
            return dataclasses.replace(self, **changes, validate="full")
        new = dataclasses.replace(self, **changes, validate="off" if validate == "off" else "cheap")
        if validate == "cheap" and not changes.keys() & {"transition", "values"}:
            self._check_opened(new)
        if not changes.keys() & {"mask", "terminal", "reference"}:
            new._set(free_ends=self.free_ends)
            if not changes.keys() & {"transition", "values"}:
                idle = self.idle_ends and "reward" not in changes
                new._set(idle_ends=idle, _standing=self._standing)
        if validate == "full":
            new._check_data(frozenset(changes))
        return new

    def _check_opened(self, new: Self) -> None:
        """Raise NonStochasticError where actions open up whose rows the former mask has emptied."""
        if self.mask is None or not is_concrete(self.mask, new.mask):
            return
        opened = ~self.mask if new.mask is None else new.mask & ~self.mask
        if bool(opened.any()):
            raise NonStochasticError(
                "the mask opens actions whose rows the former mask has emptied",
                fix="give the transition too",
            )

    def to(self, *targets: torch.device | str | torch.dtype) -> Self:
        """A copy on another device, in another dtype, or both: ``mdp.to("cuda", torch.float32)``.

        The discount keeps its dtype: 1/(1 − γ) would magnify its rounding. Widening to float64
        divides every row of P, and ρ, by its sum: this leaves the model as it was read before (P/σ)
        and lets it pass the tighter tolerance.
        """
        devices = [as_device(t) for t in targets if not isinstance(t, torch.dtype)]
        dtypes = [target for target in targets if isinstance(target, torch.dtype)]
        for dtype in dtypes:
            if dtype not in (torch.float32, torch.float64):
                raise DtypeError(f"to({dtype}) was asked for", allowed="float32, float64")
        changes: dict[str, Any] = {}
        for name, tensor in self._tensors().items():
            for device in devices:
                tensor = tensor.to(device)
            if tensor.is_floating_point() and name != "discount":
                for dtype in dtypes:
                    tensor = tensor.to(dtype)
            changes[name] = tensor
        widened = torch.float64 in dtypes and self.dtype == torch.float32
        new = self.replace(validate="cheap", **changes)
        if not widened:
            new._set(free_ends=self.free_ends, idle_ends=self.idle_ends)
            return new
        if new.initial_distribution is not None:
            start = new.initial_distribution
            changes["initial_distribution"] = start / start.sum(-1, keepdim=True)
        changes[self._entries] = new._normalised()
        new = new.replace(validate="cheap", **changes)
        new._set(free_ends=self.free_ends, idle_ends=self.idle_ends)
        return new

    # Normal form

    def flatten(self, temperature: float | Tensor, batch: tuple[int, ...] = ()) -> Flat:
        """The MDP at temperature τ as (N, G) tensors: what the ops read.

        Args:
            temperature: τ, a number or (*B).
            batch: further batch axes to broadcast with, those of a policy or a value, say.
        """
        return flatten(
            self.reward,
            getattr(self, self._entries),
            self.log_reference,
            getattr(self, "discount", 0.0),  # a field of each kind, behind its own tensors
            temperature,
            crow=getattr(self, "crow", None),
            col=getattr(self, "col", None),
            batch=batch,
        )

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the MDP to a .npz or .safetensors file; `load` reads it back bit for bit.

        Raises:
            FileFormatError: another extension.
            MissingDependencyError: .safetensors without the package.
        """
        tensors = self._tensors()
        discount = self._fields()["discount"]
        tensors["discount"] = torch.as_tensor(discount, dtype=torch.float64)
        tensors["format"] = torch.tensor(_FORMAT)
        write_tensors(path, tensors)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, validate: Level = "full", max_bytes: int = MAX_BYTES
    ) -> Self:
        """Read an MDP of this kind; see `birl_ext.model.mdp.load`."""
        mdp = load(path, validate=validate, max_bytes=max_bytes)
        if not isinstance(mdp, cls):
            raise FileFormatError(
                f"{os.fspath(path)} holds a {type(mdp).__name__}",
                allowed=cls.__name__,
                fix=f"use {type(mdp).__name__}.load",
            )
        return mdp

    def __repr__(self) -> str:
        discount = self._fields()["discount"]
        discount = "tensor" if isinstance(discount, Tensor) else discount
        given = "".join(f", {name}" for name in _OPTIONAL if getattr(self, name) is not None)
        return (
            f"{type(self).__name__}(states={self.states}, actions={self.actions}, "
            f"batch_shape={self.batch_shape}, discount={discount}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device}{given})"
        )

    # Construction

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _tensors(self) -> dict[str, Tensor]:
        return {k: value for k, value in self._fields().items() if isinstance(value, Tensor)}

    def _fields(self) -> dict[str, Any]:
        """What it was made of, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def _begin(self, validate: Level) -> None:
        """The fields in the kinds that the rest takes them for, and all that needs no data."""
        fields = self._fields()
        promoted = checks.promoted(self._entries, fields, validate)
        self._set(**promoted)
        fields |= promoted
        if validate != "off":
            checks.check_form(self._entries, fields)
        self._set(batch_shape=checks.common_batch(self._entries, self._event, fields))

    def _check_data(self, changed: frozenset[str]) -> None:
        free = checks.check_data(self._entries, self._fields(), changed, self._check_rows)
        if free is not None:
            self._set(free_ends=free)
        moved = changed & {self._entries, "crow", "col", "mask", "terminal", "reference"}
        if moved:
            self._set(_standing=self._find_standing())
        if self._standing is not None and (moved or "reward" in changed):
            self._set(idle_ends=checks.pays_alike(self.reward, self.mask, self._standing))

    def _find_standing(self) -> Tensor | None:
        """(*B, S) bool, states that go on, that no action leaves, and that have a free choice; None
        for no such state, and where nothing can be read.
        """
        fields = self._fields()
        if self.actions == 1 or not is_concrete(*fields.values()):
            return None
        standing = self.stands()
        if not bool(standing.any()):
            return None
        if self.terminal is not None:
            standing = standing & ~self.terminal
        standing = standing & checks.free_choices(self.mask, self.reference, self.actions)
        return standing if bool(standing.any()) else None

    def stands(self) -> Tensor:
        """(*B, S) bool, states that no available action leaves; a terminal one may be either."""
        raise NotImplementedError

    @property
    def ending(self) -> bool:
        """Whether rows of zeros may be meant: the process ends, or nobody can go there."""
        return self.mask is not None or self.terminal is not None

    def _mask_rewards(self) -> None:
        """Zero the reward behind the mask and take the logarithm of the reference."""
        mask, available = self.mask, self.mask
        if mask is not None:
            self._set(reward=torch.where(mask, self.reward, 0.0))
            if self.terminal is not None:
                # A terminal state without actions gets one that pays nothing, so that V = 0.
                closed = (self.terminal & ~mask.any(-1)).unsqueeze(-1)
                first = torch.arange(self.actions, device=self.device) == 0
                available = mask | (closed & first)
        self._set(log_reference=self._log_reference(available))

    def _continuing(self) -> Tensor | None:
        """(*B, S, A) bool, the rows of P that some problem may enter; None for all."""
        rows = None
        if self.mask is not None:
            batch = getattr(self, self._entries).shape[: -self._event]
            rows = _any_over_shared(self.mask, tuple(batch))
        if self.terminal is not None:
            ongoing = ~self.terminal.unsqueeze(-1)
            rows = ongoing.expand(*self.terminal.shape, self.actions) if rows is None else rows
            rows = rows & ongoing
        return rows

    def forbidden(self) -> Tensor | None:
        """(*B, S, A) bool, True where a policy may have no mass; None for nowhere.

        A terminal state without any action is not among them: nothing is paid there.
        """
        if self.mask is None:
            return None
        closed = ~self.mask
        if self.terminal is None:
            return closed
        return closed & ~(self.terminal & closed.all(-1)).unsqueeze(-1)

    def _log_reference(self, available: Tensor | None) -> Tensor:
        if self.reference is None:
            if available is None:
                return torch.empty(0, dtype=torch.float64, device=self.device)
            zeros = torch.zeros(available.shape, dtype=torch.float64, device=self.device)
            return zeros.masked_fill(~available, -torch.inf)
        reference = self.reference.to(torch.float64)
        if available is None or self.mask is None:
            return reference.log()
        return torch.where(self.mask, reference, 1.0).log().masked_fill(~available, -torch.inf)

    def _check_rows(self) -> None:
        raise NotImplementedError

    def _normalised(self) -> Tensor:
        """P/σ, as the tensor that holds P's numbers; rows of zeros stay."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class DenseMDP(_MDP):
    """An MDP, or a batch of them, whose transition is a dense tensor.

        Q(s,a) = r(s,a) + γ Σ_t P(t|s,a) V(t),    V(s) = τ log Σ_a μ(a|s) exp(Q(s,a) / τ)

    Batch axes *B broadcast; a transition shared by many rewards is never copied. What lies behind
    the mask, and every row of P at a terminal state, is replaced by zero and never read, NaN
    included. That replacement is part of the autograd graph: build the MDP (or `replace` the
    reward) inside the training step.

    Args:
        reward: r, (*B, S, A), reward per step. float32 or float64; half types become float32.
        transition: P, (*B, S, A, S), probabilities of the next state; rows sum to one.
        discount: γ in [0, 1), per step; a number or a tensor (*B).
        mask: (*B, S, A) bool, True where the action is available; None means everywhere.
        terminal: (*B, S) bool, True where the process ends after the reward is paid. A terminal
            state with no available action is worth zero; one with a choice keeps the entropy of
            it, τ log A where all actions pay the same. Its batch axes belong to P: a batch of
            terminals with a shared P makes a batch of P. A state that no action leaves keeps that
            entropy forever, τ log A/(1−γ). `birl_ext.convert.mask_ends` closes both.
        reference: μ, (*B, S, A), positive weights of the actions; need not be normalised; None
            means μ ≡ 1, plain entropy regularisation.
        initial_distribution: ρ, (*B, S), probabilities of the first state.
        validate: "full" reads every number once, "cheap" only shapes, dtypes, devices and the
            discount, "off" nothing.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit together.
        DiscountError: γ outside [0, 1).
        InvalidMDPError: its subclasses name the first bad number and its place.

    Gradients: reward, transition, discount, reference and initial_distribution stay attached.
    Source: (M1)-(M3).
    """

    _entries: ClassVar[str] = "transition"
    _event: ClassVar[int] = 3

    transition: Tensor
    discount: float | Tensor

    @checks.within_memory
    def __post_init__(self, validate: Level) -> None:
        self._begin(validate)
        self._mask_rewards()
        if (rows := self._continuing()) is not None:
            self._set(transition=torch.where(rows.unsqueeze(-1), self.transition, 0.0))
        if validate == "full":
            self._check_data(frozenset(f.name for f in dataclasses.fields(self)))

    def to_sparse(self) -> SparseMDP:
        """The same MDP in CSR form; the pattern is the union of the non-zeros over the batch."""
        batch = self.transition.shape[:-3]
        flat = self.transition.flatten(-3)
        present = (flat != 0).flatten(0, -2).any(0) if batch else flat != 0
        keep = present.nonzero().squeeze(-1)
        counts = present.reshape(-1, self.states).sum(-1)
        crow = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        sparse = SparseMDP(
            self.reward,
            flat[..., keep],
            crow,
            keep % self.states,
            self.discount,
            **{name: getattr(self, name) for name in _OPTIONAL},
            validate="cheap",
        )
        sparse._set(free_ends=self.free_ends, idle_ends=self.idle_ends, _standing=self._standing)
        return sparse

    def _check_rows(self) -> None:
        checks.check_rows(self.transition, self._continuing())

    def stands(self) -> Tensor:
        stays = self.transition.detach().diagonal(dim1=-3, dim2=-1).transpose(-2, -1) == 1
        return (stays if self.mask is None else stays | ~self.mask).all(-1)

    def _normalised(self) -> Tensor:
        total = self.transition.sum(-1, keepdim=True)
        return self.transition / torch.where(total == 0, 1.0, total)


@dataclass(frozen=True, eq=False, repr=False)
class SparseMDP(_MDP):
    """An MDP, or a batch of them, whose transition is a CSR matrix with rows s·A + a.

    One sparsity pattern serves the whole batch. Columns within a row may come in any order, and
    duplicate entries add up. Everything else is as in `DenseMDP`.

    Args:
        reward: r, (*B, S, A).
        values: (*B, nnz), probabilities.
        crow: (S·A + 1,) int64, row pointers: row s·A + a holds entries crow[row] to crow[row + 1].
        col: (nnz,) int64, next state of each entry.
        discount: γ in [0, 1), a number or (*B).
        mask: (*B, S, A) bool, True where the action is available.
        terminal: (*B, S) bool, True where the process ends; its rows may be empty or not.
        reference: μ, (*B, S, A), positive.
        initial_distribution: ρ, (*B, S).
        validate: "full", "cheap" or "off".

    Raises:
        SparseFormatError: the CSR arrays are malformed; and all that `DenseMDP` raises.

    Gradients: as in `DenseMDP`; those of the transition live on the pattern.
    Source: (M1)-(M3).
    """

    _entries: ClassVar[str] = "values"
    _event: ClassVar[int] = 1

    values: Tensor
    crow: Tensor
    col: Tensor
    discount: float | Tensor

    @checks.within_memory
    def __post_init__(self, validate: Level) -> None:
        self._begin(validate)
        self._set(crow=self.crow.to(torch.int64), col=self.col.to(torch.int64))
        if validate == "full" and is_concrete(self.crow, self.col):
            checks.check_crow_col(self.crow, self.col, self.states)
        self._mask_rewards()
        if (rows := self._continuing()) is not None:
            keep = rows.flatten(-2)[..., self.rows()]
            self._set(values=torch.where(keep, self.values, 0.0))
        if validate == "full":
            self._check_data(frozenset(f.name for f in dataclasses.fields(self)))

    def rows(self) -> Tensor:
        """(nnz,) int64, the row s·A + a of each entry."""
        index = torch.arange(self.states * self.actions, device=self.device)
        return index.repeat_interleave(self.crow.diff(), output_size=self.col.shape[0])

    @classmethod
    def from_torch(
        cls, transition: Tensor, reward: Tensor, discount: float | Tensor, **options: Any
    ) -> Self:
        """From a torch.sparse_csr tensor of shape (S·A, S); `options` as in the constructor."""
        if not isinstance(transition, Tensor) or transition.layout != torch.sparse_csr:
            got = getattr(transition, "layout", type(transition).__name__)
            raise SparseFormatError(
                f"transition is {got}", allowed="torch.sparse_csr", fix="call to_sparse_csr() on it"
            )
        reward = checks.as_floating("reward", reward)
        states, actions = checks.states_and_actions("reward", reward)
        if tuple(transition.shape) != (states * actions, states):
            raise ShapeError(
                f"transition has shape {tuple(transition.shape)}",
                allowed=f"(S·A, S) = ({states * actions}, {states})",
                fix="stack the rows so that row s·A + a belongs to state s and action a",
            )
        crow, col = transition.crow_indices(), transition.col_indices()
        return cls(reward, transition.values(), crow, col, discount, **options)

    @classmethod
    def from_scipy(
        cls, transition: Any, reward: Tensor, discount: float | Tensor, **options: Any
    ) -> Self:
        """From a SciPy sparse matrix (S·A, S), or a list of A matrices (S, S), one per action."""
        reward = checks.as_floating("reward", reward)
        states, actions = checks.states_and_actions("reward", reward)
        matrices = list(transition) if isinstance(transition, Sequence) else [transition]
        per_action = isinstance(transition, Sequence)
        want = (states, states) if per_action else (states * actions, states)
        if per_action and len(matrices) != actions:
            raise ShapeError(
                f"transition has {len(matrices)} matrices",
                allowed=f"one per action, {actions}",
                fix="give one (S, S) matrix per action",
            )
        for matrix in matrices:
            if not hasattr(matrix, "tocsr"):
                raise SparseFormatError(
                    f"transition holds a {type(matrix).__name__}",
                    allowed="SciPy sparse matrices",
                    fix="pass scipy.sparse.csr_array(matrix) for each dense matrix",
                )
            if tuple(matrix.shape) != want:
                raise ShapeError(
                    f"transition has shape {tuple(matrix.shape)}",
                    allowed=str(want),
                    fix="give (S·A, S) with row s·A + a, or a list of A matrices (S, S)",
                )
        values, crow, col = (
            torch.as_tensor(array, device=reward.device)
            for array in _interleave([matrix.tocsr() for matrix in matrices])
        )
        return cls(reward, values, crow, col, discount, **options)

    def to_dense(self) -> DenseMDP:
        """The same MDP with a dense transition; duplicate entries are added up."""
        batch = self.values.shape[:-1]
        checks.check_memory(
            f"to_dense() of {self.states} states and {self.actions} actions",
            math.prod(batch) * self.states * self.actions * self.states,
            fix="keep the SparseMDP: every function takes it",
        )
        flat = self.values.new_zeros((*batch, self.states * self.actions * self.states))
        flat = flat.index_add(-1, self.rows() * self.states + self.col, self.values)
        shape = (*batch, self.states, self.actions, self.states)
        dense = DenseMDP(
            self.reward,
            flat.reshape(shape),
            self.discount,
            **{name: getattr(self, name) for name in _OPTIONAL},
            validate="cheap",
        )
        dense._set(free_ends=self.free_ends, idle_ends=self.idle_ends, _standing=self._standing)
        return dense

    def _check_rows(self) -> None:
        checks.check_sparse_rows(
            self.values, self.crow, self.col, (self.states, self.actions), self._continuing()
        )

    def stands(self) -> Tensor:
        states = torch.arange(self.states, device=self.device)
        start, stop = self.crow[: -1 : self.actions], self.crow[self.actions :: self.actions]
        entries = self.values.detach()
        if not len(self.col):
            return states >= 0
        # most states are left by the first entry that they have
        first = start.clamp(max=len(self.col) - 1)
        left = (stop > start) & (self.col[first] != states)
        left = left & (entries[..., first] != 0).reshape(-1, self.states).all(0)
        rest = (~left).nonzero().squeeze(-1)
        counts = (stop - start)[rest]
        place = torch.arange(int(counts.sum()), device=self.device)
        shift = start[rest] - counts.cumsum(0) + counts
        place = place + shift.repeat_interleave(counts)
        own = rest.repeat_interleave(counts)
        leaves = (self.col[place] != own) & (entries[..., place] != 0)
        number = leaves.new_zeros((*leaves.shape[:-1], self.states), dtype=torch.int64)
        number = number.index_add(-1, own, leaves.long())
        return (number == 0) & ~left

    def _normalised(self) -> Tensor:
        rows = self.rows()
        total = self.values.new_zeros((*self.values.shape[:-1], self.states * self.actions))
        total = total.index_add(-1, rows, self.values)
        return self.values / torch.where(total == 0, 1.0, total)[..., rows]


def load(
    path: str | os.PathLike[str], *, validate: Level = "full", max_bytes: int = MAX_BYTES
) -> DenseMDP | SparseMDP:
    """Read an MDP from a .npz or .safetensors file; nothing in it is executed or unpickled.

    Args:
        path: the file; its extension decides the format.
        validate: as in `DenseMDP`.
        max_bytes: most bytes that the tensors may take together.

    Returns:
        A DenseMDP or a SparseMDP. A discount saved without batch axes comes back as a float.

    Raises:
        FileFormatError: missing, truncated, oversized, or not an MDP.
        MissingDependencyError: .safetensors without the package.
        InvalidMDPError: the file is well formed but its numbers are not an MDP.
    """
    required = {"reward", "discount"}
    kinds = {DenseMDP: {"transition"}, SparseMDP: {"values", "crow", "col"}}
    names = required.union(*kinds.values(), _OPTIONAL, ("format",))
    tensors = read_tensors(path, names, max_bytes=max_bytes)
    version = tensors.pop("format", None)
    if version is None or version.numel() != 1 or int(version) != _FORMAT:
        found = "none" if version is None else version.flatten()[:1].tolist()
        raise FileFormatError(
            f"{os.fspath(path)} has format {found}",
            allowed=str(_FORMAT),
            fix=FOREIGN,
        )
    for kind, own in kinds.items():
        if required | own <= tensors.keys() <= required | own | set(_OPTIONAL):
            discount = tensors.pop("discount")
            value = discount if discount.ndim else float(discount)
            mdp: DenseMDP | SparseMDP = kind(**tensors, discount=value, validate=validate)
            return mdp
    raise FileFormatError(
        f"{os.fspath(path)} has members {', '.join(sorted(tensors))}",
        allowed="reward, discount and either transition or values, crow, col",
        fix="write it again with save()",
    )


def _any_over_shared(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """`mask` (*B, S, A) reduced by any() along the axes of P's `batch` that are shared."""
    extra = mask.ndim - 2 - len(batch)
    if extra > 0:
        mask = mask.flatten(0, extra - 1).any(0)
    for axis in range(-1, 1 - mask.ndim, -1):  # batch axes, from the last
        if batch[axis] == 1:
            mask = mask.any(axis - 2, keepdim=True)
    return mask


def _interleave(matrices: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR arrays whose row s·A + a is row s of matrix a; one matrix passes through."""
    actions = len(matrices)
    counts = np.stack([np.diff(m.indptr.astype(np.int64)) for m in matrices], axis=1)
    crow = np.concatenate(([0], counts.ravel().cumsum()))
    data = np.empty(crow[-1], dtype=np.result_type(*(m.data for m in matrices)))
    col = np.empty(crow[-1], dtype=np.int64)
    for action, matrix in enumerate(matrices):
        shift = crow[action:-1:actions] - matrix.indptr[:-1]
        place = np.repeat(shift, counts[:, action]) + np.arange(matrix.indptr[-1])
        data[place] = matrix.data[: matrix.indptr[-1]]
        col[place] = matrix.indices[: matrix.indptr[-1]]
    return data, crow, col
