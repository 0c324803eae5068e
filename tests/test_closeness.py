"""The assertions fail when they should, and say what is needed to find the fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closeness import assert_close, assert_same_bits

INF, NAN = float("inf"), float("nan")


def test_accepts_what_lies_on_the_bound() -> None:
    got = torch.tensor([1.0, 2.0])
    assert_close(got, torch.tensor([1.5, 2.0]), bound=0.5, label="x")
    assert_close(got, np.array([1.0, 2.0]), bound=0.0, label="x")
    assert_close(got, np.array([1.0, 2.25]), bound=np.array([0.0, 0.25]), label="x")
    assert_close(torch.empty(0, 3), np.empty((0, 3)), bound=0.0, label="x")


def test_equal_infinities_are_close() -> None:
    assert_close(torch.tensor([-INF, INF]), np.array([-INF, INF]), bound=0.0, label="x")


def test_names_the_worst_entry_both_values_and_the_bound() -> None:
    got = torch.zeros(2, 3, dtype=torch.float64)
    want = got.clone()
    want[0, 1], want[1, 2] = 0.25, -0.5
    with pytest.raises(AssertionError) as failure:
        assert_close(got, want, bound=0.125, label="value")
    message = str(failure.value)
    for part in (
        "value: 2 of 6",
        "worst at (1, 2)",
        "got 0",
        "want -0.5",
        "|Δ| 0.5",
        "bound 0.125",
    ):
        assert part in message


def test_worst_is_relative_to_the_bound() -> None:
    with pytest.raises(AssertionError, match=r"worst at \(0\)"):
        assert_close(torch.tensor([1.0, 9.0]), np.zeros(2), bound=np.array([0.1, 8.0]), label="x")


@pytest.mark.parametrize(
    ("got", "want"),
    [(NAN, 0.0), (0.0, NAN), (NAN, NAN), (INF, 0.0), (0.0, -INF), (INF, -INF)],
    ids=str,
)
def test_refuses_nan_and_unequal_infinities_whatever_the_bound(got: float, want: float) -> None:
    for bound in (0.0, 1e300, INF):
        if bound == INF and not np.isnan([got, want]).any():
            continue  # an infinite bound does allow an infinite distance
        with pytest.raises(AssertionError, match=r"1 of 2 outside the bound; worst at \(1\)"):
            assert_close(torch.tensor([1.0, got]), np.array([1.0, want]), bound=bound, label="x")


def test_refuses_other_shapes_dtypes_and_bounds() -> None:
    one = torch.ones(3)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(one, torch.ones(1, 3), bound=9.0, label="x")
    with pytest.raises(AssertionError, match=r"float32.*float64"):
        assert_close(one, one.double(), bound=9.0, label="x")
    with pytest.raises(AssertionError, match="bound is NaN"):
        assert_close(one, one, bound=NAN, label="x")
    with pytest.raises(AssertionError, match="bound is NaN or negative"):
        assert_close(one, one, bound=-1.0, label="x")
    with pytest.raises(AssertionError, match="not a tensor"):
        assert_close([1.0], np.ones(1), bound=9.0, label="x")  # type: ignore[arg-type]


def test_same_bits() -> None:
    values = torch.tensor([[0.0, NAN], [1.0, -INF]])
    assert_same_bits(values, values.clone(), label="x")
    assert_same_bits(values.T, values.T.contiguous(), label="x")
    other = values.clone()
    other[1, 0] = 1.0000001
    with pytest.raises(AssertionError, match=r"first at \(1, 0\): got 1\.0, want 1\.0000001"):
        assert_same_bits(values, other, label="x")
    with pytest.raises(AssertionError, match="bits differ"):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]), label="x")
    with pytest.raises(AssertionError, match="float64"):
        assert_same_bits(values, values.double(), label="x")
    with pytest.raises(AssertionError, match=r"\(4,\)"):
        assert_same_bits(values, values.flatten(), label="x")
