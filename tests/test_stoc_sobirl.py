"""Stoc-SoBiRL: its estimate, its bookkeeping, its descent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from closeness import assert_same_state
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import exact_pair_objective, measure_estimator
from birl_ext.bilevel.stoc_sobirl import Effort, SampledProblem, StocSoBiRLDescent
from birl_ext.errors import (
    DiscountError,
    NonStochasticError,
    OptionError,
    ShapeError,
    TemperatureError,
)
from birl_ext.problems.random_mdp import RandomMDPConfig
from birl_ext.problems.sampled_random_mdp import sampled_random_mdp
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

SMALL = RandomMDPConfig(states=4, actions=3, dimension=5, discount=0.6)


def make(effort: Effort, config: RandomMDPConfig = SMALL, rate: float = 0.05) -> StocSoBiRLDescent:
    problem, simulator, _, start = sampled_random_mdp(config, seed=1)
    return StocSoBiRLDescent(
        problem,
        simulator,
        start / 4,
        discount=config.discount,
        temperature=config.temperature,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        effort=effort,
    )


def exact_gradient(config: RandomMDPConfig, x: Tensor) -> Tensor:
    _, _, exact, _ = sampled_random_mdp(config)
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(exact.objective(x, config.temperature), x)[0]


def test_the_sampled_objective_is_the_exact_one() -> None:
    problem, simulator, exact, start = sampled_random_mdp(SMALL, seed=3)
    x = start / 4
    objective, solution = exact.evaluate(x, SMALL.temperature)
    follower = FiniteFollower(solution.policy)
    paths = [simulator.rollout(follower, 200_000, 1) for _ in range(2)]
    assert problem.loss is not None
    loss = problem.loss(x, paths)
    error = float(loss.std() / len(loss) ** 0.5)
    assert abs(float(loss.mean() - objective)) < 4 * error
    assert error < 0.02 * float(objective)


def test_the_estimate_agrees_with_the_exact_hypergradient() -> None:
    algorithm = make(Effort(batch=20_000, horizon=20, sweeps=400))
    exact = exact_gradient(SMALL, algorithm.x)
    report = measure_estimator(lambda: algorithm.hypergradient()[1], exact, repetitions=20)
    assert report.noise < 0.03, report
    assert report.relative_error < 4 * report.noise + 0.01, report


@pytest.mark.parametrize("shaped", ["mask", "reference"])
def test_mask_and_reference_are_those_of_the_process(shaped: str) -> None:
    """Worth below zero, so that what a masked action's empty row says, the end, would be best."""
    draws = torch.Generator().manual_seed(5)
    base = torch.randn(4, 3, generator=draws, dtype=torch.float64) - 5
    transition = torch.rand(4, 3, 4, generator=draws, dtype=torch.float64).softmax(-1)
    given: dict[str, Any] = {}
    if shaped == "mask":
        given["mask"] = torch.tensor([[True, True, False]] * 3 + [[True, False, False]])
        base[~given["mask"]] = torch.nan
    else:
        given["reference"] = torch.tensor([[0.8, 0.15, 0.05]] * 4, dtype=torch.float64)
    mdp = birl_ext.DenseMDP(base, transition, 0.6, **given)
    x = 0.3 * torch.randn(12, generator=draws, dtype=torch.float64)

    def loss(x: Tensor, paths: Sequence[Paths]) -> Tensor:
        return (paths[0].action[:, 0] == 1).double() + 0 * x[0]

    algorithm = StocSoBiRLDescent(
        SampledProblem(lambda x: base + x.view(4, 3), loss, paths=1),
        FiniteSimulator(mdp, torch.Generator().manual_seed(0)),
        x,
        discount=0.6,
        temperature=0.5,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        effort=Effort(batch=20_000, horizon=20, sweeps=2000),
    )
    exact = algorithm.x.detach().clone().requires_grad_()
    shifted = mdp.replace(reward=base + exact.view(4, 3))
    solution = birl_ext.solve(shifted, temperature=0.5)
    (gradient,) = torch.autograd.grad(solution.policy[:, 1].mean(), exact)
    report = measure_estimator(lambda: algorithm.hypergradient()[1], gradient, repetitions=10)
    assert report.noise < 0.05, report
    assert report.relative_error < 4 * report.noise + 0.01, report
    gap = (algorithm.q - solution.q.detach())[solution.policy > 0]
    assert float(gap.abs().max()) < 0.02 * float(solution.q.detach().abs().max())


class Moved(NamedTuple):
    """A process and rewards that x moves, in full and as samples."""

    exact: Callable[[Tensor], Tensor]
    sampled: SampledProblem
    simulator: FiniteSimulator
    x: Tensor


def moved() -> Moved:
    draws = torch.Generator().manual_seed(8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    base, slope, wish = 3 * normal(3, 2), 0.2 * normal(3, 2, 4), normal(3, 2)
    logits, lean = normal(3, 2, 3), normal(3, 2, 3, 4)

    def reward(x: Tensor) -> Tensor:
        return base + slope @ x

    def transition(x: Tensor) -> Tensor:
        return (logits + lean @ x).softmax(-1)

    def loss(x: Tensor, *steps: Tensor) -> Tensor:
        """Of states and actions of the first path, then of the second."""
        one, other = wish[steps[:2]].sum(-1), wish[steps[2:]].sum(-1)
        return one * other + x.square().sum() * one

    def mdp(x: Tensor) -> birl_ext.DenseMDP:
        return birl_ext.DenseMDP(reward(x), transition(x), 0.6)

    def exact(x: Tensor) -> Tensor:
        def of_pair(*steps: Tensor) -> Tensor:
            return loss(x, *steps)

        return exact_pair_objective(mdp(x), of_pair, temperature=0.5, steps=2)

    x = 0.5 * normal(4)
    sampled = SampledProblem(
        reward,
        lambda x, paths: loss(x, *(part for path in paths for part in path[:2])),
        steps=2,
        transition=transition,
    )
    # at another x, so that a process that stays behind shows
    simulator = FiniteSimulator(mdp(x + 1), torch.Generator().manual_seed(0))
    return Moved(exact, sampled, simulator, x)


def test_a_process_that_x_moves_is_part_of_the_hypergradient() -> None:
    problem = moved()
    algorithm = StocSoBiRLDescent(
        problem.sampled,
        problem.simulator,
        problem.x,
        discount=0.6,
        temperature=0.5,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        effort=Effort(batch=20_000, horizon=12, sweeps=1000),
    )
    x = problem.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.exact(x), x)
    report = measure_estimator(lambda: algorithm.hypergradient()[1], gradient, repetitions=15)
    assert report.noise < 0.03, report
    assert report.relative_error < 4 * report.noise + 0.01, report
    algorithm.effort = Effort(batch=2000, horizon=12, sweeps=100)
    for _ in range(40):
        algorithm.step()
    with torch.no_grad():
        assert problem.exact(algorithm.x) < problem.exact(problem.x) - 0.1


def test_a_simulator_is_moved_and_goes_on_with_its_draws() -> None:
    problem = moved()
    simulator = problem.simulator
    follower = FiniteFollower(torch.full((3, 2), 0.5))
    simulator.rollout(follower, 5, 3)
    before, drawn = simulator.state_dict(), simulator.samples
    sure = torch.eye(3, dtype=torch.float64)[torch.tensor([[1, 1], [2, 2], [0, 0]])]
    simulator.adapt(sure)
    path = simulator.rollout(follower, 5, 3)
    assert torch.equal(path.observation[:, 1:], (path.observation[:, :-1] + 1) % 3)
    assert simulator.samples == drawn + 10
    assert not torch.equal(before["generator"], simulator.state_dict()["generator"])
    with pytest.raises(NonStochasticError):
        simulator.adapt(sure / 2)


def test_the_lower_level_learns_the_soft_q() -> None:
    algorithm = make(Effort(batch=1, horizon=1, sweeps=20_000))
    algorithm.hypergradient()
    _, _, exact, _ = sampled_random_mdp(SMALL)
    solution = birl_ext.solve(exact.lower(algorithm.x.detach()), temperature=SMALL.temperature)
    scale = solution.q.abs().max()
    assert float((algorithm.q - solution.q).abs().max() / scale) < 0.02


def test_every_transition_is_counted() -> None:
    effort = Effort(batch=7, horizon=5, sweeps=3)
    algorithm = make(effort)
    outcome = algorithm.step()
    # two paths of one step draw no successor; two continuations of K steps from each draw K − 1
    drawn = 3 * 4 * 3 + 2 * 7 * 2 * (5 - 1)
    assert outcome.samples == algorithm.simulator.samples == drawn


def test_descent_comes_within_the_accuracy_of_its_effort() -> None:
    for epsilon in (0.1, 0.01):
        algorithm = make(Effort.for_accuracy(epsilon, SMALL.discount))
        for _ in range(150):
            algorithm.step()
        assert float(exact_gradient(SMALL, algorithm.x).square().sum()) < epsilon


def test_a_run_goes_on_to_the_same_bits() -> None:
    effort = Effort(batch=20, horizon=4, sweeps=5)
    one, other = make(effort), make(effort)
    for _ in range(3):
        one.step()
        other.step()
    kept = one.state_dict()
    for _ in range(3):
        one.step()
    again = make(effort)
    again.load_state_dict(kept)
    for _ in range(3):
        again.step()
        other.step()
    assert torch.equal(one.x, again.x)
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.q, again.q)
    assert kept["steps"] == 3


def test_paths_end_where_the_process_ends() -> None:
    transition = torch.zeros(3, 1, 3, dtype=torch.float64)
    transition[0, 0, 1] = transition[1, 0, 2] = 1.0
    mdp = birl_ext.DenseMDP(
        torch.zeros(3, 1, dtype=torch.float64),
        transition,
        0.9,
        terminal=torch.tensor([False, False, True]),
        initial_distribution=torch.tensor([1.0, 0, 0], dtype=torch.float64),
    )
    simulator = FiniteSimulator(mdp, torch.Generator().manual_seed(0))
    path = simulator.rollout(FiniteFollower(torch.ones(3, 1)), 2, 5)
    assert path.observation[0, :3].tolist() == [0, 1, 2]
    assert path.present.tolist() == 2 * [[True, True, True, False, False]]
    ahead, goes_on = simulator.successors()
    assert goes_on.flatten().tolist() == [True, True, False]
    assert ahead[:2].flatten().tolist() == [1, 2]


def test_impossible_actions_and_states_are_never_drawn() -> None:
    policy = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64)
    follower, generator = FiniteFollower(policy), torch.Generator().manual_seed(0)
    where = torch.arange(2).repeat(5000)
    drawn = follower.sample(where, generator)
    assert (policy[where, drawn] > 0).all()
    share = (drawn[where == 1] == 2).double().mean()
    assert abs(float(share) - 0.5) < 4 * 0.5 / 5000**0.5


def test_errors_are_named() -> None:
    with pytest.raises(OptionError, match="batch is 0"):
        Effort(batch=0, horizon=1, sweeps=1)
    with pytest.raises(OptionError, match="epsilon is 2"):
        Effort.for_accuracy(2, 0.5)
    with pytest.raises(DiscountError, match="discount is 1"):
        Effort.for_accuracy(0.1, 1)
    batched = birl_ext.DenseMDP(torch.zeros(2, 1, 1), torch.ones(2, 1, 1, 1), 0.5)
    with pytest.raises(ShapeError, match="batch axes"):
        FiniteSimulator(batched, torch.Generator())
    problem, simulator, _, start = sampled_random_mdp(SMALL)
    with pytest.raises(TemperatureError):
        StocSoBiRLDescent(
            problem,
            simulator,
            start,
            discount=0.5,
            temperature=0.0,
            optimiser=torch.optim.SGD,
            effort=Effort(1, 1, 1),
        )


def test_a_loss_may_use_any_number_of_paths() -> None:
    def loss(x: Tensor, paths: Sequence[Paths]) -> Tensor:
        return sum((path.observation[:, -1] == 0).double() for path in paths) * x.sum()

    _, simulator, exact, _ = sampled_random_mdp(SMALL)
    algorithm = StocSoBiRLDescent(
        SampledProblem(lambda x: exact.lower(x).reward, loss, paths=3, steps=4),
        simulator,
        torch.ones(5, dtype=torch.float64),
        discount=0.6,
        temperature=1.0,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        effort=Effort(10, 3, 3),
    )
    assert algorithm.step().gradient_norm > 0


def additive(
    credit: Any = "critic", *, moves: bool = False, **options: Any
) -> tuple[StocSoBiRLDescent, Tensor]:
    """An upper level that sums its own costs over the steps of one path, which x enters too, and
    its exact gradient over them.
    """
    draws = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    features, own, lean = normal(4, 3, 5), normal(4, 3), 0.3 * normal(4, 3, 4, 5)
    logits, start, x = 1.5 * normal(4, 3, 4), normal(4).softmax(-1), normal(5)
    ends = torch.tensor([False, False, True, False])
    steps, above = 12, 0.7

    def transition(x: Tensor) -> Tensor:
        rows = (logits + (lean @ x if moves else 0.0)).softmax(-1)
        return torch.where(ends[:, None, None], 0.0, rows)

    def cost(x: Tensor) -> Tensor:
        return own + 0.1 * (features @ x).square()

    def mdp(x: Tensor) -> birl_ext.DenseMDP:
        return birl_ext.DenseMDP(
            features @ x, transition(x), 0.6, terminal=ends, initial_distribution=start
        )

    at = x.clone().requires_grad_()
    policy = birl_ext.solve(mdp(at), temperature=0.5).policy
    objective, where = torch.zeros((), dtype=torch.float64), start
    for step in range(steps):
        objective = objective + above**step * torch.einsum("s,sa,sa->", where, policy, cost(at))
        where = torch.einsum("s,sa,sat->t", where, policy, transition(at))
    (exact,) = torch.autograd.grad(objective, at)
    algorithm = StocSoBiRLDescent(
        SampledProblem(
            lambda x: features @ x,
            cost=cost,
            steps=steps,
            discount=above,
            transition=transition if moves else None,
        ),
        FiniteSimulator(mdp(x + 1 if moves else x), torch.Generator().manual_seed(0)),
        x,
        discount=0.6,
        temperature=0.5,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.02),
        effort=Effort(**{"batch": 2000, "horizon": 20, "sweeps": 2000, **options}),
        credit=credit,
    )
    return algorithm, exact


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("credit", ["critic", "to go"])
def test_a_sum_over_steps_has_the_exact_hypergradient(credit: str, moves: bool) -> None:
    algorithm, exact = additive(credit, moves=moves)
    report = measure_estimator(lambda: algorithm.hypergradient()[1], exact, repetitions=12)
    assert report.noise < 0.04, report
    assert report.relative_error < 4 * report.noise + 0.02, report


def test_a_critic_of_the_upper_level_learns_what_the_policy_costs() -> None:
    algorithm, _ = additive(batch=1, horizon=1, sweeps=20_000)
    algorithm.hypergradient()
    simulator, policy = algorithm.simulator, algorithm._preference().softmax(-1)
    cost = algorithm.problem.cost
    assert cost is not None
    mdp = simulator._mdp
    table, ends = cost(algorithm.x.detach()), mdp.terminal
    value = birl_ext.evaluate(policy, table, mdp.transition, discount=0.7, terminal=ends)
    wanted = table + 0.7 * torch.einsum("sat,t->sa", mdp.transition, value)
    torch.testing.assert_close(algorithm.upper_q, wanted, rtol=0, atol=0.03)


def test_a_critic_costs_less_noise_than_what_follows() -> None:
    noise = {}
    for credit in ("critic", "to go"):
        algorithm, exact = additive(credit, batch=200)
        estimates = (algorithm.hypergradient()[1] for _ in range(30))
        noise[credit] = measure_estimator(estimates.__next__, exact, repetitions=30).variance
    assert noise["critic"] < noise["to go"] / 2


def test_a_sum_over_steps_goes_on_from_its_state() -> None:
    ours, theirs = (additive(batch=20, horizon=5, sweeps=20)[0] for _ in range(2))
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    assert ours.step() == theirs.step()
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_what_a_sum_over_steps_needs_is_named() -> None:
    def table(x: Tensor) -> Tensor:
        return x

    with pytest.raises(OptionError, match="neither loss and cost"):
        SampledProblem(table)
    with pytest.raises(OptionError, match="both loss and cost"):
        SampledProblem(table, lambda x, paths: x, cost=table)
    with pytest.raises(OptionError, match=r"discount is 1.5 \(allowed: \[0, 1\]"):
        SampledProblem(table, cost=table, discount=1.5)
    with pytest.raises(OptionError, match=r"credit is 'actor'"):
        additive("actor")
    algorithm, _ = additive(batch=2, horizon=2, sweeps=2)
    endless = dataclasses.replace(algorithm.problem, discount=1.0)
    with pytest.raises(OptionError, match=r'discount of the costs is 1.0.*credit="to go"'):
        StocSoBiRLDescent(
            endless,
            algorithm.simulator,
            algorithm.x,
            discount=0.6,
            temperature=0.5,
            optimiser=torch.optim.Adam,
            effort=algorithm.effort,
        )
    algorithm.problem = dataclasses.replace(algorithm.problem, cost=lambda x: x)
    with pytest.raises(ShapeError, match=r"cost has shape \(5,\) \(allowed: \(S, A\) = \(4, 3\)"):
        algorithm.step()
