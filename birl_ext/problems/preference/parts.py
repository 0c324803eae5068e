"""What a preference run is put together from, as its settings ask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.networks import StateActionMLP, Twin, head_network
from birl_ext.agents.sac import SAC
from birl_ext.agents.sac_discrete import DiscreteSAC
from birl_ext.agents.soft_q import SoftQ
from birl_ext.agents.successor_features import ActionValue, SuccessorFeatures
from birl_ext.agents.temperature import (
    Temperature,
    continuous_entropy_target,
    discrete_entropy_target,
)
from birl_ext.bilevel.additive import AdditiveUpdate, PlannedUpdate
from birl_ext.bilevel.mrn import MRNUpdate
from birl_ext.bilevel.score import Critic, FullHorizon, OneStep, Score, Simulator
from birl_ext.bilevel.sobirl import DRLHFUpdate, SoBiRLUpdate
from birl_ext.environments.atari import atari_environment, is_atari
from birl_ext.environments.finite import FiniteEnvironment
from birl_ext.environments.spaces import Spaces
from birl_ext.environments.vector import check_distinct, close_with_warning, registration
from birl_ext.errors import (
    ConfigError,
    EnvironmentFailureError,
    MissingDependencyError,
    OptionError,
)
from birl_ext.model.checks import check_memory
from birl_ext.model.mdp import DenseMDP
from birl_ext.preferences.last_layer import LastLayer
from birl_ext.preferences.queries import Disagreement, Entropy, Query, Uniform
from birl_ext.preferences.reward_model import (
    FeatureReward,
    RewardEnsemble,
    RewardModel,
    RewardNetwork,
)
from birl_ext.preferences.schedule import QuerySchedule
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.preference.gridworld import GRIDWORLD, gridworld_mdp
from birl_ext.replay.buffer import ReplayBuffer
from birl_ext.replay.frames import FrameReplay
from birl_ext.simulators.finite import FiniteSimulator
from birl_ext.simulators.restored import simulator_for
from birl_ext.state import Stateful

try:
    import gymnasium
    from gymnasium.vector import VectorEnv
    from gymnasium.wrappers import TimeLimit
except ImportError:
    raise MissingDependencyError(
        "environments need gymnasium", fix='pip install "birl_ext[rl]"'
    ) from None

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

__all__ = [
    "FACES",
    "Generators",
    "Source",
    "VectorEnv",
    "check_sizes",
    "environment_source",
    "gymnasium",
    "is_own",
    "make_agent",
    "make_judge",
    "make_learner",
    "make_query",
    "make_replay",
    "make_reward",
    "make_score",
    "registered_threshold",
]


class Generators(Stateful):
    """Independent generators of one seed, kept together for the checkpoint."""

    STATE = ("_states",)

    def __init__(self, seed: int) -> None:
        self._seeds = np.random.SeedSequence(seed)
        self._states: list[torch.Generator] = []

    def seed(self) -> int:
        """One that nothing else has."""
        (child,) = self._seeds.spawn(1)
        return int(child.generate_state(1, np.uint64)[0] >> 1)

    def next(self, device: str = "cpu") -> torch.Generator:
        made = torch.Generator(device).manual_seed(self.seed())
        self._states.append(made)
        return made


FACES = {"sobirl": "SoBiRL", "stoc-sobirl": "StocSoBiRL", "drlhf": "DRLHF", "mrn": "MRN"}
"""What the library calls each algorithm."""

Source: TypeAlias = "Callable[[], gymnasium.Env[Any, Any]] | VectorEnv[Any, Any, Any]"
"""An environment of a user's own: a function that builds one, or several in one."""


def is_own(name: str) -> bool:
    """Whether a setting names an environment or a teacher that was given as an object."""
    return name.startswith("<")


def environment_source(
    config: PreferenceConfig, own: Source | None = None
) -> tuple[str | Callable[..., gymnasium.Env[Any, Any]], dict[str, Any]]:
    """What `make_environments` builds, and its keyword arguments: Atari comes with its
    preprocessing.
    """
    steps = config.episode_steps
    if own is not None:
        assert not isinstance(own, VectorEnv)
        return _own_source(config, own), {}
    options = {} if steps is None else {"max_episode_steps": steps}
    if is_atari(config.env):
        return functools.partial(atari_environment, config.env), options
    return config.env, options


def _own_source(
    config: PreferenceConfig, build: Callable[..., gymnasium.Env[Any, Any]]
) -> Callable[..., gymnasium.Env[Any, Any]]:
    """The same with the settings' limit, under the name that messages have for it."""
    steps = config.episode_steps

    def made(**options: Any) -> gymnasium.Env[Any, Any]:
        built = build(**options)
        return built if steps is None else TimeLimit(built, steps)

    made.__name__ = config.env
    return made


def registered_threshold(config: PreferenceConfig, own: Source | None) -> float | None:
    """The return that counts as learned, where the environment was registered with one.

    Raises:
        ConfigError: its evaluation might not end, or a setting asks for what it does not give.
        OptionError: it is not registered, or none.
        EnvironmentFailureError: it cannot be built.
    """
    if own is None and is_own(config.env):
        face = FACES[config.algorithm]
        raise ConfigError(
            f"env is {config.env}: a function or an environment of the program that made the run",
            fix=f"give it: birl_ext.{face}.load(DIR, environment=…); its plot() draws figures",
        )
    if own is not None and not is_own(config.env):
        raise ConfigError(
            f"env is {config.env}, and an environment is given besides", fix="leave one out"
        )
    limit: float | None = config.episode_steps
    if isinstance(own, VectorEnv):
        for name, value, none in (
            ("episode_steps", config.episode_steps, None),
            ("video_every", config.video_every, 0),
            ("environments", config.environments, own.num_envs),
        ):
            if value != none:
                raise ConfigError(
                    f"{name} is {value}", where=f"env {config.env}", allowed=str(none)
                )
        spec, limit = own.spec, math.inf  # what it is made of is not seen
    elif own is not None:
        spec, own_limit = _looked_at(own, config.env)
        limit = limit or own_limit
    else:
        spec = registration(config.env)
        limit = limit or spec.max_episode_steps
    if limit is None and not is_atari(config.env):  # a console has a limit of its own
        raise ConfigError(
            f"env is {config.env}, which has no time limit",
            allowed="environments that have one, or episode_steps",
            fix="set episode_steps, on the command line --episode-steps; to load a run, give the "
            "environment that it was made with",
        )
    found = None if spec is None else spec.reward_threshold
    return None if found is None else float(found)


def _looked_at(
    build: Callable[[], gymnasium.Env[Any, Any]], name: str
) -> tuple[EnvSpec | None, int | None]:
    """What an environment was registered with, if it was, and its time limit."""
    built: list[gymnasium.Env[Any, Any]] = []
    for _ in range(2):
        try:
            made = build()
        except (Exception, SystemExit) as error:
            raise EnvironmentFailureError(
                f"building raised {type(error).__name__}: {error}", where=f"environment {name!r}"
            ) from error
        if not isinstance(made, gymnasium.Env):
            raise OptionError(
                f"the environment's function returned a {type(made).__name__}",
                where=f"environment {name!r}",
                allowed="a gymnasium.Env",
                fix="give a vector environment itself, not a function",
            )
        built.append(made)
        close_with_warning(made, name)
    check_distinct(built, name)
    spec = made.spec
    limit = None if spec is None else spec.max_episode_steps
    while limit is None and isinstance(made, gymnasium.Wrapper):
        if isinstance(made, TimeLimit):
            limit = made._max_episode_steps
        made = made.env
    return spec, limit


def check_sizes(config: PreferenceConfig) -> QuerySchedule:
    """Refuse what no memory holds, whatever the environment, before anything is made.

    Returns:
        How the questions are spread over the rounds, which takes room for each.
    """

    def check(numbers: int, *names: str) -> None:
        what = " and ".join(f"{name} {getattr(config, name)}" for name in names)
        check_memory(what, numbers, fix=f"lower {' or '.join(names)}")

    check(16 * config.rounds, "rounds")
    check(10_000 * config.environments, "environments")
    check(10_000 * config.members, "members")
    check(16 * sum(map(math.prod, pairwise((1, *config.hidden, 1)))), "hidden")
    rows, widest = config.batch_size * config.n_step, max((1, *config.hidden))
    check(rows * widest, "batch_size", "n_step", "hidden")
    check(config.replay, "replay")
    asked, first = config.questions
    schedule = QuerySchedule(config.schedule, config.rounds, asked, first)
    most = max(schedule.counts[0] + first, *schedule.counts)
    each = 2 * (config.fragment + config.lead)
    check(config.pairs * each, "pairs", "fragment", "lead")
    if config.query == "uniform":
        check(most * each, "labels", "fragment", "lead")
    else:
        check(most * each * config.candidates, "labels", "fragment", "lead", "candidates")
    return schedule


class _Learned(TypedDict):
    """What all agents are told alike."""

    discount: float
    temperature: Temperature
    optimiser: Callable[[Iterable[Tensor]], Optimizer]
    target_rate: float
    target_period: int
    anneal_over: int | None


def make_agent(
    config: PreferenceConfig, spaces: Spaces, draws: Generators
) -> SoftQ | DiscreteSAC | SAC:
    """Soft Q-learning, of a table where observations are indices, or soft actor-critic."""
    if spaces.actions == 1:
        raise OptionError(
            f"env {config.env} has 1 action",
            allowed="2 or more",
            fix="choose another environment: in this one there is nothing to learn",
        )
    total = config.updates_due(config.rounds * config.environment_steps)
    learned: _Learned = {
        "discount": config.discount,
        "temperature": _temperature(config, spaces),
        "optimiser": functools.partial(torch.optim.Adam, lr=config.learning_rate, fused=True),
        "target_rate": config.target_rate,
        "target_period": config.target_period,
        "anneal_over": max(total, 1) if config.anneal else None,
    }
    shape, dtype = spaces.observation_shape, spaces.observation_dtype
    heads = functools.partial(_heads, config, spaces, draws)
    if spaces.actions is not None:
        if spaces.observations is not None and config.follower == "sac":
            raise ConfigError(
                f"follower is sac, and env {config.env} is learned by a table",
                allowed="soft-q there, which auto takes",
            )
        if config.follower != "sac":
            return SoftQ(_values(config, spaces, draws), **learned)
        return DiscreteSAC(
            heads(spaces.actions), Twin(heads(spaces.actions), heads(spaces.actions)), **learned
        )
    if config.follower == "soft-q":
        raise ConfigError(
            f"follower is soft-q, and env {config.env} has continuous actions",
            allowed="sac there, which auto takes",
        )
    if dtype is torch.uint8 or spaces.observations is not None:
        raise ConfigError(
            f"env is {config.env}, with continuous actions and observations {shape}, {dtype}",
            allowed="continuous actions with observations of floating point",
        )
    (dimensions,) = spaces.action_shape

    def critic() -> nn.Module:
        size = math.prod(shape)
        made = StateActionMLP(size, dimensions, hidden=config.hidden, generator=draws.next())
        return made.to(config.device)

    assert spaces.low is not None
    assert spaces.high is not None
    return SAC(
        heads(2 * dimensions),
        Twin(critic(), critic()),
        low=spaces.low,
        high=spaces.high,
        seed=draws.seed(),
        **learned,
    )


def _values(config: PreferenceConfig, spaces: Spaces, draws: Generators) -> nn.Module:
    """A number for each discrete action: a table where observations are indices."""
    assert spaces.actions is not None
    if spaces.observations is not None:
        table = nn.Embedding(spaces.observations, spaces.actions, device=config.device)
        nn.init.zeros_(table.weight)
        return table
    return _heads(config, spaces, draws, spaces.actions)


def _heads(config: PreferenceConfig, spaces: Spaces, draws: Generators, outputs: int) -> nn.Module:
    """The usual network for the environment's observations."""
    shape, dtype = spaces.observation_shape, spaces.observation_dtype
    made = head_network(shape, dtype, outputs, generator=draws.next(), hidden=config.hidden)
    return made.to(config.device)


def make_replay(config: PreferenceConfig) -> ReplayBuffer | FrameReplay:
    """One that holds each frame once, where observations are known to be stacks of frames."""
    # Atari's are, by its preprocessing; others may be the colours of one picture.
    kind = FrameReplay if is_atari(config.env) else ReplayBuffer
    return kind(config.replay, device=config.device, linked=config.n_step > 1)


def _temperature(config: PreferenceConfig, spaces: Spaces) -> Temperature:
    target = None
    if config.entropy_target:
        target = (
            continuous_entropy_target(spaces.action_shape[0])
            if spaces.actions is None
            else discrete_entropy_target(spaces.actions, config.entropy_share)
        )
    return Temperature(
        config.temperature,
        entropy_target=target,
        learning_rate=config.learning_rate,
        device=config.device,
    )


def make_reward(config: PreferenceConfig, spaces: Spaces, draws: Generators) -> RewardModel:
    """The reward of few knobs, if it is asked for, or that of `make_flexible_reward`."""
    if not config.reward_features:
        return make_flexible_reward(config, spaces, draws)
    if spaces.observations is None or spaces.actions is None or config.members > 1:
        raise ConfigError(
            f"reward_features is {config.reward_features}, with env {config.env} and "
            f"{config.members} members",
            allowed="0, unless observations are indices and actions discrete; one member",
            fix="leave it out",
        )
    shape = (spaces.observations, spaces.actions, config.reward_features)
    return FeatureReward(torch.randn(shape, generator=draws.next())).to(config.device)


def make_flexible_reward(
    config: PreferenceConfig, spaces: Spaces, draws: Generators
) -> RewardModel:
    """The usual reward for the environment's observations, or an ensemble of them."""

    if config.members > 1 and spaces.observations is not None:
        raise ConfigError(
            f"members is {config.members}",
            where=config.env,
            allowed="1, where observations are indices: tables all start, and stay, the same",
        )

    def one() -> RewardModel:
        return _reward_network(spaces, draws.next()).to(config.device)

    return RewardEnsemble.of(config.members, one) if config.members > 1 else one()


def _reward_network(spaces: Spaces, generator: torch.Generator) -> RewardNetwork:
    shape, actions = spaces.observation_shape, spaces.actions
    if actions is None:
        (dimensions,) = spaces.action_shape
        return RewardNetwork.mlp(math.prod(shape), generator, action_size=dimensions)
    if spaces.observation_dtype is torch.uint8:
        return RewardNetwork.cnn((shape[0], shape[1], shape[2]), generator, actions=actions)
    if spaces.observations is not None:
        return RewardNetwork.table(spaces.observations, actions)
    return RewardNetwork.mlp(math.prod(shape), generator, actions=actions)


def make_score(
    config: PreferenceConfig,
    spaces: Spaces,
    reward: RewardModel,
    draws: Generators,
    own: Source | None = None,
) -> tuple[Score | None, SuccessorFeatures | None]:
    """The estimator of the policy's derivative, and what has to learn beside the agent for it."""
    if config.score == "critic":
        return _critic(config, spaces, reward, draws)
    if config.score == "full-horizon":
        simulator = _simulator(config, spaces, draws.next(config.device), own)
        return FullHorizon(simulator, discount=config.discount, steps=config.horizon), None
    if config.score == "exact":
        return None, None  # the planner says it all
    if spaces.actions is None:
        return OneStep(samples=4, generator=draws.next(config.device)), None
    return OneStep(spaces.actions), None


def _simulator(
    config: PreferenceConfig, spaces: Spaces, generator: torch.Generator, own: Source | None
) -> Simulator:
    mdp = _finite(config, own)
    if mdp is not None:
        if config.device != "cpu":
            raise ConfigError(
                f"device is {config.device}",
                where=f"{config.env} with full-horizon",
                allowed="cpu",
            )
        return FiniteSimulator(mdp, generator)
    if isinstance(own, VectorEnv):
        raise OptionError(
            "a vector environment cannot be restarted from an observation",
            allowed="with score=one-step or critic, and algorithm=sobirl",
            fix="give a function that builds one environment, with a method restore(observation)",
        )
    return simulator_for(config.env, spaces, generator, build=own)


def _finite(config: PreferenceConfig, own: Source | None) -> DenseMDP | None:
    """The MDP that the environment is, if it is known to be one."""
    if config.env == GRIDWORLD:
        return gridworld_mdp(config.discount)
    made = None if own is None or isinstance(own, VectorEnv) else own()
    if not isinstance(made, FiniteEnvironment):
        return None
    return made.mdp.replace(discount=config.discount)


def _critic(
    config: PreferenceConfig, spaces: Spaces, reward: RewardModel, draws: Generators
) -> tuple[Score, SuccessorFeatures]:
    if spaces.actions is None or spaces.observations is not None or config.members > 1:
        raise ConfigError(
            f"score is 'critic', with env {config.env} and {config.members} members",
            allowed="discrete actions, observations that are no indices, one member",
            fix="use score=one-step",
        )
    assert isinstance(reward, RewardNetwork)
    layer = LastLayer(reward)
    features = SuccessorFeatures(
        _heads(config, spaces, draws, spaces.actions * layer.size),
        layer.features,
        discount=config.discount,
        optimiser=functools.partial(torch.optim.Adam, lr=config.learning_rate, fused=True),
        target_rate=config.target_rate,
        target_period=config.target_period,
    )
    return Critic(features, layer.weights, trunk=layer.trunk), features


def make_learner(
    config: PreferenceConfig, reward: RewardModel, score: Score | None, own: Source | None = None
) -> SoBiRLUpdate | AdditiveUpdate | PlannedUpdate:
    """The upper level."""
    if config.algorithm == "drlhf":
        return _fitted(config, reward)
    if config.algorithm == "mrn":
        return MRNUpdate(
            reward,
            optimiser=_reward_optimiser(config),
            rate=config.learning_rate,
            noise=config.noise,
            lead=config.lead,
        )
    if config.score == "exact":
        mdp = _finite(config, own)
        if mdp is None or config.device != "cpu":
            raise ConfigError(
                f"score is exact, with env {config.env} and device {config.device}",
                allowed=f"an MDP of your own, or {GRIDWORLD}, on the cpu",
                fix="use score=full-horizon or one-step",
            )
        return PlannedUpdate(reward, mdp, optimiser=_reward_optimiser(config))
    if config.upper != "cross-entropy":
        assert score is not None
        return AdditiveUpdate(
            reward, optimiser=_reward_optimiser(config), score=score, average=config.average
        )
    assert config.indirect_limit is not None
    return SoBiRLUpdate(
        reward,
        optimiser=_reward_optimiser(config),
        score=score,
        noise=config.noise,
        stale=config.stale,
        limit=config.limit,
        weigh_loss=bool(config.weigh_loss),
        average=config.average,
        indirect_limit=config.indirect_limit,
        lead=config.lead,
    )


def _fitted(config: PreferenceConfig, reward: RewardModel) -> DRLHFUpdate:
    return DRLHFUpdate(
        reward, optimiser=_reward_optimiser(config), noise=config.noise, lead=config.lead
    )


def _reward_optimiser(config: PreferenceConfig) -> Callable[[Iterable[Tensor]], Optimizer]:
    return functools.partial(torch.optim.AdamW, lr=config.reward_rate, fused=True)


def make_judge(
    config: PreferenceConfig, spaces: Spaces, draws: Generators
) -> tuple[DRLHFUpdate | None, ActionValue | None]:
    """Of an upper level that judges behaviour: the reward by which it does, where that is learned
    from answers, and what the policy earns by it, where that is learned from samples.
    """
    if config.upper == "cross-entropy":
        return None, None
    if spaces.actions is None:
        raise ConfigError(
            f"upper is {config.upper}, and env {config.env} has continuous actions",
            allowed="discrete actions",
            fix="take upper=cross-entropy",
        )
    value = None if config.score == "exact" else _action_value(config, spaces, draws)
    if config.upper == "return":
        return None, value
    judge = make_flexible_reward(config, spaces, draws)
    return _fitted(config, judge), value


def _action_value(config: PreferenceConfig, spaces: Spaces, draws: Generators) -> ActionValue:
    rate = config.learning_rate
    if spaces.observations is not None:
        rate *= 1 - config.discount  # a table's entries, which Adam moves by that, are (1 − γ) Q
    return ActionValue(
        _values(config, spaces, draws),
        discount=config.discount,
        optimiser=functools.partial(torch.optim.Adam, lr=rate, fused=True),
        target_rate=config.target_rate,
        target_period=config.target_period,
    )


def make_query(config: PreferenceConfig, reward: RewardModel) -> Query:
    """Which of the candidate pairs are asked."""
    each = reward.each if isinstance(reward, RewardEnsemble) else reward
    if config.query == "disagreement":
        return Disagreement(each)
    return Entropy(each) if config.query == "entropy" else Uniform()
