"""A leader that acts in the follower's process: its policy is the upper-level variable."""

from __future__ import annotations

import torch
from torch import Tensor

from birl_ext.errors import ShapeError
from birl_ext.model import checks
from birl_ext.model.mdp import DenseMDP

__all__ = ["leader_policy_mdp"]


def leader_policy_mdp(
    transition: Tensor,
    reward: Tensor,
    logits: Tensor,
    discount: float | Tensor,
    *,
    initial_distribution: Tensor | None = None,
    terminal: Tensor | None = None,
    mask: Tensor | None = None,
) -> DenseMDP:
    """The follower's MDP when a leader moves first in each state by the policy softmax(logits).

        states (s, b), at index s·B + b:  r((s, b), a) = r(s, b, a),
        P((s', b')|(s, b), a) = P(s'|s, b, a) π_L(b'|s'),   ρ(s, b) = ρ(s) π_L(b|s)

    The follower sees the leader's action b before it chooses a, and knows π_L: its soft-optimal
    policy is `solve(...).policy`, (*M, S·B, A), which reshapes to (*M, S, B, A).

    Args:
        transition: P(s'|s, b, a), (S, B, A, S).
        reward: the follower's, (S, B, A), units of reward.
        logits: of the leader's policy, (*M, S, B), as x gives them; *M are the starts.
        discount: γ in [0, 1).
        initial_distribution: ρ, (S,).
        terminal: states that end the process, (S,) bool.
        mask: actions that the follower has, (S, B, A) bool.

    Returns:
        DenseMDP, batch axes *M, of S·B states and A actions.

    Raises:
        ShapeError, DtypeError: the tensors do not fit together.
        InvalidMDPError: a row of P is no distribution.

    Gradients: to all tensors; P depends on x through π_L.

    Source: Kudo, Tanabe, Wachi and Akimoto (2026): two-player Markov games as bilevel problems.
    """
    for name, tensor in (("transition", transition), ("reward", reward), ("logits", logits)):
        checks.as_floating(name, tensor)
    if transition.dim() != 4 or transition.shape[0] != transition.shape[-1]:
        raise ShapeError(
            f"transition has shape {tuple(transition.shape)}", allowed="(S, B, A, S): P(s'|s, b, a)"
        )
    states, moves, actions, _ = transition.shape
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "reward": (reward, (states, moves, actions)),
        "initial_distribution": (initial_distribution, (states,)),
        "terminal": (terminal, (states,)),
        "mask": (mask, (states, moves, actions)),
    }
    for name, (given, shape) in wanted.items():
        if given is not None and tuple(given.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(given.shape)}", allowed=str(shape))
    if tuple(logits.shape[-2:]) != (states, moves):
        raise ShapeError(
            f"logits has shape {tuple(logits.shape)}", allowed=f"(*M, {states}, {moves})"
        )
    starts, pairs = logits.shape[:-2], states * moves
    leader = logits.softmax(-1)
    joint = torch.einsum("sbat,...tc->...sbatc", transition, leader)
    start = None
    if initial_distribution is not None:
        start = (initial_distribution.unsqueeze(-1) * leader).reshape(*starts, pairs)
    return DenseMDP(
        reward.reshape(pairs, actions).expand(*starts, pairs, actions),
        joint.reshape(*starts, pairs, actions, pairs),
        discount,
        initial_distribution=start,
        terminal=None if terminal is None else terminal.repeat_interleave(moves),
        mask=None if mask is None else mask.reshape(pairs, actions),
    )
