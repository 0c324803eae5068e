"""The outer step of HPGD on Four Rooms by its authors' own code, from a checkout of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["SCRIPT", "outer_step"]

SCRIPT = "train_stochastic_bilevel_opt"
SETTINGS = "data/experiment_reg_lambda_0_003/config.yaml"


def outer_step(
    checkout: Path, temperature: float, kappa: float, rate: float
) -> Callable[[Any, Any], tuple[Any, Any, Any]]:
    """(key, w) → w after a step, ∇φ̂ and what the step reports; not compiled.

    Its settings of λ = 0.003, on-policy, but λ, κ and the rate as given. The gradient is read off
    w, so its norm is cut to a number that it never reaches.
    """
    import jax

    sys.path.insert(0, str(checkout))
    script = importlib.import_module(SCRIPT)
    config = importlib.import_module("yaml").safe_load((checkout / SETTINGS).read_text())
    config["upper_optimisation"] |= {
        "incentive_reg_param": kappa,
        "learning_rate": rate,
        "max_grad_norm": 1e9,
        "advantage_gradient_sampling": "on_policy",
    }
    environment, setting, state, _ = script.environment_setup(jax.random.PRNGKey(0), config)
    update = script.create_update_step(environment, config)

    def step(key: Any, w: Any) -> tuple[Any, Any, Any]:
        own = {"params": {"weights": w}}
        carry = key, setting.replace(incentive_params=own), state.replace(params=own)
        (_, _, after), told = update(carry, temperature)
        found = after.params["params"]["weights"]
        return found, (w - found) / rate, told

    return step
