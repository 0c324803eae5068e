"""Followers: what a model is answered with, and what is certified of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from birl_ext import DenseMDP, MSoBiRL, solve
from birl_ext.bilevel import (
    BilevelProblem,
    Exact,
    Fitted,
    Follower,
    NoResponse,
    Sweeps,
    action_counts,
    hypergradient_report,
)
from birl_ext.errors import (
    NotConvergedError,
    OptionError,
    ShapeError,
    UndeterminedError,
    UninformativeDataError,
)
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator
from birl_ext.simulators.paths import Paths
from birl_ext.solution import Solution


def random_mdp(
    seed: int = 0, states: int = 7, actions: int = 3, discount: float = 0.9, **parts: Any
) -> DenseMDP:
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    weight = torch.rand(states, actions, states, generator=generator, dtype=torch.float64) ** 4
    return DenseMDP(reward, weight / weight.sum(-1, keepdim=True), discount, **parts)


def plain_sweeps(
    mdp: DenseMDP, temperature: float, count: int, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """V_K and π_K by loops."""
    reward, rows = mdp.reward.detach().numpy(), mdp.transition.numpy()
    value, policy = start.copy(), np.zeros_like(reward)
    for _ in range(count):
        after = np.empty_like(value)
        for s in range(mdp.states):
            q = np.array([reward[s, a] + mdp.discount * rows[s, a] @ value for a in range(3)])
            top = q.max()
            weight = np.exp((q - top) / temperature)
            policy[s] = weight / weight.sum()
            after[s] = top + temperature * np.log(weight.sum())
        value = after
    return value, policy


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 10, 20, 50])
def test_sweeps_are_plain_and_their_bound_holds(count: int, temperature: float) -> None:
    mdp = random_mdp()
    start = torch.linspace(-3, 3, 7, dtype=torch.float64)
    found = Sweeps(count).answer(mdp, temperature, start)
    value, policy = plain_sweeps(mdp, temperature, count, start.numpy())
    np.testing.assert_allclose(found.value.numpy(), value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.policy.numpy(), policy, rtol=0, atol=1e-11)
    exact = solve(mdp, temperature=temperature)
    assert float((found.value - exact.value).abs().max()) <= float(found.error_bound)
    off = (found.log_policy - exact.log_policy).abs().max()
    assert float(off) <= float(found.log_policy_error_bound)
    assert int(found.iterations) == count


def test_the_bound_is_no_idle_one() -> None:
    """It falls with the error, to rounding."""
    mdp = random_mdp()
    bounds = [float(Sweeps(count).answer(mdp, 0.5).error_bound) for count in (1, 20, 400)]
    assert bounds[0] > 10 * bounds[1] / 2 > 1e3 * bounds[2]
    assert bounds[2] < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 5, 50, 500])
def test_the_bound_holds_for_a_batch_with_masks_and_ends(count: int, dtype: torch.dtype) -> None:
    base = random_mdp(1)
    mask = torch.ones(7, 3, dtype=torch.bool)
    mask[2, 1:] = False
    mask[6] = False
    ends = torch.zeros(7, dtype=torch.bool)
    ends[6] = True
    mdp = DenseMDP(
        torch.stack([base.reward, 5 * base.reward]), base.transition, 0.9, mask=mask, terminal=ends
    )
    tau = torch.tensor([0.3, 1.0], dtype=torch.float64)
    mdp = mdp.to(dtype)
    exact = solve(mdp.to(torch.float64), temperature=tau)
    found = Sweeps(count).answer(mdp, tau)
    error = (found.value.double() - exact.value).abs().amax(-1)
    assert bool((error <= found.error_bound).all())
    assert torch.equal(found.policy == 0, exact.policy == 0)
    assert found.policy.dtype == dtype


def test_a_follower_that_does_not_carry_starts_from_zero() -> None:
    mdp, start = random_mdp(), torch.full((7,), 5.0, dtype=torch.float64)
    fresh = Sweeps(3).answer(mdp, 0.5)
    assert torch.equal(Sweeps(3, carry=False).answer(mdp, 0.5, start).value, fresh.value)
    assert not torch.equal(Sweeps(3).answer(mdp, 0.5, start).value, fresh.value)


def test_a_value_of_another_model() -> None:
    with pytest.raises(ShapeError, match=r"is of shape \(5,\)"):
        Sweeps(3).answer(random_mdp(), 0.5, torch.zeros(5, dtype=torch.float64))


def test_a_tolerance_saves_sweeps() -> None:
    mdp = random_mdp()
    few, all_of_them = Sweeps(500, tol=1e-3).answer(mdp, 0.5), Sweeps(500).answer(mdp, 0.5)
    assert int(few.iterations) < 150 < int(all_of_them.iterations)
    assert float(few.error_bound) <= 1e-3 * float(few.value.abs().max().clamp(min=0.5)) * 1.01


def test_exact_is_solve_with_its_derivatives() -> None:
    mdp = random_mdp()
    reward = mdp.reward.clone().requires_grad_()
    found = Exact().answer(mdp.replace(reward=reward), 0.5)
    assert torch.equal(found.value.detach(), solve(mdp, temperature=0.5).value)
    assert found.value.requires_grad
    loose = Exact(tol=0.1).answer(mdp, 0.5)
    assert float(loose.error_bound) > 1e3 * float(found.error_bound)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sweeps(0), "count is 0"),
        (lambda: Sweeps(3, carry=1), "carry is 1"),  # type: ignore[arg-type]
        (lambda: Sweeps(3, tol=-1.0), "tol is -1"),
        (lambda: Exact(tol=float("nan")), "tol is nan"),
    ],
)
def test_what_is_no_follower(make: Callable[[], Follower], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make()


# M-SoBiRL with another follower than its own


def problem() -> BilevelProblem:
    base = random_mdp(2)
    features = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(3)).double()

    def lower(x: Tensor) -> DenseMDP:
        return base.replace(reward=torch.einsum("sak,...k->...sa", features, x))

    def upper(x: Tensor, solution: Solution) -> Tensor:
        return (solution.policy[..., 0] ** 2).sum(-1) + 0.1 * x.square().sum(-1)

    return BilevelProblem(lower, upper)


def algorithm(**options: Any) -> MSoBiRL:
    x = torch.tensor([0.5, -0.2, 0.1, 0.9], dtype=torch.float64)
    given: dict[str, Any] = {
        "temperature": 0.5,
        "optimiser": lambda p: torch.optim.SGD(p, lr=0.1),
        "accuracy": float("inf"),
    }
    return MSoBiRL(problem(), x, **(given | options))


def test_the_published_mode_is_that_of_a_follower_of_sweeps() -> None:
    own, given = (
        algorithm(mode="published", sweeps=4),
        algorithm(mode="published", follower=Sweeps(4)),
    )
    for _ in range(3):
        assert own.step().objective == given.step().objective
    assert torch.equal(own.x, given.x)


def test_a_follower_of_many_sweeps_is_the_exact_one() -> None:
    own, given = algorithm(), algorithm(follower=Sweeps(400))
    for _ in range(3):
        one, other = own.step(), given.step()
        torch.testing.assert_close(one.objective, other.objective, rtol=1e-12, atol=0)
    torch.testing.assert_close(own.x, given.x, rtol=1e-10, atol=0)


def test_the_carried_value_closes_the_gap_and_is_kept() -> None:
    """With a small rate x hardly moves: sweeps add up where they are carried over."""
    settings: dict[str, Any] = {"optimiser": lambda p: torch.optim.SGD(p, lr=1e-6)}
    carried = algorithm(follower=Sweeps(2), **settings)
    reset = algorithm(follower=Sweeps(2, carry=False), **settings)
    errors = [float(carried.step().relative_error) for _ in range(150)]
    assert errors[0] > 1
    assert errors[-1] < 1e-3
    assert [float(reset.step().relative_error) > 1 for _ in range(5)] == [True] * 5
    fresh = algorithm(follower=Sweeps(2), **settings)
    fresh.load_state_dict(carried.state_dict())
    assert fresh.step().objective == carried.step().objective


def test_a_tolerance_beside_a_follower() -> None:
    with pytest.raises(OptionError, match="beside a follower"):
        algorithm(tol=0.1, follower=Exact())
    with pytest.raises(OptionError, match="follower is 'exact'"):
        algorithm(follower="exact")


# A follower whose reward is not known


def behaviour(
    paths: int = 1000, steps: int = 100
) -> tuple[Tensor, Tensor, list[DenseMDP], list[Paths]]:
    """1e5 steps of a follower with w = (1, −0.5, 0.3), seen under each of two incentives."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(7, 3, 3, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    models, seen = [], []
    for seed in (5, 6):
        known = random_mdp(2).replace(reward=random_mdp(seed).reward)
        known = known.replace(initial_distribution=torch.full((7,), 1 / 7, dtype=torch.float64))
        true = known.replace(reward=known.reward + features @ weights)
        follower = FiniteFollower(solve(true, temperature=0.5).policy)
        models.append(known)
        seen.append(FiniteSimulator(true, generator).rollout(follower, paths // 2, steps))
    return features, weights, models, seen


def test_a_known_follower_is_recovered_from_its_behaviour() -> None:
    features, weights, models, seen = behaviour()
    both = DenseMDP(torch.stack([m.reward for m in models]), models[0].transition, 0.9)
    counts = torch.stack([action_counts(paths, 7, 3) for paths in seen])
    assert int(counts.sum()) == 100_000
    fitted = Fitted.of(features, both, counts, temperature=0.5)
    assert fitted.covariance is not None
    deviation = fitted.covariance.diagonal().sqrt()
    assert float(deviation.max()) < 0.02
    assert bool(((fitted.weights - weights).abs() < 4 * deviation).all())
    one = Fitted.of(features, models[0], seen[0], temperature=0.5)
    assert float((one.weights - weights).norm()) < 0.05
    assert "Fitted(weights=[" in repr(one)


def test_what_was_fitted_is_the_model_of_a_method() -> None:
    """The hyper-gradient is that of the completed problem, by whichever follower."""
    features, weights, _, _ = behaviour(2, 1)
    base = problem()

    def completed(x: Tensor) -> DenseMDP:
        mdp = base.lower(x)
        assert isinstance(mdp, DenseMDP)
        return mdp.replace(reward=mdp.reward + features @ weights)

    x = torch.tensor([0.5, -0.2, 0.1, 0.9], dtype=torch.float64)
    want = hypergradient_report(BilevelProblem(completed, base.upper), x, 0.5).exact
    for by in (Exact(), Sweeps(400)):
        fitted = Fitted(features, weights, by=by)
        got = algorithm(follower=fitted).hypergradient_report().estimate
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
        answer = fitted.answer(base.model(x), 0.5)
        exact = solve(completed(x), temperature=0.5)
        torch.testing.assert_close(answer.policy, exact.policy, rtol=1e-9, atol=1e-12)
        assert float(fitted.approach(base.model(x), 0.5).error_bound) < 1e-9
        naive = NoResponse(
            base,
            x,
            temperature=0.5,
            optimiser=lambda p: torch.optim.SGD(p, lr=0.1),
            follower=fitted,
        )
        phi = base.upper(x, exact)
        torch.testing.assert_close(naive.step().objective, phi, rtol=1e-9, atol=0)


def test_data_that_do_not_determine_the_weights() -> None:
    features, _, models, seen = behaviour(200, 20)
    potential = torch.randn(7, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    mdp = models[0]
    # a shaping reward φ(s) − γ E φ(s') moves no policy
    shaping = potential[:, None] - 0.9 * mdp.transition @ potential
    with pytest.raises(UndeterminedError, match="singular") as caught:
        Fitted.of(torch.cat([features, shaping[..., None]], -1), mdp, seen[0], temperature=0.5)
    assert abs(caught.value.direction[3]) == 1
    twice = torch.cat([features, 2 * features[..., :1]], -1)
    with pytest.raises(UndeterminedError, match="singular"):
        Fitted.of(twice, mdp, seen[0], temperature=0.5)


def test_behaviour_that_is_no_data() -> None:
    features, _, models, _ = behaviour(2, 1)
    mdp = models[0]
    none = torch.zeros(7, 3, dtype=torch.float64)
    with pytest.raises(UninformativeDataError, match="behaviour holds 0 actions"):
        Fitted.of(features, mdp, none, temperature=0.5)
    with pytest.raises(UninformativeDataError, match="counts"):
        Fitted.of(features, mdp, none - 1, temperature=0.5)
    mask = torch.ones(7, 3, dtype=torch.bool)
    mask[2, 1] = False
    with pytest.raises(UninformativeDataError, match="that the model forbids"):
        Fitted.of(features, mdp.replace(mask=mask), none + 1, temperature=0.5)
    with pytest.raises(ShapeError, match="behaviour has shape"):
        Fitted.of(features, mdp, none[:5], temperature=0.5)
    with pytest.raises(ShapeError, match="features have shape"):
        Fitted.of(features[:5], mdp, none + 1, temperature=0.5)
    with pytest.raises(ShapeError, match="features have shape"):
        Fitted(features, torch.zeros(4).double())
    with pytest.raises(OptionError, match="by is 'exact'"):
        Fitted(features, torch.zeros(3).double(), by="exact")  # type: ignore[arg-type]


def test_a_likelihood_without_a_maximum() -> None:
    """Only the better action of each state was ever seen: the weight runs away."""
    mdp = random_mdp(2)
    feature = torch.zeros(7, 3, 1, dtype=torch.float64)
    feature[:, 0] = 1
    counts = torch.zeros(7, 3, dtype=torch.float64)
    counts[:, 0] = 10
    with pytest.raises(UninformativeDataError, match="the likelihood has no maximum"):
        Fitted.of(feature, mdp.replace(reward=0 * mdp.reward), counts, temperature=0.5)
    counts[0, 1] = 1
    fitted = Fitted.of(feature, mdp.replace(reward=0 * mdp.reward), counts, temperature=0.5)
    assert float(fitted.weights) > 0.5


def test_too_few_steps() -> None:
    features, _, models, seen = behaviour(200, 20)
    with pytest.raises(NotConvergedError, match="after 1 steps"):
        Fitted.of(features, models[0], seen[0], temperature=0.5, steps=1)
