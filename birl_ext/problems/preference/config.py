"""Settings of a preference run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from birl_ext.errors import ConfigError
from birl_ext.modules import locate
from birl_ext.runs.settings import check_settings

__all__ = ["PreferenceConfig"]

SCRIPTED = ("oracle", "mistake", "noisy", "skip", "myopic", "equal")


@dataclass(frozen=True)
class PreferenceConfig:
    """Learn a reward from a teacher's preferences, and the policy that maximises it."""

    PLACES: ClassVar[tuple[str, ...]] = ("module",)

    env: str = "CartPole-v1"
    """Gymnasium id with its version: discrete or continuous actions; ALE/… is seen as 84 × 84 grey
    frames."""
    module: tuple[str, ...] = ()
    """Your own code, the path of a file or the name of a module, imported first: it may register
    environments and teachers. Kept by its absolute path; a run whose files have moved is resumed
    with the new one."""
    algorithm: Literal["sobirl", "stoc-sobirl", "drlhf", "mrn"] = "sobirl"
    """stoc-sobirl takes the whole gradient, from each round's own pairs; drlhf leaves the
    hyper-gradient out; mrn updates the reward through one step of the agent's critics besides."""
    upper: Literal["cross-entropy", "critic", "return"] = "cross-entropy"
    """What the reward is learned for: to explain the answers about the behaviour it causes, the
    paper's; for behaviour that a second, flexible reward fitted to the same answers judges well;
    for that which earns most of the environment's own reward: nobody is asked then."""
    reward_features: int = 0
    """Knobs of the reward: weights of as many fixed random features, where observations are
    indices; 0 for the usual network or table."""
    reuse: bool | None = None
    """Learn from all pairs kept, or from those of the newest round only; by default yes, of
    stoc-sobirl no."""
    score: Literal["one-step", "full-horizon", "critic", "exact"] | None = None
    """Estimator of the policy's derivative, by default one-step, of stoc-sobirl full-horizon, which
    needs an environment that can be started from any observation; exact, with upper critic or
    return, differentiates through the planner of a known MDP."""
    horizon: int = 20
    """Steps of a continuation, of full-horizon."""
    lead: int = 0
    """Steps before each fragment that are scored with it, since the policy chose them too."""
    average: float = 0.98
    """Of the score's part over updates, which its noise then shrinks; 0 takes each as it is."""
    indirect_limit: float | None = None
    """Most of what noise leaves of the score's part of the gradient, in units of the loss's part;
    inf for all of it. By default 0.3, of stoc-sobirl inf."""
    weigh_loss: bool | None = None
    """Weigh the loss too, not its score alone; by default no, of stoc-sobirl yes."""
    hypergradient_after: int = 0
    """Environment steps before the hyper-gradient counts."""

    teacher: str = "noisy"
    """oracle, mistake, noisy, skip, myopic, equal; your own by MODULE:NAME of code that --module
    names, or by the name it was registered with."""
    sign_only: bool = False
    """The teacher looks at the sign of each true reward only, as is usual on Atari."""
    labels: int = 300
    """Answers asked for in all."""
    initial_labels: int = 60
    """Of them, before the agent learns."""
    schedule: Literal["constant", "hyperbolic", "inverse-linear"] = "hyperbolic"
    """How the other labels are spread over the rounds."""
    fragment: int = 25
    """Steps of a fragment."""
    recent: int = 4000
    """Newest environment steps that fragments are cut from, in whole episodes; of stoc-sobirl none
    before the round, with another upper level than cross-entropy no episode that ended before it.
    """
    query: Literal["uniform", "disagreement", "entropy"] = "uniform"
    """Which of the candidates are asked; disagreement needs members."""
    candidates: int = 10
    """Candidate pairs per question, unless the query is uniform."""
    pairs: int = 1000
    """Pairs kept, first in first out."""
    noise: float = 0.0
    """Share of answers taken to be random."""

    rounds: int = 30
    """Outer steps."""
    environment_steps: int = 1000
    """Of an outer step, all environments together."""
    environments: int = 4
    episode_steps: int | None = None
    """Steps after which an episode is cut off; by default as the environment has it. One without a
    time limit needs this."""
    parallel: bool = False
    """Each environment in a process of its own."""
    timeout: float = 60.0
    """Seconds that a parallel environment may take for a step."""

    discount: float = 0.99
    temperature: float = 1.0
    """τ in units of the reward that the agent is given, see normalise: where entropy_target is on,
    of the start."""
    cool_from: float = 1.0
    """A fixed τ starts at that many times temperature and falls to it, by equal factors, within 7
    in 10 rounds."""
    entropy_target: bool = True
    """τ follows a target for the policy's entropy, entropy_share of ln A nats, of d continuous
    actions −d; otherwise it stays."""
    entropy_share: float = 0.5
    """Of ln A, the entropy of A equally likely actions."""
    follower: Literal["auto", "soft-q", "sac"] = "auto"
    """What learns the policy: soft Q-learning by one network, of discrete actions, or soft
    actor-critic; auto takes the first where it can."""
    update_every: int = 2
    """Environment steps per update of the agent, in the mean."""
    burst: int = 128
    """Updates made at once, after burst · update_every environment steps."""
    n_step: int = 1
    """Steps of the learned reward that a target sums before it takes the critic's word; more than 1
    take the actions between as the present policy's."""
    normalise: Literal["no", "scale", "standard"] = "no"
    """Of the reward that the agent is given: scale divides it by its standard deviation over the
    replay, of every round; standard takes its mean off too, which changes what is best where
    episodes may terminate. temperature is in units of what results; that x moves these units too
    is not in the hyper-gradient."""
    learning_starts: int | None = None
    """Environment steps of random actions at the start, by default those of the first round. The
    agent learns after them, and after the first round, when there is a reward."""
    batch_size: int = 64
    replay: int = 50_000
    """Transitions kept."""
    learning_rate: float = 2.3e-3
    """Of the agent, at the start."""
    anneal: bool = True
    """The agent's learning rate falls linearly to 0 at the last update of the run."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the agent's hidden layers; of pixels, its convolutions have their own."""
    target_rate: float = 0.03
    """Share of the critics that their copies take over when they move."""
    target_period: int = 1
    """Updates from one move of the copies to the next."""

    members: int = 1
    """Rewards in the ensemble."""
    normalise_members: bool = False
    """Each is divided by its own standard deviation over the replay, of every round, before the
    mean is taken."""
    initial_epochs: int = 100
    """Passes over the first answers, before the agent learns."""
    reward_steps: int = 20
    """Updates of the reward per outer step."""
    pair_batch: int = 64
    reward_rate: float = 3e-4
    """Learning rate of the reward."""
    stale: Literal["weigh", "reject", "keep"] = "weigh"
    """Pairs of earlier policies: weighed by importance, rejected, or kept as they are; in the
    score's part only, unless weigh_loss."""
    limit: float = 5.0
    """Of the importance weights."""

    evaluation_episodes: int = 10
    evaluate_every: int = 5
    """Outer steps between evaluations."""
    keep_best: bool = True
    """A finished run hands out the policy of its best evaluation, by true return, not its last."""
    threshold: float | None = None
    """True return that counts as learned; by default the one registered with the environment."""
    video_every: int = 0
    """Outer steps between videos of an evaluation episode; 0 records none."""
    device: str = "cpu"
    """Where networks learn: cpu, cuda, cuda:1, …"""
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", tuple(map(locate, self.module)))  # found from anywhere
        self._settle()
        check_settings(
            self,
            least=_LEAST | {"cool_from": 1, "temperature": 1e-12},  # by which float32 can divide
            above=dict.fromkeys(("learning_rate", "reward_rate", "timeout", "target_rate"), 0)
            | {"entropy_share": 0, "limit": 1},
            most={"target_rate": 1},
            below={"average": 1, "discount": 1, "entropy_share": 1, "noise": 1},
            infinite=("indirect_limit", "limit", "threshold"),
        )
        for name in ("environment_steps", "learning_starts"):
            value = getattr(self, name)
            if value is not None and value % self.environments:
                raise ConfigError(
                    f"{name} is {value}",
                    allowed=f"a multiple of environments, {self.environments}",
                )
        for name, kept in (("fragment", "recent"), ("lead", "recent"), ("n_step", "replay")):
            if getattr(self, name) > getattr(self, kept):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}",
                    allowed=f"up to {kept}, {getattr(self, kept)}: no more steps are kept",
                )
        asked, first = self.questions
        if asked < first:
            raise ConfigError(
                f"labels is {asked}",
                allowed=f"initial_labels, {first}, or more: they are part of them",
            )
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"hidden is {self.hidden}", allowed="widths of 1 or more")
        if self.sign_only and self.teacher not in SCRIPTED:
            raise ConfigError(
                f"sign_only is True, with teacher {self.teacher}",
                allowed=f"with {', '.join(SCRIPTED)}, which answer by the true reward",
                fix="leave sign_only out",
            )
        if self.query == "disagreement" and self.members < 2:
            raise ConfigError(
                f"members is {self.members}",
                allowed="2 or more, with query=disagreement",
                fix="set members to 3",
            )
        if self.normalise_members and self.members < 2:
            raise ConfigError(
                f"members is {self.members}",
                allowed="2 or more, with normalise_members",
                fix="set members to 3, or take normalise=scale",
            )
        if self.cool_from != 1.0 and self.entropy_target:
            raise ConfigError(
                f"cool_from is {self.cool_from}, and entropy_target is on",
                allowed="1, where τ follows the entropy",
                fix="set entropy_target to false",
            )
        if self.score == "exact" and self.upper == "cross-entropy":
            raise ConfigError(
                "score is exact, with upper cross-entropy",
                allowed="with upper=critic or upper=return",
                fix="use score=full-horizon",
            )
        if self.score == "exact" and self.entropy_target:
            raise ConfigError(
                "score is exact, and entropy_target is on",
                allowed="a fixed τ: what τ itself does is not in that gradient",
                fix="set entropy_target to false",
            )
        if self.score == "exact" and self.normalise != "no":
            raise ConfigError(
                f"score is exact, and normalise {self.normalise}",
                allowed="no: τ would move with the reward's spread, which is not in that gradient",
                fix="leave normalise out, and choose temperature in the reward's own units",
            )
        if self.upper != "cross-entropy" and (self.algorithm != "sobirl" or self.members > 1):
            raise ConfigError(
                f"upper is {self.upper}, algorithm {self.algorithm}, members {self.members}",
                allowed="algorithm=sobirl and one member",
                fix="leave them out, or take upper=cross-entropy",
            )

    def _settle(self) -> None:
        """What is left to the algorithm, as it has it; what contradicts it is refused."""
        settled = _STOCHASTIC if self.algorithm == "stoc-sobirl" else _USUAL
        for name, value in settled.items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, value)
            elif settled is _STOCHASTIC and given != value:
                raise ConfigError(
                    f"{name} is {given}, with algorithm stoc-sobirl",
                    allowed=f"{value}: it descends φ by the whole gradient, from the pairs of "
                    "the present policy alone",
                    fix=f"leave {name} out, or take algorithm=sobirl",
                )

    @property
    def random_steps(self) -> int:
        """Environment steps of random actions at the start."""
        return self.environment_steps if self.learning_starts is None else self.learning_starts

    @property
    def silent_steps(self) -> int:
        """Environment steps before the agent learns."""
        return max(self.random_steps, self.environment_steps)

    @property
    def questions(self) -> tuple[int, int]:
        """How many are asked in all, and of them at first."""
        return (0, 0) if self.upper == "return" else (self.labels, self.initial_labels)

    def idle(self) -> dict[str, object]:
        """What is set to other than its default, and has no effect with what else is set."""
        off: set[str] = set()
        if self.algorithm in ("drlhf", "mrn"):
            off |= {"score", "average", "hypergradient_after", *_OF_PAIRS}
        if self.upper != "cross-entropy":
            off.update(_OF_PAIRS)
        if self.upper == "return":
            off.update(_OF_ANSWERS.split())
        if self.score == "exact":
            off.add("average")
        if self.stale == "keep":
            off.add("limit")
        if not self.entropy_target:
            off.add("entropy_share")
        usual = {f.name: _USUAL.get(f.name, f.default) for f in fields(self)}
        given = {name: getattr(self, name) for name in usual if name in off}
        return {name: value for name, value in given.items() if value != usual[name]}

    def unlearned(self) -> list[str]:
        """What cannot be learned with these settings, and why."""
        total = self.rounds * self.environment_steps
        found = []
        if not self.updates_due(total):
            found.append(
                f"the agent makes no update: {self.silent_steps} of {total} environment steps are "
                f"before it learns, and {self.update_every * self.burst} go to its first updates "
                "(rounds, environment_steps, learning_starts, update_every, burst)"
            )
        asked, first = self.questions
        if self.upper != "return" and not asked:
            found.append("the reward stays as it was drawn: labels is 0, nobody is asked")
        elif not self.reward_steps and not (first and self.initial_epochs):
            found.append("the reward stays as it was drawn: reward_steps is 0")
        return found

    def updates_due(self, steps: int) -> int:
        """Updates of the agent after so many environment steps."""
        steps = max(steps - self.silent_steps, 0)
        return steps // (self.update_every * self.burst) * self.burst


_USUAL = {"reuse": True, "score": "one-step", "indirect_limit": 0.3, "weigh_loss": False}
_STOCHASTIC = {
    "reuse": False,
    "score": "full-horizon",
    "indirect_limit": math.inf,
    "weigh_loss": True,
    "query": "uniform",
}
_OF_PAIRS = ("indirect_limit", "weigh_loss", "stale", "limit")
"""What the score of pairs is limited and weighed by."""
_OF_ANSWERS = """
    teacher sign_only labels initial_labels schedule fragment lead query candidates pairs noise
    reuse initial_epochs pair_batch
"""
_ONE_OR_MORE = """
    horizon fragment recent candidates pairs rounds environment_steps environments
    episode_steps update_every burst n_step batch_size replay target_period members pair_batch
    evaluation_episodes evaluate_every
"""
_NONE_OR_MORE = """
    average indirect_limit lead hypergradient_after initial_labels learning_starts initial_epochs
    reward_steps video_every discount noise reward_features
"""
_LEAST = dict.fromkeys(_ONE_OR_MORE.split(), 1) | dict.fromkeys(_NONE_OR_MORE.split(), 0)
