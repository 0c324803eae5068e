"""How much faster are the batched pair loss and SoBiRL's step than a Python loop over the pairs?

"as published" does, fragment by fragment, the work of the code published with SoBiRL, on top of the
preference model of imitation 1.0: arrays are put together, turned into tensors and scaled, the
action one-hot, the next observation too though nothing reads it; one evaluation of the reward, for
the step another one of all actions and one of the policy; one probability per pair, written into a
tensor; the same from the true rewards, for the metrics. "lean loop" has tensors ready and makes one
call per fragment.

Before a time is taken, losses and gradients are compared. Each candidate takes a step's work, with
the gradient in every parameter, in evaluation mode, where all compute the same. Counted is
processor time of one thread, so that other processes of a machine change it little; seconds of the
wall are stored beside it.

    python benchmarks/pair_loss.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from birl_bench.machine import header
from birl_bench.report import digits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from birl_ext.agents.categorical import CategoricalPolicy
from birl_ext.agents.networks import MLP, NatureCNN
from birl_ext.bilevel.score import OneStep
from birl_ext.bilevel.sobirl import SoBiRL
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.loss import bradley_terry, margins
from birl_ext.preferences.reward_model import RewardNetwork

PAIRS = 64
STEPS = 25
ACTIONS = 9
MLP_INPUTS = 17
FRAME = (4, 84, 84)
TEMPERATURE = 0.2
THRESHOLD = 50.0
"""Differences of returns are cut there by the published loop."""
AT_ONCE = 200
"""Steps per call, of the candidate in parts."""
REPEATS = {"mlp": 21, "pixels": 3}


class Policy(CategoricalPolicy):
    """A network's softmax."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def log_probs(self, observation: Tensor) -> Tensor:
        logits: Tensor = self.network(observation)
        return logits.log_softmax(-1)


class Trajectory(NamedTuple):
    """A fragment as the published code keeps it: arrays, with one observation more than actions."""

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray


class Case(NamedTuple):
    """What all candidates start from."""

    reward: RewardNetwork
    policy: Policy
    pairs: Pairs
    trajectories: list[tuple[Trajectory, Trajectory]]
    learner: SoBiRL
    optimiser: torch.optim.Optimizer


Answer = tuple[Tensor, list[Tensor]]
"""Loss, and gradient in every parameter."""


# The loop as published


def flattened(part: Trajectory) -> dict[str, np.ndarray]:
    """One batch of steps, from a list of one trajectory."""
    done = np.zeros(len(part.action), dtype=bool)
    columns = {
        "observation": [part.observation[:-1]],
        "next_observation": [part.observation[1:]],
        "action": [part.action],
        "done": [done],
        "info": [np.array([{}] * len(part.action))],
    }
    return {name: np.concatenate(arrays) for name, arrays in columns.items()}


def preprocessed(steps: dict[str, np.ndarray]) -> tuple[Tensor, ...]:
    """Tensors of floats, pixels divided by 255, the action one-hot."""

    def floats(array: np.ndarray) -> Tensor:
        given = torch.as_tensor(array)
        return given.float() / 255 if array.dtype == np.uint8 else given.float()

    action = nn.functional.one_hot(torch.as_tensor(steps["action"]).long(), ACTIONS).float()
    done = torch.as_tensor(steps["done"]).float()
    return floats(steps["observation"]), action, floats(steps["next_observation"]), done


def probability(first: Tensor, second: Tensor) -> Tensor:
    gap = torch.clip((second - first).sum(0), -THRESHOLD, THRESHOLD)
    return 1 / (1 + gap.exp())


def published_rewards(case: Case, part: Trajectory, score: bool) -> tuple[Tensor, Tensor | None]:
    """r of each step, and r less its mean over the policy's actions."""
    where, action, _, _ = preprocessed(flattened(part))
    rewards = (case.reward.body(where) * action).sum(1)
    if not score:
        return rewards, None
    with torch.no_grad():
        logits = acting(case.policy)(where)
        drawn = torch.distributions.Categorical(logits=logits)
        drawn.sample()
        shares = drawn.probs
        logits.log_softmax(1)
    return rewards, rewards - (case.reward.body(where) * shares).sum(1)


def acting(policy: Policy) -> Callable[[Tensor], Tensor]:
    """The policy's network on pixels that are scaled already."""
    network = policy.network
    if isinstance(network, NatureCNN):
        return lambda pixels: network.head(network.convolutions(pixels))
    return network


def published(case: Case, *, score: bool) -> tuple[Tensor, Tensor]:
    """Mean cross entropy, and what is differentiated."""
    count = len(case.trajectories)
    shares, scores, truth = torch.empty(count), torch.empty(count), torch.empty(count)
    for i, (one, other) in enumerate(case.trajectories):
        ours, our_score = published_rewards(case, one, score)
        theirs, their_score = published_rewards(case, other, score)
        shares[i] = probability(ours, theirs)
        if our_score is not None and their_score is not None:
            scores[i] = our_score.sum() + their_score.sum()
        truth[i] = probability(torch.from_numpy(one.reward), torch.from_numpy(other.reward))
    label = case.pairs.label
    metrics = {
        "accuracy": ((shares > 0.5) == (label > 0.5)).float().mean(),
        "loss of the true reward": nn.functional.binary_cross_entropy(truth, label),
    }
    entropy = nn.functional.binary_cross_entropy(shares, label, reduction="none")
    loss = entropy.mean()
    whole = loss + (entropy.detach() * scores / TEMPERATURE).mean() if score else loss
    for value in (whole, *metrics.values()):
        value.item()  # into a log
    return loss.detach(), whole


# Candidates


def published_loss(case: Case) -> Answer:
    return differentiated(case, *published(case, score=False))


def published_step(case: Case) -> Answer:
    case.optimiser.zero_grad()
    loss, whole = published(case, score=True)
    whole.backward()
    case.optimiser.step()
    return loss, gradients(case.reward.parameters())


def lean_loss(case: Case) -> Answer:
    losses = []
    for i in range(len(case.pairs)):
        first, second = (
            case.reward(part.observation[i], part.action[i]).sum()
            for part in (case.pairs.first, case.pairs.second)
        )
        label = case.pairs.label[i : i + 1]
        losses.append(bradley_terry((first - second).unsqueeze(0), label))
    loss = torch.cat(losses).mean()
    return differentiated(case, loss.detach(), loss)


def batched_loss(case: Case, at_once: int | None = None) -> Answer:
    margin = margins(case.reward, case.pairs, at_once=at_once)
    loss = bradley_terry(margin, case.pairs.label).mean()
    return differentiated(case, loss.detach(), loss)


def our_step(case: Case) -> Answer:
    found = case.learner.step(case.pairs, case.policy, temperature=TEMPERATURE)
    return torch.tensor(found.loss), gradients(case.learner.parameters)


def differentiated(case: Case, loss: Tensor, whole: Tensor) -> Answer:
    return loss, list(torch.autograd.grad(whole, list(case.reward.parameters())))


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


TASKS: dict[str, dict[str, Callable[[Case], Answer]]] = {
    "loss and gradient": {
        "as published": published_loss,
        "lean loop": lean_loss,
        "one call": batched_loss,
        "in parts": lambda case: batched_loss(case, AT_ONCE),
    },
    "step of SoBiRL": {
        "as published": published_step,
        "ours": our_step,
    },
}


# Measuring


def make_case(kind: str, generator: torch.Generator) -> Case:
    def observed() -> Tensor:
        shape = (PAIRS, STEPS + 1)
        if kind == "pixels":
            return torch.randint(256, (*shape, *FRAME), generator=generator, dtype=torch.uint8)
        return torch.randn(*shape, MLP_INPUTS, generator=generator)

    def fragments(whole: Tensor) -> Fragments:
        shape = (PAIRS, STEPS)
        return Fragments(
            observation=whole[:, :-1],
            action=torch.randint(ACTIONS, shape, generator=generator),
            reward=torch.randn(shape, generator=generator),
            present=torch.ones(shape, dtype=torch.bool),
            log_prob=torch.zeros(shape),
            version=torch.zeros(PAIRS, dtype=torch.int64),
        )

    wholes = [observed(), observed()]
    sides = [fragments(whole) for whole in wholes]
    label = torch.randint(2, (PAIRS,), generator=generator).float()
    arrays = [
        [
            Trajectory(*(rows.numpy() for rows in steps))
            for steps in zip(whole, side.action, side.reward, strict=True)
        ]
        for whole, side in zip(wholes, sides, strict=True)
    ]
    network: nn.Module
    if kind == "pixels":
        reward = RewardNetwork.cnn(FRAME, generator, actions=ACTIONS)
        network = NatureCNN(FRAME, ACTIONS, generator=generator)
    else:
        reward = RewardNetwork.mlp(MLP_INPUTS, generator, actions=ACTIONS)
        network = MLP(MLP_INPUTS, ACTIONS, hidden=(64, 64), generator=generator)

    def still(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.0)  # works, and changes nothing

    # the published step has neither a baseline nor importance weights
    learner = SoBiRL(reward, optimiser=still, score=OneStep(ACTIONS), baseline="none", stale="keep")
    return Case(
        reward,
        Policy(network),
        Pairs(sides[0], sides[1], label),
        list(zip(*arrays, strict=True)),
        learner,
        still(reward.parameters()),
    )


def agree(
    case: Case, candidates: dict[str, Callable[[Case], Answer]]
) -> tuple[float, dict[str, int]]:
    """Largest difference of a gradient from the published loop's, relative to the largest entry;
    and the floating-point operations of each candidate's products and convolutions.
    """
    answers, counted = {}, {}
    for name, candidate in candidates.items():
        with FlopCounterMode(display=False) as counter:
            answers[name] = candidate(case)
        counted[name] = int(counter.get_total_flops())
    loss, expected = answers["as published"]
    scale = max(float(part.abs().max()) for part in expected)
    worst = 0.0
    for name, (other, found) in answers.items():
        gap = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / scale
        if not (gap < 1e-3 and abs(float(loss - other)) < 1e-5 * max(1.0, float(loss))):
            raise AssertionError(f"{name}: losses {other} and {loss}, gradients differ by {gap}")
        worst = max(worst, gap)
    return worst, counted


def measure(
    case: Case, candidates: dict[str, Callable[[Case], Answer]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds per step, taken in turns so that all meet the same machine."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"processor": [], "wall": []} for name in candidates
    }
    for _ in range(repeats):
        for name, candidate in candidates.items():
            wall, processor = time.perf_counter(), time.process_time()
            candidate(case)
            seconds[name]["processor"].append(time.process_time() - processor)
            seconds[name]["wall"].append(time.perf_counter() - wall)
    return seconds


def peak() -> float:
    """Operations per second of a product of matrices that stay in cache, the best of several."""
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    best = 0.0
    for _ in range(20):
        start = time.process_time()
        for _ in range(10):
            left @ right
        best = max(best, 10 * 2 * 512**3 / (time.process_time() - start))
    return best


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| work of 64 pairs of 25 steps | | ms | as published / this | GFLOP | GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        head = f"{row['case']}, {row['task']}"
        for name, seconds in row["median_processor_seconds"].items():
            count = row["operations"][name]
            gain = f"{row['times_the_published'][name]:.2f}"
            rest = (
                digits(1e3 * seconds),
                gain,
                digits(count / 1e9),
                digits(count / seconds / 1e9),
            )
            lines.append(f"| {head} | {name} | {' | '.join(rest)} |")
            head = ""
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert __doc__ is not None
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the actions that the published step draws and does not use
    top = peak()
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        **header(
            f"python benchmarks/pair_loss.py{' --quick' if options.quick else ''}",
            torch.device("cpu"),
            1,
            options.quick,
        ),
        "pairs": PAIRS,
        "steps": STEPS,
        "at_once": AT_ONCE,
        "operations_per_second_of_a_product": top,
        "rows": [],
    }
    names = {"mlp": f"MLP 64-64 on {MLP_INPUTS} numbers", "pixels": "CNN on 84x84x4 pixels"}
    for kind, name in names.items():
        case = make_case(kind, torch.Generator().manual_seed(0))
        for task, candidates in TASKS.items():
            gap, counted = agree(case, candidates)
            seconds = measure(case, candidates, 1 if options.quick else REPEATS[kind])
            middle = {
                which: statistics.median(times["processor"]) for which, times in seconds.items()
            }
            base = middle["as published"]
            report["rows"].append(
                {
                    "case": name,
                    "task": task,
                    "seconds": seconds,
                    "median_processor_seconds": middle,
                    "pairs_per_second": {which: PAIRS / time for which, time in middle.items()},
                    "times_the_published": {which: base / time for which, time in middle.items()},
                    "operations": counted,
                    "floor_seconds": {which: count / top for which, count in counted.items()},
                    "gradient_gap": gap,
                }
            )
            print(f"{name}, {task}", flush=True)
            for which, time_taken in middle.items():
                print(
                    f"    {which:34} {1e3 * time_taken:9.2f} ms  {base / time_taken:6.2f}x  "
                    f"{counted[which] / 1e9:7.2f} GFLOP  {counted[which] / time_taken / 1e9:6.1f} "
                    "GFLOP/s",
                    flush=True,
                )
    print(f"a product of matrices: {top / 1e9:.1f} GFLOP/s")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
