"""Those who answer which of two fragments is better: by rule from the true reward, or by code of a
user's own.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from birl_ext.errors import (
    BirlError,
    ConfigError,
    NonFiniteInputError,
    OptionError,
    TeacherError,
    shown,
    suggestion,
)
from birl_ext.model import checks
from birl_ext.preferences.fragments import Fragments
from birl_ext.state import Stateful

__all__ = [
    "TEACHERS",
    "AbsentTeacher",
    "OwnTeacher",
    "ScriptedTeacher",
    "Teacher",
    "TeacherRule",
    "absent",
    "name_of",
    "named_teacher",
    "register_teacher",
]


class Teacher(Protocol):
    """Whoever answers: a rule, or a person; any function of two batches of fragments.

    A teacher that remembers may have `state_dict` and `load_state_dict` besides, both or neither:
    what the first returns (tensors and plain values) is in every checkpoint, and a resumed run
    gives it to the second.
    """

    def __call__(
        self, first: Fragments, second: Fragments
    ) -> Tensor | NDArray[Any] | Sequence[float | None]:
        """Which of two fragments is better, for each of n pairs.

        Args:
            first, second: n fragments each, of which pair i is the i-th of both. One whose episode
                ended early is padded with zeros, where its `present` is False: take means and sums
                over steps by `Fragments.mean` and `Fragments.sum`, which leave them out. They are
                copies.

        Returns:
            (n,): 1 if `first` is better, 0 if `second`, 0.5 for a tie; None for no answer, in a
            list or an array of objects, or masked, and the pair is left out. NaN is refused.
        """
        ...


@dataclass(frozen=True)
class TeacherRule:
    """How a scripted teacher answers.

    From the returns R = Σ_h r_h of both fragments, of which the longer one has H steps, and the
    mean reward r̄ per step of the recent policy:

    1. no answer where max(R₁, R₂) ≤ skip_share·H·r̄;
    2. a tie where |R₁ − R₂| < tie_share·H·|r̄|;
    3. otherwise `first` with probability σ(rationality·(R′₁ − R′₂)), R′ = Σ_h γ^(H−1−h) r_h, and a
       tie where a fully rational teacher finds R′₁ = R′₂;
    4. a strict answer is turned round with probability mistake_rate.

    Args:
        rationality: β, per unit of reward; infinite means always the larger return.
        mistake_rate: ε, probability.
        skip_share: share of the mean return; zero answers everything.
        discount: γ ≤ 1 per step back from the end: a myopic teacher remembers the end best.
        tie_share: share of the mean return; zero has no ties but exact ones.
        sign_only: look at the sign of each reward only, as Atari's clipped rewards do; r̄ is the
            mean sign then.

    Source: Lee et al. (2021), B-Pref, section 3.
    """

    rationality: float = math.inf
    mistake_rate: float = 0.0
    skip_share: float = 0.0
    discount: float = 1.0
    tie_share: float = 0.0
    sign_only: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rationality", 0.0, math.inf),
            ("mistake_rate", 0.0, 1.0),
            ("skip_share", 0.0, math.inf),
            ("discount", 0.0, 1.0),
            ("tie_share", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise OptionError(f"{name} is {value!r}", allowed=f"[{low:g}, {high:g}]")

    @classmethod
    def oracle(cls) -> TeacherRule:
        """Always right."""
        return cls()

    @classmethod
    def mistake(cls) -> TeacherRule:
        """Wrong one time in ten."""
        return cls(mistake_rate=0.1)

    @classmethod
    def noisy(cls) -> TeacherRule:
        """Boltzmann with β = 1."""
        return cls(rationality=1.0)

    @classmethod
    def skip(cls) -> TeacherRule:
        """Silent where both are poor."""
        return cls(skip_share=0.1)

    @classmethod
    def myopic(cls) -> TeacherRule:
        """Remembers the end best."""
        return cls(discount=0.9)

    @classmethod
    def equal(cls) -> TeacherRule:
        """A tie where the difference is small."""
        return cls(tie_share=0.1)

    @classmethod
    def boltzmann(cls, temperature: float = 1.0, *, sign_only: bool = False) -> TeacherRule:
        """First with probability σ((R₁ − R₂)/temperature); temperature in units of reward."""
        if not temperature > 0:
            raise OptionError(f"temperature is {temperature!r}", allowed="(0, inf]")
        return cls(rationality=1 / temperature, sign_only=sign_only)


TEACHERS: Mapping[str, TeacherRule] = MappingProxyType(
    {
        rule.__name__: rule()
        for rule in (
            TeacherRule.oracle,
            TeacherRule.mistake,
            TeacherRule.noisy,
            TeacherRule.skip,
            TeacherRule.myopic,
            TeacherRule.equal,
        )
    }
)
"""The six of B-Pref."""


class ScriptedTeacher(Stateful):
    """Answers by a rule, from the fragments' true rewards.

    Args:
        rule: see `TeacherRule`.
        generator: of all its randomness, on the CPU; it belongs to the teacher from now on.
        mean_reward: r̄, true reward per step of the recent policy, the mean of its sign where the
            rule is `sign_only`; needed where the rule skips or ties, and kept up to date with
            `observe`.
    """

    STATE = ("generator", "mean_reward")

    def __init__(
        self,
        rule: TeacherRule,
        generator: torch.Generator,
        *,
        mean_reward: float | None = None,
    ) -> None:
        self.rule = rule
        self.generator = generator
        self.mean_reward: float | None = None
        if mean_reward is not None:
            self.observe(mean_reward)

    def observe(self, mean_reward: float) -> None:
        """Take over the mean true reward per step of the recent policy, where the rule is
        `sign_only` the mean of its sign.

        Raises:
            OptionError: it is not finite; or the rule skips and it is negative, where no share of
                it separates poor fragments from good ones; or the rule is `sign_only` and it is no
                mean of signs.
        """
        found = checks.real(mean_reward)
        number = math.nan if found is None else found
        if self.rule.sign_only and abs(number) > 1:
            raise OptionError(
                f"mean_reward is {mean_reward!r}",
                allowed="[-1, 1], where the rule is sign_only",
                fix="give the mean of the rewards' signs",
            )
        if not math.isfinite(number) or (self.rule.skip_share and number < 0):
            raise OptionError(
                f"mean_reward is {mean_reward!r}",
                allowed="finite, and not negative where skip_share is above zero",
                fix="use a rule with skip_share=0 for negative rewards",
            )
        self.mean_reward = number

    def __call__(self, first: Fragments, second: Fragments) -> Tensor:
        """Labels (n,) float32, NaN where there is no answer.

        Raises:
            NonFiniteInputError: the true reward of a present step is NaN or infinite.
            OptionError: the rule needs `mean_reward`.
        """
        _check_finite("first", first)
        _check_finite("second", second)
        rule = self.rule
        ours, theirs = self._return(first, 1.0), self._return(second, 1.0)
        late = self._return(first, rule.discount) - self._return(second, rule.discount)
        # All numbers are drawn, needed or not: answers to the same questions then differ between
        # rules by the rule alone.
        choice, slip = torch.rand(2, len(late), generator=self.generator, dtype=torch.float64)
        if math.isinf(rule.rationality):
            label = (1 + late.sign()) / 2
        else:
            label = (choice < torch.sigmoid(rule.rationality * late)).double()
        label = torch.where(slip < rule.mistake_rate, 1 - label, label)
        if rule.tie_share:
            near = rule.tie_share * abs(self._typical()) * self._steps(first, second)
            label = torch.where((ours - theirs).abs() < near, 0.5, label)
        if rule.skip_share:
            poor = rule.skip_share * self._typical() * self._steps(first, second)
            label = torch.where(torch.maximum(ours, theirs) <= poor, math.nan, label)
        return label.to(torch.float32).to(first.reward.device)

    def _typical(self) -> float:
        if self.mean_reward is None:
            raise OptionError(
                "mean_reward is not known, and the rule skips or ties by its share",
                fix="give mean_reward, or call observe() with the mean true reward per step",
            )
        return self.mean_reward

    def _return(self, fragments: Fragments, discount: float) -> Tensor:
        """Σ_h γ^(steps after h) r_h over the present steps, (n,) float64 on the CPU."""
        present = fragments.present.cpu()
        reward = fragments.reward.cpu().double()
        if self.rule.sign_only:
            reward = reward.sign()
        reward = torch.where(present, reward, 0.0)
        if discount == 1:
            return reward.sum(-1)
        after = present.sum(-1, keepdim=True) - present.cumsum(-1)
        return (reward * discount ** after.double()).sum(-1)

    @staticmethod
    def _steps(first: Fragments, second: Fragments) -> Tensor:
        """H, (n,): steps of the longer of the two."""
        return torch.maximum(first.present.sum(-1), second.present.sum(-1)).cpu()


def _check_finite(name: str, fragments: Fragments) -> None:
    wrong = (fragments.present & ~fragments.reward.isfinite()).nonzero()
    if len(wrong):
        row, step = wrong[0].tolist()
        raise NonFiniteInputError(
            f"the true reward is {float(fragments.reward[row, step])}",
            where=f"pair {row}, step {step} of its {name} fragment",
            fix="mend the environment, or leave the pair out",
        )


class OwnTeacher:
    """A teacher of a user's own, looked at when it is given and at every answer.

    Args:
        teacher: see `Teacher`.

    Raises:
        TeacherError: it cannot be called with two batches of fragments, or has one half of a state.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.name = name_of(teacher)
        fix = "give a function of two batches of fragments, or an object with such a __call__"
        if isinstance(teacher, type):
            fix = f"give an object of it: {teacher.__name__}(…)"
        if isinstance(teacher, type) or not callable(teacher):
            what = f"the teacher is {'the class ' * isinstance(teacher, type)}{self.name}"
            raise TeacherError(what, allowed="what answers when it is called", fix=fix)
        try:
            inspect.signature(teacher).bind(None, None)
        except TypeError as error:
            what = f"the teacher {self.name} does not take (first, second): {error}"
            raise TeacherError(what, fix=fix) from None
        except ValueError:  # compiled code may not say what it takes
            pass
        halves = [hasattr(teacher, half) for half in ("state_dict", "load_state_dict")]
        if any(halves) and not all(halves):
            raise TeacherError(
                f"the teacher {self.name} has one of state_dict and load_state_dict",
                allowed="both, or neither",
                fix="define the other",
            )
        self.teacher = teacher
        self.remembers = all(halves)
        """Whether it has a state, which its answers may change."""

    def __call__(self, first: Fragments, second: Fragments) -> Tensor:
        """Labels (n,) float32, NaN where there is no answer.

        Raises:
            TeacherError: it raised, or an answer is neither 0, 1, 0.5 nor none.
        """
        count = len(first)
        remedy = (
            "mend the teacher, which is given many pairs at once; the questions are asked again"
        )
        with self._named(f"a batch of {count} pairs", remedy):
            # Copies: what it writes into them is no observation.
            found = self.teacher(*(Fragments(*map(torch.clone, two)) for two in (first, second)))
        answers = _listed(found)
        shape = tuple(getattr(found, "shape", () if answers is None else (len(answers),)))
        if answers is None or shape != (count,):
            raise TeacherError(
                f"the teacher {self.name} answered {type(found).__name__} {shape}",
                where=f"a batch of {count} pairs",
                allowed=f"{count} numbers, one for each pair, in a list, an array or a tensor",
                fix="answer for all pairs at once: each is a row of `first` and of `second`",
            )
        for pair, answer in enumerate(answers):
            if answer is not None and not (isinstance(answer, Real) and answer in (0, 0.5, 1)):
                raise TeacherError(
                    f"the teacher {self.name} answered {shown(answer)}",
                    where=f"pair {pair} of {count}",
                    allowed="the numbers 0, 1, 0.5; None, in a list, for no answer",
                )
        label = [math.nan if answer is None else float(answer) for answer in answers]
        return torch.tensor(label, dtype=torch.float32, device=first.reward.device)

    def state_dict(self) -> dict[str, Any]:
        """What the teacher remembers, as a snapshot; nothing of one that does not."""
        own: Any = self.teacher
        with self._named("its state_dict"):
            return {"own": copy.deepcopy(own.state_dict())} if self.remembers else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the teacher go on from a state."""
        own: Any = self.teacher
        if self.remembers:
            with self._named("its load_state_dict"):
                own.load_state_dict(copy.deepcopy(state["own"]))

    @contextlib.contextmanager
    def _named(self, where: str, fix: str = "mend the teacher") -> Iterator[None]:
        """What the teacher raises inside has its name."""
        try:
            yield
        except BirlError:
            raise
        except (Exception, SystemExit) as error:
            raise TeacherError(
                f"the teacher {self.name} raised {type(error).__name__}: {error}",
                where=where,
                fix=fix,
            ) from error


def _listed(found: Any) -> list[Any] | None:
    """Answers one by one, None where an array masks them; None of what is no list of any."""
    try:
        if not isinstance(found, list | tuple):
            plain = found.detach() if isinstance(found, Tensor) else np.asanyarray(found)
            found = plain.tolist()
    except Exception:  # it may be anything
        return None
    if not isinstance(found, list | tuple):
        return None
    arrays = Tensor | np.generic | np.ndarray
    return [one.tolist() if isinstance(one, arrays) and one.ndim == 0 else one for one in found]


class AbsentTeacher:
    """In the place of a teacher that was given as an object and is not at hand: it keeps the state.

    Args:
        name: what it was.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._state: Mapping[str, Any] = {}

    def __call__(self, first: Fragments, second: Fragments) -> Tensor:
        """Raises TeacherError."""
        raise absent(self.name, "give it: load(DIR, teacher=…).learn()")

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = copy.deepcopy(dict(state))


def absent(name: str, fix: str) -> TeacherError:
    """Of a name that a file has for a teacher that was given as an object."""
    return TeacherError(f"the teacher {name} was given as an object, and is not at hand", fix=fix)


_REGISTERED: dict[str, Teacher | type[Any]] = {}


def register_teacher(name: str, teacher: Teacher | type[Any]) -> None:
    """Let runs name a teacher of one's own, on the command line by ``--teacher NAME``.

    Args:
        name: not one of `TEACHERS`; of two teachers of one name the later one holds.
        teacher: see `Teacher`; or a class, of which each run makes one without arguments.

    Raises:
        OptionError: the name is none, or taken.
        TeacherError: no teacher can be called so.
    """
    if not isinstance(name, str) or not name or ":" in name or name in TEACHERS:
        raise OptionError(
            f"the teacher's name is {name!r}",
            allowed=f"words without a colon, other than {', '.join(TEACHERS)}",
        )
    if not isinstance(teacher, type):
        OwnTeacher(teacher)  # looked at now
    _REGISTERED[name] = teacher


def named_teacher(name: str, modules: Mapping[str, ModuleType]) -> Teacher:
    """A teacher of a user's own, as a setting names it.

    Args:
        name: as it was registered, or MODULE:NAME of a function, an object, or a class that is made
            without arguments.
        modules: those that have been imported for this run.

    Raises:
        ConfigError: there is none.
        TeacherError: the class cannot be made.
    """
    found: Any = _REGISTERED.get(name)
    module, colon, path = name.partition(":")
    if found is None and colon:
        if module not in modules:
            near = suggestion(module, modules)
            raise ConfigError(
                f"teacher is {name!r}, and module {module!r} is not named",
                fix=f"name its file, on the command line --module {module}.py"
                + (f"; or {near}" if near else ""),
            )
        try:
            found = operator.attrgetter(path)(modules[module])
        except AttributeError:
            known = [one for one, value in vars(modules[module]).items() if callable(value)]
            raise ConfigError(
                f"teacher is {name!r}, and the module has no {path!r}",
                where=str(modules[module].__file__),
                fix=suggestion(path, known) or "give the name of a class or function in it",
            ) from None
    if found is None:
        known = [*TEACHERS, *_REGISTERED]
        known += [f"{module}:{name}" for module, own in modules.items() if hasattr(own, name)]
        raise ConfigError(
            f"teacher is {name!r}",
            allowed=f"{', '.join(known)}; or MODULE:NAME of code named by --module",
            fix=suggestion(name, known) or "choose one of them",
        )
    if not isinstance(found, type):
        return found  # type: ignore[no-any-return]
    try:
        return found()  # type: ignore[no-any-return]
    except (Exception, SystemExit) as error:
        raise TeacherError(
            f"making the teacher {name!r} raised {type(error).__name__}: {error}",
            fix="let it be made without arguments, or register an object",
        ) from error


def name_of(thing: Any) -> str:
    """MODULE:NAME of what is given, or of its class."""
    if not hasattr(thing, "__qualname__"):
        thing = type(thing)
    return f"{thing.__module__}:{thing.__qualname__}"
