"""What the settings of all problems are checked for alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin, get_type_hints

from birl_ext.errors import ConfigError
from birl_ext.runs.config import suggestion

__all__ = ["check_settings"]

_MOST_SEED = 2**64 - 1  # what a torch.Generator takes; gymnasium and NumPy take any from 0


def check_settings(config: Any, *, infinite: Collection[str] = ()) -> None:
    """Refuse choices that are none, numbers that are not finite, and seeds out of range.

    Args:
        config: a dataclass with a field `seed`, of which fields annotated as `Literal` are choices.
        infinite: the settings that may be an infinity.

    Raises:
        ConfigError: a setting is not what it may be.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = [str(choice) for choice in get_args(hint)]
            raise ConfigError(
                f"{field.name} is {value!r}",
                allowed=", ".join(choices),
                fix=suggestion(str(value), choices),
            )
        if isinstance(value, float) and not math.isfinite(value):
            if field.name not in infinite:
                raise ConfigError(f"{field.name} is {value!r}", allowed="finite numbers")
            if math.isnan(value):
                raise ConfigError(f"{field.name} is nan", allowed="numbers, inf among them")
    if not 0 <= config.seed <= _MOST_SEED:
        raise ConfigError(f"seed is {config.seed!r}", allowed="0 to 2⁶⁴ − 1")
