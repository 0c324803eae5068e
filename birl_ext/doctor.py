"""``birl doctor``: what is installed, which compiled modules loaded, why one did not, devices.

It needs no optional package, and reports a broken installation instead of failing on it.
"""

from __future__ import annotations

import importlib
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import birl_ext
from birl_ext.runs.versions import installed

__all__ = ["main", "report"]


def report() -> Iterator[str]:
    """The lines that ``birl doctor`` prints."""
    yield from _section(
        f"birl_ext {birl_ext.__version__}",
        {
            "location": str(Path(__file__).parent),
            "python": f"{platform.python_version()} on {platform.platform()}",
            "torch": _torch_version(),
            "numpy": installed("numpy") or "not installed",
        },
    )
    yield ""
    yield from _section("compiled modules", _modules())
    yield ""
    yield from _section("devices", _devices())
    yield ""
    yield from _section("optional packages", dict(_extras()))


def _section(title: str, entries: Mapping[str, str]) -> Iterator[str]:
    yield title
    width = max(map(len, entries), default=0)
    for name, text in entries.items():
        yield f"  {name:<{width}}  {text}"


def _torch() -> Any:
    """The torch module, or the error that its import raised."""
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return error


def _torch_version() -> str:
    torch = _torch()
    if isinstance(torch, Exception):
        return f"does not import: {torch}"
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"{torch.__version__}, {cuda}"


def _modules() -> dict[str, str]:
    try:
        loader = importlib.import_module("birl_ext.ops.backends.loader")
    except ImportError as error:
        return {"_cpu, _cuda": f"not loaded: {error}; PyTorch computes the same answers, slower"}
    found: Mapping[str, Mapping[str, Any]] = loader.report()
    return {name: _module(entry) for name, entry in found.items()}


def _module(entry: Mapping[str, Any]) -> str:
    if not entry["loaded"]:
        return f"not loaded: {entry['reason']}"
    facts = ", ".join(f"{key} {value}" for key, value in entry["build_info"].items())
    return f"loaded; {facts}" if facts else "loaded"


def _devices() -> dict[str, str]:
    torch = _torch()
    if isinstance(torch, Exception):
        return {"cpu": "unknown: torch does not import"}
    threads = torch.get_num_threads()
    found = {"cpu": f"{platform.machine()}, {threads} thread{'s' * (threads != 1)}"}
    if not torch.cuda.is_available():
        return {**found, "cuda": "none available to torch"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory, capability = device.total_memory / 2**30, f"{device.major}.{device.minor}"
        found[f"cuda:{index}"] = f"{device.name}, {memory:.0f} GiB, capability {capability}"
    return found


def _declared() -> dict[str, list[str]]:
    """Extra -> packages, as the installed metadata have them; other extras of ours left out."""
    declared: dict[str, list[str]] = {}
    for requirement in metadata.requires("birl_ext") or ():
        of = re.search(r"""extra == ["']([\w-]+)["']""", requirement)
        package = re.match(r"[\w.-]+", requirement)
        if of and package and package[0].replace("-", "_") != "birl_ext":
            declared.setdefault(of[1], []).append(package[0])
    return declared


def _extras() -> Iterator[tuple[str, str]]:
    try:
        declared = _declared()
    except metadata.PackageNotFoundError:
        yield "unknown", "birl_ext itself is not installed: it runs from a folder"
        return
    for extra, packages in declared.items():
        found = {package: installed(package) for package in packages}
        text = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
        if None in found.values():
            text += f': pip install "birl_ext[{extra}]"'
        yield f"[{extra}]", text


def main() -> int:
    """Print the report; the exit status is 1 if torch itself does not import."""
    for line in report():
        print(line)
    return int(isinstance(_torch(), Exception))


if __name__ == "__main__":
    sys.exit(main())
