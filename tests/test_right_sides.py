"""Several right-hand sides of one policy system, and the sparse formats behind them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_native import EPS, STORAGE, Case, linear_solve, make_case, policy_system, run_policy_solve

from birl_ext.ops.backends import loader

if loader.reason("cpu") and os.environ.get("BIRL_REQUIRE_EXT") != "1":
    pytest.skip(f"no compiled CPU module: {loader.reason('cpu')}", allow_module_level=True)

COLUMNS = [1, 3, 4, 8, 9, 17]


def some_policy(case: Case) -> np.ndarray:
    lane = case.reward.shape[:-1]
    return np.random.default_rng(0).dirichlet(np.ones(case.reward.shape[-1]), lane)


def grid_case(side: int, discount: float) -> Case:
    """A walk on a grid, the same successors for every action, with repeats at the walls merged."""
    states, moves = side * side, ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))
    transition = np.zeros((1, states, len(moves), states))
    for s in range(states):
        for a in range(len(moves)):
            for b, (down, right) in enumerate(moves):
                row = min(max(s // side + down, 0), side - 1)
                column = min(max(s % side + right, 0), side - 1)
                transition[0, s, a, row * side + column] += 0.84 if a == b else 0.04
    reward = np.random.default_rng(0).standard_normal((1, 1, states, len(moves)))
    return Case(transition, reward, np.full((1, 1), discount), np.ones((1, 1)), sparse=True)


def hub_case(states: int, discount: float) -> Case:
    """One state leads everywhere and is led to from everywhere; some actions have no successor in
    common with the others."""
    rng = np.random.default_rng(3)
    transition = np.zeros((1, states, 2, states))
    for s in range(states):
        transition[0, s, 0, [s, 7]] = 0.5
        transition[0, s, 1, rng.choice(states, 1 + s % 11, replace=False)] = 1.0
    transition[0, 7] = rng.random((2, states)) + 0.1
    transition /= transition.sum(-1, keepdims=True)
    reward = rng.standard_normal((1, 1, states, 2))
    return Case(transition, reward, np.full((1, 1), discount), np.ones((1, 1)), sparse=True)


def cases(storage: type) -> dict[str, Case]:
    return {
        "small": make_case(1, 40, 3, storage=storage, discount=0.99, problems=2),
        "small csr": make_case(1, 40, 3, storage=storage, discount=0.99, sparse=True),
        "dense": make_case(2, 307, 2, storage=storage, discount=0.99, successors=307),
        "csr": make_case(2, 307, 2, storage=storage, discount=0.99, sparse=True),
        "terminal": make_case(3, 300, 2, storage=storage, sparse=True, terminal=True),
        "grid": grid_case(18, 0.99),
        "hub": hub_case(301, 0.99),
    }


@pytest.mark.parametrize("name", list(cases(np.float64)))
@pytest.mark.parametrize("storage", STORAGE, ids=["float32", "float64"])
@pytest.mark.parametrize("method", [0, 2, 3, 5], ids=["auto", "direct", "krylov", "richardson"])
def test_each_of_many_right_hand_sides_is_solved_as_if_alone(
    name: str, storage: type, method: int
) -> None:
    case = cases(storage)[name]
    policy = some_policy(case)
    problems, states = policy.shape[1:3]
    matrix = policy_system(case, 0, 0, policy[0, 0])
    for transpose in (False, True):
        order = 1 if transpose else np.inf
        for count in COLUMNS if method == 0 else (4, 9):
            rhs = np.random.default_rng(count).standard_normal((1, problems, count, states))
            rhs[:, :, 0] = np.abs(rhs[:, :, 0])
            if count > 1:
                rhs[:, :, count // 2] = 0.0
                rhs[:, :, -1] *= 1e-9
            found, residual, failed = run_policy_solve(
                case, policy, rhs, transpose=transpose, method=method
            )
            assert failed == 0
            for k in range(count):
                alone, _, _ = run_policy_solve(
                    case, policy, rhs[:, :, [k]], transpose=transpose, method=method
                )
                for g in range(problems):
                    b, x = rhs[0, g, k], found[0, g, k]
                    where = f"transpose {transpose}, {count} columns, column {k}, problem {g}"
                    rounding = 50 * EPS * (np.linalg.norm(b, order) + np.linalg.norm(x, order))
                    allowed = 2 * rounding / (1 - case.discount[0, g])
                    gap = np.linalg.norm(x - alone[0, g, 0], order)
                    assert gap <= allowed, f"{where}: {gap:.3g} from the lone one > {allowed:.3g}"
                    assert residual[0, g, k] <= rounding, f"{where}: {residual[0, g, k]:.3g}"
            turned = matrix.T if transpose else matrix
            truth = linear_solve(turned, rhs[0, 0, -1])
            error = np.linalg.norm(np.float64(found[0, 0, -1] - truth), order)
            assert error <= 100 * EPS * np.linalg.norm(np.float64(truth), order) / (
                1 - case.discount[0, 0]
            )


@pytest.mark.parametrize("name", ["small", "dense", "csr"])
def test_a_right_hand_side_that_is_not_finite_spoils_only_itself(name: str) -> None:
    case = cases(np.float64)[name]
    policy = some_policy(case)
    rhs = np.random.default_rng(5).standard_normal((1, policy.shape[1], 6, policy.shape[2]))
    broken = rhs.copy()
    broken[0, 0, 1, 3], broken[0, 0, 4, 0] = np.nan, np.inf
    for transpose in (False, True):
        whole, _, _ = run_policy_solve(case, policy, rhs, transpose=transpose)
        found, residual, failed = run_policy_solve(case, policy, broken, transpose=transpose)
        assert failed == 2
        assert np.isnan(found[0, 0, [1, 4]]).all()
        assert np.isnan(residual[0, 0, [1, 4]]).all()
        kept = [0, 2, 3, 5]
        size = np.abs(whole[0, 0, kept]).sum(-1).max()
        assert np.abs(found[0, 0, kept] - whole[0, 0, kept]).max() <= 1e-10 * size


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
def test_thread_count_does_not_change_a_bit_of_many_right_hand_sides(sparse: bool) -> None:
    states, actions, successors = (2100, 1, 40) if sparse else (500, 2, 250)
    case = make_case(0, states, actions, successors=successors, sparse=sparse)
    policy = some_policy(case)
    rhs = np.random.default_rng(1).standard_normal((1, 1, 13, policy.shape[2]))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                [
                    part.tobytes()
                    for transpose in (False, True)
                    for part in run_policy_solve(case, policy, rhs, transpose=transpose)[:2]
                ]
            )
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("count", [1, 3])
def test_constants_cost_no_products_in_either_direction(count: int, sparse: bool) -> None:
    """At γ = 1 − 10⁻⁶ a constant alone would take ten million: minutes instead of nothing."""
    case = make_case(0, 60, 2, successors=30, sparse=sparse, discount=1 - 1e-6)
    policy = some_policy(case)
    rhs = 1 + np.random.default_rng(1).standard_normal((1, 1, count, 60))

    def hang(*_: object) -> None:
        raise TimeoutError("the constant was iterated away")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(20)
    try:
        for transpose in (False, True):
            assert run_policy_solve(case, policy, rhs, transpose=transpose, method=5)[2] == 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets_agree(isa: str) -> None:
    """The kernels are chosen once per process: the same test once more in another."""
    if isa not in loader.build_info("cpu")["instruction_sets"]:
        pytest.skip(f"{isa} is not compiled in")
    selection = "solved_as_if_alone and auto and float64 and (hub or dense)"
    done = subprocess.run(
        # -P: the installed package, not the checkout's.
        [sys.executable, "-P", "-m", "pytest", "-q", "-k", selection, __file__],
        env={**os.environ, "BIRL_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
