"""The compiled CPU kernels against straightforward numpy in extended precision, written here."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from processes import fork

from birl_ext.errors import DeviceError, DtypeError, ShapeError
from birl_ext.ops.backends import loader, native
from birl_ext.ops.request import Data, Settings
from birl_ext.solution import Info, Kernel, Method, Rigour, Status

if loader.reason("cpu") and os.environ.get("BIRL_REQUIRE_EXT") != "1":
    pytest.skip(f"no compiled CPU module: {loader.reason('cpu')}", allow_module_level=True)

EPS = np.finfo(np.float64).eps
SIZES = [1, 2, 31, 32, 33, 65, 130]
STORAGE = [np.float32, np.float64]
NATIVE_KERNELS = (  # dense, sparse
    (Kernel.CPU_LANES, Kernel.CPU_ROWS),
    (Kernel.CPU_LANES, Kernel.CPU_CSR),
)
METHODS = {0: "auto", 1: "value_iteration", 2: "newton", 3: "krylov", 4: "mpi"}


@dataclass
class Case:
    """A batch of N transitions with G problems each; arrays in the kernels' own layout."""

    transition: np.ndarray  # (N, S, A, S)
    reward: np.ndarray  # (N, G, S, A)
    discount: np.ndarray  # (N, G)
    temperature: np.ndarray  # (N, G)
    log_reference: np.ndarray | None = None
    sparse: bool = False

    def tensors(self) -> list[torch.Tensor | None]:
        """transition, crow, col, reward, log_reference, discount, temperature."""
        if self.sparse:
            n, s, a, _ = self.transition.shape
            stored = (self.transition != 0).any(0).reshape(s * a, s)
            crow = np.concatenate(([0], np.cumsum(stored.sum(1)))).astype(np.int64)
            values = self.transition.reshape(n, s * a, s)[:, stored]
            model = [values, crow, np.nonzero(stored)[1].astype(np.int64)]
        else:
            model = [self.transition, None, None]
        arrays = [*model, self.reward, self.log_reference, self.discount, self.temperature]
        return [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]


def make_case(
    seed: int,
    states: int,
    actions: int,
    *,
    storage: type = np.float64,
    discount: float = 0.9,
    temperature: float = 0.1,
    sparse: bool = False,
    transitions: int = 1,
    problems: int = 1,
    successors: int = 4,
    terminal: bool = False,
    masked: bool = False,
) -> Case:
    rng = np.random.default_rng(seed)
    shape = (transitions, states, actions, states)
    transition = np.zeros(shape)
    few = min(successors, states)
    # One pattern for all transitions of a sparse batch.
    order = np.argsort(rng.random((1, *shape[1:]) if sparse else shape), -1)[..., :few]
    order = np.broadcast_to(order, (*shape[:-1], few))
    np.put_along_axis(transition, order, rng.random(order.shape) + 0.01, -1)
    transition /= transition.sum(-1, keepdims=True)
    reward = rng.standard_normal((transitions, problems, states, actions))
    log_reference = None
    if masked:
        log_reference = np.log(rng.dirichlet(np.ones(actions), reward.shape[:-1]))
        hidden = rng.random((states, actions)) < 0.3
        hidden[np.arange(states), rng.integers(actions, size=states)] = False
        log_reference[..., hidden] = -np.inf
        transition[:, hidden] = 0
        reward[..., hidden] = 0
    if terminal:
        transition[:, 0] = 0
    lane = (transitions, problems)
    return Case(
        transition.astype(storage),
        reward.astype(storage),
        np.full(lane, discount) * (1 - 0.01 * rng.random(lane) * (discount < 0.99)),
        np.full(lane, temperature),
        log_reference,
        sparse,
    )


# ---- the mathematics, plainly -------------------------------------------------------------------


def normalised(transition: np.ndarray) -> np.ndarray:
    p = transition.astype(np.longdouble)
    total = p.sum(-1, keepdims=True)
    return p / np.where(total == 0, 1, total)


def bellman(case: Case, n: int, g: int, value: np.ndarray) -> tuple[np.ndarray, ...]:
    """TV, advantage, policy, log policy of one problem."""
    tau = case.temperature[n, g]
    q = case.reward[n, g] + case.discount[n, g] * normalised(case.transition[n]) @ value
    mu = 0.0 if case.log_reference is None else case.log_reference[n, g]
    x = q / tau + mu
    top = x.max(-1, keepdims=True)
    log_policy = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
    image = tau * (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))
    advantage = np.where(np.isneginf(x), 0, q - image)
    return image[:, 0], advantage, np.exp(log_policy), log_policy


def remembered(oracle: Callable[..., Any]) -> Callable[..., Any]:
    """Ask it once: many tests differ in nothing but the method that is put to the question."""
    answers: dict[bytes, Any] = {}

    @functools.wraps(oracle)
    def ask(*question: Any) -> Any:
        key = hashlib.sha256(pickle.dumps(question)).digest()
        if key not in answers:
            answers[key] = oracle(*question)
        return answers[key]

    return ask


def linear_solve(matrix: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Float64 LU with refinement in extended precision."""
    low = matrix.astype(np.float64)
    x = np.linalg.solve(low, b.astype(np.float64)).astype(np.longdouble)
    for _ in range(4):
        x = x + np.linalg.solve(low, (b - matrix @ x).astype(np.float64))
    return x


def policy_system(case: Case, n: int, g: int, policy: np.ndarray) -> np.ndarray:
    states = policy.shape[0]
    p = np.einsum("sa,sat->st", policy.astype(np.longdouble), normalised(case.transition[n]))
    return np.eye(states) - np.longdouble(case.discount[n, g]) * p


@remembered
def fixed_point(case: Case, n: int, g: int) -> tuple[np.ndarray, ...]:
    """V*, advantage, policy, log policy by Newton's method to well below float64 rounding."""
    value = np.zeros(case.reward.shape[2], np.longdouble)
    for _ in range(300):
        image, _, policy, _ = bellman(case, n, g, value)
        step = linear_solve(policy_system(case, n, g, policy), image - value)
        value = value + step
        if np.abs(step).max() <= 1e-17 * np.abs(value).max():
            break
    return value, *bellman(case, n, g, value)[1:]


# ---- calling the kernels ------------------------------------------------------------------------


@dataclass
class Solved:
    value: np.ndarray
    q: np.ndarray
    advantage: np.ndarray
    policy: np.ndarray
    log_policy: np.ndarray
    info: np.ndarray
    status: np.ndarray
    relative: np.ndarray
    raw: list[bytes]


def compiled_solve(*given: torch.Tensor | None, **options: float) -> tuple[torch.Tensor, ...]:
    """transition, crow, col, reward, log_reference, discount, temperature and a start."""
    data, initial = Data(*given[:7]), given[7]
    return native.solve(data, initial, Settings(data.reward.shape[:2], **options))


def run_solve(case: Case, *, initial: np.ndarray | None = None, **options: object) -> Solved:
    first = None if initial is None else torch.from_numpy(initial)
    outputs = compiled_solve(*case.tensors(), first, **options)
    raw = [x.numpy().tobytes() for x in outputs]
    return Solved(*(x.numpy() for x in outputs), raw=raw)


def run_policy_solve(
    case: Case, policy: np.ndarray, rhs: np.ndarray, **options: object
) -> tuple[np.ndarray, np.ndarray, int]:
    transition, crow, col, _, _, discount, _ = case.tensors()
    x, residual, failed = native.policy_solve(
        (transition, crow, col),
        torch.from_numpy(policy),
        discount,
        torch.from_numpy(rhs),
        **options,
    )
    return x.numpy(), residual.numpy(), failed


def assert_close(found: np.ndarray, truth: np.ndarray, bound: float, what: str) -> None:
    if found.dtype == np.float32:  # and then rounded once
        bound += float(np.finfo(np.float32).eps) / 2 * np.abs(truth[np.isfinite(truth)]).max()
    with np.errstate(invalid="ignore"):  # both −inf behind a mask
        error = np.where(found == truth, 0, np.abs(found - truth))
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    assert error[worst] <= bound, (
        f"{what}[{worst}]: {found[worst]!r}, expected {truth[worst]!r}, bound {bound:.3g}"
    )


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extras", ["plain", "terminal", "masked", "both"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("storage", STORAGE, ids=["float32", "float64"])
@pytest.mark.parametrize("actions", [1, 3])
@pytest.mark.parametrize("states", SIZES)
def test_sweep(states: int, actions: int, storage: type, sparse: bool, extras: str) -> None:
    case = make_case(
        states, states, actions, storage=storage, sparse=sparse, transitions=2, problems=2,
        terminal=extras in ("terminal", "both"), masked=extras in ("masked", "both"),
    )  # fmt: skip
    value = np.random.default_rng(1).standard_normal(case.reward.shape[:-1]) + 50.0
    image, _, *pairs = compiled_solve(
        *case.tensors(), torch.from_numpy(value), method=Method.SWEEP, max_iterations=1, validate=0
    )
    for n in range(2):
        for g in range(2):
            truth = bellman(case, n, g, value[n, g])
            found = [image[n, g].numpy(), *(x[n, g].numpy() for x in pairs[:3])]
            bound = 64 * EPS * 60
            for name, x, t, scale in zip(
                ("value", "advantage", "policy", "log_policy"), found, truth, (1, 1, 10, 10),
                strict=True,
            ):  # fmt: skip
                assert_close(x, t, bound * scale, f"{name}[{n},{g}]")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("storage", STORAGE, ids=["float32", "float64"])
@pytest.mark.parametrize("actions", [1, 3])
@pytest.mark.parametrize("states", SIZES)
def test_solve_over_discounts_and_temperatures(
    states: int, actions: int, storage: type, sparse: bool
) -> None:
    for discount in (0.0, 0.9, 0.9999):
        for temperature in (1e-3, 0.1, 10.0):
            case = make_case(
                7, states, actions, storage=storage, sparse=sparse,
                discount=discount, temperature=temperature,
            )  # fmt: skip
            check_solution(case, run_solve(case), f"discount {discount}, temperature {temperature}")


@pytest.mark.parametrize("extras", ["plain", "terminal", "masked", "both"])
@pytest.mark.parametrize("method", METHODS, ids=list(METHODS.values()))
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("states", [5, 33, 130])
def test_every_method(states: int, sparse: bool, method: int, extras: str) -> None:
    case = make_case(
        11, states, 3, sparse=sparse, discount=0.99, transitions=2, problems=2,
        terminal=extras in ("terminal", "both"), masked=extras in ("masked", "both"),
    )  # fmt: skip
    check_solution(case, run_solve(case, method=method), METHODS[method])
    loose = run_solve(case, method=method, tol=1e-4)
    check_solution(case, loose, f"{METHODS[method]} at 1e-4", tol=1e-4)


def check_solution(case: Case, found: Solved, what: str, tol: float = 0.0) -> None:
    lanes = [(n, g) for n in range(case.reward.shape[0]) for g in range(case.reward.shape[1])]
    for lane in lanes:
        where = f"{what}, problem {lane}"
        assert found.status[lane] == Status.CONVERGED, f"{where}: status {found.status[lane]}"
        # how the transition is stored changes nothing
        value, advantage, policy, log_policy = fixed_point(replace(case, sparse=False), *lane)
        bound = found.info[lane][1]
        assert_close(found.value[lane], value, bound, f"{where}: value")
        size = max(np.abs(value).max(), np.abs(case.reward[lane]).max())
        gamma, tau = case.discount[lane], case.temperature[lane]
        if tol:
            assert bound <= tol * size, f"{where}: bound {bound:.3g} above {tol} of {size:.3g}"
        else:
            span = np.ptp(value) + np.abs(case.reward[lane]).max() + 4 * tau
            longest = int((case.transition[lane[0]] != 0).sum(-1).max())
            floor = (120 + longest / 2) * EPS * (span + (1 - gamma) * size) / (1 - gamma)
            assert bound <= floor, f"{where}: bound {bound:.3g} above the floor {floor:.3g}"
        # (M7): the policy is as good as the value, twice and over the temperature. On the way to
        # convergence only the span of the error counts, and that is far below the bound.
        slack = 4 * bound
        assert_close(found.advantage[lane], advantage, slack, f"{where}: advantage")
        assert_close(
            found.log_policy[lane], log_policy, slack / tau + 1e-12, f"{where}: log_policy"
        )
        assert_close(found.policy[lane], policy, slack / tau + 1e-12, f"{where}: policy")
        total = found.policy[lane].sum(-1, dtype=np.float64).astype(found.policy.dtype)
        assert_close(total, np.ones_like(total), 4 * EPS, f"{where}: sum of the policy")
        assert found.info[lane][Info.KERNEL] in NATIVE_KERNELS[case.sparse]


def test_float32_storage_keeps_its_policy_near_discount_one() -> None:
    """Plain float32 value iteration has a policy that is wrong by a tenth here."""
    case = make_case(
        3, 32, 4, storage=np.float32, discount=0.9999, temperature=1e-3, successors=32
    )  # fmt: skip
    found, truth = run_solve(case), fixed_point(case, 0, 0)
    assert_close(found.policy[0, 0], truth[2], 1e-9, "policy")
    assert_close(found.q[0, 0], truth[0][:, None] + truth[1], 1e-9, "q")
    assert_close(found.value[0, 0], truth[0], 1e-11 * np.abs(truth[0]).max(), "value")


def two_clusters(states: int, actions: int, leak: float, discount: float) -> Case:
    """Two halves that exchange `leak` of their mass: the slowest mode is close to the discount."""
    rng = np.random.default_rng(5)
    half = states // 2
    transition = rng.random((1, states, actions, states))
    same = np.arange(states)[:, None] // half == np.arange(states)[None] // half
    for block, mass in ((same, 1 - leak), (~same, leak)):
        part = transition * block[None, :, None]
        part *= mass / part.sum(-1, keepdims=True)
        transition = np.where(block[None, :, None], part, transition)
    reward = rng.standard_normal((1, 1, states, actions))
    return Case(transition, reward, np.full((1, 1), discount), np.full((1, 1), 0.1))


@pytest.mark.parametrize("method", [0, 2, 3, 4], ids=["auto", "newton", "krylov", "mpi"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("states", [20, 200])
def test_slow_mixing(states: int, sparse: bool, method: int) -> None:
    case = replace(two_clusters(states, 3, 1e-4, 0.9999), sparse=sparse)
    found = run_solve(case, method=method)
    check_solution(case, found, METHODS[method])
    if method == 0:
        assert found.info[0, 0, 2] <= 100, "value iteration would need thousands of passes"


def test_chain_needs_many_newton_steps_and_gets_them() -> None:
    """River swim: news travels one state per sweep, and Newton's residual is not monotone."""
    states = 65
    transition = np.zeros((1, states, 2, states))
    for s in range(states):
        transition[0, s, 0, max(s - 1, 0)] = 1
        for t, p in ((max(s - 1, 0), 0.1), (s, 0.55), (min(s + 1, states - 1), 0.35)):
            transition[0, s, 1, t] += p
    reward = np.zeros((1, 1, states, 2))
    reward[..., 0, 0], reward[..., -1, 1] = 0.005, 1.0
    for temperature in (1.0, 1e-2, 1e-3):
        case = Case(transition, reward, np.full((1, 1), 0.999), np.full((1, 1), temperature))
        for method in (0, 2, 3, 4):
            check_solution(case, run_solve(case, method=method), f"{temperature} {METHODS[method]}")


def deterministic(seed: int, states: int, temperature: float, discount: float) -> Case:
    """Several closed classes, each with a gain of its own: values differ by 1/(1 − γ)."""
    random = np.random.default_rng(seed)
    transition = np.zeros((1, states, 3, states))
    np.put_along_axis(transition, random.integers(0, states, (1, states, 3, 1)), 1.0, -1)
    reward = random.random((1, 1, states, 3))
    return Case(transition, reward, np.full((1, 1), discount), np.full((1, 1), temperature))


@pytest.mark.parametrize(
    ("states", "method"), [(10, 0), (10, 2), (150, 2)], ids=["auto", "newton", "general newton"]
)
@pytest.mark.parametrize("discount", [1 - 1e-9, 1 - 1e-12])
def test_newton_does_not_go_in_circles_near_discount_one(
    discount: float, states: int, method: int
) -> None:
    for seed in range(20):
        case = deterministic(seed, states, 1e-4, discount)
        found = run_solve(case, method=method, max_iterations=100)
        assert found.status[0, 0] == Status.CONVERGED, seed
        assert found.info[0, 0, 0] <= 1e-6, "the residual, where values differ by up to 1e12"


@pytest.mark.parametrize("pairs", [1, 75], ids=["lanes", "general"])
def test_newton_that_goes_in_circles_ends(pairs: int) -> None:
    """With negative probabilities, which nothing checks here, it may, and sweeps take forever."""
    one = np.array([[[-2.0, 3.0], [4.0, -3.0]], [[-3.0, 4.0], [-1.0, 2.0]]])
    transition = np.zeros((pairs, 2, 2, pairs, 2))
    for i in range(pairs):
        transition[i, :, :, i] = one
    reward = np.tile([[0.0, 2.0], [-2.0, 0.0]], (pairs, 1))
    case = Case(
        transition.reshape(1, 2 * pairs, 2, 2 * pairs),
        reward[None, None],
        np.full((1, 1), 1 - 1e-9),
        np.full((1, 1), 0.01),
    )
    found = run_solve(case, method=2, validate=Rigour.OFF)
    assert found.status[0, 0] == Status.MAX_ITERATIONS
    assert found.info[0, 0, Info.PASSES] == 1000


@pytest.mark.parametrize(("states", "discount"), [(2, 0.9999), (3, 0.9999), (150, 0.999)])
def test_value_iteration_ends_on_a_cycle(states: int, discount: float) -> None:
    """Its rounding errors add up along the cycle, since each comes around undamped."""
    transition = np.roll(np.eye(states), 1, 1)[None, :, None]
    reward = np.random.default_rng(1).random((1, 1, states, 1))
    case = Case(transition, reward, np.full((1, 1), discount), np.full((1, 1), 0.1))
    found = run_solve(case, method=1)
    assert found.status[0, 0] == Status.CONVERGED
    truth = fixed_point(case, 0, 0)[0]
    bound = found.info[0, 0, Info.ERROR_BOUND]
    assert bound <= 1e-6
    assert_close(found.value[0, 0], truth, bound, "value")


# ---- linear systems -----------------------------------------------------------------------------


@pytest.mark.parametrize("extras", ["plain", "terminal", "masked"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("storage", STORAGE, ids=["float32", "float64"])
@pytest.mark.parametrize("method", [0, 2, 3, 5], ids=["auto", "direct", "krylov", "richardson"])
@pytest.mark.parametrize("states", [1, 2, 33, 130, 300])
def test_policy_solve(states: int, method: int, storage: type, sparse: bool, extras: str) -> None:
    slow = method == 5 and extras == "terminal" and states == 300  # 400 000 products
    for discount in (0.0, 0.9) if slow else (0.0, 0.9, 0.9999):
        case = make_case(
            states, states, 3, storage=storage, sparse=sparse, discount=discount, problems=2,
            terminal=extras == "terminal", masked=extras == "masked",
        )  # fmt: skip
        rng = np.random.default_rng(2)
        policy = rng.dirichlet(np.ones(3), case.reward.shape[:-1])
        if case.log_reference is not None:
            policy = np.where(np.isneginf(case.log_reference), 0, policy)
            policy /= policy.sum(-1, keepdims=True)
        rhs = rng.standard_normal((1, 2, 3, states))
        rhs[:, :, 1] = np.abs(rhs[:, :, 1])
        rhs[:, :, 2] = 0
        for transpose in (False, True):
            matrices = [policy_system(case, 0, g, policy[0, g]) for g in range(2)]
            matrices = [matrix.T if transpose else matrix for matrix in matrices]
            truths = [linear_solve(matrix, rhs[0, g, :2].T).T for g, matrix in enumerate(matrices)]
            order = 1 if transpose else np.inf
            for tol in (0.0, 1e-6):
                found, residual, failed = run_policy_solve(
                    case, policy, rhs, transpose=transpose, method=method, tol=tol
                )
                assert failed == 0
                assert (found[:, :, 2] == 0).all()
                for g, matrix in enumerate(matrices):
                    for k, truth in enumerate(truths[g]):
                        size = np.linalg.norm(rhs[0, g, k], order)
                        where = f"discount {discount}, transpose {transpose}, tol {tol}, {g}, {k}"
                        error = np.linalg.norm(np.float64(found[0, g, k] - truth), order)
                        rounding = 40 * EPS * (np.linalg.norm(np.float64(truth), order) + size)
                        allowed = max(tol * size, rounding) / (1 - discount)
                        assert error <= allowed, f"{where}: error {error:.3g} > {allowed:.3g}"
                        honest = np.linalg.norm(
                            np.float64(rhs[0, g, k] - matrix @ found[0, g, k]), order
                        )
                        assert abs(residual[0, g, k] - honest) <= rounding, f"{where}: residual"


def test_direct_occupancy_is_non_negative_to_full_relative_accuracy() -> None:
    """Nothing is subtracted: also components far below the largest one have all their digits."""
    states = 60
    transition = np.zeros((1, states, 1, states))
    for s in range(states):
        transition[0, s, 0, 0] = 0.9
        transition[0, s, 0, min(s + 1, states - 1)] += 0.1
    case = Case(transition, np.zeros((1, 1, states, 1)), np.full((1, 1), 0.9999), np.ones((1, 1)))
    rhs = np.zeros((1, 1, 1, states))
    rhs[..., 0] = 1
    found, _, failed = run_policy_solve(
        case, np.ones((1, 1, states, 1)), rhs, transpose=True, method=2
    )
    assert failed == 0
    truth = np.zeros(states, np.longdouble)
    step = np.longdouble(0.9999) * transition[0, 0, 0, 1]
    truth[0] = 1
    for s in range(1, states):
        truth[s] = truth[s - 1] * step
    truth[-1] /= 1 - step
    truth /= truth.sum() * (1 - np.longdouble(0.9999))
    relative = np.float64(np.abs(found[0, 0, 0] - truth) / truth)
    assert relative.max() <= 1e-12, f"state {relative.argmax()}: {relative.max():.3g}"


def test_policy_that_does_not_sum_to_one_is_taken_as_given() -> None:
    """Finite differences with respect to the policy leave the simplex."""
    case = make_case(0, 20, 3)
    policy = np.random.default_rng(0).dirichlet(np.ones(3), (1, 1, 20)) * 1.01
    rhs = np.random.default_rng(1).standard_normal((1, 1, 1, 20))
    for method in (0, 2, 3, 5):
        found, _, failed = run_policy_solve(case, policy, rhs, method=method)
        assert failed == 0
        truth = linear_solve(policy_system(case, 0, 0, policy[0, 0]), rhs[0, 0, 0])
        assert_close(found[0, 0, 0], truth, 1e-12, f"method {method}")


# ---- failures -----------------------------------------------------------------------------------


def poison(case: Case, kind: Status) -> tuple[int, float]:
    """Spoil problem (1, 0) of a batch; returns the place and value that must be reported."""
    if kind == Status.ROW_SUM:
        case.transition[1, 2, 1] *= 0.5
        return 2 * 3 + 1, float(case.transition[1, 2, 1].sum(dtype=np.float64))
    if kind in (Status.NEGATIVE_PROBABILITY, Status.NON_FINITE_TRANSITION):
        bad = -1e-3 if kind == Status.NEGATIVE_PROBABILITY else np.inf
        case.transition[1, 4, 2, 1] = bad
        return (4 * 3 + 2) * case.transition.shape[1] + 1, float(case.transition[1, 4, 2, 1])
    if kind == Status.NON_FINITE_REWARD:
        case.reward[1, 0, 3, 1] = np.nan
        return 3 * 3 + 1, np.nan
    if kind == Status.BAD_DISCOUNT:
        case.discount[1, 0] = 1.0
        return 0, 1.0
    if kind == Status.BAD_TEMPERATURE:
        case.temperature[1, 0] = -0.5
        return 0, -0.5
    assert case.log_reference is not None
    if kind == Status.NO_ACTION:
        case.log_reference[1, 0, 2] = -np.inf
        return 2, 0.0
    case.log_reference[1, 0, 2, 1] = np.inf
    return 2 * 3 + 1, np.inf


@pytest.mark.parametrize("kind", [kind for kind in Status if kind >= 10], ids=lambda k: k.name)
@pytest.mark.parametrize("storage", STORAGE, ids=["float32", "float64"])
def test_a_bad_problem_is_named_and_spoils_no_other(kind: Status, storage: type) -> None:
    case = make_case(0, 9, 3, storage=storage, transitions=3, masked=True, successors=9)
    before = run_solve(case)
    place, culprit = poison(case, kind)
    after = run_solve(case)
    assert after.status[1, 0] == kind
    assert after.info[1, 0, 3] == place
    np.testing.assert_allclose(after.info[1, 0, 4], culprit, rtol=1e-12)
    for name in ("value", "advantage", "policy", "log_policy"):
        assert np.isnan(getattr(after, name)[1]).all(), name
        for n in (0, 2):
            assert getattr(after, name)[n].tobytes() == getattr(before, name)[n].tobytes(), name


def test_row_sum_tolerance_follows_the_storage() -> None:
    for storage, inside, outside in ((np.float32, 0.5e-5, 4e-5), (np.float64, 0.5e-8, 4e-8)):
        for excess, expected in ((inside, Status.CONVERGED), (outside, Status.ROW_SUM)):
            case = make_case(0, 4, 2, storage=storage)
            case.transition[0, 1, 0] *= 1 + excess
            assert run_solve(case).status[0, 0] == expected, f"{storage.__name__} {excess}"


def test_overflow_is_reported() -> None:
    case = make_case(0, 4, 2)
    case.reward[:] = 1e308
    assert run_solve(case).status[0, 0] == Status.NON_FINITE


def test_limit_and_stagnation_are_reported() -> None:
    case = two_clusters(20, 3, 1e-4, 0.9999)
    limited = run_solve(case, method=1, max_iterations=5)
    assert limited.status[0, 0] == Status.MAX_ITERATIONS
    assert limited.info[0, 0, 2] == 5
    truth = fixed_point(case, 0, 0)[0]
    assert_close(limited.value[0, 0], truth, limited.info[0, 0, 1], "value at the limit")
    stuck = run_solve(case, tol=1e-16)
    assert stuck.status[0, 0] == Status.STAGNATED
    assert_close(stuck.value[0, 0], truth, stuck.info[0, 0, 1], "stagnated value")


def test_certificate_holds_along_the_way() -> None:
    for terminal in (False, True):
        case = make_case(1, 33, 3, discount=0.99, terminal=terminal)
        truth = fixed_point(case, 0, 0)[0]
        for method in METHODS:
            for limit in (1, 2, 3, 5, 8):
                found = run_solve(case, method=method, max_iterations=limit)
                what = f"{METHODS[method]} after {limit}"
                assert_close(found.value[0, 0], truth, found.info[0, 0, 1], what)


def test_warm_start_shortens_the_solve() -> None:
    case = make_case(1, 200, 3, discount=0.99, sparse=True)
    cold = run_solve(case)
    warm = run_solve(case, initial=cold.value)
    check_solution(case, warm, "warm")
    assert warm.info[0, 0, 2] < cold.info[0, 0, 2]


@pytest.mark.parametrize("far", [0.0, 1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("method", [0, 1])
def test_a_start_in_single_precision_keeps_to_the_limit_and_to_the_bound(
    method: int, far: float
) -> None:
    case = make_case(3, 20, 3, storage=np.float32, discount=0.95)
    truth = fixed_point(case, 0, 0)[0]
    noise = np.random.default_rng(3).standard_normal(truth.shape)
    start = (truth + far * noise).astype(np.float64)[None, None]
    for limit in (1, 2, 3, 5, 9):
        found = run_solve(case, initial=start, method=method, max_iterations=limit)
        assert found.info[0, 0, 2] <= limit
        bound = found.info[0, 0, 1]
        assert_close(found.value[0, 0], truth, bound, f"{far:g} away, after {limit}")
    found = run_solve(case, initial=start, method=method)
    assert_close(found.value[0, 0], truth, 1e-11 * np.abs(truth).max(), f"{far:g} away")


def test_malformed_sparsity_never_reaches_a_kernel() -> None:
    case = make_case(1, 5, 2, sparse=True)
    transition, crow, col, *rest = case.tensors()
    assert crow is not None
    assert col is not None
    value = torch.zeros(1, 1, 5, dtype=torch.float64)
    bad_col, bad_crow = col.clone(), crow.clone()
    bad_col[3] = 5
    bad_crow[2] = bad_crow[3] + 1
    for pattern in ((crow, bad_col), (bad_crow, col)):
        with pytest.raises(ValueError, match=r"crow|column"):
            compiled_solve(transition, *pattern, *rest, value)


# ---- form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("shape", [(6, 2, 40, 3), (1, 1, 700, 4)], ids=["batch", "one_large"])
def test_thread_count_does_not_change_a_bit(shape: tuple[int, ...], sparse: bool) -> None:
    n, g, states, actions = shape
    case = make_case(
        0, states, actions, transitions=n, problems=g, sparse=sparse, successors=states // 2
    )  # fmt: skip
    policy = np.random.default_rng(0).dirichlet(np.ones(actions), (n, g, states))
    rhs = np.random.default_rng(1).standard_normal((n, g, 2, states))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = [x for method in METHODS for x in run_solve(case, method=method).raw]
            for method in (2, 3, 5):
                for transpose in (False, True):
                    x, residual, _ = run_policy_solve(
                        case, policy, rhs, method=method, transpose=transpose
                    )
                    found += [x.tobytes(), residual.tobytes()]
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@pytest.mark.timeout(60)
def test_a_forked_child_solves_with_threads() -> None:
    """The parent's pool of threads is not there in a child; waiting for it would never end."""
    case = make_case(0, 40, 3, transitions=64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = run_solve(case).raw

        def work() -> None:
            signal.alarm(20)  # a child that waits for ever is killed
            assert run_solve(case).raw == expected

        _, status = os.waitpid(fork(work), 0)
    finally:
        torch.set_num_threads(threads)
    assert status == 0


@pytest.mark.parametrize("lanes", [(0, 1), (1, 0), (0, 0)])
def test_empty_batches_return_at_once(lanes: tuple[int, int]) -> None:
    case = make_case(0, 5, 2, transitions=lanes[0], problems=lanes[1])
    assert run_solve(case).value.shape == (*lanes, 5)
    empty = np.zeros((*lanes, 3, 5))
    assert run_policy_solve(case, np.zeros((*lanes, 5, 2)), empty)[2] == 0
    value = torch.zeros((*lanes, 5), dtype=torch.float64)
    compiled_solve(*case.tensors(), value)


def test_no_right_hand_side_is_a_right_number_of_them() -> None:
    case = make_case(0, 5, 2)
    policy = np.full((1, 1, 5, 2), 0.5)
    assert run_policy_solve(case, policy, np.zeros((1, 1, 0, 5)))[2] == 0


def test_wrapper_refuses_what_the_kernel_would_misread() -> None:
    case = make_case(0, 5, 2)
    tensors = case.tensors()
    value = torch.zeros(1, 1, 5, dtype=torch.float64)
    transition = tensors[0]
    assert transition is not None
    refused = [
        (0, transition.half(), DtypeError),
        (0, transition.transpose(1, 3), ShapeError),
        (0, transition.transpose(2, 3).contiguous().transpose(2, 3), ShapeError),
        (3, case_reward := torch.from_numpy(case.reward).float(), DtypeError),
        (3, case_reward.double().to("meta"), DeviceError),
        (5, torch.zeros(1, 2, dtype=torch.float64), ShapeError),
    ]
    for place, tensor, error in refused:
        arguments = list(tensors)
        arguments[place] = tensor
        with pytest.raises(error):
            compiled_solve(*arguments, value)


def test_interrupt_ends_a_long_solve() -> None:
    case = two_clusters(400, 10, 1e-7, 1 - 1e-7)
    # a shell's background jobs are started with Ctrl-C ignored
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_solve(case, method=1)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, previous)


def test_build_info_is_reported() -> None:
    entry = loader.report()["_cpu"]
    assert entry["loaded"]
    assert entry["build_info"]["instruction_set"] in entry["build_info"]["instruction_sets"]
