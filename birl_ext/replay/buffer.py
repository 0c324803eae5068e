"""Experience replay: a ring of tensors that holds no learned reward.

Learned rewards change with the upper level, so they are computed where a batch is sampled, with the
reward of that moment; stored ones would be stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        linked: remember which transition follows which, for `ahead`; they come by `record` then.
    """

    def __init__(
        self, capacity: int, *, device: torch.device | str = "cpu", linked: bool = False
    ) -> None:
        if capacity < 1:
            raise OptionError(f"capacity is {capacity!r}", allowed="1 or more")
        self.capacity = capacity
        self.device = torch.device(device)
        self._ring: Transitions | None = None
        self._next = 0
        self._size = 0
        self._links = _Links(capacity, self.device) if linked else None

    def __len__(self) -> int:
        return self._size

    def record(self, found: Collection) -> None:
        """Write what was collected over the oldest transitions; see `append`."""
        self.append(found.transitions, found.environment.tolist(), found.ended.tolist())

    def append(
        self,
        batch: Transitions,
        environment: Sequence[int] | None = None,
        ended: Sequence[bool] | None = None,
    ) -> None:
        """Write n transitions over the oldest ones.

        Args:
            environment, ended: where each happened and whether its episode ended with it, as in
                `Collection`; needed by `linked` alone.

        Raises:
            OptionError: a linked replay is not told where they happened.
            ShapeError: they are shaped unlike those before, or not one row each.
            DtypeError: a dtype differs; nothing is converted silently.
            SizeLimitError: the capacity does not fit into the memory.
        """
        self.check(batch)
        if self._links is not None and (environment is None or ended is None):
            raise OptionError(
                "a linked replay is not told where transitions happened",
                fix="write by `record`, or give environment and ended",
            )
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
        if self._links is not None and environment is not None and ended is not None:
            self._links.add(ring, environment, ended)

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
        ring, index = self._drawn(size, generator)
        return ring.select(index)

    def ahead(
        self, size: int, steps: int, generator: torch.Generator
    ) -> tuple[Transitions, Tensor]:
        """`size` paths of up to `steps` transitions of one episode, whose first ones are those of
        `sample`. One is shorter where its episode ends, or goes on in steps not seen yet.

        Returns:
            steps · size rows, all first steps, then all second ones, and so on, a path's last step
            again after its end; and whether a row is there, (steps, size) bool.

        Raises:
            OptionError: the buffer is empty, or not linked.
        """
        if self._links is None:
            raise OptionError("the replay does not know what follows", fix="make it with linked")
        ring, index = self._drawn(size, generator)
        rows, present = [index], [torch.ones_like(index, dtype=torch.bool)]
        for _ in range(steps - 1):
            following = self._links.following[rows[-1]]
            present.append(present[-1] & (following >= 0))
            rows.append(torch.where(present[-1], following, rows[-1]))
        return ring.select(torch.cat(rows)), torch.stack(present)

    def _drawn(self, size: int, generator: torch.Generator) -> tuple[Transitions, Tensor]:
        if self._ring is None or not self._size:
            raise OptionError("the buffer is empty", fix="append transitions first")
        index = torch.randint(self._size, (size,), generator=generator, device=generator.device)
        return self._ring, index.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """What is held, as a snapshot, and where the next row goes."""
        held = None
        if self._ring is not None:
            held = {
                name: column[: self._size].clone()
                for name, column in zip(Transitions._fields, self._ring, strict=True)
            }
        links = {} if self._links is None else {"links": self._links.state_dict()}
        return {"capacity": self.capacity, "next": self._next, "held": held, **links}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if int(state["capacity"]) != self.capacity:
            raise OptionError(
                f"the stored capacity is {state['capacity']}", allowed=str(self.capacity)
            )
        if (self._links is None) != ("links" not in state):
            raise OptionError(
                "the stored replay is linked and this one is not, or the reverse",
                fix="load it into one that was made with the same arguments",
            )
        if self._links is not None:
            self._links.load_state_dict(state["links"])
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


class _Links:
    """Which row of a ring follows which, in the same episode.

    Args:
        capacity, device: of the ring.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.following = torch.full((capacity,), -1, device=device)
        """(capacity,) int64, −1 where none does, or none yet."""
        self._open: dict[int, int] = {}
        """Environment → number of its newest row, if its episode goes on."""
        self._written = 0

    def add(self, ring: Transitions, environment: Sequence[int], ended: Sequence[bool]) -> None:
        """The newest rows of the ring, those of one environment in the order of time."""
        capacity = len(self.following)
        for e, over in zip(environment, ended, strict=True):
            row, before = self._written % capacity, self._open.pop(e, None)
            self.following[row] = -1
            if before is not None and self._written - before < capacity:
                before %= capacity
                # not so where an environment was taken up again in a new episode
                if torch.equal(ring.next_observation[before], ring.observation[row]):
                    self.following[before] = row
            if not over:
                self._open[e] = self._written
            self._written += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "following": self.following.clone(),
            "environments": list(self._open),
            "newest": list(self._open.values()),
            "written": self._written,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.following = state["following"].clone().to(self.following.device)
        self._open = dict(zip(state["environments"], state["newest"], strict=True))
        self._written = int(state["written"])
