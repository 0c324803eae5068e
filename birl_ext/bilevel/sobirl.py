"""SoBiRL: a reward learned from preferences by the hyper-gradient (Yang, Gao and Yuan, 2025)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.target import snapshot
from birl_ext.bilevel.score import Follower, Score
from birl_ext.bilevel.trajectory import Baseline, trajectory_surrogate
from birl_ext.errors import OptionError
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.loss import accuracy, bradley_terry, margins
from birl_ext.preferences.reward_model import RewardModel

__all__ = ["DRLHF", "Outcome", "SoBiRL", "importance"]

Stale = Literal["weigh", "reject", "keep"]
_STALE = ("weigh", "reject", "keep")


class Outcome(NamedTuple):
    """One update of the reward.

    Args:
        loss: mean cross entropy of the pairs.
        accuracy: share of pairs, ties apart, whose order the reward explains; before the update.
        gradient_norm: ‖∇φ̂‖₂.
        indirect_share: ‖the score's part‖₂ / ‖∇φ̂‖₂: zero without a hyper-gradient.
        used: pairs that counted, after stale ones were rejected.
        effective: (Σw)²/Σw² of the importance weights.
    """

    loss: float
    accuracy: float
    gradient_norm: float
    indirect_share: float
    used: int
    effective: float


def importance(fragments: Fragments, log_prob: Tensor, *, stale: Stale, limit: float) -> Tensor:
    """w of fragments drawn from an earlier policy, (n,).

        log w = Σ_h log π_now(a_h|s_h) − log π_then(a_h|s_h)

    What the process did cancels; what the policy did before the fragment is left out.

    Args:
        fragments: with `log_prob` of the policy that acted.
        log_prob: (n, H), the same under the present policy.
        stale: "weigh": w cut to [1/limit, limit]; "reject": 1 inside that range and 0 outside;
            "keep": 1.
        limit: above 1.

    Source: Precup, Sutton and Singh (2000); the cut: Ionides (2008).
    """
    _check_stale(stale, limit)
    gap = torch.where(fragments.present, log_prob - fragments.log_prob, 0.0).sum(-1)
    most = math.log(limit)
    if stale == "weigh":
        return gap.clamp(-most, most).exp()
    if stale == "reject":
        return (gap.abs() <= most).to(gap.dtype)
    return torch.ones_like(gap)


def _check_stale(stale: str, limit: float) -> None:
    if stale not in _STALE:
        raise OptionError(f"stale is {stale!r}", allowed=", ".join(map(repr, _STALE)))
    if not limit > 1:
        raise OptionError(f"limit is {limit!r}", allowed="more than 1")


class SoBiRL:
    """The upper level: the reward that explains a teacher's answers about the behaviour it causes.

        φ(x) = E[ l(d₁, d₂, y; x) ],  l = −y log p − (1 − y) log(1 − p),  p = σ(R_x(d₁) − R_x(d₂)),
        d₁, d₂ ~ π*(x);   x ← x − β ∇φ̂, ∇φ̂ from (M16)

    Args:
        reward: its parameters are x. It stays in evaluation mode, so that the same state and action
            have one reward wherever they occur.
        optimiser: from parameters to any torch optimiser.
        score: estimator of the policy's derivative (`birl_ext.bilevel.score`).
        noise: share of answers taken to be random, [0, 1).
        baseline: of the losses, see `trajectory_surrogate`.
        stale: what to do with pairs from earlier policies, see `importance`.
        limit: of the importance weights.
        lead: the first steps of every fragment that are scored and weighed but not compared, see
            `birl_ext.preferences.fragments.draw`; what the policy did before them is left out.

    Source: Yang, Gao and Yuan (2025), Algorithm SoBiRL; (M16).
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        optimiser: Callable[[Iterable[nn.Parameter]], Optimizer],
        score: Score | None,
        noise: float = 0.0,
        baseline: Baseline = "others",
        stale: Stale = "weigh",
        limit: float = 5.0,
        lead: int = 0,
    ) -> None:
        if not 0 <= noise < 1:
            raise OptionError(f"noise is {noise!r}", allowed="[0, 1)")
        if lead < 0:
            raise OptionError(f"lead is {lead!r}", allowed="0 or more")
        _check_stale(stale, limit)
        self.reward = reward
        self.parameters = [p for p in reward.parameters() if p.requires_grad]
        self.optimiser = optimiser(self.parameters)
        self.score = score
        self.noise = noise
        self.baseline: Baseline = baseline
        self.stale: Stale = stale
        self.limit = limit
        self.lead = lead
        self.steps = 0

    def step(self, pairs: Pairs, follower: Any, *, temperature: float) -> Outcome:
        """One update from a batch of answered pairs.

        Args:
            pairs: n of them, answered without their lead; skipped answers are not among them.
            follower: the present policy, held fixed; `log_prob` is asked of it where `stale` is not
                "keep".
            temperature: its τ.
        """
        margin = margins(self.reward, pairs.after(self.lead))
        loss = bradley_terry(margin, pairs.label, self.noise)
        weight = self._weight(pairs, follower).to(loss)
        direct = (weight * loss).sum() / len(loss)
        indirect = torch.zeros_like(direct)
        if self.score is not None:
            indirect = self._indirect(pairs, follower, loss, weight, temperature)
        parts = [
            torch.autograd.grad(part, self.parameters, retain_graph=True, allow_unused=True)
            if part.requires_grad
            else [None] * len(self.parameters)
            for part in (direct, indirect)
        ]
        sizes = []
        for parameter, one, other in zip(self.parameters, *parts, strict=True):
            found = [part for part in (one, other) if part is not None]
            parameter.grad = sum(found[1:], found[0]) if found else None
        for part in ([p.grad for p in self.parameters], parts[1]):
            squares = [x.double().square().sum() for x in part if x is not None]
            sizes.append(float(torch.stack(squares).sum().sqrt()) if squares else 0.0)
        self.optimiser.step()
        self.steps += 1
        return Outcome(
            loss=float(loss.detach().mean()),
            accuracy=float(accuracy(margin, pairs.label)),
            gradient_norm=sizes[0],
            indirect_share=sizes[1] / sizes[0] if sizes[0] else 0.0,
            used=int((weight > 0).sum()),
            effective=float(weight.sum().square() / weight.square().sum().clamp(min=1e-12)),
        )

    def _indirect(
        self, pairs: Pairs, follower: Follower, loss: Tensor, weight: Tensor, temperature: float
    ) -> Tensor:
        """(1/n) Σ w (l − b) h/τ, whose gradient is the score's part."""
        assert self.score is not None
        scores = torch.zeros_like(loss)
        for part in (pairs.first, pairs.second):
            scores = scores + self.score(
                self.reward, follower, part.observation, part.action, part.present
            )
        return trajectory_surrogate(
            loss.detach(),
            scores,
            temperature=temperature,
            baseline=self.baseline,
            weight=weight,
        )

    def _weight(self, pairs: Pairs, follower: Any) -> Tensor:
        """w of each pair, (n,): the product of its fragments'."""
        weight = torch.ones_like(pairs.label)
        if self.stale == "keep":
            return weight
        for part in (pairs.first, pairs.second):
            with torch.no_grad():
                now = torch.zeros_like(part.log_prob)
                seen = part.present
                now[seen] = follower.log_prob(part.observation[seen], part.action[seen]).to(now)
            weight = weight * importance(part, now, stale=self.stale, limit=self.limit).to(weight)
        return weight

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "reward": snapshot(self.reward),
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reward.load_state_dict(state["reward"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.steps = int(state["steps"])


class DRLHF(SoBiRL):
    """Reward learning from preferences without the hyper-gradient: the cross entropy alone, every
    pair counted as it is (Christiano et al., 2017).

    Args:
        reward, optimiser, noise: as for `SoBiRL`.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        optimiser: Callable[[Iterable[nn.Parameter]], Optimizer],
        noise: float = 0.0,
    ) -> None:
        super().__init__(reward, optimiser=optimiser, score=None, noise=noise, stale="keep")
