"""The temperature of an agent: fixed, or adjusted until the policy has an entropy asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from birl_ext.errors import OptionError, TemperatureError
from birl_ext.model import checks
from birl_ext.state import Stateful

__all__ = ["Temperature", "continuous_entropy_target", "discrete_entropy_target"]


def discrete_entropy_target(actions: int, share: float = 0.89) -> float:
    """share · ln A, nats. Shares near one ask for a nearly uniform policy and drive τ up for ever.

    Args:
        actions: A, 2 or more.
    """
    if actions < 2:
        raise OptionError(f"actions is {actions!r}", allowed="2 or more")
    if not 0 < (checks.real(share) or 0) < 1:
        raise OptionError(f"share is {share!r}", allowed="(0, 1)")
    return share * math.log(actions)


def continuous_entropy_target(dimensions: int) -> float:
    """−d nats, of a density over [−1, 1]^d."""
    return -float(dimensions)


class Temperature(Stateful):
    """τ, units of reward.

    With an entropy target, τ follows the gradient of

        L(log τ) = log τ · (H(π) − target)

    so that it falls while the policy is more random than asked, and rises while it is less.

    Args:
        initial: τ at the start, positive.
        entropy_target: nats; None keeps τ fixed.
        learning_rate: of log τ (Adam).
        device: of the agent.

    Source: Haarnoja et al. (2018), with the logarithm in place of τ.
    """

    STATE = ("log", "fixed", "_optimiser")

    def __init__(
        self,
        initial: float,
        *,
        entropy_target: float | None = None,
        learning_rate: float = 3e-4,
        device: torch.device | str = "cpu",
    ) -> None:
        _positive(initial)
        self.entropy_target = entropy_target
        self.log = torch.tensor(math.log(initial), device=device, dtype=torch.float64)
        self.fixed = None if entropy_target is not None else float(initial)
        """τ, where it follows no target; otherwise None."""
        self._optimiser = None
        if entropy_target is not None:
            self.log.requires_grad_()
            self._optimiser = torch.optim.Adam([self.log], lr=learning_rate, fused=True)

    @property
    def value(self) -> float:
        return self.fixed if self.fixed is not None else math.exp(float(self.log.detach()))

    def set(self, value: float) -> None:
        """A fixed τ from now on.

        Raises:
            OptionError: it follows an entropy target.
        """
        if self.fixed is None:
            raise OptionError("the temperature follows an entropy target", fix="leave it alone")
        self.fixed = _positive(value)

    def update(self, entropy: Tensor) -> None:
        """One step towards the entropy target; nothing if τ is fixed.

        Args:
            entropy: (), the policy's mean entropy over a batch, nats.
        """
        if self._optimiser is None or self.entropy_target is None:
            return
        self.log.grad = (entropy.detach() - self.entropy_target).to(self.log)
        self._optimiser.step()

    def _check_state(self, state: Any, name: str = "") -> None:
        if isinstance(state, Mapping) and (state.get("fixed") is None) != (self.fixed is None):
            raise OptionError(
                "the stored temperature was fixed and this one is not, or the reverse"
            )
        super()._check_state(state, name)


def _positive(value: float) -> float:
    if not 0 < (checks.real(value) or 0) < math.inf:
        raise TemperatureError(f"temperature is {value!r}", allowed="(0, inf)")
    return float(value)
