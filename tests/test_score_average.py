"""The average of noisy gradients, and what its noise leaves of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closeness import assert_same_bits, assert_same_state
from torch import Tensor

from birl_ext.bilevel.score_average import ScoreAverage, signed
from birl_ext.bilevel.sobirl import SoBiRLUpdate
from birl_ext.errors import OptionError
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.reward_model import RewardNetwork
from birl_ext.simulators.finite import FiniteFollower

SIZE = 400


def averaged(decay: float, gradients: Tensor) -> list[ScoreAverage]:
    """Of gradients whose numbers have a variance of one each."""
    found = [ScoreAverage(gradients.shape[-1], decay, gradients)]
    for gradient in gradients:
        found.append(found[-1].after(gradient, gradients.shape[-1]))
    return found[1:]


def noise(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, SIZE, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_it_is_the_mean_by_weights_that_sum_to_one(decay: float) -> None:
    gradients = noise(12)
    for t, average in enumerate(averaged(decay, gradients), 1):
        weight = torch.tensor([decay ** (t - s) for s in range(1, t + 1)], dtype=torch.float64)
        want = (weight / weight.sum()) @ gradients[:t]
        torch.testing.assert_close(average.mean, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_signed_terms_have_the_variance_of_their_sum(count: int) -> None:
    """In the mean, whatever their own mean is, which halves of one length take away."""
    terms = 5.0 + noise(400 * count).view(400, count, SIZE)
    found = torch.stack([signed(part).sum(0).square().mean() for part in terms]).mean()
    want = count if count > 1 else 26.0
    assert abs(float(found) - want) < 0.02 * want


@pytest.mark.parametrize("signal", [0.0, 0.05, 0.2, 2.0])
@pytest.mark.parametrize(
    ("few", "pool", "times"),
    [(8, None, 1), (8, 32, 100), (8, 8, 100), (8, 8, 5), (5, 20, 10)],
    ids=["new", "of 32", "all of 8", "all of 8, five times", "5 of 20, ten times"],
)
def test_what_is_kept_is_the_share_of_the_signal(
    signal: float, few: int, pool: int | None, times: int
) -> None:
    """1 − noise/(noise + signal²), of the average, the factor that makes the least error: where
    each gradient is the mean of n data, drawn without replacement from a pool of N that is used so
    many times. The mean of all N is off, and no average over updates mends that.
    """
    decay, truth = 0.9, torch.full((SIZE,), signal, dtype=torch.float64)
    kept, off = [], []
    for seed in range(12):
        draws = torch.Generator().manual_seed(seed)
        average = ScoreAverage(SIZE, decay, truth)
        data = noise(pool or few, 1000 * seed)
        for update in range(100):
            if renewed := not update % times:
                data = noise(pool or few, 1000 * seed + update)
            # of one datum; a variance of one in each number of the mean
            each = truth + few**0.5 * data[torch.randperm(len(data), generator=draws)[:few]]
            variance = float((signed(each).sum(0) / few).square().sum())
            shared = 0.0 if pool is None else few / pool
            average = average.after(each.mean(0), variance, shared=shared, renewed=renewed)
        kept.append(average.kept)
        off.append(float((average.mean - truth).square().mean()))
    left = sum(off) / len(off)
    want = signal**2 / (signal**2 + left)
    assert abs(sum(kept) / len(kept) - want) < 0.06, (kept, want)


def test_nothing_is_made_of_a_gradient_without_noise_or_of_nothing() -> None:
    sure = ScoreAverage(3, 0.9, torch.zeros(1)).after(torch.ones(3), 0.0)
    assert sure.kept == 1.0
    assert sure.after(torch.ones(3), 1e9).kept == 0.0
    assert [one.kept for one in averaged(0.0, noise(2))] == [1.0, 1.0]
    assert ScoreAverage(3, 0.9, torch.zeros(1)).kept == 0.0
    for decay in (-0.1, 1.0, math.nan, "x"):
        with pytest.raises(OptionError, match="average is "):
            ScoreAverage(3, decay, torch.zeros(1))  # type: ignore[arg-type]


def learner(average: float) -> tuple[SoBiRLUpdate, Any]:
    """A table of rewards, and a step on pairs of one's own choosing."""
    reward = RewardNetwork.table(3, 2).double()
    follower = FiniteFollower(torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]]))
    (weight,) = reward.parameters()
    with torch.no_grad():
        weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))

    def score(reward: Any, follower: Any, where: Tensor, chosen: Tensor, _: Tensor) -> Tensor:
        found: Tensor = reward(where.flatten(), chosen.flatten()).view(where.shape).sum(-1)
        return found

    own = SoBiRLUpdate(
        reward,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        score=score,  # type: ignore[arg-type]
        average=average,
    )

    def step(seed: int, pool: int | None = None) -> Any:
        random = torch.Generator().manual_seed(seed)

        def side() -> Fragments:
            where = torch.randint(3, (8, 2), generator=random)
            chosen = torch.randint(2, (8, 2), generator=random)
            log_prob, ones = follower.log_prob(where, chosen), torch.ones(8, 2)
            now = torch.zeros(8, dtype=torch.int64)
            return Fragments(where, chosen, ones, ones.bool(), log_prob, now)

        label = torch.randint(2, (8,), generator=random).double()
        return own.step(Pairs(side(), side(), label), follower, temperature=0.5, pool=pool)

    return own, step


def test_a_step_uses_what_the_noise_leaves() -> None:
    """What is kept is the factor of the average; of the same pairs again it does not grow."""
    own, step = learner(0.9)
    shares = [step(seed) for seed in range(12)]
    assert any(outcome.kept > 0 for outcome in shares)
    assert all((outcome.indirect_share > 0) == (outcome.kept > 0) for outcome in shares)
    few = learner(0.9)[1]
    reused = [few(seed, pool=8) for seed in range(12)]
    assert sum(one.kept for one in reused) < sum(one.kept for one in shares)
    plain, at_once = learner(0.0)
    assert at_once(0).kept == 1.0
    assert plain.steps == 1
    assert own.steps == 12


@pytest.mark.parametrize("seed", range(4))
def test_the_same_pairs_again_tell_nothing_new(seed: int) -> None:
    own, step = learner(0.9)
    for group in own.optimiser.param_groups:
        group["lr"] = 0.0
    kept = {step(seed, pool=8).kept for _ in range(20)}
    assert max(kept) - min(kept) < 1e-5


def test_an_average_goes_on_from_its_state() -> None:
    ours, step = learner(0.9)
    for seed in range(6):
        step(seed)
    theirs, other = learner(0.9)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(6, 10):
        assert step(seed) == other(seed)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert_same_bits(ours.parameters[0], theirs.parameters[0], label="reward")


def test_a_step_that_fails_leaves_the_average() -> None:
    own, step = learner(0.9)
    step(0), step(1)
    before = own.state_dict()

    def broken(*_: Any) -> Tensor:
        raise OptionError("no score")

    own.score = broken  # type: ignore[assignment]
    with pytest.raises(OptionError, match="no score"):
        step(2)
    assert_same_state(own.state_dict(), before)
