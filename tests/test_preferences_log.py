"""The log of answers: a kill loses at most the last one, and damage anywhere is found."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from preference_cases import fragments_with
from processes import fork

from birl_ext.errors import (
    AnswerLogCorruptError,
    AnswerLogRecoveryWarning,
    AnswerLogWriteError,
    ConfigError,
)
from birl_ext.preferences.answer_log import AnswerLog, fingerprints
from birl_ext.preferences.fragments import Pairs

TRIALS = 30


def head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def written(path: Path, count: int) -> list[dict]:
    answers = [{"label": [0, 0.5, 1, None][i % 4], "pair": [i, f"ü{i}"]} for i in range(count)]
    with AnswerLog(path) as log:
        for answer in answers[len(log) :]:
            log.append(answer)
    return answers


def read(path: Path) -> list[dict]:
    with AnswerLog(path) as log:
        return log.answers


def test_what_is_written_comes_back_over_several_sessions(tmp_path):
    path = tmp_path / "answers"
    assert read(path) == []
    for count in (0, 1, 2, 7):
        assert written(path, count) == read(path)


def test_the_format_is_what_its_description_says(tmp_path):
    """Read once more with nothing but hashlib and json."""
    path = tmp_path / "answers"
    answers = written(path, 5)
    top, *lines = path.read_bytes().splitlines(keepends=True)
    link = hashlib.sha256(top).hexdigest()
    for line, answer in zip(lines, answers, strict=True):
        digest, body = line.rstrip(b"\n").split(b" ", 1)
        link = hashlib.sha256(link.encode() + b" " + body).hexdigest()
        assert digest.decode() == link
        assert json.loads(body) == answer
    assert head_of(path).read_text() == f"5 {link}\n"


@pytest.mark.parametrize("name", ["answers", "answers.head"])
def test_a_change_of_any_byte_is_refused(tmp_path, name):
    path = tmp_path / "answers"
    written(path, 4)
    target = tmp_path / name
    data = target.read_bytes()
    for place in range(len(data)):
        for mask in (0x01, 0x20, 0x80):
            changed = bytearray(data)
            changed[place] ^= mask
            target.write_bytes(changed)
            with pytest.raises(AnswerLogCorruptError, match="BIRL-E705"):
                AnswerLog(path)
            assert target.read_bytes() == changed, "a refused log must not be touched"
    target.write_bytes(data)
    assert len(read(path)) == 4


@pytest.mark.parametrize("name", ["answers", "answers.head"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, name):
    path = tmp_path / "answers"
    written(path, 3)
    target = tmp_path / name
    data = target.read_bytes()
    for size in range(len(data)):
        target.write_bytes(data[:size])
        with pytest.raises(AnswerLogCorruptError):
            AnswerLog(path)
        assert target.read_bytes() == data[:size]


def test_bytes_taken_out_or_put_in_are_refused(tmp_path):
    path = tmp_path / "answers"
    written(path, 4)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    changes = {
        "a record taken out": lines[:2] + lines[3:],
        "two records swapped": [*lines[:2], lines[3], lines[2], lines[4]],
        "a record twice": [*lines[:3], lines[2], *lines[3:]],
        "the last record twice": [*lines, lines[-1]],
        "an empty line": [*lines, b"\n"],
        "a byte less": [data[:100], data[101:]],
    }
    for what, parts in changes.items():
        path.write_bytes(b"".join(parts))
        with pytest.raises(AnswerLogCorruptError):
            pytest.fail(f"{what}: {len(AnswerLog(path))} answers read")


def test_a_lost_file_is_refused(tmp_path):
    path = tmp_path / "answers"
    written(path, 2)
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(AnswerLogCorruptError):
        AnswerLog(path)
    path.write_bytes(data)
    head_of(path).unlink()
    with pytest.raises(AnswerLogCorruptError, match=r"answers\.head is missing"):
        AnswerLog(path)


def test_an_older_log_beside_a_newer_head_is_refused(tmp_path):
    path = tmp_path / "answers"
    written(path, 3)
    old = path.read_bytes()
    written(path, 4)
    path.write_bytes(old)
    with pytest.raises(AnswerLogCorruptError, match="3 whole records of 4 written"):
        AnswerLog(path)


def test_another_log_beside_the_head_is_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    written(one, 3)
    with AnswerLog(other) as log:
        for i in range(3):
            log.append({"label": 1, "pair": i})
    one.write_bytes(other.read_bytes())
    with pytest.raises(AnswerLogCorruptError, match="record 3 is not the one"):
        AnswerLog(one)


def test_a_torn_last_record_is_removed_with_a_warning(tmp_path):
    """Every state between two answers: k bytes of the record written, the head not replaced."""
    path = tmp_path / "answers"
    answers = written(path, 3)
    old, head = path.read_bytes(), head_of(path).read_bytes()
    written(path, 4)
    whole, full = path.read_bytes(), written(path, 4)
    for size in range(len(old), len(whole) + 1):
        path.write_bytes(whole[:size])
        head_of(path).write_bytes(head)
        if len(old) < size < len(whole):
            with pytest.warns(AnswerLogRecoveryWarning, match=f"{size - len(old)} bytes"):
                assert read(path) == answers
            assert path.read_bytes() == old
        else:
            assert read(path) == (answers if size == len(old) else full)
        assert written(path, 5) == read(path), "it goes on from there"


def test_a_kill_while_the_log_is_made_leaves_an_empty_one(tmp_path):
    path = tmp_path / "answers"
    written(path, 0)
    top = path.read_bytes()
    for size in range(len(top) + 1):
        head_of(path).unlink(missing_ok=True)
        path.write_bytes(top[:size])
        assert read(path) == []
        assert path.read_bytes() == top


def test_answers_survive_kills(tmp_path):
    """A child writes answers and says so; it is killed at a random moment; what it said is there,
    and at most one answer more."""
    path = tmp_path / "answers"
    moments = random.Random(0)
    total = 0
    for trial in range(TRIALS):
        receiver, sender = os.pipe()

        def work(sender=sender):
            with AnswerLog(path) as log:
                for number in range(len(log), 10**6):
                    log.append({"number": number, "padding": "x" * 2000})
                    os.write(sender, b".")

        child = fork(work)
        os.close(sender)
        try:
            assert os.read(receiver, 1) == b".", "the child could not write"
            time.sleep(moments.random() * 0.03)
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        said = 1
        while part := os.read(receiver, 1 << 16):
            said += len(part)
        os.close(receiver)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AnswerLogRecoveryWarning)
            answers = read(path)
        assert [answer["number"] for answer in answers] == list(range(len(answers)))
        assert total + said <= len(answers) <= total + said + 1, trial
        total = len(answers)
    assert total > TRIALS


class Killed(BaseException):
    """Stands for a kill: no clean-up that catches Exception runs."""


@pytest.mark.parametrize("kill", [False, True], ids=["ENOSPC", "killed"])
def test_a_failure_at_each_call_loses_nothing_acknowledged(tmp_path, monkeypatch, kill):
    """Each write, fsync and rename in turn fails, the writes half-way through."""
    calls = fail_at = 0

    def failing(function, partial=None):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at or (kill and calls > fail_at > 0):
                if partial and calls == fail_at:
                    partial(*args)
                raise Killed if kill else OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    plain = os.write
    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(
        os, "write", failing(plain, lambda f, data: plain(f, data[: len(data) // 2]))
    )
    monkeypatch.setattr(os, "ftruncate", failing(os.ftruncate))
    monkeypatch.setattr(Path, "replace", failing(Path.replace))
    monkeypatch.setattr(Path, "open", failing(Path.open))
    for k in range(1, 100):
        path = tmp_path / str(k)
        fail_at = 0
        written(path, 2)
        log = AnswerLog(path)
        calls, fail_at = 0, k
        try:
            log.append({"label": 1})
            acknowledged = 3
        except (AnswerLogWriteError, Killed):
            acknowledged = 2
        reached, fail_at = calls, 0
        log.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AnswerLogRecoveryWarning)
            found = len(read(path))
        assert acknowledged <= found <= 3, k
        if not kill and acknowledged == 2:
            assert found == 2, "an answer refused must not be there: it will be given again"
        assert read(path) == read(path)
        if reached < k:
            break
    assert k >= 5, "nothing failed"


def test_a_failed_log_takes_no_more_answers(tmp_path, monkeypatch):
    path = tmp_path / "answers"
    log = AnswerLog(path)
    log.append({"label": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda f: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(AnswerLogWriteError, match=r"answer 2 was not written: I/O error"):
            log.append({"label": 0})
    with pytest.raises(AnswerLogWriteError, match="the log is closed"):
        log.append({"label": 0})
    assert read(path) == [{"label": 1}]


def test_an_interrupted_log_takes_no_more_answers(tmp_path, monkeypatch):
    """Ctrl-C after the record, before its head: going on would break the chain."""
    path = tmp_path / "answers"
    log = AnswerLog(path)
    log.append({"label": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda f: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            log.append({"label": 0})
    with pytest.raises(AnswerLogWriteError, match="the log is closed"):
        log.append({"label": 0.5})
    assert read(path) == [{"label": 1}, {"label": 0}]


def test_every_answer_is_on_the_disk_before_it_is_acknowledged(tmp_path, monkeypatch):
    """The file itself is fsynced after its last byte and before its head is replaced."""
    path = tmp_path / "answers"
    log = AnswerLog(path)
    events = []
    sync, replace = os.fsync, Path.replace

    def watched(descriptor):
        events.append(
            (os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), path.stat().st_size)
        )
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append((b.name, 0)), replace(a, b)))
    for _ in range(3):
        events.clear()
        log.append({"label": 1})
        names = [name for name, _ in events]
        assert names == ["answers", ".answers.head.partial", "answers.head"]
        assert events[0][1] == path.stat().st_size
    log.close()


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "answers"
    with AnswerLog(path), pytest.raises(ConfigError, match="another process writes to this log"):
        AnswerLog(path)
    read(path)


def test_no_answer_holds_a_nan(tmp_path):
    with AnswerLog(tmp_path / "answers") as log:
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.append({"label": math.nan})
        log.append({"label": None})
    assert read(tmp_path / "answers") == [{"label": None}]


def test_a_stored_state_must_be_a_beginning_of_the_log(tmp_path):
    path = tmp_path / "answers"
    written(path, 3)
    with AnswerLog(path) as log:
        state = log.state_dict()
        log.append({"label": 1})
        later = log.state_dict()
        log.load_state_dict(state)  # answers given since stay
        assert len(log) == 4
    other = tmp_path / "other"
    written(other, 3)
    with AnswerLog(other) as log:
        log.load_state_dict(state)
        with pytest.raises(AnswerLogCorruptError, match="first 4 answers are not those"):
            log.load_state_dict(later)
        log.append({"label": 0})
        with pytest.raises(AnswerLogCorruptError, match="first 4 answers are not those"):
            log.load_state_dict(later)


def test_pairs_are_recorded_by_what_was_seen(tmp_path):
    first, second = (fragments_with(torch.zeros(3, 4)) for _ in range(2))
    first.present[2, 3] = False
    with AnswerLog(tmp_path / "answers") as log:
        log.record(Pairs(first, second, torch.tensor([1.0, math.nan, 0.5])))
        assert [answer["label"] for answer in log.answers] == [1, None, 0.5]
        assert [answer["first"] for answer in log.answers] == fingerprints(first)
    marks = fingerprints(first)
    assert len(set(marks + fingerprints(second))) == 6
    first.observation[2, 3] += 1  # padding
    first.reward.add_(1)  # never shown
    assert fingerprints(first) == marks
    first.observation[0, 3, 1] += 1e-6
    first.action[1, 0] = 1 - first.action[1, 0]
    changed = [a != b for a, b in zip(fingerprints(first), marks, strict=True)]
    assert changed == [True, True, False]


def test_a_run_that_goes_back_repeats_its_answers_and_adds_none(tmp_path):
    """Back to a checkpoint, or to the start: the same questions come again."""
    path = tmp_path / "answers"
    first, second = (fragments_with(torch.zeros(5, 4)) for _ in range(2))
    asked = Pairs(first, second, torch.tensor([1.0, 0.0, 0.5, math.nan, 1.0]))
    with AnswerLog(path) as log:
        log.record(asked.select(torch.arange(2)))
        state = log.state_dict()
        log.record(asked.select(torch.arange(2, 4)))
    whole = read(path)
    for back in (state, None):
        with AnswerLog(path) as log:
            if back is None:
                log.rewind()
            else:
                log.load_state_dict(back)
            log.record(asked.select(torch.arange(2 if back else 0, 4)))
            assert log.answers == whole
            assert log.state_dict()["answers"] == 4
    with AnswerLog(path) as log:
        log.load_state_dict(state)
        log.record(asked.select(torch.tensor([2, 3, 4])))  # two known ones, and one more
        assert len(log) == 5


def test_a_run_that_takes_another_course_leaves_the_answers_of_the_old_one(tmp_path):
    path = tmp_path / "answers"
    first, second = (fragments_with(torch.zeros(5, 4)) for _ in range(2))
    asked = Pairs(first, second, torch.tensor([1.0, 0.0, 0.5, math.nan, 1.0]))
    other = Pairs(first, second, torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0]))
    with AnswerLog(path) as log:
        log.record(asked)
        log.rewind()
        with pytest.warns(AnswerLogRecoveryWarning, match="after answer 3; the 2 answers"):
            log.record(other)
        found = log.answers
    assert [answer["label"] for answer in found] == [1, 0, 0.5, 0, 0]
    assert read(path) == found  # the file holds the same, and verifies
    fresh = tmp_path / "fresh"
    with AnswerLog(fresh) as log:
        log.record(other)
    assert path.read_bytes() == fresh.read_bytes()


def test_the_new_head_is_on_the_disk_before_old_answers_are_removed(tmp_path, monkeypatch):
    """Its name too, which the directory holds: a log shorter than its head says is refused."""
    path = tmp_path / "answers"
    first, second = (fragments_with(torch.zeros(4, 4)) for _ in range(2))
    asked = Pairs(first, second, torch.tensor([1.0, 0.0, 0.5, 1.0]))
    events = []
    sync, replace, truncate = os.fsync, Path.replace, os.ftruncate

    def synced(descriptor):
        events.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        sync(descriptor)

    with AnswerLog(path) as log:
        log.record(asked)
        log.rewind()
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(
            os, "ftruncate", lambda *given: (events.append("truncate"), truncate(*given))
        )
        monkeypatch.setattr(
            Path, "replace", lambda a, b: (events.append(f"rename {b.name}"), replace(a, b))
        )
        with pytest.warns(AnswerLogRecoveryWarning):
            log.record(Pairs(first, second, 1 - asked.label).select(torch.arange(1)))
    assert events[:5] == [
        "sync .answers.head.partial",
        "rename answers.head",
        f"sync {tmp_path.name}",
        "truncate",
        "sync answers",
    ]


def test_a_kill_while_old_answers_are_removed_leaves_a_whole_log(tmp_path, monkeypatch):
    path = tmp_path / "answers"
    first, second = (fragments_with(torch.zeros(4, 4)) for _ in range(2))
    asked = Pairs(first, second, torch.tensor([1.0, 0.0, 0.5, 1.0]))

    def killed(*given):
        raise KeyboardInterrupt

    with AnswerLog(path) as log:
        log.record(asked)
        log.rewind()
        monkeypatch.setattr(os, "ftruncate", killed)
        with pytest.raises(KeyboardInterrupt):
            log.record(Pairs(first, second, 1 - asked.label))
        monkeypatch.undo()
    assert [answer["label"] for answer in read(path)] == [1, 0, 0.5, 1]
