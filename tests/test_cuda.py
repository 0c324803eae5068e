"""On a GPU: values and gradients against the CPU, graphs, streams, the same bits every time.

Skipped without a device. What can be tested without one is in test_device_host.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import kernel_policy_solve

import birl_ext
from birl_ext import errors
from birl_ext.solution import Info, Kernel, Solution

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPTIONS: dict[str, Any] = {"discount": 0.97, "temperature": 0.1}
SHAPES = [  # batch, states, actions, kernel
    (1, 1, 1, Kernel.CUDA_WARP),
    (1000, 8, 16, Kernel.CUDA_WARP),
    (1000, 16, 4, Kernel.CUDA_WARP),
    (37, 31, 5, Kernel.CUDA_BLOCK),
    (256, 32, 8, Kernel.CUDA_BLOCK),
    (37, 33, 8, Kernel.CUDA_BLOCK),
    (3, 65, 17, None),
    (2, 200, 4, None),
    (1, 600, 3, Kernel.CUDA_GRID),
    (3, 1001, 2, Kernel.CUDA_GRID),
]


def problem(
    batch: int, states: int, actions: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    size = (batch, states, actions)
    transition = torch.rand((*size, states), generator=random, dtype=torch.float64) ** 4
    transition /= transition.sum(-1, keepdim=True)
    return torch.randn(size, generator=random).to(dtype), transition.to(dtype)


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


def bits(solution: Solution) -> list[torch.Tensor]:
    return [x.clone() for x in (*solution[:5], solution.info, solution.status)]


@pytest.mark.parametrize(("batch", "states", "actions", "kernel"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values(
    batch: int, states: int, actions: int, kernel: Kernel | None, dtype: torch.dtype
) -> None:
    reward, transition = problem(batch, states, actions, dtype)
    truth = birl_ext.solve(reward, transition, **OPTIONS)
    found = birl_ext.solve(*on_gpu(reward, transition), **OPTIONS, backend="cuda")
    used = set(found.info[..., Info.KERNEL].flatten().tolist())
    assert used == {kernel} if kernel is not None else min(used) >= Kernel.CUDA_WARP
    gap = (found.value.cpu().double() - truth.value.double()).abs().amax(-1)
    assert bool((gap <= found.error_bound.cpu() + truth.error_bound).all())
    torch.testing.assert_close(found.policy.cpu(), truth.policy)
    torch.testing.assert_close(found.log_policy.cpu(), truth.log_policy)


@pytest.mark.parametrize(("states", "actions"), [(16, 4), (32, 8), (200, 4), (700, 2)])
def test_gradients(states: int, actions: int) -> None:
    reward, transition = problem(3, states, actions, torch.float64)

    def gradients(*data: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in data]
        found = birl_ext.solve(*leaves, **OPTIONS)
        (found.value.square().sum() + found.log_policy.sin().sum()).backward()
        return [leaf.grad.cpu() for leaf in leaves if leaf.grad is not None]

    pairs = zip(gradients(*on_gpu(reward, transition)), gradients(reward, transition), strict=True)
    for found, truth in pairs:
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("batch", "states", "actions"), [(50, 16, 4), (50, 32, 8), (50, 100, 8), (2, 600, 3)]
)
def test_a_graph_replays_the_solve(batch: int, states: int, actions: int) -> None:
    reward, transition = on_gpu(*problem(batch, states, actions, torch.float32))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a first call loads the kernels
        birl_ext.solve(reward, transition, **OPTIONS, on_fail="status")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = birl_ext.solve(reward, transition, **OPTIONS, on_fail="status")
    for seed in (1, 2):
        fresh = problem(batch, states, actions, torch.float32, seed)
        reward.copy_(fresh[0])
        transition.copy_(fresh[1])
        graph.replay()
        eager = birl_ext.solve(reward, transition, **OPTIONS)
        for x, y in zip(bits(captured), bits(eager), strict=True):
            assert torch.equal(x, y)


def test_a_capture_that_cannot_raise_says_so() -> None:
    reward, transition = on_gpu(*problem(4, 8, 4, torch.float32))
    birl_ext.solve(reward, transition, **OPTIONS)
    with (
        pytest.raises(errors.OptionError, match="CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        birl_ext.solve(reward, transition, **OPTIONS)


def test_the_current_stream_is_used() -> None:
    reward, transition = on_gpu(*problem(2000, 32, 8, torch.float32))
    wanted = bits(birl_ext.solve(reward, transition, **OPTIONS))
    torch.cuda.synchronize()
    late = torch.zeros_like(transition)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(transition)  # a kernel on another stream would see zeros
        found = birl_ext.solve(reward, late, **OPTIONS, on_fail="status", validate="off")
    stream.synchronize()
    for x, y in zip(bits(found), wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("states", "actions"), [(16, 4), (32, 8), (100, 8), (600, 3)])
def test_the_same_bits_a_thousand_times(states: int, actions: int) -> None:
    reward, transition = on_gpu(*problem(20, states, actions, torch.float32))
    first = bits(birl_ext.solve(reward, transition, **OPTIONS, on_fail="status"))
    for _ in range(1000):
        again = birl_ext.solve(reward, transition, **OPTIONS, on_fail="status")
        for x, y in zip(bits(again), first, strict=True):
            assert torch.equal(x, y)


def test_a_bad_problem_leaves_its_neighbours_alone() -> None:
    reward, transition = problem(9, 32, 8, torch.float64)
    wanted = birl_ext.solve(*on_gpu(reward, transition), **OPTIONS)
    transition[4, 3, 2, 1] = torch.nan
    found = birl_ext.solve(*on_gpu(reward, transition), **OPTIONS, on_fail="status")
    others = [i for i in range(9) if i != 4]
    assert torch.equal(found.value[others], wanted.value[others])
    assert bool(found.value[4].isnan().all())


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("states", [16, 65, 300])
def test_policy_systems(states: int, transpose: bool) -> None:
    random = torch.Generator().manual_seed(0)
    _, transition = problem(3, states, 4, torch.float64)
    policy = torch.rand(3, 2, states, 4, generator=random, dtype=torch.float64)
    policy /= policy.sum(-1, keepdim=True)
    discount = torch.full((3, 2), 0.999, dtype=torch.float64)
    rhs = torch.randn(3, 2, 5, states, generator=random, dtype=torch.float64)
    data = [transition, policy, discount, rhs]
    t, p, g, b = on_gpu(*data)
    x, residual, _ = kernel_policy_solve((t, None, None), p, g, b, transpose=transpose)
    matrix = torch.eye(states).double() - 0.999 * torch.einsum(
        "nsat,ngsa->ngst", transition, policy
    )
    product = torch.einsum("ngts,ngkt->ngks" if transpose else "ngst,ngkt->ngks", matrix, x.cpu())
    order = 1 if transpose else torch.inf
    gap = torch.linalg.vector_norm(product - rhs, order, -1)
    size = torch.linalg.vector_norm(x.cpu(), order, -1)
    assert bool((gap <= 1e-13 * size).all())
    assert bool((residual.cpu() <= 1e-13 * size).all())


def ring(states: int, dtype: torch.dtype) -> birl_ext.SparseMDP:
    """Two actions: stay or step, and now and then a leap."""
    state = torch.arange(states).view(-1, 1, 1)
    action = torch.arange(2).view(1, -1, 1)
    leaps = torch.cat([state + 0 * action, state + 1 + 0 * action, state + 17 + 400 * action], -1)
    col = (leaps % states).flatten()
    probabilities = torch.tensor([0.5, 0.25, 0.25], dtype=dtype).repeat(2 * states)
    crow = torch.arange(0, 6 * states + 1, 3)
    reward = torch.sin(0.01 * torch.arange(2 * states)).view(states, 2).to(dtype)
    data: Any = on_gpu(reward, probabilities, crow, col)
    return birl_ext.SparseMDP(*data, discount=0.97)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_sparse_problem(dtype: torch.dtype) -> None:
    mdp = ring(5000, dtype)
    found = birl_ext.solve(mdp, temperature=0.1, backend="cuda")
    assert int(found.info[Info.KERNEL]) == Kernel.CUDA_GRID_CSR
    truth = birl_ext.solve(mdp, temperature=0.1, backend="torch")
    gap = (found.value.double() - truth.value.double()).abs().max()
    assert bool(gap <= found.error_bound + truth.error_bound)


def test_a_graph_replays_a_large_sparse_solve() -> None:
    mdp = ring(5000, torch.float32)
    wanted = bits(birl_ext.solve(mdp, temperature=0.1, on_fail="status"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = birl_ext.solve(mdp, temperature=0.1, on_fail="status")
    graph.replay()
    for x, y in zip(bits(captured), wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("right_sides", [1, 8])
def test_large_policy_systems(transpose: bool, right_sides: int) -> None:
    random = torch.Generator().manual_seed(1)
    _, transition = problem(1, 2501, 1, torch.float64)
    rhs = torch.randn(1, 1, right_sides, 2501, generator=random, dtype=torch.float64)
    policy = torch.ones(1, 1, 2501, 1, dtype=torch.float64)
    discount = torch.full((1, 1), 0.999, dtype=torch.float64)
    t, p, g, b = on_gpu(transition, policy, discount, rhs)
    x, residual, _ = kernel_policy_solve((t, None, None), p, g, b, transpose=transpose)
    matrix = torch.eye(2501, device="cuda").double() - 0.999 * t[0, :, 0]
    truth = torch.linalg.solve(matrix.T if transpose else matrix, b[0, 0].T).T
    size = truth.abs().sum() if transpose else truth.abs().max()
    assert float((x[0, 0] - truth).abs().max()) <= 1e-10 * float(size)
    assert bool((residual <= 1e-12 * size).all())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_on_two_devices_are_named() -> None:
    reward, transition = problem(2, 8, 4, torch.float64)
    with pytest.raises(errors.DeviceError, match="cuda:1"):
        birl_ext.solve(reward.to("cuda:0"), transition.to("cuda:1"), **OPTIONS)
    found = birl_ext.solve(reward.to("cuda:1"), transition.to("cuda:1"), **OPTIONS)
    assert found.value.device.index == 1
    assert torch.cuda.current_device() == 0
