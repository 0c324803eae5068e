"""Is a follower strong enough to judge a reward by? Agents with the settings of a preference run,
told the environment's own reward.

Every `every` steps the greedy policy plays 20 episodes whose starts are the same for all; processor
time is without these. Stable-Baselines3, where it is installed, learns the same tasks with the
settings that its own collection of tuned ones (RL Zoo) has for them, one environment, and is judged
by the same episodes.

    python benchmarks/followers.py [--candidates …] [--seeds N] [--out FILE]
    python benchmarks/followers.py --table FILE

Every finished run is written at once, and a run that the file already holds is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from birl_bench.machine import header, today
from birl_bench.report import store
from birl_bench.report import table as markdown

from birl_ext.environments.vector import make_environments
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.preference.parts import Generators, make_agent, make_replay
from birl_ext.rollouts.collect import Collector
from birl_ext.rollouts.evaluate import evaluate_agent
from birl_ext.runs.config import to_plain
from birl_ext.runs.versions import installed

EPISODES = 20
STARTS = 1_000_003
"""Seed of the first of the starts that everyone is judged from."""


@dataclass(frozen=True)
class Task:
    env: str
    steps: int
    every: int
    """Steps between evaluations."""
    goal: float


CARTPOLE = Task("CartPole-v1", 50_000, 5_000, 475.0)
PENDULUM = Task("Pendulum-v1", 10_000, 1_000, -200.0)


@dataclass(frozen=True)
class Candidate:
    task: Task
    settings: dict[str, Any] = field(default_factory=dict)
    """What differs from the defaults; of Stable-Baselines3, its model's."""
    rival: str = ""
    """Of Stable-Baselines3."""


EARLIER = {
    "hidden": (64, 64),
    "learning_rate": 1e-3,
    "anneal": False,
    "update_every": 2,
    "burst": 1,
    "target_rate": 0.01,
}
"""The defaults until November 2026."""
FIXED = {"temperature": 0.1, "entropy_target": False}
"""For rewards of a known scale, about one per step."""
CANDIDATES = {
    "soft Q": Candidate(CARTPOLE, {"follower": "soft-q"}),
    "soft Q, τ fixed": Candidate(CARTPOLE, {"follower": "soft-q", **FIXED}),
    "discrete SAC": Candidate(CARTPOLE, {"follower": "sac"}),
    "discrete SAC, earlier defaults": Candidate(CARTPOLE, {"follower": "sac", **EARLIER}),
    "Stable-Baselines3 DQN": Candidate(
        CARTPOLE,
        {
            "learning_rate": 2.3e-3,
            "batch_size": 64,
            "buffer_size": 100_000,
            "learning_starts": 1000,
            "gamma": 0.99,
            "target_update_interval": 10,
            "train_freq": 256,
            "gradient_steps": 128,
            "exploration_fraction": 0.16,
            "exploration_final_eps": 0.04,
            "policy_kwargs": {"net_arch": [256, 256]},
        },
        rival="DQN",
    ),
    "SAC": Candidate(PENDULUM, {"follower": "sac"}),
    "SAC, τ fixed": Candidate(PENDULUM, {"follower": "sac", **FIXED}),
    "Stable-Baselines3 SAC": Candidate(PENDULUM, {"learning_rate": 1e-3}, rival="SAC"),
}


Judge = Callable[[Any], None]


USED = """
    follower discount temperature entropy_target entropy_share update_every burst n_step batch_size
    replay learning_rate anneal hidden target_rate target_period environments environment_steps
"""


def config_of(candidate: Candidate, seed: int) -> PreferenceConfig:
    task = candidate.task
    rounds: dict[str, Any] = {"rounds": task.steps // 1000, "environment_steps": 1000}
    return PreferenceConfig(env=task.env, seed=seed, **rounds, **candidate.settings)


def recorded(candidate: Candidate) -> dict[str, Any]:
    """The settings that decide what is measured, as JSON holds them."""
    if candidate.rival:
        found: dict[str, Any] = candidate.settings
    else:
        plain = to_plain(config_of(candidate, 0))
        found = {name: plain[name] for name in USED.split()}
    held: dict[str, Any] = json.loads(json.dumps(found))
    return held


def ours(candidate: Candidate, seed: int, judge: Judge) -> None:
    task, config, draws = candidate.task, config_of(candidate, seed), Generators(seed)
    with make_environments(task.env, count=config.environments, seed=seed) as environments:
        agent = make_agent(config, environments.spaces, draws)
        sampling = draws.next()
        collector = Collector(environments, agent, seed=seed, random_steps=config.random_steps)
        replay = make_replay(config)
        due = task.every
        while collector.transitions < task.steps:
            replay.record(collector.collect(1))
            while agent.version < config.updates_due(collector.transitions):
                if config.n_step == 1:
                    batch, present = replay.sample(config.batch_size, sampling), None
                else:
                    batch, present = replay.ahead(config.batch_size, config.n_step, sampling)
                agent.update(batch, batch.reward, present)
            if collector.transitions >= due:
                judge(agent)
                due += task.every


class Rival:
    """A model of Stable-Baselines3, as far as `evaluate_agent` asks."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.model = model

    def act(self, observation: Any, generator: torch.Generator, greedy: bool = False) -> Any:
        return torch.as_tensor(self.model.predict(observation.numpy(), deterministic=greedy)[0])


def theirs(candidate: Candidate, seed: int, judge: Judge) -> None:
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback

    task = candidate.task

    class Judged(BaseCallback):  # type: ignore[misc, unused-ignore]
        def _on_step(self) -> bool:
            if self.num_timesteps % task.every == 0:
                judge(Rival(self.model))
            return True

    kind = getattr(stable_baselines3, candidate.rival)
    model = kind("MlpPolicy", task.env, seed=seed, device="cpu", **candidate.settings)
    model.learn(task.steps, callback=Judged())


def measure(name: str, seed: int) -> dict[str, Any]:
    """One run to its end."""
    candidate = CANDIDATES[name]
    task, returns = candidate.task, []
    spent, since = 0.0, time.process_time()

    def judge(agent: Any) -> None:
        nonlocal spent, since
        spent += time.process_time() - since
        with make_environments(task.env, count=EPISODES, seed=STARTS) as own:
            returns.append(round(evaluate_agent(agent, own, episodes=EPISODES).mean, 2))
        since = time.process_time()

    (theirs if candidate.rival else ours)(candidate, seed, judge)
    spent += time.process_time() - since
    reached = [i for i, value in enumerate(returns, 1) if value >= task.goal]
    return {
        "candidate": name,
        "seed": seed,
        "returns": returns,
        "reached": reached[0] * task.every if reached else None,
        "seconds_per_1000_steps": round(1000 * spent / task.steps, 3),
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown, of all runs."""
    lines = []
    for name, candidate in CANDIDATES.items():
        task = candidate.task
        runs = [run for run in report["runs"] if run["candidate"] == name]
        if not runs and candidate.rival and not report["versions"]["stable_baselines3"]:
            lines.append([task.env, name, *["not installed"] * 5])
        if not runs:
            continue
        steps = [run["reached"] for run in runs if run["reached"] is not None]
        first = ", ".join(f"{run['reached'] or '–'}" for run in runs)
        best = ", ".join(f"{max(run['returns']):.0f}" for run in runs)
        last = ", ".join(f"{run['returns'][-1]:.0f}" for run in runs)
        seconds = statistics.fmean(run["seconds_per_1000_steps"] for run in runs)
        passed = f"{len(steps)} of {len(runs)}"
        lines.append([task.env, name, passed, first, best, last, f"{seconds:.2f}"])
    head = ["", "follower", "reached", "first at step", "best", "last", "s per 1,000 steps"]
    return markdown(head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, … of each")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / f"followers_{today()}.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print that of an earlier run")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return 0
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        **header("python benchmarks/followers.py", threads=1),
        "settings": {name: recorded(one) for name, one in CANDIDATES.items()},
        "runs": [],
    }
    report["versions"]["stable_baselines3"] = installed("stable_baselines3")
    if options.out.exists():
        held = json.loads(options.out.read_text())
        for name in options.candidates:
            old, new = held["settings"].get(name), report["settings"][name]
            if old is not None and old != new:
                parser.error(
                    f"{options.out} holds {name} with other settings; choose another --out"
                )
            held["settings"][name] = new
        report = {**held, "versions": {**held["versions"], **report["versions"]}}
    done = {(run["candidate"], run["seed"]) for run in report["runs"]}
    for seed, name in itertools.product(range(options.seeds), options.candidates):
        if (name, seed) in done:
            continue
        if CANDIDATES[name].rival and not report["versions"]["stable_baselines3"]:
            print(f"{name}: not installed", file=sys.stderr)
            continue
        run = measure(name, seed)
        report["runs"].append(run)
        store(report, options.out)
        print(run, flush=True)
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
