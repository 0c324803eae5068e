"""Registers, spills and shared memory of every CUDA kernel on every architecture.

Reads what `ptxas -v` printed while the module was built (CMake option BIRL_CUDA_RESOURCES):

    cmake --build build 2>&1 | tee build.log
    python csrc/cuda/entry/resource_usage.py build.log            # compare with resource_usage.json
    python csrc/cuda/entry/resource_usage.py build.log --write    # and replace it

The comparison fails on a kernel that spills or is not in the file, and on one that takes more
registers than the file says. Compilers differ: the file names the one it was made with, and with
another only spills are judged.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).with_name("resource_usage.json")
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")

Usage = dict[str, dict[str, dict[str, int]]]  # kernel, architecture, quantity


def parse(log: str) -> Usage:
    """What ptxas said of each kernel on each architecture."""
    found: Usage = {}
    current: dict[str, int] | None = None
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            current = found.setdefault(entry["name"], {}).setdefault(entry["architecture"], {})
        elif current is None:
            continue
        elif spill := SPILL.search(line):
            current.setdefault("stack", int(spill[1]))
            current.setdefault("spill", int(spill[2]) + int(spill[3]))
        elif used := USED.search(line):
            current["registers"] = int(used[1])
            shared = SHARED.search(line)
            current["shared"] = int(shared[1]) if shared else 0
            current = None
    ordered = {}
    for name, usage in found.items():
        ordered[readable(name)] = dict(sorted(usage.items(), key=lambda item: int(item[0][3:])))
    return dict(sorted(ordered.items()))


def readable(mangled: str) -> str:
    """A kernel's C++ name without namespaces, parameters, and what all of them share."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"birl::(device::|\(anonymous namespace\)::)?|^void |\(.*\)$", "", full.strip())
    name = re.sub(r"(\d)[uU]?[lL]+\b", r"\1", name)
    name = re.sub(r"\s+>", ">", name)
    return re.sub(r"^run_items<(\w+), (.*)>$", r"\2 by \1", name)


def complaints(found: Usage, known: Usage, *, same_compiler: bool) -> list[str]:
    """Sentences about what got worse."""
    wrong = []
    for kernel, architectures in found.items():
        for architecture, usage in architectures.items():
            where = f"{kernel} on {architecture}"
            if usage["spill"] or usage["stack"]:
                wrong.append(f"{where}: {usage['spill']} bytes spilled, stack {usage['stack']}")
            before = known.get(kernel, {}).get(architecture)
            if before is None:
                wrong.append(f"{where}: not in {FILE.name}; run with --write")
            elif same_compiler and usage["registers"] > before["registers"]:
                wrong.append(f"{where}: {usage['registers']} registers, was {before['registers']}")
    return wrong


def compiler() -> str:
    """The last line of `nvcc --version`."""
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return printed.stdout.strip().splitlines()[-1]


def main() -> int:
    """Compare or write; the exit status is 1 if something got worse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("log", type=Path, help="output of the build")
    parser.add_argument("--write", action="store_true", help=f"replace {FILE.name}")
    arguments = parser.parse_args()
    found = parse(arguments.log.read_text())
    if not found:
        print(f"{arguments.log}: no kernel in it; was BIRL_CUDA_RESOURCES on?", file=sys.stderr)
        return 1
    if arguments.write:
        FILE.write_text(json.dumps({"compiler": compiler(), "kernels": found}, indent=1) + "\n")
    known = json.loads(FILE.read_text())
    wrong = complaints(found, known["kernels"], same_compiler=known["compiler"] == compiler())
    print("\n".join(wrong) if wrong else f"{len(found)} kernels, none spills")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
