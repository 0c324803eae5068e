"""MDPs of different sizes as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from birl_ext.errors import OptionError, ShapeError
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP, SparseMDP

__all__ = ["StackedMDP", "stack"]


class StackedMDP(NamedTuple):
    """A batch of N MDPs, padded to the largest S and A.

    Args:
        mdp: batch axis (N,).
        states: (N, S) bool, True for states that are an MDP's own.
        actions: (N, S, A) bool, True for actions that are its own and available.
        sizes: S_i and A_i of each.
    """

    mdp: DenseMDP | SparseMDP
    states: Tensor
    actions: Tensor
    sizes: list[tuple[int, int]]

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """A result without its padding: (N, S) as N tensors (S_i,), (N, S, A) as (S_i, A_i).

        Args:
            tensor: (N, S) or (N, S, A).

        Raises:
            ShapeError: it has another shape.
        """
        shape = self.actions.shape
        if tuple(tensor.shape) not in (tuple(shape[:2]), tuple(shape)):
            raise ShapeError(
                f"the tensor has shape {tuple(tensor.shape)}",
                allowed=f"(N, S) = {tuple(shape[:2])} or (N, S, A) = {tuple(shape)}",
            )
        return [
            part[:states] if part.ndim == 1 else part[:states, :actions]
            for part, (states, actions) in zip(tensor, self.sizes, strict=True)
        ]


def stack(mdps: Sequence[DenseMDP | SparseMDP]) -> StackedMDP:
    """One batch of MDPs of different sizes, to be solved by one call.

    Ends: what is added to an MDP is an end: its states are terminal without an action, worth 0, and
    no row leads there; its actions are masked. The ends of each MDP stay what they were.

    Args:
        mdps: N of one kind, dtype and device, without batch axes. If one has an initial
            distribution, all have; where some have no reference, it is 1.

    Returns:
        A batch of the same kind; of SparseMDPs, the pattern is the union of theirs.

    Raises:
        OptionError: there are none, of two kinds, or only some have an initial distribution.
        ShapeError: one has batch axes.
        DtypeError, DeviceError: they differ.

    Gradients: as of each MDP.
    """
    mdps = list(mdps)
    if not mdps:
        raise OptionError("there are no MDPs", allowed="one at least")
    kind = type(mdps[0])
    for i, mdp in enumerate(mdps):
        if not isinstance(mdp, DenseMDP | SparseMDP) or type(mdp) is not kind:
            raise OptionError(
                f"mdps[{i}] is {checks.kind_of(mdp)}, mdps[0] {checks.kind_of(mdps[0])}",
                allowed="DenseMDPs or SparseMDPs, of one kind",
                fix="call to_dense() or to_sparse() on those that differ",
            )
        if mdp.batch_shape:
            raise ShapeError(
                f"mdps[{i}] has batch axes {tuple(mdp.batch_shape)}", allowed="single MDPs"
            )
        if (mdp.initial_distribution is None) != (mdps[0].initial_distribution is None):
            raise OptionError(
                f"only one of mdps[0] and mdps[{i}] has an initial distribution",
                allowed="all, or none",
            )
    checks.check_same_dtype({f"mdps[{i}]": mdp.reward for i, mdp in enumerate(mdps)})
    checks.check_devices({f"mdps[{i}]": mdp.reward for i, mdp in enumerate(mdps)})
    sizes = [(mdp.states, mdp.actions) for mdp in mdps]
    most = max(states for states, _ in sizes), max(actions for _, actions in sizes)

    def padded(tensor: Tensor, axes: str, fill: Any) -> Tensor:
        """To the largest S and A, along the axes that are named."""
        room: list[int] = []
        for size, axis in zip(reversed(tensor.shape), reversed(axes), strict=True):
            room += [0, most[axis == "A"] - size]
        if tensor.dtype == torch.bool:  # of which not every device has a padding
            return pad(tensor.to(torch.uint8), room, value=int(fill)).bool()
        return pad(tensor, room, value=fill)

    def gathered(name: str, axes: str, missing: Any, fill: Any) -> Tensor:
        found = []
        for mdp, size in zip(mdps, sizes, strict=True):
            tensor = getattr(mdp, name)
            if tensor is None:
                shape = [size[axis == "A"] for axis in axes]
                dtype = torch.bool if isinstance(missing, bool) else mdp.dtype
                tensor = torch.full(shape, missing, dtype=dtype, device=mdp.device)
            found.append(padded(tensor, axes, fill))
        return torch.stack(found)

    states = torch.stack(
        [torch.arange(most[0], device=mdps[0].device) < mdp.states for mdp in mdps]
    )
    mask = gathered("mask", "SA", True, False)
    fields: dict[str, Any] = {}
    if not bool(mask.all()):
        fields["mask"] = mask
    terminal = gathered("terminal", "S", False, True)
    if bool(terminal.any()):
        fields["terminal"] = terminal
    if any(mdp.reference is not None for mdp in mdps):
        fields["reference"] = gathered("reference", "SA", 1.0, 1.0)
    if mdps[0].initial_distribution is not None:
        fields["initial_distribution"] = gathered("initial_distribution", "S", 0.0, 0.0)
    reward = gathered("reward", "SA", 0.0, 0.0)
    discount = torch.stack(
        [torch.as_tensor(m.discount, dtype=torch.float64, device=m.device) for m in mdps]
    )
    if bool((discount == discount[0]).all()) and not isinstance(mdps[0].discount, Tensor):
        fields["discount"] = mdps[0].discount
    else:
        fields["discount"] = discount
    if kind is DenseMDP:
        stacked: DenseMDP | SparseMDP = DenseMDP(
            reward, gathered("transition", "SAS", 0.0, 0.0), **fields
        )
    else:
        stacked = SparseMDP(reward, *_joined(mdps, sizes, most), **fields)
    return StackedMDP(stacked, states, mask, sizes)


def _joined(
    mdps: Sequence[Any], sizes: list[tuple[int, int]], most: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """values, (N, nnz), crow and col of the union of all patterns, padded."""
    places = []
    for mdp, (_, actions) in zip(mdps, sizes, strict=True):
        row = mdp.rows()
        row = row // actions * most[1] + row % actions
        places.append(row * most[0] + mdp.col)
    union, which = torch.unique(torch.cat(places), return_inverse=True)
    values = [
        mdp.values.new_zeros(len(union)).index_add(0, index, mdp.values)
        for mdp, index in zip(mdps, which.split([len(p) for p in places]), strict=True)
    ]
    counts = torch.bincount(union // most[0], minlength=most[0] * most[1])
    crow = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return torch.stack(values), crow, union % most[0]
