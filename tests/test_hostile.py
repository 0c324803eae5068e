"""What a careless or hostile caller can hand to the compiled CPU kernels: a named error, or the
right answer.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import closeness
import numpy as np
import pytest
import torch
from cases import Case, kernel_arguments, kernel_policy_solve, kernel_solve, untyped
from closeness import assert_close
from flint import arb, ctx
from oracle import exact

import birl_ext
from birl_ext import errors
from birl_ext.ops.backends import loader, native
from birl_ext.ops.request import Saved
from birl_ext.options import BackendName, MethodName
from birl_ext.solution import Info, Kernel, Solution, Status

if loader.reason("cpu"):
    pytest.skip(f"no compiled CPU module: {loader.reason('cpu')}", allow_module_level=True)

F32, F64 = torch.float32, torch.float64
METHODS: tuple[MethodName, ...] = get_args(MethodName)
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


def dense(
    transition: torch.Tensor,
    reward: torch.Tensor,
    discount: torch.Tensor,
    temperature: torch.Tensor,
) -> dict[str, Any]:
    """Arguments of the kernels."""
    rest = {"crow": None, "col": None, "log_reference": None}
    numbers = {"discount": discount, "temperature": temperature}
    return {"transition": transition, "reward": reward, **rest, **numbers}


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
    arguments = kernel_arguments(Case("garnet", 5, 2).mdp().to_sparse(), 0.1)
    crow, col = arguments["crow"], arguments["col"]
    for at, number in (
        (10, 2**31),
        (10, 2**62),
        (4, 2**62),
        (3, -1),
        (0, 1),
        (0, -(2**62)),
        (2, int(crow[3]) + 1),
    ):
        wrong = crow.clone()
        wrong[at] = number
        with pytest.raises(ValueError, match="crow"):
            kernel_solve({**arguments, "crow": wrong})
    for number in (-1, 5, 2**31, 2**62, -(2**62)):
        wrong = col.clone()
        wrong[-1] = number
        with pytest.raises(ValueError, match="column"):
            kernel_solve({**arguments, "col": wrong})


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
    found = kernel_solve(dense(transition, reward, rate, tau), method=1)
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
    found = kernel_solve(dense(transition, reward, 0.9 * one, one))
    assert not found[6].any()
    assert bool((found[0][-2] == 3.0).all())
    assert not found[0][:-2].any()
    alone = kernel_solve(dense(last, reward[-1:].contiguous(), 0.9 * one[-1:], one[-1:]))
    assert torch.equal(found[0][-1:], alone[0])
    bar = torch.zeros_like(found[0])
    bar[-1] = 1.0
    solution = (found[i] for i in (0, 2, 3, 5, 6))
    absent = untyped(None)
    saved = Saved._make((transition, absent, absent, 0.9 * one, one, *solution, absent))
    bars, needs = (bar, None, None, None, None), (False, True, False, False, False)
    reward_bar = native.solve_vjp(saved, bars, needs)[1]
    assert reward_bar is not None
    assert not reward_bar[:-1].any()
    assert float(reward_bar[-1].sum()) == pytest.approx(states / (1 - 0.9), rel=1e-5)


# ---- layouts ------------------------------------------------------------------------------------


def offset(tensor: torch.Tensor, by: int = 1) -> torch.Tensor:
    """The same numbers, some entries away from where the allocator would put them."""
    storage = torch.empty(tensor.numel() + by, dtype=tensor.dtype)
    moved = storage[by:].view(tensor.shape)
    return moved.copy_(tensor)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


def negated(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.bool else torch._neg_view(-tensor)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "offset": offset,
    "offset by three": lambda tensor: offset(tensor, 3),
    "transposed": transposed,
    "first axis last": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "flipped": lambda tensor: tensor.flip(-1).contiguous().flip(-1),
    "strided": strided,
    "negated": negated,
}


def everything(
    reward: torch.Tensor,
    transition: torch.Tensor,
    optional: dict[str, torch.Tensor],
    layout: Callable[[torch.Tensor], torch.Tensor],
    backend: BackendName = "auto",
) -> list[torch.Tensor]:
    """solve and its gradient, bellman, evaluate and occupancy."""
    leaves = [layout(x).detach().requires_grad_() for x in (reward, transition)]
    rates: dict[str, Any] = {"discount": 0.9, "temperature": 0.3, "backend": backend}
    given: dict[str, Any] = {name: layout(tensor) for name, tensor in optional.items()}
    solution = birl_ext.solve(leaves[0], leaves[1], **rates, **given)
    given.pop("initial", None)
    generator = torch.Generator().manual_seed(5)
    bar = torch.randn(solution.value.shape, generator=generator, dtype=F64).to(reward.dtype)
    gradients = torch.autograd.grad(
        [solution.value, solution.policy],
        leaves,
        [layout(bar), layout(torch.ones_like(solution.policy))],
    )
    plain = [leaf.detach() for leaf in leaves]
    policy = layout(solution.policy.detach())
    swept = birl_ext.bellman(layout(bar), plain[0], plain[1], **rates, **given)
    fixed: dict[str, Any] = {"discount": 0.9, "backend": backend}
    value = birl_ext.evaluate(policy, *plain, **fixed)
    start = layout(torch.full_like(bar, 1 / bar.shape[-1]))
    share = birl_ext.occupancy(policy, plain[1], initial_distribution=start, **fixed)
    return [*solution, *gradients, *swept, value, share]


def assert_same_bits(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        closeness.assert_same_bits(one, other, label=number)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "optional"])
@pytest.mark.parametrize(
    ("states", "backend"), [(5, "torch"), (5, "cpu"), (20, "cpu"), (GENERAL + 3, "cpu")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(
    layout: str, states: int, optional: bool, dtype: torch.dtype, backend: BackendName
) -> None:
    reward, transition = data(states, 3, 2, dtype=dtype)
    given = {}
    if optional:
        given["reference"] = torch.rand(2, states, 3, dtype=dtype) + 0.1
        given["mask"] = torch.rand(2, states, 3) < 0.8
        given["mask"][..., 0] = True
        given["initial"] = torch.randn(2, states, dtype=dtype)
    expected = everything(reward, transition, given, torch.clone, backend)
    found = everything(reward, transition, given, LAYOUTS[layout], backend)
    assert_same_bits(found, expected)


@pytest.mark.parametrize(("states", "backend"), [(5, "torch"), (5, "cpu"), (GENERAL, "cpu")])
def test_expanded_views_do_not_change_a_bit(states: int, backend: BackendName) -> None:
    """One reward for many models, one model for many rewards, one of each."""
    reward, transition = data(states, 2)
    many, models = data(states, 2, 3, seed=1)
    for r, p in ((reward, models), (many, transition), (reward, transition)):
        views = r.expand(3, -1, -1), p.expand(3, -1, -1, -1)
        copies = [view.contiguous() for view in views]
        found = everything(*views, {}, lambda tensor: tensor, backend)
        assert_same_bits(found, everything(copies[0], copies[1], {}, torch.clone, backend))


# ---- nothing to do, and other devices -----------------------------------------------------------


def test_tensors_on_two_devices_are_named() -> None:
    reward, transition = data(4, 2)
    value, policy = torch.zeros(4, dtype=F64), torch.full((4, 2), 0.5, dtype=F64)
    far = transition.to("meta")
    rates: dict[str, Any] = {"discount": 0.9, "temperature": 0.1}
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


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("states", "batch", "repeats", "backend"),
    [(40, 6, 1, "torch"), (8, 250, 125, "cpu"), (GENERAL, 3, 30, "cpu"), (700, 1, 1, "cpu")],
    ids=["torch", "small", "general", "one"],
)
def test_the_same_input_gives_the_same_bits(
    threads: Callable[[int], None],
    states: int,
    batch: int,
    repeats: int,
    sparse: bool,
    backend: BackendName,
) -> None:
    base = Case("garnet", states, 3, batch=(batch,), dtype=F32, seed=5).mdp()
    given = base.to_sparse() if sparse else base
    rows = "values" if sparse else "transition"
    leaves = [getattr(given, name).clone().requires_grad_() for name in ("reward", rows)]
    mdp = given.replace(**dict(zip(("reward", rows), leaves, strict=True)), validate="off")
    for method in METHODS:
        expected: list[torch.Tensor] = []
        for count in (1, 2, 3, 5):
            threads(count)
            for _ in range(repeats if method == "auto" else 1):
                solution = birl_ext.solve(mdp, temperature=0.3, method=method, backend=backend)
                outputs = [solution.value.sum(), solution.policy.square().sum()]
                found = [*solution, *torch.autograd.grad(outputs, leaves, retain_graph=True)]
                expected = expected or found
                assert_same_bits(found, expected)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("terminal", [False, True], ids=["goes_on", "ends"])
@pytest.mark.parametrize("states", [20, GENERAL])
def test_a_problem_does_not_depend_on_those_before_it(
    states: int, terminal: bool, sparse: bool
) -> None:
    """A worker keeps what it knows of a transition; the next problem must not notice."""
    mdp: Any = Case("garnet", states, 3, batch=(5,), shared=True, terminal=terminal).mdp()
    mdp = mdp.to_sparse() if sparse else mdp
    together = birl_ext.solve(mdp, temperature=0.1)
    for g in range(5):
        alone = birl_ext.solve(mdp.replace(reward=mdp.reward[g]), temperature=0.1)
        assert_same_bits(alone, [part[g] for part in together])


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
        arguments = dense(mine, reward[at, None], half[at], one[at])
        solved = kernel_solve(arguments, method=2, validate=0)
        systems = [
            kernel_policy_solve(
                (mine, None, None), policy[at], half[at], rhs[at], transpose=transpose
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
    base = Case("garnet", states, 2, terminal=True).mdp()
    base = base.replace(reward=torch.ones(states, 2, dtype=F64))
    truth = exact_value(kernel_arguments(base, 0.1))
    for method in METHODS:
        found = birl_ext.solve(
            base.to_sparse() if sparse else base, temperature=0.1, method=method, tol=1e-3
        )
        assert_close(found.value, truth, bound=found.error_bound, label=method)


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
) -> dict[str, Any]:
    """Arguments of the kernels, one problem in single precision."""
    case = Case(
        "garnet",
        states,
        actions,
        branching=4,
        dtype=F32,
        terminal="terminal" in extras,
        mask="masked" in extras,
        reference="masked" in extras,
        seed=7 * actions,
    )
    arguments = kernel_arguments(case.mdp(), temperature)
    table = arguments["reward"]
    size = table.abs().max().clamp(min=1e-9)  # all of it may lie behind the mask
    arguments["reward"] = table / size * reward
    arguments["discount"].fill_(discount)
    return arguments


def exact_value(arguments: dict[str, Any]) -> np.ndarray:
    """V* by 512 bits; a reference of any size counts as a reward, τ log μ."""
    reward, log_reference = arguments["reward"][0, 0], arguments["log_reference"]
    tau = float(arguments["temperature"])
    logs = np.zeros(reward.shape) if log_reference is None else log_reference[0, 0].numpy()
    model = exact.Model.of(
        reward.numpy(),
        arguments["transition"][0].numpy(),
        discount=float(arguments["discount"]),
        temperature=tau,
        mask=np.isfinite(logs),
    )
    size = np.abs(logs[np.isfinite(logs)]).max()
    bits = model.bits + int(np.log2(1 + size))
    with ctx.workprec(bits):
        pairs = zip(model.reward, logs.ravel().tolist(), strict=True)
        pays = [r if np.isinf(log) else (r + arb(tau) * arb(log)).mid() for r, log in pairs]
    return exact.solve(dataclasses.replace(model, reward=pays, bits=bits)).floats().value


def check_corner(arguments: dict[str, Any]) -> None:
    """Within the bound of the truth; finite wherever arithmetic in double precision alone is.

    An overflow where the tables, which are in single precision, cannot hold it.
    """
    wide = arguments["transition"].double()
    total = wide.sum(-1, keepdim=True)
    wide /= total.where(total > 0, 1.0)
    low = float(arguments["discount"]) < 0.99
    reward = arguments["reward"].double()
    double = solved({**arguments, "transition": wide, "reward": reward}, 1 if low else 2)
    truth = exact_value(arguments)
    for method in (0, 1) if low else (0,):
        found = solved(arguments, method)
        lost = np.abs(truth).max() > torch.finfo(F32).max
        if arguments["log_reference"] is None:
            lost = lost or bool(found.q.isinf().any())
        assert double.status == Status.CONVERGED
        assert found.status == (Status.NON_FINITE if lost else Status.CONVERGED)
        bound = float(found.error_bound)
        assert np.isfinite(bound)
        gap = np.abs(found.value[0, 0].numpy() - truth).max()
        rounding = torch.finfo(F64).eps * np.abs(truth).max()  # of the truth
        assert gap <= bound + rounding, (gap, bound)
        # no worse than a few times what double precision certifies
        assert bound <= 10 * float(double.error_bound), bound
        assert not any(table.isnan().any() for table in found[1:5])
        torch.testing.assert_close(found.policy.double(), double.policy, rtol=1e-5, atol=1e-7)


def solved(arguments: dict[str, Any], method: int = 0) -> Solution:
    value, q, advantage, policy, log_policy, info, status, _ = kernel_solve(
        arguments, method=method
    )
    return Solution(value, q, policy, log_policy, advantage, info, status)


SIZES = [(1, 1), (1, 17), (5, 1), (17, 3), (33, 17), (127, 2), (128, 1), (128, 2), (129, 2)]


@pytest.mark.parametrize("reward", [0.0, 1e-38, 1e-30, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-35, 1e-29, 1e-3, 1.0, 1e29, 1e35, 1e300])
def test_rewards_and_temperatures_of_any_size(reward: float, temperature: float) -> None:
    for extras in ("plain", "masked", "terminal"):
        check_corner(corner(9, 3, reward, temperature, 0.9, extras))


@pytest.mark.slow
@pytest.mark.parametrize("discount", [0.0, 1e-30, 0.9, 1 - 1e-7])
@pytest.mark.parametrize("extras", ["plain", "masked", "terminal", "masked terminal"])
@pytest.mark.parametrize(("states", "actions"), SIZES)
def test_sizes_and_discounts(states: int, actions: int, extras: str, discount: float) -> None:
    arguments = corner(states, actions, 1.0, 0.1, discount, extras)
    kernel = Kernel.CPU_PACKED if states <= 128 else Kernel.CPU_ROWS
    assert solved(arguments).info[0, 0, Info.KERNEL] == kernel
    check_corner(arguments)


@pytest.mark.parametrize("reference", [-1e300, -1e30, -100.0, 1e30, 300.0])
def test_references_that_single_precision_cannot_hold(reference: float) -> None:
    for every in (False, True):
        arguments = corner(9, 3, 1.0, 0.5, 0.9, "masked")
        logs = arguments["log_reference"]
        available = logs.isfinite()
        logs[available & (every | (torch.arange(3) == 1))] = reference
        check_corner(arguments)
