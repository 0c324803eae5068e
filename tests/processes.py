"""Child processes for tests that kill them, and what their states are compared by."""

from __future__ import annotations

import hashlib
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child that shares what is imported; return its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's idle threads
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # never back into pytest


def digest(state: Any) -> str:
    """Of every bit of a state, times apart."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if key != "seconds":
                    total.update(f"{key}:".encode())
                    add(item)
        elif isinstance(value, (list, tuple)):
            total.update(f"{len(value)} items".encode())
            for item in value:
                add(item)
        else:
            total.update(repr(value).encode())

    add(state)
    return total.hexdigest()
