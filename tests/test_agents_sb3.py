"""Policies of Stable-Baselines3 as frozen followers, with stand-ins that have the same parts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from birl_ext.agents.collect import Collector
from birl_ext.agents.environment import make_environments
from birl_ext.agents.sb3 import from_sb3
from birl_ext.errors import OptionError, TemperatureError


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Policy(nn.Module):
    """What the policies have in common: modules, and spaces."""

    def __init__(self, action_space: Any) -> None:
        super().__init__()
        self.action_space = action_space
        self.net = nn.Linear(2, 3)


class PPO(Policy):
    def get_distribution(self, observation: Tensor) -> Any:
        # normalised as Stable-Baselines3 does, by the policy
        output = self.net(observation.float() / 255)
        if isinstance(self.action_space, Discrete):
            return SimpleNamespace(distribution=torch.distributions.Categorical(logits=output))
        spread = torch.full((3,), 0.5)
        return SimpleNamespace(distribution=torch.distributions.Normal(output, spread))


class DQN(Policy):
    def __init__(self) -> None:
        super().__init__(Discrete(3))
        self.q_net = nn.Linear(2, 3)


class SquashedActor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(2, 1)

    def get_action_dist_params(self, observation: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        mean = self.mean(observation)
        return mean, torch.full_like(mean, -0.5), {}


class SquashedPolicy(Policy):
    def __init__(self) -> None:
        super().__init__(Box(-2.0, 4.0, (1,)))
        self.actor = SquashedActor()


def observations(count: int) -> Tensor:
    return torch.randn(count, 2, generator=generator())


def test_discrete_policies() -> None:
    policy = PPO(Discrete(3))
    follower = from_sb3(SimpleNamespace(policy=policy))
    pixels = torch.randint(256, (4, 2), generator=generator(), dtype=torch.uint8)
    want = policy.net(pixels.float() / 255).softmax(-1).detach()
    assert_close(follower.probabilities(pixels), want, bound=1e-6, label="π")
    action = torch.tensor([0, 1, 2, 0])
    picked = want.gather(1, action.unsqueeze(1)).squeeze(1).log()
    assert_close(follower.log_prob(pixels, action), picked, bound=1e-6, label="log π")
    assert torch.equal(follower.act(pixels, generator(), greedy=True), want.argmax(-1))
    drawn = follower.sample(pixels[:1].expand(30_000, -1), generator())
    shares = torch.bincount(drawn, minlength=3).float() / 30_000
    assert_close(shares, want[0], bound=0.015, label="shares")


def test_dqn_needs_a_temperature() -> None:
    policy = DQN()
    with pytest.raises(TemperatureError, match="for DQN"):
        from_sb3(policy)
    follower = from_sb3(policy, temperature=0.5)
    seen = observations(4)
    want = (policy.q_net(seen) / 0.5).softmax(-1).detach()
    assert_close(follower.probabilities(seen), want, bound=1e-6, label="π")
    with pytest.raises(OptionError, match="unless the model has a q_net"):
        from_sb3(PPO(Discrete(3)), temperature=0.5)


def test_gaussian_policies() -> None:
    policy = PPO(Box(-1.0, 1.0, (3,)))
    follower = from_sb3(policy)
    seen = 255 * observations(1)
    mean = policy.net(seen / 255).detach()
    assert_close(follower.act(seen, generator(), True), mean, bound=1e-6, label="greedy")
    drawn = follower.sample(seen.expand(40_000, -1), generator())
    assert_close(drawn.mean(0), mean[0], bound=0.015, label="mean")
    assert_close(drawn.std(0), torch.full((3,), 0.5), bound=0.01, label="spread")
    action = mean + 0.5
    want = torch.full((1,), -0.5 * 3 - 3 * math.log(0.5 * math.sqrt(2 * math.pi)))
    assert_close(follower.log_prob(seen, action), want, bound=1e-5, label="log π")


def test_squashed_policies() -> None:
    """The density over the box [−2, 4] integrates to one, and the samples have its mean."""
    policy = SquashedPolicy()
    follower = from_sb3(policy)
    seen = observations(1)
    grid = 1 + 3 * torch.linspace(-5, 5, 20_001).tanh()
    log_density = follower.log_prob(seen.expand(len(grid), -1), grid.unsqueeze(-1))
    density = log_density.double().exp()
    assert float(torch.trapezoid(density, grid.double())) == pytest.approx(1, abs=1e-3)
    mean = float(torch.trapezoid(density * grid, grid.double()))
    drawn = follower.sample(seen.expand(40_000, -1), generator())
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.03)
    greedy = 1 + 3 * policy.actor.mean(seen).tanh().detach()
    assert_close(follower.act(seen, generator(), True), greedy, bound=1e-6, label="greedy")


@pytest.mark.parametrize("policy", [PPO(Discrete(3)), DQN(), SquashedPolicy()], ids=repr)
def test_a_follower_is_frozen(policy: Policy) -> None:
    policy.train()
    from_sb3(policy, temperature=1.0 if isinstance(policy, DQN) else None)
    assert not policy.training
    assert not any(parameter.requires_grad for parameter in policy.parameters())


def test_a_follower_can_be_collected_from() -> None:
    follower = from_sb3(PPO(Discrete(2)))
    follower._logits = lambda seen: seen[:, :2]
    with make_environments("CartPole-v1", count=2) as environments:
        found = Collector(environments, follower).collect(10)
    rows = found.transitions
    assert_close(
        follower.log_prob(rows.observation, rows.action), found.log_prob, bound=1e-6, label="log π"
    )


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match="the model is a SimpleNamespace"):
        from_sb3(SimpleNamespace())
