"""How many tiny MDPs are solved in a second, and what does solving them in step cost?

4096 Garnet MDPs of 16 states and 4 actions. The slowest needs several times the sweeps of the
mean: whoever iterates the whole batch until the last one has converged pays for it.
"""

from __future__ import annotations

from typing import Any

import torch
import workloads
from bench_small_batch import cases
from harness import measure


def run(small: bool = False) -> list[dict[str, Any]]:
    """The measured cases; `small` shrinks them to a test of the benchmark itself."""
    shape = (5, 6, 2) if small else (4096, 16, 4)
    problem = workloads.garnet(*shape, torch.float32, discount=0.95, temperature=0.1)
    return [measure(case) for case in cases("micro batch", problem)]
