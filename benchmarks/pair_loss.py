"""How much faster is the batched pair loss than a Python loop over the pairs?

The loop is what published code does: one evaluation of the reward per fragment and one loss per
pair. "one call" is `margins`, "in parts" the same with `at_once`. Before a time is taken the losses
and their gradients are compared. Each takes a step's work: the loss of a batch and its gradient in
every parameter, in evaluation mode, where all compute the same.

    python benchmarks/pair_loss.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import birl_ext
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.loss import bradley_terry, margins
from birl_ext.preferences.reward_model import RewardNetwork

PAIRS = 64
STEPS = 25
ACTIONS = 9
MLP_INPUTS = 17
REPEATS = 7


AT_ONCE = 200
"""Steps per call, of the candidate between one call and the loop."""


def one_call(reward: RewardNetwork, pairs: Pairs) -> Tensor:
    return bradley_terry(margins(reward, pairs), pairs.label).mean()


def in_parts(reward: RewardNetwork, pairs: Pairs) -> Tensor:
    return bradley_terry(margins(reward, pairs, at_once=AT_ONCE), pairs.label).mean()


def looped(reward: RewardNetwork, pairs: Pairs) -> Tensor:
    losses = []
    for i in range(len(pairs)):
        first = reward(pairs.first.observation[i], pairs.first.action[i]).sum()
        second = reward(pairs.second.observation[i], pairs.second.action[i]).sum()
        losses.append(bradley_terry((first - second).unsqueeze(0), pairs.label[i : i + 1]))
    return torch.cat(losses).mean()


def random_pairs(observe: Callable[[tuple[int, ...]], Tensor], generator: torch.Generator) -> Pairs:
    def fragments() -> Fragments:
        shape = (PAIRS, STEPS)
        return Fragments(
            observation=observe(shape),
            action=torch.randint(ACTIONS, shape, generator=generator),
            reward=torch.zeros(shape),
            present=torch.ones(shape, dtype=torch.bool),
            log_prob=torch.zeros(shape),
            version=torch.zeros(PAIRS, dtype=torch.int64),
        )

    label = torch.randint(2, (PAIRS,), generator=generator).float()
    return Pairs(fragments(), fragments(), label)


def cases(generator: torch.Generator) -> dict[str, tuple[RewardNetwork, Pairs]]:
    def pixels(shape: tuple[int, ...]) -> Tensor:
        size = (*shape, 4, 84, 84)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape, MLP_INPUTS, generator=generator)

    return {
        f"MLP 64-64 on {MLP_INPUTS} numbers": (
            RewardNetwork.mlp(MLP_INPUTS, generator, actions=ACTIONS),
            random_pairs(numbers, generator),
        ),
        "CNN on 84x84x4 pixels": (
            RewardNetwork.cnn((4, 84, 84), generator, actions=ACTIONS),
            random_pairs(pixels, generator),
        ),
    }


def step(
    loss: Callable[[RewardNetwork, Pairs], Tensor], reward: RewardNetwork, pairs: Pairs
) -> Any:
    value = loss(reward, pairs)
    return value.detach(), torch.autograd.grad(value, list(reward.parameters()))


CANDIDATES = {"loop": looped, "one call": one_call, "in parts": in_parts}


def agree(reward: RewardNetwork, pairs: Pairs) -> float:
    """Largest difference of a gradient from the loop's, relative to the largest entry."""
    loss, gradients = step(looped, reward, pairs)
    scale = max(float(part.abs().max()) for part in gradients)
    worst = 0.0
    for name in ("one call", "in parts"):
        other, found = step(CANDIDATES[name], reward, pairs)
        gap = max(float((a - b).abs().max()) for a, b in zip(found, gradients, strict=True)) / scale
        if not (gap < 1e-3 and abs(float(loss - other)) < 1e-5 * max(1.0, float(loss))):
            raise AssertionError(f"{name}: losses {other} and {loss}, gradients differ by {gap}")
        worst = max(worst, gap)
    return worst


def measure(reward: RewardNetwork, pairs: Pairs, repeats: int) -> dict[str, list[float]]:
    """Seconds per step, taken in turns so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(repeats):
        for name, loss in CANDIDATES.items():
            start = time.perf_counter()
            step(loss, reward, pairs)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used, "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two repeats instead of seven")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert __doc__ is not None
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {"birl_ext": birl_ext.__version__, "torch": torch.__version__},
        "pairs": PAIRS,
        "steps": STEPS,
        "rows": [],
    }
    for case, (reward, pairs) in cases(torch.Generator().manual_seed(0)).items():
        gap = agree(reward, pairs)
        seconds = measure(reward, pairs, 2 if options.quick else REPEATS)
        middle = {name: statistics.median(times) for name, times in seconds.items()}
        row = {
            "case": case,
            "at_once": AT_ONCE,
            "seconds": seconds,
            "pairs_per_second": {which: PAIRS / time for which, time in middle.items()},
            "times_the_loop": {which: middle["loop"] / time for which, time in middle.items()},
            "gradient_gap": gap,
        }
        report["rows"].append(row)
        cells = "  ".join(
            f"{which} {1e3 * time:8.2f} ms ({middle['loop'] / time:.2f}x)"
            for which, time in middle.items()
        )
        print(f"{case:26} {cells}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
