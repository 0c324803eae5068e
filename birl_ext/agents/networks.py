"""Networks of the agents: multilayer perceptrons, the convolutions for pixels, twin critics.

Any other module fits in: a head per action maps observations (n, *O) to (n, A), a critic of
continuous actions maps (n, *O) and (n, d) to (n,). Pixels are scaled in `NatureCNN`, and nowhere
else. Weights are drawn from an explicit generator; torch's global one is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from birl_ext.errors import DtypeError, OptionError, ShapeError
from birl_ext.model.checks import check_count
from birl_ext.torch_internals import is_concrete

__all__ = ["MLP", "NatureCNN", "OneHot", "StateActionMLP", "Twin", "head_network"]


class MLP(nn.Module):
    """Linear layers with ReLU between them, (n, *O) → (n, outputs).

    Args:
        inputs: number of entries of an observation, flattened.
        outputs: numbers per observation.
        hidden: widths; () is a linear map.
        generator: of the initial weights, on the CPU.

    Raises:
        DtypeError: observations are integers; see `OneHot` and `NatureCNN`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (256, 256),
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [_linear(inputs, width, generator), nn.ReLU()]
            inputs = width
        layers.append(_linear(inputs, outputs, generator))
        self.layers = nn.Sequential(*layers)

    def forward(self, observation: Tensor) -> Tensor:
        if not observation.is_floating_point():
            raise DtypeError(
                f"observation is {observation.dtype}",
                allowed="a floating-point dtype",
                fix="use NatureCNN for pixels, OneHot in front for indices",
            )
        return cast(Tensor, self.layers(observation.flatten(1)))


class NatureCNN(nn.Module):
    """Three convolutions and a hidden layer on stacked frames, (n, C, H, W) uint8 → (n, outputs).

        filters 32, 64, 64; kernels 8, 4, 3; strides 4, 2, 1; then 512 units

    Pixels are divided by 255 here. Floating-point input is refused, so it cannot happen twice.

    Args:
        shape: (C, H, W), at least 36 × 36.
        outputs: numbers per observation.
        generator: of the initial weights, on the CPU.

    Source: Mnih et al. (2015).
    """

    def __init__(self, shape: Sequence[int], outputs: int, *, generator: torch.Generator) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 36:
            raise ShapeError(
                f"observations have shape {tuple(shape)}",
                allowed="(channels, height, width), at least 36 × 36",
                fix="stack frames along the first axis",
            )
        self.convolutions = nn.Sequential(
            _convolution(shape[0], 32, 8, 4, generator),
            nn.ReLU(),
            _convolution(32, 64, 4, 2, generator),
            nn.ReLU(),
            _convolution(64, 64, 3, 1, generator),
            nn.ReLU(),
            nn.Flatten(),
        )
        height, width = (((((k - 4) // 4) - 2) // 2) - 2 for k in shape[1:])
        self.head = MLP(64 * height * width, outputs, hidden=(512,), generator=generator)

    def forward(self, observation: Tensor) -> Tensor:
        if observation.dtype is not torch.uint8:
            raise DtypeError(
                f"pixels are {observation.dtype}",
                allowed="uint8, as the environment gives them",
                fix="leave the scaling to this network",
            )
        return cast(Tensor, self.head(self.convolutions(observation.float() / 255)))


class OneHot(nn.Module):
    """Indices as unit vectors in front of another module, (n,) int64 → what it makes of (n, count).

    Args:
        count: number of different observations.
        module: takes (n, count) float32.

    Raises:
        DtypeError, OptionError: observations are no indices, or outside [0, count).
    """

    def __init__(self, count: int, module: nn.Module) -> None:
        super().__init__()
        self.count = count
        self.module = module

    def forward(self, observation: Tensor) -> Tensor:
        if observation.dtype is not torch.int64:
            raise DtypeError(f"observation is {observation.dtype}", allowed="int64, indices")
        if observation.is_cpu and is_concrete(observation):  # elsewhere a look makes the host wait
            outside = (observation < 0) | (observation >= self.count)
            if bool(outside.any()):
                first = int(observation[outside][0])
                raise OptionError(f"observation is {first}", allowed=f"0 to {self.count - 1}")
        vectors = nn.functional.one_hot(observation, self.count).float()
        return cast(Tensor, self.module(vectors))


class StateActionMLP(nn.Module):
    """A critic of continuous actions: (n, *O), (n, d) → (n,).

    Args:
        inputs: number of entries of an observation, flattened.
        actions: d.
        hidden, generator: as in `MLP`.
    """

    def __init__(
        self,
        inputs: int,
        actions: int,
        *,
        hidden: Sequence[int] = (256, 256),
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.network = MLP(inputs + actions, 1, hidden=hidden, generator=generator)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        joined = torch.cat([observation.flatten(1), action], -1)
        return cast(Tensor, self.network(joined)).squeeze(-1)


class Twin(nn.Module):
    """Two critics of one shape, stacked: whatever they return with a leading axis of two.

    Args:
        first, second: modules with the same inputs and outputs, initialised independently.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        if first is second:
            raise OptionError("both critics are the same module", fix="build two")
        self.first = first
        self.second = second

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([self.first(*inputs), self.second(*inputs)])


def head_network(
    shape: Sequence[int],
    dtype: torch.dtype,
    outputs: int,
    *,
    generator: torch.Generator,
    hidden: Sequence[int] = (256, 256),
) -> nn.Module:
    """The usual network for observations of a shape and dtype: convolutions for stacked uint8
    frames, otherwise a perceptron.
    """
    if dtype is torch.uint8 and len(shape) == 3:
        return NatureCNN(shape, outputs, generator=generator)
    return MLP(math.prod(shape), outputs, hidden=hidden, generator=generator)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
    check_count("inputs", inputs)
    check_count("outputs", outputs)
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    return _initialised(layer, inputs, generator)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int, generator: torch.Generator
) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, device="meta").to_empty(device="cpu")
    return _initialised(layer, inputs * kernel**2, generator)


def _initialised(layer: nn.Module, fan_in: int, generator: torch.Generator) -> nn.Module:
    """torch's own distribution, U(−1/√fan_in, 1/√fan_in), from our generator."""
    bound = 1 / math.sqrt(fan_in)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
