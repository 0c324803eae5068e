"""Constrained leaders: projections against a quadratic programme, and what the optimisers do."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import untyped
from closeness import assert_close, assert_same_state
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from birl_ext import DenseMDP
from birl_ext.bilevel import (
    L1,
    BilevelProblem,
    Box,
    ConstraintSet,
    L1Ball,
    Mirror,
    MSoBiRL,
    Projected,
    Proximal,
    Simplex,
    ZeroOrder,
    stationarity,
)
from birl_ext.bilevel.stoc_sobirl import Effort, StocSoBiRLDescent
from birl_ext.errors import (
    BirlError,
    DtypeError,
    InfeasibleError,
    NonFiniteResultError,
    OptionError,
    ShapeError,
)
from birl_ext.problems.random_mdp import RandomMDPConfig
from birl_ext.problems.sampled_random_mdp import sampled_random_mdp

FLOAT = torch.float64
NAN, INF = math.nan, math.inf
SETS: list[ConstraintSet] = [Simplex(), Simplex(3.5), L1Ball(1.5), Box(-0.5, 1.0)]
named = pytest.mark.parametrize("own", SETS, ids=repr)


def vectors(size: int = 5, rows: int = 1) -> Any:
    numbers = st.floats(-20.0, 20.0, allow_subnormal=False)
    return st.lists(numbers, min_size=size * rows, max_size=size * rows).map(
        lambda found: torch.tensor(found, dtype=FLOAT).reshape(rows, size)
    )


def outside(own: ConstraintSet, x: Tensor) -> float:
    """How far a condition that defines the set is from being met, from its definition alone."""
    if isinstance(own, Simplex):
        return max(float(-x.min()), float((x.sum(-1) - own.total).abs().max()))
    if isinstance(own, L1Ball):
        return float((x.abs().sum(-1) - own.radius).max())
    assert isinstance(own, Box)
    return max(float((own.low - x).max()), float((x - own.high).max()))


# Projections


def programme(own: ConstraintSet, x: np.ndarray) -> np.ndarray:
    """The nearest point, by SLSQP; the ℓ₁ ball in the variables x⁺ and x⁻."""
    from scipy.optimize import minimize

    size, options = len(x), {"ftol": 1e-15, "maxiter": 2000}
    if isinstance(own, L1Ball):
        found = minimize(
            lambda z: 0.5 * ((z[:size] - z[size:] - x) ** 2).sum(),
            np.full(2 * size, 0.1),
            jac=lambda z: np.concatenate([z[:size] - z[size:] - x, x - z[:size] + z[size:]]),
            bounds=[(0, None)] * (2 * size),
            constraints={"type": "ineq", "fun": lambda z: own.radius - z.sum()},
            method="SLSQP",
            options=options,
        ).x
        return found[:size] - found[size:]
    if isinstance(own, Simplex):
        limits: Any = [(0, None)] * size
        meets: Any = {"type": "eq", "fun": lambda z: z.sum() - own.total}
    else:
        assert isinstance(own, Box)
        limits, meets = [(float(own.low), float(own.high))] * size, ()
    return minimize(
        lambda z: 0.5 * ((z - x) ** 2).sum(),
        np.full(size, 0.2),
        jac=lambda z: z - x,
        bounds=limits,
        constraints=meets,
        method="SLSQP",
        options=options,
    ).x


@named
def test_a_projection_is_the_nearest_point(own: ConstraintSet) -> None:
    draws = np.random.default_rng(0)
    for scale in (0.1, 1.0, 4.0):
        for _ in range(6):
            x = scale * draws.normal(size=5)
            got = own.project(torch.tensor(x))
            assert_close(got, programme(own, x), bound=2e-6, label=f"{own} of {x}")


@named
@given(rows=vectors(rows=2))
def test_a_projection_stays_nears_and_is_in_the_set(own: ConstraintSet, rows: Tensor) -> None:
    there = own.project(rows)
    assert outside(own, there) < 1e-12
    assert_close(own.project(there), there, bound=1e-12, label="projected twice")
    apart = float((there[0] - there[1]).norm())
    assert apart <= float((rows[0] - rows[1]).norm()) + 1e-12
    # what is left stands in no acute angle to the set: obtuse to every other point of it
    others = own.project(torch.eye(5, dtype=FLOAT) * 3 - 1)
    angle = ((rows - there).unsqueeze(1) * (others - there.unsqueeze(1))).sum(-1)
    assert float(angle.max()) < 1e-9
    assert torch.equal(there[0], own.project(rows[0]))  # a batch is its rows


def test_projections_keep_dtype_and_small_differences() -> None:
    x = torch.tensor([1e8 + 0.25, 1e8, -1e8], dtype=FLOAT)
    assert_close(Simplex().project(x), np.array([0.625, 0.375, 0.0]), bound=1e-8, label="shifted")
    assert Simplex().project(x.float()).dtype == torch.float32
    assert_close(
        L1Ball(2.0).project(torch.tensor([3.0, -1.0, 0.5], dtype=FLOAT)),
        np.array([2.0, 0.0, 0.0]),
        bound=1e-15,
        label="a corner",
    )
    inside = torch.tensor([0.3, -0.2], dtype=FLOAT)
    assert torch.equal(L1Ball(1.0).project(inside), inside)
    high = torch.tensor([1.0, 2.0, INF], dtype=FLOAT)
    got = Box(0.0, high).project(torch.tensor([[-1.0, 3.0, 9.0]], dtype=FLOAT))
    assert got.tolist() == [[0.0, 2.0, 9.0]]
    for own in SETS:
        assert own.project(torch.tensor([0.0, NAN, 1.0])).isnan().any()


def test_distances_and_the_soft_threshold() -> None:
    x = torch.tensor([[2.0, 0.0], [0.5, 0.5]], dtype=FLOAT)
    assert Simplex().distance(x).tolist() == [1.0, 0.0]
    got = L1(2.0).prox(torch.tensor([1.5, -0.1, -3.0], dtype=FLOAT), 0.25)
    assert got.tolist() == [1.0, 0.0, -2.5]
    assert L1(2.0)(x).tolist() == [4.0, 2.0]


# A leader


S, A = 5, 2
DRAWS = torch.Generator().manual_seed(3)
BASE = DenseMDP(
    torch.randn(S, A, generator=DRAWS, dtype=FLOAT),
    torch.rand(S, A, S, generator=DRAWS, dtype=FLOAT).softmax(-1),
    0.8,
)
WANTED = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2], dtype=FLOAT)
TAU = 0.4


def lower(x: Tensor) -> DenseMDP:
    """A bonus of action 0 in each state."""
    bonus = torch.stack([x, torch.zeros_like(x)], -1)
    return BASE.replace(reward=BASE.reward + bonus)


def upper(x: Tensor, solution: Any) -> Tensor:
    return (solution.policy[..., 0] - WANTED).square().sum(-1) + 0.02 * x.square().sum(-1)


PROBLEM = BilevelProblem(lower, upper)


def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=1.0)


def made(optimiser: Any, x: Tensor | None = None, **options: Any) -> MSoBiRL:
    start = torch.full((S,), 0.2, dtype=FLOAT) if x is None else x
    return MSoBiRL(PROBLEM, start, temperature=TAU, optimiser=optimiser, **options)


def slope(x: Tensor) -> tuple[float, Tensor]:
    """φ and ∇φ by finite differences of solves."""
    x = x.detach()
    step = 1e-5
    found = [
        (PROBLEM.objective(x + step * e, TAU) - PROBLEM.objective(x - step * e, TAU)) / (2 * step)
        for e in torch.eye(S, dtype=FLOAT)
    ]
    return float(PROBLEM.objective(x, TAU)), torch.stack(found)


@named
def test_a_run_ends_where_the_conditions_of_an_optimum_hold(own: ConstraintSet) -> None:
    algorithm = made(lambda p: Projected(sgd(p), own))
    algorithm.run(400, progress=False)
    x = algorithm.x.detach()
    assert outside(own, x) < 1e-12
    _, gradient = slope(x)
    assert float(stationarity(x, gradient, own)) < 1e-6
    assert float(gradient.norm()) > 0.01  # or nothing binds
    # the same by hand
    if isinstance(own, Simplex):
        level = gradient[x > 1e-9]
        assert float(level.max() - level.min()) < 1e-6
        assert float((gradient - level.mean()).min()) > -1e-6
    elif isinstance(own, Box):
        assert bool(
            (gradient[x >= own.high] < 1e-6).all() and (gradient[x <= own.low] > -1e-6).all()
        )
        assert float(gradient[(x < own.high) & (x > own.low)].abs().amax()) < 1e-6
    else:
        size = gradient.abs().max()
        assert_close(gradient[x != 0], -size * x[x != 0].sign(), bound=1e-6, label="slopes")


def test_no_other_point_of_the_simplex_is_better() -> None:
    algorithm = made(lambda p: Projected(sgd(p), Simplex()))
    algorithm.run(300, progress=False)
    best = float(PROBLEM.objective(algorithm.x.detach(), TAU))
    draws = torch.Generator().manual_seed(0)
    others = -torch.rand(3000, S, generator=draws, dtype=FLOAT).log()
    others = others.pow(3.0)
    others = others / others.sum(-1, keepdim=True)
    assert float(PROBLEM.objective(others, TAU).min()) > best - 1e-9


def test_mirror_proximal_and_projected_agree_on_the_simplex() -> None:
    ways = {
        "mirror": lambda p: Mirror(p, lr=8.0),
        "proximal": lambda p: Proximal(p, Simplex(), lr=1.0),
        "momentum": lambda p: Projected(torch.optim.SGD(p, lr=0.3, momentum=0.8), Simplex()),
    }
    want = made(lambda p: Projected(sgd(p), Simplex()))
    want.run(300, progress=False)
    for name, way in ways.items():
        algorithm = made(way)
        algorithm.run(400, progress=False)
        assert_close(algorithm.x.detach(), want.x.detach(), bound=1e-5, label=name)


def test_the_l1_norm_is_paid_for() -> None:
    """Soft thresholding: entries exactly zero, and elsewhere a slope of minus the weight."""
    weight = 0.08
    algorithm = made(lambda p: Proximal(p, L1(weight), lr=1.0))
    algorithm.run(600, progress=False)
    x = algorithm.x.detach()
    _, gradient = slope(x)
    assert 0 < int((x == 0).sum()) < S
    assert_close(gradient[x != 0], -weight * x[x != 0].sign(), bound=1e-6, label="active")
    assert float(gradient[x == 0].abs().max()) < weight


def test_many_starts_and_several_leaves() -> None:
    starts = torch.rand(4, S, generator=torch.Generator().manual_seed(1), dtype=FLOAT)
    batch = made(lambda p: Projected(sgd(p), Simplex()), starts)
    batch.run(5, progress=False)
    for number, start in enumerate(starts):
        one = made(lambda p: Projected(sgd(p), Simplex()), start)
        one.run(5, progress=False)
        assert_close(batch.x[number].detach(), one.x.detach(), bound=1e-12, label="a start")

    problem = BilevelProblem(
        lambda x: lower(x["share"] + x["free"]), lambda x, s: upper(x["share"], s) - x["free"].sum()
    )
    begin = {"share": torch.ones(S, dtype=FLOAT), "free": torch.zeros(S, dtype=FLOAT)}
    both = MSoBiRL(
        problem, begin, temperature=TAU, optimiser=lambda p: Projected(sgd(p), [Simplex(), None])
    )
    both.step()
    assert abs(float(both.x["share"].detach().sum()) - 1) < 1e-12
    assert float(both.x["free"].detach().sum()) > 1.5


def test_zero_order_is_constrained_the_same_way() -> None:
    algorithm = ZeroOrder(
        PROBLEM,
        torch.full((S,), 0.2, dtype=FLOAT),
        temperature=TAU,
        radius=1e-4,
        optimiser=lambda p: Projected(torch.optim.SGD(p, lr=0.05), Simplex()),
    )
    before = float(PROBLEM.objective(algorithm.x.detach(), TAU))
    algorithm.run(150, progress=False)
    assert outside(Simplex(), algorithm.x.detach()) < 1e-12
    assert float(PROBLEM.objective(algorithm.x.detach(), TAU)) < before - 0.02


def test_samples_are_constrained_the_same_way() -> None:
    """A step from samples is the projection of the step that the same samples take freely."""
    problem, simulator, _, start = sampled_random_mdp(
        RandomMDPConfig(states=4, actions=3, dimension=5)
    )
    start = start.abs() / start.abs().sum()

    def stepped(optimiser: Any) -> Tensor:
        simulator.generator.manual_seed(0)
        algorithm = StocSoBiRLDescent(
            problem,
            simulator,
            start,
            discount=0.5,
            temperature=1.0,
            optimiser=optimiser,
            effort=Effort(4, 3, 3),
        )
        algorithm.step()
        return algorithm.x.detach()

    inside, free = stepped(lambda p: Projected(sgd(p), Simplex())), stepped(sgd)
    assert outside(Simplex(), free) > 1e-3
    assert_close(inside, Simplex().project(free), bound=1e-12, label="x")


def test_a_start_outside_is_projected_and_a_positive_one_scaled() -> None:
    far = torch.tensor([3.0, -1.0, 0.0, 0.0, 0.0], dtype=FLOAT)
    kept = far.clone()
    for way in (lambda p: Projected(sgd(p), Simplex()), lambda p: Proximal(p, Simplex(), lr=1.0)):
        assert made(way, far).x.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.equal(far, kept)
    scaled = made(lambda p: Mirror(p, lr=1.0, total=2.0), torch.ones(S, dtype=FLOAT))
    assert_close(scaled.x.detach(), np.full(S, 0.4), bound=1e-15, label="scaled")
    free = made(lambda p: Proximal(p, L1(0.1), lr=1.0), far)
    assert torch.equal(free.x.detach(), far)


# States


WAYS = {
    "projected": lambda p: Projected(torch.optim.SGD(p, lr=0.5, momentum=0.9), Simplex()),
    "projected adam": lambda p: Projected(torch.optim.Adam(p, lr=0.05), Box(0.0, 0.5)),
    "proximal": lambda p: Proximal(p, L1(0.05), lr=0.5),
    "mirror": lambda p: Mirror(p, lr=0.5),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@ways
def test_a_saved_state_goes_on_to_the_same_bits(way: Any) -> None:
    whole, first, second = (made(way, noise=0.01) for _ in range(3))
    whole.run(6, progress=False)
    first.run(3, progress=False)
    kept = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    second.run(3, progress=False)
    assert_same_state(second.state_dict(), whole.state_dict())
    assert_same_state(first.state_dict(), kept)


@ways
def test_a_copy_and_a_pickle_step_alike(way: Any) -> None:
    x = torch.nn.Parameter(torch.full((S,), 0.2, dtype=FLOAT))
    optimiser = way([x])
    x.grad = torch.arange(S, dtype=FLOAT)
    optimiser.step()
    for other in (copy.deepcopy(optimiser), pickle.loads(pickle.dumps(optimiser))):
        (leaf,) = other.param_groups[0]["params"]
        leaf.grad = torch.arange(S, dtype=FLOAT)
        other.step()
        twin = copy.deepcopy(optimiser)
        (want,) = twin.param_groups[0]["params"]
        want.grad = torch.arange(S, dtype=FLOAT)
        twin.step()
        assert torch.equal(leaf, want)
        assert not torch.equal(leaf, x)


@ways
def test_a_learning_rate_is_scheduled(way: Any) -> None:
    algorithm = made(way)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(algorithm.optimiser, 0.5)
    algorithm.step()
    before = algorithm.optimiser.param_groups[0]["lr"]
    scheduler.step()
    assert algorithm.optimiser.param_groups[0]["lr"] == before / 2
    for group in algorithm.optimiser.param_groups:
        group["lr"] = 1e-300
    x = algorithm.x.detach().clone()
    algorithm.optimiser.state.clear()
    algorithm.step()
    assert_close(algorithm.x.detach(), x, bound=1e-15, label="a step of rate zero")


def test_a_foreign_state_is_refused_and_nothing_has_changed() -> None:
    algorithm = made(WAYS["projected adam"])
    algorithm.run(2, progress=False)
    before = algorithm.state_dict()
    with pytest.raises(OptionError, match="stored optimiser is that of an optimiser"):
        algorithm.load_state_dict(made(WAYS["projected"]).state_dict())
    broken = copy.deepcopy(before)
    broken["optimiser"]["state"][0]["exp_avg"] = torch.zeros(2, dtype=FLOAT)
    with pytest.raises(ShapeError, match=r"exp_avg"):
        algorithm.load_state_dict(broken)
    assert_same_state(algorithm.state_dict(), before)


@ways
def test_after_an_error_all_is_as_it_was(way: Any) -> None:
    bad: list[int] = []

    def sick(x: Tensor, solution: Any) -> Tensor:
        return upper(x, solution) * (NAN if bad else 1.0)

    algorithm = MSoBiRL(
        BilevelProblem(lower, sick),
        torch.full((S,), 0.2, dtype=FLOAT),
        temperature=TAU,
        optimiser=way,
    )
    algorithm.step()
    before = algorithm.state_dict()
    bad.append(1)
    with pytest.raises(BirlError, match="nan"):
        algorithm.step()
    assert_same_state(algorithm.state_dict(), before)
    bad.clear()
    algorithm.step()


# What is refused


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: Simplex(0.0), InfeasibleError, r"Simplex is empty: total is 0"),
        (lambda: Simplex(-1.0), InfeasibleError, r"total is -1"),
        (lambda: Simplex(NAN), OptionError, r"total is nan"),
        (lambda: L1Ball(-2), InfeasibleError, r"L1Ball is empty: radius is -2"),
        (lambda: Mirror([torch.ones(2)], 0.1, total=0), InfeasibleError, "total is 0"),
        (lambda: Box(1.0, 0.0), InfeasibleError, "Box is empty: low is 1, high 0"),
        (
            lambda: Box(torch.tensor([0.0, 2.0]), 1.0),
            InfeasibleError,
            r"low is 2, high 1 at entry \[1\]",
        ),
        (lambda: Box(INF, INF), InfeasibleError, "low is inf"),
        (lambda: Box(NAN, 1.0), OptionError, "low is nan"),
        (lambda: Box(untyped("a"), 1.0), OptionError, "low is 'a'"),
        (lambda: Box(torch.zeros(2), torch.ones(3)), ShapeError, r"low has shape \(2,\)"),
        (lambda: Box(torch.zeros(2, dtype=torch.int64), 1.0), DtypeError, "low has dtype"),
        (lambda: L1(-1.0), OptionError, "weight is -1"),
    ],
)
def test_an_empty_set_is_named(make: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        make()


@pytest.mark.parametrize(
    ("way", "kind", "words"),
    [
        (lambda p: Projected(torch.optim.Adam(p), Simplex()), OptionError, "not separable: Adam"),
        (lambda p: Projected(torch.optim.LBFGS(p), Box(0, 1)), OptionError, "outside the set"),
        (lambda p: Projected(p, Simplex()), OptionError, "inner is"),
        (lambda p: Projected(sgd(p), untyped("simplex")), OptionError, "onto is"),
        (lambda p: Projected(sgd(p), untyped(None)), OptionError, "onto is"),
        (lambda p: Projected(sgd(p), untyped(L1(0.1))), OptionError, "onto is a?n? ?L1"),
        (lambda p: Projected(sgd(p), [Simplex(), Simplex()]), OptionError, "onto has 2 entries"),
        (lambda p: Projected(sgd(p), Box(torch.zeros(3), 1.0)), ShapeError, r"`low` of the Box"),
        (lambda p: Proximal(p, L1(0.1), lr=0.0), OptionError, "lr is 0"),
        (lambda p: Mirror(p, lr=NAN), OptionError, "lr is nan"),
    ],
)
def test_a_wrong_way_is_named_before_the_first_step(way: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        made(way)


def test_a_start_that_mirror_could_not_leave_is_refused() -> None:
    start = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0], dtype=FLOAT)
    with pytest.raises(OptionError, match="entry of leaf 0 of Mirror is 0"):
        made(lambda p: Mirror(p, lr=1.0), start)
    with pytest.raises(ShapeError, match=r"leaf 0 of x has shape \(\)"):
        Projected(torch.optim.SGD([torch.zeros(())], lr=0.1), Simplex())


def test_adam_on_the_simplex_would_stop_at_no_optimum() -> None:
    """Why it is refused: slopes of one sign move all entries alike, which a projection undoes."""
    x = torch.nn.Parameter(torch.tensor([0.5, 0.5], dtype=FLOAT))
    adam = torch.optim.Adam([x], lr=0.1)
    for _ in range(100):
        x.grad = torch.tensor([1.0, 2.0], dtype=FLOAT)  # the optimum is (1, 0)
        adam.step()
        with torch.no_grad():
            x.copy_(Simplex().project(x))
    assert_close(x.detach(), np.array([0.5, 0.5]), bound=1e-6, label="stuck")
    other = Projected(torch.optim.SGD([x], lr=0.1), Simplex())
    for _ in range(100):
        x.grad = torch.tensor([1.0, 2.0], dtype=FLOAT)
        other.step()
    assert x.tolist() == [1.0, 0.0]


@ways
def test_a_step_that_a_projection_would_hide_is_refused(way: Any) -> None:
    x = torch.nn.Parameter(torch.full((S,), 0.2, dtype=FLOAT))
    optimiser = way([x])
    x.grad = torch.full((S,), INF, dtype=FLOAT)
    with pytest.raises(NonFiniteResultError, match="leaf 0 of"):
        optimiser.step()


def test_mirror_comes_back_from_the_edge() -> None:
    x = torch.nn.Parameter(torch.tensor([0.5, 0.5]))
    mirror = Mirror([x], lr=1.0)
    for sign in (1.0, -1.0):
        for _ in range(3):
            x.grad = torch.tensor([0.0, sign * 400.0])
            mirror.step()
        assert float(x.detach().sum()) == pytest.approx(1.0)
        assert float(x.detach()[1]) == pytest.approx(0.0 if sign > 0 else 1.0, abs=1e-30)
        assert bool((x > 0).all())
