"""What this machine can do, measured in the same run: bandwidth per memory level, arithmetic."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import birl_ext
from birl_ext.ops.backends import loader
from birl_ext.runs.versions import installed

__all__ = [
    "bandwidth",
    "busy",
    "caches",
    "ceilings",
    "clock",
    "header",
    "last_cache",
    "missing",
    "overflow",
    "peak",
    "today",
    "wait",
]

CPU = torch.device("cpu")
FORMAT = 2
PACKAGES = ("torch", "numpy", "jax", "optimistix", "jaxopt", "quantecon", "mdpsolver", "scipy")
REPEATS = 9


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(call: Callable[[], Any], device: torch.device, threads: int) -> float:
    """Seconds of one call, to the end. Packages that set the number of threads set it for all."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


# Bandwidth


def bandwidth(device: torch.device, threads: int, size: int | None = None) -> float:
    """GB/s at which a buffer is read again and again: the best of a sum, a matrix-vector product
    and a dot product, medians. Without a size: one that no cache holds.
    """
    size = size or 8 * last_cache(device)
    table = torch.ones(max(size // 4096, 1), 1024, device=device)
    vector = torch.ones(1024, device=device)
    flat = table.view(-1)
    median = min(
        statistics.median(clock(read, device, threads) for _ in range(REPEATS))
        for read in (table.sum, lambda: table.mv(vector), lambda: flat.dot(flat))
    )
    return 1e-9 * table.numel() * 4 / median


def cached_bandwidth(low: int, high: int, threads: int) -> float:
    """GB/s of a cache that holds `high` bytes, of one core each, times the cores.

    The slope between two sizes inside the cache: what a call costs besides drops out.
    """
    torch.set_num_threads(1)
    best = 0.0
    for reads in (_sums, _dots):
        seconds = [_least(reads(size)) for size in (low, high)]
        if seconds[1] > seconds[0]:
            best = max(best, 1e-9 * (high - low) / (seconds[1] - seconds[0]))
    torch.set_num_threads(threads)
    return best * threads


def _sums(size: int) -> Callable[[], Any]:
    return torch.ones(size // 4).sum


def _dots(size: int) -> Callable[[], Any]:
    one, other = torch.ones(size // 8), torch.ones(size // 8)
    return lambda: one.dot(other)


def _least(call: Callable[[], Any], calls: int = 200) -> float:
    times = []
    for _ in range(5 * REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(time.perf_counter() - start)
    return min(times) / calls


@functools.cache
def ceilings(device: torch.device, threads: int, quick: bool = False) -> dict[str, Any]:
    """GB/s per memory level and GFLOP/s per dtype of this machine."""
    found: dict[str, float] = {"memory": bandwidth(device, threads)}
    if device.type == "cuda":
        found["L2"] = bandwidth(device, threads, last_cache(device) // 3)
    elif not quick:
        for level, size in caches().items():
            if level == "L3":
                found[level] = bandwidth(device, threads, size // 3)
            else:
                found[level] = cached_bandwidth(size // 4, 3 * size // 4, threads)
    order = 64 if quick else 1024 if device.type == "cpu" else 8192
    kinds = (torch.float32, torch.float64)
    arithmetic = {_name(kind): peak(device, threads, kind, order) for kind in kinds}
    return {"gigabytes_per_second": found, "gigaflops": arithmetic}


def peak(device: torch.device, threads: int, dtype: torch.dtype, order: int) -> float:
    """GFLOP/s of a matrix product, the most arithmetic that this machine does."""
    one = torch.ones(order, order, dtype=dtype, device=device)
    one @ one
    median = statistics.median(clock(lambda: one @ one, device, threads) for _ in range(REPEATS))
    return 2e-9 * order**3 / median


def overflow(device: torch.device) -> None:
    """Read four times what the last cache holds."""
    _flusher(device).sum()
    wait(device)


@functools.cache
def _flusher(device: torch.device) -> Tensor:
    return torch.ones(last_cache(device), device=device)  # four bytes each


def caches() -> dict[str, int]:
    """Bytes of each data cache of the first core, innermost first."""
    found = {}
    for path in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (path / "type").read_text().strip() != "Instruction":
            text = (path / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
            found[f"L{(path / 'level').read_text().strip()}"] = int(text.rstrip("KM")) * unit
    return found


def last_cache(device: torch.device) -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(caches().values(), default=32 << 20)


# Who and what


def missing(*packages: str) -> str:
    """Which of the packages are not installed; empty if none."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def header(
    command: str,
    device: torch.device = CPU,
    threads: int | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Date, machine, versions and command of a run; nothing that names a host or a folder."""
    kind = "_cuda" if device.type == "cuda" else "_cpu"
    native = loader.report()[kind]
    return {
        "format": FORMAT,
        "date": today(),
        "command": command,
        "quick": quick,
        "device": _device(device),
        "machine": _machine(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": threads or torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "compiled_module": native["build_info"] or native["reason"],
    }


def busy(load: float) -> str:
    """A warning if other programs want this machine too; empty if not."""
    if load <= 0.5 * (os.cpu_count() or 1):
        return ""
    return (
        f"Other programs are running (load average {load:.1f}). Rivals whose threads spin while "
        "they wait lose many times what ours lose: ratios of this run are void."
    )


def today() -> str:
    return date.today().isoformat()


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    card = torch.cuda.get_device_properties(device)
    memory = card.total_memory / 2**30
    return f"{card.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}"


def _machine() -> str:
    facts = _facts("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    memory = int((_facts("/proc/meminfo", "MemTotal") or "0").split()[0]) / (1 << 20)
    last = last_cache(torch.device("cpu")) >> 20
    return (
        f"{facts}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"{last} MiB of last-level cache, {platform.system()}"
    )


def _facts(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return ""


def _versions() -> Mapping[str, str]:
    found = {name: installed(name) or "not installed" for name in PACKAGES}
    return {"birl_ext": birl_ext.__version__, **found}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
