"""First and second derivatives of tame problems along a random line, against the oracle.

Tolerance for the policy and its logarithm, with A = Q − V: 1e-9·max|dA|/τ, and 1e-6·(max|dA|/τ)²
at second order, with max|d log π| in place of max|dA|/τ if that is larger; for a value, an
occupancy and an evaluation also of their own derivatives. Never less than what eight roundings of
the right side make, 8ε·κN/τ (at second order with the square), where κ = `exact.condition` and N is
the size of what drives the change: dr, d(γP)·W, τ dμ/μ, dτ·log A, times 1 + (|r| + |W|)/τ, for a
policy is known to ε of that. A problem with κ > 1e6 is ill-conditioned, and a system that is known
to ε then has a solution that is known to εκ: there another factor κ. How often either decides is
counted, and that the ill-conditioned are said to be so is checked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import draw
import numpy as np
import torch
from checks import TABLES, Scene, model, solved
from draw import Array, Drawn, Index
from flint import arb
from oracle import exact
from torch import Tensor

import birl_ext
from birl_ext.errors import IllConditionedWarning

INPUTS = ("reward", "transition", "reference", "discount", "temperature")
OUTPUTS = (*TABLES, "occupancy", "evaluate")
MODES = ("reverse reverse", "forward reverse", "forward forward")
ASKED = (1e-9, 1e-6)  # at first and second order
ROUNDINGS = 8
ILL = 1e6  # κ from which a problem counts as ill-conditioned
SURELY_WELL, SURELY_ILL = 10.0, 1e8  # below, no IllConditionedWarning may come; above, one must

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


@dataclass(frozen=True)
class Line:
    """Where derivatives are taken: inputs move by t times `direction`.

    Attributes:
        name: the input that moves, or "all".
        direction: an array for each input that does.
        start: ρ, for the occupancy.
        gain: the reward that is evaluated.
        weights: a cotangent per output of the element that is compared.
        mode: of the second derivative.
    """

    name: str
    direction: dict[str, Array]
    start: Array
    gain: Tensor
    weights: dict[str, Tensor]
    mode: str


def gradients(scene: Scene) -> None:
    """Forward, reverse, and one kind of second derivative, of one element."""
    drawn, index = scene.drawn, scene.shown[0]
    if bool(solved(drawn, scene.backend).status.any()):
        return
    if "line" not in scene.memory:
        scene.memory["line"] = line(drawn)
        scene.memory["wanted"] = wanted(drawn, index, scene.memory["line"], scene.models[index])
    path, truth = scene.memory["line"], scene.memory["wanted"]
    judge = Judge(scene, path, truth)
    open_ = torch.from_numpy(draw.available(drawn.element(index)))

    def tables(t: Tensor) -> dict[str, Tensor]:
        """The outputs of the element at t, what is masked as zero."""
        found = outputs(drawn, scene.backend, moved(drawn, path.direction, t), path)
        own = {key: table[index] for key, table in found.items()}
        return {
            k: table.where(open_, 0.0) if table.dim() == 2 else table for k, table in own.items()
        }

    def sums(t: Tensor) -> dict[str, Tensor]:
        """Each output times its weights."""
        return {k: (path.weights[k] * x.double().flatten()).sum() for k, x in tables(t).items()}

    with conditions(scene, truth):
        judge.tables("forward", along(tables)(ZERO))
        t = ZERO.clone().requires_grad_()
        slopes, curves = {}, {}
        twice = path.mode == "reverse reverse"
        for key, total in sums(t).items():
            (slopes[key],) = torch.autograd.grad(total, t, retain_graph=True, create_graph=twice)
            if twice and slopes[key].requires_grad:
                (curve,) = torch.autograd.grad(
                    slopes[key], t, retain_graph=True, materialize_grads=True
                )
                curves[key] = curve
        judge.sums("reverse", slopes)
        if twice:
            judge.sums(path.mode, curves, order=2)
        elif path.mode == "forward reverse":
            judge.sums(path.mode, along(torch.func.jacrev(sums))(ZERO), order=2)
        else:
            judge.tables(path.mode, along(along(tables))(ZERO), order=2)


def line(drawn: Drawn) -> Line:
    """A direction in one of the inputs, or in all of them."""
    rng = np.random.default_rng([drawn.seed, 2])
    inputs = [name for name in INPUTS if name in drawn.arrays]
    chosen = inputs if rng.random() < 0.25 else [inputs[int(rng.integers(len(inputs)))]]
    direction = {}
    for name in chosen:
        array = drawn.arrays[name]
        shift = rng.normal(size=array.shape)
        if name in ("transition", "reference"):
            shift = shift * array
        if name == "transition" and drawn.form != "sparse" and rng.random() < 0.3:
            shift = shift + 0.1 * rng.random(array.shape)  # entries of zero move too
        if name == "temperature":
            shift = array * rng.uniform(0.5, 1.0, array.shape)
        if name == "discount":
            shift = np.ones(array.shape)
            if len(chosen) > 1 or rng.random() < 0.3:
                shift = shift * drawn.arrays["gap"]
        held = torch.as_tensor(shift).to(drawn.dtype if name in draw.FLOATING else torch.float64)
        direction[name] = held.double().numpy()
    shape = drawn.states, drawn.actions
    weights = {
        key: torch.from_numpy(rng.normal(size=math.prod(shape if key in TABLES[1:] else shape[:1])))
        for key in OUTPUTS
    }
    return Line(
        chosen[0] if len(chosen) == 1 else "all",
        direction,
        rng.multinomial(16, np.full(drawn.states, 1 / drawn.states)) / 16,
        torch.from_numpy(rng.normal(size=drawn.arrays["reward"].shape)).to(drawn.dtype),
        weights,
        MODES[int(rng.integers(len(MODES)))],
    )


def moved(drawn: Drawn, direction: dict[str, Array], t: Tensor) -> dict[str, Any]:
    """The drawn tensors, those of the direction t along it."""
    given = draw.tensors(drawn)
    for key, shift in direction.items():
        old = given[key]
        if isinstance(old, float):
            old = torch.tensor(old, dtype=torch.float64)
        given[key] = old + (torch.from_numpy(np.array(shift)) * t).to(old.dtype)
    return given


def along(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The derivative in forward mode."""
    return lambda t: torch.func.jvp(function, (t,), (ONE,))[1]


def outputs(drawn: Drawn, backend: str, given: dict[str, Any], path: Line) -> dict[str, Tensor]:
    """What is differentiated, of a whole batch."""
    found = solved(drawn, backend, given)
    tables = {name: getattr(found, name) for name in TABLES}
    start = torch.from_numpy(path.start).to(drawn.dtype)
    arguments, keywords = draw.problem(drawn, {**given, "reward": path.gain})
    extras = {k: v for k, v in keywords.items() if k in ("mask", "terminal", "reference")}
    rest: dict[str, Any] = {"backend": backend}
    if extras:
        arguments = (birl_ext.DenseMDP(arguments[0], arguments[1], keywords["discount"], **extras),)
    elif "discount" in keywords:
        rest["discount"] = keywords["discount"]
    tables["evaluate"] = birl_ext.evaluate(found.policy, *arguments, **rest)
    tables["occupancy"] = birl_ext.occupancy(
        found.policy, arguments[-1], initial_distribution=start, **rest
    )
    return tables


@contextmanager
def conditions(scene: Scene, truth: Wanted) -> Iterator[None]:
    """An ill-conditioned problem is said to be so, and no other is."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", IllConditionedWarning)
        yield
    kind = f"conditions {scene.backend}"
    if truth.condition > SURELY_ILL:
        words = f"κ is {truth.condition:.3g}, and nothing is said"
        scene.outcome.expect(kind, bool(heard), words)
    if heard:
        batch = [model(scene.drawn, index) for index in scene.drawn.indices()]
        kappa = max(exact.condition(one, exact.solve(one).policy)[0] for one in batch)
        words = f"{heard[0].message}, but κ is {kappa:.3g}"
        scene.outcome.expect(kind, kappa > SURELY_WELL, words)


@dataclass(frozen=True)
class Wanted:
    """The oracle's derivatives of one element along a line, and what they are measured by.

    Attributes:
        derivatives: by order and output.
        units: by output, sizes at first and second order, a share of which is asked for.
        floors: likewise, sizes of which rounding is a share.
        condition: κ.
        reach: the largest number on the way to a derivative, by order.
        story: the numbers behind the tolerance.
    """

    derivatives: tuple[dict[str, Array], dict[str, Array]]
    units: dict[str, tuple[float, float]]
    floors: dict[str, tuple[float, float]]
    condition: float
    reach: tuple[float, float]
    story: str


def wanted(drawn: Drawn, index: Index, path: Line, one: exact.Model) -> Wanted:
    """Central differences."""
    own = drawn.element(index)
    free = one.free
    pays = np.where(free, path.gain[index].double().numpy(), 0.0).ravel()
    moves = {
        name: shift[index] if shift.ndim > draw.EVENT[name] and index else shift
        for name, shift in path.direction.items()
    }

    def found(at: exact.Model, answer: exact.Answer) -> dict[str, list[Any]]:
        tables: dict[str, list[Any]] = {
            name: [arb(0) if x is None else x for x in getattr(answer, name)] for name in TABLES
        }
        pi = [x.mid() for x in answer.policy]
        tables["evaluate"] = exact.evaluate(at, pi, [arb(x) for x in pays.tolist()])
        tables["occupancy"] = exact.occupancy(at, pi, path.start.tolist())
        return tables

    slopes = exact.slopes(one, moves, found)
    first = {name: float(np.abs(table).max()) for name, table in slopes.first.items()}
    second = {name: float(np.abs(table).max()) for name, table in slopes.second.items()}
    kappa, mass = exact.condition(one, exact.solve(one).policy)

    def largest(name: str, by: Any = 1.0) -> float:
        """Of a move."""
        return float(np.abs(moves[name] / by).max()) if name in moves else 0.0

    # N: the right side as it stands in the equations before anything cancels
    tau, whole = float(own["temperature"]), not own.get("terminal", np.zeros(1)).any()
    log_mu = np.abs(np.log(own["reference"][free])) if "reference" in own else np.zeros(1)
    entropy = 1 + math.log(drawn.actions) + float(log_mu.max(initial=0.0))
    reward = float(np.abs(own["reward"][free]).max(initial=0.0))
    flow = largest("discount")
    if "transition" in moves:
        flow += float(np.abs(moves["transition"]).sum(-1).max())
    level = reward + spread(slopes.at["value"], whole)
    drive = (
        largest("reward")
        + flow * (level + tau * entropy)
        + largest("temperature") * entropy
        + tau * largest("reference", own.get("reference", 1.0))
    ) * (1 + level / tau)
    size = max(first["advantage"] / tau, first["log_policy"])
    ill = kappa if kappa > ILL else 1.0
    driven = ill * (1 + kappa) * drive / tau
    chain = (1 + kappa) * max(driven, flow)  # of the occupancy
    gain = mass * (float(np.abs(pays).max()) + spread(slopes.at["evaluate"], whole))
    shift = mass * largest("discount")  # of the level of an evaluation
    policy = (size, size**2), (driven, driven**2)
    value = (size * tau, size**2 * tau * mass), (mass * ill * drive, driven**2 * tau * mass)
    units, floors = {}, {}
    for name, (unit, floor), scale, counts in (
        ("policy", policy, 1.0, False),
        ("log_policy", policy, 1.0, False),
        ("advantage", policy, tau, False),
        ("value", value, 1.0, True),
        ("q", value, 1.0, True),
        ("occupancy", ((size, size**2), (chain, chain**2)), 1.0, True),
        ("evaluate", ((size, size**2), (chain + shift, (chain + shift) ** 2)), gain, True),
    ):
        sizes = first[name], second[name]
        pairs = zip(unit, floor, sizes, strict=True)
        kept = [(max(u * scale, x * counts), max(f * scale, x * ill)) for u, f, x in pairs]
        units[name], floors[name] = zip(*kept, strict=True)
    story = f"κ {kappa:.2g}, max|dA|/τ {size:.2g}, κN/τ {driven:.2g}"
    reach = mass**2 * max(1.0, gain / mass), mass**3 * max(1.0, gain / mass)
    return Wanted((slopes.first, slopes.second), units, floors, kappa, reach, story)


def spread(values: Array, whole: bool) -> float:
    """Half the range of a value; all of it where the process ends and its level matters."""
    return float(0.5 * np.ptp(values) if whole else np.abs(values).max())


@dataclass(frozen=True)
class Judge:
    """Compares derivatives with the oracle's."""

    scene: Scene
    path: Line
    truth: Wanted

    def tables(self, mode: str, got: dict[str, Tensor], order: int = 1) -> None:
        """Every entry."""
        for key, want in self.truth.derivatives[order - 1].items():
            error = np.abs(got[key].detach().double().numpy().ravel() - want).max()
            self._hold(mode, key, float(error), 1.0, order)

    def sums(self, mode: str, got: dict[str, Tensor], order: int = 1) -> None:
        """Outputs times their weights; what is not there is zero."""
        for key, want in self.truth.derivatives[order - 1].items():
            weight = self.path.weights[key].numpy()
            error = abs(float(got.get(key, ZERO).detach()) - math.fsum((weight * want).tolist()))
            self._hold(mode, key, error, float(np.abs(weight).sum()), order)

    def _hold(self, mode: str, key: str, error: float, factor: float, order: int) -> None:
        outcome, truth, where = self.scene.outcome, self.truth, self.scene.where
        if truth.reach[order - 1] > 1e-4 * torch.finfo(self.scene.drawn.dtype).max:
            outcome.counts[f"derivatives {where}, beyond its range"] += 1
            return
        asked = ASKED[order - 1] * truth.units[key][order - 1]
        eps = torch.finfo(self.scene.drawn.dtype).eps
        floor = ROUNDINGS * eps * truth.floors[key][order - 1]
        outcome.counts[f"derivatives {where}"] += 1
        if truth.condition > ILL:
            outcome.counts[f"derivatives {where}, ill-conditioned"] += 1
        elif floor > asked:
            outcome.counts[f"derivatives {where}, by rounding"] += 1
        kind = f"order {order} of {key} {where}"
        words = f"by {self.path.name}, {mode} {self.scene.shown[0]}: {truth.story}"
        outcome.hold(kind, error, factor * max(asked, floor), words)
