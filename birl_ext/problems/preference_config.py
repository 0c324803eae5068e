"""Settings of a preference run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from birl_ext.errors import ConfigError

__all__ = ["PreferenceConfig"]


@dataclass(frozen=True)
class PreferenceConfig:
    """Learn a reward from a teacher's preferences, and the policy that maximises it."""

    env: str = "CartPole-v1"
    """Gymnasium id; discrete actions."""
    algorithm: Literal["sobirl", "drlhf"] = "sobirl"
    """drlhf leaves the hyper-gradient out."""
    teacher: Literal["oracle", "mistake", "noisy", "skip", "myopic", "equal"] = "noisy"
    rounds: int = 30
    """Outer steps."""
    environment_steps: int = 1000
    """Of an outer step, all environments together."""
    environments: int = 4
    update_every: int = 2
    """Environment steps per update of the agent."""
    batch_size: int = 64
    replay: int = 50_000
    """Transitions kept."""
    discount: float = 0.99
    temperature: float | None = None
    """τ in units of the learned reward; by default it follows an entropy target."""
    learning_rate: float = 1e-3
    """Of the agent."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the agent's hidden layers."""
    target_rate: float = 0.01
    """Share of the critics that their copies take over at each update."""
    labels: int = 300
    """Answers asked for in all."""
    initial_labels: int = 60
    fragment: int = 25
    """Steps of a fragment."""
    pairs: int = 1000
    """Pairs kept."""
    initial_epochs: int = 100
    """Passes over the first answers, before the agent learns."""
    reward_steps: int = 20
    """Updates of the reward per outer step."""
    pair_batch: int = 64
    reward_rate: float = 3e-4
    """Learning rate of the reward."""
    evaluation_episodes: int = 10
    evaluate_every: int = 5
    """Outer steps between evaluations."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "environment_steps", "environments", "update_every", "fragment"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", allowed="1 or more")
        if self.environment_steps % self.environments:
            raise ConfigError(
                f"environment_steps is {self.environment_steps}",
                allowed=f"a multiple of environments, {self.environments}",
            )
