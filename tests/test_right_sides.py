"""Several right-hand sides of one policy system, and the sparse formats behind them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from cases import FLOATS, Case, kernel_model, kernel_policy_solve
from oracle import float64
from torch import Tensor

from birl_ext.model.mdp import DenseMDP
from birl_ext.ops.backends import loader

if loader.reason("cpu") and os.environ.get("BIRL_REQUIRE_EXT") != "1":
    pytest.skip(f"no compiled CPU module: {loader.reason('cpu')}", allow_module_level=True)

COLUMNS = [1, 3, 4, 8, 9, 17]
F64 = torch.float64
EPS = torch.finfo(F64).eps


class Systems:
    """The policy systems of one transition, a random policy for each of some problems."""

    def __init__(self, mdp: DenseMDP, problems: int = 1, *, sparse: bool = False) -> None:
        self.mdp, (states, actions) = mdp, mdp.reward.shape[-2:]
        model = mdp.to_sparse() if sparse else mdp
        self.model = kernel_model(model)
        self.discount = torch.full((1, problems), float(mdp.discount), dtype=F64)
        weights = torch.rand(1, problems, states, actions, dtype=F64)
        self.policy = weights / weights.sum(-1, keepdim=True)

    def solve(self, rhs: Tensor, *, transpose: bool) -> tuple[Tensor, Tensor, int]:
        return kernel_policy_solve(self.model, self.policy, self.discount, rhs, transpose=transpose)

    def rhs(self, count: int) -> Tensor:
        return torch.randn(*self.policy.shape[:2], count, self.policy.shape[2], dtype=F64)


def hub(states: int, discount: float) -> DenseMDP:
    """One state leads everywhere and is led to from everywhere; some actions have no successor in
    common with the others."""
    rng = np.random.default_rng(3)
    transition = np.zeros((states, 2, states))
    for s in range(states):
        transition[s, 0, [s, 7]] = 0.5
        transition[s, 1, rng.choice(states, 1 + s % 11, replace=False)] = 1.0
    transition[7] = rng.random((2, states)) + 0.1
    transition /= transition.sum(-1, keepdims=True)
    return DenseMDP(torch.zeros(states, 2, dtype=F64), torch.from_numpy(transition), discount)


def systems(name: str, dtype: torch.dtype = F64) -> Systems:
    def case(kind: str, states: int, actions: int, **options: Any) -> DenseMDP:
        options = {"discount": 0.99, "dtype": dtype, "seed": 1, **options}
        return Case(kind, states, actions, **options).mdp()

    match name:
        case "small":
            return Systems(case("garnet", 40, 3), 2)
        case "small csr":
            return Systems(case("garnet", 40, 3), sparse=True)
        case "dense":
            return Systems(case("dense", 307, 2))
        case "csr":
            return Systems(case("garnet", 307, 2, branching=4), sparse=True)
        case "terminal":
            return Systems(case("garnet", 300, 2, discount=0.9, terminal=True), sparse=True)
        case "grid":
            return Systems(case("grid", 324, 5), sparse=True)
        case "slow":  # for series, which Krylov's method takes over from
            return Systems(case("chain", 300, 3, discount=0.9999), sparse=True)
    return Systems(hub(301, 0.99), sparse=True)


NAMES = ["small", "small csr", "dense", "csr", "terminal", "grid", "slow", "hub"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])
def test_each_of_many_right_hand_sides_is_solved_as_if_alone(name: str, dtype: torch.dtype) -> None:
    given = systems(name, dtype)
    mdp, discount = given.mdp, float(given.mdp.discount)
    system = float64.policy_system(
        given.policy[0, 0].numpy(), mdp.transition.numpy(), discount, mdp.terminal
    )
    for transpose in (False, True):
        order = 1 if transpose else torch.inf
        for count in COLUMNS:
            rhs = given.rhs(count)
            rhs[:, :, 0] = rhs[:, :, 0].abs()
            if count > 1:
                rhs[:, :, count // 2] = 0.0
                rhs[:, :, -1] *= 1e-9
            found, residual, failed = given.solve(rhs, transpose=transpose)
            assert failed == 0
            rounding = 50 * EPS * (rhs.norm(order, -1) + found.norm(order, -1))
            where = f"transpose {transpose}, {count} columns"
            assert (residual <= rounding).all(), f"{where}: {residual}"
            alone = [
                given.solve(rhs[:, :, [k]].contiguous(), transpose=transpose)[0]
                for k in range(count)
            ]
            gap = (found - torch.cat(alone, 2)).norm(order, -1)
            allowed = 2 * rounding / (1 - discount)
            assert (gap <= allowed).all(), f"{where}: {gap} from the lone ones"
            want = float64.refined(system.T if transpose else system, rhs[0, 0, -1].numpy())
            error = np.linalg.norm(found[0, 0, -1].numpy() - want, order)
            assert error <= 100 * EPS * np.linalg.norm(want, order) / (1 - discount)


@pytest.mark.parametrize("name", ["small", "dense", "csr"])
def test_a_right_hand_side_that_is_not_finite_spoils_only_itself(name: str) -> None:
    given = systems(name)
    rhs = given.rhs(6)
    broken = rhs.clone()
    broken[0, 0, 1, 3], broken[0, 0, 4, 0] = np.nan, np.inf
    for transpose in (False, True):
        whole, _, _ = given.solve(rhs, transpose=transpose)
        found, residual, failed = given.solve(broken, transpose=transpose)
        assert failed == 2
        assert found[0, 0, [1, 4]].isnan().all()
        assert residual[0, 0, [1, 4]].isnan().all()
        kept = [0, 2, 3, 5]
        size = whole[0, 0, kept].abs().sum(-1).max()
        assert (found[0, 0, kept] - whole[0, 0, kept]).abs().max() <= 1e-10 * size


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
def test_thread_count_does_not_change_a_bit_of_many_right_hand_sides(sparse: bool) -> None:
    shape = (2100, 1) if sparse else (500, 2)
    given = Systems(Case("garnet", *shape, branching=40).mdp(), sparse=sparse)
    rhs = given.rhs(13)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                [
                    part
                    for transpose in (False, True)
                    for part in given.solve(rhs, transpose=transpose)[:2]
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("count", [1, 3])
def test_constants_cost_no_products_in_either_direction(count: int, sparse: bool) -> None:
    """At γ = 1 − 10⁻⁶ a constant alone would take ten million: minutes instead of nothing."""
    case = Case("garnet", 300, 2, branching=30, discount=1 - 1e-6)
    given = Systems(case.mdp(), sparse=sparse)
    rhs = 1 + given.rhs(count)

    def hang(*_: object) -> None:
        raise TimeoutError("the constant was iterated away")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(20)
    try:
        for transpose in (False, True):
            assert given.solve(rhs, transpose=transpose)[2] == 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets_agree(isa: str) -> None:
    """The kernels are chosen once per process: the same test once more in another."""
    if isa not in loader.build_info("cpu")["instruction_sets"]:
        pytest.skip(f"{isa} is not compiled in")
    selection = "solved_as_if_alone and float64 and (hub or dense)"
    done = subprocess.run(
        # -P: the installed package, not the checkout's.
        [sys.executable, "-P", "-m", "pytest", "-q", "-k", selection, __file__],
        env={**os.environ, "BIRL_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
