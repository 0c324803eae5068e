"""Agents learn what the solver and closed forms say, and go on from a checkpoint unchanged."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from cases import untyped
from closeness import assert_close, assert_same_state
from torch import Tensor, nn

import birl_ext
from birl_ext.agents.best import Best
from birl_ext.agents.categorical import CategoricalPolicy
from birl_ext.agents.networks import MLP, OneHot, StateActionMLP, Twin
from birl_ext.agents.sac import SAC
from birl_ext.agents.sac_discrete import DiscreteSAC
from birl_ext.agents.soft_q import SoftQ
from birl_ext.agents.squashed import SquashedGaussian, log_slope
from birl_ext.agents.temperature import (
    Temperature,
    continuous_entropy_target,
    discrete_entropy_target,
)
from birl_ext.environments.transitions import Transitions
from birl_ext.environments.vector import Environments, make_environments
from birl_ext.errors import (
    DiscountError,
    NonFiniteInputError,
    NonFiniteResultError,
    OptionError,
    ShapeError,
    TemperatureError,
)
from birl_ext.replay.buffer import ReplayBuffer
from birl_ext.rollouts.collect import Collector
from birl_ext.runs.checkpoint import CheckpointStore

Optimiser = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(states: int, actions: int, source: torch.Generator) -> nn.Module:
    """A number for every state and action, as a linear network."""
    return OneHot(states, MLP(states, actions, hidden=(), generator=source))


def sgd(rate: float) -> Optimiser:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def adam(rate: float) -> Optimiser:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


# Against the exact solution


class Finite(NamedTuple):
    """A finite MDP and one batch with every transition as often as it is likely."""

    mdp: birl_ext.DenseMDP
    batch: Transitions
    reward: Tensor


STATES, ACTIONS, DISCOUNT = 4, 3, 0.6


def finite(discount: float = DISCOUNT) -> Finite:
    """Four equally likely successors, repetitions allowed, from each state and action; the last
    state is terminal.
    """
    source = generator(3)
    successors = torch.randint(STATES, (STATES, ACTIONS, 4), generator=source)
    counts = nn.functional.one_hot(successors, STATES).sum(2).double()
    values = torch.randn(STATES, ACTIONS, generator=source, dtype=torch.float64)
    terminal = torch.arange(STATES) == STATES - 1
    mdp = birl_ext.DenseMDP(values, counts / 4, discount, terminal=terminal)
    grid = torch.cartesian_prod(torch.arange(STATES), torch.arange(ACTIONS), torch.arange(4))
    where, chosen, draw = grid.unbind(-1)
    batch = Transitions(
        where,
        chosen,
        successors[where, chosen, draw],
        terminal[where],
        torch.full((len(grid),), math.nan),  # no agent may read it
    )
    return Finite(mdp, batch, values[where, chosen].float())


def soft_q(temperature: float) -> SoftQ:
    return SoftQ(
        table(STATES, ACTIONS, generator()),
        discount=DISCOUNT,
        temperature=Temperature(temperature),
        optimiser=sgd(2.0),
        target_period=1,
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_soft_q_learning_converges_to_the_solution(temperature: float) -> None:
    problem = finite()
    agent = soft_q(temperature)
    for _ in range(300):
        agent.update(problem.batch, problem.reward)
    assert_solution(agent, problem, temperature, bound=1e-4)


class Steep(nn.Module):
    """Makes a network learn gain² times as fast."""

    def __init__(self, network: nn.Module, gain: float) -> None:
        super().__init__()
        self.network = network
        self.gain = gain

    def forward(self, observation: Tensor) -> Tensor:
        logits: Tensor = self.network(observation)
        return self.gain * logits


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_discrete_sac_converges_to_the_solution(temperature: float) -> None:
    problem = finite()
    agent = DiscreteSAC(
        # the curvature of the actor's loss is proportional to τ
        Steep(table(STATES, ACTIONS, generator(1)), 1.6 / math.sqrt(temperature)),
        Twin(table(STATES, ACTIONS, generator(2)), table(STATES, ACTIONS, generator(3))),
        discount=DISCOUNT,
        temperature=Temperature(temperature),
        optimiser=sgd(2.0),
        target_period=1,
    )
    for _ in range(500):
        agent.update(problem.batch, problem.reward)
    assert_solution(agent, problem, temperature, bound=1e-3)


def assert_solution(agent: Any, problem: Finite, temperature: float, bound: float) -> None:
    want = birl_ext.solve(problem.mdp, temperature=temperature)
    states = torch.arange(STATES)
    assert_close(agent.q(states).double(), want.q, bound=bound, label="Q")
    assert_close(agent.probabilities(states).double(), want.policy, bound=bound, label="π")
    chosen = torch.tensor([0, 2, 1, 0])
    log_policy = agent.probabilities(states)[states, chosen].log()
    assert_close(agent.log_prob(states, chosen), log_policy, bound=1e-5, label="log π")


# Where an episode ends


class Corridor(gymnasium.Env[int, Any]):
    """From state 0 to state 1, where each step pays 1. After two steps the episode ends: it has
    terminated, or it is only cut off and would have gone on for ever.
    """

    observation_space = untyped(gymnasium.spaces.Discrete(2))

    def __init__(self, terminates: bool, box: bool = False) -> None:
        self.terminates = terminates
        one = np.ones(1, dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(-one, one) if box else gymnasium.spaces.Discrete(1)

    def reset(self, **_: Any) -> tuple[int, dict[str, Any]]:
        self.steps = 0
        return 0, {}

    def step(self, _: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        ends = self.steps == 2
        reward = float(ends)
        return 1, reward, ends and self.terminates, ends and not self.terminates, {}


class Constant(nn.Module):
    """Ignores the action: a number per state."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(2))

    def forward(self, observation: Tensor, _: Tensor) -> Tensor:
        return self.numbers[observation]


class FixedActor(nn.Module):
    """The same mean and log σ, whatever is observed."""

    def __init__(self, mean: float = 0.0, log_std: float = 0.0) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.tensor([mean, log_std]))

    def forward(self, observation: Tensor) -> Tensor:
        return self.output.expand(len(observation), 2)


def corridor_agent(kind: str) -> Any:
    options: dict[str, Any] = {
        "discount": 0.5,
        "temperature": Temperature(1e-4),
        "target_period": 1,
    }
    if kind == "soft Q":
        return SoftQ(table(2, 1, generator()), optimiser=sgd(0.5), **options)
    if kind == "discrete SAC":
        critics = Twin(table(2, 1, generator(1)), table(2, 1, generator(2)))
        return DiscreteSAC(table(2, 1, generator()), critics, optimiser=sgd(0.5), **options)
    return SAC(
        FixedActor(),
        Twin(Constant(), Constant()),
        low=-torch.ones(1),
        high=torch.ones(1),
        optimiser=sgd(0.5),
        target_rate=1.0,
        **options,
    )


MODES = list(gymnasium.vector.AutoresetMode)


@pytest.mark.parametrize("kind", ["soft Q", "discrete SAC", "SAC"])
@pytest.mark.parametrize("terminates", [True, False])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_truncation_bootstraps_and_termination_does_not(
    mode: gymnasium.vector.AutoresetMode, terminates: bool, kind: str
) -> None:
    """γ = ½. Cut off: Q = (1, 2). Terminated: (½, 1).

    Bootstrapping where it terminated gives (1, 2), not bootstrapping where it was cut off (½, 1),
    bootstrapping from the next episode's first state (⅔, 4/3), and a reset taken for a transition
    something in between.
    """
    build = [lambda: Corridor(terminates, box=kind == "SAC")] * 2
    vector = gymnasium.vector.SyncVectorEnv(build, autoreset_mode=mode)
    agent = corridor_agent(kind)
    with Environments(vector) as environments:
        found = Collector(environments, agent).collect(30)
    agent_batch = found.transitions
    for _ in range(100):
        agent.update(agent_batch, agent_batch.reward)
    want = torch.tensor([0.5, 1.0] if terminates else [1.0, 2.0])
    states = torch.arange(2)
    values = agent.q(states, torch.zeros(2, 1)) if kind == "SAC" else agent.q(states).squeeze(-1)
    assert_close(values, want, bound=2e-3, label=f"{kind}, {mode.name}")


# Entropy


def test_entropy_targets() -> None:
    assert discrete_entropy_target(9) == pytest.approx(0.89 * math.log(9))
    assert discrete_entropy_target(4, 0.5) == pytest.approx(math.log(2))
    assert continuous_entropy_target(6) == -6
    for wrong in ((1, 0.5), (3, 1.0), (3, 0.0)):
        with pytest.raises(OptionError):
            discrete_entropy_target(*wrong)


@pytest.mark.parametrize("kind", ["soft Q", "discrete SAC"])
@pytest.mark.parametrize("start", [0.05, 5.0])
def test_the_temperature_settles_where_the_entropy_is_as_asked(kind: str, start: float) -> None:
    """One state, rewards 0, 1, 2; the right τ is found by bisection."""
    rewards = torch.tensor([0.0, 1.0, 2.0])
    goal = discrete_entropy_target(3, 0.6)

    def entropy(tau: float) -> float:
        log_policy = (rewards.double() / tau).log_softmax(-1)
        return -float((log_policy.exp() * log_policy).sum())

    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy(middle) < goal else (low, middle)
    temperature = Temperature(start, entropy_target=goal, learning_rate=0.05)
    if kind == "soft Q":
        agent: Any = SoftQ(
            table(1, 3, generator()), discount=0.0, temperature=temperature, optimiser=sgd(0.5)
        )
    else:
        critics = Twin(table(1, 3, generator()), table(1, 3, generator(1)))
        agent = DiscreteSAC(
            table(1, 3, generator(2)),
            critics,
            discount=0.0,
            temperature=temperature,
            optimiser=sgd(0.5),
        )
    state = torch.zeros(3, dtype=torch.int64)
    batch = Transitions(state, torch.arange(3), state, torch.ones(3, dtype=torch.bool), rewards)
    for _ in range(600):
        metrics = agent.update(batch, rewards)
    assert agent.temperature == pytest.approx(low, rel=0.02)
    assert metrics["entropy"] == pytest.approx(goal, abs=0.01)


def test_a_fixed_temperature_stays() -> None:
    temperature = Temperature(0.1)
    temperature.update(torch.tensor(5.0))
    assert temperature.value == 0.1
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(TemperatureError):
            Temperature(wrong)
    with pytest.raises(OptionError, match="fixed"):
        Temperature(1.0, entropy_target=0.5).load_state_dict(temperature.state_dict())


# The squashed Gaussian


def test_the_density_integrates_to_one() -> None:
    # Even steps of z: near the edges the density has a good share of its mass in very little room.
    grid = torch.linspace(-12, 12, 100_001, dtype=torch.float64).tanh()
    for mean, log_std in ((0.0, 0.0), (0.7, -1.5), (-1.2, 0.3)):
        parameters = torch.tensor([[mean]], dtype=torch.float64).expand(len(grid), 1)
        policy = SquashedGaussian(parameters, torch.full_like(parameters, log_std))
        density = policy.log_prob(grid.unsqueeze(-1)).exp()
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)


def test_the_density_is_the_change_of_variables() -> None:
    """log p(u) = Σ log N(z) − log du/dz, the slope by autograd of tanh."""
    source = generator()
    mean, log_std = torch.randn(2, 50, 3, generator=source, dtype=torch.float64)
    mean, log_std = mean / 2, log_std / 4 - 1  # |z| < 4: atanh of what is close to ±1 is not exact
    policy = SquashedGaussian(mean, log_std)
    u, log_prob = policy.rsample(source)
    z = u.atanh().requires_grad_()
    (slope,) = torch.autograd.grad(z.tanh().sum(), z)
    want = (torch.distributions.Normal(mean, log_std.exp()).log_prob(z) - slope.log()).sum(-1)
    assert_close(log_prob, want.detach(), bound=1e-8, label="of a sample")
    assert_close(policy.log_prob(u), want.detach(), bound=1e-8, label="of an action")


def test_the_slope_does_not_cancel() -> None:
    z = torch.tensor([0.0, 1.0, -1.0, 20.0, -30.0, 90.0])
    # 1 − tanh² z = 4/(e^z + e^−z)²
    want = [2 * (math.log(2) - abs(v) - math.log1p(math.exp(-2 * abs(v)))) for v in z.tolist()]
    assert_close(log_slope(z), np.array(want), bound=2e-5, label="log(1 − tanh²)")


def test_a_sample_has_the_density_it_says() -> None:
    """Shares of 100,000 samples in ten bins against the integral of the density of SAC, over a box
    that is not (−1, 1).
    """
    low, high = torch.tensor([-1.0]), torch.tensor([3.0])
    agent = bandit_agent(low, high, seed=0)
    agent.actor = FixedActor(0.3, -0.4)
    observation = torch.ones(1, 1)
    drawn = agent.sample(observation.expand(100_000, -1), generator())
    assert bool(((drawn >= low) & (drawn <= high)).all())
    grid = 1 + 2 * torch.linspace(-6, 6, 40_001).tanh()
    log_density = agent.log_prob(observation.expand(len(grid), -1), grid.unsqueeze(-1))
    density = log_density.double().exp()
    assert float(torch.trapezoid(density, grid.double())) == pytest.approx(1, abs=1e-3)
    edges = torch.linspace(-1, 3, 11)
    for left, right in itertools.pairwise(edges):
        inside = (grid >= left) & (grid < right)
        share = float(torch.trapezoid(density[inside], grid[inside].double()))
        seen = float(((drawn >= left) & (drawn < right)).double().mean())
        assert abs(seen - share) < 5 * math.sqrt(share / 100_000) + 2e-4, (left, seen, share)


def bandit_agent(low: Tensor, high: Tensor, seed: int, temperature: float = 0.4) -> SAC:
    source = generator(seed)
    critics = [StateActionMLP(1, 1, hidden=(32, 32), generator=source) for _ in range(2)]
    return SAC(
        MLP(1, 2, hidden=(16,), generator=source),
        Twin(*critics),
        low=low,
        high=high,
        discount=0.9,
        temperature=Temperature(temperature),
        optimiser=adam(5e-3),
        seed=seed,
    )


@pytest.mark.parametrize("entry", [0, 1], ids=["mean", "log σ"])
def test_a_gaussian_that_is_nan_acts_no_more(entry: int) -> None:
    agent = bandit_agent(torch.tensor([-1.0]), torch.tensor([3.0]), seed=0)
    with torch.no_grad():
        next(reversed(list(agent.actor.parameters())))[entry] = math.nan
    rows = torch.ones(3, 1)
    words = "the policy is NaN at row 0 .* learning rate"
    with pytest.raises(NonFiniteResultError, match=words):
        agent.sample(rows, generator())
    with pytest.raises(NonFiniteResultError, match=words):
        agent.act(rows, generator())
    if entry == 0:  # the greedy action is that of the mean
        with pytest.raises(NonFiniteResultError, match=words):
            agent.act(rows, generator(), greedy=True)


def test_sac_finds_the_soft_optimum_of_a_parabola() -> None:
    """r = −(a − 1.5)² over [−1, 3], one step: π is near N(1.5, τ/2), which the box hardly cuts."""
    low, high = torch.tensor([-1.0]), torch.tensor([3.0])
    agent, source = bandit_agent(low, high, seed=1), generator(1)
    ones = torch.ones(128, 1)
    probe = torch.ones(4000, 1)

    def mean_reward() -> float:
        return float(-(agent.sample(probe, generator(5)) - 1.5).square().mean())

    start = mean_reward()
    for _ in range(600):
        action = low + (high - low) * torch.rand(128, 1, generator=source)
        reward = -(action - 1.5).square().squeeze(-1)
        agent.update(
            Transitions(ones, action, ones, torch.ones(128, dtype=torch.bool), reward), reward
        )
    drawn = agent.sample(probe, generator(5))
    assert mean_reward() > start + 0.3
    assert float(drawn.mean()) == pytest.approx(1.5, abs=0.06)
    assert float(drawn.std()) == pytest.approx(math.sqrt(0.2), rel=0.12)
    assert float(agent.act(probe[:1], generator(), greedy=True)) == pytest.approx(1.5, abs=0.08)


# Borders


def test_a_reward_that_would_broadcast_is_refused() -> None:
    problem = finite()
    agent = soft_q(1.0)
    with pytest.raises(ShapeError, match=r"reward has shape \(48, 1\)"):
        agent.update(problem.batch, problem.reward.unsqueeze(-1))
    wrong = problem.reward.clone()
    wrong[7] = math.nan
    with pytest.raises(NonFiniteInputError, match="row 7 of the batch"):
        agent.update(problem.batch, wrong)


def test_no_gradient_reaches_the_learned_reward() -> None:
    batch, reward = finite().batch, finite().reward.requires_grad_()
    agent = soft_q(1.0)
    agent.update(batch, 2 * reward)
    assert reward.grad is None


def test_impossible_options_are_refused() -> None:
    with pytest.raises(DiscountError):
        SoftQ(nn.Linear(1, 1), discount=1.0, temperature=Temperature(1.0), optimiser=sgd(1.0))
    with pytest.raises(ShapeError, match="low < high"):
        bandit_agent(torch.ones(1), torch.ones(1), seed=0)
    with pytest.raises(ShapeError, match="finite"):
        bandit_agent(torch.tensor([-math.inf]), torch.ones(1), seed=0)
    agent = bandit_agent(-torch.ones(2), torch.ones(2), seed=0)
    with pytest.raises(ShapeError, match=r"\(n, 4\): mean and log σ"):
        agent.sample(torch.ones(3, 1), generator())


class Tabled(CategoricalPolicy):
    """The same probabilities everywhere."""

    def __init__(self, log_policy: Tensor) -> None:
        self.log_policy = log_policy

    def log_probs(self, observation: Tensor) -> Tensor:
        return self.log_policy.expand(len(observation), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_is_the_one_of_multinomial(dtype: torch.dtype) -> None:
    shares = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=dtype)
    policy = Tabled(shares.log())
    expected = torch.multinomial(shares.expand(10_000, -1), 1, generator=generator(5))
    action, log_prob = policy.draw(torch.zeros(10_000), generator(5))
    assert torch.equal(action, expected.squeeze(-1))
    assert torch.equal(log_prob, shares.log()[action])
    assert torch.equal(policy.sample(torch.zeros(10_000), generator(5)), action)


def test_a_policy_that_is_nan_draws_nothing() -> None:
    log_policy = torch.tensor([0.5, 0.3, 0.2]).log()
    log_policy[1] = math.nan
    for seed in range(5):
        with pytest.raises(NonFiniteResultError, match="the policy is NaN") as caught:
            Tabled(log_policy).sample(torch.zeros(3), generator(seed))
        assert "row 0" in str(caught.value)


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    agent = soft_q(0.1)
    source = generator()
    before = source.get_state()
    states = torch.arange(STATES)
    greedy = agent.act(states, source, greedy=True)
    assert torch.equal(greedy, agent.probabilities(states).argmax(-1))
    assert torch.equal(before, source.get_state())
    many = agent.act(states.repeat(20_000), source).view(-1, STATES)
    shares = nn.functional.one_hot(many, ACTIONS).double().mean(0)
    assert_close(shares, agent.probabilities(states).double(), bound=0.02, label="shares")


@pytest.mark.parametrize("kind", ["soft Q", "discrete SAC", "SAC"])
def test_an_agent_learns_where_its_networks_are(kind: str, device: str) -> None:
    run = Run(kind, seed=1, device=device)
    run.advance(12)
    assert run.agent.device.type == device
    assert run.replay.sample(3, run.generator).observation.device.type == device
    again = Run(kind, seed=2, device=device)
    again.load_state_dict(run.state_dict())
    again.advance(2)
    assert again.agent.version == 14
    for one in (run, again):
        one.environments.close()


# Paths of several steps


def path_agent(kind: str) -> Any:
    options: dict[str, Any] = {"discount": 0.5, "temperature": Temperature(0.3)}
    source = generator(5)
    if kind == "soft Q":
        return SoftQ(MLP(2, 3, hidden=(4,), generator=source), optimiser=sgd(0.0), **options)
    if kind == "discrete SAC":
        actor, *critics = (MLP(2, 3, hidden=(4,), generator=source) for _ in range(3))
        return DiscreteSAC(actor, Twin(*critics), optimiser=sgd(0.0), **options)
    pair = [StateActionMLP(2, 1, hidden=(4,), generator=source) for _ in range(2)]
    actor = MLP(2, 2, hidden=(4,), generator=source)
    edge = torch.ones(1)
    return SAC(actor, Twin(*pair), low=-edge, high=edge, optimiser=sgd(0.0), **options)


def paths(kind: str) -> tuple[Transitions, Tensor, Tensor]:
    """Four of up to three steps; the second ends by termination, the third is cut off."""
    source = generator(2)
    present = torch.tensor([[True] * 4, [True, False, True, True], [True, False, False, True]])
    action = torch.randint(3, (12,), generator=source)
    batch = Transitions(
        torch.randn(12, 2, generator=source),
        action if kind != "SAC" else torch.rand(12, 1, generator=source),
        torch.randn(12, 2, generator=source),
        torch.tensor([False, True] + 9 * [False] + [True]),
        torch.full((12,), math.nan),
    )
    return batch, torch.randn(12, generator=source), present


@pytest.mark.parametrize("kind", ["soft Q", "discrete SAC", "SAC"])
@torch.no_grad()
def test_a_target_of_several_steps_is_their_soft_return(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σ γᵏ (r_k + τ H(s_k) [k > 0]) + γᵐ (1 − terminated) V̄(s_m), added up path by path; an
    estimate of the entropy is replaced by a function of the state."""
    agent = path_agent(kind)
    if kind == "SAC":
        monkeypatch.setattr(agent, "_entropy", lambda where: where[:, 0])
        monkeypatch.setattr(agent, "_following", lambda where: where[:, 1])
    batch, reward, present = paths(kind)
    first, goal = agent.goal(batch, reward, present)
    for part, whole in zip(first[:4], batch[:4], strict=True):
        assert torch.equal(part, whole[:4])
    for path in range(4):
        want, rows = 0.0, [path + 4 * k for k in range(3) if present[k, path]]
        for k, row in enumerate(rows):
            bonus = float(agent._entropy(batch.observation[[row]])) if k else 0.0
            want += 0.5**k * (float(reward[row]) + 0.3 * bonus)
        if not batch.terminated[rows[-1]]:
            after = agent._following(batch.next_observation[[rows[-1]]])
            want += 0.5 ** len(rows) * float(after)
        assert float(goal[path]) == pytest.approx(want, abs=1e-5), path
    with torch.enable_grad():
        assert math.isfinite(agent.update(batch, reward, present)["entropy"])


@pytest.mark.parametrize("kind", ["soft Q", "discrete SAC"])
def test_the_entropy_of_a_state_is_that_of_its_policy(kind: str) -> None:
    agent = path_agent(kind)
    where = torch.randn(5, 2, generator=generator())
    share = agent.probabilities(where)  # the copy is not behind yet
    assert_close(agent._entropy(where), -(share * share.log()).sum(-1), bound=1e-6, label="H")


def test_paths_that_fit_no_batch_are_refused() -> None:
    agent = path_agent("soft Q")
    batch, reward, present = paths("soft Q")
    for wrong in (present[:2], present[0], ~present):
        with pytest.raises(ShapeError, match=r"present has shape .* a batch of 12"):
            agent.update(batch, reward, wrong)


# Learning rates


@pytest.mark.parametrize("kind", ["soft Q", "discrete SAC", "SAC"])
def test_learning_rates_fall_linearly_to_nothing(kind: str) -> None:
    run = Run(kind, seed=1)  # over 40 updates
    run.advance(11)
    optimisers = [one for one in vars(run.agent).values() if isinstance(one, torch.optim.Optimizer)]
    assert len(optimisers) == (1 if kind == "soft Q" else 2)
    for one in optimisers:  # the eleventh update had ten before it
        assert one.param_groups[0]["lr"] == pytest.approx(1e-3 * 30 / 40)
    run.advance(29)
    before = run.agent.policy_state()["network"]
    run.advance(2)
    assert_same_state(run.agent.policy_state()["network"], before)
    run.environments.close()
    with pytest.raises(OptionError, match="anneal_over is 0"):
        SoftQ(
            table(2, 2, generator()),
            discount=0.5,
            temperature=Temperature(1.0),
            optimiser=sgd(1.0),
            anneal_over=0,
        )


# The best so far


@pytest.mark.parametrize("kind", ["soft Q", "discrete SAC", "SAC"])
def test_the_best_policy_is_kept_and_restored(kind: str) -> None:
    run = Run(kind, seed=1)
    best = Best(run.agent)
    where = torch.randn(6, run.environments.spaces.observation_shape[0], generator=generator())

    def acts() -> tuple[Tensor, float]:
        return run.agent.sample(where, generator()), run.agent.temperature

    found = {}
    for value in (1.0, 3.0, 2.0, math.nan):
        run.advance(3)
        best.offer(value)
        found[value] = acts(), run.agent.policy_state()
    assert best.value == 3.0
    kept = best.state_dict()
    run.advance(1)
    best.restore()
    (action, tau), network = found[3.0]
    assert torch.equal(acts()[0], action)
    assert acts()[1] == tau != found[2.0][0][1]
    assert_same_state(run.agent.policy_state(), network)
    run.advance(1)
    again = Best(run.agent)
    again.load_state_dict(kept)
    again.restore()
    assert_same_state(run.agent.policy_state(), network)
    assert_same_state(again.state_dict(), kept)
    run.environments.close()


# Resuming


class Run:
    """An agent, its replay and its collector, as a job would hold them."""

    def __init__(self, kind: str, seed: int, device: str = "cpu") -> None:
        source = generator(seed)
        automatic = Temperature(0.5, entropy_target=0.3, learning_rate=1e-2, device=device)
        options: dict[str, Any] = {
            "discount": 0.9,
            "temperature": automatic,
            "optimiser": adam(1e-3),
            "target_rate": 0.5,
            "target_period": 3,
            "anneal_over": 40,
        }
        name = "Pendulum-v1" if kind == "SAC" else "CartPole-v1"
        self.environments = make_environments(name, count=3, seed=4)
        spaces = self.environments.spaces
        inputs = spaces.observation_shape[0]
        if kind == "SAC":
            assert spaces.low is not None
            assert spaces.high is not None
            critics = [StateActionMLP(inputs, 1, hidden=(8,), generator=source) for _ in range(2)]
            self.agent: Any = SAC(
                MLP(inputs, 2, hidden=(8,), generator=source).to(device),
                Twin(*critics).to(device),
                low=spaces.low,
                high=spaces.high,
                seed=seed,
                **options,
            )
        else:
            assert spaces.actions is not None
            networks = [
                MLP(inputs, spaces.actions, hidden=(8,), generator=source) for _ in range(3)
            ]
            if kind == "soft Q":
                self.agent = SoftQ(networks[0].to(device), **options)
            else:
                self.agent = DiscreteSAC(
                    networks[0].to(device), Twin(*networks[1:]).to(device), **options
                )
        self.replay = ReplayBuffer(80, device=device)
        self.generator = generator(seed)
        self.collector = Collector(self.environments, self.agent, seed=seed, random_steps=20)
        self.episodes: list[Any] = []

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            found = self.collector.collect(2)
            self.episodes += found.episodes
            self.replay.append(found.transitions)
            batch = self.replay.sample(16, self.generator)
            self.agent.update(batch, batch.observation[:, 0] - batch.observation[:, 1])

    def state_dict(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "replay": self.replay.state_dict(),
            "collector": self.collector.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self.replay.load_state_dict(state["replay"])
        self.collector.load_state_dict(state["collector"])
        self.generator.set_state(state["generator"])


@pytest.mark.parametrize("half", [3, 25])  # uniform actions, then the agent's; within an episode
@pytest.mark.parametrize("kind", ["soft Q", "discrete SAC", "SAC"])
def test_resuming_changes_no_bit(kind: str, half: int, tmp_path: Path) -> None:
    through = Run(kind, seed=1)
    through.advance(half)
    store = CheckpointStore(tmp_path)
    store.save(through.state_dict(), step=half, config={}, versions={})
    lengths = through.collector.state_dict()["lengths"]
    assert any(lengths), "the checkpoint should lie within an episode"
    before = len(through.episodes)
    through.advance(half)

    resumed = Run(kind, seed=2)
    resumed.advance(1)  # so that nothing is as it was built
    resumed.load_state_dict(store.load().state)
    resumed.episodes = []
    resumed.advance(half)
    assert_same_state(resumed.state_dict(), through.state_dict())
    assert resumed.episodes == through.episodes[before:]
    for run in (through, resumed):
        run.environments.close()


def test_a_snapshot_is_not_moved_by_what_follows() -> None:
    run = Run("SAC", seed=1)
    run.advance(4)
    state = run.state_dict()
    kept = copy.deepcopy(state)
    run.advance(2)
    assert_same_state(state, kept)
    run.environments.close()


def test_the_global_generators_are_left_alone() -> None:
    before, legacy = torch.get_rng_state(), untyped(np.random.get_state())[1].copy()  # noqa: NPY002
    for kind in ("soft Q", "discrete SAC", "SAC"):
        run = Run(kind, seed=1)
        run.advance(12)
        run.environments.close()
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(legacy, untyped(np.random.get_state())[1])  # noqa: NPY002
