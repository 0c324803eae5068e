"""Damaged files are refused, or read as what was written: never as anything else.

``python tests/test_damage.py --changes 4000`` makes that many changes to each kind of file, and
prints what came of them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from birl_ext.errors import BirlError, CheckpointFallbackWarning
from birl_ext.model.mdp import DenseMDP, load
from birl_ext.preferences.answer_log import AnswerLog
from birl_ext.runs.checkpoint import CheckpointStore

KINDS = ("checkpoint", "model", "answers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_was(kind: str) -> None:
    found = trials(kind, 300)
    assert found["different"] == found["raw errors"] == 0, found
    assert found["refused"] > 200, found


def trials(kind: str, changes: int, seed: int = 0) -> Counter[str]:
    """Change one file at a time, somewhere and somehow; count what reading it then gives."""
    generator = random.Random(f"{kind} {seed}")
    hit = Counter(dict.fromkeys(("changes", "refused", "equal", "different", "raw errors"), 0))
    with tempfile.TemporaryDirectory() as folder:
        files, read = {"checkpoint": checkpoint, "model": model, "answers": answers}[kind](
            Path(folder)
        )
        while hit["changes"] < changes:
            path = generator.choice(files)
            whole = path.read_bytes()
            changed = damaged(whole, generator)
            if changed == whole:
                continue
            hit["changes"] += 1
            path.write_bytes(changed)
            try:
                hit["equal" if read() else "different"] += 1
            except (BirlError, CheckpointFallbackWarning):
                hit["refused"] += 1
            except Exception:
                hit["raw errors"] += 1
            path.write_bytes(whole)
    return hit


def damaged(whole: bytes, generator: random.Random) -> bytes:
    """A bit flipped, a byte replaced, a stretch zeroed, something cut off or put in."""
    place = generator.randrange(len(whole))
    how = generator.randrange(5)
    if how == 0:
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        return bytes(changed)
    if how == 1:
        return whole[:place] + generator.randbytes(1) + whole[place + 1 :]
    if how == 2:
        length = min(generator.randrange(1, 64), len(whole) - place)
        return whole[:place] + bytes(length) + whole[place + length :]
    if how == 3:
        return whole[:place]
    return whole[:place] + generator.randbytes(generator.randrange(1, 8)) + whole[place:]


def checkpoint(folder: Path) -> tuple[list[Path], Callable[[], bool]]:
    """One checkpoint; nothing to fall back on."""
    store = CheckpointStore(folder / "checkpoints")
    state: dict[str, Any] = {
        "x": torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        "step": 3,
        "words": ["one", {"two": 2.0}],
    }
    store.save(state, step=3, config={"rate": 0.1}, versions={}, seconds=1.0)

    def read() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = CheckpointStore(store.folder).load({"rate": 0.1})
        same = torch.equal(found.state.pop("x"), state["x"])
        rest = {name: value for name, value in state.items() if name != "x"}
        return same and found.step == 3 and found.state == rest

    return store.paths(), read


def model(folder: Path) -> tuple[list[Path], Callable[[], bool]]:
    """An MDP as .npz."""
    generator = torch.Generator().manual_seed(0)
    transition = torch.rand(5, 3, 5, generator=generator, dtype=torch.float64)
    mdp = DenseMDP(
        torch.rand(5, 3, generator=generator, dtype=torch.float64),
        transition / transition.sum(-1, keepdim=True),
        0.9,
        terminal=torch.arange(5) == 4,
    )
    path = folder / "mdp.npz"
    mdp.save(path)

    def read() -> bool:
        found = load(path)
        pairs: list[tuple[Any, Any]] = [
            (getattr(found, name), getattr(mdp, name))
            for name in ("reward", "transition", "terminal")
        ]
        return bool(found.discount == mdp.discount) and all(torch.equal(a, b) for a, b in pairs)

    return [path], read


def answers(folder: Path) -> tuple[list[Path], Callable[[], bool]]:
    """A log of answers that fill its pages."""
    path = folder / "answers.sqlite"
    given = [{"first": f"{i}" * 60, "label": i % 3 / 2} for i in range(100)]
    with AnswerLog(path) as log:
        for answer in given:
            log.append(answer)

    def read() -> bool:
        with AnswerLog(path) as log:
            return log.answers == given

    return [path], read


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--changes", type=int, default=4000)
    changes = parser.parse_args().changes
    print(json.dumps({kind: trials(kind, changes) for kind in KINDS}))


if __name__ == "__main__":
    main()
