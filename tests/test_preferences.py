"""Fragments, the Bradley–Terry loss, schedules and queries, against formulas of their own."""

from __future__ import annotations

import functools
import math
from collections import Counter
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_cases import episode, fragments_with

from birl_ext.errors import OptionError, ShapeError
from birl_ext.preferences.fragments import Fragments, Pairs, cut, draw
from birl_ext.preferences.loss import accuracy, bradley_terry, fragment_returns, margins
from birl_ext.preferences.queries import Disagreement, Entropy, Uniform
from birl_ext.preferences.schedule import QuerySchedule

LENGTHS = [7, 3, 1, 10, 5, 6]

# Fragments


def assert_whole(found: Fragments, row: int, length: int) -> tuple[int, int]:
    """One fragment is consecutive steps of one episode; return (episode, start)."""
    present = found.present[row]
    size = int(present.sum())
    assert present.tolist() == [True] * size + [False] * (length - size)
    numbers, steps = found.observation[row, :size].long().unbind(-1)
    number, start = int(numbers[0]), int(steps[0])
    source = episode(number, LENGTHS[number])
    assert numbers.tolist() == [number] * size
    assert steps.tolist() == list(range(start, start + size))
    assert size == min(length, LENGTHS[number] - start)
    for name in ("action", "reward", "log_prob"):
        part = getattr(found, name)[row]
        assert part[:size].equal(getattr(source, name)[start : start + size]), name
        assert not part[size:].any(), name
    assert not found.observation[row, size:].any()
    assert int(found.version[row]) == 10 * number + start // 4, "that of the oldest step"
    return number, start


@pytest.mark.parametrize("length", [1, 3, 5, 25])
def test_a_cut_covers_every_step_once_and_crosses_no_end(length):
    found = cut([episode(i, n) for i, n in enumerate(LENGTHS)], length)
    places = [assert_whole(found, row, length) for row in range(len(found))]
    assert places == [(i, t) for i, n in enumerate(LENGTHS) for t in range(0, n, length)]
    assert found.observation.dtype == torch.uint8
    assert found.action.dtype == torch.int64


def test_a_draw_crosses_no_end_and_takes_each_place_equally_often():
    length, count = 4, 5_000
    episodes = [episode(i, n) for i, n in enumerate(LENGTHS)]
    found = draw(episodes, length, count, torch.Generator().manual_seed(3))
    places = Counter(assert_whole(found, row, length) for row in range(count))
    allowed = {(i, t) for i, n in enumerate(LENGTHS) for t in range(max(n - length + 1, 1))}
    assert set(places) == allowed
    share = 1 / len(allowed)
    bound = 5 * math.sqrt(count * share * (1 - share))
    for place, times in places.items():
        assert abs(times - count * share) < bound, (place, times)


def test_a_lead_is_what_happened_before_and_moves_nothing():
    episodes = [episode(1, 9), episode(2, 3), episode(3, 12)]
    plain, led = (
        draw(episodes, 4, 300, torch.Generator().manual_seed(0), lead=lead) for lead in (0, 3)
    )
    assert led.present.shape == (300, 7)
    after = led.after(3)
    for name, ours, theirs in zip(Fragments._fields, after, plain, strict=True):
        if name != "version":
            assert torch.equal(ours, theirs), name
    began = plain.observation[:, 0, 1].long()
    for row in range(300):
        number, start = int(plain.observation[row, 0, 0]), int(began[row])
        before = min(start, 3)
        assert led.present[row, :3].tolist() == [False] * (3 - before) + [True] * before
        steps = led.observation[row, 3 - before : 3]
        assert steps[:, 0].tolist() == [number] * before
        assert steps[:, 1].tolist() == list(range(start - before, start))
        assert led.reward[row, 3 - before : 3].tolist() == [
            100 * number + step for step in range(start - before, start)
        ]
        assert int(led.version[row]) == 10 * number + (start - before) // 4
    assert began.min() == 0
    assert began.max() > 3
    pairs = Pairs(led, led, torch.ones(300))
    assert torch.equal(pairs.after(3).second.action, plain.action)
    for wrong in (-1, 7):
        with pytest.raises(OptionError, match=f"lead is {wrong} \\(allowed: 0 to 6, of 7 steps"):
            led.after(wrong)
    with pytest.raises(OptionError, match="lead is -1"):
        draw(episodes, 4, 3, torch.Generator(), lead=-1)


def test_a_draw_follows_its_generator_and_no_other():
    episodes = [episode(i, n) for i, n in enumerate(LENGTHS)]
    torch.manual_seed(1)
    one = draw(episodes, 4, 50, torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    other = draw(episodes, 4, 50, torch.Generator().manual_seed(3))
    third = draw(episodes, 4, 50, torch.Generator().manual_seed(4))
    assert one.reward.equal(other.reward)
    assert not one.reward.equal(third.reward)


def test_an_empty_episode_has_no_fragments():
    found = draw([episode(0, 0), episode(1, 3)], 3, 20, torch.Generator())
    assert set(found.observation[..., 0].flatten().tolist()) == {1}
    with pytest.raises(OptionError, match="no steps"):
        cut([episode(0, 0)], 3)
    with pytest.raises(OptionError, match="length is 0"):
        cut([episode(0, 4)], 0)
    with pytest.raises(ShapeError, match=r"reward 3.*episode 0"):
        cut([episode(0, 4)._replace(reward=torch.zeros(3))], 2)


def test_sums_and_means_are_of_the_steps_that_are_present():
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    rows = fragments_with(torch.zeros(3, 4), present)
    rows.observation[~present] = math.nan  # whatever stands there
    for value in (rows.observation, rows.observation[..., 0], rows.action, rows.action == 1):
        for row in range(3):
            there = value[row][present[row]]
            assert torch.equal(rows.sum(value)[row], there.sum(0))
            torch.testing.assert_close(rows.mean(value)[row], there.float().mean(0))
    for wrong in (rows.observation[:2], rows.observation.sum(1), torch.tensor(1.0)):
        with pytest.raises(ShapeError, match=r"value has shape .*\(3, 4\), …"):
            rows.mean(wrong)


def test_pairs_are_selected_with_all_their_parts():
    pairs = Pairs(
        fragments_with(torch.randn(5, 2)), fragments_with(torch.randn(5, 2)), torch.rand(5)
    )
    some = pairs.select(torch.tensor([4, 1]))
    assert len(pairs) == 5
    assert len(some) == 2
    for part, whole in zip((*some.first, *some.second), (*pairs.first, *pairs.second), strict=True):
        assert part.equal(whole[[4, 1]])
    assert some.label.equal(pairs.label[[4, 1]])


# Bradley–Terry


@functools.cache
def exact(margin: float, label: float, noise: float) -> tuple[float, float]:
    """ℓ and dℓ/dz = −(y/p − (1−y)/(1−p))·(1−ε)σ(1−σ), from the definition, in 4400 digits: σ(1e4)
    differs from one in the 4343rd.
    """
    with mpmath.workdps(4400):
        share = 1 / (1 + mpmath.exp(-mpmath.mpf(margin)))
        p = (1 - mpmath.mpf(noise)) * share + mpmath.mpf(noise) / 2
        inner = (1 - mpmath.mpf(noise)) * share * (1 - share)
        loss = -(mpmath.log(p) * label if label else 0)
        loss -= mpmath.log(1 - p) * (1 - label) if label != 1 else 0
        return float(loss), float(-(label / p - (1 - label) / (1 - p)) * inner)


MARGINS = [0.0, 1e-9, -0.3, 2.0, -17.0, 40.0, 800.0, -1e4, 1e4]


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_formula_at_any_margin(noise, dtype):
    for label in (0.0, 0.5, 1.0, 0.25):
        margin = torch.tensor(MARGINS, dtype=dtype, requires_grad=True)
        found = bradley_terry(margin, torch.full((len(MARGINS),), label), noise)
        (slope,) = torch.autograd.grad(found.sum(), margin)
        found, eps = found.detach(), torch.finfo(dtype).eps
        for i, z in enumerate(margin.tolist()):
            want, steep = exact(z, label, noise)
            assert abs(float(found[i]) - want) <= 4 * eps * max(1, abs(want)), (z, label)
            assert abs(float(slope[i]) - steep) <= 8 * eps * max(1, abs(steep)), (z, label)


def test_the_slope_of_the_loss_is_its_finite_difference():
    margin = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    label = torch.rand(13, dtype=torch.float64)
    for noise in (0.0, 0.2):
        assert torch.autograd.gradcheck(lambda z, e=noise: bradley_terry(z, label, e), margin)
        assert torch.autograd.gradgradcheck(lambda z, e=noise: bradley_terry(z, label, e), margin)


def test_the_loss_refuses_what_it_cannot_mean():
    with pytest.raises(OptionError, match="noise is 1"):
        bradley_terry(torch.zeros(2), torch.zeros(2), 1.0)
    with pytest.raises(ShapeError, match="label"):
        bradley_terry(torch.zeros(2), torch.zeros(3))


def numpy_margins(table: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Pair by pair, step by step, in float64."""
    found = []
    for i in range(len(pairs)):
        total = 0.0
        for sign, side in ((1.0, pairs.first), (-1.0, pairs.second)):
            for h in range(side.present.shape[1]):
                if side.present[i, h]:
                    x = side.observation[i, h].double().numpy()
                    total += sign * float(np.tanh(x @ table)[int(side.action[i, h])])
        found.append(total)
    return np.array(found)


@pytest.mark.parametrize("padded", [False, True])
def test_margins_come_from_one_call_and_leave_padding_out(padded):
    table = torch.randn(3, 2, dtype=torch.float64)
    shape = (6, 5)
    present = torch.arange(5) < torch.tensor([5, 1, 3, 5, 2, 4])[:, None] if padded else None
    first = fragments_with(torch.zeros(shape), present)
    second = fragments_with(torch.zeros(6, 4))  # the two sides may differ in length
    if present is not None:
        first.observation[~present] = math.nan
    calls = []

    def reward(observation, action):
        calls.append(len(observation))
        every = torch.tanh(observation.double() @ table)
        return every.gather(1, action[:, None]).squeeze(1)

    pairs = Pairs(first, second, torch.ones(6))
    found = margins(reward, pairs)
    steps = int(first.present.sum()) + 24
    assert calls == [steps]
    assert np.abs(found.numpy() - numpy_margins(table.numpy(), pairs)).max() < 1e-13
    parts = margins(reward, pairs, at_once=7)
    assert calls[1:] == [7] * (steps // 7) + [steps % 7]
    assert torch.allclose(parts, found, rtol=1e-14)
    with pytest.raises(OptionError, match="at_once is 0"):
        margins(reward, pairs, at_once=0)


def test_returns_of_members_keep_their_axis():
    first, second = fragments_with(torch.zeros(4, 3)), fragments_with(torch.zeros(2, 3))
    second.present[1, 2] = False

    def reward(observation, action):
        return torch.stack([observation[:, 0], observation[:, 1], action.float()])

    ours, theirs = fragment_returns(reward, first, second)
    assert ours.shape == (3, 4)
    assert theirs.shape == (3, 2)
    assert torch.allclose(ours[1], first.observation[..., 1].sum(-1))
    assert torch.allclose(theirs[0, 1], second.observation[1, :2, 0].sum())
    with pytest.raises(ShapeError, match="the reward returned"):
        fragment_returns(lambda o, a: o, first)


def test_accuracy_counts_strict_answers_only():
    margin = torch.tensor([1.0, -1.0, 2.0, 0.0, 5.0])
    label = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0])
    assert float(accuracy(margin, label)) == 0.5
    assert math.isnan(float(accuracy(margin[2:3], label[2:3])))


# Schedules

KINDS = st.sampled_from(["constant", "hyperbolic", "inverse-linear"])


@given(KINDS, st.integers(1, 60), st.integers(0, 5000), st.floats(0, 1))
def test_a_schedule_spends_its_total_exactly_and_keeps_to_its_shares(kind, rounds, total, part):
    initial = int(part * total)
    counts = QuerySchedule(kind, rounds, total, initial).counts
    assert len(counts) == rounds
    assert sum(counts) + initial == total
    assert min(counts) >= 0
    last = max(rounds - 1, 1)
    weight = {
        "constant": lambda k: Fraction(1),
        "hyperbolic": lambda k: Fraction(last, last + k),
        "inverse-linear": lambda k: Fraction(1, 1 + k),
    }[kind]
    weights = [float(weight(k)) for k in range(rounds)]
    for k in range(rounds):
        share = (total - initial) * math.fsum(weights[: k + 1]) / math.fsum(weights)
        assert abs(sum(counts[: k + 1]) - share) <= 0.5 + 1e-6, k


def test_the_published_schedule_asks_for_2800_pairs_in_a_fifth_of_its_rounds():
    """9,000 nominal over 2,000 rounds, 600 at first: about 2,800 after 4e6 of 2e7 steps."""
    counts = QuerySchedule("hyperbolic", 2000, 9000, 600).counts
    found = 600 + sum(counts[:400])
    assert abs(found - (600 + 8400 * math.log(1.2) / math.log(2))) < 3


def test_a_schedule_refuses_what_it_cannot_do():
    for bad in (("steep", 3, 3), ("constant", 0, 3), ("constant", 3, 3, 4)):
        with pytest.raises(OptionError):
            QuerySchedule(*bad)


# Queries


def candidates(margin: torch.Tensor) -> tuple[Fragments, Fragments]:
    """One-step fragments; those of the first side have the margin as their observation."""
    first, second = (fragments_with(torch.zeros(len(margin), 1), size=1) for _ in range(2))
    first.observation.copy_(margin[:, None, None])
    second.observation.zero_()
    return first, second


def test_entropy_asks_where_the_answer_is_least_certain():
    first, second = candidates(torch.tensor([3.0, -0.1, 900.0, 0.0, -2.0, 0.5]))

    def reward(observation, action):
        return observation[:, 0]

    chosen = Entropy(reward)(first, second, 6, torch.Generator())
    assert chosen.tolist() == [3, 1, 5, 4, 0, 2]


def test_entropy_of_members_is_meaned_after_not_before():
    """Two members sure of opposite answers: the mean p is 1/2, the mean entropy nearly zero."""
    first, second = candidates(torch.tensor([8.0, 0.5]))

    def each(observation, action):
        return torch.stack([observation[:, 0], -observation[:, 0]])

    assert Entropy(each)(first, second, 1, torch.Generator()).tolist() == [1]
    assert Disagreement(each)(first, second, 1, torch.Generator()).tolist() == [0]


def test_disagreement_asks_where_the_spread_of_the_probabilities_is_largest():
    """Members c·z with c = 1, 2, 4; computed once more with numpy. Not the spread of the margins:
    that would be largest at 50, where all are sure."""
    margin = torch.tensor([50.0, 0.1, -1.0, 0.6, 3.0])
    factors = np.array([[1.0], [2.0], [4.0]])
    spread = (1 / (1 + np.exp(-factors * margin.numpy()))).std(0)
    first, second = candidates(margin)

    def each(observation, action):
        return torch.tensor(factors, dtype=torch.float32) * observation[:, 0]

    chosen = Disagreement(each)(first, second, 3, torch.Generator())
    assert chosen.tolist() == np.argsort(-spread)[:3].tolist()
    assert 0 not in chosen.tolist()


def test_uniform_queries_are_distinct_and_even():
    first, second = candidates(torch.zeros(10))
    generator = torch.Generator().manual_seed(0)
    times: Counter[int] = Counter()
    for _ in range(2000):
        chosen = Uniform()(first, second, 3, generator).tolist()
        assert len(set(chosen)) == 3
        times.update(chosen)
    bound = 5 * math.sqrt(2000 * 0.3 * 0.7)
    assert all(abs(times[i] - 600) < bound for i in range(10))
    with pytest.raises(OptionError, match="count is 11"):
        Uniform()(first, second, 11, generator)
