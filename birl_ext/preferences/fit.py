"""Fitting a reward to answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.errors import NonFiniteResultError, warn
from birl_ext.model import checks
from birl_ext.preferences.fragments import Pairs
from birl_ext.preferences.loss import accuracy, bradley_terry, margins
from birl_ext.preferences.reward_model import RewardModel, global_draws_from, members_of

__all__ = ["Evaluation", "Fit", "evaluate", "fit"]


class Evaluation(NamedTuple):
    """How well a reward explains answers.

    Args:
        loss: mean cross entropy, nats.
        accuracy: share of the strict answers that the larger return explains; NaN without any.
    """

    loss: float
    accuracy: float


class Fit(NamedTuple):
    """What `fit` did.

    Args:
        epochs: passes taken.
        training: over the batches of the last pass, each before its step, in training mode.
        validation: of the parameters kept; None without validation pairs.
    """

    epochs: int
    training: Evaluation
    validation: Evaluation | None


def fit(
    reward: RewardModel,
    pairs: Pairs,
    optimiser: Optimizer,
    generator: torch.Generator,
    *,
    epochs: int = 1,
    batch_size: int = 64,
    at_once: int | None = None,
    noise: float = 0.0,
    validation: Pairs | None = None,
    patience: int = 5,
) -> Fit:
    """Minimise the mean cross entropy of the answers, by steps on batches.

    Each member of an ensemble sees the pairs in an order of its own. The model is in training mode
    here and nowhere else.

    Args:
        reward: the model, on the pairs' device.
        pairs: at least one; `PreferenceBuffer.everything`.
        optimiser: over the model's parameters; its state goes on from fit to fit.
        generator: of the orders and of dropout, on the CPU.
        epochs: passes over the pairs, at most.
        batch_size: pairs per step; the last batch of a pass may be smaller.
        at_once: see `margins`.
        noise: ε of `bradley_terry`.
        validation: pairs kept apart, at least one. With them fitting stops after `patience` passes
            without a smaller loss on them, and the parameters of the best pass are kept.
        patience: see `validation`.

    Answers that are all ties carry nothing; a warning says so.

    Raises:
        NonFiniteResultError: a loss is NaN or infinite, that on the validation pairs included; no
            step was taken on it.
        OptionError: there are no pairs to fit to or to validate on, or a number is below one; or an
            ensemble is inside another model.
    """
    numbers = {
        "the number of pairs": len(pairs),
        "epochs": epochs,
        "batch_size": batch_size,
        "patience": patience,
    }
    if validation is not None:
        numbers["the number of validation pairs"] = len(validation)
    for name, value in numbers.items():
        checks.check_count(name, value)
    if bool((pairs.label == 0.5).all()):
        warn(
            f"all {len(pairs)} answers are ties: none has found any fragment better than another, "
            "and a reward that is the same everywhere explains them best",
        )
    members = members_of(reward)
    best = _Best(patience)
    for epoch in range(1, epochs + 1):
        with reward.fitting(), global_draws_from(generator, pairs.label.device):
            training = _pass(
                members, pairs, optimiser, generator, batch_size, at_once, noise, epoch
            )
        if validation is not None:
            found = evaluate(
                reward, validation, batch_size=batch_size, at_once=at_once, noise=noise
            )
            _check_loss(found.loss, f"validation after epoch {epoch}")
            if best.is_over(found, reward):
                break
    best.restore(reward)
    return Fit(epoch, training, best.evaluation)


@torch.no_grad()
def evaluate(
    reward: RewardModel,
    pairs: Pairs,
    *,
    batch_size: int = 64,
    at_once: int | None = None,
    noise: float = 0.0,
) -> Evaluation:
    """Loss and accuracy on answered pairs, in evaluation mode."""
    parts = torch.split(torch.arange(len(pairs), device=pairs.label.device), batch_size)
    found = [margins(reward, pairs.select(part), at_once=at_once) for part in parts]
    margin = torch.cat(found).double()
    loss = bradley_terry(margin, pairs.label, noise).mean()
    return Evaluation(float(loss), float(accuracy(margin, pairs.label)))


def _pass(
    members: Sequence[nn.Module],
    pairs: Pairs,
    optimiser: Optimizer,
    generator: torch.Generator,
    batch_size: int,
    at_once: int | None,
    noise: float,
    epoch: int,
) -> Evaluation:
    """One pass over the pairs."""
    orders = [torch.randperm(len(pairs), generator=generator) for _ in members]
    seen: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(pairs), batch_size):
        losses = []
        for member, order in zip(members, orders, strict=True):
            batch = pairs.select(order[start : start + batch_size].to(pairs.label.device))
            margin = margins(member, batch, at_once=at_once)
            losses.append(bradley_terry(margin, batch.label, noise).mean())
            seen.append((margin.detach().double(), batch.label))
        loss = torch.stack(losses).sum()
        _check_loss(float(loss.detach()), f"epoch {epoch}, pair {start} of {len(pairs)}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    margin, label = (torch.cat(parts) for parts in zip(*seen, strict=True))
    loss = bradley_terry(margin, label, noise).mean()
    return Evaluation(float(loss), float(accuracy(margin, label)))


def _check_loss(value: float, where: str) -> None:
    if not math.isfinite(value):
        raise NonFiniteResultError(
            f"the loss is {value}",
            where=where,
            fix="lower the learning rate, or look for NaN in the observations",
        )


class _Best:
    """The parameters of the pass with the smallest loss on the validation pairs."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.evaluation: Evaluation | None = None
        self._parameters: dict[str, Tensor] = {}
        self._waited = 0

    def is_over(self, found: Evaluation, reward: RewardModel) -> bool:
        if self.evaluation is None or found.loss < self.evaluation.loss:
            self.evaluation = found
            self._parameters = copy.deepcopy(reward.state_dict())
            self._waited = 0
        else:
            self._waited += 1
        return self._waited >= self.patience

    def restore(self, reward: RewardModel) -> None:
        if self.evaluation is not None:
            reward.load_state_dict(self._parameters)
