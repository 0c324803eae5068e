"""Gymnasium: the tables P of its toy texts, and any small environment by enumeration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from birl_ext.convert.enumeration import Script, outcomes
from birl_ext.convert.table import Rows, assemble, continuing, refuse_sums, start_of
from birl_ext.errors import MissingDependencyError, OptionError, ShapeError, SizeLimitError
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP, SparseMDP

__all__ = ["EnumeratedMDP", "enumerate_env", "from_gymnasium", "key_of", "to_gymnasium"]

Table = dict[int, dict[int, list[tuple[float, int, float, bool]]]]
Restore = Callable[[Any, Any], None]

# wrappers that hide the environment's state in a counter, or only watch
_ASIDE = ("TimeLimit", "OrderEnforcing", "PassiveEnvChecker")


def from_gymnasium(
    table: Any,
    discount: float,
    *,
    initial: Any = None,
    dtype: torch.dtype = torch.float64,
) -> SparseMDP:
    """The MDP of a toy text's table, P[s][a] = [(probability, next state, reward, done), …].

        P(t|s, a) = Σ probability,   r(s, a) = Σ probability · reward

    Ends: `done` belongs to an outcome, and nothing follows it: the value behind it is 0. A state
    that is entered by such outcomes alone, and where no episode starts, is the end itself:
    terminal, without an action, whatever the table says of it. If other outcomes lead to it too,
    those that are done go to a state of their own, the last. Time limits are no ends, and are left
    out.

    Args:
        table: the dictionary, or an environment that has it as `P`: FrozenLake, CliffWalking, Taxi.
            An action that a state's dictionary lacks is masked.
        discount: γ in [0, 1).
        initial: ρ: (S,), a state, or {state: probability}; None is the environment's own, if the
            table is an environment's.
        dtype: float64 or float32.

    Raises:
        OptionError: there is no table, or an outcome is not of the form above.
        NonStochasticError: a row does not sum to one; state, action and sum are named.
        InvalidMDPError: other numbers that are none of an MDP.

    Source: (M1).
    """
    if not isinstance(table, Mapping):
        inner = getattr(table, "unwrapped", table)
        found = getattr(inner, "P", None)
        if not isinstance(found, Mapping):
            raise OptionError(
                f"table is {checks.kind_of(table)}",
                allowed="a dictionary of states, or an environment that has one as P",
                fix="use enumerate_env for an environment without a table",
            )
        if initial is None:
            initial = getattr(inner, "initial_state_distrib", None)
        table = found
    states = _numbered(table, "state")
    for state in range(states):
        _numbered(table[state], f"action of state {state}", gaps=True)
    actions = 1 + max((int(a) for row in table.values() for a in row), default=0)
    mask, reward, sums = (np.zeros((states, actions)) for _ in range(3))
    found_rows: list[tuple[int, int, int, float, bool]] = []
    for state in range(states):
        for action, listed in table[state].items():
            mask[state, action] = 1
            for outcome in listed:
                p, following, paid, done = _outcome(outcome, state, action, states)
                sums[state, action] += p
                reward[state, action] += p * paid
                found_rows.append((state, action, following, p, done))
    refuse_sums(sums, mask > 0, checks.row_sum_tolerance(torch.float64, states))
    rows = _rows(found_rows)
    start = start_of(initial, states)
    return assemble(rows, reward, discount, mask=mask > 0, initial=start, dtype=dtype)


def to_gymnasium(mdp: DenseMDP | SparseMDP) -> Table:
    """The table P of an MDP; `from_gymnasium` reads it back. For an environment to act in:
    `birl_ext.environments.finite.FiniteEnvironment`.

    Ends: an outcome that enters an end without an action is done. An end with an action, which is
    paid, leads, done, to a state that is added. The discount and ρ are left out.

    Args:
        mdp: without batch axes or a reference. A masked action is left out of its state.

    Raises:
        ShapeError: it has batch axes.
        OptionError: it has a reference.
        MissingDependencyError: no scipy.
    """
    found = continuing(mdp, "a table P")
    states, actions = found.reward.shape
    crow, col, values = (
        part.tolist()
        for part in (found.transition.indptr, found.transition.indices, found.transition.data)
    )
    ends = found.ends.tolist()
    table: Table = {}
    for state in range(states):
        table[state] = {}
        for action in np.flatnonzero(found.mask[state]).tolist():
            row = state * actions + action
            paid = float(found.reward[state, action])
            table[state][action] = [
                (values[i], col[i], paid, ends[col[i]]) for i in range(crow[row], crow[row + 1])
            ]
    return table


class EnumeratedMDP(NamedTuple):
    """An environment as an MDP.

    Args:
        mdp: its states in the order in which they were found.
        observations: of each state; the last of `mdp` may have none, where the process ends.
        state_of: from an observation, as `key_of` writes it, to its state.
    """

    mdp: SparseMDP
    observations: list[Any]
    state_of: dict[Hashable, int]


def enumerate_env(
    env: Any,
    discount: float,
    *,
    restore: Restore | None = None,
    initial: Mapping[Any, float] | None = None,
    max_states: int = 10_000,
    max_outcomes: int = 100_000,
    dtype: torch.dtype = torch.float64,
) -> EnumeratedMDP:
    """The MDP of a small environment with discrete actions, by going everywhere.

    Each action is taken in each state that can be reached, once for every way in which the
    environment's draws can come out: while it is enumerated, `np_random` is a script that counts
    the outcomes of `choice`, `integers`, `random` and `permutation` and knows their probabilities.
    So P and r are exact and nothing is sampled. What the environment draws from elsewhere is not
    seen.

    Ends: `terminated` belongs to an outcome, and nothing follows it: the value behind it is 0. A
    state that is entered by such outcomes alone, and where no episode starts, is the end itself:
    terminal, without an action. If others lead to it too, those that terminate go to a state of
    their own, the last, that has no observation. A state that only the next action ends has that
    choice, and its entropy. `truncated` is no end, and wrappers that only count steps are taken
    off.

    An observation has to be the whole state. By default an environment is copied, and each state
    that is met twice is enumerated twice: if the two differ, something is hidden.

    Args:
        env: a Gymnasium environment. It is copied, not stepped.
        discount: γ in [0, 1).
        restore: (environment, observation) → None puts it into the state behind an observation, and
            draws from its `np_random` what is hidden. None is the environment's own `restore`, if
            it has one, else copies.
        initial: {observation: probability} where episodes start, for environments whose `reset`
            draws too much; needs `restore`. None enumerates `reset`.
        max_states: most states.
        max_outcomes: most ways in which one step, or one reset, can come out.
        dtype: float64 or float32.

    Raises:
        OptionError: actions are not discrete, something is hidden, or a number is drawn whose
            outcomes cannot be counted.
        SizeLimitError: more states or outcomes than allowed.
        MissingDependencyError: no gymnasium.

    Source: (M1).
    """
    try:
        import gymnasium
    except ImportError:
        raise MissingDependencyError(
            "enumerate_env needs gymnasium", fix='pip install "birl_ext[rl]"'
        ) from None
    while type(env).__name__ in _ASIDE:
        env = env.env
    space = env.action_space
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise OptionError(
            f"the environment's actions are {space}",
            allowed="Discrete",
            fix="wrap it so that its actions are numbered",
        )
    checks.check_count("max_states", max_states)
    checks.check_count("max_outcomes", max_outcomes)
    if restore is None and callable(getattr(env.unwrapped, "restore", None)):
        restore = _own_restore
    if initial is not None and restore is None:
        raise OptionError(
            "initial is given without restore",
            allowed="both, or none",
            fix="give restore(environment, observation), which puts it there",
        )
    search = _Search(env, restore, max_states, max_outcomes)
    return search.run(int(space.start), int(space.n), discount, initial, dtype)


def key_of(observation: Any) -> Hashable:
    """An observation as a key of a dictionary: arrays as tuples, numbers as Python's.

    Args:
        observation: a number, a text, an array, or a tuple, list or dictionary of them.

    Raises:
        OptionError: it is none of them, and has no hash.
    """
    if isinstance(observation, np.ndarray):
        return key_of(observation.tolist())
    if isinstance(observation, np.generic):
        found: Hashable = observation.item()
        return found
    if isinstance(observation, tuple | list):
        return tuple(key_of(part) for part in observation)
    if isinstance(observation, Mapping):
        return tuple((name, key_of(part)) for name, part in sorted(observation.items()))
    if not isinstance(observation, Hashable):
        raise OptionError(
            f"an observation is {checks.kind_of(observation)}",
            allowed="numbers, texts, arrays, and tuples or dictionaries of them",
        )
    return observation


class _Search:
    """States found so far, and how each is entered again."""

    def __init__(self, env: Any, restore: Restore | None, states: int, most: int) -> None:
        self.env, self.restore, self.states, self.most = copied(env), restore, states, most
        self.index: dict[Hashable, int] = {}
        self.seen: list[Any] = []
        self.copies: list[Any] = []
        self.again: dict[int, Any] = {}
        self.laws: dict[tuple[int, int], tuple[dict[tuple[int, bool], float], float]] = {}

    def run(
        self, first: int, actions: int, discount: float, initial: Any, dtype: torch.dtype
    ) -> EnumeratedMDP:
        start: dict[int, float] = {}
        if initial is None:
            for p, (shown, env) in outcomes(self._reset, self.most, "reset"):
                state = self._state(shown, env)
                start[state] = start.get(state, 0.0) + p
        else:
            for shown, p in initial.items():
                start[self._state(shown, None)] = float(p)
        visited: set[int] = set()
        pending = list(start)
        while pending:
            state = pending.pop(0)
            if state in visited:
                continue
            visited.add(state)
            for action in range(actions):
                law, paid = self.laws[state, action] = self._step(state, action, first)
                pending += [following for following, ended in law if not ended]
        for state in self.again:
            self._compare(state, actions, first)
        size = len(self.seen)
        reward = np.zeros((size, actions))
        rows = []
        for (state, action), (law, paid) in self.laws.items():
            reward[state, action] = paid
            rows += [(state, action, t, p, ended) for (t, ended), p in law.items()]
        begins = np.zeros(size)
        begins[list(start)] = list(start.values())
        mdp = assemble(_rows(rows), reward, discount, initial=begins, dtype=dtype)
        return EnumeratedMDP(mdp, self.seen, self.index)

    def _reset(self, script: Script) -> tuple[Any, Any]:
        env = self.env if self.restore is not None else copied(self.env)
        scripted(env, script)
        shown, _ = env.reset()
        return shown, env

    def _step(
        self, state: int, action: int, first: int, source: Any = None
    ) -> tuple[dict[tuple[int, bool], float], float]:
        """Probabilities of (next state, whether it ended), and E[reward]."""

        def take(script: Script) -> tuple[Any, float, bool, Any]:
            env = self._at(state, script, source)
            shown, paid, ended, _, _ = env.step(first + action)
            return shown, float(paid), bool(ended), env

        law: dict[tuple[int, bool], float] = {}
        mean = 0.0
        where = f"observation {key_of(self.seen[state])!r}, action {first + action}"
        for p, (shown, paid, ended, env) in outcomes(take, self.most, where):
            following = self._state(shown, None if ended else env)
            law[following, ended] = law.get((following, ended), 0.0) + p
            mean += p * paid
        return law, mean

    def _at(self, state: int, script: Script, source: Any) -> Any:
        if self.restore is not None:
            scripted(self.env, script)
            self.restore(self.env, copy.deepcopy(self.seen[state]))
            return self.env
        env = copied(self.copies[state] if source is None else source)
        scripted(env, script)
        return env

    def _state(self, shown: Any, env: Any) -> int:
        """The number of an observation; who went there is kept, to go on from."""
        key = key_of(shown)
        state = self.index.get(key)
        if state is None:
            state = self.index[key] = len(self.seen)
            self.seen.append(copy.deepcopy(shown))
            self.copies.append(None)
            if state >= self.states:
                raise SizeLimitError(
                    f"the environment has more than {self.states} states",
                    allowed=f"max_states = {self.states}",
                    fix="raise max_states, or let the environment show a coarser observation",
                )
        if self.restore is None and env is not None:
            if self.copies[state] is None:
                self.copies[state] = env
            else:
                self.again.setdefault(state, env)
        return state

    def _compare(self, state: int, actions: int, first: int) -> None:
        """Refuse a state from which two ways of getting there lead on differently."""
        for action in range(actions):
            known, paid = self.laws[state, action]
            law, mean = self._step(state, action, first, self.again[state])
            same = known.keys() == law.keys() and abs(mean - paid) <= 1e-9 * (1 + abs(paid))
            if not same or any(abs(known[k] - p) > 1e-9 for k, p in law.items()):
                raise OptionError(
                    "what follows depends on more than the observation",
                    where=f"observation {key_of(self.seen[state])!r}, action {first + action}",
                    allowed="observations that are the whole state",
                    fix="give restore(environment, observation), which draws what is hidden; or "
                    "show it",
                )


def copied(env: Any) -> Any:
    """A copy with a state of its own; what by Gymnasium's conventions never changes is shared."""
    inner = env.unwrapped
    fixed = [env.action_space, env.observation_space, env.spec]
    fixed += [inner.action_space, inner.observation_space, getattr(inner, "P", None)]
    fixed += [getattr(inner, "_np_random", None)]
    return copy.deepcopy(env, {id(part): part for part in fixed if part is not None})


def scripted(env: Any, script: Script) -> None:
    env.unwrapped.np_random = script


def _own_restore(env: Any, observation: Any) -> None:
    env.unwrapped.restore(observation)


def _rows(found: list[tuple[int, int, int, float, bool]]) -> Rows:
    state, action, following, probability, ended = zip(*found, strict=True) if found else [()] * 5
    return Rows(
        np.array(state, np.int64),
        np.array(action, np.int64),
        np.array(following, np.int64),
        np.array(probability, float),
        np.array(ended, bool),
    )


def _numbered(keys: Mapping[Any, Any], what: str, *, gaps: bool = False) -> int:
    """How many there are, if they are numbered from 0."""
    if not isinstance(keys, Mapping):
        raise OptionError(f"the {what} holds {checks.kind_of(keys)}", allowed="a dictionary")
    found = {k for k in keys if isinstance(k, int | np.integer) and not isinstance(k, bool)}
    if len(found) < len(keys) or min(found, default=0) < 0:
        odd = next(k for k in keys if k not in found or k < 0)
        raise OptionError(f"a {what} is {odd!r}", allowed="numbers from 0")
    if not gaps and (found != set(range(len(found))) or not found):
        missing = next(i for i in range(len(found) + 1) if i not in found)
        raise OptionError(f"the table has no {what} {missing}", allowed="every number from 0")
    return len(found)


def _outcome(outcome: Any, state: int, action: int, states: int) -> tuple[float, int, float, bool]:
    where = f"state {state}, action {action}"
    try:
        p, following, paid, done = outcome
        p, paid = float(p), float(paid)
    except (TypeError, ValueError):
        raise OptionError(
            f"an outcome is {outcome!r}",
            where=where,
            allowed="(probability, next state, reward, done)",
        ) from None
    if not isinstance(following, int | np.integer) or not 0 <= following < states:
        raise ShapeError(
            f"a next state is {following!r}", where=where, allowed=f"0 to {states - 1}"
        )
    if not isinstance(done, bool | np.bool_):
        raise OptionError(f"done is {done!r}", where=where, allowed="True or False")
    return p, int(following), paid, bool(done)
