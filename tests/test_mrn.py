"""A reward updated through the critic, against the derivative of the whole computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from birl_ext.agents.learner import Learner
from birl_ext.agents.networks import StateActionMLP, Twin, head_network
from birl_ext.agents.sac import SAC
from birl_ext.agents.sac_discrete import DiscreteSAC
from birl_ext.agents.soft_q import SoftQ
from birl_ext.agents.temperature import Temperature
from birl_ext.bilevel.mrn import MRNUpdate
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import NonFiniteInputError, OptionError
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.reward_model import RewardNetwork

SIZE, ACTIONS, COUNT, STEPS, RATE = 3, 2, 12, 4, 0.3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agent(kind: str) -> Learner:
    learned: dict[str, Any] = {
        "discount": 0.9,
        "temperature": Temperature(0.3),
        "optimiser": torch.optim.Adam,
    }

    def heads(seed: int, outputs: int = ACTIONS) -> nn.Module:
        return head_network((SIZE,), torch.float32, outputs, generator=generator(seed), hidden=(8,))

    if kind == "soft Q":
        return SoftQ(heads(0), **learned)
    if kind == "discrete":
        return DiscreteSAC(heads(0), Twin(heads(1), heads(2)), **learned)
    critics = (StateActionMLP(SIZE, 1, hidden=(8,), generator=generator(s)) for s in (1, 2))
    bound = torch.ones(1)
    return SAC(heads(0, 2), Twin(*critics), low=-bound, high=bound, seed=0, **learned)


def setting(kind: str) -> tuple[Learner, RewardNetwork, Pairs, Transitions]:
    draws = generator(7)
    discrete = kind != "continuous"

    def actions(*shape: int) -> Tensor:
        if discrete:
            return torch.randint(ACTIONS, shape, generator=draws)
        return 2 * torch.rand(*shape, 1, generator=draws) - 1

    def side() -> Fragments:
        shape = (COUNT, STEPS)
        return Fragments(
            torch.randn(*shape, SIZE, generator=draws),
            actions(*shape),
            torch.zeros(shape),
            torch.ones(shape, dtype=torch.bool),
            torch.zeros(shape),
            torch.zeros(COUNT, dtype=torch.int64),
        )

    pairs = Pairs(side(), side(), torch.randint(2, (COUNT,), generator=draws).float())
    batch = Transitions(
        torch.randn(COUNT, SIZE, generator=draws),
        actions(COUNT),
        torch.randn(COUNT, SIZE, generator=draws),
        torch.rand(COUNT, generator=draws) < 0.2,
        torch.zeros(COUNT),
    )
    heads = {"actions": ACTIONS} if discrete else {"action_size": 1}
    reward = RewardNetwork.mlp(SIZE, draws, hidden=(5,), **heads)
    return agent(kind), reward, pairs, batch


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def by_autograd(
    follower: Learner,
    reward: RewardNetwork,
    pairs: Pairs,
    batch: Transitions,
    goal: Tensor,
    scale: float,
) -> list[Tensor]:
    """∇ of the loss of the critics after one step of theirs, differentiated as it is computed."""
    critics = dict(follower.critics.named_parameters())
    paid = reward(batch.observation, batch.action) / scale
    target = goal + paid - paid.detach()
    values = follower.chosen(follower.critics, batch.observation, batch.action)
    error = (values - target).square().mean(-1).sum()
    slope = torch.autograd.grad(error, list(critics.values()), create_graph=True)
    ahead = {name: one - RATE * by for (name, one), by in zip(critics.items(), slope, strict=True)}
    first, second = (
        follower.chosen(
            lambda *inputs: functional_call(follower.critics, ahead, inputs),
            part.observation[:, 0],
            part.action[:, 0],
        )
        for part in (pairs.first, pairs.second)
    )
    label = pairs.label.expand_as(first)
    loss = nn.functional.binary_cross_entropy_with_logits(first - second, label, reduction="none")
    return list(torch.autograd.grad(loss.mean(-1).sum(), list(reward.parameters())))


@pytest.mark.parametrize("scale", [1.0, 0.05])
@pytest.mark.parametrize("kind", ["soft Q", "discrete", "continuous"])
def test_the_gradient_is_that_of_the_critics_step(kind: str, scale: float) -> None:
    follower, reward, pairs, batch = setting(kind)
    paid = reward(batch.observation, batch.action).detach() / scale
    drawn = follower.state_dict()  # the continuous agent draws an action for its goal
    _, goal = follower.goal(batch, paid)
    follower.load_state_dict(drawn)
    want = by_autograd(follower, reward, pairs, batch, goal, scale)
    learner = MRNUpdate(reward, optimiser=still, rate=RATE)
    before = [parameter.detach().clone() for parameter in follower.critics.parameters()]
    found = learner.through_critic(pairs, follower, batch, paid, scale=scale)
    for parameter, one in zip(reward.parameters(), want, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, one, rtol=1e-4, atol=1e-7)
    assert found.gradient_norm > 1e-6
    for parameter, one in zip(follower.critics.parameters(), before, strict=True):
        assert torch.equal(parameter, one)


def test_the_critic_comes_to_agree_with_the_answers() -> None:
    follower, reward, pairs, batch = setting("soft Q")
    learner = MRNUpdate(
        reward, optimiser=lambda parameters: torch.optim.Adam(parameters, lr=0.05), rate=RATE
    )
    losses = []
    for _ in range(30):
        paid = reward(batch.observation, batch.action).detach()
        losses.append(learner.through_critic(pairs, follower, batch, paid).loss)
    assert losses[-1] < losses[0] - 0.02
    outcome = learner.step(pairs, follower, temperature=0.3)
    assert outcome.indirect_share == 0.0


def test_what_cannot_be_learned_from_is_named() -> None:
    follower, reward, pairs, batch = setting("soft Q")
    with pytest.raises(OptionError, match="rate is 0"):
        MRNUpdate(reward, optimiser=still, rate=0.0)
    learner = MRNUpdate(reward, optimiser=still, rate=RATE)
    broken = torch.full((COUNT,), torch.inf)
    with pytest.raises(NonFiniteInputError):
        learner.through_critic(pairs, follower, batch, broken)
