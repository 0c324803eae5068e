"""Durable files: whole or not there, in the right order, one writer at a time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from processes import fork

from birl_ext.errors import ConfigError
from birl_ext.files import PARTIAL, locked, replacing, tidy


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch
):
    log: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        log.append(f"fsync {place.name}, {place.stat().st_size if place.is_file() else 'folder'}")
        fsync(descriptor)

    def logged_replace(self: Path, target: Path) -> Path:
        log.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    with replacing(tmp_path / "x.txt") as draft:
        draft.write_text("1234")
        assert draft.parent == tmp_path
        assert draft.suffix == ".txt"
        assert not log
    assert log == [f"fsync {draft.name}, 4", "rename to x.txt", f"fsync {tmp_path.name}, folder"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_raises_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch, error):
    def fail(descriptor: int) -> None:
        raise error

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error), replacing(tmp_path / "x") as draft:
        draft.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    with replacing(tmp_path / "x") as one, replacing(tmp_path / "x") as other:
        one.write_text("one")
        other.write_text("other")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["one"]


def test_drafts_that_a_kill_has_left_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "x").touch()
    (tmp_path / f"{PARTIAL}x").touch()
    (tmp_path / f"{PARTIAL}link").symlink_to(tmp_path / "x")
    (tmp_path / f"{PARTIAL}folder").mkdir()  # none of ours
    tidy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f"{PARTIAL}folder", "x"]
    tidy(tmp_path / "absent")


def test_a_lock_is_held_by_one_and_let_go_of_by_the_system(tmp_path):
    path = tmp_path / ".lock"

    def work() -> None:
        with locked(path, "works here"):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = fork(work)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with (
        pytest.raises(ConfigError, match=rf"another process works here at {tmp_path}\. Fix: wait"),
        locked(path, "works here"),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with (
        locked(path, "works here"),
        pytest.raises(ConfigError),
        locked(path, "works here"),  # nor twice by one process
    ):
        pass
    with locked(path, "works here"):
        pass
