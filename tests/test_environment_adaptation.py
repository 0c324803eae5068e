"""Environment adaptation: critics of both levels against gradients that share nothing with them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from cases import untyped
from processes import digest
from torch import Tensor

from birl_ext.agents.networks import MLP
from birl_ext.agents.soft_q import SoftQ
from birl_ext.agents.temperature import Temperature
from birl_ext.bilevel.environment_adaptation import (
    Adaptation,
    AdaptationProblem,
    Practice,
    ZeroOrderAdaptation,
)
from birl_ext.errors import (
    BirlError,
    GradientError,
    NonFiniteInputError,
    NonFiniteResultError,
    OptionError,
    ShapeError,
)
from birl_ext.simulators.equations import CartPole, DynamicsSimulator, Pendulum
from birl_ext.simulators.noisy import NoisyDynamics

Adam = torch.optim.Adam

# A sled and its driver, who minimises s² + a²/2: soft-optimal control in closed form

DISCOUNT, UPPER, TEMPERATURE, EFFORT, NOISE, STEPS = 0.7, 0.6, 1.0, 0.5, 1.0, 16


class Sled:
    """s' = (1 − x₀) s + x₁ a."""

    observation_size = 1

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def state_of(self, observation: Tensor) -> Tensor:
        return observation.double()

    def observe(self, state: Tensor) -> Tensor:
        return state.float()

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        after = (1 - self.x[0]) * state + self.x[1] * action.view_as(state)
        return after, torch.zeros(len(state), dtype=torch.bool)


class Law(NamedTuple):
    """a ~ N(−gain·s, variance), V(s) = −slope·s² + a constant."""

    slope: Tensor
    gain: Tensor
    variance: Tensor


def law(x: Tensor) -> Law:
    """The fixed point of Riccati's equation, differentiable in x."""
    slope, kept = torch.ones((), dtype=torch.float64), 1 - x[0]
    for _ in range(200):
        steepness = EFFORT + DISCOUNT * slope * x[1] ** 2
        gain = DISCOUNT * slope * x[1] * kept / steepness
        slope = 1 + DISCOUNT * slope * kept**2 - steepness * gain**2
    return Law(slope, gain, TEMPERATURE / (2 * steepness))


def exact_objective(x: Tensor) -> Tensor:
    """φ = E Σ_t γ_uᵗ (s_t − 3)² from s₀ ~ N(2, 1), by the moments of s_t."""
    driver = law(x)
    kept = 1 - x[0] - x[1] * driver.gain
    mean, variance = torch.tensor([2.0, 1.0], dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for step in range(STEPS):
        total = total + UPPER**step * ((mean - 3) ** 2 + variance)
        mean, variance = kept * mean, kept**2 * variance + x[1] ** 2 * driver.variance + NOISE**2
    return total


class Driver:
    """An agent that has learned all there is."""

    device, version, temperature = torch.device("cpu"), 0, TEMPERATURE

    def __init__(self, x: Tensor) -> None:
        self.law = law(x)

    def _normal(self, observation: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(
            -self.law.gain * observation.double(), self.law.variance.sqrt()
        )

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        shock = torch.randn(observation.shape, generator=generator, dtype=torch.float64)
        return self._normal(observation).mean + self.law.variance.sqrt() * shock

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        return self._normal(observation).log_prob(action).squeeze(-1)

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        value = -self.law.slope * observation.double().square().squeeze(-1)
        return value + TEMPERATURE * self.log_prob(observation, action)

    def update(self, *_: Any) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Quadratic(torch.nn.Module):
    """All that critics of a linear and quadratic problem can be, 1 + 2 of them."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(6, outputs, dtype=torch.float64))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        s, a = observation.double().squeeze(-1), action.double().squeeze(-1)
        return torch.stack([torch.ones_like(s), s, a, s * s, s * a, a * a], -1) @ self.weight


def first(count: int, generator: torch.Generator) -> Tensor:
    return 2 + torch.randn(count, 1, generator=generator)


def sled_problem(**changes: Any) -> AdaptationProblem:
    given: dict[str, Any] = {
        "dynamics": lambda x: NoisyDynamics(Sled(x), [NOISE]),
        "reward": lambda x, s, a: -(s.double() ** 2 + EFFORT * a.double() ** 2).squeeze(-1),
        "cost": lambda x, s, a: (s.double().squeeze(-1) - 3) ** 2,
        "start": first,
        "steps": STEPS,
        "discount": UPPER,
    }
    return AdaptationProblem(**{**given, **changes})


PLACE = torch.tensor([0.2, 0.5], dtype=torch.float64)
PRACTICE = Practice(environments=512, rounds=8, updates=75, batch=512, paths=500)
QUICK = Practice(environments=4, rounds=1, updates=2, batch=16, paths=8)


def sled_leader(**changes: Any) -> Adaptation:
    given: dict[str, Any] = {
        "problem": sled_problem(),
        "agent": Driver(PLACE),
        "x": PLACE,
        "network": Quadratic(),
        "discount": DISCOUNT,
        "optimiser": partial(Adam, lr=0.01),
        "learn": partial(Adam, lr=0.05),
        "practice": QUICK,
        "target_rate": 0.2,
    }
    return Adaptation(**{**given, **changes})


def exact_gradient() -> Tensor:
    x = PLACE.clone().requires_grad_()
    return torch.autograd.grad(exact_objective(x), x)[0]


def learned() -> Adaptation:
    """Critics that have learned, in ever smaller steps."""
    leader = sled_leader(practice=PRACTICE, actions=2)  # where what A draws share counts most
    for rate in (0.05, 0.015, 0.005):
        leader.critics.optimiser.param_groups[0]["lr"] = rate
        leader.practise()
    return leader


def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on x does not move the density, which has a graph nevertheless."""
    whole = NoisyDynamics.log_prob
    monkeypatch.setattr(
        NoisyDynamics,
        "log_prob",
        lambda self, *step: whole(self, *step).detach() + 0 * whole(self, *step),
    )


def relative_error(leader: Adaptation) -> float:
    exact = exact_gradient()
    found = torch.stack([leader.estimate(4000)[1] for _ in range(8)]).mean(0)
    return float((found - exact).norm() / exact.norm())


def test_the_truth_is_its_finite_difference() -> None:
    steps = 1e-6 * torch.eye(2, dtype=torch.float64)
    slopes = [(exact_objective(PLACE + d) - exact_objective(PLACE - d)) / 2e-6 for d in steps]
    torch.testing.assert_close(exact_gradient(), torch.stack(slopes), rtol=1e-6, atol=1e-8)


def test_the_estimate_is_the_exact_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is another without the probability of a path."""
    leader = learned()
    assert relative_error(leader) < 0.15
    objective, _ = leader.estimate(20_000)
    assert objective == pytest.approx(float(exact_objective(PLACE)), rel=0.02)
    unmoved(monkeypatch)
    assert relative_error(leader) > 0.3


def test_what_the_follower_foresees_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        unmoved(patch)
        leader = learned()
    assert relative_error(leader) > 0.3


# A walker with two ways to go, whose exact policy is that of a fine grid


class Walker(Sled):
    """s' = s + x₀ (2a − 1) − x₁ s."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        push = self.x[0] * (2 * action.double() - 1)
        after = state + push.unsqueeze(-1) - self.x[1] * state
        return after, torch.zeros(len(state), dtype=torch.bool)


def grid_objective(x: Tensor, cells: int = 161) -> float:
    """φ of the same reward and cost as the sled's, without effort: cells instead of densities."""
    s = torch.linspace(-6, 6, cells, dtype=torch.float64)
    mean = torch.stack([s - x[0] - x[1] * s, s + x[0] - x[1] * s], -1)
    moves = (-((s - mean.unsqueeze(-1)) ** 2) / (2 * NOISE**2)).softmax(-1)
    value = torch.zeros(cells, dtype=torch.float64)
    for _ in range(80):
        q = -(s**2).unsqueeze(-1) + DISCOUNT * moves @ value
        value = TEMPERATURE * (q / TEMPERATURE).logsumexp(-1)
    chain = torch.einsum("sa,sat->st", (q / TEMPERATURE).softmax(-1), moves)
    where, total = (-((s - 2) ** 2) / 2).softmax(-1), 0.0
    for step in range(STEPS):
        total += UPPER**step * float(where @ (s - 3) ** 2)
        where = where @ chain
    return total


def test_an_agent_that_learns_leads_to_the_exact_gradient() -> None:
    """Of a network that knew nothing, within a tenth of a minute."""
    place = torch.tensor([1.0, 0.2], dtype=torch.float64)
    steps = 1e-4 * torch.eye(2, dtype=torch.float64)
    exact = torch.tensor([grid_objective(place + d) - grid_objective(place - d) for d in steps])
    exact = exact.double() / 2e-4
    generator = torch.Generator().manual_seed(0)
    leader = sled_leader(
        problem=sled_problem(
            dynamics=lambda x: NoisyDynamics(Walker(x), [NOISE]),
            reward=lambda x, s, a: -(s.double().squeeze(-1) ** 2) + 0 * x[0],
        ),
        agent=soft_q(generator),
        x=place,
        network=MLP(1, 2 * 3, hidden=(32, 32), generator=generator),
        learn=partial(Adam, lr=3e-3),
        target_rate=0.05,
        practice=Practice(environments=256, rounds=40, updates=30, paths=500),
    )
    leader.practise()
    found = torch.stack([leader.estimate(4000)[1] for _ in range(4)]).mean(0)
    assert (found - exact).norm() < 0.2 * exact.norm(), (found, exact)


def soft_q(generator: torch.Generator) -> SoftQ:
    return SoftQ(
        MLP(1, 2, hidden=(32, 32), generator=generator),
        discount=DISCOUNT,
        temperature=Temperature(TEMPERATURE),
        optimiser=partial(Adam, lr=3e-3),
        target_rate=0.05,
        target_period=1,
    )


def test_zero_order_follows_the_slope() -> None:
    """Of φ itself where the agent has nothing to learn: in the mean over directions."""
    problem = sled_problem(reward=lambda x, s, a: torch.zeros(len(s), dtype=torch.float64), steps=2)
    leader = ZeroOrderAdaptation(
        problem,
        untyped(Driver(PLACE)),
        PLACE,
        optimiser=partial(Adam, lr=0.01),
        practice=Practice(environments=1, rounds=1, updates=1, batch=1, paths=2000),
        radius=0.05,
    )
    found = torch.stack([leader.hypergradient()[1] for _ in range(300)])
    # the driver stays as it is: E[(s₁ − 3)²] by hand, γ_u times
    driver = law(PLACE)
    x = PLACE.clone().requires_grad_()
    mean = (1 - x[0] - x[1] * driver.gain) * 2
    spread = (1 - x[0] - x[1] * driver.gain) ** 2 + x[1] ** 2 * driver.variance
    (exact,) = torch.autograd.grad(UPPER * ((mean - 3) ** 2 + spread), x)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    assert error.norm() < 0.1 * exact.norm()


# What a step leaves behind


def test_after_an_error_all_is_as_it_was() -> None:
    leader = sled_leader()
    leader.step()
    before = leader.state_dict()
    leader.problem = sled_problem(cost=lambda x, s, a: torch.full((len(s),), math.nan))
    with pytest.raises(NonFiniteInputError, match="cost is nan at row 0"):
        leader.step()
    assert digest(leader.state_dict()) == digest(before)


def test_a_temperature_that_moves_is_refused() -> None:
    class Cooling(Driver):
        def update(self, *_: Any) -> dict[str, float]:
            self.temperature = 0.5
            return {}

    with pytest.raises(OptionError, match=r"temperature went from 1 to 0\.5"):
        sled_leader(agent=Cooling(PLACE)).step()


def test_samples_are_steps_of_an_environment() -> None:
    leader = sled_leader()
    outcome = leader.step()
    assert outcome.samples == leader.samples == (4 + 8) * STEPS
    zero_order = ZeroOrderAdaptation(
        sled_problem(),
        untyped(Driver(PLACE)),
        PLACE,
        optimiser=partial(Adam, lr=0.01),
        practice=QUICK,
        radius=0.1,
    )
    zero_order.step()
    assert zero_order.step().samples == 2 * (4 + 8) * STEPS
    assert zero_order.samples == (4 + 4 * (4 + 8)) * STEPS


# Noise, and the density it gives


def test_the_density_is_that_of_torch() -> None:
    gravity = torch.tensor(9.8, dtype=torch.float64, requires_grad=True)
    noisy = NoisyDynamics(CartPole(gravity=gravity), [0.0, 0.1, 0.0, 0.2])
    draws = torch.Generator().manual_seed(0)
    here = 0.1 * torch.randn(50, 4, generator=draws)
    action = torch.arange(50) % 2
    path = DynamicsSimulator(noisy, draws).continuations(untyped(None), here, action, 1)
    assert path.observation.shape == (50, 1, 4)
    with torch.no_grad():
        there, _ = noisy.draw(here.double(), action, draws)
    mean, _ = CartPole(gravity=gravity).step(here.double(), action)
    one, other = (
        torch.distributions.Normal(mean[:, i], sigma).log_prob(there[:, i])
        for i, sigma in ((1, 0.1), (3, 0.2))
    )
    found = noisy.log_prob(here, action, there)
    torch.testing.assert_close(found, one + other)
    (slope,) = torch.autograd.grad(found.sum(), gravity)
    h = 1e-5
    up, down = (
        NoisyDynamics(CartPole(gravity=9.8 + d), noisy.deviation)
        .log_prob(here, action, there)
        .sum()
        for d in (h, -h)
    )
    assert float(slope) == pytest.approx(float(up - down) / (2 * h), rel=1e-6)
    noisy.require_density(here, action, gravity)


def test_what_is_drawn_has_that_mean_and_deviation() -> None:
    noisy = NoisyDynamics(CartPole(), [0.0, 0.1, 0.0, 0.2])
    state = torch.tensor([0.1, 0.2, 0.05, -0.1], dtype=torch.float64).expand(40_000, 4)
    action = torch.ones(len(state), dtype=torch.int64)

    class Right:
        def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
            return torch.ones(len(observation), dtype=torch.int64)

    simulator = DynamicsSimulator(noisy, torch.Generator().manual_seed(0))
    path = simulator.continuations(Right(), state.float(), action, 2)
    after = path.observation[:, 1].double()
    mean, _ = CartPole().step(state[:1].float().double(), action[:1])
    torch.testing.assert_close(after.std(0), noisy.deviation, rtol=0.02, atol=1e-6)
    assert ((after.mean(0) - mean[0]).abs() <= 4 * noisy.deviation / 200 + 1e-6).all()


def test_x_that_moves_what_has_no_noise_is_refused() -> None:
    """Gymnasium's pendulum takes its new speed into its new angle."""
    gravity = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    noisy = NoisyDynamics(Pendulum(untyped(gravity)), [0.0, 0.1])
    here = torch.tensor([[0.6, 0.8, 0.1]])
    with pytest.raises(GradientError, match="x moves entry 0 of the state, which has no noise"):
        noisy.require_density(here, torch.zeros(1, 1), gravity)
    leader = sled_leader()

    class Pair(Sled):
        observation_size = 2

        def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
            after, ended = super().step(state[:, :1], action)
            return torch.cat([after, after], -1), ended

    leader.problem = sled_problem(
        dynamics=lambda x: NoisyDynamics(Pair(x), [NOISE, 0.0]),
        start=lambda n, g: first(n, g).expand(n, 2),
    )
    leader.agent = untyped(First(PLACE))
    leader.critics.network.forward = lambda s, a: torch.zeros(len(s), 3)
    with pytest.raises(GradientError, match="x moves entry 1 of the state"):
        leader.estimate(4)


class First(Driver):
    """Looks at the first entry alone."""

    def _normal(self, observation: Tensor) -> torch.distributions.Normal:
        return super()._normal(observation[:, :1])

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample(observation[:, :1], generator)


@pytest.mark.parametrize(
    ("deviation", "error", "words"),
    [
        ([0.0, 0.0, 0.0, 0.0], OptionError, "deviation is"),
        ([0.0, -1.0, 0.0, 0.0], OptionError, "0 or more"),
        ([0.0, math.nan, 0.0, 0.0], OptionError, "deviation is"),
        ([], ShapeError, r"deviation has shape \(0,\)"),
        ([[0.1]], ShapeError, r"deviation has shape \(1, 1\)"),
        ([0.1], ShapeError, "deviation has 1 entries, a state 4"),
    ],
)
def test_a_deviation_that_cannot_be(deviation: Any, error: type[BirlError], words: str) -> None:
    here, action = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(error, match=words):
        NoisyDynamics(CartPole(), deviation).step(here, action)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"problem": None}, OptionError, "problem is"),
        ({"practice": None}, OptionError, "practice is"),
        ({"actions": 1}, OptionError, "actions is 1"),
        ({"network": Quadratic(2)}, ShapeError, "network of the critics returned shape"),
        ({"network": None}, OptionError, "network is"),
        (
            {"problem": sled_problem(reward=lambda x, s, a: -s.double())},
            ShapeError,
            r"reward has shape \(16, 1\)",
        ),
        (
            {"problem": sled_problem(dynamics=lambda x: NoisyDynamics(Sled(x.detach()), [NOISE]))},
            GradientError,
            "the lower level does not depend on x",
        ),
        ({"learn": partial(torch.optim.SGD, lr=1e200)}, NonFiniteResultError, "critics' loss"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    change: dict[str, Any], error: type[BirlError], words: str
) -> None:
    with pytest.raises(error, match=words):
        sled_leader(**change).step()


def test_problems_and_practice_that_cannot_be() -> None:
    with pytest.raises(OptionError, match=r"discount is 1\.0"):
        sled_problem(discount=1.0)
    with pytest.raises(OptionError, match="cost is"):
        sled_problem(cost=None)
    with pytest.raises(OptionError, match="rounds is 0"):
        Practice(rounds=0)
    with pytest.raises(OptionError, match="radius is 0"):
        ZeroOrderAdaptation(
            sled_problem(),
            untyped(Driver(PLACE)),
            PLACE,
            optimiser=Adam,
            practice=QUICK,
            radius=0.0,
        )
