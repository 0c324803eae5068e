"""Layers draw from torch's global generators; here those follow one that a run can store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["global_draws_from"]


@contextmanager
def global_draws_from(
    generator: torch.Generator, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Inside, torch's global generators continue one number drawn from `generator`; afterwards they
    are as before.

    Args:
        generator: on the CPU; advances by one draw.
        device: whose global generator follows, besides the CPU's.
    """
    device = torch.device(device)
    seed = int(torch.randint(2**62, (), generator=generator))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield
