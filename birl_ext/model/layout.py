"""The normal form of a batch: N transition models, each shared by a group of G problems.

Batch axes broadcast at the surface; underneath there are exactly two, (N, G). A transition model
that serves many rewards is stored and read once, whatever the order of the axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.model import checks
from birl_ext.torch_internals import is_concrete

__all__ = ["Data", "Flat", "Layout", "absent", "flatten", "layout"]


class Layout(NamedTuple):
    """How the broadcast batch axes map onto (N, G).

    Attributes:
        batch_shape: the broadcast batch axes, *B.
        order: the batch axes with those of the transition first, or None if they are already.
        models: N, the number of distinct transition models.
        group: G, the number of problems that share each of them.
    """

    batch_shape: tuple[int, ...]
    order: tuple[int, ...] | None
    models: int
    group: int

    def shared(self, tensor: Tensor, event: int) -> Tensor:
        """(*B_transition, *event) to (N, *event), for the last `event` axes of a transition."""
        shape = (self.models, *tensor.shape[tensor.ndim - event :])
        return tensor.reshape(shape).contiguous()

    def grouped(self, tensor: Tensor, event: int) -> Tensor:
        """(*B, *event) to (N, G, *event); axes that broadcast stay views where strides allow it."""
        shape = tensor.shape[tensor.ndim - event :]
        if self.batch_shape:
            tensor = tensor.expand(*self.batch_shape, *shape)
            if self.order is not None:
                axes = len(self.batch_shape)
                tensor = tensor.permute(*self.order, *range(axes, axes + event))
        return tensor.reshape(self.models, self.group, *shape)

    def scalar(self, value: float | Tensor, device: torch.device) -> Tensor:
        """A number or a (*B) tensor as (N, G) float64."""
        if isinstance(value, Tensor):
            return self.grouped(value.to(torch.float64), 0)
        return torch.full((self.models, self.group), value, dtype=torch.float64, device=device)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Axes in which an op can write its outputs: the caller's, unless they are permuted."""
        return self.batch_shape if self.order is None else (self.models, self.group)

    def locate(self, flat: int) -> tuple[int, ...]:
        """Batch index, in the caller's axes, of the problem with flat index n·G + g."""
        order = self.order or range(len(self.batch_shape))
        place = {}
        for axis in reversed(order):
            flat, place[axis] = divmod(flat, self.batch_shape[axis])
        return tuple(place[axis] for axis in range(len(self.batch_shape)))

    def restore(self, tensor: Tensor) -> Tensor:
        """(N, G, *event) back to (*B, *event)."""
        event = tensor.shape[2:]
        if self.order is None:
            return tensor.reshape((*self.batch_shape, *event))
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        tensor = tensor.reshape((*(self.batch_shape[axis] for axis in self.order), *event))
        return tensor.permute(*inverse, *range(len(inverse), tensor.ndim))


_SINGLE = Layout((), None, 1, 1)


def layout(transition_batch: tuple[int, ...], *batches: tuple[int, ...]) -> Layout:
    """The layout of a transition's batch axes against everyone else's.

    Args:
        transition_batch: batch axes of the transition.
        batches: batch axes of the other tensors; all must broadcast.
    """
    if not transition_batch and not any(batches):
        return _SINGLE
    batch = checks.broadcast(transition_batch, *batches)
    own = (1,) * (len(batch) - len(transition_batch)) + tuple(transition_batch)
    # An axis along which the transition has size one belongs to the group; if such an axis comes
    # before one of the transition's, the small tensors are permuted instead of copying P.
    group_axes = [i for i, size in enumerate(batch) if own[i] == 1 and size != 1]
    model_axes = [i for i in range(len(batch)) if i not in group_axes]
    order = (*model_axes, *group_axes)
    return Layout(
        batch_shape=batch,
        order=None if order == tuple(range(len(batch))) else order,
        models=_product([batch[i] for i in model_axes]),
        group=_product([batch[i] for i in group_axes]),
    )


def _product(sizes: list[int]) -> int:
    """`math.prod`, which torch.compile cannot trace for symbolic sizes."""
    total = 1
    for size in sizes:
        total *= size
    return total


class Data(NamedTuple):
    """What every op is given first; an empty tensor stands for what is absent."""

    transition: Tensor  # (N, S, A, S), or the CSR values (N, nnz)
    crow: Tensor  # (S·A + 1,) int64; (0,) for a dense transition
    col: Tensor  # (nnz,) int64; (0,) for a dense transition
    reward: Tensor  # (N, G, S, A)
    log_reference: Tensor  # log μ, (N, G, S, A) float64, −inf where masked; (0,) when μ ≡ 1
    discount: Tensor  # (N, G) float64
    temperature: Tensor  # (N, G) float64

    @property
    def pattern(self) -> tuple[Tensor, Tensor]:
        """crow and col."""
        return self.crow, self.col

    @property
    def available(self) -> Tensor | None:
        """(N, G, S, A) bool, False where an action is masked; None without mask or reference."""
        return self.log_reference != -torch.inf if self.log_reference.ndim > 1 else None


class Flat(NamedTuple):
    """An MDP in normal form, and how to get back to the caller's axes."""

    data: Data
    layout: Layout


_ABSENT: dict[torch.dtype, Tensor] = {}


def absent(dtype: torch.dtype, like: Tensor) -> Tensor:
    """An empty tensor, which stands for an argument that was not given.

    Not `new_empty`, which under vmap is batched. Kept where that is safe: it is asked for often.
    """
    if not like.is_cpu or not is_concrete(like):
        return torch.empty(0, dtype=dtype, device=like.device)
    if dtype not in _ABSENT:
        with torch.inference_mode(False):  # one made in that mode could never be saved for backward
            _ABSENT[dtype] = torch.empty(0, dtype=dtype, device="cpu")
    return _ABSENT[dtype]


def flatten(
    reward: Tensor,
    transition: Tensor,
    log_reference: Tensor,
    discount: float | Tensor,
    temperature: float | Tensor,
    *,
    crow: Tensor | None = None,
    col: Tensor | None = None,
    batch: tuple[int, ...] = (),
) -> Flat:
    """Bring raw tensors into normal form, by differentiable views only.

    Args:
        reward: r, (*B, S, A).
        transition: P, (*B, S, A, S), or with `crow` and `col` the CSR values, (*B, nnz).
        log_reference: log μ, (*B, S, A) float64 with −inf behind the mask, or (0,) when absent.
        discount: γ, a number or (*B).
        temperature: τ, a number or (*B).
        crow: (S·A + 1,) int64 row pointers of a sparse transition.
        col: (nnz,) int64 next states of a sparse transition.
        batch: further batch axes to broadcast with, those of a policy or a value, say.

    Raises:
        ShapeError: batch axes that do not broadcast; names the tensor.

    Gradients: reward, transition, log_reference, discount, temperature.
    """
    event = 3 if crow is None else 1
    has_reference = log_reference.ndim > 1
    scalars = [x for x in (discount, temperature) if isinstance(x, Tensor) and x.ndim]
    batched = transition.ndim > event or reward.ndim > 2 or log_reference.ndim > 2
    if batched or batch or scalars:
        batches = {
            "transition": tuple(transition.shape[:-event]),
            "reward": tuple(reward.shape[:-2]),
            "mask or reference": tuple(log_reference.shape[:-2]) if has_reference else (),
            "discount": tuple(discount.shape) if isinstance(discount, Tensor) else (),
            "temperature": tuple(temperature.shape) if isinstance(temperature, Tensor) else (),
            "policy, value or initial distribution": batch,
        }
        checks.broadcast_batches(batches)  # names the one that does not fit
        axes = layout(*batches.values())
    else:
        axes = _SINGLE
    nothing = absent(torch.int64, reward)
    data = Data(
        transition=axes.shared(transition, event),
        crow=nothing if crow is None else crow,
        col=nothing if col is None else col,
        reward=axes.grouped(reward, 2),
        log_reference=axes.grouped(log_reference, 2) if has_reference else log_reference,
        discount=axes.scalar(discount, reward.device),
        temperature=axes.scalar(temperature, reward.device),
    )
    return Flat(data, axes)
