"""Environment adaptation: how a sled should brake and push, when its driver adapts to it.

A sled slides by s' = (1 − x₀) s + x₁ a + noise; its driver minimises s² + a²/2 per step, in a
continuous space of actions, with soft-optimal control. We choose the friction x₀ and the force x₁,
want the sled near 1, and see episodes only. The problem is linear and quadratic, so the driver's
policy and value are known in closed form, and so is the exact gradient through both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.bilevel.adaptation import AdaptedReward, path_log_probability
from birl_ext.bilevel.score import FullHorizon
from birl_ext.bilevel.trajectory import trajectory_surrogate

DISCOUNT, TEMPERATURE, COST, NOISE, STEPS = 0.7, 1.0, 0.5, 0.5, 3
HORIZON = 10  # of the continuations
PATHS, REPETITIONS = 4000, 40


class Driver(NamedTuple):
    """Soft-optimal control: a ~ N(−gain·s, variance), V(s) = −slope·s² + a constant."""

    slope: Tensor
    gain: Tensor
    variance: Tensor

    def probabilities(self, observation: Tensor) -> Tensor:
        raise NotImplementedError("actions are continuous")

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        shock = torch.randn(observation.shape, generator=generator, dtype=torch.float64)
        return self.variance.sqrt() * shock - self.gain * observation


class Paths(NamedTuple):
    """(n, H) each."""

    observation: Tensor
    action: Tensor
    present: Tensor


class Sled(NamedTuple):
    """The environment at one x; it never ends."""

    x: Tensor
    generator: torch.Generator

    def continuations(
        self, follower: Driver, observation: Tensor, action: Tensor | None, steps: int
    ) -> Paths:
        here, states, actions = observation, [], []
        for step in range(steps):
            given = action is not None and step == 0
            chosen = action if given else follower.sample(here, self.generator)
            states.append(here)
            actions.append(chosen)
            shock = torch.randn(here.shape, generator=self.generator, dtype=torch.float64)
            here = mean_of(self.x, here, chosen) + NOISE * shock
        present = torch.ones(len(observation), steps, dtype=torch.bool)
        return Paths(torch.stack(states, -1), torch.stack(actions, -1), present)


def mean_of(x: Tensor, here: Tensor, chosen: Tensor) -> Tensor:
    return (1 - x[0]) * here + x[1] * chosen


def driver_of(x: Tensor) -> Driver:
    """The fixed point of Riccati's equation, differentiable in x."""
    slope, kept = torch.ones((), dtype=torch.float64), 1 - x[0]
    for _ in range(200):
        steepness = COST + DISCOUNT * slope * x[1] ** 2
        gain = DISCOUNT * slope * x[1] * kept / steepness
        slope = 1 + DISCOUNT * slope * kept**2 - steepness * gain**2
    return Driver(slope, gain, TEMPERATURE / (2 * steepness))


def objective(x: Tensor) -> Tensor:
    """φ = E Σ_h (s_h − 1)² from s₀ = 2, by the mean and the variance of s_h."""
    driver = driver_of(x)
    kept = 1 - x[0] - x[1] * driver.gain
    mean, variance = torch.tensor([2.0, 0.0], dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(STEPS):
        total = total + (mean - 1) ** 2 + variance
        mean, variance = kept * mean, kept**2 * variance + x[1] ** 2 * driver.variance + NOISE**2
    return total


def estimate(x: Tensor, generator: torch.Generator) -> Tensor:
    """∇φ from episodes alone, but for the driver's policy and value."""
    with torch.no_grad():
        driver = driver_of(x)
    sled = Sled(x.detach(), generator)

    def transition(here: Tensor, chosen: Tensor, there: Tensor) -> Tensor:
        return torch.distributions.Normal(mean_of(x, here, chosen), NOISE).log_prob(there)

    reward = AdaptedReward(
        lambda s, a: -(s**2) - COST * a**2,
        transition,
        sled,
        driver,
        value=lambda s: -driver.slope * s**2,
        discount=DISCOUNT,
    )
    start = torch.full((PATHS,), 2.0, dtype=torch.float64)
    path = sled.continuations(driver, start, None, STEPS)
    surrogate = trajectory_surrogate(
        (path.observation - 1).square().sum(-1),
        FullHorizon(sled, discount=DISCOUNT, steps=HORIZON)(reward, driver, *path),
        temperature=TEMPERATURE,
        path=path_log_probability(transition, *path),
    )
    (gradient,) = torch.autograd.grad(surrogate, x)
    return gradient


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([0.2, 0.5], dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(objective(x), x)
    found = torch.stack([estimate(x, generator) for _ in range(REPETITIONS)])
    mean, error = found.mean(0), found.std(0) / REPETITIONS**0.5
    for name, *numbers in zip(("friction", "force"), exact, mean, error, strict=True):
        print("{:9} exact {:7.3f}   from samples {:7.3f} ± {:.3f}".format(name, *numbers))
    assert ((mean - exact).abs() < 4 * error).all()
    assert error.norm() < 0.1 * exact.norm()


if __name__ == "__main__":
    main()
