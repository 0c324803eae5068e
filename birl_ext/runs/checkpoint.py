"""Checkpoints that survive a kill at any moment and hold data only, never code.

One checkpoint is one file, ``step-<step>.<attempt>-<SHA-256 of its bytes>.pt``, read with
weights_only=True. It is hashed while it is written, and named once it is on the disk: a file with
such a name is complete, unless the disk damaged it later, which the hash shows. torch.load itself
notices no flipped bit. Hashes prove integrity, not origin.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import stat
from collections.abc import Collection, Mapping
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
    warn,
)
from birl_ext.files import draft_beside, put
from birl_ext.runs.config import differences

__all__ = ["Checkpoint", "CheckpointStore"]

FORMAT = 2
MAX_BITS = 2000
"""Of an integer: what is longer is written, but not read with weights_only."""
_NAME = re.compile(r"step-\d{1,18}\.\d{1,6}-[0-9a-f]{64}\.pt")


class Checkpoint(NamedTuple):
    """A state read back.

    Args:
        path: the file it came from.
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
        document = {
            "format": FORMAT,
            "step": step,
            "seconds": seconds,
            "config": _data(config, "config"),
            "versions": _data(versions, "versions"),
            "metrics": metrics,
            "state": _data(state, "state"),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with draft_beside(self.folder / "step.pt") as draft:
                with _HashedFile(draft) as file:
                    torch.save(document, cast(BinaryIO, file))
                # A damaged one of the same step may lie there: never write over anything.
                taken = [attempt for other, attempt in map(_order, self.paths()) if other == step]
                attempt = max(taken, default=-1) + 1
                final = self.folder / f"step-{step:08d}.{attempt}-{file.hash}.pt"
                put(draft, final)
        except OSError as error:
            raise CheckpointWriteError(
                f"the checkpoint of step {step} was not written: {error.strerror or error}",
                where=str(self.folder),
            ) from error
        self._prune()
        return final

    def load(
        self, config: Mapping[str, Any] | None = None, *, without: Collection[str] = ()
    ) -> Checkpoint:
        """Read the newest checkpoint that verifies.

        Args:
            config: the plain config to resume with; None accepts any.
            without: settings that may differ.

        Raises:
            CheckpointCorruptError: none verifies.
            CheckpointIncompatibleError: it was written for another config or in another format.

        Warns:
            CheckpointFallbackWarning: for each damaged one passed over, naming the file.
        """
        reasons = []
        for path in self.paths():
            try:
                found = _read(path)
            except CheckpointIncompatibleError:
                raise
            except Exception as error:  # torch raises nearly anything
                self._damaged.add(path)
                reasons.append(f"{path}: {error}".partition("\n")[0])
                text = f"damaged checkpoint passed over: {reasons[-1]}"
                warn(text, CheckpointFallbackWarning)
                continue
            if config is not None and (
                changed := differences(found.config, config, without=without)
            ):
                raise CheckpointIncompatibleError(
                    f"the configuration differs: {'; '.join(changed)}", where=str(path)
                )
            return found
        raise CheckpointCorruptError(
            "no intact checkpoint" + (f" ({'; '.join(reasons)})" if reasons else ""),
            where=str(self.folder),
        )

    def paths(self) -> list[Path]:
        """The files, newest first, whether intact or not."""
        found = (path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
        return sorted(found, key=_order, reverse=True)

    def _prune(self) -> None:
        # Damaged ones must not count as one of the two kept. Failing to delete does no harm.
        intact = [path for path in self.paths() if path not in self._damaged]
        for path in [*self._damaged, *intact[self.keep :]]:
            with contextlib.suppress(OSError):
                path.unlink()
        self._damaged.clear()


def _order(path: Path) -> tuple[int, int]:
    """Step and attempt in a name."""
    step, attempt = path.name.split("-")[1].split(".")
    return int(step), int(attempt)


class _HashedFile:
    """A new file that hashes what is written.

    The first failure is kept and raised on close: torch.save would report it as an internal error
    of its zip writer, a full disk and Ctrl-C alike.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        rest = view = memoryview(data).cast("B")
        self._hash.update(view)
        try:
            while rest and self._error is None:
                rest = rest[self._file.write(rest) :]
        except BaseException as error:
            self._error = error
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered."""

    @property
    def hash(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._error is not None:
            raise self._error


def _read(path: Path) -> Checkpoint:
    """One that verifies; anything else raises."""
    if not stat.S_ISREG(path.lstat().st_mode):  # opening a planted FIFO would wait for a writer
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        if not path.name.endswith(f"-{hashlib.file_digest(file, 'sha256').hexdigest()}.pt"):
            raise ValueError("it does not match the hash in its name")
        file.seek(0)
        found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError("it holds no checkpoint")
    if (version := found.get("format")) != FORMAT:
        raise CheckpointIncompatibleError(
            f"checkpoint format {version} is not that of this version",
            where=str(path),
            allowed=str(FORMAT),
            fix="resume with the birl_ext that wrote it",
        )
    return Checkpoint(
        path=path,
        step=int(found["step"]),
        seconds=float(found["seconds"]),
        config=dict(found["config"]),
        versions=dict(found["versions"]),
        metrics=str(found["metrics"]),
        state=dict(found["state"]),
    )


def _data(value: Any, where: str) -> Any:
    """A copy that torch.load takes back: of exactly these types, with tensors on the CPU.

    Raises:
        CheckpointError: something else is among them; names the place.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        if tensor.layout is not torch.strided:
            return tensor
        tensor = tensor.as_subclass(Tensor)
        shown = tensor.numel() * tensor.element_size()  # a view would drag its storage along
        return tensor if tensor.untyped_storage().nbytes() == shown else tensor.clone()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() < MAX_BITS:
        return int(value)
    if isinstance(value, float):
        return float(value)  # of NumPy's
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        items = [_data(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {_data(k, f"{where}.{k}"): _data(v, f"{where}.{k}") for k, v in value.items()}
    raise CheckpointError(
        f"a state cannot hold a {type(value).__name__}",
        where=where,
        allowed=f"tensors, bool, int below 2**{MAX_BITS}, float, str, None, and dicts, lists and "
        "tuples of them",
        fix="return tensors and plain values from state_dict()",
    )
