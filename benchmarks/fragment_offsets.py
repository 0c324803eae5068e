"""What does it cost to leave out the steps before a fragment?

    python benchmarks/fragment_offsets.py [--instances 20] [--out FILE]

A fragment that starts t steps into an episode depends on the policy through these steps, too. Their
score is left out where fragments are cut from the middle of episodes. On random MDPs (4 states, 2
actions, γ = 0.9, τ = 0.5, a reward of its own for each state and action) the hyper-gradient of the
preferences between two fragments of 3 steps is a sum over all paths. It is compared with the same
gradient when only the last `lead` steps before the fragments are scored, with the one-step score of
the fragments, and with no score at all. Medians and maxima over instances.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from birl_bench import machine
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import exact_pair_objective

STATES, ACTIONS, STEPS, DISCOUNT, TEMPERATURE = 4, 2, 3, 0.9, 0.5
OFFSETS = (0, 1, 2, 4, 8, 16)
LEADS = (0, 1, 2, 4, 8)
SHOWN_OFFSETS, SHOWN_LEADS = (1, 4, 16), (0, 1, 4)
# Of the logits of the transitions, and the probability of staying beside them.
PROCESSES = {"blurred": (1.5, 0.0), "sharp": (4.0, 0.0), "slow": (4.0, 0.8)}


class Instance:
    """A random MDP, a learned reward x and the teacher's."""

    def __init__(self, seed: int, sharpness: float, stay: float) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        transition = (1 - stay) * (sharpness * normal(STATES, ACTIONS, STATES)).softmax(-1)
        transition = transition + stay * torch.eye(STATES, dtype=torch.float64).unsqueeze(1)
        self.x = normal(STATES, ACTIONS).requires_grad_()
        self.truth = 2 * normal(STATES, ACTIONS)
        start = torch.eye(STATES, dtype=torch.float64)[0]
        self.mdp = birl_ext.DenseMDP(self.x, transition, DISCOUNT, initial_distribution=start)
        self.policy = birl_ext.solve(self.mdp, temperature=TEMPERATURE).policy

    def loss(self, s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        """Cross entropy of a Boltzmann teacher's answer, in expectation over it."""
        gap = (self.x[s1, a1] - self.x[s2, a2]).sum(-1)
        share = torch.sigmoid((self.truth[s1, a1] - self.truth[s2, a2]).sum(-1))
        return torch.nn.functional.binary_cross_entropy_with_logits(gap, share, reduction="none")

    def gradient(self, offset: int, lead: int, policy: Tensor) -> Tensor:
        """∇φ of fragments at an offset, through the last `lead` steps before them only."""
        start = self.mdp.initial_distribution
        for _ in range(offset - lead):
            start = torch.einsum("s,sa,sat->t", start, policy, self.mdp.transition)
        assert start is not None
        objective = exact_pair_objective(
            self.mdp.replace(initial_distribution=start.detach(), validate="off"),
            self.loss,
            temperature=TEMPERATURE,
            steps=STEPS,
            offset=lead,
            policy=policy,
        )
        (found,) = torch.autograd.grad(objective, self.x, retain_graph=True)
        return found.flatten()

    def candidates(self, offset: int) -> dict[str, Tensor]:
        fixed = self.policy.detach()
        tilt = (self.x - self.x.detach()) / TEMPERATURE
        one_step = (fixed.log() + tilt).softmax(-1)  # the score of r in place of that of Q
        found = {f"lead {n}": self.gradient(offset, n, self.policy) for n in LEADS if n < offset}
        if not offset:
            found["lead 0"] = self.gradient(0, 0, self.policy)
        found["one step"] = self.gradient(offset, 0, one_step)
        found["no score"] = self.gradient(offset, 0, fixed)
        return found


def measure(instances: int, sharpness: float, stay: float) -> list[dict[str, Any]]:
    """A row per offset: relative error and cosine of each candidate."""
    rows: list[dict[str, Any]] = []
    everything = [Instance(seed, sharpness, stay) for seed in range(instances)]
    for offset in OFFSETS:
        errors: dict[str, list[float]] = {}
        cosines: dict[str, list[float]] = {}
        for instance in everything:
            exact = instance.gradient(offset, offset, instance.policy)
            for name, found in instance.candidates(offset).items():
                errors.setdefault(name, []).append(float((found - exact).norm() / exact.norm()))
                cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
                cosines.setdefault(name, []).append(float(cosine))
        rows.append(
            {
                "offset": offset,
                "median error": {name: median(values) for name, values in errors.items()},
                "largest error": {name: max(values) for name, values in errors.items()},
                "median cosine": {name: median(values) for name, values in cosines.items()},
                "smallest cosine": {name: min(values) for name, values in cosines.items()},
            }
        )
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown: relative error of ∇φ, median (largest) of the instances."""
    names = {f"lead {n}": f"lead {n}" if n else "no lead" for n in SHOWN_LEADS}
    names |= {"one step": "one-step score, no lead", "no score": "no score"}
    lines = [
        f"| process | first step | {' | '.join(names.values())} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for process, rows in report["tables"].items():
        head = process
        for row in rows:
            if row["offset"] not in SHOWN_OFFSETS:
                continue
            middle, largest = row["median error"], row["largest error"]
            cells = [
                f"{middle[name]:.2f} ({_two_digits(largest[name])})" if name in middle else "0"
                for name in names  # a lead as long as all that comes before has no error
            ]
            lines.append(f"| {head} | {row['offset']} | {' | '.join(cells)} |")
            head = ""
    return "\n".join(lines)


def _two_digits(number: float) -> str:
    return f"{number:.1f}" if number >= 1 else f"{number:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    tables = {}
    for name, (sharpness, stay) in PROCESSES.items():
        tables[name] = measure(options.instances, sharpness, stay)
        print(f"{name}: transitions {1 - stay:.1g} softmax({sharpness:g} N(0, 1)) + {stay:g} stay")
    print(table({"tables": tables}))
    if options.out:
        command = f"python benchmarks/fragment_offsets.py --instances {options.instances}"
        report = {
            **machine.header(command, torch.device("cpu"), 1, False),
            "seconds": time.perf_counter() - began,
            "instances": options.instances,
            "tables": tables,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
