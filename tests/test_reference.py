"""The oracles agree with each other, with closed forms, and with their own definitions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from cases import SMALL, Case, problems
from flint import arb, ctx
from oracle import exact, float64
from oracle.exact import Cotangents, Model

EPS = np.finfo(np.float64).eps


def one(case: Case) -> dict:
    """The first problem of a case as keyword arguments of the oracles."""
    return next(problems(case.mdp(), case.temperature))[1]


def near(got: np.ndarray, want: np.ndarray, bound: float) -> bool:
    same = got == want
    return bool(
        np.all(same | (np.abs(np.where(same, 0.0, got) - np.where(same, 0.0, want)) <= bound))
    )


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float64_agrees_with_512_bits(case: Case) -> None:
    arguments = one(case)
    got = float64.solve(**arguments)
    want = exact.solve(Model.of(**arguments)).floats()
    size = 1 + np.abs(want.value).max()
    bound = 8 * case.states * EPS * size / (1 - case.discount)
    assert near(got.value, want.value, bound)
    assert near(got.q, want.q, bound)
    assert near(got.policy, want.policy, 4 * bound / case.temperature)
    assert near(got.log_policy, want.log_policy, 4 * bound / case.temperature)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_512_bits_satisfy_the_bellman_equation(case: Case) -> None:
    """V(s) = τ log Σ μ exp(Q/τ), checked in the form Σ_a μ exp((Q − V)/τ) = 1, from the inputs."""
    arguments = one(case)
    answer = exact.solve(Model.of(**arguments))
    assert answer.error < 1e-100
    terminal = arguments["terminal"]
    mask, reference = arguments["mask"], arguments["reference"]
    with ctx.workprec(512):
        for s in range(case.states):
            own = slice(s * case.actions, (s + 1) * case.actions)
            policy, log_policy = answer.policy[own], answer.log_policy[own]
            ends = terminal is not None and terminal[s]
            if ends and mask is not None:  # in these cases such a state has no action at all
                assert answer.value[s] == 0
                assert policy == [1, *[0] * (case.actions - 1)]
                continue
            total = arb(0)
            for a in range(case.actions):
                if mask is not None and not mask[s, a]:
                    assert log_policy[a] is None
                    continue
                row = [arb(float(p)) for p in arguments["transition"][s, a]]
                mean = sum((p * v for p, v in zip(row, answer.value, strict=True)), arb(0))
                ahead = arb(0) if ends else mean / sum(row, arb(0))
                q = arb(float(arguments["reward"][s, a])) + arb(case.discount) * ahead
                weight = arb(1) if reference is None else arb(float(reference[s, a]))
                weight *= ((q - answer.value[s]) / arb(case.temperature)).exp()
                assert abs(weight - policy[a]) < 1e-100
                total += weight
            assert abs(total - 1) < 1e-100


def test_closed_form_of_one_state() -> None:
    reward, discount, temperature = [[0.3, -1.2]], 0.95, 0.25
    log_sum = math.log(math.exp(0.3 / 0.25) + math.exp(-1.2 / 0.25))
    want = temperature * log_sum / (1 - discount)
    arguments = {"discount": discount, "temperature": temperature}
    assert float64.solve(reward, [[[1.0], [1.0]]], **arguments).value[0] == pytest.approx(
        want, 1e-13
    )
    model = Model.of(reward, [[[1.0], [1.0]]], **arguments)
    assert float(exact.solve(model).value[0]) == pytest.approx(want, rel=1e-13)


def differences(model: Model, arguments: dict, cotangents: Cotangents, name: str) -> np.ndarray:
    """dL by every entry of one input, by differences."""

    def objective(_: Model, answer: exact.Answer) -> dict:
        total = arb(0)
        for field in ("value", "q", "policy", "log_policy"):
            if (weights := getattr(cotangents, field)) is not None:
                pairs = zip(np.ravel(weights).tolist(), getattr(answer, field), strict=True)
                total += sum((arb(w) * x for w, x in pairs if x is not None), arb(0))
        return {"L": [total]}

    found = np.zeros(np.shape(arguments[name]))
    for place in np.ndindex(found.shape):
        step = np.zeros(found.shape)
        step[place] = 1.0
        found[place] = exact.slopes(model, {name: step}, objective).first["L"][0]
    return found


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_adjoint_equals_differences(case: Case) -> None:
    case = dataclasses.replace(case, states=min(case.states, 3))
    rng = np.random.default_rng(case.seed)
    shape = (case.states, case.actions)
    arguments = one(case)
    model = Model.of(**arguments)
    cotangents = Cotangents(
        rng.normal(size=case.states), *(rng.normal(size=shape) for _ in range(3))
    )
    for name, ours in exact.gradients(model, cotangents)._asdict().items():
        if arguments[name] is None:
            continue
        # with one action nothing moves the policy; with one state there is one distribution
        assert np.abs(ours).max() > 0 or 1 in shape, name
        theirs = differences(model, arguments, cotangents, name)
        # two ways in 512 bits: what is left is the rounding to float64
        assert near(ours, theirs, 4e-16 * np.abs(theirs).max() + 1e-70), name


@pytest.mark.parametrize("field", ["value", "q", "policy", "log_policy"])
def test_each_cotangent_alone_has_the_right_gradient(field: str) -> None:
    arguments = one(Case(states=3, actions=2, mask=True, terminal=True, reference=True, seed=3))
    model = Model.of(**arguments)
    weights = np.arange(1.0, 4.0) if field == "value" else np.arange(1.0, 7.0).reshape(3, 2)
    cotangents = Cotangents(**{field: weights})
    for name, ours in exact.gradients(model, cotangents)._asdict().items():
        theirs = differences(model, arguments, cotangents, name)
        assert near(ours, theirs, 4e-16 * np.abs(theirs).max() + 1e-70), name


def test_transition_gradient_keeps_row_sums() -> None:
    arguments = one(Case(terminal=True, seed=4))
    gradient = exact.gradients(Model.of(**arguments), Cotangents(value=np.ones(6))).transition
    assert np.abs((gradient * arguments["transition"]).sum(-1)).max() < 1e-14
    assert (gradient[-1] == 0).all()
    assert (np.abs(gradient[:-1]).max(-1) > 0).all()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_hard_bracket_contains_the_soft_value(case: Case) -> None:
    arguments = one(case)
    low, high = float64.hard_bracket(**arguments)
    value = float64.solve(**arguments).value
    slack = 1e-12 * (1 + np.abs(value).max()) / (1 - case.discount)
    assert (low - slack <= value).all()
    assert (value <= high + slack).all()


def test_hard_bracket_is_tight_as_the_temperature_falls() -> None:
    arguments = {**one(Case(seed=1)), "temperature": 1e-7}
    low, high = float64.hard_bracket(**arguments)
    assert near(float64.solve(**arguments).value, low, 1e-5)
    assert (high - low).max() < 1e-5


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_policy_value_and_occupancy_are_dual(case: Case) -> None:
    """ρᵀJ = Σ_s d(s) Σ_a π r / (1−γ); without terminal states the occupancy has mass one."""
    arguments = one(case)
    policy = float64.solve(**arguments).policy
    reward, transition = arguments["reward"], arguments["transition"]
    terminal, discount = arguments["terminal"], case.discount
    start = np.full(case.states, 1 / case.states)
    value = float64.evaluate(policy, reward, transition, discount=discount, terminal=terminal)
    visits = float64.occupancy(
        policy, transition, discount=discount, initial_distribution=start, terminal=terminal
    )
    assert (visits >= 0).all()
    if terminal is None:
        assert visits.sum() == pytest.approx(1.0, abs=1e-11)
    else:
        assert visits.sum() < 1
    gain = np.where(policy > 0, policy * reward, 0.0).sum(1)
    assert start @ value == pytest.approx(visits @ gain / (1 - discount), rel=1e-9)


def test_evaluate_with_entropy_gives_the_soft_value() -> None:
    """The soft value is the plain value of π* under the reward r − τ log(π/μ)."""
    arguments = one(Case(reference=True, seed=2))
    best = float64.solve(**arguments)
    entropy = -arguments["temperature"] * (best.log_policy - np.log(arguments["reference"]))
    value = float64.evaluate(
        best.policy, arguments["reward"] + entropy, arguments["transition"], discount=0.9
    )
    assert near(value, best.value, 1e-12)


def test_values_behind_the_mask_and_in_terminal_rows_are_not_read() -> None:
    arguments = one(Case(mask=True, terminal=True, reference=True, seed=6))
    want = float64.solve(**arguments), exact.solve(Model.of(**arguments)).floats()
    dirty = dict(arguments)
    hidden = ~arguments["mask"]
    for name in ("reward", "reference"):
        dirty[name] = np.where(hidden, np.nan, arguments[name])
    rows = (hidden | arguments["terminal"][:, None])[..., None]
    dirty["transition"] = np.where(rows, np.nan, arguments["transition"])
    got = float64.solve(**dirty), exact.solve(Model.of(**dirty)).floats()
    for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert np.array_equal(ours, theirs)


def test_rows_are_read_as_ratios() -> None:
    """Doubling is exact, so P/ΣP, and with it every bit of the answer, stays."""
    arguments = one(Case(seed=3))
    double = {**arguments, "transition": 2 * arguments["transition"]}
    for solve in (
        lambda given: float64.solve(**given),
        lambda given: exact.solve(Model.of(**given)).floats(),
    ):
        for ours, theirs in zip(solve(double), solve(arguments), strict=True):
            assert np.array_equal(ours, theirs)
