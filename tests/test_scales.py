"""Values of very different sizes: what one state cannot reach costs it no digit, whatever it is,
and every bound holds.
"""

from __future__ import annotations

import functools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from flint import arb
from oracle import exact

import birl_ext
from birl_ext import Status
from birl_ext.options import BackendName, MethodName
from birl_ext.solution import Info, Kernel

BACKENDS: list[BackendName] = ["auto", "torch"]
Array = np.ndarray


def transitions(rng: np.random.Generator, states: int, actions: int, power: float = 4.0) -> Array:
    found = rng.random((states, actions, states)) ** power
    return found / found.sum(-1, keepdims=True)


def iterated(reward: Array, transition: Array, discount: float, temperature: float) -> Array:
    """π* by plain value iteration in extended precision: a state's digits are its own."""
    reward, transition = reward.astype(np.longdouble), transition.astype(np.longdouble)
    transition = transition / np.maximum(transition.sum(-1, keepdims=True), 1e-30)
    value = np.zeros(len(reward), np.longdouble)
    for _ in range(int(50 / (1 - discount)) + 50):
        q = reward + discount * (transition @ value)
        top = q.max(-1, keepdims=True)
        share = np.exp((q - top) / temperature)
        value = top[:, 0] + temperature * np.log(share.sum(-1))
    return (share / share.sum(-1, keepdims=True)).astype(float)


# ---- penalties ----------------------------------------------------------------------------------


@functools.cache
def penalised_policy(kind: str, size: float, states: int, seed: int) -> Array:
    reward, transition, seen = penalised(kind, size, states, seed)
    return iterated(reward, transition, 0.9, 0.1)[seen]


def penalised(kind: str, size: float, states: int, seed: int) -> tuple[Array, Array, slice]:
    """Reward, transition, and the states that must not notice."""
    rng = np.random.default_rng(seed)
    reward, transition = rng.standard_normal((states, 3)), transitions(rng, states, 3)
    part = 2 * states // 3
    if kind == "action":
        reward[::2, 0] = size
        return reward, transition, slice(None)
    if kind == "wall":  # only one action leads there
        transition[:part, 1:, part:] = 0
        transition /= transition.sum(-1, keepdims=True)
        reward[part:] = -abs(size)
        reward[:part, 0] = -abs(size)
        return reward, transition, slice(part)
    transition[:part, :, part:] = 0  # a part that the others never reach
    transition /= transition.sum(-1, keepdims=True)
    reward[part:] = reward[part:] + size if kind == "constant" else size
    return reward, transition, slice(part)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [-1e3, -1e6, -1e9, -1e12, -1e15, 1e12])
@pytest.mark.parametrize("kind", ["action", "wall", "unreachable", "constant"])
def test_a_large_number_costs_other_states_no_digit(
    kind: str, size: float, backend: BackendName
) -> None:
    if kind == "action":
        size = -abs(size)
    drawn: list[tuple[int, int, MethodName]]
    drawn = [(12, 0, "auto"), (12, 1, "value-iteration"), (150, 2, "auto")]
    for states, seed, method in drawn:
        reward, transition, seen = penalised(kind, size, states, seed)
        want = penalised_policy(kind, size, states, seed)
        for sparse in (False, True):
            mdp = birl_ext.DenseMDP(torch.from_numpy(reward), torch.from_numpy(transition), 0.9)
            found = birl_ext.solve(
                mdp.to_sparse() if sparse else mdp, temperature=0.1, backend=backend, method=method
            )
            error = np.abs(found.policy.numpy()[seen] - want).max()
            assert error < 3e-12, (states, method, sparse, error)
            bound = found.error_bounds.numpy()[seen].max()
            assert size < -1e3 or kind == "action" or bound < 1e-9, (states, method, bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_number_costs_float32_no_digit(dtype: torch.dtype, backend: BackendName) -> None:
    for kind in ("action", "wall", "unreachable"):
        reward, transition, seen = penalised(kind, -1e12, 12, 3)
        given = torch.tensor(reward, dtype=dtype), torch.tensor(transition, dtype=dtype)
        want = iterated(given[0].double().numpy(), given[1].double().numpy(), 0.95, 0.1)[seen]
        found = birl_ext.solve(*given, discount=0.95, temperature=0.1, backend=backend)
        limit = 1e-12 if dtype == torch.float64 else 1e-7
        assert np.abs(found.policy.double().numpy()[seen] - want).max() < limit, kind


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["action", "wall", "unreachable"])
def test_a_tolerance_follows_the_values_that_matter(kind: str, backend: BackendName) -> None:
    for size in (-1e6, -1e9, -1e15):
        for tol in (1e-3, 1e-6, 1e-9):
            reward, transition, seen = penalised(kind, size, 12, 4)
            given = torch.from_numpy(reward), torch.from_numpy(transition)
            options: dict[str, Any] = {"discount": 0.95, "temperature": 0.1, "backend": backend}
            rough = birl_ext.solve(*given, tol=tol, **options).value.numpy()[seen]
            sharp = birl_ext.solve(*given, **options).value.numpy()[seen]
            assert np.abs(rough - sharp).max() <= tol * np.abs(sharp).max()


# ---- starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("states", [6, 140])
def test_any_start_ends_in_the_same_solution(
    states: int, dtype: torch.dtype, backend: BackendName
) -> None:
    rng = np.random.default_rng(0)
    reward = torch.tensor(rng.random((states, 3)), dtype=dtype)
    transition = torch.tensor(transitions(rng, states, 3), dtype=dtype)
    noise = torch.tensor(rng.standard_normal(states))
    options: dict[str, Any] = {"discount": 0.99, "temperature": 0.1, "backend": backend}
    want = birl_ext.solve(reward, transition, **options)
    methods: tuple[MethodName, ...] = get_args(MethodName)
    for power in (16, 18, 20, 160, 300, 308):
        for start in (torch.ones(states).double(), -torch.ones(states).double(), noise):
            initial = start.clamp(-1, 1) * 10.0**power
            for method in methods if power == 300 else methods[:1]:
                for tol in (None, 1e-6) if power == 18 else (None,):
                    found = birl_ext.solve(
                        reward, transition, initial=initial, method=method, tol=tol, **options
                    )
                    gap = (found.value - want.value).abs().max()
                    assert gap <= found.error_bound + want.error_bound, (power, method)
                    if tol is None:
                        assert found.error_bound <= 4 * want.error_bound, (power, method)


def test_a_start_that_is_not_finite_is_refused() -> None:
    rng = np.random.default_rng(0)
    given = torch.from_numpy(rng.random((4, 2))), torch.from_numpy(transitions(rng, 4, 2))
    for wrong in (np.nan, np.inf, -np.inf):
        initial = torch.tensor([0.0, 1.0, wrong, 2.0]).double()
        for backend in BACKENDS:
            with pytest.raises(birl_ext.errors.BirlError):
                birl_ext.solve(
                    *given, discount=0.9, temperature=1.0, initial=initial, backend=backend
                )


def test_a_warm_float32_problem_is_the_same_in_company() -> None:
    """Neighbours of other sizes leave nothing behind in the lanes beyond the last state."""
    for seed in range(12):
        random = torch.Generator().manual_seed(seed)
        states = 3 + seed % 8
        size = 10.0 ** torch.randint(-1, 7, (6, 1, 1), generator=random)
        reward = torch.rand(6, states, 3, generator=random) * size
        transition = torch.rand(6, states, 3, states, generator=random).softmax(-1)
        initial = torch.randn(6, states, generator=random) * size[..., 0] * 10
        options: dict[str, Any] = {"discount": 0.95, "temperature": 0.2, "on_fail": "status"}
        for method in ("auto", "value-iteration"):
            for tol in (None, 1e-4):
                options |= {"method": method, "tol": tol}
                whole = birl_ext.solve(reward, transition, initial=initial, **options)
                for i in range(6):
                    data = reward[i].clone(), transition[i].clone()
                    alone = birl_ext.solve(*data, initial=initial[i].clone(), **options)
                    assert torch.equal(alone.value, whole.value[i])
                    assert alone.iterations == whole.iterations[i]


# ---- PyTorch backend ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["value-iteration", "policy-iteration", "auto"])
def test_a_masked_action_does_not_cost_the_constant_mode(method: MethodName) -> None:
    rng = np.random.default_rng(0)
    reward = torch.from_numpy(rng.random((20, 3)))
    transition = torch.from_numpy(transitions(rng, 20, 3, 1.0))
    mask = torch.ones(20, 3, dtype=torch.bool)
    mask[4, 1] = False
    options: dict[str, Any] = {"discount": 0.999, "temperature": 0.1, "method": method}
    passes = [
        int(birl_ext.solve(reward, transition, mask=m, backend="torch", **options).iterations)
        for m in (None, mask)
    ]
    assert passes[1] <= passes[0] + 2 < 60


def test_on_torch_a_neighbour_changes_no_passes() -> None:
    random = torch.Generator().manual_seed(0)
    for states in (9, 20):
        size = 10.0 ** torch.randint(-2, 6, (5, 1, 1), generator=random)
        reward = torch.randn(5, states, 3, generator=random, dtype=torch.float64) * size
        transition = torch.rand(5, states, 3, states, generator=random, dtype=torch.float64) ** 6
        transition /= transition.sum(-1, keepdim=True)
        mask = torch.rand(5, states, 3, generator=random) < 0.7
        mask[..., 0] = True
        start = 100 * size[..., 0] * torch.randn(5, states, generator=random, dtype=torch.float64)
        start[::2] = 0
        given: dict[str, Any] = {"mask": mask, "initial": start}
        for method in ("auto", "newton-krylov", "policy-iteration", "value-iteration"):
            options: dict[str, Any] = {
                **{"discount": 0.9, "temperature": 0.2, "method": method},
                **{"backend": "torch", "on_fail": "status"},
            }
            whole = birl_ext.solve(reward, transition, **given, **options)
            for i in range(5):
                own: dict[str, Any] = {name: x[i].clone() for name, x in given.items()}
                alone = birl_ext.solve(reward[i].clone(), transition[i].clone(), **own, **options)
                assert alone.iterations == whole.iterations[i], (states, method)
                assert alone.status == whole.status[i]
                both = alone.error_bounds + whole.error_bounds[i]
                assert ((alone.value - whole.value[i]).abs() <= both).all()


# ---- certificates -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [False, True], ids=["continuing", "ending"])
def test_certificates_of_one_pass_agree(ending: bool) -> None:
    """At the same value all kernels and backends certify the same, to one per cent."""
    for states, masked in ((9, False), (9, True), (140, False), (140, True)):
        rng = np.random.default_rng(states)
        reward = torch.from_numpy(rng.standard_normal((states, 3)))
        transition = torch.from_numpy(transitions(rng, states, 3))
        initial = torch.from_numpy(rng.standard_normal(states))
        marks: dict[str, Any] = {}
        if masked:
            marks["mask"] = torch.from_numpy(rng.random((states, 3)) < 0.7)
            marks["mask"][:, 0] = True
            marks["reference"] = torch.from_numpy(10.0 ** rng.uniform(-30, 0, (states, 3)))
        if ending:
            marks["terminal"] = torch.arange(states) == 2
        mdp = birl_ext.DenseMDP(reward, transition, 0.9, **marks)
        bounds, kernels = [], set()
        for sparse in (False, True):
            for backend in BACKENDS:
                found = birl_ext.solve(
                    mdp.to_sparse() if sparse else mdp,
                    temperature=0.1,
                    initial=initial,
                    max_iterations=1,
                    on_fail="status",
                    backend=backend,
                )
                assert int(found.iterations) == 1
                bounds.append(float(found.error_bound))
                kernels.add(int(found.info[Info.KERNEL]))
        assert Kernel.TORCH in kernels
        assert max(bounds) < 1.01 * min(bounds), bounds


PARTS = 10


def drawn(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A problem as the oracle takes it, and options of `solve`."""
    rng = np.random.default_rng(seed)
    states, actions = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    transition = rng.random((states, actions, states)) ** float(rng.choice([1, 4, 20]))
    reward = rng.standard_normal((states, actions))
    big = float(10 ** rng.uniform(1, 17)) * float(rng.choice([-1, -1, 1]))
    kind, k = int(rng.integers(6)), int(rng.integers(states))
    if kind == 0:
        reward[k, 0] = big
    elif kind == 1:
        reward[k] = big
    elif kind == 2:
        reward[k:], transition[:k, :, k:] = big, 0.0
    elif kind == 3:
        reward *= 10.0 ** rng.uniform(-8, 8, (states, 1))
    transition[transition.sum(-1) == 0] = 1.0
    transition /= transition.sum(-1, keepdims=True)
    temperature = float(10.0 ** rng.choice([-310, -4, -2, -1, 0, 2]))
    tiny = temperature < 1e-300
    dtype = np.float32 if not tiny and rng.random() < 0.3 else np.float64
    if tiny:
        reward = rng.standard_normal((states, actions)) * 1e-309
    data: dict[str, Any] = {
        "reward": reward.astype(dtype),
        "transition": transition.astype(dtype),
        "discount": float(rng.choice([0, 0.3, 0.9, 0.99, 0.9999])),
        "temperature": temperature,
    }
    if rng.random() < 0.3:
        data["reference"] = (10.0 ** rng.uniform(-30, 0, (states, actions))).astype(dtype)
    if rng.random() < 0.3:
        data["mask"] = rng.random((states, actions)) < 0.6
        data["mask"][:, 0] = True
    if rng.random() < 0.2:
        data["terminal"] = rng.random(states) < 0.3
    options: dict[str, Any] = {"method": str(rng.choice(METHODS))}
    if rng.random() < 0.3:
        size = 10.0 ** float(rng.choice([0, 5, 18, 300]))
        options["initial"] = torch.from_numpy(rng.standard_normal(states) * size)
    if rng.random() < 0.3:
        options["tol"] = float(10 ** rng.uniform(-9, -2))
    if rng.random() < 0.2:
        options["max_iterations"] = int(rng.integers(1, 6))
    return data, options


METHODS: list[MethodName] = ["auto", *get_args(MethodName)]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_bound_holds_on_a_thousand_problems(part: int) -> None:
    """Bounds of value, states and log π, against 512 bits: never below the true error."""
    for seed in range(part, 1000, PARTS):
        data, options = drawn(seed)
        truth = exact.solve(exact.Model.of(**data))
        tensors: dict[str, Any] = {
            name: torch.from_numpy(x) if isinstance(x, Array) else x for name, x in data.items()
        }
        logs = [x for x in truth.log_policy if x is not None]
        for backend in BACKENDS:
            if backend == "torch":  # a pass takes a millisecond
                options.setdefault("max_iterations", 300)
            found = birl_ext.solve(**tensors, **options, backend=backend, on_fail="status")
            if found.status == Status.NON_FINITE:
                continue
            error = distances(found.value, truth.value)
            bounds = found.error_bounds.numpy()
            assert (error <= bounds).all(), (seed, backend, error, bounds)
            assert (bounds <= found.error_bound.numpy()).all(), (seed, backend)
            ours = found.log_policy[found.log_policy > -np.inf]
            bound = float(found.log_policy_error_bound)
            if len(ours) < len(logs):
                assert bound == np.inf, (seed, backend)
            else:
                off = distances(ours, logs).max()
                assert off <= bound, (seed, backend, off, bound)


def distances(found: torch.Tensor, truth: list[Any]) -> Array:
    pairs = zip(found.double().tolist(), truth, strict=True)
    return np.array([float((arb(x) - y).abs_upper()) for x, y in pairs])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("states", "factor", "small"),
    [(50, 3e4, 1), (50, 3e3, 2), (200, 1e5, 1), (16, 2e3, 1), (50, 1e9, 10)],
)
def test_few_states_with_small_values_keep_their_digits(
    states: int, factor: float, small: int, backend: BackendName
) -> None:
    """However few they are: those of the small states alone, which never touch the others. `tol` is
    theirs too where they are a sixteenth of all.
    """
    rng = np.random.default_rng(states)
    rows = rng.random((states, 3, states))
    rows[:small, :, small:] = 0
    rows[small:, :, :small] = 0
    rows /= rows.sum(-1, keepdims=True)
    reward = rng.random((states, 3))
    reward[small:] *= factor
    options: dict[str, Any] = {"discount": 0.9, "temperature": 0.5, "backend": backend}
    alone = birl_ext.solve(
        torch.tensor(reward[:small]), torch.tensor(rows[:small, :, :small].copy()), **options
    )
    for tol in (None, 1e-6) if small >= states / 16 else (None,):
        found = birl_ext.solve(torch.tensor(reward), torch.tensor(rows), tol=tol, **options)
        allowed = 1e-14 if tol is None else 4 * tol
        assert float((found.policy[:small] - alone.policy).abs().max()) <= 10 * allowed
        assert float((found.value[:small] / alone.value - 1).abs().max()) <= allowed
