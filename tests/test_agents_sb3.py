"""The recipe of docs/preferences.md for Stable-Baselines3 does what the models themselves do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor

from birl_ext.environments.vector import make_environments
from birl_ext.rollouts.collect import Collector
from birl_ext.rollouts.evaluate import evaluate_agent

sb3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "preferences.md"


@pytest.fixture(scope="module")
def follower() -> Any:
    """The class of the recipe."""
    _, _, page = PAGE.read_text().partition("## A policy of Stable-Baselines3")
    known: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], known)
    return known["Follower"]


def made(algorithm: str, env: Any, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(sb3, algorithm)("MlpPolicy", env, seed=0, device="cpu", **options)

    make.__name__ = f"{algorithm}-{env if isinstance(env, str) else 'env'}-{options}"
    return make


def shifted() -> Any:
    """Pendulum with torques from −1 to 5: the box has a centre and a width of its own."""
    return gymnasium.wrappers.RescaleAction(
        gymnasium.make("Pendulum-v1"), np.float32(-1), np.float32(5)
    )


def normalised() -> Any:
    return VecNormalize(DummyVecEnv([lambda: gymnasium.make("MountainCarContinuous-v0")]))


SQUASHED = {"squash_output": True, "log_std_init": -2.0}
MODELS = [
    made("PPO", "CartPole-v1"),
    made("A2C", "CartPole-v1"),
    made("PPO", "CliffWalking-v1"),
    made("PPO", "Pendulum-v1"),
    made("A2C", "Pendulum-v1", use_sde=True),
    made("PPO", "Pendulum-v1", use_sde=True, policy_kwargs=SQUASHED),
    made("SAC", "Pendulum-v1"),
    made("SAC", "Pendulum-v1", use_sde=True),
    made("DQN", "CartPole-v1"),
]


def jolted(model: Any) -> Any:
    """With other parameters than those of the start, where outputs are nearly 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def observations(model: Any, count: int) -> Tensor:
    model.observation_space.seed(0)
    shown = [model.observation_space.sample() for _ in range(count)]
    found = torch.tensor(np.array(shown))
    return found.clamp(-3, 3) if found.is_floating_point() else found


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_recipe_is_the_model(make: Any, follower: Any) -> None:
    """Greedy actions are those of `predict`, drawn ones have the moments of SB3's own, and log π is
    that of `evaluate_actions`."""
    model = jolted(make())
    is_dqn = isinstance(model, sb3.DQN)
    ours = follower(model, 0.5) if is_dqn else follower(model)
    shown, generator = observations(model, 6), torch.Generator().manual_seed(1)
    discrete = hasattr(model.action_space, "n")
    greedy = ours.act(shown, generator, greedy=True)
    edges: tuple[Any, ...] = ()
    clip: Any = (lambda a: a) if discrete else (lambda a: a.clamp(*edges))
    if not discrete:
        edges = float(model.action_space.low[0]), float(model.action_space.high[0])
    want = torch.tensor(model.predict(shown.numpy(), deterministic=True)[0])
    assert_close(clip(greedy).double(), want.double(), bound=1e-5, label="greedy")

    action = ours.sample(shown, generator)
    found = ours.log_prob(shown, action)
    with torch.no_grad():
        if is_dqn:
            want = (model.q_net(shown) / 0.5).log_softmax(-1).gather(1, action[:, None])[:, 0]
        elif isinstance(model, sb3.SAC):  # a density of u in (−1, 1), a = 2u
            mean, log_std, more = model.actor.get_action_dist_params(shown)
            if more:
                spread = (more["latent_sde"] ** 2 @ log_std.exp() ** 2 + 1e-6).sqrt()
            else:
                spread = log_std.exp()
            unit = action / 2
            normal = torch.distributions.Normal(mean, spread)
            want = (normal.log_prob(unit.atanh()) - (1 - unit**2 + 1e-6).log() - math.log(2)).sum(
                -1
            )
        elif model.policy.squash_output:
            unit = action / 2
            want = model.policy.evaluate_actions(shown, unit)[1] - math.log(2)
        else:
            want = model.policy.evaluate_actions(shown, action)[1]
    assert_close(found, want, bound=1e-4, label="log π")


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_what_is_drawn_has_the_density_that_is_named(make: Any, follower: Any) -> None:
    model = jolted(make())
    ours = follower(model, 0.5) if isinstance(model, sb3.DQN) else follower(model)
    count = 20_000
    shown = observations(model, 1).expand(count, *observations(model, 1).shape[1:])
    drawn = ours.sample(shown, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, ours.sample(shown, torch.Generator().manual_seed(1)))
    if hasattr(model.action_space, "n"):
        number = int(model.action_space.n)
        shares = torch.bincount(drawn, minlength=number).double() / count
        want = ours.log_prob(shown[:number], torch.arange(number)).exp().double()
        assert_close(shares, want, bound=0.015, label="shares")
        return
    squashed = model.policy.squash_output
    # on an even grid of z, where a = edge·tanh z if squashed
    z = torch.linspace(-9, 9, count, dtype=torch.float64)
    grid = (2 * z.tanh()).clamp(-2 + 1e-5, 2 - 1e-5) if squashed else 6 * z
    density = ours.log_prob(shown, grid.float().unsqueeze(-1)).double().exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=0.01)
    mean = float(torch.trapezoid(density * grid, grid))
    square = float(torch.trapezoid(density * grid**2, grid))
    bound = 5 * math.sqrt(square / count) + 0.01
    assert float(drawn.mean()) == pytest.approx(mean, abs=bound)
    assert float(drawn.square().mean()) == pytest.approx(square, rel=0.05)


def test_observations_are_normalised_as_in_training(follower: Any) -> None:
    env = normalised()
    model = sb3.PPO("MlpPolicy", env, n_steps=128, seed=0, device="cpu")
    model.learn(512)
    raw = np.array([[-0.5, 0.03]], np.float32)
    ours = follower(model).act(torch.from_numpy(raw), torch.Generator(), greedy=True)
    want = model.predict(env.normalize_obs(raw), deterministic=True)[0]
    assert_close(ours.clamp(-1, 1), torch.from_numpy(want), bound=1e-6, label="greedy")
    assert float(abs(ours - torch.from_numpy(model.predict(raw, deterministic=True)[0]))) > 1e-3


def test_a_box_of_its_own_is_filled(follower: Any) -> None:
    model = jolted(sb3.SAC("MlpPolicy", shifted(), seed=0, device="cpu"))
    ours = follower(model)
    shown = observations(model, 500)
    greedy = ours.act(shown, torch.Generator(), greedy=True)
    want = torch.from_numpy(model.predict(shown.numpy(), deterministic=True)[0])
    assert_close(greedy, want, bound=1e-5, label="greedy")
    drawn = ours.sample(shown, torch.Generator())
    assert -1 <= float(drawn.min()) < 0 < 4 < float(drawn.max()) <= 5


def test_a_follower_is_frozen_and_can_be_collected_from(follower: Any) -> None:
    ours = follower(made("PPO", "CartPole-v1")())
    assert not any(parameter.requires_grad for parameter in ours.policy.parameters())
    with make_environments("CartPole-v1", count=2) as environments:
        rows = (found := Collector(environments, ours).collect(20)).transitions
        assert evaluate_agent(ours, environments, episodes=2).rewards.min() > 5
    log_prob = ours.log_prob(rows.observation, rows.action)
    assert_close(log_prob, found.log_prob, bound=1e-6, label="log π")


def test_other_models_are_refused(follower: Any) -> None:
    with pytest.raises(TypeError, match="TD3: PPO, A2C or SAC"):
        follower(made("TD3", "Pendulum-v1")())
    with pytest.raises(TypeError, match=r"DQN: .* with a temperature"):
        follower(made("DQN", "CartPole-v1")())
    with pytest.raises(TypeError, match="PPO: "):
        follower(made("PPO", "CartPole-v1")(), 0.5)
