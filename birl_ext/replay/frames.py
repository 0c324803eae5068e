"""Experience replay for stacked frames that holds every frame once.

A transition shows C frames and the next C, and its neighbours show the same ones again: kept as
they come, each frame is stored 2C times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from birl_ext.environments.transitions import Transitions
from birl_ext.errors import DtypeError, OptionError, ShapeError
from birl_ext.replay.buffer import LOWER, ReplayBuffer
from birl_ext.replay.storage import reserve

if TYPE_CHECKING:
    from birl_ext.rollouts.collect import Collection

__all__ = ["FrameReplay"]

_PIECE = 1024  # rows written at once: bounds the working memory of a long collection


class FrameReplay:
    """The last `capacity` transitions of stacked frames, to the bit those of a `ReplayBuffer`.

    A frame is shared where it is certain to be the same: by an observation and the next one, and by
    successive transitions of an environment if the second starts from the very observation in which
    the first ended. So an episode of n steps takes n + 1 frames if its first observation is one
    frame repeated, and at most n + C. Memory is reserved for episodes of 32 steps; if they are
    shorter it grows, by copying.

    Args:
        capacity: most transitions held.
        device, linked: as for `ReplayBuffer`.
    """

    def __init__(
        self, capacity: int, *, device: torch.device | str = "cpu", linked: bool = False
    ) -> None:
        # Rows whose observations are places in `_frames`, (n, C) int64.
        self._rows = ReplayBuffer(capacity, device=device, linked=linked)
        self._frames: Tensor | None = None  # (places, *F)
        self._users = torch.zeros(0, dtype=torch.int64)  # of each place, rows and `_latest`
        self._free: list[int] = []  # places without users
        self._latest: dict[int, list[int]] = {}  # what each environment showed last

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def frames(self) -> int:
        """How many are held."""
        return len(self._users) - len(self._free)

    def record(self, found: Collection) -> None:
        """Write what was collected over the oldest transitions.

        Raises:
            ShapeError: observations are not (n, C, *F), or something differs from what is held.
            DtypeError: frames are not uint8, or another dtype differs from what is held.
            OptionError: an observation and the next one are not stacks of successive frames.
            SizeLimitError: the capacity does not fit into the memory.
        """
        batch = found.transitions
        self._check(batch, found.environment)
        step = min(_PIECE, self._rows.capacity)
        for start in range(0, batch.size, step):
            piece = slice(start, start + step)
            rows = Transitions(*(part[piece].to(self._rows.device) for part in batch))
            self._write(rows, found.environment[piece].tolist(), found.ended[piece].tolist())

    def sample(self, size: int, generator: torch.Generator) -> Transitions:
        """`size` transitions, uniform over those held, with replacement; see `ReplayBuffer.sample`.

        Raises:
            OptionError: nothing is held.
        """
        return self._shown(self._rows.sample(size, generator))

    def ahead(
        self, size: int, steps: int, generator: torch.Generator
    ) -> tuple[Transitions, Tensor]:
        """Paths of transitions, see `ReplayBuffer.ahead`."""
        rows, present = self._rows.ahead(size, steps, generator)
        return self._shown(rows), present

    def _shown(self, rows: Transitions) -> Transitions:
        """With frames in place of where they lie."""
        assert self._frames is not None
        return rows._replace(
            observation=self._frames[rows.observation],
            next_observation=self._frames[rows.next_observation],
        )

    def state_dict(self) -> dict[str, Any]:
        """What is held, as a snapshot, and where the next row goes."""
        places = self._users.nonzero().squeeze(-1)
        return {
            "rows": self._rows.state_dict(),
            "frames": None if self._frames is None else self._frames[places],
            "places": places,
            "environments": torch.tensor(list(self._latest), dtype=torch.int64),
            "latest": torch.tensor(list(self._latest.values()), dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            OptionError: the stored capacity differs.
        """
        self._rows.load_state_dict(state["rows"])
        if state["frames"] is None:
            self._frames, self._users, self._free, self._latest = None, self._users[:0], [], {}
            return
        places = state["places"]
        frames = self._reserve(state["frames"], least=int(places.max()) + 1)
        frames[places.to(frames.device)] = state["frames"].to(frames.device)
        self._latest = dict(
            zip(state["environments"].tolist(), state["latest"].tolist(), strict=True)
        )
        held = state["rows"]["held"]
        self._hold(held["observation"], held["next_observation"][:, -1:], state["latest"])
        self._free = (self._users == 0).nonzero().squeeze(-1).tolist()

    def _write(self, batch: Transitions, environment: Sequence[int], ended: Sequence[bool]) -> None:
        """Rows in the order of time, at most as many as the capacity."""
        if self._frames is None:
            self._reserve(batch.observation[:, 0])
        replaced = self._rows.replaced(batch.size)
        if replaced is not None:
            self._release(replaced.observation, replaced.next_observation[:, -1:])
        before = [self._latest[e] for e in set(environment) if e in self._latest]
        places = self._store(batch, environment)
        rows = batch._replace(observation=places[:, :-1], next_observation=places[:, 1:])
        self._rows.append(rows, environment, ended)
        self._hold(places, torch.tensor([self._latest[e] for e in set(environment)]))
        if before:
            self._release(torch.tensor(before))

    def _store(self, batch: Transitions, environment: Sequence[int]) -> Tensor:
        """Keep the frames that are new; the places of what each row shows, (n, C + 1)."""
        depth = batch.observation.shape[1]
        continues = self._continues(batch, environment)
        opening = [row for row, shared in enumerate(continues) if not shared]
        stacks = batch.observation[opening]
        alike = _same(stacks[:, 1:], stacks[:, :-1], 2).tolist()
        repeats = dict(zip(opening, alike, strict=True))
        table: list[list[int]] = []
        fresh: list[tuple[int, int, int]] = []  # place, row, position among the row's frames
        for row, e in enumerate(environment):
            shown = list(self._latest[e]) if continues[row] else []
            for position in range(len(shown), depth + 1):
                if 0 < position < depth and repeats[row][position - 1]:
                    shown.append(shown[-1])
                    continue
                shown.append(self._place())
                fresh.append((shown[-1], row, position))
            table.append(shown)
            self._latest[e] = shown[1:]
        assert self._frames is not None
        place, row_of, position_of = torch.tensor(fresh, device=self._rows.device).T
        first = position_of < depth
        self._frames[place[first]] = batch.observation[row_of[first], position_of[first]]
        self._frames[place[~first]] = batch.next_observation[row_of[~first], -1]
        return torch.tensor(table, device=self._rows.device)

    def _continues(self, batch: Transitions, environment: Sequence[int]) -> list[bool]:
        """Whether each row starts from what its environment showed last."""
        assert self._frames is not None
        earlier: dict[int, int] = {}
        within: list[tuple[int, int]] = []
        across: list[tuple[int, list[int]]] = []
        for row, e in enumerate(environment):
            if e in earlier:
                within.append((row, earlier[e]))
            elif e in self._latest:
                across.append((row, self._latest[e]))
            earlier[e] = row
        found = torch.zeros(batch.size, dtype=torch.bool, device=self._rows.device)
        if within:
            row, previous = torch.tensor(within, device=self._rows.device).T
            found[row] = _same(batch.observation[row], batch.next_observation[previous], 1)
        for row_, places in across:
            found[row_] = torch.equal(batch.observation[row_], self._frames[places])
        return found.tolist()

    def _check(self, batch: Transitions, environment: Tensor) -> None:
        """Raise before anything is written."""
        observation, following = batch.observation, batch.next_observation
        if observation.ndim < 3 or following.shape != observation.shape:
            raise ShapeError(
                f"observations have shapes {tuple(observation.shape)}, {tuple(following.shape)}",
                allowed="(n, frames, *frame), the same for both",
                fix="use ReplayBuffer for what is not stacked",
            )
        if observation.dtype is not torch.uint8 or following.dtype is not torch.uint8:
            raise DtypeError(
                f"frames are {observation.dtype}, {following.dtype}",
                allowed="torch.uint8",
                fix="use ReplayBuffer, or leave the scaling to the network",
            )
        if environment.shape != (batch.size,):
            raise ShapeError(
                f"environment has shape {tuple(environment.shape)}", allowed=f"({batch.size},)"
            )
        if self._frames is not None and observation.shape[2:] != self._frames.shape[1:]:
            raise ShapeError(
                f"frames have shape {tuple(observation.shape[2:])}",
                allowed=str(tuple(self._frames.shape[1:])),
            )
        places = torch.empty(observation.shape[:2], dtype=torch.int64)
        self._rows.check(batch._replace(observation=places, next_observation=places))
        for start in range(0, batch.size, _PIECE):
            piece = slice(start, start + _PIECE)
            moved = _same(following[piece, :-1], observation[piece, 1:], 1)
            if not bool(moved.all()):
                row = start + int((~moved).nonzero()[0])
                raise OptionError(
                    "the next observation is not the observation moved on by one frame",
                    where=f"row {row}, environment {int(environment[row])}",
                    allowed="stacks of successive frames, the latest last",
                    fix="stack with gymnasium.wrappers.FrameStackObservation, or use ReplayBuffer",
                )

    def _reserve(self, frames: Tensor, least: int = 0) -> Tensor:
        """Room for frames like those given, (n, *F), all of it free."""
        capacity = self._rows.capacity
        count = max(capacity + capacity // 32 + 64, least)
        what = f"a replay of {capacity} transitions"
        (self._frames,) = reserve(what, count, [frames], self._rows.device, fix=LOWER)
        self._users = torch.zeros(count, dtype=torch.int64, device=self._rows.device)
        self._free = list(range(count))
        return self._frames

    def _place(self) -> int:
        """One without users."""
        if not self._free:
            assert self._frames is not None
            count = len(self._users)
            more = max(count // 8, 64)
            self._frames = torch.cat(
                [self._frames, self._frames.new_empty(more, *self._frames.shape[1:])]
            )
            self._users = torch.cat([self._users, self._users.new_zeros(more)])
            self._free = list(range(count, count + more))
        return self._free.pop()

    def _hold(self, *places: Tensor) -> None:
        """One more user for each mention of a place."""
        for each in places:
            index = each.flatten().to(self._users.device)
            self._users.index_add_(0, index, torch.ones_like(index))

    def _release(self, *places: Tensor) -> None:
        """One user less for each mention of a place."""
        index = torch.cat([each.flatten() for each in places]).to(self._users.device)
        self._users.index_add_(0, index, -torch.ones_like(index))
        self._free += set(index[self._users[index] == 0].tolist())


def _same(a: Tensor, b: Tensor, axes: int) -> Tensor:
    """Whether two tensors agree in all that lies behind their first `axes` axes."""
    return (a == b).flatten(axes).all(-1)
