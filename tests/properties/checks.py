"""What must hold of every problem that can be drawn, and how far each of it is from not holding.

`check(seed)` draws a problem, solves it with every backend, and compares with `oracle.exact`:

- values: value, q, advantage, policy and log policy within their certified bounds, whatever the
  status; a status that is true; nothing looser than rounding explains.
- gradients (tame problems): along a random line, of value, q, advantage, policy, log policy,
  occupancy and evaluate; forward, reverse, second order.
- company: an element of a batch is the same alone, bit for bit on a compiled backend.
- masks: no cotangent from behind a mask goes anywhere.
- threads: their number changes no bit.
- raising: on_fail="raise" and "status" tell the same.
- certificates: both backends certify one sweep alike.

Tolerance of a derivative of the policy or its logarithm, with A = Q − V: 1e-9·max|dA|/τ, and
1e-6·(max|dA|/τ)² at second order, with max|d log π| in place of max|dA|/τ if that is larger. Never
less than what one rounding of the right side makes, c·ε·κN/τ
(at second order with its square), where κ = `exact.condition` and N is the size of what drives the
change: dr + d(γP)W, τ dμ/μ, dτ log A. A problem with κ > 1e6 is ill-conditioned: another factor κ,
for a system that is known to ε has a solution that is known to εκ. How often either decides is
counted.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import draw
import numpy as np
import torch
from draw import Drawn, Index
from flint import arb, ctx
from oracle import exact
from torch import Tensor

import birl_ext
from birl_ext import Status, _native
from birl_ext.errors import IllConditionedWarning, SolveError
from birl_ext.solution import Info, Solution

BACKENDS = ["torch"] if _native.reason("cpu") else ["cpu", "torch"]
SHOWN = 3  # elements of a batch that are compared with the oracle
TABLES = ("value", "q", "advantage", "policy", "log_policy")
FIRST, SECOND = 1e-9, 1e-6  # what is asked of derivatives, see above
ROUNDINGS = 4  # c above
ILL = 1e6  # κ from which a problem counts as ill-conditioned
SURELY_WELL, SURELY_ILL = 1e4, 1e8  # below, no IllConditionedWarning may come; above, one must
TORCH_PASSES = 300  # a pass of the PyTorch backend takes a millisecond

Array = np.ndarray


@dataclass
class Outcome:
    """What one seed showed.

    Attributes:
        failures: kind and words.
        worst: by figure, the largest ratio of an error to what is allowed.
        counts: by name.
    """

    seed: int
    failures: list[tuple[str, str]] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, by: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + by

    def fail(self, kind: str, words: str) -> None:
        self.failures.append((kind, words))

    def hold(self, figure: str, error: float, bound: float, words: str) -> None:
        """Note error/bound, and fail unless it is at most one; NaN fails."""
        error, bound = float(error), float(bound)
        if math.isnan(error) or not bound >= 0:
            ratio = math.inf
        elif error == 0 or math.isinf(bound):
            ratio = 0.0
        else:
            ratio = error / bound if bound > 0 else math.inf
        self.worst[figure] = max(ratio, self.worst.get(figure, 0.0))
        if not ratio <= 1:
            self.fail(figure, f"{words}: error {error:.3g}, allowed {bound:.3g}")


def check(seed: int) -> Outcome:
    """Draw, solve, compare."""
    drawn, outcome = draw.draw(seed), Outcome(seed)
    rng = np.random.default_rng([seed, 1])
    outcome.count("problems", len(drawn.indices()))
    for trait in ("tame" if drawn.tame else "wild", drawn.chain, drawn.form, *drawn.traits):
        outcome.count(f"kind {trait}")
    shown = [drawn.indices()[i] for i in rng.permutation(len(drawn.indices()))[:SHOWN]]
    models = {index: model(drawn, index) for index in shown}
    truths = {index: exact.solve(one) for index, one in models.items()}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
        warnings.simplefilter("always", IllConditionedWarning)
        for backend in BACKENDS:
            try:
                found = solved(drawn, backend)
            except Exception as error:
                outcome.fail(f"raised {backend}", f"{type(error).__name__}: {error}")
                continue
            for index in shown:
                values(drawn, index, models[index], truths[index], found, backend, outcome)
            part = drawn.seed % 10
            for name, look, wanted in (
                ("company", company, bool(drawn.batch)),
                ("masks", masks, "mask" in drawn.arrays),
                ("threads", threads, part == 0 and backend == "cpu"),
                ("certificates", certificates, part in (1, 2) and backend == "torch"),
                ("raising", raising, part in (3, 4)),
                ("gradients", gradients, drawn.tame and bool((found.status == 0).all())),
            ):
                if not wanted:
                    continue
                heard.clear()
                try:
                    look(drawn, shown, models, truths, backend, rng, outcome)
                except Exception as error:
                    outcome.fail(f"{name} raised {backend}", f"{type(error).__name__}: {error}")
                if name == "gradients":
                    conditions(drawn, models[shown[0]], [one.message for one in heard], outcome)
    return outcome


def model(drawn: Drawn, index: Index) -> exact.Model:
    """The oracle's view of one element."""
    own = drawn.element(index)
    options = {k: own[k] for k in ("mask", "terminal", "reference") if k in own}
    return exact.Model.of(
        own["reward"],
        own["transition"],
        discount=float(own["discount"]),
        temperature=float(own["temperature"]),
        **options,
    )


def solved(
    drawn: Drawn, backend: str, given: dict[str, Any] | None = None, **changes: Any
) -> Solution:
    """`birl_ext.solve` of a batch, of the drawn tensors or of others in their place.

    Every other seed says "auto" for "cpu", which for plain calls is another way to the same bits.
    """
    arguments, keywords = draw.problem(drawn, draw.tensors(drawn) if given is None else given)
    options = {k: v for k, v in drawn.options.items() if k != "validate"} | changes
    slow = options["method"] in ("value-iteration", "policy-iteration")
    if backend == "torch" and slow and (options["max_iterations"] or math.inf) > TORCH_PASSES:
        options["max_iterations"] = TORCH_PASSES
    name = "auto" if backend == "cpu" and drawn.seed % 2 else backend
    return birl_ext.solve(
        *arguments, **keywords, **{"on_fail": "status", "backend": name} | options
    )


# ---- values -------------------------------------------------------------------------------------


def values(
    drawn: Drawn,
    index: Index,
    one: exact.Model,
    truth: exact.Answer,
    found: Solution,
    backend: str,
    outcome: Outcome,
) -> None:
    """Errors against bounds, and whether the status is true."""
    dtype = "f32" if drawn.dtype == torch.float32 else "f64"
    where = f"{backend} {dtype}"
    eps = torch.finfo(drawn.dtype).eps
    own = drawn.element(index)
    open_ = draw.available(own).ravel()
    status = Status(int(found.status[index]))
    outcome.count(f"{where} {status.name}")
    bound, log_bound = (
        float(getattr(found, name)[index]) for name in ("error_bound", "log_policy_error_bound")
    )
    temperature, gap = float(own["temperature"]), float(own["gap"])
    exact_value = exact.floats(truth.value)
    q = exact.floats(truth.q)[open_]
    largest = max(np.abs(exact_value).max(), np.abs(q).max())
    weights = own.get("reference", np.ones(1))
    entropy = temperature * (1 + math.log(drawn.actions) + float(np.abs(np.log(weights)).max()))
    size = largest + entropy  # what rounding is relative to
    limits = torch.finfo(drawn.dtype)
    extreme = not size < limits.max * 1e-6
    label = f"{index} {status.name}"
    if status == Status.NON_FINITE:
        if not extreme:
            outcome.fail(f"status {where}", f"{label}: overflow, though |V| is {largest:.3g}")
        return
    if status >= Status.ROW_SUM:
        outcome.fail(f"status {where}", f"{label}: refused")
        return
    if not bound >= 0 or not log_bound >= 0:
        outcome.fail(f"bound {where}", f"{label}: bounds {bound}, {log_bound}")
        return
    tables = {name: getattr(found, name)[index].double().numpy().ravel() for name in TABLES}
    errors = {}
    with ctx.workprec(one.bits):
        for name, got in tables.items():
            pairs = zip(getattr(truth, name), got.tolist(), strict=True)
            errors[name] = np.array(
                [0.0 if want is None else float(abs(want - arb(x))) for want, x in pairs]
            )
    outcome.hold(f"value {where}", errors["value"].max(), bound, label)
    if hasattr(found, "error_bounds"):
        each = found.error_bounds[index].double().numpy()
        if not (each >= 0).all():
            outcome.fail(f"value of a state {where}", f"{label}: bounds {each}")
        for s, (error, most) in enumerate(zip(errors["value"], each, strict=True)):
            outcome.hold(f"value of a state {where}", error, float(most), f"{label}, state {s}")
    log_error = errors["log_policy"][open_].max()
    outcome.hold(f"log policy {where}", log_error, log_bound, label)
    # what follows from these two and one rounding of each entry
    tiny = limits.smallest_normal
    policy = np.array([float(x) for x in truth.policy])
    logs = np.maximum(exact.floats(truth.log_policy), -1e300)
    most = np.exp(np.minimum(logs + min(log_bound, 1e300), 0.0))
    near = policy * math.expm1(log_bound) if log_bound < 1 else np.maximum(most, policy)
    near = near + 4 * eps * policy + tiny
    worst = int((errors["policy"] - near).argmax())
    outcome.hold(f"policy {where}", errors["policy"][worst], near[worst], label)
    near = temperature * log_bound + 2 * eps * np.abs(exact.floats(truth.advantage, 0.0)) + tiny
    worst = int((errors["advantage"] - near)[open_].argmax())
    outcome.hold(f"advantage {where}", errors["advantage"][open_][worst], near[open_][worst], label)
    near = 3 * bound + 4 * eps * np.abs(exact.floats(truth.q, 0.0)) + tiny
    worst = int((errors["q"] - near)[open_].argmax())
    outcome.hold(f"q {where}", errors["q"][open_][worst], near[open_][worst], label)
    if not (tables["policy"][~open_] == 0).all():
        outcome.fail(f"policy {where}", f"{label}: mass behind the mask")

    # the status, and how tight the bound is
    tol, limited = drawn.options["tol"], drawn.options["max_iterations"] is not None
    slow = drawn.options["method"] in ("value-iteration", "policy-iteration")
    limited |= backend == "torch" and slow
    floor = 2.0**-53 * size / gap  # what a value can be known to
    if tol and status == Status.CONVERGED:
        asked = tol * max(np.abs(exact_value).max(), temperature)
        outcome.hold(f"tol {where}", bound, 1.01 * asked + 4 * eps * largest, label)
    within = tol and tol > 4 * eps and tol * np.abs(exact_value).max() > 1e3 * floor
    if within and status == Status.STAGNATED:
        outcome.fail(f"status {where}", f"{label}: tol {tol:.3g} is within reach")
    if not tol and not limited and not extreme:
        if status != Status.CONVERGED:
            outcome.fail(f"status {where}", f"{label}: without tol and limit")
        outcome.hold(f"tightness {where}", bound, 1000 * floor + 4 * eps * largest + tiny, label)
    if drawn.traits & {"penalty", "unreachable pay"} and gap >= 0.01 and not (tol or limited):
        bar(drawn, own, truth, errors, tables, where, label, outcome)


def bar(
    drawn: Drawn,
    own: dict[str, Array],
    truth: exact.Answer,
    errors: dict[str, Array],
    tables: dict[str, Array],
    where: str,
    label: str,
    outcome: Outcome,
) -> None:
    """Value iteration in NumPy keeps the digits of states that never touch a wall; so must we, to
    a factor of ten.
    """
    open_ = draw.available(own)
    rows = own["transition"] / own["transition"].sum(-1, keepdims=True)
    closed = np.zeros_like(open_)
    if "terminal" in own:
        rows = np.where(own["terminal"][:, None, None], 0.0, rows)
        if "mask" in own:
            closed = own["terminal"][:, None] & ~own["mask"].any(1)[:, None] & open_
    pays = np.where(open_ & ~closed, own["reward"], 0.0)
    log_mu = np.where(open_, np.log(np.where(closed, 1.0, own.get("reference", 1.0))), -np.inf)
    gamma, tau = float(own["discount"]), float(own["temperature"])
    value = np.zeros(len(pays))
    flat = rows.reshape(-1, len(pays))
    for _ in range(min(int(45 / (1 - gamma)) + 50, 5000)):
        q = pays + gamma * (flat @ value).reshape(pays.shape)
        top = q.max(1, where=open_, initial=-np.inf)
        value = top + tau * np.log(np.exp((q - top[:, None]) / tau + log_mu).sum(1))
    policy = np.exp((q - value[:, None]) / tau + log_mu)
    policy /= policy.sum(1, keepdims=True)
    want = exact.floats(truth.value)
    eps = torch.finfo(drawn.dtype).eps
    theirs = np.abs(policy.ravel() - np.array([float(x) for x in truth.policy])).max()
    # a policy in the dtype cannot be nearer than its rounding
    outcome.hold(f"bar of policy {where}", errors["policy"].max(), 10 * theirs + 8 * eps, label)
    entropy = tau * (1 + math.log(drawn.actions) + np.abs(log_mu[open_]).max())
    scale = np.maximum(np.abs(want), entropy)
    numpy_error = (np.abs(value - want) / scale).max()
    ours = (errors["value"] / scale).max()
    outcome.hold(f"bar of value {where}", ours, 10 * numpy_error + 8 * eps, label)


# ---- company ------------------------------------------------------------------------------------


def leaves(drawn: Drawn) -> dict[str, Tensor]:
    """Tensors that require a gradient, those with the axes of the batch."""
    given = draw.tensors(drawn)
    for name in ("reward", "transition", "reference", "discount", "temperature"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.ndim == draw.EVENT[name] + len(drawn.batch):
            given[name] = tensor.requires_grad_()
    return given


def pulled(
    drawn: Drawn, backend: str, weights: dict[str, Tensor]
) -> tuple[Solution, dict[str, Tensor]]:
    """The solution, and the gradients of its tables times `weights`."""
    given = leaves(drawn)
    found = solved(drawn, backend, given)
    inputs = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    outputs = [getattr(found, name) for name in weights]
    bars = torch.autograd.grad(outputs, list(inputs.values()), list(weights.values()))
    found = Solution._make(part.detach() for part in found)
    return found, dict(zip(inputs, bars, strict=True))


def cotangents(drawn: Drawn, rng: np.random.Generator) -> dict[str, Tensor]:
    """One per table, zero behind the mask."""
    shape = (*drawn.batch, drawn.states, drawn.actions)
    seen = np.ones(shape, bool)
    for index in drawn.indices():
        seen[index] = draw.available(drawn.element(index))
    found = {}
    for name in TABLES:
        weight = rng.normal(size=shape[:-1] if name == "value" else shape)
        weight = weight if name == "value" else np.where(seen, weight, 0.0)
        found[name] = torch.from_numpy(weight).to(drawn.dtype)
    return found


def company(
    drawn: Drawn,
    shown: list[Index],
    models: dict[Index, exact.Model],
    truths: dict[Index, exact.Answer],
    backend: str,
    rng: np.random.Generator,
    outcome: Outcome,
) -> None:
    """Every element of a batch alone: the same bits from compiled code, else the same status and
    passes, and values within their bounds.
    """
    weights = cotangents(drawn, rng)
    together, bars = pulled(drawn, backend, weights)
    for index in shown:
        own = {name: weight[index] for name, weight in weights.items()}
        alone, own_bars = pulled(drawn.alone(index), backend, own)
        outcome.count(f"company {backend}")
        kind = f"company {backend}"
        if int(alone.status) != int(together.status[index]):
            outcome.fail(kind, f"{index}: status {int(alone.status)}, {together.status[index]}")
            continue
        if int(alone.iterations) != int(together.iterations[index]):
            passes = int(alone.iterations), int(together.iterations[index])
            outcome.fail(kind, f"{index}: {passes[0]} passes alone, {passes[1]} in the batch")
        if backend == "torch":
            apart = float((alone.value - together.value[index]).double().abs().max())
            near = float(alone.error_bound) + float(together.error_bound[index])
            if not apart <= near and int(alone.status) != Status.NON_FINITE:
                outcome.fail(kind, f"{index}: values {apart:.3g} apart, bounds {near:.3g}")
            continue
        for name in (*TABLES, "info"):
            one, other = getattr(alone, name), getattr(together, name)[index]
            if not same(one, other):
                outcome.fail(kind, f"{index}: {name} differs, {difference(one, other)}")
        for name, bar_ in own_bars.items():
            if name in bars and not same(bar_, bars[name][index]):
                words = difference(bar_, bars[name][index])
                outcome.fail(f"{kind} gradient", f"{index}: of {name} differs, {words}")


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bits but for the payload of a NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def difference(one: Tensor, other: Tensor) -> str:
    gap = (one.detach().double() - other.detach().double()).abs()
    return f"by at most {float(gap.nan_to_num(torch.inf).max()):.3g}"


# ---- masks, threads, certificates ---------------------------------------------------------------


def masks(
    drawn: Drawn,
    shown: list[Index],
    models: dict[Index, exact.Model],
    truths: dict[Index, exact.Answer],
    backend: str,
    rng: np.random.Generator,
    outcome: Outcome,
) -> None:
    """NaN and infinite cotangents behind a mask change no bit of a gradient."""
    weights = cotangents(drawn, rng)
    seen = torch.stack(
        [torch.from_numpy(draw.available(drawn.element(index))) for index in drawn.indices()]
    ).reshape(*drawn.batch, drawn.states, drawn.actions)
    given = leaves(drawn)
    found = solved(drawn, backend, given)
    inputs = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    for name in ("q", "policy", "log_policy", "advantage"):
        spoilt = weights[name].masked_fill(~seen, rng.choice([np.nan, np.inf]))
        clean, dirty = (
            torch.autograd.grad(
                getattr(found, name), list(inputs.values()), weight, retain_graph=True
            )
            for weight in (weights[name], spoilt)
        )
        outcome.count("masks")
        for leaf, one, other in zip(inputs, clean, dirty, strict=True):
            if not same(one, other):
                words = f"{leaf} by {name}: {difference(one, other)}"
                outcome.fail(f"masks {backend}", words)


def threads(
    drawn: Drawn,
    shown: list[Index],
    models: dict[Index, exact.Model],
    truths: dict[Index, exact.Answer],
    backend: str,
    rng: np.random.Generator,
    outcome: Outcome,
) -> None:
    """The number of threads changes no bit."""
    weights = cotangents(drawn, rng)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, bars = pulled(drawn, backend, weights)
        torch.set_num_threads(int(rng.integers(2, 6)))
        several, others = pulled(drawn, backend, weights)
    finally:
        torch.set_num_threads(before)
    outcome.count("threads")
    pairs = [(name, getattr(one, name), getattr(several, name)) for name in (*TABLES, "info")]
    pairs += [(f"gradient of {name}", bars[name], others[name]) for name in bars]
    for name, left, right in pairs:
        if not same(left, right):
            outcome.fail("threads", f"{name} differs, {difference(left, right)}")


def raising(
    drawn: Drawn,
    shown: list[Index],
    models: dict[Index, exact.Model],
    truths: dict[Index, exact.Answer],
    backend: str,
    rng: np.random.Generator,
    outcome: Outcome,
) -> None:
    """on_fail="raise" raises where a status is not 0, with the same solution, and nowhere else."""
    found = solved(drawn, backend)
    try:
        again = solved(drawn, backend, on_fail="raise")
    except SolveError as error:
        again = error.solution
        if bool((found.status == 0).all()):
            outcome.fail(f"raising {backend}", f"{error}")
    else:
        if not bool((found.status == 0).all()):
            outcome.fail(f"raising {backend}", f"silent, though the status is {found.status}")
    outcome.count("raising")
    for name in (*TABLES, "info", "status"):
        if not same(getattr(found, name), getattr(again, name)):
            words = difference(getattr(found, name), getattr(again, name))
            outcome.fail(f"raising {backend}", f"{name} differs, {words}")


def certificates(
    drawn: Drawn,
    shown: list[Index],
    models: dict[Index, exact.Model],
    truths: dict[Index, exact.Answer],
    backend: str,
    rng: np.random.Generator,
    outcome: Outcome,
) -> None:
    """One sweep from one start, its residual well above rounding: all backends certify alike."""
    if len(BACKENDS) < 2:
        return
    options = {"method": "value-iteration", "max_iterations": 1, "tol": None}
    one, other = (solved(drawn, name, **options) for name in BACKENDS)
    for index in shown:
        residual = float(one.residual[index])
        size = max(
            float(np.abs(exact.floats(truths[index].q, 0.0)).max()),
            float(one.value[index].double().abs().max()),
            float(np.abs(drawn.element(index).get("initial", np.zeros(1))).max()),
        )
        rounding = 1e4 * torch.finfo(drawn.dtype).eps * size
        apart = float((one.value[index] - other.value[index]).double().abs().max())
        if not apart <= 1e-6 * residual:
            continue  # not the same vector
        both = all(int(x.status[index]) == Status.MAX_ITERATIONS for x in (one, other))
        if not both or not residual > rounding:
            continue
        bounds = [float(x.info[index][Info.ERROR_BOUND]) for x in (one, other)]
        outcome.count("certificates")
        words = f"{index}: {bounds[0]:.6g} and {bounds[1]:.6g}"
        apart = abs(bounds[0] - bounds[1])
        outcome.hold("certificates", apart, 0.01 * min(bounds), words)


# ---- gradients ----------------------------------------------------------------------------------


def conditions(drawn: Drawn, one: exact.Model, heard: list[Any], outcome: Outcome) -> None:
    """An ill-conditioned problem is said to be so, and no other is."""
    kappa, _ = exact.condition(one, exact.solve(one).policy)
    if kappa > SURELY_ILL:
        outcome.count("conditions, ill")
        if not heard:
            outcome.fail("conditions", f"κ is {kappa:.3g}, and nothing is said")
    if heard:
        batch = [model(drawn, index) for index in drawn.indices()]
        kappa = max(exact.condition(each, exact.solve(each).policy)[0] for each in batch)
        outcome.count("conditions, said")
        if kappa < SURELY_WELL:
            said = max(one.condition for one in heard)
            outcome.fail("conditions", f"said to be {said:.3g}, and κ is {kappa:.3g}")


INPUTS = ("reward", "transition", "reference", "discount", "temperature")
OUTPUTS = (*TABLES, "occupancy", "evaluate")
MODES = ("reverse reverse", "forward reverse", "forward forward")


def line(drawn: Drawn, rng: np.random.Generator) -> tuple[dict[str, Array], str]:
    """A direction in one of the inputs, or in all of them, and its name."""
    inputs = [name for name in INPUTS if name in drawn.arrays]
    chosen = inputs if rng.random() < 0.25 else [inputs[int(rng.integers(len(inputs)))]]
    direction = {}
    for name in chosen:
        array = drawn.arrays[name]
        shift = rng.normal(size=array.shape)
        if name in ("transition", "reference"):
            shift = shift * array
        if name == "temperature":
            shift = array * rng.uniform(0.5, 1.0, array.shape)
        if name == "discount":
            shift = np.ones(array.shape)
            if len(chosen) > 1 or rng.random() < 0.3:
                shift = shift * drawn.arrays["gap"]
        held = torch.as_tensor(shift).to(drawn.dtype if name in draw.FLOATING else torch.float64)
        direction[name] = held.double().numpy()
    return direction, chosen[0] if len(chosen) == 1 else "all"


def gradients(
    drawn: Drawn,
    shown: list[Index],
    models: dict[Index, exact.Model],
    truths: dict[Index, exact.Answer],
    backend: str,
    rng: np.random.Generator,
    outcome: Outcome,
) -> None:
    """First and second derivatives along a line."""
    rng = np.random.default_rng([drawn.seed, 2])  # the same line for every backend
    direction, name = line(drawn, rng)
    start = rng.multinomial(16, np.full(drawn.states, 1 / drawn.states)) / 16
    gain = torch.from_numpy(rng.normal(size=drawn.arrays["reward"].shape)).to(drawn.dtype)
    index = shown[0]
    mode = MODES[int(rng.integers(len(MODES)))]
    wanted = truth_along(drawn, index, direction, start, gain, models[index])

    def outputs(t: Tensor) -> dict[str, Tensor]:
        given = draw.tensors(drawn)
        for key, shift in direction.items():
            old = given[key]
            if isinstance(old, float):
                old = torch.tensor(old, dtype=torch.float64)
            step = torch.from_numpy(np.array(shift)) * t
            given[key] = old + step.to(old.dtype)
        return tables(drawn, backend, given, start, gain)

    open_ = torch.from_numpy(draw.available(drawn.element(index)))

    def of_element(t: Tensor) -> dict[str, Tensor]:
        """The outputs of the element shown, what is masked as zero."""
        found = {key: table[index] for key, table in outputs(t).items()}
        return {
            key: table.where(open_, 0.0) if table.dim() == 2 else table
            for key, table in found.items()
        }

    weights = {key: torch.from_numpy(rng.normal(size=wanted.first[key].shape)) for key in OUTPUTS}

    def scalars(t: Tensor) -> dict[str, Tensor]:
        return {
            key: (weights[key] * table.double().flatten()).sum()
            for key, table in of_element(t).items()
        }

    zero = torch.zeros((), dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    judge = Judge(drawn, backend, name, wanted, index, outcome)

    _, forward = torch.func.jvp(of_element, (zero,), (one,))
    for key, slope in forward.items():
        judge.table("forward", key, slope)
    t = zero.clone().requires_grad_()
    graph = scalars(t)
    second = mode == "reverse reverse"
    for key, scalar in graph.items():
        (slope,) = torch.autograd.grad(scalar, t, retain_graph=True, create_graph=second)
        judge.scalar("reverse", key, slope, weights[key])
        if second:
            curve = torch.zeros(())
            if slope.requires_grad:
                (found,) = torch.autograd.grad(slope, t, retain_graph=True, allow_unused=True)
                curve = curve if found is None else found
            judge.scalar(mode, key, curve, weights[key], order=2)
    if mode == "forward reverse":

        def slopes(t: Tensor) -> dict[str, Tensor]:
            return torch.func.jacrev(scalars)(t)

        _, curves = torch.func.jvp(slopes, (zero,), (one,))
        for key, curve in curves.items():
            judge.scalar(mode, key, curve, weights[key], order=2)
    if mode == "forward forward":

        def forwards(t: Tensor) -> dict[str, Tensor]:
            return torch.func.jvp(of_element, (t,), (one,))[1]

        _, curves = torch.func.jvp(forwards, (zero,), (one,))
        for key, curve in curves.items():
            judge.table(mode, key, curve, order=2)


def tables(
    drawn: Drawn, backend: str, given: dict[str, Any], start: Array, gain: Tensor
) -> dict[str, Tensor]:
    """The outputs whose derivatives are compared, of a whole batch."""
    found = solved(drawn, backend, given)
    outputs = {name: getattr(found, name) for name in TABLES}
    begin = torch.from_numpy(start).to(drawn.dtype)
    arguments, keywords = draw.problem(drawn, {**given, "reward": gain})
    if drawn.form == "tensors" and not keywords.keys() & {"mask", "terminal", "reference"}:
        rest = {"discount": keywords["discount"], "backend": backend}
        outputs["evaluate"] = birl_ext.evaluate(found.policy, *arguments, **rest)
        outputs["occupancy"] = birl_ext.occupancy(
            found.policy, arguments[1], initial_distribution=begin, **rest
        )
        return outputs
    mdp = arguments[0]
    if drawn.form == "tensors":
        extras = {k: v for k, v in keywords.items() if k in ("mask", "terminal", "reference")}
        mdp = birl_ext.DenseMDP(*arguments, keywords["discount"], **extras)
    outputs["evaluate"] = birl_ext.evaluate(found.policy, mdp, backend=backend)
    outputs["occupancy"] = birl_ext.occupancy(
        found.policy, mdp, initial_distribution=begin, backend=backend
    )
    return outputs


@dataclass(frozen=True)
class Wanted:
    """The oracle's derivatives of one element along a line, and what they are measured by.

    Attributes:
        first, second: derivatives by output.
        units: by output, sizes at first and second order, of which `FIRST` and `SECOND` are asked.
        floors: likewise, sizes of which rounding is a share, conditioning included.
        ill: whether the problem is ill-conditioned.
        story: the numbers behind them.
    """

    first: dict[str, Array]
    second: dict[str, Array]
    units: dict[str, tuple[float, float]]
    floors: dict[str, tuple[float, float]]
    ill: bool
    story: str


def truth_along(
    drawn: Drawn,
    index: Index,
    direction: dict[str, Array],
    start: Array,
    gain: Tensor,
    one: exact.Model,
) -> Wanted:
    """Central differences of the oracle."""
    own = drawn.element(index)
    shape = own["reward"].shape
    open_ = draw.available(own)
    moved = {
        name: shift[index] if shift.ndim > draw.EVENT[name] and index else shift
        for name, shift in direction.items()
    }
    ends = own.get("terminal", np.zeros(drawn.states, bool))
    closed = open_ & ends[:, None] & ~own.get("mask", np.ones(shape, bool))
    free = open_ & ~closed
    pays = np.where(free, gain[index].double().numpy(), 0.0).ravel()
    moves: dict[str, Array] = {}
    for name, shift in moved.items():
        if name == "transition":
            moves["rows"] = np.where((open_ & ~ends[:, None])[..., None], shift, 0.0)
        elif name in ("reward", "reference"):
            moves[name] = np.where(free, shift, 0.0)
        else:
            moves[name] = np.atleast_1d(shift)

    def outputs(model: exact.Model, answer: exact.Answer) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            name: [arb(0) if x is None else x for x in getattr(answer, name)] for name in TABLES
        }
        pi = [x.mid() for x in answer.policy]
        found["evaluate"] = exact.evaluate(model, pi, [arb(x) for x in pays.tolist()])
        found["occupancy"] = exact.occupancy(model, pi, start.tolist())
        return found

    slopes = exact.slopes(one, moves, outputs)
    first, second = slopes.first, slopes.second
    answer = exact.solve(one)
    kappa, mass = exact.condition(one, answer.policy)

    # the sizes of the right side: what changes, as it stands in the equations before it cancels
    tau = float(own["temperature"])
    levels = spread(answer.value, whole=not ends.any())
    worth = spread([arb(x) for x in slopes.at["evaluate"].tolist()], whole=not ends.any())
    log_mu = np.abs(np.log(own["reference"][free])) if "reference" in own else np.zeros(1)
    entropy = 1 + math.log(drawn.actions) + log_mu.max(initial=0.0)
    unit_reward = np.abs(own["reward"][free]).max(initial=0.0) + tau * entropy
    rows = np.abs(moves.get("rows", np.zeros((1, 1, 1)))).sum(-1).max()
    gamma = float(np.abs(moves.get("discount", np.zeros(1))).max())
    drive = (
        np.abs(moves.get("reward", np.zeros(1))).max()
        + (rows + gamma) * (levels + unit_reward)
        + float(np.abs(moves.get("temperature", np.zeros(1))).max()) * entropy
    )
    if "reference" in moves:
        drive += tau * np.abs(moves["reference"] / own["reference"])[free].max(initial=0.0)
    size = max(np.abs(first["advantage"]).max() / tau, np.abs(first["log_policy"]).max())
    ill = kappa if kappa > ILL else 1.0
    driven = ill * (1 + kappa) * drive / tau
    chain = (1 + kappa) * max(driven, rows + gamma)  # of the occupancy
    gains = np.abs(pays).max() + worth
    units, floors = {}, {}
    for name in OUTPUTS:
        one_, two = np.abs(first[name]).max(), np.abs(second[name]).max()
        if name in ("policy", "log_policy", "advantage"):
            unit = tau if name == "advantage" else 1.0
            units[name] = size * unit, size**2 * unit
            floors[name] = max(driven * unit, one_), max(driven**2 * unit, two)
        elif name in ("value", "q"):
            units[name] = max(one_, size * tau), max(two, size**2 * tau * mass)
            floors[name] = ill * max(one_, mass * drive), max(ill * two, driven**2 * tau * mass)
        elif name == "occupancy":
            units[name] = max(one_, size), max(two, one_**2, size**2)
            floors[name] = max(ill * one_, chain), max(ill * two, chain**2)
        else:
            part = mass * gains
            units[name] = max(one_, size * part), max(two, size**2 * part)
            floors[name] = max(ill * one_, chain * part), max(ill * two, chain**2 * part)
    story = f"κ {kappa:.2g}, max|dA|/τ {size:.2g}, κN/τ {driven:.2g}"
    return Wanted(first, second, units, floors, kappa > ILL, story)


def spread(numbers: list[Any], *, whole: bool) -> float:
    """Half the range of a value; all of it where the process ends and its level matters."""
    low, high = float(min(numbers, key=float)), float(max(numbers, key=float))
    return 0.5 * (high - low) if whole else max(abs(low), abs(high))


@dataclass(frozen=True)
class Judge:
    """Compares derivatives with the oracle's."""

    drawn: Drawn
    backend: str
    line: str
    wanted: Wanted
    index: Index
    outcome: Outcome

    def table(self, mode: str, key: str, got: Tensor, order: int = 1) -> None:
        """Every entry."""
        want = (self.wanted.first if order == 1 else self.wanted.second)[key]
        error = np.abs(got.detach().double().numpy().ravel() - want).max()
        self._hold(mode, key, float(error), 1.0, order)

    def scalar(self, mode: str, key: str, got: Tensor, weight: Tensor, order: int = 1) -> None:
        """The sum of an output times a weight."""
        want = (self.wanted.first if order == 1 else self.wanted.second)[key]
        total = math.fsum((weight.numpy() * want).tolist())
        error = abs(float(got.detach()) - total)
        self._hold(mode, key, error, float(weight.abs().sum()), order)

    def _hold(self, mode: str, key: str, error: float, factor: float, order: int) -> None:
        wanted = self.wanted
        asked = (FIRST, SECOND)[order - 1] * wanted.units[key][order - 1]
        eps = torch.finfo(self.drawn.dtype).eps
        floor = ROUNDINGS * eps * wanted.floors[key][order - 1]
        where = f"{self.backend} {'f32' if self.drawn.dtype == torch.float32 else 'f64'}"
        self.outcome.count(f"derivatives {where}")
        if wanted.ill:
            self.outcome.count(f"derivatives {where}, ill-conditioned")
        elif floor > asked and self.drawn.dtype == torch.float64:
            self.outcome.count(f"derivatives {where}, by rounding")
        figure = f"order {order} of {key} by {self.line} {where}"
        words = f"{mode} {self.index}: {wanted.story}"
        self.outcome.hold(figure, error, factor * max(asked, floor), words)
