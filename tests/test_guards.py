"""What the bilevel algorithms refuse, by name and value, with x to the bit what it was."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import untyped
from closeness import assert_close, assert_same_bits, assert_same_state
from torch import Tensor, nn

from birl_ext.agents.networks import MLP
from birl_ext.agents.target import Target
from birl_ext.agents.temperature import Temperature, discrete_entropy_target
from birl_ext.bilevel import (
    BilevelProblem,
    DampedNewton,
    MSoBiRL,
    ZeroOrder,
    geometric,
    hypergradient_report,
)
from birl_ext.bilevel.guards import reaches
from birl_ext.bilevel.newton import _undetermined
from birl_ext.bilevel.score import FullHorizon
from birl_ext.bilevel.sobirl import DRLHFUpdate, SoBiRLUpdate
from birl_ext.bilevel.stoc_sobirl import Effort, SampledProblem, StocSoBiRLDescent
from birl_ext.errors import (
    AccuracyWarning,
    BirlError,
    DtypeError,
    GradientError,
    NonFiniteInputError,
    NonFiniteResultError,
    OptionError,
    ParameterError,
    ShapeError,
    TemperatureError,
    UndeterminedError,
)
from birl_ext.model.mdp import DenseMDP
from birl_ext.preferences.buffer import PreferenceBuffer
from birl_ext.preferences.loss import bradley_terry
from birl_ext.preferences.reward_model import RewardEnsemble, RewardNetwork
from birl_ext.preferences.schedule import QuerySchedule
from birl_ext.preferences.teachers import ScriptedTeacher, TeacherRule
from birl_ext.problems.random_mdp import RandomMDPConfig
from birl_ext.problems.sampled_random_mdp import sampled_random_mdp

S, A = 4, 2
GENERATOR = torch.Generator().manual_seed(0)
P = torch.rand(S, A, S, generator=GENERATOR, dtype=torch.float64).softmax(-1)
BASE = DenseMDP(torch.rand(S, A, generator=GENERATOR, dtype=torch.float64), P, 0.9)
START = torch.linspace(-1, 1, S * A, dtype=torch.float64)
NAN, INF = math.nan, math.inf


def lower(x: Tensor) -> DenseMDP:
    return BASE.replace(reward=x.reshape(S, A))


def upper(x: Tensor, solution: Any) -> Tensor:
    return x.square().sum() - solution.log_policy[:, 0].mean()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=1.0, max_iter=20)


def exact(problem: BilevelProblem, x: Tensor = START, **options: Any) -> MSoBiRL:
    settings: dict[str, Any] = {"temperature": 0.5, "optimiser": sgd, "accuracy": INF, **options}
    return MSoBiRL(problem, x, **settings)


def published(problem: BilevelProblem, x: Tensor = START, **options: Any) -> MSoBiRL:
    return exact(problem, x, **{"mode": "published", **options})


def newton(problem: BilevelProblem, x: Tensor = START, **options: Any) -> DampedNewton:
    options.pop("optimiser", None)
    return DampedNewton(problem, x, **{"temperature": 0.5, **options})


def zero_order(problem: BilevelProblem, x: Tensor = START, **options: Any) -> ZeroOrder:
    settings: dict[str, Any] = {"temperature": 0.5, "optimiser": sgd, "radius": 0.1, **options}
    return ZeroOrder(problem, x, **settings)


ALL = (exact, published, newton, zero_order)
OPTIMISED = (exact, published, zero_order)
every = pytest.mark.parametrize("make", ALL)
optimised = pytest.mark.parametrize("make", OPTIMISED)


def assert_refused(
    kind: type[BirlError], words: str, make: Callable[..., Any], *arguments: Any, **options: Any
) -> None:
    """Refused at construction or in the first step, with everything as it was."""
    kept = START.clone()
    made: list[Any] = []

    def attempt() -> None:
        algorithm = make(*arguments, **options)
        made.append((algorithm, algorithm.state_dict()))
        algorithm.step()

    with pytest.raises(kind, match=words) as caught:
        attempt()
    assert_same_bits(START, kept, label="the start is not the algorithm's")
    assert ". Fix: " in str(caught.value) or "allowed" in str(caught.value)
    for algorithm, before in made:
        after = algorithm.state_dict()
        for name in ("x", "value", "flow", "generator", "q", "simulator"):
            assert_same_state(after.get(name), before.get(name), name)
        assert getattr(algorithm, "steps", 0) == 0


# Temperatures


@every
@pytest.mark.parametrize("tau", [0.0, -1.0, NAN, INF, torch.tensor(0.0), torch.tensor(NAN)])
def test_temperatures_are_named(make: Any, tau: Any) -> None:
    assert_refused(
        TemperatureError, "temperature is", make, BilevelProblem(lower, upper), temperature=tau
    )


@every
@pytest.mark.parametrize("tau", ["warm", None])
def test_temperatures_are_numbers(make: Any, tau: Any) -> None:
    assert_refused(
        DtypeError, "temperature is", make, BilevelProblem(lower, upper), temperature=tau
    )


@pytest.mark.parametrize("make", [exact, published])
@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (0.0, TemperatureError),
        (-0.5, TemperatureError),
        (NAN, TemperatureError),
        (torch.tensor(-1.0), TemperatureError),
        (None, DtypeError),
    ],
)
def test_schedules_are_checked_at_every_step(make: Any, last: Any, kind: Any) -> None:
    """The step that passes zero is named; the next one with a good τ goes on from there."""
    taus = [1.0, 0.7, 0.4, last]
    algorithm = make(BilevelProblem(lower, upper), temperature=lambda step: taus[step])
    other = make(BilevelProblem(lower, upper), temperature=lambda step: [1.0, 0.7, 0.4, 0.2][step])
    for _ in range(3):
        algorithm.step()
        other.step()
    before = algorithm.state_dict()
    with pytest.raises(kind, match=r"temperature is .* at outer step 3 of the schedule"):
        algorithm.step()
    assert_same_bits(algorithm.x.detach(), before["x"], label="x")
    taus[3] = 0.2
    algorithm.step()
    other.step()
    assert_same_bits(algorithm.x.detach(), other.x.detach(), label="x of the step taken after all")


@pytest.mark.parametrize("make", [exact, published])
def test_a_temperature_too_small_for_a_gradient_is_refused(make: Any) -> None:
    assert_refused(
        GradientError,
        "(gradient|returned) is",
        make,
        BilevelProblem(lower, upper),
        temperature=1e-320,
    )


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, NAN), (INF, 1.0), ("a", 1.0)])
def test_the_ends_of_a_continuation_are_temperatures(ends: Any) -> None:
    with pytest.raises(TemperatureError, match=r"(start|end) is"):
        geometric(*ends, 10)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"steps is 1\.5"):
        geometric(1.0, 0.1, 1.5)  # type: ignore[arg-type]


# Levels


def detached(x: Tensor, solution: Any) -> Tensor:
    return solution.value.detach().sum() - solution.policy.detach().square().sum()


def unseen(x: Tensor, solution: Any) -> Tensor:
    with torch.no_grad():
        return upper(x, solution)


NOWHERE = {
    "detached": detached,
    "no grad": unseen,
    "constant": lambda x, solution: torch.tensor(3.0, dtype=torch.float64),
    "another leaf": lambda x, solution: torch.ones((), dtype=torch.float64, requires_grad=True) * 2,
    "argmax": lambda x, solution: solution.policy.argmax(-1).double().sum(),
    "copied": lambda x, solution: torch.tensor(solution.value.tolist()).sum(),
}


@every
@pytest.mark.parametrize("name", NOWHERE)
def test_an_objective_without_a_path_to_x_is_refused(make: Any, name: str) -> None:
    words = "objective does not depend on x, neither directly nor through the solution"
    assert_refused(GradientError, words, make, BilevelProblem(lower, NOWHERE[name]))


def frozen(x: Tensor) -> DenseMDP:
    with torch.no_grad():
        return lower(x)


DEAF = {
    "constant": lambda x: BASE,
    "detached": lambda x: lower(x.detach()),
    "no grad": frozen,
    "another leaf": lambda x: lower(torch.zeros(S * A, dtype=torch.float64, requires_grad=True)),
    "copied": lambda x: lower(torch.tensor(x.tolist(), dtype=torch.float64)),
}


@every
@pytest.mark.parametrize("name", DEAF)
def test_a_lower_level_that_does_not_reach_x_is_refused(make: Any, name: str) -> None:
    """Also beside an objective that depends on x directly: its gradient would miss a part."""
    words = "lower level does not depend on x"
    assert_refused(GradientError, words, make, BilevelProblem(DEAF[name], upper))


ONLY = {
    "directly": lambda x, solution: (x.square() * torch.arange(1, 9)).sum(),
    "through the solution": lambda x, solution: solution.policy[:, 0].square().sum(),
    "through the value": lambda x, solution: solution.value.square().sum(),
}


@every
@pytest.mark.parametrize("name", ONLY)
def test_one_path_to_x_is_enough(make: Any, name: str) -> None:
    algorithm = make(BilevelProblem(lower, ONLY[name]))
    outcome = algorithm.step()
    assert float(outcome.gradient_norm) > 0


@pytest.mark.parametrize("make", [exact, zero_order])
def test_a_stationary_point_is_no_missing_path(make: Any) -> None:
    """Zero gradients are values: of a flat objective, at a minimum, behind a saturated policy."""
    for flat, start in (
        (lambda x, solution: x.square().sum(), torch.zeros_like(START)),
        (lambda x, solution: 0.0 * solution.value.sum(), START),
        (lambda x, solution: solution.policy[:, 0].sum(), 1e6 * START),
    ):
        algorithm = (
            make(BilevelProblem(lower, flat), start, radius=1e-9, temperature=1e-3)
            if (make is zero_order)
            else make(BilevelProblem(lower, flat), start, temperature=1e-3)
        )
        before = algorithm.x.detach().clone()
        for _ in range(2):
            outcome = algorithm.step()
            assert float(outcome.gradient_norm) < 1e-7
        assert_close(algorithm.x.detach(), before, bound=1e-6, label="x")


RETURNED = {
    "float": (lambda x, s: 1.0, DtypeError, "upper returned a float"),
    "None": (lambda x, s: None, DtypeError, "upper returned a NoneType"),
    "tuple": (lambda x, s: (x.sum(), 0), DtypeError, "upper returned a tuple"),
    "numpy": (lambda x, s: x.detach().numpy().sum(), DtypeError, "upper returned a float64"),
    "integer": (lambda x, s: x.sum().long(), DtypeError, "upper returned a tensor of torch.int64"),
    "vector": (lambda x, s: x, ShapeError, r"upper returned shape \(8,\)"),
    "table": (lambda x, s: s.policy, ShapeError, r"upper returned shape \(4, 2\)"),
    "NaN": (lambda x, s: x.sum() * NAN, GradientError, "`upper` returned is nan at outer|nan"),
    "infinite": (lambda x, s: x.sum() / 0.0, GradientError, "`upper` returned is (-?inf|nan)"),
    "outside": (
        lambda x, s: (x.sum() - 1).sqrt() - s.log_policy[:, 0].mean(),
        GradientError,
        "objective that `upper` returned is nan",
    ),
}


@every
@pytest.mark.parametrize("name", RETURNED)
def test_what_upper_returns_is_a_finite_scalar(make: Any, name: str) -> None:
    returned, kind, words = RETURNED[name]
    assert_refused(kind, words, make, BilevelProblem(lower, returned))


@every
def test_infinite_slopes_are_refused(make: Any) -> None:
    """φ is finite, its gradient is not: √ at zero."""

    def steep(x: Tensor, solution: Any) -> Tensor:
        return (x - START).abs().sum().sqrt() + solution.policy[0, 0]

    if make is zero_order:  # needs no slope
        return
    assert_refused(GradientError, "hyper-gradient is", make, BilevelProblem(lower, steep))


@pytest.mark.parametrize("make", [exact, published, zero_order])
def test_an_upper_level_that_becomes_nan_later_is_refused_then(make: Any) -> None:
    calls: list[int] = []

    def sick(x: Tensor, solution: Any) -> Tensor:
        calls.append(1)
        return upper(x, solution) * (NAN if healthy[0] == 0 else 1.0)

    healthy = [1]
    algorithm = make(BilevelProblem(lower, sick), optimiser=adam)
    for _ in range(2):
        algorithm.step()
    before = algorithm.state_dict()
    healthy[0] = 0
    with pytest.raises(GradientError, match=r"returned is nan at outer step 2"):
        algorithm.step()
    assert_same_bits(algorithm.x.detach(), before["x"], label="x")
    moments = algorithm.optimiser.state_dict()["state"][0]
    for name, value in before["optimiser"]["state"][0].items():
        assert torch.equal(moments[name], value), name


@every
@pytest.mark.parametrize(
    "returned", [(1, 2), None, BASE.reward, "MDP"], ids=["tuple", "None", "tensor", "text"]
)
def test_what_lower_returns_is_an_mdp(make: Any, returned: Any) -> None:
    words = f"lower returned a {type(returned).__name__}"
    assert_refused(DtypeError, words, make, BilevelProblem(lambda x: returned, upper))


@pytest.mark.parametrize("make", [exact, published, newton])
def test_a_reward_that_is_nan_is_named_as_such(make: Any) -> None:
    def broken(x: Tensor) -> DenseMDP:
        return BASE.replace(reward=x.reshape(S, A) * NAN, validate="off")

    assert_refused(NonFiniteInputError, "reward is nan", make, BilevelProblem(broken, upper))


def test_levels_are_functions() -> None:
    for levels in ((None, upper), (lower, 1.0), (BASE, upper)):
        with pytest.raises(OptionError, match=r"lower is (None|a DenseMDP) |upper is 1\.0 "):
            BilevelProblem(*levels)


def test_a_path_is_a_question_to_the_graph() -> None:
    x = torch.zeros(3, requires_grad=True)
    other = torch.zeros(3, requires_grad=True)
    assert reaches([x], x)
    assert reaches([None, 0.9, other, (x * 0).sum()], x)
    assert reaches([torch.stack([other.sum(), (x + other).relu()[0]])], x)
    assert not reaches([other, x.detach(), other.exp().sum()], x)
    chain = x
    for _ in range(20_000):  # no recursion
        chain = chain + 1
    assert reaches([chain], x)


# Starts and options


@every
@pytest.mark.parametrize(
    ("start", "kind", "words"),
    [
        (torch.zeros(8, dtype=torch.int64), DtypeError, "x has dtype int64"),
        (torch.zeros(8, dtype=torch.complex128), DtypeError, "x has dtype complex128"),
        ([0.0] * 8, DtypeError, r"x\[0\] is a float"),
        (0.0, DtypeError, "x is a float"),
        (START * NAN, NonFiniteInputError, r"x is nan at entry \[0\]"),
        (START / 0, NonFiniteInputError, "x is -?inf"),
    ],
    ids=["integer", "complex", "list", "float", "NaN", "infinite"],
)
def test_a_start_is_a_finite_tensor(make: Any, start: Any, kind: Any, words: str) -> None:
    assert_refused(kind, words, make, BilevelProblem(lower, upper), start)


OPTIONS = [
    (exact, "noise", -1.0),
    (exact, "noise", NAN),
    (exact, "noise", INF),
    (exact, "noise", "loud"),
    (exact, "noise", True),
    (exact, "seed", True),
    (zero_order, "seed", False),
    (published, "sweeps", 1.5),
    (published, "sweeps", 0),
    (published, "sweeps", -3),
    (published, "sweeps", True),
    (published, "sweeps", "many"),
    (published, "adjoint_rate", NAN),
    (published, "adjoint_rate", -0.5),
    (published, "adjoint_rate", 0.0),
    (published, "tol", NAN),
    (published, "tol", -1.0),
    (exact, "tol", INF),
    (exact, "accuracy", 0.0),
    (exact, "accuracy", NAN),
    (exact, "seed", 1.5),
    (exact, "seed", -1),
    (exact, "mode", "fast"),
    (newton, "damping", -1.0),
    (newton, "damping", NAN),
    (newton, "damping", INF),
    (zero_order, "radius", 0.0),
    (zero_order, "radius", NAN),
    (zero_order, "radius", INF),
    (zero_order, "radius", 10**400),
    (zero_order, "seed", 0.5),
]


@pytest.mark.parametrize(("make", "name", "value"), OPTIONS)
def test_options_are_named(make: Any, name: str, value: Any) -> None:
    assert_refused(OptionError, f"{name} is ", make, BilevelProblem(lower, upper), **{name: value})


@every
@pytest.mark.parametrize("problem", [None, (lower, upper)], ids=["None", "tuple"])
def test_problems_are_named(make: Any, problem: Any) -> None:
    assert_refused(OptionError, "problem is .*allowed: a BilevelProblem", make, problem)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (2, 2), (3, 2, 2), (2, 2, 2)])
def test_zero_order_differences_are_one_per_start(shape: tuple[int, ...]) -> None:
    """Z along the first axis: (φ(x + uZ) − φ(x))/u is its inner product with each start's slope."""
    starts = shape[:1] if len(shape) > 1 else ()
    size = torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64).reshape(shape)

    def total(x: Tensor) -> Tensor:
        return (size * x).reshape(*starts, -1).sum(-1)

    def bottom(x: Tensor) -> DenseMDP:
        return BASE.replace(reward=BASE.reward + 0 * x.sum())

    problem = BilevelProblem(bottom, lambda x, _: total(x))
    algorithm = zero_order(problem, torch.zeros(shape, dtype=torch.float64))
    kept = algorithm.generator.get_state()
    _, gradient = algorithm.estimate()
    algorithm.generator.set_state(kept)
    z = torch.randn(shape, generator=algorithm.generator, dtype=torch.float64)
    want = total(z).reshape((*starts, *[1] * (len(shape) - len(starts)))) * z
    assert_close(gradient, want, bound=1e-9, label="estimate")
    algorithm.generator.set_state(kept)
    norm = want.reshape(*starts, -1).norm(dim=-1)
    assert_close(algorithm.step().gradient_norm, norm, bound=1e-9, label="norm")


# Optimisers


class Deaf(torch.optim.SGD):
    """Takes a closure and does not ask it."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


class Closed(torch.optim.SGD):
    """Takes no closure."""

    def step(self) -> None:  # type: ignore[override]
        super().step()


class Rash(torch.optim.SGD):
    """Moves, then fails."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise RuntimeError("out of luck")


OPTIMISERS = {
    "number": (0.1, "optimiser is 0.1"),
    "name": ("adam", "optimiser is 'adam'"),
    "built": (torch.optim.SGD([START.clone().requires_grad_()]), "optimiser is a SGD"),
    "None": (None, "optimiser is None"),
    "nothing returned": (lambda p: None, "optimiser returned None"),
    "class returned": (lambda p: torch.optim.SGD, "optimiser returned a type"),
    "refused": (lambda p: torch.optim.SGD(p, lr=-1.0), "raised ValueError: Invalid learning rate"),
    "arguments": (lambda p: torch.optim.SGD(p, rate=1.0), "optimiser raised TypeError"),  # type: ignore[call-arg]
    "failed": (lambda p: {}["adam"], "optimiser raised KeyError"),  # type: ignore[index]
    "no such": (lambda p: torch.optim.Eve(p), "optimiser raised AttributeError"),  # type: ignore[attr-defined]
    "broken": (lambda p: torch.zeros(2) @ torch.zeros(3), "optimiser raised RuntimeError"),
    "another tensor": (
        lambda p: sgd([torch.zeros(8, dtype=torch.float64, requires_grad=True)]),
        "SGD of `optimiser` steps other tensors",
    ),
    "a copy": (
        lambda p: sgd([t.detach().clone().requires_grad_() for t in p]),
        "SGD of `optimiser` steps other tensors",
    ),
    "deaf": (lambda p: Deaf(p, lr=0.1), "Deaf of `optimiser` did not ask for a gradient"),
    "closed": (lambda p: Closed(p, lr=0.1), "Closed of `optimiser` raised TypeError"),
    "rash": (lambda p: Rash(p, lr=0.1), "Rash of `optimiser` raised RuntimeError: out of luck"),
}


@optimised
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_are_checked(make: Any, name: str) -> None:
    optimiser, words = OPTIMISERS[name]
    assert_refused(OptionError, words, make, BilevelProblem(lower, upper), optimiser=optimiser)


@optimised
def test_a_step_to_infinity_is_taken_back(make: Any) -> None:
    def steep(x: Tensor, solution: Any) -> Tensor:
        return 1e10 * upper(x, solution)

    assert_refused(
        NonFiniteResultError,
        "after a step of the SGD of `optimiser` x is .*Fix: lower the learning rate",
        make,
        BilevelProblem(lower, steep),
        optimiser=lambda p: torch.optim.SGD(p, lr=1e308),
    )


@optimised
def test_a_step_to_where_the_levels_fail_is_named(make: Any) -> None:
    """x stays finite; its square, which `lower` takes, does not."""
    problem = BilevelProblem(lambda x: lower(x.square().square()), upper)
    algorithm = make(problem, optimiser=lambda p: torch.optim.SGD(p, lr=1e90))
    algorithm.step()
    words = r"BIRL-E403 steps of the SGD .* made ‖x‖ .*e\+.*Fix: lower the learning rate"
    with pytest.raises(NonFiniteResultError, match=words):
        algorithm.step()


def test_a_step_that_failed_leaves_the_optimiser_as_it_was() -> None:
    """Taken again, it ends with the bits of a run in which nothing failed."""
    fails = [False]

    class Late(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            if fails[0]:
                raise RuntimeError("too late")
            return found

    runs = [
        exact(BilevelProblem(lower, upper), optimiser=lambda p: Late(p, lr=0.1)) for _ in range(2)
    ]
    for k in range(3):
        for run in runs:
            if run is runs[0]:
                fails[0] = True
                with pytest.raises(OptionError, match="too late"):
                    run.step()
                fails[0] = False
            run.step()
        assert_same_bits(runs[0].x, runs[1].x, label=f"x after step {k}")


@pytest.mark.parametrize("make", [exact, published])
def test_only_the_published_mode_has_an_adjoint_rate_to_lower(make: Any) -> None:
    def steep(x: Tensor, solution: Any) -> Tensor:
        return upper(x, solution) + (x - x.detach()).abs().sqrt().sum()

    with pytest.raises(GradientError, match="Fix: look for") as caught:
        make(BilevelProblem(lower, steep)).step()
    assert ("adjoint_rate" in str(caught.value)) == (make is published)


@optimised
def test_an_optimiser_that_has_moved_x_before_the_error_is_taken_back(make: Any) -> None:
    """LBFGS asks again at points of its own; the second is outside the domain of φ."""
    asked: list[Tensor] = []

    def fragile(x: Tensor, solution: Any) -> Tensor:
        here = x.detach().clone()
        if not any(torch.equal(here, point) for point in asked):
            asked.append(here)
        value = upper(x, solution)
        limit = 3 if make is zero_order else 1
        return value if len(asked) <= limit else value * NAN

    assert_refused(
        GradientError,
        "returned is nan at outer step 0",
        make,
        BilevelProblem(lower, fragile),
        optimiser=lbfgs,
    )
    assert len(asked) > 1


def test_an_optimiser_whose_groups_are_swapped_later_is_refused() -> None:
    algorithm = exact(BilevelProblem(lower, upper))
    algorithm.step()
    algorithm.x = algorithm.x.detach().clone().requires_grad_()
    before = algorithm.x.detach().clone()
    with pytest.raises(OptionError, match="steps other tensors"):
        algorithm.step()
    assert_same_bits(algorithm.x.detach(), before, label="x")


NO_NUMBERS = ("a", None, NAN, -1, torch.ones(2), [1])
MAKERS: dict[str, Any] = {
    "target_rate": lambda v: Target(nn.Linear(2, 2), rate=v, period=1),
    "target_period": lambda v: Target(nn.Linear(2, 2), rate=1, period=v),
    "temperature": Temperature,
    "share": lambda v: discrete_entropy_target(3, v),
    "discount": lambda v: FullHorizon(untyped(None), discount=v, steps=1),
    "capacity": PreferenceBuffer,
    "noise": lambda v: bradley_terry(torch.ones(2), torch.ones(2), v),
    "rounds": lambda v: QuerySchedule("constant", v, 10),
    "epsilon": lambda v: Effort.for_accuracy(v, 0.9),
    "inputs": lambda v: MLP(v, 2, generator=torch.Generator()),
    "outputs": lambda v: MLP(2, 2, hidden=(v,), generator=torch.Generator()),
    "states": lambda v: RewardNetwork.table(v, 2),
    "count": lambda v: RewardEnsemble.of(v, lambda: RewardNetwork.table(2, 2)),
}


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_number_of_its_kind_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"BIRL-E20\d {name} is "):
        MAKERS[name](value)


@pytest.mark.parametrize("value", ["a", NAN, torch.ones(2), [1]], ids=repr)
def test_a_mean_reward_is_one_number(value: Any) -> None:
    with pytest.raises(OptionError, match="mean_reward is "):
        ScriptedTeacher(TeacherRule.oracle(), torch.Generator(), mean_reward=value)


def test_what_is_of_another_kind_is_refused_by_name() -> None:
    reward, start = RewardNetwork.table(2, 2), torch.ones(2)
    for words, make in (
        (r"members\[0\] is 3", lambda: RewardEnsemble(untyped([3]))),
        ("reward is a Linear", lambda: DRLHFUpdate(untyped(nn.Linear(2, 2)), optimiser=sgd)),
        (
            "pairs is 3",
            lambda: DRLHFUpdate(reward, optimiser=sgd).step(untyped(3), None, temperature=1.0),
        ),
        ("reward is 3", lambda: SampledProblem(untyped(3), untyped(4))),
        ("problem is 3", lambda: hypergradient_report(untyped(3), start, 0.5)),
    ):
        with pytest.raises(OptionError, match=rf"BIRL-E203 {words} "):
            make()


# Accuracy


def test_a_published_run_that_misses_its_accuracy_says_so_and_warns_once() -> None:
    algorithm = published(BilevelProblem(lower, upper), accuracy=1e-3)
    with pytest.warns(AccuracyWarning, match=r"certified error .* in outer step 0, and a") as seen:
        assert algorithm.run(1)[0].missed
    assert [warning.filename for warning in seen] == [__file__], "not a line of the package"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            outcome = algorithm.step()
            assert outcome.missed
            assert float(outcome.relative_error) > 1e-3


def test_a_run_that_keeps_its_accuracy_is_quiet() -> None:
    def resting(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)

    base = DenseMDP(BASE.reward, P, 0.3)
    problem = BilevelProblem(lambda x: base.replace(reward=x.reshape(S, A)), upper)
    algorithm = published(problem, optimiser=resting)
    for _ in range(200):
        algorithm.step()
    algorithm.accuracy = 0.05
    outcome = algorithm.step()
    assert not outcome.missed
    assert float(outcome.relative_error) <= 0.05
    assert not exact(BilevelProblem(lower, upper), accuracy=1e-9).step().missed


@pytest.mark.parametrize("make", [exact, published])
def test_every_certified_error_is_positive_and_no_nan(make: Any) -> None:
    for tau in (1e-300, 1e-12, 1e-3, 1.0, 1e12):
        algorithm = make(BilevelProblem(lower, upper), temperature=tau)
        try:
            error = float(algorithm.step().relative_error)
        except GradientError:
            continue
        assert error >= 0, tau


# Reports


@pytest.mark.parametrize("smoothness", [0.0, 0, -1.0, NAN, -INF, "smooth", None, True])
def test_a_smoothness_that_is_none_is_refused(smoothness: Any) -> None:
    problem = BilevelProblem(lower, upper)
    for report in (
        lambda: hypergradient_report(problem, START, 0.5, smoothness=smoothness),
        lambda: exact(problem).hypergradient_report(smoothness),
        lambda: published(problem).hypergradient_report(smoothness=smoothness),
    ):
        with pytest.raises(OptionError, match=r'smoothness is .*smoothness="linear"'):
            report()


@pytest.mark.parametrize("make", [exact, published])
def test_a_bound_without_a_declaration_is_infinite(make: Any) -> None:
    """f = Σ sin(2000 π): its cotangents are anything within the error of π."""

    def wild(x: Tensor, solution: Any) -> Tensor:
        return (2000 * solution.policy).sin().sum()

    algorithm = make(BilevelProblem(lower, wild))
    report = algorithm.hypergradient_report()
    assert float(report.bound) == INF
    assert math.isfinite(float(report.adjoint_error))
    declared = algorithm.hypergradient_report(smoothness=2000.0**2)
    error = float((declared.estimate - declared.exact).norm())
    assert error <= float(declared.bound) < INF
    plain = make(BilevelProblem(lower, upper)).hypergradient_report(smoothness="linear")
    assert float((plain.estimate - plain.exact).norm()) <= float(plain.bound) < INF


def test_a_report_refuses_what_a_step_refuses() -> None:
    with pytest.raises(GradientError, match="objective does not depend on x"):
        hypergradient_report(BilevelProblem(lower, detached), START, 0.5)
    with pytest.raises(GradientError, match="lower level does not depend on x"):
        hypergradient_report(BilevelProblem(DEAF["constant"], upper), START, 0.5)
    with pytest.raises(TemperatureError, match="temperature is -1"):
        hypergradient_report(BilevelProblem(lower, upper), START, -1.0)
    with pytest.raises(NonFiniteInputError, match="x is nan"):
        hypergradient_report(BilevelProblem(lower, upper), START * NAN, 0.5)


# Newton's Hessian


def form(matrix: list[list[float]], linear: list[float] | None = None) -> BilevelProblem:
    """φ = ½ xᵀMx + bᵀx, beside a lower level that x reaches and φ does not look at."""
    m = torch.tensor(matrix, dtype=torch.float64)
    b = torch.zeros(len(m), dtype=torch.float64)
    if linear is not None:
        b = torch.tensor(linear, dtype=torch.float64)
    return BilevelProblem(
        lambda x: BASE.replace(reward=BASE.reward + 0 * x[0]),
        lambda x, _: x @ m @ x / 2 + b @ x,
    )


FLAT = {
    "a parameter that does nothing": ([[2.0, 0.0], [0.0, 0.0]], [0, 1]),
    "two that do the same": ([[1.0, 1.0], [1.0, 1.0]], [1, -1]),
    "in other units": ([[1.0, 1e-6], [1e-6, 1e-12]], [1e-6, -1]),
    "three": ([[2.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], [1, -1, -1]),
}


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_a_singular_hessian_names_the_direction(name: str, slope: float) -> None:
    """At once where φ slopes along it, and elsewhere once the rest is at its minimum."""
    matrix, along = FLAT[name]
    want = torch.tensor(along, dtype=torch.float64)
    start = torch.full((len(matrix),), 0.5, dtype=torch.float64)
    algorithm = DampedNewton(form(matrix, (slope * want).tolist()), start, temperature=1.0)

    def to_the_end() -> None:
        for _ in range(30):
            before.append(algorithm.x)
            assert algorithm.step().decrement == INF

    before: list[Tensor] = []
    for use in (algorithm.covariance, to_the_end, algorithm.covariance):
        with pytest.raises(UndeterminedError, match=r"Hessian is singular.* in x\[1\]") as caught:
            use()
        got = torch.tensor(caught.value.direction, dtype=torch.float64)
        cosine = float((got @ want).abs() / got.norm() / want.norm())
        assert cosine == pytest.approx(1, abs=1e-12)
    assert_same_bits(algorithm.x, before[-1], label="x")
    if slope:
        assert_same_bits(algorithm.x, start, label="x")
    else:
        m = torch.tensor(matrix, dtype=torch.float64)
        assert_close(m @ algorithm.x, torch.zeros(len(m)).double(), bound=1e-6, label="gradient")


def test_an_indefinite_hessian_gives_no_standard_errors() -> None:
    algorithm = DampedNewton(
        form([[2.0, 0.0], [0.0, -1.0]]), torch.zeros(2, dtype=torch.float64), temperature=1.0
    )
    for use in (algorithm.covariance, algorithm.step):  # a saddle: no step promises anything
        with pytest.raises(UndeterminedError, match=r"indefinite: curvature -1 .* 1 in x\[1\]"):
            use()
    assert_same_bits(algorithm.x, torch.zeros(2, dtype=torch.float64), label="x")


def test_an_indefinite_hessian_on_the_way_is_no_obstacle() -> None:
    """φ = (x² − 1)² + y² from near its maximum in x."""
    problem = BilevelProblem(
        lambda x: BASE.replace(reward=BASE.reward + 0 * x[0]),
        lambda x, _: (x[0] ** 2 - 1) ** 2 + x[1] ** 2,
    )
    algorithm = DampedNewton(problem, torch.tensor([0.1, 0.3]).double(), temperature=1.0)
    with pytest.raises(UndeterminedError, match="indefinite"):
        algorithm.covariance()
    for _ in range(30):
        algorithm.step()
    assert_close(algorithm.x, torch.tensor([1.0, 0.0]).double(), bound=1e-9, label="minimiser")
    assert_close(
        algorithm.covariance(), torch.tensor([[1 / 8, 0], [0, 0.5]]).double(), bound=1e-8, label="Σ"
    )


def test_an_objective_that_is_linear_in_x_has_no_newton_step() -> None:
    start = torch.ones(2, dtype=torch.float64)
    algorithm = DampedNewton(form([[0.0] * 2] * 2, [1.0, 2.0]), start, temperature=1.0)
    for use in (algorithm.step, algorithm.covariance):
        with pytest.raises(
            UndeterminedError,
            match=r"singular: curvature 0 .* 1 in x\[1\], 0\.5 in x\[0\], and a slope",
        ):
            use()
    assert_same_bits(algorithm.x, start, label="x")


def test_badly_scaled_parameters_are_still_determined() -> None:
    scale = torch.tensor([1.0, 1e-3, 1e3]).double()
    well = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.5]]).double()
    algorithm = DampedNewton(
        form((well * scale * scale.unsqueeze(-1)).tolist()),
        torch.zeros(3, dtype=torch.float64),
        temperature=1.0,
    )
    want = torch.linalg.inv(well) / scale / scale.unsqueeze(-1)
    assert_close(algorithm.covariance() / want, torch.ones(3, 3).double(), bound=1e-9, label="Σ")


@pytest.mark.parametrize("unit", [1e-12, 3e-8, 1e-8, 1e7, 1e8, 1e12])
def test_units_of_x_far_apart_make_no_hessian_singular(unit: float) -> None:
    moves = torch.full((2, 2, 2), 0.5, dtype=torch.float64)
    problem = BilevelProblem(
        lambda x: DenseMDP(x[0] * torch.eye(2, dtype=torch.float64), moves, 0.9),
        lambda x, found: (x[0] - 1) ** 2 + (unit * x[1] - 1) ** 2 + 0 * found.policy.sum(),
    )
    algorithm = DampedNewton(problem, torch.zeros(2, dtype=torch.float64), temperature=1.0)
    outcome = algorithm.step()
    assert outcome.decrement == pytest.approx(4, rel=1e-9)
    for _ in range(10):
        algorithm.step()
    units = torch.tensor([1.0, unit], dtype=torch.float64)
    one = torch.eye(2, dtype=torch.float64)
    assert_close(algorithm.x * units, torch.ones(2).double(), bound=1e-6, label="minimiser")
    covariance = algorithm.covariance() * units * units.unsqueeze(-1)
    assert_close(covariance, one / 2, bound=1e-9, label="Σ")


def test_correlated_parameters_in_far_units_have_their_covariance() -> None:
    scale = torch.tensor([1.0, 1e-9, 1e9]).double()
    well = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.5]]).double()
    start = torch.zeros(3, dtype=torch.float64)
    matrix = (well * scale * scale.unsqueeze(-1)).tolist()
    algorithm = DampedNewton(form(matrix), start, temperature=1.0)
    want = torch.linalg.inv(well) / scale / scale.unsqueeze(-1)
    assert_close(algorithm.covariance() / want, torch.ones(3, 3).double(), bound=1e-9, label="Σ")


def test_a_curvature_that_is_rounding_is_no_other_unit() -> None:
    rounding = torch.tensor([[1.0, 1e-17], [0.0, 1e-17]], dtype=torch.float64)
    found = _undetermined(rounding, torch.tensor([0.0, 1.0]).double())
    assert found is not None
    assert found.singular
    assert found.sloping


def test_the_covariance_of_a_mean_is_that_of_the_sum() -> None:
    """A normal sample of 500, known variance 4: the mean's standard error is 2/√500."""
    sample = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def likelihood(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        return of((2 * sample - x[0]).square() / 8)

    def problem(of: Callable[[Tensor], Tensor]) -> BilevelProblem:
        return BilevelProblem(
            lambda x: BASE.replace(reward=BASE.reward + 0 * x[0]), lambda x, _: likelihood(x, of)
        )

    want = 2 / 500**0.5
    for of, mean_of in ((torch.sum, 1), (torch.mean, 500)):
        algorithm = DampedNewton(problem(of), torch.zeros(1).double(), temperature=1.0)
        for _ in range(8):
            algorithm.step()
        error = float(algorithm.covariance(mean_of=mean_of).sqrt())
        assert error == pytest.approx(want, rel=1e-9)
    with pytest.raises(OptionError, match=r"mean_of is 2\.5"):
        algorithm.covariance(mean_of=2.5)  # type: ignore[arg-type]


# From samples


def sampled(
    x: Tensor | None = None, *, reward: Any = None, loss: Any = None, **options: Any
) -> Any:
    problem, simulator, _, start = sampled_random_mdp(
        RandomMDPConfig(states=4, actions=3, dimension=5)
    )
    own = options.pop("problem", ...)
    if own is ...:
        own = SampledProblem(
            reward or problem.reward, loss or problem.loss, problem.paths, problem.steps
        )
    settings: dict[str, Any] = {
        "discount": 0.5,
        "temperature": 1.0,
        "optimiser": sgd,
        "effort": Effort(4, 3, 3),
        **options,
    }
    return StocSoBiRLDescent(own, simulator, start if x is None else x, **settings)


SAMPLED = {
    "temperature": ({"temperature": NAN}, TemperatureError, "temperature is nan"),
    "start": ({"x": torch.zeros(5).long()}, DtypeError, "x has dtype"),
    "deaf": ({"reward": lambda x: torch.zeros(4, 3).double()}, GradientError, "lower level does"),
    "reward": ({"reward": lambda x: x.sum() * NAN * torch.ones(4, 3)}, BirlError, "reward is nan"),
    "list": ({"reward": lambda x: [1.0]}, DtypeError, "reward is a list"),
    "loss": ({"loss": lambda x, paths: 1.0}, DtypeError, "loss is a float"),
    "NaN": ({"loss": lambda x, paths: x.sum() * NAN * torch.ones(4)}, GradientError, "is nan"),
    "copy": ({"optimiser": OPTIMISERS["a copy"][0]}, OptionError, "steps other tensors"),
    "number": ({"optimiser": 0.1}, OptionError, "optimiser is 0.1"),
    "deaf optimiser": ({"optimiser": OPTIMISERS["deaf"][0]}, OptionError, "did not ask"),
    "matrix": ({"x": torch.zeros(5, 2).double()}, ShapeError, r"x has shape \(5, 2\)"),
    "number of x": ({"x": torch.tensor(0.5)}, ShapeError, r"x has shape \(\)"),
    "wide": ({"reward": lambda x: x.sum() * torch.ones(4, 7)}, ShapeError, "reward has shape"),
    "state reward": ({"reward": lambda x: x.sum() * torch.ones(4)}, ShapeError, "reward has shape"),
    "effort": ({"effort": 4}, OptionError, "effort is 4"),
    "problem": ({"problem": None}, OptionError, "problem is None"),
    "pair": ({"problem": (lower, upper)}, OptionError, "problem is a tuple"),
    "own words": (
        {"reward": lambda x: torch.zeros(4, 3).double()},
        GradientError,
        "what `reward` and `transition` returned",
    ),
    "own loss": (
        {"loss": lambda x, paths: x.sum() * NAN * torch.ones(4)},
        GradientError,
        "`loss` returned",
    ),
    "baseline": ({"baseline": "median"}, OptionError, "baseline is 'median'"),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_runs_are_refused_alike(name: str) -> None:
    options, kind, words = SAMPLED[name]
    assert_refused(kind, words, sampled, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 1.5, -2, NAN, "many"])
def test_efforts_are_whole_numbers(value: Any) -> None:
    for name in ("batch", "horizon", "sweeps"):
        with pytest.raises(OptionError, match=f"{name} is "):
            Effort(**{"batch": 1, "horizon": 1, "sweeps": 1, name: value})
    for name in ("paths", "steps"):
        with pytest.raises(OptionError, match=f"{name} is "):
            SampledProblem(lambda x: x, lambda x, paths: x, **{name: value})


@pytest.mark.parametrize("of", [SoBiRLUpdate, DRLHFUpdate])
@pytest.mark.parametrize(
    ("name", "value"),
    [("noise", -0.1), ("noise", NAN), ("noise", "loud"), ("lead", 0.5), ("lead", -1)],
)
def test_options_of_learned_rewards_are_named(of: Any, name: str, value: Any) -> None:
    options: dict[str, Any] = {"score": None} if of is SoBiRLUpdate else {}
    with pytest.raises(OptionError, match=f"{name} is "):
        of(RewardNetwork.table(2, 2), optimiser=sgd, **options, **{name: value})
    for optimiser, words in (OPTIMISERS["number"], OPTIMISERS["a copy"], OPTIMISERS["None"]):
        with pytest.raises(OptionError, match=words):
            of(RewardNetwork.table(2, 2), optimiser=optimiser, **options)


def test_a_radius_that_rounding_takes_off_x_is_refused() -> None:
    algorithm = zero_order(BilevelProblem(lower, upper), radius=1e-17)
    before = algorithm.state_dict()
    with pytest.raises(OptionError, match="radius is 1e-17, which rounding takes off x"):
        algorithm.step()
    assert torch.equal(algorithm.x.detach(), before["x"])
    assert torch.equal(algorithm.generator.get_state(), before["generator"])


@every
def test_where_a_process_starts_is_no_way_to_its_policy(make: Any) -> None:
    def started(x: Tensor) -> DenseMDP:
        mdp = lower(x.detach())
        start = x.flatten()[: mdp.states].softmax(-1)
        return mdp.replace(initial_distribution=start)

    assert_refused(
        GradientError,
        "lower level does not depend on x",
        make,
        BilevelProblem(started, lambda x, solution: solution.policy[0, 0] + x.square().sum()),
    )


@every
def test_a_run_stops_at_its_tolerance_and_tells(make: Any) -> None:
    told: list[tuple[int, Any]] = []
    algorithm = make(BilevelProblem(lower, upper))
    found = algorithm.run(3, tell=lambda number, outcome: told.append((number, outcome)))
    assert [number for number, _ in told] == [1, 2, 3][: len(found)]
    assert all(one is other for (_, one), other in zip(told, found, strict=True))
    norm = float(torch.as_tensor(found[-1].gradient_norm).max())
    other = make(BilevelProblem(lower, upper))
    assert len(other.run(3, tol=10 * norm + 1e9)) == 1
    with pytest.raises(OptionError, match="tol is -1"):
        algorithm.run(1, tol=-1)
    with pytest.raises(OptionError, match="steps is 0"):
        algorithm.run(0)
    before = algorithm.state_dict()
    with pytest.raises(OptionError, match=r"tell is 3 .*a function"):
        algorithm.run(1, tell=untyped(3))
    assert_same_bits(algorithm.state_dict()["x"], before["x"], label="no step was taken")


@every
def test_a_run_shows_how_far_it_is(make: Any, capfd: Any, monkeypatch: Any) -> None:
    """In lines where there is no terminal, some time apart; in a bar on one; or not at all."""
    algorithm = make(BilevelProblem(lower, upper))
    algorithm.run(2)
    assert capfd.readouterr() == ("", ""), "ten seconds have not passed"
    monkeypatch.setattr("birl_ext.bilevel.algorithm.LINES", 0.0)
    algorithm.run(2, progress=False)
    assert capfd.readouterr() == ("", "")
    (outcome, *_) = algorithm.run(2)
    out, err = capfd.readouterr()
    assert not out
    name, phi = type(algorithm).__name__, float(outcome.objective)
    norm = float(outcome.gradient_norm)
    assert err.splitlines()[0] == f"{name} 1/2  φ {phi:.4g}  ‖∇φ‖ {norm:.4g}"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    algorithm.run(2, progress=False)
    assert not terminal.getvalue()
    algorithm.run(2)
    shown = terminal.getvalue()
    assert name in shown
    assert "‖∇φ‖" in shown


def test_what_is_shown_of_many_starts_is_the_least_and_the_largest(
    capfd: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("birl_ext.bilevel.algorithm.LINES", 0.0)
    problem = BilevelProblem(
        lambda x: BASE.replace(reward=x.reshape(-1, S, A)),
        lambda x, solution: x.square().sum(-1) - solution.log_policy[..., 0].mean(-1),
    )
    (outcome,) = exact(problem, torch.stack((START, 2 * START))).run(1)
    assert outcome.objective.shape == (2,)
    least, largest = float(outcome.objective.min()), float(outcome.gradient_norm.max())
    assert capfd.readouterr().err == f"MSoBiRL 1/1  φ {least:.4g}  ‖∇φ‖ {largest:.4g}\n"


@pytest.mark.parametrize("make", [exact, published])
def test_a_tolerance_saves_passes_and_is_certified(make: Any) -> None:
    """Both modes end their sweeps once V is known to `tol`, and say how well π is."""
    problem, wide = BilevelProblem(lower, upper), {"sweeps": 400}
    loose, tight = make(problem, tol=1e-3, **wide), make(problem, **wide)
    few, many = loose.step(), tight.step()
    assert few.sweeps < many.sweeps
    assert float(few.relative_error) > float(many.relative_error)
    report = loose.hypergradient_report(smoothness="linear")
    error = float((report.estimate - report.exact).norm())
    assert 0 < error <= float(report.bound) < INF
    if make is exact:
        solution = problem.evaluate(START, 0.5)[1]
        assert few.sweeps <= int(solution.iterations)
        assert float(many.relative_error) < 1e-12 < float(few.relative_error) < 0.1


@every
def test_repr_of_an_algorithm_is_a_line(make: Any) -> None:
    shown = repr(make(BilevelProblem(lower, upper)))
    assert re.fullmatch(r"(MSoBiRL|DampedNewton|ZeroOrder)\(x=\(8,\).*\)", shown), shown
