"""What does each part of SoBiRL's hyper-gradient move?

    python benchmarks/two_parts.py [--seeds 10] [--updates 200] [--out FILE] [--figure FILE]

The gridworld (γ = 0.95, τ = 0.3) with a reward of one number per cell, fitted to 240 noisy answers
about fragments of 4 steps: 60 about each of four policies, the first uniform, then that of the fit
so far. From there on φ, the cross entropy over all pairs of fragments that the present policy
shows, and both parts of its gradient (M16), are computed exactly, by summing over all paths of 4
cells, which begin where the policy is (discounted visits). φ is descended by the direct part alone,
as DRLHF does, and by both, at a rate of 1. The figure is of seed 0, its maps of the two parts after
ten updates by both; the table of all seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from birl_bench import machine
from birl_bench.report import store
from birl_bench.report import table as markdown
from torch import Tensor
from torch.nn import functional

import birl_ext

DISCOUNT, TEMPERATURE, STEPS = 0.95, 0.3, 4
ROUNDS, ANSWERS = 4, 60
RATE, SHOWN = 1.0, 10
FITTED, DIRECT, BOTH = "answers fitted", "direct part alone (DRLHF)", "both parts (SoBiRL)"
COLUMNS = {
    "objective": ("φ", 3),
    "undecided": ("of it undecided answers", 3),
    "misfit": ("of it misfit", 3),
    "direct": ("‖direct part‖", 3),
    "indirect": ("‖indirect part‖", 3),
    "cosine": ("cosine", 2),
    "goal": ("% of time at G", 1),
    "return": ("true return of an episode", 1),
}


class Parts(NamedTuple):
    """φ and its gradient in the reward of each state, (S,)."""

    objective: float
    undecided: float
    direct: Tensor
    """E[∇l], the policy as it is."""
    indirect: Tensor
    """(1/τ) E[l · Σ (∇Q − ∇V)], the loss as it is."""


class Preferences:
    """Pairs of fragments of H steps that a policy shows, and their answers, all of them in full.

    Args:
        transition: P, (S, A, S).
        start: ρ, (S,); a fragment begins anywhere in the discounted visits from there.
        truth: the true reward of a state, (S,), by whose sums the teacher answers, noisily.
    """

    def __init__(
        self,
        transition: Tensor,
        start: Tensor,
        truth: Tensor,
        *,
        discount: float = DISCOUNT,
        temperature: float = TEMPERATURE,
        steps: int = STEPS,
    ) -> None:
        self.transition, self.start, self.truth = transition, start, truth
        self.discount, self.temperature = discount, temperature
        self.states, self.actions = transition.shape[:2]
        after = [row.nonzero().flatten().tolist() for row in transition.sum(1)]
        paths = [[state] for state in range(self.states)]
        for _ in range(steps - 1):
            paths = [[*path, state] for path in paths for state in after[path[-1]]]
        self.paths = torch.tensor(paths)
        # a loss sees how often each state was visited, and nothing else of a path
        visits = functional.one_hot(self.paths, self.states).sum(1)
        kinds, self.kind = visits.unique(dim=0, return_inverse=True)
        self.kinds = kinds.to(truth)
        self.share = torch.sigmoid(self.gaps(truth))

    def gaps(self, x: Tensor) -> Tensor:
        """R₁ − R₂ of every pair."""
        returns = self.kinds @ x
        return returns[:, None] - returns

    def policy(self, x: Tensor) -> Tensor:
        reward = x[:, None].expand(-1, self.actions)
        return birl_ext.solve(
            reward, self.transition, discount=self.discount, temperature=self.temperature
        ).policy

    def visits(self, policy: Tensor) -> Tensor:
        """The discounted share of time in each state, (S,)."""
        return birl_ext.occupancy(
            policy, self.transition, discount=self.discount, initial_distribution=self.start
        )

    def shown(self, policy: Tensor) -> Tensor:
        """How likely a fragment is of each kind."""
        walk = torch.einsum("sa,sat->st", policy, self.transition)
        likely = self.visits(policy)[self.paths[:, 0]]
        likely = likely * walk[self.paths[:, :-1], self.paths[:, 1:]].prod(-1)
        return likely.new_zeros(len(self.kinds)).index_add(0, self.kind, likely)

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """φ, of a reward and a policy."""
        shown, gaps = self.shown(policy), self.gaps(x)
        return shown @ (functional.softplus(gaps) - self.share * gaps) @ shown

    def parts(self, x: Tensor) -> Parts:
        """By (M16)."""
        x = x.detach().requires_grad_()
        policy = self.policy(x).detach()
        log_policy = policy.log().requires_grad_()
        objective = self.objective(x, log_policy.exp())
        # E[l · Σ 1{(s, a)}], the sum over the steps of both paths and those that led to them
        direct, weight = torch.autograd.grad(objective, (x, log_policy))
        own = torch.eye(self.states).to(policy)
        walk = torch.einsum("sa,sat->st", policy, self.transition)
        value = torch.linalg.inv(own - self.discount * walk)  # ∇V: visits from each state
        quality = own[:, None] + self.discount * self.transition @ value  # ∇Q
        score = (quality - value[:, None]) / self.temperature
        indirect = torch.einsum("sa,saf->f", weight, score)
        return Parts(float(objective.detach()), float(self.undecided(policy)), direct, indirect)

    def undecided(self, policy: Tensor) -> Tensor:
        """The entropy of the teacher's answers: the least φ of any reward, at this policy."""
        shown = self.shown(policy)
        entropy = functional.binary_cross_entropy(self.share, self.share, reduction="none")
        return shown @ entropy @ shown

    def moved(self, what: Callable[[Tensor], Tensor], x: Tensor, step: Tensor) -> Tensor:
        """The change of what(π(x)) along a step of the reward, to first order."""
        found: Tensor = torch.func.jvp(lambda x: what(self.policy(x)), (x,), (step,))[1]
        return found

    def fit(self, generator: torch.Generator) -> Tensor:
        """The likeliest reward after the answers, each state's standard normal before them."""
        x = torch.zeros_like(self.truth)
        seen: list[Tensor] = []
        answers: list[Tensor] = []
        for _ in range(ROUNDS):
            shown = self.shown(self.policy(x))
            pairs = shown.multinomial(2 * ANSWERS, True, generator=generator).view(2, -1)
            seen.append(self.kinds[pairs[0]] - self.kinds[pairs[1]])
            answers.append(torch.bernoulli(self.share[*pairs], generator=generator))
            x = _likeliest(torch.cat(seen), torch.cat(answers))
        return x


def _likeliest(seen: Tensor, answers: Tensor) -> Tensor:
    x = seen.new_zeros(seen.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([x], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        gap = seen @ x
        found = (functional.softplus(gap) - answers * gap).sum() + x.square().sum() / 2
        found.backward()
        return found

    optimiser.step(loss)
    return x.detach()


def gridworld() -> Preferences:
    from birl_ext.problems.preference.gridworld import gridworld_mdp

    mdp = gridworld_mdp(DISCOUNT)
    assert mdp.initial_distribution is not None
    return Preferences(mdp.transition, mdp.initial_distribution, mdp.reward[:, 0].contiguous())


class Descent(NamedTuple):
    """Before each update and after the last: the reward, and what is known of it."""

    rewards: list[Tensor]
    rows: list[dict[str, float]]


def descend(world: Preferences, x: Tensor, *, both: bool, updates: int) -> Descent:
    """Gradient descent on φ, by both parts or the direct one alone."""
    from birl_ext.problems.preference.gridworld import true_return

    found = Descent([], [])
    for _ in range(updates + 1):
        at, policy = world.parts(x), world.policy(x)
        found.rewards.append(x)
        found.rows.append(
            {
                "objective": at.objective,
                "undecided": at.undecided,
                "misfit": at.objective - at.undecided,
                "direct": float(at.direct.norm()),
                "indirect": float(at.indirect.norm()),
                "cosine": float(functional.cosine_similarity(at.direct, at.indirect, dim=0)),
                "goal": 100 * float(world.visits(policy)[world.truth.argmax()]),
                "return": true_return(policy),
            }
        )
        x = x - RATE * (at.direct + at.indirect if both else at.direct)
    return found


def run(world: Preferences, seed: int, updates: int) -> dict[str, Descent]:
    x = world.fit(torch.Generator().manual_seed(seed))
    return {name: descend(world, x, both=name == BOTH, updates=updates) for name in (DIRECT, BOTH)}


def table(report: dict[str, Any]) -> str:
    """Mean over seeds, and range."""
    lines = []
    for name in (FITTED, DIRECT, BOTH):
        cells = [name]
        for key, (_, places) in COLUMNS.items():
            column = [row[name][key] for row in report["rows"]]
            low, mean, high = (f"{one(column):.{places}f}" for one in (min, fmean, max))
            cells.append(f"{mean} ({low} to {high})")
        lines.append(cells)
    return markdown(["", *(head for head, _ in COLUMNS.values())], lines)


def largest(change: Tensor, count: int = 3) -> str:
    """The cells that gain and lose most, as row and column from the top left, in points."""
    from birl_ext.problems.preference.gridworld import CELLS

    order = change.argsort(descending=True).tolist()
    named = [(CELLS[state], 100 * float(change[state])) for state in order]
    return ", ".join(
        f"({row + 1}, {column + 1}) {points:+.2f}"
        for (row, column), points in named[:count] + named[-count:]
    )


def strongest(world: Preferences, x: Tensor) -> str:
    """The cell that ∇φ pushes most."""
    from birl_ext.problems.preference.gridworld import CELLS

    at = world.parts(x)
    state = int((at.direct + at.indirect).abs().argmax())
    row, column = CELLS[state]
    return (
        f"({row + 1}, {column + 1}) is pushed most, reward {x[state]:.2f}, "
        f"direct part {-at.direct[state]:+.3f}, indirect {-at.indirect[state]:+.3f}"
    )


class Maps(NamedTuple):
    """What the figure shows of one seed."""

    reward: Tensor
    visits: Tensor
    pushes: tuple[Tensor, Tensor]
    """−∇φ, of it the direct part and the indirect."""
    moves: tuple[Tensor, Tensor]
    """Of the visits, along a step by each."""
    decided: tuple[float, float]
    """The change of undecided answers along the same."""
    difference: Tensor
    """Of the visits at the end: both parts − direct part alone."""


def maps(world: Preferences, found: dict[str, Descent]) -> Maps:
    x = found[BOTH].rewards[SHOWN]
    at = world.parts(x)

    def along(what: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        return world.moved(what, x, -RATE * part)

    ends = {name: world.visits(world.policy(one.rewards[-1])) for name, one in found.items()}
    return Maps(
        x,
        world.visits(world.policy(x)),
        (-at.direct, -at.indirect),
        (along(world.visits, at.direct), along(world.visits, at.indirect)),
        (float(along(world.undecided, at.direct)), float(along(world.undecided, at.indirect))),
        ends[BOTH] - ends[DIRECT],
    )


TITLES = (
    (
        f"reward and policy\nafter {SHOWN} updates by both",
        "direct part: explain\nthe answers that are seen",
        "indirect part: change\nwhich answers are seen",
    ),
    (
        "where that policy is",
        "what a step by the\ndirect part moves",
        "what a step by the\nindirect part moves",
    ),
    (
        "φ; dotted: the least of\nany reward, at that policy",
        "cosine between the parts",
        "policies at the end:\nSoBiRL − DRLHF",
    ),
)


def figure(world: Preferences, shown: Maps, found: dict[str, Descent], path: Path) -> None:
    """Nine panels: pushes on the reward, moves of the visits, the descents."""
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    from birl_ext.problems.preference.gridworld import CELLS, draw_cells
    from birl_ext.runs import plots

    def shade(panels: Any, label: str, *values: Tensor, **options: Any) -> None:
        """Maps on one scale, by default one with white at zero; G and g are the true rewards."""
        if "norm" not in options:
            most = max(float(cells.abs().max()) for cells in values)
            options |= {"cmap": "RdBu", "vmin": -most, "vmax": most}
        for panel, cells in zip(panels, values, strict=True):
            image = draw_cells(panel, cells, walls="#c4c8cd", **options)
            for state in world.truth.nonzero().flatten().tolist():
                row, column = CELLS[state]
                panel.text(
                    column + 0.47,
                    row - 0.45,
                    "G" if world.truth[state] == 1 else "g",
                    fontweight="bold",
                    ha="right",
                    va="top",
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                )
        drawn.colorbar(image, ax=[*panels], label=label, location="bottom", aspect=30, shrink=0.9)

    with plots.style():
        drawn, axes = plots.new_figure(3, 3, size=(10.5, 12.2))
        policy = world.policy(shown.reward)
        shade(axes[0, :1], "learned reward", shown.reward, policy=policy, arrows=plots.INK)
        shade(axes[0, 1:], "push on the reward of a cell, −∇φ", *shown.pushes)
        visits = 100 * shown.visits
        norm = LogNorm(float(visits.min()), float(visits.max()))
        shade(axes[1, :1], "share of time, %", visits, norm=norm, cmap="Blues")
        moves = [100 * move for move in shown.moves]
        shade(axes[1, 1:], "change of the share of time, points", *moves)
        shade(axes[2, 2:], "difference of the share of time, points", 100 * shown.difference)
        for (name, one), colour in zip(found.items(), plots.COLOURS, strict=False):
            for key, line in (("objective", "-"), ("undecided", ":")):
                axes[2, 0].plot([row[key] for row in one.rows], line, color=colour)
            axes[2, 1].plot([row["cosine"] for row in one.rows], color=colour, label=name)
        axes[2, 1].set_ylim(-1.05, 1.05)
        axes[2, 1].legend()
        for panel in axes[2, :2]:
            panel.axvline(SHOWN, color=plots.MUTED, linewidth=0.8)
            panel.set_xlabel("updates")
        axes[2, 1].annotate("maps above", (SHOWN + 4, 0.25))
        for panel, title in zip(axes.flat, (name for row in TITLES for name in row), strict=True):
            panel.set_title(title)
        drawn.savefig(path, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0, 1, …")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--out", type=Path, help="JSON of what the table shows")
    parser.add_argument("--figure", type=Path, help="PNG of seed 0")
    options = parser.parse_args()
    if options.updates < SHOWN:
        parser.error(f"--updates is {options.updates}, allowed: {SHOWN} or more")
    torch.set_num_threads(1)
    began = time.perf_counter()
    world = gridworld()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        found = run(world, seed, options.updates)
        ends = {name: one.rows[-1] for name, one in found.items()}
        rows.append({"seed": seed, FITTED: found[DIRECT].rows[0], **ends})
        print(
            f"seed {seed}, answers fitted: {strongest(world, found[DIRECT].rewards[0])}", flush=True
        )
        if seed == 0:
            shown = maps(world, found)
            print("cells (row, column) that gain and lose most, points of time")
            for at, name in enumerate(("direct", "indirect")):
                push, answers = shown.pushes[at], shown.decided[at]
                misfit = -RATE * float(torch.stack(list(shown.pushes)).sum(0) @ push) - answers
                print(f"  a step by the {name} part: {largest(shown.moves[at])}")
                print(f"    undecided answers {answers:+.5f}, misfit {misfit:+.5f}")
            print(f"  at the end, both parts − direct alone: {largest(shown.difference)}")
            if options.figure:
                figure(world, shown, found, options.figure)
    report = {
        **machine.header(
            f"python benchmarks/two_parts.py --seeds {options.seeds} --updates {options.updates}"
        ),
        "seconds": time.perf_counter() - began,
        "rows": rows,
    }
    print(table(report))
    if options.out:
        store(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
