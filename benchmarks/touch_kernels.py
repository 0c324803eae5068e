"""Does every kernel run, on awkward shapes too, and agree with the CPU?

Made for a sanitizer: problems are small, nothing is repeated, and the reference is computed on the
CPU. The exit status is 1 if an answer is wrong or a kernel of the device was not reached.

    python benchmarks/touch_kernels.py [--device cuda] [--brief] [--graph]

--brief leaves out most shapes; --graph captures each call in a CUDA graph, replays it on new data,
and compares that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from birl_bench.families import normalised
from torch import Tensor

import birl_ext
from birl_ext.ops.backends import loader
from birl_ext.options import BackendName
from birl_ext.solution import Kernel

SHAPES = (
    (1, 1, 1),
    (3, 5, 2),
    (5, 16, 4),
    (2, 31, 3),
    (2, 33, 8),
    (1, 65, 4),
    (2, 130, 3),
    (1, 300, 10),
    (1, 1030, 2),
    (1, 2600, 1),
)
"""Batch, states, actions: around the warp, one block, the whole device, and too many states for an
elimination.
"""
BRIEF = SHAPES[1:3] + SHAPES[4:5] + SHAPES[6:8]
DISCOUNT, TEMPERATURE = 0.9, 0.2
ALLOWED = {torch.float32: 2e-5, torch.float64: 1e-9}


class Touch(NamedTuple):
    """One call, and how far from right it may be.

    Attributes:
        call: (backend, reward) → tensors.
    """

    name: str
    reward: Tensor
    call: Callable[[Any, Tensor], list[Tensor]]
    kernels: set[str]


def touches(device: torch.device, brief: bool) -> Iterator[Touch]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for batch, states, actions in BRIEF if brief else SHAPES:
            weights = torch.rand(batch, states, actions, states, generator=generator)
            weights *= torch.rand(weights.shape, generator=generator) < 0.7
            weights[..., 0] += 0.1
            transition = normalised(normalised(weights).to(dtype)).to(device)
            reward = torch.rand(batch, states, actions, generator=generator).to(dtype).to(device)
            mask = (torch.rand(batch, states, actions, generator=generator) < 0.8).to(device)
            mask[..., 0] = True
            terminal = torch.zeros(batch, states, dtype=torch.bool, device=device)
            terminal[:, -1] = states > 1
            name = f"{batch}×{states}×{actions} {str(dtype).removeprefix('torch.')}"
            plain = birl_ext.DenseMDP(reward, transition, DISCOUNT)
            special = plain.replace(mask=mask, terminal=terminal)
            shared = plain.replace(transition=transition[0])
            kinds: dict[str, birl_ext.DenseMDP | birl_ext.SparseMDP]
            kinds = {"dense": plain, "masked": special, "shared": shared}
            kinds["sparse"] = special.to_sparse()
            for kind, mdp in kinds.items():
                yield from _calls(f"{name} {kind}", reward, mdp)


def _calls(
    name: str, reward: Tensor, mdp: birl_ext.DenseMDP | birl_ext.SparseMDP
) -> Iterator[Touch]:
    kernels: set[str] = set()

    def solve(backend: BackendName, reward: Tensor) -> list[Tensor]:
        reward = reward.clone().requires_grad_()
        model: Any = mdp.replace(reward=reward, validate="off")
        found = birl_ext.solve(model, temperature=TEMPERATURE, backend=backend)
        if backend != "torch":
            kernels.update(found.kernels)
        (grad,) = torch.autograd.grad(found.value.sum() + found.policy.square().sum(), reward)
        return [found.value.detach(), found.policy.detach(), grad]

    def bellman(backend: BackendName, reward: Tensor) -> list[Tensor]:
        model = mdp.replace(reward=reward, validate="off")
        value = reward.amax(-1)
        return list(birl_ext.bellman(value, model, temperature=TEMPERATURE, backend=backend))

    def policy(backend: BackendName, reward: Tensor) -> list[Tensor]:
        model = mdp.replace(reward=reward, validate="off")
        chosen = torch.softmax(reward, -1)
        if mdp.mask is not None:
            chosen = torch.where(mdp.mask, chosen, 0)
            chosen = chosen / chosen.sum(-1, keepdim=True)
        start = torch.full_like(reward[..., 0], 1 / reward.shape[-2])
        value = birl_ext.evaluate(chosen, model, backend=backend)
        share = birl_ext.occupancy(chosen, model, initial_distribution=start, backend=backend)
        return [value, share]

    for what, call in (("solve", solve), ("bellman", bellman), ("policy", policy)):
        yield Touch(f"{what} {name}", reward, call, kernels)


def _error(found: list[Tensor], right: list[Tensor]) -> float:
    worst = 0.0
    for one, other in zip(found, right, strict=True):
        kept = other.isfinite()
        if not torch.equal(one.isfinite(), kept):
            return float("inf")
        if kept.any():
            gap = (one - other)[kept].abs().max() / other[kept].abs().max().clamp(min=1e-30)
            worst = max(worst, float(gap))
    return worst


def _replayed(touch: Touch, backend: str, reward: Tensor) -> list[Tensor]:
    """The call, captured on other data and replayed on `reward`."""
    static = torch.rand_like(reward)
    side = torch.cuda.Stream(reward.device)
    side.wait_stream(torch.cuda.current_stream(reward.device))
    with torch.cuda.stream(side):
        touch.call(backend, static)
    torch.cuda.current_stream(reward.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = touch.call(backend, static)
    static.copy_(reward)
    graph.replay()
    torch.cuda.synchronize(reward.device)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--brief", action="store_true", help="few shapes")
    parser.add_argument("--graph", action="store_true", help="capture and replay instead")
    options = parser.parse_args()
    device = torch.device(options.device)
    failures, reached, count = [], set(), 0
    host = torch.device("cpu")
    other = "torch" if device.type == "cpu" or loader.reason("cpu") else "cpu"
    pairs = zip(touches(device, options.brief), touches(host, options.brief), strict=True)
    for touch, reference in pairs:
        count += 1
        right = reference.call(other, reference.reward)
        try:
            if options.graph:
                found = _replayed(touch, device.type, touch.reward)
            else:
                found = touch.call(device.type, touch.reward)
        except Exception as error:
            failures.append(f"{touch.name}: {type(error).__name__}: {error}")
            continue
        reached |= touch.kernels
        off = _error([one.to(host) for one in found], right)
        if not off <= ALLOWED[touch.reward.dtype]:
            failures.append(f"{touch.name}: off by {off:.2g}")
    wanted = {kernel.name for kernel in Kernel if kernel.name.startswith(_prefix(device))}
    if not options.graph:
        failures += [f"{name} was not reached" for name in sorted(wanted - reached)]
    print("\n".join(failures))
    print(f"{count} calls, {len(failures)} failures; kernels: {', '.join(sorted(reached)) or '–'}")
    return int(bool(failures))


def _prefix(device: torch.device) -> str:
    return f"{device.type.upper()}_"


if __name__ == "__main__":
    sys.exit(main())
