"""What a solution shows of itself, and its parts."""

from __future__ import annotations

import pytest
import torch
from cases import untyped

import birl_ext
from birl_ext.errors import DeviceError


def solved(*batch: int) -> birl_ext.Solution:
    reward = torch.arange(6.0, dtype=torch.float64).reshape(3, 2).expand(*batch, 3, 2)
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    return birl_ext.solve(reward, transition, discount=0.9, temperature=1.0, on_fail="status")


def test_repr_fits_a_screen() -> None:
    shown = repr(solved(2))
    assert shown.startswith(
        "Solution(batch shape: (2,), states: 3, actions: 2, dtype: float64, device: cpu, "
        "status: CONVERGED (2), iterations: at most "
    )
    assert "error bound: at most " in shown
    assert len(shown) < 240


def test_repr_names_every_status() -> None:
    found = solved(2)
    status, info = found.status.clone(), found.info.clone()
    status[1], info[1, 1] = birl_ext.Status.NON_FINITE, torch.nan
    shown = repr(found._replace(status=status, info=info))
    assert "status: CONVERGED (1), NON_FINITE (1)" in shown
    assert "error bound: at most nan" in shown


def test_repr_of_an_empty_batch_and_under_a_transform() -> None:
    assert "batch shape: (0,)" in repr(solved(0))
    seen = []

    def look(reward: torch.Tensor) -> torch.Tensor:
        transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
        found = birl_ext.solve(reward, transition, discount=0.9, temperature=1.0)
        seen.append(repr(found))
        return found.value

    torch.func.vmap(look)(torch.ones(4, 3, 2, dtype=torch.float64))
    assert seen[0].startswith("Solution(batch shape: (), states: 3")


def test_a_notebook_shows_a_table() -> None:
    html = solved()._repr_html_()
    assert html.startswith("<table>")
    assert "<th>status</th><td>CONVERGED (1)</td>" in html


def test_one_problem_of_a_batch() -> None:
    found = solved(2, 3)
    one = found.problem(1, -1)
    for table, whole in zip(one, found, strict=True):
        assert torch.equal(table, whole[1, 2])
    assert one.iterations == found.iterations[1, 2]
    with pytest.raises(IndexError, match=r"1 indices, for a batch of shape \(2, 3\)"):
        found.problem(1)
    with pytest.raises(IndexError):
        found.problem(2, 0)


def test_detached_and_moved() -> None:
    reward = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    found = birl_ext.solve(reward, transition, discount=0.9, temperature=1.0)
    assert found.value.requires_grad
    assert not any(table.requires_grad for table in found.detach())
    assert torch.equal(found.detach().policy, found.policy)
    assert all(table.device.type == "meta" for table in found.detach().to("meta"))
    for target in ("xyz", "hpu", None, 1.5):
        with pytest.raises(DeviceError, match=r"E303 .* was asked for .*device of this machine"):
            found.to(untyped(target))
    with pytest.raises(DeviceError, match=r"torch\.float16 was .*Fix: convert .*to\(dtype\)"):
        found.to(untyped(torch.float16))
