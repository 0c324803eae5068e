"""How much of the score's part of SoBiRL's hyper-gradient should a step use?

    python benchmarks/score_limit.py [--seeds 8] [--out FILE] [--figure FILE]

Random MDPs (5 states, 3 actions, γ = 0.7, τ = 0.3), a table of rewards learned by Adam (0.03) from
the comparisons, by a true reward, of fragments of two steps; exact soft-optimal followers and exact
scores. φ is the cross entropy over all pairs of paths, in full; its exact minimiser by the same
optimiser on ∇φ says what there is to gain over the fit of the loss alone (DRLHF). "Fresh": 64 new
pairs an update, 200 updates. "Reused": 240 pairs in all, 24 new ones every 20 updates, batches of
64 of them, importance weights, cut at 5, on the score alone; there the noise may count what all
updates share (`pool`), which fresh pairs do not. Along each run: the error and the
cosine of the update's gradient against ∇φ.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import store
from torch import Tensor

import birl_ext
from birl_ext.bilevel.bias_meter import exact_pair_objective
from birl_ext.bilevel.score import Critic
from birl_ext.bilevel.sobirl import DRLHFUpdate, SoBiRLUpdate
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.reward_model import RewardNetwork
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator, Paths

STATES, ACTIONS, STEPS, DISCOUNT, TEMPERATURE = 5, 3, 2, 0.7, 0.3
UPDATES, BATCH, POOL, ROUND, RATE = 200, 64, 240, 20, 0.03
SETTLED, SHOWN = 20, 10
RULES: dict[str, dict[str, Any] | None] = {
    "exact ∇φ": None,
    "averaged and shrunk by its noise": {"average": 0.98},
    "the same, at most 1 of the loss's part": {"average": 0.98, "indirect_limit": 1.0},
    "the same, at most .3": {"average": 0.98, "indirect_limit": 0.3},
    "the same, at most .1": {"average": 0.98, "indirect_limit": 0.1},
    "shrunk by a noise that counts reuse": {"average": 0.98, "counted": True},
    "the same, at most .3 of the loss's part": {
        "average": 0.98,
        "counted": True,
        "indirect_limit": 0.3,
    },
    "as it is": {"average": 0.0},
    "at most 1 of the loss's part": {"average": 0.0, "indirect_limit": 1.0},
    "at most .1": {"average": 0.0, "indirect_limit": 0.1},
    "not at all (DRLHF)": {},
}
EXACT, *_, NOTHING = RULES


class Setting:
    """One MDP with a true reward, and φ of any table in full."""

    def __init__(self, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draws, dtype=torch.float64)

        self.transition = (1.5 * normal(STATES, ACTIONS, STATES)).softmax(-1)
        self.truth = normal(STATES, ACTIONS)
        self.start = normal(STATES).softmax(-1)
        self.seed = seed

    def mdp(self, table: Tensor) -> birl_ext.DenseMDP:
        return birl_ext.DenseMDP(
            table, self.transition, DISCOUNT, initial_distribution=self.start, validate="off"
        )

    def policy(self, table: Tensor) -> Tensor:
        return birl_ext.solve(self.mdp(table), temperature=TEMPERATURE).policy

    def objective(self, table: Tensor) -> Tensor:
        """φ."""

        def loss(s1: Tensor, a1: Tensor, s2: Tensor, a2: Tensor) -> Tensor:
            gap = (table[s1, a1] - table[s2, a2]).sum(-1)
            share = torch.sigmoid((self.truth[s1, a1] - self.truth[s2, a2]).sum(-1))
            return torch.nn.functional.binary_cross_entropy_with_logits(
                gap, share, reduction="none"
            )

        return exact_pair_objective(self.mdp(table), loss, temperature=TEMPERATURE, steps=STEPS)

    def value(self, table: Tensor) -> float:
        """The true return of the policy of a table, discounted."""
        policy = self.policy(table)
        found = birl_ext.evaluate(policy, self.truth, self.transition, discount=DISCOUNT)
        return float(self.start @ found)

    def answered(self, simulator: FiniteSimulator, follower: FiniteFollower, count: int) -> Pairs:
        def side(path: Paths) -> Fragments:
            where, chosen, present = path
            return Fragments(
                where,
                chosen,
                self.truth[where, chosen],
                present,
                follower.log_prob(where, chosen),
                torch.zeros(count, dtype=torch.int64),
            )

        first, second = (side(simulator.rollout(follower, count, STEPS)) for _ in range(2))
        share = torch.sigmoid((first.reward - second.reward).sum(-1))
        return Pairs(first, second, torch.bernoulli(share, generator=simulator.generator))


def exact_score(setting: Setting, policy: Tensor, weight: Callable[[], Tensor]) -> Critic:
    """∇Q of a table's entries: discounted visits of each state and action, from each."""
    size = STATES * ACTIONS
    own = torch.eye(size, dtype=torch.float64).view(STATES, ACTIONS, size)
    moves = DISCOUNT * torch.einsum("sa,sat->st", policy, setting.transition)
    mean = torch.einsum("sa,saf->sf", policy, own)
    ahead = torch.linalg.solve(torch.eye(STATES, dtype=torch.float64) - moves, mean)
    visits = own + DISCOUNT * torch.einsum("sat,tf->saf", setting.transition, ahead)
    return Critic(lambda where: visits[where], weight)


def rules(pairs: str) -> list[str]:
    """Those that differ there: of fresh pairs nothing is shared that could be counted."""
    counted = [name for name, rule in RULES.items() if rule and "counted" in rule]
    return [name for name in RULES if pairs == "reused" or name not in counted]


def run(setting: Setting, rule: dict[str, Any] | None, *, fresh: bool) -> dict[str, Any]:
    """φ and return at the end, and the gradients' errors and cosines along the way."""
    reward = RewardNetwork.table(STATES, ACTIONS).double()
    (weight,) = reward.parameters()
    counted = bool(rule and rule.get("counted"))
    rule = None if rule is None else {k: v for k, v in rule.items() if k != "counted"}
    with torch.no_grad():
        weight.zero_()
    simulator = FiniteSimulator(
        setting.mdp(torch.zeros(STATES, ACTIONS, dtype=torch.float64)),
        torch.Generator().manual_seed(setting.seed + 1),
    )
    adam: Any = lambda parameters: torch.optim.Adam(parameters, lr=RATE)  # noqa: E731
    if rule is None:
        optimiser = adam([weight])
        algorithm: Any = None
    elif rule:
        algorithm = SoBiRLUpdate(
            reward,
            optimiser=adam,
            score=exact_score(setting, _uniform(), weight.flatten),
            weigh_loss=fresh,
            **rule,
        )
    else:
        algorithm = DRLHFUpdate(reward, optimiser=adam)
    pool: Pairs | None = None
    errors, cosines = [], []
    for update in range(UPDATES):
        table = weight.detach().reshape(STATES, ACTIONS).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(setting.objective(table), table)
        truth = gradient.flatten()
        if algorithm is None:
            weight.grad = truth.view_as(weight).clone()
            optimiser.step()
            continue
        policy = setting.policy(table.detach())
        follower = FiniteFollower(policy)
        if algorithm.score is not None:
            algorithm.score = exact_score(setting, policy, weight.flatten)
        if fresh:
            pairs = setting.answered(simulator, follower, BATCH)
        else:
            if update % ROUND == 0:
                new = setting.answered(simulator, follower, POOL * ROUND // UPDATES)
                pool = new if pool is None else _joined(pool, new)
            assert pool is not None
            chosen = torch.randperm(len(pool), generator=simulator.generator)[:BATCH]
            pairs = pool.select(chosen)
        among = len(pool or ()) if counted and not fresh else None
        algorithm.step(pairs, follower, temperature=TEMPERATURE, pool=among)
        assert weight.grad is not None
        used = weight.grad.flatten()
        errors.append(float((used - truth).norm() / truth.norm()))
        cosines.append(float(torch.nn.functional.cosine_similarity(used, truth, dim=0)))
    final = weight.detach().reshape(STATES, ACTIONS)
    found: dict[str, Any] = {
        "objective": float(setting.objective(final)),
        "return": setting.value(final),
    }
    if errors:
        found |= {
            "error": median(errors[SETTLED:]),
            "cosine": fmean(cosines[SETTLED:]),
            # of ten updates each
            "errors": [median(errors[at : at + SHOWN]) for at in range(0, UPDATES, SHOWN)],
            "cosines": [fmean(cosines[at : at + SHOWN]) for at in range(0, UPDATES, SHOWN)],
        }
    return found


def _uniform() -> Tensor:
    return torch.full((STATES, ACTIONS), 1 / ACTIONS, dtype=torch.float64)


def _joined(one: Pairs, other: Pairs) -> Pairs:
    def cat(a: Any, b: Any) -> Any:
        return type(a)(*(torch.cat(parts) for parts in zip(a, b, strict=True)))

    return Pairs(
        cat(one.first, other.first),
        cat(one.second, other.second),
        torch.cat((one.label, other.label)),
    )


def table(report: dict[str, Any]) -> str:
    """Means over seeds; the share of what the exact gradient gains over the loss alone in φ."""
    lines = [
        "| pairs | score's part | share of the gain, range over seeds | φ | true return |"
        " error of ∇φ | cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for pairs in ("fresh", "reused"):

        def mean(name: str, key: str, pairs: str = pairs) -> float:
            kind = [r for r in report["rows"] if (r["pairs"], r["rule"]) == (pairs, name)]
            return fmean(row.get(key, math.nan) for row in kind)

        def spread(name: str, pairs: str = pairs) -> str:
            """Range over seeds of the share."""
            by = {
                (r["rule"], r["seed"]): r["objective"]
                for r in report["rows"]
                if r["pairs"] == pairs
            }
            seeds = sorted({seed for _, seed in by})
            shares = [
                (by[NOTHING, s] - by[name, s]) / (by[NOTHING, s] - by[EXACT, s]) for s in seeds
            ]
            return f"{min(shares):.2f} to {max(shares):.2f}"

        worst, best = mean(NOTHING, "objective"), mean(EXACT, "objective")
        for name in rules(pairs):
            share = (worst - mean(name, "objective")) / (worst - best)
            cells = [pairs, name, f"{share:.2f}, {spread(name)}", f"{mean(name, 'objective'):.3f}"]
            cells.append(f"{mean(name, 'return'):.2f}")
            along = [mean(name, key) for key in ("error", "cosine")]
            cells += ["" if math.isnan(one) else f"{one:.2f}" for one in along]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(report: dict[str, Any], path: Path) -> None:
    """The bias meter along the runs: the new default, the old cap, and no limit at all."""
    from birl_ext.runs import plots

    shown = {
        "averaged and shrunk by its noise": "averaged and shrunk",
        "the same, at most .3 of the loss's part": "…, reuse counted, at most .3",
        "at most .1": "not averaged, at most .1",
        "as it is": "as it is",
        "not at all (DRLHF)": "not at all (DRLHF)",
    }
    with plots.style():
        drawn, axes = plots.new_figure(2, 2, sharex=True, sharey="row")
        x = range(SHOWN // 2, UPDATES, SHOWN)
        for column, pairs in enumerate(("fresh", "reused")):
            axes[0, column].set_title(f"{pairs} pairs")
            for key, panel in zip(("errors", "cosines"), axes[:, column], strict=True):
                for (rule, label), colour in zip(shown.items(), plots.COLOURS, strict=False):
                    if rule not in rules(pairs):
                        continue
                    rows = [r for r in report["rows"] if (r["pairs"], r["rule"]) == (pairs, rule)]
                    found = [row[key] for row in rows]
                    plots.draw_runs(panel, x, found, label=label, colour=colour)
            axes[1, column].set_xlabel("update")
        axes[0, 0].set(yscale="log", ylabel="relative error of one update's ∇φ")
        axes[1, 0].set_ylabel("cosine to the exact ∇φ")
        axes[0, 1].legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for pairs in ("fresh", "reused"):
        for name in rules(pairs):
            for seed in range(options.seeds):
                found = run(Setting(seed), RULES[name], fresh=pairs == "fresh")
                rows.append({"pairs": pairs, "rule": name, "seed": seed, **found})
            print(f"{pairs} pairs, {name}: {time.perf_counter() - began:.0f} s", flush=True)
    print(table({"rows": rows}))
    report = {
        **machine.header(f"python benchmarks/score_limit.py --seeds {options.seeds}"),
        "seconds": time.perf_counter() - began,
        "seeds": options.seeds,
        "rows": rows,
    }
    if options.out:
        store(report, options.out)
    if options.figure:
        figure(report, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
