"""Write TOML; the standard library only reads it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from birl_ext.errors import ConfigError

__all__ = ["dumps"]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dumps(document: Mapping[str, Any]) -> str:
    """Write plain values as TOML 1.0, so that ``tomllib.loads(dumps(d)) == d``.

    Args:
        document: str keys; values are bool, int, float, str, lists or tuples of values, and dicts.
            None has no form in TOML: such keys of a dict are left out.

    Returns:
        The text: plain keys first, then one ``[table]`` per nested dict, in the order given.

    Raises:
        ConfigError: a value has no TOML form.
    """
    return "\n".join(_table(document, ())).lstrip("\n") + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    # Plain keys must precede the sub-tables: after a [header], every key belongs to it.
    lines = [
        f"{_key(key)} = {_value(value, (*path, key))}"
        for key, value in table.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    for key, value in table.items():
        if isinstance(value, Mapping):
            below = (*path, key)
            lines += ["", f"[{'.'.join(map(_key, below))}]", *_table(value, below)]
    return lines


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are a subset of TOML's; TOML forbids a raw DEL as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)  # inf, -inf and nan are TOML
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(_value(item, path) for item in value)}]"
    if isinstance(value, Mapping):  # inside a list: an inline table
        items = (f"{_key(k)} = {_value(v, (*path, k))}" for k, v in value.items() if v is not None)
        return f"{{{', '.join(items)}}}"
    raise ConfigError(
        f"a value of type {type(value).__name__} has no TOML form",
        where=".".join(path),
        allowed="bool, int, float, str, lists and dicts of them",
        fix="store it as a string or a number",
    )
