"""How much faster is the batched pair loss than a Python loop over the pairs?

The loop is what published code does: one evaluation of the reward and one loss per pair. Before a
time is taken the two losses and their gradients are compared. Both take a step's work: the loss of
a batch and its gradient in every parameter, in evaluation mode, where both compute the same.

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


def batched(reward: RewardNetwork, pairs: Pairs) -> Tensor:
    return bradley_terry(margins(reward, pairs), pairs.label).mean()


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


def agree(reward: RewardNetwork, pairs: Pairs) -> float:
    """Largest difference of the two gradients, relative to the largest entry."""
    (one, ours), (other, theirs) = (step(loss, reward, pairs) for loss in (batched, looped))
    scale = max(float(part.abs().max()) for part in theirs)
    gap = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale
    if not (gap < 1e-3 and abs(float(one - other)) < 1e-5 * max(1.0, float(other))):
        raise AssertionError(f"losses {float(one)} and {float(other)}, gradients differ by {gap}")
    return gap


def measure(reward: RewardNetwork, pairs: Pairs, repeats: int) -> dict[str, list[float]]:
    """Seconds per step, the two taken in turns so that both meet the same machine."""
    seconds: dict[str, list[float]] = {"batched": [], "looped": []}
    for _ in range(repeats):
        for loss in (batched, looped):
            start = time.perf_counter()
            step(loss, reward, pairs)
            seconds[loss.__name__].append(time.perf_counter() - start)
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
    for name, (reward, pairs) in cases(torch.Generator().manual_seed(0)).items():
        gap = agree(reward, pairs)
        seconds = measure(reward, pairs, 2 if options.quick else REPEATS)
        middle = {loss: statistics.median(times) for loss, times in seconds.items()}
        row = {
            "case": name,
            "seconds": seconds,
            "pairs_per_second": {loss: PAIRS / time for loss, time in middle.items()},
            "ratio": middle["looped"] / middle["batched"],
            "gradient_gap": gap,
        }
        report["rows"].append(row)
        print(
            f"{name:26} batched {1e3 * middle['batched']:9.2f} ms   "
            f"loop {1e3 * middle['looped']:9.2f} ms   ratio {row['ratio']:.2f}",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
