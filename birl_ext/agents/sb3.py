"""A policy of Stable-Baselines3 as a frozen lower level. The package itself is not imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from birl_ext.agents.categorical import CategoricalPolicy
from birl_ext.agents.squashed import SquashedGaussian
from birl_ext.errors import OptionError, TemperatureError

__all__ = ["GaussianFollower", "SoftmaxFollower", "SquashedFollower", "from_sb3"]


def from_sb3(
    model: Any, *, temperature: float | None = None
) -> SoftmaxFollower | GaussianFollower | SquashedFollower:
    """The policy of a model, frozen: its parameters take no gradient and it stays in eval mode.

    Observations are handed over as the environment gives them: the model scales pixels itself.

    Args:
        model: a model or its policy. PPO and A2C with discrete or continuous actions, DQN, SAC.
        temperature: τ of DQN's softmax(Q/τ), units of reward; of no other model.

    Raises:
        OptionError: the model has none of the parts known here.
        TemperatureError: of DQN, missing or not positive.
    """
    policy = getattr(model, "policy", model)
    if hasattr(policy, "q_net"):
        if temperature is None or not temperature > 0:
            raise TemperatureError(f"temperature is {temperature!r}", allowed="(0, inf), for DQN")
        _freeze(policy)
        return SoftmaxFollower(policy, lambda seen: policy.q_net(seen) / temperature)
    if temperature is not None:
        raise OptionError("temperature is given", allowed="None, unless the model has a q_net")
    actor = getattr(policy, "actor", None)
    if hasattr(actor, "get_action_dist_params"):
        _freeze(policy)
        return SquashedFollower(policy)
    if hasattr(policy, "get_distribution"):
        _freeze(policy)
        if hasattr(policy.action_space, "n"):
            return SoftmaxFollower(
                policy, lambda seen: policy.get_distribution(seen).distribution.logits
            )
        return GaussianFollower(policy)
    raise OptionError(
        f"the model is a {type(model).__name__}",
        allowed="a model with `q_net`, `get_distribution` or a squashed Gaussian actor",
    )


class SoftmaxFollower(CategoricalPolicy):
    """π = softmax of logits.

    Args:
        policy: where the parameters are.
        logits: observation (n, *O) → (n, A).
    """

    version = 0

    def __init__(self, policy: Any, logits: Callable[[Tensor], Tensor]) -> None:
        self.device = _device(policy)
        self._logits = logits

    @torch.no_grad()
    def log_probs(self, observation: Tensor) -> Tensor:
        return self._logits(observation).log_softmax(-1)


class GaussianFollower:
    """A diagonal Gaussian; its actions may leave the box, as in Stable-Baselines3, which clips them
    on their way to the environment.
    """

    version = 0

    def __init__(self, policy: Any) -> None:
        self.device = _device(policy)
        self._policy = policy

    @torch.no_grad()
    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        normal = self._policy.get_distribution(observation).distribution
        mean: Tensor = normal.mean
        spread: Tensor = normal.stddev
        return mean + spread * torch.randn(
            mean.shape, generator=generator, dtype=mean.dtype, device=mean.device
        )

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator, greedy: bool = False) -> Tensor:
        if greedy:
            mean: Tensor = self._policy.get_distribution(observation).distribution.mean
            return mean
        return self.sample(observation, generator)

    @torch.no_grad()
    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), (n,), before clipping."""
        found: Tensor = self._policy.get_distribution(observation).distribution.log_prob(action)
        return found.sum(-1)


class SquashedFollower:
    """A tanh-squashed Gaussian over the box of actions."""

    version = 0

    def __init__(self, policy: Any) -> None:
        self.device = _device(policy)
        self._actor = policy.actor
        space = policy.action_space
        low, high = (torch.as_tensor(edge, device=self.device) for edge in (space.low, space.high))
        self._centre, self._half = (low + high) / 2, (high - low) / 2

    def _policy(self, observation: Tensor) -> SquashedGaussian:
        mean, log_std, _ = self._actor.get_action_dist_params(observation)
        return SquashedGaussian(mean, log_std)

    @torch.no_grad()
    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        return self._centre + self._half * self._policy(observation).rsample(generator)[0]

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator, greedy: bool = False) -> Tensor:
        if greedy:
            return self._centre + self._half * self._policy(observation).mode()
        return self.sample(observation, generator)

    @torch.no_grad()
    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), (n,), a density per unit of action."""
        unit = (action - self._centre) / self._half
        return self._policy(observation).log_prob(unit) - self._half.log().sum()


def _device(policy: Any) -> torch.device:
    device: torch.device = next(policy.parameters()).device
    return device


def _freeze(policy: Any) -> None:
    policy.requires_grad_(False)
    policy.eval()
