"""Learned successor features against a linear solve, and what a critic of them says of a reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_score import (
    ACTIONS,
    DISCOUNT,
    STATES,
    estimate,
    make_problem,
    simulator_of,
    successor_features,
)
from torch import Tensor, nn

from birl_ext.agents.networks import MLP, OneHot
from birl_ext.agents.successor_features import SuccessorFeatures
from birl_ext.bilevel.bias_meter import measure_estimator
from birl_ext.bilevel.score import Critic, OneStep
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import DiscountError, NonFiniteInputError, OptionError, ShapeError
from birl_ext.preferences.last_layer import LastLayer
from birl_ext.preferences.reward_model import RewardNetwork
from birl_ext.simulators.finite import FiniteFollower

S, A, F, GAMMA = 5, 3, 2, 0.9


class Process:
    """Each (s, a) has four equally likely outcomes, some of which end the process: so a batch that
    holds every outcome once is the expectation itself.
    """

    def __init__(self, seed: int = 0) -> None:
        draws = np.random.default_rng(seed)
        self.after = draws.integers(S, size=(S, A, 4))
        self.ends = draws.random((S, A, 4)) < 0.15
        self.policy = draws.dirichlet(np.ones(A), size=S)
        self.features = draws.standard_normal((S, A, F))

    def batch(self) -> Transitions:
        where, chosen, which = (part.ravel() for part in np.indices((S, A, 4)))
        after, ends = self.after[where, chosen, which], self.ends[where, chosen, which]
        parts = [torch.tensor(part) for part in (where, chosen, after, ends)]
        return Transitions(*parts, torch.zeros(S * A * 4))  # type: ignore[call-arg]

    def exact(self) -> np.ndarray:
        """M, (S, A, F): (I − γ P Π)⁻¹ ψ over pairs."""
        moves = np.zeros((S * A, S * A))
        for s, a, k in np.ndindex(S, A, 4):
            if not self.ends[s, a, k]:
                t = self.after[s, a, k]
                moves[s * A + a, t * A : (t + 1) * A] += self.policy[t] / 4
        found = np.linalg.solve(np.eye(S * A) - GAMMA * moves, self.features.reshape(S * A, F))
        return found.reshape(S, A, F)


def learner(process: Process, **options: Any) -> SuccessorFeatures:
    """A table, whose step on the whole batch is one application of the Bellman operator."""
    features = torch.tensor(process.features)
    table = nn.Embedding(S, A * F).double()
    nn.init.zeros_(table.weight)
    rate = S * A * F / 2

    def optimiser(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=rate)

    defaults: dict[str, Any] = {"discount": GAMMA, "optimiser": optimiser, "target_rate": 1.0}
    return SuccessorFeatures(table, lambda s: features[s], **{**defaults, **options})


def test_what_is_learned_solves_the_linear_system() -> None:
    process = Process()
    found = learner(process)
    policy = FiniteFollower(torch.tensor(process.policy))
    for _ in range(250):
        found.update(process.batch(), policy)
    table = found(torch.arange(S))
    np.testing.assert_allclose(table, process.exact(), rtol=1e-9, atol=1e-9)
    assert np.abs(process.exact()).max() > 2  # more than one step


def test_a_step_is_the_bellman_operator_with_a_target_that_waits() -> None:
    process = Process(1)
    found = learner(process, target_period=2)
    policy = FiniteFollower(torch.tensor(process.policy))
    for _ in range(2):
        found.update(process.batch(), policy)
    np.testing.assert_allclose(found(torch.arange(S)), process.features, rtol=1e-12)


def test_learning_goes_on_to_the_same_bits() -> None:
    process = Process(2)
    policy = FiniteFollower(torch.tensor(process.policy))

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.01)

    one, other = (learner(process, optimiser=adam, target_rate=0.1) for _ in range(2))
    for _ in range(3):
        one.update(process.batch(), policy)
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        losses = [each.update(process.batch(), policy)["features_loss"] for each in (one, other)]
        assert losses[0] == losses[1]
    assert torch.equal(one(torch.arange(S)), other(torch.arange(S)))


def test_a_learned_critic_gives_the_exact_hypergradient() -> None:
    """From sampled transitions, through a network: what error it has left is the gradient's."""
    problem = make_problem()
    simulator = simulator_of(problem)
    generator = torch.Generator().manual_seed(0)
    network = OneHot(STATES, MLP(STATES, ACTIONS * 4, hidden=(), generator=generator))

    def features(observation: Tensor) -> Tensor:
        return problem.features[observation].float()

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.02)

    critic = SuccessorFeatures(
        network, features, discount=DISCOUNT, optimiser=adam, target_rate=0.1
    )
    for _ in range(500):
        where = torch.randint(STATES, (600,), generator=generator)
        chosen = torch.randint(ACTIONS, (600,), generator=generator)
        path = simulator.continuations(problem.follower, where, chosen, 2)
        ended = torch.zeros(600, dtype=torch.bool)
        batch = Transitions(where, chosen, path.observation[:, 1], ended, torch.zeros(600))
        critic.update(batch, problem.follower)
    exact = successor_features(problem)
    learned = critic(torch.arange(STATES)).double()
    error = float((learned - exact).norm() / exact.norm())
    assert error < 0.03, error

    score = Critic(critic, lambda: problem.x)
    report = measure_estimator(
        lambda: estimate(problem, simulator, score, 10_000), problem.exact, repetitions=20
    )
    assert report.noise < 0.06, report
    assert report.relative_error < error + 4 * report.noise, report


# ---- a network's last layer ----------------------------------------------------------------------


def network_reward(seed: int = 0) -> RewardNetwork:
    generator = torch.Generator().manual_seed(seed)
    body = nn.Sequential(
        OneHot(STATES, MLP(STATES, 6, hidden=(), generator=generator)),
        nn.Tanh(),
        nn.Linear(6, ACTIONS),
    )
    for part in body[2].parameters():
        nn.init.normal_(part, generator=generator)
    return RewardNetwork(body, actions=ACTIONS)


def gradients(output: Tensor, reward: RewardNetwork) -> tuple[Tensor, Tensor]:
    """With respect to the trunk, and to the last layer."""
    parts = torch.autograd.grad(output, list(reward.parameters()))
    flat = [part.flatten().double() for part in parts]
    return torch.cat(flat[:-2]), torch.cat(flat[-2:])


def test_a_network_is_linear_in_its_last_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    for reward, seen in (
        (RewardNetwork.mlp(3, generator, actions=4), torch.randn(7, 3, generator=generator)),
        (network_reward(), torch.arange(STATES)),
        (
            RewardNetwork.cnn((2, 43, 43), generator, actions=3),
            torch.randint(256, (2, 2, 43, 43), dtype=torch.uint8, generator=generator),
        ),
    ):
        last = LastLayer(reward)
        table = last.features(seen)
        assert table.shape == (len(seen), last.actions, last.size)
        torch.testing.assert_close(table @ last.weights(), reward.all_actions(seen))
        torch.testing.assert_close(last.trunk(seen), reward.all_actions(seen))
    reward = network_reward()
    last = LastLayer(reward)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(last.trunk(torch.arange(STATES)).sum(), list(reward.parameters()))


def test_a_critic_of_a_network_is_exact_in_the_last_layer_and_one_step_in_the_trunk() -> None:
    reward = network_reward()
    last = LastLayer(reward)
    problem = make_problem()
    policy, transition = problem.follower.policy, problem.mdp.transition
    everywhere = torch.arange(STATES)
    features = last.features(everywhere).double()
    exact_features = successor_features(problem._replace(features=features))
    critic = Critic(lambda where: exact_features[where].float(), last.weights, trunk=last.trunk)
    where, chosen = torch.tensor([[0, 2, 1]]), torch.tensor([[1, 0, 1]])
    present = torch.tensor([[True, True, False]])
    found = critic(reward, problem.follower, where, chosen, present)
    trunk, top = gradients(found.sum(), reward)

    # Q of the fixed policy, differentiated: V = (I − γ P_π)⁻¹ r_π
    table = reward.all_actions(everywhere).double()
    moves = torch.einsum("sa,sat->st", policy, transition)
    eye = torch.eye(STATES, dtype=torch.float64)
    value = torch.linalg.solve(eye - DISCOUNT * moves, (policy * table).sum(-1))
    advantage = table + DISCOUNT * transition @ value - value.unsqueeze(-1)
    total = advantage[0, 1] + advantage[2, 0]
    exact_trunk, exact_top = gradients(total, reward)
    torch.testing.assert_close(top, exact_top, rtol=1e-5, atol=1e-5)

    first = OneStep(ACTIONS)(reward, problem.follower, where, chosen, present)
    first_trunk, first_top = gradients(first.sum(), reward)
    torch.testing.assert_close(trunk, first_trunk, rtol=1e-5, atol=1e-5)
    assert (trunk - exact_trunk).norm() > 0.1 * exact_trunk.norm()
    assert (first_top - exact_top).norm() > 0.1 * exact_top.norm()


def test_what_does_not_fit_is_named() -> None:
    process = Process()
    policy = FiniteFollower(torch.tensor(process.policy))
    with pytest.raises(DiscountError):
        learner(process, discount=1.0)
    wrong = SuccessorFeatures(
        nn.Embedding(S, A * F + 1),
        lambda s: torch.zeros(len(s), A, F),
        discount=GAMMA,
        optimiser=torch.optim.Adam,
    )
    with pytest.raises(ShapeError, match=r"\(60, 7\), where .* is \(60, 3, 2\)"):
        wrong.update(process.batch(), policy)
    process.features[1, 2] = np.nan
    with pytest.raises(NonFiniteInputError, match="row 12 of the batch"):
        learner(process).update(process.batch(), policy)
    generator = torch.Generator().manual_seed(0)
    for reward in (
        RewardNetwork.table(S, A),
        RewardNetwork.mlp(3, generator, action_size=2),
        RewardNetwork(nn.Sequential(nn.Linear(3, 2, bias=False)), actions=2),
    ):
        with pytest.raises(OptionError, match="ends in a Linear with a bias"):
            LastLayer(reward)
