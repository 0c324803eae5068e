"""Checkpoints: what is written comes back, a kill loses nothing, damage is found, no code runs."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

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
FILES = ("tensors.pt", "state.json", "manifest.json")


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
    state = {
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
    assert (path / "tensors.pt").stat().st_size < 10_000


def test_what_is_not_data_is_refused_by_name(store):
    with pytest.raises(CheckpointError, match=r"set.*state\.a\[1\]"):
        save(store, 1, {"a": [1, {2}]})
    assert store.paths() == []


def test_the_newest_two_are_kept(store):
    for step in (1, 2, 10, 9):
        save(store, step)
    assert [path.name for path in store.paths()] == ["step-00000010.0", "step-00000009.0"]


def test_there_is_no_checkpoint(store):
    assert store.paths() == []
    with pytest.raises(CheckpointCorruptError, match="no intact checkpoint"):
        store.load()


# Kills and failing disks


def test_files_are_durable_before_the_rename_and_the_rename_before_the_return(two, monkeypatch):
    log: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def logged_rename(self: Path, target: Path) -> Path:
        log.append(f"rename {self.name} {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    save(two, 3)
    assert log == [
        "fsync tensors.pt",
        "fsync state.json",
        "fsync manifest.json",
        "fsync .partial-new",
        "rename .partial-new step-00000003.0",
        "fsync checkpoints",
        "rename step-00000001.0 .partial-step-00000001.0",
    ]


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
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    monkeypatch.setattr(Path, "mkdir", failing(Path.mkdir))
    monkeypatch.setattr(Path, "open", failing(Path.open))
    if kill:
        monkeypatch.setattr(shutil, "rmtree", failing(shutil.rmtree))
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
        assert not list(store.folder.glob(".partial*"))
        if reached < k:
            break
    else:
        pytest.fail("a save makes fewer than 100 calls")
    assert failures >= 9


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


@pytest.fixture
def fast_store() -> Iterator[CheckpointStore]:
    """In memory where there is such a disk: a kill, unlike a power cut, spares the page cache."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield CheckpointStore(Path(folder) / "checkpoints")


def test_kill_9_never_loses_an_acknowledged_checkpoint(fast_store):
    store = fast_store
    generator = random.Random(0)
    started = time.perf_counter()
    for step in range(1, 21):
        save(store, step)
    per_save = (time.perf_counter() - started) / 20
    step, lost_work = 20, 0
    for _ in range(200):
        reader, writer = os.pipe()

        def work(first: int = step + 1, writer: int = writer) -> None:
            for step in range(first, first + 1000):
                save(CheckpointStore(store.folder), step)
                os.write(writer, struct.pack("q", step))

        child = fork(work)
        os.close(writer)
        time.sleep(generator.uniform(0, 2.5 * per_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            acknowledged = [step, *(entry[0] for entry in struct.iter_unpack("q", pipe.read()))]
        lost_work += bool(list(store.folder.glob(".partial*")))
        # The kill may fall between the rename and the acknowledgement: one more is right as well.
        assert_intact(store, at_least=acknowledged[-1], at_most=acknowledged[-1] + 1)
        step = store.load().step
    assert lost_work > 20, "the kills did not fall inside the writing"


# Damage


def damaged_at(two: CheckpointStore, name: str) -> None:
    """The newest checkpoint is passed over with a warning that names the file."""
    with pytest.warns(CheckpointFallbackWarning, match=f"step-00000002.0/{name}"):
        found = CheckpointStore(two.folder).load(CONFIG)
    assert found.step == 1
    assert torch.equal(found.state["x"], state_of(1)["x"])


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_falls_back(two, name):
    path = two.paths()[0] / name
    content = path.read_bytes()
    for size in sorted({0, 1, len(content) - 1, *range(0, len(content), len(content) // 60 + 1)}):
        path.write_bytes(content[:size])
        told = (
            ""
            if name == "manifest.json"
            else f" has {size} bytes, the manifest says {len(content)}"
        )
        damaged_at(two, name + told)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_falls_back(two, name):
    path = two.paths()[0] / name
    content = path.read_bytes()
    generator = random.Random(name)
    harmless = 0
    for offset in sorted({0, len(content) - 1, *range(0, len(content), len(content) // 60 + 1)}):
        spoiled = bytearray(content)
        spoiled[offset] ^= 1 << generator.randrange(8)
        path.write_bytes(spoiled)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            found = CheckpointStore(two.folder).load()
        # The manifest has no hash of its own: a bit in its white space may change nothing.
        harmless += found.step == 2
        assert torch.equal(found.state["x"], state_of(found.step)["x"])
    assert harmless <= (15 if name == "manifest.json" else 0)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_falls_back(two, name):
    (two.paths()[0] / name).unlink()
    damaged_at(two, name)


@pytest.mark.parametrize("name", ["tensors.pt", "state.json"])
def test_a_link_or_a_pipe_in_place_of_a_file_is_not_followed(two, tmp_path, name):
    path = two.paths()[0] / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    damaged_at(two, name)
    path.unlink()
    os.mkfifo(path)
    damaged_at(two, name)


def test_nothing_intact_says_what_is_wrong_with_each(two):
    for path in two.paths():
        (path / "tensors.pt").write_bytes(b"")
    with (
        pytest.warns(CheckpointFallbackWarning),
        pytest.raises(CheckpointCorruptError, match=r"00002\.0/tensors.*00001\.0/tensors"),
    ):
        two.load()


def test_damaged_ones_do_not_count_among_the_two_kept(two):
    (two.paths()[0] / "state.json").write_bytes(b"{}")
    with pytest.warns(CheckpointFallbackWarning):
        two.load()
    save(two, 2)
    assert [path.name for path in two.paths()] == ["step-00000002.1", "step-00000001.0"]
    assert_intact(two, at_least=2, at_most=2)


# Malice


def replace_file(store: CheckpointStore, name: str, data: bytes) -> None:
    """Exchange a file of the newest checkpoint and make its manifest agree."""
    folder = store.paths()[0]
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest["files"][name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_a_right_hash_does_not_run(two, tmp_path):
    mark = tmp_path / "it ran"
    replace_file(two, "tensors.pt", pickle.dumps(Bomb(mark), protocol=2))
    damaged_at(two, "tensors.pt")
    torch.save({"0": Bomb(mark)}, tmp_path / "bomb.pt")
    replace_file(two, "tensors.pt", (tmp_path / "bomb.pt").read_bytes())
    damaged_at(two, "tensors.pt")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/x", "..", "extra.json"])
def test_a_manifest_cannot_lead_out_of_its_directory(two, name):
    folder = two.paths()[0]
    (folder.parent / "outside").write_bytes(b"")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    damaged_at(two, "manifest.json")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        "[" * 50_000,
        '{"format": "1", "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"tensors.pt": 3, "state.json": 4}}',
        '{"format": 1, "files": {"tensors.pt": {"bytes": "3", "sha256": 4}, "state.json": {}}}',
        " " * 70_000,
    ],
)
def test_a_strange_manifest_falls_back(two, text):
    (two.paths()[0] / "manifest.json").write_text(text)
    damaged_at(two, "manifest.json")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 50_000,
        "{}",
        '{"step": 2, "seconds": 0, "config": {}, "versions": {}, "state": {"$tensor": "9"}}',
        '{"step": 2, "seconds": 0, "config": {}, "versions": {}, "state": {"$tensor": ["0"]}}',
        '{"step": 2, "seconds": 0, "config": {}, "versions": {}, "state": {"$items": [1]}}',
        '{"step": 2, "seconds": 0, "config": {}, "versions": {}, "state": {"$tuple": 4}}',
        '{"step": "x", "seconds": 0, "config": {}, "versions": {}, "state": {}}',
        '{"step": 2, "seconds": 0, "config": 1, "versions": {}, "state": {}}',
    ],
)
def test_a_strange_state_with_a_right_hash_falls_back(two, text):
    replace_file(two, "state.json", text.encode())
    damaged_at(two, "state.json")


# Compatibility


def test_another_configuration_is_refused_with_the_differences(two):
    with pytest.raises(CheckpointIncompatibleError) as caught:
        two.load({"rate": 0.2, "seed": 0, "cost": {"kind": "linear"}})
    message = str(caught.value)
    assert "rate: stored 0.1, given 0.2" in message
    assert "cost: stored absent, given {'kind': 'linear'}" in message
    assert "seed" not in message


def test_a_newer_format_is_refused(two):
    path = two.paths()[0] / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointIncompatibleError, match="format 2 is newer"):
        two.load()
