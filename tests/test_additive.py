"""An upper level that is a sum over steps, against the derivative through the planner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_entropy_target import (
    ACTIONS,
    DISCOUNT,
    HELD,
    START,
    STATES,
    TARGET,
    TRUTH,
    Setting,
    mdp,
    still,
)
from torch import Tensor

import birl_ext
from birl_ext.bilevel.additive import AdditiveUpdate
from birl_ext.bilevel.bias_meter import measure_estimator
from birl_ext.bilevel.score import Critic, OneStep, Score
from birl_ext.errors import GradientError, NonFiniteInputError, OptionError, ShapeError

ABOVE = 0.8
"""γ of the upper level, which is not the lower's."""


def value(policy: Tensor, transition: Tensor) -> Tensor:
    """Of the truth, from each state, by a linear solve."""
    gained = (policy * TRUTH).sum(-1)
    moves = torch.einsum("sa,sat->st", policy, transition)
    return torch.linalg.solve(torch.eye(STATES, dtype=torch.float64) - ABOVE * moves, gained)


class Above:
    """φ = −(1 − γ_u) E Σ γ_uᵗ truth, its gradients, and what a step needs: all exact."""

    def __init__(self) -> None:
        self.setting = setting = Setting()
        table = setting.weight.detach().reshape(STATES, ACTIONS).clone().requires_grad_()
        process = mdp(table)
        tau = birl_ext.temperature_for(TARGET, process, weight=HELD)
        self.gradients = {}
        for name, temperature in (("whole", tau), ("at fixed", setting.temperature)):
            policy = birl_ext.solve(process, temperature=temperature).policy
            phi = -(1 - ABOVE) * START @ value(policy, process.transition)
            (found,) = torch.autograd.grad(phi, table, retain_graph=True)
            self.gradients[name] = found.flatten()
        policy, transition = setting.follower.policy, process.transition.detach()
        worth = TRUTH + ABOVE * transition @ value(policy, transition)
        self.advantage = policy * (worth - (policy * worth).sum(-1, keepdim=True))
        moves = torch.einsum("sa,sat->st", policy, transition)
        self.visits = (1 - ABOVE) * torch.linalg.solve(
            torch.eye(STATES, dtype=torch.float64) - ABOVE * moves.T, START
        )

    def estimate(self, score: Score, *, held: int = 0, count: int = 10_000) -> Tensor:
        setting = self.setting
        learner = AdditiveUpdate(setting.reward, optimiser=still, score=score, average=0.0)
        states = torch.multinomial(
            self.visits, count, replacement=True, generator=setting.simulator.generator
        )
        found = learner.step(
            states,
            self.advantage[states],
            setting.follower,
            temperature=setting.temperature,
            held=setting.held(held) if held else None,
        )
        assert setting.weight.grad is not None
        gradient = setting.weight.grad.flatten().clone()
        assert found.gradient_norm == pytest.approx(float(gradient.norm()))
        assert found.kept == 1.0
        return gradient


@pytest.mark.parametrize("which", ["whole", "at fixed"])
def test_the_gradient_is_the_planners(which: str) -> None:
    above = Above()
    fixed, whole = above.gradients["at fixed"], above.gradients["whole"]
    apart = float((whole - fixed).norm() / whole.norm())
    assert apart > 0.1
    report = measure_estimator(
        lambda: above.estimate(
            above.setting.full_horizon(), held=10_000 if which == "whole" else 0
        ),
        above.gradients[which],
        repetitions=10,
    )
    assert report.noise < apart / 6, report
    assert report.relative_error < 4 * report.noise + 0.005, report


def test_a_critic_has_the_noise_of_the_states_alone() -> None:
    above = Above()
    policy, size = above.setting.follower.policy, STATES * ACTIONS
    transition = mdp(torch.zeros(STATES, ACTIONS, dtype=torch.float64)).transition
    own = torch.eye(size, dtype=torch.float64).view(STATES, ACTIONS, size)
    moves = torch.einsum("sat,tb->satb", transition, policy).reshape(size, size)
    visits = torch.linalg.solve(
        torch.eye(size, dtype=torch.float64) - DISCOUNT * moves, own.view(size, size)
    ).view(STATES, ACTIONS, size)
    critic = Critic(lambda where: visits[where], above.setting.weight.flatten)
    report = measure_estimator(
        lambda: above.estimate(critic, count=100_000),
        above.gradients["at fixed"],
        repetitions=4,
    )
    assert report.relative_error < 0.01, report


def test_it_descends() -> None:
    above = Above()
    setting = above.setting

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    def phi() -> float:
        table = setting.weight.detach().reshape(STATES, ACTIONS)
        policy = birl_ext.solve(mdp(table), temperature=setting.temperature).policy
        return -(1 - ABOVE) * float(START @ value(policy, mdp(table).transition))

    learner = AdditiveUpdate(setting.reward, optimiser=sgd, score=setting.full_horizon())
    before = phi()
    states = torch.multinomial(
        above.visits, 10_000, replacement=True, generator=setting.simulator.generator
    )
    for _ in range(4):
        learner.step(
            states, above.advantage[states], setting.follower, temperature=setting.temperature
        )
    predicted = float(above.gradients["at fixed"].square().sum())
    assert phi() < before - 0.5 * predicted


def test_what_cannot_be_learned_from_is_named() -> None:
    above = Above()
    setting = above.setting
    learner = AdditiveUpdate(setting.reward, optimiser=still, score=OneStep(ACTIONS))
    states = torch.arange(STATES)
    tau = setting.temperature
    before = setting.weight.detach().clone()
    for advantage in (above.advantage[:2], above.advantage[0], above.advantage[:0]):
        with pytest.raises(ShapeError, match=r"allowed: \(m, A\), with m = 3 states"):
            learner.step(states, advantage, setting.follower, temperature=tau)
    broken = above.advantage.clone()
    broken[1, 1] = torch.nan
    with pytest.raises(NonFiniteInputError, match="advantage is not finite"):
        learner.step(states, broken, setting.follower, temperature=tau)
    critic = Critic(lambda where: torch.zeros(len(where), ACTIONS, 9), setting.weight.flatten)
    learner.score = critic
    with pytest.raises(OptionError, match="asked for by `held`"):
        learner.step(
            states, above.advantage, setting.follower, temperature=tau, held=setting.held(5)
        )
    setting.weight.requires_grad_(False)
    with pytest.raises(GradientError, match="the score does not depend on any"):
        learner.step(states, above.advantage, setting.follower, temperature=tau)
    assert torch.equal(setting.weight.detach(), before)
