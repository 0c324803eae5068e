"""What every algorithm refuses, by name and value, before the upper-level variable is touched.

Whether an objective depends on x is a question to the graph of autograd, never to the value of a
gradient: zero is what a stationary point has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from birl_ext.bilevel.variables import Variables, held, leaves, named, require_finite
from birl_ext.errors import (
    BirlError,
    GradientError,
    NonFiniteResultError,
    OptionError,
)
from birl_ext.model.checks import (
    check_callable,
    check_count,
    check_kind,
    check_number,
    check_seed,
    kind_of,
)
from birl_ext.model.mdp import DenseMDP, SparseMDP

__all__ = [
    "check_callable",
    "check_count",
    "check_gradient",
    "check_kind",
    "check_lower",
    "check_number",
    "check_objective",
    "check_seed",
    "make_optimiser",
    "no_path",
    "reaches",
    "take_step",
]

_T = TypeVar("_T", bound=Tensor)
_HUGE = 1e15  # ‖x‖ at which 1 is rounding: no error there is about the levels alone


# An optimiser


def make_optimiser(
    optimiser: Callable[[Iterable[_T]], Optimizer], parameters: Sequence[_T]
) -> Optimizer:
    """What `optimiser` makes of the parameters, if it will move them."""
    allowed = "a function from parameters to a torch.optim.Optimizer over them"
    fix = "pass e.g. optimiser=lambda p: torch.optim.Adam(p, lr=1e-2)"
    if not callable(optimiser):
        raise OptionError(f"optimiser is {kind_of(optimiser)}", allowed=allowed, fix=fix)
    try:
        made = optimiser(parameters)
    except BirlError:
        raise
    except Exception as error:
        what = f"optimiser raised {_sentence(error)}"
        raise OptionError(what, allowed=allowed, fix=fix) from error
    if not isinstance(made, Optimizer):
        raise OptionError(f"optimiser returned {kind_of(made)}", allowed=allowed, fix=fix)
    _require_held(made, parameters)
    return made


def _require_held(optimiser: Optimizer, parameters: Sequence[Tensor]) -> None:
    ours = {id(parameter) for parameter in parameters}
    if not any(id(part) in ours for group in optimiser.param_groups for part in group["params"]):
        raise OptionError(
            f"the {type(optimiser).__name__} of `optimiser` steps other tensors than it was given",
            allowed="the parameters themselves, not copies of them",
            fix="pass e.g. optimiser=lambda p: torch.optim.Adam(p, lr=1e-2)",
        )


# A step


def take_step(
    optimiser: Optimizer,
    x: Variables,
    closure: Callable[[], float],
    step: int,
) -> None:
    """One step of the optimiser; after any error x is to the bit what it was, buffers of a module
    and gradients included, and the optimiser is too.

    Args:
        optimiser: over the leaves of x.
        x: its tensors are changed in place.
        closure: sets their gradients and returns φ; may be asked several times.
        step: steps taken before this one.
    """
    parameters = held(x)
    _require_held(optimiser, parameters)
    before = [(part, part.detach().clone(), part.grad) for part in parameters]
    state = {part: copy.deepcopy(kept) for part, kept in optimiser.state.items()}
    groups = [dict(group) for group in optimiser.param_groups]
    name = f"the {type(optimiser).__name__} of `optimiser`"
    asked, ours = 0, False

    def watched() -> float:
        nonlocal asked, ours
        asked, ours = asked + 1, True
        try:
            objective = closure()
        except BirlError as error:
            norms = (float(leaf.detach().double().norm()) for leaf in leaves(x))
            size = max(norms, default=0.0)
            if (step or asked > 1) and size > _HUGE:
                raise NonFiniteResultError(
                    f"steps of {name} have made ‖x‖ {size:.3g}, and there: {error.what}",
                    where=error.where,
                    fix="lower the learning rate",
                ) from error
            raise
        ours = False
        return objective

    try:
        try:
            optimiser.step(watched)
        except Exception as error:
            if ours or isinstance(error, BirlError):
                raise
            raise OptionError(
                f"{name} raised {_sentence(error)}",
                allowed="an optimiser whose step takes a closure",
            ) from error
        if not asked:
            raise OptionError(
                f"{name} did not ask for a gradient",
                allowed="an optimiser whose step calls its closure",
                fix="call the closure in `step`, under torch.enable_grad()",
            )
        for which, leaf in named(x).items():
            require_finite(
                leaf,
                f"after a step of {name} {which}",
                NonFiniteResultError,
                fix="lower the learning rate",
            )
    except BaseException:
        with torch.no_grad():
            for part, was, gradient in before:
                part.copy_(was)
                part.grad = gradient
        optimiser.state.clear()
        optimiser.state.update(state)
        for group, kept in zip(optimiser.param_groups, groups, strict=True):
            group.update(kept)
        raise


# Levels


def check_objective(objective: Tensor, step: int | None = None, upper: str = "upper") -> None:
    """Refuse a φ, scalar or one per start, that is not finite; `upper` is its function's name."""
    require_finite(
        objective,
        f"the objective that `{upper}` returned",
        GradientError,
        where=_outer(step),
        allowed="finite numbers",
        fix=f"look in `{upper}` for a root, logarithm or quotient outside its domain at this x",
    )


def check_gradient(
    gradient: Tensor,
    step: int | None = None,
    name: str = "the hyper-gradient",
    *,
    levels: str = "`upper` or `lower`",
    published: bool = False,
) -> None:
    """Refuse a hyper-gradient that is not finite, or whose norm is not.

    Args:
        gradient: any shape.
        step: the outer step.
        name: what it is.
        levels: the functions that it is made of.
        published: whether `adjoint_rate` took part in it.
    """
    remedies = [f"look for an infinite slope in {levels}", "raise the temperature"]
    fix = ", or ".join([*remedies, "lower `adjoint_rate`"] if published else remedies)
    norm = gradient.detach().double().norm()
    if math.isfinite(norm):
        return
    for what, tensor in ((name, gradient), (f"the norm of {name}", norm)):
        require_finite(
            tensor,
            what,
            GradientError,
            where=_outer(step),
            allowed="finite numbers",
            fix=fix,
        )


def check_lower(
    made: DenseMDP | SparseMDP | Iterable[Any],
    x: Variables,
    lower: str = "`lower`",
    parts: str = "reward, transition, reference or discount",
) -> None:
    """Refuse a lower level none of whose tensors depends on x; `lower` names its functions."""
    if isinstance(made, (DenseMDP, SparseMDP)):  # whose policy is the same wherever it starts
        made = [part for name, part in vars(made).items() if name != "initial_distribution"]
    if not reaches(made, *leaves(x)):
        raise GradientError(
            f"the lower level does not depend on x: no tensor of what {lower} returned leads to it",
            allowed=f"a {parts} made from x by torch",
            fix=f"compute it from the x that {lower} is given, without detach, no_grad or NumPy",
        )


def no_path(name: str = "x") -> GradientError:
    """The error of an objective that does not depend on a leaf of x."""
    leave = (
        "" if name == "x" else f", or leave {name} out of x, by requires_grad_(False) in a module"
    )
    return GradientError(
        f"the objective does not depend on {name}, neither directly nor through the solution",
        allowed="a φ made from x or from the Solution by torch",
        fix="compute it from what `upper` is given, without detach, no_grad, NumPy or argmax"
        + leave,
    )


def reaches(tensors: Iterable[Any], *of: Tensor) -> bool:
    """Whether the graph of any of the tensors leads to any of the leaves."""
    targets = {id(leaf) for leaf in of}
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if any(id(tensor) in targets for tensor in found):
        return True
    pending = [tensor.grad_fn for tensor in found if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if id(getattr(node, "variable", None)) in targets:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return False


def _outer(step: int | None) -> str:
    return "" if step is None else f"outer step {step}"


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).rstrip('.')}"
