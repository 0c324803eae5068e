"""The compiled backward of `solve` and the differentiable one are two paths to the same numbers.

`create_graph=True` takes the differentiable path, which the oracle of 512 bits has proved; without
it a plain CPU problem takes the compiled one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import FLOATS, SMALL, WARP, Case
from closeness import assert_close
from torch import Tensor

import birl_ext
from birl_ext.ops.backends import loader, native
from birl_ext.ops.request import NATIVE, Data, Settings
from birl_ext.ops.solve import solve as solve_op
from birl_ext.solution import Solution

if loader.reason("cpu"):
    pytest.skip(f"no compiled CPU module: {loader.reason('cpu')}", allow_module_level=True)

# forward mode makes torch load decompositions that it still scripts
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

PARTS = ("value", "q", "policy", "log_policy", "advantage")
LEAVES = ("reward", "transition", "discount", "temperature", "reference")
EVERYTHING = Case(
    "garnet", 7, 3, batch=(3,), mask=True, terminal=True, reference=True, dtype=torch.float64
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every compiled backward."""
    original, seen = native.solve_vjp, []

    def counted(*args: Any) -> Any:
        seen.append(1)
        return original(*args)

    monkeypatch.setattr(native, "solve_vjp", counted)
    return seen


def leaves_of(case: Case, sparse: bool) -> dict[str, Tensor]:
    mdp = case.mdp()
    batch = mdp.batch_shape
    found = {
        "reward": mdp.reward,
        "transition": mdp.to_sparse().values if sparse else mdp.transition,
        "discount": torch.full(batch, case.discount, dtype=torch.float64),
        "temperature": torch.full(batch, case.temperature, dtype=torch.float64),
    }
    if mdp.reference is not None:
        found["reference"] = mdp.reference
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in found.items()}


def solved(case: Case, sparse: bool, leaves: dict[str, Tensor]) -> Solution:
    mdp: Any = case.mdp()
    mine = {name: leaf for name, leaf in leaves.items() if name != "temperature"}
    if sparse:
        mdp = mdp.to_sparse()
        mine["values"] = mine.pop("transition")
    return birl_ext.solve(mdp.replace(validate="cheap", **mine), temperature=leaves["temperature"])


def objective(solution: Solution, parts: tuple[str, ...]) -> Tensor:
    """Σ c·x over the parts, with random c; −inf behind a mask left out."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for name in parts:
        table = getattr(solution, name)
        weight = torch.randn(table.shape, generator=generator, dtype=torch.float64)
        total = total + (weight * table.where(table > -torch.inf, 0.0)).sum()
    return total


def both(loss: Tensor, leaves: list[Tensor], calls: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    before = len(calls)
    compiled = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert len(calls) == before + 1, "the compiled backward was not taken"
    plain = torch.autograd.grad(loss, leaves, create_graph=True)
    assert len(calls) == before + 1, "create_graph=True needs the differentiable backward"
    return zip(compiled, plain, strict=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=["f32", "f64"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize(
    "case",
    [
        *SMALL,
        *WARP,
        EVERYTHING,
        Case("clusters", 32, 3, batch=(9,), discount=0.9999, seed=13),
        Case("dense", 33, 2, batch=(3,), shared=True, terminal=True, seed=14),
        Case("garnet", 12, 3, batch=(2, 10), shared=True, mask=True, seed=15),
        Case("garnet", 270, 2, batch=(2,), discount=0.999, seed=16),
        Case("dense", 260, 2, batch=(2,), terminal=True, seed=17),
    ],
    ids=str,
)
def test_both_backwards_agree(
    case: Case, sparse: bool, dtype: torch.dtype, calls: list[int]
) -> None:
    case = replace(case, dtype=dtype)
    leaves = leaves_of(case, sparse)
    loss = objective(solved(case, sparse, leaves), PARTS)
    pairs = list(both(loss, list(leaves.values()), calls))
    size = pairs[0][1].detach().abs().max()  # with one state that of P is zero, up to rounding
    for name, (got, want) in zip(leaves, pairs, strict=True):
        # a float32 cotangent of P is a difference that the differentiable path takes in float32
        unit = 1e-11 if dtype == torch.float64 else 1e-5 if name == "transition" else 2e-6
        bound = unit * torch.maximum(size, want.detach().abs().max())
        assert_close(got, want.detach(), bound=bound, label=f"{case} {name}")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("states", [7, 40])
def test_every_subset_of_cotangents_and_of_wishes(
    states: int, sparse: bool, calls: list[int]
) -> None:
    case = replace(EVERYTHING, states=states)
    leaves = leaves_of(case, sparse)
    solution = solved(case, sparse, leaves)
    subsets = [
        [name for name, take in zip(names, flags, strict=True) if take]
        for names in (PARTS, LEAVES)
        for flags in itertools.product((False, True), repeat=5)
        if any(flags)
    ]
    for parts in subsets[:31]:
        loss = objective(solution, tuple(parts))
        for name, (got, want) in zip(leaves, both(loss, list(leaves.values()), calls), strict=True):
            bound = 1e-11 * want.detach().abs().max()
            assert_close(got, want.detach(), bound=bound, label=f"{parts} {name}")
    for wishes in subsets[31:]:
        kept = {n: leaf if n in wishes else leaf.detach() for n, leaf in leaves.items()}
        loss = objective(solved(case, sparse, kept), PARTS)
        mine = [leaves[name] for name in wishes]
        for name, (got, want) in zip(wishes, both(loss, mine, calls), strict=True):
            bound = 1e-11 * want.detach().abs().max()
            assert_close(got, want.detach(), bound=bound, label=f"{wishes} {name}")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("states", [12, 33])
@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_problem_has_nan_and_its_neighbours_their_bits(
    shared: bool, states: int, sparse: bool, calls: list[int]
) -> None:
    case = Case("clusters", states, 3, batch=(10,), shared=shared, seed=2)
    leaves = leaves_of(case, sparse)
    mdp: Any = case.mdp().to_sparse() if sparse else case.mdp()
    name = "values" if sparse else "transition"

    def slopes(discount: Tensor) -> list[Tensor]:
        mine = {"reward": leaves["reward"], name: leaves["transition"], "discount": discount}
        solution = birl_ext.solve(
            mdp.replace(validate="cheap", **mine),
            temperature=leaves["temperature"],
            max_iterations=3,
            method="newton",
            on_fail="status",
        )
        assert (solution.status != 0).tolist() == [bool(d > 0.5) for d in discount]
        wanted = [leaves[leaf] for leaf in ("reward", "transition", "temperature")]
        return list(torch.autograd.grad(solution.policy.square().sum(), wanted))

    easy = torch.zeros(10, dtype=torch.float64)
    hard = easy.index_fill(0, torch.tensor([4]), 0.9999)
    good, mixed = slopes(easy), slopes(hard)
    assert len(calls) == 2
    others = [lane for lane in range(10) if lane != 4]
    for leaf, before, after in zip(
        ("reward", "transition", "temperature"), good, mixed, strict=True
    ):
        if leaf == "transition" and shared:
            assert after.isnan().all()
            continue
        assert after[4].isnan().all(), leaf
        assert torch.equal(after[others], before[others]), leaf


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("case", [
    Case("garnet", 20, 4, batch=(300,), seed=1),
    Case("garnet", 12, 4, batch=(2, 300), shared=True, seed=2),
    Case("dense", 300, 8, batch=(1,), seed=3, dtype=torch.float32),
    Case("dense", 70, 8, batch=(40,), shared=True, seed=4),
], ids=str)  # fmt: skip
def test_the_same_bits_at_any_number_of_threads(case: Case, sparse: bool, calls: list[int]) -> None:
    leaves = leaves_of(case, sparse)
    loss = objective(solved(case, sparse, leaves), PARTS)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad(loss, list(leaves.values()), retain_graph=True))
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 4
    for other in found[1:]:
        for name, one, two in zip(leaves, found[0], other, strict=True):
            assert torch.equal(one, two), name


def test_a_problem_does_not_know_its_neighbours(calls: list[int]) -> None:
    """Problems are eliminated eight at a time: whoever is beside one changes no bit of it."""
    case = Case("dense", 9, 3, batch=(19,), seed=3)
    leaves = leaves_of(case, False)

    def slopes(chosen: slice) -> Tensor:
        own = {name: leaf.detach()[chosen].requires_grad_() for name, leaf in leaves.items()}
        solution = birl_ext.solve(
            own["reward"],
            own["transition"],
            discount=own["discount"],
            temperature=own["temperature"],
        )
        (slope,) = torch.autograd.grad(solution.policy.square().sum(), own["transition"])
        return slope

    everyone = slopes(slice(None))
    for start, stop in ((0, 1), (3, 11), (18, 19)):
        assert torch.equal(slopes(slice(start, stop)), everyone[start:stop])


def test_the_layout_of_a_cotangent_does_not_change_a_bit(calls: list[int]) -> None:
    leaves = leaves_of(SMALL[9], False)
    policy = solved(SMALL[9], False, leaves).policy
    mine = list(leaves.values())
    scattered = torch.randn(policy.shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0)
    for cotangent in (scattered, torch.ones((), dtype=torch.float64).expand(policy.shape)):
        one = torch.autograd.grad(policy, mine, cotangent, retain_graph=True)
        two = torch.autograd.grad(policy, mine, cotangent.contiguous(), retain_graph=True)
        assert all(map(torch.equal, one, two))
    assert len(calls) == 4


@pytest.mark.parametrize("problems", [(0, 2), (2, 0)])
def test_no_problems(problems: tuple[int, int], calls: list[int]) -> None:
    n, g = problems
    nothing, index = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    transition = torch.full((n, 3, 2, 3), 1 / 3, dtype=torch.float64).requires_grad_()
    reward = torch.zeros(n, g, 3, 2, dtype=torch.float64).requires_grad_()
    scalars = torch.full((n, g), 0.5, dtype=torch.float64)
    outputs = solve_op(
        Data(transition, index, index, reward, nothing, scalars, scalars),
        nothing,
        Settings((n, g), backend=NATIVE),
    )
    slopes = torch.autograd.grad(outputs[0].sum(), (transition, reward))
    assert len(calls) == 1
    assert torch.equal(slopes[0], torch.zeros_like(transition))
    assert slopes[1].shape == reward.shape


def test_what_is_differentiated_again_does_not_take_the_compiled_path(calls: list[int]) -> None:
    """Forward over reverse, and functions that map or differentiate the backward."""
    mdp = SMALL[0].mdp()
    reward = mdp.reward.clone().requires_grad_()
    direction = mdp.reward.cos()  # a constant one would change no policy

    def loss(r: Tensor) -> Tensor:
        return birl_ext.solve(mdp.replace(reward=r), temperature=0.5).policy.square().sum()

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(reward, direction)
        (slope,) = torch.autograd.grad(loss(dual), dual)
        tangent = torch.autograd.forward_ad.unpack_dual(slope).tangent
    hessian = torch.func.hessian(loss)(mdp.reward)
    assert not calls
    want = (hessian * direction).sum((2, 3))
    assert_close(tangent, want, bound=1e-10 * want.abs().max(), label="forward over reverse")
    policy = birl_ext.solve(mdp.replace(reward=reward), temperature=0.5).policy
    rows = torch.eye(policy.numel(), dtype=torch.float64).reshape(-1, *policy.shape)
    (batched,) = torch.autograd.grad(policy, reward, rows, is_grads_batched=True, retain_graph=True)
    assert not calls
    one = torch.stack(
        [torch.autograd.grad(policy, reward, row, retain_graph=True)[0] for row in rows]
    )
    assert len(calls) == len(rows)
    assert_close(batched, one, bound=1e-11 * one.abs().max(), label="batched cotangents")


@pytest.mark.parametrize("differentiable", [False, True])
def test_the_advantage_behind_a_mask_has_no_gradient(differentiable: bool) -> None:
    """It is zero whatever the parameters are: nothing flows from it to the value."""
    mdp = replace(SMALL[4], states=4, actions=3).mdp()
    weight = torch.randn(mdp.reward.shape, dtype=torch.float64)

    def loss(reward: Tensor) -> Tensor:
        solution = birl_ext.solve(mdp.replace(reward=reward), temperature=0.5)
        return (weight * solution.advantage).sum()

    reward = mdp.reward.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(reward), reward, create_graph=differentiable)
    for place in torch.eye(12, dtype=torch.float64).reshape(12, 4, 3):
        step = 1e-6 * place
        want = (loss(mdp.reward + step) - loss(mdp.reward - step)) / 2e-6
        got = (slope.detach() * place).sum()
        assert_close(got, want, bound=1e-7, label="slope")
