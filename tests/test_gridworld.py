"""The gridworld is one world, as an environment and as an MDP."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import birl_ext
from birl_ext.environments.vector import make_environments
from birl_ext.errors import OptionError
from birl_ext.problems.preference.gridworld import (
    GRIDWORLD,
    STEPS,
    Gridworld,
    gridworld_mdp,
    true_return,
)


def test_the_environment_draws_from_the_transition_of_the_mdp() -> None:
    mdp = gridworld_mdp(0.9)
    world = Gridworld()
    world.reset(seed=3)
    generator = np.random.default_rng(0)
    count = torch.zeros_like(mdp.transition)
    state, steps = world.reset()[0], 40_000
    for _ in range(steps):
        action = int(generator.integers(4))
        after, reward, terminated, truncated, _ = world.step(action)
        assert not terminated
        assert not truncated
        assert reward == mdp.reward[state, action]
        count[state, action, after] += 1
        state = after
    visits = count.sum(-1, keepdim=True)
    assert int(visits.min()) > 50
    share = mdp.transition
    gap = (count / visits - share).abs()
    assert bool((gap <= 5 * (share * (1 - share) / visits).sqrt() + 1e-12).all())
    assert bool((count[share == 0] == 0).all())


def test_starts_are_those_of_the_mdp() -> None:
    mdp = gridworld_mdp(0.9)
    world = Gridworld()
    count = torch.zeros(mdp.states)
    for seed in range(4000):
        count[world.reset(seed=seed)[0]] += 1
    share = mdp.initial_distribution
    assert share is not None
    assert bool(((count / 4000 - share).abs() <= 5 * (share / 4000).sqrt()).all())


def test_the_exact_return_is_the_mean_of_episodes() -> None:
    """A uniform policy, played."""
    policy = torch.full((38, 4), 0.25)
    with make_environments(GRIDWORLD, count=20, seed=0) as worlds:
        generator = torch.Generator().manual_seed(0)
        sums = torch.zeros(20, 20)
        for episode in range(20):
            for step in range(STEPS):
                found = worlds.step(torch.randint(4, (20,), generator=generator))
                sums[episode] += found.transitions.reward
                assert bool(found.ended.all()) == (step == STEPS - 1)
    error = float(sums.std() / sums.numel() ** 0.5)
    assert abs(float(sums.mean()) - true_return(policy)) < 4 * error


def test_the_best_policy_passes_the_threshold_and_one_that_goes_for_the_near_reward_does_not() -> (
    None
):
    import gymnasium

    threshold = gymnasium.spec(GRIDWORLD).reward_threshold
    assert threshold is not None
    best = birl_ext.solve(gridworld_mdp(0.95), temperature=0.01).policy
    decoy = gridworld_mdp(0.95)
    near = decoy.replace(reward=torch.where(decoy.reward < 1, decoy.reward, 0.0))
    second = birl_ext.solve(near, temperature=0.01).policy
    assert true_return(best) > threshold > 1.5 * true_return(second)


def test_a_picture_shows_the_walker() -> None:
    world = Gridworld(render_mode="rgb_array")
    world.reset(seed=0)
    one = world.render()
    assert one.dtype == np.uint8
    assert one.shape == (224, 224, 3)
    moved = next(
        a for a in range(4) if world.step(a)[0] is not None and (world.render() != one).any()
    )
    assert moved in range(4)
    with pytest.raises(OptionError, match="render_mode is 'human'"):
        Gridworld(render_mode="human")
