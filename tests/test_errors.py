"""Every error that the functions, the containers and the bilevel layer can raise: its class, its
code, and a message with the place, the value and a remedy.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import birl_ext
from birl_ext import errors
from birl_ext.bilevel import BilevelProblem, DampedNewton, MSoBiRL, geometric
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.nn import SoftPlanner
from birl_ext.solution import Status

ROOT = Path(__file__).parent.parent
S, A = 4, 3
CATALOGUE = dict(errors.catalogue())


def model() -> dict[str, Any]:
    """A valid batch of two problems."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, S, A, S, generator=generator, dtype=torch.float64)
    return {
        "reward": torch.randn(2, S, A, generator=generator, dtype=torch.float64),
        "transition": rows / rows.sum(-1, keepdim=True),
        "discount": 0.9,
        "temperature": 0.5,
    }


def with_entry(name: str, place: tuple[int, ...], value: Any) -> dict[str, Any]:
    """The valid batch with one number changed."""
    arguments = model()
    arguments[name] = arguments[name].clone()
    arguments[name][place] = torch.as_tensor(value, dtype=torch.float64)
    return arguments


def solve(**changes: Any) -> Any:
    return birl_ext.solve(**{**model(), **changes})


def dense(**changes: Any) -> DenseMDP:
    arguments = {**model(), **changes}
    del arguments["temperature"]
    return DenseMDP(**arguments)


def sparse(**changes: Any) -> SparseMDP:
    """Every row of four states and three actions goes to states 0 and 1."""
    arguments: dict[str, Any] = {
        "reward": torch.zeros(S, A, dtype=torch.float64),
        "values": torch.full((2 * S * A,), 0.5, dtype=torch.float64),
        "crow": 2 * torch.arange(S * A + 1),
        "col": torch.tensor([0, 1]).repeat(S * A),
        "discount": 0.9,
    }
    return SparseMDP(**{**arguments, **changes})


def huge(states: int = 1_000_000) -> SparseMDP:
    """A ring of a million states: small as CSR, eight terabytes as a dense tensor."""
    ring = torch.arange(states)
    return SparseMDP(
        torch.zeros(states, 1, dtype=torch.float64),
        torch.ones(states, dtype=torch.float64),
        torch.arange(states + 1),
        (ring + 1) % states,
        0.9,
    )


def changed(tensor: Tensor, place: Any, value: Any) -> Tensor:
    copy = tensor.clone()
    copy[place] = value
    return copy


def broken_row(short: float = 0.1) -> dict[str, Any]:
    arguments = model()
    arguments["transition"][1, 2, 0, 3] += short
    return arguments


def policy() -> Tensor:
    return torch.full((S, A), 1 / A, dtype=torch.float64)


def one_closed() -> Tensor:
    return changed(torch.ones(2, S, A, dtype=torch.bool), (1, 2, 1), False)


def no_action() -> Tensor:
    return changed(torch.ones(2, S, A, dtype=torch.bool), (1, 2), False)


def quadratic(sign: float = 1.0) -> BilevelProblem:
    """φ = ‖x‖², or with sign −1 the same value with the gradient of −‖x‖²."""

    def upper(x: Tensor, _: Any) -> Tensor:
        bowl = x.square().sum()
        return sign * bowl + (1 - sign) * bowl.detach()

    return BilevelProblem(lambda x: dense(reward=x[0] * model()["reward"]), upper)


X0 = torch.tensor([1.0, -2.0], dtype=torch.float64)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# code, words of the message (a regular expression), and what provokes it
Row = tuple[str, str, Callable[[], Any]]

NUMBERS: dict[str, Row] = {
    "row sum": (
        "E101",
        r"transition row sums to 1\.1\d* at batch 1, state 2, action 0 \(allowed: 1 ± 1e-08",
        lambda: solve(**{"transition": broken_row()["transition"]}),
    ),
    "row sum, MDP": (
        "E101",
        r"sums to 1\.1\d* at batch 1, state 2, action 0",
        lambda: dense(transition=broken_row()["transition"]),
    ),
    "row sum, sparse": (
        "E101",
        r"sums to 0\.75 at state 1, action 1 ",
        lambda: sparse(values=changed(sparse().values, 9, 0.25)),
    ),
    "row sum, zero row": (
        "E101",
        r"sums to 0 at batch 0, state 3, action 2 .*terminal",
        lambda: solve(**with_entry("transition", (0, 3, 2), 0.0)),
    ),
    "row sum, bellman": (
        "E101",
        r"sums to 1\.1\d* at batch 1, state 2, action 0",
        lambda: birl_ext.bellman(torch.zeros(S).double(), **broken_row()),
    ),
    "row sum, evaluate": (
        "E101",
        r"sums to 1\.1\d* at batch 1, state 2, action 0",
        lambda: birl_ext.evaluate(
            policy(), model()["reward"], broken_row()["transition"], discount=0.9
        ),
    ),
    "row sum, occupancy": (
        "E101",
        r"sums to 1\.1\d* at batch 1, state 2, action 0",
        lambda: birl_ext.occupancy(
            policy(),
            broken_row()["transition"],
            discount=0.9,
            initial_distribution=torch.full((S,), 1 / S, dtype=torch.float64),
        ),
    ),
    "negative": (
        "E102",
        r"transition is -0\.25 at batch 0, state 1, action 2, next state 3 \(allowed: at least 0",
        lambda: solve(**with_entry("transition", (0, 1, 2), [0.5, 0.5, 0.25, -0.25])),
    ),
    "negative by a hair": (
        "E102",
        r"transition is -1e-12 at batch 0, state 1, action 2, next state 0",
        lambda: dense(
            transition=with_entry("transition", (0, 1, 2), [-1e-12, 0.5, 0.25, 0.25])["transition"]
        ),
    ),
    "negative, sparse": (
        "E102",
        r"transition is -0\.5 at state 3, action 2, next state 1",
        lambda: sparse(values=changed(sparse().values, slice(-2, None), torch.tensor([1.5, -0.5]))),
    ),
    "NaN in P": (
        "E103",
        r"transition is nan at batch 1, state 0, action 1, next state 2",
        lambda: solve(**with_entry("transition", (1, 0, 1, 2), math.nan)),
    ),
    "inf in P, sparse": (
        "E103",
        r"transition is inf at state 0, action 1, next state 0",
        lambda: sparse(values=changed(sparse().values, 2, math.inf)),
    ),
    "NaN in r": (
        "E103",
        r"reward is nan at batch 1, state 3, action 0 .*mask",
        lambda: solve(**with_entry("reward", (1, 3, 0), math.nan)),
    ),
    "-inf in r": (
        "E103",
        r"reward is -inf at batch 0, state 0, action 2 .*use `mask`",
        lambda: solve(**with_entry("reward", (0, 0, 2), -math.inf)),
    ),
    "NaN in the reference": (
        "E103",
        r"reference is nan at state 2, action 1",
        lambda: solve(reference=changed(policy(), (2, 1), math.nan)),
    ),
    "NaN in the start": (
        "E103",
        r"initial is nan at batch 1, state 2 \(allowed: finite",
        lambda: solve(initial=changed(torch.zeros(2, S).double(), (1, 2), math.nan)),
    ),
    "NaN in ρ": (
        "E103",
        r"initial_distribution is nan at state 1",
        lambda: dense(initial_distribution=torch.tensor([1, math.nan, 0, 0], dtype=torch.float64)),
    ),
    "no action": (
        "E104",
        r"mask forbids all 3 actions at batch 1, state 2 ",
        lambda: solve(mask=no_action()),
    ),
    "no action, MDP": (
        "E104",
        r"mask forbids all 3 actions at batch 1, state 2 ",
        lambda: dense(mask=no_action()),
    ),
    "column": (
        "E105",
        r"col is 4 at index 5 \(allowed: 0 to 3",
        lambda: sparse(col=changed(sparse().col, 5, 4)),
    ),
    "falling rows": (
        "E105",
        r"crow falls from 4 to 3 at index 3",
        lambda: sparse(crow=changed(sparse().crow, 3, 3)),
    ),
    "layout": (
        "E105",
        r"transition is torch\.strided",
        lambda: SparseMDP.from_torch(model()["transition"], model()["reward"], 0.9),
    ),
    "zero reference": (
        "E106",
        r"reference is 0 at state 2, action 1 \(allowed: above 0",
        lambda: solve(reference=changed(policy(), (2, 1), 0.0)),
    ),
    "negative reference": (
        "E106",
        r"reference is -1 at state 0, action 0",
        lambda: dense(reference=changed(policy(), (0, 0), -1.0)),
    ),
    "ρ sum": (
        "E107",
        r"initial_distribution sums to 1\.1 .*allowed: 1 ± 1e-08",
        lambda: birl_ext.occupancy(
            policy(),
            model()["transition"],
            discount=0.9,
            initial_distribution=torch.tensor([0.5, 0.5, 0.1, 0], dtype=torch.float64),
        ),
    ),
    "negative ρ": (
        "E107",
        r"initial_distribution is -0\.5 at state 2",
        lambda: dense(initial_distribution=torch.tensor([1, 0.5, -0.5, 0], dtype=torch.float64)),
    ),
    "policy sum": (
        "E108",
        r"policy sums to 0\.9 at state 2 \(allowed: 1 ± 1e-08",
        lambda: birl_ext.evaluate(
            changed(torch.full((S, A), 0.3, dtype=torch.float64) + 0.1 / 3, 2, 0.3),
            model()["reward"],
            model()["transition"],
            discount=0.9,
        ),
    ),
    "negative policy": (
        "E108",
        r"policy is -0\.5 at state 1, action 2",
        lambda: birl_ext.occupancy(
            changed(policy(), 1, torch.tensor([1.0, 0.5, -0.5]).double()),
            model()["transition"],
            discount=0.9,
            initial_distribution=torch.full((S,), 1 / S, dtype=torch.float64),
        ),
    ),
    "NaN in the policy": (
        "E108",
        r"policy is nan at state 1, action 0",
        lambda: birl_ext.evaluate(changed(policy(), (1, 0), math.nan), dense()),
    ),
    "policy behind the mask": (
        "E108",
        r"policy is 0\.333333 behind the mask at batch 1, state 2, action 1 \(allowed: 0 there",
        lambda: birl_ext.evaluate(policy(), dense(mask=one_closed())),
    ),
    "policy behind the mask, occupancy": (
        "E108",
        r"policy is 0\.333333 behind the mask at batch 1, state 2, action 1 .*normalise",
        lambda: birl_ext.occupancy(
            policy(),
            dense(mask=one_closed()).to_sparse(),
            initial_distribution=torch.full((S,), 1 / S, dtype=torch.float64),
        ),
    ),
}

SCALARS: dict[str, Row] = {
    "γ = 1": ("E201", r"discount is 1\.0 \(allowed: 0 ≤ discount < 1", lambda: solve(discount=1.0)),
    "γ < 0": (
        "E201",
        r"discount is -5e-324",
        lambda: solve(discount=math.nextafter(0, -1)),
    ),
    "γ NaN": ("E201", r"discount is nan", lambda: solve(discount=math.nan)),
    "γ tensor": (
        "E201",
        r"discount is 1\.0 at batch 1 ",
        lambda: solve(discount=torch.tensor([0.5, 1.0])),
    ),
    "γ, MDP": ("E201", r"discount is 1\.5", lambda: dense(discount=1.5)),
    "γ, evaluate": (
        "E201",
        r"discount is 2\.0",
        lambda: birl_ext.evaluate(policy(), model()["reward"], model()["transition"], discount=2.0),
    ),
    "γ tensor, evaluate": (
        "E201",
        r"discount is 2\.0 at batch 1",
        lambda: birl_ext.evaluate(
            policy(),
            model()["reward"],
            model()["transition"],
            discount=torch.tensor([0.5, 2.0]),
        ),
    ),
    "τ = 0": ("E202", r"temperature is 0\.0 .*positive", lambda: solve(temperature=0.0)),
    "τ inf": ("E202", r"temperature is inf", lambda: solve(temperature=math.inf)),
    "τ NaN": ("E202", r"temperature is nan", lambda: solve(temperature=math.nan)),
    "τ tensor": (
        "E202",
        r"temperature is -1\.0 at batch 0 ",
        lambda: solve(temperature=torch.tensor([-1.0, 1.0])),
    ),
    "τ tensor, bellman": (
        "E202",
        r"temperature is -1\.0 at batch 0 ",
        lambda: birl_ext.bellman(
            torch.zeros(S).double(), **{**model(), "temperature": torch.tensor([-1.0, 1.0])}
        ),
    ),
    "τ tensor, bellman, MDP": (
        "E202",
        r"temperature is -1\.0 \(",
        lambda: birl_ext.bellman(torch.zeros(S).double(), dense(), temperature=torch.tensor(-1.0)),
    ),
    "γ tensor, cheap": (
        "E201",
        r"discount is 1\.5 at batch 1",
        lambda: solve(discount=torch.tensor([0.5, 1.5]), validate="cheap"),
    ),
    "τ tensor, cheap": (
        "E202",
        r"temperature is 0\.0 at batch 0 \(",
        lambda: solve(temperature=torch.tensor(0.0), validate="cheap"),
    ),
    "γ tensor, MDP, cheap": (
        "E201",
        r"discount is 1\.5 \(",
        lambda: dense(discount=torch.tensor(1.5), validate="cheap"),
    ),
    "τ, MDP": (
        "E202",
        r"temperature is -1",
        lambda: birl_ext.solve(dense(), temperature=-1.0),
    ),
    "τ, layer": (
        "E202",
        r"temperature is 0 ",
        lambda: SoftPlanner(discount=0.9, temperature=0),
    ),
    "τ, schedule": ("E202", r"end is 0\.0 ", lambda: geometric(1.0, 0.0, 10)),
    "method": (
        "E203",
        r"method is 'newtn' .*Fix: use method='newton'",
        lambda: solve(method="newtn"),
    ),
    "on_fail": ("E203", r"on_fail is 'ignore'", lambda: solve(on_fail="ignore")),
    "validate": ("E203", r"validate is 'no'", lambda: solve(validate="no")),
    "backend": ("E203", r"backend is 'gpu'", lambda: solve(backend="gpu")),
    "tol": ("E203", r"tol is -1 \(allowed: 0 or more", lambda: solve(tol=-1)),
    "max_iterations": (
        "E203",
        r"max_iterations is 0 \(allowed: 1 or more",
        lambda: solve(max_iterations=0),
    ),
    "no transition": (
        "E203",
        r"transition is missing",
        lambda: birl_ext.solve(model()["reward"], discount=0.9, temperature=1.0),  # type: ignore[call-overload]
    ),
    "no discount": ("E203", r"discount is missing", lambda: solve(discount=None)),
    "twice": (
        "E203",
        r"discount was given beside an MDP object\. Fix: use mdp\.replace",
        lambda: birl_ext.solve(dense(), temperature=1.0, discount=0.5),  # type: ignore[call-overload]
    ),
    "no ρ": (
        "E203",
        r"initial_distribution is None",
        lambda: birl_ext.occupancy(policy(), model()["transition"], discount=0.9),
    ),
    "mode": (
        "E203",
        r"mode is 'fast' .*'exact', 'published'",
        lambda: MSoBiRL(quadratic(), X0, temperature=1.0, optimiser=sgd, mode="fast"),  # type: ignore[arg-type]
    ),
    "sweeps": (
        "E203",
        r"sweeps is 0 ",
        lambda: MSoBiRL(quadratic(), X0, temperature=1.0, optimiser=sgd, sweeps=0),
    ),
    "schedule": ("E203", r"steps is 0 ", lambda: geometric(1.0, 0.1, 0)),
}

TENSORS: dict[str, Row] = {
    "P against r": (
        "E301",
        r"transition has shape \(2, 4, 3, 4\) \(allowed: \(\*B, S, A, S\) = \(\*B, 4, 2, 4\)",
        lambda: solve(reward=torch.zeros(S, 2, dtype=torch.float64)),
    ),
    "no state": (
        "E301",
        r"reward has shape \(0, 3\) .*S ≥ 1 and A ≥ 1",
        lambda: solve(reward=torch.zeros(0, 3).double(), transition=torch.zeros(0, 3, 0).double()),
    ),
    "no action axis": (
        "E301",
        r"reward has shape \(4, 0\)",
        lambda: solve(reward=torch.zeros(4, 0).double(), transition=torch.zeros(4, 0, 4).double()),
    ),
    "batch axes": (
        "E301",
        r"batch axes \(3,\)",
        lambda: dense(reward=torch.zeros(3, S, A, dtype=torch.float64)),
    ),
    "batch axes, solve": (
        "E301",
        r"batch axes \(3,\)",
        lambda: solve(reward=torch.zeros(3, S, A, dtype=torch.float64)),
    ),
    "mask": (
        "E301",
        r"mask has shape \(3, 4\)",
        lambda: solve(mask=torch.ones(A, S, dtype=torch.bool)),
    ),
    "warm start": (
        "E301",
        r"initial has shape \(5,\) \(allowed: \(\*B, 4\)",
        lambda: solve(initial=torch.zeros(5, dtype=torch.float64)),
    ),
    "value": (
        "E301",
        r"value has shape \(5,\)",
        lambda: birl_ext.bellman(torch.zeros(5).double(), **model()),
    ),
    "policy": (
        "E301",
        r"policy has shape \(4, 2\)",
        lambda: birl_ext.evaluate(
            torch.full((S, 2), 0.5).double(),
            model()["reward"],
            model()["transition"],
            discount=0.9,
        ),
    ),
    "upper": (
        "E301",
        r"upper returned shape \(2, 4\)",
        lambda: BilevelProblem(lambda x: dense(), lambda x, s: s.value).objective(X0, 1.0),
    ),
    "upper, not reduced": (
        "E301",
        r"upper returned shape \(4,\) \(allowed: a scalar\)",
        lambda: BilevelProblem(lambda x: dense(), lambda x, s: s.value[0]).objective(X0[0], 1.0),
    ),
    "mixed": (
        "E302",
        r"transition has dtype float64 \(allowed: float32, as reward",
        lambda: solve(reward=model()["reward"].float()),
    ),
    "integers": (
        "E302",
        r"reward has dtype int64",
        lambda: solve(reward=torch.zeros(S, A, dtype=torch.int64)),
    ),
    "no tensor": ("E302", r"reward is a list", lambda: solve(reward=[[0.0]])),
    "mask of numbers": (
        "E302",
        r"mask is float64 \(allowed: a bool tensor",
        lambda: solve(mask=torch.ones(S, A, dtype=torch.float64)),
    ),
    "γ of words": ("E302", r"discount is 'high'", lambda: dense(discount="high")),
    "γ of digits": ("E302", r"discount is '0\.9'", lambda: solve(discount="0.9")),
    "τ of words": ("E302", r"temperature is None", lambda: solve(temperature=None)),
    "policy of integers": (
        "E302",
        r"policy has dtype int64",
        lambda: birl_ext.evaluate(policy().long(), dense()),
    ),
    "ρ of integers": (
        "E302",
        r"initial_distribution has dtype int64",
        lambda: birl_ext.occupancy(policy(), dense(), initial_distribution=torch.arange(S)),
    ),
    "warm start, batch": (
        "E301",
        r"initial has batch axes \(3,\) \(allowed: axes that broadcast to \(2,\)",
        lambda: solve(initial=torch.zeros(3, S, dtype=torch.float64)),
    ),
    "warm start, more batch": (
        "E301",
        r"initial has batch axes \(2, 2\)",
        lambda: solve(initial=torch.zeros(2, 2, S, dtype=torch.float64)),
    ),
    "to_dense": (
        "E304",
        r"to_dense\(\) .* GiB \(allowed: the .* GiB of this machine",
        lambda: huge().to_dense(),
    ),
    "dense factors": (
        "E304",
        r"newton.* with 1000000 states needs .*Fix: use method=\"auto\"",
        lambda: birl_ext.solve(huge(), temperature=1.0, method="newton"),
    ),
    "device": (
        "E303",
        r"reward is on cpu but transition is on meta",
        lambda: solve(transition=model()["transition"].to("meta")),
    ),
    "device of γ": (
        "E303",
        r"discount is on meta",
        lambda: solve(discount=torch.tensor(0.9, device="meta")),
    ),
    "device, MDP": (
        "E303",
        r"on meta",
        lambda: dense(mask=torch.ones(S, A, dtype=torch.bool, device="meta")),
    ),
}

RESULTS: dict[str, Row] = {
    "not converged": (
        "E401",
        r"not converged: certified error \d.* after 2 passes at 2 of 2 problems, .*batch",
        lambda: solve(max_iterations=2, discount=0.999),
    ),
    "stagnated": (
        "E402",
        r"stagnated: certified error \d.* after \d+ passes",
        lambda: solve(tol=1e-18, discount=0.999),
    ),
    "overflow": (
        "E403",
        r"overflowed.*rescale",
        lambda: solve(reward=torch.full((S, A), 1e308, dtype=torch.float64), discount=0.99),
    ),
    "NaN objective": (
        "E501",
        r"the objective that `upper` returned is nan .*Fix: look in `upper`",
        lambda: DampedNewton(
            BilevelProblem(
                lambda x: dense(reward=x[0] * model()["reward"]),
                lambda x, s: (x.square() / 0 - x / 0).sum(),
            ),
            X0,
            temperature=1.0,
        ).step(),
    ),
    "wrong sign": (
        "E501",
        r"no step along the gradient \(norm 4\.47\) decreases the objective",
        lambda: DampedNewton(quadratic(-1.0), X0, temperature=1.0).step(),
    ),
    "no such device": (
        "E601",
        r'backend="cuda" for tensors on cpu',
        lambda: solve(backend="cuda"),
    ),
}

ROWS = {**NUMBERS, **SCALARS, **TENSORS, **RESULTS}


def assert_raises(code: str, words: str, provoke: Callable[[], Any]) -> None:
    expected = CATALOGUE[f"BIRL-{code}"]
    with pytest.raises(expected, match=rf"^BIRL-{code} .*{words}") as caught:
        provoke()
    error = caught.value
    assert type(error) is expected
    assert error.code == f"BIRL-{code}"
    assert ". Fix: " in str(error), "no remedy"
    assert error.fix
    assert error.what in str(error)


@pytest.mark.parametrize("name", ROWS)
def test_error(name: str) -> None:
    assert_raises(*ROWS[name])


def test_what_only_the_op_can_see_is_said_in_the_same_words() -> None:
    """Under a trace nothing is read at the border; the op's status becomes the same error."""
    given = broken_row()
    with pytest.raises(errors.NonStochasticError) as at_the_border:
        dense(transition=given["transition"])
    with pytest.raises(errors.NonStochasticError) as from_the_op:
        birl_ext.solve(**given)
    assert str(at_the_border.value) == str(from_the_op.value)


def test_an_input_without_validation_is_not_read() -> None:
    """validate="off" takes rows as ratios: the answer is that of the normalised rows."""
    given = broken_row()
    rows = given["transition"]
    got = birl_ext.solve(**given, validate="off")
    want = birl_ext.solve(**{**given, "transition": rows / rows.sum(-1, keepdim=True)})
    assert torch.allclose(got.value, want.value, rtol=1e-13)


ZERO_ROW = with_entry("transition", (1, 2, 0), 0.0)["transition"]
GAMMAS = torch.tensor([1.5, 0.9], dtype=torch.float64)
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, r: torch.func.grad(lambda x: f(x).sum())(r),
    "vmap": lambda f, r: torch.func.vmap(f)(torch.stack((r, r))),
    "vmap of grad": lambda f, r: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(r[None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_no_transform_has_wrapped_is_read(transform: str) -> None:
    """Only the reward is wrapped here."""
    broken, rows, reward = broken_row()["transition"], model()["transition"], model()["reward"]
    even, twice = policy(), 2 * policy()
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda r: birl_ext.evaluate(even, r, broken, discount=0.9),
        lambda r: birl_ext.bellman(r[..., 0], r, broken, discount=0.9, temperature=1.0)[0],
        lambda r: birl_ext.solve(DenseMDP(r, broken, 0.9), temperature=1.0).value,
    ]
    for call in calls:
        with pytest.raises(errors.NonStochasticError, match="batch 1, state 2, action 0"):
            TRANSFORMS[transform](call, reward)
    with pytest.raises(errors.PolicyError, match=r"sums to 2 at state 0"):
        TRANSFORMS[transform](lambda r: birl_ext.evaluate(twice, r, rows, discount=0.9), reward)


@pytest.mark.parametrize("validate", ["full", "off"])
def test_a_row_of_zeros_ends_nothing_without_mask_or_terminal(validate: Any) -> None:
    """Whether the rows were read when the MDP was made, or only by the solver."""
    reward = model()["reward"][0]

    def value(rows: Tensor) -> Tensor:
        mdp = DenseMDP(reward, rows, 0.9, validate=validate)
        return birl_ext.solve(mdp, temperature=1.0).value

    for run in (
        lambda: value(ZERO_ROW[1]),
        lambda: torch.func.vmap(value)(ZERO_ROW),
        lambda: torch.func.grad(lambda rows: value(rows).sum())(ZERO_ROW[1]),
        lambda: torch.compile(value, backend="eager")(ZERO_ROW[1]),
    ):
        with pytest.raises(
            errors.NonStochasticError, match=r"sums to 0 at (batch ., )?state 2, action 0"
        ):
            run()


def test_scalars_out_of_range_give_nan_where_nothing_can_be_raised() -> None:
    reward, rows, even = model()["reward"][0], model()["transition"][0], policy()
    start = torch.full((S,), 1 / S, dtype=torch.float64)

    def swept(gamma: Any, tau: Any) -> Tensor:
        options: dict[str, Any] = {"discount": gamma, "temperature": tau}
        image, q, pi = birl_ext.bellman(reward[:, 0], reward, rows, **options)
        return torch.cat((image, q.flatten(), pi.flatten()))

    def share(gamma: Tensor) -> Tensor:
        options: dict[str, Any] = {"discount": gamma, "initial_distribution": start}
        return birl_ext.occupancy(even, rows, **options)

    calls: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda g: birl_ext.evaluate(even, reward, rows, discount=g), GAMMAS),
        (share, GAMMAS),
        (lambda g: swept(g, 1.0), GAMMAS),
        (lambda tau: swept(0.9, tau), 1.25 - GAMMAS),
        (lambda tau: swept(0.9, tau), GAMMAS.new_tensor([torch.inf, 1.0])),
    ]
    for call, scalars in calls:
        for found in (
            torch.func.vmap(call)(scalars),
            torch.func.vmap(torch.func.jacrev(call))(scalars),
        ):
            assert found[0].isnan().all()
            assert found[1].isfinite().all()
        torch.testing.assert_close(torch.func.vmap(call)(scalars)[1], call(scalars[1]))


@pytest.mark.parametrize("states", [5, 150])
@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("discount", 1.5, Status.BAD_DISCOUNT),
        ("discount", torch.nan, Status.BAD_DISCOUNT),
        ("temperature", -1.0, Status.BAD_TEMPERATURE),
        ("temperature", torch.inf, Status.BAD_TEMPERATURE),
    ],
)
def test_numbers_are_checked_without_validation_of_the_tables(
    name: str, value: float, status: Status, states: int
) -> None:
    """A discount of 1.5 would be certified with a negative bound."""
    given = {
        "reward": torch.ones(states, 2, dtype=torch.float64),
        "transition": torch.full((states, 2, states), 1 / states, dtype=torch.float64),
        "discount": torch.tensor(0.9, dtype=torch.float64),
        "temperature": torch.tensor(1.0, dtype=torch.float64),
        name: torch.tensor(value, dtype=torch.float64),
    }
    for validate in ("cheap", "off"):
        got = birl_ext.solve(**given, validate=validate, on_fail="status")  # type: ignore[call-overload]
        assert got.status == status
        assert got.error_bound.isnan()


def test_every_class_says_what_it_means() -> None:
    for code, cls in errors.catalogue():
        assert re.fullmatch(r"BIRL-E\d{3}", code)
        assert cls.meaning, code
        assert cls.__name__ in errors.__all__


def test_every_status_has_a_sentence() -> None:
    for status in Status:
        assert status.sentence.endswith(".")


def test_an_error_can_be_caught_as_what_python_would_raise() -> None:
    """A shape is a ValueError, a dtype a TypeError, a failed solve a RuntimeError."""
    for code, builtin in (("E1", ValueError), ("E2", ValueError), ("E4", RuntimeError)):
        for name, cls in CATALOGUE.items():
            if name.startswith(f"BIRL-{code}"):
                assert issubclass(cls, builtin), name
    assert issubclass(errors.DtypeError, TypeError)
    assert issubclass(errors.MissingDependencyError, ImportError)


def test_every_code_of_the_catalogue_is_exercised_somewhere() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    here = {f"BIRL-{code}" for code, _, _ in ROWS.values()}
    missing = [
        code
        for code, cls in errors.catalogue()
        if code not in here and not re.search(rf"\b{cls.__name__}\b", text)
    ]
    assert not missing, f"no test provokes {', '.join(missing)}"


def test_the_table_of_the_readme_is_the_catalogue() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    listed = re.findall(r"^\|\s*`?(BIRL-E\d{3})", readme.read_text(encoding="utf-8"), re.MULTILINE)
    if not listed:
        pytest.skip("README.md has no table of errors yet")
    assert listed == list(CATALOGUE)


# Copies and processes


def instance(cls: type[errors.BirlError]) -> errors.BirlError:
    """An error with every part, with notes, and with what its class adds."""
    error = cls("x is 3", where="batch 1", allowed="up to 2", fix="take 2; then go on")
    error.add_note("a note")
    if isinstance(error, errors.SolveError):
        reward = model()["reward"].requires_grad_()
        error.solution = solve(reward=reward)  # with a graph, which no other process can have
    if isinstance(error, errors.UndeterminedError):
        error.direction = (1.0, -0.5)
    return error


def assert_same_error(got: BaseException, want: errors.BirlError) -> None:
    assert type(got) is type(want)
    assert isinstance(got, errors.BirlError)
    assert str(got) == str(want)
    assert str(got).count(want.code) == 1
    assert got.args == want.args
    assert vars(got).keys() == vars(want).keys()
    for name, value in vars(want).items():
        found = getattr(got, name)
        if name != "solution" or value is None:
            assert found == value, name
            continue
        for part, expected in zip(found, value, strict=True):
            assert torch.equal(part, expected)
    assert getattr(got, "msg", None) == getattr(want, "msg", None)  # of an ImportError


@pytest.mark.parametrize("code", CATALOGUE)
def test_an_error_is_the_same_after_any_copy(code: str) -> None:
    want = instance(CATALOGUE[code])
    copies = [copy.copy(want), copy.deepcopy(want)]
    copies += [
        pickle.loads(pickle.dumps(want, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    copies.append(pickle.loads(pickle.dumps(copies[-1])))
    for got in copies:
        assert_same_error(got, want)
    assert getattr(copies[0], "solution", None) is getattr(want, "solution", None)


def test_errors_cross_the_border_of_a_process_that_has_ended() -> None:
    """Tensors too, which torch would fetch from the process that sent them."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    sent = [instance(cls) for cls in CATALOGUE.values()]
    sent.sort(key=lambda error: isinstance(error, errors.SolveError))  # one with tensors is last

    def work() -> None:
        for error in sent:
            queue.put(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's idle threads
        process = context.Process(target=work)
        process.start()
    got = [queue.get() for _ in sent[:-1]]
    process.join()
    got.append(queue.get())
    for error, want in zip(got, sent, strict=True):
        assert_same_error(error, want)


def test_a_failed_solve_keeps_its_solution() -> None:
    with pytest.raises(errors.NotConvergedError) as caught:
        solve(discount=0.999, max_iterations=1, method="value-iteration")
    assert_same_error(pickle.loads(pickle.dumps(caught.value)), caught.value)
