"""Configurations: frozen dataclasses to plain values and back, and the files that hold them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import os
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from birl_ext.errors import ConfigError, MissingDependencyError, suggestion
from birl_ext.files import replacing

__all__ = ["differences", "from_plain", "places", "read_toml", "to_plain", "write_toml"]

_T = TypeVar("_T")

MAX_BYTES = 1 << 20
MAX_DEPTH = 20


def to_plain(config: Any, *, where: str = "config") -> dict[str, Any]:
    """A config dataclass as what TOML holds; None is left out, tuples become lists.

    Raises:
        ConfigError: a value has no form in TOML; names the place.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return dict(_plain(fields, where))


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_plain(value, where=where)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        items = ((key, item) for key, item in value.items() if item is not None)
        return {key: _plain(item, f"{where}.{key}") for key, item in items}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (int, float, str)):
        return value
    raise ConfigError(
        f"a value of type {type(value).__name__} has no form in TOML",
        where=where,
        allowed="bool, int, float, str, lists and dicts of them",
        fix="store it as a string or a number",
    )


def from_plain(
    cls: type[_T], plain: Mapping[str, Any], *, where: str = "config", check: bool = True
) -> _T:
    """Build a config from plain values, strictly.

    Args:
        cls: the dataclass.
        plain: what a TOML table or a JSON object holds; a field left out takes its default.
        where: the place named in errors.
        check: whether the class checks the values, in its `__post_init__`. Without, some may be
            replaced first; one that is left out must have a default, or is None.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, a wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in plain:
        if key not in fields:
            raise ConfigError(
                f"unknown key {key!r}",
                where=where,
                allowed=", ".join(fields),
                fix=suggestion(key, fields) or "remove it",
            )
    values = {key: _typed(hints[key], value, f"{where}.{key}") for key, value in plain.items()}
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not optional:
            if not _accepts_none(hints[name]):
                raise ConfigError(f"the key {name!r} is missing", where=where, fix=f"add {name}")
            values[name] = None  # TOML cannot write None, so its absence means None
    if check:
        return cls(**values)
    made = object.__new__(cls)
    for name, field in fields.items():
        if name not in values and field.default_factory is not dataclasses.MISSING:
            values[name] = field.default_factory()
        object.__setattr__(made, name, values.get(name, field.default))
    return made


def _accepts_none(hint: Any) -> bool:
    return hint is Any or hint is type(None) or type(None) in typing.get_args(hint)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotated type, or raise; only int -> float is converted silently."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _typed(arguments[0], value, where)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return _typed(choice, value, where)
            except ConfigError:
                continue
    elif origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value in hint.__members__:
            return hint[value]
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return from_plain(hint, value, where=where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        each = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(each) == len(value):
            return tuple(
                _typed(h, v, f"{where}[{i}]")
                for i, (h, v) in enumerate(zip(each, value, strict=True))
            )
    elif origin is list and isinstance(value, (list, tuple)):
        return [_typed(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, Mapping):
        return {key: _typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint in (bool, int, str, type(None)) and type(value) is hint:
        return value
    raise ConfigError(
        f"{value!r} is not accepted",
        where=where,
        allowed=_describe(hint),
        fix="correct the value",
    )


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(repr, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ", ".join(hint.__members__)
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def places(config: Any) -> tuple[str, ...]:
    """Settings that only say where files are, which may move: the class's `PLACES`, if it has any.

    A run may be resumed with others.
    """
    return getattr(config, "PLACES", ())


def differences(
    stored: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    prefix: str = "",
    without: Collection[str] = (),
) -> list[str]:
    """Name every value in which two plain configs differ: ``discount: stored 0.9, given 0.99``.

    Args:
        without: keys that are not looked at.
    """
    found = []
    for key in dict.fromkeys([*stored, *given]):
        if key in without:
            continue
        old, new = stored.get(key), given.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, prefix=f"{prefix}{key}.")
        elif not _same(old, new):
            show = [repr(value) if value is not None else "absent" for value in (old, new)]
            found.append(f"{prefix}{key}: stored {show[0]}, given {show[1]}")
    return found


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new):
        return True
    return isinstance(old, bool) == isinstance(new, bool) and bool(old == new)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of bounded size and depth.

    Raises:
        ConfigError: not readable, larger than 1 MiB, deeper than 20 tables, or not TOML.
    """
    refused = functools.partial(ConfigError, where=str(path))
    too_deep = refused(
        "the configuration is nested too deeply", allowed=f"{MAX_DEPTH} levels", fix="flatten it"
    )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            allowed, fix = f"{MAX_BYTES} bytes", "name a TOML file written for a run"
            raise refused("the configuration is too large", allowed=allowed, fix=fix)
        document = tomllib.loads(data.decode("utf-8"))
        if _depth(document) > MAX_DEPTH:
            raise too_deep
    except OSError as error:
        what, fix = f"cannot read the configuration: {error.strerror}", "name an existing TOML file"
        raise refused(what, fix=fix) from None
    except RecursionError:
        raise too_deep from None
    except ConfigError:
        raise
    except ValueError as error:  # bad UTF-8, bad TOML, numbers without end
        raise refused(f"not a TOML file: {error}", fix="correct the line named") from None
    return document


def write_toml(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file for `read_toml`, whole or not at all.

    Raises:
        MissingDependencyError: tomli-w is not installed.
    """
    try:
        import tomli_w
    except ImportError:
        raise MissingDependencyError(
            "a new run directory needs tomli-w", fix='pip install "birl_ext[cli]"'
        ) from None
    with replacing(path) as draft:
        draft.write_text(tomli_w.dumps(document), "utf-8", newline="\n")


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
