"""Reward models, the buffer and fitting: a reward is one function wherever it is used, and all
resumes to the same bits.
"""

from __future__ import annotations

import copy
import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import untyped
from preference_cases import fragments_with
from torch import nn

from birl_ext.errors import (
    DtypeError,
    NonFiniteResultError,
    OptionError,
    ShapeError,
)
from birl_ext.preferences.buffer import PreferenceBuffer
from birl_ext.preferences.fit import evaluate, fit
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.loss import bradley_terry, margins
from birl_ext.preferences.queries import Disagreement, Entropy
from birl_ext.preferences.reward_model import (
    RewardEnsemble,
    RewardModel,
    RewardNetwork,
    global_draws_from,
)
from birl_ext.runs.checkpoint import CheckpointStore

SIDE = 43


def weight(model: Any) -> torch.nn.Parameter:
    """Of a reward that is one linear layer."""
    return untyped(model.body.weight)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_cnn(seed: int = 0) -> RewardNetwork:
    return RewardNetwork.cnn((2, SIDE, SIDE), seeded(seed), actions=3, channels=4, width=8)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(256, (*shape, 2, SIDE, SIDE), dtype=torch.uint8)


def pixel_pairs(count: int, steps: int) -> Pairs:
    sides = [
        fragments_with(torch.randn(count, steps))._asdict() | {"observation": pixels(count, steps)}
        for _ in range(2)
    ]
    return Pairs(Fragments(**sides[0]), Fragments(**sides[1]), torch.randint(2, (count,)).float())


def linear_pairs(count: int, *, seed: int = 1) -> Pairs:
    """Answers that the reward x·(1, −2, 3) explains without exception."""
    generator = seeded(seed)
    truth = torch.tensor([1.0, -2.0, 3.0])
    sides = []
    for _ in range(2):
        observation = torch.randn(count, 4, 3, generator=generator)
        action = torch.randint(2, (count, 4), generator=generator)
        blank = fragments_with(observation @ truth)
        sides.append(blank._asdict() | {"observation": observation, "action": action})
    first, second = (Fragments(**side) for side in sides)
    label = (first.reward.sum(-1) > second.reward.sum(-1)).float()
    return Pairs(first, second, label)


def everything_in(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: part.clone() for name, part in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, part in one.items():
        assert part.equal(other[name]), name


# Modes


def models() -> dict[str, RewardModel]:
    return {
        "network": small_cnn(),
        "ensemble": RewardEnsemble([small_cnn(1), small_cnn(2)]),
    }


@pytest.mark.parametrize("name", models())
def test_no_use_of_a_reward_draws_or_moves_statistics(name):
    """Even where somebody has asked for training mode, of the model or of what it is part of."""
    model = models()[name]
    around = nn.ModuleList([model])
    pairs = pixel_pairs(4, 2)
    observation, action = pixels(6), torch.randint(3, (6,))
    for switch in (lambda: None, model.train, around.train, lambda: around.train(True)):
        switch()
        assert not any(module.training for module in model.modules())
        before, drawn = everything_in(model), torch.get_rng_state()
        first = model(observation, action)
        assert model(observation, action).equal(first), "dropout is at work"
        every = model.all_actions(observation)
        assert torch.allclose(every.gather(1, action[:, None])[:, 0], first, atol=1e-6)
        alone = torch.cat([model(observation[i : i + 1], action[i : i + 1]) for i in range(6)])
        assert torch.allclose(alone, first, atol=1e-5), "batch statistics are at work"
        margins(model, pairs).sum().backward()
        evaluate(model, pairs)
        Entropy(model)(pairs.first, pairs.second, 2, seeded())
        assert_same(before, everything_in(model))
        assert torch.get_rng_state().equal(drawn)


def test_an_ensemble_asked_in_training_mode_is_in_evaluation_mode():
    model = RewardEnsemble([small_cnn(1), small_cnn(2)]).train()
    pairs = pixel_pairs(4, 2)
    before = everything_in(model)
    Disagreement(model.each)(pairs.first, pairs.second, 2, seeded())
    one = model.std(pixels(3), torch.zeros(3, dtype=torch.int64))
    assert one.shape == (3,)
    assert_same(before, everything_in(model))


@pytest.mark.parametrize("name", models())
def test_training_mode_lasts_as_long_as_fitting(name):
    model = models()[name]
    observation, action = pixels(8), torch.randint(3, (8,))
    before = everything_in(model)
    with model.fitting():
        assert all(module.training for module in model.modules())
        assert not model(observation, action).equal(model(observation, action))
        with model.fitting():
            pass
        assert all(module.training for module in model.modules())
        model.eval()
        assert not any(module.training for module in model.modules())
    assert not any(module.training for module in model.modules())
    after = everything_in(model)
    moved = [n for n in after if "running" in n and not after[n].equal(before[n])]
    assert moved, "batch statistics move in fitting"
    with pytest.raises(ZeroDivisionError), model.fitting():
        raise ZeroDivisionError
    assert not any(module.training for module in model.train().modules())


# What a network computes


def test_pixels_are_divided_by_255_once():
    seen = []

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :2] * self.weight

    model = RewardNetwork(Body(), actions=2)
    observation = torch.tensor([[0, 51], [255, 102]], dtype=torch.uint8)
    want = torch.tensor([[0.0, 0.2], [1.0, 0.4]])
    assert torch.allclose(model.all_actions(observation), want)
    assert torch.allclose(model(observation, torch.tensor([1, 0])), torch.tensor([0.2, 1.0]))
    assert torch.allclose(RewardEnsemble([model, model]).all_actions(observation), want)
    assert model.all_actions(want * 255).equal(want * 255), "other numbers are not scaled"
    assert all(part.dtype == torch.float32 for part in seen)


def test_the_networks_are_their_formula():
    model = RewardNetwork.mlp(3, seeded(), actions=2, hidden=(5,))
    x = torch.randn(7, 3)
    w = {name: part.double().numpy() for name, part in model.state_dict().items()}
    hidden = np.tanh(x.double().numpy() @ w["body.1.weight"].T + w["body.1.bias"])
    want = hidden @ w["body.3.weight"].T + w["body.3.bias"]
    assert np.abs(model.all_actions(x).detach().numpy() - want).max() < 1e-6

    model = RewardNetwork.mlp(3, seeded(), action_size=2, hidden=(5,))
    action = torch.randn(7, 2)
    w = {name: part.double().numpy() for name, part in model.state_dict().items()}
    side = np.concatenate([x.double().numpy(), action.double().numpy()], 1)
    want = np.tanh(side @ w["body.1.weight"].T + w["body.1.bias"]) @ w["body.3.weight"].T
    want = want[:, 0] + w["body.3.bias"]
    assert np.abs(model(x, action).detach().numpy() - want).max() < 1e-6
    with pytest.raises(OptionError, match="continuous"):
        model.all_actions(x)

    table = RewardNetwork.table(4, 3)
    with torch.no_grad():
        weight(table).copy_(torch.arange(12.0).view(4, 3))
    assert table(torch.tensor([3, 0]), torch.tensor([2, 1])).tolist() == [11, 1]


def test_the_published_network_has_its_shape():
    """4 × 84 × 84 pixels, 9 actions."""
    model = RewardNetwork.cnn((4, 84, 84), seeded(), actions=9)
    convolutions = 16 * (4 * 49 + 16 * 25 + 16 * 9 + 16 * 9) + 4 * 16 + 4 * 2 * 16
    linear = 16 * 7 * 7 * 64 + 64 + 64 * 9 + 9
    assert sum(part.numel() for part in model.parameters()) == convolutions + linear
    kinds = Counter(type(module).__name__ for module in untyped(model.body))
    assert kinds == {
        "Conv2d": 4,
        "BatchNorm2d": 4,
        "LeakyReLU": 5,
        "Dropout": 4,
        "Flatten": 1,
        "Linear": 2,
    }
    assert {module.p for module in untyped(model.body) if isinstance(module, nn.Dropout)} == {0.5}
    observation = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    assert model.all_actions(observation).shape == (2, 9)
    with pytest.raises(ShapeError, match="43 × 43 or larger"):
        RewardNetwork.cnn((4, 42, 84), seeded(), actions=9)


def test_weights_follow_the_generator_and_leave_the_global_one_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = everything_in(RewardNetwork.mlp(3, seeded(5), actions=2))
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert_same(one, everything_in(RewardNetwork.mlp(3, seeded(5), actions=2)))
    other = everything_in(RewardNetwork.mlp(3, seeded(6), actions=2))
    assert not one["body.1.weight"].equal(other["body.1.weight"])
    generator = seeded(5)
    pair = RewardEnsemble.of(2, lambda: RewardNetwork.mlp(3, generator, actions=2))
    first, second = (everything_in(member) for member in pair.members)
    assert not first["body.1.weight"].equal(second["body.1.weight"])
    with pytest.raises(ZeroDivisionError), global_draws_from(generator):
        raise ZeroDivisionError


def test_wrong_shapes_are_refused():
    model = RewardNetwork.mlp(3, seeded(), actions=2)
    with pytest.raises(ShapeError, match="action has shape"):
        model(torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(ShapeError, match="action has shape"):
        model(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ShapeError, match="the body returned"):
        RewardNetwork(nn.Linear(3, 4), actions=2).all_actions(torch.zeros(4, 3))
    with pytest.raises(ShapeError, match="the body returned"):
        RewardNetwork(nn.Linear(5, 2), actions=None)(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(OptionError, match="action_size"):
        RewardNetwork.mlp(3, seeded())
    with pytest.raises(OptionError, match="no members"):
        RewardEnsemble([])


def constant(*values: float) -> RewardNetwork:
    model = RewardNetwork.table(1, len(values))
    with torch.no_grad():
        weight(model).copy_(torch.tensor([values]))
    return model


def test_an_ensemble_is_mean_and_spread_of_its_members():
    model = RewardEnsemble([constant(1.0, 5.0), constant(3.0, 5.0), constant(8.0, 5.0)])
    state, action = torch.tensor([0, 0]), torch.tensor([0, 1])
    assert model.each(state, action).tolist() == [[1, 5], [3, 5], [8, 5]]
    assert model(state, action).tolist() == [4, 5]
    assert torch.allclose(model.all_actions(state), torch.tensor([[4.0, 5.0]] * 2))
    want = torch.tensor([math.sqrt((9 + 1 + 16) / 3), 0.0])
    assert torch.allclose(model.std(state, action), want)


# Buffer


def numbered(numbers: Sequence[float]) -> tuple[Fragments, Fragments, torch.Tensor]:
    value = torch.tensor(numbers, dtype=torch.float32)
    sides = [fragments_with(value[:, None].repeat(1, 2) + shift) for shift in (0, 1000)]
    return sides[0], sides[1], (value.long() % 2).float()


def contents(buffer: PreferenceBuffer) -> list[int]:
    if not len(buffer):
        return []
    pairs = buffer.everything()
    numbers = pairs.first.reward[:, 0].long()
    assert pairs.second.reward[:, 1].long().equal(numbers + 1000)
    assert pairs.label.long().equal(numbers % 2)
    return numbers.tolist()


def test_normalised_members_count_in_units_of_their_own_spread() -> None:
    """And are fitted as they are: the loss sees `each`."""
    source = seeded()
    models = [RewardNetwork.mlp(3, source, actions=2, hidden=(5,)) for _ in range(2)]
    big = copy.deepcopy(models[1])
    with torch.no_grad():
        for parameter in untyped(big.body)[-1].parameters():
            parameter.mul_(100.0)
    observation, action = torch.randn(50, 3, generator=source), torch.arange(50) % 2
    plain, scaled = RewardEnsemble(models), RewardEnsemble([models[0], big])
    before = scaled.each(observation, action)
    one, other = plain.all_actions(observation), scaled.all_actions(observation)
    assert float((one - other).detach().abs().max()) > 1
    for ensemble in (plain, scaled):
        ensemble.normalise(observation, action)
    assert torch.equal(scaled.each(observation, action), before)
    want = (before / before.std(1, correction=0, keepdim=True)).mean(0)
    assert torch.allclose(scaled(observation, action), want)
    assert torch.allclose(scaled.all_actions(observation), plain.all_actions(observation))
    again = RewardEnsemble([models[0], big])
    again.load_state_dict(scaled.state_dict())
    assert torch.equal(again(observation, action), scaled(observation, action))
    gap = torch.autograd.grad(scaled(observation, action).sum(), list(big.parameters()))
    small = torch.autograd.grad(scaled.each(observation, action)[1].sum(), list(big.parameters()))
    for got, each in zip(gap, small, strict=True):
        assert torch.allclose(got, each / (2 * scaled.scale[1]), atol=1e-6)


def test_a_constant_member_is_left_as_it_is() -> None:
    model = RewardEnsemble([constant(3.0, 5.0)])
    model.normalise(*torch.zeros(2, 4, dtype=torch.int64))
    assert model.scale.tolist() == [1.0]


def test_the_oldest_pairs_make_room():
    model: list[Any] = []
    buffer, number = PreferenceBuffer(7), 0
    for size in (3, 0, 5, 1, 20, 2, 7, 6):
        numbers = list(range(number, number + size))
        number += size
        assert buffer.append(*numbered(numbers)) == size
        model = (model + numbers)[-7:]
        assert contents(buffer) == model
        assert len(buffer) == len(model)
        if model:
            chosen = buffer.sample(min(3, len(model)), seeded(number)).first.reward[:, 0]
            assert len(set(chosen.tolist()) & set(model)) == min(3, len(model))
    assert buffer.added == number


def test_unanswered_pairs_are_left_out():
    buffer = PreferenceBuffer(5)
    first, second, label = numbered([0, 1, 2, 3])
    label[1] = math.nan
    assert buffer.append(first, second, label) == 3
    assert contents(buffer) == [0, 2, 3]


def test_the_buffer_keeps_types_and_refuses_others():
    buffer = PreferenceBuffer(4)
    with pytest.raises(OptionError, match="empty"):
        buffer.everything()
    pairs = pixel_pairs(2, 3)
    buffer.append(*pairs)
    assert buffer.everything().first.observation.dtype == torch.uint8
    with pytest.raises(ShapeError, match="like the pairs stored"):
        buffer.append(*pixel_pairs(2, 4))
    first, second = (
        Fragments(*(p.float() if i == 0 else p for i, p in enumerate(side))) for side in pairs[:2]
    )
    with pytest.raises(DtypeError, match=r"float32.*uint8, like the pairs stored"):
        buffer.append(first, second, pairs.label)
    with pytest.raises(OptionError, match=r"label is [23]\.0"):
        buffer.append(pairs.first, pairs.second, pairs.label + 2)
    assert len(buffer) == 2
    with pytest.raises(OptionError, match="size is 3"):
        buffer.sample(3, seeded())
    with pytest.raises(OptionError, match="capacity is 0"):
        PreferenceBuffer(0)


def test_the_two_sides_of_a_pair_may_differ_in_length_only():
    """Told from each other before the first pair is kept."""
    first, label = fragments_with(torch.zeros(3, 2)), torch.ones(3)
    changes = {
        "observation": torch.zeros(3, 2, 4),
        "action": torch.zeros(3, 2, 1),
        "version": torch.arange(2),
    }
    buffer = PreferenceBuffer(4)
    for name, part in changes.items():
        second = Fragments(**first._asdict() | {name: part})
        for sides in ((first, second), (second, first)):
            with pytest.raises(ShapeError, match=rf"{name} has shape .* in the first fragments"):
                buffer.append(*sides, label)
    double = Fragments(**first._asdict() | {"reward": first.reward.double()})
    with pytest.raises(DtypeError, match=r"reward has dtype torch\.float32 .* torch\.float64"):
        buffer.append(first, double, label)
    with pytest.raises(ShapeError, match=r"observation has shape \(3, 2, 3\) .* \(4, 2, 3\)"):
        buffer.append(first, fragments_with(torch.zeros(4, 2)), label)
    for wrong in (label[:2], label[:, None], label[0]):
        with pytest.raises(ShapeError, match=r"label has shape .* \(allowed: \(3,\)\)"):
            buffer.append(first, first, wrong)
    assert len(buffer) == 0
    longer = fragments_with(torch.randn(3, 5))
    assert buffer.append(first, longer, label) == 3
    assert buffer.everything().second.reward.equal(longer.reward)


def test_pairs_are_selected_by_index_or_mask_and_only_those_that_are_there():
    """Full and not, and after the ring has gone round."""
    buffer = PreferenceBuffer(5)
    for numbers in ([0, 1, 2], [3, 4, 5, 6]):
        buffer.append(*numbered(numbers))
        held = contents(buffer)
        count = len(held)
        for chosen in ([count - 1, 0, 0], []):
            found = buffer.select(torch.tensor(chosen, dtype=torch.int64))
            assert found.first.reward[:, 0].tolist() == [held[i] for i in chosen]
        mask = torch.arange(count) % 2 == 1
        found = buffer.select(mask)
        assert found.first.reward[:, 0].tolist() == held[1::2]
        assert len(buffer.select(torch.zeros(count, dtype=torch.bool))) == 0
        for wrong in (-1, count, count + 4):
            with pytest.raises(OptionError, match=rf"index is {wrong} \(allowed: \[0, {count}\)"):
                buffer.select(torch.tensor([0, wrong]))
        for mask in (torch.ones(count + 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)):
            with pytest.raises(ShapeError, match=rf"allowed: \({count},\), one for each"):
                buffer.select(mask)
        with pytest.raises(ShapeError, match=r"index has shape \(\)"):
            buffer.select(torch.tensor(0))
        for dtype in (torch.uint8, torch.float32):
            with pytest.raises(DtypeError, match="int64 or bool"):
                buffer.select(torch.ones(count, dtype=dtype))
    skipped = PreferenceBuffer(5)
    first, second, label = numbered([0, 1])
    skipped.append(first, second, label * math.nan)
    with pytest.raises(OptionError, match="index is 0"):
        skipped.select(torch.tensor([0]))


def test_a_buffer_resumes_through_a_checkpoint_to_the_same_bits(tmp_path):
    one = PreferenceBuffer(5)
    one.append(*numbered(list(range(8))))
    store = CheckpointStore(tmp_path)
    store.save({"buffer": one.state_dict()}, step=1, config={}, versions={})
    other = PreferenceBuffer(5)
    other.append(*numbered([90.0, 91.0]))
    other.load_state_dict(store.load().state["buffer"])
    more = numbered([8.0, 9.0])
    for buffer in (one, other):
        buffer.append(*more)
    assert contents(one) == contents(other) == [5, 6, 7, 8, 9]
    assert one.added == other.added == 10
    mine, theirs = (b.sample(4, seeded(2)) for b in (one, other))
    for part, whole in zip(
        (*mine.first, *mine.second), (*theirs.first, *theirs.second), strict=True
    ):
        assert part.equal(whole)
    narrow = PreferenceBuffer(3)
    narrow.load_state_dict(one.state_dict())
    assert contents(narrow) == [7, 8, 9]
    wide = PreferenceBuffer(30)
    wide.load_state_dict(one.state_dict())
    wide.append(*numbered([10.0]))
    assert contents(wide) == [5, 6, 7, 8, 9, 10]
    empty = PreferenceBuffer(3)
    empty.load_state_dict(PreferenceBuffer(3).state_dict())
    assert len(empty) == 0
    state = one.state_dict()
    state["pairs"]["label"] = torch.full((5,), 2.0)
    with pytest.raises(OptionError, match=r"label is 2\.0"):
        other.load_state_dict(state)
    assert contents(other) == contents(one), "all or nothing"


# Fitting


def test_a_step_of_fitting_is_a_step_on_the_mean_loss():
    """One batch, plain gradient descent, against autograd on the pairs themselves."""
    pairs = linear_pairs(16)
    model = RewardNetwork.mlp(3, seeded(), actions=2)
    twin = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    found = fit(model, pairs, optimiser, seeded(1), batch_size=16, noise=0.1)
    every = [
        twin(side.observation.flatten(0, 1), side.action.flatten()).view(16, 4).sum(-1)
        for side in (pairs.first, pairs.second)
    ]
    p = 0.9 * torch.sigmoid(every[0] - every[1]) + 0.05
    loss = nn.functional.binary_cross_entropy(p, pairs.label)
    loss.backward()
    assert abs(found.training.loss - float(loss.detach())) < 1e-6
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs - 0.1 * untyped(theirs.grad), atol=1e-6)


def test_fitting_finds_the_reward_behind_the_answers():
    model = RewardNetwork.mlp(3, seeded(), actions=2, hidden=(32,))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = evaluate(model, linear_pairs(300, seed=7))
    found = fit(model, linear_pairs(300), optimiser, seeded(1), epochs=15)
    after = evaluate(model, linear_pairs(300, seed=7))
    assert before.accuracy < 0.8
    assert after.accuracy > 0.93
    assert found.training.accuracy > 0.95
    assert after.loss < 0.3 < before.loss
    assert found.epochs == 15
    assert found.validation is None


def test_evaluation_does_not_depend_on_its_batches():
    model, pairs = RewardNetwork.mlp(3, seeded(), actions=2), linear_pairs(30)
    margin = margins(model, pairs).detach().double().numpy()
    label = pairs.label.double().numpy()
    p = 1 / (1 + np.exp(-margin))
    loss = -(label * np.log(p) + (1 - label) * np.log(1 - p)).mean()
    for size, at_once in ((1, None), (7, 3), (30, 200), (100, None)):
        found = evaluate(model, pairs, batch_size=size, at_once=at_once)
        assert abs(found.loss - loss) < 1e-6
        assert found.accuracy == ((margin > 0) == (label == 1)).mean()


def test_members_see_orders_of_their_own_and_every_pair_once():
    """One step per pair: with a rate of 1 on a table of margins, the last pair seen stands out."""
    pairs = linear_pairs(12)
    seen: list[list[float]] = []

    class Watched(RewardNetwork):
        def forward(self, observation, action):
            seen[untyped(self.number)].append(float(observation[0, 0]))
            return super().forward(observation, action)

    members = []
    for number in range(3):
        member = Watched(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), actions=2)
        untyped(member).number = number
        members.append(member)
        seen.append([])
    model = RewardEnsemble(members)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    fit(model, pairs, optimiser, seeded(), batch_size=1, epochs=1)
    everyone = sorted(float(x) for x in pairs.first.observation[:, 0, 0])
    assert [sorted(order) for order in seen] == [everyone] * 3
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_answers_that_are_all_ties_are_said_to_carry_nothing():
    first, second, _ = linear_pairs(20)
    label = torch.full((20,), 0.5)
    reward = RewardNetwork.mlp(3, seeded(), actions=2)
    optimiser = torch.optim.Adam(reward.parameters())
    with pytest.warns(UserWarning, match="all 20 answers are ties"):
        found = fit(reward, Pairs(first, second, label), optimiser, seeded())
    assert math.isnan(found.training.accuracy)
    label[7] = 1.0  # and one that is none is enough
    fit(reward, Pairs(first, second, label), optimiser, seeded())


def test_the_buffer_counts_the_answers_that_are_no_ties():
    buffer = PreferenceBuffer(5)
    assert buffer.strict == 0
    first, second, _ = linear_pairs(4)
    for labels, strict in (
        ([0.5, 0.5, math.nan, 0.5], 0),
        ([1.0, 0.5, 0.0, math.nan], 2),  # the first of the three ties has made room
        ([0.5, 0.25, 0.5, 0.5], 2),
        ([0.5, 0.5, 0.5, 0.5], 0),
    ):
        buffer.append(first, second, torch.tensor(labels))
        want = int((buffer.everything().label != 0.5).sum())
        assert buffer.strict == want == strict
        other = PreferenceBuffer(5)
        other.load_state_dict(buffer.state_dict())
        assert other.strict == strict


def test_an_ensemble_inside_another_model_is_not_fitted():
    """Its members would see the pairs in one order, and learn from the loss of their mean."""
    inner = RewardEnsemble.of(2, lambda: RewardNetwork.mlp(3, seeded(), actions=2))
    model = RewardEnsemble([inner])
    before, generator = everything_in(model), seeded()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(OptionError, match=r"an ensemble is inside a .*Fix: fit the inner ensemble"):
        fit(model, linear_pairs(6), optimiser, generator)
    assert_same(before, everything_in(model))
    assert generator.get_state().equal(seeded().get_state())
    fit(inner, linear_pairs(6), optimiser, generator)


def test_early_stopping_keeps_the_best_parameters():
    """Answers of the training set are the reverse of those to validate on: every pass hurts."""
    pairs, validation = linear_pairs(64), linear_pairs(64, seed=3)
    model = RewardNetwork.mlp(3, seeded(), actions=2)
    fit(model, validation, torch.optim.Adam(model.parameters(), lr=1e-2), seeded(), epochs=10)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    wrong = Pairs(pairs.first, pairs.second, 1 - pairs.label)
    found = fit(
        model, wrong, optimiser, seeded(), epochs=50, validation=validation, patience=3, noise=0.0
    )
    assert found.epochs == 4, "the first pass is the best, and three more do not help"
    assert found.validation == evaluate(model, validation)


def test_fitting_resumes_to_the_same_bits(tmp_path):
    """Dropout and orders included, through a checkpoint, whatever the global generator does."""

    def build():
        model = RewardEnsemble([small_cnn(1), small_cnn(2)])
        return model, torch.optim.AdamW(model.parameters(), lr=3e-4), seeded(4)

    pairs = pixel_pairs(10, 2)
    model, optimiser, generator = build()
    fit(model, pairs, optimiser, generator, batch_size=4)
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "generator": generator.get_state(),
    }
    store = CheckpointStore(tmp_path)
    store.save(state, step=1, config={}, versions={})
    torch.manual_seed(11)
    want = fit(model, pairs, optimiser, generator, batch_size=4, epochs=2)

    other, again, chance = build()
    state = store.load().state
    other.load_state_dict(state["model"])
    again.load_state_dict(state["optimiser"])
    chance.set_state(state["generator"])
    torch.manual_seed(12)
    assert fit(other, pairs, again, chance, batch_size=4, epochs=2) == want
    assert_same(everything_in(model), everything_in(other))
    assert chance.get_state().equal(generator.get_state())


def test_fitting_is_in_training_mode_and_validation_is_not():
    pairs, model = pixel_pairs(6, 2), small_cnn()
    seen = []
    untyped(model.body)[0].register_forward_hook(lambda layer, *_: seen.append(layer.training))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    fit(model, pairs, optimiser, seeded(), batch_size=3, epochs=2, validation=pairs)
    assert seen == [True, True, False, False] * 2
    assert int(untyped(model.body)[1].num_batches_tracked) == 4


def test_a_reward_is_in_evaluation_mode_after_a_fit_that_failed():
    pairs = pixel_pairs(6, 2)
    model = small_cnn()
    optimiser = torch.optim.SGD(model.parameters(), lr=math.inf)
    with pytest.raises(NonFiniteResultError, match="epoch 1, pair 2 of 6"):
        fit(model, pairs, optimiser, seeded(), batch_size=2)
    assert not any(module.training for module in model.modules())
    with pytest.raises(OptionError, match="number of pairs is 0"):
        fit(model, pairs.select(torch.arange(0)), optimiser, seeded())
    with pytest.raises(OptionError, match="epochs is 0"):
        fit(model, pairs, optimiser, seeded(), epochs=0)


def test_a_fit_is_not_validated_on_nothing_or_on_what_is_not_finite():
    pairs, model = linear_pairs(6), RewardNetwork.mlp(3, seeded(), actions=2)
    before = everything_in(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptionError, match="number of validation pairs is 0"):
        fit(model, pairs, optimiser, seeded(), validation=pairs.select(torch.arange(0)))
    assert_same(before, everything_in(model))
    broken = linear_pairs(6)
    broken.first.observation[3, 1] = math.nan
    with pytest.raises(NonFiniteResultError, match="loss is nan at validation after epoch 1"):
        fit(model, pairs, optimiser, seeded(), epochs=3, validation=broken)


def test_disagreement_finds_where_members_were_told_different_things():
    """Two members fitted on one half of the line each agree there and part on the other."""
    members = [constant(3.0, 0.0, 0.0), constant(0.0, 0.0, 3.0)]
    model = RewardEnsemble(members)
    action = torch.tensor([[0], [1], [2], [1]])
    blank = fragments_with(torch.zeros(4, 1))._asdict()
    state = torch.zeros(4, 1, dtype=torch.int64)
    first = Fragments(**(blank | {"observation": state, "action": action}))
    second = Fragments(**(blank | {"observation": state, "action": torch.ones_like(action)}))
    chosen = Disagreement(model.each)(first, second, 2, seeded())
    assert sorted(chosen.tolist()) == [0, 2]


def test_a_state_holds_data_only():
    """What torch reads with weights_only."""
    model = RewardEnsemble([small_cnn()])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), everything_in(model))


def test_the_loss_reaches_the_parameters_through_two_derivatives():
    """Finite differences of the mean loss along a direction of all parameters, in float64."""
    model = RewardNetwork.mlp(3, seeded(), actions=2, hidden=(4,)).double()
    pairs = linear_pairs(6)
    direction = [torch.randn_like(part) for part in model.parameters()]

    def loss(step: float) -> torch.Tensor:
        moved = {
            name: part + step * way
            for (name, part), way in zip(model.named_parameters(), direction, strict=True)
        }

        def reward(observation, action):
            return torch.func.functional_call(model, moved, (observation, action))

        return bradley_terry(margins(reward, pairs), pairs.label, 0.1).mean()

    slopes = torch.autograd.grad(loss(0.0), list(model.parameters()), create_graph=True)
    slope = sum((a * b).sum() for a, b in zip(slopes, direction, strict=True))
    numeric = float((loss(1e-5) - loss(-1e-5)).detach()) / 2e-5
    assert abs(float(untyped(slope).detach()) - numeric) < 1e-8
    bends = torch.autograd.grad(untyped(slope), list(model.parameters()))
    bend = float(sum((a * b).sum() for a, b in zip(bends, direction, strict=True)))
    numeric = float((loss(1e-3) - 2 * loss(0.0) + loss(-1e-3)).detach()) / 1e-6
    assert abs(bend - numeric) < 1e-4 * max(1, abs(numeric))
