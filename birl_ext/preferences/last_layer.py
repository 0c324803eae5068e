"""A reward network as a function linear in its last layer, as the critic estimator needs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from birl_ext.errors import OptionError
from birl_ext.preferences.reward_model import RewardNetwork

__all__ = ["LastLayer"]


class LastLayer:
    """r(s, a) = w·ψ(s, a), with w the last layer and ψ what it is applied to.

        w = (W, b) flattened, (A(h + 1),);  ψ(s, a) = e_a ⊗ (φ_θ(s), 1)

    φ_θ, (h,), is what the layers before, the trunk, make of an observation.

    Args:
        reward: of discrete actions; its body is a Sequential that ends in a Linear with a bias.

    Raises:
        OptionError: it is not.
    """

    def __init__(self, reward: RewardNetwork) -> None:
        body = reward.body
        last = body[-1] if isinstance(body, nn.Sequential) and len(body) else None
        if reward.actions is None or not isinstance(last, nn.Linear) or last.bias is None:
            raise OptionError(
                f"the reward has actions {reward.actions!r} and the body {type(body).__name__}",
                allowed="discrete actions, and a Sequential that ends in a Linear with a bias",
                fix="build it by RewardNetwork.mlp or RewardNetwork.cnn",
            )
        self.reward = reward
        self.actions = reward.actions
        self._layer = last

    @property
    def size(self) -> int:
        """Number of features, A(h + 1)."""
        return self.actions * (self._layer.in_features + 1)

    def weights(self) -> Tensor:
        """w, (A(h + 1),), differentiable."""
        return torch.cat([self._layer.weight, self._layer.bias.unsqueeze(-1)], -1).flatten()

    @torch.no_grad()
    def features(self, observation: Tensor) -> Tensor:
        """ψ(s, ·), (m, A, A(h + 1)), without a gradient."""
        below = self.reward.below_last(observation)
        padded = torch.cat([below, torch.ones_like(below[:, :1])], -1)
        table = padded.new_zeros(len(padded), self.actions, self.actions, padded.shape[-1])
        every = torch.arange(self.actions, device=table.device)
        table[:, every, every] = padded.unsqueeze(1)
        return table.flatten(2)

    def trunk(self, observation: Tensor) -> Tensor:
        """r(s, ·), (m, A), differentiable in the trunk's parameters alone."""
        below = self.reward.below_last(observation)
        layer = self._layer
        return nn.functional.linear(below, layer.weight.detach(), layer.bias.detach())
