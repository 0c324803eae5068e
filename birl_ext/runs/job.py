"""What a problem must offer so that it can be run, resumed and plotted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from birl_ext.errors import JobError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = [
    "ChecksNew",
    "Job",
    "Logger",
    "Metrics",
    "Problem",
    "State",
    "WritesFiles",
    "checked_metrics",
    "require_job",
]

Metrics: TypeAlias = dict[str, float]
"""One row of metrics.jsonl: ``step`` and whatever the job's `Job.step` returned."""

Logger: TypeAlias = Callable[[Metrics], None]
"""Takes the row of each outer step, such as ``wandb.log`` or a `TensorBoardWriter`."""

State: TypeAlias = "Tensor | float | str | Mapping[Any, State] | Sequence[State] | None"
"""What a checkpoint can hold: tensors and plain values in nested dicts, lists and tuples."""


class Job(Protocol):
    """One optimisation that advances in outer steps and can be stopped between any two of them.

    Two rules make a resumed run end with the same bits as an uninterrupted one:

    * `state_dict` holds everything the next step depends on, the state of every random generator
      (``torch.Generator.get_state()``) included, and reading it changes nothing;
    * a job built from the same config and given that state continues as if never stopped.
    """

    @property
    def config(self) -> Any:
        """The frozen dataclass the job was built from; its fields are plain TOML values.

        It has a field ``seed: int``.
        """

    @property
    def total_steps(self) -> int:
        """Outer steps the job takes at most; the length of the progress bar."""

    @property
    def done(self) -> bool:
        """Whether no step is left to take."""

    def step(self) -> Mapping[str, float]:
        """Take one outer step and return its metrics, numbers; the run adds the key ``step``."""

    def state_dict(self) -> Mapping[str, State]:
        """Everything the next step depends on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; its tensors are on the CPU and belong to the caller."""

    def summary(self) -> Mapping[str, Any]:
        """The result, under the job's own names: what it is judged by first.

        Values are numbers, strings, tensors, or nested dicts and lists of them. Scalars at the top
        level are shown in the table that ends a run. If ``converged`` or ``identified`` is among
        them and false, `birl run` says so and its exit status is 1.
        """

    def figures(
        self, history: Sequence[Metrics], summary: Mapping[str, Any]
    ) -> Mapping[str, Callable[[], Figure]]:
        """File name (without suffix) -> function that draws the figure.

        The functions are called inside `birl_ext.runs.plots.style`; building the mapping must not
        import matplotlib, so that a run without it can say what was not drawn.

        Args:
            history: the rows of metrics.jsonl, oldest first.
            summary: what summary.json holds, i.e. `summary` as plain values (tensors as lists).
        """


@runtime_checkable
class WritesFiles(Protocol):
    """A job that also writes files of its own, such as videos or a log of answers.

    After a kill the steps since the last checkpoint are taken again, so a file of one step is
    written over under the same name, and one that grows is cut back by `Job.load_state_dict`.
    """

    def attach(self, path: Path) -> None:
        """Take the directory that the files go under.

        A run calls it once, with the directory locked, before `Job.load_state_dict` and the first
        step.
        """

    def detach(self) -> None:
        """Close what is open; the run has ended, however it did, or is only looked at, as by
        ``birl plot``: then without `attach`, before `Job.load_state_dict`.
        """


@runtime_checkable
class ChecksNew(Protocol):
    """A job that cannot begin with every config that it can go on with."""

    def check_new(self) -> None:
        """Refuse to begin; called before the directory of a new run is made."""


class Problem(NamedTuple):
    """An entry of ``birl_ext.problems.PROBLEMS``; importing it must not import torch."""

    config: type[Any]
    """Frozen dataclass; its docstring and defaults are the command line's help."""

    job: Callable[[Any], Job]
    """Builds the job from a config; imports what it needs when called."""

    summary: str
    """One line for ``birl run --help``."""


def require_job(job: Any) -> None:
    """Refuse, before the first step, what does not keep the contract of `Job`.

    Raises:
        JobError: names what is missing, or of another kind.
    """
    name = type(job).__name__
    for part in ("step", "state_dict", "load_state_dict", "summary", "figures"):
        if not callable(getattr(job, part, None)):
            raise JobError(f"{name}.{part} is no method", fix=f"define it: see Job.{part}")
    config, steps = getattr(job, "config", None), getattr(job, "total_steps", None)
    seed = getattr(config, "seed", None)
    for what, value, right, allowed in (
        ("config", config, dataclasses.is_dataclass(config), "the dataclass it was built from"),
        ("config.seed", seed, _is_int(seed), "an integer: a field `seed: int = 0`"),
        ("total_steps", steps, _is_int(steps), "an integer, as a property"),
        ("done", None, hasattr(job, "done"), "a bool, as a property"),
    ):
        if not right:
            raise JobError(f"{name}.{what} is {value!r}", allowed=allowed, fix="define it")


def checked_metrics(found: Any, job: Job) -> Metrics:
    """What a step returned, as numbers.

    Raises:
        JobError: it is no mapping from names to numbers, or has an entry `step` itself.
    """
    where = f"{type(job).__name__}.step"
    if not isinstance(found, Mapping):
        raise JobError(
            f"a step returned {type(found).__name__}",
            where=where,
            allowed="a mapping from names to numbers",
            fix="return a dict of the step's metrics",
        )
    for name in found:
        if not isinstance(name, str) or name == "step":
            raise JobError(
                f"a metric is called {name!r}",
                where=where,
                allowed="strings other than 'step', which the run adds",
                fix="rename the metric",
            )
    return {name: _number(name, value, where) for name, value in found.items()}


def _number(name: str, value: Any, where: str) -> float:
    if not isinstance(value, (str, bytes, bytearray)):
        try:
            return float(value)  # of a tensor or an array of one element too
        except OverflowError:
            return math.inf if value > 0 else -math.inf
        except (TypeError, ValueError, RuntimeError):
            pass
    raise JobError(
        f"the metric {name!r} is {value!r:.200}",
        where=where,
        allowed="a number, or a tensor or an array of one",
        fix="return float(…) of it, or leave it out",
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
