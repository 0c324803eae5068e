"""Limits, closed forms, hostile layouts, and what must not change by a bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import FLOATS, SMALL, WARP, Case, oracle, problems
from closeness import assert_close, assert_same_bits
from oracle import float64
from torch import Tensor

import birl_ext
from birl_ext import errors
from birl_ext.model.mdp import DenseMDP
from birl_ext.ops.backends import choice
from birl_ext.options import BackendName, MethodName
from birl_ext.solution import Solution, Status

BACKENDS: list[BackendName] = ["torch"] if choice.unavailable("cpu") else ["torch", "cpu"]
METHODS: tuple[MethodName, ...] = ("value-iteration", "newton", "newton-krylov", "policy-iteration")
DIFFERENTIABLE = ("value", "q", "policy", "log_policy", "advantage")
EPS = torch.finfo(torch.float64).eps

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    # forward mode makes torch load decompositions that it still scripts
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows P (…, S) that sum to one."""
    weight = torch.rand(*shape, dtype=torch.float64)
    return (weight / weight.sum(-1, keepdim=True)).to(dtype)


def tables(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def assert_same_solution(got: Solution, want: Solution, label: object) -> None:
    for name in (*DIFFERENTIABLE, "error_bound", "status"):
        ours, theirs = (torch.atleast_1d(getattr(solution, name)) for solution in (got, want))
        assert_same_bits(ours, theirs, label=f"{label}: {name}")


# Sizes


@pytest.mark.parametrize("batch", [(0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("states", [3, 144])  # solved side by side, and one by one
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_an_empty_batch_gives_empty_answers_and_gradients(
    batch: tuple[int, ...], sparse: bool, own: bool, states: int, backend: BackendName
) -> None:
    dtype = torch.float32 if own else torch.float64
    reward = torch.zeros(*batch, states, 2, dtype=dtype, requires_grad=True)
    transition = rows(*(batch if own else ()), states, 2, states, dtype=dtype).requires_grad_()
    mdp: Any = DenseMDP(reward, transition, 0.9)
    mdp = mdp.to_sparse() if sparse else mdp
    got = birl_ext.solve(mdp, temperature=0.5, backend=backend)
    assert got.value.shape == (*batch, states)
    assert got.policy.shape == (*batch, states, 2)
    assert got.status.shape == got.error_bound.shape == batch
    image, _, _ = birl_ext.bellman(got.value, mdp, temperature=0.5, backend=backend)
    gained = birl_ext.evaluate(got.policy, mdp, backend=backend)
    visits = birl_ext.occupancy(
        got.policy,
        mdp,
        initial_distribution=torch.full((states,), 1 / states, dtype=dtype),
        backend=backend,
    )
    total = got.value.sum() + got.policy.sum() + image.sum() + gained.sum() + visits.sum()
    total.backward()
    assert reward.grad is not None
    assert reward.grad.shape == reward.shape
    assert transition.grad is not None
    assert_same_bits(transition.grad, torch.zeros_like(transition), label="gradient of nothing")


@pytest.mark.parametrize("dtype", FLOATS, ids=["f32", "f64"])
@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9999])
def test_one_state_and_one_action(
    discount: float, dtype: torch.dtype, backend: BackendName
) -> None:
    """V = r/(1−γ) to two units in the last place; A = 1 adds no entropy; dV/dr = 1/(1−γ)."""
    reward = torch.tensor([[1.3]], dtype=dtype, requires_grad=True)
    got = birl_ext.solve(
        reward,
        torch.ones(1, 1, 1, dtype=dtype),
        discount=discount,
        temperature=0.7,
        backend=backend,
    )
    want = float(reward.detach()) / (1 - discount)
    unit = torch.finfo(dtype).eps
    assert_close(got.value, np.array([want]), bound=2 * unit * want, label="value")
    assert got.policy.item() == 1
    assert got.log_policy.item() == 0
    (slope,) = torch.autograd.grad(got.value.sum(), reward)
    exact = np.array([[1 / (1 - discount)]])
    assert_close(slope, exact, bound=2 * unit * exact, label="slope")


def test_one_state_with_many_actions(backend: BackendName) -> None:
    """V = τ log Σ exp(r/τ) / (1−γ)."""
    reward = tables(1, 5)
    got = birl_ext.solve(
        reward,
        torch.ones(1, 5, 1, dtype=torch.float64),
        discount=0.99,
        temperature=0.3,
        backend=backend,
    )
    want = 0.3 * torch.logsumexp(reward / 0.3, -1) / (1 - 0.99)
    assert_close(got.value, want, bound=1e-13 * want.abs(), label="value")
    assert_close(got.policy, torch.softmax(reward / 0.3, -1), bound=4 * EPS, label="policy")


def test_one_action_per_state_is_policy_evaluation(backend: BackendName) -> None:
    transition, reward = rows(6, 1, 6), tables(6, 1)
    got = birl_ext.solve(reward, transition, discount=0.95, temperature=3.0, backend=backend)
    want = torch.linalg.solve(torch.eye(6).double() - 0.95 * transition[:, 0], reward[:, 0])
    assert_close(got.value, want, bound=1e-12, label="value")
    assert_same_bits(got.policy, torch.ones(6, 1).double(), label="policy")


def test_no_discount_is_one_softmax(backend: BackendName) -> None:
    reward = tables(7, 4)
    got = birl_ext.solve(reward, rows(7, 4, 7), discount=0.0, temperature=0.2, backend=backend)
    want = 0.2 * torch.logsumexp(reward / 0.2, -1)
    assert_close(got.value, want, bound=4 * EPS * want.abs().max(), label="value")
    assert_close(got.policy, torch.softmax(reward / 0.2, -1), bound=4 * EPS, label="policy")
    assert (got.error_bound < 1e-13).all()


# Temperatures


@pytest.mark.parametrize("temperature", [1e-8, 1e-5, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("case", SMALL[:7], ids=str)
def test_the_value_lies_in_the_hard_max_bracket(
    case: Case, temperature: float, backend: BackendName
) -> None:
    """(M8): V_hard ≤ V ≤ V_hard + τ log A / (1−γ)."""
    mdp = case.mdp()
    got = birl_ext.solve(mdp, temperature=temperature, backend=backend)
    assert (got.status == 0).all()
    for index, arguments in problems(mdp, temperature):
        low, high = float64.hard_bracket(**arguments)
        slack = float(got.error_bound[index]) + 1e-13 * np.abs(low).max() / (1 - case.discount)
        value = got.value[index].numpy()
        assert (value >= low - slack).all(), (value - low).min()
        assert (value <= high + slack).all(), (value - high).max()


@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_temperature_gives_the_greedy_policy(
    method: MethodName, backend: BackendName
) -> None:
    """τ = 1e-8: no overflow, V is the hard maximum, the policy is greedy, gradients exist."""
    mdp = Case(states=8, actions=3, seed=4).mdp()
    reward = mdp.reward.clone().requires_grad_()
    got = birl_ext.solve(
        mdp.replace(reward=reward), temperature=1e-8, method=method, backend=backend
    )
    arguments = next(problems(mdp, 1e-8))[1]
    low, _ = float64.hard_bracket(**arguments)
    assert_close(got.value, low, bound=1e-6, label="value")
    assert_close(got.policy.amax(-1), np.ones(8), bound=1e-12, label="greedy")
    (slope,) = torch.autograd.grad(got.value.sum(), reward)
    assert torch.isfinite(slope).all()
    # where the policy is greedy the gradient is the occupancy of the greedy policy
    assert_close(slope.sum(), torch.tensor(8 / (1 - 0.9)).double(), bound=1e-9, label="mass")


@pytest.mark.parametrize("temperature", [1e6, 1e9, 1e12])
def test_a_huge_temperature_gives_the_uniform_policy(
    temperature: float, backend: BackendName
) -> None:
    """V → τ log A/(1−γ) + mean reward's value, π → 1/A; first order in 1/τ for the policy."""
    transition, reward = rows(5, 4, 5), tables(5, 4)
    got = birl_ext.solve(reward, transition, discount=0.9, temperature=temperature, backend=backend)
    uniform = torch.full((5, 4), 0.25).double()
    plain = birl_ext.evaluate(uniform, reward, transition, discount=0.9, backend=backend)
    want = temperature * math.log(4) / (1 - 0.9) + plain
    drift = 100 / temperature  # second-order term of the log-sum-exp
    assert_close(got.value, want, bound=8 * EPS * want.abs().max() + drift, label="value")
    assert_close(got.policy, uniform, bound=20 / temperature + EPS, label="policy")
    # Q − V does not drown in τ log A: what is left of it is resolved in units of τ
    centred = got.advantage / temperature + math.log(4)
    assert centred.abs().max() < 20 / temperature + 4 * EPS


@pytest.mark.parametrize("dtype", FLOATS, ids=["f32", "f64"])
def test_huge_rewards_at_a_small_temperature_work_or_are_refused(
    dtype: torch.dtype, backend: BackendName
) -> None:
    """r = 1e6, τ = 1e-3: the answer, or an error with a reason; its certificate tells the truth."""
    reward, transition = 1e6 * tables(6, 3, dtype=dtype), rows(6, 3, 6, dtype=dtype)
    got = birl_ext.solve(
        reward,
        transition,
        discount=0.99,
        temperature=1e-3,
        on_fail="status",
        backend=backend,
    )
    if got.status.item():  # then for a reason that names rounding or range, with a remedy
        status = Status(int(got.status))
        assert status in (Status.STAGNATED, Status.NON_FINITE)
        assert "rescale" in status.sentence or "loosen" in status.sentence
        return
    model = transition.double() / transition.double().sum(-1, keepdim=True)
    want = float64.solve(reward.double(), model, discount=0.99, temperature=1e-3)
    assert_close(got.value, want.value, bound=got.error_bound + 1e-6, label="value")
    resolved = got.log_policy_error_bound.item() < 1
    if resolved:
        assert_close(got.policy, want.policy, bound=1e-2, label="policy")
    assert torch.isfinite(got.policy).all()


@pytest.mark.parametrize("power", [-40, -3, 10, 300])
@pytest.mark.parametrize("method", METHODS)
def test_a_power_of_two_scales_everything_exactly(
    method: MethodName, power: int, backend: BackendName
) -> None:
    """(r, τ) → 2ᵏ(r, τ) scales V by 2ᵏ and leaves the policy alone, to the last bit."""
    transition, reward = rows(6, 3, 6), tables(6, 3)
    scale = 2.0**power

    def solve(factor: float) -> Solution:
        return birl_ext.solve(
            factor * reward,
            transition,
            discount=0.95,
            temperature=0.25 * factor,
            method=method,
            backend=backend,
        )

    one, scaled = solve(1.0), solve(scale)
    for name in ("value", "q", "advantage"):
        assert_same_bits(getattr(scaled, name), scale * getattr(one, name), label=name)
    assert scaled.error_bound.item() == scale * one.error_bound.item()
    assert_same_bits(scaled.policy, one.policy, label="policy")
    assert_same_bits(scaled.log_policy, one.log_policy, label="log_policy")


def test_a_constant_added_to_the_reward_moves_the_value_only(backend: BackendName) -> None:
    """r + c shifts V by c/(1−γ); with c = 1e6 the policy keeps the digits that c leaves in r."""
    transition, reward = rows(6, 3, 6), tables(6, 3)
    shift = 1e6
    moved = reward + shift

    def solve(r: Tensor) -> Solution:
        return birl_ext.solve(r, transition, discount=0.999, temperature=0.3, backend=backend)

    got, want = solve(moved), solve(moved - shift)
    assert_close(got.policy, want.policy, bound=1e-6, label="policy")
    total = want.value + shift / (1 - 0.999)
    assert_close(got.value, total, bound=4 * EPS * total, label="value")


# Ends


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_chain_with_an_end_has_its_closed_form(sparse: bool, backend: BackendName) -> None:
    """One action, a step costs 1, the last state pays 10 and ends: a geometric sum."""
    states, gamma = 6, 0.9
    transition = torch.zeros(states, 1, states, dtype=torch.float64)
    transition[torch.arange(states - 1), 0, torch.arange(1, states)] = 1
    reward = torch.full((states, 1), -1.0, dtype=torch.float64)
    reward[-1] = 10
    terminal = torch.arange(states) == states - 1
    mdp: Any = DenseMDP(reward, transition, gamma, terminal=terminal)
    mdp = mdp.to_sparse() if sparse else mdp
    got = birl_ext.solve(mdp, temperature=0.5, backend=backend)
    steps = np.arange(states - 1, -1, -1)
    want = -(1 - gamma**steps) / (1 - gamma) + 10 * gamma**steps
    assert_close(got.value, want, bound=1e-14 * 20, label="value")


def test_an_absorbing_state_is_not_an_end(backend: BackendName) -> None:
    """A state that returns to itself is paid for ever: r/(1−γ); a terminal one is paid once."""
    transition = torch.ones(1, 1, 1, dtype=torch.float64)
    reward = torch.ones(1, 1, dtype=torch.float64)
    options: dict[str, Any] = {"discount": 0.75, "temperature": 1.0, "backend": backend}
    for_ever = birl_ext.solve(reward, transition, **options)
    once = birl_ext.solve(reward, transition, terminal=torch.tensor([True]), **options)
    assert for_ever.value.item() == 4.0
    assert once.value.item() == 1.0


def test_what_follows_an_end_has_no_gradient(backend: BackendName) -> None:
    case = Case(terminal=True, seed=6)
    mdp = case.mdp()
    transition = mdp.transition.clone().requires_grad_()
    reward = mdp.reward.clone().requires_grad_()
    whole = DenseMDP(reward, transition, 0.9, terminal=mdp.terminal)
    got = birl_ext.solve(whole, temperature=0.5, backend=backend)
    of_reward, of_rows = torch.autograd.grad(
        got.value.sum() + got.policy.square().sum(), (reward, transition)
    )
    assert_same_bits(of_rows[-1], torch.zeros_like(of_rows[-1]), label="rows of the end")
    assert (of_reward[-1] != 0).all()  # its reward is still paid
    pull = (of_rows * mdp.transition).sum(-1)[:-1]
    assert_close(pull, torch.zeros_like(pull), bound=1e-12, label="along P itself")


# Masks


@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e300])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_what_lies_behind_a_mask_is_never_read(
    sparse: bool, junk: float, backend: BackendName
) -> None:
    case = Case(batch=(3,), mask=True, terminal=True, reference=True, seed=6)
    clean = case.mdp()
    assert clean.mask is not None
    assert clean.reference is not None
    hidden = ~clean.mask
    unread = hidden.unsqueeze(-1)
    dirty = {
        "reward": clean.reward.masked_fill(hidden, junk),
        "reference": clean.reference.masked_fill(hidden, junk),
        "transition": clean.transition.masked_fill(unread, junk),
    }

    def run(inputs: dict[str, Tensor]) -> tuple[Solution, tuple[Tensor, ...]]:
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        mdp: Any = DenseMDP(
            leaves["reward"],
            leaves["transition"],
            case.discount,
            mask=clean.mask,
            terminal=clean.terminal,
            reference=leaves["reference"],
        )
        mdp = mdp.to_sparse() if sparse else mdp
        got = birl_ext.solve(mdp, temperature=0.5, backend=backend)
        total = got.value.sum() + got.policy.square().sum()
        return got, torch.autograd.grad(total, list(leaves.values()))

    want, want_grads = run({name: getattr(clean, name) for name in dirty})
    got, grads = run(dirty)
    assert_same_solution(got, want, junk)
    for name, ours, theirs in zip(dirty, grads, want_grads, strict=True):
        assert_same_bits(ours, theirs, label=f"gradient of {name}")
    hidden &= clean.mask.any(-1, keepdim=True)  # an end without actions is given one, which pays 0
    assert (got.policy[hidden] == 0).all()
    assert (got.q[hidden] == -math.inf).all()
    assert (got.log_policy[hidden] == -math.inf).all()
    assert (got.advantage[hidden] == 0).all()
    unseen_rows = unread.expand(clean.transition.shape)
    for grad, unseen in zip(grads, (hidden, hidden, unseen_rows), strict=True):
        assert (grad[unseen] == 0).all()


def test_a_mask_is_the_limit_of_a_bad_reward(backend: BackendName) -> None:
    """Forbidding an action equals paying −1e4 for it, where that means probability zero."""
    case = Case("grid", 9, 4, mask=True, seed=4)
    mdp = case.mdp()
    assert mdp.mask is not None
    open_rows = rows(9, 4, 9).where(~mdp.mask.unsqueeze(-1), mdp.transition)
    reward = mdp.reward.masked_fill(~mdp.mask, -1e4)
    masked = birl_ext.solve(mdp, temperature=0.5, backend=backend)
    paid = birl_ext.solve(reward, open_rows, discount=0.9, temperature=0.5, backend=backend)
    assert_close(masked.value, paid.value, bound=1e-11, label="value")
    assert_close(masked.policy, paid.policy, bound=1e-12, label="policy")


# Layouts


@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_outputs_never_alias_inputs_or_each_other(discount: float, backend: BackendName) -> None:
    inputs = [tables(2, 4, 3), rows(2, 4, 3, 4), tables(2, 4)]
    kept = [x.clone() for x in inputs]
    reward, transition, initial = inputs
    got = birl_ext.solve(
        reward, transition, discount=discount, temperature=0.5, initial=initial, backend=backend
    )
    others = birl_ext.bellman(
        initial, reward, transition, discount=discount, temperature=0.5, backend=backend
    )
    gained = birl_ext.evaluate(
        got.policy, reward, transition, discount=discount, backend=backend
    )  # fmt: skip
    visits = birl_ext.occupancy(
        got.policy,
        transition,
        discount=discount,
        initial_distribution=rows(2, 4),
        backend=backend,
    )
    outputs = [*(getattr(got, name) for name in DIFFERENTIABLE), *others, gained, visits]
    spans = {}
    for name, tensor in [*enumerate(outputs), *((f"input {i}", x) for i, x in enumerate(inputs))]:
        spans[name] = tensor.untyped_storage().data_ptr()
    assert len(set(spans.values())) == len(spans), spans
    for tensor in outputs:
        tensor.fill_(math.pi)
    for tensor, before in zip(inputs, kept, strict=True):
        assert_same_bits(tensor, before, label="an input was written to")


# One bad problem in a batch

BAD: dict[str, tuple[Status, str, Any]] = {  # status, tensor, and what stands in its place
    "row sum": (Status.ROW_SUM, "transition", [0.2, 0.3, 0.4, 0.0]),
    "negative": (Status.NEGATIVE_PROBABILITY, "transition", [0.5, 0.75, -0.25, 0.0]),
    "NaN in P": (Status.NON_FINITE_TRANSITION, "transition", [0.5, 0.5, math.nan, 0.0]),
    "inf in P": (Status.NON_FINITE_TRANSITION, "transition", [0.5, 0.5, math.inf, 0.0]),
    "inf in r": (Status.NON_FINITE_REWARD, "reward", math.inf),
    "NaN in r": (Status.NON_FINITE_REWARD, "reward", math.nan),
    "discount": (Status.BAD_DISCOUNT, "discount", 1.0),
    "temperature": (Status.BAD_TEMPERATURE, "temperature", 0.0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_problem_leaves_its_neighbours_alone(
    bad: str, method: MethodName, backend: BackendName
) -> None:
    """Values and gradients of the other 63 keep every bit; the bad one has a status and NaN."""
    inputs = {
        "reward": tables(64, 4, 3),
        "transition": rows(64, 4, 3, 4),
        "discount": 0.5 + 0.4 * torch.rand(64, dtype=torch.float64),
        "temperature": 0.2 + torch.rand(64, dtype=torch.float64),
    }
    poisoned: dict[str, Any] = {name: tensor.clone() for name, tensor in inputs.items()}
    status, where, instead = BAD[bad]
    place = (17, 2, 1) if where in ("transition", "reward") else (17,)
    poisoned[where][place] = torch.tensor(instead, dtype=torch.float64)

    def run(given: dict[str, Tensor]) -> tuple[Solution, tuple[Tensor, ...]]:
        leaves: dict[str, Any] = {
            name: tensor.clone().requires_grad_() for name, tensor in given.items()
        }
        got = birl_ext.solve(**leaves, method=method, on_fail="status", backend=backend)
        total = got.value.sum() + got.policy.square().sum()
        return got, torch.autograd.grad(total, list(leaves.values()))

    want, want_grads = run(inputs)
    got, grads = run(poisoned)
    others = torch.arange(64) != 17
    assert got.status[17] == status
    assert (got.status[others] == 0).all()
    for name in DIFFERENTIABLE:
        ours, theirs = getattr(got, name), getattr(want, name)
        assert torch.isnan(ours[17]).all(), name
        assert_same_bits(ours[others], theirs[others], label=f"{bad}: {name} of the others")
    for name, ours, theirs in zip(inputs, grads, want_grads, strict=True):
        assert_same_bits(ours[others], theirs[others], label=f"{bad}: gradient of {name}")
        assert torch.isnan(ours[17]).all(), f"{bad}: gradient of {name}"
    with pytest.raises(errors.BirlError, match=r"batch 17"):
        birl_ext.solve(**poisoned, method=method, backend=backend)


# Convergence


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_start_changes_the_work_and_not_the_answer(
    method: MethodName, backend: BackendName
) -> None:
    mdp = Case("garnet", 30, 3, batch=(2,), discount=0.99, seed=2).mdp()

    def solve(**options: Any) -> Solution:
        return birl_ext.solve(mdp, temperature=0.5, method=method, backend=backend, **options)

    cold = solve()
    near = cold.value + 1e-6 * torch.randn_like(cold.value)
    warm = solve(initial=near)
    bound = (cold.error_bound + warm.error_bound).unsqueeze(-1)
    assert_close(warm.value, cold.value, bound=bound, label="value")
    assert (warm.iterations < cold.iterations).all()
    there = solve(initial=cold.value)
    assert (there.iterations <= warm.iterations.clamp(min=5)).all()
    far = solve(initial=torch.full_like(cold.value, 1e3) + 50 * torch.randn_like(cold.value))
    bound = (cold.error_bound + far.error_bound).unsqueeze(-1)
    assert_close(far.value, cold.value, bound=bound, label="from afar")
    assert bound.max() < 1e-8
    guess = near.clone().requires_grad_()
    assert not solve(initial=guess).value.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_below_the_rounding_floor_is_refused(
    method: MethodName, backend: BackendName
) -> None:
    """float32 data are solved in float64, so the floor that can be missed is the float64 one."""
    mdp = Case("garnet", 20, 3, discount=0.9999, dtype=torch.float32, seed=1).mdp()
    options: dict[str, Any] = {"temperature": 1e-3, "method": method, "backend": backend}
    with pytest.raises(errors.StagnatedError, match=r"BIRL-E402 .*Fix:") as caught:
        birl_ext.solve(mdp, tol=1e-17, **options)
    best = caught.value.solution
    assert best.status.item() == Status.STAGNATED
    want = oracle(mdp, 1e-3)
    assert_close(best.value, want.value, bound=best.error_bound + 1e-9, label="what was reached")
    got = birl_ext.solve(mdp, tol=1e-17, on_fail="status", **options)
    assert_same_solution(got, best, "the two ways to get it")
    assert got.iterations.item() < 100_000  # noticed, not sat out


@pytest.mark.parametrize("tol", [1e-12, 1e-8])
@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_that_float32_cannot_hold_is_refused(
    method: MethodName, tol: float, backend: BackendName
) -> None:
    """The value is handed out in float32: a relative error of 1e-12 cannot be certified of it."""
    mdp = Case("garnet", 20, 3, discount=0.99, dtype=torch.float32, seed=1).mdp()
    options: dict[str, Any] = {"temperature": 0.5, "method": method, "backend": backend}
    with pytest.raises(errors.StagnatedError, match=r"BIRL-E402 .*Fix:"):
        birl_ext.solve(mdp, tol=tol, **options)
    got = birl_ext.solve(mdp, tol=1e-6, **options)
    size = max(float(got.value.abs().max()), float(mdp.reward.abs().max()))
    assert got.error_bound.item() <= 1e-6 * size


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_limit_raises_and_keeps_the_best_iterate(
    method: MethodName, sparse: bool, backend: BackendName
) -> None:
    base = Case("clusters", 8, 3, batch=(3,), discount=0.9999, temperature=0.1, seed=2).mdp()
    reward = base.reward.clone().requires_grad_()
    mdp: Any = base.replace(reward=reward)
    mdp = mdp.to_sparse() if sparse else mdp
    options: dict[str, Any] = {
        "temperature": 0.1,
        "method": method,
        "max_iterations": 2,
        "backend": backend,
    }
    with pytest.raises(errors.NotConvergedError, match=r"BIRL-E401 .*3 of 3 .*batch") as caught:
        birl_ext.solve(mdp, **options)
    got = birl_ext.solve(mdp, on_fail="status", **options)
    assert_same_solution(caught.value.solution, got, "the error's solution")
    assert (got.status == Status.MAX_ITERATIONS).all()
    assert (got.iterations == 2).all()
    want = oracle(base, 0.1)
    assert_close(
        got.value, want.value, bound=got.error_bound.unsqueeze(-1), label="certified even so"
    )
    (slope,) = torch.autograd.grad(got.value.sum(), reward, retain_graph=True)
    assert torch.isnan(slope).all()
    (slope,) = torch.autograd.grad(got.policy.square().sum(), reward)
    assert torch.isnan(slope).all()


@pytest.mark.parametrize("part", ["value", "q", "policy", "log_policy", "advantage"])
def test_every_derivative_of_a_failed_solve_is_nan(part: str, backend: BackendName) -> None:
    """Reverse and forward; a converged neighbour in the same batch keeps its own."""
    reward = tables(2, 8, 3)
    transition = Case("clusters", 8, 3, seed=2).mdp().transition
    discount = torch.tensor([0.0, 0.9999], dtype=torch.float64)  # the first is done at once

    def solve(r: Tensor) -> Tensor:
        got = birl_ext.solve(
            r,
            transition,
            discount=discount,
            temperature=0.1,
            max_iterations=3,
            method="value-iteration",
            on_fail="status",
            backend=backend,
        )
        assert got.status.tolist() == [0, 1]
        out: Tensor = getattr(got, part)
        return out

    leaf = reward.clone().requires_grad_()
    (slope,) = torch.autograd.grad(solve(leaf).sin().sum(), leaf)
    assert torch.isfinite(slope[0]).all()
    assert torch.isnan(slope[1]).all()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(reward, torch.ones_like(reward))
        tangent = torch.autograd.forward_ad.unpack_dual(solve(dual)).tangent
    assert torch.isfinite(tangent[0]).all()
    assert torch.isnan(tangent[1]).all()


def test_an_overflow_is_an_error(backend: BackendName) -> None:
    """Rewards near the largest float: V = r/(1−γ) has no float64."""
    reward = torch.full((3, 2), 1e308, dtype=torch.float64)
    options: dict[str, Any] = {"discount": 0.99, "temperature": 1.0, "backend": backend}
    with pytest.raises(errors.NonFiniteResultError, match=r"BIRL-E403 .*Fix: rescale"):
        birl_ext.solve(reward, rows(3, 2, 3), **options)


# Autograd's own rules


@pytest.mark.parametrize("changed", ["reward", "transition", "policy"])
def test_an_in_place_change_after_the_forward_is_caught(changed: str, backend: BackendName) -> None:
    """Autograd's version counters; a reward may change, since its derivative does not need it."""
    reward, transition = tables(4, 3).requires_grad_(), rows(4, 3, 4).requires_grad_()
    got = birl_ext.solve(reward, transition, discount=0.9, temperature=0.5, backend=backend)
    total = got.value.sum() + got.policy.square().sum()
    want = torch.autograd.grad(total, (reward, transition), retain_graph=True)
    tensor = {"reward": reward, "transition": transition, "policy": got.policy}[changed]

    def change_and_differentiate() -> tuple[Tensor, ...]:
        with torch.no_grad():
            tensor.mul_(2)
        return torch.autograd.grad(total, (reward, transition))

    if changed == "reward":
        for ours, theirs in zip(change_and_differentiate(), want, strict=True):
            assert_same_bits(ours, theirs, label="the reward is not needed")
        return
    with pytest.raises(RuntimeError, match=r"modified by an inplace"):
        change_and_differentiate()


@pytest.mark.parametrize("function", ["bellman", "evaluate", "occupancy"])
def test_an_in_place_change_is_caught_everywhere(function: str, backend: BackendName) -> None:
    transition = rows(4, 3, 4).requires_grad_()
    policy = rows(4, 3).requires_grad_()
    options: dict[str, Any] = {"discount": 0.9, "backend": backend}
    if function == "bellman":
        out = birl_ext.bellman(
            tables(4), tables(4, 3).requires_grad_(), transition, temperature=0.5, **options
        )[0]
    elif function == "evaluate":
        out = birl_ext.evaluate(policy, tables(4, 3), transition, **options)
    else:
        out = birl_ext.occupancy(policy, transition, initial_distribution=rows(4), **options)
    with torch.no_grad():
        transition.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


# Determinism


@pytest.mark.parametrize("method", METHODS)
def test_a_problem_does_not_know_its_place_in_the_batch(
    method: MethodName, backend: BackendName
) -> None:
    mdp = Case("dense", 9, 3, batch=(5,), discount=0.97, seed=5).mdp()
    order = torch.tensor([3, 1, 4, 0, 2])
    options: dict[str, Any] = {
        "discount": 0.97,
        "temperature": 0.5,
        "method": method,
        "backend": backend,
    }
    want = birl_ext.solve(mdp.reward, mdp.transition, **options)
    got = birl_ext.solve(mdp.reward[order], mdp.transition[order], **options)
    for name in ("value", "policy", "error_bound"):
        assert_same_bits(getattr(got, name), getattr(want, name)[order], label=name)


@pytest.mark.parametrize("case", WARP, ids=str)
def test_states_can_be_renamed(case: Case, backend: BackendName) -> None:
    """Permuting the states permutes the answer, to rounding."""
    mdp = case.mdp()
    order = torch.randperm(case.states)
    options: dict[str, Any] = {
        "discount": case.discount,
        "temperature": case.temperature,
        "backend": backend,
    }
    got = birl_ext.solve(
        mdp.reward[:, order], mdp.transition[:, order][..., order], **options
    )  # fmt: skip
    want = birl_ext.solve(mdp.reward, mdp.transition, **options)
    assert_close(got.value, want.value[:, order], bound=1e-12, label="value")
    assert_close(got.policy, want.policy[:, order], bound=1e-12, label="policy")
