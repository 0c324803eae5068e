"""The soft-optimal solution of one small MDP, and its derivatives, to fifty digits.

Floats are taken as the exact rationals they are, so an answer rounded to float64 is the correctly
rounded one. Needs mpmath.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from mpmath import mp, mpf  # type: ignore[import-untyped]
from numpy.typing import NDArray

from birl_ext.reference import float64

__all__ = ["Cotangents", "Exact", "Gradients", "Problem", "adjoint", "differences", "solve"]

DIGITS = 50
Rows = list[list[Any]]


@dataclass(frozen=True)
class Problem:
    """One MDP in exact numbers; build it with `Problem.of`.

    Attributes:
        reward: r, S lists of A.
        transition: P as given, S × A lists of S; a row counts as P/ΣP, a terminal one as absent.
        discount: γ.
        temperature: τ.
        log_reference: log μ, S lists of A, None where masked.
        continues: S × A booleans, False for rows that are masked or terminal.
        closed: terminal states without any action; they are given action 0, which pays nothing.
    """

    reward: Rows
    transition: list[Rows]
    discount: Any
    temperature: Any
    log_reference: Rows
    continues: list[list[bool]]
    closed: frozenset[int]

    @classmethod
    def of(
        cls,
        reward: Any,
        transition: Any,
        *,
        discount: float,
        temperature: float,
        mask: Any = None,
        terminal: Any = None,
        reference: Any = None,
    ) -> Problem:
        """From arrays (S, A), (S, A, S), (S, A), (S,), (S, A); entries behind a mask are unread."""
        states, actions = np.shape(reward)
        with mp.workdps(DIGITS):
            rewards: Rows = [[mpf(0)] * actions for _ in range(states)]
            rows: list[Rows] = [[[mpf(0)] * states] * actions for _ in range(states)]
            logs: Rows = [[None] * actions for _ in range(states)]
            continues = [[False] * actions for _ in range(states)]
            closed = set()
            for s in range(states):
                ends = terminal is not None and bool(terminal[s])
                open_actions = [a for a in range(actions) if mask is None or bool(mask[s][a])]
                for a in open_actions:
                    rewards[s][a] = mpf(float(reward[s][a]))
                    logs[s][a] = mpf(0) if reference is None else mp.log(float(reference[s][a]))
                    if not ends:
                        continues[s][a] = True
                        rows[s][a] = [mpf(float(p)) for p in transition[s][a]]
                if ends and not open_actions:
                    logs[s][0] = mpf(0)
                    closed.add(s)
            return cls(
                rewards, rows, mpf(discount), mpf(temperature), logs, continues, frozenset(closed)
            )


class Exact(NamedTuple):
    """value (S), q, policy, log_policy (S × A) in mpf; masked: q and log_policy None, policy 0."""

    value: list[Any]
    q: Rows
    policy: Rows
    log_policy: Rows

    def floats(self) -> float64.Oracle:
        """Rounded to float64; None becomes −inf."""
        return float64.Oracle(*(_floats(part) for part in self))


@dataclass(frozen=True)
class Cotangents:
    """Coefficients of L = Σ cV·V + Σ cQ·Q + Σ cπ·π + Σ cl·log π; None is zero, masked is unread."""

    value: Any = None
    q: Any = None
    policy: Any = None
    log_policy: Any = None


class Gradients(NamedTuple):
    """dL with respect to each input.

    Attributes:
        reward: (S × A); zero where masked.
        transition: (S × A × S), the derivative through P/ΣP, which keeps every row's sum.
        discount: scalar.
        temperature: scalar.
        log_reference: (S × A); divide by μ for the derivative with respect to μ.
    """

    reward: Rows
    transition: list[Rows]
    discount: Any
    temperature: Any
    log_reference: Rows

    def floats(self) -> tuple[NDArray[np.float64], ...]:
        """Each rounded to float64, in the order of the fields."""
        return tuple(_floats(part) for part in self)


def solve(problem: Problem) -> Exact:
    """V* = T V* by Newton's method from the float64 oracle's answer, or from zero without one.

    Source: (M3), (M9).
    """
    with mp.workdps(DIGITS + 10):
        rows = _normalised(problem)
        value = _start(problem)
        for _ in range(100):
            exact = _bellman(problem, rows, value)
            gap = [image - old for image, old in zip(exact.value, value, strict=True)]
            scale = 1 + max(abs(v) for v in value)
            if max(abs(g) for g in gap) <= scale * (1 - problem.discount) * mpf(10) ** -DIGITS:
                return exact
            system = _system(exact.policy, rows, problem.discount)
            step = mp.lu_solve(system, mp.matrix(gap))
            value = [old + step[s] for s, old in enumerate(value)]
    raise ArithmeticError("Newton's method did not converge in a hundred steps")


def adjoint(problem: Problem, cotangents: Cotangents) -> Gradients:
    """Exact gradients of L by one transposed solve.

    Source: (M12), written out with log π = log μ + (Q − V)/τ.
    """
    with mp.workdps(DIGITS + 10):
        exact = solve(problem)
        rows = _normalised(problem)
        discount, temperature = problem.discount, problem.temperature
        states, actions = len(problem.reward), len(problem.reward[0])
        c_value, c_q, c_log = _on_log_policy(problem, exact, cotangents)

        expected = [[mp.fdot(p, exact.value) for p in row] for row in rows]  # Σ_t P V
        on_q = [[c_q[s][a] + c_log[s][a] / temperature for a in range(actions)]
                for s in range(states)]  # fmt: skip
        on_value = [c_value[s] - mp.fsum(c_log[s]) / temperature for s in range(states)]
        for t in range(states):
            on_value[t] += discount * mp.fsum(
                rows[s][a][t] * on_q[s][a] for s in range(states) for a in range(actions)
            )
        system = _system(exact.policy, rows, discount)
        weight = mp.lu_solve(system.T, mp.matrix(on_value))  # λ

        reward: Rows = [[mpf(0)] * actions for _ in range(states)]
        transition: list[Rows] = [[[mpf(0)] * states] * actions for _ in range(states)]
        log_reference: Rows = [[mpf(0)] * actions for _ in range(states)]
        d_discount, d_temperature = mpf(0), mpf(0)
        for s in range(states):
            for a in range(actions):
                if problem.log_reference[s][a] is None:
                    continue
                policy = exact.policy[s][a]
                gain = exact.log_policy[s][a] - problem.log_reference[s][a]  # (Q − V)/τ
                flow = on_q[s][a] + weight[s] * policy
                reward[s][a] = flow
                log_reference[s][a] = c_log[s][a] + temperature * weight[s] * policy
                d_discount += flow * expected[s][a]
                d_temperature -= c_log[s][a] * gain / temperature + weight[s] * policy * gain
                if problem.continues[s][a]:
                    total = mp.fsum(problem.transition[s][a])
                    transition[s][a] = [
                        discount * flow * (v - expected[s][a]) / total for v in exact.value
                    ]
        for s in problem.closed:  # its only action has a reward that nobody can change
            reward[s][0] = log_reference[s][0] = mpf(0)
        return Gradients(reward, transition, d_discount, d_temperature, log_reference)


def differences(problem: Problem, cotangents: Cotangents, step: float = 1e-15) -> Gradients:
    """The same gradients by central differences of fifty-digit solves: error about step²."""
    with mp.workdps(DIGITS + 10):
        h = mpf(step)

        def slope(nudge: Any) -> Any:
            return (_linear(nudge(h), cotangents) - _linear(nudge(-h), cotangents)) / (2 * h)

        def entry(name: str, *place: int) -> Any:
            values = getattr(problem, name)
            return slope(lambda d: replace(problem, **{name: _nudged(values, place, d)}))

        states, actions = len(problem.reward), len(problem.reward[0])
        zero = mpf(0)
        cells = [
            [
                problem.log_reference[s][a] is not None and s not in problem.closed
                for a in range(actions)
            ]
            for s in range(states)
        ]
        return Gradients(
            [[entry("reward", s, a) if cells[s][a] else zero for a in range(actions)]
             for s in range(states)],
            [[[entry("transition", s, a, t) if problem.continues[s][a] else zero
               for t in range(states)] for a in range(actions)] for s in range(states)],
            slope(lambda d: replace(problem, discount=problem.discount + d)),
            slope(lambda d: replace(problem, temperature=problem.temperature + d)),
            [[entry("log_reference", s, a) if cells[s][a] else zero for a in range(actions)]
             for s in range(states)],
        )  # fmt: skip


def _linear(problem: Problem, cotangents: Cotangents) -> Any:
    """L at the solution of `problem`."""
    exact = solve(problem)
    states, actions = len(problem.reward), len(problem.reward[0])
    total = mpf(0)
    if cotangents.value is not None:
        total += mp.fsum(mpf(float(cotangents.value[s])) * exact.value[s] for s in range(states))
    for part, weights in (
        (exact.q, cotangents.q),
        (exact.policy, cotangents.policy),
        (exact.log_policy, cotangents.log_policy),
    ):
        if weights is not None:
            total += mp.fsum(
                mpf(float(weights[s][a])) * part[s][a]
                for s in range(states)
                for a in range(actions)
                if problem.log_reference[s][a] is not None
            )
    return total


def _on_log_policy(
    problem: Problem, exact: Exact, cotangents: Cotangents
) -> tuple[list[Any], Rows, Rows]:
    """Cotangents of V, of Q, and of log π with that of π folded in (dπ = π d log π)."""
    states, actions = len(problem.reward), len(problem.reward[0])

    def read(weights: Any, s: int, a: int) -> Any:
        masked = problem.log_reference[s][a] is None
        return mpf(0) if weights is None or masked else mpf(float(weights[s][a]))

    given = cotangents.value
    c_value = [mpf(0) if given is None else mpf(float(given[s])) for s in range(states)]
    c_q = [[read(cotangents.q, s, a) for a in range(actions)] for s in range(states)]
    c_log = [
        [
            read(cotangents.log_policy, s, a) + read(cotangents.policy, s, a) * exact.policy[s][a]
            for a in range(actions)
        ]
        for s in range(states)
    ]
    return c_value, c_q, c_log


def _bellman(problem: Problem, rows: list[Rows], value: list[Any]) -> Exact:
    image, qs, policies, logs = [], [], [], []
    for s, reward in enumerate(problem.reward):
        q: list[Any] = [None] * len(reward)
        exponent: dict[int, Any] = {}
        for a, log_mu in enumerate(problem.log_reference[s]):
            if log_mu is not None:
                q[a] = reward[a] + problem.discount * mp.fdot(rows[s][a], value)
                exponent[a] = q[a] / problem.temperature + log_mu
        top = max(exponent.values())
        log_total = top + mp.log(mp.fsum(mp.exp(e - top) for e in exponent.values()))
        log_policy: list[Any] = [None] * len(reward)
        policy = [mpf(0)] * len(reward)
        for a, e in exponent.items():
            log_policy[a] = e - log_total
            policy[a] = mp.exp(log_policy[a])
        image.append(problem.temperature * log_total)
        qs.append(q)
        policies.append(policy)
        logs.append(log_policy)
    return Exact(image, qs, policies, logs)


def _system(policy: Rows, rows: list[Rows], discount: Any) -> Any:
    """I − γP_π."""
    states = len(policy)
    system = mp.eye(states)
    for s in range(states):
        for t in range(states):
            system[s, t] -= discount * mp.fdot(policy[s], [row[t] for row in rows[s]])
    return system


def _normalised(problem: Problem) -> list[Rows]:
    rows: list[Rows] = []
    for given, continues in zip(problem.transition, problem.continues, strict=True):
        rows.append([])
        for row, goes_on in zip(given, continues, strict=True):
            total = mp.fsum(row) if goes_on else mpf(1)
            rows[-1].append([p / total for p in row])
    return rows


def _start(problem: Problem) -> list[Any]:
    try:
        rough = float64.solve(
            _floats(problem.reward),
            _floats(problem.transition),
            discount=float(problem.discount),
            temperature=float(problem.temperature),
            mask=[[log is not None for log in row] for row in problem.log_reference],
            terminal=[not any(row) for row in problem.continues],
            reference=np.exp(_floats(problem.log_reference)),
        ).value
    except (ArithmeticError, ValueError, np.linalg.LinAlgError):
        return [mpf(0)] * len(problem.reward)
    return [mpf(float(v)) if np.isfinite(v) else mpf(0) for v in rough]


def _nudged(values: Sequence[Any], place: Sequence[int], change: Any) -> Any:
    """Nested lists with `change` added at one place; the original is left alone."""
    if not place:
        return values + change
    copy = list(values)
    copy[place[0]] = _nudged(copy[place[0]], place[1:], change)
    return copy


def _floats(values: Any) -> NDArray[np.float64]:
    def convert(item: Any) -> Any:
        if isinstance(item, list):
            return [convert(part) for part in item]
        return -np.inf if item is None else float(item)

    return np.array(convert(values), dtype=np.float64)
