"""The error catalogue: every failure has a stable code, names its place and offers one remedy."""

from __future__ import annotations

import difflib
import pickle
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, ClassVar

__all__ = [
    "AccuracyWarning",
    "AnswerLogCorruptError",
    "AnswerLogRecoveryWarning",
    "AnswerLogWriteError",
    "BackendFallbackWarning",
    "BackendUnavailableError",
    "BirlError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointFallbackWarning",
    "CheckpointIncompatibleError",
    "CheckpointWriteError",
    "ConfigError",
    "DeviceError",
    "DiscountError",
    "DtypeError",
    "EmptyActionSetError",
    "EnvironmentFailureError",
    "FileFormatError",
    "GradientError",
    "IllConditionedWarning",
    "InfeasibleError",
    "InitialDistributionError",
    "InvalidMDPError",
    "JobError",
    "MissingDependencyError",
    "NegativeProbabilityError",
    "NonFiniteInputError",
    "NonFiniteResultError",
    "NonStochasticError",
    "NotConvergedError",
    "OptionError",
    "ParameterError",
    "PolicyError",
    "ReferencePolicyError",
    "RenderError",
    "ShapeError",
    "SizeLimitError",
    "SolveError",
    "SparseFormatError",
    "StagnatedError",
    "TeacherError",
    "TemperatureError",
    "TerminalChoiceWarning",
    "UndeterminedError",
    "UninformativeDataError",
    "catalogue",
    "shown",
    "suggestion",
    "warn",
]


class BirlError(Exception):
    """Base of every error of the package.

    The message reads ``BIRL-E101 what where: value (allowed: range). Fix: remedy``.

    Args:
        what: the subject and what is wrong with it, e.g. ``"transition row sums to 0.97"``.
        where: its place, e.g. ``"batch 3, state 17, action 2"``.
        allowed: the range that would have been accepted.
        fix: one thing to do about it; the class has a default.
    """

    code: ClassVar[str] = ""
    meaning: ClassVar[str] = ""
    remedy: ClassVar[str] = ""

    def __init__(self, what: str, *, where: str = "", allowed: str = "", fix: str = "") -> None:
        self.what, self.where, self.allowed = what, where, allowed
        self.fix = fix or self.remedy
        message = f"{self.code} {what}" if self.code else what
        if where:
            message += f" at {where}"
        if allowed:
            message += f" (allowed: {allowed})"
        if self.fix:
            message += f". Fix: {self.fix}"
        super().__init__(message)

    def __copy__(self) -> BirlError:
        copied = _restored(type(self), self.args)
        vars(copied).update(vars(self))
        return copied

    def __reduce__(self) -> tuple[Callable[..., BirlError], tuple[Any, ...]]:
        # As bytes: torch would hand the tensors of a solution over by a connection that ends with
        # this process, and refuses to copy those that have a graph.
        return _restored, (type(self), self.args, pickle.dumps(vars(self)))


def _restored(
    cls: type[BirlError], args: tuple[Any, ...], attributes: bytes | None = None
) -> BirlError:
    """An error that crossed the border of a process: its message is composed already."""
    error = cls.__new__(cls, *args)
    super(BirlError, error).__init__(*args)
    if attributes is not None:
        vars(error).update(pickle.loads(attributes))
    return error


class InvalidMDPError(BirlError, ValueError):
    """The numbers given do not describe a Markov decision process."""


class NonStochasticError(InvalidMDPError):
    code = "BIRL-E101"
    meaning = "a row of the transition does not sum to one"
    remedy = "normalise the row"


class NegativeProbabilityError(InvalidMDPError):
    code = "BIRL-E102"
    meaning = "a transition probability is negative"
    remedy = "clip at zero and normalise the row"


class NonFiniteInputError(InvalidMDPError):
    code = "BIRL-E103"
    meaning = "an input is NaN or infinite"
    remedy = "replace the value; to forbid an action use `mask`"


class EmptyActionSetError(InvalidMDPError):
    code = "BIRL-E104"
    meaning = "every action of a non-terminal state is masked"
    remedy = "leave at least one action available, or mark the state in `terminal`"


class SparseFormatError(InvalidMDPError):
    code = "BIRL-E105"
    meaning = "the CSR arrays are malformed"
    remedy = "build them with torch.sparse_csr_tensor(..., check_invariants=True)"


class ReferencePolicyError(InvalidMDPError):
    code = "BIRL-E106"
    meaning = "the reference policy is not positive on an available action"
    remedy = "give it positive weight, or mask the action"


class InitialDistributionError(InvalidMDPError):
    code = "BIRL-E107"
    meaning = "the initial distribution is not a probability vector"
    remedy = "make it non-negative and normalise it"


class PolicyError(InvalidMDPError):
    code = "BIRL-E108"
    meaning = "a policy is not a probability distribution over the actions"
    remedy = "make it non-negative and normalise it over the last axis"


class ParameterError(BirlError, ValueError):
    """A scalar or option is outside its range."""


class DiscountError(ParameterError):
    code = "BIRL-E201"
    meaning = "the discount is outside [0, 1)"
    remedy = "use a discount below one; 0.9999 is fine"


class TemperatureError(ParameterError):
    code = "BIRL-E202"
    meaning = "the temperature is not positive and finite"
    remedy = "use a small positive temperature; the hard maximum is its limit and has no gradient"


class OptionError(ParameterError):
    code = "BIRL-E203"
    meaning = "an option has an unknown name or an impossible value"
    remedy = "choose one of the allowed values"


class InfeasibleError(ParameterError):
    code = "BIRL-E204"
    meaning = "no x meets a constraint, or none was found that does"
    remedy = "loosen the constraint"


class ShapeError(BirlError, ValueError):
    code = "BIRL-E301"
    meaning = "tensor shapes do not fit together"


class DtypeError(BirlError, TypeError):
    code = "BIRL-E302"
    meaning = "tensor dtypes are mixed or unsupported"
    remedy = "convert the inputs to one dtype, float32 or float64"


class DeviceError(BirlError, ValueError):
    code = "BIRL-E303"
    meaning = "tensors live on different devices"
    remedy = "move them to one device"


class SizeLimitError(BirlError, OverflowError):
    code = "BIRL-E304"
    meaning = "a problem is too large to be indexed or stored"


class SolveError(BirlError, RuntimeError):
    """The fixed point was not reached; ``solution`` holds the best iterate and its certificate."""

    def __init__(self, what: str, *, solution: Any = None, **kwargs: str) -> None:
        super().__init__(what, **kwargs)
        self.solution = solution


class NotConvergedError(SolveError):
    code = "BIRL-E401"
    meaning = "the iteration limit was reached before the tolerance"
    remedy = 'raise `max_iterations`, loosen `tol`, or use method="newton"'


class StagnatedError(SolveError):
    code = "BIRL-E402"
    meaning = "the tolerance asked for lies below the rounding floor"
    remedy = "loosen `tol` (None means: as far as rounding allows) or rescale the reward"


class NonFiniteResultError(SolveError):
    code = "BIRL-E403"
    meaning = "the solution overflowed"
    remedy = "rescale the reward, and the temperature with it"


class GradientError(BirlError, RuntimeError):
    code = "BIRL-E501"
    meaning = "a derivative cannot be trusted or is not defined"


class UndeterminedError(BirlError, ArithmeticError):
    """A direction of x, (d,), that an objective does not determine is the error's ``direction``."""

    code = "BIRL-E502"
    meaning = "the Hessian is singular or indefinite: the objective does not determine x"
    remedy = "fix the parameters of that direction, or give data that tell them apart"

    def __init__(self, what: str, *, direction: tuple[float, ...] = (), **kwargs: str) -> None:
        super().__init__(what, **kwargs)
        self.direction = direction


class AccuracyWarning(UserWarning):
    """An algorithm is less accurate than it was asked to be; every outcome says by how much."""


class BackendUnavailableError(BirlError, RuntimeError):
    code = "BIRL-E601"
    meaning = "the backend asked for is not available"
    remedy = 'use backend="auto"; `python -m birl_ext` says what is missing'


class BackendFallbackWarning(UserWarning):
    """A compiled module could not be used; the PyTorch path computes the same answers, slower."""


class IllConditionedWarning(UserWarning):
    """Rounding in a derivative is magnified by `condition`: near a discount of one the process has
    parts that it hardly ever leaves.

    Attributes:
        condition: by how much, estimated: once in a first derivative, twice in a second one, and as
            often again where what drives it, dγ or dP, meets values as many times larger.
        problem: the flat index of the worst problem in the batch.
    """

    def __init__(self, condition: float, problem: int) -> None:
        super().__init__(condition, problem)
        self.condition, self.problem = condition, problem

    def __str__(self) -> str:
        return (
            f"ill-conditioned: derivatives of problem {self.problem} of the batch magnify rounding "
            f"by {self.condition:.1g}: the process hardly moves between some of its states. "
            "Fix: use a smaller discount, or solve these parts apart"
        )


class FileFormatError(BirlError, ValueError):
    code = "BIRL-E701"
    meaning = "a file is missing, truncated, or not of the expected form"


class CheckpointError(BirlError, RuntimeError):
    """A checkpoint cannot be used."""


class CheckpointCorruptError(CheckpointError):
    code = "BIRL-E702"
    meaning = "no intact checkpoint was found"
    remedy = "start the run again in a new directory"


class CheckpointIncompatibleError(CheckpointError):
    code = "BIRL-E703"
    meaning = "the checkpoint belongs to another configuration or version"
    remedy = "resume with the configuration stored beside it"


class CheckpointWriteError(CheckpointError):
    code = "BIRL-E704"
    meaning = "a checkpoint could not be written; the one before it is intact"
    remedy = "make room on the disk and resume"


class CheckpointFallbackWarning(UserWarning):
    """A damaged checkpoint was passed over; the run goes on from the one before it."""


class AnswerLogCorruptError(BirlError, RuntimeError):
    code = "BIRL-E705"
    meaning = "a log of answers was altered or cut short"
    remedy = "restore it from a copy; nothing was changed"


class AnswerLogWriteError(BirlError, RuntimeError):
    code = "BIRL-E706"
    meaning = "an answer could not be written; those before it are intact"
    remedy = "make room on the disk and give the answer again"


class TerminalChoiceWarning(UserWarning):
    """An end, terminal or absorbing, keeps the entropy of a choice that leads nowhere."""


class AnswerLogRecoveryWarning(UserWarning):
    """Answers of a course that a run has left have been removed from a log."""


class UninformativeDataError(BirlError, ValueError):
    code = "BIRL-E707"
    meaning = "data that leave an estimate without a maximum or a parameter without influence"
    remedy = "add observations that tell the parameters apart"


class ConfigError(BirlError, ValueError):
    code = "BIRL-E801"
    meaning = "a configuration is invalid"
    remedy = "choose an allowed value"


class MissingDependencyError(BirlError, ImportError):
    code = "BIRL-E802"
    meaning = "an optional package is not installed"


class JobError(BirlError, TypeError):
    code = "BIRL-E803"
    meaning = "a job does not keep the contract of birl_ext.runs.job.Job"


class EnvironmentFailureError(BirlError, RuntimeError):
    code = "BIRL-E901"
    meaning = "an environment raised, died, hung, or returned what it has not declared"
    remedy = "mend the environment; the seed and the action reproduce the failure"


class RenderError(BirlError, RuntimeError):
    code = "BIRL-E902"
    meaning = "an environment cannot be drawn on this machine"
    remedy = 'build it with render_mode="rgb_array"'


class TeacherError(BirlError, ValueError):
    code = "BIRL-E903"
    meaning = "a teacher raised, or gave an answer that is none"
    remedy = "answer 1 where the first is better, 0 where the second is, 0.5 for a tie"


def warn(message: str | Warning, category: type[Warning] | None = None) -> None:
    """Warn at the line that called into the package, through whatever of it and of torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    """Of the package, of torch, or of a graph that torch has written."""
    room = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    written = ("<eval_with_key>", "_functorch")
    return room in ("birl_ext", "torch") or any(x in frame.f_code.co_filename for x in written)


def catalogue() -> Iterator[tuple[str, type[BirlError]]]:
    """Every error that has a code, in the order of the codes."""
    found: dict[str, type[BirlError]] = {}
    pending: list[type[BirlError]] = [BirlError]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.code:
            found[cls.code] = cls
    yield from sorted(found.items())


def shown(given: Any) -> str:
    """A short repr."""
    try:
        return reprlib.repr(given)
    except ValueError:  # an integer of more digits than Python prints
        return "too long to print"


def suggestion(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?``, or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""
