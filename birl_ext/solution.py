"""What a solve returns: the solution, its certificate, and per problem a status with a remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_ext.errors import DeviceError

__all__ = [
    "INFO",
    "Info",
    "Kernel",
    "Method",
    "Rigour",
    "Solution",
    "Status",
    "as_device",
    "info_table",
]


class Method(IntEnum):
    """How the fixed point is computed (docs/solvers.md)."""

    AUTO = 0
    VALUE_ITERATION = 1  # with the constant mode deflated
    NEWTON = 2  # soft policy iteration, direct solve (M9)
    KRYLOV = 3  # Newton, inexact: BiCGStab
    POLICY_ITERATION = 4  # modified policy iteration
    SWEEP = 5  # of the op `bellman`: one pass, and its image as it is


class Info(IntEnum):
    """What a solver says of each problem: the first columns of `Solution.info`."""

    RESIDUAL = 0
    ERROR_BOUND = 1
    PASSES = 2
    PLACE = 3  # of an invalid input, a flat index
    CULPRIT = 4  # its value
    PRODUCTS = 5  # of inner linear solvers
    TEMPERATURE = 6
    OFFSET = 7  # a constant near the value
    KERNEL = 8  # the `Kernel` that solved the problem


INFO = len(Info)  # columns before the bounds of the states
EPS = torch.finfo(torch.float64).eps


def info_table(
    shape: Sequence[int], states: int, device: torch.device, **columns: Tensor | float
) -> Tensor:
    """`Solution.info` of the problems of a batch: the columns named, in lower case, and zeros; the
    bounds of the states are that of the problem.
    """
    info = torch.zeros((*shape, INFO + states), dtype=torch.float64, device=device)
    for name, values in columns.items():
        info[..., Info[name.upper()]] = values
    info[..., INFO:] = info[..., Info.ERROR_BOUND, None]
    return info


class Kernel(IntEnum):
    """The code that solves a problem, chosen by device, storage form and size."""

    TORCH = 0  # plain PyTorch, any device
    CPU_PACKED = 1  # small dense: states on the lanes of a vector
    CPU_ROWS = 2  # dense, row by row
    CPU_CSR = 3  # sparse
    CUDA_WARP = 10  # one warp per problem
    CUDA_BLOCK = 11  # one block, P in shared memory
    CUDA_GRID = 13  # the whole device on one dense problem
    CUDA_CSR = 14  # one block, sparse
    CUDA_GRID_CSR = 15  # the whole device on one sparse problem


class Rigour(IntEnum):
    """What an op checks of the rows of P in its first pass over them."""

    OFF = 0
    OR_ENDING = 1  # stochastic, or exactly zero: the process ends there
    STOCHASTIC = 2


class Status(IntEnum):
    """How a solve ended; `sentence` says it in words, with what to do about it."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STAGNATED = 2
    NON_FINITE = 3
    ROW_SUM = 10
    NEGATIVE_PROBABILITY = 11
    NON_FINITE_TRANSITION = 12
    NON_FINITE_REWARD = 13
    BAD_DISCOUNT = 14
    BAD_TEMPERATURE = 15
    NO_ACTION = 16
    BAD_REFERENCE = 17

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "The certified error bound meets the tolerance.",
    Status.MAX_ITERATIONS: "The iteration limit came first: raise max_iterations or loosen tol.",
    Status.STAGNATED: "The tolerance lies below the rounding floor: loosen tol, or leave it None.",
    Status.NON_FINITE: "The iteration overflowed: rescale the reward, and the temperature with it.",
    Status.ROW_SUM: "A row of the transition does not sum to one: normalise it.",
    Status.NEGATIVE_PROBABILITY: "A transition probability is negative: clip and normalise.",
    Status.NON_FINITE_TRANSITION: "A transition probability is NaN or infinite.",
    Status.NON_FINITE_REWARD: "A reward is NaN or infinite: to forbid an action use a mask.",
    Status.BAD_DISCOUNT: "The discount is outside [0, 1).",
    Status.BAD_TEMPERATURE: "The temperature is not positive and finite.",
    Status.NO_ACTION: "Every action of a state is masked: leave one, or mark it terminal.",
    Status.BAD_REFERENCE: "The reference policy is NaN, infinite or negative.",
}


class Solution(NamedTuple):
    """The fixed point of a batch of regularised MDPs and its certificate; a pytree.

    Shapes: *B are the broadcast batch axes. Units: of reward, unless said otherwise.
    """

    value: Tensor
    """V*, (*B, S)."""
    q: Tensor
    """Q*, (*B, S, A); −inf where masked."""
    policy: Tensor
    """π*, (*B, S, A), a probability per action; 0 where masked."""
    log_policy: Tensor
    """log π*, (*B, S, A); −inf where masked."""
    advantage: Tensor
    """Q* − V*, (*B, S, A), free of the cancellation of subtracting the two; 0 where masked."""
    info: Tensor
    """What the solver certified and counted, (*B, 9 + S) float64: see the properties."""
    status: Tensor
    """A `Status` per problem, (*B,) int64; 0 is success."""

    @property
    def residual(self) -> Tensor:
        """Half the span of TV − V at the last sweep, (*B,); its sup norm if some row ends."""
        return self.info[..., Info.RESIDUAL]

    @property
    def error_bound(self) -> Tensor:
        """Certified bound on ‖value − V*‖∞, (*B,): (M6) and rounding, never below the error."""
        return self.info[..., Info.ERROR_BOUND] + _rounding(self.value, 1)

    @property
    def error_bounds(self) -> Tensor:
        """Certified bound on |value − V*| of each state, (*B, S); none above `error_bound`.

        They differ where values differ so much in size that each state was certified by itself.
        """
        rounded = _rounding(self.value.unsqueeze(-1), 1)
        return self.info[..., INFO:] + rounded

    @property
    def log_policy_error_bound(self) -> Tensor:
        """Certified bound on max |log_policy − log π*|, (*B,), dimensionless (M7)."""
        none = self.log_policy == -torch.inf
        seen = self.log_policy.where(~none, 0.0)
        change = 2 * self.info[..., Info.ERROR_BOUND] / self.info[..., Info.TEMPERATURE]
        # of actions far from being taken, whose Q has a larger rounding than the value
        change = change + 4 * EPS * seen.detach().double().abs().amax((-2, -1))
        # not masked, where the advantage is 0, but too small for the dtype
        overflowed = (none & (self.advantage != 0)).flatten(-2).any(-1)
        return (change + _rounding(seen, 2)).masked_fill(overflowed, torch.inf)

    @property
    def iterations(self) -> Tensor:
        """Passes over the transition, (*B,) int64."""
        return self.info[..., Info.PASSES].nan_to_num().long()

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that solved the batch, each once, in the order of `Kernel`; none for
        an approximate solution, which nothing has solved.

        Reads `info`: on a GPU it waits for the solution.
        """
        used = set(self.info[..., Info.KERNEL].flatten().tolist())
        return tuple(kernel.name for kernel in Kernel if kernel in used)

    def problem(self, *index: int) -> Solution:
        """That of one problem of the batch, by an index per batch axis; from the end if negative.

        Raises:
            IndexError: there is no such problem, or an index is missing.
        """
        shape = tuple(self.status.shape)
        if len(index) != len(shape):
            raise IndexError(f"{len(index)} indices, for a batch of shape {shape}")
        if any(isinstance(i, bool) or not hasattr(i, "__index__") for i in index):
            raise IndexError(f"{index} are no whole numbers, for a batch of shape {shape}")
        return Solution(*(table[index] for table in self))

    def detach(self) -> Solution:
        """The same numbers without their derivatives."""
        return Solution(*(table.detach() for table in self))

    def to(self, device: torch.device | str) -> Solution:
        """The same on another device.

        Raises:
            DeviceError: it is none, or this machine has none of its kind.
        """
        target = as_device(device)
        return Solution(*(table.to(target) for table in self))

    def _facts(self) -> dict[str, str]:
        """What a screen shows: the statuses by name, where they can be read."""
        *batch, states, actions = self.policy.shape
        facts = {
            "batch shape": str(tuple(batch)),
            "states": str(states),
            "actions": str(actions),
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "device": str(self.policy.device),
        }
        try:
            codes = self.status.flatten().tolist()
            bound, passes = self.error_bound.flatten().tolist(), self.iterations.flatten().tolist()
        except RuntimeError:  # while a transform traces
            return facts
        counts = Counter(Status(code).name for code in codes)
        if codes:
            facts["status"] = ", ".join(f"{name} ({count})" for name, count in counts.items())
            facts["iterations"] = f"at most {max(passes)}"
            facts["error bound"] = f"at most {max(bound, key=_worst):.2g}"
        return facts

    def __repr__(self) -> str:
        return f"Solution({', '.join(f'{name}: {fact}' for name, fact in self._facts().items())})"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{name}</th><td>{fact}</td></tr>" for name, fact in self._facts().items())
        return f"<table><caption>Solution</caption>{''.join(rows)}</table>"

    def closed(self, available: Tensor) -> Solution:
        """The same, but what flows back into an entry where no action is `available`, (*B, S, A),
        flows no further, whatever its derivative: log π, say, has none at 0. Nor does what flows
        into π = 1 of a state's only action, which nothing moves.
        """
        choice = available.sum(-1, keepdim=True) > 1

        def chosen(table: Tensor) -> Tensor:
            return table.where(choice, table.detach())

        return self._replace(
            q=self.q.where(available, -torch.inf),
            policy=chosen(self.policy).where(available, 0.0),
            log_policy=chosen(self.log_policy).where(available, -torch.inf),
            advantage=self.advantage.where(available, 0.0),
        )


def as_device(target: Any) -> torch.device:
    """The device that is asked for, if this machine has it."""
    try:
        device = torch.device(target)
        torch.empty(0, device=device)
    except (TypeError, RuntimeError, AssertionError, ImportError) as error:
        raise DeviceError(
            f"{target!r} was asked for",
            allowed="a device of this machine, such as 'cpu' or 'cuda:0'",
            fix="convert what is needed by itself, such as solution.policy.to(dtype)"
            if isinstance(target, torch.dtype)
            else "use one that torch has been built for",
        ) from error
    return device


def _worst(bound: float) -> float:
    return bound if bound == bound else float("inf")


def _rounding(table: Tensor, event: int) -> Tensor | float:
    """What the last rounding, to the dtype handed out, adds to an error."""
    if table.dtype == torch.float64:
        return 0.0
    largest = table.detach().double().abs().flatten(-event).amax(-1)
    limits = torch.finfo(table.dtype)
    return limits.eps / 2 * torch.clamp(largest, min=limits.smallest_normal)
