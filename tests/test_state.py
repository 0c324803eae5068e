"""What `Stateful` takes out of an object and puts back: to the same bits, and sharing nothing."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cases import untyped
from closeness import assert_same_bits, assert_same_state
from torch import nn

import birl_ext
from birl_ext.errors import DtypeError, OptionError, ShapeError, warn
from birl_ext.preferences.teachers import ScriptedTeacher, TeacherRule
from birl_ext.state import Stateful


class Inner(Stateful):
    STATE: ClassVar[tuple[str, ...]] = ("_count",)

    def __init__(self) -> None:
        self._count = 0


class Outer(Inner):
    """One of each kind, drawn and stepped on."""

    STATE = ("x", "net", "optimiser", "generator", "inner", "known", "kept", "share", "parts")

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(3, generator=self.generator).requires_grad_()
        self.net = nn.Linear(2, 1)
        with torch.no_grad():
            self.net.weight.copy_(torch.randn(1, 2, generator=self.generator))
        self.optimiser = torch.optim.Adam([self.x, *self.net.parameters()], lr=0.1)
        self.inner = Inner()
        self.known: float | None = None
        self.kept: torch.Tensor | None = None
        self.share = 1.0
        self.parts: dict[str, Any] = {"a": torch.zeros(2).requires_grad_(), "b": [torch.zeros(())]}

    def step(self) -> torch.Tensor:
        noise = torch.randn(3, generator=self.generator)
        loss: torch.Tensor = (
            (self.x * noise).sum() + self.net(noise[:2]).sum() + self.parts["a"].sum()
        )
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        self.optimiser.step()
        with torch.no_grad():
            self.parts["a"].add_(noise[:2])
        self.parts["b"] = [noise[2]]
        self.kept = torch.zeros(3) if self.kept is None else self.kept
        self.kept += noise  # in place
        self.known, self.share = float(noise[0]), self.share / 2
        self._count += 1
        self.inner._count += 2
        return loss.detach()


def test_an_object_goes_on_from_its_state() -> None:
    one, other = Outer(0), Outer(1)
    for _ in range(3):
        one.step()
    kept = one.state_dict()
    again = copy.deepcopy(kept)
    x, net, optimiser = other.x, other.net, other.optimiser
    other.load_state_dict(kept)
    assert (other.x, other.net, other.optimiser) == (x, net, optimiser), "others hold them"
    assert_same_state(other.state_dict(), kept)
    for _ in range(3):
        assert_same_bits(one.step(), other.step(), label="loss")
    assert_same_state(one.state_dict(), other.state_dict())
    assert_same_state(kept, again)  # neither stepping nor loading reaches into it
    assert [*kept] == ["count", *Outer.STATE]
    assert kept["known"] is not None
    Outer(2).load_state_dict(Outer(3).state_dict())


def test_what_is_not_known_yet_may_be_put_back() -> None:
    fresh, used = Outer(0), Outer(0)
    state = fresh.state_dict()
    used.step()
    used.load_state_dict(state)
    assert used.known is None
    assert used.kept is None
    assert_same_bits(used.step(), fresh.step(), label="loss")
    rule = TeacherRule.oracle()
    told, new = (ScriptedTeacher(rule, torch.Generator(), mean_reward=mean) for mean in (0.5, None))
    kept, blank = told.state_dict(), new.state_dict()
    told.load_state_dict(blank)
    new.load_state_dict(kept)
    assert (told.mean_reward, new.mean_reward) == (None, 0.5)


@pytest.mark.parametrize(
    ("key", "value", "kind", "words"),
    [
        ("x", torch.zeros(4), ShapeError, r"x is a tensor \(4,\) of float32 .*\(3,\)"),
        ("x", torch.zeros(()), ShapeError, r"x is a tensor \(\) of float32"),
        ("x", torch.zeros(3).double(), DtypeError, r"x is a tensor \(3,\) of float64 .*float32"),
        ("x", [torch.zeros(10**5)] * 3, OptionError, r"x is a list of 3 .*a tensor \(3,\)"),
        ("x", None, OptionError, r"x is None"),
        ("net", torch.zeros(2), OptionError, r"net is a tensor .*dict of 'weight', 'bias'"),
        ("net", {"weight": 0}, OptionError, r"net is a dict that lacks 'bias' and has nothing"),
        (
            "net",
            {"weight": torch.ones(1, 2), "bias": torch.ones(2)},
            ShapeError,
            r"net\['bias'\] is a tensor \(2,\)",
        ),
        ("optimiser", 3, OptionError, r"optimiser is a number .*optimiser of \[3\] parameters"),
        (
            "optimiser",
            {"state": {}, "param_groups": []},
            OptionError,
            r"optimiser is that of an optimiser of \[\] parameters",
        ),
        ("optimiser", {"param_groups": [{"params": [0, 1, 2]}]}, OptionError, r"optimiser is .*\["),
        ("generator", torch.zeros(3), ShapeError, r"generator is a tensor \(3,\) of float32"),
        ("generator", None, OptionError, r"generator is None"),
        ("inner", None, OptionError, r"inner is None"),
        ("inner", {}, OptionError, r"inner is a dict that lacks 'count'"),
        ("inner", {"count": "1"}, OptionError, r"inner\['count'\] is a str .*a whole number"),
        ("parts", {"a": torch.zeros(2)}, OptionError, r"parts is a dict that lacks 'b'"),
        ("parts", {"a": torch.zeros(1), "b": []}, ShapeError, r"parts\['a'\] is a tensor \(1,\)"),
        ("parts", {"a": torch.zeros(2), "b": []}, OptionError, r"parts\['b'\] is a list of 0"),
        ("other", 1, OptionError, r"state is a dict that lacks nothing and has 'other' besides"),
    ],
)
def test_the_state_of_another_object_is_refused(
    key: str, value: Any, kind: Any, words: str
) -> None:
    """By a short error, and before anything has changed."""
    ours, theirs = Outer(0), Outer(1)
    for each in (ours, theirs, theirs):
        each.step()
    before = ours.state_dict()
    with pytest.raises(kind, match=f"the stored {words}") as raised:
        ours.load_state_dict({**theirs.state_dict(), key: value})
    assert len(str(raised.value)) < 300
    assert_same_state(ours.state_dict(), before)


@pytest.mark.parametrize("key", Outer.STATE)
def test_half_a_state_changes_nothing(key: str) -> None:
    ours, theirs = Outer(0), Outer(1)
    before, state = ours.state_dict(), theirs.state_dict()
    del state[key]
    with pytest.raises(OptionError, match=f"the stored state is a dict that lacks '{key}'"):
        ours.load_state_dict(state)
    with pytest.raises(OptionError, match="the stored state is None"):
        ours.load_state_dict(untyped(None))
    assert_same_state(ours.state_dict(), before)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 2), 0.3, dtype=torch.float64))
        self.register_buffer("units", torch.ones(2))


def descent(optimiser: Any, mode: Any = "exact") -> birl_ext.MSoBiRL:
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    problem = birl_ext.BilevelProblem(
        lambda x: birl_ext.DenseMDP(x.weight, transition, 0.9),
        lambda x, solution: solution.policy[..., 0].square().sum(),
    )
    return birl_ext.MSoBiRL(problem, Weights(), temperature=0.5, optimiser=optimiser, mode=mode)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("optimiser",), "another's"),
        (("optimiser",), torch.zeros(2)),
        (("optimiser", "state"), "x"),
        (("optimiser", "state", 0), 3),
        (("x", "units"), None),
        (("x", "weight"), None),
        (("optimiser", "state", 0, "exp_avg"), torch.zeros(2, dtype=torch.float64)),
        (("optimiser", "state", 0, "exp_avg"), torch.zeros(()).double()),
        (("optimiser", "state", 0, "step"), torch.zeros(3, 2)),
        (("optimiser", "param_groups", 0, "lr"), "x"),
        (("optimiser", "param_groups", 0, "lr"), True),
        (("optimiser", "param_groups", 0, "betas"), ("a", "b")),
        (("optimiser", "param_groups", 0, "params"), [7]),
        (("optimiser", "param_groups", 0, "params"), [[0]]),
        (("optimiser", "param_groups", 0, "betas"), 0.9),
        (("steps",), None),
        (("steps",), True),
        (("steps",), 2.5),
        (("steps",), -1),
        (("value",), "x"),
        (("flow",), []),
    ],
)
def test_a_state_that_an_algorithm_cannot_take_changes_nothing(
    path: tuple[Any, ...], value: Any
) -> None:
    theirs, ours = descent(adam), descent(adam)
    theirs.run(2, progress=False)
    ours.step()
    if value == "another's":
        other = descent(momentum)
        other.step()
        value = other.state_dict()["optimiser"]
    state = part = copy.deepcopy(theirs.state_dict())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    before = ours.state_dict()
    words = r"(stored (optimiser|x|steps|value|flow|state)|^BIRL-E203 steps is -1)"
    with pytest.raises((OptionError, ShapeError), match=words):
        ours.load_state_dict(state)
    assert_same_state(ours.state_dict(), before)
    ours.step()


class Remembering(torch.optim.SGD):
    """It keeps what is not of the shape of its parameters."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for one in self.param_groups[0]["params"]:
            self.state[one]["history"] = torch.zeros(5)
        return found


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (adam, lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.1))),
        (lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.1)), adam),
        (adam, lambda parameters: torch.optim.Adam(parameters, lr=0.1, foreach=True)),
        (lambda parameters: torch.optim.Adam(parameters, lr=0.1, foreach=True), adam),
        (adam, lambda parameters: torch.optim.Adam(parameters, lr=untyped(np.float32(0.1)))),
        (torch.optim.LBFGS, torch.optim.LBFGS),
        (
            torch.optim.LBFGS,
            lambda parameters: torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe"),
        ),
        (lambda p: Remembering(p, lr=0.1), lambda p: Remembering(p, lr=0.1)),
        (
            lambda parameters: torch.optim.Adadelta(parameters, lr=0.1),
            lambda parameters: torch.optim.Adadelta(parameters, lr=0.1),
        ),
    ],
)
def test_every_good_state_of_an_optimiser_is_taken(theirs: Any, ours: Any) -> None:
    one, other = descent(theirs), descent(ours)
    one.run(2, progress=False)
    other.load_state_dict(one.state_dict())
    assert_same_bits(one.step().objective, other.step().objective, label="objective")
    if theirs is ours or "Adam" not in type(one.optimiser).__name__:
        assert_same_bits(one.x.weight, other.x.weight, label="x")


@pytest.mark.filterwarnings("ignore::birl_ext.errors.AccuracyWarning")
def test_a_batch_of_temperatures_may_come_later() -> None:
    transition = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    problem = birl_ext.BilevelProblem(
        lambda x: birl_ext.DenseMDP(x, transition, 0.9),
        lambda x, solution: solution.policy[..., 0].square().sum(),
    )
    both = torch.tensor([1.0, 2.0], dtype=torch.float64)
    algorithm = birl_ext.MSoBiRL(
        problem,
        torch.full((3, 2), 0.3, dtype=torch.float64),
        temperature=lambda step: both if step else 1.0,
        optimiser=adam,
        mode="published",
    )
    algorithm.run(2, progress=False)


@pytest.mark.filterwarnings("ignore::birl_ext.errors.AccuracyWarning")
def test_a_kept_flow_of_another_length_is_named() -> None:
    theirs = descent(adam, "published")
    theirs.run(2, progress=False)
    state = theirs.state_dict()
    ours = descent(adam, "published")
    ours.load_state_dict({**state, "value": None, "flow": torch.zeros(1, 1, 4)})
    kept = ours.state_dict()
    with pytest.raises(ShapeError, match=r"flow .* shape \(1, 1, 4\) \(allowed: \(1, 1, 3\)"):
        ours.step()
    assert_same_state(ours.state_dict(), kept)


@pytest.mark.parametrize("names", [{}, {"__name__": "of_a_user"}])
def test_a_warning_finds_code_that_has_no_module(names: dict[str, Any]) -> None:
    code = compile("\nwarn('look')", "<theirs>", "exec")
    with pytest.warns(UserWarning, match="look") as found:
        exec(code, {"warn": warn, **names})
    assert (found[0].filename, found[0].lineno) == ("<theirs>", 2)
