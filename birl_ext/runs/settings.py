"""What the settings of all problems are checked for alike."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from birl_ext.errors import ConfigError, suggestion

__all__ = ["check_settings"]

_MOST = 2**53  # the next integer is no float
_SEEDS = 2**64  # what a torch.Generator takes; gymnasium and NumPy take any from 0


def check_settings(
    config: Any,
    *,
    least: Mapping[str, float] = {},
    above: Mapping[str, float] = {},
    most: Mapping[str, float] = {},
    below: Mapping[str, float] = {},
    infinite: Collection[str] = (),
) -> None:
    """Refuse choices that are none, and numbers that are not finite or out of their range.

    Args:
        config: a dataclass with a field `seed`, of which fields annotated as `Literal` are choices,
            or tuples of them.
        least, above, most, below: setting → the bound it must meet, or must not reach. A setting
            that is None is not looked at.
        infinite: the settings that may be an infinity.

    Raises:
        ConfigError: a setting is not what it may be.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        options = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        choices = [str(choice) for option in options for choice in get_args(option)]
        for chosen in value if isinstance(value, tuple) else (value,):
            if choices and chosen is not None and chosen not in choices:
                raise ConfigError(
                    f"{field.name} is {chosen!r}",
                    allowed=", ".join(choices),
                    fix=suggestion(str(chosen), choices),
                )
        if isinstance(value, float) and not _sound(value, field.name in infinite):
            allowed = "finite numbers, 0 or 1e-100 to 1e100 in size: others overflow in products"
            if field.name in infinite:
                allowed = "numbers, inf among them"
            raise ConfigError(f"{field.name} is {value!r}", allowed=allowed)
        if isinstance(value, int) and abs(value) > _MOST and field.name != "seed":
            raise ConfigError(f"{field.name} is {value!r}", allowed="integers up to 2⁵³ in size")
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{field.name} is {value!r}", allowed="text in UTF-8") from None
    if not 0 <= config.seed < _SEEDS:
        raise ConfigError(f"seed is {config.seed!r}", allowed="0 to 2⁶⁴ − 1")
    for bounds, words, met in (
        (least, "{} or more", operator.ge),
        (above, "more than {}", operator.gt),
        (most, "{} or less", operator.le),
        (below, "less than {}", operator.lt),
    ):
        for name, bound in bounds.items():
            value = getattr(config, name)
            if value is not None and not met(value, bound):
                raise ConfigError(f"{name} is {value!r}", allowed=words.format(bound))


def _sound(value: float, infinite: bool) -> bool:
    return not math.isnan(value) if infinite else value == 0 or 1e-100 <= abs(value) <= 1e100
