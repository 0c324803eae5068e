"""Which versions are at work, read from package metadata without importing anything."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["installed", "versions"]


def installed(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Name -> version of what the bits of a result depend on."""
    found = {"python": platform.python_version()}
    for package in ("birl_ext", "torch", "numpy"):
        # A source tree on the path has no metadata; its results must not claim a release.
        found[package] = installed(package) or "unreleased"
    return found
