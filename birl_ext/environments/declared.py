"""Whether what an environment returns is what it has declared: the one place that looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from birl_ext.errors import shown

__all__ = ["Declared", "Misfit"]

_LARGEST = float(np.finfo(np.float32).max)
_EXACT = [np.dtype(kind) for kind in "?bBhHef"]  # in float32
_SLACK = 4 * float(np.finfo(np.float32).eps)  # by how much rounding may carry a number over an edge


class Misfit(Exception):
    """An environment returned what it has not declared.

    Args:
        what, allowed, fix: of the error that names the environment.
        row: which one of several.
    """

    def __init__(self, what: str, allowed: str, fix: str = "", row: int | None = None) -> None:
        super().__init__(what, allowed, fix)
        self.row = row


class Declared:
    """What an environment has declared.

    An observation has the shape of its space, numbers of its kind, and lies between its edges, up
    to the rounding of float32. Integers stand for floats, and floats never for integers: what is
    1.0 now may be 1.5 in the next step. A reward is one number, ends are booleans, and every number
    is finite in float32.

    Args:
        space: of observations, one that `read_spaces` takes.
        count: of environments that answer together; None for one, which has no axis for it.

    Attributes:
        rounded: names the first number that float32, in which everything here is computed, moves by
            half a unit or takes to zero, such as a whole number above 2²⁴. Empty if none.
    """

    def __init__(self, space: Any, count: int | None = None) -> None:
        self.rounded = ""
        self._space = space
        self._lead = () if count is None else (count,)
        self._shape = (*self._lead, *space.shape)
        self._dtype = np.dtype(space.dtype)
        self._low: Any
        self._high: Any
        if not space.shape:  # Discrete
            self._low, self._high = 0, int(space.n) - 1
        elif self._dtype.kind == "f":
            self._low, self._high = _edges(space, self._dtype)
        else:
            self._low, self._high = space.low, space.high
        whole = np.iinfo(self._dtype) if self._dtype.kind in "iu" else None
        self._holds_all = whole is not None and bool(
            np.all(self._low == whole.min) and np.all(self._high == whole.max)
        )

    def reset(self, answer: Any) -> NDArray[Any]:
        """The observation that `reset` returned, in the dtype of its space, a copy.

        Raises:
            Misfit: it is not what was declared.
        """
        return self.observation(_parts("reset", answer, ("observation", "info"))[0])

    def step(self, answer: Any) -> tuple[NDArray[Any], Any, Any, Any]:
        """What `step` returned: observation, as of `reset`; reward; terminated; truncated.

        Raises:
            Misfit: it is not what was declared.
        """
        parts = _parts("step", answer, ("observation", "reward", "terminated", "truncated", "info"))
        return (
            self.observation(parts[0]),
            self._reward(parts[1]),
            self._flag("terminated", parts[2]),
            self._flag("truncated", parts[3]),
        )

    def observation(self, given: Any) -> NDArray[Any]:
        """An observation, or one of each environment, in the dtype of its space, a copy.

        Raises:
            Misfit: it is not what was declared.
        """
        found = _numbers("observation", given, self._shape, self._space)
        if self._holds_all and found.dtype == self._dtype and found.dtype in _EXACT:  # frames
            return found.copy()
        held = found
        if self._dtype.kind == "f":
            held = _rounded(found, self._dtype)
        elif found.dtype.kind == "f":
            raise Misfit(
                f"its observation is {_odd(found)}, {found.dtype}",
                f"{self._dtype}, of {self._space}",
                "return what the space declares, or declare floats; for a Box "
                "gymnasium.wrappers.DtypeObservation(env, np.float32) does",
            )
        inside = (held >= self._low) & (held <= self._high)  # NaN is not
        if not inside.all():
            at = _first(~inside)
            entry = at[len(self._lead) :]
            what = f"its observation is {found[at]}" + (f" in entry {entry}" if entry else "")
            row = at[0] if self._lead else None
            if not abs(float(found[at])) <= _LARGEST:
                raise Misfit(what, "finite in float32", row=row)
            space = self._space
            edges = (space.low, space.high) if space.shape else (self._low, self._high)
            low, high = (np.broadcast_to(edge, self._shape)[at] for edge in edges)
            fix = "mend the environment, or declare an observation_space with room for it"
            raise Misfit(what, f"[{low:g}, {high:g}], of {self._space}", fix, row)
        if self._dtype.kind == "f" or self._space.shape:  # an index stays one
            self._note_rounding("observation", found)
        return held.astype(self._dtype)

    def _reward(self, given: Any) -> Any:
        if isinstance(given, float) and (not given or 1e-30 < abs(given) < 1e6) and not self._lead:
            return given  # the usual one, soon
        exact = given
        if isinstance(given, int):  # NumPy has no dtype for a large one
            try:
                given = float(given)
            except OverflowError:
                what = f"its reward is an integer of {given.bit_length()} bits"
                raise Misfit(what, "finite in float32") from None
        found = _numbers("reward", given, self._lead, "one number")
        wrong = ~np.isfinite(_rounded(found, np.dtype(np.float32)))
        if wrong.any():
            at = _first(wrong)
            what = f"its reward is {found[at]}"
            raise Misfit(what, "finite in float32", row=at[0] if at else None)
        self._note_rounding("reward", np.asarray(exact))
        return found if self._lead else float(found)

    def _flag(self, name: str, given: Any) -> Any:
        if not self._lead and isinstance(given, (bool, np.bool_)):
            return bool(given)
        found = np.asarray(given)
        if found.dtype != np.bool_ or found.shape != self._lead:
            raise Misfit(
                f"its {name} is {shown(given)}, a {type(given).__name__}",
                f"booleans, shape {self._lead}",
                f"return bool({name})",
            )
        return found if self._lead else bool(found)

    def _note_rounding(self, name: str, found: NDArray[Any]) -> None:
        if self.rounded or found.dtype in _EXACT:
            return
        held = found.astype(np.float32)
        vanished = np.count_nonzero(held) < np.count_nonzero(found)
        if vanished or np.abs(held).max() > 2**22:
            if found.dtype.kind in "iuO":  # as Python's numbers, which compare exactly
                lost = np.asarray(held.astype(object) != found.astype(object))
            else:
                lost = np.abs(held - found) > np.minimum(0.49, np.abs(found) / 2)
            if lost.any():
                at = _first(lost)
                self.rounded = f"its {name} {found[at]} becomes {held[at]}, in float32"


def _edges(space: Any, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Those of a box of floats, with room for rounding, finite in float32."""
    low, high = (np.asarray(edge, dtype=np.float64) for edge in (space.low, space.high))
    room = _SLACK * np.maximum(*(np.where(np.isfinite(e), np.abs(e), 0.0) for e in (low, high)))
    most = min(float(np.finfo(dtype).max), _LARGEST)
    low, high = (edge.clip(-most, most) for edge in (low - room, high + room))
    return low.astype(dtype), high.astype(dtype)


def _parts(method: str, answer: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """What a method returned, taken apart."""
    whole = isinstance(answer, (tuple, list)) and len(answer) == len(names)
    if not whole or not isinstance(answer[-1], Mapping):
        count = f" of {len(answer)}" if isinstance(answer, (tuple, list)) else ""
        raise Misfit(
            f"its {method} returned a {type(answer).__name__}{count}",
            f"{len(names)} parts: {', '.join(names)}, the last one a dict",
            "return all of them, as gymnasium.Env does",
        )
    return tuple(answer)


def _numbers(name: str, given: Any, shape: tuple[int, ...], allowed: Any) -> NDArray[Any]:
    """Numbers in this shape; `allowed` is of the message."""
    try:
        found = np.asarray(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Misfit(f"its {name} is no array: {error}", str(allowed)) from error
    if found.dtype.kind not in "biuf":
        what = f"its {name} is {shown(given)}, a {type(given).__name__}"
        raise Misfit(what, str(allowed))
    if found.shape != shape:
        raise Misfit(
            f"its {name} has shape {found.shape}",
            str(allowed),
            "return float(reward)" if name == "reward" else "return the shape that is declared",
        )
    return found


def _rounded(found: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """In another precision; what is too large becomes infinite."""
    if found.dtype == dtype:
        return found
    with np.errstate(over="ignore"):
        return found.astype(dtype)


def _first(wrong: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def _odd(found: NDArray[Any]) -> Any:
    """An entry that is no integer, or else the first."""
    return next(iter(found[found != np.trunc(found)].tolist()), found.flat[0])
