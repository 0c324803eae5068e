"""A durable record of every answer, since a person will not give them twice.

Two files. ``NAME`` grows, and is cut only where a resumed run leaves its old course::

    birl_ext answers 1
    <SHA-256> {"first": …, "label": 1.0, "second": …}
    …

Each hash covers the hash before it and its own JSON, the first one the line at the top.
``NAME.head`` is one line, the number of records and the hash of the last; it is replaced whole
after each record has reached the disk. So

* a changed, missing or moved byte breaks the chain;
* a file that was cut short has fewer records than its head says;
* a process killed while writing leaves at most one incomplete record, which the head does not
  count: it is removed, with a warning, when the log is next opened.

Hashes prove integrity, not origin.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from birl_ext.errors import (
    AnswerLogCorruptError,
    AnswerLogRecoveryWarning,
    AnswerLogWriteError,
    ConfigError,
)
from birl_ext.preferences.fragments import Fragments, Pairs

__all__ = ["AnswerLog", "fingerprints"]

_TOP = b"birl_ext answers 1\n"
_HEAD = re.compile(rb"(0|[1-9]\d{0,17}) ([0-9a-f]{64})\n")


class AnswerLog:
    """An append-only log of answers; each is on the disk when `append` returns.

    Args:
        path: the log; created if absent, with a second file beside it, ``<path>.head``.

    Raises:
        AnswerLogCorruptError: it was altered or cut short.
        ConfigError: another process has it open.

    Warns:
        AnswerLogRecoveryWarning: the last record was torn by a kill, and has been removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[dict[str, Any]] = []
        self._at = 0  # where `record` goes on
        self._hashes = [hashlib.sha256(_TOP).hexdigest()]
        self._ends = [len(_TOP)]  # bytes up to there, of each hash
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            self._open()
            self._at = len(self)
        except BaseException:
            self.close()
            raise

    def append(self, answer: Mapping[str, Any]) -> None:
        """Write one answer, plain JSON data without NaN or infinities.

        Raises:
            AnswerLogWriteError: the disk refused, or the log is closed, as it is after that;
                earlier answers are intact.
        """
        if self._file < 0:
            raise AnswerLogWriteError(
                "the log is closed", where=str(self.path), fix="open it again"
            )
        body = json.dumps(dict(answer), sort_keys=True, allow_nan=False).encode()
        digest = _link(self._hashes[-1], body)
        line = digest.encode() + b" " + body + b"\n"
        try:
            self._write(line)
            os.fsync(self._file)
            _replace(self._head_path, _head(len(self) + 1, digest))
        except OSError as error:
            self._undo()
            raise AnswerLogWriteError(
                f"answer {len(self) + 1} was not written: {error.strerror or error}",
                where=str(self.path),
            ) from error
        except BaseException:
            # Interrupted: the record may have been written or not, which only opening anew shows.
            self.close()
            raise
        self._size += len(line)
        self._hashes.append(digest)
        self._ends.append(self._size)
        at_end = self._at == len(self)
        self.answers.append(json.loads(body))
        self._at += at_end

    def record(self, pairs: Pairs) -> None:
        """One answer per pair: fingerprints of its fragments and the label, null if there was no
        answer.

        What the log has already, after `load_state_dict` or `rewind`, is not written twice. If it
        is another answer, the run has taken another course since (on a GPU, or with other
        versions): what was answered on the course it left is removed.

        Warns:
            AnswerLogRecoveryWarning: answers have been removed.
        """
        labels = [None if math.isnan(label) else label for label in pairs.label.tolist()]
        marks = fingerprints(pairs.first), fingerprints(pairs.second)
        for first, second, label in zip(*marks, labels, strict=True):
            answer = {"first": first, "second": second, "label": label}
            if self._at < len(self) and self.answers[self._at] != answer:
                self._cut()
            if self._at == len(self):
                self.append(answer)
            else:
                self._at += 1

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
        count = int(state["answers"])
        if count > len(self) or self._hashes[count] != state["hash"]:
            raise AnswerLogCorruptError(
                f"the log's first {count} answers are not those of the stored state",
                where=str(self.path),
                fix="use the log that was written by the same run",
            )
        self._at = count

    def close(self) -> None:
        """Let another process open the log; a closed log takes no answers."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __len__(self) -> int:
        return len(self.answers)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _head_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.head")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                "another process writes to this log",
                where=str(self.path),
                fix="wait for it or stop it",
            ) from None

    def _open(self) -> None:
        data = self.path.read_bytes()
        head = _read_head(self._head_path)
        if head is None:
            # Killed before the first head was written: nothing can have been answered.
            if not _TOP.startswith(data):
                raise self._corrupt(f"{self._head_path.name} is missing")
            os.ftruncate(self._file, 0)
            self._write(_TOP)
            os.fsync(self._file)
            _replace(self._head_path, _head(0, self._hashes[0]))
            _sync_directory(self.path.parent)
            data = _TOP
            head = _read_head(self._head_path)
        assert head is not None
        self._verify(data, head)

    def _cut(self) -> None:
        """Remove the answers from `_at` on. The head first: a log that is longer than it says is
        whole, a shorter one is not.
        """
        left = len(self) - self._at
        try:
            _replace(self._head_path, _head(self._at, self._hashes[self._at]))
            _sync_directory(self.path.parent)  # or a power cut may undo it, and not what follows
            self._size = self._ends[self._at]
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
        except OSError as error:
            self.close()
            raise AnswerLogWriteError(
                f"{left} answers were not removed: {error.strerror or error}", where=str(self.path)
            ) from error
        del self.answers[self._at :], self._hashes[self._at + 1 :], self._ends[self._at + 1 :]
        warnings.warn(
            f"{self.path}: the run has taken another course after answer {self._at}; the {left} "
            "answers given on the old one have been removed",
            AnswerLogRecoveryWarning,
            stacklevel=3,
        )

    def _verify(self, data: bytes, head: _Head) -> None:
        if not data.startswith(_TOP):
            raise self._corrupt(f"it does not begin with {_TOP.decode().strip()!r}", line=1)
        *lines, torn = data[len(_TOP) :].split(b"\n")
        for number, line in enumerate(lines, 2):
            digest, _, body = line.partition(b" ")
            if digest != _link(self._hashes[-1], body).encode():
                raise self._corrupt("a record does not match its hash", line=number)
            self._hashes.append(digest.decode())
            self._ends.append(self._ends[-1] + len(line) + 1)
            try:
                self.answers.append(dict(json.loads(body)))
            except (ValueError, TypeError, RecursionError):
                raise self._corrupt("a record is not a JSON object", line=number) from None
        if len(lines) < head.records:
            raise self._corrupt(f"it has {len(lines)} whole records of {head.records} written")
        if self._hashes[head.records] != head.hash:
            raise self._corrupt(f"record {head.records} is not the one that was written")
        self._size = len(data) - len(torn)
        if torn:
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
            warnings.warn(
                f"{self.path}: the last record was torn, {len(torn)} bytes, and has been removed",
                AnswerLogRecoveryWarning,
                stacklevel=4,
            )

    def _corrupt(self, what: str, *, line: int | None = None) -> AnswerLogCorruptError:
        where = str(self.path) if line is None else f"{self.path}, line {line}"
        return AnswerLogCorruptError(what, where=where)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]

    def _undo(self) -> None:
        """Take a failed record back as far as the disk lets us: what stays is found on opening."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size)
        self.close()


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


class _Head(NamedTuple):
    """What the second file says."""

    records: int
    hash: str


def _head(count: int, digest: str) -> bytes:
    return f"{count} {digest}\n".encode()


def _read_head(path: Path) -> _Head | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    match = _HEAD.fullmatch(data)
    if match is None:
        raise AnswerLogCorruptError("it is not a number of records and a hash", where=str(path))
    return _Head(int(match[1]), match[2].decode())


def _link(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + b" " + body).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """Write a small file so that a reader, or a crash, sees the old or the new one, never half."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
