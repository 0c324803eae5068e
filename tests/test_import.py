"""What importing the package costs, and that compilation works whichever import came first."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    heavy = ("torch._dynamo", "torch._inductor", "matplotlib", "tyro", "rich", "scipy", "mpmath")
    run(
        "import sys, birl_ext\n"
        f"found = [module for module in {heavy!r} if module in sys.modules]\n"
        "assert not found, found"
    )


@pytest.mark.parametrize("first", ["import birl_ext", "import torch._dynamo"])
def test_compiled_gradients_are_right_whichever_import_comes_first(first: str) -> None:
    """Dynamo must hear of the ops in either order: it would trace into them, to silent zeros."""
    run(first + COMPILED_GRADIENT)
