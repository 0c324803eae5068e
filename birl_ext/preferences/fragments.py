"""Stretches of episodes, as a teacher compares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.errors import OptionError, ShapeError
from birl_ext.model import checks

__all__ = ["Episode", "Fragments", "Pairs", "cut", "draw"]


class Episode(NamedTuple):
    """One episode, or a part of one, of T steps.

    Args:
        observation: (T, *O).
        action: (T, *A), int64 (T,) if discrete.
        reward: (T,) float, the environment's own.
        log_prob: (T,) log π(a|s) of the policy that acted.
        version: (T,) int64, how often that policy had been updated.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    log_prob: Tensor
    version: Tensor


class Fragments(NamedTuple):
    """n fragments of H steps; one that ended early is padded, with zeros.

    Its length is n, not the number of its fields, so `_replace` cannot be used.

    Args:
        observation: (n, H, *O).
        action: (n, H, *A), int64 (n, H) if discrete.
        reward: (n, H) float, the environment's own: for teachers and measurements only.
        present: (n, H) bool, False where a fragment had ended.
        log_prob: (n, H) log π(a|s) of the policy that acted, at the time.
        version: (n,) int64, how often that policy had been updated.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    present: Tensor
    log_prob: Tensor
    version: Tensor

    def __len__(self) -> int:
        return self.observation.shape[0]

    def sum(self, value: Tensor) -> Tensor:
        """Σ_h of a number per step, (n, H, …) → (n, …), over the steps that are present.

        Raises:
            ShapeError: it has not one per step.
        """
        if value.shape[:2] != self.present.shape:
            raise ShapeError(
                f"value has shape {tuple(value.shape)}", allowed=f"{tuple(self.present.shape)}, …"
            )
        present = self.present.reshape(*self.present.shape, *[1] * (value.ndim - 2))
        return torch.where(present, value, 0).sum(1)

    def mean(self, value: Tensor) -> Tensor:
        """The same over the number of steps that are present."""
        found = self.sum(value)
        return found / self.present.sum(1).reshape(-1, *[1] * (found.ndim - 1))

    def select(self, index: Tensor) -> Fragments:
        """Those at `index`, (m,) int64 or (n,) bool."""
        return Fragments(*(part[index] for part in self))

    def after(self, lead: int) -> Fragments:
        """Without the first `lead` steps, see `draw`: what a teacher compares, (n, H − lead, …)."""
        length = self.present.shape[1]
        if not 0 <= lead < length:
            raise OptionError(f"lead is {lead!r}", allowed=f"0 to {length - 1}, of {length} steps")
        return Fragments(
            self.observation[:, lead:],
            self.action[:, lead:],
            self.reward[:, lead:],
            self.present[:, lead:],
            self.log_prob[:, lead:],
            self.version,
        )

    def to(self, device: torch.device | str) -> Fragments:
        """The same on another device."""
        return Fragments(*(part.to(device) for part in self))


class Pairs(NamedTuple):
    """n pairs of fragments with a teacher's answers; its length is n.

    Args:
        label: (n,) float, the probability that `first` is preferred: 1, 0, or 0.5 for a tie.
    """

    first: Fragments
    second: Fragments
    label: Tensor

    def __len__(self) -> int:
        return self.label.shape[0]

    def select(self, index: Tensor) -> Pairs:
        """Those at `index`, (m,) int64 or (n,) bool."""
        return Pairs(self.first.select(index), self.second.select(index), self.label[index])

    def after(self, lead: int) -> Pairs:
        """Without the first `lead` steps of each fragment."""
        return Pairs(self.first.after(lead), self.second.after(lead), self.label)

    def to(self, device: torch.device | str) -> Pairs:
        """The same on another device."""
        return Pairs(self.first.to(device), self.second.to(device), self.label.to(device))


def cut(episodes: Sequence[Episode], length: int) -> Fragments:
    """Each episode from its start, in pieces of H steps; its last piece may be padded.

    Args:
        episodes: at least one; steps of different ones never share a fragment.
        length: H, steps.

    Returns:
        Σ_e ⌈T_e/H⌉ fragments, in the order of the episodes. `version` is that of the oldest step.

    Raises:
        OptionError: the length is below one, or there is no step at all.
        ShapeError: the parts of an episode differ in length.
    """
    _check(episodes, length)
    return _gather(
        episodes,
        [(e, t) for e, one in enumerate(episodes) for t in range(0, len(one.reward), length)],
        length,
    )


def draw(
    episodes: Sequence[Episode],
    length: int,
    count: int,
    generator: torch.Generator,
    *,
    lead: int = 0,
) -> Fragments:
    """Fragments that start anywhere, each place equally likely, with replacement.

    An episode of T ≥ H steps has T − H + 1 places; a shorter one has one, and is padded.

    The policy chose the steps before a fragment, too. With a lead they come along, for the score
    (`birl_ext.bilevel.sobirl.SoBiRLUpdate`, option `lead`); `Fragments.after` takes them off.

    Args:
        episodes: at least one; steps of different ones never share a fragment.
        length: H, steps.
        count: n.
        generator: of the places, on the CPU.
        lead: steps before each fragment that come along; those before an episode's start are
            padding. The places are the same whatever the lead.

    Returns:
        (n, lead + H, …). `version` is that of the oldest step.

    Raises:
        OptionError: the length is below one, the lead below zero, or there is no step at all.
        ShapeError: the parts of an episode differ in length.
    """
    _check(episodes, length)
    if lead < 0:
        raise OptionError(f"lead is {lead!r}", allowed="0 or more")
    steps = torch.tensor([len(one.reward) for one in episodes])
    places = torch.where(steps > 0, (steps - length + 1).clamp(min=1), 0)
    ends = places.cumsum(0)
    drawn = torch.randint(int(ends[-1]), (count,), generator=generator)
    which = torch.searchsorted(ends, drawn, right=True)
    start = drawn - (ends - places)[which]
    return _gather(episodes, list(zip(which.tolist(), start.tolist(), strict=True)), length, lead)


def _check(episodes: Sequence[Episode], length: int) -> None:
    checks.check_count("length", length)
    for index, episode in enumerate(episodes):
        sizes = [len(part) for part in episode]
        if len(set(sizes)) > 1:
            named = ", ".join(map("{} {}".format, episode._fields, sizes))
            raise ShapeError(f"its parts have {named} steps", where=f"episode {index}")
    if not any(len(one.reward) for one in episodes):
        raise OptionError("there are no steps to take fragments from", fix="collect some first")


def _gather(
    episodes: Sequence[Episode],
    places: Sequence[tuple[int, int]],
    length: int,
    lead: int = 0,
) -> Fragments:
    """The fragments that start at (episode, step), each with the steps that lead up to it."""
    model = episodes[places[0][0]] if places else episodes[0]
    count = len(places)
    blank = [part.new_zeros((count, lead + length, *part.shape[1:])) for part in model]
    observation, action, reward, log_prob, _ = blank
    present = torch.zeros(count, lead + length, dtype=torch.bool, device=reward.device)
    version = model.version.new_zeros(count)
    for row, (which, start) in enumerate(places):
        before = min(start, lead)
        piece = [part[start - before : start + length] for part in episodes[which]]
        filled = slice(lead - before, lead - before + len(piece[0]))
        for target, source in zip((observation, action, reward, log_prob), piece, strict=False):
            target[row, filled] = source
        present[row, filled] = True
        version[row] = piece[-1].min()
    return Fragments(observation, action, reward, present, log_prob, version)
