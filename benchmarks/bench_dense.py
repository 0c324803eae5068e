"""Does one large dense MDP run at the speed of memory, and who needs the fewest passes over P?

1000 states, 10 actions, random rows: P is 40 MB in float32, 80 MB in float64, beyond the last
cache. A pass costs what reading P costs, whoever makes it; what differs is their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import competitors
import torch
import workloads
from harness import Case, measure

TOL = {torch.float32: 1e-6, torch.float64: 1e-10}


def cases(small: bool) -> Iterator[Case]:
    for dtype, tol in TOL.items():
        shape = (1, 12, 3) if small else (1, 1000, 10)
        problem = workloads.dense(*shape, dtype, discount=0.95, temperature=0.1)
        name = f"dense, {str(dtype).removeprefix('torch.')}"
        allowed = dict.fromkeys(("value", "grad_reward", "grad_transition"), 100 * tol)
        accuracy = f"ours: certified relative error {tol:g}; the others: relative residual {tol:g}"
        common = {"problem": problem, "truth": workloads.truth(problem), "allowed": allowed}
        yield Case(
            f"{name}, forward",
            "Is one large dense MDP solved at the speed of memory?",
            **common,
            candidates=competitors.forward(tol, span_block=1, list_input=small),
            accuracy=accuracy,
        )
        yield Case(
            f"{name}, gradient",
            "What does its gradient with respect to r and P add?",
            **common,
            candidates=competitors.gradient(tol, span_block=1),
            accuracy=accuracy,
        )


def run(small: bool = False) -> list[dict[str, Any]]:
    """The measured cases; `small` shrinks them to a test of the benchmark itself."""
    return [measure(case) for case in cases(small)]
