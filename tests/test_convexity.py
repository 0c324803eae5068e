"""The page on convexity shows what its script measures, and the script measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import convexity
import pytest
import torch
from closeness import assert_close

import birl_ext

ROOT = Path(__file__).resolve().parents[1]
FLOAT = torch.float64


def test_the_table_is_the_one_measured() -> None:
    stored = sorted((ROOT / "benchmarks" / "results").glob("convexity_*.json"))[-1]
    page = (ROOT / "docs" / "convexity.md").read_text()
    assert convexity.table(json.loads(stored.read_text())) in page


def test_the_closed_form_is_the_return_of_the_mdp() -> None:
    """By the policy that the layer finds, and against the value that it gives."""
    xs = torch.linspace(0.2, 2.0, 7, dtype=FLOAT)
    solution = birl_ext.solve(convexity.lower(xs.unsqueeze(-1)), temperature=convexity.TAU)
    theta = convexity.best(xs)
    assert_close(convexity.returned(theta, xs), solution.value[:, 0], bound=1e-10, label="J")
    assert_close(
        convexity.found(theta, xs), convexity.phi(xs), bound=1e-10, label="φ in the logits"
    )


def test_the_mixture_is_worse_than_both() -> None:

    def worth(chance: float) -> float:
        one = torch.ones((), dtype=FLOAT)
        return float(convexity.worth(chance * one, chance * one, one))

    assert worth(0.8 * 0.02 + 0.2 * 0.98) < min(worth(0.02), worth(0.98))


def test_only_the_damped_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convexity, "STEPS", (100,))
    report = convexity.measured(9)
    ours, *others = report["methods"]
    assert ours["largest"] < 1e-8
    for one in others:
        if one["steps"] == "exact" and not one["damping"]:
            assert one["largest"] < 1e-8  # the implicit function theorem holds at the top
            assert 0 < one["curvature"] < 1e-6
        elif one["steps"] == "exact":
            assert one["largest"] > 0.02
        else:
            assert one["largest"] > 0.5
            assert one["indefinite"] > 0.3
