"""One run of learning a reward from preferences."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from birl_ext.agents.agent import DiscreteAgent
from birl_ext.agents.best import Best
from birl_ext.agents.categorical import entropy
from birl_ext.agents.sac import SAC
from birl_ext.bilevel.additive import AdditiveOutcome, AdditiveUpdate, PlannedUpdate
from birl_ext.bilevel.mrn import MRNUpdate
from birl_ext.bilevel.score import Critic
from birl_ext.bilevel.sobirl import SoBiRLOutcome, SoBiRLUpdate
from birl_ext.environments.transitions import Transitions
from birl_ext.environments.vector import Environments, make_environments
from birl_ext.errors import ConfigError, MissingDependencyError, RenderError, warn
from birl_ext.modules import import_own
from birl_ext.preferences.answer_log import AnswerLog
from birl_ext.preferences.buffer import PreferenceBuffer
from birl_ext.preferences.fit import evaluate, fit
from birl_ext.preferences.fragments import Fragments, Pairs, draw
from birl_ext.preferences.reward_model import RewardEnsemble, RewardModel, spread
from birl_ext.preferences.teachers import (
    TEACHERS,
    AbsentTeacher,
    OwnTeacher,
    ScriptedTeacher,
    Teacher,
    absent,
    named_teacher,
)
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.preference.gridworld import GRIDWORLD, draw_worlds
from birl_ext.problems.preference.parts import (
    Generators,
    Source,
    VectorEnv,
    check_sizes,
    environment_source,
    is_own,
    make_agent,
    make_judge,
    make_learner,
    make_query,
    make_replay,
    make_reward,
    make_score,
    registered_threshold,
)
from birl_ext.problems.preference.recorder import Recorder
from birl_ext.rollouts.collect import Collector
from birl_ext.rollouts.evaluate import Evaluation, evaluate_agent
from birl_ext.rollouts.policy import Policy
from birl_ext.rollouts.video import film_writer, record_video
from birl_ext.runs.device import check_device
from birl_ext.state import Stateful

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PreferenceJob"]

_EVALUATION_SEED = 1_000_003  # added to the run's: episodes that are not those of training
_NORMALISED_OVER = 1000
"""Transitions that the scale of the reward is taken over."""
_HELD_OVER = 128
"""States of the replay at which the entropy, and what moves it, are looked at."""
_COOLED = 0.7
"""Share of the rounds in which a fixed τ falls to what it is at the end."""
_BEHAVIOUR = 256
"""Steps of the policy that an update by what it earns is made from."""
_AT_TARGET = 0.1
"""Of ln A: as near as the entropy must be to its target for τ to be what holds it there."""


class PreferenceJob(Stateful):
    """One run of SoBiRL, or of reward learning alone, in one environment.

    With a directory (`attach`) every answer is on the disk before it is used, and episodes are
    recorded as videos.

    Args:
        config: the settings.
        environment: in place of the id in them, which is its name in brackets then: a function that
            builds a `gymnasium.Env`, or a vector environment, whose episodes under way are cut off
            by every evaluation and by a resume.
        teacher: in place of the one that they name.
    """

    STATE = (
        "agent",
        "_collector",
        "_replay",
        "learner",
        "judging",
        "_worth",
        "teacher",
        "answers",
        "_log",
        "_recorder",
        "_features",
        "_draws",
        "_round",
        "_asked",
        "_return",
        "_phi",
        "_best",
        "_normal",
        "_labels_to_threshold",
        "_seconds",
    )

    def __init__(
        self,
        config: PreferenceConfig,
        *,
        environment: Source | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.config = config
        modules = {found.__name__: found for found in map(import_own, config.module)}
        if teacher is None and config.teacher not in TEACHERS and not is_own(config.teacher):
            teacher = named_teacher(config.teacher, modules)
        if teacher is not None and config.upper == "return":
            raise ConfigError(
                f"a teacher is given, {config.teacher}, with upper return, which asks nobody",
                allowed="no teacher of one's own",
                fix="leave it out, or take upper=critic or cross-entropy",
            )
        check_device(config.device)
        self.schedule = check_sizes(config)
        if config.video_every:
            film_writer()  # before the run, not when the first film is due
        self._own = environment
        registered = registered_threshold(config, environment)
        draws = Generators(config.seed)
        self._environments = self._make_environments(config.environments, config.seed)
        spaces = self._environments.spaces
        self.agent = make_agent(config, spaces, draws)
        self.policy = Policy(self.agent, spaces, seed=config.seed)
        self._collector = Collector(
            self._environments, self.agent, seed=config.seed, random_steps=config.random_steps
        )
        self._replay = make_replay(config)
        self._best = Best(self.agent)
        self.reward = make_reward(config, spaces, draws)
        self.teacher = _teacher(config, teacher, draws.next())
        self._sampling = draws.next()  # of minibatches and questions
        # The score last: what is drawn for it must not change what every algorithm has.
        score, features = None, None
        if config.algorithm in ("sobirl", "stoc-sobirl"):
            score, features = make_score(config, spaces, self.reward, draws, environment)
        self._score, self._features = score, features
        self._holding = draws.next()
        self.learner = make_learner(config, self.reward, score, environment)
        self.judging, self._worth = make_judge(config, spaces, draws)
        self.answers = PreferenceBuffer(config.pairs, config.device)
        self._query = make_query(config, self._answering)
        self._recorder = Recorder(config.environments, keep=config.recent)
        self._draws = draws
        self._round = 0
        self._asked = 0
        self._answered = 0  # of this round's questions
        self._return = self._phi = math.nan
        self._normal = {"shift": 0.0, "scale": 1.0}  # of the reward, as the agent is given it
        self._threshold = registered if config.threshold is None else config.threshold
        self._labels_to_threshold: int | None = None
        self._seconds = dict.fromkeys(("environment", "update", "reward"), 0.0)
        self._log: AnswerLog | None = None
        self._videos: Path | None = None
        first = config.questions[1] + self.schedule.counts[0]
        if self._skips and first and self._shared is None:
            self._play_first_round()

    def check_new(self) -> None:
        """Refuse a run from the start that nobody would answer.

        Raises:
            TeacherError: the teacher is the name that files have for one given as an object.
        """
        if isinstance(self.teacher, AbsentTeacher) and self.config.questions[0]:
            fix = "name a teacher, your own by --module FILE.py --teacher FILE:NAME"
            raise absent(self.config.teacher, fix)

    def attach(self, path: Path) -> None:
        """Keep answers and videos there; a log of the same run is checked and continued.

        Warns:
            UserWarning: settings that have no effect, or with which nothing can be learned.
        """
        config = self.config
        if idle := config.idle():
            named = ", ".join(f"{name} {value}" for name, value in idle.items())
            warn(f"{named}: not used with algorithm {config.algorithm}, upper {config.upper}")
        for words in config.unlearned():
            warn(f"{config.env}: {words}")
        self._log = AnswerLog(path / "answers.sqlite")
        self._log.rewind()
        self._videos = path / "videos"

    def detach(self) -> None:
        """Close the log and the environments; there are no more steps after that."""
        if self._log is not None:
            self._log.close()
        if self._shared is None:
            self._environments.close()
        else:
            self._environments.let_go()
        self._log, self._videos = None, None

    @property
    def total_steps(self) -> int:
        return self.config.rounds

    @property
    def round(self) -> int:
        """How many have been taken."""
        return self._round

    @property
    def done(self) -> bool:
        return self._round >= self.config.rounds

    def step(self) -> dict[str, float]:
        """One round: act, let the agent learn, ask, let the reward learn, and at times evaluate."""
        spent = dict.fromkeys(self._seconds, 0.0)
        self._cool()
        episodes, learned = self._live(spent)
        with _clock(spent, "reward"):
            count = self.schedule.counts[self._round]
            if self._round == 0:
                count += self.config.questions[1]
            judged = self._ask(count)
            if self._round == 0:
                self._first_fit()
            fitted = self._learn_reward()
            phi = judged.pop("phi")
            if self._judges:
                phi = self._phi = self._cost_of_behaviour()
            self._normalise()
        self._round += 1
        evaluated = self.done or self._round % self.config.evaluate_every == 0
        if evaluated:
            self._return = self.evaluate().mean
            self._best.offer(self._return)
            if self._labels_to_threshold is None and self._passed(self._return):
                self._labels_to_threshold = self._asked
        if self.done and self.config.keep_best:
            self._best.restore()
        if self.config.video_every and self._round % self.config.video_every == 0:
            self._record_video()
        total = sum(spent.values())
        for name, seconds in spent.items():
            self._seconds[name] += seconds
        return {
            "phi": phi,
            **({"true_return": self._return} if evaluated else {}),
            "training_return": fmean([e.reward for e in episodes]) if episodes else math.nan,
            "episodes": float(len(episodes)),
            "labels": float(self._asked),
            "environment_steps": float(self._collector.transitions),
            "environment_steps_per_second": self.config.environment_steps / total,
            "updates_per_second": learned.pop("updates") / total,
            **{f"share_{name}": seconds / total for name, seconds in spent.items()},
            **learned,
            **judged,
            **fitted,
        }

    def evaluate(self) -> Evaluation:
        """Episodes of the present policy on the true reward, in environments of their own."""
        config = self.config
        if self._shared is not None:
            own = self._make_environments(config.environments, config.seed + _EVALUATION_SEED)
            found = evaluate_agent(self.agent, own, episodes=config.evaluation_episodes)
            self._collector.load_state_dict(self._collector.state_dict())  # begins new episodes
            self._recorder.cut_off()
            return found
        count = min(config.environments, config.evaluation_episodes)
        with self._make_environments(count, config.seed + _EVALUATION_SEED) as own:
            return evaluate_agent(self.agent, own, episodes=config.evaluation_episodes)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which stays as it is."""
        super().load_state_dict(state)
        if not self._environments.repeatable:  # new episodes have begun
            self._recorder.cut_off()

    @property
    def _shared(self) -> VectorEnv[Any, Any, Any] | None:
        """The one vector environment for acting and evaluation, where it was given."""
        return self._own if isinstance(self._own, VectorEnv) else None

    def _make_environments(self, count: int, seed: int) -> Environments:
        config = self.config
        if self._shared is not None:
            return Environments(self._shared, name=config.env, seed=seed, timeout=config.timeout)
        source, options = environment_source(config, self._own)
        return make_environments(
            source,
            count=count,
            seed=seed,
            options=options,
            parallel=self.config.parallel,
            timeout=self.config.timeout,
            modules=self.config.module,
        )

    def _play_first_round(self) -> None:
        """In advance, for the mean reward that the teacher will see in it.

        Raises:
            ConfigError: it cannot answer by that.
        """
        config = self.config
        seen = Recorder(config.environments, keep=config.recent)
        with self._make_environments(config.environments, config.seed) as own:
            source = Collector(own, self.agent, seed=config.seed, random_steps=config.random_steps)
            for _ in range(config.environment_steps // config.environments):
                seen.record(source.collect(1))
        self._mean_reward(seen)

    def _mean_reward(self, seen: Recorder) -> float:
        """True reward per step, where the teacher can answer by it."""
        mean = seen.mean_reward(sign_only=self.config.sign_only)
        if mean < 0 and self._skips:
            raise ConfigError(
                f"teacher is {self.config.teacher}, and the mean true reward per step {mean:.4g}",
                where=self.config.env,
                allowed="0 or more: below it no share of the mean tells poor fragments from good",
                fix="choose another teacher, on the command line --teacher",
            )
        return mean

    @property
    def _skips(self) -> bool:
        return isinstance(self.teacher, ScriptedTeacher) and self.teacher.rule.skip_share > 0

    def _passed(self, found: float) -> bool:
        return self._threshold is not None and found >= self._threshold

    def _record_video(self) -> None:
        if self._videos is None:
            return
        self._videos.mkdir(exist_ok=True)
        path = self._videos / f"round-{self._round:05d}.mp4"
        seed = self.config.seed + _EVALUATION_SEED
        source, options = environment_source(self.config, self._own)
        try:
            record_video(self.agent, source, path, seed=seed, options=options)
        except (RenderError, MissingDependencyError) as error:  # the run itself is well
            warn(str(error))

    def _cool(self) -> None:
        """Set a fixed τ to what this round has."""
        config = self.config
        if config.entropy_target:
            return
        left = max(0.0, 1 - self._round / (_COOLED * config.rounds))
        self.agent.temperature = config.temperature * config.cool_from**left

    def _live(self, spent: dict[str, float]) -> tuple[list[Any], dict[str, float]]:
        """The environment steps of a round, with an update of the agent now and then."""
        config = self.config
        episodes: list[Any] = []
        sums: Counter[str] = Counter()
        updates = 0
        if config.algorithm == "stoc-sobirl":  # of the present policy's own steps alone
            self._recorder.forget()
        elif self._judges:  # of its episodes, whole: it is their beginning that counts most
            self._recorder.forget_finished()
        for _ in range(config.environment_steps // config.environments):
            with _clock(spent, "environment"):
                found = self._collector.collect(1)
                self._replay.record(found)
                self._recorder.record(found)
            episodes += found.episodes
            if self._round == 0:  # there is no reward to learn from yet
                continue
            with _clock(spent, "update"):
                due = config.updates_due(self._collector.transitions)
                while self.agent.version < due:
                    sums.update(self._update())
                    updates += 1
        means = {name: value / updates for name, value in sums.items()}
        return episodes, means | {"updates": float(updates)}

    def _update(self) -> dict[str, float]:
        size, steps = self.config.batch_size, self.config.n_step
        present: Tensor | None = None
        if steps == 1:
            batch = self._replay.sample(size, self._sampling)
        else:
            batch, present = self._replay.ahead(size, steps, self._sampling)
        reward = self._paid(batch)
        first = Transitions(*(part[:size] for part in batch))
        if self._features is not None:
            self._features.update(first, cast(DiscreteAgent, self.agent))
        if self._worth is not None:
            judged = self._judged(first.observation, first.action, first.reward)
            self._worth.update(first, judged, cast(DiscreteAgent, self.agent))
        return self.agent.update(batch, reward, present)

    @torch.no_grad()
    def _paid(self, batch: Transitions) -> Tensor:
        """The learned reward as the agent is given it, (n,)."""
        reward: Tensor = self.reward(batch.observation, batch.action)
        return (reward - self._normal["shift"]) / self._normal["scale"]

    def _cost_of_behaviour(self) -> float:
        """φ of an upper level that judges behaviour, over the episodes that the round has seen."""
        config = self.config
        whole, weight = self._recorder.discounted(config.discount)
        where, chosen, true = (part.to(config.device) for part in whole[:3])
        earned = self._judged(where, chosen, true).cpu().double()
        return -(1 - config.discount) * float(weight @ earned)

    @torch.no_grad()
    def _judged(self, observation: Tensor, action: Tensor, true: Tensor) -> Tensor:
        """The upper level's own reward of steps, (m,)."""
        return true if self.judging is None else self._answering(observation, action)

    @torch.no_grad()
    def _normalise(self) -> None:
        """Take the scale of the reward of this moment, over transitions of the replay."""
        config = self.config
        if config.normalise == "no" and not config.normalise_members:
            return
        batch = self._replay.sample(_NORMALISED_OVER, self._sampling)
        if config.normalise_members:
            cast(RewardEnsemble, self.reward).normalise(batch.observation, batch.action)
        if config.normalise != "no":
            reward = self.reward(batch.observation, batch.action)
            self._normal["scale"] = float(spread(reward))
            self._normal["shift"] = float(reward.mean()) if config.normalise == "standard" else 0.0

    def _ask(self, count: int) -> dict[str, float]:
        """Put questions to the teacher and keep the answers.

        Returns:
            How well the reward that is fitted to answers foretold them, and how many there were;
            `phi` estimates the φ of an upper level that is their cross entropy without bias where
            the fragments are the present policy's and the query is uniform.
        """
        config, device = self.config, self.config.device
        self._answered = 0
        if not count:
            return self._told()
        episodes = self._recorder.episodes()
        many = count if config.query == "uniform" else count * config.candidates
        first, second = (
            draw(episodes, config.fragment, many, self._sampling, lead=config.lead).to(device)
            for _ in range(2)
        )
        chosen = self._query(
            first.after(config.lead), second.after(config.lead), count, self._sampling
        )
        first, second = first.select(chosen), second.select(chosen)
        if isinstance(self.teacher, ScriptedTeacher):
            self.teacher.observe(self._mean_reward(self._recorder))
        seen = first.after(config.lead), second.after(config.lead)
        label = self._answers(*seen)
        asked = Pairs(*seen, label)
        if self._log is not None:
            self._log.record(asked)
        self._asked += count
        self._answered = self.answers.append(first, second, label)
        if self._round and not self.answers.strict:  # in the first round the first fit says so
            warn(
                f"{config.env}: the {config.teacher} teacher has not found any fragment better "
                "than another yet: all answers are ties or withheld, and carry nothing. Longer "
                "fragments (--fragment) may differ",
            )
        known = asked.select(~label.isnan())
        if not len(known) or not self._round:  # in the first round there is no reward yet
            return self._told()
        found = evaluate(self._answering, known, noise=config.noise)
        self._phi = found.loss
        return self._told(found.loss, found.accuracy)

    def _answers(self, first: Fragments, second: Fragments) -> Tensor:
        """Labels (n,): what the log has, of a run that has been here before, and the teacher's for
        the rest.

        A rule draws its numbers again, and a teacher that remembers is asked again for its memory:
        its first answers hold.
        """
        teacher = self.teacher
        if self._log is None or not isinstance(teacher, OwnTeacher):
            return teacher(first, second)
        known = self._log.answered(first, second).to(first.reward.device)
        count, total = len(known), len(first)
        if teacher.remembers:
            label = teacher(first, second)
            if others := int((~label[:count].isclose(known, equal_nan=True)).sum()):
                warn(
                    f"the teacher {teacher.name} answered {others} of {count} questions otherwise "
                    "than the first time; its first answers hold"
                )
            return torch.cat([known, label[count:]])
        if count == total:
            return known
        rest = torch.arange(count, total, device=known.device)
        return torch.cat([known, teacher(first.select(rest), second.select(rest))])

    def _told(self, phi: float = math.nan, foretold: float = math.nan) -> dict[str, float]:
        return {
            "phi": phi,
            "answers": float(self.answers.added),
            "strict_answers": float(self.answers.strict),  # of those kept, without ties
            "foretold": foretold,
        }

    def _first_fit(self) -> None:
        if not (len(self.answers) and self.config.initial_epochs):
            return
        answers = self.answers.everything().after(self.config.lead)
        for learner in filter(None, (self.learner, self.judging)):
            fit(
                learner.reward,
                answers,
                learner.optimiser,
                self._sampling,
                epochs=self.config.initial_epochs,
                batch_size=self.config.pair_batch,
                noise=self.config.noise,
            )

    def _learn_reward(self) -> dict[str, float]:
        late = self._collector.transitions >= self.config.hypergradient_after
        self.learner.score = self._score if late else None
        if isinstance(self.learner, SoBiRLUpdate):
            return self._learn_from_answers(self.learner)
        found = {} if self.judging is None else self._learn_from_answers(self.judging)
        # in the first round there is no policy of the reward's own yet
        return found | (self._learn_from_behaviour(self.learner) if self._round and late else {})

    def _learn_from_answers(self, learner: SoBiRLUpdate) -> dict[str, float]:
        config = self.config
        pool = len(self.answers)
        if not config.reuse:
            pool = min(pool, self._answered)
        size = min(config.pair_batch, pool)
        if not size or not config.reward_steps:
            return {}
        oldest = len(self.answers) - pool
        holds = self._holds_entropy()
        outcomes = []
        for number in range(config.reward_steps):
            index = oldest + torch.randperm(pool, generator=self._sampling)[:size]
            pairs = self.answers.select(index)
            outcomes.append(
                learner.step(
                    pairs,
                    self.agent,
                    temperature=self._temperature,
                    held=self._held() if holds else None,
                    pool=pool,
                    renewed=not (config.reuse or number),
                )
            )
            if isinstance(learner, MRNUpdate) and self._round:
                batch = self._replay.sample(config.batch_size, self._holding)
                paid, scale = self._paid(batch), self._normal["scale"]
                learner.through_critic(pairs, self.agent, batch, paid, scale=scale)
        last = SoBiRLOutcome(*(fmean(column) for column in zip(*outcomes, strict=True)))  # type: ignore[arg-type]
        known = [found.accuracy for found in outcomes if not math.isnan(found.accuracy)]
        return {
            "cross_entropy": last.loss,
            # of the batches that are not ties alone
            "reward_accuracy": fmean(known) if known else math.nan,
            "gradient_norm": last.gradient_norm,
            "indirect_share": last.indirect_share,
            "kept": last.kept,
            "capped": last.capped,
            "holds_entropy": float(holds),
            "effective_pairs": last.effective,
        }

    def _learn_from_behaviour(self, learner: AdditiveUpdate | PlannedUpdate) -> dict[str, float]:
        agent = cast(DiscreteAgent, self.agent)
        holds, outcomes = self._holds_entropy(), []
        for _ in range(self.config.reward_steps):
            if isinstance(learner, PlannedUpdate):
                outcomes.append(learner.step(self._worths(learner), temperature=self._temperature))
                continue
            assert self._worth is not None
            where = self._behaviour(_BEHAVIOUR)[0]
            outcomes.append(
                learner.step(
                    where,
                    self._worth.advantage(where, agent),
                    agent,
                    temperature=self._temperature,
                    held=self._held() if holds else None,
                )
            )
        if not outcomes:
            return {}
        last = AdditiveOutcome(*(fmean(column) for column in zip(*outcomes, strict=True)))
        return {"gradient_norm": last.gradient_norm, "kept": last.kept}

    @torch.no_grad()
    def _worths(self, learner: PlannedUpdate) -> Tensor:
        """The upper level's own reward of every state and action, (S, A)."""
        table = learner.process.reward
        if self.judging is None:
            return table
        return self._answering.all_actions(torch.arange(len(table)))

    def _behaviour(self, count: int) -> Sequence[Tensor]:
        """Observations, actions and true rewards of the policy, as a discounted sum counts them."""
        drawn = self._recorder.steps(count, self.config.discount, self._holding)
        return [part.to(self.config.device) for part in drawn]

    @property
    def _judges(self) -> bool:
        """Whether the upper level is about behaviour, by a reward of its own."""
        return self.config.upper != "cross-entropy"

    @property
    def _answering(self) -> RewardModel:
        """The reward that is fitted to the answers."""
        return self.reward if self.judging is None else self.judging.reward

    @property
    def _temperature(self) -> float:
        """τ, in units of the reward itself."""
        return self.agent.temperature * self._normal["scale"]

    def _held(self) -> Tensor:
        return self._replay.sample(_HELD_OVER, self._holding).observation

    def _holds_entropy(self) -> bool:
        """Whether dτ/dx is part of the gradient: τ follows a target, and has reached it."""
        agent, score = self.agent, self.learner.score
        if score is None or isinstance(score, Critic) or agent.entropy_target is None:
            return False
        if isinstance(agent, SAC):  # continuous actions
            return False
        with torch.no_grad():
            log_policy = agent.log_probs(self._held())
        apart = abs(float(entropy(log_policy).mean()) - agent.entropy_target)
        return apart <= _AT_TARGET * math.log(log_policy.shape[-1])

    def summary(self) -> dict[str, Any]:
        total = sum(self._seconds.values()) or math.nan
        return {
            "true_return": self._best.value if self.config.keep_best else self._return,
            "best_return": self._best.value,
            "last_return": self._return,
            "phi": self._phi,
            "labels": self._asked,
            "labels_to_threshold": self._labels_to_threshold,
            "strict_answers": self.answers.strict,
            "environment_steps": self._collector.transitions,
            **{f"share_{name}": s / total for name, s in self._seconds.items()},
        }

    def figures(
        self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]
    ) -> dict[str, Callable[[], Figure]]:
        title = f"{self.config.env}, {self.config.algorithm}, {self.config.teacher} teacher"

        def learning() -> Figure:
            from birl_ext.runs import plots

            curves = {"training_return": "training episodes", "true_return": "evaluation"}
            known = {} if self._threshold is None else {"threshold": self._threshold}
            return plots.learning_curve(
                history, curves, title=title, ylabel="true return", references=known
            )

        def upper() -> Figure:
            from birl_ext.runs import plots

            if self._judges:
                name = "φ: cost per step by the upper level's own reward"
                return plots.learning_curve(history, {"phi": name}, title=title)
            curves = {
                "phi": "φ: of new answers, before it learned from them",
                "cross_entropy": "of answers it learns from",
            }
            return plots.learning_curve(
                history,
                curves,
                title=title,
                ylabel="cross entropy, nats",
                references={"coin": math.log(2)},
            )

        def reward() -> Figure:
            from birl_ext.runs import plots

            curves = {
                "reward_accuracy": "of answers it learns from",
                "foretold": "of answers it has not seen yet",
            }
            return plots.learning_curve(
                history,
                curves,
                title=title,
                ylabel="accuracy of the reward",
                references={"chance": 0.5},
            )

        def worlds() -> Figure:
            count = self._environments.spaces.observations
            assert count is not None
            every = torch.arange(count, device=self.config.device)
            with torch.no_grad():
                policy = cast(DiscreteAgent, self.agent).probabilities(every).cpu()
                return draw_worlds(self.reward.all_actions(every).cpu(), policy, title=title)

        drawn = {"true_return": learning, "phi": upper}
        if self.config.upper != "return":  # there nobody answers
            drawn["reward_accuracy"] = reward
        return drawn | ({"learned_reward": worlds} if self.config.env == GRIDWORLD else {})


def _teacher(
    config: PreferenceConfig, own: Teacher | None, generator: torch.Generator
) -> ScriptedTeacher | OwnTeacher | AbsentTeacher:
    if own is None and is_own(config.teacher):
        return AbsentTeacher(config.teacher)
    if own is None:
        rule = dataclasses.replace(TEACHERS[config.teacher], sign_only=config.sign_only)
        return ScriptedTeacher(rule, generator)
    return own if isinstance(own, ScriptedTeacher) else OwnTeacher(own)


@contextmanager
def _clock(spent: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - start
