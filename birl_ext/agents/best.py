"""The policy that did best so far."""

from __future__ import annotations

import math

from birl_ext.agents.learner import Learner
from birl_ext.state import Stateful

__all__ = ["Best"]


class Best(Stateful):
    """Keeps how an agent acted when it was valued highest.

    Args:
        agent: whose policy is kept and restored; that of now, until one has been valued.
    """

    STATE = ("value", "_policy")

    def __init__(self, agent: Learner) -> None:
        self.value = -math.inf
        """Of the policy kept, in the units of what is offered."""
        self._agent = agent
        self._policy = agent.policy_state()

    def offer(self, value: float) -> None:
        """Keep the present policy if it is worth more than the one kept; NaN is worth nothing."""
        if value > self.value:
            self.value, self._policy = value, self._agent.policy_state()

    def restore(self) -> None:
        """Let the agent act as the policy kept, without learning from there on."""
        self._agent.load_policy_state(self._policy)
