"""Which device was asked for."""

from __future__ import annotations

import torch

from birl_ext.errors import ConfigError

__all__ = ["check_device"]


def check_device(name: str) -> torch.device:
    """The device of a name, if it is there and can be computed on.

    Raises:
        ConfigError: it is not.
    """
    fix = "use cpu, or what `birl doctor` lists"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}", allowed="cpu, cuda, cuda:1, …", fix=fix)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device is {name!r}: {reason}", fix=fix) from None
