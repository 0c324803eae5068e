"""What must hold of every problem that can be drawn, and how far each of it is from not holding.

`check(seed)` draws a problem, solves it with every backend, and compares with `oracle.exact`:

- `check_values`: value, q, advantage, policy and log policy within their certified bounds, whatever
  the status; a status that is true; nothing looser than rounding explains.
- `check_batches`: an element of a batch is the same alone, bit for bit from compiled code; no
  cotangent from behind a mask goes anywhere; threads, and what on_fail says, change no bit; the
  backends certify one sweep alike.
- `check_gradients` (tame problems): derivatives along a random line, first and second.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import draw
import numpy as np
import torch
from draw import Drawn, Index
from oracle import exact

import birl_ext
from birl_ext.errors import IllConditionedWarning, TerminalChoiceWarning
from birl_ext.ops.backends import loader
from birl_ext.solution import Solution

BACKENDS = ["torch"] if loader.reason("cpu") else ["cpu", "torch"]
TABLES = ("value", "q", "advantage", "policy", "log_policy")
SHOWN = 3  # elements of a batch that are compared with the oracle
TORCH_PASSES = 300  # of a method that makes many: one takes the PyTorch backend a millisecond


@dataclass
class Judged:
    """What one seed showed.

    Attributes:
        failures: kind and words.
        tried: how many times each kind of promise was put to the test.
        worst: the largest ratio of an error to what is allowed, by kind.
        counts: of what was drawn and how solves ended.
    """

    seed: int
    failures: list[tuple[str, str]] = field(default_factory=list)
    tried: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def expect(self, kind: str, kept: bool, words: str) -> None:
        """A promise that is kept or not."""
        self.tried[kind] += 1
        if not kept:
            self.failures.append((kind, words))

    def hold(self, kind: str, error: float, bound: float, words: str) -> None:
        """A promise that error ≤ bound; NaN breaks it."""
        error, bound = float(error), float(bound)
        if math.isnan(error) or not bound >= 0:
            ratio = math.inf
        elif error == 0 or math.isinf(bound):
            ratio = 0.0
        else:
            ratio = error / bound if bound > 0 else math.inf
        self.worst[kind] = max(ratio, self.worst.get(kind, 0.0))
        self.expect(kind, ratio <= 1, f"{words}: error {error:.3g}, allowed {bound:.3g}")


class Scene(NamedTuple):
    """What the checks of one seed and backend have in common.

    `shown` are the batch indices that are compared, `models` and `truths` the oracle's views;
    `memory` is what one backend leaves to the next.
    """

    drawn: Drawn
    backend: str
    shown: list[Index]
    models: dict[Index, exact.Model]
    truths: dict[Index, exact.Answer]
    rng: np.random.Generator
    outcome: Judged
    memory: dict[str, Any]

    @property
    def where(self) -> str:
        """Backend and dtype."""
        return f"{self.backend} {'f32' if self.drawn.dtype == torch.float32 else 'f64'}"


Check = Callable[[Scene], None]


def check(seed: int) -> Judged:
    """Draw, solve, compare."""
    import check_batches
    import check_gradients
    import check_values

    drawn, outcome = draw.draw(seed), Judged(seed)
    rng = np.random.default_rng([seed, 1])
    indices = drawn.indices()
    for trait in ("tame" if drawn.tame else "wild", drawn.chain, drawn.form, *drawn.traits):
        outcome.counts[f"kind {trait}"] += 1
    shown = [indices[i] for i in rng.permutation(len(indices))[:SHOWN]]
    outcome.counts["problems"] += len(shown)
    models = {index: model(drawn, index) for index in shown}
    truths = {index: exact.solve(one) for index, one in models.items()}
    memory: dict[str, Any] = {}
    part = seed % 10
    checks: list[tuple[str, Check, bool]] = [
        ("values", check_values.values, True),
        ("company", check_batches.company, bool(drawn.batch)),
        ("masks", check_batches.masks, "mask" in drawn.arrays),
        ("threads", check_batches.threads, part == 0),
        ("certificates", check_batches.certificates, part in (1, 2)),
        ("raising", check_batches.raising, part in (3, 4)),
        ("gradients", check_gradients.gradients, drawn.tame),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
        for kind in (IllConditionedWarning, TerminalChoiceWarning):
            warnings.simplefilter("ignore", kind)
        for backend in BACKENDS:
            scene = Scene(drawn, backend, shown, models, truths, rng, outcome, memory)
            for name, look, wanted in checks:
                if not wanted:
                    continue
                try:
                    look(scene)
                except Exception as error:
                    words = f"{type(error).__name__}: {error}"
                    outcome.expect(f"{name} raised {backend}", False, words)
    return outcome


def model(drawn: Drawn, index: Index) -> exact.Model:
    """The oracle's view of one element."""
    own = drawn.element(index)
    options = {k: own[k] for k in ("mask", "terminal", "reference") if k in own}
    return exact.Model.of(
        own["reward"],
        own["transition"],
        discount=float(own["discount"]),
        temperature=float(own["temperature"]),
        **options,
    )


def solved(
    drawn: Drawn, backend: str, given: dict[str, Any] | None = None, **changes: Any
) -> Solution:
    """`birl_ext.solve` of a batch, of the drawn tensors or of others in their place.

    Every other seed says "auto" for "cpu", which for plain calls is another way to the same bits.
    """
    arguments, keywords = draw.problem(drawn, draw.tensors(drawn) if given is None else given)
    options: dict[str, Any]
    options = {k: v for k, v in drawn.options.items() if k != "validate"} | changes
    if limited(drawn, backend):
        options["max_iterations"] = min(options["max_iterations"] or TORCH_PASSES, TORCH_PASSES)
    name = "auto" if backend == "cpu" and drawn.seed % 2 else backend
    options = {"on_fail": "status", "backend": name} | options
    return birl_ext.solve(*arguments, **(keywords | options))


def limited(drawn: Drawn, backend: str) -> bool:
    """Whether the number of passes is: by what was drawn, or on the slow backend."""
    slow = drawn.options["method"] in ("value-iteration", "policy-iteration")
    return drawn.options["max_iterations"] is not None or (slow and backend == "torch")
