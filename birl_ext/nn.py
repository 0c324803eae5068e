"""Modules: thin, holding settings and parameters only; the mathematics is in `functional`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from birl_ext.errors import OptionError, ShapeError
from birl_ext.functional import solve
from birl_ext.model import checks
from birl_ext.model.mdp import SparseMDP
from birl_ext.options import Options, SolveOptions, check_names
from birl_ext.solution import Solution

__all__ = ["SoftPlanner", "SolveOptions"]

_SPARSE = (torch.sparse_csr, torch.sparse_csc, torch.sparse_coo)


class SoftPlanner(nn.Module):
    """A planner as a layer: rewards (and dynamics) in, the soft-optimal policy out, gradients back.

        π(a|s) ∝ μ(a|s) exp(Q*(s,a)/τ)

    Args:
        discount: γ in [0, 1), per step; may be set between calls.
        temperature: τ > 0, units of reward: its value, or its start if it is learned; may be set
            between calls.
        transition: P, (*B, S, A, S), or a sparse tensor (S·A, S), kept as buffers; None: given at
            each call, where torch.compile takes no sparse ones.
        learn_temperature: make log τ a parameter, (1,), in the dtype of the transition, by default
            that of new modules.
        mask, terminal, reference, initial: as in `birl_ext.solve`, kept as buffers. Those given at
            a call take their place.
        options: further keyword arguments of `birl_ext.solve`, such as method and tol.

    Raises:
        OptionError: an option that `birl_ext.solve` does not have, or a value it does not take.

    Shapes: reward (*B, S, A) → Solution with value (*B, S) and policy (*B, S, A).

    Converted to another dtype, a learned log τ follows, as every parameter does. One that is not
    learned stays float64, and P is never narrower than float32; a widened P is divided by its row
    sums, as by `DenseMDP.to`.

    Gradients: reward, transition, temperature; see `birl_ext.solve`.
    """

    log_temperature: Tensor
    transition: Tensor | None
    mask: Tensor | None
    terminal: Tensor | None
    reference: Tensor | None
    initial: Tensor | None
    crow: Tensor | None
    col: Tensor | None

    def __init__(
        self,
        *,
        discount: float,
        temperature: float,
        transition: Tensor | None = None,
        learn_temperature: bool = False,
        mask: Tensor | None = None,
        terminal: Tensor | None = None,
        reference: Tensor | None = None,
        initial: Tensor | None = None,
        **options: Unpack[SolveOptions],
    ) -> None:
        super().__init__()
        check_names("SoftPlanner", options)
        Options.of(**options)
        start = torch.tensor([_log(temperature)], dtype=torch.float64)
        crow = col = None
        if (rows := _as_csr(transition)) is not None:
            # torch.compile takes no buffers that are views of a sparse tensor
            crow, col = rows.crow_indices().clone(), rows.col_indices().clone()
            transition = rows.values().clone()
        if transition is not None:
            transition = checks.as_floating("transition", transition)
        self.discount = discount
        self.options = options
        buffers = {
            "transition": transition,
            "crow": crow,
            "col": col,
            "mask": mask,
            "terminal": terminal,
            "reference": reference,
            "initial": initial,
        }
        checks.check_flags("mask", mask)
        checks.check_flags("terminal", terminal)
        for name, buffer in buffers.items():
            self.register_buffer(name, checks.as_tensor(name, buffer))
        if learn_temperature:
            dtype = torch.get_default_dtype() if transition is None else transition.dtype
            self.log_temperature = nn.Parameter(start.to(dtype))
        else:
            self.register_buffer("log_temperature", start)

    @property
    def discount(self) -> float:
        """γ."""
        return self._discount

    @discount.setter
    def discount(self, discount: float) -> None:
        checks.check_discount(discount)
        self._discount = discount

    @property
    def temperature(self) -> float:
        """τ, as it is now."""
        return float(self.log_temperature.detach().exp())

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        with torch.no_grad():
            self.log_temperature.fill_(_log(temperature))

    def forward(
        self,
        reward: Tensor,
        transition: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        terminal: Tensor | None = None,
        reference: Tensor | None = None,
        initial: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Solution:
        """Solve for rewards (*B, S, A); what is given here takes the place of what is kept."""
        extras: dict[str, Any] = {
            "mask": self.mask if mask is None else mask,
            "terminal": self.terminal if terminal is None else terminal,
            "reference": self.reference if reference is None else reference,
        }
        if temperature is None:
            temperature = self.log_temperature.double().exp().squeeze(0)
        initial = self.initial if initial is None else initial
        given = self.transition if transition is None else transition
        if given is None:
            raise OptionError(
                "SoftPlanner has no transition",
                allowed="a tensor (*B, S, A, S), or a sparse one (S·A, S)",
                fix="pass transition to the module or to the call",
            )
        rows = _as_csr(transition)
        if rows is not None or (transition is None and self.crow is not None):
            options: dict[str, Any] = dict(self.options)
            extras["validate"] = options.pop("validate", "full")
            if rows is not None:
                mdp = SparseMDP.from_torch(rows, reward, self.discount, **extras)
            else:
                assert self.crow is not None
                assert self.col is not None
                mdp = SparseMDP(reward, given, self.crow, self.col, self.discount, **extras)
            return solve(mdp, temperature=temperature, initial=initial, **options)
        return solve(
            reward,
            given,
            discount=self.discount,
            temperature=temperature,
            initial=initial,
            **extras,
            **self.options,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftPlanner:
        rows = self.transition
        exact = None if isinstance(self.log_temperature, nn.Parameter) else self.log_temperature

        def convert(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor is exact:
                return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved
            if tensor is not rows or moved.dtype == tensor.dtype:
                return moved
            if moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device, torch.float32)
            if moved.dtype.itemsize > tensor.dtype.itemsize:
                total = self._row_sums(moved)
                return moved / torch.where(total == 0, 1.0, total)
            return moved

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        return self

    def _row_sums(self, values: Tensor) -> Tensor:
        """Of P, for each of its entries."""
        if self.crow is None:
            return values.sum(-1, keepdim=True)
        counts = self.crow.diff().to(values.device)
        rows = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
        return values.new_zeros(len(counts)).index_add(0, rows, values)[rows]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """State dicts of the time when log τ was 0-d hold no mask and the like."""
        key = f"{prefix}log_temperature"
        former = state_dict.get(key)
        if isinstance(former, Tensor) and former.dim() == 0:
            state_dict[key] = former.reshape(1).to(self.log_temperature.dtype)
            for name, buffer in self.named_buffers(prefix.removesuffix("."), recurse=False):
                state_dict.setdefault(name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        learned = ", learned" if isinstance(self.log_temperature, nn.Parameter) else ""
        return f"discount={self.discount}, temperature={self.temperature:.4g}{learned}"


def _log(temperature: float | Tensor) -> float:
    """log τ of one number."""
    checks.check_temperature(temperature)
    shape = torch.as_tensor(temperature).shape
    if shape.numel() != 1:
        raise ShapeError(
            f"temperature has shape {tuple(shape)}", allowed="one number for all problems"
        )
    return math.log(temperature)


def _as_csr(transition: Tensor | None) -> Tensor | None:
    """A sparse matrix in CSR form; None for all else."""
    if isinstance(transition, Tensor) and transition.layout in _SPARSE:
        if transition.dim() != 2 or transition.dense_dim():
            raise ShapeError(
                f"the sparse transition has shape {tuple(transition.shape)}",
                allowed="(S·A, S), shared by the batch",
            )
        return transition.to_sparse_csr()
    return None
