"""birl_ext.convert against soft value iteration on each source's own form, by plain loops."""

from __future__ import annotations

import builtins
import copy
import itertools
import math
import types
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import scipy.sparse
import torch
from cases import untyped
from closeness import assert_close

import birl_ext
from birl_ext import convert, errors
from birl_ext.environments.finite import FiniteEnvironment
from birl_ext.model.mdp import DenseMDP, SparseMDP

GAMMA, TAU = 0.9, 0.3
Array = np.ndarray
MDP = DenseMDP | SparseMDP


def soft_values(backups: list[Any], discount: float = GAMMA, tau: float = TAU) -> Array:
    """V of a process given as, for each state, a list of functions V → Q, by sweeps; an empty list
    is an end worth 0.
    """
    value = np.zeros(len(backups))
    for _ in range(20_000):
        after = value.copy()
        for state, actions in enumerate(backups):
            q = np.array([take(value) for take in actions])
            if len(q):
                after[state] = q.max() + tau * math.log(np.exp((q - q.max()) / tau).sum())
        if np.abs(after - value).max() < 1e-13:
            return after
        value = after
    raise AssertionError("the oracle has not converged")


def near(got: Any, want: Any, *, bound: float, label: str) -> None:
    assert_close(torch.as_tensor(got, dtype=torch.float64), want, bound=bound, label=label)


def values(mdp: MDP, tau: float = TAU) -> Array:
    return birl_ext.solve(mdp, temperature=tau).value.numpy()


def same(a: MDP, b: MDP, bound: float = 1e-12) -> None:
    """The same process, whatever the form; ρ where both have one."""
    a, b = (x.to_dense() if isinstance(x, SparseMDP) else x for x in (a, b))
    assert (a.states, a.actions, a.discount) == (b.states, b.actions, b.discount)
    masks = [torch.ones_like(x.reward).bool() if x.mask is None else x.mask for x in (a, b)]
    assert torch.equal(*masks)
    ends = [torch.zeros(x.states).bool() if x.terminal is None else x.terminal for x in (a, b)]
    assert torch.equal(*ends)
    near(a.transition.numpy(), b.transition.numpy(), bound=bound, label="P")
    near(a.reward.numpy(), b.reward.numpy(), bound=bound, label="r")
    if a.initial_distribution is not None and b.initial_distribution is not None:
        near(a.initial_distribution.numpy(), b.initial_distribution.numpy(), bound=bound, label="ρ")


def random_mdp(seed: int, states: int = 6, actions: int = 3, **options: Any) -> DenseMDP:
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(states, 0.3), size=(states, actions))
    rows = np.where(rows < 0.02, 0, rows)
    rows /= rows.sum(-1, keepdims=True)
    return DenseMDP(
        torch.as_tensor(rng.normal(size=(states, actions))), torch.as_tensor(rows), GAMMA, **options
    )


def ending(seed: int, *, mask: bool = False) -> DenseMDP:
    """Its last state is an end without an action, worth 0."""
    mdp = random_mdp(seed)
    open_ = torch.ones_like(mdp.reward).bool()
    if mask:
        open_ = torch.as_tensor(np.random.default_rng(seed).random(open_.shape) < 0.6)
        open_[:, 1] = True
    open_[-1] = False
    return mdp.replace(mask=open_, terminal=torch.arange(mdp.states) == mdp.states - 1)


# Gymnasium


def table_values(table: Any) -> Array:
    def backup(listed: Any) -> Any:
        return lambda v: sum(p * (r + GAMMA * v[t] * (not done)) for p, t, r, done in listed)

    return soft_values([[backup(table[s][a]) for a in table[s]] for s in sorted(table)])


@pytest.mark.parametrize(
    ("name", "states", "ends"),
    [("FrozenLake-v1", 16, 5), ("CliffWalking-v1", 48, 1), ("Taxi-v4", 501, 1)],
)
def test_toy_texts_are_worth_what_their_tables_say(name: str, states: int, ends: int) -> None:
    env = gymnasium.make(name)
    mdp = convert.from_gymnasium(env, GAMMA)
    assert mdp.states == states
    assert mdp.terminal is not None
    assert int(mdp.terminal.sum()) == ends
    found = values(mdp)
    assert (found[mdp.terminal.numpy()] == 0).all()
    count = len(env.unwrapped.P)  # type: ignore[attr-defined]
    on = ~mdp.terminal.numpy()[:count]
    want = table_values(env.unwrapped.P)  # type: ignore[attr-defined]
    near(found[:count][on], want[on], bound=1e-11, label=name)
    near(
        mdp.initial_distribution.numpy()[:count],  # type: ignore[union-attr]
        env.unwrapped.initial_state_distrib,  # type: ignore[attr-defined]
        bound=1e-15,
        label="ρ",
    )
    back = convert.from_gymnasium(
        convert.to_gymnasium(mdp), GAMMA, initial=mdp.initial_distribution
    )
    same(back, mdp)


def test_a_state_entered_in_both_ways_is_no_end() -> None:
    table = {
        0: {0: [(0.5, 1, 1.0, True), (0.5, 1, 2.0, False)], 1: [(1.0, 0, 0.0, False)]},
        1: {0: [(1.0, 0, -1.0, False)], 1: [(0.3, 1, 4.0, True), (0.7, 0, 0.0, False)]},
    }
    mdp = convert.from_gymnasium(table, GAMMA)
    assert mdp.states == 3
    near(values(mdp), np.append(table_values(table), 0), bound=1e-12, label="V")
    same(convert.from_gymnasium(convert.to_gymnasium(mdp), GAMMA), mdp)


def test_where_episodes_start_is_no_end() -> None:
    table = {0: {0: [(1.0, 1, 1.0, True)]}, 1: {0: [(1.0, 0, 3.0, False)]}}
    assert values(convert.from_gymnasium(table, GAMMA))[1] == 0
    started = convert.from_gymnasium(table, GAMMA, initial=1)
    near(values(started), np.array([1.0, 3 + GAMMA, 0]), bound=1e-12, label="V")
    assert started.initial_distribution is not None
    assert started.initial_distribution.tolist() == [0, 1, 0]
    half = convert.from_gymnasium(table, GAMMA, initial={0: 0.5, 1: 0.5})
    assert half.initial_distribution is not None
    assert half.initial_distribution.tolist() == [0.5, 0.5, 0]


def test_an_action_that_a_state_lacks_is_masked() -> None:
    table = {
        0: {0: [(1.0, 1, 1.0, False)], 2: [(1.0, 0, 0.0, False)]},
        1: {1: [(1.0, 0, 0.5, False)]},
    }
    mdp = convert.from_gymnasium(table, GAMMA, dtype=torch.float32)
    assert mdp.dtype == torch.float32
    assert mdp.mask is not None
    assert mdp.mask.tolist() == [[True, False, True], [False, True, False]]
    near(values(mdp), table_values(table), bound=1e-5, label="V")
    assert convert.to_gymnasium(mdp)[1].keys() == {1}


GOOD = [(1.0, 0, 0.0, False)]


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        ({0: {0: GOOD, 1: [(0.5, 0, 0.0, False), (0.4, 0, 1.0, True)]}}, errors.NonStochasticError,
         r"sum to 0\.9 at state 0, action 1 "),
        ({0: {0: []}}, errors.NonStochasticError, r"sum to 0 at state 0, action 0"),
        ({0: {0: [(1.5, 0, 0.0, False), (-0.5, 0, 0.0, False)]}}, errors.NegativeProbabilityError,
         r"-0\.5 at state 0, action 0, next state 0"),
        ({0: {0: [(1.0, 3, 0.0, False)]}}, errors.ShapeError,
         r"next state is 3 at state 0, action 0 \(allowed: 0 to 0\)"),
        ({0: {0: [(1.0, 0, 0.0)]}}, errors.OptionError, r"outcome is \(1\.0, 0, 0\.0\) at state 0"),
        ({0: {0: [(1.0, 0, 0.0, "no")]}}, errors.OptionError, r"done is 'no'"),
        ({0: {0: [(1.0, 0, math.nan, False)]}}, errors.NonFiniteInputError,
         r"reward is nan at state 0, action 0"),
        ({0: {0: GOOD}, 2: {0: GOOD}}, errors.OptionError, r"no state 1"),
        ({0: {"up": GOOD}}, errors.OptionError, r"action of state 0 is 'up'"),
        ({0: GOOD}, errors.OptionError, r"action of state 0 holds a list"),
        ({}, errors.OptionError, r"no state 0"),
        (5, errors.OptionError, r"table is 5 .*enumerate_env"),
    ],
)  # fmt: skip
def test_a_malformed_table_is_refused(table: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        convert.from_gymnasium(table, GAMMA)


# Enumeration


class Queue(gymnasium.Env[Any, Any]):
    """Draws of every kind that can be counted; an observation of two arrays; actions from 5."""

    def __init__(self) -> None:
        self.action_space = gymnasium.spaces.Discrete(2, start=5)
        self.observation_space = gymnasium.spaces.Box(0, 9, (2,), np.int64)
        self.length = 0

    def _shown(self) -> Array:
        return np.array([self.length, self.length % 2])

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(1, 3))
        return self._shown(), {}

    def step(self, action: Any) -> Any:
        served = self.np_random.random() < (0.3 if action == 5 else 0.6)
        self.length -= int(served)
        self.length += int(self.np_random.choice([0, 1, 1], p=[0.5, 0.25, 0.25]))
        if self.np_random.uniform(-1, 1) > 0.8:
            self.length = int(self.np_random.permutation(3)[0])
        if action == 6 and self.length > 0:
            items = [1, 0, 0]
            self.np_random.shuffle(items)
            self.length -= items[0]
        self.length = min(max(self.length, 0), 4)
        return self._shown(), -float(self.length) - (action == 6), self.length == 4, False, {}


def sampled(env: Any, found: convert.EnumeratedMDP, put: Any, count: int) -> tuple[int, float]:
    """Of every state and action, the largest distance of a sampled frequency from P, and of a mean
    reward from r, in standard errors; and how many entries were compared.
    """
    env = copy.deepcopy(env).unwrapped
    env.np_random = np.random.default_rng(0)
    dense = found.mdp.to_dense()
    first = int(env.action_space.start)
    worst, compared = 0.0, 0
    for state, action in itertools.product(range(len(found.observations)), range(dense.actions)):
        if dense.terminal is not None and dense.terminal[state]:
            continue
        seen: Counter[int] = Counter()
        for _ in range(count):
            put(env, found.observations[state])
            shown, _, ended, _, _ = env.step(first + action)
            following = found.state_of[convert.key_of(shown)]
            if ended and dense.terminal is not None and not dense.terminal[following]:
                following = dense.states - 1
            seen[following] += 1
        law = dense.transition[state, action].numpy()
        assert all(law[t] > 0 for t in seen)  # nothing happens that P rules out
        for t in np.flatnonzero(law):
            error = math.sqrt(law[t] * (1 - law[t]) / count) or 1e-9
            worst = max(worst, abs(seen[int(t)] / count - law[t]) / error)
            compared += 1
    return compared, worst


def put_queue(env: Any, shown: Any) -> None:
    env.length = int(shown[0])


def put_lake(env: Any, shown: Any) -> None:
    env.unwrapped.s = int(shown)


def test_a_queue_is_enumerated_as_its_samples_say() -> None:
    found = convert.enumerate_env(Queue(), GAMMA)
    assert found.mdp.terminal is not None
    assert sorted(untyped(found.state_of)) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    # by hand: from length 1, action 5, no service, none arrives, no restart
    dense = found.mdp.to_dense()
    one = found.state_of[1, 1]
    stay = 0.9 * (0.7 * 0.5 + 0.3 * 0.5) + 0.1 / 3
    near(float(dense.transition[one, 0, one]), stay, bound=1e-12, label="P")
    assert dense.initial_distribution is not None
    assert dense.initial_distribution[one] == 0.5
    compared, worst = sampled(Queue(), found, put_queue, 2000)
    assert compared > 20
    assert worst < 4.5
    again = convert.enumerate_env(Queue(), GAMMA, restore=put_queue)
    same(again.mdp, found.mdp)


@pytest.mark.parametrize(
    ("name", "options"),
    [("FrozenLake-v1", {"success_rate": 0.5}), ("CliffWalking-v1", {"is_slippery": True})],
)
def test_enumeration_finds_the_tables_of_toy_texts(name: str, options: dict[str, Any]) -> None:
    env = gymnasium.make(name, **options)
    table = convert.from_gymnasium(env, GAMMA).to_dense()
    found = convert.enumerate_env(env, GAMMA)
    order = torch.tensor(found.observations)
    dense = found.mdp.to_dense()
    assert dense.states == len(order)
    near(
        dense.transition.numpy(),
        table.transition[order][:, :, order].numpy(),
        bound=1e-12,
        label="P",
    )
    near(dense.reward.numpy(), table.reward[order].numpy(), bound=1e-12, label="r")
    assert torch.equal(dense.terminal, table.terminal[order])  # type: ignore[index,arg-type]


def test_the_frozen_lake_is_enumerated_as_its_samples_say() -> None:
    env = gymnasium.make("FrozenLake-v1")
    compared, worst = sampled(env, convert.enumerate_env(env, GAMMA), put_lake, 500)
    assert compared > 100
    assert worst < 4.5


def test_taxi_has_its_404_states() -> None:
    env = gymnasium.make("Taxi-v4")
    found = convert.enumerate_env(env, GAMMA, restore=put_lake)
    assert len(found.observations) == found.mdp.states == 404
    want = values(convert.from_gymnasium(env, GAMMA))
    on = ~found.mdp.terminal.numpy()  # type: ignore[union-attr]
    assert on.sum() == 400
    got = values(found.mdp)
    near(got[on], want[np.array(found.observations)][on], bound=1e-11, label="V")


def put_hand(env: Any, shown: Any) -> None:
    """A hand of that sum; the dealer's other card is hidden, so it is drawn."""
    total, dealer, ace = shown
    env = env.unwrapped
    env.player = [1, total - 11] if ace else [10, total - 10] if total > 11 else [2, total - 2]
    env.dealer = [dealer, int(env.np_random.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10]))]


def test_blackjack_needs_to_know_what_is_hidden() -> None:
    env = gymnasium.make("Blackjack-v1", sab=False)
    with pytest.raises(errors.SizeLimitError, match=r"10 ways at reset .*give `initial`"):
        convert.enumerate_env(env, GAMMA, max_outcomes=10)
    found = convert.enumerate_env(
        env, GAMMA, restore=put_hand, initial={(18, 10, 0): 0.5, (20, 9, 1): 0.5}
    )
    # 18 to 21 against 10, 12 to 21 and soft 20, 21 against 9, the bust hands, and the end
    compared, worst = sampled(env, found, put_hand, 300)
    assert compared > 60
    assert worst < 4.5
    # the dealer's 17 or more, by the law of what he draws, loops apart
    stick = found.mdp.reward[found.state_of[20, 9, 1], 0]
    near(float(stick), dealers_loss(20, 9), bound=1e-12, label="r")


def dealers_loss(player: int, card: int) -> float:
    """E[reward] of standing on `player` against that card, by recursion on the dealer's sums."""
    deck = {**dict.fromkeys(range(1, 10), 1 / 13), 10: 4 / 13}

    def best(total: int, ace: bool) -> int:
        return total + 10 if ace and total <= 11 else total

    def win(total: int, ace: bool) -> float:
        if best(total, ace) >= 17:
            dealer = best(total, ace)
            return 1.0 if dealer > 21 else float(np.sign(player - dealer))
        return sum(p * win(total + c, ace or c == 1) for c, p in deck.items())

    return sum(p * win(card + c, 1 in (c, card)) for c, p in deck.items())


class Hidden(gymnasium.Env[Any, Any]):
    """A coin is drawn at the start, and decides what follows without being shown."""

    action_space = gymnasium.spaces.Discrete(1)
    observation_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.coin = bool(self.np_random.integers(2))
        return 0, {}

    def step(self, action: Any) -> Any:
        return 1 + self.coin, 0.0, False, False, {}


class Drawing(Hidden):
    draw: Any = None

    def step(self, action: Any) -> Any:
        return 0, float(self.draw(self.np_random)), False, False, {}


def test_what_is_hidden_is_found() -> None:
    with pytest.raises(errors.OptionError, match=r"more than the observation at observation 0"):
        convert.enumerate_env(Hidden(), GAMMA)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda rng: rng.normal(), r"np_random\.normal\(\)"),
        (lambda rng: rng.random(3)[0], r"random\(size\)"),
        (lambda rng: rng.uniform(0, 1, 3)[0], r"uniform\(size\)"),
        (lambda rng: rng.choice(3, 2, False, [0.2, 0.3, 0.5])[0], r"choice\(replace=False, p="),
        (lambda rng: rng.random(), r"as a number"),
        (lambda rng: 1 - rng.random(), r"as a number"),
        (lambda rng: int(rng.random() * 4), r"as a number"),
    ],
)
def test_a_draw_that_cannot_be_counted_is_refused(draw: Any, words: str) -> None:
    env = Drawing()
    env.draw = draw
    with pytest.raises(errors.OptionError, match=words):
        convert.enumerate_env(env, GAMMA, restore=lambda env, shown: None, initial={0: 1.0})


def test_enumeration_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.SizeLimitError, match="more than 3 states"):
        convert.enumerate_env(gymnasium.make("FrozenLake-v1"), GAMMA, max_states=3)
    with pytest.raises(errors.OptionError, match="actions are Box"):
        convert.enumerate_env(gymnasium.make("Pendulum-v1"), GAMMA)
    with pytest.raises(errors.OptionError, match="initial is given without restore"):
        convert.enumerate_env(gymnasium.make("FrozenLake-v1"), GAMMA, initial={0: 1.0})
    missing(monkeypatch, "gymnasium")
    with pytest.raises(errors.MissingDependencyError, match=r'pip install "birl_ext\[rl\]"'):
        convert.enumerate_env(Queue(), GAMMA)


def test_an_mdp_comes_back_from_its_own_environment() -> None:
    mdp = ending(3).replace(initial_distribution=torch.tensor([0.5, 0.5, 0, 0, 0, 0]).double())
    found = convert.enumerate_env(FiniteEnvironment(mdp), GAMMA)
    order = np.array(found.observations[: mdp.states])
    # there an end takes one more step, whose choice is one
    near(values(found.mdp)[:6], values(mdp.replace(mask=None))[order], bound=1e-10, label="V")


def missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package not installed."""
    real = builtins.__import__

    def blocked(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", blocked)


# pymdptoolbox


def toolbox_values(transitions: Any, reward: Array, ends: Any = ()) -> Array:
    """Of P (A, S, S) and R (A, S, S), (S, A) or (S,)."""

    def backup(s: int, a: int) -> Any:
        row = np.asarray(transitions[a])[s]
        paid = (
            float(row @ reward[a][s])
            if reward.ndim == 3
            else reward[s]
            if reward.ndim == 1
            else reward[s, a]
        )
        return lambda v: paid + GAMMA * row @ v

    count = len(np.asarray(transitions[0]))
    return soft_values(
        [[] if s in ends else [backup(s, a) for a in range(len(transitions))] for s in range(count)]
    )


def toolbox(seed: int) -> tuple[Array, Array]:
    reward = np.random.default_rng(seed).normal(size=(3, 6, 6))
    return random_mdp(seed).transition.numpy().transpose(1, 0, 2), reward


@pytest.mark.parametrize("kind", ["(S,)", "(S, A)", "(A, S, S)"])
@pytest.mark.parametrize("sparse", [False, True])
def test_toolbox_tables_are_worth_what_they_say(kind: str, sparse: bool) -> None:
    P, R = toolbox(1)
    reward = {"(S,)": R[0, 0], "(S, A)": R[:, 0].T, "(A, S, S)": R}[kind]
    given: Any = [scipy.sparse.csr_matrix(p) for p in P] if sparse else P
    paid: Any = [scipy.sparse.csr_matrix(r) for r in R] if sparse and reward.ndim == 3 else reward
    if sparse and reward.ndim == 2:
        paid = scipy.sparse.csr_matrix(reward)
    mdp = convert.from_mdptoolbox(given, paid, GAMMA)
    assert isinstance(mdp, SparseMDP if sparse else DenseMDP)
    near(values(mdp), toolbox_values(P, reward), bound=1e-12, label="V")
    tables = convert.to_mdptoolbox(mdp)
    assert isinstance(tables.transitions, list if sparse else np.ndarray)
    same(convert.from_mdptoolbox(*tables), mdp)


def test_mixed_toolbox_tables_are_read() -> None:
    P, R = toolbox(2)
    want = toolbox_values(P, R)
    for transitions in (list(P), [scipy.sparse.csr_array(p) for p in P]):
        for reward in (list(R), [scipy.sparse.csr_array(r) for r in R]):
            mdp = convert.from_mdptoolbox(transitions, reward, GAMMA)
            near(values(mdp), want, bound=1e-12, label="V")


def test_an_absorbing_state_of_a_toolbox_is_an_end() -> None:
    P, R = toolbox(3)
    reward = R[:, 0].T.copy()
    P = P.copy()
    P[:, 2] = P[:, 4] = P[:, 5] = 0
    P[:, 2, 2] = P[:, 4, 4] = P[:, 5, 5] = 1
    reward[2], reward[4] = 0, 0.7
    mdp = convert.from_mdptoolbox(P, reward, GAMMA)
    found = values(mdp)
    assert found[2] == 0  # not τ log A / (1 − γ)
    near(found[4], 0.7 / (1 - GAMMA), bound=1e-12, label="V")
    want = soft_values([[lambda v: 0.7 + GAMMA * v[4]] if s == 4 else [] if s == 2 else
                        [(lambda v, s=s, a=a: reward[s, a] + GAMMA * P[a, s] @ v) for a in range(3)]
                        for s in range(6)])  # fmt: skip
    near(found, want, bound=1e-12, label="V")  # 5 pays differently: a choice that is meant
    assert mdp.mask is not None
    assert mdp.mask.sum(-1).tolist() == [3, 3, 0, 3, 1, 3]
    with pytest.raises(errors.OptionError, match=r"forbids an action .* at state 4, action 1"):
        convert.to_mdptoolbox(mdp)
    open_ = mdp.mask.clone()
    open_[4] = True
    again = convert.from_mdptoolbox(*convert.to_mdptoolbox(mdp.replace(
        mask=open_, transition=torch.as_tensor(P.transpose(1, 0, 2).copy()),
        reward=torch.as_tensor(reward))))  # fmt: skip
    same(again, mdp)


def test_an_end_that_is_paid_leads_to_one_that_is_added() -> None:
    mdp = random_mdp(4, terminal=torch.arange(6) == 5)
    for back in (
        convert.from_mdptoolbox(*convert.to_mdptoolbox(mdp)),
        convert.from_gymnasium(convert.to_gymnasium(mdp), GAMMA),
        convert.from_quantecon(stand_in(*convert.to_quantecon(mdp))),
    ):
        assert back.states == 7
        near(values(back), np.append(values(mdp), 0), bound=1e-12, label="V")


def test_the_toolbox_itself_agrees() -> None:
    mdptoolbox = pytest.importorskip("mdptoolbox.mdp")
    example = pytest.importorskip("mdptoolbox.example")
    P, R = example.forest()
    mdp = convert.from_mdptoolbox(P, R, GAMMA)
    near(values(mdp), toolbox_values(P, R), bound=1e-12, label="V")
    iteration = mdptoolbox.PolicyIteration(*convert.to_mdptoolbox(mdp))
    iteration.run()
    near(np.array(iteration.V), values(mdp, 1e-6), bound=1e-4, label="V")
    P, R = example.rand(8, 3, is_sparse=True)
    found = convert.from_mdptoolbox(P, R, GAMMA)
    dense = np.array([p.toarray() for p in P]), np.array([r.toarray() for r in R])
    near(values(found), toolbox_values(*dense), bound=1e-12, label="V")


SHORT = np.eye(3)[None].repeat(2, 0)
SHORT[1, 2] = [0.5, 0.4, 0]


@pytest.mark.parametrize(
    ("transitions", "reward", "error", "words"),
    [
        (SHORT, np.ones(3), errors.NonStochasticError, r"sums to 0\.9 at state 2, action 1"),
        ([scipy.sparse.csr_array(m) for m in SHORT], np.ones(3), errors.NonStochasticError,
         r"sums to 0\.9 at state 2, action 1"),
        (np.eye(3), np.ones(3), errors.ShapeError, r"shape \(3, 3\) \(allowed: \(A, S, S\)\)"),
        (np.ones((3, 2, 3)) / 3, np.ones(3), errors.ShapeError, r"DenseMDP takes it"),
        (np.eye(3)[None], np.ones((1, 3)), errors.ShapeError, r"\(1, 3\) .*transpose it"),
        (np.eye(3)[None], np.ones((1, 3, 2)), errors.ShapeError, r"1 matrices of shapes"),
        (scipy.sparse.eye_array(3), np.ones(3), errors.SparseFormatError, r"one sparse matrix"),
        ([scipy.sparse.eye_array(3), scipy.sparse.eye_array(2)], np.ones(3), errors.ShapeError,
         r"\(2, 2\) at action 1"),
        ([[[1.0], [1.0, 2.0]]], np.ones(3), errors.DtypeError, r"no table of numbers"),
        (np.eye(3)[None], [1.0, math.nan, 0.0], errors.NonFiniteInputError, r"nan at state 1"),
    ],
)  # fmt: skip
def test_malformed_toolbox_tables_are_refused(
    transitions: Any, reward: Any, error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        convert.from_mdptoolbox(transitions, reward, GAMMA)


# QuantEcon


def stand_in(R: Any, Q: Any, beta: float, s_indices: Any = None, a_indices: Any = None) -> Any:
    """The attributes of a DiscreteDP that its documentation names."""
    return types.SimpleNamespace(R=R, Q=Q, beta=beta, s_indices=s_indices, a_indices=a_indices)


def pair_values(R: Any, Q: Any, s: Any, a: Any, count: int) -> Array:
    """Of pairs; an absorbing state that pays nothing counts as an end."""
    found: list[list[Any]] = [[] for _ in range(count)]
    for i, state in enumerate(s):
        if R[i] > -np.inf:
            found[state].append(lambda v, i=i: R[i] + GAMMA * Q[i] @ v)
    return soft_values(found)


def test_a_product_form_is_worth_what_it_says() -> None:
    mdp = random_mdp(5)
    R, Q = mdp.reward.numpy().copy(), mdp.transition.numpy()
    R[1, 0] = R[3, 2] = -np.inf
    found = convert.from_quantecon(stand_in(R, Q, GAMMA))
    assert isinstance(found, DenseMDP)
    state, action = np.indices(R.shape).reshape(2, -1)
    want = pair_values(R.ravel(), Q.reshape(-1, 6), state, action, 6)
    near(values(found), want, bound=1e-12, label="V")
    for form in ("product", "pairs", None):
        same(convert.from_quantecon(stand_in(*convert.to_quantecon(found, untyped(form)))), found)


@pytest.mark.parametrize("sparse", [False, True])
def test_pairs_are_worth_what_they_say(sparse: bool) -> None:
    rng = np.random.default_rng(6)
    mdp = random_mdp(6)
    keep = rng.permutation(18)[:12]
    keep = np.union1d(keep, np.arange(0, 18, 3))
    rng.shuffle(keep)  # in any order
    R, Q = mdp.reward.numpy().ravel()[keep], mdp.transition.numpy().reshape(18, 6)[keep]
    given: Any = scipy.sparse.csr_matrix(Q) if sparse else Q
    found = convert.from_quantecon(stand_in(R, given, GAMMA, keep // 3, keep % 3))
    assert isinstance(found, SparseMDP)
    near(values(found), pair_values(R, Q, keep // 3, keep % 3, 6), bound=1e-12, label="V")
    for form in ("product", "pairs", None):
        same(convert.from_quantecon(stand_in(*convert.to_quantecon(found, untyped(form)))), found)


@pytest.mark.parametrize("form", ["product", "pairs"])
def test_ends_and_masks_come_back_from_both_forms(form: Any) -> None:
    mdp = ending(7, mask=True)
    same(convert.from_quantecon(stand_in(*convert.to_quantecon(mdp, form))), mdp)


def test_quantecon_itself_agrees() -> None:
    markov = pytest.importorskip("quantecon.markov")
    mdp = ending(8, mask=True)
    for form in ("product", "pairs"):
        problem = markov.DiscreteDP(*convert.to_quantecon(mdp, untyped(form)))
        same(convert.from_quantecon(problem), mdp)
        result = problem.solve(method="policy_iteration")
        near(result.v, values(mdp, 1e-6), bound=1e-4, label="V")
    R, Q = [[5, 10], [-1, -math.inf]], [[(0.5, 0.5), (0, 1)], [(0, 1), (0.5, 0.5)]]
    found = convert.from_quantecon(markov.DiscreteDP(R, Q, 0.95))
    near(values(found, 1e-6), np.array([-8.57142857, -20]), bound=1e-4, label="V")


ROWS = np.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("problem", "error", "words"),
    [
        (5, errors.OptionError, r"has no R"),
        (stand_in(np.zeros((2, 2)), ROWS, 0.9), errors.ShapeError, r"\(2, 2\) and Q \(2, 2\)"),
        (stand_in(np.zeros((1, 2)), [[[0.9], [1.0]]], 0.9), errors.NonStochasticError,
         r"0\.9 at state 0, action 0"),
        (stand_in(np.zeros((1, 1)), [[[1.0]]], 1.0), errors.DiscountError, r"discount is 1\.0"),
        (stand_in(np.zeros(2), ROWS, 0.9, [0, 2], [0, 0]), errors.ShapeError,
         r"s_indices is 2 at entry 1 \(allowed: 0 to 1\)"),
        (stand_in(np.zeros(2), ROWS, 0.9, [0, 1], [0, -1]), errors.ShapeError, r"a_indices is -1"),
        (stand_in(np.zeros(2), ROWS, 0.9, [0, 1], [0, 0.5]), errors.DtypeError, r"whole numbers"),
        (stand_in(np.zeros(2), ROWS, 0.9, [0, 0], [1, 1]), errors.OptionError,
         r"given twice at state 0, action 1"),
        (stand_in(np.zeros(2), ROWS, 0.9, [0, 0], [0, 1]), errors.EmptyActionSetError,
         r"state 1"),
        (stand_in(np.zeros(2), ROWS[:1], 0.9, [0, 1], [0, 1]), errors.ShapeError, r"of L pairs"),
        (stand_in(np.zeros(2), ROWS, 0.9, [0, 1, 1], [0, 1, 0]), errors.ShapeError, r"length 3"),
        (stand_in(np.zeros(2), ROWS * [[1], [0.8]], 0.9, [0, 1], [0, 1]),
         errors.NonStochasticError, r"0\.8 at state 1, action 1"),
        (stand_in(np.zeros(2), [[0.5, 0.5], [1.5, -0.5]], 0.9, [0, 1], [0, 1]),
         errors.NegativeProbabilityError, r"-0\.5 at state 1, action 1, next state 1"),
    ],
)  # fmt: skip
def test_a_malformed_discrete_dp_is_refused(problem: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        convert.from_quantecon(problem)


# PRISM and Storm

TRA = """3 4 6
0 0 1 0.5 go
0 0 2 0.5 go
0 1 0 1 stay
1 0 0 0.25 go
1 0 1 0.75 go
2 0 2 1
"""
SREW = "3 2\n0 1.5\n1 -1\n"
TREW = "# Reward structure\n3 4 2\n0 0 1 2\n0 0 2 4\n"
LAB = '0="init" 1="deadlock" 2="target"\n0: 0\n2: 1 2\n'
STORM_LAB = "#DECLARATION\ninit deadlock target\n#END\n0 init\n2 deadlock target\n"


def write(folder: Path, **files: str) -> dict[str, Path]:
    paths = {}
    for name, text in files.items():
        paths[name] = folder / f"model.{name}"
        paths[name].write_text(text)
    return paths


def prism_values() -> Array:
    """Of the files above."""
    return soft_values(
        [
            [
                lambda v: 1.5 + 0.5 * 2 + 0.5 * 4 + GAMMA * (0.5 * v[1] + 0.5 * v[2]),
                lambda v: 1.5 + GAMMA * v[0],
            ],
            [lambda v: -1 + GAMMA * (0.25 * v[0] + 0.75 * v[1])],
            [],
        ]
    )


@pytest.mark.parametrize("storm", [False, True])
def test_explicit_files_are_worth_what_they_say(tmp_path: Path, storm: bool) -> None:
    tra = "mdp\n" + TRA.partition("\n")[2] if storm else TRA
    srew = SREW.partition("\n")[2] if storm else SREW
    trew = "".join(TREW.splitlines(True)[2:]) if storm else TREW
    paths = write(tmp_path, tra=tra, srew=srew, trew=trew, lab=STORM_LAB if storm else LAB)
    model = convert.read_prism(
        paths["tra"],
        GAMMA,
        state_rewards=paths["srew"],
        transition_rewards=paths["trew"],
        labels=paths["lab"],
    )
    near(values(model.mdp), prism_values(), bound=1e-12, label="V")
    assert model.mdp.terminal is not None
    assert model.mdp.terminal.tolist() == [False, False, True]
    assert {name: on.tolist() for name, on in model.labels.items()} == {
        "init": [True, False, False],
        "deadlock": [False, False, True],
        "target": [False, False, True],
    }
    assert model.mdp.initial_distribution is not None
    assert model.mdp.initial_distribution.tolist() == [1, 0, 0]


def test_a_chain_and_a_deadlock_without_a_loop(tmp_path: Path) -> None:
    paths = write(tmp_path, tra="3 3\n0 1 .5\n0 2 5e-1\n1 0 1\n", rew="0 2\n", trew="0 1 3\n")
    model = convert.read_prism(
        paths["tra"], GAMMA, state_rewards=paths["rew"], transition_rewards=paths["trew"]
    )
    want = soft_values(
        [[lambda v: 2 + 1.5 + GAMMA * (v[1] + v[2]) / 2], [lambda v: GAMMA * v[0]], []]
    )
    near(values(model.mdp), want, bound=1e-12, label="V")


@pytest.mark.parametrize("seed", range(3))
def test_explicit_files_come_back(tmp_path: Path, seed: int) -> None:
    mdp = ending(seed, mask=True).to_sparse()
    mdp = mdp.replace(initial_distribution=torch.tensor([0.5, 0, 0.5, 0, 0, 0]).double())
    far = np.arange(6) > 3
    paths = convert.write_prism(mdp, tmp_path / "own", labels={"far": far})
    assert [path.name for path in paths] == ["own.tra", "own.trew", "own.lab"]
    tra, trew, lab = paths
    model = convert.read_prism(tra, GAMMA, transition_rewards=trew, labels=lab, by="name")
    assert model.actions == ["a0", "a1", "a2"]
    same(model.mdp, mdp)
    assert model.labels["far"].tolist() == far.tolist()
    assert model.labels["deadlock"].tolist() == [False] * 5 + [True]
    by_choice = convert.read_prism(tra, GAMMA, transition_rewards=trew).mdp
    near(values(by_choice), values(mdp), bound=1e-12, label="V")


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({"tra": TRA.replace("0.75", "0.65")}, errors.NonStochasticError,
         r"sum to 0\.9 at state 1, action 0"),
        ({"tra": TRA.replace("3 4 6", "3 4 7")}, errors.FileFormatError, r"has 6 transitions"),
        ({"tra": TRA.replace("1 0 0 0.25", "1 0 9 0.25")}, errors.FileFormatError,
         r"state 9 at line 5 \(allowed: 0 to 2\)"),
        ({"tra": TRA.replace("0.25", "x")}, errors.FileFormatError, r"1 0 0 x go at line 5"),
        ({"tra": TRA.replace("0.25", "-0.25").replace("0.75", "1.25")},
         errors.NegativeProbabilityError, r"-0\.25 at state 1, action 0, next state 0"),
        ({"tra": ""}, errors.FileFormatError, r"is empty"),
        ({"tra": "what is this"}, errors.FileFormatError, r"what is this at line 1"),
        ({"tra": "mdp\n"}, errors.FileFormatError, r"no transitions"),
        ({"srew": "3 3\n0 1.5\n"}, errors.FileFormatError, r"has 1 rewards \(allowed: 3"),
        ({"srew": "7 1.5\n"}, errors.FileFormatError, r"state 7 at line 1"),
        ({"trew": "0 0 0 1\n"}, errors.FileFormatError, r"transition that the model lacks"),
        ({"trew": "0 0 1 1 1\n"}, errors.FileFormatError, r"0 0 1 1 1 at line 1"),
        ({"lab": '0="init"\n0: 4\n'}, errors.FileFormatError, r"label 4 at line 2"),
        ({"lab": '0="init"\n9: 0\n'}, errors.FileFormatError, r"state 9 at line 2"),
        ({"lab": '0="init"\n0 0\n'}, errors.FileFormatError, r"0 0 at line 2"),
        ({"lab": "#DECLARATION\ninit\n"}, errors.FileFormatError, r"no #END"),
        ({"lab": "#DECLARATION\ninit\n#END\n0 start\n"}, errors.FileFormatError, r"label start"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused(
    tmp_path: Path, files: dict[str, str], error: type, words: str
) -> None:
    paths = write(tmp_path, **{"tra": TRA, "srew": SREW, "trew": TREW, "lab": LAB, **files})
    with pytest.raises(error, match=words):
        convert.read_prism(
            paths["tra"],
            GAMMA,
            state_rewards=paths["srew"],
            transition_rewards=paths["trew"],
            labels=paths["lab"],
        )


def test_files_are_refused_by_name(tmp_path: Path) -> None:
    tra = write(tmp_path, tra=TRA)["tra"]
    with pytest.raises(errors.OptionError, match="by is 'x'"):
        convert.read_prism(tra, GAMMA, by=untyped("x"))
    with pytest.raises(errors.OptionError, match=r"a choice has no name at .*line 7"):
        convert.read_prism(tra, GAMMA, by="name")
    tra.write_text(TRA.replace("stay", "go"))
    with pytest.raises(errors.OptionError, match=r"a choice has no name|two choices"):
        convert.read_prism(tra, GAMMA, by="name")
    with pytest.raises(errors.FileFormatError, match="cannot be read"):
        convert.read_prism(tmp_path / "none.tra", GAMMA)
    start = torch.tensor([0.25, 0.75, 0, 0, 0, 0]).double()
    with pytest.raises(errors.OptionError, match="not uniform"):
        convert.write_prism(random_mdp(1, initial_distribution=start), tmp_path / "x")
    with pytest.raises(errors.ShapeError, match=r"label 'far' has shape \(2,\)"):
        convert.write_prism(random_mdp(1), tmp_path / "x", labels={"far": [True, False]})


# What no form holds


@pytest.mark.parametrize("to", [convert.to_gymnasium, convert.to_mdptoolbox, convert.to_quantecon])
def test_what_a_form_cannot_hold_is_refused(to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = random_mdp(1)
    with pytest.raises(errors.OptionError, match="has a reference"):
        to(mdp.replace(reference=torch.ones(6, 3).double()))
    with pytest.raises(errors.ShapeError, match="has batch axes"):
        to(mdp.replace(reward=mdp.reward.expand(2, 6, 3)))
    with pytest.raises(errors.OptionError, match="mdp is 5"):
        to(5)
    missing(monkeypatch, "scipy")
    with pytest.raises(errors.MissingDependencyError, match="pip install scipy"):
        to(mdp)


# Logs


def logged(seed: int, count: int) -> tuple[DenseMDP, dict[str, Array]]:
    """Transitions of a uniform policy through a process with an end, started anew at each end."""
    mdp = ending(seed)
    rng = np.random.default_rng(seed)
    P, r = mdp.transition.numpy(), mdp.reward.numpy()
    columns: dict[str, list[Any]] = {
        name: [] for name in ("state", "action", "next_state", "reward", "terminated")
    }
    state = 0
    for _ in range(count):
        action = int(rng.integers(3))
        following = int(rng.choice(6, p=P[state, action]))
        row = (state, action, following, r[state, action] + rng.normal(), following == 5)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
        state = int(rng.integers(5)) if following == 5 else following
    return mdp, {name: np.array(column) for name, column in columns.items()}


def test_a_log_is_counted() -> None:
    log = {
        "state": [0, 0, 0, 1, 1],
        "action": [0, 0, 1, 0, 1],
        "next_state": [1, 2, 0, 2, 0],
        "reward": [1.0, 3.0, 5.0, -1.0, 0.0],
        "terminated": [False, True, False, True, False],
    }
    found = convert.from_logs(**untyped(log), discount=GAMMA)
    assert found.mdp.states == 3
    assert found.counts.tolist() == [[2, 1], [1, 1], [0, 0]]
    assert found.mdp.reward.tolist() == [[2, 5], [-1, 0], [0, 0]]
    assert found.mdp.terminal is not None
    assert found.mdp.terminal.tolist() == [False, False, True]
    dense = found.mdp.to_dense().transition
    assert dense[0, 0].tolist() == [0, 0.5, 0.5]
    error = torch.zeros(6, 3, dtype=torch.float64)
    error[found.mdp.rows(), found.mdp.col] = found.transition_error
    near(error[0].numpy(), np.array([0, 0.5, 0.5]) / np.sqrt(2), bound=1e-15, label="se")
    assert float(found.reward_error[0, 0]) == 1.0  # √2 / √2
    assert found.reward_error[0, 1].isnan()
    assert not found.unseen.any()
    assert not found.dead_ends.any()


def test_errors_of_a_log_are_as_large_as_they_say() -> None:
    """Over 60 logs, standardised errors have variance one."""
    scores: list[float] = []
    pays: list[float] = []
    for seed in range(60):
        mdp, log = logged_again(seed, 1500)
        found = convert.from_logs(**untyped(log), discount=GAMMA)
        rows, col = found.mdp.rows(), found.mdp.col
        truth = mdp.transition.reshape(-1, 6)[rows, col]
        error = found.transition_error
        fine = (found.counts.flatten()[rows] * truth > 8) & (truth < 1) & (error > 0)
        scores += ((found.mdp.values - truth) / error)[fine].tolist()
        paid = (found.mdp.reward - mdp.reward) / found.reward_error
        pays += paid[found.counts > 30].tolist()
    assert len(scores) > 500
    assert len(pays) > 300
    for sample in (scores, pays):
        deviation = np.std(sample)
        assert 0.9 < deviation < 1.12
        assert abs(np.mean(sample)) < 5 / math.sqrt(len(sample))


def logged_again(seed: int, count: int) -> tuple[DenseMDP, dict[str, Array]]:
    """`logged` of one process by different draws."""
    mdp = ending(1)
    rng = np.random.default_rng([1, seed])
    P, r = mdp.transition.numpy().cumsum(-1), mdp.reward.numpy()
    state = rng.integers(5, size=count)
    action = rng.integers(3, size=count)
    following = (P[state, action] < rng.random(count)[:, None] * P[state, action, -1:]).sum(-1)
    paid = r[state, action] + rng.normal(size=count)
    return mdp, {
        "state": state,
        "action": action,
        "next_state": following,
        "reward": paid,
        "terminated": following == 5,
    }


def test_a_long_log_tells_the_process() -> None:
    mdp, log = logged(2, 8000)
    tensors = {name: torch.as_tensor(column) for name, column in log.items()}
    found = convert.from_logs(**untyped(tensors), discount=GAMMA, first=[0, 0, 1, 2])
    same(found.mdp.replace(initial_distribution=None), mdp, bound=0.3)
    near(values(found.mdp), values(mdp), bound=0.4, label="V")
    assert found.mdp.initial_distribution is not None
    assert found.mdp.initial_distribution.tolist() == [0.5, 0.25, 0.25, 0, 0, 0]


def test_a_prior_spreads_over_what_was_seen() -> None:
    log = ([0, 0, 1], [0, 0, 0], [1, 1, 0], [1.0, 1.0, 0.0], [False, True, False])
    found = convert.from_logs(*log, discount=GAMMA, prior=0.5)
    # places: 0, 1, and the end; of n = 2 one went to 1 and one ended
    want = np.array([[0.5, 1.5, 1.5], [1.5, 0.5, 0.5]]) / [[3.5], [2.5]]
    dense = found.mdp.to_dense().transition[:2, 0].numpy()
    near(dense, want, bound=1e-15, label="P")
    law = found.mdp.values.numpy()
    n = np.array([2, 2, 2, 1, 1, 1])
    spread = np.sqrt(law * (1 - law) / (n + 1.5 + 1))
    near(found.transition_error.numpy(), spread, bound=1e-15, label="sd")


def test_what_was_never_done_is_refused_or_masked() -> None:
    log = ([0, 1], [0, 1], [1, 2], [1.0, 2.0])
    with pytest.raises(errors.UninformativeDataError, match=r"2 actions .* at state 0, action 1"):
        convert.from_logs(*log, discount=GAMMA)
    found = convert.from_logs(*log, discount=GAMMA, unseen="mask", states=4)
    assert found.unseen.tolist() == [[False, True], [True, False], [False] * 2, [False] * 2]
    assert found.dead_ends.tolist() == [False, False, True, False]
    near(values(found.mdp), np.array([1 + GAMMA * 2, 2, 0, 0]), bound=1e-12, label="V")
    with pytest.raises(errors.UninformativeDataError, match=r"is no end at state 1, after entry 0"):
        convert.from_logs([0], [0], [1], [1.0], discount=GAMMA)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"reward": [1.0, math.nan]}, errors.NonFiniteInputError, r"reward is nan at entry 1"),
        ({"state": [0, -1]}, errors.ShapeError, r"state is -1 at entry 1"),
        ({"state": [0, 5], "states": 2}, errors.ShapeError, r"state is 5 at entry 1"),
        ({"action": [0, 0.5]}, errors.DtypeError, r"action holds float64"),
        ({"action": [0]}, errors.ShapeError, r"action has shape \(1,\)"),
        ({"terminated": [0, 2]}, errors.DtypeError, r"terminated holds"),
        ({"unseen": "stay"}, errors.OptionError, r"unseen is 'stay'"),
        ({"prior": -1}, errors.OptionError, r"prior is -1"),
        ({"first": []}, errors.ShapeError, r"first is empty"),
        ({"state": [], "action": [], "next_state": [], "reward": []},
         errors.UninformativeDataError, r"no transitions"),
    ],
)  # fmt: skip
def test_a_malformed_log_is_refused(changes: Any, error: type, words: str) -> None:
    log: dict[str, Any] = {
        "state": [0, 1], "action": [0, 0], "next_state": [1, 0], "reward": [1.0, 2.0]
    }  # fmt: skip
    with pytest.raises(error, match=words):
        convert.from_logs(**{**log, **changes}, discount=GAMMA)


# Stacks


def parts() -> list[DenseMDP]:
    return [
        random_mdp(1, 4, 2),
        ending(2, mask=True),
        random_mdp(3, 2, 5).replace(discount=0.5),
        random_mdp(4, 5, 3, terminal=torch.arange(5) == 0),
    ]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_stack_is_worth_what_its_parts_are(sparse: bool) -> None:
    mdps: list[Any] = [mdp.to_sparse() if sparse else mdp for mdp in parts()]
    stacked = convert.stack(mdps)
    assert stacked.mdp.batch_shape == (4,)
    assert stacked.states.sum(-1).tolist() == [4, 6, 2, 5]
    solution = birl_ext.solve(stacked.mdp, temperature=TAU)
    for mdp, value, policy in zip(
        mdps, stacked.parts(solution.value), stacked.parts(solution.policy), strict=True
    ):
        alone = birl_ext.solve(mdp, temperature=TAU)
        near(value.numpy(), alone.value.numpy(), bound=1e-12, label="V")
        near(policy.numpy(), alone.policy.numpy(), bound=1e-12, label="π")
    assert (solution.value[~stacked.states] == 0).all()
    with pytest.raises(errors.ShapeError, match=r"allowed: \(N, S\) = \(4, 6\)"):
        stacked.parts(solution.value[0])


def test_a_stack_keeps_references_starts_and_gradients() -> None:
    first = random_mdp(1, 4, 2, initial_distribution=torch.full((4,), 0.25).double())
    second = random_mdp(2, 3, 3, reference=torch.full((3, 3), 1 / 3, dtype=torch.float64))
    second = second.replace(initial_distribution=torch.tensor([1.0, 0, 0]).double())
    reward = first.reward.clone().requires_grad_()
    stacked = convert.stack([first.replace(reward=reward), second])
    value = birl_ext.solve(stacked.mdp, temperature=TAU).value
    for i, mdp in enumerate((first, second)):
        near(value[i, : mdp.states].detach().numpy(), values(mdp), bound=1e-12, label="V")
    start = stacked.mdp.initial_distribution
    assert start is not None
    assert start.tolist() == [[0.25] * 4, [1, 0, 0, 0]]
    (value * start).sum().backward()
    alone = first.reward.clone().requires_grad_()
    birl_ext.solve(first.replace(reward=alone), temperature=TAU).value.mean().backward()
    assert reward.grad is not None
    assert alone.grad is not None
    near(reward.grad.numpy(), alone.grad.numpy(), bound=1e-12, label="dV/dr")


def test_equal_sizes_need_no_mask() -> None:
    stacked = convert.stack([random_mdp(1), random_mdp(2)])
    assert stacked.mdp.mask is None
    assert stacked.mdp.terminal is None
    assert stacked.mdp.discount == GAMMA


@pytest.mark.parametrize(
    ("mdps", "error", "words"),
    [
        ([], errors.OptionError, r"no MDPs"),
        ([random_mdp(1), 5], errors.OptionError, r"mdps\[1\] is 5"),
        ([random_mdp(1), random_mdp(1).to_sparse()], errors.OptionError, r"to_dense\(\)"),
        ([random_mdp(1), random_mdp(1).to(torch.float32)], errors.DtypeError, r"mdps\[1\]"),
        ([random_mdp(1).replace(reward=torch.zeros(2, 6, 3).double())], errors.ShapeError,
         r"mdps\[0\] has batch axes"),
        ([random_mdp(1), random_mdp(1, initial_distribution=torch.ones(6).double() / 6)],
         errors.OptionError, r"initial distribution"),
    ],
)  # fmt: skip
def test_what_cannot_be_stacked_is_refused(mdps: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        convert.stack(mdps)


# Ends


@pytest.mark.parametrize("sparse", [False, True])
def test_ends_are_masked(sparse: bool) -> None:
    rows = torch.eye(4, dtype=torch.float64).unsqueeze(1).repeat(1, 2, 1)
    rows[0] = torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 0, 1.0]])
    reward = torch.tensor([[1.0, 2], [0, 0], [3, 3], [5, 5]]).double()
    dense = DenseMDP(reward, rows, GAMMA, terminal=torch.arange(4) == 3)
    mdp: MDP = dense.to_sparse() if sparse else dense
    closed = convert.mask_ends(mdp)
    q = [1 + GAMMA * 0.5 * 30, 2 + GAMMA * 5]
    want = TAU * math.log(math.exp(q[0] / TAU) + math.exp(q[1] / TAU))
    near(values(closed), np.array([want, 0, 30, 5]), bound=1e-12, label="V")
    assert closed.terminal is not None
    assert closed.terminal.tolist() == [False, True, False, True]
    assert convert.mask_ends(closed) is closed
    open_ = mdp.replace(reference=torch.full((4, 2), 0.5, dtype=torch.float64))
    assert convert.mask_ends(open_) is open_  # normalised: worth r as it is
    skewed = convert.mask_ends(mdp.replace(reference=torch.full((4, 2), 0.2, dtype=torch.float64)))
    near(values(skewed)[1:], np.array([0, 30.0, 5]), bound=1e-12, label="V")
    with pytest.raises(errors.ShapeError, match="has batch axes"):
        convert.mask_ends(mdp.replace(reward=reward.expand(2, 4, 2)))
