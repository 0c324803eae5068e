"""The first random problems; `run.py` looks at any others, with figures."""

from __future__ import annotations

import draw
import numpy as np
import pytest
from run import COMMAND, checked

SEEDS, BLOCK = 1100, 25  # 2,084 problems: a seed is a batch, of which three at most are judged


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_problems_keep_every_promise(first: int) -> None:
    failed = []
    for seed in range(first, first + BLOCK):
        outcome, _ = checked(seed)
        for kind, words in outcome.failures:
            failed.append(f"{kind}: {words}\n  {draw.draw(seed)}\n  {COMMAND} --seeds {seed}")
    assert not failed, "\n".join(failed)


def test_a_seed_is_the_same_problem_everywhere() -> None:
    for seed in range(20):
        one, other = draw.draw(seed), draw.draw(seed)
        assert str(one) == str(other)
        assert all(np.array_equal(one.arrays[k], other.arrays[k]) for k in one.arrays)


def test_every_option_is_drawn() -> None:
    drawn = [draw.draw(seed) for seed in range(SEEDS)]
    traits = set().union(*(one.traits for one in drawn))
    assert {"mask", "terminal", "reference", "tiny reference", "shared", "penalty"} <= traits
    assert {"unreachable pay", "wild start", "warm", "subnormal τ", "closed", "narrow"} <= traits
    assert {one.chain for one in drawn} == set(draw.CHAINS)
    assert {one.options["method"] for one in drawn} == set(draw.METHODS)
    assert {one.form for one in drawn} == {"tensors", "dense", "sparse"}
    assert min(float(one.arrays["gap"].min()) for one in drawn) < 1e-11
    assert max(one.states for one in drawn) > 50
