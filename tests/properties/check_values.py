"""Values, policies and their certificates against the oracle."""

from __future__ import annotations

import math

import draw
import numpy as np
import torch
from checks import TABLES, Scene, limited, solved
from draw import Array, Index
from flint import arb, ctx
from oracle import exact

from birl_ext import Status
from birl_ext.solution import Solution


def values(scene: Scene) -> None:
    """Every element that is shown."""
    found = solved(scene.drawn, scene.backend)
    for index in scene.shown:
        element(scene, index, found)


def element(scene: Scene, index: Index, found: Solution) -> None:
    """Errors against bounds, and whether the status is true."""
    drawn, outcome, where = scene.drawn, scene.outcome, scene.where
    own, truth = drawn.element(index), scene.truths[index]
    open_ = draw.available(own).ravel()
    status = Status(int(found.status[index]))
    outcome.counts[f"{where} {status.name}"] += 1
    label = f"{index} {status.name}"
    limits = torch.finfo(drawn.dtype)
    eps, tiny = limits.eps, 2 * limits.smallest_normal
    temperature, gap = float(own["temperature"]), float(own["gap"])
    want = exact.floats(truth.value)
    largest = max(np.abs(want).max(), np.abs(exact.floats(truth.q)[open_]).max())
    size = largest + entropy(own)  # what rounding is relative to
    extreme = not size < limits.max * 1e-6
    if status == Status.NON_FINITE or status >= Status.ROW_SUM:
        fine = extreme and status == Status.NON_FINITE
        outcome.expect(f"status {where}", fine, f"{label}, though |V| is {largest:.3g}")
        return
    bound, log_bound = (
        float(getattr(found, name)[index]) for name in ("error_bound", "log_policy_error_bound")
    )
    each = found.error_bounds[index].double().numpy()
    fine = bound >= 0 and log_bound >= 0 and bool((each >= 0).all())
    outcome.expect(f"bounds {where}", fine, f"{label}: {bound}, {log_bound}, {each}")
    if not fine:
        return
    tables = {name: getattr(found, name)[index].double().numpy().ravel() for name in TABLES}
    errors = {}
    with ctx.workprec(scene.models[index].bits):
        for name, got in tables.items():
            pairs = zip(getattr(truth, name), got.tolist(), strict=True)
            errors[name] = np.array(
                [0.0 if w is None else float(abs(w - arb(x))) for w, x in pairs]
            )
    outcome.hold(f"value {where}", errors["value"].max(), bound, label)
    for s, (error, most) in enumerate(zip(errors["value"], each, strict=True)):
        outcome.hold(f"value of a state {where}", error, most, f"{label}, state {s}")
    outcome.hold(f"log policy {where}", errors["log_policy"][open_].max(), log_bound, label)

    # what follows from these and one rounding of each entry
    policy = exact.floats(truth.policy)
    if log_bound < 1:
        near = policy * math.expm1(log_bound)
    else:
        logs = np.maximum(exact.floats(truth.log_policy), -1e300)
        near = np.maximum(np.exp(np.minimum(logs + min(log_bound, 1e300), 0.0)), policy)
    allowed = {
        "policy": near + 4 * eps * policy,
        "advantage": temperature * log_bound + 2 * eps * np.abs(exact.floats(truth.advantage, 0.0)),
        "q": 3 * bound + 4 * eps * np.abs(exact.floats(truth.q, 0.0)),
    }
    for name, most in allowed.items():
        at = int((errors[name] - most)[open_].argmax())
        error, bound_there = errors[name][open_][at], most[open_][at] + tiny
        outcome.hold(f"{name} {where}", error, bound_there, label)
    behind = tables["policy"][~open_]
    outcome.expect(f"policy {where}", not behind.any(), f"{label}: mass behind the mask")

    # the status, and how tight the bound is
    tol = drawn.options["tol"]
    floor = 2.0**-53 * size / gap  # what a value can be known to
    if tol and status == Status.CONVERGED:
        asked = tol * max(np.abs(want).max(), temperature)
        outcome.hold(f"tol {where}", bound, 1.01 * asked + 4 * eps * largest + tiny, label)
    if tol and status == Status.STAGNATED:
        within = tol > 4 * eps and tol * np.abs(want).max() > max(1e3 * floor, tiny)
        outcome.expect(f"status {where}", not within, f"{label}: tol {tol:.3g} is within reach")
    if tol or limited(drawn, scene.backend) or extreme:
        return
    outcome.expect(f"status {where}", status == Status.CONVERGED, f"{label}, without tol and limit")
    outcome.hold(f"tightness {where}", bound, 1000 * floor + 4 * eps * largest + tiny, label)
    if drawn.traits & {"penalty", "unreachable pay"} and gap >= 0.01:
        bar(scene, index, errors)


def entropy(own: dict[str, Array]) -> float:
    """What the regularisation adds to a value, at most."""
    log_mu = np.abs(np.log(own.get("reference", np.ones(1)))).max()
    return float(own["temperature"]) * (1 + math.log(own["reward"].shape[1]) + float(log_mu))


def bar(scene: Scene, index: Index, errors: dict[str, Array]) -> None:
    """Value iteration in NumPy keeps the digits of states that never touch a wall; so must we, to
    a factor of ten.
    """
    own, truth = scene.drawn.element(index), scene.truths[index]
    open_ = draw.available(own)
    rows = own["transition"] / own["transition"].sum(-1, keepdims=True)
    closed = np.zeros_like(open_)
    if "terminal" in own:
        rows = np.where(own["terminal"][:, None, None], 0.0, rows)
        if "mask" in own:
            closed = own["terminal"][:, None] & ~own["mask"].any(1, keepdims=True) & open_
    pays = np.where(open_ & ~closed, own["reward"], 0.0)
    log_mu = np.where(open_, np.log(np.where(closed, 1.0, own.get("reference", 1.0))), -np.inf)
    gamma, tau = float(own["discount"]), float(own["temperature"])
    value = np.zeros(len(pays))
    flat = rows.reshape(-1, len(pays))
    for _ in range(min(int(45 / (1 - gamma)) + 50, 5000)):
        q = pays + gamma * (flat @ value).reshape(pays.shape)
        top = q.max(1, where=open_, initial=-np.inf)
        with np.errstate(over="ignore"):  # of an exponent: −∞ then is right
            value = top + tau * np.log(np.exp((q - top[:, None]) / tau + log_mu).sum(1))
    with np.errstate(over="ignore"):
        policy = np.exp((q - value[:, None]) / tau + log_mu)
    policy /= policy.sum(1, keepdims=True)
    want = exact.floats(truth.value)
    scale = np.maximum(np.abs(want), entropy(own))
    theirs = {
        "policy": np.abs(policy.ravel() - exact.floats(truth.policy)).max(),
        "value": (np.abs(value - want) / scale).max(),
    }
    ours = {"policy": errors["policy"].max(), "value": (errors["value"] / scale).max()}
    for name, error in ours.items():
        # what is handed out in a dtype cannot be nearer than its rounding, and NumPy's sums of few
        # terms are at times lucky
        most = 10 * theirs[name] + 64 * torch.finfo(scene.drawn.dtype).eps
        scene.outcome.hold(f"bar of {name} {scene.where}", error, most, str(index))
