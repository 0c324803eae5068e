"""A preference run that is killed 200 times ends with the bits of one that never was.

``python tests/test_kill.py`` makes the kills and prints what they hit. It is a process of its own,
because a fork cannot differentiate once its parent has, on a machine with a GPU.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from preference_run import SMALL
from processes import digest, fork

from birl_ext import cli
from birl_ext.runs.checkpoint import CheckpointStore
from birl_ext.runs.config import write_toml

KILLS = 200
CONFIG: dict[str, Any] = {
    **SMALL,
    "rounds": 50,
    "environment_steps": 20,
    "update_every": 4,
    "batch_size": 8,
    "replay": 200,
    "fragment": 4,
    "pairs": 40,
    "pair_batch": 8,
    "initial_epochs": 1,
    "reward_steps": 1,
    "evaluation_episodes": 1,
    "evaluate_every": 10,
}

EVENT = struct.Struct("cq")  # what a child tells, and the step it is about
STEP, SAVE, SAVED = b"t", b"v", b"d"
START = b"s"  # never told: what comes before the first event


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute of one processor, if it has it to itself
def test_a_run_killed_200_times_ends_with_the_same_bits() -> None:
    pytest.importorskip("gymnasium")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    hit = json.loads(done.stdout)
    assert hit["kills"] == KILLS
    assert hit["runs"] >= 2
    for phase in ("start-up", "step", "save"):
        assert hit[phase] >= 20, hit
    assert hit["half a checkpoint"] >= 5, hit


class Reference(NamedTuple):
    """An uninterrupted run: what each row and each state was, times apart."""

    rows: list[dict[str, Any]]
    states: dict[int, str]
    summary: dict[str, Any]


def untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith("share") and "second" not in k}


def rows_of(run: Path, *, torn: bool) -> list[dict[str, Any]]:
    """The metrics, times apart; a last line without its end may be there or not."""
    path = run / "metrics.jsonl"
    *lines, rest = path.read_text().split("\n") if path.exists() else [""]
    assert torn or not rest, f"a torn row: {rest}"
    return [untimed(json.loads(line)) for line in lines]


def birl_run(run: Path, tell: Callable[[bytes, int], object], *, look: Any = None) -> None:
    """In a child: `birl run preference`, from where it was; tells when a step or a save begins."""
    from birl_ext.problems.preference.job import PreferenceJob

    step, save = PreferenceJob.step, CheckpointStore.save

    def told_step(job: Any) -> Any:
        tell(STEP, 0)
        return step(job)

    def told_save(store: Any, state: Any, *, step: int, **rest: Any) -> Any:
        if look is not None:
            look(step, state)
        tell(SAVE, step)
        path = save(store, state, step=step, **rest)
        tell(SAVED, step)
        return path

    PreferenceJob.step, CheckpointStore.save = told_step, told_save  # type: ignore[assignment, method-assign]
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    known = (run / "config.toml").is_file()
    where = ["--resume", str(run)] if known else ["--config", f"{run.parent}/config.toml"]
    new = [] if known else ["--out", str(run)]
    status = cli.main(["run", *where, *new, "--checkpoint-every", "1", "--no-figures"])
    assert status == 0


def reference_in(folder: Path) -> Reference:
    run, found = folder / "whole", folder / "states.json"
    states: dict[int, str] = {}

    def work() -> None:
        def look(step: int, state: Any) -> None:
            states[step] = digest(state)

        birl_run(run, lambda *_: None, look=look)
        found.write_text(json.dumps(states))

    assert os.waitpid(fork(work), 0)[1] == 0
    digests = {int(step): value for step, value in json.loads(found.read_text()).items()}
    summary = json.loads((run / "summary.json").read_text())
    assert len(set(digests.values())) == CONFIG["rounds"] + 1  # and the start
    return Reference(rows_of(run, torn=False), digests, untimed(summary))


class Victim:
    """A session of a run in a child, and the events it told."""

    def __init__(self, run: Path, lasting: dict[bytes, float]) -> None:
        receiver, sender = os.pipe()

        def work() -> None:
            os.close(receiver)
            birl_run(run, lambda kind, step: os.write(sender, EVENT.pack(kind, step)))

        self._seen_at = time.perf_counter()
        self._child = fork(work)
        os.close(sender)
        self._pipe = os.fdopen(receiver, "rb")
        self._lasting = lasting
        self.phase, self.acknowledged = START, 0

    def listen(self) -> bool:
        """Wait for the next event; False if the session has ended."""
        before = self.phase
        if not self._read():
            return False
        now = time.perf_counter()
        self._lasting[before], self._seen_at = now - self._seen_at, now
        return True

    def _read(self) -> bool:
        data = self._pipe.read(EVENT.size)
        if len(data) < EVENT.size:
            return False
        self.phase, step = EVENT.unpack(data)
        if self.phase == SAVED:
            self.acknowledged = step
        return True

    def end(self) -> int:
        """Read what is left; the exit status."""
        while self._read():
            pass
        self._pipe.close()
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])

    def kill(self, phase: bytes, passing: int, share: float) -> int:
        """Kill it in a phase, after some others like it and a share of the seconds it takes."""
        while self.phase != phase or (passing := passing - 1) >= 0:
            if not self.listen():
                return self.end()
        # no later than half a second: the phase was long because the machine was busy
        time.sleep(share * min(self._lasting[phase], 0.5))
        os.kill(self._child, signal.SIGKILL)
        return self.end()


def check(run: Path, reference: Reference, acknowledged: int) -> int:
    """After a kill: the step of the newest checkpoint, the one acknowledged or the next."""
    store = CheckpointStore(run / "checkpoints")
    step = 0
    if acknowledged or store.paths():
        step, state = (found := store.load()).step, found.state
        assert digest(state) == reference.states[step], f"step {step} has another state"
    # The kill may fall between the rename and the acknowledgement.
    assert acknowledged <= step <= acknowledged + 1, (acknowledged, step)
    rows = rows_of(run, torn=True)
    assert step <= len(rows) <= step + 1, (step, rows)
    assert rows == reference.rows[: len(rows)]
    return step


def trials(folder: Path) -> Counter[str]:
    """Kill runs until there were `KILLS`; each ends as the reference did."""
    from birl_ext.problems.preference.config import PreferenceConfig
    from birl_ext.problems.preference.job import PreferenceJob

    write_toml(folder / "config.toml", {"problem": "preference", "config": CONFIG})
    # What the children would import one by one.
    PreferenceJob(PreferenceConfig(**CONFIG))
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(["run", "preference", "--help"])
    reference = reference_in(folder)
    moments = random.Random(0)
    lasting = {START: 0.1, STEP: 0.02, SAVE: 0.01, SAVED: 0.0}
    hit: Counter[str] = Counter()
    names = {START: "start-up", STEP: "step", SAVE: "save", SAVED: "between"}
    while hit["kills"] < KILLS:
        hit["runs"] += 1
        run, step, status = folder / f"run-{hit['runs']}", 0, -signal.SIGKILL
        while status == -signal.SIGKILL:
            victim = Victim(run, lasting)
            victim.acknowledged = step
            if hit["kills"] == KILLS:
                status = victim.end()
                break
            phase = moments.choice([START, STEP, SAVE])
            passing = 0 if phase == START else moments.randrange(4)
            status = victim.kill(phase, passing, moments.random())
            if status == -signal.SIGKILL:
                hit["kills"] += 1
                hit[names[victim.phase]] += 1
                hit["half a checkpoint"] += bool(list(run.glob("checkpoints/.partial-*")))
                step = check(run, reference, victim.acknowledged)
        assert status == 0, f"{run.name} ended with {status}"
        assert check(run, reference, CONFIG["rounds"]) == CONFIG["rounds"]
        assert rows_of(run, torn=False) == reference.rows
        assert untimed(json.loads((run / "summary.json").read_text())) == reference.summary
    return hit


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A folder, in memory where it can be: a kill, unlike a power cut, spares the page cache."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with in_memory() as folder:
        print(json.dumps(trials(folder)))


if __name__ == "__main__":
    main()
