"""Small preference runs, for the tests of what can go wrong with long ones."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "rounds": 4,
    "environment_steps": 120,
    "environments": 2,
    "update_every": 8,
    "burst": 1,
    "batch_size": 16,
    "hidden": (16,),
    "labels": 40,
    "initial_labels": 20,
    "fragment": 8,
    "initial_epochs": 3,
    "reward_steps": 3,
    "horizon": 3,
    "evaluation_episodes": 2,
    "evaluate_every": 2,
}

TIMED = (
    "share_environment",
    "share_update",
    "share_reward",
    "environment_steps_per_second",
    "updates_per_second",
)
"""Metrics that differ from one run to the next."""


def make_job(**changes: Any) -> Any:
    from birl_ext.problems.preference.config import PreferenceConfig
    from birl_ext.problems.preference.job import PreferenceJob

    return PreferenceJob(PreferenceConfig(**{**SMALL, **changes}))
