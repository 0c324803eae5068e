"""How many tiny MDPs are solved in a second, and what does solving them in step cost?

4096 Garnet MDPs of 16 states and 4 actions, 100,000 on a GPU. The slowest needs several times the
sweeps of the mean: whoever iterates the whole batch until the last has converged pays for it. The
columns "passes" of ours (the mean) and of the expert (the slowest) show that ratio.
"""

from __future__ import annotations

from typing import Any

import torch

from birl_bench import workloads
from birl_bench.cases import small_batch
from birl_bench.families import garnet
from birl_bench.harness import Plan, measure

__all__ = ["run"]


def run(plan: Plan) -> list[dict[str, Any]]:
    batches = (5,) if plan.quick else (4096, 100_000) if plan.cuda else (4096,)
    found = []
    for batch in batches:
        shape = (batch, 6, 2) if plan.quick else (batch, 16, 4)
        problem = workloads.random(garnet, shape, torch.float32, discount=0.95, temperature=0.1)
        name = "micro batch" if batch != 100_000 else "micro batch of 1e5"
        few = batch <= 4096  # a tape of hundreds of copies of P fits
        pair = small_batch.cases(name, problem.to(plan.device), plan, unrolled=few)
        found += [measure(case, plan) for case in pair]
    return found
