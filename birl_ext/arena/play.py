"""One run of one method to its budget."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from birl_ext.arena.config import Switch
from birl_ext.arena.contest import Bout, Contest
from birl_ext.arena.methods import METHODS, Plan
from birl_ext.bilevel.algorithm import Algorithm, Descent
from birl_ext.errors import BirlError, JobError

__all__ = ["Match", "play"]

PACE = 1.0
"""Processor seconds that a pace is measured for, and at least three steps."""

POINTS = 24
"""Values on a curve."""

COOLING = 0.6
"""Share of a run in which the temperature falls."""

MEMORY = 0.9
"""Of the last estimate of φ, in a mean over steps where it is noisy."""

IDLE = 1000
"""Steps without a sample after which a run that ends with its samples is ended."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Match:
    """A method on a setting of a contest, for one seed, or several in a batch.

    Args:
        rate: the optimiser's.
        steps: outer steps, of which samples may leave fewer or take more; None to find how long
            one takes.
        budget: of each seed, in the contest's unit.
        starts, heat, noise: of the switches.
    """

    contest: Contest
    setting: str
    method: str
    switch: Switch
    rate: float
    seeds: tuple[int, ...]
    steps: int | None
    budget: float
    starts: int
    heat: float
    noise: float


def play(match: Match) -> Record:
    """Play it.

    Returns:
        `seeds`; `values`, of each at the end, None where the method failed; `cost` and `curve`, the
        values on the way, (points,) and (points, seeds); `steps`; `seconds` and `samples` of a
        seed; `memory`, MiB of the process at most; `failed`, the error of the method, or nothing.
    """
    torch.set_num_threads(1)
    game = _Game(match)
    failed = ""
    try:
        game.run()
    except BirlError as error:  # of the method, at these settings: the others go on
        failed = " ".join(str(error).split())
    return {
        "seeds": list(match.seeds),
        "values": None if failed or not game.curve else game.curve[-1],
        "cost": game.cost,
        "curve": game.curve,
        "steps": game.taken,
        "seconds": game.seconds / len(match.seeds),
        "samples": game.samples,
        "memory": _memory(),
        "rate": match.rate,
        "failed": failed,
    }


class _Game:
    """The algorithms of a match, taken in turn, and what has been seen of them."""

    def __init__(self, match: Match) -> None:
        self.match, self.contest = match, match.contest
        self.method = METHODS[match.method]
        several = "starts" in match.switch
        self.starts = match.starts if several and not self.method.whole else 1
        self.bout: Bout = self.contest.make(
            self.contest.settings[match.setting], match.seeds, self.starts
        )
        together = self.contest.batched and self.method.needs != "samples"
        rows: Sequence[Tensor] = [self.bout.start] if together else list(self.bout.start)
        self.team = [self._algorithm(x, k) for k, x in enumerate(rows)]
        self.own: list[Tensor | None] = [None] * len(rows)
        self.taken, self.seconds = 0, 0.0
        self.cost: list[float] = []
        self.curve: list[list[float]] = []

    @property
    def samples(self) -> int:
        return self.bout.samples.simulator.samples if self.bout.samples else 0

    def run(self) -> None:
        pace, last, looks = self.match.steps is None, 0, 1
        limited = self.contest.unit == "samples"
        while not self._over(last):
            before = self.samples
            self._step()
            last = self.samples - before
            if limited and not self.samples and self.taken >= IDLE:
                raise JobError(f"{IDLE} steps of {self.match.method} have drawn no sample")
            if not pace and self._share() >= looks / POINTS:
                self._look()
                looks = math.floor(self._share() * POINTS) + 1
        if not pace and (not self.cost or self.cost[-1] != self._cost()):
            self._look()

    def _over(self, last: int) -> bool:
        """Whether no step is left; where samples count, one as dear as the last is too much."""
        if self.match.steps is None:
            return self.taken >= 3 * len(self.team) and self.seconds >= PACE
        if self.contest.unit == "samples":
            return self.samples + last > self.match.budget
        return self.taken >= self.match.steps

    def _share(self) -> float:
        """How much of the run is over."""
        if self.contest.unit == "samples":
            return self.samples / self.match.budget
        return self.taken / (self.match.steps or 100)

    def _step(self) -> None:
        who = self.taken % len(self.team)
        algorithm = self.team[who]
        if isinstance(algorithm, Descent):
            for group in algorithm.optimiser.param_groups:
                group["lr"] = self.match.rate * 0.1 ** self._share()
        began = time.process_time()
        outcome = algorithm.step()
        self.seconds += time.process_time() - began
        self.taken += 1
        found = torch.as_tensor(outcome.objective, dtype=torch.float64).detach()
        before = self.own[who]
        if before is not None and self.bout.samples:
            found = MEMORY * before + (1 - MEMORY) * found
        self.own[who] = found

    def _look(self) -> None:
        """The true value of each seed's best start, by the method's own reckoning."""
        phi = [self.bout.objective(algorithm.x.detach()) for algorithm in self.team]
        seeds = len(self.match.seeds)
        own = [phi[0].new_full((), torch.inf) if o is None else o for o in self.own]
        objective, reckoned = (torch.stack([*p]).reshape(seeds, -1) for p in (phi, own))
        lead = reckoned.argmin(-1, keepdim=True)
        values = self.contest.shown(objective.gather(-1, lead).squeeze(-1))
        self.cost.append(self._cost())
        self.curve.append(values.tolist())

    def _cost(self) -> float:
        seconds = self.seconds / len(self.match.seeds)
        return float(self.samples) if self.contest.unit == "samples" else seconds

    def _algorithm(self, x: Tensor, number: int) -> Algorithm[Any]:
        match = self.match
        heat = match.heat if "cooled" in match.switch else 1.0
        plan = Plan(
            temperature=self._schedule(x, heat),
            optimiser=partial(torch.optim.Adam, lr=match.rate),
            noise=match.noise if match.switch == "noise" else 0.0,
            seed=match.seeds[0] + 7919 * number,
            starts=match.starts if "starts" in match.switch else 1,
            heat=heat,
            budget=match.budget,
        )
        return self.method.make(self.bout, x, plan)

    def _schedule(self, x: Tensor, heat: float) -> Callable[[int], float | Tensor] | float:
        """From λ·heat down to λ; several starts in a batch begin at heats from 1 to that."""
        if heat == 1.0:
            return self.bout.temperature
        own = torch.tensor(heat, dtype=torch.float64)
        if x.dim() > 1:
            share = torch.linspace(1, 0, self.starts, dtype=torch.float64)
            own = (own**share).repeat(len(x) // self.starts)
        return lambda _: self.bout.temperatures(own ** (1 - min(self._share() / COOLING, 1.0)))


def _memory() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
