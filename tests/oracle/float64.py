"""The soft-optimal solution of one small MDP in float64, by loops that read like the equations.

Conventions of every function here: reward (S, A), transition (S, A, S), mask (S, A) bool with True
for available, terminal (S,) bool, reference μ (S, A) > 0. Rows of P are divided by their sum.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Oracle",
    "bellman",
    "evaluate",
    "hard_bracket",
    "occupancy",
    "policy_matrix",
    "policy_system",
    "refined",
    "solve",
]

Array = NDArray[np.float64]


class Oracle(NamedTuple):
    """value (S,), q (S, A), policy (S, A), log_policy (S, A); masked: q and log_policy are −inf."""

    value: Array
    q: Array
    policy: Array
    log_policy: Array


def solve(
    reward: Any,
    transition: Any,
    *,
    discount: float,
    temperature: float,
    mask: Any = None,
    terminal: Any = None,
    reference: Any = None,
) -> Oracle:
    """V* = T V* by Newton's method, stopped when rounding stops it.

    Source: (M3), (M9).
    """
    inputs = _inputs(reward, transition, mask, terminal, reference)
    value = np.zeros(inputs.reward.shape[0])
    best = math.inf
    for _ in range(200):
        image, _, policy, _ = _bellman(value, inputs, discount, temperature)
        change = np.linalg.solve(_system(policy, inputs, discount), image - value)
        value = value + change
        size = float(np.abs(change).max())
        # Newton on a convex monotone map rises after the first step; a step that is no smaller
        # than the one before, and tiny, is rounding.
        if size >= best and size <= 1e-8 * (1.0 + np.abs(value).max()):
            break
        best = min(best, size)
    # TV has the error of V shrunk by γ, and makes the four outputs agree with each other.
    image, q, policy, log_policy = _bellman(value, inputs, discount, temperature)
    return Oracle(image, q, policy, log_policy)


def bellman(
    value: Any,
    reward: Any,
    transition: Any,
    *,
    discount: float,
    temperature: float,
    mask: Any = None,
    terminal: Any = None,
    reference: Any = None,
) -> Oracle:
    """One application of T: TV, and Q, π, log π at V.

    Source: (M1)-(M3).
    """
    inputs = _inputs(reward, transition, mask, terminal, reference)
    return Oracle(*_bellman(_array(value), inputs, discount, temperature))


def policy_matrix(policy: Any, transition: Any, *, terminal: Any = None) -> Array:
    """P_π(s,t) = Σ_a π(a|s) P(t|s,a), (S, S).

    Source: (M4).
    """
    policy = _array(policy)
    inputs = _inputs(np.zeros_like(policy), transition, policy > 0, terminal, None)
    return np.eye(len(policy)) - _system(policy, inputs, 1.0)


def policy_system(policy: Any, transition: Any, discount: float, terminal: Any = None) -> Any:
    """I − γP_π in extended precision, (S, S)."""
    matrix = policy_matrix(policy, transition, terminal=terminal).astype(np.longdouble)
    return np.eye(len(matrix)) - np.longdouble(discount) * matrix


def refined(matrix: Any, b: Any) -> Array:
    """A⁻¹b by float64 LU, refined with residuals in extended precision."""
    low, x = matrix.astype(np.float64), np.zeros_like(b, dtype=np.longdouble)
    for _ in range(5):
        x = x + np.linalg.solve(low, (b - matrix @ x).astype(np.float64))
    return _array(x)


def evaluate(
    policy: Any, reward: Any, transition: Any, *, discount: float, terminal: Any = None
) -> Array:
    """The value of a fixed policy, without entropy: J = (I − γP_π)⁻¹ Σ_a π r, (S,)."""
    policy = _array(policy)
    gain = np.where(policy > 0, policy * _array(reward), 0.0).sum(1)
    matrix = policy_matrix(policy, transition, terminal=terminal)
    return _array(np.linalg.solve(np.eye(len(policy)) - discount * matrix, gain))


def occupancy(
    policy: Any,
    transition: Any,
    *,
    discount: float,
    initial_distribution: Any,
    terminal: Any = None,
) -> Array:
    """d = (1−γ) ρᵀ(I − γP_π)⁻¹, (S,)."""
    matrix = policy_matrix(policy, transition, terminal=terminal)
    system = np.eye(len(matrix)) - discount * matrix
    return _array((1.0 - discount) * np.linalg.solve(system.T, _array(initial_distribution)))


def hard_bracket(
    reward: Any,
    transition: Any,
    *,
    discount: float,
    temperature: float,
    mask: Any = None,
    terminal: Any = None,
    reference: Any = None,
) -> tuple[Array, Array]:
    """Two values between which the soft value must lie: V_hard and V_hard + τ log|A| / (1−γ).

    With a reference policy the hard problem has the reward r + τ log μ.
    Source: (M8).
    """
    inputs = _inputs(reward, transition, mask, terminal, reference)
    states, actions = inputs.reward.shape
    gain = inputs.reward + temperature * inputs.log_reference  # −inf where masked
    choice = [int(np.argmax(gain[s])) for s in range(states)]
    value = np.zeros(states)
    for _ in range(10_000):  # policy iteration ends after finitely many changes
        policy = np.eye(actions)[choice]
        chosen = np.array([gain[s, choice[s]] for s in range(states)])
        value = np.linalg.solve(_system(policy, inputs, discount), chosen)
        improved = False
        for s in range(states):
            q = [gain[s, a] + discount * inputs.transition[s, a] @ value for a in range(actions)]
            best = int(np.argmax(q))
            if q[best] > q[choice[s]] + 1e-12 * (1.0 + abs(q[best])):
                choice[s], improved = best, True
        if not improved:
            break
    return value, value + temperature * math.log(actions) / (1.0 - discount)


class _Inputs(NamedTuple):
    reward: Array
    transition: Array
    log_reference: Array


def _inputs(reward: Any, transition: Any, mask: Any, terminal: Any, reference: Any) -> _Inputs:
    """Copies with masked and terminal entries cleared and rows of P normalised."""
    reward, transition = _array(reward).copy(), _array(transition).copy()
    states, actions = reward.shape
    log_reference = np.zeros((states, actions))
    for s in range(states):
        ends = terminal is not None and bool(terminal[s])
        closed = ends and mask is not None and not np.any(np.asarray(mask)[s])
        for a in range(actions):
            available = mask is None or bool(mask[s][a])
            if not available:
                reward[s, a] = 0.0
                log_reference[s, a] = 0.0 if closed and a == 0 else -math.inf
            elif reference is not None:
                log_reference[s, a] = math.log(float(reference[s][a]))
            if ends or not available:
                transition[s, a] = 0.0
            else:
                transition[s, a] /= math.fsum(transition[s, a])
    return _Inputs(reward, transition, log_reference)


def _bellman(
    value: Array, inputs: _Inputs, discount: float, temperature: float
) -> tuple[Array, Array, Array, Array]:
    states, actions = inputs.reward.shape
    image = np.zeros(states)
    q = np.full((states, actions), -math.inf)
    policy = np.zeros((states, actions))
    log_policy = np.full((states, actions), -math.inf)
    for s in range(states):
        available = [a for a in range(actions) if inputs.log_reference[s, a] > -math.inf]
        for a in available:
            q[s, a] = inputs.reward[s, a] + discount * float(inputs.transition[s, a] @ value)
        top = max(q[s, a] for a in available)
        exponent = {
            a: (q[s, a] - top) / temperature + inputs.log_reference[s, a] for a in available
        }
        peak = max(exponent.values())
        weight = {a: math.exp(exponent[a] - peak) for a in available}
        total = math.fsum(weight.values())
        image[s] = top + temperature * (peak + math.log(total))
        for a in available:
            policy[s, a] = weight[a] / total
            log_policy[s, a] = exponent[a] - peak - math.log(total)
    return image, q, policy, log_policy


def _system(policy: Array, inputs: _Inputs, discount: float) -> Array:
    """I − γP_π."""
    states, actions = policy.shape
    system = np.eye(states)
    for s in range(states):
        for a in range(actions):
            system[s] -= discount * policy[s, a] * inputs.transition[s, a]
    return system


def _array(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)
