"""Checkpoints that survive a kill at any moment and hold data only, never code.

One checkpoint is one directory ``step-<step>.<attempt>``::

    tensors.pt      torch.save of a flat dict name -> tensor, read with weights_only=True
    state.json      plain values, with references into tensors.pt
    manifest.json   format, step, and the size and SHA-256 of the two files above

It is written under a temporary name, every file is fsynced, the manifest last; then the directory
is fsynced, renamed, and its parent fsynced. So a directory with its final name is complete, unless
the disk damaged it later, which the hashes show. Hashes prove integrity, not origin.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from birl_ext.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFallbackWarning,
    CheckpointIncompatibleError,
    CheckpointWriteError,
)
from birl_ext.runs.config import differences

__all__ = ["Checkpoint", "CheckpointStore"]

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.pt", "state.json", "manifest.json"
MAX_MANIFEST_BYTES = 1 << 16
_NAME = re.compile(r"step-(\d{1,18})\.(\d{1,6})")
_TEMPORARY = ".partial-"


class Checkpoint(NamedTuple):
    """A state read back.

    Args:
        path: the directory it came from.
        step: outer steps taken when it was written.
        seconds: time the run had used, over all its sessions.
        config: the plain config of the run.
        versions: package -> version that wrote it.
        metrics: digest of the metrics up to that step; empty where none was kept.
        state: the job's state, tensors on the CPU.
    """

    path: Path
    step: int
    seconds: float
    config: dict[str, Any]
    versions: dict[str, str]
    metrics: str
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run; the newest two are kept.

    Args:
        folder: the directory that holds them; created by the first `save`.
    """

    keep = 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: set[Path] = set()

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        config: Mapping[str, Any],
        versions: Mapping[str, str],
        seconds: float = 0.0,
        metrics: str = "",
    ) -> Path:
        """Write one checkpoint; when this returns it survives a crash, and not before.

        Raises:
            CheckpointWriteError: the disk refused; earlier checkpoints are untouched.
            CheckpointError: the state holds something that is neither a tensor nor plain data.
        """
        tensors: dict[str, Tensor] = {}
        document = {
            "step": step,
            "seconds": seconds,
            "config": dict(config),
            "versions": dict(versions),
            "metrics": metrics,
            "state": _encode(state, "", tensors),
        }
        temporary = self.folder / f"{_TEMPORARY}new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tidy()
            temporary.mkdir()
            files = {}
            with _DurableFile(temporary / TENSORS) as file:
                torch.save(tensors, cast(BinaryIO, file))
            files[TENSORS] = file.entry
            with _DurableFile(temporary / STATE) as file:
                file.write(json.dumps(document).encode())
            files[STATE] = file.entry
            with _DurableFile(temporary / MANIFEST) as file:
                manifest = {"format": FORMAT, "step": step, "files": files}
                file.write(json.dumps(manifest, indent=1).encode())
            _sync_directory(temporary)
            final = self._free_name(step)
            temporary.rename(final)
            _sync_directory(self.folder)
        except OSError as error:
            raise CheckpointWriteError(
                f"the checkpoint of step {step} was not written: {error.strerror or error}",
                where=str(self.folder),
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune()
        return final

    def load(self, config: Mapping[str, Any] | None = None) -> Checkpoint:
        """Read the newest checkpoint that verifies.

        Args:
            config: the plain config to resume with; None accepts any.

        Raises:
            CheckpointCorruptError: none verifies.
            CheckpointIncompatibleError: it was written for another config or a newer format.

        Warns:
            CheckpointFallbackWarning: for each damaged one passed over, naming the file.
        """
        reasons = []
        for path in self.paths():
            try:
                found = _read(path)
            except _DamagedError as damage:
                self._damaged.add(path)
                reasons.append(str(damage))
                warnings.warn(
                    f"damaged checkpoint passed over: {damage}",
                    CheckpointFallbackWarning,
                    stacklevel=2,
                )
                continue
            if config is not None and (changed := differences(found.config, config)):
                raise CheckpointIncompatibleError(
                    f"the configuration differs: {'; '.join(changed)}", where=str(path)
                )
            return found
        raise CheckpointCorruptError(
            "no intact checkpoint" + (f" ({'; '.join(reasons)})" if reasons else ""),
            where=str(self.folder),
        )

    def paths(self) -> list[Path]:
        """The checkpoint directories, newest first, whether intact or not."""
        if not self.folder.is_dir():
            return []
        matches = [(m, p) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name))]
        return [p for m, p in sorted(matches, key=lambda x: (-int(x[0][1]), -int(x[0][2])))]

    def tidy(self) -> None:
        """Remove what a kill left half written or half removed."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _free_name(self, step: int) -> Path:
        # A damaged checkpoint of the same step may lie there: never write over anything.
        taken = [int(p.name.rpartition(".")[2]) for p in self.paths() if _step(p) == step]
        return self.folder / f"step-{step:08d}.{max(taken, default=-1) + 1}"

    def _prune(self) -> None:
        # Damaged ones must not count as one of the two kept. Failing to delete does no harm.
        intact = [path for path in self.paths() if path not in self._damaged]
        for path in [*self._damaged, *intact[self.keep :]]:
            # Renamed first, so that a kill half-way leaves no half of a checkpoint behind.
            doomed = self.folder / f"{_TEMPORARY}{path.name}"
            try:
                path.rename(doomed)
            except OSError:
                continue
            shutil.rmtree(doomed, ignore_errors=True)
        self._damaged.clear()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-").partition(".")[0])


class _DurableFile:
    """A new file that hashes what is written and is on the disk once closed.

    The first failure is kept and raised on close: torch.save would report it as an internal error
    of its zip writer, a full disk and Ctrl-C alike.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._size = 0
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._size += len(view)
        try:
            rest = view
            while rest and self._error is None:
                rest = rest[self._file.write(rest) :]
        except BaseException as error:
            self._error = error
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered."""

    @property
    def entry(self) -> dict[str, Any]:
        return {"sha256": self._hash.hexdigest(), "bytes": self._size}

    def __enter__(self) -> _DurableFile:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            if self._error is not None:
                raise self._error
            os.fsync(self._file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _DamagedError(Exception):
    """One checkpoint does not verify; the message names the file."""


def _read(path: Path) -> Checkpoint:
    if path.is_symlink() or not path.is_dir():
        raise _DamagedError(f"{path} is not a directory")
    manifest = _parse_manifest(path / MANIFEST)
    with _verified(path / STATE, manifest["files"][STATE]) as file:
        try:
            document = json.load(file)
        except (ValueError, RecursionError):
            raise _DamagedError(f"{path / STATE} is not JSON") from None
    with _verified(path / TENSORS, manifest["files"][TENSORS]) as file:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises nearly anything here
            reason = str(error).partition("\n")[0]
            raise _DamagedError(f"{path / TENSORS} holds no plain tensors: {reason}") from None
    try:
        return Checkpoint(
            path=path,
            step=int(document["step"]),
            seconds=float(document["seconds"]),
            config=dict(document["config"]),
            versions=dict(document["versions"]),
            metrics=str(document.get("metrics", "")),
            state=_decode(document["state"], tensors),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _DamagedError(f"{path / STATE} does not describe a state") from None


def _parse_manifest(path: Path) -> dict[str, Any]:
    with _regular(path) as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    try:
        if len(data) > MAX_MANIFEST_BYTES:
            raise ValueError
        manifest = json.loads(data)
        version, files = manifest["format"], manifest["files"]
        if not isinstance(version, int):
            raise ValueError
        if version > FORMAT:
            raise CheckpointIncompatibleError(
                f"checkpoint format {version} is newer than this version reads",
                where=str(path),
                allowed=f"up to {FORMAT}",
                fix="upgrade birl_ext",
            )
        # Only these two names are ever opened, so a manifest cannot lead out of its directory.
        if set(files) != {TENSORS, STATE}:
            unexpected = sorted(set(files) ^ {TENSORS, STATE})
            raise _DamagedError(f"{path} should name {TENSORS} and {STATE} only: {unexpected}")
        for entry in files.values():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _DamagedError(f"{path} is not a manifest") from None
    return cast("dict[str, Any]", manifest)


def _regular(path: Path) -> BufferedReader:
    """Open a regular file, following no link."""
    try:
        # O_NONBLOCK: opening a planted FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _DamagedError(f"{path}: {error.strerror}") from None
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise _DamagedError(f"{path} is not a regular file")
    return file


def _verified(path: Path, entry: Mapping[str, Any]) -> BufferedReader:
    """Open a file whose size and hash match its manifest entry."""
    file = _regular(path)
    try:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise _DamagedError(f"{path} has {size} bytes, the manifest says {entry['bytes']}")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise _DamagedError(f"{path} does not match its hash")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


# The state as JSON: plain values stand for themselves, everything else is a one-key dict whose key
# starts with "$"; a dict with such a key, or with keys that are not str, is written as its items.


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _compact(value)
        return {"$tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {k: _encode(item, f"{where}.{k}", tensors) for k, item in value.items()}
        pairs = [(k, v, f"{where}.{k}") for k, v in value.items()]
        return {
            "$items": [[_encode(k, at, tensors), _encode(v, at, tensors)] for k, v, at in pairs]
        }
    raise CheckpointError(
        f"a state cannot hold a {type(value).__name__}",
        where=f"state{where}",
        allowed="tensors, bool, int, float, str, None, and dicts, lists and tuples of them",
        fix="return tensors and plain values from state_dict()",
    )


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, owning no more storage than it shows."""
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        return tensor
    shown = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == shown else tensor.clone()


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), None):
        case ("$tensor", name):
            tensor = tensors[name]
            if not isinstance(tensor, Tensor):
                raise TypeError(name)
            return tensor
        case ("$tuple", items):
            return tuple(_decode(item, tensors) for item in items)
        case ("$items", items):
            return {_decode(key, tensors): _decode(item, tensors) for key, item in items}
    return {key: _decode(item, tensors) for key, item in value.items()}
