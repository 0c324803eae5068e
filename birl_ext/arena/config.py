"""The settings of an arena."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from birl_ext.errors import ConfigError
from birl_ext.runs.settings import check_settings

__all__ = ["TUNED", "ArenaConfig", "Switch"]

Switch = Literal["plain", "cooled", "starts", "cooled starts", "noise"]


@dataclass(frozen=True)
class ArenaConfig:
    """Compare bilevel methods on one problem, at equal budgets, tuned on seeds not reported."""

    contest: str = "random-mdp"
    """The problem; `birl arena` lists them."""

    methods: tuple[str, ...] = ()
    """Which methods; by default all that can take part."""

    settings: tuple[str, ...] = ()
    """Which settings of the problem; by default all but those that take long."""

    switches: tuple[Switch, ...] = ()
    """How each method escapes local maxima: "plain" not at all; "cooled" begins at a temperature
    `heat` times λ, which falls to λ; "starts" takes the best of several starts by its own
    reckoning; "cooled starts" does both; "noise" perturbs the gradient. The budget is the same
    for each. By default the contest's own."""

    seeds: int = 5
    """Seeds that are reported: `seed`, `seed` + 1, …"""

    tuning_seeds: int = 1
    """Seeds that the learning rate is chosen on: from the first one that is reported, + 10⁶."""

    budget: float | None = None
    """Of each seed: processor seconds where the model is known, environment steps where it is
    sampled; by default the contest's own."""

    starts: int | None = None
    """Starts of the switches that have several; by default the contest's own."""

    heat: float = 8.0
    """Temperature to cool from, in units of λ."""

    gradient_noise: float = 0.01
    """Standard deviation of the switch "noise", units of φ per unit of x."""

    workers: int | None = None
    """Processes at work; by default one for each processor, 1 needs no other process."""

    seed: int = 0
    """First seed that is reported."""

    PLACES: ClassVar[tuple[str, ...]] = ("workers",)

    def __post_init__(self) -> None:
        check_settings(
            self,
            least={"heat": 1, "seeds": 1, "tuning_seeds": 1, "starts": 1, "gradient_noise": 0}
            | {"workers": 1},
            above={"budget": 0},
            most={"heat": 1e6, "seeds": 10_000, "tuning_seeds": 10_000, "starts": 100_000}
            | {"budget": 1e9, "workers": 4096},
        )
        for name in ("methods", "settings", "switches"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ConfigError(
                    f"{name} is {', '.join(given)}", allowed="each once", fix="leave out the second"
                )


TUNED = 1_000_000
"""How far the seeds that the learning rates are chosen on lie beyond those that are reported."""
