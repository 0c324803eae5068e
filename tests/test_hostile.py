"""What a careless or hostile caller can hand to the compiled CPU kernels: a named error, or the
right answer.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_native import EPS, Case, compiled_solve, fixed_point, make_case, normalised, run_solve

import birl_ext
from birl_ext import errors
from birl_ext.ops.backends import loader, native
from birl_ext.solution import Info, Kernel, Status

if loader.reason("cpu"):
    pytest.skip(f"no compiled CPU module: {loader.reason('cpu')}", allow_module_level=True)

F32, F64 = torch.float32, torch.float64
GENERAL = 144  # states: too many for the solver of small problems, and whole vectors


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def data(
    states: int, actions: int, *batch: int, dtype: torch.dtype = F64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shape = (*batch, states, actions)
    transition = torch.rand((*shape, states), generator=random, dtype=F64) ** 4
    transition /= transition.sum(-1, keepdim=True)
    return torch.randn(shape, generator=random, dtype=F64).to(dtype), transition.to(dtype)


# ---- sizes --------------------------------------------------------------------------------------


def call(entry: str, n: int, g: int, k: int, s: int, a: int, crow: int = 0, nnz: int = 0) -> None:
    """An entry point of the compiled module on sizes alone: it must not reach for the memory."""
    sizes = {"transitions": n, "problems": g, "states": s, "actions": a, "nnz": nnz}
    data = dict.fromkeys(("is_double", "transition", "discount"), 0)
    problem = sizes | data | {"crow": crow, "col": crow}
    if entry != "policy_solve":
        problem["temperature"] = 0
    if entry == "solve":
        problem["reward"] = 0
    names = {
        "solve": "value q advantage policy log_policy info status validate",
        "solve_vjp": "relative advantage policy info status threads",
        "policy_solve": "policy rhs out residual transpose",
    }
    request = dict.fromkeys(names[entry].split(), 0) | {"threads": 1}
    if entry == "policy_solve":
        request["right_sides"] = k
    getattr(loader.require("cpu"), entry)(problem, request)


@pytest.mark.parametrize("entry", ["solve", "solve_vjp", "policy_solve"])
def test_names_that_are_missing_or_unknown_are_refused(
    entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = loader.require("cpu")
    said = []

    def listen(problem: dict[str, int], request: dict[str, int]) -> None:
        said.append((problem, request))

    monkeypatch.setattr(loader, "require", lambda _: SimpleNamespace(**{entry: listen}))
    call(entry, 0, 1, 1, 1, 1)
    problem, request = said[0]
    function = getattr(module, entry)
    for part in (problem, request):
        for name in part.keys() - {"crow", "col", "nnz", "threads"}:
            value = part.pop(name)
            with pytest.raises(TypeError, match=rf"^{name} is missing$"):
                function(problem, request)
            part[name] = value
        part["statues"] = 0
        with pytest.raises(TypeError, match=r"^statues is not asked for$"):
            function(problem, request)
        del part["statues"]
    with pytest.raises(TypeError, match="float"):
        function({**problem, "states": 1.0}, request)


ENTRIES = ["solve", "solve_vjp", "policy_solve"]
HUGE = 2**62


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 2**31, 1),  # S·A·S
        (2**40, 1, 1, 2**12, 1),
        (1, 2**40, 1, 2**11, 2**10),  # G·S·A
        (HUGE, HUGE, 1, 1, 1),  # N·G is zero modulo 2⁶⁴
        (1, 2**57, 1, 1, 1),  # the table `info`
        (0, 1, 1, HUGE, HUGE),
    ],
)
def test_sizes_without_an_address_are_refused(entry: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(OverflowError, match="no 64-bit address"):
        call(entry, *sizes)


def test_right_hand_sides_and_entries_without_an_address_are_refused() -> None:
    with pytest.raises(OverflowError, match="no 64-bit address"):
        call("policy_solve", 1, 1, HUGE, 4, 1)
    crow = torch.zeros(2, dtype=torch.int64)
    for entry in ENTRIES:
        with pytest.raises(OverflowError, match="no 64-bit address"):
            call(entry, 2**10, 1, 1, 1, 1, crow.data_ptr(), 2**55)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("place", range(4))
def test_negative_sizes_are_refused(entry: str, place: int) -> None:
    sizes = [1, 1, 1, 1]
    sizes[place] = -3
    n, g, s, a = sizes
    with pytest.raises(ValueError, match="sizes: expected"):
        call(entry, n, g, 1, s, a)


def test_patterns_whose_counts_lie_are_refused() -> None:
    """crow and col that would lead far beyond the stored entries."""
    case = make_case(1, 5, 2, sparse=True)
    transition, crow, col, *rest = case.tensors()
    assert crow is not None
    assert col is not None
    value = torch.zeros(1, 1, 5, dtype=F64)
    for at, number in ((10, 2**31), (10, 2**62), (4, 2**62), (3, -1), (0, 1), (0, -(2**62))):
        wrong = crow.clone()
        wrong[at] = number
        with pytest.raises(ValueError, match="crow"):
            compiled_solve(transition, wrong, col, *rest, value)
    for number in (-1, 2**31, 2**62, -(2**62)):
        wrong = col.clone()
        wrong[-1] = number
        with pytest.raises(ValueError, match="column"):
            compiled_solve(transition, crow, wrong, *rest, value)


def untouched(*shape: int) -> torch.Tensor:
    """Zeros that take no memory until they are written, or a skip."""
    pages = Path("/proc/meminfo")
    memory = int(pages.read_text().split()[1]) * 1024 if pages.exists() else 0
    if memory < 4 * np.prod(shape, dtype=np.float64):
        pytest.skip("the system would refuse to promise so much memory")
    return torch.zeros(*shape, dtype=F32)


@pytest.mark.large
def test_one_transition_of_more_than_two_to_the_31_entries() -> None:
    """Every row ends but the last, whose probabilities lie beyond the reach of 32 bits."""
    states = 46_400
    transition = untouched(1, states, 1, states)
    transition[0, -1, 0, -1] = 1.0
    assert transition.numel() > 2**31
    reward = torch.linspace(-1, 1, states).reshape(1, 1, states, 1)
    rate, tau = torch.full((1, 1), 0.5, dtype=F64), torch.ones(1, 1, dtype=F64)
    found = compiled_solve(transition, None, None, reward, None, rate, tau, None, method=1)
    assert int(found[6]) == Status.CONVERGED
    expected = reward.double().flatten()
    expected[-1] *= 2
    torch.testing.assert_close(found[0].flatten(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.large
def test_a_batch_of_more_than_two_to_the_31_entries() -> None:
    states, count = 128, 131_080
    transition = untouched(count, states, 1, states)
    _, last = data(states, 1, 1, dtype=F32)
    transition[-1:] = last
    assert transition.numel() - last.numel() > 2**31
    reward = torch.zeros(count, 1, states, 1)
    reward[-1] = torch.linspace(-1, 1, states)[:, None]
    reward[-2] = 3.0
    one = torch.ones(count, 1, dtype=F64)
    found = compiled_solve(transition, None, None, reward, None, 0.9 * one, one, None)
    assert not found[6].any()
    assert bool((found[0][-2] == 3.0).all())
    assert not found[0][:-2].any()
    options = (None, 0.9 * one[-1:], one[-1:], None)
    alone = compiled_solve(last, None, None, reward[-1:].contiguous(), *options)
    assert torch.equal(found[0][-1:], alone[0])
    bar = torch.zeros_like(found[0])
    bar[-1] = 1.0
    solution = (*(found[i] for i in (0, 2, 3, 5, 6)),)
    bars, needs = (bar, None, None, None, None), (False, True, False, False, False)
    model, numbers = (transition, None, None), (0.9 * one, one)
    reward_bar = native.solve_vjp(model, numbers, solution, bars, needs)[1]
    assert reward_bar is not None
    assert not reward_bar[:-1].any()
    assert float(reward_bar[-1].sum()) == pytest.approx(states / (1 - 0.9), rel=1e-5)


# ---- layouts ------------------------------------------------------------------------------------


def offset(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, one entry away from where the allocator would put them."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = storage[1:].view(tensor.shape)
    return moved.copy_(tensor)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


LAYOUTS = {
    "offset": offset,
    "transposed": transposed,
    "strided": strided,
    "negated": lambda tensor: torch._neg_view(-tensor),
}


def everything(reward: torch.Tensor, transition: torch.Tensor, *options: Any) -> list[torch.Tensor]:
    """solve and its gradient, bellman, evaluate and occupancy."""
    reference, layout = options
    leaves = [layout(x).detach().requires_grad_() for x in (reward, transition)]
    rates = {"discount": 0.9, "temperature": 0.3}
    if reference is not None:
        rates["reference"] = layout(reference)
    solution = birl_ext.solve(*leaves, **rates)
    generator = torch.Generator().manual_seed(5)
    bar = torch.randn(solution.value.shape, generator=generator, dtype=F64).to(reward.dtype)
    gradients = torch.autograd.grad(
        [solution.value, solution.log_policy],
        leaves,
        [layout(bar), layout(torch.ones_like(solution.log_policy))],
    )
    plain = [leaf.detach() for leaf in leaves]
    policy = layout(solution.policy.detach())
    swept = birl_ext.bellman(layout(bar), *plain, **rates)
    value = birl_ext.evaluate(policy, *plain, discount=0.9)
    start = layout(torch.full_like(bar, 1 / bar.shape[-1]))
    share = birl_ext.occupancy(policy, plain[1], discount=0.9, initial_distribution=start)
    return [*solution, *gradients, *swept, value, share]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "reference"])
@pytest.mark.parametrize("states", [5, 20, GENERAL + 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(
    layout: str, states: int, masked: bool, dtype: torch.dtype
) -> None:
    reward, transition = data(states, 3, 2, dtype=dtype)
    reference = torch.rand(2, states, 3, dtype=dtype) + 0.1 if masked else None
    expected = everything(reward, transition, reference, torch.clone)
    found = everything(reward, transition, reference, LAYOUTS[layout])
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("states", [5, GENERAL])
def test_expanded_views_do_not_change_a_bit(states: int) -> None:
    reward, transition = data(states, 2)
    expected = everything(reward.repeat(3, 1, 1), transition.repeat(3, 1, 1, 1), None, torch.clone)
    views = reward.expand(3, -1, -1), transition.expand(3, -1, -1, -1)
    found = everything(*views, None, lambda tensor: tensor)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


# ---- nothing to do, and other devices -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("batch", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("states", [4, GENERAL])
def test_batches_of_nothing(states: int, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = (*batch, states, 2)
    reward = torch.zeros(shape, dtype=dtype)
    transition = torch.zeros((*shape, states), dtype=dtype)
    found = everything(reward, transition, None, torch.clone)
    assert all(x.numel() == 0 for x in found)
    _, shared = data(states, 2, dtype=dtype)
    reward.requires_grad_()
    shared.requires_grad_()
    value = birl_ext.solve(reward, shared, discount=0.9, temperature=0.1).value
    assert value.shape == (*batch, states)
    one, other = torch.autograd.grad(value.sum(), [reward, shared])
    assert one.shape == reward.shape
    assert not other.any()


def test_tensors_on_two_devices_are_named() -> None:
    reward, transition = data(4, 2)
    value, policy = torch.zeros(4, dtype=F64), torch.full((4, 2), 0.5, dtype=F64)
    far, rates = transition.to("meta"), {"discount": 0.9, "temperature": 0.1}
    start = torch.full((4,), 0.25, dtype=F64)
    calls: list[Callable[[], object]] = [
        lambda: birl_ext.solve(reward, far, **rates),
        lambda: birl_ext.solve(reward.to("meta"), transition, **rates),
        lambda: birl_ext.solve(reward, transition, **rates, initial=value.to("meta")),
        lambda: birl_ext.solve(reward, transition, **rates, reference=policy.to("meta")),
        lambda: birl_ext.solve(reward, transition, **rates, mask=(policy > 0).to("meta")),
        lambda: birl_ext.solve(
            reward, transition, discount=torch.tensor(0.9).to("meta"), temperature=0.1
        ),
        lambda: birl_ext.bellman(value.to("meta"), reward, transition, **rates),
        lambda: birl_ext.bellman(value, reward, far, **rates),
        lambda: birl_ext.evaluate(policy.to("meta"), reward, transition, discount=0.9),
        lambda: birl_ext.evaluate(policy, reward, far, discount=0.9),
        lambda: birl_ext.occupancy(
            policy, transition, discount=0.9, initial_distribution=start.to("meta")
        ),
        lambda: birl_ext.occupancy(policy, far, discount=0.9, initial_distribution=start),
    ]
    for number, call_ in enumerate(calls):
        with pytest.raises(errors.DeviceError, match=r"meta") as caught:
            call_()
        assert "cpu" in str(caught.value), number


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_that_runs_out_is_a_memory_error() -> None:
    """In a process of its own: free space on a long-lived heap could hold P_π below any limit."""
    program = """
        import resource
        from pathlib import Path

        import torch

        from birl_ext.ops.backends import native
        from birl_ext.ops.request import Data

        torch.set_default_dtype(torch.float64)
        transition = torch.full((1, 3000, 1, 3000), 1 / 3000)
        tensors = transition, None, None, torch.randn(1, 1, 3000, 1), None
        data = Data(*tensors, torch.full((1, 1), 0.9), torch.ones(1, 1))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), hard))  # P_π is 69 MiB
        try:
            native.solve(data, None)
        except MemoryError:
            print("a memory error")
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        print("afterwards", native.solve(data, None)[6].tolist())
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["a memory error", "afterwards [[0]]"], done.stderr


# ---- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "batch", "repeats"), [(8, 250, 250), (GENERAL, 3, 30)], ids=["small", "general"]
)
def test_the_same_input_gives_the_same_bits(
    threads: Callable[[int], None], states: int, batch: int, repeats: int
) -> None:
    reward, transition = data(states, 3, batch, dtype=F32)
    leaves = [reward.requires_grad_(), transition.requires_grad_()]
    expected: list[torch.Tensor] = []
    for count in (1, 2, 3, 5):
        threads(count)
        for _ in range(repeats):
            solution = birl_ext.solve(*leaves, discount=0.9, temperature=0.3)
            outputs = [solution.value.sum(), solution.policy.square().sum()]
            found = [*solution, *torch.autograd.grad(outputs, leaves)]
            expected = expected or found
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("terminal", [False, True], ids=["goes_on", "ends"])
@pytest.mark.parametrize("states", [20, GENERAL])
def test_a_problem_does_not_depend_on_those_before_it(
    states: int, terminal: bool, sparse: bool
) -> None:
    """A worker keeps what it knows of a transition; the next problem must not notice."""
    case = make_case(3, states, 3, problems=5, terminal=terminal, sparse=sparse)
    together = run_solve(case)
    for g in range(5):
        one = slice(g, g + 1)
        alone = run_solve(
            replace(
                case,
                reward=case.reward[:, one],
                discount=case.discount[:, one],
                temperature=case.temperature[:, one],
            )
        )
        assert np.array_equal(alone.value[0, 0], together.value[0, g])
        assert np.array_equal(alone.policy[0, 0], together.policy[0, g])
        assert np.array_equal(alone.info[0, 0], together.info[0, g])


@pytest.mark.parametrize("states", [3, GENERAL])
def test_a_singular_system_spoils_no_other(states: int) -> None:
    """Unchecked, a row (2, −1) makes the matrix singular at γ = 1/2; its worker goes on."""
    reward, transition = data(states, 1, 2)
    transition[0, :, 0] = torch.eye(states, dtype=F64)
    transition[0, 0, 0, :2] = torch.tensor([2.0, -1.0])
    half, one = torch.full((2, 1), 0.5, dtype=F64), torch.ones(2, 1, dtype=F64)
    policy, rhs = torch.ones(2, 1, states, 1, dtype=F64), torch.ones(2, 1, 1, states, dtype=F64)

    def solutions(at: slice) -> list[torch.Tensor]:
        mine = transition[at].clone()
        solved = compiled_solve(
            mine, None, None, reward[at, None], None, half[at], one[at], None, method=2, validate=0
        )
        systems = [
            native.policy_solve(
                (mine, None, None), policy[at], half[at], rhs[at], method=2, transpose=transpose
            )[0]
            for transpose in (False, True)
        ]
        return [*solved, *systems]

    for alone, both in zip(solutions(slice(1, 2)), solutions(slice(0, 2)), strict=True):
        assert torch.equal(alone[0], both[1])


# ---- certificates -------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("states", [20, GENERAL])
def test_no_certificate_without_reading_the_transition(states: int, sparse: bool) -> None:
    """T0 of a constant reward is constant: where all goes on, and only there, it is V* but for a
    constant.
    """
    case = make_case(0, states, 2, terminal=True, sparse=sparse)
    case.reward[:] = 1.0
    for method in range(5):
        found = run_solve(case, method=method, tol=1e-3)
        gap = np.abs(found.value[0, 0] - fixed_point(case, 0, 0)[0]).max()
        assert gap <= found.info[0, 0, Info.ERROR_BOUND], method


@pytest.mark.parametrize("discount", [0.0, 0.5])
@pytest.mark.parametrize("states", [20, GENERAL])
def test_a_loose_tolerance_does_not_excuse_a_bad_transition(states: int, discount: float) -> None:
    reward, transition = data(states, 2)
    reward.fill_(1.0)
    transition[3, 1, 4] += 0.5
    with pytest.raises(errors.NonStochasticError, match="state 3, action 1"):
        birl_ext.solve(reward, transition, discount=discount, temperature=0.1, tol=0.5)


# ---- the ends of single precision ---------------------------------------------------------------


def corner(
    states: int,
    actions: int,
    reward: float,
    temperature: float,
    discount: float,
    extras: str = "plain",
) -> Case:
    case = make_case(
        states + 7 * actions,
        states,
        actions,
        storage=np.float32,
        temperature=temperature,
        terminal="terminal" in extras,
        masked="masked" in extras,
    )
    size = np.abs(case.reward).max()
    case.reward[:] = (case.reward / size * reward).astype(np.float32)
    case.discount[:] = discount
    return case


SIZES = [(1, 1), (1, 17), (5, 1), (17, 3), (33, 17), (127, 2), (128, 1), (128, 2), (129, 2)]


def check_corner(case: Case) -> None:
    """Within the bound of the truth; finite wherever arithmetic in double precision alone is.

    An overflow where the tables, which are in single precision, cannot hold it.
    """
    wide = replace(
        case,
        transition=normalised(case.transition).astype(np.float64),
        reward=case.reward.astype(np.float64),
    )
    double = run_solve(wide, method=1 if case.discount[0, 0] < 0.99 else 2)
    truth = fixed_point(case, 0, 0)[0].astype(np.float64)
    # the truth's rounding: it is not in relative form
    own = np.finfo(np.longdouble).eps / (1 - case.discount[0, 0]) + 2 * EPS
    own *= np.abs(truth).max()
    for method in (0, 1) if case.discount[0, 0] < 0.99 else (0,):
        found = run_solve(case, method=method)
        lost = np.abs(truth).max() > np.finfo(np.float32).max
        if case.log_reference is None:
            lost = lost or np.isinf(found.q).any()
        assert double.status[0, 0] == Status.CONVERGED
        assert found.status[0, 0] == (Status.NON_FINITE if lost else Status.CONVERGED)
        bound = found.info[0, 0, Info.ERROR_BOUND]
        assert np.isfinite(bound)
        assert np.isfinite(found.value).all()
        gap = np.abs(found.value[0, 0] - truth).max()
        assert gap <= bound + own, (gap, bound)
        # no worse than a few times what double precision certifies
        assert bound <= 10 * double.info[0, 0, Info.ERROR_BOUND], bound
        assert not np.isnan(found.policy).any()
        assert not np.isnan(found.log_policy).any()
        assert not np.isnan(found.q).any()
        np.testing.assert_allclose(found.policy, double.policy, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reward", [0.0, 1e-38, 1e-30, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-35, 1e-29, 1e-3, 1.0, 1e29, 1e35, 1e300])
def test_rewards_and_temperatures_of_any_size(reward: float, temperature: float) -> None:
    for extras in ("plain", "masked", "terminal"):
        check_corner(corner(9, 3, reward, temperature, 0.9, extras))


@pytest.mark.parametrize("discount", [0.0, 1e-30, 0.9, 1 - 1e-7])
@pytest.mark.parametrize("extras", ["plain", "masked", "terminal", "masked terminal"])
@pytest.mark.parametrize(("states", "actions"), SIZES)
def test_sizes_and_discounts(states: int, actions: int, extras: str, discount: float) -> None:
    case = corner(states, actions, 1.0, 0.1, discount, extras)
    kernel = Kernel.CPU_LANES if states <= 128 else Kernel.CPU_ROWS
    assert run_solve(case).info[0, 0, Info.KERNEL] == kernel
    check_corner(case)


@pytest.mark.parametrize("reference", [-1e300, -1e30, -100.0, 1e30, 300.0])
def test_references_that_single_precision_cannot_hold(reference: float) -> None:
    for every in (False, True):
        case = corner(9, 3, 1.0, 0.5, 0.9, "masked")
        assert case.log_reference is not None
        available = np.isfinite(case.log_reference)
        case.log_reference[available & (every | (np.arange(3) == 1))] = reference
        check_corner(case)
