"""Imports go one way, the oracle stays apart, and no file remembers a machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

import pytest

from birl_ext.ops.request import Data, Settings, derivable
from birl_ext.solution import Kernel, Method, Rigour, Status

ROOT = Path(__file__).resolve().parents[1]

# From the bottom to the top: a module imports from its own layer or from those before it.
LAYERS = (
    "_version",
    "torch_internals",
    "errors",
    "modules",
    "files",
    "state",
    "progress",
    "solution",
    "model",
    "options",
    "ops",
    "functional",
    "entropy",
    "nn",
    "__init__",  # the front door, open to everything above it
    "convert",
    "environments",
    "agents",
    "rollouts",
    "replay",
    "simulators",
    "preferences",
    "bilevel",
    "runs",
    "arena",
    "problems",
    "doctor",
    "cli",
    "__main__",
)
# What may be imported at module level besides the standard library.
THIRD_PARTY = {"torch", "numpy"}


def imports(path: Path, package: str) -> list[tuple[int, str, bool]]:
    """Every import in a file as (line, absolute dotted name, whether it is at module level)."""
    tree = ast.parse(path.read_text(), str(path))
    if path_of(path, package) == path.parent and path.name == "__init__.py":
        # the front door shows what lies above it, to type checkers and by name
        tree.body = [node for node in tree.body if "TYPE_CHECKING" not in ast.unparse(node)]
    here = [package, *path.relative_to(path_of(path, package)).parent.parts]
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from birl_ext import mdp` reaches a module, `from torch import nn` only torch.
            names = [f"{stem}.{alias.name}" if stem == package else stem for alias in node.names]
        else:
            continue
        found += [(node.lineno, name, id(node) in top) for name in names]
    return found


def path_of(path: Path, package: str) -> Path:
    return next(parent for parent in path.parents if parent.name == package)


def layer(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py") if parts else "__init__"


def offences(root: Path) -> list[str]:
    """Sentences about the imports of a package that break the order."""
    wrong = []
    names = {layer(path.relative_to(root).parts) for path in root.rglob("*.py")}
    for path in sorted(root.rglob("*.py")):
        own = layer(path.relative_to(root).parts)
        where = path.relative_to(root.parent)
        if own not in LAYERS:
            wrong.append(f"{where} has no place in LAYERS")
            continue
        for line, name, at_top in imports(path, root.name):
            head, *rest = name.split(".")
            if head != root.name:
                outside = head not in sys.stdlib_module_names and head not in THIRD_PARTY
                if outside and at_top:
                    wrong.append(f"{where}:{line} imports {head} at module level")
                continue
            target = rest[0] if rest and rest[0] in names else "__init__"
            if LAYERS.index(target) > LAYERS.index(own):
                wrong.append(f"{where}:{line} imports {target}, which lies above {own}")
    return wrong


def test_imports_go_one_way() -> None:
    assert not offences(ROOT / "birl_ext")


def edges(root: Path) -> dict[str, set[str]]:
    """Which file of a package imports which when it is imported itself, by dotted names."""
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        # what a call imports is no circle
        guarded = [
            n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
        ]
        for node in [*tree.body, *(inner for block in guarded for inner in block.body)]:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in files else str(node.module) for name in inner]
            else:
                continue
            found[name] |= {target for target in names if target in files} - {name, root.name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The files of one circle, or nothing."""
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := walk(target, [*above, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_file_stands_on_itself() -> None:
    assert not circle(edges(ROOT / "birl_ext"))


def test_a_circle_is_found(tmp_path: Path) -> None:
    root = tmp_path / "birl_ext"
    root.mkdir()
    (root / "a.py").write_text("from birl_ext.b import x")
    (root / "b.py").write_text("from birl_ext import c")
    (root / "c.py").write_text("def f():\n    import birl_ext.a")
    assert not circle(edges(root))
    (root / "c.py").write_text("import birl_ext.a")
    assert circle(edges(root)) == ["birl_ext.a", "birl_ext.b", "birl_ext.c", "birl_ext.a"]


def reaches_into_ops(source: str) -> list[str]:
    """What a file takes of the private side of `birl_ext.ops`."""
    tree, bound, found = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("birl_ext.ops"):
            bound |= {alias.asname or alias.name for alias in node.names}
            names = (name for alias in node.names for name in (alias.name, alias.asname or ""))
            found += [name for name in names if name.startswith("_")]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        text = ast.unparse(node)
        private = text.split(".")[0] in bound and re.search(
            r"\._(?!replace|fields|make|asdict)", text
        )
        if private or text == "torch.ops.birl_ext":
            found.append(text)
    return found


def test_nobody_reaches_into_ops() -> None:
    files = [*(ROOT / "birl_ext").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    taken = {
        str(path.relative_to(ROOT)): found
        for path in files
        if "birl_ext/ops" not in str(path) and (found := reaches_into_ops(path.read_text()))
    }
    # the bare op is one of the layers that this case times
    assert taken.pop("benchmarks/birl_bench/cases/tiny_call.py", []) == ["torch.ops.birl_ext"]
    assert not taken


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from birl_ext.ops.backends import choice as _backends", True),
        ("from birl_ext.ops.solve import _fake", True),
        ("from birl_ext.ops.backends import loader\nloader._backends['cpu']", True),
        ("import torch\ntorch.ops.birl_ext.bellman(x)", True),
        ("from birl_ext.ops.request import Settings\nSettings._fields", False),
        ("from birl_ext.ops.bellman import bellman\nself._value = bellman(x)", False),
    ],
)
def test_a_reach_into_ops_is_found(source: str, found: bool) -> None:
    assert bool(reaches_into_ops(source)) == found


def test_every_layer_exists() -> None:
    package = ROOT / "birl_ext"
    assert {*LAYERS} <= {layer(path.relative_to(package).parts) for path in package.rglob("*.py")}


def test_the_kernels_of_two_devices_share_core_alone() -> None:
    csrc = ROOT / "csrc"
    for path in csrc.rglob("*.[ch]*"):
        floor = path.relative_to(csrc).parts[0]
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
            assert name.split("/")[0] in ("core", floor), f"{path.relative_to(ROOT)}: {name}"


def test_requests_have_the_fields_of_what_ops_are_given() -> None:
    """Of both devices, whichever of them is there to refuse a name."""
    lists = re.split(r"#define BIRL_(\w+)\(NEED, MAY\)", (ROOT / "csrc/core/request.h").read_text())
    named = {
        name: re.findall(r"(?:NEED|MAY)\([^,]+, (\w+)", body)
        for name, body in zip(lists[1::2], lists[2::2], strict=True)
    }
    assert named.keys() == {"BATCH", "SOLVE", "SOLVE_VJP", "POLICY_SOLVE", "OUTER"}
    data = [name for name in named["BATCH"] if name in Data._fields]
    assert data == list(Data._fields)
    how = [name for name in named["SOLVE"] if name in Settings._fields]
    assert how == [name for name in Settings._fields if name not in ("batch", "strict", "backend")]
    bars = [f"{name}_bar" for name in derivable(Data._fields)]
    assert [name for name in named["SOLVE_VJP"] if name in bars] == bars
    glue = (ROOT / "birl_ext/ops/backends/native.py").read_text()
    told = {*Data._fields, *Settings._fields, *bars, *re.findall(r'"(\w+)"', glue)}
    assert {name for names in named.values() for name in names} <= told


@pytest.mark.parametrize("kind", [Kernel, Method, Rigour, Status])
def test_codes_are_the_same_in_compiled_code(kind: type[IntEnum]) -> None:
    files = (ROOT / "csrc/core/request.h", ROOT / "csrc/core/common.h")
    text = "".join(file.read_text() for file in files)
    found = re.search(rf"enum class {kind.__name__} : Index {{(.*?)}};", text, re.DOTALL)
    assert found is not None
    entries = re.findall(r"k\w+(?: = (\d+))?", re.sub("//.*", "", found[1]))
    codes: list[int] = []
    for given in entries:
        codes.append(int(given) if given else (codes[-1] + 1 if codes else 0))
    assert codes == list(kind)


def test_frames_are_counted_in_one_place() -> None:
    """`errors.warn` finds the caller's line; a number would be wrong after the next move."""
    counted = [
        path for path in (ROOT / "birl_ext").rglob("*.py") if "stacklevel" in path.read_text()
    ]
    assert counted == [ROOT / "birl_ext/errors.py"]


def test_the_oracle_shares_nothing_with_the_package() -> None:
    for path in (ROOT / "tests/oracle").glob("*.py"):
        assert "birl_ext" not in path.read_text(), path


@pytest.mark.parametrize(
    ("file", "text", "offence"),
    [
        ("model/mdp.py", "from birl_ext.errors import BirlError", None),
        ("model/mdp.py", "from birl_ext import errors", None),
        ("errors.py", "from birl_ext.model.mdp import DenseMDP", "imports model, which lies above"),
        ("errors.py", "from birl_ext import model", "imports model, which lies above errors"),
        ("errors.py", "from . import model", "imports model, which lies above errors"),
        ("errors.py", "def f():\n    import birl_ext.model", ":2 imports model"),
        ("model/mdp.py", "from ..ops import solve", "imports ops, which lies above model"),
        ("ops/sweep.py", "from .other import x", None),
        ("model/mdp.py", "from birl_ext import solve", "imports __init__, which lies above model"),
        ("cli.py", "from birl_ext import solve", None),
        ("model/mdp.py", "import scipy", "imports scipy at module level"),
        ("model/mdp.py", "def f():\n    import safetensors", None),
        ("stray.py", "", "has no place in LAYERS"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, text: str, offence: str | None) -> None:
    root = tmp_path / "birl_ext"
    for name in ("__init__.py", "errors.py", "model/mdp.py", "ops/other.py", "cli.py", file):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "ops/__init__.py").touch()
    (root / file).write_text(text)
    found = offences(root)
    assert len(found) == (offence is not None), found
    assert offence is None or offence in found[0]


# A folder of one person's machine, at the start of a word: URLs and relative paths pass.
MACHINE_PATH = re.compile(
    r"(?<![\w.\-}/])(?:[A-Z]:\\Users|/(?:home|root|Users|work|tmp|mnt))[\\/]\w"
)


def test_no_file_mentions_a_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        for match in MACHINE_PATH.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{name}:{line} mentions {match[0]}…")
    assert not found


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("see /home/ada/data", True),
        ("open('/tmp/x')", True),
        ("C:\\Users\\ada", True),
        ("https://example.org/work/page", False),
        ("docs/work/plan.md", False),
        ("#!/usr/bin/env python", False),
        ("{root}/home/x", False),
    ],
)
def test_machine_paths_are_recognised(text: str, hit: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) == hit
