"""The short way through `solve` gives the bits and the errors of the general one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import FLOATS, SMALL, WARP, Case
from test_errors import ROWS
from torch import Tensor

import birl_ext
from birl_ext.errors import BirlError
from birl_ext.ops import fast
from birl_ext.ops.backends import loader
from birl_ext.solution import Solution

if loader.reason("cpu"):
    pytest.skip(f"no compiled CPU module: {loader.reason('cpu')}", allow_module_level=True)

# forward mode makes torch load decompositions that it still scripts
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

CASES = (*SMALL, *WARP, Case("dense", 140, 3, seed=1), Case("clusters", 40, 3, seed=2))


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[bool]]:
    """Opens or closes the short way; the list grows with every question whether to take it."""
    original = fast.solve

    def choose(short: bool) -> list[bool]:
        taken: list[bool] = []

        def asked(*arguments: Any) -> Any:
            outcome = original(*arguments) if short else None
            taken.append(outcome is not None)
            return outcome

        monkeypatch.setattr(fast, "solve", asked)
        return taken

    return choose


def answers(case: Case, mdp: Any) -> tuple[Solution, list[Tensor]]:
    """Solutions from tensors where the case has no more than tensors, and all their gradients."""
    leaves = [mdp.reward.clone().requires_grad_(), mdp.transition.clone().requires_grad_()]
    reward, transition = leaves
    if mdp.mask is mdp.terminal is mdp.reference is None:
        solution = birl_ext.solve(
            reward, transition, discount=case.discount, temperature=case.temperature
        )
    else:
        solution = birl_ext.solve(
            mdp.replace(reward=reward, transition=transition, validate="cheap"),
            temperature=case.temperature,
        )
    total = torch.zeros((), dtype=torch.float64)
    for table in solution[:5]:
        weight = torch.linspace(-1, 2, table.numel(), dtype=torch.float64).reshape(table.shape)
        total = total + (weight * table.where(table > -torch.inf, 0.0)).sum()
    first = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad(
        torch.stack([slope.sin().sum() for slope in first]).sum(), leaves, retain_graph=True
    )
    plainly = torch.autograd.grad(total, leaves)
    return solution, [*first, *second, *plainly]


@pytest.mark.parametrize("dtype", FLOATS, ids=["f32", "f64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ways_give_the_same_bits(
    case: Case, dtype: torch.dtype, way: Callable[[bool], list[bool]]
) -> None:
    mdp = replace(case, dtype=dtype).mdp()
    taken = way(True)
    short = answers(case, mdp)
    usual = mdp.mask is None and mdp.reference is None and mdp.transition.dim() > mdp.reward.dim()
    assert any(taken) == usual
    with torch.no_grad():
        silent = birl_ext.solve(mdp, temperature=case.temperature)
    assert not silent.value.requires_grad
    way(False)
    general = answers(case, mdp)
    for name, one, two in zip(Solution._fields, short[0], general[0], strict=True):
        assert torch.equal(one, two), name
        assert one.dtype == two.dtype
        assert one.requires_grad == two.requires_grad
    for one, two in zip(short[1], general[1], strict=True):
        assert torch.equal(one, two), (one - two).abs().max()
    if mdp.mask is mdp.terminal is mdp.reference is None:
        assert torch.equal(silent.policy, general[0].policy)


@pytest.mark.parametrize("name", ROWS)
def test_both_ways_give_the_same_error(name: str, way: Callable[[bool], list[bool]]) -> None:
    provoke = ROWS[name][2]
    said = []
    for short in (True, False):
        way(short)
        with pytest.raises(BirlError) as caught:
            provoke()
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


def test_a_failure_without_raising_is_the_same(way: Callable[[bool], list[bool]]) -> None:
    mdp = Case(batch=(3,)).mdp()
    transition = mdp.transition.clone()
    transition[1, 2, 0, 3] = torch.nan
    found = []
    for short in (True, False):
        taken = way(short)
        reward = mdp.reward.clone().requires_grad_()
        solution = birl_ext.solve(
            reward, transition, discount=0.9, temperature=0.5, on_fail="status"
        )
        assert taken == [short]
        (slope,) = torch.autograd.grad(solution.policy.square().sum(), reward)
        assert slope[1].isnan().all()
        found.append([*solution, slope])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


UNUSUAL: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a tensor as discount": lambda r, p: birl_ext.solve(
        r, p, discount=torch.tensor(0.9), temperature=0.5
    ),
    "an option": lambda r, p: birl_ext.solve(r, p, discount=0.9, temperature=0.5, tol=1e-6),
    "a warm start": lambda r, p: birl_ext.solve(
        r, p, discount=0.9, temperature=0.5, initial=torch.zeros(6, dtype=torch.float64)
    ),
    "a backend by name": lambda r, p: birl_ext.solve(
        r, p, discount=0.9, temperature=0.5, backend="cpu"
    ),
    "a shared transition": lambda r, p: birl_ext.solve(
        r.expand(2, *r.shape), p, discount=0.9, temperature=0.5
    ),
    "strides": lambda r, p: birl_ext.solve(
        r, p.permute(2, 1, 0).contiguous().permute(2, 1, 0), discount=0.9, temperature=0.5
    ),
    "a dual tensor": lambda r, p: _dual(r, p),
    "vmap": lambda r, p: torch.func.vmap(lambda x: _value(x, p))(torch.stack([r, r])),
    "grad": lambda r, p: torch.func.grad(lambda x: _value(x, p).sum())(r),
    "a parameter of another class": lambda r, p: _value(r.as_subclass(_Odd), p),
    "a mode that listens": lambda r, p: _listened(r, p),
}  # fmt: skip


class _Odd(Tensor):
    pass


def _value(reward: Tensor, transition: Tensor) -> Tensor:
    return birl_ext.solve(reward, transition, discount=0.9, temperature=0.5).value


def _dual(reward: Tensor, transition: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(reward, torch.ones_like(reward))
        tangent = torch.autograd.forward_ad.unpack_dual(_value(dual, transition)).tangent
    assert torch.allclose(tangent, torch.full_like(tangent, 10.0))


def _listened(reward: Tensor, transition: Tensor) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ear(TorchDispatchMode):
        heard = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            Ear.heard += "birl_ext" in str(func)
            return func(*args, **(kwargs or {}))

    with Ear():
        _value(reward, transition)
    assert Ear.heard


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_takes_the_general_way(
    name: str, way: Callable[[bool], list[bool]]
) -> None:
    mdp = Case().mdp()
    taken = way(True)
    UNUSUAL[name](mdp.reward, mdp.transition)
    assert not any(taken)
