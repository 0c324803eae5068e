"""A tiny problem for the tests of runs: noisy least squares; also a ``birl`` that knows it.

``python tests/fake_problem.py run fake …`` is the command line with this problem alone registered.
"""

import sys
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import birl_ext
from birl_ext.runs.job import Problem


@dataclass(frozen=True)
class FakeConfig:
    """Noisy least squares."""

    steps: int = 20
    """Outer steps."""

    size: int = 5
    """Unknowns."""

    rate: float = 0.05
    """Step size."""

    noise: Literal["gaussian", "none"] = "gaussian"
    """Noise of the gradient."""

    pause: float = 0.0
    """Seconds to sleep in each step."""

    fail_at: int = -1
    """Step that raises a SolveError."""

    seed: int = 0
    """Seed of the target and of the noise."""

    def __post_init__(self) -> None:
        from birl_ext.errors import ConfigError

        if self.size > 100 and self.rate > 1:
            raise ConfigError(f"size is {self.size}", allowed="up to 100, or a rate of up to 1")


class FakeJob:
    """Adam on ½‖x − target‖² with noise from its own generator."""

    def __init__(self, config: FakeConfig) -> None:
        import torch

        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.target = torch.randn(config.size, generator=self.generator, dtype=torch.float64)
        self.x = torch.zeros(config.size, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.x], lr=config.rate)
        self.taken = 0

    @property
    def total_steps(self) -> int:
        return self.config.steps

    @property
    def done(self) -> bool:
        return self.taken >= self.config.steps

    def step(self) -> dict[str, float]:
        import torch

        from birl_ext.errors import NotConvergedError

        if self.taken == self.config.fail_at:
            raise NotConvergedError("the solver did not converge")
        time.sleep(self.config.pause)
        noise = torch.randn(self.x.shape, generator=self.generator, dtype=torch.float64)
        gradient = self.x.detach() - self.target
        self.x.grad = gradient + (0.1 * noise if self.config.noise == "gaussian" else 0)
        self.optimizer.step()
        self.taken += 1
        return {"objective": 0.5 * float(gradient @ gradient), "gradient": float(gradient.norm())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "taken": self.taken,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.x.data.copy_(state["x"])
        self.taken = state["taken"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def summary(self) -> dict[str, Any]:
        gradient = self.x.detach() - self.target
        return {
            "parameters": self.x.detach(),
            "objective": 0.5 * float(gradient @ gradient),
            "gradient_norm": float(gradient.norm()),
            "error_bound": float("inf"),
        }

    def figures(self, history: Any, summary: Any) -> dict[str, Any]:
        def objective() -> Any:
            from birl_ext.runs.plots import learning_curve

            return learning_curve(
                history,
                ["objective"],
                title="Noisy least squares",
                log=True,
                references={"at the end": summary["objective"]},
            )

        def both() -> Any:
            from birl_ext.runs.plots import learning_curve

            return learning_curve(history, ["objective", "gradient"], ylabel="metric")

        return {"objective": objective, "both": both}


PROBLEM = Problem(FakeConfig, FakeJob, "noisy least squares")


def main() -> int:
    problems: Any = types.ModuleType("birl_ext.problems")
    problems.PROBLEMS = {"fake": PROBLEM}
    problems.__path__ = [str(Path(birl_ext.__file__).parent / "problems")]
    sys.modules["birl_ext.problems"] = problems
    from birl_ext import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
