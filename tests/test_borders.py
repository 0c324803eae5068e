"""What is almost right: it is taken, or refused with a remedy that is right when obeyed."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import untyped
from closeness import assert_close, assert_same_bits
from torch import Tensor

import birl_ext
from birl_ext import DenseMDP, SparseMDP, errors, functional
from birl_ext.model import checks
from birl_ext.nn import SoftPlanner
from birl_ext.ops.backends import choice, native

S, A = 4, 3
NOTHING: Any = None  # where a signature asks for something
P = torch.rand(S, A, S, generator=torch.Generator().manual_seed(0)).double()
P = P / P.sum(-1, keepdim=True)
R = torch.linspace(-1, 1, S * A, dtype=torch.float64).reshape(S, A).sin()
EVEN = torch.full((S, A), 1 / A, dtype=torch.float64)
START = torch.full((S,), 1 / S, dtype=torch.float64)


def solve(reward: Any = R, transition: Any = P, **options: Any) -> Tensor:
    return birl_ext.solve(
        reward, transition, **{"discount": 0.5, "temperature": 0.5, **options}
    ).value


# Types


NUMBERS: tuple[Any, ...] = (
    np.float32(0.5),
    np.float64(0.5),
    np.array(0.5),
    Fraction(1, 2),
    Decimal("0.5"),
    torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.float16),
)
NO_NUMBERS: tuple[Any, ...] = (
    [0.5],
    (0.5,),
    np.array([0.5]),
    "0.5",
    0.5 + 0j,
    True,
    np.True_,
    torch.tensor(1),
    10**400,
    np.array(0.5).__dlpack__(),
)
CALLS: dict[str, Callable[[Any], Tensor]] = {
    "solve, discount": lambda x: solve(discount=x),
    "solve, temperature": lambda x: solve(temperature=x),
    "DenseMDP, discount": lambda x: birl_ext.solve(DenseMDP(R, P, x), temperature=0.5).value,
    "bellman, temperature": lambda x: birl_ext.bellman(START, R, P, discount=0.5, temperature=x)[0],
    "evaluate, discount": lambda x: birl_ext.evaluate(EVEN, R, P, discount=x),
    "occupancy, discount": lambda x: birl_ext.occupancy(
        EVEN, P, discount=x, initial_distribution=START
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_one_number_is_taken_and_nothing_else(call: str) -> None:
    want = CALLS[call](0.5)
    for number in NUMBERS:
        assert_same_bits(CALLS[call](number), want, label=f"{call} {number!r}")
    for other in NO_NUMBERS:
        with pytest.raises(errors.DtypeError, match=r"BIRL-E302 (discount|temperature) "):
            CALLS[call](other)


def test_the_remedy_for_several_numbers() -> None:
    discount = [0.5, 0.6]
    with pytest.raises(errors.DtypeError) as refused:
        solve(discount=discount)
    obeyed = eval(refused.value.fix.removeprefix("pass "), {"torch": torch, "discount": discount})
    assert solve(discount=obeyed).shape == (2, S)


ARRAYS: dict[str, Callable[[Any], Any]] = {
    "reward": lambda x: solve(reward=x),
    "transition": lambda x: solve(transition=x),
    "initial": lambda x: solve(initial=x),
    "reference": lambda x: solve(reference=x),
    "mask": lambda x: solve(mask=x),
    "terminal": lambda x: solve(terminal=x),
    "value": lambda x: birl_ext.bellman(x, R, P, discount=0.5, temperature=0.5),
    "policy": lambda x: birl_ext.evaluate(x, R, P, discount=0.5),
    "initial_distribution": lambda x: birl_ext.occupancy(
        EVEN, P, discount=0.5, initial_distribution=x
    ),
}


@pytest.mark.filterwarnings("ignore:.*(prototype stage|beta state):UserWarning")
@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_no_ordinary_tensor_is_refused_by_name(name: str) -> None:
    values = torch.full((S, A), 0.5, dtype=torch.float64)
    for other in (
        [[0.5] * A] * S,
        values.numpy(),
        "0.5",
        values.to_sparse(),
        values.to_sparse_csr(),
        torch.nested.nested_tensor([values, values]),
        torch.masked.masked_tensor(values, values > 0),
        values + 0j,
        values.long(),
    ):
        with pytest.raises(errors.DtypeError, match=rf"BIRL-E302 {name} (is|has)"):
            ARRAYS[name](other)


def test_dense_matrices_are_no_sparse_ones() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    matrices = [P[:, a].numpy() for a in range(A)]
    with pytest.raises(errors.SparseFormatError, match=r"scipy\.sparse\.csr_array"):
        SparseMDP.from_scipy(matrices, R, 0.5)
    mdp = SparseMDP.from_scipy([scipy_sparse.csr_array(m) for m in matrices], R, 0.5)
    assert_close(birl_ext.solve(mdp, temperature=0.5).value, solve(), bound=1e-14, label="obeyed")


@pytest.mark.parametrize("bad", [1.5, True, float("nan"), float("inf"), "7", 0, 2**63])
def test_passes_are_counted_in_whole_numbers(bad: Any) -> None:
    with pytest.raises(errors.OptionError, match="max_iterations is"):
        solve(max_iterations=bad)
    assert_close(solve(max_iterations=np.int64(90)), solve(), bound=1e-14, label="int64")


# Axes in another order


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("order", ["asS", "aSs", "sSa", "Ssa", "Sas"])
def test_the_remedy_for_a_transposed_transition(order: str, batch: tuple[int, ...]) -> None:
    """`order` is that in which another program stores P(S|s, a)."""
    given = torch.einsum(f"...saS->...{order}", P.expand(*batch, S, A, S)).contiguous()
    with pytest.raises((errors.ShapeError, errors.NonStochasticError)) as refused:
        solve(transition=given)
    expression = re.search(r"transition\.\w+\([-\d, ]+\)", refused.value.fix)
    assert expression, refused.value
    obeyed = eval(expression[0], {"transition": given})
    assert torch.equal(obeyed, P.expand(*batch, S, A, S))


def test_the_remedy_for_a_transposed_reward() -> None:
    with pytest.raises(errors.ShapeError, match="E301 reward has shape") as refused:
        solve(reward=R.mT)
    assert torch.equal(eval(refused.value.fix.removeprefix("pass "), {"reward": R.mT}), R)


# Rows that do not sum to one


def test_the_remedies_for_a_row_of_zeros() -> None:
    """A choice that a state lacks is masked; a state where the process ends is terminal."""
    lacking = P.clone()
    lacking[1, 2] = 0
    with pytest.raises(errors.NonStochasticError, match=r"`mask` to False .* `terminal`"):
        solve(transition=lacking)
    q = R.masked_fill(lacking.sum(-1) == 0, -torch.inf)
    value = torch.zeros(S, dtype=torch.float64)
    for _ in range(60):
        value = 0.5 * torch.logsumexp((q + 0.5 * lacking @ value) / 0.5, -1)
    obeyed = solve(transition=lacking, mask=lacking.sum(-1) > 0)
    assert_close(obeyed, value, bound=1e-13, label="masked")


def test_the_remedy_for_a_row_below_one() -> None:
    """What is missing goes to an absorbing end; normalising would be another problem."""
    leaking = 0.9 * P
    with pytest.raises(errors.NonStochasticError, match=r"absorbing state .* `terminal` .* `mask`"):
        solve(transition=leaking)
    whole = torch.zeros(S + 1, A, S + 1, dtype=torch.float64)
    whole[:S, :, :S] = leaking
    whole[:S, :, S] = 1 - leaking.sum(-1)
    reward = torch.cat((R, torch.zeros(1, A, dtype=torch.float64)))
    end = torch.arange(S + 1) == S
    obeyed = solve(reward, whole, terminal=end, mask=~end.unsqueeze(-1).expand(-1, A))
    value = torch.zeros(S, dtype=torch.float64)
    for _ in range(60):
        value = 0.5 * torch.logsumexp((R + 0.5 * leaking @ value) / 0.5, -1)
    assert_close(obeyed[:S], value, bound=1e-13, label="absorbed")
    assert obeyed[S] == 0


# Rounding below zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_subtractions_leave_of_one_is_no_mistake(
    backend: Any, sparse: bool, dtype: torch.dtype
) -> None:
    """1 − 0.9 − 0.1 is −2.8e-17; the solution is that with zero, its gradient has no gap."""
    one = torch.ones((), dtype=dtype)
    small = one - one * 0.9 - one * 0.1
    least = -torch.finfo(dtype).eps if not small < 0 else small
    rows = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.3, 0.3, 0.4]], dtype=dtype)
    rows = rows.unsqueeze(1).repeat(1, 2, 1)
    rows[0, 1, 2] = least
    reward = torch.tensor([[1.0, 0.2], [0.5, 0.1], [2.0, -1.0]], dtype=dtype)

    def value(transition: Tensor) -> tuple[Tensor, Tensor]:
        leaf = transition.clone().requires_grad_()
        model: tuple[Any, ...] = (reward, leaf)
        options: dict[str, Any] = {"discount": 0.9}
        if sparse:
            crow, col = torch.arange(0, 19, 3), torch.arange(3).repeat(6)
            model, options = (SparseMDP(reward, leaf.flatten(), crow, col, 0.9),), {}
        found = birl_ext.solve(*model, temperature=0.5, backend=backend, **options)
        found.value.sum().backward()
        assert leaf.grad is not None
        return found.value.detach(), leaf.grad

    zero = rows.clone()
    zero[0, 1, 2] = 0
    got, want = value(rows), value(zero)
    eps = torch.finfo(dtype).eps
    assert_close(got[0], want[0], bound=300 * eps, label="value")
    assert_close(got[1], want[1], bound=3000 * eps, label="gradient")
    policy = torch.tensor([1 + 2.8e-17, -2.8e-17], dtype=dtype).expand(3, 2)
    assert birl_ext.evaluate(policy, reward, rows, discount=0.9).isfinite().all()
    too_much = rows.clone()
    too_much[0, 1, 2] = -100 * eps
    with pytest.raises(errors.NegativeProbabilityError, match=r"BIRL-E102 .* next state 2"):
        value(too_much)


# Ends that leave a choice


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[str]]:
    """What a call, made twice, says of ends in a process where nothing has been said."""

    def listen(call: Callable[[], Any]) -> list[str]:
        monkeypatch.setattr(functional, "_told", set())
        monkeypatch.setattr(functional, "_looked", 0)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
            call()
        assert all(w.category is errors.TerminalChoiceWarning for w in seen)
        assert all(w.filename == __file__ for w in seen)
        return [str(w.message) for w in seen]

    return listen


def test_an_end_with_a_choice_is_told_once(heard: Any) -> None:
    end = torch.arange(S) == S - 1
    closed = torch.ones(S, A, dtype=torch.bool)
    closed[-1, 1:] = False

    mdp = DenseMDP(R, P, 0.5, terminal=end)
    for call in (
        lambda: solve(terminal=end),
        lambda: birl_ext.solve(mdp, temperature=0.5),
        lambda: birl_ext.solve(mdp.to_sparse().replace(reward=2 * R), temperature=0.5),
        lambda: birl_ext.bellman(START, mdp, temperature=0.5),
        lambda: SoftPlanner(discount=0.5, temperature=0.5, transition=P, terminal=end)(R),
        lambda: solve(terminal=end, mask=closed | end.unsqueeze(-1)),
    ):
        (message,) = heard(call)
        assert "τ log A" in message
    for call in (
        lambda: solve(terminal=end, mask=closed),
        lambda: solve(terminal=end & False),
        lambda: solve(terminal=end, reference=EVEN),
        lambda: birl_ext.evaluate(EVEN, mdp),
    ):
        assert heard(call) == []
    reward = R.where(~end.unsqueeze(-1), 0.0)
    free = solve(reward, terminal=end)
    assert_close(free[-1], 0.5 * np.log(A), bound=1e-15, label="V = τ log A")
    closed[-1] = False
    assert solve(reward, terminal=end, mask=closed)[-1] == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_an_absorbing_state_with_a_choice_is_told_once(heard: Any, sparse: bool) -> None:
    rows, paid = P.clone(), R.clone()
    rows[1] = torch.eye(S, dtype=torch.float64)[1]
    paid[1] = 0.5
    one = torch.ones(S, A, dtype=torch.bool)
    one[1, 1:] = False

    def built(**options: Any) -> Any:
        mdp = DenseMDP(options.pop("reward", paid), rows, 0.5, **options)
        return dataclasses.replace(mdp.to_sparse(), validate="full") if sparse else mdp

    def solved(mdp: Any) -> Any:
        return birl_ext.solve(mdp, temperature=0.5)

    told = [
        lambda: solved(built()),
        lambda: solved(built(reference=torch.ones(S, A, dtype=torch.float64))),
        lambda: solved(built(reward=R).replace(reward=paid)),
        lambda: solved(built().replace(discount=0.25)),
        lambda: solved(built(initial_distribution=START.softmax(-1)).to(torch.float64)),
        lambda: solved(built(reward=torch.stack((R, paid)))),
        lambda: solved(built(terminal=torch.arange(S) == 0, mask=torch.ones_like(one))),
        lambda: SoftPlanner(discount=0.5, temperature=0.5, transition=rows)(paid),
        lambda: birl_ext.solve(paid, rows, discount=0.5, temperature=0.5),
        lambda: birl_ext.solve(paid, rows, discount=0.5, temperature=0.5, method="newton"),
        lambda: birl_ext.bellman(START, paid, rows, discount=0.5, temperature=0.5),
    ]  # fmt: skip
    for call in told:
        messages = heard(call)
        assert sum("τ log A / (1 − γ)" in message for message in messages) == 1, messages
    for call in (
        lambda: solved(built(reward=R)),  # its actions pay differently: a choice that is meant
        lambda: solved(built().replace(reward=R)),
        lambda: solved(built(mask=one)),
        lambda: solved(built().replace(mask=one)),
        lambda: solved(built(reference=EVEN)),
        lambda: solved(built(mask=one, terminal=torch.arange(S) == 1)),
        lambda: solved(DenseMDP(paid, rows, 0.5, validate="cheap")),
        lambda: solved(built().replace(reward=R, validate="cheap")),
        lambda: solved(dataclasses.replace(DenseMDP(0 * R, P, 0.5).to_sparse(), validate="full")),
        lambda: birl_ext.solve(R, rows, discount=0.5, temperature=0.5),
        lambda: birl_ext.solve(paid, P, discount=0.5, temperature=0.5),
    ):
        assert heard(call) == []
    closed = birl_ext.convert.mask_ends(built())
    assert heard(lambda: solved(closed)) == []
    assert_close(solved(built()).value[1], 1 + np.log(A), bound=1e-15, label="V, with the entropy")
    assert solved(closed).value[1] == 1.0


def test_tensors_are_looked_at_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_looked", 0)
    looked: list[Tensor] = []
    real = checks.pays_alike
    monkeypatch.setattr(
        checks, "pays_alike", lambda *given: (looked.append(given[0]), real(*given))[1]
    )
    rows = P.clone()
    rows[1] = torch.eye(S, dtype=torch.float64)[1]
    for _ in range(3 * functional._LOOKS):
        birl_ext.solve(R, rows, discount=0.5, temperature=0.5)
    assert len(looked) == functional._LOOKS


def test_a_reference_that_is_not_normalised_leaves_a_free_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = torch.arange(S) == S - 1
    for reference, free in ((EVEN, False), (2 * EVEN, True), (EVEN.float().double(), False)):
        mdp = DenseMDP(R, P, 0.5, terminal=end, reference=reference)
        assert mdp.free_ends == free
        assert mdp.to_sparse().to(torch.float32).free_ends == free
    mask = torch.ones(S, A, dtype=torch.bool)
    mask[-1, 1:] = False  # one action is no choice, whatever its weight
    assert not DenseMDP(R, P, 0.5, terminal=end, reference=EVEN, mask=mask).free_ends


# Out of range, unchecked


@pytest.mark.parametrize("discount", [1.0, 2.0, -0.5, float("nan")])
def test_an_unchecked_discount_gives_no_number(discount: float) -> None:
    """A number is refused at any level; a tensor gives NaN or an error that is named."""
    tensor = torch.tensor([0.5, discount], dtype=torch.float64)
    calls: tuple[Callable[[Any], Tensor], ...] = (
        lambda d: birl_ext.evaluate(EVEN, R, P, discount=d, validate="off"),
        lambda d: birl_ext.occupancy(
            EVEN, P, discount=d, initial_distribution=START, validate="off"
        ),
        lambda d: birl_ext.bellman(START, R, P, discount=d, temperature=1.0, validate="off")[0],
    )
    for call in calls:
        with pytest.raises(errors.DiscountError):
            call(discount)
        try:
            found = call(tensor)
        except errors.NotConvergedError:
            continue
        assert found[0].isfinite().all()
        assert found[1].isnan().all()


def test_an_end_with_a_choice_keeps_nobody_from_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_told", set())
    mdp = DenseMDP(R, P, 0.5, terminal=torch.arange(S) == S - 1)
    compiled = torch.compile(
        lambda tau: birl_ext.solve(mdp, temperature=tau).value, backend="eager", fullgraph=True
    )
    tau = torch.tensor(0.5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_bits(compiled(tau), birl_ext.solve(mdp, temperature=tau).value, label="value")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_unchecked_nan_is_not_called_an_overflow(backend: Any) -> None:
    rows = P.clone()
    rows[0, 0, 0] = torch.nan
    with pytest.raises(errors.NonFiniteResultError, match=r'not finite.*validate="full"'):
        solve(transition=rows, validate="off", backend=backend)


# Memory


@pytest.mark.slow
def test_memory_that_runs_out_is_named_with_its_bytes() -> None:
    """In a process of its own, which may have little."""
    program = """
        import resource, torch, birl_ext
        rows = torch.full((1, 1, 30000), 1 / 30000).double().expand(30000, 1, 30000)
        reward = torch.zeros(30000, 1).double()
        small, limit = torch.eye(2).double().expand(2, 2, 2), 2**32
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for call in (
            lambda: birl_ext.solve(reward, rows, discount=.9, temperature=1.),
            lambda: birl_ext.DenseMDP(reward, rows, .9, mask=torch.ones(30000, 1) > 0),
            lambda: birl_ext.evaluate(torch.ones(30000, 1).double(), reward, rows, discount=.9),
            lambda: birl_ext.solve(
                torch.zeros(2, 2).double().expand(2**28, 2, 2), small, discount=.9, temperature=1.
            ),
        ):
            try:
                call()
            except birl_ext.errors.SizeLimitError as error:
                print(error.code, error.what)
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("BIRL")]
    assert len(lines) == 4, done.stdout + done.stderr
    for line in lines:
        found = re.fullmatch(r"BIRL-E304 the problem needs (\d+) bytes more", line)
        assert found, line
        assert int(found[1]) >= 2**30


# Failures


def test_a_plain_call_that_fails_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fast, general = native.solve_fast, choice.solve

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(function)
            return function(*args, **options)

        return call

    monkeypatch.setattr(native, "solve_fast", counted(fast))
    monkeypatch.setattr(choice, "solve", counted(general))
    rewards, rows = torch.stack([R, R]), torch.stack([P, P])
    rows[1, 2, 0] *= 0.5
    message = r"BIRL-E101 .* sums to 0\.5 at batch 1, state 2, action 0"
    with pytest.raises(errors.NonStochasticError, match=message):
        solve(rewards, rows)
    with pytest.raises(errors.NonFiniteResultError) as overflowed:
        solve(torch.full_like(R, 1e308), discount=0.99)
    assert len(calls) == 2
    assert overflowed.value.solution.status == 3


@pytest.mark.parametrize("validate", ["full", "cheap", "off"])
@pytest.mark.parametrize(("backend", "spent"), [("cpu", " after 1 pass"), ("torch", "")])
def test_an_overflow_says_no_more_than_is_known(backend: Any, validate: Any, spent: str) -> None:
    """PyTorch does not count the passes of what has overflowed."""
    huge = torch.full_like(R, 1e308)
    with pytest.raises(errors.NonFiniteResultError, match=rf"E403 overflowed{spent}\. Fix: resc"):
        solve(huge, discount=0.99, backend=backend, validate=validate)


# Files


@pytest.mark.parametrize("name", ["model.mat", "model.npy", "model.tra", "model"])
def test_the_remedy_for_a_file_of_another_program(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"of another program")
    with pytest.raises(errors.FileFormatError, match=r"build DenseMDP\(reward, transition, disc"):
        birl_ext.model.mdp.load(path)
    other = tmp_path / "other.npz"
    np.savez(other, P=P.numpy(), R=R.numpy())
    with pytest.raises(errors.FileFormatError, match=r"build DenseMDP\(reward, transition, disc"):
        birl_ext.model.mdp.load(other)
    with pytest.raises(errors.FileFormatError, match=r"ends in \.npz"):
        DenseMDP(R, P, 0.5).save(path)


def test_orders_that_the_numbers_do_not_tell_apart_are_all_named() -> None:
    """With as many actions as states the last axis is known and the first two are not."""
    rows = torch.rand(3, 3, 3, dtype=torch.float64).softmax(-1)
    reward = torch.rand(3, 3, dtype=torch.float64)
    for given, right in (
        (rows.permute(1, 2, 0).contiguous(), "transition.movedim(-1, -3)"),
        (rows.permute(2, 1, 0).contiguous(), "transition.transpose(-3, -1)"),
    ):
        with pytest.raises(errors.NonStochasticError) as raised:
            birl_ext.solve(reward, given, discount=0.9, temperature=0.3)
        assert right in str(raised.value)
        assert " or transition." in str(raised.value)


def test_a_mask_that_opens_emptied_rows_is_refused() -> None:
    rows = torch.rand(3, 2, 3, dtype=torch.float64).softmax(-1)
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    mdp = birl_ext.DenseMDP(torch.rand(3, 2, dtype=torch.float64), rows, 0.9, mask=mask)
    wider = torch.ones(3, 2, dtype=torch.bool)
    for changes in ({"mask": wider}, {"mask": None}):
        for level in ("full", "cheap"):
            with pytest.raises(errors.NonStochasticError):
                mdp.replace(**changes, validate=level)
    mdp.replace(mask=wider, transition=rows, validate="cheap")
    narrower = mask & torch.tensor([[True, True], [True, False], [True, True]])
    mdp.replace(mask=narrower, validate="cheap")


def test_options_of_the_wrong_kind_are_named() -> None:
    rows = torch.rand(3, 2, 3, dtype=torch.float64).softmax(-1)
    problem = (torch.rand(3, 2, dtype=torch.float64), rows)
    for options in ({"method": ["newton"]}, {"tol": True}, {"tol": float("inf")}):
        with pytest.raises(errors.OptionError):
            birl_ext.solve(*problem, discount=0.9, temperature=0.3, **options)
    with pytest.raises(errors.ShapeError, match="temperature"):
        SoftPlanner(discount=0.9, temperature=untyped(torch.tensor([0.3, 0.2])))
    SoftPlanner(discount=0.9, temperature=untyped(torch.tensor([0.3])))
    with pytest.raises(errors.DtypeError, match="transition"):
        SoftPlanner(
            discount=0.9,
            temperature=0.3,
            transition=torch.zeros(3, 2, 3, dtype=torch.int64),
            learn_temperature=True,
        )


@pytest.mark.parametrize(
    "call",
    [
        lambda r, p: birl_ext.solve(NOTHING, p, discount=0.9, temperature=1.0),
        lambda r, p: birl_ext.bellman(NOTHING, r, p, discount=0.9, temperature=1.0),
        lambda r, p: birl_ext.evaluate(NOTHING, r, p, discount=0.9),
        lambda r, p: birl_ext.evaluate(r, NOTHING, p, discount=0.9),
        lambda r, p: birl_ext.occupancy(NOTHING, p, discount=0.9, initial_distribution=r[:, 0]),
        lambda r, p: birl_ext.occupancy(r, NOTHING, discount=0.9, initial_distribution=r[:, 0]),
        lambda r, p: birl_ext.DenseMDP(NOTHING, p, 0.9),
        lambda r, p: birl_ext.DenseMDP(r, NOTHING, 0.9),
    ],
)
def test_none_in_place_of_a_tensor_is_named(call: Callable[..., Any]) -> None:
    reward = torch.ones(3, 2, dtype=torch.float64)
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(errors.DtypeError, match=r"(reward|transition|policy|value) is None.*give "):
        call(reward, transition)


@pytest.mark.parametrize("name", ["tol", "max_iterations"])
@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(2),
        np.ones(1),
        torch.empty(0),
        10**400,
        torch.tensor(True),
        np.bool_(True),
        torch.tensor(1 + 0j),
        "1",
    ],
    ids=repr,
)
def test_a_number_is_asked_for_and_nothing_else_is_taken(name: str, bad: Any) -> None:
    reward = torch.ones(3, 2, dtype=torch.float64)
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(errors.OptionError, match=f"{name} is "):
        birl_ext.solve(reward, transition, discount=0.9, temperature=1.0, **untyped({name: bad}))


@pytest.mark.parametrize("name", ["method", "backend", "validate", "on_fail"])
def test_a_word_is_asked_for_and_nothing_else_is_taken(name: str) -> None:
    reward = torch.ones(3, 2, dtype=torch.float64)
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    for bad in (np.array(["auto", "auto"]), torch.ones(2), 3, None):
        with pytest.raises(errors.OptionError, match=f"{name} is "):
            birl_ext.solve(
                reward, transition, discount=0.9, temperature=1.0, **untyped({name: bad})
            )


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_a_table_without_both_axes_is_named(shape: tuple[int, ...]) -> None:
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    table = torch.ones(shape, dtype=torch.float64)
    start = torch.full((3,), 1 / 3, dtype=torch.float64)
    with pytest.raises(errors.ShapeError, match="policy has shape"):
        birl_ext.occupancy(table, transition, discount=0.9, initial_distribution=start)
    scipy = pytest.importorskip("scipy.sparse")
    rows = scipy.csr_array(transition.reshape(6, 3).numpy())
    with pytest.raises(errors.ShapeError, match="reward has shape"):
        birl_ext.SparseMDP.from_scipy(rows, table, 0.9)


def test_memory_that_is_missing_is_counted_for_what_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("birl_ext.functional.ops_solve.solve", out_of_memory)
    mask = torch.ones(S, A, dtype=torch.bool)
    size = sum(x.numel() * x.itemsize for x in (R, P, mask))
    with pytest.raises(errors.SizeLimitError, match=f"more than the {size} bytes"):
        solve(mask=mask)
    mdp = DenseMDP(R, P, 0.5, mask=mask)
    with pytest.raises(errors.SizeLimitError, match=r"more than the \d{3,} bytes"):
        birl_ext.solve(mdp, temperature=0.5)
