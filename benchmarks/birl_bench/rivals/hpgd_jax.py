"""The outer step of HPGD on Four Rooms in JAX, one function, in float32 as published.

A lean one: transitions are looked up and not multiplied, random numbers are drawn at once, tables
are summed by cell, and what the published code computes only to report it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from birl_ext.problems.four_rooms import BUDGET, DISCOUNT, SLIP, STEPS, FourRooms, Noise, moves

__all__ = ["SWEEPS", "UPDATES", "outer_step"]

UPDATES, SWEEPS = 100, 5
"""Of the policy, and of its Q between two updates."""
HORIZON = 200
UNROLL = 8
"""Steps of a walk that are compiled into one turn of the loop."""

Slopes = Literal["reverse", "forward"]
Step = Callable[[Any, Any], tuple[Any, Any, Any]]


def outer_step(
    rooms: FourRooms,
    temperature: float,
    rate: float,
    environments: int = 5,
    steps: int = 2000,
    slopes: Slopes = "reverse",
    walks: Noise = "simulator",
) -> Step:
    """(key, w) → w after a step, ∇φ̂ and the follower's policy of both goals, (2, S, A); not
    compiled.

    1. The policy of both goals: `UPDATES` × `SWEEPS` sweeps of soft Q from zero, by the planner.
    2. A goal is drawn, and so many environments walk so many steps each, beginning again at the
       goal and after `HORIZON` steps.
    3. Advantages of both levels are means over visits; a step up their product's sum, clipped to 1.

    Args:
        temperature: λ.
        rate: of the step.
        slopes: "reverse", one pass back, or "forward" as published, all 105 slopes taken along.
        walks: their moves, the simulator's as published.

    Source: Thoma et al. (2024), Algorithm 1.
    """
    import jax
    import jax.numpy as jnp

    cells = len(rooms.cells)
    places = {cell: s for s, cell in enumerate(rooms.cells)}
    landing = jnp.asarray(
        [[places.get((i + down, j + right), s) for down, right in STEPS] for (i, j), s in
         places.items()],
        jnp.int32,
    )  # fmt: skip
    planned = jnp.asarray(moves(rooms.noise).numpy(), jnp.float32)
    at_goal = jnp.asarray(rooms.goals.numpy(), jnp.float32)  # (2, S)
    at_target = jnp.asarray(np.eye(cells)[rooms.target], jnp.float32)

    def incentive(w: Any) -> Any:
        return -BUDGET * jax.nn.softmax(w)[:-1]

    def respond(w: Any) -> Any:
        paid = (at_goal + (1 - at_goal) * incentive(w))[..., None]
        goes_on = DISCOUNT * (1 - at_goal)[..., None]

        def update(q: Any, _: None) -> tuple[Any, None]:
            logs = jax.nn.log_softmax(q / temperature)
            policy = jnp.exp(logs)
            base = paid - temperature * (policy * logs).sum(-1, keepdims=True)

            def sweep(_: int, q: Any) -> Any:
                value = (policy * q).sum(-1)
                return base + goes_on * (value[:, landing] @ planned.T)

            return jax.lax.fori_loop(0, SWEEPS, sweep, q), None

        q, _ = jax.lax.scan(update, jnp.zeros((2, cells, 4), jnp.float32), None, UPDATES)
        return jax.nn.softmax(q / temperature)

    def walk(key: Any, policy: Any, goal: Any) -> Any:
        """States, actions, hours and ends, (steps, environments) each."""
        cumulative = policy.cumsum(-1)[:, :-1]
        others = 4 if walks == "simulator" else 3  # moves to slip into

        def move(carry: Any, point: Any) -> tuple[Any, Any]:
            place, hour = carry
            action = (cumulative[place] < point[0][:, None]).sum(-1)
            slip = jnp.floor(others / SLIP * point[1]).astype(jnp.int32)
            elsewhere = slip if others == 4 else (action + 1 + slip) % 4
            ends = (place == goal) | (hour + 1 >= HORIZON)
            onwards = landing[place, jnp.where(slip < others, elsewhere, action)]
            after = jnp.where(ends, rooms.start, onwards), jnp.where(ends, 0, hour + 1)
            return after, (place, action, hour, ends)

        points = jax.random.uniform(key, (steps, 2, environments))
        first = jnp.full(environments, rooms.start), jnp.zeros(environments, jnp.int32)
        return jax.lax.scan(move, first, points, unroll=UNROLL)[1]

    def to_go(paid: Any, ends: Any) -> Any:
        def back(ahead: Any, now: Any) -> tuple[Any, Any]:
            ahead = now[0] + DISCOUNT * jnp.where(now[1], 0, ahead)
            return ahead, ahead

        first = jnp.zeros(environments, jnp.float32)
        return jax.lax.scan(back, first, (paid, ends), reverse=True, unroll=UNROLL)[1]

    def means(index: Any, number: Any, count: int) -> Any:
        total = jax.ops.segment_sum(number.ravel(), index.ravel(), count)
        seen = jax.ops.segment_sum(jnp.ones(number.size, jnp.float32), index.ravel(), count)
        return total / jnp.maximum(seen, 1)

    def step(key: Any, w: Any) -> tuple[Any, Any, Any]:
        which, walks = jax.random.split(key)
        context = jax.random.randint(which, (), 0, 2)
        policies = respond(w)
        goal = at_goal[context].argmax()
        place, action, hour, ends = walk(walks, policies[context], goal)
        cell = 4 * place + action

        def surrogate(w: Any) -> Any:
            own = jnp.where(jnp.arange(cells) == goal, 0, incentive(w))[place]
            spent = -incentive(w).sum()
            theirs = (at_target - rooms.kappa * spent * at_goal[context])[place]
            own, theirs = to_go(own, ends), to_go(theirs, ends)
            upper = means(place, theirs, cells)
            response = means(cell, own, 4 * cells)[cell] - means(place, own, cells)[place]
            credit = means(cell, theirs, 4 * cells)[cell] - upper[place]
            credit = jax.lax.stop_gradient(credit) * DISCOUNT**hour / temperature
            return (credit * response).sum() / jnp.maximum(ends.sum(), 1) + upper[rooms.start]

        uphill = (jax.jacfwd if slopes == "forward" else jax.grad)(surrogate)(w)
        norm = jnp.linalg.norm(uphill)
        return w + rate * uphill / jnp.maximum(norm, 1), -uphill, policies

    return step
