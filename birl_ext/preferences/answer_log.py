"""A durable record of every answer, since a person will not give them twice.

An SQLite database, one row per answer, whose ``user_version`` is their number::

    id   answer                                       hash
    1    {"first": …, "label": 1.0, "second": …}      <SHA-256>
    …

Each hash covers the hash before it and its own answer. So a row that was changed, moved or taken
out breaks the chain, and rows missing at the end the number. A kill leaves the answers that were
acknowledged, or one call's more. Hashes prove integrity, not origin.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from birl_ext.errors import (
    AnswerLogCorruptError,
    AnswerLogRecoveryWarning,
    AnswerLogWriteError,
    ConfigError,
    OptionError,
    warn,
)
from birl_ext.files import locked, replacing
from birl_ext.preferences.fragments import Fragments, Pairs

__all__ = ["AnswerLog", "fingerprints"]

_TABLE = "CREATE TABLE answers (id INTEGER PRIMARY KEY, answer TEXT NOT NULL, hash TEXT NOT NULL)"


class AnswerLog:
    """A log of answers; each is on the disk when `append` or `record` returns.

    Args:
        path: the database; created if absent.

    Raises:
        AnswerLogCorruptError: it was altered or cut short.
        ConfigError: another process has it open, or no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
            raise OptionError(f"path is {path!r}", allowed="the path of a file")
        self.path = path = Path(path)
        self.answers: list[dict[str, Any]] = []
        self._hashes = [hashlib.sha256(b"birl_ext answers").hexdigest()]
        self._at = 0  # where `record` goes on
        with contextlib.ExitStack() as stack, _openable(path):
            stack.enter_context(locked(path.with_name(f".{path.name}.lock"), "writes to this log"))
            if not path.exists():
                with replacing(path) as draft, contextlib.closing(sqlite3.connect(draft)) as new:
                    new.execute(_TABLE)
            self._database = sqlite3.connect(path, timeout=1, check_same_thread=False)
            stack.callback(self._database.close)
            try:
                self._read()
            except Exception as error:  # it may hold anything
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                    raise ConfigError(str(error), where=str(path), fix="let go of it") from None
                raise AnswerLogCorruptError(str(error), where=str(path)) from None
            self._at = len(self)
            self._resources = stack.pop_all()

    def append(self, answer: Mapping[str, Any]) -> None:
        """Write one answer, JSON data without NaN or infinities.

        Raises:
            OptionError: it is none.
            AnswerLogWriteError: the disk refused, or the log is closed; earlier answers are intact.
        """
        at_end = self._at == len(self)
        self._write(len(self), [answer])
        self._at += at_end

    def answered(self, first: Fragments, second: Fragments) -> Tensor:
        """What the log has for the next questions, up to the first that is another one.

        Returns:
            (k,) float32 labels of the first k of n pairs, NaN where there was no answer.
        """
        found: list[float] = []
        if self._at == len(self):
            return torch.tensor(found)
        marks = zip(fingerprints(first), fingerprints(second), strict=True)
        for known, (ours, theirs) in zip(self.answers[self._at :], marks, strict=False):
            if (known.get("first"), known.get("second")) != (ours, theirs):
                break
            found.append(math.nan if known["label"] is None else known["label"])
        return torch.tensor(found, dtype=torch.float32)

    def record(self, pairs: Pairs) -> None:
        """One answer per pair: fingerprints of its fragments and the label, null if there was no
        answer.

        What the log has already, after `load_state_dict` or `rewind`, is not written twice. If it
        is another answer, the run has taken another course since (on a GPU, or with other
        versions): what was answered on the course it left is removed.

        Raises:
            AnswerLogWriteError: as `append`; none of the answers is written.

        Warns:
            AnswerLogRecoveryWarning: answers have been removed.
        """
        if not isinstance(pairs, Pairs):
            raise OptionError(f"pairs is a {type(pairs).__name__}", allowed="a Pairs")
        labels = [None if math.isnan(label) else label for label in pairs.label.tolist()]
        marks = fingerprints(pairs.first), fingerprints(pairs.second)
        given = [
            {"first": first, "second": second, "label": label}
            for first, second, label in zip(*marks, labels, strict=True)
        ]
        known = zip(self.answers[self._at :], given, strict=False)
        kept = self._at + sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], known))
        left = len(self) - kept
        if new := given[kept - self._at :]:
            self._write(kept, new)
            if left:
                warn(
                    f"{self.path}: the run has taken another course after answer {kept}; the "
                    f"{left} answers given on the old one have been removed",
                    AnswerLogRecoveryWarning,
                )
        self._at += len(given)

    def rewind(self) -> None:
        """Let `record` go through the answers from the first one on, as a run does that starts
        again.
        """
        self._at = 0

    def state_dict(self) -> dict[str, Any]:
        """How far `record` has come, and a hash of all up to there."""
        return {"answers": self._at, "hash": self._hashes[self._at]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the log continues the one of the state; answers given since stay, and are
        what `record` expects next.

        Raises:
            AnswerLogCorruptError: it does not.
        """
        count, link = (
            state.get(key) if isinstance(state, Mapping) else None for key in ("answers", "hash")
        )
        if not isinstance(count, int) or count < 0 or self._hashes[count:][:1] != [link]:
            raise AnswerLogCorruptError(
                f"the log's first {count} answers are not those of the stored state",
                where=str(self.path),
                fix="use the log that was written by the same run",
            )
        self._at = count

    def close(self) -> None:
        """Let another process open the log; a closed log takes no answers."""
        self._resources.close()

    def __len__(self) -> int:
        return len(self.answers)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> None:
        """Take the answers in, or raise what is wrong with them."""
        run = self._database.execute
        run("PRAGMA synchronous = EXTRA")  # FULL may lose a commit when the power fails
        (count,) = run("PRAGMA user_version").fetchone()
        if (fault := run("PRAGMA quick_check").fetchone()) != ("ok",):
            raise ValueError(fault[0])
        for number, (key, answer, link) in enumerate(run("SELECT * FROM answers ORDER BY id"), 1):
            if key != number or link != _link(self._hashes[-1], answer):
                raise ValueError(f"answer {number} does not match its hash")
            self._hashes.append(link)
            self.answers.append(dict(json.loads(answer)))
        if len(self) != count:
            raise ValueError(f"it has {len(self)} answers of {count} written")

    def _write(self, kept: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Let these follow the first ones, in place of all others; a kill leaves the old or the new
        log.
        """
        try:
            texts = [json.dumps(dict(each), sort_keys=True, allow_nan=False) for each in answers]
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(
                f"the answer is no JSON data: {error}",
                allowed="a dict of texts, finite numbers, lists and dicts",
                fix="write None for what was not answered",
            ) from None
        links = list(itertools.accumulate(texts, _link, initial=self._hashes[kept]))[1:]
        rows = zip(itertools.count(kept + 1), texts, links, strict=False)
        try:
            with self._database as transaction:
                transaction.execute("DELETE FROM answers WHERE id > ?", (kept,))
                transaction.executemany("INSERT INTO answers VALUES (?, ?, ?)", rows)
                transaction.execute(f"PRAGMA user_version = {kept + len(texts)}")
        except sqlite3.Error as error:
            closed = isinstance(error, sqlite3.ProgrammingError)
            raise AnswerLogWriteError(
                f"answer {kept + 1} was not written: {error}",
                where=str(self.path),
                fix="open the log again" if closed else "",
            ) from error
        # In this order: after an interrupt the next answers replace those that nobody was told of.
        self._hashes[kept + 1 :] = links
        self.answers[kept:] = map(json.loads, texts)


@contextlib.contextmanager
def _openable(path: Path) -> Iterator[None]:
    """What the system says of a path that no log can be at, as an error of the catalogue."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise ConfigError(
            f"no log can be opened: {error}",
            where=str(path),
            fix="give the path of a file, in a folder that can be written to",
        ) from error


def fingerprints(fragments: Fragments) -> list[str]:
    """SHA-256 of what a teacher saw of each fragment, its present observations and actions."""
    found = []
    for observation, action, present in zip(
        fragments.observation.cpu(), fragments.action.cpu(), fragments.present.cpu(), strict=True
    ):
        digest = hashlib.sha256()
        for part in (observation[present], action[present]):
            digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            digest.update(part.contiguous().numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def _link(previous: str, answer: str) -> str:
    return hashlib.sha256(f"{previous} {answer}".encode()).hexdigest()
