"""Target copies of critics."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from birl_ext.errors import OptionError
from birl_ext.model import checks
from birl_ext.state import Stateful
from birl_ext.torch_internals import copy_all_, lerp_all_

__all__ = ["Target"]


class Target(Stateful):
    """A network that follows another one.

        every `period` updates:  θ̄ ← θ̄ + rate · (θ − θ̄)

    rate=1 is a hard copy every `period` updates; a small rate with period=1 a soft one.

    Args:
        source: the network followed; its buffers are copied as they are.
        rate: in (0, 1].
        period: updates from one move to the next.
    """

    STATE = ("_network", "_updates")

    def __init__(self, source: nn.Module, *, rate: float, period: int) -> None:
        if not 0 < (checks.real(rate) or 0) <= 1:
            raise OptionError(f"target_rate is {rate!r}", allowed="(0, 1]")
        self.rate = rate
        self.period = checks.check_count("target_period", period)
        self._network = copy.deepcopy(source).requires_grad_(False).eval()
        self._ours: list[Tensor] = list(self._network.parameters())
        self._theirs: list[Tensor] = list(source.parameters())
        self._kept, self._live = list(self._network.buffers()), list(source.buffers())
        self._updates = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the copy says, without a gradient."""
        with torch.no_grad():
            output: Tensor = self._network(*inputs)
            return output

    @torch.no_grad()
    def follow(self) -> None:
        """Count one update of the source, and move if it is time."""
        self._updates += 1
        if self._updates % self.period:
            return
        # one call for all tensors: on small networks a loop in Python outlasts the arithmetic
        if self.rate == 1:
            copy_all_(self._ours, self._theirs)  # exactly, which x̄ + 1·(x − x̄) is not
        else:
            lerp_all_(self._ours, self._theirs, self.rate)
        if self._kept:
            copy_all_(self._kept, self._live)
