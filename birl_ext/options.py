"""The options of `birl_ext.solve`: their names, ranges and defaults."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any, Literal, NamedTuple, TypedDict

from birl_ext.errors import OptionError
from birl_ext.model import checks
from birl_ext.solution import Method

__all__ = [
    "BACKENDS",
    "METHODS",
    "USUAL",
    "BackendName",
    "MethodName",
    "OnFail",
    "Options",
    "SolveOptions",
    "check_names",
    "check_one_of",
]

MethodName = Literal["auto", "value-iteration", "newton", "newton-krylov", "policy-iteration"]
BackendName = Literal["auto", "torch", "cpu", "cuda"]
OnFail = Literal["raise", "status"]

METHODS: dict[str, Method] = {
    "auto": Method.AUTO,
    "value-iteration": Method.VALUE_ITERATION,
    "newton": Method.NEWTON,
    "newton-krylov": Method.KRYLOV,
    "policy-iteration": Method.POLICY_ITERATION,
}
BACKENDS = ("auto", "torch", "cpu", "cuda")
_AUTO, _FULL = "auto", "full"


class SolveOptions(TypedDict, total=False):
    """What of `birl_ext.solve` does not depend on the problem."""

    method: MethodName
    tol: float | None
    max_iterations: int | None
    on_fail: OnFail
    validate: checks.Level
    backend: BackendName


class Options(NamedTuple):
    """`SolveOptions` that have been checked."""

    method: str = _AUTO
    tol: float | None = None
    max_iterations: int = 0
    on_fail: str = "raise"
    validate: str = _FULL
    backend: str = _AUTO

    @classmethod
    def of(
        cls,
        method: Any = _AUTO,
        tol: Any = None,
        max_iterations: Any = None,
        on_fail: Any = "raise",
        validate: Any = _FULL,
        backend: Any = _AUTO,
    ) -> Options:
        """Options as a caller gives them.

        Raises:
            OptionError: one that is not known, or out of its range.
        """
        usual = method is backend is _AUTO and validate is _FULL and tol is max_iterations is None
        if usual and type(on_fail) is str and on_fail in USUAL:
            return USUAL[on_fail]
        check_one_of("on_fail", on_fail, USUAL)
        check_one_of("method", method, METHODS)
        check_one_of("backend", backend, BACKENDS)
        checks.check_level(validate)
        if tol is not None:
            asked = checks.real(tol)
            if asked is None or not 0 <= asked < math.inf:
                raise OptionError(f"tol is {tol!r}", allowed="0 or more, or None")
            tol = asked
        most = 1.0 if max_iterations is None else checks.real(max_iterations)
        if most is None or not (1 <= most < 2**63 and most.is_integer()):
            raise OptionError(
                f"max_iterations is {max_iterations!r}", allowed="1 or more and whole, or None"
            )
        options = cls(method, tol, int(max_iterations or 0), on_fail, validate, backend)
        return USUAL[on_fail] if options == USUAL[on_fail] else options


# What nearly every call asks for, so that a short way can tell it by identity.
USUAL = {name: Options(on_fail=name) for name in ("raise", "status")}


def check_one_of(option: str, value: Any, names: Collection[str]) -> None:
    """Raise OptionError unless the value of an option is one of its names."""
    if isinstance(value, str) and value in names:
        return
    known = tuple(names)
    near = difflib.get_close_matches(str(value), known, 1)
    raise OptionError(
        f"{option} is {value!r}",
        allowed=", ".join(map(repr, known)),
        fix=f"use {option}={(near or known)[0]!r}",
    )


def check_names(owner: str, given: Iterable[str]) -> None:
    """Raise OptionError unless all are names of options."""
    for name in given:
        if name not in Options._fields:
            near = difflib.get_close_matches(name, Options._fields, 1)
            raise OptionError(
                f"{owner} has no option {name!r}",
                allowed=", ".join(Options._fields),
                fix=f"use {near[0]}" if near else "leave it out",
            )
