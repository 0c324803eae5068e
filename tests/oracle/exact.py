"""The soft-optimal solution of one small MDP in ball arithmetic, and its derivatives along a line.

Floats are taken as the exact rationals they are; a row of P counts as P/ΣP. The solution comes by
Newton's method from zero, and the bound on its error from the balls of one last sweep. Derivatives
are central differences with a step of 2⁻¹³⁰ (`slopes`), so that no formula of the package is used
again; `gradients` has all of them at once by one transposed solve, and is held to the differences.
Needs python-flint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from flint import arb, arb_mat, ctx

BITS = 512  # before what the temperature and the discount add
STEP = -130  # the differences' step, as a power of two
SWEEPS = 300  # more than any problem has needed by far

Array = np.ndarray
Outputs = dict[str, list[Any]]


@dataclass(frozen=True)
class Model:
    """One MDP; build it with `Model.of`.

    Attributes:
        reward: r, S·A numbers.
        rows: P as given, (S·A × S); zero rows do not continue.
        reference: μ, S·A numbers, None where no action is available.
        free: where there is an action whose reward can be changed, (S, A) bool.
        discount: γ.
        temperature: τ.
        actions: A.
        bits: of the arithmetic.
    """

    reward: list[Any]
    rows: Any
    reference: list[Any]
    free: Array
    discount: Any
    temperature: Any
    actions: int
    bits: int

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
    ) -> Model:
        """From arrays (S, A), (S, A, S), (S, A), (S,), (S, A); what lies behind a mask is unread.

        A terminal state without an action has one that pays nothing.
        """
        pays = np.array(reward, dtype=float)
        states, actions = pays.shape
        ends = np.zeros(states, bool) if terminal is None else np.asarray(terminal)
        free = np.ones((states, actions), bool) if mask is None else np.array(mask)
        available = free.copy()
        available[ends & ~free.any(1), 0] = True
        weights = np.ones(free.shape) if reference is None else np.array(reference, dtype=float)
        pays, weights = np.where(free, pays, 0.0), np.where(free, weights, 1.0)
        goes_on = (available & ~ends[:, None])[..., None]
        rows = np.where(goes_on, np.asarray(transition, dtype=float), 0.0)
        scale = max(1.0, float(np.abs(pays).max())) / (1.0 - discount)
        bits = BITS + max(0, int(np.log2(scale) - np.log2(temperature)))
        pairs = zip(weights.ravel().tolist(), available.ravel(), strict=True)
        return cls(
            [arb(x) for x in pays.ravel().tolist()],
            arb_mat(states * actions, states, [arb(x) for x in rows.ravel().tolist()]),
            [arb(weight) if there else None for weight, there in pairs],
            free,
            arb(float(discount)),
            arb(float(temperature)),
            actions,
            bits,
        )

    def moved(self, direction: Mapping[str, Any], step: Any) -> Model:
        """Inputs (reward, transition, reference, discount, temperature) moved by `step` times their
        array in `direction`, where they can be changed.
        """
        changes: dict[str, Any] = {}
        for name, array in direction.items():
            shift = np.asarray(array, dtype=float)
            if name in ("discount", "temperature"):
                changes[name] = (getattr(self, name) + step * float(shift.item())).mid()
            elif name == "transition":
                states = self.rows.ncols()
                goes_on = np.array([any(x != 0 for x in row) for row in self.rows.tolist()])
                shift = np.where(goes_on[:, None], shift.reshape(-1, states), 0.0)
                moved = arb_mat(shift.shape[0], shift.shape[1], shift.ravel().tolist()) * step
                changes["rows"] = (self.rows + moved).mid()
            else:
                shift = np.where(self.free, shift, 0.0).ravel()
                pairs = zip(getattr(self, name), shift.tolist(), strict=True)
                changes[name] = [None if x is None else (x + step * d).mid() for x, d in pairs]
        return replace(self, **changes)


class Rounded(NamedTuple):
    """An answer in float64: value (S), the others (S, A); −inf, and a policy of 0, where masked."""

    value: Array
    q: Array
    policy: Array
    log_policy: Array


class Answer(NamedTuple):
    """value (S); q, advantage, log_policy, policy (S·A), None or 0 where masked; all balls.

    `error` bounds ‖value − V*‖∞, by the balls of the last sweep.
    """

    value: list[Any]
    q: list[Any]
    advantage: list[Any]
    log_policy: list[Any]
    policy: list[Any]
    error: float

    def floats(self) -> Rounded:
        """Rounded to float64."""
        tables = (self.q, self.policy, self.log_policy)
        shape = len(self.value), -1
        return Rounded(floats(self.value), *(floats(table).reshape(shape) for table in tables))


def solve(model: Model, start: list[Any] | None = None) -> Answer:
    """V* = T V*, from a start or from zero."""
    with ctx.workprec(model.bits):
        rows = _normalised(model)
        value = [arb(0)] * model.rows.ncols() if start is None else start
        best = None
        for _ in range(SWEEPS):
            answer = _sweep(model, rows, value)
            gap = [new - old for new, old in zip(answer.value, value, strict=True)]
            size = max(
                *(abs(x).mid() for x in (*answer.value, *value)),
                *(abs(x).mid() for x in answer.q if x is not None),
                model.temperature,
            )
            largest = max(abs(g).abs_upper() for g in gap)
            small = largest <= size * arb(2) ** (60 - model.bits)
            if small and (best is None or not largest < best):
                error = (largest / (1 - model.discount)).abs_upper()
                return answer._replace(error=float(error))
            best = largest if small else None
            system = _system(model, rows, answer.policy)
            right = arb_mat(len(value), 1, [g.mid() for g in gap])
            step = system.solve(right, algorithm="approx")
            value = [(old + step[s, 0]).mid() for s, old in enumerate(value)]
    raise ArithmeticError(f"Newton's method did not converge in {SWEEPS} steps")


def sweep(model: Model, value: list[Any]) -> Answer:
    """TV as the value, with Q, Q − TV, log π and π at V."""
    with ctx.workprec(model.bits):
        return _sweep(model, _normalised(model), value)


def evaluate(model: Model, policy: list[Any], gain: list[Any]) -> list[Any]:
    """J = (I − γP_π)⁻¹ Σ_a π g, for a policy and a reward of S·A numbers."""
    with ctx.workprec(model.bits):
        states, actions = model.rows.ncols(), model.actions
        pays = [
            sum((policy[i] * gain[i] for i in range(s * actions, (s + 1) * actions)), arb(0))
            for s in range(states)
        ]
        system = _system(model, _normalised(model), policy)
        return _refined(system, arb_mat(states, 1, [p.mid() for p in pays]))


def occupancy(model: Model, policy: list[Any], start: list[float]) -> list[Any]:
    """d = (1 − γ) ρᵀ(I − γP_π)⁻¹."""
    with ctx.workprec(model.bits):
        system = _system(model, _normalised(model), policy).transpose()
        right = [((1 - model.discount) * arb(p)).mid() for p in start]
        return _refined(system, arb_mat(len(start), 1, right))


def condition(model: Model, policy: list[Any]) -> tuple[float, float]:
    """Of (I − γP_π)⁻¹: the largest span of its image of a vector of at most one, and its norm.

    The first says how much a change of the rewards can change what tells states apart: large where
    the chain nearly falls apart, whatever γ is. The second is 1/(1 − γ) unless the process ends.
    """
    with ctx.workprec(model.bits):
        system = _system(model, _normalised(model), [x.mid() for x in policy])
        inverse = system.inv().tolist()
        # the rows share a part as large as 1/(1 − γ), in which doubles would drown
        apart = ([float(x - y) for x, y in zip(row, inverse[0], strict=True)] for row in inverse)
        rows = np.array(list(apart))
        norm = max(float(sum((abs(x) for x in row), arb(0))) for row in inverse)
    return float(np.abs(rows[:, None] - rows[None, :]).sum(-1).max()), norm


class Slopes(NamedTuple):
    """Of every output: where it stands, its first and its second derivative along a line."""

    at: dict[str, Array]
    first: dict[str, Array]
    second: dict[str, Array]


def slopes(
    model: Model,
    direction: Mapping[str, Array],
    outputs: Callable[[Model, Answer], Outputs],
) -> Slopes:
    """Derivatives of `outputs` along `direction`, by central differences."""
    with ctx.workprec(model.bits):
        step = arb(2) ** STEP
        middle = solve(model)
        found = [outputs(model, middle)]
        for sign in (-1, 1):
            near = model.moved(direction, sign * step)
            start = [x.mid() for x in middle.value]
            found.append(outputs(near, solve(near, start)))
        at, first, second = {}, {}, {}
        for name, here in found[0].items():
            triples = list(zip(found[1][name], here, found[2][name], strict=True))
            at[name] = _floats(here)
            first[name] = _floats([(b - a) / (2 * step) for a, _, b in triples])
            second[name] = _floats([(a - 2 * m + b) / (step * step) for a, m, b in triples])
        return Slopes(at, first, second)


@dataclass(frozen=True)
class Cotangents:
    """Coefficients of L = Σ cV·V + Σ cQ·Q + Σ cπ·π + Σ cl·log π; None is zero, masked is unread."""

    value: Array | None = None
    q: Array | None = None
    policy: Array | None = None
    log_policy: Array | None = None


class Gradients(NamedTuple):
    """dL with respect to each input, rounded to float64, zero where it cannot be changed.

    That of the transition is the derivative through P/ΣP, which keeps every row's sum.
    """

    reward: Array
    transition: Array
    discount: Array
    temperature: Array
    reference: Array


def gradients(model: Model, cotangents: Cotangents) -> Gradients:
    """All derivatives of L by one transposed solve, with log π = log μ + (Q − V)/τ."""
    with ctx.workprec(model.bits):
        answer, rows = solve(model), _normalised(model)
        states, actions, gamma, tau = len(rows), model.actions, model.discount, model.temperature
        count = states * actions
        there = [weight is not None for weight in model.reference]

        def read(weights: Array | None, size: int) -> list[Any]:
            if weights is None:
                return [arb(0)] * size
            given = np.asarray(weights, dtype=float).ravel()
            fine = there if len(given) == count and weights is not cotangents.value else True
            return [arb(x) for x in np.where(fine, given, 0.0).tolist()]

        on_log = [
            own + on_policy * pi
            for own, on_policy, pi in zip(
                read(cotangents.log_policy, count),
                read(cotangents.policy, count),
                answer.policy,
                strict=True,
            )
        ]
        on_q = [q + log / tau for q, log in zip(read(cotangents.q, count), on_log, strict=True)]
        value = arb_mat(states, 1, answer.value)
        ahead: list[Any] = []
        right = read(cotangents.value, states)
        for s, block in enumerate(rows):
            own = slice(s * actions, (s + 1) * actions)
            ahead += (block * value).entries()
            right[s] -= sum(on_log[own], arb(0)) / tau
            pulled = (arb_mat(1, actions, on_q[own]) * block * gamma).entries()
            right = [old + new for old, new in zip(right, pulled, strict=True)]
        system = _system(model, rows, answer.policy).transpose()
        weight = _refined(system, arb_mat(states, 1, [x.mid() for x in right]))
        reward, reference = [arb(0)] * count, [arb(0)] * count
        transition = [[arb(0)] * states for _ in range(count)]
        by_discount, by_temperature = arb(0), arb(0)
        for row in (i for i in range(count) if there[i]):
            mu, mass = model.reference[row], weight[row // actions] * answer.policy[row]
            gain = answer.log_policy[row] - mu.log()  # (Q − V)/τ
            flow = on_q[row] + mass
            reward[row], reference[row] = flow, (on_log[row] + tau * mass) / mu
            by_discount += flow * ahead[row]
            by_temperature -= (on_log[row] / tau + mass) * gain
            total = sum((model.rows[row, t] for t in range(states)), arb(0))
            if total != 0:
                share = gamma * flow / total
                transition[row] = [share * (v - ahead[row]) for v in answer.value]
        shape = states, actions
        return Gradients(
            np.where(model.free, floats(reward).reshape(shape), 0.0),
            np.array([floats(row) for row in transition]).reshape(*shape, states),
            np.array(float(by_discount)),
            np.array(float(by_temperature)),
            np.where(model.free, floats(reference).reshape(shape), 0.0),
        )


def floats(numbers: list[Any], absent: float = -np.inf) -> Array:
    """Rounded to float64; `absent` for None."""
    return np.array([absent if x is None else float(x) for x in numbers])


def _floats(numbers: list[Any]) -> Array:
    return np.array([float(x) for x in numbers])


def _sweep(model: Model, rows: list[Any], value: list[Any]) -> Answer:
    """TV, and at V: Q, Q − TV, log π and π."""
    column = arb_mat(len(value), 1, value)
    image, qs, advantages, logs, policies = [], [], [], [], []
    zero = arb(0)
    for s, block in enumerate(rows):
        ahead = block * column
        q: list[Any] = []
        exponent: list[Any] = []
        for a in range(model.actions):
            weight = model.reference[s * model.actions + a]
            if weight is None:
                q.append(None)
                exponent.append(None)
                continue
            q.append(model.reward[s * model.actions + a] + model.discount * ahead[a, 0])
            exponent.append(q[a] / model.temperature + weight.log())
        top = _largest([x.mid() for x in exponent if x is not None])
        total = top + sum(((x - top).exp() for x in exponent if x is not None), zero).log()
        image.append(model.temperature * total)
        qs += q
        advantages += [None if x is None else x - image[s] for x in q]
        own = [None if x is None else x - total for x in exponent]
        logs += own
        policies += [zero if x is None else x.exp() for x in own]
    return Answer(image, qs, advantages, logs, policies, float("inf"))


def _largest(numbers: list[Any]) -> Any:
    best = numbers[0]
    for x in numbers[1:]:
        if x > best:
            best = x
    return best


def _normalised(model: Model) -> list[Any]:
    """P/ΣP, one (A × S) block per state."""
    states, actions = model.rows.ncols(), model.actions
    table = model.rows.tolist()
    blocks = []
    for s in range(states):
        block = []
        for row in table[s * actions : (s + 1) * actions]:
            total = sum(row, arb(0))
            block.append(row if total == 0 else [p / total for p in row])
        blocks.append(arb_mat(block))
    return blocks


def _system(model: Model, rows: list[Any], policy: list[Any]) -> Any:
    """I − γP_π, midpoints."""
    states, actions = model.rows.ncols(), model.actions
    entries: list[Any] = []
    for s, block in enumerate(rows):
        own = arb_mat(1, actions, [x.mid() for x in policy[s * actions : (s + 1) * actions]])
        row = (own * block * (-model.discount)).entries()
        row[s] += 1
        entries += row
    return arb_mat(states, states, entries).mid()


def _refined(system: Any, right: Any) -> list[Any]:
    """The solution of a linear system, after one step of refinement."""
    found = system.solve(right, algorithm="approx").mid()
    found += system.solve((right - system * found).mid(), algorithm="approx")
    return found.mid().entries()
