"""How noisy and how slow is each estimator of the score on CartPole?

    python benchmarks/score_variance.py [--rounds 10] [--repetitions 100] [--out FILE]

A preference run of a few rounds gives a policy and a reward; 1,000 fresh pairs of fragments of 25
steps are drawn from that policy and answered. The indirect part g of the hyper-gradient is
estimated twice from each of the same minibatches of 64 pairs by every estimator. Per estimator:

- variance: E‖g − E g‖², in units of that of the one-step score;
- drawn: share of it that comes from the continuations, and not from the pairs: ½ E‖g − g'‖² of the
  two estimates from one minibatch;
- against direct: its root over the norm of the direct part of the gradient, from all pairs;
- seconds: median processor time of the score of a minibatch and its gradient, on one thread.
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

from birl_ext.bilevel.score import FullHorizon, OneStep, Score
from birl_ext.bilevel.trajectory import trajectory_surrogate
from birl_ext.environments.vector import make_environments
from birl_ext.preferences.fragments import Pairs, draw
from birl_ext.preferences.loss import bradley_terry, margins
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.preference.job import PreferenceJob
from birl_ext.problems.preference.recorder import Recorder
from birl_ext.rollouts.collect import Collector
from birl_ext.simulators.equations import CartPole, DynamicsSimulator

HORIZONS = (5, 10, 20)
PAIRS, BATCH, ENVIRONMENTS, STEPS = 1000, 64, 4, 1000


def fresh_pairs(job: PreferenceJob, generator: torch.Generator) -> Pairs:
    """Answered pairs of fragments of the policy as it is now."""
    with make_environments(job.config.env, count=ENVIRONMENTS, seed=77) as environments:
        recorder = Recorder(ENVIRONMENTS, keep=ENVIRONMENTS * STEPS)
        recorder.record(Collector(environments, job.agent, seed=1).collect(STEPS))
    episodes = recorder.episodes()
    first, second = (draw(episodes, job.config.fragment, PAIRS, generator) for _ in range(2))
    job.teacher.observe(recorder.mean_reward())
    return Pairs(first, second, job.teacher(first, second))


def indirect(job: PreferenceJob, score: Score, pairs: Pairs) -> Tensor:
    """The part of ∇φ̂ that goes through the policy, (d,)."""
    with torch.no_grad():
        loss = bradley_terry(margins(job.reward, pairs), pairs.label)
    parts = [
        score(job.reward, job.agent, part.observation, part.action, part.present)
        for part in (pairs.first, pairs.second)
    ]
    surrogate = trajectory_surrogate(loss, parts[0] + parts[1], temperature=job.agent.temperature)
    found = torch.autograd.grad(surrogate, list(job.reward.parameters()))
    return torch.cat([part.flatten() for part in found])


def direct(job: PreferenceJob, pairs: Pairs) -> Tensor:
    """The part of ∇φ̂ that the pairs have as they are, (d,)."""
    loss = bradley_terry(margins(job.reward, pairs), pairs.label).mean()
    found = torch.autograd.grad(loss, list(job.reward.parameters()))
    return torch.cat([part.flatten() for part in found])


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| estimator | variance, OneStep = 1 | of it from the continuations "
        "| root of it / direct part of ∇φ | processor time |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['estimator']} | {row['variance']:.1f} | {row['drawn']:.2f} "
        f"| {row['against direct']:.1f} | {1e3 * row['seconds']:.0f} ms |"
        for row in report["rows"]
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    job = PreferenceJob(PreferenceConfig(rounds=options.rounds))
    while not job.done:
        metrics = job.step()
    print(f"after {options.rounds} rounds: true return {metrics['true_return']:.0f}")
    generator = torch.Generator().manual_seed(0)
    pairs = fresh_pairs(job, generator)
    discount = job.config.discount
    scores: dict[str, Score] = {"OneStep": OneStep(2)}
    for steps in HORIZONS:
        simulator = DynamicsSimulator(CartPole(), torch.Generator().manual_seed(steps))
        scores[f"FullHorizon, K = {steps}"] = FullHorizon(simulator, discount=discount, steps=steps)
    found: dict[str, list[Tensor]] = {name: [] for name in scores}
    seconds: dict[str, list[float]] = {name: [] for name in scores}
    for _ in range(options.repetitions):
        batch = pairs.select(torch.randperm(PAIRS, generator=generator)[:BATCH])
        for name, score in scores.items():
            began = time.process_time()
            one = indirect(job, score, batch)
            seconds[name].append(time.process_time() - began)
            found[name].append(torch.stack([one, indirect(job, score, batch)]))
    size = direct(job, pairs).norm()
    rows: list[dict[str, Any]] = []
    for name in scores:
        each = torch.stack(found[name])  # (repetitions, 2, d)
        gaps = each[:, 0] - each[:, 0].mean(0)
        variance = gaps.square().sum() / (len(each) - 1)
        drawn = (each[:, 0] - each[:, 1]).square().sum(-1).mean() / 2
        rows.append(
            {
                "estimator": name,
                "variance": float(variance) / (rows[0]["absolute"] if rows else float(variance)),
                "absolute": float(variance),
                "drawn": float(drawn / variance),
                "against direct": float(variance.sqrt() / size),
                "seconds": median(seconds[name]),
            }
        )
    print(table({"rows": rows}))
    if options.out:
        command = (
            f"python benchmarks/score_variance.py --rounds {options.rounds} "
            f"--repetitions {options.repetitions}"
        )
        report = {
            **machine.header(command, torch.device("cpu"), 1, False),
            "true_return": metrics["true_return"],
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
