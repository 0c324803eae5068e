"""What becomes of a hyper-gradient where the follower's return is not concave in its policy?

    python benchmarks/convexity.py [--points 41] [--out FILE] [--figure PNG]

Two decisions: in the hall, take a safe .6 and leave, or walk on to the vault; in the vault, turn
the right key and find x, or the wrong one and find nothing. The follower maximises its return plus
τ = .1 times its entropy. The leader picks x and wants the vault opened, at a price:
φ(x) = .3 x − P(opened). Truth: central differences of the follower's exact policy.

Implicit differentiation in the policy's parameters θ, the logits of the two decisions, is what
methods for strongly convex lower levels do: N steps of gradient ascent on the return, then
dφ/dx = ∂f/∂x − ∂f/∂θ (H − c I)⁻¹ ∂²J/∂θ∂x with the Hessian H of the return and a damping c.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import store
from torch import Tensor

import birl_ext
from birl_ext.bilevel import BilevelProblem

SAFE, DISCOUNT, TAU, PRICE = 0.6, 0.95, 0.1, 0.3
HALL, VAULT, OUT = range(3)
POINTS = (0.2, 2.0)
BAD_START = (-2.0, -2.0)
"""Logits of "walk on" and "right key": a follower that has learned to leave."""
STEPS = (100, 1_000, 10_000)
RATE = 1.0
DAMPING = (0.0, 0.001, 0.01, 0.1)


# The follower as an MDP, for ours


def lower(x: Tensor) -> birl_ext.DenseMDP:
    """x (M, 1); actions 0: leave, or the wrong key; 1: walk on, or the right key."""
    x = x.squeeze(-1)
    zero = torch.zeros_like(x)
    hall, vault = torch.stack([zero + SAFE, zero], -1), torch.stack([zero, x], -1)
    rows = torch.zeros(3, 2, 3, dtype=x.dtype)
    rows[HALL, 0, OUT] = rows[HALL, 1, VAULT] = rows[VAULT, :, OUT] = 1
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    last = torch.tensor([False, False, True])
    reward = torch.stack([hall, vault, torch.zeros_like(hall)], -2)
    return birl_ext.DenseMDP(reward, rows, DISCOUNT, terminal=last, mask=mask)


def upper(x: Tensor, solution: birl_ext.Solution) -> Tensor:
    return PRICE * x.squeeze(-1) - solution.policy[..., HALL, 1] * solution.policy[..., VAULT, 1]


PROBLEM = BilevelProblem(lower, upper)


def phi(xs: Tensor) -> Tensor:
    """φ of many x at once, by exact solves."""
    return PROBLEM.objective(xs.unsqueeze(-1), TAU)


# The same in its policy's parameters, in closed form, for the others


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)


def worth(on: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """The follower's return, with its entropy, of the chances to walk on and of the right key."""
    vault = right * x + TAU * entropy(right)
    return (1 - on) * SAFE + TAU * entropy(on) + on * DISCOUNT * vault


def returned(theta: Tensor, x: Tensor) -> Tensor:
    on, right = theta.sigmoid().unbind(-1)
    return worth(on, right, x)


def found(theta: Tensor, x: Tensor) -> Tensor:
    """φ, by the logits."""
    return PRICE * x - theta.sigmoid().prod(-1)


def ascents(xs: Tensor) -> dict[int, Tensor]:
    """The logits after so many steps of gradient ascent on the return, for all x at once."""
    theta, kept = torch.tensor(BAD_START, dtype=xs.dtype).repeat(len(xs), 1), {}
    for step in range(1, max(STEPS) + 1):
        theta.requires_grad_()
        (slope,) = torch.autograd.grad(returned(theta, xs).sum(), theta)
        theta = (theta + RATE * slope).detach()
        if step in STEPS:
            kept[step] = theta
    return kept


def best(xs: Tensor) -> Tensor:
    """The logits of the soft-optimal policies."""
    policy = birl_ext.solve(lower(xs.unsqueeze(-1)), temperature=TAU).log_policy[..., :2, :]
    return policy[..., 1] - policy[..., 0]


def implicit(theta: Tensor, x: Tensor, damping: float) -> tuple[float, float]:
    """dφ/dx with H − c I in the place of H, and the least eigenvalue of −H."""
    hessian = torch.autograd.functional.hessian(lambda t: returned(t, x), theta)
    x = x.clone().requires_grad_()
    theta = theta.clone().requires_grad_()
    direct, through = torch.autograd.grad(found(theta, x), (x, theta))
    (slope,) = torch.autograd.grad(returned(theta, x), theta, create_graph=True)
    mixed = torch.stack([torch.autograd.grad(s, x, retain_graph=True)[0] for s in slope])
    response = -torch.linalg.solve(hessian - damping * torch.eye(2, dtype=x.dtype), mixed)
    least = float(torch.linalg.eigvalsh(-hessian)[0])
    return float(direct + through @ response), least


# What is measured


def measured(points: int) -> dict[str, Any]:
    xs = torch.linspace(*POINTS, points, dtype=torch.float64)
    step = 1e-5
    ends = [phi(xs + sign * step) for sign in (1, -1)]
    truth = ((ends[0] - ends[1]) / (2 * step)).tolist()

    x = xs.unsqueeze(-1).requires_grad_()
    value, solution = PROBLEM.evaluate(x, TAU)
    ours = torch.autograd.grad(value.sum(), x)[0].squeeze(-1)
    methods: list[dict[str, Any]] = [{"method": "ours", "gradients": ours.tolist()}]
    for steps, places in (ascents(xs) | {0: best(xs)}).items():
        for damping in DAMPING:
            rows = [implicit(theta, one, damping) for theta, one in zip(places, xs, strict=True)]
            methods.append(
                {
                    "method": "implicit",
                    "steps": steps or "exact",
                    "damping": damping,
                    "gradients": [row[0] for row in rows],
                    "curvature": min(row[1] for row in rows),
                    "indefinite": sum(row[1] <= 0 for row in rows) / points,
                }
            )
    scale = max(map(abs, truth))
    for one in methods:
        off = [abs(g - t) / scale for g, t in zip(one["gradients"], truth, strict=True)]
        wrong = [g * t < 0 for g, t in zip(one["gradients"], truth, strict=True)]
        one |= {"median": median(off), "largest": max(off), "wrong_sign": sum(wrong) / points}
    steepest = max(range(points), key=lambda i: abs(truth[i]))
    safe, bold = (torch.tensor(pair, dtype=torch.float64) for pair in ((0.02, 0.02), (0.98, 0.98)))
    shares = torch.linspace(0, 1, 51, dtype=torch.float64).unsqueeze(-1)
    mixed = (1 - shares) * safe + shares * bold
    along = worth(mixed[:, 0], mixed[:, 1], torch.tensor(1.0, dtype=torch.float64))
    return {
        "x": xs.tolist(),
        "truth": truth,
        "methods": methods,
        "steepest": steepest,
        "error_bound": float(solution.log_policy_error_bound.max()),
        "mixture": {"share": shares.flatten().tolist(), "return": along.tolist()},
    }


def table(report: Mapping[str, Any]) -> str:
    """Of the report, in Markdown."""
    lines = [
        "| gradient | follower found by | c | indefinite | median error | largest | wrong sign |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in report["methods"]:
        errors = f"{one['median']:.2g} | {one['largest']:.2g} | {one['wrong_sign']:.0%}"
        if one["method"] == "ours":
            lines.append(f"| **birl_ext.solve and backward** | the same | – | – | {errors} |")
            continue
        steps = one["steps"]
        how = "birl_ext.solve" if steps == "exact" else f"{steps:,} steps of ascent"
        share = f"{one['indefinite']:.0%}"
        lines.append(f"| implicit, in θ | {how} | {one['damping']:g} | {share} | {errors} |")
    return "\n".join(lines)


SHOWN = {
    (100, 0.1): "implicit, 100 steps of ascent, c = .1",
    (1_000, 0.01): "implicit, 1,000 steps, c = .01",
    ("exact", 0.1): "implicit, exact follower, c = .1",
}


def figure(report: Mapping[str, Any], path: Path) -> None:
    from birl_ext.runs import plots

    with plots.style():
        drawn, (left, right) = plots.new_figure(1, 2)
        mixture = report["mixture"]
        left.plot(mixture["share"], mixture["return"], color=plots.COLOURS[0])
        ends = [mixture["return"][0], mixture["return"][-1]]
        left.plot([0, 1], ends, "--", color="grey", label="a concave return would lie above")
        left.set(xlabel="share of the bold policy", ylabel="the follower's return at x = 1")
        left.legend()
        right.plot(report["x"], report["truth"], "k.", label="finite differences")
        curves = {"birl_ext.solve and backward": report["methods"][0]}
        for (steps, damping), words in SHOWN.items():
            curves[words] = next(
                one
                for one in report["methods"][1:]
                if (one["steps"], one["damping"]) == (steps, damping)
            )
        for (words, one), colour in zip(curves.items(), plots.COLOURS, strict=False):
            right.plot(report["x"], one["gradients"], label=words, color=colour)
        right.set(xlabel="x, the prize in the vault", ylabel="dφ/dx", ylim=(-2.4, 1.9))
        right.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=41)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = measured(options.points)
    print(table(found))
    report = {
        **machine.header(f"python benchmarks/convexity.py --points {options.points}"),
        "seconds": time.perf_counter() - began,
        **found,
    }
    if options.out:
        store(report, options.out)
    if options.figure:
        figure(report, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
