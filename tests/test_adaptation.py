"""(M17) against the exact hyper-gradient: what x does to the transitions is in the estimate."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from cases import untyped
from torch import Tensor

import birl_ext
from birl_ext.bilevel.adaptation import AdaptedReward, path_log_probability
from birl_ext.bilevel.bias_meter import exact_pair_objective, measure_estimator
from birl_ext.bilevel.score import FullHorizon
from birl_ext.bilevel.trajectory import trajectory_surrogate
from birl_ext.errors import DiscountError, OptionError, ShapeError
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

STATES, ACTIONS, STEPS, DISCOUNT, TEMPERATURE, VARIABLES = 3, 2, 2, 0.7, 0.5, 4
HORIZON = 14  # of the continuations: γᴷ is 0.007


class Problem(NamedTuple):
    """Reward and transition that x moves, a loss of two paths, and what is true of them."""

    features: Tensor  # (S, A, F)
    tilt: Tensor  # (S, A, S, F)
    gain: Tensor  # (S, A), what the upper level sees in a step

    def mdp(self, x: Tensor, terminal: Tensor | None = None) -> birl_ext.DenseMDP:
        return birl_ext.DenseMDP(
            self.features @ x,
            (self.tilt @ x).softmax(-1),
            DISCOUNT,
            terminal=terminal,
            initial_distribution=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        )

    def loss(self, x: Tensor, first: Any, second: Any) -> Tensor:
        later = torch.tensor([0.5, 2.0], dtype=torch.float64)
        one, other = self.gain[first] @ later, self.gain[second] @ later
        return one + one * other + x.square().sum() * other

    def objective(self, x: Tensor) -> Tensor:
        return exact_pair_objective(
            self.mdp(x),
            lambda s1, a1, s2, a2: self.loss(x, (s1, a1), (s2, a2)),
            temperature=TEMPERATURE,
            steps=STEPS,
        )


class Setting(NamedTuple):
    """A point x, and the lower level there, ready to be sampled."""

    problem: Problem
    x: Tensor
    solution: birl_ext.Solution
    follower: FiniteFollower
    simulator: FiniteSimulator

    def transition(self, here: Tensor, chosen: Tensor, there: Tensor) -> Tensor:
        return (self.problem.tilt @ self.x).log_softmax(-1)[here, chosen, there]

    def adapted(self, value: Tensor | None = None, **options: Any) -> AdaptedReward:
        table = self.solution.value if value is None else value
        return AdaptedReward(
            lambda s, a: (self.problem.features @ self.x)[s, a],
            self.transition,
            self.simulator,
            self.follower,
            value=lambda s: table[s],
            **{"discount": DISCOUNT, **options},
        )


def make_problem() -> Problem:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # a state where the policy is all but uniform: its entropy differs from that of the others, so
    # that a value without the entropy is another one
    weight = torch.tensor([0.1, 1.0, 1.0], dtype=torch.float64)[:, None, None]
    return Problem(
        weight * normal(STATES, ACTIONS, VARIABLES),
        normal(STATES, ACTIONS, STATES, VARIABLES),
        normal(STATES, ACTIONS) + torch.tensor([[0.5], [0.0], [-0.5]], dtype=torch.float64),
    )


def make_setting(terminal: Tensor | None = None) -> Setting:
    problem = make_problem()
    x = torch.tensor([0.6, -0.4, 0.9, 0.3], dtype=torch.float64, requires_grad=True)
    mdp = problem.mdp(x.detach(), terminal)
    solution = birl_ext.solve(mdp, temperature=TEMPERATURE)
    simulator = FiniteSimulator(mdp, torch.Generator().manual_seed(0))
    return Setting(problem, x, solution, FiniteFollower(solution.policy), simulator)


def exact_gradient(setting: Setting) -> Tensor:
    (gradient,) = torch.autograd.grad(setting.problem.objective(setting.x), setting.x)
    return gradient


def estimate(
    setting: Setting,
    count: int,
    *,
    reward: AdaptedReward | None = None,
    path: bool = True,
    **options: Any,
) -> Tensor:
    """∇φ̂ from `count` pairs of paths."""
    reward = reward or setting.adapted()
    pair = [setting.simulator.rollout(setting.follower, count, STEPS) for _ in range(2)]
    score = FullHorizon(setting.simulator, discount=DISCOUNT, steps=HORIZON)
    first, second = ((p.observation, p.action) for p in pair)
    scores = torch.stack([score(reward, setting.follower, *p) for p in pair]).sum(0)
    paths = torch.stack([path_log_probability(setting.transition, *p) for p in pair]).sum(0)
    surrogate = trajectory_surrogate(
        setting.problem.loss(setting.x, first, second),
        scores,
        temperature=TEMPERATURE,
        path=paths if path else None,
        **options,
    )
    (gradient,) = torch.autograd.grad(surrogate, setting.x)
    return gradient


def test_the_truth_is_its_finite_difference() -> None:
    setting = make_setting()
    x, h = setting.x.detach(), 1e-5
    steps = h * torch.eye(VARIABLES, dtype=torch.float64)
    slopes = [
        (setting.problem.objective(x + d) - setting.problem.objective(x - d)) / (2 * h)
        for d in steps
    ]
    torch.testing.assert_close(exact_gradient(setting), torch.stack(slopes), rtol=1e-7, atol=1e-8)


def formula(
    setting: Setting, value: Tensor, discount: float = DISCOUNT, *, path: bool = True
) -> Tensor:
    """(M17) summed over all paths: P held fixed in the lower level, its reward r + γ P_x V."""
    problem, x = setting.problem, setting.x
    moving, fixed = problem.mdp(x), problem.mdp(x.detach())
    replaced = moving.reward + discount * moving.transition @ value
    policy = birl_ext.solve(
        fixed.replace(reward=fixed.reward + replaced - replaced.detach()), temperature=TEMPERATURE
    ).policy
    every = torch.tensor(list(itertools.product(range(STATES), range(ACTIONS), repeat=STEPS)))
    where, chosen = every.view(-1, STEPS, 2).unbind(-1)
    log_probability = path_log_probability(
        setting.transition, where, chosen, torch.ones_like(where, dtype=torch.bool)
    )
    if not path:
        log_probability = log_probability.detach()
    share = log_probability.exp() * policy[where, chosen].prod(-1)
    assert fixed.initial_distribution is not None
    share = share * fixed.initial_distribution[where[:, 0]]
    total = torch.stack(
        [
            (p * share * problem.loss(x, (w.expand_as(where), c.expand_as(where)), (where, chosen)))
            for p, w, c in zip(share, where, chosen, strict=True)
        ]
    ).sum()
    return torch.autograd.grad(total, x)[0]


def test_the_formula_is_the_derivative() -> None:
    """With V the soft value. Q in its place, a value without entropy, or no γ, is another."""
    setting = make_setting()
    solution, policy = setting.solution, setting.follower.policy
    exact = exact_gradient(setting)
    torch.testing.assert_close(formula(setting, solution.value), exact, rtol=1e-11, atol=1e-12)
    without_entropy = birl_ext.evaluate(policy, setting.problem.mdp(setting.x.detach()))
    for wrong in (
        formula(setting, (policy * solution.q).sum(-1)),
        formula(setting, without_entropy),
        formula(setting, solution.value, 1.0),
    ):
        assert (wrong - exact).norm() > 5e-3 * exact.norm()


def test_what_leaving_out_a_term_costs() -> None:
    """The two numbers of docs/stochastic.md."""
    setting = make_setting()
    value, exact = setting.solution.value, exact_gradient(setting)
    without_path = formula(setting, value, path=False)
    without_foresight = formula(setting, torch.zeros_like(value))
    assert (without_path - exact).norm() / exact.norm() == pytest.approx(0.35, abs=0.005)
    assert (without_foresight - exact).norm() / exact.norm() == pytest.approx(0.23, abs=0.005)


@pytest.mark.parametrize("options", [{}, {"baseline": "none"}], ids=str)
def test_the_estimate_agrees_with_the_exact_gradient(options: dict[str, Any]) -> None:
    setting = make_setting()
    report = measure_estimator(
        lambda: estimate(setting, 2000, **options), exact_gradient(setting), repetitions=25
    )
    assert report.noise < 0.045, report
    assert report.relative_error < 3 * report.noise, report
    assert report.cosine > 0.99, report


@pytest.mark.parametrize("missing", ["path", "transition in the reward"])
def test_whatever_is_left_out_is_noticed(missing: str) -> None:
    setting = make_setting()
    blind = setting.adapted(torch.zeros_like(setting.solution.value))
    options = {"path": False} if missing == "path" else {"reward": blind}
    report = measure_estimator(
        lambda: estimate(setting, 2000, **options), exact_gradient(setting), repetitions=25
    )
    assert report.relative_error > 4 * report.noise, report


def test_error_falls_with_the_root_of_the_samples() -> None:
    setting = make_setting()
    exact = exact_gradient(setting)
    counts, errors = [50, 200, 800], []
    for count in counts:
        squares = [(estimate(setting, count) - exact).square().sum() for _ in range(60)]
        errors.append(math.log(float(torch.stack(squares).mean().sqrt())))
    places = torch.tensor([math.log(count) for count in counts])
    heights, centred = torch.tensor(errors), places - places.mean()
    slope = float((centred * heights).sum() / centred.square().sum())
    assert abs(slope + 0.5) < 0.08, (slope, errors)


def test_the_reward_carries_what_m14_puts_in_its_place() -> None:
    """∇r + γ Σ_t ∇P V at every (s, a); ∇r alone where the process ends."""
    terminal = torch.tensor([False, False, True])
    setting = make_setting(terminal)
    problem, x = setting.problem, setting.x

    def replaced(x: Tensor) -> Tensor:
        mdp = problem.mdp(x, terminal)
        return mdp.reward + DISCOUNT * mdp.transition @ setting.solution.value

    exact = torch.autograd.functional.jacobian(replaced, x.detach()).flatten(0, 1)
    found, error = torch.empty_like(exact), torch.empty_like(exact)
    for pair in range(STATES * ACTIONS):
        where = torch.full((300,), pair // ACTIONS)
        chosen = torch.full((300,), pair % ACTIONS)
        many = [
            torch.autograd.grad(setting.adapted()(where, chosen).mean(), x)[0] for _ in range(40)
        ]
        found[pair] = torch.stack(many).mean(0)
        error[pair] = torch.stack(many).std(0) / math.sqrt(len(many))
    assert ((found - exact).abs() <= 4 * error + 1e-12).all()
    assert (error[-ACTIONS:] < 1e-12).all()  # nothing is drawn there
    assert (error[:-ACTIONS].norm(dim=-1) < 0.1 * exact[:-ACTIONS].norm(dim=-1)).all()


def test_a_process_that_ends() -> None:
    """Paths of one step, so that all of the gradient comes through what the policy foresees."""
    terminal = torch.tensor([False, False, True])
    setting = make_setting(terminal)
    problem, x, simulator = setting.problem, setting.x, setting.simulator

    def objective(x: Tensor) -> Tensor:
        mdp = problem.mdp(x, terminal)
        policy = birl_ext.solve(mdp, temperature=TEMPERATURE).policy
        assert mdp.initial_distribution is not None
        return mdp.initial_distribution @ (policy * problem.gain).sum(-1)

    (exact,) = torch.autograd.grad(objective(x), x)
    score = FullHorizon(simulator, discount=DISCOUNT, steps=HORIZON)

    def one() -> Tensor:
        seen = simulator.rollout(setting.follower, 4000, 1)
        surrogate = trajectory_surrogate(
            problem.gain[seen.observation, seen.action].sum(-1),
            score(setting.adapted(), setting.follower, *seen),
            temperature=TEMPERATURE,
            path=path_log_probability(setting.transition, *seen),
        )
        return torch.autograd.grad(surrogate, x)[0]

    report = measure_estimator(one, exact, repetitions=30)
    assert report.noise < 0.05, report
    assert report.relative_error < 3 * report.noise, report


def test_the_probability_of_a_path_is_that_of_its_steps() -> None:
    """By hand, step by step; a path that ends has fewer."""
    setting = make_setting()
    path = setting.simulator.rollout(setting.follower, 50, 6)
    length = torch.arange(50) % 7
    present = torch.arange(6) < length.unsqueeze(-1)
    table = setting.problem.mdp(setting.x.detach()).transition
    expected = []
    for states, actions, steps in zip(*path[:2], length.tolist(), strict=True):
        product = 1.0
        for h in range(steps - 1):
            product *= float(table[states[h], actions[h], states[h + 1]])
        expected.append(math.log(product))
    found = path_log_probability(setting.transition, *Paths(*path[:2], present))
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64))


def test_a_successor_that_is_not_there_adds_nothing() -> None:
    """Whatever a simulator shows after the end, as a reset environment does."""
    setting = make_setting()

    class Ending:
        @staticmethod
        def continuations(_: Any, here: Tensor, chosen: Tensor, steps: int) -> Paths:
            ended = torch.tensor([[True, False], [True, True]])
            return Paths(torch.stack([here, 1 - here], -1), chosen.expand(steps, -1).T, ended)

    adapted = setting.adapted()
    adapted.simulator = untyped(Ending())
    where, chosen = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    found, paid = adapted(where, chosen), (setting.problem.features @ setting.x)[0, 1]
    assert found[0] == paid
    assert found[1] != paid


def test_what_cannot_be_meant_is_refused() -> None:
    setting = make_setting()
    with pytest.raises(DiscountError, match="discount is 1"):
        setting.adapted(discount=1.0)
    with pytest.raises(OptionError, match="samples is 0"):
        setting.adapted(samples=0)
    with pytest.raises(ShapeError, match=r"path has shape \(3,\)"):
        trajectory_surrogate(torch.zeros(2), torch.zeros(2), temperature=1.0, path=torch.zeros(3))
