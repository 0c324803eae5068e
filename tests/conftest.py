"""Determinism, signals, devices, and the hypothesis profiles."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from cases import DEVICES

# "ci" draws the same examples every time; BIRL_HYPOTHESIS=nightly looks further.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("BIRL_HYPOTHESIS", "ci"))


def pytest_report_header() -> list[str]:
    missing = [] if "cuda" in DEVICES else ["no CUDA device: nothing is tested on one"]
    return [f"devices: {', '.join(DEVICES + missing)}", f"torch: {torch.__version__}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes many gigabytes runs when it is asked for by its marker."""
    if "large" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="takes 10 GB of memory: pytest -m large")
        for item in items:
            if item.get_closest_marker("large"):
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _signals_are_heard() -> Iterator[None]:
    """Here and in child processes, also where the tests run under nohup or behind an `&`."""
    handlers: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    ignored = [n for n in handlers if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, handlers[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the legacy generator is what a stray call would use)
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine in turn."""
    return str(request.param)
