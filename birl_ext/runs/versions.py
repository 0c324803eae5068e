"""Which versions are at work."""

from __future__ import annotations

import functools
import platform
from importlib import metadata

import birl_ext

__all__ = ["installed", "versions"]


@functools.cache
def installed(package: str) -> str | None:
    """The version of an installed distribution, read without importing it; None if absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Name -> version of what the bits of a result depend on."""
    return {
        "birl_ext": birl_ext.__version__,
        "python": platform.python_version(),
        "torch": installed("torch") or "unknown",
        "numpy": installed("numpy") or "unknown",
    }
