"""Every way in which random draws can come out, with its probability."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import numpy as np

from birl_ext.errors import OptionError, SizeLimitError

__all__ = ["Script", "Uniform", "outcomes"]

T = TypeVar("T")

ROUNDING = 1e-12
"""A uniform number that lies so near to a threshold is taken for at it: sums of probabilities end
so near to one, and what would be drawn beyond their end was never meant."""


class Script:
    """Stands in for a `numpy.random.Generator`: draws come out as prescribed, and their
    probabilities are kept.

    Args:
        prescribed: which outcome each of the first draws takes; those that follow take their first.
    """

    def __init__(self, prescribed: list[int]) -> None:
        self.prescribed = prescribed
        self.taken: list[tuple[int, int]] = []
        """(outcome, number of outcomes) of each draw so far."""
        self.probability = 1.0

    def branch(self, probabilities: Any) -> int:
        """Which of the outcomes with these `probabilities` comes next; those of 0 never do."""
        possible = [i for i, p in enumerate(probabilities) if p > 0]
        place = len(self.taken)
        turn = self.prescribed[place] if place < len(self.prescribed) else 0
        self.taken.append((turn, len(possible)))
        outcome = possible[turn]
        self.probability *= float(probabilities[outcome])
        return outcome

    def choice(
        self, a: Any, size: Any = None, replace: bool = True, p: Any = None, **_: Any
    ) -> Any:
        """One of a, or of range(a); equal items are one outcome.

        Args:
            a: the items, or how many.
            size: shape of several draws; None for one.
            replace: whether an item may be drawn twice.
            p: their probabilities; None where all are alike.

        Raises:
            OptionError: several are drawn without replacement, and with probabilities.
        """
        if size is not None:
            items = np.arange(a) if isinstance(a, int | np.integer) else np.asarray(a)
            if not replace:
                if p is not None:
                    self.refuse("choice(replace=False, p=…)")
                return self.permutation(items)[: int(np.prod(size))].reshape(size)
            drawn = [self.choice(items, p=p) for _ in range(int(np.prod(size)))]
            return np.array(drawn, items.dtype).reshape(size)
        if p is None and isinstance(a, list) and all(type(x) is int for x in a):
            items, places, chances = _cards(tuple(a))
        else:
            items, places, chances = _merged(a, p)
        return items[places[self.branch(chances)]]

    def integers(
        self,
        low: int,
        high: int | None = None,
        size: Any = None,
        dtype: Any = np.int64,
        endpoint: bool = False,
    ) -> Any:
        """A whole number from low to high − 1.

        Args:
            low: the least; 0 if `high` is None, and `low` is the bound above.
            high: the bound above.
            size: shape of several draws; None for one.
            dtype: of the number.
            endpoint: whether the bound above may be drawn too.
        """
        low, high = (0, low) if high is None else (low, high)
        items = np.arange(low, high + int(endpoint), dtype=dtype)
        return self.choice(items, size)

    def random(self, size: Any = None, **_: Any) -> Any:
        """A number in [0, 1) that may be compared, scaled and shifted, and nothing else.

        Args:
            size: None; the outcomes of several cannot be counted.

        Raises:
            OptionError: there is a `size`.
        """
        return Uniform(self) if size is None else self.refuse("random(size)")

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = None) -> Any:
        """A number in [low, high) that may be compared, scaled and shifted, and nothing else.

        Args:
            low, high: the bounds.
            size: None, as of `random`.

        Raises:
            OptionError: there is a `size`.
        """
        if size is not None:
            self.refuse("uniform(size)")
        return Uniform(self) * (high - low) + low

    def permutation(self, x: Any) -> Any:
        """The items of `x`, or of range(x), in any order."""
        left = list(np.arange(x) if isinstance(x, int | np.integer) else x)
        drawn = []
        while left:
            drawn.append(left.pop(self.branch([1 / len(left)] * len(left))))
        return np.array(drawn)

    def shuffle(self, x: Any) -> None:
        """Bring the items of `x` into any order, in place."""
        x[:] = self.permutation(x).tolist() if isinstance(x, list) else self.permutation(x)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.random.Generator, name):
            raise AttributeError(name)
        self.refuse(f"{name}()")

    def __deepcopy__(self, memo: Any) -> Script:
        return self

    def refuse(self, name: str) -> NoReturn:
        """Say that the outcomes of this draw cannot be counted.

        Args:
            name: the call, as it is written behind ``np_random.``

        Raises:
            OptionError: always.
        """
        raise OptionError(
            f"the environment draws by np_random.{name}, whose outcomes cannot be counted",
            allowed="choice, integers, permutation, shuffle; random and uniform that are compared",
            fix="draw one of finitely many values, by choice(values, p=…)",
        )


def _merged(a: Any, p: Any) -> tuple[Any, tuple[int, ...], tuple[float, ...]]:
    """Items, the places of those that differ, and their probabilities."""
    items = np.arange(a) if isinstance(a, int | np.integer) else np.asarray(a)
    chances = [1 / len(items)] * len(items) if p is None else np.asarray(p, float).tolist()
    if items.ndim > 1:
        return items, tuple(range(len(items))), tuple(chances)
    law: dict[Any, tuple[int, float]] = {}
    for i, (item, chance) in enumerate(zip(items.tolist(), chances, strict=True)):
        first, total = law.get(item, (i, 0.0))
        law[item] = (first, total + chance)
    places, merged = zip(*law.values(), strict=True)
    return items, places, merged


@functools.lru_cache(maxsize=64)
def _cards(a: tuple[int, ...]) -> tuple[Any, tuple[int, ...], tuple[float, ...]]:
    return _merged(a, None)


class Uniform:
    """A uniform number known only as far as it was asked about: an interval that comparisons cut.

    What is left of it by rounding, less than `ROUNDING`, does not count.
    ``np.argmax(cumulative > u)``, ``np.searchsorted(cumulative, u)`` and ``u < 0.1`` come out in
    finitely many ways. It may be scaled and shifted before.

    Args:
        script: decides into which piece of the interval the number falls.
        interval: where the number drawn lies, as far as it is known, shared by all that is made of
            it; None is [0, 1].
        scale, shift: this number is scale · (the number drawn) + shift; scale > 0.
    """

    __array_ufunc__ = None  # so that NumPy leaves comparisons to this class

    def __init__(
        self,
        script: Script,
        interval: list[float] | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        self.script, self.scale, self.shift = script, scale, shift
        self.interval = [0.0, 1.0] if interval is None else interval  # of the number drawn itself

    def _above(self, thresholds: Any) -> Any:
        """Whether the number lies at or above each threshold."""
        if thresholds is self:  # a binary search begins so
            return True
        cuts = (np.asarray(thresholds, float) - self.shift) / self.scale
        low, high = self.interval
        inside = np.unique(cuts[(cuts > low + ROUNDING) & (cuts < high - ROUNDING)])
        if len(inside):
            inside = inside[np.diff(inside, append=np.inf) > ROUNDING]
            edges = np.concatenate(([low], inside, [high]))
            piece = self.script.branch(np.diff(edges) / (high - low))
            self.interval[:] = edges[piece : piece + 2].tolist()
        answer = cuts <= self.interval[0] + ROUNDING
        return answer if answer.ndim else bool(answer)

    def __ge__(self, other: Any) -> Any:
        return self._above(other)

    def __gt__(self, other: Any) -> Any:
        return self._above(other)

    def __lt__(self, other: Any) -> Any:
        return np.logical_not(self._above(other)) if np.ndim(other) else not self._above(other)

    def __le__(self, other: Any) -> Any:
        return self < other

    def __mul__(self, factor: Any) -> Uniform:
        if not isinstance(factor, int | float | np.number) or not factor > 0:
            self._refuse()
        times = float(factor)
        return Uniform(self.script, self.interval, self.scale * times, self.shift * times)

    def __add__(self, number: Any) -> Uniform:
        if not isinstance(number, int | float | np.number):
            self._refuse()
        return Uniform(self.script, self.interval, self.scale, self.shift + float(number))

    __rmul__ = __mul__
    __radd__ = __add__

    def __sub__(self, number: Any) -> Uniform:
        return self.__add__(-number)

    def __truediv__(self, number: Any) -> Uniform:
        return self.__mul__(1 / number)

    def __float__(self) -> NoReturn:
        self._refuse()

    def __int__(self) -> NoReturn:
        self._refuse()

    def __neg__(self) -> NoReturn:
        self._refuse()

    def __rsub__(self, _: Any) -> NoReturn:
        self._refuse()

    def __bool__(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        self.script.refuse("random() as a number")


def outcomes(take: Callable[[Script], T], most: int, where: str) -> Iterator[tuple[float, T]]:
    """(probability, result) of everything that `take` can come to, by its draws from a script.

    Args:
        take: called once for each way, with the script to draw from.
        most: ways that are tried at most.
        where: what the message of a refusal calls the place.

    Raises:
        SizeLimitError: more than `most`.
    """
    prescribed: list[int] = []
    count = 0
    while True:
        script = Script(prescribed)
        result = take(script)
        count += 1
        if count > most:
            raise SizeLimitError(
                f"draws come out in more than {most} ways",
                where=where,
                allowed=f"max_outcomes = {most}",
                fix="raise max_outcomes; where it is a reset, give `initial`",
            )
        yield script.probability, result
        taken = script.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        prescribed = [turn for turn, _ in taken[:-1]] + [taken[-1][0] + 1]
