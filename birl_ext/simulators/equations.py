"""Environments whose equations are known, batched: paths from any observation.

Rewards are not computed: a score asks for those that are being learned. Time limits are left out: a
path goes on to its own end, as the values of the lower level do.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from birl_ext.errors import ShapeError
from birl_ext.simulators.paths import Paths, Policy, follow
from birl_ext.state import Stateful

__all__ = ["CartPole", "Dynamics", "DynamicsSimulator", "Pendulum", "RandomDynamics"]


class Dynamics(Protocol):
    """The equations of an environment without noise, n at a time."""

    observation_size: int
    """Entries of an observation, which is a vector."""

    def state_of(self, observation: Tensor) -> Tensor:
        """The state an observation stands for, (n, observation_size) → (n, d) float64."""
        ...

    def observe(self, state: Tensor) -> Tensor:
        """What is seen of a state, (n, d) → (n, observation_size) float32."""
        ...

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """What follows, (n, d), and whether the episode ends with it, (n,) bool."""
        ...


@runtime_checkable
class RandomDynamics(Dynamics, Protocol):
    """Dynamics whose `step` is a mean, and which say how what follows is distributed around it."""

    def draw(
        self, state: Tensor, action: Tensor, generator: torch.Generator, /
    ) -> tuple[Tensor, Tensor]:
        """What follows, (n, d), and whether the episode ends with it, (n,) bool."""
        ...

    def log_prob(self, observation: Tensor, action: Tensor, successor: Tensor, /) -> Tensor:
        """log P_x(s'|s, a) of observations, (n,), differentiable in what the equations are made
        from; a constant may be left out.
        """
        ...


class CartPole:
    """CartPole-v1 of Gymnasium: state and observation are x, ẋ, θ, θ̇ (m, m/s, rad, rad/s).

    An observation is the state rounded to float32, so a path from it leaves the environment's own
    by as much; one that grazes a threshold may end a step earlier or later.

    Args:
        gravity: m/s².
        cart_mass, pole_mass: kg.
        half_length: of the pole, m.
        force: of a push, N. Any of these may be a tensor (), through which gradients pass.

    Source: Barto, Sutton and Anderson (1983); Gymnasium's `CartPoleEnv`, Euler's method.
    """

    observation_size = 4
    seconds = 0.02
    farthest = 2.4
    steepest = 12 * 2 * math.pi / 360

    def __init__(
        self,
        *,
        gravity: float | Tensor = 9.8,
        cart_mass: float | Tensor = 1.0,
        pole_mass: float | Tensor = 0.1,
        half_length: float | Tensor = 0.5,
        force: float | Tensor = 10.0,
    ) -> None:
        self.gravity = gravity
        self.cart_mass = cart_mass
        self.pole_mass = pole_mass
        self.half_length = half_length
        self.force = force

    def state_of(self, observation: Tensor) -> Tensor:
        return observation.double()

    def observe(self, state: Tensor) -> Tensor:
        return state.float()

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
        action: (n,) int64: 0 pushes to the left, 1 to the right.
        """
        _, speed, angle, spin = state.unbind(-1)
        force = torch.where(action == 1, self.force, -self.force).to(state)
        cosine, sine = angle.cos(), angle.sin()
        mass = self.cart_mass + self.pole_mass
        moment = self.pole_mass * self.half_length
        push = (force + moment * spin.square() * sine) / mass
        turning = (self.gravity * sine - cosine * push) / (
            self.half_length * (4 / 3 - self.pole_mass * cosine.square() / mass)
        )
        speeding = push - moment * turning * cosine / mass
        after = state + self.seconds * torch.stack([speed, speeding, spin, turning], -1)
        ended = (after[:, 0].abs() > self.farthest) | (after[:, 2].abs() > self.steepest)
        return after, ended


class Pendulum:
    """Pendulum-v1 of Gymnasium: state θ, θ̇ (rad, rad/s), observation cos θ, sin θ, θ̇.

    It never ends. θ is found up to whole turns, which change nothing.

    Args:
        gravity: m/s².

    Source: Gymnasium's `PendulumEnv`.
    """

    observation_size = 3
    strongest = 2.0
    fastest = 8.0
    seconds = 0.05
    mass = 1.0
    length = 1.0

    def __init__(self, gravity: float = 10.0) -> None:
        self.gravity = gravity

    def state_of(self, observation: Tensor) -> Tensor:
        cosine, sine, spin = observation.double().unbind(-1)
        return torch.stack([torch.atan2(sine, cosine), spin], -1)

    def observe(self, state: Tensor) -> Tensor:
        angle, spin = state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), spin], -1).float()

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
        action: (n, 1), torque in N·m, cut to [−2, 2].
        """
        angle, spin = state.unbind(-1)
        torque = action.squeeze(-1).to(state).clamp(-self.strongest, self.strongest)
        turning = 3 * self.gravity / (2 * self.length) * angle.sin()
        turning = turning + 3 / (self.mass * self.length**2) * torque
        spin = (spin + self.seconds * turning).clamp(-self.fastest, self.fastest)
        after = torch.stack([angle + self.seconds * spin, spin], -1)
        return after, torch.zeros_like(spin, dtype=torch.bool)


class DynamicsSimulator(Stateful):
    """Draws paths of an environment whose equations are known.

    Args:
        dynamics: such as `CartPole()`; `RandomDynamics` are drawn from.
        generator: source of all randomness, on the policy's device.

    Attributes:
        samples: transitions drawn so far.
    """

    STATE = ("generator", "samples")

    def __init__(self, dynamics: Dynamics, generator: torch.Generator) -> None:
        self.dynamics = dynamics
        self.generator = generator
        self.samples = 0

    def continuations(
        self, follower: Policy, observation: Tensor, action: Tensor | None, steps: int
    ) -> Paths:
        """One path from each observation, with the first action given or drawn from the policy.

        Args:
            observation: (n, observation_size).
            action: (n, *A).
            steps: of each path.
        """
        size = self.dynamics.observation_size
        if observation.dim() != 2 or observation.shape[1] != size:
            raise ShapeError(
                f"observation has shape {tuple(observation.shape)}", allowed=f"(n, {size})"
            )
        state = self.dynamics.state_of(observation)

        def advance(_: Tensor, chosen: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal state
            if isinstance(self.dynamics, RandomDynamics):
                after, ended = self.dynamics.draw(state, chosen, self.generator)
            else:
                after, ended = self.dynamics.step(state, chosen)
            # Beyond its end the equations may blow up.
            state = torch.where(alive.unsqueeze(-1), after, state)
            self.samples += int(alive.sum())
            return self.dynamics.observe(state).to(observation.dtype), ended

        return follow(follower, observation, action, steps, self.generator, advance)
