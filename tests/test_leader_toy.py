"""Leaders that are policies: the joint MDP against loops, and the three-state toy's optimum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor

from birl_ext import solve
from birl_ext.bilevel import MSoBiRL, leader_policy_mdp
from birl_ext.errors import BirlError, DtypeError, NonStochasticError, OptionError, ShapeError
from birl_ext.problems.leader_toy import TEMPERATURE, leader_toy, tables

FLOAT = torch.float64
OPTIMUM = 27.3156
"""Of R1, discounted: the best of all probabilities of the one move that matters."""


def soft(z: np.ndarray, tau: float) -> float:
    return z.max() + tau * np.log(np.exp((z - z.max()) / tau).sum())


def follower(
    rows: np.ndarray,
    reward: np.ndarray,
    leader: np.ndarray,
    discount: float,
    tau: float,
    blind: bool = False,
) -> np.ndarray:
    """π*(a|s, b) by plain loops: the follower sees b, and averages over the next one; if `blind`,
    before it takes the soft maximum there, as published.
    """
    states, moves, _ = reward.shape
    q = np.zeros_like(reward)
    for _ in range(int(math.log(1e-12) / math.log(discount))):
        value = [
            soft(leader[s] @ q[s], tau)
            if blind
            else sum(leader[s, b] * soft(q[s, b], tau) for b in range(moves))
            for s in range(states)
        ]
        q = reward + discount * rows @ np.array(value)
    policy = np.exp((q - q.max(-1, keepdims=True)) / tau)
    return policy / policy.sum(-1, keepdims=True)


def paid(
    bonus: float,
    send_back: float,
    discount: float,
    factor: float,
    horizon: int,
    blind: bool = False,
) -> float:
    """The leader's return in the toy, written down anew from its definition in words."""
    nxt = {(0, "s"): 0, (0, "a"): 1, (0, "b"): 2, (1, "s"): 0, (1, "a"): 1, (1, "b"): 2}
    nxt |= {(2, "s"): 0, (2, "a"): 2, (2, "b"): 2}
    rows, reward = np.zeros((3, 2, 3, 3)), np.zeros((3, 2, 3))
    for (s, action), target in nxt.items():
        for b in range(2):
            forced = s == 1 and b == 1
            rows[s, b, "sab".index(action), 0 if forced else target] = 1
    reward[0, :, 1] = reward[0, :, 2] = 1
    reward[1, 0, 2] = bonus
    reward[1, 1] = -1
    leader = np.array([[0.5, 0.5], [1 - send_back, send_back], [0.5, 0.5]])
    policy = follower(rows, reward, leader, discount, 0.05, blind)
    at, total = np.array([1.0, 0.0, 0.0]), 0.0
    joint = np.einsum("sb,sba->sba", leader, policy)
    for step in range(horizon):
        total += factor**step * at[0] * joint[0, :, 1].sum()
        at = np.einsum("s,sba,sbat->t", at, joint, rows)
    return total


# The helper


def case(seed: int = 0, starts: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=FLOAT)

    return (2 * normal(4, 3, 2, 4)).softmax(-1), normal(4, 3, 2), normal(*starts, 4, 3)


def test_the_follower_of_a_joint_mdp_is_that_of_the_loops() -> None:
    rows, reward, logits = case(starts=(2,))
    found = solve(leader_policy_mdp(rows, reward, logits, 0.8), temperature=0.3).policy
    assert found.shape == (2, 12, 2)
    for number, one in enumerate(logits):
        want = follower(rows.numpy(), reward.numpy(), one.softmax(-1).numpy(), 0.8, 0.3)
        assert_close(found[number].reshape(4, 3, 2), want, bound=1e-9, label="policy")


def test_its_parts_are_where_they_are_promised() -> None:
    rows, reward, logits = case(1)
    start = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=FLOAT)
    last = torch.tensor([False, False, False, True])
    mask = torch.ones(4, 3, 2, dtype=torch.bool)
    mask[0, 1, 0] = False
    mdp = leader_policy_mdp(
        rows, reward, logits, 0.8, initial_distribution=start, terminal=last, mask=mask
    )
    leader = logits.softmax(-1)
    assert mdp.initial_distribution is not None
    for s in range(4):
        for b in range(3):
            pair = 3 * s + b
            assert float(mdp.initial_distribution[pair]) == pytest.approx(
                float(start[s] * leader[s, b])
            )
            for a in range(2):
                taken = float(mask[s, b, a]) * (s < 3)
                want = taken * torch.einsum("t,tc->tc", rows[s, b, a], leader).flatten()
                assert_close(mdp.transition[pair, a], want, bound=1e-15, label=(s, b, a))
    found = solve(mdp, temperature=0.3)
    assert float(found.policy[1, 0]) == 0
    assert_close(
        found.value[9:], (0.3 * (reward[3] / 0.3).exp().sum(-1).log()), bound=1e-12, label="V"
    )


def test_gradients_reach_the_leader_and_the_tables() -> None:
    rows, reward, logits = case(2)

    def worth(rows: Tensor, reward: Tensor, logits: Tensor) -> Tensor:
        free = leader_policy_mdp(rows.softmax(-1), reward, logits, 0.7)
        return solve(free, temperature=0.5).policy

    given = [part.clone().requires_grad_() for part in (rows.log(), reward, logits)]
    assert torch.autograd.gradcheck(worth, given, fast_mode=True)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"rows": torch.ones(4, 2, 4)}, ShapeError, r"transition has shape \(4, 2, 4\)"),
        ({"rows": torch.ones(4, 3, 2, 5)}, ShapeError, r"transition has shape \(4, 3, 2, 5\)"),
        ({"reward": torch.ones(4, 2)}, ShapeError, r"reward has shape \(4, 2\)"),
        ({"logits": torch.ones(3, 4)}, ShapeError, r"logits has shape \(3, 4\)"),
        ({"logits": torch.ones(4, 3, dtype=torch.int64)}, DtypeError, "logits has dtype"),
        ({"logits": [0.0]}, DtypeError, "logits is a list"),
        ({"terminal": torch.zeros(3, dtype=torch.bool)}, ShapeError, "terminal has shape"),
        ({"mask": torch.ones(4, 2, dtype=torch.bool)}, ShapeError, "mask has shape"),
        ({"initial_distribution": torch.ones(12)}, ShapeError, "initial_distribution has shape"),
        ({"rows": torch.ones(4, 3, 2, 4, dtype=FLOAT)}, NonStochasticError, "sums to 4"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], kind: Any, words: str) -> None:
    rows, reward, logits = case()
    given = {"rows": rows, "reward": reward, "logits": logits, **change}
    with pytest.raises(kind, match=words):
        leader_policy_mdp(given.pop("rows"), given.pop("reward"), given.pop("logits"), 0.8, **given)


# The toy


def at(send_back: float) -> Tensor:
    x = torch.zeros(6, dtype=FLOAT)
    x[3] = math.log(send_back / (1 - send_back))
    return x


@pytest.mark.parametrize("bonus", [1.0, 2.0])
@pytest.mark.parametrize(("factor", "horizon"), [(None, 150), (1.0, 150), (0.9, 7)])
def test_the_leader_is_paid_what_the_words_say(
    bonus: float, factor: float | None, horizon: int
) -> None:
    problem, _ = leader_toy(bonus, leader_discount=factor, horizon=horizon)
    for send_back in (0.01, 0.17, 0.3, 0.5, 0.8):
        want = paid(bonus, send_back, 0.99, 0.99 if factor is None else factor, horizon)
        got = -problem.objective(at(send_back), TEMPERATURE)
        assert_close(got, np.array(want), bound=1e-8, label=send_back)


def test_a_leader_that_only_draws_earns_nothing_much() -> None:
    problem, start = leader_toy()
    assert -float(problem.objective(start, TEMPERATURE)) == pytest.approx(0.4808, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "best", "where"),
    [
        ({}, 27.3156, 0.166),
        ({"leader_discount": 1.0}, 52.324, 0.167),
        ({"bonus": 2.0}, 31.166, 0.502),
        ({"bonus": 2.0, "leader_discount": 1.0}, 59.750, 0.503),
    ],
)
def test_the_best_of_all_leaders(options: Any, best: float, where: float) -> None:
    """One number matters: how often the follower is sent back from A."""
    problem, _ = leader_toy(**options)
    x = torch.zeros(2001, 6, dtype=FLOAT)
    x[:, 3] = torch.linspace(-6.0, 6.0, 2001, dtype=FLOAT)
    found = -problem.objective(x, TEMPERATURE)
    assert float(found.max()) == pytest.approx(best, abs=1e-3)
    assert float(x[found.argmax(), 3].sigmoid()) == pytest.approx(where, abs=2e-3)


def test_the_best_leader_of_the_published_follower() -> None:
    """A little worse off: 27.1 from samples is close to its optimum, too."""
    found = [paid(1.0, 0.155 + 0.001 * n, 0.99, 0.99, 150, blind=True) for n in range(11)]
    assert max(found) == pytest.approx(27.255, abs=2e-3)
    assert 0 < int(np.argmax(found)) < 10


def test_descent_on_the_policy_reaches_the_optimum_from_several_starts() -> None:
    problem, start = leader_toy()
    starts = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
    starts[0] = start
    algorithm = MSoBiRL(
        problem,
        starts,
        temperature=TEMPERATURE,
        optimiser=lambda p: torch.optim.Adam(p, lr=0.1),
    )
    algorithm.run(200, progress=False)
    found = -problem.objective(algorithm.x.detach(), TEMPERATURE)
    assert float(found.min()) >= 27.3
    assert float(found.max()) <= OPTIMUM + 1e-3


def test_the_gradient_is_that_of_finite_differences() -> None:
    problem, _ = leader_toy()
    x = torch.tensor([0.3, -0.2, 0.1, -1.2, 0.4, 0.2], dtype=FLOAT, requires_grad=True)
    (got,) = torch.autograd.grad(problem.objective(x, TEMPERATURE), x)
    step, want = 1e-6, []
    for e in torch.eye(6, dtype=FLOAT):
        ends = [problem.objective(x.detach() + k * step * e, TEMPERATURE) for k in (1, -1)]
        want.append(float(ends[0] - ends[1]) / (2 * step))
    assert_close(got, np.array(want), bound=1e-5, label="∇φ")
    assert float(got.abs().max()) > 1


def test_tables_are_certain_moves() -> None:
    rows, _, _ = tables()
    assert rows.shape == (3, 2, 3, 3)
    assert bool(((rows == 0) | (rows == 1)).all())
    assert bool((rows.sum(-1) == 1).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bonus": math.nan}, "bonus is nan"),
        ({"discount": 1.0}, "discount is 1"),
        ({"leader_discount": 1.1}, "leader_discount is 1.1"),
        ({"horizon": 0}, "horizon is 0"),
    ],
)
def test_options_out_of_range_are_named(options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        leader_toy(**options)
    assert isinstance(caught.value, BirlError)
