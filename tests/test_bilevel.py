"""M-SoBiRL against its published formulas, its certificate against the truth, Newton on data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close, assert_same_bits
from torch import Tensor

import birl_ext
from birl_ext.bilevel import (
    BilevelProblem,
    DampedNewton,
    HypergradientReport,
    MSoBiRL,
    geometric,
    hypergradient_report,
)
from birl_ext.bilevel.hypergradient import exact_flow, linearise
from birl_ext.model.mdp import DenseMDP
from birl_ext.problems.bus import bus_problem, load_bus_data
from birl_ext.solution import Solution

S, A, D = 4, 3, 5
WHERE = ("reward", "transition")
MODES = ("published", "exact")


class Small:
    """A random bilevel problem: f = ½‖x‖² + Σ c π + ½‖π‖², x in the rewards or the transitions."""

    def __init__(
        self, seed: int, where: str = "reward", discount: float = 0.8, sparse: bool = False
    ) -> None:
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.where, self.discount, self.sparse = where, discount, sparse
        self.base, self.slope = normal(S, A), normal(S, A, D)
        self.logits, self.tilt = normal(S, A, S), normal(S, A, S, D)
        self.cost = normal(S, A)
        self.start = normal(D)
        self.problem = BilevelProblem(self.lower, self.upper)

    def reward(self, x: Tensor) -> Tensor:
        """(*M, S, A)."""
        if self.where == "transition":
            return self.base
        return self.base + torch.einsum("sad,...d->...sa", self.slope, torch.sin(x))

    def transition(self, x: Tensor) -> Tensor:
        """(*M, S, A, S)."""
        if self.where == "reward":
            return self.logits.softmax(-1)
        return (self.logits + 0.3 * torch.einsum("satd,...d->...sat", self.tilt, x)).softmax(-1)

    def lower(self, x: Tensor) -> Any:
        mdp = DenseMDP(self.reward(x), self.transition(x), self.discount)
        return mdp.to_sparse() if self.sparse else mdp

    def upper(self, x: Tensor, solution: Solution) -> Tensor:
        policy = solution.policy
        shaped = (self.cost * policy + policy.square() / 2).sum((-1, -2))
        return shaped + x.square().sum(-1) / 2

    def algorithm(self, mode: str, x: Tensor | None = None, **options: Any) -> MSoBiRL:
        settings: dict[str, Any] = {"temperature": 0.5, "optimiser": sgd, "mode": mode}
        settings |= {"accuracy": math.inf, **options}
        return MSoBiRL(self.problem, self.start if x is None else x, **settings)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def resting(parameters: Any) -> torch.optim.Optimizer:
    """Leaves x where it is: the warm starts come nearer to its solution with every step."""
    return torch.optim.SGD(parameters, lr=0.0)


def exact_gradient(problem: BilevelProblem, x: Tensor, temperature: float = 0.5) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(problem.objective(x, temperature).sum(), x)[0]


def differences(function: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-5) -> Tensor:
    steps = h * torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(function(x + d) - function(x - d)) / (2 * h) for d in steps])


# The exact hyper-gradient


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("where", WHERE)
def test_the_exact_hypergradient_equals_differences(where: str, sparse: bool) -> None:
    small = Small(1, where, sparse=sparse)
    got = exact_gradient(small.problem, small.start)
    want = differences(lambda x: small.problem.objective(x, 0.5), small.start)
    assert_close(got, want, bound=1e-8 * float(want.norm()), label=where)
    report = hypergradient_report(small.problem, small.start, 0.5, smoothness=1.0)
    assert_close(report.exact, want, bound=1e-8 * float(want.norm()), label="report")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("where", WHERE)
def test_the_hypergradient_is_the_published_formula(where: str, seed: int) -> None:
    """(M14) by loops: ∇φ = ∇f + (1/τ)[Σ G ∇r̃ − Φᵀw], (I − γP_π)ᵀw = UᵀG, ∇r̃ = ∇r + γΣ∇P V."""
    small, tau = Small(seed, where), 0.5
    x = small.start
    phi, solution = small.problem.evaluate(x, tau)
    assert phi.dim() == 0
    policy, value = solution.policy.numpy(), solution.value.numpy()
    rows = small.transition(x).numpy()
    on_reward = torch.autograd.functional.jacobian(small.reward, x).numpy()  # (S, A, D)
    on_rows = torch.autograd.functional.jacobian(small.transition, x).numpy()  # (S, A, S, D)
    on_policy = (small.cost + solution.policy).numpy()
    share = np.zeros(S)  # UᵀG
    matrix = np.eye(S)
    table = np.zeros((S, A, D))
    for s in range(S):
        for a in range(A):
            weight = policy[s, a] * on_policy[s, a]  # G
            share[s] += weight
            table[s, a] = on_reward[s, a]
            for t in range(S):
                share[t] -= small.discount * rows[s, a, t] * weight
                matrix[t, s] -= small.discount * policy[s, a] * rows[s, a, t]
                table[s, a] += small.discount * on_rows[s, a, t] * value[t]
    w = np.linalg.solve(matrix, share)
    want = x.numpy().copy()
    for s in range(S):
        for a in range(A):
            weight = policy[s, a] * on_policy[s, a]
            want += (weight - policy[s, a] * w[s]) * table[s, a] / tau
    got = exact_gradient(small.problem, x)
    assert_close(got, want, bound=1e-12 * np.abs(want).max(), label=f"{where} {seed}")


# The two modes


@pytest.mark.parametrize("seed", range(3))
def test_published_steps_follow_the_published_recursion(seed: int) -> None:
    """Sweeps, w ← w − ζ(AᵀAw − Aᵀb), and x ← x − β∇φ̂, all written out."""
    small, tau, gamma, zeta, beta = Small(seed), 0.5, 0.8, 0.4, 0.05
    algorithm = small.algorithm("published", sweeps=3, adjoint_rate=zeta, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(S, generator=generator, dtype=torch.float64).numpy()
    x, value = small.start.numpy().copy(), np.zeros(S)
    rows = small.transition(small.start).numpy()
    identity = np.eye(S)
    for step in range(6):
        point = torch.from_numpy(x)
        reward = small.reward(point).numpy()
        on_reward = torch.autograd.functional.jacobian(small.reward, point).numpy()
        for _ in range(3):
            q = reward + gamma * rows @ value
            top = q.max(1, keepdims=True)
            weight = np.exp((q - top) / tau)
            value = top[:, 0] + tau * np.log(weight.sum(1))
        policy = weight / weight.sum(1, keepdims=True)
        grad_policy = small.cost.numpy() + policy
        flow = policy * grad_policy  # G
        transposed = identity - gamma * np.einsum("sa,sat->ts", policy, rows)  # A
        b = flow.sum(1) - gamma * np.einsum("sa,sat->t", flow, rows)
        w = w - zeta * (transposed.T @ (transposed @ w) - transposed.T @ b)
        phi_x = np.einsum("sa,sad->sd", policy, on_reward)
        gradient = x + (np.einsum("sa,sad->d", flow, on_reward) - phi_x.T @ w) / tau
        outcome = algorithm.step()
        assert outcome.sweeps == 3
        assert outcome.products == 1
        norm = float(np.linalg.norm(gradient))
        assert float(outcome.gradient_norm) == pytest.approx(norm, rel=1e-10)
        objective = (small.cost.numpy() * policy + policy**2 / 2).sum() + (x**2).sum() / 2
        assert float(outcome.objective) == pytest.approx(objective, rel=1e-12)
        x = x - beta * gradient
        assert_close(algorithm.x.detach(), x, bound=1e-11, label=f"x after step {step + 1}")


def test_where_nothing_depends_on_the_policy_nothing_is_unsure() -> None:
    small = Small(3)
    small.problem = BilevelProblem(small.lower, lambda x, _: x.square().sum() / 2)
    algorithm = small.algorithm("published")
    algorithm._flow = torch.zeros(1, 1, S, dtype=torch.float64)  # the only one that is right
    for _ in range(2):
        outcome = algorithm.step()
        assert float(outcome.relative_error) == 0
        assert not outcome.missed


@pytest.mark.parametrize("where", WHERE)
def test_the_modes_meet_at_the_same_optimum(where: str) -> None:
    found = {}
    for mode in MODES:
        small = Small(3, where, discount=0.5)
        algorithm = small.algorithm(mode, sweeps=30)
        for _ in range(400):
            outcome = algorithm.step()
        found[mode] = algorithm.x.detach()
        assert float(outcome.gradient_norm) < 1e-6, mode
        assert exact_gradient(small.problem, found[mode]).norm() < 1e-5, mode
    assert_close(found["published"], found["exact"], bound=1e-5, label="published")


@pytest.mark.parametrize("where", WHERE)
def test_many_starts_are_the_same_starts_one_by_one(where: str) -> None:
    small = Small(4, where)
    starts = torch.stack([small.start, -small.start, 0.1 * small.start])
    together = small.algorithm("exact", starts, optimiser=adam)
    alone = [small.algorithm("exact", x, optimiser=adam) for x in starts]
    for _ in range(4):
        outcome = together.step()
        singles = [algorithm.step() for algorithm in alone]
        assert outcome.objective.shape == outcome.gradient_norm.shape == (3,)
        want = torch.stack([one.objective for one in singles])
        assert_close(outcome.objective, want, bound=1e-9, label="objective")
        norms = torch.stack([one.gradient_norm for one in singles])
        assert_close(outcome.gradient_norm, norms, bound=1e-8, label="gradient norm")
    want = torch.stack([one.x.detach() for one in alone])
    assert_close(together.x.detach(), want, bound=1e-8, label="x")


def test_many_published_starts_are_the_same_recursions() -> None:
    """From one state of the adjoint, which each start draws anew."""
    small = Small(4)
    starts = torch.stack([small.start, -small.start, 0.1 * small.start])
    together = small.algorithm("published", starts)
    together.step()
    state = together.state_dict()
    together.step()
    for i in range(3):
        alone = small.algorithm("published", starts[i])
        own = {"value": state["value"][i], "flow": state["flow"][:, i : i + 1]}
        single = alone.state_dict()
        alone.load_state_dict({**single, **own, "x": state["x"][i], "steps": state["steps"]})
        alone.step()
        assert_close(alone.x.detach(), together.x.detach()[i], bound=1e-13, label=f"start {i}")


# Runs


@pytest.mark.parametrize("optimiser", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("mode", MODES)
def test_a_restored_run_goes_on_to_the_same_bits(mode: str, optimiser: Any) -> None:
    small = Small(5, "transition")
    options: dict[str, Any] = {
        "optimiser": optimiser,
        "noise": 0.01,
        "seed": 7,
        "temperature": geometric(1.0, 0.1, 8),
    }
    one = small.algorithm(mode, **options)
    for _ in range(3):
        one.step()
    kept = one.state_dict()
    for _ in range(4):
        last = one.step()
    other = small.algorithm(mode, torch.zeros(D, dtype=torch.float64), **{**options, "seed": 1})
    other.load_state_dict(kept)
    for _ in range(4):
        again = other.step()
    assert_same_bits(other.x.detach(), one.x.detach(), label="x")
    assert again.temperature == last.temperature
    assert_same_bits(again.objective.reshape(1), last.objective.reshape(1), label="objective")
    assert again[3:5] == last[3:5]


def test_a_state_is_a_snapshot() -> None:
    """Steps taken after `state_dict` do not reach into it."""
    small = Small(5)
    algorithm = small.algorithm("published", optimiser=adam)
    algorithm.step()
    kept = algorithm.state_dict()
    before = kept["x"].clone(), kept["value"].clone(), kept["flow"].clone()
    moment = kept["optimiser"]["state"][0]["exp_avg"].clone()
    algorithm.step()
    for now, then in zip((kept["x"], kept["value"], kept["flow"]), before, strict=True):
        assert_same_bits(now, then, label="state")
    other = small.algorithm("published", optimiser=adam)
    other.load_state_dict(kept)
    other.step()
    assert_same_bits(other.x.detach(), algorithm.x.detach(), label="x")
    assert_same_bits(kept["optimiser"]["state"][0]["exp_avg"], moment, label="moment")


def test_the_temperature_follows_its_schedule() -> None:
    schedule = geometric(1.0, 0.01, 4)
    algorithm = Small(6).algorithm("exact", temperature=schedule)
    got = [algorithm.step().temperature for _ in range(6)]
    want = [10 ** (-step / 2) for step in range(4)] + [0.01, 0.01]
    assert got == pytest.approx(want, rel=1e-12)


def test_noise_is_seeded_and_as_strong_as_asked() -> None:
    small = Small(6)
    paths = {}
    for seed, noise in ((1, 0.3), (2, 0.3), (1, 0.0)):
        runs = []
        for _ in range(2):
            algorithm = small.algorithm("exact", noise=noise, seed=seed)
            algorithm.step()
            runs.append(algorithm.x.detach())
        assert_same_bits(runs[0], runs[1], label=f"seed {seed}")
        paths[seed, noise] = runs[0]
    assert not torch.equal(paths[1, 0.3], paths[2, 0.3])
    shock = (paths[1, 0.0] - paths[1, 0.3]) / 0.05  # the learning rate
    generator = torch.Generator().manual_seed(1)
    want = 0.3 * torch.randn(D, generator=generator, dtype=torch.float64)
    assert_close(shock, want, bound=1e-12, label="shock")


def test_lbfgs_asks_more_than_once_and_converges() -> None:
    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            parameters, max_iter=10, line_search_fn="strong_wolfe", tolerance_change=0
        )

    small = Small(7)
    algorithm = small.algorithm("exact", optimiser=lbfgs)
    norms = [float(algorithm.step().gradient_norm) for _ in range(6)]
    assert norms[-1] < 1e-6 < norms[0]
    assert exact_gradient(small.problem, algorithm.x.detach()).norm() < 1e-5


# The certificate


@pytest.mark.parametrize("where", WHERE)
def test_the_certificate_bounds_the_error_of_the_hypergradient(where: str) -> None:
    """A hundred random problems, few and many sweeps: never below the truth."""
    for seed in range(100):
        small = Small(seed, where, discount=(0.3, 0.6, 0.9)[seed % 3])
        algorithm = small.algorithm(
            "published",
            temperature=(0.03, 0.3, 1.0, 3.0)[seed // 3 % 4],
            sweeps=(1, 3, 20)[seed // 9 % 3],
            seed=seed,
        )
        for _ in range(seed % 4):
            algorithm.step()
        report = algorithm.hypergradient_report(smoothness=1.0)
        error = float((report.estimate - report.exact).norm())
        bound = float(report.bound)
        assert error <= bound < math.inf, f"problem {seed}: error {error:.6g}, bound {bound:.6g}"
        norm = float(report.exact.norm())
        assert float(report.relative_error) == pytest.approx(error / norm)
        assert -1 - 1e-12 <= float(report.cosine) <= 1 + 1e-12


@pytest.mark.parametrize("where", WHERE)
def test_every_outcome_bounds_its_own_error(where: str) -> None:
    """‖Δr̄‖₁/‖r̄‖₁ of an f linear in π, against the exact cotangent; never negative or NaN."""
    tight = []
    for seed in range(60):
        small = Small(seed, where, discount=(0.3, 0.9)[seed % 2])
        small.problem = BilevelProblem(
            small.lower,
            lambda _, solution, cost=small.cost: (cost * solution.policy).sum(),  # type: ignore[misc]
        )
        tau = (0.01, 0.3, 3.0)[seed // 2 % 3]
        algorithm = small.algorithm(
            "published", temperature=tau, sweeps=(1, 5, 400)[seed // 6 % 3], adjoint_rate=0.3
        )
        algorithm.optimiser.param_groups[0]["lr"] = 1e-3
        for _ in range(seed % 4):
            algorithm.step()
        kept = algorithm.state_dict()
        at, flow, _, relative = algorithm._estimate(tau)
        found = at.pull(flow)[1].reshape(S, A)
        algorithm.load_state_dict(kept)
        x = algorithm.x.detach().clone()
        assert float(algorithm.step().relative_error) == float(relative) > 0
        mdp = small.lower(x)
        reward = mdp.reward.clone().requires_grad_()
        policy = birl_ext.solve(mdp.replace(reward=reward), temperature=tau).policy
        (exact,) = torch.autograd.grad((small.cost * policy).sum(), reward)
        error = float((found - exact).abs().sum() / found.abs().sum())
        assert error <= float(relative), f"problem {seed}: {error:.6g}, bound {float(relative):.6g}"
        tight.append(error / float(relative))
    assert max(tight) > 0.05


def test_the_certificate_holds_where_a_policy_underflows() -> None:
    """V of one sweep makes π exactly 0 where π* is 1: no factor times 0 bounds that."""
    reward = torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    moves = torch.tensor([[1, 2], [1, 1], [2, 2]])
    base = DenseMDP(reward, torch.eye(3, dtype=torch.float64)[moves], 0.9)
    problem = BilevelProblem(
        lambda x: base.replace(reward=reward + x.reshape(3, 2)),
        lambda _, solution: solution.policy[0, 0],
    )
    start = torch.zeros(6, dtype=torch.float64)
    algorithm = MSoBiRL(problem, start, temperature=1e-3, optimiser=sgd, mode="published", sweeps=1)
    at, *_, relative = algorithm._estimate(1e-3)
    exact = problem.evaluate(start, 1e-3)[1].policy
    off = (at.policy[0, 0] - exact).abs()
    assert at.policy[0, 0, 0, 0] == 0
    assert exact[0, 0] == 1
    assert (off <= at.policy_shift()[0, 0]).all()
    assert 0 < float(relative) < math.inf


@pytest.mark.parametrize("where", WHERE)
def test_the_certificate_shrinks_with_the_error(where: str) -> None:
    small = Small(8, where, discount=0.5)
    algorithm = small.algorithm("published", sweeps=5, optimiser=resting)
    bounds = []
    for _ in range(5):
        bounds.append(float(algorithm.hypergradient_report(smoothness=1.0).bound))
        for _ in range(30):
            algorithm.step()
    assert bounds[0] > bounds[1] > bounds[2]
    assert bounds[-1] < 1e-5
    exact = hypergradient_report(small.problem, small.start, 0.5, smoothness=1.0)
    assert float(exact.bound) < 1e-8
    assert float(exact.relative_error) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_a_report_changes_nothing(mode: str) -> None:
    small = Small(9)
    watched, other = (small.algorithm(mode, noise=0.1, seed=3) for _ in range(2))
    for _ in range(3):
        watched.hypergradient_report()
        watched.step()
        other.step()
    assert_same_bits(watched.x.detach(), other.x.detach(), label="x")


@pytest.mark.parametrize("mode", MODES)
def test_a_report_is_of_the_next_step(mode: str) -> None:
    algorithm = Small(9).algorithm(mode)
    for _ in range(3):
        before, report = algorithm.x.detach().clone(), algorithm.hypergradient_report()
        algorithm.step()
        moved = (before - algorithm.x.detach()) / 0.05
        assert_close(moved, report.estimate, bound=1e-12, label="estimate")


def test_a_report_of_many_starts_is_one_per_start() -> None:
    small = Small(9)
    starts = torch.stack([small.start, 2 * small.start])
    report = hypergradient_report(small.problem, starts, 0.5, smoothness=1.0)
    for i, x in enumerate(starts):
        alone = hypergradient_report(small.problem, x, 0.5, smoothness=1.0)
        assert_close(report.exact[i], alone.exact, bound=1e-12, label="exact")
        assert_close(report.objective[i], alone.objective, bound=1e-12, label="objective")
        assert float(report.bound[i]) == pytest.approx(float(alone.bound), rel=0.5)
    assert report.bound.shape == report.cosine.shape == (2,)


def test_the_bound_is_infinite_where_none_is_proved() -> None:
    small = Small(9)

    def lower(x: Tensor) -> DenseMDP:
        return DenseMDP(
            small.base, small.logits.softmax(-1), 0.8, reference=x[: S * A].reshape(S, A).exp()
        )

    problem = BilevelProblem(lower, lambda x, solution: (small.cost * solution.policy).sum())
    x = torch.zeros(S * A, dtype=torch.float64)
    report = hypergradient_report(problem, x, 0.5, smoothness="linear")
    assert float(report.bound) == math.inf
    want = differences(lambda y: problem.objective(y, 0.5), x)
    assert_close(report.exact, want, bound=1e-8, label="gradient of the reference")


def nearby(
    problem: BilevelProblem, start: Tensor, *, smoothness: Any, off: float = 0.1
) -> HypergradientReport:
    """A report on a value that is off by as much, with the adjoint solved exactly there."""
    x = start.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)

    def swept(mdp: Any) -> tuple[Tensor, Tensor]:
        exact = birl_ext.solve(mdp, temperature=0.5).value
        shock = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
        return exact + off * (2 * shock - 1), torch.tensor(off, dtype=torch.float64)

    at = linearise(problem, x, 0.5, swept)
    return hypergradient_report(
        problem, start, 0.5, estimate=(at, exact_flow(at)), smoothness=smoothness
    )


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("part", ["value", "q", "advantage", "policy", "log_policy"])
def test_the_bound_holds_for_terms_in_both_x_and_the_solution(part: str, where: str) -> None:
    """f = x₀·y₀, linear in y: at x = 0 all of the error lies in ∂f/∂x, and the bound is tight."""

    def upper(x: Tensor, solution: Solution) -> Tensor:
        product: Tensor = x[0] * getattr(solution, part).flatten()[0]
        return product

    ratios = []
    for seed in (0, 4, 6, 21, 41, 43, 54):
        small = Small(seed, where, discount=0.3 if seed == 4 and part == "policy" else 0.6)
        problem = BilevelProblem(small.lower, upper)
        for start in (torch.zeros_like(small.start), small.start):
            report = nearby(problem, start, smoothness="linear")
            error, bound = float((report.estimate - report.exact).norm()), float(report.bound)
            assert 0 < error <= bound < math.inf, seed
            if not start.any():
                ratios.append(error / bound)
    assert max(ratios) > 0.1 or where == "transition"
    assert float(nearby(problem, small.start, smoothness=1.0).bound) == math.inf


@pytest.mark.parametrize("part", ["value", "q", "advantage", "policy", "log_policy"])
def test_the_right_hand_side_is_that_of_the_value_itself(part: str) -> None:
    """v̄ at any V, by loops: Q = r + γPV, A = Q − V and log π = A/τ with dV for the change of V."""
    small, tau, gamma = Small(2), 0.5, 0.8
    weight = torch.randn(S, A, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = 3 * small.cost[:, 0]

    def upper(_: Tensor, solution: Solution) -> Tensor:
        table = getattr(solution, part)
        return (weight[:, 0] * table).sum() if part == "value" else (weight * table).sum()

    x = small.start.clone().requires_grad_()
    problem = BilevelProblem(small.lower, upper)
    error = torch.tensor(1.0, dtype=torch.float64)
    at = linearise(problem, x, tau, lambda _: (given, error))
    q = small.reward(small.start) + gamma * small.transition(small.start) @ given
    policy = (q / tau).softmax(-1)
    assert_close(at.solution.q, q, bound=1e-12, label="Q")
    assert_close(at.solution.value, tau * (q / tau).logsumexp(-1), bound=1e-12, label="TV")
    assert_close(at.solution.policy, policy, bound=1e-13, label="π")
    scale = {"policy": policy / tau, "log_policy": torch.full_like(policy, 1 / tau)}
    on_q = weight * scale.get(part, torch.ones_like(policy))
    want = torch.zeros(S, dtype=torch.float64)
    rows = small.transition(small.start)
    for s in range(S):
        if part == "value":
            want[s] += weight[s, 0]
            continue
        for a in range(A):
            want += gamma * on_q[s, a] * rows[s, a]
            want[s] -= on_q[s, a] if part != "q" else 0
    assert_close(at.source.flatten(), want, bound=1e-11, label="v̄")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_the_error_of_the_value_is_certified(sweeps: int, where: str) -> None:
    """Of that V at which the last sweep is made, from wherever it started."""
    ratios = []
    for seed in range(12):
        small = Small(seed, where, discount=(0.0, 0.1, 0.8)[seed % 3])
        algorithm = small.algorithm("published", sweeps=sweeps, seed=seed)
        for _ in range(seed % 2):
            algorithm.step()
        at, *_ = algorithm._estimate(0.5)
        exact = birl_ext.solve(small.lower(algorithm.x.detach()), temperature=0.5)
        off = float((at.value.detach().flatten() - exact.value).abs().max())
        assert off <= float(at.value_error), seed
        ratios.append(off / float(at.value_error))
    assert max(ratios) > 0.1


def test_upper_levels_may_use_every_part_of_the_solution() -> None:
    """Value, Q, advantage and log-policy cotangents reach x as the exact gradient says."""
    small = Small(10)
    weights = [torch.randn(S, dtype=torch.float64), *(torch.randn(S, A).double() for _ in range(4))]

    def upper(x: Tensor, solution: Solution) -> Tensor:
        parts = (
            solution.value,
            solution.q,
            solution.advantage,
            solution.policy,
            solution.log_policy,
        )
        return torch.stack([(w * part).sum() for w, part in zip(weights, parts, strict=True)]).sum()

    problem = BilevelProblem(small.lower, upper)
    want = differences(lambda x: problem.objective(x, 0.5), small.start)
    for got, label in (
        (exact_gradient(problem, small.start), "exact"),
        (nearby(problem, small.start, smoothness="linear", off=1e-12).estimate, "nearby"),
    ):
        assert_close(got, want, bound=1e-7 * float(want.norm()), label=label)


# Newton


def test_newton_converges_quadratically_on_the_bus_likelihood() -> None:
    problem = bus_problem(load_bus_data(), 0.9999, "linear")
    newton = DampedNewton(problem, torch.tensor([5.0, 1.0]).double(), temperature=1.0)
    outcomes = [newton.step() for _ in range(15)]
    objectives = [outcome.objective for outcome in outcomes]
    for before, after in itertools.pairwise(objectives):
        assert after <= before + 1e-11
    assert outcomes[-1].decrement < 1e-15
    assert newton.x.tolist() == pytest.approx([10.0750, 2.2930], abs=5e-3)
    decrements = [outcome.decrement for outcome in outcomes if 1e-9 < outcome.decrement < 1]
    for before, after in itertools.pairwise(decrements):
        assert after < 0.1 * before
    assert max(outcome.solver_passes for outcome in outcomes) <= 12
    assert all(outcome.error_bound < 1e-3 for outcome in outcomes)


def test_newton_goes_on_from_its_state_to_the_same_bits() -> None:
    problem = bus_problem(load_bus_data(), 0.99, "linear")
    start = torch.tensor([5.0, 1.0]).double()
    one = DampedNewton(problem, start, temperature=1.0)
    for _ in range(3):
        one.step()
    state = one.state_dict()
    other = DampedNewton(problem, torch.zeros(2).double(), temperature=1.0)
    other.load_state_dict(state)
    for _ in range(3):
        assert one.step() == other.step()
    assert_same_bits(other.x, one.x, label="x")
    assert_same_bits(start, torch.tensor([5.0, 1.0]).double(), label="the start is copied")


def test_newton_solves_a_quadratic_in_one_undamped_step() -> None:
    small = Small(11)
    matrix = torch.tensor([[2.0, 0.3], [0.3, 1.0]]).double()
    target = torch.tensor([1.0, -1.0]).double()
    problem = BilevelProblem(
        lambda x: DenseMDP(small.base + 0 * x[0], small.logits.softmax(-1), 0.5),
        lambda x, _: (x - target) @ matrix @ (x - target) / 2,
    )
    newton = DampedNewton(problem, torch.zeros(2).double(), temperature=1.0, damping=0.0)
    first = newton.step()
    assert first.decrement == pytest.approx(float(target @ matrix @ target))
    assert_close(newton.x, target, bound=1e-6, label="minimiser")
    assert_close(newton.covariance(), torch.linalg.inv(matrix), bound=1e-12, label="covariance")


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("where", WHERE)
def test_the_adjoint_error_is_certified(where: str, steps: int) -> None:
    """(M13): ‖λ − λ*‖₁ ≤ ρ/(1 − γ), against the system solved by LU."""
    for seed in range(10):
        algorithm = Small(seed, where, discount=0.9).algorithm("published", optimiser=resting)
        for _ in range(steps):
            algorithm.step()
        report = algorithm.hypergradient_report(smoothness=1.0)
        at, flow, *_ = algorithm._estimate(0.5)
        matrix = at.rows.policy_matrix(at.policy * at.rows.scale())
        system = torch.eye(S, dtype=torch.float64) - 0.9 * matrix
        exact = torch.linalg.solve(system.mT, at.source.unsqueeze(-1)).squeeze(-1)
        error = float((flow - exact).abs().sum())
        assert error <= float(report.adjoint_error), f"problem {seed}"
        assert float(report.adjoint_residual) == pytest.approx(0.1 * float(report.adjoint_error))


def test_published_sweeps_are_plain() -> None:
    """V_k = T^N V_{k−1} (M5): from zero, after N sweeps, whatever is known of the fixed point."""
    transition = torch.full((2, 2, 2), 0.5, dtype=torch.float64)
    problem = BilevelProblem(
        lambda x: DenseMDP(x, transition, 0.9), lambda x, solution: solution.value.sum()
    )
    x = torch.zeros(2, 2, dtype=torch.float64)
    for sweeps in (1, 2, 3):
        algorithm = MSoBiRL(
            problem,
            x,
            temperature=1.0,
            optimiser=lambda p: torch.optim.SGD(p, lr=0.0),
            mode="published",
            sweeps=sweeps,
            accuracy=math.inf,
        )
        for outer in (1, 2):  # V = log 2 · (1 + γ + … ) in both states
            powers = sum(0.9**k for k in range(sweeps * outer))
            assert float(algorithm.step().objective) == pytest.approx(2 * math.log(2) * powers)
