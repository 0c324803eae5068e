"""SoBiRL: a reward learned from preferences by the hyper-gradient (Yang, Gao and Yuan, 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.agents.categorical import CategoricalPolicy
from birl_ext.bilevel.entropy_target import path_slopes
from birl_ext.bilevel.guards import check_count, check_kind, check_number
from birl_ext.bilevel.reward_update import RewardUpdate, norm
from birl_ext.bilevel.score import OneStep, Score
from birl_ext.bilevel.score_average import ScoreAverage
from birl_ext.bilevel.trajectory import Baseline, check_baseline, trajectory_surrogate
from birl_ext.errors import OptionError
from birl_ext.model import checks
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.loss import (
    Steps,
    accuracy,
    bradley_terry,
    in_parts,
    steps_at_once,
)
from birl_ext.preferences.reward_model import RewardEnsemble, RewardModel

__all__ = ["DRLHFUpdate", "SoBiRLOutcome", "SoBiRLUpdate", "importance"]

Stale = Literal["weigh", "reject", "keep"]
_STALE = ("weigh", "reject", "keep")


class SoBiRLOutcome(NamedTuple):
    """One update of the reward.

    Args:
        loss: mean cross entropy of the pairs.
        accuracy: share of pairs, ties apart, whose order the reward explains; before the update.
        gradient_norm: ‖∇φ̂‖₂.
        indirect_share: ‖the score's part‖₂ / ‖∇φ̂‖₂: zero without a hyper-gradient.
        kept: what the noise leaves of the score's part, [0, 1], see `ScoreAverage`.
        capped: 1 where `indirect_limit` has shortened what is left.
        used: pairs whose weight is not zero; the loss counts the others too without `weigh_loss`.
        effective: (Σw)²/Σw² of the importance weights.
    """

    loss: float
    accuracy: float
    gradient_norm: float
    indirect_share: float
    kept: float
    capped: float
    used: int
    effective: float


class _Evaluated(NamedTuple):
    """What the present reward and policy say about pairs.

    Args:
        margins: R₁ − R₂ without the leads, (n,), of each member of an ensemble (E, n).
        score: surrogate of the score of both fragments, (n,).
        log_prob: log π(a|s) of the steps of each side, (n, lead + H) both.
    """

    margins: Tensor
    score: Tensor | None
    log_prob: Sequence[Tensor] | None

    @property
    def margin(self) -> Tensor:
        """R₁ − R₂ of the reward itself, an ensemble's mean, (n,)."""
        return self.margins if self.margins.dim() == 1 else self.margins.mean(0)


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


def _sum(one: Tensor | None, other: Tensor | None, factor: float) -> Tensor | None:
    """one + factor · other, of those that are there."""
    if one is None or other is None:
        return one if other is None else factor * other
    return one + factor * other


def _check_stale(stale: str, limit: float) -> None:
    if stale not in _STALE:
        raise OptionError(f"stale is {stale!r}", allowed=", ".join(map(repr, _STALE)))
    check_number("limit", limit, 1.0, above=True, infinite=True)


class SoBiRLUpdate(RewardUpdate):
    """The upper level: the reward that explains a teacher's answers about the behaviour it causes.

        φ(x) = E[ l(d₁, d₂, y; x) ],  l = −y log p − (1 − y) log(1 − p),  p = σ(R_x(d₁) − R_x(d₂)),
        d₁, d₂ ~ π*(x);   x ← x − β ∇φ̂, ∇φ̂ from (M16)

    Args:
        reward: its parameters are x, those frozen in a step apart. The members of an ensemble each
            have a loss of their own: φ is the sum of these, and the policy that of the members'
            mean. It stays in evaluation mode, so that the same state and action have one reward
            wherever they occur.
        optimiser: from parameters to any torch optimiser.
        score: estimator of the policy's derivative (`birl_ext.bilevel.score`).
        noise: share of answers taken to be random, [0, 1).
        baseline: of the losses, see `trajectory_surrogate`.
        stale: what to do with pairs from earlier policies, see `importance`.
        limit: of the importance weights.
        weigh_loss: whether the weights hold for the loss itself too, as ∇φ asks. Without, the
            reward is fitted to all answers alike, and only the score's part is corrected: less
            noise, for a fit to behaviour that is not the present one's.
        average: β, [0, 1), of the average over updates that the score's part is, shrunk by its own
            noise (`birl_ext.bilevel.score_average`): the estimate of a few pairs is mostly noise
            once the loss is fitted. Zero takes the part of each update as it is.
        indirect_limit: the most that the norm of the score's part may be, in units of that of the
            loss's; what is longer is shortened. For pairs that are used again and again, whose
            error no average takes away. Infinite: no limit.
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
        weigh_loss: bool = True,
        average: float = 0.98,
        indirect_limit: float = math.inf,
        lead: int = 0,
    ) -> None:
        super().__init__(reward, optimiser=optimiser, score=score, average=average)
        _check_stale(stale, limit)
        check_baseline(baseline)
        self.noise = check_number("noise", noise, below=1.0)
        self.baseline: Baseline = baseline
        self.stale: Stale = stale
        self.limit = limit
        self.weigh_loss = weigh_loss
        self.indirect_limit = check_number("indirect_limit", indirect_limit, infinite=True)
        self.lead = check_count("lead", lead, 0)

    def step(
        self,
        pairs: Pairs,
        follower: Any,
        *,
        temperature: float,
        held: Tensor | None = None,
        pool: int | None = None,
        renewed: bool = False,
    ) -> SoBiRLOutcome:
        """One update from a batch of answered pairs.

        With `OneStep` of discrete actions and a `CategoricalPolicy`, reward and policy are each run
        once over all steps, for loss, score and weights together.

        Args:
            pairs: n of them, answered without their lead; skipped answers are not among them.
            follower: the present policy, held fixed; `log_prob` is asked of it where `stale` is not
                "keep".
            temperature: its τ, units of the reward held here.
            held: observations (m, *O) over which τ holds the follower's mean entropy at a target,
                such as a batch of its replay: dτ/dx is part of the gradient then (M21). None: τ is
                fixed. Discrete actions, and a score other than `Critic`.
            pool: how many pairs these are drawn from, without replacement, again and again: the
                error that updates share is not averaged away. None: all are new in every update.
            renewed: none of the pool were in that of the update before.

        Raises:
            OptionError: there is no pair, or no step after the lead; or no entropy can be held.
            TemperatureError: τ is not positive and finite.
            GradientError: neither loss nor score depends on a parameter that is not frozen.
            NonFiniteResultError: loss, gradient or the new parameters are NaN or infinite. After
                any error the parameters are what they were.
        """
        checks.check_temperature(temperature)
        check_kind("pairs", pairs, Pairs)
        if not len(pairs):
            raise OptionError("there are no pairs", allowed="1 or more")
        pairs.after(self.lead)  # refuses a lead that leaves nothing
        shared = 0.0 if pool is None else min(1.0, len(pairs) / check_count("pool", pool))
        renewed = renewed or pool is None
        return self._take(
            lambda: self._prepare(pairs, follower, temperature, held, shared, renewed)
        )

    def _prepare(
        self,
        pairs: Pairs,
        follower: Any,
        temperature: float,
        held: Tensor | None,
        shared: float,
        renewed: bool,
    ) -> tuple[float, SoBiRLOutcome, ScoreAverage]:
        """Set the gradient of each parameter at its present value; the average with this one."""
        found = self._evaluated(pairs, follower)
        margin = found.margin
        loss = own = bradley_terry(margin, pairs.label, self.noise)
        if found.margins is not margin:
            # by the mean's loss alone members would all move alike, and never come to disagree
            own = bradley_terry(found.margins, pairs.label, self.noise).sum(0)
        weight = self._weight(pairs, found.log_prob).to(loss)
        direct = ((weight if self.weigh_loss else 1.0) * own).sum() / len(loss)
        gradient = self._gradient("the loss", direct, retain_graph=found.score is not None)
        share, cut, average = 0.0, 1.0, self._average
        if found.score is not None:
            # (1/n) Σ w (l − b) h/τ, whose gradient is the score's part
            def weighed(score: Tensor) -> Tensor:
                return self._weighed(own, score, temperature, weight)

            of_tau = self._by_temperature(pairs, follower, temperature, held)
            average = self._averaged(weighed, found.score, of_tau, shared=shared, renewed=renewed)
            parts = self._parts(average.kept * average.mean)
            share = norm(parts)
            cut = min(1.0, self.indirect_limit * norm(gradient) / share) if share else 1.0
            share *= cut
            gradient = [_sum(one, other, cut) for one, other in zip(gradient, parts, strict=True)]
        value = float(loss.detach().mean())
        size = self._set(gradient, value, "loss")
        outcome = SoBiRLOutcome(
            loss=value,
            accuracy=float(accuracy(margin, pairs.label)),
            gradient_norm=size,
            indirect_share=share / size if size else 0.0,
            kept=average.kept if share else 0.0,
            capped=float(cut < 1.0),
            used=int((weight > 0).sum()),
            effective=float(weight.sum().square() / weight.square().sum().clamp(min=1e-12)),
        )
        return value, outcome, average

    def _weighed(self, loss: Tensor, score: Tensor, temperature: float, weight: Tensor) -> Tensor:
        return trajectory_surrogate(
            loss.detach(), score, temperature=temperature, baseline=self.baseline, weight=weight
        )

    def _by_temperature(
        self, pairs: Pairs, follower: Any, temperature: float, held: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """τ ∂/∂τ of the pairs' log-probabilities, (n,), and numbers whose mean has the gradient
        dτ/dx; None where τ is fixed.
        """
        discrete = not pairs.first.action.is_floating_point()
        moved = self._moved_temperature(follower, temperature, held, discrete=discrete)
        if moved is None:
            return None
        assert self.score is not None
        first, second = (
            path_slopes(self.score, follower, part.observation, part.action, part.present)
            for part in (pairs.first, pairs.second)
        )
        return first + second, moved

    def _evaluated(self, pairs: Pairs, follower: Any) -> _Evaluated:
        """Reward and policy at the steps of all pairs."""
        steps = Steps.of(pairs.first, pairs.second)
        at_once = steps_at_once(steps.observation)
        score = self.score
        if (
            isinstance(score, OneStep)
            and score.actions is not None
            and isinstance(follower, CategoricalPolicy)
            and not steps.action.is_floating_point()
        ):
            return self._tabulated(steps, follower, at_once)
        now = None
        if self.stale != "keep":
            with torch.no_grad():
                where, chosen = steps.observation, steps.action
                now = steps.tables(in_parts(follower.log_prob, where, chosen, at_once=at_once))
        reward = self.reward.each if isinstance(self.reward, RewardEnsemble) else self.reward
        found = in_parts(reward, steps.observation, steps.action, at_once=at_once)
        margins = self._margins(steps, found)
        if score is None:
            return _Evaluated(margins, None, now)
        first, second = (
            score(self.reward, follower, part.observation, part.action, part.present)
            for part in (pairs.first, pairs.second)
        )
        return _Evaluated(margins, first + second, now)

    def _tabulated(
        self, steps: Steps, follower: CategoricalPolicy, at_once: int | None
    ) -> _Evaluated:
        """`_evaluated` of `OneStep`: loss, score and weights all follow from r(s, ·) and π(·|s), so
        that each network is run once.
        """
        where, chosen = steps.observation, steps.action.unsqueeze(-1)
        with torch.no_grad():
            log_policy = in_parts(follower.log_probs, where, at_once=at_once, dim=0)
        if isinstance(self.reward, RewardEnsemble):
            tables = in_parts(self.reward.each_all_actions, where, at_once=at_once, dim=1)
            table = self.reward.combined(tables)
        else:
            tables = table = in_parts(self.reward.all_actions, where, at_once=at_once, dim=0)
        found = tables.gather(-1, chosen.expand(*tables.shape[:-1], 1)).squeeze(-1)
        margins = self._margins(steps, found)
        scores = steps.sums(OneStep.of_table(table, log_policy.exp(), steps.action))
        now = steps.tables(log_policy.gather(-1, chosen).squeeze(-1))
        return _Evaluated(margins, scores[0] + scores[1], now)

    def _margins(self, steps: Steps, reward: Tensor) -> Tensor:
        """R₁ − R₂ from the reward of every step, (*E, m), without the leads."""
        ours, theirs = (table[..., self.lead :].sum(-1) for table in steps.tables(reward))
        return ours - theirs

    def _weight(self, pairs: Pairs, now: Sequence[Tensor] | None) -> Tensor:
        """w of each pair, (n,): the product of its fragments'."""
        weight = torch.ones_like(pairs.label)
        if self.stale == "keep":
            return weight
        assert now is not None
        for part, log_prob in zip((pairs.first, pairs.second), now, strict=True):
            log_prob = log_prob.to(part.log_prob)
            weight = weight * importance(part, log_prob, stale=self.stale, limit=self.limit)
        return weight


class DRLHFUpdate(SoBiRLUpdate):
    """Reward learning from preferences without the hyper-gradient: the cross entropy alone, every
    pair counted as it is (Christiano et al., 2017).

    Args:
        reward, optimiser, noise, lead: as for `SoBiRLUpdate`.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        optimiser: Callable[[Iterable[nn.Parameter]], Optimizer],
        noise: float = 0.0,
        lead: int = 0,
    ) -> None:
        super().__init__(
            reward, optimiser=optimiser, score=None, noise=noise, stale="keep", lead=lead
        )
