"""What methods are compared on: one problem in several settings, and what a run may cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from birl_ext.arena.config import Switch
from birl_ext.bilevel import AdditiveProblem, BilevelProblem, Effort, SampledProblem
from birl_ext.bilevel.sampled import KnownFollower
from birl_ext.errors import ConfigError, suggestion
from birl_ext.model.mdp import DenseMDP
from birl_ext.simulators.finite import FiniteSimulator

__all__ = ["Bout", "Contest", "Samples", "Unit", "known"]

Unit = Literal["seconds", "samples"]
"""What is equal for all: processor seconds, or environment steps."""


@dataclass(frozen=True)
class Samples:
    """A process that can only be sampled.

    Args:
        problem: reward and cost.
        simulator: of the process, with the generator of this run.
        discount: γ of the follower.
        starts: (M, generator) → points to start from, (M, d).
        follower: (x, τ) → π, (S, A), where the follower answers exactly and for nothing.
        model: the process, for what is told the truth for comparison.
        effort: of an outer step of each method: paths, steps of a continuation, and samples of
            every (s, a) where something is learned from them.
    """

    problem: SampledProblem
    simulator: FiniteSimulator
    discount: float
    starts: Callable[[int, torch.Generator], Tensor]
    follower: KnownFollower | None = None
    model: DenseMDP | None = None
    effort: Effort = field(default_factory=lambda: Effort(1, 60, 1))


@dataclass(frozen=True)
class Bout:
    """One setting of a contest, made ready for some seeds.

    Args:
        start: x₀, (n, d), a row for each start of each seed; or (d,) of a contest that takes one.
        temperature: λ, which φ is judged at.
        problem: both levels, exactly: what judges every method, and what those with a model use.
        inner: axes of the lower level's batch behind the rows of x, such as contexts.
        additive: the same upper level as a sum over steps, where it is one.
        stacks: whether any number of rows may be asked for at once, or x has rows of its own.
        samples: where only samples are to be had.
    """

    start: Tensor
    temperature: float
    problem: BilevelProblem
    inner: int = 0
    additive: AdditiveProblem | None = None
    stacks: bool = False
    samples: Samples | None = None

    def objective(self, x: Tensor) -> Tensor:
        """φ at λ, solved as far as rounding allows: one for each row of x, (n,), or ()."""
        with torch.no_grad():
            return self.problem.objective(x, self.temperature)

    def temperatures(self, heat: Tensor) -> float | Tensor:
        """λ·heat as the lower level's batch takes it, heat (n,) by rows or ()."""
        if heat.dim() == 0:
            return float(self.temperature * heat)
        return self.temperature * heat.reshape(-1, *[1] * self.inner)


@dataclass(frozen=True)
class Contest:
    """One problem on which methods are compared.

    Args:
        title: of tables and figures.
        make: (setting, seeds, starts) → the bout. With `batched` its x has a row for each of
            `starts` starts of each seed, seed by seed; else it is asked for one seed and one start
            at a time.
        settings: name → what `make` is given.
        unit: what is equal for all.
        budget: of each seed, in that unit.
        methods: those that can take part, by their names in `methods.METHODS`.
        batched: whether all seeds and starts are one batch.
        value: what is shown, in words: −φ, or φ − φ* where the optimum is known.
        optimum: φ*, the same in all settings.
        references: setting → words → a level known otherwise.
        full: settings that are not played unless they are named: they take long.
        switches: those that are played if none is named.
        starts: of a switch that has several, if nobody says how many.
    """

    title: str
    make: Callable[[Mapping[str, Any], tuple[int, ...], int], Bout]
    settings: Mapping[str, Mapping[str, Any]]
    unit: Unit
    budget: float
    methods: tuple[str, ...]
    batched: bool = False
    value: str = "upper value"
    optimum: float | None = None
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    full: tuple[str, ...] = ()
    switches: tuple[Switch, ...] = ("plain", "cooled starts")
    starts: int = 16

    @property
    def sign(self) -> int:
        """1 where what is shown should be small."""
        return -1 if self.optimum is None else 1

    def shown(self, objective: Tensor) -> Tensor:
        """What is shown of φ."""
        return -objective if self.optimum is None else objective - self.optimum


def known(kind: str, name: str, names: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The name, if it is one of them.

    Raises:
        ConfigError: it is not; names the nearest.
    """
    if name not in names:
        raise ConfigError(
            f"unknown {kind} {name!r}",
            allowed=", ".join(names),
            fix=suggestion(name, names) or "choose one of them",
        )
    return name
