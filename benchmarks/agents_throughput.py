"""How many updates and environment steps per second does discrete SAC make, next to other code?

"ours" is DiscreteSAC with a Collector and a ReplayBuffer, as `birl run preference` sets it up.
"single file" is the same algorithm as people write it into one file: plain modules, a ring of
NumPy arrays, torch's default Adam. "SB3 DQN" is Stable-Baselines3's DQN: an update of it trains one
network where soft actor-critic trains three, so only its environment steps compare like with like.

An environment step is one action of the policy, one step of one environment, and one row into the
replay; several environments in one process take theirs together. An update samples a batch and
trains on it. Networks, batch and environments are the same for all. Before a time is taken, one
update of ours and of the single file from equal weights on an equal batch must end in equal
weights. A step of training is an environment step with half an update, from these two.

Counted is processor time of one thread, candidates in turn; seconds of the wall are stored beside
it.

    python benchmarks/agents_throughput.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from birl_bench.machine import header
from birl_bench.report import digits
from torch import Tensor, nn
from torch.nn import functional

from birl_ext.agents.networks import Twin, head_network
from birl_ext.agents.sac_discrete import DiscreteSAC
from birl_ext.agents.temperature import Temperature, discrete_entropy_target
from birl_ext.environments.transitions import Transitions
from birl_ext.environments.vector import make_environments
from birl_ext.replay.buffer import ReplayBuffer
from birl_ext.rollouts.collect import Collector

BATCH = 64
DISCOUNT = 0.99
RATE = 1e-3
TARGET_RATE = 0.01
HIDDEN = (64, 64)
STEPS_PER_UPDATE = 2
REPEATS = 9
CHUNK = 100
"""Environment steps that are timed come in multiples of it."""


class Setting(NamedTuple):
    """Environments, and how much is timed at once, in steps of all of them together."""

    name: str
    make: Callable[[], gymnasium.Env[Any, Any]]
    environments: int
    capacity: int
    filled: int
    steps: int
    updates: int


class Candidate(NamedTuple):
    """What is timed: each call makes the number of steps, or of updates, that it is given."""

    step: Callable[[int], None]
    update: Callable[[int], None]


def cart_pole() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1")


def pong() -> gymnasium.Env[Any, Any]:
    import ale_py

    gymnasium.register_envs(ale_py)
    env = gymnasium.make("ALE/Pong-v5", frameskip=1)
    env = gymnasium.wrappers.AtariPreprocessing(env)
    return gymnasium.wrappers.FrameStackObservation(env, 4)


SETTINGS = (
    Setting("CartPole-v1, MLP 64-64", cart_pole, 1, 50_000, 2000, 5 * CHUNK, 100),
    Setting("4 of CartPole-v1, MLP 64-64", cart_pole, 4, 50_000, 2000, 20 * CHUNK, 100),
    Setting("ALE/Pong-v5, NatureCNN", pong, 1, 1000, 2 * CHUNK, CHUNK, 2),
)


# Ours


class Ours:
    def __init__(self, setting: Setting) -> None:
        environments = make_environments(setting.make, count=setting.environments)
        spaces = environments.spaces
        assert spaces.actions is not None
        shape, dtype, actions = spaces.observation_shape, spaces.observation_dtype, spaces.actions
        draws = torch.Generator().manual_seed(0)

        def network() -> nn.Module:
            return head_network(shape, dtype, actions, generator=draws, hidden=HIDDEN)

        self.agent = DiscreteSAC(
            network(),
            Twin(network(), network()),
            discount=DISCOUNT,
            temperature=Temperature(
                1.0, entropy_target=discrete_entropy_target(actions, 0.5), learning_rate=RATE
            ),
            optimiser=lambda parameters: torch.optim.Adam(parameters, lr=RATE, fused=True),
            target_rate=TARGET_RATE,
            target_period=1,
        )
        self.collector = Collector(environments, self.agent)
        self.replay = ReplayBuffer(setting.capacity)
        self.draws = draws

    def step(self, count: int) -> None:
        for _ in range(count // self.collector.environments.count):
            self.replay.append(self.collector.collect(1).transitions)

    def update(self, count: int) -> None:
        for _ in range(count):
            batch = self.replay.sample(BATCH, self.draws)
            self.agent.update(batch, batch.reward)


# The single file


class SingleFile:
    """Discrete SAC without any library; weights start as copies of ours."""

    def __init__(self, setting: Setting, ours: DiscreteSAC) -> None:
        def copied(source: nn.Module) -> nn.Module:
            return plain(source).requires_grad_()

        self.env = gymnasium.vector.SyncVectorEnv(
            [setting.make] * setting.environments,
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
        )
        space = self.env.single_observation_space
        assert space.shape is not None
        actions = int(self.env.single_action_space.n)  # type: ignore[attr-defined]
        self.scale = 255.0 if space.dtype == np.uint8 else 1.0
        self.actor = copied(ours.actor)
        self.q1, self.q1_target = copied(ours.critics.first), plain(ours.critics.first)
        self.q2, self.q2_target = copied(ours.critics.second), plain(ours.critics.second)
        critics = [*self.q1.parameters(), *self.q2.parameters()]
        self.q_optimizer = torch.optim.Adam(critics, lr=RATE)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=RATE)
        self.log_alpha = torch.zeros(1, requires_grad=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=RATE)
        self.alpha = 1.0
        self.target_entropy = discrete_entropy_target(actions, 0.5)

        self.observations = np.zeros((setting.capacity, *space.shape), space.dtype)
        self.next_observations = np.zeros((setting.capacity, *space.shape), space.dtype)
        self.actions = np.zeros(setting.capacity, np.int64)
        self.rewards = np.zeros(setting.capacity, np.float32)
        self.dones = np.zeros(setting.capacity, np.float32)
        self.place, self.size = 0, 0
        self.random = np.random.default_rng(0)
        self.observation, _ = self.env.reset(seed=0)

    def step(self, count: int) -> None:
        many = self.env.num_envs
        for _ in range(count // many):
            with torch.no_grad():
                logits = self.actor(self.tensor(self.observation))
                action = torch.distributions.Categorical(logits=logits).sample().numpy()
            following, reward, terminated, truncated, info = self.env.step(action)
            last = following.copy()
            for k in np.flatnonzero(terminated | truncated):
                last[k] = info["final_obs"][k]
            rows = slice(self.place, self.place + many)  # capacities are multiples of their number
            self.observations[rows] = self.observation
            self.next_observations[rows] = last
            self.actions[rows] = action
            self.rewards[rows] = reward
            self.dones[rows] = terminated
            self.place = (self.place + many) % len(self.actions)
            self.size = min(self.size + many, len(self.actions))
            self.observation = following

    def update(self, count: int) -> None:
        for _ in range(count):
            index = self.random.integers(0, self.size, BATCH)
            self.train(
                self.tensor(self.observations[index]),
                torch.from_numpy(self.actions[index]),
                self.tensor(self.next_observations[index]),
                torch.from_numpy(self.rewards[index]),
                torch.from_numpy(self.dones[index]),
            )

    def train(
        self, observation: Tensor, action: Tensor, following: Tensor, reward: Tensor, done: Tensor
    ) -> None:
        with torch.no_grad():
            log_next = functional.log_softmax(self.actor(following), dim=1)
            lowest = torch.min(self.q1_target(following), self.q2_target(following))
            value = (log_next.exp() * (lowest - self.alpha * log_next)).sum(1)
            goal = reward + (1 - done) * DISCOUNT * value
        chosen = action.unsqueeze(1)
        q1 = self.q1(observation).gather(1, chosen).squeeze(1)
        q2 = self.q2(observation).gather(1, chosen).squeeze(1)
        q_loss = functional.mse_loss(q1, goal) + functional.mse_loss(q2, goal)
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()

        log_policy = functional.log_softmax(self.actor(observation), dim=1)
        policy = log_policy.exp()
        with torch.no_grad():
            lowest = torch.min(self.q1(observation), self.q2(observation))
        actor_loss = (policy * (self.alpha * log_policy - lowest)).sum(1).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        gap = -(policy * log_policy).sum(1).mean().detach() - self.target_entropy
        alpha_loss = (self.log_alpha * gap).mean()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        self.alpha = self.log_alpha.exp().item()

        for online, target in ((self.q1, self.q1_target), (self.q2, self.q2_target)):
            for new, old in zip(online.parameters(), target.parameters(), strict=True):
                old.data.copy_(TARGET_RATE * new.data + (1 - TARGET_RATE) * old.data)

    def tensor(self, observation: np.ndarray) -> Tensor:
        given = torch.from_numpy(observation).float()
        return given / self.scale if self.scale != 1 else given


def plain(network: nn.Module) -> nn.Sequential:
    """The layers of one of our networks in a row, copied."""
    layers: list[nn.Module] = []
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            fresh: nn.Module = nn.Linear(layer.in_features, layer.out_features)
        elif isinstance(layer, nn.Conv2d):
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
            fresh = nn.Conv2d(*sizes)  # type: ignore[arg-type]
        elif isinstance(layer, nn.ReLU | nn.Flatten):
            fresh = type(layer)()
        else:
            continue
        fresh.load_state_dict(layer.state_dict())
        layers.append(fresh)
    return nn.Sequential(*layers).requires_grad_(False)


# Stable-Baselines3


class BaselinesDQN:
    def __init__(self, setting: Setting) -> None:
        from stable_baselines3 import DQN
        from stable_baselines3.common.vec_env import DummyVecEnv

        env = DummyVecEnv([setting.make] * setting.environments)
        pixels = env.observation_space.dtype == np.uint8
        self.model = DQN(
            "CnnPolicy" if pixels else "MlpPolicy",
            env,
            learning_rate=RATE,
            buffer_size=setting.capacity,
            learning_starts=0,
            batch_size=BATCH,
            gamma=DISCOUNT,
            train_freq=CHUNK // setting.environments,
            gradient_steps=0,  # it trains when asked to
            exploration_initial_eps=0.0,
            exploration_final_eps=0.0,
            policy_kwargs=None if pixels else {"net_arch": list(HIDDEN)},
            seed=0,
            device="cpu",
        )

    def step(self, count: int) -> None:
        self.model.learn(count, reset_num_timesteps=False, log_interval=None)

    def update(self, count: int) -> None:
        self.model.train(gradient_steps=count, batch_size=BATCH)


# Measuring


def candidates(setting: Setting) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Those that can be run, each with a filled replay, and why the others cannot."""
    ours = Ours(setting)
    single = SingleFile(setting, ours.agent)
    found: dict[str, Candidate] = {
        "ours": Candidate(ours.step, ours.update),
        "single file": Candidate(single.step, single.update),
    }
    missing = {}
    try:
        baseline = BaselinesDQN(setting)
        found["SB3 DQN"] = Candidate(baseline.step, baseline.update)
    except ImportError as error:
        missing["SB3 DQN"] = str(error)
    for candidate in found.values():
        candidate.step(setting.filled)
    agree(ours, single)
    return found, missing


def agree(ours: Ours, single: SingleFile) -> None:
    """One update of each, from equal weights on an equal batch, ends in equal weights."""
    batch: Transitions = ours.replay.sample(BATCH, ours.draws)
    ours.agent.update(batch, batch.reward)
    scaled = (single.tensor(rows.numpy()) for rows in (batch.observation, batch.next_observation))
    where, following = scaled
    single.train(where, batch.action, following, batch.reward, batch.terminated.float())
    theirs = nn.ModuleList([single.actor, single.q1, single.q2])
    mine = nn.ModuleList([ours.agent.actor, ours.agent.critics.first, ours.agent.critics.second])
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        gap = float((one - other).detach().abs().max())
        if gap > 0.01 * RATE:  # of a step, which Adam makes as long as the learning rate
            raise AssertionError(f"weights differ by {gap} after an update")
    gap = abs(ours.agent.temperature - single.alpha)
    if gap > 0.01 * RATE:
        raise AssertionError(f"temperatures differ by {gap} after an update")


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Seconds per step and per update, candidates in turn."""
    found, missing = candidates(setting)
    seconds: dict[str, dict[str, dict[str, list[float]]]] = {
        kind: {name: {"processor": [], "wall": []} for name in found}
        for kind in ("environment steps", "updates")
    }
    counts = {"environment steps": setting.steps, "updates": setting.updates}
    for _ in range(repeats):
        for kind, count in counts.items():
            for name, candidate in found.items():
                call = candidate.step if kind == "environment steps" else candidate.update
                wall, processor = time.perf_counter(), time.process_time()
                call(count)
                taken = seconds[kind][name]
                taken["processor"].append((time.process_time() - processor) / count)
                taken["wall"].append((time.perf_counter() - wall) / count)
    rates = {
        kind: {name: 1 / statistics.median(times["processor"]) for name, times in each.items()}
        for kind, each in seconds.items()
    }
    steps, updates = rates["environment steps"], rates["updates"]
    rates["steps of training"] = {
        name: 1 / (1 / steps[name] + 1 / updates[name] / STEPS_PER_UPDATE) for name in found
    }
    return {"setting": setting.name, "rates": rates, "missing": missing, "seconds": seconds}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    names = ("ours", "single file", "SB3 DQN")
    lines = [f"| per second | | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        head = row["setting"]
        for kind, rates in row.get("rates", {}).items():
            cells = [digits(rates[name]) if name in rates else "missing" for name in names]
            lines.append(f"| {head} | {kind} | {' | '.join(cells)} |")
            head = ""
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two repeats")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert __doc__ is not None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        **header(
            f"python benchmarks/agents_throughput.py{' --quick' if options.quick else ''}",
            torch.device("cpu"),
            1,
            options.quick,
        ),
        "batch": BATCH,
        "rows": [],
    }
    for setting in SETTINGS:
        try:
            setting.make().close()
        except (ImportError, gymnasium.error.Error) as error:
            report["rows"].append({"setting": setting.name, "missing": {"all": str(error)}})
            print(f"{setting.name}: missing, {error}")
            continue
        row = measure(setting, 2 if options.quick else REPEATS)
        report["rows"].append(row)
        print(setting.name)
        for kind, rates in row["rates"].items():
            cells = "  ".join(
                f"{name} {rate:8.1f}/s ({rates['ours'] / rate:.2f}x)"
                for name, rate in rates.items()
            )
            print(f"    {kind:18} {cells}", flush=True)
        for name, why in row["missing"].items():
            print(f"    {name}: missing, {why}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
