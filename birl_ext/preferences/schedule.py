"""When to ask: how a budget of labels is spread over the rounds of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Literal

from birl_ext.errors import OptionError
from birl_ext.model import checks

__all__ = ["Kind", "QuerySchedule"]

Kind = Literal["constant", "hyperbolic", "inverse-linear"]

_WEIGHTS: Mapping[str, Callable[[int, int], float]] = MappingProxyType(
    {
        "constant": lambda k, last: 1.0,
        "hyperbolic": lambda k, last: 1 / (1 + k / last),
        "inverse-linear": lambda k, last: 1 / (1 + k),
    }
)


@dataclass(frozen=True)
class QuerySchedule:
    """`initial` labels before the first of K rounds, the rest in proportion to a weight w_k.

        constant: w = 1;  hyperbolic: w = 1/(1 + k/(K−1));  inverse-linear: w = 1/(1 + k)

    The cumulative counts are the cumulative shares, rounded: so no round is more than one label
    away from its share, and the total is exact.

    Args:
        kind: name of the weight.
        rounds: K.
        total: all labels of the run, the initial ones included.
        initial: labels before the first round.
    """

    kind: Kind
    rounds: int
    total: int
    initial: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _WEIGHTS:
            allowed = ", ".join(map(repr, _WEIGHTS))
            raise OptionError(f"kind is {self.kind!r}", allowed=allowed)
        checks.check_count("rounds", self.rounds)
        checks.check_count("total", self.total, 0)
        checks.check_count("initial", self.initial, 0)
        if not 0 <= self.initial <= self.total:
            raise OptionError(f"initial is {self.initial!r}", allowed=f"0 to total, {self.total}")

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Labels to ask for in each round, (K,); with `initial` they sum to `total`."""
        last = max(self.rounds - 1, 1)
        sums = list(accumulate(_WEIGHTS[self.kind](k, last) for k in range(self.rounds)))
        budget = self.total - self.initial
        # the last share is one exactly, whatever the sum was rounded to
        marks = [0, *(math.floor(budget * (mark / sums[-1]) + 0.5) for mark in sums)]
        return tuple(after - before for before, after in pairwise(marks))
