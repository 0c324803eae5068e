"""What every algorithm that steps on x has in common: many steps, and how it shows itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from birl_ext.bilevel.guards import check_count, check_number

__all__ = ["Algorithm"]

_Outcome = TypeVar("_Outcome", bound=tuple[Any, ...])


class Algorithm(ABC, Generic[_Outcome]):
    """An upper level that is stepped on."""

    x: Tensor

    @abstractmethod
    def step(self) -> _Outcome:
        """One outer step on x."""

    def run(
        self,
        steps: int,
        *,
        tol: float = 0.0,
        tell: Callable[[int, _Outcome], object] | None = None,
    ) -> list[_Outcome]:
        """At most so many steps; fewer once ‖∇φ‖₂ ≤ tol at every start.

        Args:
            steps: most steps.
            tol: of the norm of the gradient, estimated where that is, units of φ over x; 0: all
                steps.
            tell: called after each step with its number, from 1, and its outcome.

        Returns:
            The outcomes of the steps taken, each at the x before it; the last one meets `tol` if
            any does.

        Raises: as `step`; the steps before stay taken.
        """
        steps, tol = check_count("steps", steps), check_number("tol", tol)
        found: list[_Outcome] = []
        for number in range(1, steps + 1):
            outcome = self.step()
            found.append(outcome)
            if tell is not None:
                tell(number, outcome)
            norm: Any = outcome.gradient_norm  # type: ignore[attr-defined]
            if tol > 0 and bool((torch.as_tensor(norm) <= tol).all()):
                break
        return found

    def __repr__(self) -> str:
        facts = {"x": tuple(self.x.shape)}
        facts |= {name: getattr(self, name) for name in ("mode", "steps") if hasattr(self, name)}
        words = ", ".join(f"{name}={fact!r}" for name, fact in facts.items())
        return f"{type(self).__name__}({words})"
