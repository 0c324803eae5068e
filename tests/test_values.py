"""Values: every public function, input form, method and backend against the float64 oracle."""

from __future__ import annotations

import functools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from cases import FLOATS, LARGE, SMALL, WARP, Case, cases, oracle, problems, untyped
from closeness import assert_close
from hypothesis import given
from oracle import exact, float64
from torch import Tensor

import birl_ext
from birl_ext.errors import NotConvergedError
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.ops.backends import choice, pytorch
from birl_ext.ops.backends import native as glue
from birl_ext.options import BackendName, MethodName
from birl_ext.solution import Solution, Status

SLOW = (
    Case("clusters", 20, 3, discount=0.9999, temperature=0.1, seed=5),
    Case("clusters", 200, 3, discount=0.9999, temperature=0.1, seed=5),
)
BACKENDS: list[BackendName] = ["torch"] if choice.unavailable("cpu") else ["torch", "cpu"]
FORMS = ("dense", "sparse", "tensors")
METHODS: tuple[MethodName, ...] = get_args(MethodName)
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}
OPTIONAL = ("mask", "terminal", "reference")


def of_dtype(case: Case, dtype: torch.dtype) -> DenseMDP:
    mdp = case.mdp()
    return mdp if dtype == case.dtype else mdp.to(dtype)


def solve_as(form: str, mdp: DenseMDP, temperature: float | Tensor, **options: Any) -> Solution:
    """The same problem through one of the three kinds of input."""
    if form == "dense":
        return birl_ext.solve(mdp, temperature=temperature, **options)
    if form == "sparse":
        return birl_ext.solve(mdp.to_sparse(), temperature=temperature, **options)
    return birl_ext.solve(
        mdp.reward,
        mdp.transition,
        discount=mdp.discount,
        temperature=temperature,
        **{name: getattr(mdp, name) for name in OPTIONAL},
        **options,
    )


def as_form(form: str, mdp: DenseMDP) -> tuple[DenseMDP | SparseMDP | None, dict[str, Any]]:
    """What stands for the MDP in `bellman`, `evaluate` and `occupancy`."""
    if form == "tensors":
        return None, {"discount": mdp.discount, "terminal": mdp.terminal}
    return (mdp.to_sparse() if form == "sparse" else mdp), {}


def stretched(values: Tensor, event: int) -> Tensor:
    """A (*B) tensor with `event` axes of size one appended."""
    return values.reshape(*values.shape, *(1,) * event)


def assert_solves(got: Solution, want: float64.Oracle, case: Case, dtype: torch.dtype) -> None:
    """Within the certified bounds, which are themselves small, and consistent with each other."""
    assert got.value.dtype == got.policy.dtype == dtype
    assert (got.status == Status.CONVERGED).all(), got.status
    unit = EPS[dtype]
    slack = 1e-13 * (1 + np.abs(want.value).max()) / (1 - case.discount)  # of the oracle
    bound = got.error_bound + slack
    label = f"{case} {dtype}"
    assert_close(got.value, want.value, bound=stretched(bound, 1), label=f"{label} value")
    on_q = stretched(bound, 2) + unit * np.abs(want.value).max() + unit
    assert_close(got.q, want.q, bound=on_q, label=f"{label} q")
    on_log = got.log_policy_error_bound + 4 * slack / case.temperature + 1e-12
    assert_close(
        got.log_policy, want.log_policy, bound=stretched(on_log, 2), label=f"{label} log_policy"
    )
    on_policy = stretched(on_log.exp() - 1, 2) + unit
    assert_close(got.policy, want.policy, bound=on_policy, label=f"{label} policy")
    available = np.isfinite(want.q)
    advantage = np.where(available, np.where(available, want.q, 0.0) - want.value[..., None], 0.0)
    assert_close(got.advantage, advantage, bound=on_q + stretched(bound, 2), label="advantage")
    assert_close(
        got.policy.double().sum(-1),
        np.ones(got.value.shape),
        bound=4 * unit,
        label=f"{label}: π sums to one",
    )
    # what rounding explains, and no more: an infinite bound would pass all of the above
    q = np.where(available, want.q, want.value[..., None])
    level = max(1.0, np.abs(q).max())
    span = (q.max((-2, -1)) - q.min((-2, -1))).max(initial=0.0) + 4 * case.temperature + 1
    loss = (120 + case.states / 2) * EPS[torch.float64]
    floor = loss * (span / (1 - case.discount) + level) + 2 * unit * level
    assert (got.error_bound <= floor).all(), (label, got.error_bound, floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=["f32", "f64"])
@pytest.mark.parametrize("case", SMALL + WARP + LARGE, ids=str)
def test_solve_equals_the_oracle(
    case: Case, dtype: torch.dtype, form: str, backend: BackendName
) -> None:
    mdp = of_dtype(case, dtype)
    got = solve_as(form, mdp, case.temperature, backend=backend)
    assert_solves(got, oracle(mdp, case.temperature), case, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_every_method_finds_the_same_solution(
    case: Case, form: str, method: MethodName, backend: BackendName
) -> None:
    mdp = case.mdp()
    got = solve_as(form, mdp, case.temperature, method=method, backend=backend)
    assert_solves(got, oracle(mdp, case.temperature), case, case.dtype)


@pytest.mark.parametrize("method", ["auto", "newton", "newton-krylov", "policy-iteration"])
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("case", "backend"), [(c, b) for c in SLOW for b in BACKENDS if c.states < 99 or b == "cpu"]
)
def test_what_takes_value_iteration_thousands_of_passes(
    case: Case, form: str, method: MethodName, backend: BackendName
) -> None:
    """Its 14,000: the halves hardly mix."""
    mdp = case.mdp()
    got = solve_as(form, mdp, case.temperature, method=method, backend=backend)
    assert_solves(got, oracle(mdp, case.temperature), case, case.dtype)
    if method == "auto":
        assert got.iterations <= 150


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["auto", "newton", "newton-krylov", "policy-iteration"])
@pytest.mark.parametrize("temperature", [1.0, 1e-2, 1e-3])
def test_news_travels_one_state_per_sweep(
    temperature: float, method: MethodName, backend: BackendName
) -> None:
    """River swim: it needs many Newton steps, and their residual is not monotone."""
    states = 65
    here = torch.arange(states)
    down, up = (here - 1).clamp(min=0), (here + 1).clamp(max=states - 1)
    transition = torch.zeros(states, 2, states, dtype=torch.float64)
    transition[here, 0, down] = 1
    for there, chance in ((down, 0.1), (here, 0.55), (up, 0.35)):
        transition[here, 1, there] += chance
    reward = torch.zeros(states, 2, dtype=torch.float64)
    reward[0, 0], reward[-1, 1] = 0.005, 1.0
    case = Case(states=states, actions=2, discount=0.999, temperature=temperature)
    mdp = DenseMDP(reward, transition, case.discount)
    got = solve_as("dense", mdp, temperature, method=method, backend=backend)
    assert_solves(got, oracle(mdp, temperature), case, case.dtype)


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_tolerance_is_met_and_not_overdone(
    method: MethodName, backend: BackendName, tol: float
) -> None:
    """The certified error is below tol·max(‖V‖, τ), the true one below the certified one."""
    case = Case("garnet", 12, 3, batch=(5,), discount=0.95, temperature=0.2, seed=3)
    mdp = case.mdp()
    got = solve_as("dense", mdp, case.temperature, method=method, backend=backend, tol=tol)
    want = oracle(mdp, case.temperature)
    size = np.maximum(np.abs(want.value).max(-1), case.temperature)
    assert (got.error_bound.numpy() <= tol * size * (1 + tol)).all()
    assert_close(got.value, want.value, bound=stretched(got.error_bound, 1), label=(method, tol))
    exact = solve_as("dense", mdp, case.temperature, method=method, backend=backend)
    assert (got.iterations <= exact.iterations).all()
    if tol == 1e-2:
        assert (got.iterations < exact.iterations).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("states", [6, 200])
@pytest.mark.parametrize("far", [1e6, -1e6])
def test_a_tolerance_is_that_of_the_value_handed_out(
    states: int, method: MethodName, backend: BackendName, far: float
) -> None:
    """Not that of a start far above or below it."""
    random = torch.Generator().manual_seed(0)
    transition = torch.rand(states, 3, states, dtype=torch.float64, generator=random).softmax(-1)
    reward = torch.rand(states, 3, dtype=torch.float64, generator=random)
    start = torch.full((states,), far, dtype=torch.float64)
    got = birl_ext.solve(
        reward,
        transition,
        discount=0.9,
        temperature=0.1,
        method=method,
        backend=backend,
        tol=1e-4,
        initial=start,
    )
    assert got.error_bound <= 1e-4 * max(got.value.abs().max(), reward.abs().max())


@pytest.mark.skipif("cpu" not in BACKENDS, reason="PyTorch starts at zero")
@pytest.mark.parametrize("states", [6, 200])
def test_the_first_guess_is_no_pass(states: int) -> None:
    """T0 reads nothing of P: after one pass the value is T(T0) and a constant."""
    random = torch.Generator().manual_seed(1)
    transition = torch.rand(states, 3, states, dtype=torch.float64, generator=random) ** 8
    transition /= transition.sum(-1, keepdim=True)
    reward = torch.rand(states, 3, dtype=torch.float64, generator=random)
    model: dict[str, Any] = {"discount": 0.99, "temperature": 0.1, "backend": "cpu"}
    got = birl_ext.solve(
        reward,
        transition,
        **model,
        method="value-iteration",
        max_iterations=1,
        on_fail="status",
    )
    want = torch.zeros(states, dtype=torch.float64)
    for _ in range(2):
        want = birl_ext.bellman(want, reward, transition, **model)[0]
    apart = got.value - want
    assert int(got.iterations) == 1
    assert apart.max() - apart.min() <= 1e-12 * got.value.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("states", [6, 150])
def test_what_drowns_in_a_start_far_off_has_not_converged(
    states: int, sparse: bool, backend: BackendName
) -> None:
    """After a pass δ is below rounding, that of the start: value iteration goes on all the same, in
    as many passes as from zero and one.
    """
    case = Case(states=states, actions=2).mdp()
    reward = case.reward.clone()
    reward[0, 1] = -1e18  # never taken; V* might be as large
    mdp: Any = case.replace(reward=reward)
    mdp = mdp.to_sparse() if sparse else mdp

    def found(**options: Any) -> Solution:
        return birl_ext.solve(
            mdp, temperature=0.1, method="value-iteration", backend=backend, **options
        )

    near, far = found(), found(initial=torch.full((states,), 1e17, dtype=torch.float64))
    assert near.iterations <= far.iterations <= near.iterations + 2
    assert_close(far.value, near.value, bound=2 * near.error_bound, label="value")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=["f32", "f64"])
@pytest.mark.parametrize("case", SMALL + WARP + LARGE, ids=str)
def test_bellman_equals_the_oracle(
    case: Case, dtype: torch.dtype, form: str, backend: BackendName
) -> None:
    mdp = of_dtype(case, dtype)
    value = torch.randn(*mdp.batch_shape, case.states, dtype=dtype)
    instead, extras = as_form(form, mdp)
    if instead is None:
        extras |= {"mask": mdp.mask, "reference": mdp.reference}
        inputs: tuple[Any, ...] = (mdp.reward, mdp.transition)
    else:
        inputs = (instead,)
    got = birl_ext.bellman(value, *inputs, temperature=case.temperature, backend=backend, **extras)
    answers = [
        float64.bellman(value[index].numpy(), **arguments)
        for index, arguments in problems(mdp, case.temperature)
    ]
    want = [
        np.reshape(part, (*mdp.batch_shape, *part[0].shape)) for part in zip(*answers, strict=True)
    ]
    bound = 20 * EPS[dtype] * (1 + np.abs(want[0]).max())
    for name, ours, theirs, most in (
        ("TV", got[0], want[0], bound),
        ("Q", got[1], want[1], bound),
        ("π", got[2], want[2], bound / case.temperature),
    ):
        assert ours.dtype == dtype
        assert_close(ours, theirs, bound=most, label=f"{case} {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=["f32", "f64"])
@pytest.mark.parametrize("case", SMALL + WARP + LARGE, ids=str)
def test_evaluate_and_occupancy_equal_the_oracle(
    case: Case, dtype: torch.dtype, form: str, backend: BackendName
) -> None:
    mdp = of_dtype(case, dtype)
    policy = birl_ext.solve(mdp, temperature=case.temperature).policy
    gain = torch.randn(*mdp.batch_shape, case.states, case.actions, dtype=dtype)
    start = mdp.initial_distribution
    assert start is not None
    instead, extras = as_form(form, mdp)
    if instead is None:  # rows that the policy never takes must still be probabilities
        unused = mdp.transition.sum(-1, keepdim=True) == 0
        transition = mdp.transition.masked_fill(unused, 1 / case.states)
        value = birl_ext.evaluate(policy, gain, transition, backend=backend, **extras)
        visits = birl_ext.occupancy(
            policy, transition, initial_distribution=start, backend=backend, **extras
        )
    else:
        value = birl_ext.evaluate(policy, instead.replace(reward=gain), backend=backend)
        visits = birl_ext.occupancy(policy, instead, backend=backend)
    masked = instead.replace(reward=gain).reward if instead is not None else gain
    values, shares = [], []
    for index, arguments in problems(mdp, case.temperature):
        shared = {name: arguments[name] for name in ("transition", "discount", "terminal")}
        pi = policy[index].double().numpy()
        values.append(float64.evaluate(pi, reward=masked[index].numpy(), **shared))
        # the oracle starts where the MDP does
        shares.append(float64.occupancy(pi, initial_distribution=start.numpy(), **shared))
    shape = (*mdp.batch_shape, case.states)
    # inputs are used as they are; only the answer is rounded to the dtype
    bound = 4 * EPS[dtype] / (1 - case.discount) if dtype == torch.float64 else 1e-6
    scale = 1 + np.abs(values).max()
    assert_close(
        value, np.reshape(values, shape), bound=4 * bound * scale, label=f"{case} evaluate"
    )
    assert_close(visits, np.reshape(shares, shape), bound=4 * bound, label=f"{case} occupancy")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("transition_batch", "reward_batch", "discount_batch", "temperature_batch"),
    [
        ((), (4, 7), (), ()),
        ((4, 1), (4, 7), (), ()),
        ((7,), (4, 7), (4, 1), (7,)),
        ((4, 7), (), (7,), (4, 1)),
        ((3, 1, 2), (5, 1), (3, 1, 1), (2,)),
        ((), (), (3,), ()),
        ((1,), (1,), (), (3,)),
        ((0,), (0,), (), ()),
    ],
    ids=str,
)
def test_batch_axes_broadcast(
    transition_batch: tuple[int, ...],
    reward_batch: tuple[int, ...],
    discount_batch: tuple[int, ...],
    temperature_batch: tuple[int, ...],
    backend: BackendName,
) -> None:
    """Each problem of a broadcast batch has the answer that it has alone."""
    states, actions = 4, 3
    transition = torch.softmax(
        torch.randn(*transition_batch, states, actions, states, dtype=torch.float64), -1
    )
    reward = torch.randn(*reward_batch, states, actions, dtype=torch.float64)
    discount = 0.5 + 0.45 * torch.rand(discount_batch, dtype=torch.float64)
    temperature = 0.1 + torch.rand(temperature_batch, dtype=torch.float64)
    batch = torch.broadcast_shapes(
        transition_batch, reward_batch, discount_batch, temperature_batch
    )
    got = birl_ext.solve(
        reward, transition, discount=discount, temperature=temperature, backend=backend
    )
    assert got.value.shape == (*batch, states)
    assert got.q.shape == got.policy.shape == (*batch, states, actions)
    assert got.error_bound.shape == got.status.shape == got.iterations.shape == batch
    expanded = {
        "reward": reward.expand(*batch, states, actions),
        "transition": transition.expand(*batch, states, actions, states),
        "discount": discount.expand(batch),
        "temperature": temperature.expand(batch),
    }
    for index in np.ndindex(*batch):
        own: dict[str, Any] = {name: tensor[index].numpy() for name, tensor in expanded.items()}
        alone = float64.solve(**own)
        for name in ("value", "q", "policy", "log_policy"):
            assert_close(
                getattr(got, name)[index],
                getattr(alone, name),
                bound=1e-11,
                label=f"{name} of problem {index}",
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_axes_broadcast_in_bellman_evaluate_and_occupancy(backend: BackendName) -> None:
    states, actions, batch = 4, 3, (4, 7)
    transition = torch.softmax(
        torch.randn(7, states, actions, states, dtype=torch.float64), -1
    )  # behind the 4 of the policies
    reward = torch.randn(4, 1, states, actions, dtype=torch.float64)
    policy = torch.softmax(torch.randn(*batch, states, actions, dtype=torch.float64), -1)
    start = torch.softmax(torch.randn(7, states, dtype=torch.float64), -1)
    value = torch.randn(4, 1, states, dtype=torch.float64)
    shared: dict[str, Any] = {"discount": 0.9, "backend": backend}
    image, _, choice = birl_ext.bellman(value, reward, transition, temperature=0.3, **shared)
    gained = birl_ext.evaluate(policy, reward, transition, **shared)
    visits = birl_ext.occupancy(policy, transition, initial_distribution=start, **shared)
    assert image.shape == gained.shape == visits.shape == (*batch, states)
    for i, j in np.ndindex(*batch):
        model = transition[j].numpy()
        one = float64.bellman(
            value[i, 0].numpy(), reward[i, 0].numpy(), model, discount=0.9, temperature=0.3
        )
        pi = policy[i, j].numpy()
        assert_close(image[i, j], one.value, bound=1e-13, label=f"TV {i, j}")
        assert_close(choice[i, j], one.policy, bound=1e-13, label=f"π {i, j}")
        alone = float64.evaluate(pi, reward[i, 0].numpy(), model, discount=0.9)
        assert_close(gained[i, j], alone, bound=1e-12, label=f"J {i, j}")
        share = float64.occupancy(pi, model, discount=0.9, initial_distribution=start[j].numpy())
        assert_close(visits[i, j], share, bound=1e-13, label=f"d {i, j}")


def test_batched_masks_terminals_and_references_broadcast() -> None:
    """A mask (7,), a terminal (4, 1) and a reference (4, 7) over one shared transition."""
    states, actions = 4, 3
    transition = torch.softmax(torch.randn(states, actions, states, dtype=torch.float64), -1)
    reward = torch.randn(4, 1, states, actions, dtype=torch.float64)
    mask = torch.rand(7, states, actions) < 0.7
    mask[..., 0] = True
    terminal = torch.rand(4, 1, states) < 0.3
    reference = 0.1 + torch.rand(4, 7, states, actions, dtype=torch.float64)
    mdp = DenseMDP(
        reward, transition, 0.9, mask=mask, terminal=terminal, reference=reference
    )  # fmt: skip
    want = oracle(mdp, 0.3)
    for form in FORMS:
        got = solve_as(form, mdp, 0.3)
        assert_close(got.value, want.value, bound=1e-11, label=f"{form} value")
        assert_close(got.policy, want.policy, bound=1e-11, label=f"{form} policy")


@functools.lru_cache(maxsize=256)
def exact_answers(case: Case) -> list[tuple[tuple[int, ...], exact.Rounded]]:
    return [
        (index, exact.solve(exact.Model.of(**arguments)).floats())
        for index, arguments in problems(case.mdp(), case.temperature)
    ]


def assert_certified(got: Solution, case: Case, label: object) -> None:
    """The bounds hold against 512 bits, with no slack but the rounding of the comparison."""
    for index, want in exact_answers(case):
        ulp = 2.3e-16 * np.abs(want.value).max()
        bound = float(got.error_bound[index]) + ulp
        assert_close(got.value[index], want.value, bound=bound, label=f"{label} value {index}")
        log_bound = float(got.log_policy_error_bound[index])
        logs = np.where(np.isfinite(want.log_policy), want.log_policy, 0.0)
        assert_close(
            got.log_policy[index],
            want.log_policy,
            bound=log_bound + 2.3e-16 * np.abs(logs).max(),
            label=f"{label} log_policy {index}",
        )


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_the_certificate_is_never_below_the_true_error(
    case: Case, method: MethodName, backend: BackendName
) -> None:
    """At the end, at a tolerance, and along the way."""
    mdp = case.mdp()
    ways: list[dict[str, Any]] = [{}, {"tol": 1e-3}]
    for options in (*ways, *({"max_iterations": n} for n in (1, 2, 3, 5, 8))):
        for form in ("dense", "sparse")[: 1 + (case in LARGE)]:
            options = {"on_fail": "status", **options, "method": method, "backend": backend}
            got = solve_as(form, mdp, case.temperature, **options)
            assert_certified(got, case, f"{case} {form} {options}")
            assert (got.iterations <= options.get("max_iterations", torch.inf)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_certificate_holds_on_random_problems(backend: BackendName) -> None:
    @given(cases())
    def holds(case: Case) -> None:
        mdp = case.mdp()
        got = birl_ext.solve(mdp, temperature=case.temperature, backend=backend)
        assert_certified(got, case, case)
        sparse = birl_ext.solve(mdp.to_sparse(), temperature=case.temperature, backend=backend)
        assert_certified(sparse, case, f"{case} sparse")

    holds()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "garnet"])
def test_float32_tells_the_truth_at_a_discount_near_one(kind: str, backend: BackendName) -> None:
    """γ = .9999, τ = 1e-3: float32 data, float64 answers, gradients too, and an honest bound."""
    case = Case(
        kind, 32, 8, batch=(6,), discount=0.9999, temperature=1e-3, dtype=torch.float32, seed=7
    )
    single = case.mdp()
    double = single.to(torch.float64)  # divides every row by its sum, as the solver reads it
    weight = torch.randn(6, 32, 8, dtype=torch.float64)
    policies, gradients = [], []
    for mdp in (single, double):
        reward = mdp.reward.clone().requires_grad_()
        got = birl_ext.solve(
            reward,
            mdp.transition,
            discount=case.discount,
            temperature=case.temperature,
            backend=backend,
        )
        objective = (weight * got.policy.double()).sum() + got.value.double().mean()
        (gradient,) = torch.autograd.grad(objective, reward)
        policies.append(got.policy.double().detach())
        gradients.append(gradient.double())
        if mdp is single:
            bound = got.error_bound
            value = got.value.detach()
        else:
            # half the spacing of float32 is the least that its bound can be
            true_error = (value.double() - got.value).abs().amax(-1)
            assert (true_error <= bound).all(), (true_error / bound).max()
            assert (bound <= 1e-6 * got.value.abs().amax(-1)).all()
    assert_close(policies[0], policies[1], bound=1e-6, label="policy")
    error = (gradients[0] - gradients[1]).flatten(1).norm(dim=1)
    assert (error <= 1e-6 * gradients[1].flatten(1).norm(dim=1)).all(), error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("states", [4, 150])
@pytest.mark.parametrize(
    ("rewards", "discount"),
    [((1e37, 1e37), 0.99), ((-1.6e38, -3e38), 0.5)],
    ids=["value", "q of one action"],
)
def test_what_float32_cannot_hold_is_an_overflow(
    rewards: tuple[float, float], discount: float, states: int, backend: BackendName
) -> None:
    """Float64, in which it is computed, can."""
    for dtype, status in ((torch.float32, Status.NON_FINITE), (torch.float64, Status.CONVERGED)):
        transition = torch.full((states, 2, states), 1 / states, dtype=dtype)
        got = birl_ext.solve(
            torch.tensor(rewards, dtype=dtype).expand(states, 2),
            transition,
            discount=discount,
            temperature=1.0,
            backend=backend,
            on_fail="status",
        )
        assert got.status == status, dtype
        if status == Status.CONVERGED:
            assert got.q.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("states", [4, 150])
def test_a_log_policy_that_overflows_has_no_bound(states: int, backend: BackendName) -> None:
    transition = torch.full((states, 2, states), 1 / states)
    reward = torch.tensor([1e30, -1e30]).expand(2, states, 2)
    options: dict[str, Any] = {"discount": 0.9, "temperature": 1e-9, "backend": backend}
    mask = torch.tensor([[True, True], [True, False]])[:, None].expand(2, states, 2)
    got = birl_ext.solve(reward, transition, mask=mask, **options)
    assert (got.log_policy[..., 1] == -torch.inf).all()
    assert got.log_policy_error_bound.isinf().tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_solution_has_the_dtype_of_its_data_and_names_its_kernel(
    dtype: torch.dtype, backend: BackendName
) -> None:
    mdp = Case(states=140, batch=(2,), dtype=dtype).mdp()
    expected = {"torch": {"TORCH"}, "cpu": {"CPU_ROWS", "CPU_CSR"}}[backend]
    found: set[str] = set()
    for one in (mdp, mdp.to_sparse()):
        solution = birl_ext.solve(one, temperature=0.5, backend=backend)
        assert {table.dtype for table in solution[:5]} == {dtype}
        assert solution.info.dtype == solution.error_bound.dtype == torch.float64
        assert len(solution.kernels) == 1
        found.update(solution.kernels)
    assert found == expected


@pytest.mark.skipif(len(BACKENDS) == 1, reason=f"_cpu: {choice.unavailable('cpu')}")
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("case", SMALL + WARP, ids=str)
def test_the_backends_give_the_same_answers(case: Case, form: str) -> None:
    mdp = case.mdp()
    native, plain = (solve_as(form, mdp, case.temperature, backend=b) for b in ("cpu", "torch"))
    bound = stretched(native.error_bound + plain.error_bound, 1)
    assert_close(native.value, plain.value, bound=bound, label=f"{case} value")
    log_bound = native.log_policy_error_bound + plain.log_policy_error_bound
    assert_close(
        native.log_policy, plain.log_policy, bound=stretched(log_bound, 2), label=f"{case} log π"
    )
    assert torch.equal(native.status, plain.status)


def reflecting_walk(states: int, discount: float) -> SparseMDP:
    """A fair walk between two walls that pays at one of them: it mixes in `states`² steps."""
    here = torch.arange(states)
    steps = torch.stack(((here - 1).clamp(min=0), (here + 1).clamp(max=states - 1)), 1)
    reward = torch.zeros(states, 1, dtype=torch.float64)
    reward[0] = 1
    half = torch.full((2 * states,), 0.5, dtype=torch.float64)
    return SparseMDP(reward, half, 2 * torch.arange(states + 1), steps.flatten(), discount)


@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_of_a_slowly_mixing_chain(
    backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products alone do not solve its systems in the passes allowed: they are eliminated."""
    monkeypatch.setattr(pytorch, "DIRECT_STATES", 100)
    walk = reflecting_walk(2000, 0.999999)
    policy = torch.ones(2000, 1, dtype=torch.float64)
    start = torch.full((2000,), 1 / 2000, dtype=torch.float64)
    value = birl_ext.evaluate(policy, walk, backend=backend)
    share = birl_ext.occupancy(policy, walk, initial_distribution=start, backend=backend)
    truth = float64.evaluate(
        policy.numpy(), walk.reward.numpy(), walk.to_dense().transition.numpy(), discount=0.999999
    )
    torch.testing.assert_close(value, torch.as_tensor(truth), rtol=1e-8, atol=0)
    torch.testing.assert_close(share[0] * 1e6, value.mean(), rtol=1e-8, atol=0)


@pytest.mark.skipif(len(BACKENDS) == 1, reason=f"_cpu: {choice.unavailable('cpu')}")
def test_what_the_compiled_code_gave_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how many systems; these are found by their residuals, and eliminated if they fit."""
    mdp = Case(states=6, actions=2, batch=(3,)).mdp()
    policy = torch.full((6, 2), 0.5, dtype=torch.float64)
    right = birl_ext.evaluate(policy, mdp)
    compiled = glue.policy_solve

    def gives_up(*data: Any, **options: Any) -> tuple[Tensor, Tensor, int]:
        x, residual, _ = compiled(*data, **options)
        x.view(3, -1)[1] += 1
        return x, residual, 1

    monkeypatch.setattr(glue, "policy_solve", gives_up)
    torch.testing.assert_close(birl_ext.evaluate(policy, mdp), right, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(pytorch, "RETRY_STATES", 5)
    with pytest.raises(NotConvergedError, match=r"at batch \(1,\)"):
        birl_ext.evaluate(policy, mdp)


@pytest.mark.parametrize("transpose", [False, True])
def test_products_are_corrected(transpose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They solve this one, but for what the recursion loses against the true residual."""
    monkeypatch.setattr(pytorch, "DIRECT_STATES", 100)
    monkeypatch.setattr(pytorch, "RETRY_STATES", 100)
    walk, policy = reflecting_walk(600, 0.999999), torch.ones(600, 1, dtype=torch.float64)
    start = torch.full((600,), 1 / 600, dtype=torch.float64)

    def found(**options: Any) -> Tensor:
        if transpose:
            return birl_ext.occupancy(policy, walk, initial_distribution=start, **options)
        return birl_ext.evaluate(policy, walk, **options)

    torch.testing.assert_close(found(backend="torch"), found(), rtol=1e-8, atol=0)


def test_policy_systems_left_unsolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What neither products nor an elimination solve is an error, and NaN where none can be raised;
    its neighbour in the batch keeps its numbers.
    """
    monkeypatch.setattr(pytorch, "DIRECT_STATES", 100)
    monkeypatch.setattr(pytorch, "RETRY_STATES", 100)
    products = pytorch._bicgstab
    monkeypatch.setattr(pytorch, "_bicgstab", lambda *given: untyped(products)(*given[:4], 60))
    discount = torch.tensor([0.5, 0.999999], dtype=torch.float64)
    walk = reflecting_walk(200, 0.5).replace(discount=discount)
    policy = torch.ones(200, 1, dtype=torch.float64)
    with pytest.raises(NotConvergedError, match=r"not solved: .* at batch \(1,\)"):
        birl_ext.evaluate(policy, walk, backend="torch")

    def value(gamma: Tensor) -> Tensor:
        return birl_ext.evaluate(policy, walk.replace(discount=gamma), backend="torch")

    mapped = torch.func.vmap(value)(discount)
    assert mapped[0].isfinite().all()
    assert mapped[1].isnan().all()
    slope = torch.func.vmap(torch.func.grad(lambda gamma: value(gamma).sum()))(discount)
    assert slope.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_policy_that_is_accepted_leaks_nothing(dtype: torch.dtype) -> None:
    """Rounding of its sum would be magnified by 1/(1 − γ); mapped or not, the answer is one."""
    short = {torch.float32: 8e-6, torch.float64: 8e-9}[dtype]
    transition = torch.full((5, 2, 5), 0.2, dtype=dtype)
    policy = torch.full((5, 2), 0.5 * (1 - short), dtype=dtype)
    paying = torch.ones(5, 2, dtype=dtype)
    start = torch.full((5,), 0.2, dtype=dtype)

    def value(pi: Tensor) -> Tensor:
        return birl_ext.evaluate(pi, paying, transition, discount=0.9999)

    def share(pi: Tensor) -> Tensor:
        options: dict[str, Any] = {"discount": 0.9999, "initial_distribution": start}
        return birl_ext.occupancy(pi, transition, **options)

    bound = 1e-9 if dtype == torch.float64 else 1e-6
    for found in (value(policy), torch.func.vmap(value)(policy[None])[0]):
        assert ((found / 1e4 - 1).abs() <= bound).all()
    for found in (share(policy), torch.func.vmap(share)(policy[None])[0]):
        assert abs(float(found.double().sum()) - 1) <= bound


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_policy_in_half_precision_is_promoted(half: torch.dtype) -> None:
    mdp = Case(states=4, actions=2).mdp()
    policy = torch.full((4, 2), 0.5)
    start = torch.full((4,), 0.25)
    options: dict[str, Any] = {"initial_distribution": start.to(half)}
    assert torch.equal(birl_ext.evaluate(policy.to(half), mdp), birl_ext.evaluate(policy, mdp))
    share = birl_ext.occupancy(policy.to(half), mdp, **options)
    assert torch.equal(share, birl_ext.occupancy(policy, mdp, initial_distribution=start))


def test_any_policy_will_do_where_a_terminal_state_has_no_action() -> None:
    """Nothing is paid there and nothing follows; elsewhere the mask binds."""
    random = torch.Generator().manual_seed(0)
    reward = torch.rand(3, 2, generator=random, dtype=torch.float64)
    rows = torch.rand(3, 2, 3, generator=random, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    terminal = torch.tensor([False, False, True])
    mdp = DenseMDP(reward, rows / rows.sum(-1, keepdim=True), 0.9, mask=mask, terminal=terminal)
    policy = torch.tensor([[0.5, 0.5], [1, 0], [0.5, 0.5]], dtype=torch.float64)
    value = birl_ext.evaluate(policy, mdp)
    assert value[2] == 0
    first = torch.tensor([[0.5, 0.5], [1, 0], [1, 0]], dtype=torch.float64)
    assert torch.equal(value, birl_ext.evaluate(first, mdp))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sweep_keeps_the_digits_of_small_numbers(backend: BackendName) -> None:
    """Q far below τ log A in float32, and V whose states differ in size by twenty orders."""
    reward = torch.tensor([[1e-3, -1e-3]])
    q = birl_ext.bellman(
        torch.zeros(1), reward, torch.ones(1, 2, 1), discount=0.9, temperature=1e3, backend=backend
    )[1]
    torch.testing.assert_close(q, reward, rtol=1e-6, atol=0.0)
    still = torch.eye(3, dtype=torch.float64)[:, None]
    value = torch.tensor([1.0, 2.0, 1e20], dtype=torch.float64)
    image = birl_ext.bellman(
        value,
        torch.zeros(3, 1, dtype=torch.float64),
        still,
        discount=0.5,
        temperature=1.0,
        backend=backend,
    )[0]
    torch.testing.assert_close(image, value / 2, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_that_nobody_checked_is_no_mask(backend: BackendName) -> None:
    found = birl_ext.solve(
        torch.zeros(1, 2, dtype=torch.float64),
        torch.ones(1, 2, 1, dtype=torch.float64),
        discount=0.5,
        temperature=1.0,
        reference=torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        validate="cheap",
        on_fail="status",
        backend=backend,
    )
    assert int(found.status) == Status.NON_FINITE
    assert found.policy.isnan().all()
