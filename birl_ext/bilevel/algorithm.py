"""What every algorithm that steps on x has in common: many steps, and how it shows itself."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from birl_ext.bilevel import variables
from birl_ext.bilevel.guards import (
    check_callable,
    check_count,
    check_number,
    make_optimiser,
    take_step,
)
from birl_ext.progress import progress as shown
from birl_ext.state import Stateful

__all__ = ["Algorithm", "Descent"]

LINES = 10.0
"""Seconds between two lines of progress where there is no terminal."""

_Outcome = TypeVar("_Outcome", bound=tuple[Any, ...])
Maker = Callable[[Iterable[Tensor]], Optimizer]


class Algorithm(Stateful, ABC, Generic[_Outcome]):
    """An upper level that is stepped on."""

    x: Any
    """The upper-level variable, in the form it was given."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Parts of the state that are not known before the first step."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which stays as it is.

        Raises:
            OptionError, ShapeError, DtypeError: it is that of another object; nothing has changed.
        """
        with self.loaded_whole(self.OPTIONAL):
            super().load_state_dict(state)

    @abstractmethod
    def step(self) -> _Outcome:
        """One outer step on x."""

    def run(
        self,
        steps: int,
        *,
        tol: float = 0.0,
        tell: Callable[[int, _Outcome], object] | None = None,
        progress: bool = True,
    ) -> list[_Outcome]:
        """At most so many steps; fewer once ‖∇φ‖₂ ≤ tol at every start.

        Args:
            steps: most steps.
            tol: of the norm of the gradient, estimated where that is, units of φ over x; 0: all
                steps.
            tell: called after each step with its number, from 1, and its outcome.
            progress: show φ and ‖∇φ‖ on stderr, the least and the largest of all starts: as a bar
                on a terminal, elsewhere as a line every ten seconds.

        Returns:
            The outcomes of the steps taken, each at the x before it; the last one meets `tol` if
            any does.

        Raises: as `step`; the steps before stay taken.
        """
        steps, tol = check_count("steps", steps), check_number("tol", tol)
        if tell is not None:
            check_callable("tell", tell)
        found: list[_Outcome] = []
        name = type(self).__name__
        shows = shown(name, total=steps, lines=LINES) if progress else contextlib.nullcontext()
        with shows as show:
            due = 0.0
            for number in range(1, steps + 1):
                outcome: Any = self.step()
                found.append(outcome)
                if tell is not None:
                    tell(number, outcome)
                norm: Tensor = torch.as_tensor(outcome.gradient_norm)
                if show is not None and (now := time.monotonic()) >= due:
                    due = now + 0.1
                    least = torch.as_tensor(outcome.objective).min()
                    show({"step": number, "φ": float(least), "‖∇φ‖": float(norm.max())})
                if tol > 0 and bool((norm <= tol).all()):
                    break
        return found

    def __repr__(self) -> str:
        facts = {name: getattr(self, name) for name in ("mode", "steps") if hasattr(self, name)}
        words = [
            f"x={variables.described(self.x)}",
            *(f"{name}={fact!r}" for name, fact in facts.items()),
        ]
        return f"{type(self).__name__}({', '.join(words)})"


class Descent(Algorithm[_Outcome]):
    """An algorithm whose steps on x a torch optimiser takes."""

    STATE: ClassVar[tuple[str, ...]] = ("x", "optimiser", "steps")

    def _check_state(self, state: Any, name: str = "") -> None:
        super()._check_state(state, name)
        if state["steps"] is not None:  # else `loaded_whole` says so
            check_count("steps", state["steps"], 0)

    def _begin(self, x: variables.Variables, optimiser: Maker, *, vector: bool = False) -> None:
        self.x = variables.tracked(variables.check_start(x, vector=vector))
        self.optimiser = make_optimiser(optimiser, variables.leaves(self.x))
        self.steps = 0

    def _take(self, evaluate: Callable[[], tuple[_Outcome, Sequence[Tensor]]]) -> _Outcome:
        """One step on the gradient, by leaves, of the first outcome; after any error all of the
        state is what it was.
        """
        outcomes: list[_Outcome] = []

        def closure() -> float:
            outcome: Any
            outcome, gradient = evaluate()
            outcomes.append(outcome)
            for leaf, part in zip(variables.leaves(self.x), gradient, strict=True):
                leaf.grad = part
            return float(torch.as_tensor(outcome.objective).sum())

        with self.taken_back(without=Descent.STATE):  # these by `take_step`, to the bit
            take_step(self.optimiser, self.x, closure, self.steps)
        self.steps += 1
        return outcomes[0]
