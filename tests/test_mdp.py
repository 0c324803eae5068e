"""DenseMDP and SparseMDP: what they refuse, what they never read, what they keep."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import FLOATS, SMALL, Case, cases, untyped
from closeness import assert_same_bits
from hypothesis import given
from torch import Tensor

import birl_ext
from birl_ext import errors
from birl_ext.model import checks
from birl_ext.model.layout import layout
from birl_ext.model.mdp import DenseMDP, SparseMDP, load
from birl_ext.ops.backends import choice
from birl_ext.solution import Status

S, A = 3, 2
NAN, INF = float("nan"), float("inf")
MDP = DenseMDP | SparseMDP
FILES = [".npz", ".safetensors"]


def parts(dtype: torch.dtype = torch.float64, **changes: Any) -> dict[str, Any]:
    """Arguments of a valid DenseMDP with every optional field."""
    rng = torch.Generator().manual_seed(1)
    transition = torch.rand(S, A, S, generator=rng, dtype=torch.float64)
    arguments: dict[str, Any] = {
        "reward": torch.randn(S, A, generator=rng, dtype=torch.float64).to(dtype),
        "transition": (transition / transition.sum(-1, keepdim=True)).to(dtype),
        "discount": 0.9,
        "mask": torch.tensor([[True, True], [False, True], [True, True]]),
        "terminal": torch.tensor([False, False, True]),
        "reference": torch.rand(S, A, generator=rng, dtype=torch.float64).to(dtype) + 0.1,
        "initial_distribution": torch.tensor([0.5, 0.25, 0.25], dtype=dtype),
    }
    return {**arguments, **changes}


def plain(dtype: torch.dtype = torch.float64, **changes: Any) -> dict[str, Any]:
    """Arguments of a valid DenseMDP without the optional fields."""
    given = parts(dtype)
    return {**{name: given[name] for name in ("reward", "transition", "discount")}, **changes}


def sparse(dtype: torch.dtype = torch.float64, **changes: Any) -> dict[str, Any]:
    """Arguments of a valid SparseMDP: every row has two of the three next states."""
    arguments: dict[str, Any] = {
        "reward": parts(dtype)["reward"],
        "values": torch.tensor([0.25, 0.75], dtype=dtype).repeat(S * A),
        "crow": torch.arange(0, 2 * S * A + 1, 2),
        "col": torch.tensor([0, 2]).repeat(S * A),
        "discount": 0.9,
    }
    return {**arguments, **changes}


def put(tensor: Tensor, index: Any, value: float | Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def batched(tensor: Tensor, count: int = 4) -> Tensor:
    return tensor.expand(count, *tensor.shape).clone()


def tensors_of(mdp: MDP) -> dict[str, Tensor]:
    values = {f.name: getattr(mdp, f.name) for f in dataclasses.fields(mdp)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def assert_same(got: MDP, want: MDP) -> None:
    assert type(got) is type(want)
    assert tensors_of(got).keys() == tensors_of(want).keys()
    for name, tensor in tensors_of(want).items():
        assert_same_bits(getattr(got, name), tensor, label=name)
    if not isinstance(want.discount, Tensor):
        assert got.discount == want.discount
    assert got.batch_shape == want.batch_shape


# What is refused

P = parts()["transition"]
R = parts()["reward"]
ROW = P[2, 1] * 0.97

REFUSED: dict[str, tuple[type, dict[str, Any], type[errors.BirlError], str]] = {
    "row sum": (
        DenseMDP, plain(transition=put(P, (2, 1), ROW)), errors.NonStochasticError,
        r"^BIRL-E101 transition row sums to 0\.97 at state 2, action 1 "
        r"\(allowed: 1 ± 1e-08 for float64\)\. Fix: normalise",
    ),
    "row sum in two batch axes": (
        DenseMDP, plain(transition=put(batched(batched(P, 2)), (3, 1, 2, 1), ROW)),
        errors.NonStochasticError, r"at batch \(3, 1\), state 2, action 1 ",
    ),
    "row of zeros": (
        DenseMDP, plain(transition=put(P, (0, 1), 0.0)), errors.NonStochasticError,
        r"E101 .* sums to 0 at state 0, action 1 .*mark the state in `terminal`",
    ),
    "negative": (
        DenseMDP, plain(transition=put(P, (1, 0, 2), -1e-12)), errors.NegativeProbabilityError,
        r"^BIRL-E102 transition is -1e-12 at state 1, action 0, next state 2 \(allowed: at least 0",
    ),
    "infinity in the transition": (
        DenseMDP, plain(transition=put(P, (0, 1, 1), INF)), errors.NonFiniteInputError,
        r"E103 transition is inf at state 0, action 1, next state 1",
    ),
    "-inf in the reward": (
        DenseMDP, plain(reward=put(R, (0, 0), -INF)), errors.NonFiniteInputError,
        r"E103 reward is -inf at state 0, action 0",
    ),
    "no action": (
        DenseMDP, plain(mask=put(torch.ones(S, A, dtype=torch.bool), 1, False)),
        errors.EmptyActionSetError, r"^BIRL-E104 mask forbids all 2 actions at state 1 \(allowed: ",
    ),
    "reference NaN": (
        DenseMDP, plain(reference=put(parts()["reference"], (0, 1), NAN)),
        errors.NonFiniteInputError, r"E103 reference is nan at state 0, action 1",
    ),
    "initial sum": (
        DenseMDP, plain(initial_distribution=torch.tensor([0.5, 0.25, 0.125]).double()),
        errors.InitialDistributionError, r"^BIRL-E107 initial_distribution sums to 0\.875 ",
    ),
    **{
        f"discount {value}": (
            DenseMDP, plain(discount=value), errors.DiscountError,
            rf"^BIRL-E201 discount is {value!r} \(allowed: 0 ≤ discount < 1\)",
        )
        for value in (1.0, INF)
    },
    "discount integer tensor": (
        DenseMDP, plain(discount=torch.tensor(0)), errors.DtypeError, r"discount has dtype int64",
    ),
    "validate": (
        DenseMDP, plain(validate="none"), errors.OptionError, r"^BIRL-E203 validate is 'none' ",
    ),
    "reward too flat": (
        DenseMDP, plain(reward=R[0]), errors.ShapeError, r"E301 reward has shape \(2,\)",
    ),
    "transition shape": (
        DenseMDP, plain(transition=P[..., :2]), errors.ShapeError,
        r"E301 transition has shape \(3, 2, 2\) \(allowed: \(\*B, S, A, S\) = \(\*B, 3, 2, 3\)\)",
    ),
    "terminal shape": (
        DenseMDP, plain(terminal=torch.ones(S + 1, dtype=torch.bool)), errors.ShapeError,
        r"E301 terminal has shape \(4,\)",
    ),
    "reference shape": (
        DenseMDP, plain(reference=torch.ones(A, S).double()), errors.ShapeError,
        r"E301 reference has shape \(2, 3\)",
    ),
    "initial shape": (
        DenseMDP, plain(initial_distribution=torch.ones(A).double()), errors.ShapeError,
        r"E301 initial_distribution has shape \(2,\)",
    ),
    "batches": (
        DenseMDP, plain(reward=batched(R, 3), transition=batched(P, 4)), errors.ShapeError,
        r"E301 reward has batch axes \(3,\) \(allowed: axes that broadcast with \(4,\)",
    ),
    "initial batch": (
        DenseMDP, plain(initial_distribution=torch.full((4, S), 1 / S).double()),
        errors.ShapeError, r"E301 initial_distribution has batch axes \(4,\)",
    ),
    "complex transition": (
        DenseMDP, plain(transition=P.cfloat()), errors.DtypeError,
        r"E302 transition has dtype complex64",
    ),
    "array": (
        DenseMDP, plain(reward=R.numpy()), errors.DtypeError, r"E302 reward is a ndarray ",
    ),
    "list as terminal": (
        DenseMDP, plain(terminal=[False] * S), errors.DtypeError, r"E302 terminal is list ",
    ),
    "crow length": (
        SparseMDP, sparse(crow=torch.arange(0, 12, 2)), errors.SparseFormatError,
        r"^BIRL-E105 crow has length 6 \(allowed: S·A \+ 1 = 7\)",
    ),
    "crow start": (
        SparseMDP, sparse(crow=put(sparse()["crow"], 0, 1)), errors.SparseFormatError,
        r"E105 crow is 1 at index 0 \(allowed: 0\)",
    ),
    "crow end": (
        SparseMDP, sparse(crow=put(sparse()["crow"], 6, 11)), errors.SparseFormatError,
        r"E105 crow is 11 at index 6 \(allowed: 12\)",
    ),
    "crow falls": (
        SparseMDP, sparse(crow=put(sparse()["crow"], 2, 7)), errors.SparseFormatError,
        r"E105 crow falls from 7 to 6 at index 3 ",
    ),
    "crow dtype": (
        SparseMDP, sparse(crow=sparse()["crow"].double()), errors.DtypeError,
        r"E302 crow has dtype float64",
    ),
    "crow list": (
        SparseMDP, sparse(crow=[0, 2]), errors.DtypeError,
        r"E302 crow is a list .*as_tensor\(crow, dtype=torch\.int64\)",
    ),
    "col missing": (SparseMDP, sparse(col=None), errors.DtypeError, r"E302 col is None .*give col"),
    "crow batch": (
        SparseMDP, sparse(crow=sparse()["crow"][None]), errors.SparseFormatError,
        r"E105 crow has shape \(1, 7\)",
    ),
    "col negative": (
        SparseMDP, sparse(col=put(sparse()["col"], 4, -1)), errors.SparseFormatError,
        r"E105 col is -1 at index 4",
    ),
    "values length": (
        SparseMDP, sparse(values=sparse()["values"][:-1]), errors.SparseFormatError,
        r"E105 values has shape \(11,\) \(allowed: \(\*B, nnz\) = \(\*B, 12\)\)",
    ),
    "sparse row sum": (
        SparseMDP, sparse(values=put(batched(sparse()["values"]), (1, 7), 0.5)),
        errors.NonStochasticError, r"E101 .* 0\.75 at batch 1, state 1, action 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    kind, arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as failure:
        kind(**arguments)
    assert type(failure.value) is error
    assert ". Fix: " in str(failure.value)


DATA = {
    name: case for name, case in REFUSED.items()
    if issubclass(case[2], errors.InvalidMDPError)
    and name not in ("crow length", "crow batch", "values length")  # those are read off shapes
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_full_reads_data_and_cheap_does_not(name: str) -> None:
    kind, arguments, error, _ = DATA[name]
    for level in ("cheap", "off"):
        mdp = kind(**arguments, validate=level)
        if kind is DenseMDP:
            with pytest.raises(error):
                mdp.replace(**{k: v for k, v in arguments.items() if k != "discount"})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
def test_row_sum_tolerance(dtype: torch.dtype, sign: int) -> None:
    tolerance = checks.row_sum_tolerance(dtype, 4)
    assert 0 < tolerance < 1.1 * (1e-5 if dtype == torch.float32 else 1e-8)
    rows = torch.full((4, 1, 4), 0.25, dtype=dtype)
    reward = torch.zeros(4, 1, dtype=dtype)
    DenseMDP(reward, put(rows, (2, 0, 0), 0.25 + sign * 0.5 * tolerance), 0.9)
    for excess in (2, 10):
        wrong = put(rows, (2, 0, 0), 0.25 + sign * excess * tolerance)
        with pytest.raises(errors.NonStochasticError, match="state 2, action 0"):
            DenseMDP(reward, wrong, 0.9)
        with pytest.raises(errors.NonStochasticError, match="state 2, action 0"):
            DenseMDP(reward, rows, 0.9).replace(transition=wrong)
        with pytest.raises(errors.NonStochasticError, match="state 2, action 0"):
            DenseMDP(reward, wrong, 0.9, validate="cheap").to_sparse().replace(
                mask=torch.ones(4, 1, dtype=torch.bool)
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("states", [2, 40, 300])
def test_compiled_code_draws_the_line_where_python_does(dtype: torch.dtype, states: int) -> None:
    excess = checks.row_sum_tolerance(dtype, states)
    below = checks.below_zero(dtype, states)
    backends: list[Any] = ["torch", *([] if choice.unavailable("cpu") else ["cpu"])]
    reward = torch.zeros(states, 1, dtype=dtype)
    for entry, number, status in (
        (1, excess, Status.ROW_SUM),
        (0, -excess, Status.ROW_SUM),
        (1, -below, Status.NEGATIVE_PROBABILITY),
    ):
        near = 1e-3 if entry else 1e-2  # below one the next float32 is 6e-8 away
        for factor, found in ((1 - near, Status.CONVERGED), (1 + near, status)):
            rows = torch.zeros(states, 1, states, dtype=dtype)
            rows[..., 0] = 1
            rows[..., entry] += factor * number
            options: Any = {"discount": 0.5, "temperature": 1.0, "on_fail": "status"}
            for backend in backends:
                solved = birl_ext.solve(reward, rows, backend=backend, **options)
                assert int(solved.status) == found, (backend, factor)
            with pytest.raises(errors.BirlError) if found else contextlib.nullcontext():
                DenseMDP(reward, rows, 0.5)


def test_non_finite_is_found_at_every_position() -> None:
    for s, a, t in itertools.product(range(S), range(A), range(S)):
        for value in (NAN, INF, -INF):
            place = rf"at state {s}, action {a}, next state {t} "
            with pytest.raises(errors.NonFiniteInputError, match=place):
                DenseMDP(**plain(transition=put(P, (s, a, t), value)))
            with pytest.raises(errors.NonFiniteInputError, match=rf"at state {s}, action {a} "):
                DenseMDP(**plain(reward=put(R, (s, a), value)))


@pytest.mark.parametrize("tiny", [-1e-12, -2e-15])
def test_a_tiny_negative_is_refused_even_where_the_row_sums_to_one(tiny: float) -> None:
    row = torch.tensor([0.5, 0.5 - tiny, tiny], dtype=torch.float64)
    with pytest.raises(errors.NegativeProbabilityError, match=f"is {tiny:g} at .* next state 2 "):
        DenseMDP(**plain(transition=put(P, (2, 0), row)))
    with pytest.raises(errors.NegativeProbabilityError, match=f"is {tiny:g} at .* next state 2 "):
        DenseMDP(**plain(transition=put(P, (2, 0), row)), validate="off").to_sparse().replace(
            mask=torch.ones(S, A, dtype=torch.bool)
        )


def test_the_first_bad_row_is_named_not_the_first_dead_one() -> None:
    mask = put(torch.ones(S, A, dtype=torch.bool), (0, 1), False)
    wrong = put(P, (2, 1), ROW)
    with pytest.raises(errors.NonStochasticError, match=r"0\.97 at state 2, action 1 "):
        DenseMDP(**plain(transition=wrong, mask=mask))
    with pytest.raises(errors.NonStochasticError, match=r"0\.97 at state 2, action 1 "):
        DenseMDP(**plain(transition=wrong), validate="off").to_sparse().replace(mask=mask)


def test_discount_boundaries_are_legal() -> None:
    for value in (0, 0.0, -0.0, float(np.nextafter(1.0, 0.0)), 5e-324, torch.tensor(0.0)):
        DenseMDP(**plain(discount=value))


def test_negative_zero_is_a_probability() -> None:
    row = torch.tensor([-0.0, 0.25, 0.75]).double()
    DenseMDP(**plain(transition=row.expand(S, A, S)))


def test_half_types_are_promoted_to_float32() -> None:
    eighths = torch.tensor([0.5, 0.25, 0.25]).expand(S, A, S)
    for half in (torch.float16, torch.bfloat16):
        mdp = DenseMDP(R.to(half), eighths.to(half), 0.9, reference=torch.ones(S, A).to(half))
        assert mdp.dtype == mdp.transition.dtype == torch.float32
        assert mdp.reference is not None
        assert mdp.reference.dtype == torch.float32
        DenseMDP(R.to(half), eighths.float(), 0.9)


@pytest.mark.parametrize(("status", "location", "name"), [
    (10, 5, "row sum"), (11, 8, "negative"), (12, 4, "infinity in the transition"),
    (13, 0, "-inf in the reward"), (14, 0, "discount 1.0"), (16, 1, "no action"),
    (17, 1, "reference NaN"),
])  # fmt: skip
def test_a_status_says_what_the_border_says(status: int, location: int, name: str) -> None:
    kind, arguments, error, _ = REFUSED[name]
    with pytest.raises(error) as failure:
        kind(**arguments)
    values = {10: 0.97, 11: -1e-12, 12: INF, 13: -INF, 14: 1.0, 17: NAN}
    found = checks.status_error(
        status, location, values.get(status, 0.0), shape=(S, A), dtype=torch.float64
    )
    assert type(found) is error
    assert str(found) == str(failure.value)


def test_a_sparse_status_is_placed_by_the_pattern() -> None:
    crow, col = torch.tensor([0, 0, 2, 2, 3, 3, 3]), torch.tensor([2, 0, 1])
    found = checks.status_error(
        11, 2, -0.5, shape=(S, A), dtype=torch.float32, batch=(4,), crow=crow, col=col
    )
    assert "at batch 4, state 1, action 1, next state 1" in str(found)
    with pytest.raises(ValueError, match="status 3"):
        checks.status_error(3, 0, 0.0, shape=(S, A), dtype=torch.float32)


def test_temperature() -> None:
    for value in (0.0, -1.0, NAN, INF):
        with pytest.raises(errors.TemperatureError, match=rf"^BIRL-E202 temperature is {value!r}"):
            checks.check_temperature(value)
        with pytest.raises(errors.TemperatureError, match=rf"is {value!r} at batch 1 "):
            checks.check_temperature(torch.tensor([1.0, value]))
        checks.check_temperature(torch.tensor([1.0, value]), data=False)
    checks.check_temperature(5e-324)
    checks.check_temperature(torch.tensor([1e-3, 1e30]))


# What is never read


@pytest.mark.parametrize("kind", [DenseMDP, SparseMDP])
def test_values_behind_the_mask_and_in_terminal_rows_are_never_read(kind: type) -> None:
    clean = DenseMDP(**parts())
    for junk in (NAN, INF, -7.0):
        hidden = ~parts()["mask"]
        rows = (hidden | parts()["terminal"][:, None])[..., None]
        dirty = parts(
            reward=torch.where(hidden, junk, R),
            transition=torch.where(rows, junk, P),
            reference=torch.where(hidden, junk, parts()["reference"]),
        )
        if kind is SparseMDP:
            pattern = sparse(torch.float64)
            keep = {k: v for k, v in dirty.items() if k not in ("reward", "transition", "discount")}
            values = torch.where(rows.flatten().repeat_interleave(2), junk, pattern["values"])
            got = SparseMDP(**{**pattern, "values": values, "reward": dirty["reward"]}, **keep)
            want = SparseMDP(**{**pattern, "reward": R}, **keep)
            assert_same_bits(got.values, want.values, label="values")
            assert_same_bits(got.log_reference, want.log_reference, label="log_reference")
            continue
        whole = DenseMDP(**dirty)
        for name in ("reward", "transition", "log_reference"):
            assert_same_bits(getattr(whole, name), getattr(clean, name), label=name)
    assert (clean.transition[2] == 0).all()
    assert clean.reward[1, 0] == 0
    assert clean.reward[2, 0] == R[2, 0]  # a terminal state still pays
    assert clean.log_reference[1, 0] == -INF


def test_gradients_are_exactly_zero_behind_the_mask_even_beside_nan() -> None:
    inputs = parts()
    for name in ("reward", "transition", "reference"):
        inputs[name] = put(inputs[name], (1, 0), NAN).requires_grad_()
    mdp = DenseMDP(**inputs)
    logs = mdp.log_reference.masked_fill(mdp.log_reference == -INF, 0.0)
    (mdp.reward.sum() + mdp.transition.sum() + logs.sum()).backward()
    for name in ("reward", "transition", "reference"):
        gradient = inputs[name].grad
        assert (gradient[1, 0] == 0).all(), name
        assert gradient.isfinite().all(), name
        assert (gradient[0] != 0).all(), name


def test_a_terminal_state_without_actions_is_worth_zero() -> None:
    mask = put(parts()["mask"], 2, False)
    mdp = DenseMDP(**parts(mask=mask, reward=put(R, 2, NAN), reference=put(R.abs(), 2, NAN)))
    assert (mdp.reward[2] == 0).all()
    assert mdp.log_reference[2].tolist() == [0.0, -INF]
    assert mdp.mask is mask
    assert (mdp.replace(reward=R).reward[2] == 0).all()


def test_a_row_of_a_shared_transition_is_dead_only_if_every_problem_masks_it() -> None:
    mask = torch.ones(4, S, A, dtype=torch.bool)
    mask[:, 0, 1] = False
    mask[2, 1, 0] = False
    mdp = DenseMDP(**plain(reward=batched(R), mask=mask, transition=put(P, (0, 1), NAN)))
    assert mdp.transition.shape == (S, A, S)
    assert (mdp.transition[0, 1] == 0).all()
    assert_same_bits(mdp.transition[1, 0], P[1, 0], label="row in use")
    with pytest.raises(errors.NonFiniteInputError, match="state 1, action 0, next state 0"):
        DenseMDP(**plain(reward=batched(R), mask=mask, transition=put(P, (1, 0), NAN)))


def test_mask_reduces_along_shared_axes_only() -> None:
    mask = torch.ones(2, 3, S, A, dtype=torch.bool)
    mask[0, :, 0, 1] = False  # every problem of model 0, none of model 1
    mdp = DenseMDP(**plain(transition=P.expand(2, 1, S, A, S).clone(), mask=mask))
    assert mdp.transition.shape == (2, 1, S, A, S)
    assert (mdp.transition[0, 0, 0, 1] == 0).all()
    assert_same_bits(mdp.transition[1, 0], P, label="model 1")
    terminal = torch.tensor([[[False, False, False]], [[False, True, False]]])
    mdp = DenseMDP(**plain(transition=P, terminal=terminal))
    assert mdp.transition.shape == (2, 1, S, A, S)
    assert (mdp.transition[1, 0, 1] == 0).all()
    assert_same_bits(mdp.transition[0, 0], P, label="not terminal")


# What is kept


def test_fields_and_properties() -> None:
    mdp = DenseMDP(**parts(torch.float32, reward=batched(R.float())))
    assert (mdp.states, mdp.actions, mdp.batch_shape) == (S, A, (4,))
    assert (mdp.dtype, mdp.device) == (torch.float32, torch.device("cpu"))
    assert repr(mdp) == (
        "DenseMDP(states=3, actions=2, batch_shape=(4,), discount=0.9, float32, cpu, "
        "mask, terminal, reference, initial_distribution)"
    )
    same = plain()
    bare = DenseMDP(**same)
    assert bare.reward is same["reward"]
    assert bare.transition is same["transition"]
    assert bare.log_reference.shape == (0,)


@pytest.mark.parametrize("mdp", [DenseMDP(**parts()), SparseMDP(**sparse())], ids=repr)
def test_frozen(mdp: MDP) -> None:
    for name in [f.name for f in dataclasses.fields(mdp)] + ["other"]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(mdp, name, None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(mdp, name)


def test_replace_changes_one_field_and_validates_it_again() -> None:
    mdp = DenseMDP(**parts())
    other = mdp.replace(reward=R + 1, discount=0.5)
    assert other.discount == 0.5
    assert_same_bits(other.reward, torch.where(untyped(mdp.mask), R + 1, 0.0), label="reward")
    assert_same_bits(other.transition, mdp.transition, label="transition")
    assert mdp.discount == 0.9
    for name, value, error in (
        ("reward", put(R, (0, 0), NAN), errors.NonFiniteInputError),
        ("transition", 2 * P, errors.NonStochasticError),
        ("discount", 1.0, errors.DiscountError),
        ("discount", torch.tensor(1.0), errors.DiscountError),
        ("mask", torch.zeros(S, A, dtype=torch.bool), errors.EmptyActionSetError),
        ("mask", None, errors.NonStochasticError),  # its row was cleared
        ("terminal", None, errors.NonStochasticError),
        ("reference", -parts()["reference"], errors.ReferencePolicyError),
        ("initial_distribution", torch.zeros(S).double(), errors.InitialDistributionError),
        ("reward", R.float(), errors.DtypeError),
        ("reward", R[:2], errors.ShapeError),
    ):
        with pytest.raises(error):
            mdp.replace(**untyped({name: value}))
    with pytest.raises(errors.OptionError):
        mdp.replace(validate="none", discount=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        mdp.replace(gamma=0.5)


def test_replace_reads_only_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = DenseMDP(**parts())
    seen = []
    for name in [n for n in checks.__all__ if n.startswith("check_")]:
        check = getattr(checks, name)
        monkeypatch.setattr(
            checks, name, lambda *a, n=name, c=check, **k: (seen.append(n), c(*a, **k))[1]
        )
    data = {"check_reward", "check_rows", "check_actions", "check_reference",
            "check_initial_distribution"}  # fmt: skip
    for change, reads in (
        ({"reward": R}, {"check_reward"}),
        ({"transition": P}, {"check_rows"}),
        ({"discount": 0.5}, set()),
        ({"reference": parts()["reference"]}, {"check_reference"}),
        ({"mask": parts()["mask"]}, {"check_actions", "check_rows", "check_reference"}),
    ):
        seen.clear()
        mdp.replace(**untyped(change))
        assert data & set(seen) == reads, change


def test_replace_checks_a_new_sparsity_pattern() -> None:
    mdp = SparseMDP(**sparse(mask=parts()["mask"]))
    for change in ({"col": put(mdp.col, 3, 9)}, {"crow": put(mdp.crow, 1, 5)}):
        with pytest.raises(errors.SparseFormatError):
            mdp.replace(**untyped(change))
    with pytest.raises(errors.NonStochasticError):
        mdp.replace(crow=torch.tensor([0, 1, 4, 6, 8, 10, 12]), mask=None)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_to_another_dtype_and_back(case: Case) -> None:
    mdp = case.mdp()
    for one in (mdp, mdp.to_sparse()):
        low = one.to(torch.float32)
        assert low.dtype == torch.float32
        assert all(
            t.dtype != torch.float64 for n, t in tensors_of(low).items() if n != "log_reference"
        )
        low.replace(**untyped(tensors_given(low)))
        high = low.to("cpu", torch.float64)
        high.replace(**untyped(tensors_given(high)))  # the tighter tolerance holds after widening
        assert high.dtype == torch.float64
        assert_same(one.to("cpu"), one)
        assert high.device == torch.device("cpu")
    with pytest.raises(errors.DtypeError, match="float16"):
        mdp.to(torch.float16)
    for target in ("xyz", "hpu", None, 1.5):
        with pytest.raises(errors.DeviceError, match=r"was asked for .*device of this machine"):
            mdp.to(untyped(target))


def tensors_given(mdp: MDP) -> dict[str, Tensor]:
    derived = {f.name for f in dataclasses.fields(mdp) if not f.init}
    return {name: tensor for name, tensor in tensors_of(mdp).items() if name not in derived}


def test_to_moves_every_tensor() -> None:
    moved = DenseMDP(**parts()).to("meta")
    assert {t.device.type for t in tensors_of(moved).values()} == {"meta"}


def test_to_another_dtype_leaves_the_discount() -> None:
    """In float32, 0.9999 would move the value by a part in ten thousand."""
    discount = torch.tensor(0.9999, dtype=torch.float64)
    low = DenseMDP(**plain(discount=discount)).to(torch.float32)
    assert low.dtype == torch.float32
    for mdp in (low, low.to_sparse(), low.to_sparse().to(torch.float32, "cpu")):
        assert isinstance(mdp.discount, Tensor)
        assert_same_bits(mdp.discount, discount, label="discount")


def test_empty_batch() -> None:
    mdp = DenseMDP(R.expand(0, S, A), P.expand(0, S, A, S), 0.9, mask=parts()["mask"])
    assert mdp.batch_shape == (0,)
    assert mdp.flatten(0.5).data.reward.shape == (0, 1, S, A)
    assert DenseMDP(R.expand(0, S, A), P, 0.9).flatten(0.5).data.reward.shape == (1, 0, S, A)
    assert mdp.to_sparse().values.shape[0] == 0


# Normal form


@pytest.mark.parametrize(
    ("own", "other", "models", "group"),
    [
        ((), (), 1, 1),
        ((), (5,), 1, 5),
        ((), (4, 7), 1, 28),
        ((4,), (4,), 4, 1),
        ((4,), (), 4, 1),
        ((4, 1), (4, 7), 4, 7),
        ((1, 7), (4, 7), 7, 4),
        ((7,), (4, 7), 7, 4),
        ((4, 1, 3), (4, 7, 3), 12, 7),
        ((7, 3), (4, 7, 3), 21, 4),
        ((1, 1), (4, 7), 1, 28),
        ((4, 7), (1, 7), 28, 1),
        ((1,), (1,), 1, 1),
        ((0,), (0,), 0, 1),
        ((), (0,), 1, 0),
        ((4, 1), (1, 0), 4, 0),
    ],
)
def test_layout_pairs_every_problem_with_its_transition(
    own: tuple[int, ...], other: tuple[int, ...], models: int, group: int
) -> None:
    full = tuple(np.broadcast_shapes(own, other))
    place = layout(own, other)
    assert (place.models, place.group, place.batch_shape) == (models, group, full)
    transition = torch.arange(float(np.prod(own, dtype=int))).reshape(*own, 1).expand(*own, 2)
    reward = (
        torch.arange(float(np.prod(other, dtype=int))).reshape(*other, 1, 1).expand(*other, 2, 3)
    )
    shared, grouped = place.shared(transition, 1), place.grouped(reward, 2)
    assert (shared.shape, grouped.shape) == ((models, 2), (models, group, 2, 3))
    pairs = place.restore(shared[:, None, 0] * 1000 + grouped[..., 0, 0])
    assert pairs.shape == full
    assert torch.equal(pairs, transition[..., 0] * 1000 + reward[..., 0, 0])
    assert torch.equal(place.restore(grouped), reward.expand(*full, 2, 3))
    for flat, value in enumerate(place.grouped(pairs, 0).flatten().tolist()):
        assert pairs[place.locate(flat)] == value


def test_a_shared_transition_is_never_copied() -> None:
    for batch, own in (((64,), ()), ((4, 7), (4, 1)), ((4, 7), (7,)), ((4, 7), (1, 7))):
        transition = P.expand(*own, S, A, S).clone()
        mdp = DenseMDP(R.expand(*batch, S, A), transition, 0.9)
        flat = mdp.flatten(0.5)
        assert flat.data.transition.data_ptr() == transition.data_ptr()
        assert flat.data.transition.shape[0] == max(1, int(np.prod(own)))
        assert flat.data.transition.shape[0] * flat.data.reward.shape[1] == int(np.prod(batch))


def test_flatten_fills_in_scalars_and_references() -> None:
    mdp = DenseMDP(**plain(reward=batched(R), discount=torch.tensor([0.1, 0.2, 0.3, 0.4])))
    flat = mdp.flatten(torch.tensor(0.5))
    assert flat.data.discount.dtype == flat.data.temperature.dtype == torch.float64
    assert flat.data.discount.tolist() == [[pytest.approx(v) for v in (0.1, 0.2, 0.3, 0.4)]]
    assert flat.data.temperature.tolist() == [[0.5] * 4]
    assert flat.data.log_reference.shape == (0,)
    assert flat.data.crow.numel() == 0
    flat = DenseMDP(**parts(reward=batched(R))).flatten(0.5)
    want = parts()["reference"].log().masked_fill(~parts()["mask"], -INF)
    assert_same_bits(flat.data.log_reference, want.expand(1, 4, S, A), label="log μ")
    flat = SparseMDP(**sparse()).flatten(0.5)
    assert flat.data.transition.shape == (1, 12)
    assert flat.data.crow is not None
    assert flat.data.crow.shape == (S * A + 1,)


def test_flatten_is_differentiable() -> None:
    leaves = {
        "reward": R.clone().requires_grad_(),
        "transition": P.clone().requires_grad_(),
        "reference": parts()["reference"].requires_grad_(),
        "discount": torch.tensor(0.9, requires_grad=True),
        "temperature": torch.tensor(0.5, requires_grad=True),
    }
    temperature = leaves["temperature"]
    mdp = DenseMDP(**parts(**{k: v for k, v in leaves.items() if k != "temperature"}, mask=None))
    flat = mdp.flatten(temperature)
    torch.stack([part.sum() for part in flat.data if part.is_floating_point()]).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert (leaf.grad[:2] != 0).all() if leaf.ndim else leaf.grad == 1, name


# Inside transforms nothing is read


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of dynamo itself
def test_construction_under_compile_vmap_grad_and_fake_tensors() -> None:
    def total(reward: Tensor, transition: Tensor, mask: Tensor) -> Tensor:
        flat = DenseMDP(reward, transition, 0.9, mask=mask, reference=mask + 1.0).flatten(0.5)
        return flat.data.reward.sum() + flat.data.transition.square().sum()

    mask = parts()["mask"]
    want = total(R, P, mask)
    compiled = torch.compile(total, backend="eager", fullgraph=True)
    assert torch.equal(compiled(R, P, mask), want)
    assert torch.equal(torch.vmap(total, (0, None, None))(batched(R), P, mask)[2], want)
    assert torch.equal(torch.func.grad(total)(R, P, mask), mask.double())
    assert torch.equal(torch.func.jacfwd(total)(R, P, mask), mask.double())
    graph = torch.fx.experimental.proxy_tensor.make_fx(total)(R, P, mask)
    assert torch.equal(graph(R, P, mask), want)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (R, P, mask)]
        assert total(*fake).shape == ()


def test_shapes_are_still_checked_inside_transforms() -> None:
    with pytest.raises(errors.ShapeError, match="transition has shape"):
        torch.vmap(lambda r: DenseMDP(r, P[:2], 0.9).reward)(batched(R))


# Conversions


@given(cases(batches=((), (2,), (2, 3))))
def test_sparse_and_dense_are_the_same_mdp(case: Case) -> None:
    mdp = case.mdp()
    there = mdp.to_sparse()
    assert_same(there.to_dense(), mdp)
    for name in ("reward", "discount", "log_reference"):
        assert torch.equal(
            getattr(there.flatten(0.5).data, name), getattr(mdp.flatten(0.5).data, name)
        )


def test_unsorted_and_duplicate_entries_add_up() -> None:
    half = SparseMDP(**sparse(
        values=torch.tensor([0.5, 0.125, 0.375]).double().repeat(S * A),
        crow=torch.arange(0, 3 * S * A + 1, 3),
        col=torch.tensor([2, 0, 2]).repeat(S * A),
    ))  # fmt: skip
    row = torch.tensor([0.125, 0.0, 0.875]).double()
    assert torch.equal(half.to_dense().transition, row.expand(S, A, S))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_from_torch() -> None:
    dense = DenseMDP(**plain())
    matrix = P.flatten(0, 1).to_sparse_csr()
    mdp = SparseMDP.from_torch(matrix, R, 0.9, mask=parts()["mask"])
    assert_same(mdp.to_dense(), dense.replace(mask=parts()["mask"]))
    leaf = P.flatten(0, 1).clone().requires_grad_()
    mdp = SparseMDP.from_torch(leaf.to_sparse_csr(), R, 0.9)
    (mdp.values * torch.arange(18.0)).sum().backward()
    assert torch.equal(leaf.grad, torch.arange(18.0).double().reshape(S * A, S))
    with pytest.raises(errors.SparseFormatError, match=r"torch.strided .*torch\.sparse_csr"):
        SparseMDP.from_torch(P.flatten(0, 1), R, 0.9)
    with pytest.raises(errors.ShapeError, match=r"\(3, 6\) \(allowed: \(S·A, S\) = \(6, 3\)\)"):
        SparseMDP.from_torch(P.flatten(0, 1).T.to_sparse_csr(), R, 0.9)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_from_scipy(dtype: torch.dtype) -> None:
    case = Case("garnet", 7, 3, dtype=dtype, branching=2, seed=3)
    dense = case.mdp().replace(initial_distribution=None)
    rows = dense.transition.numpy()
    stacked = scipy.sparse.csr_matrix(rows.reshape(-1, 7))
    per_action = [scipy.sparse.coo_array(rows[:, a]) for a in range(3)]
    for source in (stacked, stacked.tocsc(), per_action, tuple(per_action)):
        mdp = SparseMDP.from_scipy(source, dense.reward, 0.9)
        assert mdp.crow.dtype == mdp.col.dtype == torch.int64
        assert mdp.values.shape == (7 * 3 * 2,)
        assert_same(mdp.to_dense(), dense)
    with pytest.raises(errors.ShapeError, match=r"2 matrices \(allowed: one per action, 3\)"):
        SparseMDP.from_scipy(per_action[:2], dense.reward, 0.9)
    with pytest.raises(errors.ShapeError, match=r"\(21, 7\) \(allowed: \(7, 7\)\)"):
        SparseMDP.from_scipy([stacked] * 3, dense.reward, 0.9)
    with pytest.raises(errors.ShapeError, match=r"\(7, 7\) \(allowed: \(21, 7\)\)"):
        SparseMDP.from_scipy(per_action[0], dense.reward, 0.9)


def test_int32_indices_are_widened() -> None:
    mdp = SparseMDP(**sparse(crow=sparse()["crow"].int(), col=sparse()["col"].int()))
    assert_same(mdp, SparseMDP(**sparse()))


def test_gradients_flow_through_conversions() -> None:
    leaf = P.clone().requires_grad_()
    weight = torch.arange(18.0).double().reshape(S, A, S)
    (DenseMDP(R, leaf, 0.9).to_sparse().to_dense().transition * weight).sum().backward()
    assert torch.equal(leaf.grad, weight)


# Files


def some_mdps() -> list[MDP]:
    full = DenseMDP(**parts(torch.float32))
    batch = Case(batch=(2, 3), reference=True, mask=True, seed=2).mdp()
    rates = torch.tensor([[0.5], [0.9]]).double()
    shared = DenseMDP(R.expand(4, S, A), P, 0.9)
    return [full, full.to_sparse(), batch.replace(discount=rates), batch.to_sparse(), shared,
            DenseMDP(R.mT.clone().mT, P.mT.clone().mT, 0.9), SparseMDP(**sparse())]  # fmt: skip


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("index", range(7))
def test_save_and_load_keep_every_bit(tmp_path: Path, suffix: str, index: int) -> None:
    mdp = some_mdps()[index]
    path = tmp_path / f"mdp{suffix}"
    mdp.save(path)
    assert_same(load(path), mdp)
    assert_same(type(mdp).load(str(path)), mdp)
    other = SparseMDP if isinstance(mdp, DenseMDP) else DenseMDP
    with pytest.raises(errors.FileFormatError, match=rf"use {type(mdp).__name__}\.load"):
        other.load(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no draft is left
    first = path.read_bytes()
    mdp.save(path)
    assert path.read_bytes() == first


def test_numpy_reads_and_writes_the_same_npz(tmp_path: Path) -> None:
    mdp = DenseMDP(**parts())
    mdp.save(tmp_path / "ours.npz")
    with zipfile.ZipFile(tmp_path / "ours.npz") as archive:  # no clock in the bytes
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert np.array_equal(arrays["transition"], mdp.transition.numpy())
    arrays["reward"] = np.asfortranarray(arrays["reward"])
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "theirs.npz", **arrays)
        assert_same(load(tmp_path / "theirs.npz"), mdp)


@pytest.mark.parametrize("suffix", FILES)
def test_tensors_that_share_memory_can_be_saved(tmp_path: Path, suffix: str) -> None:
    both = torch.rand(2, S, A, dtype=torch.float64) + 0.1
    mdp = DenseMDP(both[0], P, 0.9, reference=both[1])
    for one in (mdp, mdp.replace(reference=both[0])):
        one.save(tmp_path / f"mdp{suffix}")
        assert_same(load(tmp_path / f"mdp{suffix}"), one)


@pytest.mark.parametrize("suffix", FILES)
def test_a_loaded_mdp_is_validated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    DenseMDP(**plain(transition=2 * P), validate="cheap").save(path)
    with pytest.raises(errors.NonStochasticError, match="sums to 2 at state 0, action 0"):
        load(path)
    assert torch.equal(untyped(load(path, validate="cheap")).transition, 2 * P)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mdp.npz"
    mdp = DenseMDP(**plain())
    mdp.save(path)
    before = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        mdp.replace(discount=0.5).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_saved_file_respects_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        DenseMDP(**plain()).save(tmp_path / "mdp.npz")
    finally:
        os.umask(old)
    assert (tmp_path / "mdp.npz").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["mdp.pt", "mdp.pkl", "mdp.npy", "mdp.h5", "mdp", "mdp.NPZ"])
def test_unknown_extensions_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.FileFormatError, match=r"^BIRL-E701 .*\.npz or \.safetensors"):
        DenseMDP(**plain()).save(tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(errors.FileFormatError, match="has extension"):
        load(tmp_path / name)


@pytest.mark.parametrize("suffix", FILES)
def test_missing_files_and_folders_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(errors.FileFormatError, match="is not a file"):
        load(tmp_path / f"none{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(errors.FileFormatError, match="is not a file"):
        load(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("suffix", FILES)
def test_truncated_files_are_refused_at_every_offset(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mdp{suffix}"
    DenseMDP(**parts()).save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 13), *range(len(whole) - 64, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(errors.FileFormatError):
            load(path)


@pytest.mark.parametrize("suffix", FILES)
def test_corrupt_bytes_give_an_answer_or_an_error_of_ours(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mdp{suffix}"
    DenseMDP(**parts()).save(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            load(path)
        except errors.BirlError:
            refused += 1
    assert refused > len(whole) / 5 * (0.5 if suffix == ".npz" else 0.3)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def header(text: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    raw = text.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(raw)) + raw + data


def good_members() -> dict[str, bytes]:
    return {
        "reward": npy(R.numpy()),
        "transition": npy(P.numpy()),
        "discount": npy(np.array(0.9)),
        "format": npy(np.array(1)),
    }


def write_zip(
    path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)


HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2), }"

NPZ: dict[str, tuple[dict[str, bytes | None], str]] = {
    "object array": ({"reward": npy(np.array([{"a": 1}], dtype=object))}, "unexpected header"),
    "pickle": ({"reward": pickle.dumps([1, 2])}, "not an array of version 1 or 2"),
    "empty member": ({"reward": b""}, "not an array"),
    "complex": ({"reward": npy(R.numpy() * 1j)}, "unexpected header"),
    "text": ({"reward": npy(np.array(["x"]))}, "unexpected header"),
    "big-endian": ({"reward": npy(R.numpy().astype(">f8"))}, "unexpected header"),
    "declares too much": ({"reward": header(HEADER, bytes(47))}, "declares 48 bytes"),
    "declares too little": ({"reward": header(HEADER, bytes(49))}, "declares 48 bytes"),
    "declares an exabyte": (
        {"reward": header(HEADER.replace("(3, 2)", f"({10**17}, {10**17})"), bytes(48))},
        "declares",
    ),
    "negative axis": (
        {"reward": header(HEADER.replace("(3, 2)", "(-3, -2)"), bytes(48))}, "unexpected header",
    ),
    "code in the header": (
        {"reward": header(HEADER.replace("(3, 2)", "__import__('os')"), bytes(48))},
        "unexpected header",
    ),
    "nested header": (
        {"reward": header(HEADER.replace("(3, 2)", "(" * 400 + ")" * 400), bytes(48))},
        "unexpected header",
    ),
    "long header": ({"reward": header(HEADER + " " * 2000, bytes(48))}, "unexpected header"),
    "junk after the header": ({"reward": header(HEADER + "\n ", bytes(48))}, "unexpected header"),
    "version 3": ({"reward": header(HEADER, bytes(48), b"\x03\x00")}, "version 1 or 2"),
    "no reward": ({"reward": None}, "has members discount, transition"),
    "no format": ({"format": None}, "has format none"),
    "future format": ({"format": npy(np.array(2))}, r"has format \[2\]"),
    "both kinds": ({"values": npy(np.ones(3))}, "has members"),
    "stranger": ({"rewards": npy(np.ones(3))}, r"has a member 'rewards\.npy'"),
}  # fmt: skip


@pytest.mark.parametrize("name", NPZ)
@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"]
)
def test_malformed_npz_is_refused(tmp_path: Path, name: str, method: int) -> None:
    changes, message = NPZ[name]
    members = {**good_members(), **changes}
    path = tmp_path / "mdp.npz"
    write_zip(path, [(f"{k}.npy", v) for k, v in members.items() if v is not None], method)
    with pytest.raises(errors.FileFormatError, match=message):
        load(path)


def test_the_malformed_corpus_starts_from_a_good_file(tmp_path: Path) -> None:
    write_zip(tmp_path / "mdp.npz", [(f"{k}.npy", v) for k, v in good_members().items()])
    assert_same(load(tmp_path / "mdp.npz"), DenseMDP(**plain()))


@pytest.mark.parametrize(
    "name", ["../reward.npy", "/reward.npy", "reward", "reward.npy/", "x/reward.npy"]
)
def test_foreign_member_names_are_refused(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "mdp.npz", [(name, npy(R.numpy()))])
    with pytest.raises(errors.FileFormatError, match="has a member"):
        load(tmp_path / "mdp.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["mdp.npz"]


def test_duplicate_and_too_many_members_are_refused(tmp_path: Path) -> None:
    members = [(f"{k}.npy", v) for k, v in good_members().items()]
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(tmp_path / "twice.npz", [*members, members[0]])
    with pytest.raises(errors.FileFormatError, match="two members of one name"):
        load(tmp_path / "twice.npz")
    write_zip(tmp_path / "many.npz", [(f"{i}.npy", b"") for i in range(1000)])
    with pytest.raises(errors.FileFormatError, match="has 1000 members"):
        load(tmp_path / "many.npz")


def test_zip_bombs_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = header(HEADER.replace("(3, 2)", "(4194304,)"), bytes(2**25))
    members = [(f"{k}.npy", v) for k, v in {**good_members(), "reward": zeros}.items()]
    write_zip(tmp_path / "bomb.npz", members, zipfile.ZIP_DEFLATED)
    write_zip(tmp_path / "large.npz", members)
    reads: list[str] = []
    unpack = zipfile.ZipFile.open

    def watched(self: zipfile.ZipFile, name: Any, *args: Any, **kwargs: Any) -> Any:
        reads.append(str(name))
        return unpack(self, name, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", watched)
    with pytest.raises(
        errors.FileFormatError, match=r"expands \d+ to 33554\d+ bytes .*ratio up to"
    ):
        load(tmp_path / "bomb.npz")
    with pytest.raises(
        errors.FileFormatError, match=r"holds 33\d+ bytes \(allowed: at most 1000000"
    ):
        load(tmp_path / "large.npz", max_bytes=1_000_000)
    assert not reads


def test_a_member_that_understates_its_size_is_refused(tmp_path: Path) -> None:
    """The directory says 176 bytes, the stream would go on for 32 MiB."""
    zeros = header(HEADER, bytes(2**25))
    path = tmp_path / "liar.npz"
    members = [(f"{k}.npy", v) for k, v in {**good_members(), "reward": zeros}.items()]
    write_zip(path, members, zipfile.ZIP_DEFLATED)
    honest = len(header(HEADER, bytes(48)))
    raw = path.read_bytes().replace(struct.pack("<I", len(zeros)), struct.pack("<I", honest))
    path.write_bytes(raw)
    with pytest.raises(errors.FileFormatError):
        load(path)


def test_other_compressions_and_encryption_are_refused(tmp_path: Path) -> None:
    members = [(f"{k}.npy", v) for k, v in good_members().items()]
    write_zip(tmp_path / "mdp.npz", members, zipfile.ZIP_LZMA)
    with pytest.raises(errors.FileFormatError, match="has compression 14"):
        load(tmp_path / "mdp.npz")


def test_pickles_in_disguise_run_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (marker,)

    bomb = pickle.dumps(Bomb())
    for suffix in FILES:
        (tmp_path / f"bomb{suffix}").write_bytes(bomb)
        with pytest.raises(errors.FileFormatError):
            load(tmp_path / f"bomb{suffix}")
        torch.save(Bomb(), tmp_path / f"torch{suffix}")
        with pytest.raises(errors.FileFormatError):
            load(tmp_path / f"torch{suffix}")
    array = np.empty(1, dtype=object)
    array[0] = Bomb()
    write_zip(tmp_path / "array.npz", [("reward.npy", npy(array))])
    with pytest.raises(errors.FileFormatError):
        load(tmp_path / "array.npz")
    assert not marker.exists()


def test_malformed_safetensors_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "mdp.safetensors"
    good = {"reward": R, "transition": P, "discount": torch.tensor(0.9), "format": torch.tensor(1)}
    for changes, message in (
        ({"rewards": R.clone()}, "has a member 'rewards'"),
        ({"format": torch.tensor(2)}, r"has format \[2\]"),
        ({"values": R.clone()}, "has members"),
    ):
        safetensors.torch.save_file({**good, **changes}, path)
        with pytest.raises(errors.FileFormatError, match=message):
            load(path)
    safetensors.torch.save_file(good, path)
    assert load(path).discount == pytest.approx(0.9)
    with pytest.raises(errors.FileFormatError, match="at most 100"):
        load(path, max_bytes=100)
    for raw in (b"", b"\xff" * 64, struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(raw)
        with pytest.raises(errors.FileFormatError, match="cannot be read"):
            load(path)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mdp.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    for call in (lambda: load(path), lambda: DenseMDP(**plain()).save(path)):
        with pytest.raises(errors.MissingDependencyError, match=r"^BIRL-E802 .*birl_ext\[io\]"):
            call()
