"""Files that are whole or not there: a reader sees the old one or the new, whatever happens."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from birl_ext.errors import ConfigError

__all__ = ["PARTIAL", "draft_beside", "locked", "put", "replacing", "tidy"]

PARTIAL = ".partial-"
"""How the names of drafts begin."""


@contextlib.contextmanager
def draft_beside(target: Path) -> Iterator[Path]:
    """A path of the same folder and suffix as `target`, removed in the end unless it was `put`."""
    draft = target.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{target.name}")  # of this call alone
    try:
        yield draft
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A draft beside `target`: `put` there in the end, or removed if the block raises."""
    with draft_beside(target) as draft:
        yield draft
        put(draft, target)


def put(draft: Path, target: Path) -> None:
    """Rename a file within its folder; its content is on the disk before, its name after."""
    with draft.open("r+b") as file:
        os.fsync(file.fileno())
    draft.replace(target)
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be synchronised
        descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def tidy(folder: Path) -> None:
    """Remove the drafts that a kill has left."""
    for path in folder.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the system lets go of it if this process dies.

    Args:
        path: created if absent, and left there.
        what: is busy if another process holds it, for the error.

    Raises:
        ConfigError: another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"another process {what}", where=str(path.parent), fix="wait for it or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()
