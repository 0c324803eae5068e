"""Each teacher's answers against its formula: exactly where it has no chance, and within five
standard deviations of the binomial where it has.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from preference_cases import fragments_with

from birl_ext.errors import NonFiniteInputError, OptionError, TeacherError
from birl_ext.preferences.buffer import PreferenceBuffer
from birl_ext.preferences.teachers import (
    TEACHERS,
    OwnTeacher,
    ScriptedTeacher,
    TeacherRule,
    register_teacher,
)
from birl_ext.problems.preference.config import SCRIPTED

COUNT = 20_000
H = 4


def ask(rule, first, second, *, seed=0, mean_reward=None):
    """Labels for rewards given as lists of steps, repeated COUNT times."""
    teacher = ScriptedTeacher(rule, torch.Generator().manual_seed(seed), mean_reward=mean_reward)
    sides = [fragments_with(torch.tensor(r).float().repeat(COUNT, 1)) for r in (first, second)]
    return teacher(*sides)


def assert_share(labels, value, share):
    found = int((labels == value).sum())
    if share in (0.0, 1.0):
        assert found == share * len(labels)
    spread = math.sqrt(len(labels) * share * (1 - share))
    assert abs(found - share * len(labels)) <= 5 * spread, (found / len(labels), share)


def test_the_six_have_the_published_parameters():
    assert list(TEACHERS) == ["oracle", "mistake", "noisy", "skip", "myopic", "equal"]
    ideal = TeacherRule()
    changed = {
        "oracle": {},
        "mistake": {"mistake_rate": 0.1},
        "noisy": {"rationality": 1.0},
        "skip": {"skip_share": 0.1},
        "myopic": {"discount": 0.9},
        "equal": {"tie_share": 0.1},
    }
    for name, rule in TEACHERS.items():
        for field in TeacherRule.__dataclass_fields__:
            want = changed[name].get(field, getattr(ideal, field))
            assert getattr(rule, field) == want, (name, field)


def test_the_oracle_is_always_right_and_ties_are_half():
    oracle = TEACHERS["oracle"]
    assert (ask(oracle, [0, 0, 0, 1.0], [0, 0, 0, 0.999]) == 1).all()
    assert (ask(oracle, [0, 0, 0, 1.0], [0, 0, 2.0, 0]) == 0).all()
    assert (ask(oracle, [1.0, 2, 3, 4], [4.0, 3, 2, 1]) == 0.5).all()


def test_one_answer_in_ten_is_a_mistake():
    labels = ask(TEACHERS["mistake"], [1.0, 0, 0, 0], [0.0, 0, 0, 0])
    assert_share(labels, 0, 0.1)
    assert_share(labels, 1, 0.9)
    assert (ask(TEACHERS["mistake"], [1.0] * H, [1.0] * H) == 0.5).all()


@pytest.mark.parametrize("gap", [0.0, 0.4, -1.3, 4.0, 400.0])
def test_the_noisy_one_is_boltzmann_with_unit_temperature(gap):
    labels = ask(TEACHERS["noisy"], [gap, 1.0, 0, 0], [0.0, 1.0, 0, 0])
    share = 1 / (1 + math.exp(-gap))
    assert_share(labels, 1, share)
    assert_share(labels, 0, 1 - share)


def test_boltzmann_divides_by_its_temperature():
    labels = ask(TeacherRule.boltzmann(2.5), [3.0, 0, 0, 0], [1.0, 0, 0, 0])
    assert_share(labels, 1, 1 / (1 + math.exp(-2 / 2.5)))


def test_boltzmann_on_signs_counts_points_not_their_size():
    rule = TeacherRule.boltzmann(sign_only=True)
    labels = ask(rule, [700.0, 0, 0, 0], [5.0, 5.0, 0, -0.1])
    assert_share(labels, 1, 0.5)
    labels = ask(rule, [700.0, 1.0, 0, 0], [5.0, 0, 0, 0])
    assert_share(labels, 1, 1 / (1 + math.exp(-1)))


def test_the_skipping_one_is_silent_where_both_are_poor():
    """Threshold .1 · H · r̄ = .1 · 4 · 5 = 2."""
    skip = TEACHERS["skip"]
    assert ask(skip, [1.9, 0, 0, 0], [0.5, 0, 0, 0], mean_reward=5.0).isnan().all()
    assert (ask(skip, [2.1, 0, 0, 0], [0.5, 0, 0, 0], mean_reward=5.0) == 1).all()
    assert (ask(skip, [0.0, 0, 0, 0], [0.5, 1.7, 0, 0], mean_reward=5.0) == 0).all()


def test_the_myopic_one_remembers_the_end():
    """Σ γ^(H−1−h) r: 10·.9³ = 7.29 against 7.2 or 7.4 at the last step."""
    myopic = TEACHERS["myopic"]
    assert (ask(myopic, [10.0, 0, 0, 0], [0.0, 0, 0, 7.2]) == 1).all()
    assert (ask(myopic, [10.0, 0, 0, 0], [0.0, 0, 0, 7.4]) == 0).all()


def test_myopia_counts_back_from_the_last_present_step():
    present = torch.tensor([[True, True, False, False]])
    first = fragments_with(torch.tensor([[1.0, 0, math.nan, 50]]), present)
    second = fragments_with(torch.tensor([[0.0, 0, 0, 0.91]]))
    teacher = ScriptedTeacher(TEACHERS["myopic"], torch.Generator())
    assert teacher(first, second).tolist() == [0]
    second.reward[0, 3] = 0.89
    assert teacher(first, second).tolist() == [1]


def test_the_equal_one_ties_what_is_near():
    """Threshold .1 · H · |r̄| = 2; the size of the difference counts, not that of the returns."""
    equal = TEACHERS["equal"]
    for mean in (5.0, -5.0):
        assert (ask(equal, [90.0, 0, 0, 1.9], [90.0, 0, 0, 0], mean_reward=mean) == 0.5).all()
        assert (ask(equal, [90.0, 0, 0, 2.1], [90.0, 0, 0, 0], mean_reward=mean) == 1).all()
        assert (ask(equal, [90.0, 0, 0, 0], [90.0, 0, 0, 2.1], mean_reward=mean) == 0).all()


def test_all_rules_together():
    """Boltzmann first, then mistakes: p = (1−ε)σ(β·gap) + ε(1−σ(β·gap))."""
    rule = TeacherRule(rationality=0.5, mistake_rate=0.2, discount=0.5)
    labels = ask(rule, [0.0, 0, 8.0, 0], [0.0, 0, 0, 1.0])
    share = 1 / (1 + math.exp(-0.5 * 3))
    assert_share(labels, 1, 0.8 * share + 0.2 * (1 - share))


def test_padding_is_not_looked_at():
    reward = torch.tensor([[1.0, math.nan], [5.0, 9.0]])
    first = fragments_with(reward, torch.tensor([[True, False], [True, False]]))
    second = fragments_with(torch.tensor([[2.0, 0], [3.0, 1.0]]))
    for rule in (TEACHERS["oracle"], TEACHERS["myopic"]):
        teacher = ScriptedTeacher(rule, torch.Generator())
        assert teacher(first, second).tolist() == [0, 1], rule
    # H of the threshold is that of the longer side: .1·2·10 = 2
    teacher = ScriptedTeacher(TEACHERS["skip"], torch.Generator(), mean_reward=10.0)
    labels = teacher(first, second)
    assert labels[0].isnan()
    assert labels[1] == 1


def test_skipped_answers_never_reach_the_buffer():
    teacher = ScriptedTeacher(TEACHERS["skip"], torch.Generator(), mean_reward=5.0)
    first = fragments_with(torch.tensor([[1.0, 0], [9.0, 0], [0.5, 0], [0.0, 0]]))
    second = fragments_with(torch.tensor([[0.5, 0], [0.0, 0], [0.5, 0], [0.0, 7.0]]))
    buffer = PreferenceBuffer(10)
    labels = teacher(first, second)
    assert labels.isnan().tolist() == [True, False, True, False]
    assert buffer.append(first, second, labels) == 2
    stored = buffer.everything()
    assert stored.label.tolist() == [1, 0]
    assert stored.first.reward.equal(first.reward[[1, 3]])
    assert buffer.append(first, second, torch.full((4,), math.nan)) == 0
    assert len(buffer) == 2


def test_on_signs_shares_are_of_the_mean_sign():
    """Threshold .8 · H · |r̄| = 1.6 points, whatever a point is worth."""
    skip = TeacherRule(skip_share=0.8, sign_only=True)
    assert ask(skip, [700.0, 0, 0, 0], [5.0, 0, 0, 0], mean_reward=0.5).isnan().all()
    assert (ask(skip, [700.0, 3.0, 0, 0], [5.0, 0, 0, 0], mean_reward=0.5) == 1).all()
    tie = TeacherRule(tie_share=0.8, sign_only=True)
    assert (ask(tie, [700.0, 0, 0, 0], [0.0] * H, mean_reward=-0.5) == 0.5).all()
    assert (ask(tie, [700.0, 3.0, 0, 0], [0.0] * H, mean_reward=-0.5) == 1).all()
    for mean in (5.0, -1.01, math.inf):
        with pytest.raises(OptionError, match=rf"mean_reward is {mean} \(allowed: \[-1, 1\]"):
            ask(tie, [1.0] * H, [0.0] * H, mean_reward=mean)
    with pytest.raises(OptionError, match="mean_reward is nan"):
        ask(tie, [1.0] * H, [0.0] * H, mean_reward=math.nan)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sign_only", [False, True])
def test_a_reward_that_is_not_finite_has_no_answer(bad, sign_only):
    """Nor does it cost the teacher a draw."""
    for name, rule in TEACHERS.items():
        rule = dataclasses.replace(rule, sign_only=sign_only)
        sides = [fragments_with(torch.zeros(3, H)) for _ in range(2)]
        teacher = ScriptedTeacher(rule, torch.Generator().manual_seed(0), mean_reward=0.5)
        for side, which in zip(sides, ("first", "second"), strict=True):
            side.reward[1, 2] = bad
            state = teacher.state_dict()
            where = f"true reward is {bad} at pair 1, step 2 of its {which} fragment"
            with pytest.raises(NonFiniteInputError, match=where):
                teacher(*sides)
            assert teacher.state_dict()["generator"].equal(state["generator"]), name
            side.present[1, 2] = False
        teacher(*sides)  # padding is not looked at


def test_an_unknown_mean_reward_is_asked_for():
    for name in ("skip", "equal"):
        with pytest.raises(OptionError, match="mean_reward is not known"):
            ask(TEACHERS[name], [1.0] * H, [0.0] * H)
    with pytest.raises(OptionError, match=r"mean_reward is -1\.0"):
        ask(TEACHERS["skip"], [1.0] * H, [0.0] * H, mean_reward=-1.0)
    with pytest.raises(OptionError, match="mean_reward is nan"):
        ask(TEACHERS["equal"], [1.0] * H, [0.0] * H, mean_reward=math.nan)


@pytest.mark.parametrize(
    "bad",
    [{"mistake_rate": 1.1}, {"rationality": -1}, {"discount": 1.01}, {"tie_share": math.nan}],
    ids=str,
)
def test_a_rule_refuses_numbers_out_of_range(bad):
    with pytest.raises(OptionError, match=next(iter(bad))):
        TeacherRule(**bad)


def test_a_teacher_resumes_to_the_same_bits():
    first, second = (fragments_with(torch.randn(50, H)) for _ in range(2))
    rule = TeacherRule(rationality=1.0, mistake_rate=0.1, tie_share=0.05)
    one = ScriptedTeacher(rule, torch.Generator().manual_seed(1), mean_reward=2.0)
    one(first, second)
    other = ScriptedTeacher(rule, torch.Generator().manual_seed(9), mean_reward=7.0)
    other.load_state_dict(one.state_dict())
    torch.manual_seed(5)  # the global generator has no say
    want = one(first, second)
    torch.manual_seed(6)
    assert other(first, second).equal(want)
    assert not one(first, second).equal(want), "chance goes on"


def answered(found, count=3):
    rows = fragments_with(torch.zeros(count, 2))
    return OwnTeacher(lambda first, second: found)(rows, rows)


@pytest.mark.parametrize(
    "found",
    [
        torch.tensor([1.0, 0.5, 0.0]),
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.float16, requires_grad=True),
        np.array([1.0, 0.5, 0.0]),
        np.array([1, 0.5, None], dtype=object),
        [1, 0.5, None],
        (True, np.float32(0.5), None),
        [True, np.float16(0.5), np.ma.masked],
        [torch.tensor(1), torch.tensor(0.5), False],
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.bfloat16),
        [Fraction(1), Fraction(1, 2), None],
        np.ma.masked_array([1, 0.5, 1], mask=[False, False, True]),
    ],
)
def test_an_own_teacher_answers_in_numbers_of_any_kind(found):
    label = answered(found)
    assert label.dtype == torch.float32
    silent = found[2] is None or found[2] is np.ma.masked
    want = [1.0, 0.5, math.nan if silent else 0.0]
    assert label.tolist() == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([0, 1, 2], r"answered 2 at pair 2 of 3 .allowed: the numbers 0, 1, 0\.5; None, in a list"),
        (torch.tensor([0, math.nan, 1]), "answered nan at pair 1 of 3"),
        ([None, 1, math.nan], "answered nan at pair 2 of 3"),
        ([-1, 1, 1], "answered -1 at pair 0 of 3"),
        ([0, 0.3, 1], "answered 0.3 at pair 1 of 3"),
        ([0, math.inf, 1], "answered inf at pair 1 of 3"),
        ([0, 1], r"answered list \(2,\) at a batch of 3 pairs .allowed: 3 numbers"),
        (torch.zeros(3, 1), r"answered Tensor \(3, 1\)"),
        (1, r"answered int \(\)"),
        (None, "answered NoneType"),
        (["first"] * 3, "answered 'first' at pair 0 of 3"),
        ([[0], [1, 2], 3], r"answered \[0\] at pair 0 of 3"),
        (["1", 1, 1], "answered '1' at pair 0 of 3 .allowed: the numbers 0"),
        (np.array([None, "0.5", 1]), "answered '0.5' at pair 1 of 3"),
        (np.array(["0.5"] * 3), "answered '0.5' at pair 0 of 3"),
        (np.ones(3, complex), r"answered \(1\+0j\) at pair 0 of 3"),
        (np.ones(3, "datetime64[s]"), "answered datetime"),
        ([1, 1 - 1e-9, 0], r"answered 0\.999999999 at pair 1 of 3"),
        ([10**400, 1, 1], r"answered 1000\S+000 at pair 0 of 3"),
        ([10**5000, 1, 1], "answered too long to print at pair 0 of 3"),
        ([torch.ones(2), 1, 1], r"answered tensor\(\[1\., 1\.\]\) at pair 0"),
        ({1: 1, 2: 1, 3: 1}, r"answered dict \(\)"),
        (b"111", r"answered bytes \(\)"),
    ],
)
def test_an_answer_that_is_none_names_its_pair(found, message):
    with pytest.raises(TeacherError, match=rf"BIRL-E903 the teacher \S+ {message}") as raised:
        answered(found)
    remedy = "answer 1" if " at pair " in str(raised.value) else "answer for all pairs at once"
    assert f". Fix: {remedy}" in str(raised.value)


def test_what_a_teacher_writes_into_fragments_changes_nothing():
    def spoils(first, second):
        for part in (*first, *second):
            part.zero_()
        return [1, 0, 1]

    rows = [fragments_with(torch.ones(3, 2)) for _ in range(2)]
    before = [part.clone() for side in rows for part in side]
    OwnTeacher(spoils)(*rows)
    for part, was in zip((*rows[0], *rows[1]), before, strict=True):
        assert torch.equal(part, was)


class Half:
    def __call__(self, first, second):
        return [1]

    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("oracle", "the teacher is builtins:str"),
        (Half, r"the teacher is the class \S+:Half .*Fix: give an object of it: Half\(…\)"),
        (lambda pairs: [1], r"does not take \(first, second\)"),
        (lambda first, second, third: [1], r"does not take \(first, second\): .*'third'"),
        (Half(), "has one of state_dict and load_state_dict .*both, or neither"),
    ],
)
def test_a_teacher_that_cannot_be_asked_is_refused_when_it_is_given(teacher, message):
    with pytest.raises(TeacherError, match=message):
        OwnTeacher(teacher)
    if not isinstance(teacher, type):  # of which each run makes one
        with pytest.raises(TeacherError, match=message):
            register_teacher("mine", teacher)


def test_what_a_teacher_raises_has_its_name():
    rows = fragments_with(torch.zeros(1, 1))
    with pytest.raises(TeacherError, match=r"teacher \S+ raised ZeroDivisionError: .*1 pairs"):
        OwnTeacher(lambda first, second: [1 // 0])(rows, rows)
    with pytest.raises(TeacherError, match=r"raised SystemExit: 3 at a batch of 1 pairs"):
        OwnTeacher(lambda first, second: sys.exit(3))(rows, rows)


def test_a_teacher_written_for_one_pair_is_told_that_it_is_given_many():
    rows = fragments_with(torch.zeros(2, 1))

    def one_by_one(first, second):
        return 1 if first.reward.sum(-1) > second.reward.sum(-1) else 0

    def alone(first, second):
        return 1

    with pytest.raises(TeacherError, match=r"is ambiguous .*is given many pairs at once"):
        OwnTeacher(one_by_one)(rows, rows)
    with pytest.raises(
        TeacherError, match=r"answered int \(\) .*for all pairs at once: each is a row"
    ):
        OwnTeacher(alone)(rows, rows)


class Forgetful(Half):
    def state_dict(self):
        return [][0]

    def load_state_dict(self, state):
        raise SystemExit(3)


def test_what_a_teacher_s_memory_raises_has_its_name():
    teacher = OwnTeacher(Forgetful())
    with pytest.raises(TeacherError, match=r"Forgetful raised IndexError: .* at its state_dict"):
        teacher.state_dict()
    with pytest.raises(TeacherError, match="raised SystemExit: 3 at its load_state_dict"):
        teacher.load_state_dict({"own": {}})


@pytest.mark.parametrize("name", ["", "noisy", "my:own", 3])
def test_a_teacher_cannot_take_another_s_name(name):
    with pytest.raises(OptionError, match="the teacher's name is"):
        register_teacher(name, lambda first, second: [1])


def test_the_settings_know_the_scripted_ones():
    assert tuple(TEACHERS) == SCRIPTED
