"""Checkpoints: what is written comes back, a kill loses nothing, damage is found, no code runs."""

from __future__ import annotations

import enum
import errno
import hashlib
import io
import math
import os
import pickle
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import fork

from birl_ext.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFallbackWarning,
    CheckpointIncompatibleError,
    CheckpointWriteError,
)
from birl_ext.runs.checkpoint import CheckpointStore

CONFIG = {"rate": 0.1, "seed": 0}


def state_of(step: int) -> dict:
    """A state that can be recognised as the one of its step."""
    return {"x": torch.arange(400, dtype=torch.float64) + step, "step": step}


def save(store: CheckpointStore, step: int, state: dict | None = None) -> Path:
    state = state_of(step) if state is None else state
    return store.save(state, step=step, config=CONFIG, versions={}, seconds=float(step))


def assert_intact(store: CheckpointStore, *, at_least: int, at_most: int) -> None:
    found = store.load(CONFIG)
    assert at_least <= found.step <= at_most
    assert found.state["step"] == found.step
    assert torch.equal(found.state["x"], state_of(found.step)["x"])


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.fixture
def two(store: CheckpointStore) -> CheckpointStore:
    """A store with the steps 1 and 2."""
    save(store, 1)
    save(store, 2)
    return store


# What comes back


def test_values_and_structure_come_back(store):
    state: dict[str, Any] = {
        "float": 0.1,
        "nan": math.nan,
        "inf": -math.inf,
        "int": 2**70,
        "bool": True,
        "none": None,
        "text": "τ = ½\n\0",
        "nested": {"list": [1, [2.5, "x"]], "tuple": (1, (2, 3)), "empty": {}, "none": []},
        "int keys": {0: {"step": torch.tensor(3.0)}, (1, "a"): None},
        "$tensor": {"$tuple": 1},
    }
    save(store, 7, state)
    found = store.load()
    assert math.isnan(found.state.pop("nan"))
    assert math.isnan(state.pop("nan"))
    assert torch.equal(found.state["int keys"].pop(0)["step"], state["int keys"].pop(0)["step"])
    assert found.state == state
    assert isinstance(found.state["nested"]["tuple"], tuple)
    assert found.state["bool"] is True
    assert (found.step, found.seconds, found.config) == (7, 7.0, CONFIG)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-310], dtype=torch.float64),
        torch.randn(3, 4).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.uint8),
        torch.zeros(0, 3),
        torch.tensor(5),
        torch.randn(4, 6)[:, ::2].t(),
        torch.randn(3, 1).expand(3, 5),
        torch.randn(2, requires_grad=True),
        torch.eye(3).to_sparse(),
    ],
    ids=[
        "special",
        "bf16",
        "bool",
        "uint8",
        "empty",
        "scalar",
        "strided",
        "expanded",
        "leaf",
        "sparse",
    ],
)
def test_tensors_come_back_bit_for_bit(store, tensor):
    save(store, 1, {"tensor": tensor})
    back = store.load().state["tensor"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert not back.requires_grad
    if tensor.layout is torch.strided:
        bits = torch.uint8
        assert torch.equal(
            back.contiguous().reshape(-1).view(bits),
            tensor.detach().contiguous().reshape(-1).view(bits),
        )
    else:
        assert torch.equal(back.to_dense(), tensor.to_dense())


def test_a_view_does_not_drag_its_storage_along(store):
    path = save(store, 1, {"view": torch.zeros(1_000_000)[:10]})
    assert path.stat().st_size < 10_000


class Kind(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    ONE = "one"


class Own(torch.Tensor):
    pass


def test_what_is_a_number_a_text_or_a_tensor_comes_back_as_one(store):
    """Also of types that torch.load would not make."""
    tensor = torch.ones(2).as_subclass(Own)
    save(store, 1, {"a": np.float64(0.1), "b": Kind.ONE, "c": Word.ONE, "d": tensor})
    state = store.load().state
    assert [type(value) for value in state.values()] == [float, int, str, torch.Tensor]
    assert (state["a"], state["b"], state["c"]) == (0.1, 1, "one")


@pytest.mark.parametrize("value", [{2}, b"x", 2**2000, np.int64(1), Own], ids=str)
def test_what_is_not_data_is_refused_by_name(store, value):
    with pytest.raises(CheckpointError, match=rf"{type(value).__name__} at state\.a\[1\]"):
        save(store, 1, {"a": [1, value]})
    assert store.paths() == []


def names(store: CheckpointStore) -> list[str]:
    """Without the hashes."""
    return [path.name.partition("-")[2].partition("-")[0] for path in store.paths()]


def test_the_newest_two_are_kept(store):
    for step in (1, 2, 10**8, 10**8 - 1):
        save(store, step)
    (store.folder / "step-1.pt").touch()  # none of ours
    assert names(store) == ["100000000.0", "99999999.0"]


def test_the_name_says_what_the_bytes_are(store):
    path = save(store, 3)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert os.listdir(store.folder) == [path.name] == [f"step-00000003.0-{digest}.pt"]
    assert torch.load(path, weights_only=True)["state"]["step"] == 3


def test_there_is_no_checkpoint(store):
    assert store.paths() == []
    with pytest.raises(CheckpointCorruptError, match="no intact checkpoint"):
        store.load()


# Kills and failing disks


def test_an_old_one_goes_after_the_new_one_is_durable(two, monkeypatch):
    log: list[str] = []

    def logged(what: str, function):
        def call(*args, **kwargs):
            log.append(what)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", logged("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", logged("name", Path.replace))
    monkeypatch.setattr(Path, "unlink", logged("remove", Path.unlink))
    save(two, 3)
    # the draft's own removal finds nothing
    assert log == ["fsync", "name", "fsync", "remove", "remove"]


class Killed(BaseException):
    """Stands for the end of the process: nothing that follows it runs."""


@pytest.mark.parametrize("kill", [False, True], ids=["ENOSPC", "killed"])
def test_a_failure_at_each_call_leaves_the_previous_checkpoint(tmp_path, monkeypatch, kill):
    calls = 0
    fail_at = 0

    def failing(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at or (kill and calls > fail_at > 0):
                raise Killed if kill else OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "replace", failing(Path.replace))
    monkeypatch.setattr(Path, "mkdir", failing(Path.mkdir))
    monkeypatch.setattr(Path, "open", failing(Path.open))
    monkeypatch.setattr(torch, "save", failing(torch.save))
    if kill:
        monkeypatch.setattr(Path, "unlink", failing(Path.unlink))
    failures = 0
    for k in range(1, 100):
        store = CheckpointStore(tmp_path / str(k))
        fail_at = 0
        save(store, 1)
        save(store, 2)
        calls, fail_at = 0, k
        try:
            save(store, 3)
            acknowledged = 3
        except (CheckpointWriteError, Killed):
            acknowledged = 2
            failures += 1
        reached, fail_at = calls, 0
        assert_intact(store, at_least=acknowledged, at_most=3)
        save(store, 4)
        assert_intact(store, at_least=4, at_most=4)
        assert kill or not list(store.folder.glob(".partial*"))
        if reached < k:
            break
    else:
        pytest.fail("a save makes fewer than 100 calls")
    assert failures >= 7


@pytest.mark.parametrize("limit", [0, 1, 100, 1000, 3000, 4000])
def test_a_full_disk_leaves_the_previous_checkpoint(two, limit):
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointWriteError, match=r"BIRL-E704.*step 3.*File too large"):
            save(two, 3)
        assert not list(two.folder.glob(".partial*"))

    _, status = os.waitpid(fork(work), 0)
    assert status == 0
    assert_intact(two, at_least=2, at_most=2)


def test_ctrl_c_while_writing_is_not_taken_for_a_full_disk(two, monkeypatch):
    """At some of the writes torch.save would call it an error of its own."""
    left = 0

    class Interrupted(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return super().write(data)

    for place in range(1, 30):
        left = place
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, mode, **_: Interrupted(path, mode.strip("b")))
            with pytest.raises(KeyboardInterrupt):
                save(two, 3)
        assert len(os.listdir(two.folder)) == 2
    assert_intact(two, at_least=2, at_most=2)


# Damage


def replace_with(two: CheckpointStore, data: bytes) -> Path:
    """Exchange the newest one for a file whose name fits its bytes."""
    two.paths()[0].unlink()
    path = two.folder / f"step-00000002.0-{hashlib.sha256(data).hexdigest()}.pt"
    path.write_bytes(data)
    return path


def assert_passed_over(two: CheckpointStore, why: str) -> None:
    """The newest checkpoint, with a warning that names it and says why."""
    message = f"{re.escape(str(two.paths()[0]))}: .*{why}"
    with pytest.warns(CheckpointFallbackWarning, match=message):
        found = CheckpointStore(two.folder).load(CONFIG)
    assert found.step == 1
    assert torch.equal(found.state["x"], state_of(1)["x"])


@pytest.mark.parametrize("change", [lambda x: b"", lambda x: x[:-1], lambda x: x[:-1] + b"x"])
def test_a_changed_file_falls_back(two, change):
    """Changes of every kind and place are made in test_damage.py."""
    path = two.paths()[0]
    path.write_bytes(change(path.read_bytes()))
    assert_passed_over(two, "does not match the hash in its name")


def test_a_link_a_pipe_or_a_folder_in_place_of_the_file_is_passed_over(two, tmp_path):
    path = two.paths()[0]
    path.rename(tmp_path / "elsewhere")
    for plant in (lambda: path.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(path)):
        plant()
        assert_passed_over(two, "not a regular file")
        path.unlink()
    path.mkdir()
    assert_passed_over(two, "not a regular file")


def test_nothing_intact_says_what_is_wrong_with_each(two):
    for path in two.paths():
        path.write_bytes(b"")
    with (
        pytest.warns(CheckpointFallbackWarning),
        pytest.raises(CheckpointCorruptError, match=r"00002\.0-.*00001\.0-"),
    ):
        two.load()


def test_damaged_ones_do_not_count_among_the_two_kept(two):
    two.paths()[0].write_bytes(b"")
    with pytest.warns(CheckpointFallbackWarning):
        two.load()
    save(two, 2)
    assert names(two) == ["00000002.1", "00000001.0"]
    assert_intact(two, at_least=2, at_most=2)


# Malice, under a name that fits


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_does_not_run(two, tmp_path):
    mark = tmp_path / "it ran"
    replace_with(two, pickle.dumps(Bomb(mark), protocol=2))
    assert_passed_over(two, "Weights only load failed")
    torch.save({"state": Bomb(mark)}, tmp_path / "bomb.pt")
    replace_with(two, (tmp_path / "bomb.pt").read_bytes())
    assert_passed_over(two, "Weights only load failed")
    assert not mark.exists()


WHOLE = {"format": 2, "step": 2, "seconds": 0.0, "config": {}, "versions": {}, "metrics": ""}


@pytest.mark.parametrize(
    "document",
    [
        [],
        torch.zeros(3),
        WHOLE,
        {**WHOLE, "state": 4},
        {**WHOLE, "state": {}, "step": "x"},
        {**WHOLE, "state": {}, "config": 1},
    ],
    ids=str,
)
def test_a_strange_document_falls_back(two, document):
    file = io.BytesIO()
    torch.save(document, file)
    replace_with(two, file.getvalue())
    assert_passed_over(two, "")


# Compatibility


def test_another_configuration_is_refused_with_the_differences(two):
    with pytest.raises(CheckpointIncompatibleError) as caught:
        two.load({"rate": 0.2, "seed": 0, "cost": {"kind": "linear"}})
    message = str(caught.value)
    assert "rate: stored 0.1, given 0.2" in message
    assert "cost: stored absent, given {'kind': 'linear'}" in message
    assert "seed" not in message


def test_another_format_is_refused(two):
    file = io.BytesIO()
    torch.save({**WHOLE, "state": {}, "format": 3}, file)
    path = replace_with(two, file.getvalue())
    with pytest.raises(CheckpointIncompatibleError, match=f"format 3 is not .*{path.name}"):
        two.load()
