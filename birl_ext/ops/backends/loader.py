"""Finds the compiled modules: what loaded, why not, and whether it belongs to these sources."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from birl_ext._version import __version__
from birl_ext.errors import BackendFallbackWarning, BackendUnavailableError, warn

__all__ = ["available", "build_info", "reason", "report", "require", "stand_in"]


MODULES = {"cpu": "_cpu", "cuda": "_cuda"}
CLONE = Path(__file__).resolve().parents[3]


class _Backend:
    """One compiled module: its object, or the reason why there is none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: ModuleType | None = None
        self.reason = ""
        self._tried = self._checked = self._warned = False

    def load(self) -> None:
        """Import the module; a failure becomes the reason."""
        if self._tried:
            return
        self._tried = True
        full = f"birl_ext.{MODULES[self.name]}"
        try:
            self.module = _found(full)
            if self.module is None:
                self.reason = f"{full} was not built"
        except ImportError as error:  # a truncated file, a missing symbol, another Python
            self.reason = f"{full} does not load: {error}"

    def usable(self) -> ModuleType | None:
        """The module, if it also belongs to this version of the package."""
        self.load()
        if self.module is not None and not self._checked:
            self._checked = True
            built, sources = _built(self.module, "version"), _sources()
            if built != __version__:
                self.reason = f"built for birl_ext {built}, this is {__version__}"
                self.module = None
            elif sources and _built(self.module, "sources") != sources:
                self.reason = f"{self.module.__file__} was built from other sources than {CLONE}"
                self.module = None
        return self.module

    def require(self) -> ModuleType:
        """The module, or BackendUnavailableError."""
        module = self.usable()
        if module is None:
            raise BackendUnavailableError(f"backend {self.name!r}: {self.reason}")
        return module

    def announce(self, why: str) -> None:
        """Say once that PyTorch stands in; BIRL_REQUIRE_EXT=1 makes a missing `_cpu` an error."""
        if self.name == "cpu" and os.environ.get("BIRL_REQUIRE_EXT") == "1":
            self.require()
        if not self._warned:
            self._warned = True
            warn(
                f"{why}; PyTorch computes the same answers, slower. "
                "Fix: reinstall birl_ext with a C++ compiler at hand; `birl doctor` tells more",
                BackendFallbackWarning,
            )


def _built(module: ModuleType, entry: str) -> str:
    try:
        return str(module.build_info()[entry])
    except (AttributeError, KeyError, TypeError):
        return f"an unknown {entry}"


def _found(full: str) -> ModuleType | None:
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError:
        return _installed(full)


def _installed(full: str) -> ModuleType | None:
    """The module of an installed birl_ext, where this one is run from a clone beside it."""
    package, _, name = full.partition(".")
    if not (CLONE / "csrc").is_dir():
        return None
    for entry in sys.path:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(entry) / package / f"{name}{suffix}"
            if not file.is_file():
                continue
            spec = importlib.util.spec_from_file_location(full, file)
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    return None


def _sources() -> str:
    """Hash of the clone's compiled sources, as CMakeLists.txt takes it; empty outside of one."""
    folder = CLONE / "csrc"
    if not folder.is_dir():
        return ""
    kinds = (".cpp", ".cu", ".cuh", ".h")
    files = (path for path in folder.rglob("*") if path.suffix in kinds and path.is_file())
    named = sorted((path.relative_to(folder).as_posix(), path) for path in files)
    hashes = (hashlib.sha256(path.read_bytes()).hexdigest() for _, path in named)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


_backends = {name: _Backend(name) for name in MODULES}
CPU = _backends["cpu"]
CPU.usable()  # so that `CPU.module` tells


def available(name: str) -> bool:
    """Whether backend "cpu" or "cuda" can be used; the first time it cannot, a warning says so."""
    backend = _backends[name]
    if backend.usable() is not None:
        return True
    backend.announce(backend.reason)
    return False


def stand_in(name: str, why: str) -> None:
    """Warn, once for each backend, that PyTorch computes in its place."""
    _backends[name].announce(why)


def require(name: str) -> ModuleType:
    """The module of a backend, or BackendUnavailableError."""
    return _backends[name].require()


def build_info(name: str) -> dict[str, Any]:
    """How a module was built."""
    return dict(require(name).build_info())


def reason(name: str) -> str:
    """Why a backend cannot be used; empty if it can."""
    backend = _backends[name]
    return "" if backend.usable() is not None else backend.reason


def report() -> dict[str, dict[str, Any]]:
    """For each module whether it loaded, why not, and how it was built."""
    entries = {}
    for name, backend in _backends.items():
        module = backend.usable()
        entries[MODULES[name]] = {
            "loaded": module is not None,
            "reason": backend.reason,
            "build_info": {} if module is None else dict(module.build_info()),
        }
    return entries
