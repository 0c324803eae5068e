"""Experience replay: a ring of tensors that holds no learned reward.

Learned rewards change with the upper level, so they are computed where a batch is sampled, with the
reward of that moment; stored ones would be stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from birl_ext.environments.transitions import Transitions
from birl_ext.errors import DtypeError, OptionError, ShapeError
from birl_ext.replay.storage import reserve

if TYPE_CHECKING:  # replay works without gymnasium, collecting does not
    from birl_ext.rollouts.collect import Collection

__all__ = ["LOWER", "ReplayBuffer"]

LOWER = "lower the capacity, which a run calls `replay`"


class ReplayBuffer:
    """The last `capacity` transitions; shapes and dtypes are those of the first ones appended.

    On the CPU the memory is reserved at once and taken up as rows are written.

    Args:
        capacity: most transitions held.
        device: where they are held and sampled.
    """

    def __init__(self, capacity: int, *, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise OptionError(f"capacity is {capacity!r}", allowed="1 or more")
        self.capacity = capacity
        self.device = torch.device(device)
        self._ring: Transitions | None = None
        self._next = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def record(self, found: Collection) -> None:
        """Write what was collected over the oldest transitions; see `append`."""
        self.append(found.transitions)

    def append(self, batch: Transitions) -> None:
        """Write n transitions over the oldest ones.

        Raises:
            ShapeError: they are shaped unlike those before, or not one row each.
            DtypeError: a dtype differs; nothing is converted silently.
            SizeLimitError: the capacity does not fit into the memory.
        """
        self.check(batch)
        ring = self._ring = self._ring if self._ring is not None else self._reserve(batch)
        count = batch.size
        kept = min(count, self.capacity)
        if batch.reward.device != self.device:
            batch = batch.to(self.device)
        # Where the first of the rows kept goes, had all of them been written.
        first = (self._next + count - kept) % self.capacity
        before = min(kept, self.capacity - first)  # rows up to the end of the ring
        for column, rows in zip(ring, batch, strict=True):
            if before == count:  # the usual case, in as few calls as possible
                column[first : first + before] = rows
                continue
            rows = rows[count - kept :]
            column[first : first + before] = rows[:before]
            column[: kept - before] = rows[before:]
        self._next = (self._next + count) % self.capacity
        self._size = min(self._size + count, self.capacity)

    def check(self, batch: Transitions) -> None:
        """Raise what `append` would, and write nothing."""
        like = self._ring if self._ring is not None else batch
        for name, column, rows in zip(Transitions._fields, like, batch, strict=True):
            allowed: tuple[int, ...] = (batch.size, *column.shape[1:])
            if rows.shape != allowed:
                raise ShapeError(f"{name} has shape {tuple(rows.shape)}", allowed=str(allowed))
            if rows.dtype != column.dtype:
                raise DtypeError(f"{name} is {rows.dtype}", allowed=str(column.dtype))

    def replaced(self, count: int) -> Transitions | None:
        """Those that the next `count` transitions are written over, None if there are none.

        Args:
            count: at most the capacity.
        """
        index = self._places(self._next, count)
        return self._ring.select(index[index < self._size]) if self._ring is not None else None

    def sample(self, size: int, generator: torch.Generator) -> Transitions:
        """`size` transitions, uniform over those held, with replacement.

        Args:
            generator: on any device.

        Raises:
            OptionError: the buffer is empty.
        """
        if self._ring is None or not self._size:
            raise OptionError("the buffer is empty", fix="append transitions first")
        index = torch.randint(self._size, (size,), generator=generator, device=generator.device)
        return self._ring.select(index.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        """What is held, as a snapshot, and where the next row goes."""
        held = None
        if self._ring is not None:
            held = {
                name: column[: self._size].clone()
                for name, column in zip(Transitions._fields, self._ring, strict=True)
            }
        return {"capacity": self.capacity, "next": self._next, "held": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if int(state["capacity"]) != self.capacity:
            raise OptionError(
                f"the stored capacity is {state['capacity']}", allowed=str(self.capacity)
            )
        self._ring, self._size = None, 0
        held = state["held"]
        if held is not None:
            batch = Transitions(**held).to(self.device)
            ring = self._reserve(batch)
            for column, rows in zip(ring, batch, strict=True):
                column[: batch.size] = rows
            self._ring, self._size = ring, batch.size
        self._next = int(state["next"])

    def _places(self, first: int, count: int) -> Tensor:
        return (first + torch.arange(count, device=self.device)) % self.capacity

    def _reserve(self, batch: Transitions) -> Transitions:
        what = f"a replay of {self.capacity} transitions"
        return Transitions(*reserve(what, self.capacity, batch, self.device, fix=LOWER))
