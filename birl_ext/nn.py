"""Modules: thin, holding settings and parameters only; the mathematics is in `functional`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from birl_ext.errors import OptionError, TemperatureError
from birl_ext.functional import solve
from birl_ext.solution import Solution

__all__ = ["SoftPlanner"]


class SoftPlanner(nn.Module):
    """A planner as a layer: rewards (and dynamics) in, the soft-optimal policy out, gradients back.

        π(a|s) ∝ μ(a|s) exp(Q*(s,a)/τ)

    Args:
        discount: γ in [0, 1), per step.
        temperature: τ > 0, units of reward: its value, or its start if it is learned.
        transition: P, (*B, S, A, S), kept as a buffer; None: given at each call.
        learn_temperature: make log τ a parameter.
        options: further keyword arguments of `birl_ext.solve`, such as mask, terminal, method, tol.

    Shapes: reward (*B, S, A) → Solution with value (*B, S) and policy (*B, S, A).

    Converted to another dtype, log τ stays float64 and P is never narrower than float32; a widened
    P is divided by its row sums, as by `DenseMDP.to`.

    Gradients: reward, transition, temperature; see `birl_ext.solve`.
    """

    log_temperature: Tensor
    transition: Tensor | None

    def __init__(
        self,
        *,
        discount: float,
        temperature: float,
        transition: Tensor | None = None,
        learn_temperature: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise TemperatureError(f"temperature is {temperature!r}", allowed="(0, inf)")
        self.discount = discount
        self.options = options
        start = torch.tensor(math.log(temperature), dtype=torch.float64)
        if learn_temperature:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start)
        self.register_buffer("transition", transition)

    def forward(self, reward: Tensor, transition: Tensor | None = None) -> Solution:
        """Solve for rewards (*B, S, A); a transition given here takes the place of the buffer."""
        given = self.transition if transition is None else transition
        if given is None:
            raise OptionError(
                "SoftPlanner has no transition",
                allowed="a tensor (*B, S, A, S)",
                fix="pass transition to the module or to the call",
            )
        return solve(
            reward,
            given,
            discount=self.discount,
            temperature=self.log_temperature.exp(),
            **self.options,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftPlanner:
        exact, rows = (self.log_temperature, self.log_temperature.grad), self.transition

        def convert(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if any(tensor is one for one in exact):
                return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved
            if tensor is not rows or moved.dtype == tensor.dtype:
                return moved
            if moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device, torch.float32)
            if moved.dtype.itemsize > tensor.dtype.itemsize:
                total = moved.sum(-1, keepdim=True)
                return moved / torch.where(total == 0, 1.0, total)
            return moved

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        temperature = float(self.log_temperature.detach().exp())
        learned = ", learned" if isinstance(self.log_temperature, nn.Parameter) else ""
        return f"discount={self.discount}, temperature={temperature:.4g}{learned}"
