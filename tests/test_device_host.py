"""The CUDA kernels without a GPU: their bodies and their glue, run by host threads.

`tests/native` compiles the kernels of csrc/cuda for the host, and csrc/cuda/entry/module.cpp over
them to a module `_cuda`. Here that module takes the place of the compiled one, and CPU tensors
that of GPU tensors, so that everything but launches, streams and the hardware is exercised.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import kernel_policy_solve, untyped

import birl_ext
from birl_ext import errors
from birl_ext.ops import request
from birl_ext.ops.backends import choice, cuda, loader, native
from birl_ext.ops.rows import Rows
from birl_ext.options import BackendName, MethodName
from birl_ext.solution import Info, Kernel, Status

pytestmark = pytest.mark.slow  # the kernels are compiled for the host
ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tests" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def compile_module(folder: Path) -> Path:
    """The module `_cuda` over the host double."""
    import pybind11

    out = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [
        NATIVE / "stub",
        ROOT / "csrc",
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    sources = [ROOT / "csrc/cuda/entry/module.cpp", NATIVE / "launchers_host.cpp"]
    command = [
        str(COMPILER),
        *("-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"),
        *(f"-I{folder}" for folder in includes),
        f'-DBIRL_VERSION="{birl_ext.__version__}"',
        f'-DBIRL_SOURCES="{loader.build_info("cpu")["sources"]}"',
        '-DBIRL_CUDA_ARCHITECTURES="75-real 80-real 90"',
        *map(str, sources),
        *("-o", str(out)),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if COMPILER is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("no C++ compiler, or no pybind11: nothing to build")
    path = compile_module(tmp_path_factory.mktemp("cuda_host"))
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def gpu(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """CPU tensors go to the CUDA glue, and the glue to the host double."""
    backend = loader._Backend("cuda")
    backend._tried, backend.module = True, module
    monkeypatch.setitem(loader._backends, "cuda", backend)
    monkeypatch.setattr(cuda, "_stream", lambda index: 0)
    monkeypatch.setattr(cuda, "_index", lambda device: 0)
    # the short way to the CPU's kernels is not for tensors on a GPU
    monkeypatch.setattr("birl_ext.functional.fast.solve", lambda *_: None)
    monkeypatch.setattr(native, "_run", cuda.launch)
    # The GPU has no fused backward of its own; its outer product is a kernel.
    monkeypatch.setattr(choice, "solve_vjp", lambda *_: None)
    monkeypatch.setattr(choice, "first_order", lambda rows, _: choice._CompiledRows(*rows))
    return module


def problem(
    states: int, actions: int, dtype: torch.dtype, batch: tuple[int, ...] = (2,), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    size = (*batch, states, actions)
    transition = torch.rand((*size, states), generator=random, dtype=torch.float64) ** 4
    transition /= transition.sum(-1, keepdim=True)
    reward = torch.randn(size, generator=random, dtype=torch.float64)
    return reward.to(dtype), transition.to(dtype)


KERNELS = [  # states, actions, and the kernel that the host's small "shared memory" leads to
    (5, 3, Kernel.CUDA_WARP),
    (8, 16, Kernel.CUDA_WARP),
    (16, 4, Kernel.CUDA_WARP),
    (16, 6, Kernel.CUDA_WARP),
    (17, 3, Kernel.CUDA_BLOCK),  # P on chip
    (40, 4, Kernel.CUDA_BLOCK),  # P in memory, the elimination on chip
    (70, 2, Kernel.CUDA_BLOCK),  # the elimination in the workspace
]


@pytest.mark.parametrize(("states", "actions", "kernel"), KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_agrees_with_pytorch(
    gpu: ModuleType, states: int, actions: int, kernel: Kernel, dtype: torch.dtype
) -> None:
    reward, transition = problem(states, actions, dtype)
    options: dict[str, Any] = {"discount": 0.99, "temperature": 0.1}
    found = birl_ext.solve(reward, transition, **options)
    truth = birl_ext.solve(reward, transition, **options, backend="torch")
    assert found.info[..., Info.KERNEL].unique().tolist() == [kernel]
    gap = (found.value.double() - truth.value.double()).abs()
    assert bool((gap.amax(-1) <= found.error_bound + truth.error_bound).all())
    torch.testing.assert_close(found.policy, truth.policy)
    torch.testing.assert_close(found.log_policy, truth.log_policy)
    torch.testing.assert_close(found.q, truth.q)


def test_gradients_agree_with_pytorch(gpu: ModuleType) -> None:
    reward, transition = problem(17, 3, torch.float64)

    def gradients(backend: BackendName) -> list[torch.Tensor]:
        leaves = [reward.clone().requires_grad_(), transition.clone().requires_grad_()]
        found = birl_ext.solve(
            leaves[0], leaves[1], discount=0.95, temperature=0.2, backend=backend
        )
        (found.value.square().sum() + found.log_policy.sin().sum()).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for found, truth in zip(gradients("auto"), gradients("torch"), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)


def test_masks_ends_and_starts(gpu: ModuleType) -> None:
    reward, transition = problem(9, 4, torch.float64)
    mask = torch.rand(9, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 0] = True
    terminal = torch.zeros(9, dtype=torch.bool)
    terminal[3] = True
    options: dict[str, Any] = {
        "discount": 0.97,
        "temperature": 0.1,
        "mask": mask,
        "terminal": terminal,
    }
    found = birl_ext.solve(reward, transition, **options)
    truth = birl_ext.solve(reward, transition, **options, backend="torch")
    torch.testing.assert_close(found.value, truth.value)
    torch.testing.assert_close(found.policy, truth.policy)
    again = birl_ext.solve(reward, transition, **options, initial=found.value)
    torch.testing.assert_close(again.value, found.value)
    assert bool((again.iterations <= found.iterations).all())


def test_sparse_rows(gpu: ModuleType) -> None:
    reward, transition = problem(20, 3, torch.float64, ())
    transition = torch.where(transition > 0.05, transition, 0)
    transition /= transition.sum(-1, keepdim=True)
    stored = transition.reshape(60, 20) > 0
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), stored.sum(1).cumsum(0)])
    values, col = transition.reshape(60, 20)[stored], stored.nonzero()[:, 1]
    mdp = birl_ext.SparseMDP(reward, values, crow, col, discount=0.97)
    found = birl_ext.solve(mdp, temperature=0.1)
    truth = birl_ext.solve(reward, transition, discount=0.97, temperature=0.1, backend="torch")
    assert int(found.info[Info.KERNEL]) == Kernel.CUDA_CSR
    torch.testing.assert_close(found.value, truth.value)


def test_a_bad_problem_is_named(gpu: ModuleType) -> None:
    reward, transition = problem(17, 3, torch.float64, (3,))
    reward[1, 4, 2] = torch.nan
    status = birl_ext.solve(
        reward, transition, discount=0.9, temperature=0.1, on_fail="status"
    ).status
    assert status.tolist() == [0, Status.NON_FINITE_REWARD, 0]
    with pytest.raises(errors.NonFiniteInputError, match="batch 1, state 4, action 2"):
        birl_ext.solve(reward, transition, discount=0.9, temperature=0.1)


def test_nothing_to_solve(gpu: ModuleType) -> None:
    reward, transition = problem(4, 2, torch.float64, (0,))
    assert birl_ext.solve(reward, transition, discount=0.9, temperature=1.0).value.shape == (0, 4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outer(gpu: ModuleType, sparse: bool, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    n, g, s, a = 2, 3, 11, 4
    weight, vector = (
        torch.randn(n, g, s, a, generator=random),
        torch.randn(n, g, s, generator=random),
    )
    shift = torch.randn(n, s, a, generator=random)
    if sparse:
        stored = torch.rand(s * a, s, generator=random) < 0.3
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), stored.sum(1).cumsum(0)])
        col = stored.nonzero()[:, 1].contiguous()
        data = torch.rand(n, col.numel(), generator=random).to(dtype)
    else:
        crow = col = untyped(None)
        data = torch.rand(n, s, a, s, generator=random).to(dtype)
    absent = torch.empty(0, dtype=torch.int64)
    rows = Rows(data, absent if crow is None else crow, absent if col is None else col, s, a)
    arguments = [x.double() for x in (weight, vector, shift)]
    found = native.outer((data, crow, col), *arguments)
    torch.testing.assert_close(found, rows.outer(*arguments))


# ---- large problems: the whole device works on one ---------------------------------------------


@pytest.fixture
def large(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As `gpu`, and every problem counts as large."""
    monkeypatch.setattr(cuda, "solve_fits", lambda *_: False)
    monkeypatch.setattr(cuda, "policy_solve_fits", lambda _: False)
    return gpu


def sparse_problem(
    states: int, actions: int, dtype: torch.dtype, *, ends: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reward, and P in CSR form: each action leads to up to three states, perhaps one to none."""
    random = torch.Generator().manual_seed(2)
    reward = torch.randn(states, actions, generator=random, dtype=torch.float64)
    rows = torch.arange(states * actions) // actions
    reach = torch.randint(1, 40, (states * actions, 3), generator=random)
    col = (rows[:, None] + reach.cumsum(1)) % states
    col = col.sort(dim=1).values
    keep = torch.ones_like(col, dtype=torch.bool)
    keep[:, 1:] = col[:, 1:] != col[:, :-1]
    if ends:
        keep[5] = False
    values = torch.rand(col.shape, generator=random, dtype=torch.float64) * keep
    values /= values.sum(1, keepdim=True).clamp(min=1e-300)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    return reward.to(dtype), values[keep].to(dtype), crow, col[keep]


def densely(
    values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, states: int
) -> torch.Tensor:
    row = torch.repeat_interleave(torch.arange(crow.numel() - 1), crow.diff())
    dense = torch.zeros(crow.numel() - 1, states, dtype=torch.float64)
    return dense.index_put((row, col.long()), values).view(states, -1, states)


@pytest.mark.parametrize("states", [1, 40, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_dense_problems(large: ModuleType, states: int, dtype: torch.dtype) -> None:
    reward, transition = problem(states, 3, dtype, (3,))  # odd rows are not aligned
    options: dict[str, Any] = {"discount": 0.99, "temperature": 0.1}
    found = birl_ext.solve(reward, transition, **options)
    truth = birl_ext.solve(reward, transition, **options, backend="torch")
    assert found.info[..., Info.KERNEL].unique().tolist() == [Kernel.CUDA_GRID]
    gap = (found.value.double() - truth.value.double()).abs()
    assert bool((gap.amax(-1) <= found.error_bound + truth.error_bound).all())
    torch.testing.assert_close(found.policy, truth.policy)
    torch.testing.assert_close(found.log_policy, truth.log_policy)
    torch.testing.assert_close(found.q, truth.q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_lone_large_problem(gpu: ModuleType, dtype: torch.dtype) -> None:
    reward, transition = problem(601, 2, dtype, ())
    found = birl_ext.solve(reward, transition, discount=0.999, temperature=0.1)
    truth = birl_ext.solve(reward, transition, discount=0.999, temperature=0.1, backend="torch")
    assert int(found.info[Info.KERNEL]) == Kernel.CUDA_GRID
    gap = (found.value.double() - truth.value.double()).abs().max()
    assert bool(gap <= found.error_bound + truth.error_bound)
    torch.testing.assert_close(found.policy, truth.policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_sparse_problem(gpu: ModuleType, dtype: torch.dtype) -> None:
    reward, values, crow, col = sparse_problem(2600, 3, dtype)
    mdp = birl_ext.SparseMDP(reward, values, crow, col, 0.97)
    found = birl_ext.solve(mdp, temperature=0.1)
    assert int(found.info[Info.KERNEL]) == Kernel.CUDA_GRID_CSR
    truth = birl_ext.solve(mdp, temperature=0.1, backend="torch")
    gap = (found.value.double() - truth.value.double()).abs().max()
    assert bool(gap <= found.error_bound + truth.error_bound)
    torch.testing.assert_close(found.policy, truth.policy)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_large_problems(large: ModuleType, sparse: bool) -> None:
    if sparse:
        reward, values, crow, col = sparse_problem(45, 3, torch.float64)
    else:
        reward, values = problem(45, 3, torch.float64, ())

    def gradients(backend: BackendName) -> list[torch.Tensor]:
        leaves = [reward.clone().requires_grad_(), values.clone().requires_grad_()]
        if sparse:
            mdp = birl_ext.SparseMDP(leaves[0], leaves[1], crow, col, 0.95)
            found = birl_ext.solve(mdp, temperature=0.2, backend=backend)
        else:
            found = birl_ext.solve(
                leaves[0], leaves[1], discount=0.95, temperature=0.2, backend=backend
            )
        (found.value.square().sum() + found.log_policy.sin().sum()).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for found, truth in zip(gradients("auto"), gradients("torch"), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("states", [37, 400])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("right_sides", [1, 8])
def test_large_policy_systems(
    large: ModuleType, states: int, sparse: bool, transpose: bool, right_sides: int
) -> None:
    random = torch.Generator().manual_seed(4)
    if sparse:
        _, values, crow, col = sparse_problem(states, 2, torch.float64, ends=True)
        transition = densely(values, crow, col, states)
        model: tuple[Any, ...] = (values[None], crow, col)
    else:
        _, transition = problem(states, 2, torch.float64, ())
        model = (transition[None], None, None)
    policy = torch.rand(1, 1, states, 2, generator=random, dtype=torch.float64)
    policy /= policy.sum(-1, keepdim=True)
    discount = torch.full((1, 1), 0.999, dtype=torch.float64)
    rhs = torch.randn(1, 1, right_sides, states, generator=random, dtype=torch.float64)
    x, residual, _ = kernel_policy_solve(model, policy, discount, rhs, transpose=transpose)
    matrix = torch.eye(states).double() - 0.999 * torch.einsum(
        "sat,sa->st", transition, policy[0, 0]
    )
    truth = torch.linalg.solve(matrix.T if transpose else matrix, rhs[0, 0].T).T
    size = truth.abs().sum() if transpose else truth.abs().max()
    assert float((x[0, 0] - truth).abs().max()) <= 1e-11 * float(size)
    assert bool((residual <= 1e-13 * size).all())


def test_the_iteration_limit_of_large_problems(large: ModuleType) -> None:
    reward, transition = problem(20, 3, torch.float64, ())
    options: dict[str, Any] = {"discount": 0.99, "temperature": 0.1, "on_fail": "status"}
    ways: list[tuple[MethodName, int]] = [("auto", 1), ("auto", 2), ("value-iteration", 5)]
    for method, limit in ways:
        found = birl_ext.solve(
            reward, transition, **options, method=method, max_iterations=limit, tol=1e-13
        )
        assert int(found.status) == Status.MAX_ITERATIONS
        assert int(found.iterations) == limit


def slow_system() -> tuple[torch.Tensor, ...]:
    """Two states that are hardly ever left, γ as close to one: millions of products."""
    leave = 1e-6
    transition = torch.tensor([[1 - leave, leave], [leave, 1 - leave]], dtype=torch.float64)
    policy = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    discount = torch.full((1, 1), 1.0 - 1e-6, dtype=torch.float64)
    rhs = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    return transition.view(1, 2, 1, 2), policy, discount, rhs


def test_a_slow_system_is_no_answer(large: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    transition, policy, discount, rhs = slow_system()
    x, residual, _ = kernel_policy_solve((transition, None, None), policy, discount, rhs)
    assert bool(x.isnan().all())
    assert bool((residual > 1e-6).all())
    assert not choice._solved(x)
    monkeypatch.setattr(choice, "_capturing", lambda _: True)
    assert choice._solved(x)  # nothing may wait for the device then


@pytest.mark.parametrize("transpose", [False, True])
def test_the_pattern_of_a_policy(transpose: bool) -> None:
    states, actions = 11, 3
    _, values, crow, col = sparse_problem(states, actions, torch.float64, ends=True)
    pattern = cuda._policy_pattern(crow, col, states, actions, transpose=transpose)
    starts, merged, slot = pattern
    summed = torch.zeros(col.numel(), dtype=torch.float64).index_add_(0, slot, values)
    count = int(starts[-1])
    found = densely(summed[:count], starts, merged[:count], states)[:, 0]
    wanted = densely(values, crow, col, states).sum(1)
    assert torch.allclose(found, wanted.T if transpose else wanted)
    assert count == int((wanted != 0).sum())
    nothing = crow.new_empty(0)
    empty = cuda._policy_pattern(torch.zeros(7).long(), nothing, 3, 2, transpose=transpose)
    assert [len(part) for part in empty] == [4, 0, 0]


# ---- what a device or a driver refuses ----------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 0), False),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 6), True),  # code of 8.0
        ((9, 0), True),
        ((10, 3), True),  # PTX of 9.0
        ((12, 0), True),
    ],
)
def test_which_device_a_build_runs_on(capability: tuple[int, int], runs: bool) -> None:
    assert cuda.runs_on("75-real 80-real 90", capability) is runs
    assert cuda.runs_on("native", capability)
    assert not cuda.runs_on("86-real", (8, 0))
    assert not cuda.runs_on("90-virtual", (8, 9))


def test_a_device_without_code_is_refused_once(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_refusals", {})
    monkeypatch.setattr(cuda, "_capability", lambda index: (7, 0))
    device = torch.device("cuda", 0)
    with pytest.warns(errors.BackendFallbackWarning, match=r"compute capability 7\.0"):
        assert not choice._compiled(device, request.AUTO)
    assert not choice._compiled(device, request.AUTO)  # without a second warning
    with pytest.raises(errors.BackendUnavailableError, match=r"built for 75-real"):
        choice._compiled(device, request.NATIVE)


def test_a_refused_launch_ends_in_pytorch(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise gpu.LaunchError("solve: out of resources")

    reward, transition = problem(17, 3, torch.float64)
    fake = ModuleType("fake")
    fake.__dict__.update({**vars(gpu), "solve": refuse})
    loader._backends["cuda"].module = fake
    options: dict[str, Any] = {"discount": 0.9, "temperature": 0.1}
    with pytest.warns(errors.BackendFallbackWarning, match="out of resources"):
        found = birl_ext.solve(reward, transition, **options)
    assert found.info[..., Info.KERNEL].unique().tolist() == [Kernel.TORCH]
    with pytest.raises(errors.BackendUnavailableError, match="out of resources"):
        birl_ext.solve(reward, transition, **options, backend="cpu")


@pytest.mark.parametrize("states", [6, 40, 600])
def test_one_sweep(gpu: ModuleType, states: int) -> None:
    """TV of any V, far from what a solution can be too."""
    reward, transition = problem(states, 3, torch.float64)
    for size in (1.0, 1e9):
        value = size * torch.randn(2, states, dtype=torch.float64)
        options: dict[str, Any] = {"discount": 0.9, "temperature": 0.1}
        found = birl_ext.bellman(value, reward, transition, **options, backend="cpu")
        truth = birl_ext.bellman(value, reward, transition, **options, backend="torch")
        for one, other in zip(found, truth, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * size)


def test_capture_cannot_raise(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_capturing", lambda tensor: True)
    monkeypatch.setattr("birl_ext.functional.is_concrete", lambda *_: False)
    reward, transition = problem(5, 2, torch.float64)
    with pytest.raises(errors.OptionError, match="CUDA graph"):
        birl_ext.solve(reward, transition, discount=0.9, temperature=0.1)
    birl_ext.solve(reward, transition, discount=0.9, temperature=0.1, on_fail="status")


def test_which_problems_the_whole_device_works_on(gpu: ModuleType) -> None:
    def fits(transitions: int, states: int) -> bool:
        addresses: dict[str, float] = dict.fromkeys(
            ("is_double", "transition", "reward", "discount", "temperature"), 0
        )
        sizes = {"transitions": transitions, "problems": 1, "states": states, "actions": 8}
        return cuda.solve_fits(addresses | sizes)

    assert fits(1, 512)
    assert not fits(1, 513)
    assert fits(32, 513)
    assert not cuda.policy_solve_fits(2501)


def test_what_is_too_large_is_named() -> None:
    with pytest.raises(errors.SizeLimitError, match="rows"):
        cuda._check_rows(2**20, 2**11)


# ---- registers and spills ----------------------------------------------------------------------


def resource_usage() -> ModuleType:
    """csrc/cuda/entry/resource_usage.py, as CI runs it."""
    path = ROOT / "csrc/cuda/entry/resource_usage.py"
    spec = importlib.util.spec_from_file_location("resource_usage", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_no_kernel_in_the_report_spills() -> None:
    report = json.loads((ROOT / "csrc/cuda/entry/resource_usage.json").read_text())
    architectures = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    assert len(report["kernels"]) >= 20
    for kernel, usage in report["kernels"].items():
        assert list(usage) == architectures, kernel
        assert all(use["spill"] == use["stack"] == 0 for use in usage.values()), kernel
        assert all(use["registers"] <= 255 for use in usage.values()), kernel


def test_a_spill_and_more_registers_are_complaints() -> None:
    log = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
ptxas info    : Function properties for _Z1kv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 1552 bytes smem
"""
    tool = resource_usage()
    found = tool.parse(log)
    assert found == {"k": {"sm_90": {"stack": 0, "spill": 0, "registers": 64, "shared": 1552}}}
    assert tool.complaints(found, found, same_compiler=True) == []
    more = tool.parse(log.replace("Used 64", "Used 65"))
    assert len(tool.complaints(more, found, same_compiler=True)) == 1
    assert tool.complaints(more, found, same_compiler=False) == []
    spilling = tool.parse(log.replace("0 bytes spill stores", "8 bytes spill stores"))
    assert len(tool.complaints(spilling, found, same_compiler=False)) == 1
    assert len(tool.complaints(found, {}, same_compiler=True)) == 1


# ---- the programs of tests/native ---------------------------------------------------------------


def test_programs(tmp_path: Path) -> None:
    """The layer in every order of its threads. CI builds all programs, with sanitizers."""
    if COMPILER is None or shutil.which("cmake") is None:
        pytest.skip("no C++ compiler or no cmake: nothing to build")
    programs = ["test_layer", "test_selection"]
    commands = [
        ["cmake", "-S", str(NATIVE), "-B", str(tmp_path)],
        ["cmake", "--build", str(tmp_path), "--target", *programs],
        *([str(tmp_path / program)] for program in programs),
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize(("states", "actions", "kernel"), KERNELS)
def test_one_pass_certifies_what_pytorch_does(
    gpu: ModuleType, states: int, actions: int, kernel: Kernel
) -> None:
    reward, transition = problem(states, actions, torch.float64)
    options: dict[str, Any] = {
        "discount": 0.99,
        "temperature": 0.1,
        "initial": reward[..., 0].clone(),
    }
    once: dict[str, Any] = {"max_iterations": 1, "on_fail": "status"}
    found = birl_ext.solve(reward, transition, **options, **once)
    truth = birl_ext.solve(reward, transition, **options, **once, backend="torch")
    assert found.info[..., Info.KERNEL].unique().tolist() == [kernel]
    torch.testing.assert_close(found.error_bound, truth.error_bound, rtol=0.01, atol=0.0)
    assert torch.equal(found.error_bounds, found.error_bound.unsqueeze(-1).expand_as(found.value))


@pytest.mark.parametrize("states", [5, 17, 40])
def test_wild_starts_and_penalties_nobody_takes(gpu: ModuleType, states: int) -> None:
    reward, transition = problem(states, 3, torch.float64)
    options: dict[str, Any] = {"discount": 0.99, "temperature": 0.1}
    plain = birl_ext.solve(reward, transition, **options)
    for size in (1e18, -1e18, 1e300, -1e300):
        initial = torch.full_like(reward[..., 0], size)
        found = birl_ext.solve(reward, transition, initial=initial, **options)
        assert bool((found.error_bound <= 4 * plain.error_bound).all())
        assert bool(((found.value - plain.value).abs().amax(-1) <= 2 * plain.error_bound).all())
    reward[..., 0] = -1e12
    found = birl_ext.solve(reward, transition, **options)
    want = birl_ext.solve(reward[..., 1:], transition[..., 1:, :], **options)
    torch.testing.assert_close(found.policy[..., 1:], want.policy, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("states", [1, 7, 33])
def test_derivatives_near_a_discount_of_one(gpu: ModuleType, states: int) -> None:
    generator = torch.Generator().manual_seed(states)
    rows = torch.rand(states, 2, states, generator=generator, dtype=torch.float64)
    rows = rows / rows.sum(-1, keepdim=True)
    reward = torch.rand(states, 2, generator=generator, dtype=torch.float64).requires_grad_()
    for gap in (1e-4, 1e-12):
        discount = torch.tensor(1 - gap, dtype=torch.float64, requires_grad=True)

        def slopes(backend: BackendName, discount: torch.Tensor = discount) -> list[torch.Tensor]:
            got = birl_ext.solve(reward, rows, discount=discount, temperature=0.1, backend=backend)
            loss = got.policy.square().sum()
            first = torch.autograd.grad(loss, (reward, discount), create_graph=True)
            if states == 1:  # nothing to derive again
                return [one.detach() for one in first]
            second = torch.autograd.grad(first[0].square().sum() + first[1], (reward, discount))
            return [one.detach() for one in (*first, *second)]

        found = slopes("auto")
        assert abs(float(found[0].sum())) < 1e-11
        for got, want in zip(found, slopes("torch"), strict=True):
            scale = 1 + float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * scale)
