"""What importing the package costs, and that compilation works whichever import came first."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import birl_ext

COMPILED_GRADIENT = """
import torch, birl_ext
torch.manual_seed(0)
transition = torch.softmax(torch.randn(4, 3, 4, dtype=torch.float64), -1)
reward = torch.randn(4, 3, dtype=torch.float64)
def total(reward):
    return birl_ext.solve(reward, transition, discount=0.9, temperature=0.5).value.sum()
eager = torch.func.grad(total)(reward)
compiled = torch.compile(torch.func.grad(total), fullgraph=True, backend="aot_eager")(reward)
assert eager.abs().sum() > 1, eager
assert torch.allclose(compiled, eager), (compiled, eager)
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_import_pulls_in_nothing_heavy() -> None:
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "matplotlib",
        "tyro",
        "rich",
        "scipy",
        "mpmath",
        "gymnasium",
    )
    run(
        "import sys, birl_ext\n"
        f"found = [module for module in {heavy!r} if module in sys.modules]\n"
        "assert not found, found"
    )


def test_every_public_name_is_there_and_documented() -> None:
    run(
        "import birl_ext\n"
        "for name in birl_ext.__all__:\n"
        "    assert name in dir(birl_ext), name\n"
        "    found = getattr(birl_ext, name)\n"
        "    assert name.startswith('__') or name == 'TEACHERS' or found.__doc__, name\n"
        "try:\n"
        "    birl_ext.absent\n"
        "except AttributeError as error:\n"
        "    assert 'absent' in str(error)\n"
        "else:\n"
        "    raise SystemExit('absent is there')"
    )


def test_what_a_type_checker_sees_is_what_is_loaded_lazily() -> None:
    tree = ast.parse(Path(birl_ext.__file__).read_text())
    (shown,) = (node for node in tree.body if isinstance(node, ast.If))
    body: list[Any] = shown.body
    seen = {
        alias.name: "" if node.module == "birl_ext" else node.module.removeprefix("birl_ext.")
        for node in body
        for alias in node.names
    }
    assert seen == birl_ext._LAZY


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import birl_ext", "import torch._dynamo"])
def test_compiled_gradients_are_right_whichever_import_comes_first(first: str) -> None:
    """Dynamo must hear of the ops in either order: it would trace into them, to silent zeros."""
    run(first + COMPILED_GRADIENT)
