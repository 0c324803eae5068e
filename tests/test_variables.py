"""x as a tensor, a list, a tuple, a dict or a module: the same steps, in the form it was given."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pytest
import torch
from closeness import assert_close, assert_same_bits, assert_same_state
from torch import Tensor, nn

from birl_ext.bilevel import (
    BilevelProblem,
    DampedNewton,
    DRLHFUpdate,
    MSoBiRL,
    SampledProblem,
    StocSoBiRLDescent,
    ZeroOrder,
    hypergradient_report,
)
from birl_ext.bilevel.stoc_sobirl import Effort
from birl_ext.bilevel.variables import entry, joined, leaves, named, split
from birl_ext.errors import (
    BirlError,
    DeviceError,
    DtypeError,
    GradientError,
    NonFiniteInputError,
    NonFiniteResultError,
    OptionError,
    ShapeError,
    UndeterminedError,
)
from birl_ext.model.mdp import DenseMDP
from birl_ext.preferences.reward_model import RewardNetwork
from birl_ext.simulators.finite import FiniteSimulator
from birl_ext.solution import Kernel, Solution

S, A = 3, 2
GENERATOR = torch.Generator().manual_seed(0)
P = torch.rand(S, A, S, generator=GENERATOR, dtype=torch.float64).softmax(-1)
BASE = DenseMDP(torch.rand(S, A, generator=GENERATOR, dtype=torch.float64), P, 0.8)
W = torch.randn(S, A, generator=GENERATOR, dtype=torch.float64)
B = torch.randn(A, generator=GENERATOR, dtype=torch.float64)
START = torch.cat((W.flatten(), B))


class Pair(NamedTuple):
    weight: Tensor
    bias: Tensor


class Net(nn.Module):
    """r(s, a) = w_sa + b_a, and a number that is not to be moved."""

    def __init__(self, weight: Tensor = W, bias: Tensor = B) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.fixed = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

    def forward(self) -> Tensor:
        return self.fixed * (self.weight + self.bias)


FORMS: dict[str, Any] = {
    "list": [W, B],
    "tuple": (W, B),
    "named tuple": Pair(W, B),
    "dict": {"weight": W, "bias": B},
    "module": Net(),
}
forms = pytest.mark.parametrize("form", FORMS)


def parts(x: Any) -> tuple[Tensor, Tensor]:
    if isinstance(x, Tensor):
        return x[: S * A].reshape(S, A), x[S * A :]
    weight, bias = (x["weight"], x["bias"]) if isinstance(x, dict) else leaves(x)
    return weight, bias


def problem_of(form: Any = None) -> BilevelProblem:
    """The same φ of each form; with one, its levels insist on it."""

    def seen(x: Any) -> tuple[Tensor, Tensor]:
        assert form is None or type(x) is type(form)
        return parts(x)

    def lower(x: Any) -> DenseMDP:
        if isinstance(x, Net):
            return BASE.replace(reward=x())
        weight, bias = seen(x)
        return BASE.replace(reward=weight + bias)

    def upper(x: Any, solution: Solution) -> Tensor:
        weight, bias = seen(x)
        near = (weight - 0.3).square().sum() + (bias + 0.1).square().sum()
        return near - solution.log_policy[:, 0].mean()

    return BilevelProblem(lower, upper)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


def exact(x: Any, problem: BilevelProblem, **options: Any) -> MSoBiRL:
    settings = {"temperature": 0.5, "optimiser": sgd, "accuracy": math.inf, **options}
    return MSoBiRL(problem, x, **settings)


def published(x: Any, problem: BilevelProblem, **options: Any) -> MSoBiRL:
    return exact(x, problem, mode="published", noise=0.1, **options)


def newton(x: Any, problem: BilevelProblem, **_: Any) -> DampedNewton:
    return DampedNewton(problem, x, temperature=0.5)


def zero_order(x: Any, problem: BilevelProblem, **options: Any) -> ZeroOrder:
    return ZeroOrder(problem, x, temperature=0.5, radius=1e-3, **{"optimiser": sgd, **options})


every = pytest.mark.parametrize("make", [exact, published, newton, zero_order])
optimised = pytest.mark.parametrize("make", [exact, published, zero_order])


def vector(x: Any) -> Tensor:
    return joined(leaves(x)).detach()


@every
@forms
def test_every_form_takes_the_steps_of_the_vector(make: Any, form: str) -> None:
    given = FORMS[form]
    ours, plain = make(given, problem_of(given)), make(START, problem_of())
    for _ in range(4):
        mine, want = ours.step(), plain.step()
        assert float(mine.gradient_norm) == pytest.approx(float(want.gradient_norm), rel=1e-9)
        assert float(mine.objective) == pytest.approx(float(want.objective), rel=1e-10)
        assert_close(vector(ours.x), vector(plain.x), bound=1e-9, label="x")
    assert type(ours.x) is type(given)
    assert_same_bits(vector(given), START, label="the start is copied")


@every
@forms
def test_a_restored_form_goes_on_to_the_same_bits(make: Any, form: str) -> None:
    one = make(FORMS[form], problem_of())
    one.step()
    kept = one.state_dict()
    before = joined(t.flatten() for t in _tensors(kept["x"])).clone()
    for _ in range(2):
        one.step()
    zeros = make(Net(0 * W, 0 * B) if form == "module" else _zeroed(FORMS[form]), problem_of())
    zeros.load_state_dict(kept)
    for _ in range(2):
        zeros.step()
    assert_same_bits(vector(zeros.x), vector(one.x), label="x")
    now = joined(t.flatten() for t in _tensors(kept["x"]))
    assert_same_bits(now, before, label="a state is a snapshot")


def _tensors(state: Any) -> list[Tensor]:
    return list(state.values()) if isinstance(state, dict) else list(state)


def _zeroed(form: Any) -> Any:
    if isinstance(form, dict):
        return {name: 0 * part for name, part in form.items()}
    return (
        type(form)(*(0 * t for t in form))
        if isinstance(form, Pair)
        else type(form)([0 * t for t in form])
    )


@forms
def test_an_optimiser_sees_the_leaves(form: str) -> None:
    """Each may have a rate of its own; what is frozen is none of them."""

    def rated(own: list[Tensor]) -> torch.optim.Optimizer:
        assert [leaf.shape for leaf in own] == [W.shape, B.shape]
        return torch.optim.SGD([{"params": own[:1], "lr": 0.0}, {"params": own[1:], "lr": 0.1}])

    algorithm = exact(FORMS[form], problem_of(), optimiser=rated)
    algorithm.step()
    weight, bias = parts(algorithm.x)
    assert_same_bits(weight, W, label="weight")
    assert bool((bias != B).all())
    if isinstance(algorithm.x, Net):
        assert float(algorithm.x.fixed.detach()) == 1


@forms
def test_a_report_is_of_all_leaves(form: str) -> None:
    want = hypergradient_report(problem_of(), START, 0.5, smoothness="linear")
    found = hypergradient_report(problem_of(), FORMS[form], 0.5, smoothness="linear")
    assert found.exact.shape == found.estimate.shape == START.shape
    assert_close(found.exact, want.exact, bound=1e-12, label="exact")
    assert_close(found.estimate, want.estimate, bound=1e-12, label="estimate")
    assert float(found.bound) == pytest.approx(float(want.bound), rel=1e-6)
    rough = published(FORMS[form], problem_of()).hypergradient_report(smoothness="linear")
    assert float((rough.estimate - rough.exact).norm()) <= float(rough.bound) < math.inf


@forms
def test_standard_errors_are_of_all_leaves(form: str) -> None:
    want = newton(START, problem_of()).covariance()
    assert_close(newton(FORMS[form], problem_of()).covariance(), want, bound=1e-10, label="Σ")


def test_a_direction_names_its_leaves() -> None:
    flat = BilevelProblem(
        lambda x: BASE.replace(reward=BASE.reward + 0 * x["a"][0, 1]),
        lambda x, _: (x["a"][0, 0] - x["b"]).square() + x["a"][0, 1].square(),
    )
    start = {"a": torch.ones(1, 2).double(), "b": torch.zeros(()).double()}
    algorithm = DampedNewton(flat, start, temperature=1.0)
    with pytest.raises(UndeterminedError, match=r"direction 1 in x\['a'\]\[0, 0\], 1 in x\['b'\]"):
        algorithm.covariance()


@every
def test_every_leaf_has_a_path(make: Any) -> None:
    """One that nothing depends on would stay where it is, in silence."""

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    problem = problem_of()
    for start, name in (
        ({"weight": W, "bias": B, "other": 2 * B}, r"x\['other'\]"),
        (Wide(), r"x\.spare"),
    ):
        lax = BilevelProblem(
            problem.lower,
            lambda x, solution: solution.policy[0, 0] + parts(_first(x))[0].square().sum(),
        )
        algorithm = make(start, lax)
        before = vector(algorithm.x)
        with pytest.raises(GradientError, match=f"does not depend on {name}, neither .* leave"):
            algorithm.step()
        assert_same_bits(vector(algorithm.x), before, label="x")
    frozen = Wide()
    frozen.spare.requires_grad_(False)
    make(frozen, lax).step()


def _first(x: Any) -> Any:
    return x if isinstance(x, dict) else [x.weight, x.bias]


class Tied(nn.Module):
    """One parameter under two names, which stays one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Parameter(B.clone())


def test_a_tied_parameter_is_one_leaf() -> None:
    problem = BilevelProblem(
        lambda x: BASE.replace(reward=x.one + BASE.reward * x.other[0]),
        lambda x, solution: solution.policy[0, 0] + x.one.square().sum(),
    )
    algorithm = exact(Tied(), problem)
    algorithm.step()
    assert algorithm.x.one is algorithm.x.other
    assert [*named(algorithm.x)] == ["x.one"]


HALF = Net().half()
META = torch.zeros(2, device="meta", dtype=torch.float64)
REFUSED: dict[str, tuple[Any, type[BirlError], str]] = {
    "empty list": ([], OptionError, "x has no tensors"),
    "empty dict": ({}, OptionError, "x has no tensors"),
    "frozen": (Net().requires_grad_(False), OptionError, "x has no parameter that requires"),
    "no parameters": (nn.ReLU(), OptionError, "x has no parameter"),
    "numbers": ({"a": 1.0}, DtypeError, r"x\['a'\] is a float"),
    "integers": ([W, B.long()], DtypeError, r"x\[1\] has dtype int64"),
    "nested": ([[W]], DtypeError, r"x\[0\] is a list"),
    "text": ("xyz", DtypeError, "x is a str"),
    "half module": (HALF, DtypeError, r"x\.weight is torch\.float16.*Fix: float\(\) it"),
    "dtypes": ({"a": W, "b": B.float()}, DtypeError, r"x\['b'\] is torch.float32, x\['a'\]"),
    "devices": ([W, META], DeviceError, r"x\[1\] is on meta, x\[0\] on cpu"),
    "shared": ({"a": W, "b": W}, OptionError, r"x\['b'\] is the same tensor as x\['a'\]"),
    "computed": ([W, 2 * W.clone().requires_grad_()], GradientError, r"x\[1\] is no leaf"),
    "computed tensor": (2 * START.clone().requires_grad_(), GradientError, "x is no leaf"),
    "NaN": ((W, B * math.nan), NonFiniteInputError, r"x\[1\] is nan at entry \[0\]"),
}


@every
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_variable_is_refused(make: Any, name: str) -> None:
    start, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words) as caught:
        make(start, problem_of())
    assert ". Fix: " in str(caught.value) or "allowed" in str(caught.value)


def test_halves_in_a_list_are_promoted() -> None:
    assert [leaf.dtype for leaf in exact([W.half(), B.half()], problem_of()).x] == [
        torch.float32
    ] * 2


@optimised
def test_a_step_that_fails_leaves_every_leaf(make: Any) -> None:
    problem = problem_of()
    algorithm = make(
        {"weight": W, "bias": B},
        BilevelProblem(problem.lower, lambda x, solution: 1e10 * problem.upper(x, solution)),
        optimiser=lambda own: torch.optim.SGD(
            [{"params": own[:1], "lr": 0.1}, {"params": own[1:], "lr": 1e308}]
        ),
    )
    with pytest.raises(NonFiniteResultError, match=r"x\['bias'\] is"):
        algorithm.step()
    assert_same_bits(vector(algorithm.x), START, label="x")


def test_the_norm_of_all_leaves_may_overflow_alone() -> None:
    steep = BilevelProblem(
        problem_of().lower,
        lambda x, solution: (
            solution.policy[0, 0] + 1e154 * (x["weight"][0, 0] + 1.3 * x["bias"][0])
        ),
    )
    with pytest.raises(GradientError, match="the norm of the hyper-gradient is inf"):
        exact({"weight": W, "bias": B}, steep).step()


def test_an_infinite_slope_names_its_leaf() -> None:
    steep = BilevelProblem(
        problem_of().lower,
        lambda x, solution: (
            solution.policy[0, 0] + x["weight"].sum() + (x["bias"] - B).abs().sum().sqrt()
        ),
    )
    for make in (exact, newton):
        with pytest.raises(GradientError, match=r"hyper-gradient of x\['bias'\] is nan"):
            make({"weight": W, "bias": B}, steep).step()


@pytest.mark.parametrize("other", [*FORMS, "tensor"])
@every
@forms
def test_a_state_of_another_form_is_refused(make: Any, form: str, other: str) -> None:
    algorithm = make(FORMS[form], problem_of())
    state = make(FORMS.get(other, START), problem_of()).state_dict()
    before = vector(algorithm.x)
    lists = {"list", "tuple", "named tuple"}
    if form == other or {form, other} <= lists:  # a list, when it is stored
        algorithm.load_state_dict(state)
    else:
        with pytest.raises(OptionError, match=r"the stored x is a (list|dict|tensor)") as raised:
            algorithm.load_state_dict(state)
        assert len(str(raised.value)) < 300
    assert_same_bits(vector(algorithm.x), before, label="x")


@every
@pytest.mark.parametrize("wrong", [START[:-1], START.float()])
def test_a_state_of_another_shape_or_dtype_is_refused(make: Any, wrong: Tensor) -> None:
    algorithm = make(START, problem_of())
    kind: Any = DtypeError if wrong.shape == START.shape else ShapeError
    with pytest.raises(kind, match="the stored x is a tensor"):
        algorithm.load_state_dict({**algorithm.state_dict(), "x": wrong})
    assert_same_bits(vector(algorithm.x), START, label="x")


class Normed(Net):
    """A module that counts, in a buffer, how often it was asked."""

    asked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("asked", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        self.asked += 1
        return super().forward()


@every
def test_a_failed_step_leaves_no_trace(make: Any) -> None:
    """Neither in x nor in the buffers of a module, nor in what else the next step starts from."""
    fails = False

    def upper(x: Any, solution: Solution) -> Tensor:
        near = (x.weight - 0.3).square().sum() + (x.bias + 0.1).square().sum()
        if fails and not (make is newton and torch.is_grad_enabled()):  # of a step it tries
            raise RuntimeError("upper fails")
        return near - solution.log_policy[:, 0].mean()

    algorithm = make(Normed(), BilevelProblem(lambda x: BASE.replace(reward=x()), upper))
    for _ in range(2):
        algorithm.step()
    asked = int(algorithm.x.asked)
    before = algorithm.state_dict()
    gradients = [leaf.grad for leaf in leaves(algorithm.x)]
    fails = True
    with pytest.raises(RuntimeError, match="upper fails"):
        algorithm.step()
    assert int(algorithm.x.asked) == asked > 0
    assert_same_state(algorithm.state_dict(), before)
    fails = False
    if make is not newton:
        (group,) = algorithm.optimiser.param_groups
        group["lr"] = math.inf
        with pytest.raises(NonFiniteResultError, match="after a step of the Adam"):
            algorithm.step()
        group["lr"] = 0.1
        assert_same_state(algorithm.state_dict(), before)
    assert all(leaf.grad is g for leaf, g in zip(leaves(algorithm.x), gradients, strict=True))
    algorithm.step()
    assert int(algorithm.x.asked) > asked


def test_one_radius_for_leaves_of_far_sizes_is_refused() -> None:
    """φ does not see a step that rounding takes off one of them."""
    algorithm = zero_order({"weight": W, "bias": B + 1e20}, problem_of())
    with pytest.raises(
        OptionError, match=r"radius is 0\.001, which rounding takes off x\['bias'\]"
    ):
        algorithm.step()


def test_names_and_places() -> None:
    x = {"a": torch.zeros(2, 3), "b": torch.zeros(()), 3: torch.zeros(1)}
    assert [*named(x)] == ["x['a']", "x['b']", "x[3]"]
    assert [entry(x, i) for i in (0, 5, 6, 7)] == [
        "x['a'][0, 0]",
        "x['a'][1, 2]",
        "x['b']",
        "x[3][0]",
    ]
    numbers = torch.arange(8.0)
    assert_same_bits(joined(split(numbers, x)), numbers, label="split and joined")
    assert [part.shape for part in split(numbers, x)] == [leaf.shape for leaf in x.values()]


SHOWN = {
    "list": "list([0]: (3, 2), [1]: (2,))",
    "tuple": "tuple([0]: (3, 2), [1]: (2,))",
    "named tuple": "Pair([0]: (3, 2), [1]: (2,))",
    "dict": "dict(['weight']: (3, 2), ['bias']: (2,))",
    "module": "Net(.weight: (3, 2), .bias: (2,))",
}


@every
@forms
def test_repr_shows_the_form(make: Any, form: str) -> None:

    assert f"(x={SHOWN[form]}" in repr(make(FORMS[form], problem_of()))


def test_repr_of_many_leaves_is_a_line() -> None:
    many = [torch.zeros(2, 2) for _ in range(9)]
    shown = repr(exact(many, problem_of()))
    assert shown == "MSoBiRL(x=list(9 tensors of 36 numbers), mode='exact', steps=0)"
    learner = DRLHFUpdate(RewardNetwork.table(3, 2), optimiser=sgd)
    assert re.fullmatch(r"DRLHFUpdate\(x=RewardNetwork\(\..*: \(3, 2\)\), steps=0\)", repr(learner))


# From samples


@forms
def test_sampled_forms_take_the_steps_of_the_vector(form: str) -> None:
    def run(start: Any) -> Tensor:
        problem = SampledProblem(
            lambda x: parts(x)[0] + parts(x)[1],
            lambda x, paths: (
                parts(x)[0].square().sum() * (paths[0].action[:, 0] == paths[1].action[:, 0])
                + parts(x)[1].sum()
            ),
            steps=2,
        )
        algorithm = StocSoBiRLDescent(
            problem,
            FiniteSimulator(BASE, torch.Generator().manual_seed(1)),
            start,
            discount=0.8,
            temperature=0.5,
            optimiser=sgd,
            effort=Effort(8, 4, 4),
        )
        for _ in range(3):
            algorithm.step()
        return vector(algorithm.x)

    assert_close(run(FORMS[form]), run(START), bound=1e-10, label="x")


# What the levels are handed


@every
def test_kernels_are_known_inside_the_upper_level(make: Any) -> None:
    """The names of those that solved; none where nothing did."""
    seen: set[tuple[str, ...]] = set()

    def upper(x: Tensor, solution: Solution) -> Tensor:
        seen.add(solution.kernels)
        assert solution.problem().kernels == solution.kernels
        return x.square().sum() - solution.log_policy[:, 0].mean()

    make(START, BilevelProblem(problem_of().lower, upper)).step()
    if make is published:
        assert seen == {()}
    else:
        assert len(seen) == 1
        assert {name for names in seen for name in names} <= {kernel.name for kernel in Kernel}
        assert seen != {()}
