"""The log of answers: a kill loses none that was acknowledged, and damage anywhere is found."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import resource
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from cases import untyped
from preference_cases import fragments_with
from processes import fork

from birl_ext.errors import (
    AnswerLogCorruptError,
    AnswerLogRecoveryWarning,
    AnswerLogWriteError,
    ConfigError,
    OptionError,
)
from birl_ext.preferences.answer_log import AnswerLog, fingerprints
from birl_ext.preferences.fragments import Pairs

TRIALS = 30


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
    """Read once more with nothing but sqlite3, hashlib and json."""
    path = tmp_path / "answers"
    answers = written(path, 5)
    link = hashlib.sha256(b"birl_ext answers").hexdigest()
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT id, answer, hash FROM answers ORDER BY id").fetchall()
        assert database.execute("PRAGMA user_version").fetchone() == (5,)
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), 1):
        link = hashlib.sha256(f"{link} {row[1]}".encode()).hexdigest()
        assert (row[0], json.loads(row[1]), row[2]) == (number, answer, link)


CHANGES = {
    "UPDATE answers SET answer = replace(answer, '0.5', '1.0') WHERE id = 2": "answer 2 does not",
    "UPDATE answers SET answer = x'00' WHERE id = 2": "answer 2 does not match",
    "UPDATE answers SET hash = replace(hash, 'a', 'b') WHERE id = 3": "answer 3 does not match",
    "DELETE FROM answers WHERE id = 2": "answer 2 does not match",
    "DELETE FROM answers WHERE id = 4": "3 answers of 4 written",
    "DELETE FROM answers": "0 answers of 4 written",
    "INSERT INTO answers SELECT 5, answer, hash FROM answers WHERE id = 4": "answer 5 does not",
    "UPDATE answers SET id = 5 WHERE id = 4": "answer 4 does not match",
    "PRAGMA user_version = 3": "4 answers of 3 written",
    "DROP TABLE answers": "no such table",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_log_is_refused_and_not_touched(tmp_path, change):
    """Changes to its bytes are made in test_damage.py."""
    path = tmp_path / "answers"
    written(path, 4)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(change)
    before = path.read_bytes()
    with pytest.raises(AnswerLogCorruptError, match=f"BIRL-E705.*{CHANGES[change]}"):
        AnswerLog(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"birl_ext answers 1\n", b"\0" * 4096], ids=len)
def test_what_is_no_log_is_refused(tmp_path, content):
    path = tmp_path / "answers"
    path.write_bytes(content)
    with pytest.raises(AnswerLogCorruptError, match=str(path)):
        AnswerLog(path)
    assert path.read_bytes() == content


def test_a_record_that_is_no_object_is_refused(tmp_path):
    path = tmp_path / "answers"
    for text in ("1", "[" * 100_000, "{"):
        path.unlink(missing_ok=True)
        written(path, 0)
        link = hashlib.sha256(b"birl_ext answers").hexdigest()
        link = hashlib.sha256(f"{link} {text}".encode()).hexdigest()
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("INSERT INTO answers VALUES (1, ?, ?)", (text, link))
            database.execute("PRAGMA user_version = 1")
        with pytest.raises(AnswerLogCorruptError):
            AnswerLog(path)


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
        answers = read(path)
        assert [answer["number"] for answer in answers] == list(range(len(answers)))
        assert total + said <= len(answers) <= total + said + 1, trial
        total = len(answers)
    assert total > TRIALS


STATEMENTS = ("BEGIN", "DELETE", "INSERT", "PRAGMA user_version", "COMMIT")


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_kill_anywhere_in_a_batch_leaves_the_old_log(tmp_path, statement):
    """Here in one that also removes the answers of a course that was left."""
    path = tmp_path / "answers"
    first, second = (fragments_with(torch.zeros(4, 4)) for _ in range(2))
    asked = Pairs(first, second, torch.tensor([1.0, 0.0, 0.5, 1.0]))
    with AnswerLog(path) as log:
        log.record(asked)

    def work() -> None:
        def kill(text: str) -> None:
            if text.startswith(statement):
                os.kill(os.getpid(), signal.SIGKILL)

        log = AnswerLog(path)
        log.rewind()
        log._database.set_trace_callback(kill)
        log.record(Pairs(first, second, 1 - asked.label))

    _, status = os.waitpid(fork(work), 0)
    assert os.WIFSIGNALED(status)
    assert [answer["label"] for answer in read(path)] == [1, 0, 0.5, 1]


def test_a_full_disk_loses_no_answer_and_the_log_goes_on(tmp_path):
    path = tmp_path / "answers"
    answers = written(path, 3)

    def work() -> None:
        with AnswerLog(path) as log:
            most = path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            with pytest.raises(AnswerLogWriteError, match=r"BIRL-E706 answer 4 was not written"):
                log.append({"label": 0, "padding": "x" * 10_000})
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert log.answers == answers
            log.append({"label": 1})

    _, status = os.waitpid(fork(work), 0)
    assert status == 0
    assert read(path) == [*answers, {"label": 1}]


def test_after_an_interrupt_the_answer_is_given_again(tmp_path, monkeypatch):
    """Ctrl-C when it is on the disk, and nobody has been told so."""

    class Interrupted:
        def __init__(self, database: sqlite3.Connection) -> None:
            self.database = database

        def __enter__(self) -> sqlite3.Connection:
            return self.database.__enter__()

        def __exit__(self, *exception: object) -> None:
            self.database.__exit__(None, None, None)
            raise KeyboardInterrupt

    path = tmp_path / "answers"
    with AnswerLog(path) as log:
        log.append({"label": 1})
        with monkeypatch.context() as patch:
            patch.setattr(log, "_database", Interrupted(log._database))
            with pytest.raises(KeyboardInterrupt):
                log.append({"label": 0})
        log.append({"label": 0.5})
    assert read(path) == [{"label": 1}, {"label": 0.5}]


def test_every_commit_is_on_the_disk_before_it_is_acknowledged(tmp_path):
    """SQLite's word for it: files and folder are synchronised, and the journal is not the log."""
    with AnswerLog(tmp_path / "answers") as log:
        assert log._database.execute("PRAGMA synchronous").fetchone() == (3,)
        assert log._database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_closed_log_takes_no_answers(tmp_path):
    log = AnswerLog(tmp_path / "answers")
    log.close()
    log.close()
    with pytest.raises(AnswerLogWriteError, match=r"closed database.*Fix: open the log again"):
        log.append({"label": 0})


def test_a_log_is_a_file(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path, tmp_path / "file" / "answers"):
        with pytest.raises(ConfigError, match=rf"E801 no log can be opened: .*{path}.*a file"):
            AnswerLog(path)
    with AnswerLog(str(tmp_path / "answers")) as log:
        assert log.path == tmp_path / "answers"


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "answers"
    with AnswerLog(path), pytest.raises(ConfigError, match="another process writes to this log"):
        AnswerLog(path)
    read(path)


def test_a_log_that_another_program_changes_is_not_called_corrupt(tmp_path):
    path = tmp_path / "answers"
    written(path, 1)
    with closing(sqlite3.connect(path)) as database:
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match=f"database is locked at {path}"):
            AnswerLog(path)
        database.rollback()
        database.execute("SELECT * FROM answers").fetchone()  # and may read meanwhile
        assert len(written(path, 2)) == 2


def test_no_answer_holds_a_nan(tmp_path):
    with AnswerLog(tmp_path / "answers") as log:
        for wrong in ({"label": math.nan}, {"label": {1}}, {1: 2, "a": 3}, 3, [3]):
            with pytest.raises(OptionError, match="the answer is no JSON data"):
                log.append(untyped(wrong))
        with pytest.raises(OptionError, match="pairs is a dict"):
            log.record(untyped({"label": 1.0}))
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
        for wrong in ({}, None, {**state, "answers": -2}, {**state, "answers": "3"}):
            with pytest.raises(AnswerLogCorruptError, match="are not those of the stored state"):
                log.load_state_dict(untyped(wrong))
        assert log.state_dict() == state
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


def test_known_answers_are_found_up_to_another_question(tmp_path):
    first, second = (fragments_with(torch.zeros(5, 4)) for _ in range(2))
    asked = Pairs(first, second, torch.tensor([1.0, math.nan, 0.5, 0.0, 1.0]))
    with AnswerLog(tmp_path / "answers") as log:
        log.record(asked.select(torch.arange(4)))
        assert len(log.answered(first, second)) == 0  # it is at its end
        log.rewind()
        found = log.answered(first, second)
        assert found.tolist() == pytest.approx([1, math.nan, 0.5, 0], nan_ok=True)
        second.observation[1, 0] += 1
        assert log.answered(first, second).tolist() == [1]
        assert log.answered(second, first).tolist() == []


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
