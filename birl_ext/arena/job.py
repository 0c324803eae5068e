"""An arena as a job: paces, then learning rates, then the runs that are reported."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birl_ext.arena import report
from birl_ext.arena.config import TUNED, ArenaConfig, Switch
from birl_ext.arena.contest import Contest, known
from birl_ext.arena.methods import METHODS
from birl_ext.arena.play import Match, Record, play
from birl_ext.errors import ConfigError, EnvironmentFailureError, FileFormatError
from birl_ext.files import replacing
from birl_ext.model.checks import check_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ArenaJob"]

FEWEST = 4
"""Outer steps of a run: where the budget is less than that, a method is too slow for it."""

Key = tuple[str, ...]


class ArenaJob:
    """All runs of an arena, each an outer step, by as many processes as there are processors.

    First the pace of each method in each setting, from which steps follow: so many as fill the
    budget, and a forecast of the hours. Then its learning rate, by the mean value on seeds that
    are not reported. Then the seeds. A run is stored whole when it ends, and none is played twice.
    """

    def __init__(self, config: ArenaConfig, contests: Mapping[str, Contest]) -> None:
        self.config = config
        self.contest = contest = contests[known("contest", config.contest, tuple(contests))]
        self.methods = [known("method", m, contest.methods) for m in config.methods]
        self.methods = self.methods or list(contest.methods)
        self.settings = [known("setting", s, contest.settings) for s in config.settings]
        self.settings = self.settings or [s for s in contest.settings if s not in contest.full]
        self.budget = contest.budget if config.budget is None else config.budget
        if contest.unit == "samples" and self.budget < 1:
            raise ConfigError(f"budget is {self.budget}", allowed="1 environment step or more")
        self.entries: list[tuple[str, str, Switch]] = [
            (setting, method, switch)
            for setting in self.settings
            for method in self.methods
            for switch in config.switches or contest.switches
            if switch != "noise" or not METHODS[method].whole
        ]
        self.records: dict[Key, Record] = {}
        self._path: Path | None = None
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[Future[Record], Key] = {}

    @property
    def total_steps(self) -> int:
        return sum(len(list(phase())) for phase in self._phases())

    @property
    def done(self) -> bool:
        return len(self.records) >= self.total_steps

    def step(self) -> dict[str, float]:
        """Wait for the next run that ends."""
        key, record = self._next()
        record = {
            **dict(zip(("phase", "setting", "method", "switch"), key[:4], strict=True)),
            **record,
        }
        self.records[key] = record
        if record["failed"] and key[0] != "tune":
            self._say(f"{' / '.join(key)} failed: {record['failed']}")
        if key[0] == "pace" and len(self.records) == len(self.entries):
            self._forecast()
        if key[0] == "play" and self._path is not None:
            self._write()
        values = record["values"] or []
        row = {"seconds": record["seconds"] * len(record["seeds"])}
        return {"value": sum(values) / len(values), **row} if values and key[0] == "play" else row

    def state_dict(self) -> dict[str, Any]:
        return {"records": json.dumps([[list(key), found] for key, found in self.records.items()])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        try:
            records = {tuple(key): found for key, found in json.loads(state["records"])}
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"the stored state is none of an arena: {error}",
                fix="begin anew in another directory",
            ) from error
        self.records = records

    def attach(self, path: Path) -> None:
        self._path = path

    def detach(self) -> None:
        """End what is still at work; its runs are played again."""
        self._path = None
        if self._pool is not None:
            workers = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
            self._pool, self._running = None, {}

    def summary(self) -> dict[str, Any]:
        found = report.standings(self._records())
        best = {}
        for setting in self.settings:
            own = [s for s in found if s.setting == setting and s.values]
            if own:
                lead = min(own, key=lambda s: self.contest.sign * s.mean)
                best[setting] = f"{lead.mean:.4g} by {lead.name}"
        return {
            "best": best,
            "runs": len(self.records),
            "failed": sum(bool(record["failed"]) for record in self.records.values()),
            "processor_seconds": sum(
                record["seconds"] * len(record["seeds"]) for record in self.records.values()
            ),
            "records": self._records(),
        }

    def figures(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> dict[str, Callable[[], Figure]]:
        return {"values": partial(report.figures, self.contest, summary["records"])}

    # What is played

    def _phases(self) -> list[Callable[[], Iterator[Key]]]:
        return [self._paces, self._tunings, self._plays]

    def _paces(self) -> Iterator[Key]:
        for entry in self.entries:
            yield ("pace", *entry)

    def _tunings(self) -> Iterator[Key]:
        seeds = self._seeds(TUNED, self.config.tuning_seeds)
        for setting, method, switch in self.entries:
            rates = METHODS[method].rates
            if len(rates) < 2:
                continue
            for rate, some in itertools.product(rates, self._grouped(method, seeds)):
                yield ("tune", setting, method, switch, f"{rate:g}", _words(some))

    def _plays(self) -> Iterator[Key]:
        seeds = self._seeds(0, self.config.seeds)
        for setting, method, switch in self.entries:
            for some in self._grouped(method, seeds):
                yield ("play", setting, method, switch, _words(some))

    def _seeds(self, beyond: int, count: int) -> list[int]:
        """So many from the first one of the settings, or beyond it; a generator takes 64 bits."""
        return [(self.config.seed + beyond + k) % 2**64 for k in range(count)]

    def _grouped(self, method: str, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """Seeds of one run: all of them where the method takes a batch."""
        if self._together(method):
            return [tuple(seeds)]
        return [(seed,) for seed in seeds]

    def _together(self, method: str) -> bool:
        return self.contest.batched and METHODS[method].needs != "samples"

    def _match(self, key: Key) -> Match:
        phase, setting, method, switch, *rest = key
        config, entry = self.config, (setting, method, switch)
        if phase == "pace":
            seeds, steps = self._grouped(method, self._seeds(0, config.seeds))[0], None
        else:
            seeds, steps = tuple(map(int, rest[-1].split("-"))), self._steps(entry)
        rate = float(rest[0]) if phase == "tune" else self._rate(entry, phase)
        return Match(
            contest=self.contest,
            setting=setting,
            method=method,
            switch=switch,  # type: ignore[arg-type]
            rate=rate,
            seeds=seeds,
            steps=steps,
            budget=self.budget,
            starts=config.starts or self.contest.starts,
            heat=config.heat,
            noise=config.gradient_noise,
        )

    def _rate(self, entry: Key, phase: str) -> float:
        """That of the best mean value on the tuning seeds; before, the middle one."""
        rates = METHODS[entry[1]].rates
        if phase == "pace" or len(rates) < 2:
            return rates[len(rates) // 2]
        found: dict[float, list[float]] = {}
        for key, record in self.records.items():
            if key[0] == "tune" and key[1:4] == entry:
                found.setdefault(float(key[4]), []).extend(record["values"] or [math.nan])
        loss = {rate: self.contest.sign * sum(v) / len(v) for rate, v in found.items()}
        sound = {rate: number for rate, number in loss.items() if math.isfinite(number)}
        return min(sound, key=sound.__getitem__) if sound else rates[0]

    def _steps(self, entry: Key) -> int:
        """Outer steps that fill the budget at the pace that was measured."""
        pace = self.records[("pace", *entry)]
        spent = pace["samples"] if self.contest.unit == "samples" else pace["seconds"]
        each = max(spent, 1e-9) / max(1, pace["steps"])
        return int(self.budget / each)

    def _unplayed(self, key: Key) -> Record | None:
        """The record of a run that is none: its method's pace failed, or is too slow."""
        if key[0] == "pace":
            return None
        pace, steps = self.records[("pace", *key[1:4])], self._steps(key[1:4])
        if not pace["failed"] and steps >= FEWEST:
            return None
        slow = f"its budget is enough for {steps} outer steps, {FEWEST} are the fewest played"
        match = self._match(key)
        return {
            **dict.fromkeys(("steps", "seconds", "samples", "memory"), 0),
            **{"values": None, "cost": [], "curve": []},
            "seeds": list(match.seeds),
            "rate": match.rate,
            "failed": pace["failed"] or slow,
        }

    # Who plays

    def _next(self) -> tuple[Key, Record]:
        todo = [key for key in self._open() if key not in self._running.values()]
        for key in todo:
            if (record := self._unplayed(key)) is not None:
                return key, record
        workers = self.config.workers or _processors()
        if workers == 1:
            return todo[0], play(self._match(todo[0]))
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), initializer=_begin
            )
        for key in todo[: 2 * workers - len(self._running)]:
            self._running[self._pool.submit(play, self._match(key))] = key
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        first = ended.pop()
        try:
            return self._running.pop(first), first.result()
        except BrokenExecutor as error:
            raise EnvironmentFailureError(
                "a process of the arena has died",
                where=f"one of {workers} workers",
                fix="resume with fewer --workers, if the memory was not enough",
            ) from error

    def _open(self) -> list[Key]:
        """What is left of the first phase that is not over."""
        for phase in self._phases():
            left = [key for key in phase() if key not in self.records]
            if left:
                return left
        return []

    # What is said

    def _forecast(self) -> None:
        """Hours and memory of all that is left, from the paces."""
        seconds = 0.0
        for key in [*self._tunings(), *self._plays()]:
            pace = self.records[("pace", *key[1:4])]
            each = pace["seconds"] * len(pace["seeds"]) / max(1, pace["steps"])
            if self._unplayed(key) is None:  # fewer seeds of a batch take hardly less
                seconds += self._steps(key[1:4]) * each
        workers = self.config.workers or _processors()
        memory = max(record["memory"] for record in self.records.values())
        check_memory(f"{workers} workers", int(workers * memory * 2**17), fix="lower --workers")
        left = self.total_steps - len(self.records)
        self._say(
            f"{left} runs, about {_duration(seconds / workers)} on {workers} "
            f"process{'es' * (workers > 1)}, {workers * memory / 1024:.1f} GiB of memory"
        )

    def _say(self, text: str) -> None:
        if self._path is not None:
            print(f"arena: {text}", file=sys.stderr, flush=True)

    def _records(self) -> list[Record]:
        every = itertools.chain.from_iterable(phase() for phase in self._phases())
        return [self.records[key] for key in every if key in self.records]

    def _write(self) -> None:
        assert self._path is not None
        for name, text in (
            ("table.md", report.table(self.contest, self._records()) + "\n"),
            ("results.csv", report.csv_text(self.contest, self._records())),
        ):
            with replacing(self._path / name) as draft:
                draft.write_text(text, "utf-8", newline="\n")


def _processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin() -> None:
    """Of a worker: the process that asks for it ends it, by its own end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _words(seeds: Sequence[int]) -> str:
    return "-".join(map(str, seeds))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
