"""Learning a reward from a teacher's preferences in a Gymnasium environment."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from birl_ext.agents.agent import Agent
from birl_ext.agents.collect import Collection, Collector
from birl_ext.agents.environment import make_environments
from birl_ext.agents.evaluate import Evaluation, evaluate_agent
from birl_ext.agents.networks import Twin, head_network
from birl_ext.agents.replay import ReplayBuffer
from birl_ext.agents.sac_discrete import DiscreteSAC
from birl_ext.agents.spaces import Spaces
from birl_ext.agents.temperature import Temperature, discrete_entropy_target
from birl_ext.bilevel.score import OneStep
from birl_ext.bilevel.sobirl import DRLHF, Outcome, SoBiRL
from birl_ext.errors import ConfigError
from birl_ext.preferences.buffer import PreferenceBuffer
from birl_ext.preferences.fit import fit
from birl_ext.preferences.fragments import Episode, draw
from birl_ext.preferences.reward_model import RewardNetwork
from birl_ext.preferences.schedule import QuerySchedule
from birl_ext.preferences.teachers import TEACHERS, ScriptedTeacher
from birl_ext.problems.preference_config import PreferenceConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PreferenceJob", "Recorder"]


class PreferenceJob:
    """One run of SoBiRL, or of reward learning alone, in one environment."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config
        draws = _Generators(config.seed)
        self._environments = make_environments(
            config.env, count=config.environments, seed=config.seed
        )
        spaces = self._environments.spaces
        self.agent = make_agent(config, spaces, draws)
        self._collector = Collector(
            self._environments,
            self.agent,
            seed=config.seed,
            random_steps=config.environment_steps,
        )
        self._replay = ReplayBuffer(config.replay)
        self.reward = make_reward(spaces, draws.next())
        score = OneStep(spaces.actions)

        def optimiser(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=config.reward_rate, fused=True)

        self.learner = (
            SoBiRL(self.reward, optimiser=optimiser, score=score)
            if config.algorithm == "sobirl"
            else DRLHF(self.reward, optimiser=optimiser)
        )
        self.teacher = ScriptedTeacher(TEACHERS[config.teacher], draws.next())
        self.answers = PreferenceBuffer(config.pairs)
        self.schedule = QuerySchedule(
            "hyperbolic", config.rounds, config.labels, config.initial_labels
        )
        self._recorder = Recorder(config.environments, keep=4 * config.environment_steps)
        self._sampling = draws.next()  # of minibatches and questions
        self._draws = draws
        self._round = 0
        self._return = math.nan
        self._seconds = dict.fromkeys(("environment", "update", "reward"), 0.0)

    @property
    def total_steps(self) -> int:
        return self.config.rounds

    @property
    def done(self) -> bool:
        return self._round >= self.config.rounds

    def step(self) -> dict[str, float]:
        """One round: act, let the agent learn, ask, let the reward learn, and at times evaluate."""
        spent = dict.fromkeys(self._seconds, 0.0)
        episodes, learned = self._live(spent)
        with _clock(spent, "reward"):
            asked = self._ask(self.schedule.counts[self._round])
            if self._round == 0:
                asked += self._ask(self.config.initial_labels)
                self._first_fit()
            outcomes = self._learn_reward()
        self._round += 1
        due = self._round % self.config.evaluate_every == 0
        if due or self.done:
            self._return = self.evaluate().mean
        total = sum(spent.values())
        for name, seconds in spent.items():
            self._seconds[name] += seconds
        metrics = {
            "true_return": self._return,
            "episodes": float(len(episodes)),
            "training_return": fmean([e.reward for e in episodes]) if episodes else math.nan,
            "labels": float(self.answers.added),
            "asked": float(asked),
            "environment_steps": float(self._collector.transitions),
            "environment_steps_per_second": self.config.environment_steps / total,
            **{f"share_{name}": seconds / total for name, seconds in spent.items()},
            **learned,
        }
        if outcomes:
            last = Outcome(*(fmean(column) for column in zip(*outcomes, strict=True)))  # type: ignore[arg-type]
            metrics |= {
                "objective": last.loss,
                "reward_accuracy": last.accuracy,
                "gradient_norm": last.gradient_norm,
                "indirect_share": last.indirect_share,
                "effective_pairs": last.effective,
            }
        return metrics

    def evaluate(self) -> Evaluation:
        """Episodes of the present policy on the true reward, in environments of their own."""
        config = self.config
        count = min(config.environments, config.evaluation_episodes)
        with make_environments(config.env, count=count, seed=config.seed + 1_000_003) as own:
            return evaluate_agent(self.agent, own, episodes=config.evaluation_episodes)

    def _live(self, spent: dict[str, float]) -> tuple[list[Any], dict[str, float]]:
        """The environment steps of a round, with an update of the agent now and then."""
        config = self.config
        episodes: list[Any] = []
        sums: Counter[str] = Counter()
        updates = 0
        for _ in range(config.environment_steps // config.environments):
            with _clock(spent, "environment"):
                found = self._collector.collect(1)
            self._replay.append(found.transitions)
            self._recorder.record(found)
            episodes += found.episodes
            if self._round == 0:  # there is no reward to learn from yet
                continue
            with _clock(spent, "update"):
                due = self._collector.transitions // config.update_every
                while self.agent.version < due - config.environment_steps // config.update_every:
                    sums.update(self._update())
                    updates += 1
        return episodes, {name: value / updates for name, value in sums.items()}

    def _update(self) -> dict[str, float]:
        batch = self._replay.sample(self.config.batch_size, self._sampling)
        with torch.no_grad():
            reward = self.reward(batch.observation, batch.action)
        return self.agent.update(batch, reward)

    def _ask(self, count: int) -> int:
        """Put questions to the teacher; returns how many."""
        if not count:
            return 0
        episodes = self._recorder.episodes()
        first, second = (
            draw(episodes, self.config.fragment, count, self._sampling) for _ in range(2)
        )
        self.teacher.observe(self._recorder.mean_reward)
        self.answers.append(first, second, self.teacher(first, second))
        return count

    def _first_fit(self) -> None:
        if len(self.answers) and self.config.initial_epochs:
            fit(
                self.reward,
                self.answers.everything(),
                self.learner.optimiser,
                self._sampling,
                epochs=self.config.initial_epochs,
                batch_size=self.config.pair_batch,
            )

    def _learn_reward(self) -> list[Outcome]:
        size = min(self.config.pair_batch, len(self.answers))
        if size < 2:
            return []
        return [
            self.learner.step(
                self.answers.sample(size, self._sampling),
                self.agent,
                temperature=self.agent.temperature,
            )
            for _ in range(self.config.reward_steps)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "collector": self._collector.state_dict(),
            "replay": self._replay.state_dict(),
            "learner": self.learner.state_dict(),
            "teacher": self.teacher.state_dict(),
            "answers": self.answers.state_dict(),
            "recorder": self._recorder.state_dict(),
            "draws": self._draws.state_dict(),
            "round": self._round,
            "return": self._return,
            "seconds": dict(self._seconds),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self._collector.load_state_dict(state["collector"])
        self._replay.load_state_dict(state["replay"])
        self.learner.load_state_dict(state["learner"])
        self.teacher.load_state_dict(state["teacher"])
        self.answers.load_state_dict(state["answers"])
        self._recorder.load_state_dict(state["recorder"])
        self._draws.load_state_dict(state["draws"])
        self._round = int(state["round"])
        self._return = float(state["return"])
        self._seconds = {name: float(value) for name, value in state["seconds"].items()}

    def summary(self) -> dict[str, Any]:
        total = sum(self._seconds.values()) or math.nan
        return {
            "objective": self._return,
            "labels": self.answers.added,
            "environment_steps": self._collector.transitions,
            **{f"share of time, {name}": s / total for name, s in self._seconds.items()},
        }

    def figures(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> dict[str, Callable[[], Figure]]:
        def learning() -> Figure:
            from birl_ext.runs import plots

            curves = {"training_return": "training episodes", "true_return": "evaluation"}
            title = f"{self.config.env}, {self.config.algorithm}, {self.config.teacher} teacher"
            return plots.learning_curve(history, curves, title=title, ylabel="true return")

        return {"true_return": learning}


class Recorder:
    """The newest steps of each environment, as episodes that fragments can be cut from.

    Args:
        environments: how many.
        keep: steps kept, all together.
    """

    def __init__(self, environments: int, keep: int) -> None:
        self.keep = keep
        self._open: list[list[Episode]] = [[] for _ in range(environments)]
        self._closed: deque[Episode] = deque()
        self._steps = 0

    def record(self, found: Collection) -> None:
        """Add what a collector saw."""
        parts = found.transitions
        version = torch.full((1,), found.version)
        for row, where in enumerate(found.environment.tolist()):
            step = Episode(
                parts.observation[row : row + 1],
                parts.action[row : row + 1],
                parts.reward[row : row + 1],
                found.log_prob[row : row + 1],
                version,
            )
            self._open[where].append(step)
            if found.ended[row]:
                self._close(where)

    def _close(self, where: int) -> None:
        whole = _joined(self._open[where])
        self._open[where] = []
        self._closed.append(whole)
        self._steps += len(whole.reward)
        while len(self._closed) > 1 and self._steps - len(self._closed[0].reward) >= self.keep:
            self._steps -= len(self._closed.popleft().reward)

    def episodes(self) -> list[Episode]:
        """Finished ones, then those under way."""
        return [*self._closed, *(_joined(steps) for steps in self._open if steps)]

    @property
    def mean_reward(self) -> float:
        """True reward per step of what is kept."""
        return float(torch.cat([episode.reward for episode in self.episodes()]).mean())

    def state_dict(self) -> dict[str, Any]:
        return {
            "closed": [tuple(episode) for episode in self._closed],
            "open": [tuple(_joined(steps)) if steps else None for steps in self._open],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._closed = deque(Episode(*parts) for parts in state["closed"])
        self._open = [[] if parts is None else [Episode(*parts)] for parts in state["open"]]
        self._steps = sum(len(episode.reward) for episode in self._closed)


def _joined(steps: Sequence[Episode]) -> Episode:
    return Episode(*(torch.cat(column) for column in zip(*steps, strict=True)))


class _Generators:
    """Independent generators of one seed, kept together for the checkpoint."""

    def __init__(self, seed: int) -> None:
        self._seeds = np.random.SeedSequence(seed)
        self._made: list[torch.Generator] = []

    def next(self) -> torch.Generator:
        (child,) = self._seeds.spawn(1)
        made = torch.Generator().manual_seed(int(child.generate_state(1, np.uint64)[0] >> 1))
        self._made.append(made)
        return made

    def state_dict(self) -> dict[str, Any]:
        return {"states": [generator.get_state() for generator in self._made]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for generator, kept in zip(self._made, state["states"], strict=True):
            generator.set_state(kept)


def make_agent(config: PreferenceConfig, spaces: Spaces, draws: _Generators) -> Agent:
    """Soft actor-critic for the environment's actions."""

    def optimiser(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)

    shape, dtype = spaces.observation_shape, spaces.observation_dtype
    if spaces.actions is None:
        raise ConfigError(f"env is {config.env}", allowed="environments with discrete actions")
    actions = spaces.actions

    def network() -> nn.Module:
        return head_network(shape, dtype, actions, generator=draws.next(), hidden=config.hidden)

    target = None if config.temperature is not None else discrete_entropy_target(actions, 0.5)
    temperature = Temperature(
        config.temperature or 1.0, entropy_target=target, learning_rate=config.learning_rate
    )
    return DiscreteSAC(
        network(),
        Twin(network(), network()),
        discount=config.discount,
        temperature=temperature,
        optimiser=optimiser,
        target_rate=config.target_rate,
        target_period=1,
    )


def make_reward(spaces: Spaces, generator: torch.Generator) -> RewardNetwork:
    """The usual reward network for the environment's observations."""
    shape, actions = spaces.observation_shape, cast(int, spaces.actions)
    if spaces.observation_dtype is torch.uint8 and len(shape) == 3:
        return RewardNetwork.cnn((shape[0], shape[1], shape[2]), generator, actions=actions)
    return RewardNetwork.mlp(math.prod(shape), generator, actions=actions)


@contextmanager
def _clock(spent: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - start
