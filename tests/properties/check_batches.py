"""What must not matter: neighbours in a batch, masked cotangents, threads, on_fail, the backend."""

from __future__ import annotations

from typing import Any

import draw
import numpy as np
import torch
from checks import BACKENDS, TABLES, Scene, solved
from draw import Drawn
from oracle import exact
from torch import Tensor

from birl_ext import Status
from birl_ext.errors import SolveError
from birl_ext.solution import Info, Solution


def leaves(drawn: Drawn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The drawn tensors; and those of them, with the axes of the batch, that require a gradient."""
    given = draw.tensors(drawn)
    inputs = {}
    for name in ("reward", "transition", "reference", "discount", "temperature"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.ndim == draw.EVENT[name] + len(drawn.batch):
            inputs[name] = tensor.requires_grad_()
    return given, inputs


def pulled(
    drawn: Drawn, backend: str, weights: dict[str, Tensor]
) -> tuple[Solution, dict[str, Tensor]]:
    """The solution, and the gradients of its tables times `weights`."""
    given, inputs = leaves(drawn)
    found = solved(drawn, backend, given)
    outputs = [getattr(found, name) for name in weights]
    bars = torch.autograd.grad(outputs, list(inputs.values()), list(weights.values()))
    return Solution._make(part.detach() for part in found), dict(zip(inputs, bars, strict=True))


def cotangents(scene: Scene) -> tuple[dict[str, Tensor], Tensor]:
    """One per table, zero behind the mask; and what is not behind it."""
    drawn = scene.drawn
    shape = (*drawn.batch, drawn.states, drawn.actions)
    seen = np.ones(shape, bool)
    for index in drawn.indices():
        seen[index] = draw.available(drawn.element(index))
    found = {}
    for name in TABLES:
        weight = scene.rng.normal(size=shape[:-1] if name == "value" else shape)
        weight = weight if name == "value" else np.where(seen, weight, 0.0)
        found[name] = torch.from_numpy(weight).to(drawn.dtype)
    return found, torch.from_numpy(seen)


def company(scene: Scene) -> None:
    """Every element of a batch alone: the same bits from compiled code, else the same status and
    passes, and values within their bounds.
    """
    drawn, backend, outcome = scene.drawn, scene.backend, scene.outcome
    kind = f"company {backend}"
    weights, _ = cotangents(scene)
    together, bars = pulled(drawn, backend, weights)
    for index in scene.shown:
        own = {name: weight[index] for name, weight in weights.items()}
        alone, own_bars = pulled(drawn.alone(index), backend, own)
        for name, one, other in (
            ("status", alone.status, together.status[index]),
            ("passes", alone.iterations, together.iterations[index]),
        ):
            words = f"{index}: {name} {int(one)} alone, {int(other)} in the batch"
            outcome.expect(kind, int(one) == int(other), words)
        if backend == "torch":
            if int(alone.status) != Status.NON_FINITE:
                apart = (alone.value - together.value[index]).double().abs().max()
                near = alone.error_bound + together.error_bound[index]
                outcome.hold(kind, float(apart), float(near), f"{index}: values apart")
            continue
        for name in (*TABLES, "info"):
            compare(
                scene,
                kind,
                f"{index}: {name}",
                getattr(alone, name),
                getattr(together, name)[index],
            )
        for name in own_bars.keys() & bars.keys():
            label = f"{index}: gradient of {name}"
            compare(scene, kind, label, own_bars[name], bars[name][index])


def compare(scene: Scene, kind: str, label: str, one: Tensor, other: Tensor) -> None:
    """Equal bits but for the payload of a NaN."""
    equal = bool(((one == other) | (one.isnan() & other.isnan())).all())
    apart = (one.detach().double() - other.detach().double()).abs().nan_to_num(torch.inf).max()
    scene.outcome.expect(kind, equal, f"{label} differs by {float(apart):.3g}")


def masks(scene: Scene) -> None:
    """NaN and infinite cotangents behind a mask change no bit of a gradient."""
    weights, seen = cotangents(scene)
    given, inputs = leaves(scene.drawn)
    found = solved(scene.drawn, scene.backend, given)
    for name in ("q", "policy", "log_policy", "advantage"):
        spoilt = weights[name].masked_fill(~seen, scene.rng.choice([np.nan, np.inf]))
        clean, dirty = (
            torch.autograd.grad(
                getattr(found, name), list(inputs.values()), weight, retain_graph=True
            )
            for weight in (weights[name], spoilt)
        )
        for leaf, one, other in zip(inputs, clean, dirty, strict=True):
            compare(scene, f"masks {scene.backend}", f"{leaf} by {name}", one, other)


def threads(scene: Scene) -> None:
    """The number of threads changes no bit of what compiled code finds."""
    if scene.backend == "torch":
        return
    weights, _ = cotangents(scene)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, bars = pulled(scene.drawn, scene.backend, weights)
        torch.set_num_threads(int(scene.rng.integers(2, 6)))
        several, others = pulled(scene.drawn, scene.backend, weights)
    finally:
        torch.set_num_threads(before)
    for name in (*TABLES, "info"):
        compare(scene, "threads", name, getattr(one, name), getattr(several, name))
    for name, bar in bars.items():
        compare(scene, "threads", f"gradient of {name}", bar, others[name])


def raising(scene: Scene) -> None:
    """on_fail="raise" raises where a status is not 0, with the same solution, and nowhere else."""
    kind = f"raising {scene.backend}"
    found = solved(scene.drawn, scene.backend)
    failed = bool(found.status.any())
    try:
        again = solved(scene.drawn, scene.backend, on_fail="raise")
        raised = False
    except SolveError as error:
        again, raised = error.solution, True
    scene.outcome.expect(kind, failed == raised, f"raised: {raised}, status {found.status}")
    for name in (*TABLES, "info", "status"):
        compare(scene, kind, name, getattr(found, name), getattr(again, name))


def certificates(scene: Scene) -> None:
    """One sweep from one start, its residual well above rounding: all backends certify alike."""
    if scene.backend == BACKENDS[0]:
        return
    options: dict[str, Any] = {"method": "value-iteration", "max_iterations": 1, "tol": None}
    one, other = (solved(scene.drawn, name, **options) for name in BACKENDS)
    for index in scene.shown:
        residual = float(scene.drawn.element(index)["discount"]) * float(one.residual[index])
        largest = max(
            float(np.abs(exact.floats(scene.truths[index].q, 0.0)).max()),
            float(one.value[index].double().abs().max()),
            float(np.abs(scene.drawn.element(index).get("initial", np.zeros(1))).max()),
        )
        apart = float((one.value[index] - other.value[index]).double().abs().max())
        same_vector = apart <= 1e-6 * residual
        above = (
            residual * float(scene.drawn.element(index)["discount"])
            > 1e4 * torch.finfo(scene.drawn.dtype).eps * largest
        )
        both = all(int(x.status[index]) == Status.MAX_ITERATIONS for x in (one, other))
        if same_vector and above and both:
            bounds = [float(x.info[index][Info.ERROR_BOUND]) for x in (one, other)]
            words = f"{index}: {bounds[0]:.6g} and {bounds[1]:.6g}"
            apart = abs(bounds[0] - bounds[1])
            scene.outcome.hold("certificates", apart, 0.01 * min(bounds), words)
