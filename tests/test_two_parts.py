"""The two parts of a hyper-gradient are those of (M16), and the page shows what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import two_parts
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import exact_pair_objective

ROOT = Path(__file__).resolve().parents[1]
DISCOUNT, TEMPERATURE, STEPS = 0.8, 0.4, 3
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def world() -> tuple[two_parts.Preferences, Tensor]:
    """Three states, two actions, moves that cannot be made, and a reward."""
    draws = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 2, 3, generator=draws, dtype=torch.float64)
    logits[0, :, 2] = -torch.inf
    truth, x = torch.randn(2, 3, generator=draws, dtype=torch.float64)
    start = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    own = two_parts.Preferences(
        logits.softmax(-1),
        start,
        truth,
        discount=DISCOUNT,
        temperature=TEMPERATURE,
        steps=STEPS,
    )
    return own, x


def objective(own: two_parts.Preferences, x: Tensor, policy: Tensor | None = None) -> Tensor:
    """φ by the library: every path of states and actions, those that cannot happen too."""
    reward = x[:, None].expand(-1, 2)
    if policy is None:
        policy = birl_ext.solve(
            reward, own.transition, discount=DISCOUNT, temperature=TEMPERATURE
        ).policy
    start = birl_ext.occupancy(
        policy, own.transition, discount=DISCOUNT, initial_distribution=own.start
    )
    mdp = birl_ext.DenseMDP(
        reward, own.transition, DISCOUNT, initial_distribution=start, validate="off"
    )

    def loss(s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
        gap, true_gap = ((r[s1] - r[s2]).sum(-1) for r in (x, own.truth))
        return torch.nn.functional.binary_cross_entropy_with_logits(
            gap, torch.sigmoid(true_gap), reduction="none"
        )

    return exact_pair_objective(mdp, loss, temperature=TEMPERATURE, steps=STEPS, policy=policy)


def test_the_two_parts_are_the_gradient_through_the_solver_and_each_is_its_own() -> None:
    own, x = world()
    found = own.parts(x)
    leaf = x.clone().requires_grad_()
    phi = objective(own, leaf)
    assert found.objective == pytest.approx(float(phi.detach()), rel=1e-12)
    (whole,) = torch.autograd.grad(phi, leaf)
    torch.testing.assert_close(found.direct + found.indirect, whole, rtol=1e-9, atol=1e-12)
    held = objective(own, leaf, own.policy(x))
    (direct,) = torch.autograd.grad(held, leaf)
    torch.testing.assert_close(found.direct, direct, rtol=1e-9, atol=1e-12)
    assert min(float(found.direct.norm()), float(found.indirect.norm())) > 0.01


def test_the_two_parts_are_what_central_differences_say() -> None:
    own, x = world()
    found = own.parts(x)
    policy, step = own.policy(x), 1e-5
    for state, unit in enumerate(step * torch.eye(3, dtype=torch.float64)):
        ahead, back = (own.policy(x + sign * unit) for sign in (1, -1))
        direct = own.objective(x + unit, policy) - own.objective(x - unit, policy)
        indirect = own.objective(x, ahead) - own.objective(x, back)
        visits = (own.visits(ahead) - own.visits(back)) / 2
        assert float(found.direct[state]) == pytest.approx(float(direct) / 2 / step, abs=1e-8)
        assert float(found.indirect[state]) == pytest.approx(float(indirect) / 2 / step, abs=1e-8)
        moved = own.moved(own.visits, x, unit)
        torch.testing.assert_close(moved, visits, rtol=1e-6, atol=1e-12)


def test_no_reward_explains_better_than_the_true_one() -> None:
    own, x = world()
    found = own.parts(own.truth)
    assert found.objective == pytest.approx(found.undecided)
    torch.testing.assert_close(found.direct, torch.zeros(3, dtype=torch.float64))
    assert float(found.indirect.norm()) > 0.01
    assert own.parts(x).objective > own.parts(x).undecided


def test_the_command_draws_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gymnasium")
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    words = ["two_parts.py", "--seeds", "1", "--out", str(file), "--figure", str(picture)]
    monkeypatch.setattr(sys, "argv", [*words, "--updates", "10"])
    threads = torch.get_num_threads()
    try:
        assert two_parts.main() == 0
    finally:
        torch.set_num_threads(threads)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert two_parts.table(report) in printed
    (row,) = report["rows"]
    assert row[two_parts.BOTH]["objective"] < row[two_parts.DIRECT]["objective"]
    assert row[two_parts.DIRECT]["objective"] < row[two_parts.FITTED]["objective"]
    monkeypatch.setattr(sys, "argv", [*words, "--updates", "9"])
    with pytest.raises(SystemExit):
        two_parts.main()
    assert "--updates is 9, allowed: 10 or more" in capsys.readouterr().err


def test_the_table_is_the_one_measured() -> None:
    stored = sorted((ROOT / "benchmarks" / "results").glob("two_parts_*.json"))[-1]
    table = two_parts.table(json.loads(stored.read_text()))
    text = (ROOT / "docs" / "two_parts.md").read_text()
    assert table in text, f"docs/two_parts.md should contain\n\n{table}"
