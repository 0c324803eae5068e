"""The compiled CPU kernels: what no public function reaches, or reaches on both backends alike."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
from cases import FLOATS, Case, kernel_arguments, kernel_model, kernel_policy_solve, kernel_solve
from closeness import assert_close
from oracle import exact, float64
from processes import fork
from torch import Tensor

import birl_ext
from birl_ext.errors import DeviceError, DtypeError, ShapeError
from birl_ext.model.mdp import DenseMDP
from birl_ext.ops.backends import loader, pytorch
from birl_ext.ops.request import Data, Settings
from birl_ext.options import BackendName
from birl_ext.solution import Info, Solution, Status

if loader.reason("cpu") and os.environ.get("BIRL_REQUIRE_EXT") != "1":
    pytest.skip(f"no compiled CPU module: {loader.reason('cpu')}", allow_module_level=True)

F64 = torch.float64
EPS = torch.finfo(F64).eps


def solve(*arguments: Any, **options: Any) -> Solution:
    """Of an MDP and a temperature, whatever the status."""
    mdp, temperature = arguments
    options = {"backend": "cpu", "on_fail": "status", **options}
    return birl_ext.solve(mdp, temperature=temperature, **options)


def truth(mdp: DenseMDP, temperature: float) -> np.ndarray:
    """V* of one MDP, by 512 bits."""
    exact_model = exact.Model.of(
        mdp.reward.numpy(),
        mdp.transition.numpy(),
        discount=float(mdp.discount),
        temperature=temperature,
    )
    return exact.solve(exact_model).floats().value


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "method"), [(10, "auto"), (10, "newton"), (150, "newton")], ids=str
)
@pytest.mark.parametrize("gap", [1e-9, 1e-12])
def test_newton_does_not_go_in_circles_near_discount_one(
    gap: float, states: int, method: str
) -> None:
    """Several closed classes, each with a gain of its own: values differ by 1/(1 − γ)."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        transition = np.zeros((states, 3, states))
        np.put_along_axis(transition, random.integers(0, states, (states, 3, 1)), 1.0, -1)
        reward = torch.from_numpy(random.random((states, 3)))
        mdp = DenseMDP(reward, torch.from_numpy(transition), 1 - gap)
        found = solve(mdp, 1e-4, method=method, max_iterations=100)
        assert found.status == Status.CONVERGED, seed
        assert found.residual <= 1e-6, "where values differ by up to 1e12"


def circles(pairs: int, discount: float, **options: Any) -> Solution:
    """Newton's method goes in circles: negative probabilities, which nothing checks here."""
    one = torch.tensor([[[-2.0, 3.0], [4.0, -3.0]], [[-3.0, 4.0], [-1.0, 2.0]]], dtype=F64)
    transition = torch.zeros(pairs, 2, 2, pairs, 2, dtype=F64)
    for i in range(pairs):
        transition[i, :, :, i] = one
    return birl_ext.solve(
        torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=F64).repeat(pairs, 1),
        transition.view(2 * pairs, 2, 2 * pairs),
        discount=discount,
        temperature=0.01,
        validate="off",
        on_fail="status",
        **options,
    )


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("pairs", [1, 75], ids=["lanes", "general"])
def test_newton_that_goes_in_circles_ends(pairs: int, backend: BackendName) -> None:
    """After a thousand passes, where sweeps take forever."""
    found = circles(pairs, 1 - 1e-9, method="newton", backend=backend)
    assert found.status == Status.MAX_ITERATIONS
    assert found.iterations == 1000


def test_sweeps_that_take_over_from_newton_keep_at_it() -> None:
    """They overflow here, in some hundred passes: back to Newton's method, there is no end."""
    found = circles(1, 0.999, max_iterations=3000, backend="cpu")
    assert found.status == Status.NON_FINITE
    assert 1000 < found.iterations < 2000


@pytest.mark.parametrize(("states", "discount"), [(2, 0.9999), (3, 0.9999), (150, 0.999)])
def test_value_iteration_ends_on_a_cycle(states: int, discount: float) -> None:
    """Its rounding errors add up along the cycle, since each comes around undamped."""
    cycle = torch.eye(states, dtype=F64).roll(1, 1)[:, None]
    reward = torch.rand(states, 1, dtype=F64)
    found = solve(DenseMDP(reward, cycle, discount), 0.1, method="value-iteration")
    assert found.status == Status.CONVERGED
    assert found.error_bound <= 1e-6
    want = np.linalg.solve(np.eye(states) - discount * cycle[:, 0].numpy(), reward[:, 0].numpy())
    assert_close(found.value, want, bound=found.error_bound, label="value")


@pytest.mark.parametrize("far", [0.0, 1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("method", ["auto", "value-iteration"])
def test_a_start_in_single_precision_keeps_to_the_limit_and_to_the_bound(
    method: str, far: float
) -> None:
    mdp = Case("garnet", 20, 3, discount=0.95, dtype=torch.float32, seed=3).mdp()
    want = truth(mdp, 0.1)
    start = torch.from_numpy(want) + far * torch.randn(20, dtype=F64)
    rounding = torch.finfo(torch.float32).eps * np.abs(want).max()
    for limit in (1, 2, 3, 5, 9):
        found = solve(mdp, 0.1, initial=start, method=method, max_iterations=limit)
        assert found.iterations <= limit
        assert_close(found.value, want, bound=found.error_bound, label=f"{far:g} away, {limit}")
    found = solve(mdp, 0.1, initial=start, method=method)
    assert_close(found.value, want, bound=rounding, label=f"{far:g} away")


@pytest.mark.parametrize("dtype", FLOATS, ids=["f32", "f64"])
def test_row_sum_tolerance_follows_the_storage(dtype: torch.dtype) -> None:
    inside, outside = (0.5e-5, 4e-5) if dtype == torch.float32 else (0.5e-8, 4e-8)
    for excess, status in ((inside, Status.CONVERGED), (outside, Status.ROW_SUM)):
        arguments = kernel_arguments(Case(dtype=dtype).mdp(), 0.1)
        arguments["transition"][0, 1, 0] *= 1 + excess
        assert kernel_solve(arguments)[6] == status, excess


@pytest.mark.parametrize(
    ("status", "place", "value"),
    [(Status.NO_ACTION, (2,), -torch.inf), (Status.BAD_REFERENCE, (2, 1), torch.inf)],
)
def test_a_bad_reference_is_named_and_spoils_no_other(
    status: Status, place: tuple[int, ...], value: float
) -> None:
    """The tensors' borders find it first, unless nobody asked them to."""
    arguments = kernel_arguments(Case(batch=(3,), reference=True).mdp(), 0.1)
    before = kernel_solve(arguments)
    arguments["log_reference"][(1, 0, *place)] = value
    after = kernel_solve(arguments)
    assert after[6].flatten().tolist() == [0, status, 0]
    assert after[5][1, 0, Info.PLACE] == (2 if len(place) == 1 else 2 * 3 + 1)
    for one, other in zip(before[:5], after[:5], strict=True):
        assert other[1].isnan().all()
        assert torch.equal(one[::2], other[::2])


@pytest.mark.parametrize("states", [6, 150])
def test_of_several_defects_every_backend_tells_the_same(states: int) -> None:
    """The first in the order of `birl_ext.model.checks`, wherever the others are."""
    base = kernel_arguments(Case(states=states, reference=True).mdp(), 0.1)
    defects: list[tuple[str, tuple[int, ...], float, Status]] = [
        ("discount", (), 1.0, Status.BAD_DISCOUNT),
        ("temperature", (), 0.0, Status.BAD_TEMPERATURE),
        ("log_reference", (4, 1), torch.nan, Status.BAD_REFERENCE),
        ("log_reference", (3,), -torch.inf, Status.NO_ACTION),
        ("reward", (2, 1), torch.nan, Status.NON_FINITE_REWARD),
        ("transition", (1, 2, 0), torch.nan, Status.NON_FINITE_TRANSITION),
        ("transition", (1, 1, 0), -0.5, Status.NEGATIVE_PROBABILITY),
        ("transition", (0, 1, 0), 0.75, Status.ROW_SUM),
    ]
    for first, second in itertools.combinations(defects, 2):
        arguments: dict[str, Any] = {
            name: tensor if tensor is None else tensor.clone() for name, tensor in base.items()
        }
        for name, place, value, _ in (first, second):
            lead = (0,) if name == "transition" else (0, 0)
            arguments[name][(*lead, *place)] = value
        want = kernel_solve(arguments)
        absent = torch.empty(0, dtype=torch.int64)
        data = Data(**{n: absent if t is None else t for n, t in arguments.items()})
        found = pytorch.solve(data, absent, Settings((1, 1)))
        assert want[6] == found[6] == first[3], (first, second)
        assert torch.equal(want[5][..., Info.PLACE], found[5][..., Info.PLACE]), (first, second)


# ---- linear systems -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [
    Case("garnet", 33, 3, discount=0.9999, seed=33),
    Case("garnet", 33, 3, discount=0.9, dtype=torch.float32, mask=True, seed=34),
    Case("garnet", 130, 3, batch=(2,), shared=True, mask=True, terminal=True, seed=130),
    Case("garnet", 300, 3, discount=0.9999, dtype=torch.float32, seed=300),
    Case("chain", 300, 3, discount=0.9999, seed=301),
    Case("dense", 2, 3, discount=0.0, terminal=True),
    Case("dense", 1, 1, discount=0.9999),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
def test_policy_solve(case: Case, sparse: bool) -> None:
    """Errors within rounding over 1 − γ; the residual that is told is true. Up to 256 states it is
    an elimination, beyond them products: sparse ones by series, which give up on the chain.
    """
    mdp = case.mdp()
    policy = birl_ext.solve(mdp, temperature=1.0).policy.double()
    model = kernel_model(mdp.to_sparse() if sparse else mdp)
    discount = kernel_arguments(mdp, 1.0)["discount"]
    pi = (policy / policy.sum(-1, keepdim=True)).view(1, -1, case.states, case.actions)
    rhs = torch.randn(*pi.shape[:2], 3, case.states, dtype=F64)
    rhs[:, :, 1] = rhs[:, :, 1].abs()
    rhs[:, :, 2] = 0
    for transpose in (False, True):
        order = 1 if transpose else np.inf
        found, residual, failed = kernel_policy_solve(model, pi, discount, rhs, transpose=transpose)
        assert failed == 0
        assert (found[:, :, 2] == 0).all()
        for g in range(pi.shape[1]):
            system = float64.policy_system(
                pi[0, g].numpy(), mdp.transition.numpy(), case.discount, mdp.terminal
            )
            system = system.T if transpose else system
            for k in range(2):
                b, x = rhs[0, g, k].numpy(), found[0, g, k].numpy()
                want = float64.refined(system, b)
                size = np.linalg.norm(b, order)
                rounding = 40 * EPS * (np.linalg.norm(want, order) + size)
                where = f"transpose {transpose}, problem {g}, column {k}"
                error = np.linalg.norm(x - want, order)
                allowed = rounding / (1 - case.discount)
                assert error <= allowed, f"{where}: error {error:.3g} > {allowed:.3g}"
                left = np.linalg.norm(np.float64(b - system @ x), order)
                assert abs(float(residual[0, g, k]) - left) <= rounding, f"{where}: residual"


def test_direct_occupancy_is_non_negative_to_full_relative_accuracy() -> None:
    """Nothing is subtracted: also components far below the largest one have all their digits."""
    states = 60
    transition = torch.zeros(states, 1, states, dtype=F64)
    for s in range(states):
        transition[s, 0, 0] = 0.9
        transition[s, 0, min(s + 1, states - 1)] += 0.1
    start = torch.zeros(states, dtype=F64)
    start[0] = 1
    found = birl_ext.occupancy(
        torch.ones(states, 1, dtype=F64), transition,
        discount=0.9999, initial_distribution=start, backend="cpu",
    )  # fmt: skip
    step = np.longdouble(0.9999) * float(transition[0, 0, 1])
    want = step ** np.arange(states)
    want[-1] /= 1 - step
    want /= want.sum()
    assert_close(found, np.float64(want), bound=1e-12 * np.float64(want), label="share")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("states", [20, 300])
def test_policy_that_does_not_sum_to_one_is_taken_as_given(states: int, sparse: bool) -> None:
    """Finite differences with respect to the policy leave the simplex."""
    mdp = Case("garnet", states, 3).mdp()
    model = kernel_model(mdp.to_sparse() if sparse else mdp)
    discount = torch.full((1, 1), 0.9, dtype=F64)
    policy = torch.rand(1, 1, states, 3, dtype=F64).softmax(-1) * 1.01
    rhs = torch.randn(1, 1, 1, states, dtype=F64)
    system = float64.policy_system(policy[0, 0].numpy(), mdp.transition.numpy(), 0.9)
    want = float64.refined(system, rhs.flatten().numpy())
    found, _, failed = kernel_policy_solve(model, policy, discount, rhs)
    assert failed == 0
    assert_close(found.flatten(), want, bound=1e-12, label="x")


def test_no_right_hand_side_is_a_right_number_of_them() -> None:
    model = kernel_model(Case().mdp())
    discount = torch.full((1, 1), 0.9, dtype=F64)
    policy, nothing = torch.full((1, 1, 6, 3), 1 / 3).double(), torch.zeros(1, 1, 0, 6).double()
    assert kernel_policy_solve(model, policy, discount, nothing)[2] == 0


# ---- form ---------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_forked_child_solves_with_threads() -> None:
    """The parent's pool of threads is not there in a child; waiting for it would never end."""
    arguments = kernel_arguments(Case("garnet", 40, 3, batch=(64,)).mdp(), 0.1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = kernel_solve(arguments)

        def work() -> None:
            signal.alarm(20)  # a child that waits for ever is killed
            found = kernel_solve(arguments)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

        _, status = os.waitpid(fork(work), 0)
    finally:
        torch.set_num_threads(threads)
    assert status == 0


def test_wrapper_refuses_what_the_kernel_would_misread() -> None:
    arguments = kernel_arguments(Case(states=5, actions=2).mdp(), 0.1)
    transition, reward = arguments["transition"], arguments["reward"]
    refused: list[tuple[str, Tensor, type[Exception]]] = [
        ("transition", transition.half(), DtypeError),
        ("transition", transition.transpose(1, 3), ShapeError),
        ("transition", transition.transpose(2, 3).contiguous().transpose(2, 3), ShapeError),
        ("reward", reward.float(), DtypeError),
        ("reward", reward.to("meta"), DeviceError),
        ("discount", torch.zeros(1, 2, dtype=F64), ShapeError),
    ]
    for name, tensor, error in refused:
        with pytest.raises(error):
            kernel_solve({**arguments, name: tensor})


def test_interrupt_ends_a_long_solve() -> None:
    mdp = Case("clusters", 400, 10, discount=1 - 1e-7).mdp()
    # a shell's background jobs are started with Ctrl-C ignored
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            solve(mdp, 0.1, method="value-iteration")
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, previous)


def test_build_info_is_reported() -> None:
    entry = loader.report()["_cpu"]
    assert entry["loaded"]
    assert entry["build_info"]["instruction_set"] in entry["build_info"]["instruction_sets"]
