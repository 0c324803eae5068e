"""An arm whose physics are designed for the motor that moves it: the motor's controller adapts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from birl_ext.agents.networks import MLP, StateActionMLP, Twin
from birl_ext.agents.sac import SAC
from birl_ext.agents.sac_discrete import DiscreteSAC
from birl_ext.agents.soft_q import SoftQ
from birl_ext.agents.temperature import Temperature
from birl_ext.bilevel.environment_adaptation import (
    Adaptation,
    AdaptationProblem,
    Practice,
    ZeroOrderAdaptation,
)
from birl_ext.model.checks import check_memory
from birl_ext.runs.settings import check_settings
from birl_ext.simulators.noisy import NoisyDynamics
from birl_ext.state import Stateful

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "AdaptationConfig",
    "AdaptationJob",
    "Arm",
    "adaptation_problem",
    "follower",
    "leader",
    "start",
]

DISCOUNT, UPPER, STEPS = 0.9, 0.9, 40
NOISE = 0.5  # of the velocity, rad/s
TARGET = 1.0  # rad
PRICE = 0.05  # of x that leaves its start
NAMES = ("gravity", "length", "friction", "goal")

Method = Literal["gradient", "zero-order"]
Follower = Literal["soft-q", "discrete-sac", "sac"]


@dataclass(frozen=True)
class AdaptationConfig:
    """Design an arm for its motor, whose controller learns to use what it is given."""

    method: Method = "gradient"
    """"gradient" follows the hyper-gradient by critics of both levels, "zero-order" the difference
    of two controllers that practise on both sides of x."""

    follower: Follower = "soft-q"
    """What learns to control: three torques by soft Q-learning or discrete SAC, or any by SAC."""

    springs: int = 8
    """Springs along the arm's way, each of a strength of its own."""

    temperature: float = 0.2
    """τ of the controller, units of its reward."""

    steps: int = 60
    """Outer steps."""

    learning_rate: float = 0.02
    """Of Adam, on the design."""

    radius: float = 0.1
    """Length of the method "zero-order", units of x."""

    rounds: int = 2
    """Times that 32 episodes of 40 steps are practised in an outer step, 30 updates after each; the
    method "zero-order" does so on both sides."""

    first: int = 50
    """The same before the first outer step."""

    paths: int = 64
    """Episodes that the hyper-gradient, or a value of the method "zero-order", is averaged over."""

    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            least={"springs": 0, "first": 0},
            above={
                "temperature": 0,
                "steps": 0,
                "learning_rate": 0,
                "radius": 0,
                "rounds": 0,
                "paths": 0,
            },
            most={"springs": 1000},
        )
        critics = 3 * (1 + len(NAMES) + self.springs)  # of each step, and as much in the making
        need = STEPS * self.paths * 8 * critics
        check_memory(f"{self.paths} paths", need, fix="lower paths")
        episodes = 32 * max(self.rounds, self.first)
        check_memory(f"{episodes} episodes", STEPS * 8 * episodes, fix="lower rounds and first")


class Arm:
    """An arm on a hinge, hanging down at θ = 0, and a motor.

        θ' = θ + .1 θ̇
        θ̇' = θ̇ + .1 [ u/l² − k θ̇ − (g/l) sin θ' + 5 Σ_j c_j exp(4 cos(θ' − θ_j) − 4) ]

    State θ, θ̇ (rad, rad/s), observation cos θ, sin θ, θ̇. It never ends. The motor's torque u is one
    of −6, 0 and 6, or any between them; at the start, 6 hold the arm at 37°.

    Args:
        x: (4 + J,): of g = 10·2^tanh(x₀), l = 2^tanh(x₁) and k = 2^tanh(x₂), which cannot leave the
            range from half to twice the start's; the goal of the controller (rad); and c of J
            springs, whose θ_j are spread evenly from −π/2 to π.
    """

    observation_size = 3
    seconds = 0.1
    strongest = 6.0

    def __init__(self, x: Tensor) -> None:
        times = self.times(x)
        self.gravity, self.length, self.friction = 10 * times[0], times[1], times[2]
        self.springs = 5 * x[len(NAMES) :]
        self.places = torch.linspace(-math.pi / 2, math.pi, len(self.springs), dtype=torch.float64)

    @staticmethod
    def times(x: Tensor) -> Tensor:
        """Gravity, length and friction over those at the start, (3,)."""
        factors: Tensor = 2 ** x[:3].tanh()
        return factors

    def state_of(self, observation: Tensor) -> Tensor:
        cosine, sine, speed = observation.double().unbind(-1)
        return torch.stack([torch.atan2(sine, cosine), speed], -1)

    def observe(self, state: Tensor) -> Tensor:
        angle, speed = state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), speed], -1).float()

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
        action: (n,) int64, 0 to 2, or (n, 1), torque.
        """
        angle, speed = state.unbind(-1)
        angle = angle + self.seconds * speed
        pushed = torque(action) / self.length**2 - self.friction * speed
        pulled = -self.gravity / self.length * angle.sin()
        near = (4 * (angle.unsqueeze(-1) - self.places).cos() - 4).exp()
        speed = speed + self.seconds * (pushed + pulled + near @ self.springs)
        return torch.stack([angle, speed], -1), torch.zeros_like(speed, dtype=torch.bool)


def torque(action: Tensor) -> Tensor:
    """(n,) of indices, or (n, 1) of torques → (n,) float64."""
    if action.dim() == 1:
        return Arm.strongest * (action.double() - 1)
    return action.squeeze(-1).double()


def start(springs: int) -> Tensor:
    """x of an arm without springs, (4 + J,), whose goal is its target."""
    return torch.tensor([0.0, 0.0, 0.0, TARGET, *[0.0] * springs], dtype=torch.float64)


def adaptation_problem(springs: int) -> AdaptationProblem:
    """Both levels.

        r = −2 (1 − cos(θ − x_goal)) − .05 θ̇² − .02 (u/6)²
        f = 2 (1 − cos(θ − 1)) + .02 θ̇² + .3 (u/6)² + .05 ‖x − x₀‖²

    The controller wants the arm at its goal, whatever torque that takes; the designer wants it at
    1 rad (57°), still, and with little torque.
    """
    unmoved = start(springs)

    def reward(x: Tensor, observation: Tensor, action: Tensor) -> Tensor:
        speed, effort = observation[:, 2].double(), torque(action) / Arm.strongest
        return -_apart(observation, x[3]) - 0.05 * speed.square() - 0.02 * effort.square()

    def cost(x: Tensor, observation: Tensor, action: Tensor) -> Tensor:
        speed, effort = observation[:, 2].double(), torque(action) / Arm.strongest
        running = 0.02 * speed.square() + 0.3 * effort.square()
        price = PRICE * (x - unmoved).square().sum()
        return _apart(observation, torch.tensor(TARGET)) + running + price

    def first(count: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(2, count, generator=generator, dtype=torch.float64)
        return Arm(unmoved).observe(torch.stack([0.5 * drawn[0], drawn[1]], -1))

    return AdaptationProblem(
        lambda x: NoisyDynamics(Arm(x), (0.0, NOISE)), reward, cost, first, STEPS, UPPER
    )


def _apart(observation: Tensor, angle: Tensor) -> Tensor:
    """2 (1 − cos(θ − angle)), (n,)."""
    cosine, sine, _ = observation.double().unbind(-1)
    return 2 * (1 - cosine * angle.cos() - sine * angle.sin())


def follower(
    kind: Follower, temperature: float, seed: int, *, inputs: int = 3, actions: int = 3
) -> SoftQ | DiscreteSAC | SAC:
    """A controller that has learned nothing yet, of the arm unless it is given other sizes.

    Args:
        inputs: numbers in an observation.
        actions: how many there are; SAC has the arm's.
    """
    generator = torch.Generator().manual_seed(seed)
    network = partial(MLP, inputs, hidden=(64, 64), generator=generator)
    given: dict[str, Any] = {
        "discount": DISCOUNT,
        "temperature": Temperature(temperature),
        "optimiser": partial(torch.optim.Adam, lr=1e-3),
        "target_rate": 0.02,
        "target_period": 1,
    }
    if kind == "soft-q":
        return SoftQ(network(actions), **given)
    if kind == "discrete-sac":
        return DiscreteSAC(network(actions), Twin(network(actions), network(actions)), **given)
    critic = partial(StateActionMLP, inputs, 1, hidden=(64, 64), generator=generator)
    edge = torch.tensor([Arm.strongest])
    return SAC(network(2), Twin(critic(), critic()), low=-edge, high=edge, seed=seed, **given)


def leader(
    config: AdaptationConfig, x: Tensor | None = None, **effort: int
) -> Adaptation | ZeroOrderAdaptation:
    """The method of a configuration, at the start unless x is given.

    Args:
        effort: settings of `Practice` in place of the configuration's.
    """
    x = start(config.springs) if x is None else x
    agent = follower(config.follower, config.temperature, config.seed)
    own = {name: getattr(config, name) for name in ("rounds", "first", "paths")}
    given: dict[str, Any] = {
        "optimiser": partial(torch.optim.Adam, lr=config.learning_rate),
        "practice": Practice(**{**own, **effort}),
        "seed": config.seed,
    }
    problem = adaptation_problem(config.springs)
    if config.method == "zero-order":
        return ZeroOrderAdaptation(problem, agent, x, radius=config.radius, **given)
    generator = torch.Generator().manual_seed(config.seed)
    inputs, outputs = (4, 1 + len(x)) if config.follower == "sac" else (3, 3 * (1 + len(x)))
    network: torch.nn.Module = MLP(inputs, outputs, hidden=(64, 64), generator=generator)
    if config.follower == "sac":
        network = _Joined(network)
    learn = partial(torch.optim.Adam, lr=1e-3)
    return Adaptation(problem, agent, x, network=network, discount=DISCOUNT, learn=learn, **given)


class _Joined(torch.nn.Module):
    """Observation and action as one vector."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        found: Tensor = self.network(torch.cat([observation, action], -1))
        return found


class AdaptationJob(Stateful):
    """Design an arm by Adam."""

    STATE = ("leader",)

    def __init__(self, config: AdaptationConfig) -> None:
        self.config = config
        self.leader = leader(config)

    @property
    def total_steps(self) -> int:
        return self.config.steps

    @property
    def done(self) -> bool:
        return self.leader.steps >= self.config.steps

    def step(self) -> dict[str, float]:
        design = _named(self.leader.x.detach())
        outcome = self.leader.step()
        return {
            "objective": outcome.objective,
            "gradient_norm": outcome.gradient_norm,
            "environment_steps": self.leader.samples,
            **design,
        }

    def summary(self) -> dict[str, Any]:
        """The last design, and what the controller that there is makes of it."""
        x = self.leader.x.detach()
        with self.leader.taken_back(always=True):
            costs = self.leader.watch(x, 2000)
        return {
            "objective": float(costs.mean()),
            "standard_error": float(costs.std()) / math.sqrt(len(costs)),
            "environment_steps": self.leader.samples,
            **_named(x),
            "params": {"x": x},
        }

    def figures(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> dict[str, Callable[[], Figure]]:
        return {
            "learning_curve": partial(self._learning_curve, history),
            "design": partial(self._design, history),
            "springs": partial(self._springs, summary),
        }

    # The figures

    def _learning_curve(self, history: Sequence[Mapping[str, float]]) -> Figure:
        from birl_ext.runs import plots

        return plots.learning_curve(
            history,
            {"objective": "φ, the designer's cost"},
            title=f"An arm for its motor: {self.config.follower}, {self.config.method}",
        )

    def _design(self, history: Sequence[Mapping[str, float]]) -> Figure:
        from birl_ext.runs import plots

        names = {name: name.replace("_", " ") for name in _named(start(0))}
        return plots.learning_curve(history, names, title="The design", ylabel="as at the start, 1")

    def _springs(self, summary: Mapping[str, Any]) -> Figure:
        """The torque that holds the arm without the motor."""
        from birl_ext.runs import plots

        angle = torch.linspace(-math.pi / 2, math.pi, 200, dtype=torch.float64)
        still = torch.stack([angle, torch.zeros_like(angle)], -1)
        figure, axes = plots.new_figure()
        held = torch.ones(len(angle), dtype=torch.int64)
        x = torch.tensor(summary["params"]["x"], dtype=torch.float64)
        for label, design in (("at the start", start(self.config.springs)), ("designed", x)):
            speed = Arm(design).step(still, held)[0][:, 1]
            axes.plot(angle, speed / Arm.seconds, label=label)
        axes.axvline(TARGET, color="0.6", linewidth=1)
        axes.set(xlabel="angle, rad", ylabel="acceleration without the motor, rad/s²")
        axes.legend()
        return figure


def _named(x: Tensor) -> dict[str, float]:
    """The physics of a design: gravity, length and friction in units of those at the start."""
    scales = [*Arm.times(x).tolist(), float(x[3])]
    return dict(zip(NAMES, scales, strict=True))
