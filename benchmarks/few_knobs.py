"""Few knobs, many answers: should they explain the answers, or be judged by what does?

    python benchmarks/few_knobs.py [--seeds 20] [--out FILE]

The gridworld (γ = 0.95, τ = 0.1), where all but the answers is exact: 240 noisy ones about pieces
of 10 steps, asked in six rounds about the soft-optimal policy of the table fitted so far, by the
cross entropy and a ridge. The reward to be found has k weights of random features ψ(s, a). They are
fitted to the same answers; or moved by the exact hyper-gradient of what their policy earns by the
table, the judge (`PlannedUpdate`), while the temperature falls from 50 times the last one or stays;
or found by random search with as many solves. DRLHF asks 240 answers of its own about the policy of
its k weights. Returns are those of an episode, of the soft-optimal policy and of the greedy one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from birl_bench.report import table as markdown
from birl_bench.seeds import study
from torch import Tensor

import birl_ext
from birl_ext.bilevel.additive import PlannedUpdate
from birl_ext.preferences.fit import fit
from birl_ext.preferences.fragments import Episode, Pairs, draw
from birl_ext.preferences.reward_model import FeatureReward, RewardModel, RewardNetwork
from birl_ext.preferences.teachers import TEACHERS
from birl_ext.problems.preference.gridworld import STEPS, gridworld_mdp, true_return
from birl_ext.runs.intervals import mean_interval
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator

TEMPERATURE, COOL_FROM, COOLED = 0.1, 50.0, 0.7
ROUNDS, ANSWERS, FRAGMENT, EPISODES = 6, 40, 10, 20
KNOBS, SOLVES, RATE = (8, 4), 230, 0.1
FIT_RATE, RIDGE, EPOCHS = 0.03, 0.03, 50
MDP = gridworld_mdp(0.95)
STATES, ACTIONS = MDP.reward.shape
EVERYWHERE = torch.arange(STATES)

FITTED, OWN = "fitted to the answers", "DRLHF, with answers of its own"
PLANNED, COLD, SEARCH = "judged, cooled", "judged, not cooled", "judged, random search"
TRUE = "the true reward as judge, cooled"
TABLE, WIDE = "the table itself, the judge", "152 knobs, one of each entry, judged, cooled"
COLUMNS = {"soft": "return", "greedy": "greedy return"}


class Knobs(NamedTuple):
    """What a seed has been given: the features of a few knobs, and answers."""

    features: Tensor  # ψ, (S, A, k)
    answers: Pairs
    table: RewardModel
    """Fitted to them, about whose policies they are."""
    seed: int

    @property
    def worth(self) -> Tensor:
        """f, (S, A)."""
        return rewards(self.table)

    def reward(self) -> FeatureReward:
        return FeatureReward(self.features)


@torch.no_grad()
def rewards(model: RewardModel) -> Tensor:
    return model.all_actions(EVERYWHERE).double()


def solved(reward: Tensor, temperature: float = TEMPERATURE) -> birl_ext.Solution:
    return birl_ext.solve(MDP.replace(reward=reward), temperature=temperature)


def earned(policy: Tensor, worth: Tensor) -> float:
    """(1 − γ) E Σ γᵗ f, per step."""
    assert MDP.initial_distribution is not None
    value = birl_ext.evaluate(policy, MDP.replace(reward=worth))
    return (1 - MDP.discount) * float(MDP.initial_distribution @ value)


def asked(model: RewardModel, seed: int) -> Pairs:
    """Answers about the policies of a reward that is fitted to them, round after round."""
    draws = torch.Generator().manual_seed(seed)
    simulator = FiniteSimulator(MDP, draws)
    teacher = birl_ext.ScriptedTeacher(TEACHERS["noisy"], draws)
    optimiser = torch.optim.Adam(model.parameters(), lr=FIT_RATE, weight_decay=RIDGE)
    found: list[Pairs] = []
    for _ in range(ROUNDS):
        follower = FiniteFollower(solved(rewards(model)).policy)
        paths = simulator.rollout(follower, EPISODES, STEPS)
        where, chosen = paths.observation[:, :STEPS], paths.action
        episodes = [
            Episode(s, a, MDP.reward[s, a], follower.log_prob(s, a), torch.zeros(STEPS).long())
            for s, a in zip(where, chosen, strict=True)
        ]
        first, second = (draw(episodes, FRAGMENT, ANSWERS, draws) for _ in range(2))
        found.append(Pairs(first, second, teacher(first, second)))
        fit(model, joined(found), optimiser, draws, epochs=EPOCHS)
    return joined(found)


def joined(parts: list[Pairs]) -> Pairs:
    first, second = (
        type(side[0])(*(torch.cat(column) for column in zip(*side, strict=True)))
        for side in ([one.first for one in parts], [one.second for one in parts])
    )
    return Pairs(first, second, torch.cat([one.label for one in parts]))


def fitted(given: Knobs) -> Tensor:
    reward = given.reward()
    optimiser = torch.optim.Adam(reward.parameters(), lr=FIT_RATE, weight_decay=RIDGE)
    draws = torch.Generator().manual_seed(given.seed)
    fit(reward, given.answers, optimiser, draws, epochs=ROUNDS * EPOCHS)
    return rewards(reward)


def on_own_answers(given: Knobs) -> Tensor:
    reward = given.reward()
    asked(reward, given.seed)
    return rewards(reward)


def planned(
    given: Knobs, *, true: bool = False, cool_from: float = COOL_FROM, wide: bool = False
) -> Tensor:
    """By the hyper-gradient of what the policy earns, from x = 0."""
    worth = MDP.reward if true else given.worth
    each = torch.eye(STATES * ACTIONS, dtype=torch.float64).view(STATES, ACTIONS, -1)
    reward = FeatureReward(each) if wide else given.reward()
    learner = PlannedUpdate(reward, MDP, optimiser=partial(torch.optim.Adam, lr=RATE))
    for solve in range(SOLVES):
        left = max(0.0, 1 - solve / (COOLED * SOLVES))
        learner.step(worth, temperature=TEMPERATURE * cool_from**left)
    return rewards(reward)


def searched(given: Knobs) -> Tensor:
    """The best of as many: half of them drawn anywhere, half about the best so far."""
    draws = torch.Generator().manual_seed(given.seed)
    size = given.features.shape[-1]
    best, most = torch.zeros(size, dtype=torch.float64), -torch.inf
    for solve in range(SOLVES):
        far = solve < SOLVES // 2
        step = torch.randn(size, generator=draws, dtype=torch.float64)
        scale = 10 ** (2 * torch.rand(1, generator=draws, dtype=torch.float64) - 1.5)
        x = scale * step if far else best + best.norm() / size**0.5 * scale / 3 * step
        found = earned(solved(given.features @ x).policy, given.worth)
        if found > most:
            best, most = x, found
    return given.features @ best


METHODS: dict[str, Callable[[Knobs], Tensor]] = {
    FITTED: fitted,
    OWN: on_own_answers,
    PLANNED: planned,
    COLD: partial(planned, cool_from=1.0),
    SEARCH: searched,
    TRUE: partial(planned, true=True),
    TABLE: lambda given: given.worth,
    WIDE: partial(planned, wide=True),
}
"""Whose reward, (S, A), comes from what was given."""


def measured(seed: int, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    table = RewardNetwork.table(STATES, ACTIONS)
    answers, rows = asked(table, seed), []
    for count in counts:
        draws = torch.Generator().manual_seed(1000 + seed)
        features = torch.randn(STATES, ACTIONS, count, generator=draws, dtype=torch.float64)
        given = Knobs(features, answers, table, seed)
        for name, method in METHODS.items():
            if name in (TABLE, WIDE) and count != counts[0]:
                continue  # they have no features
            found = solved(method(given))
            likely = found.q.argmax(-1)
            greedy = torch.nn.functional.one_hot(likely, ACTIONS)
            rows.append(
                {
                    "seed": seed,
                    "knobs": count,
                    "method": name,
                    "soft": true_return(found.policy),
                    "greedy": true_return(greedy),
                    "judged": earned(found.policy, given.worth),
                }
            )
    return rows


def table(report: dict[str, Any]) -> str:
    """A line for each way: means, and paired differences to the first of the judged ones."""
    lines = []
    for count, name in dict.fromkeys((row["knobs"], row["method"]) for row in report["rows"]):

        def column(key: str, which: str = name, knobs: int = count) -> list[float]:
            return [
                row[key]
                for row in report["rows"]
                if (row["knobs"], row["method"]) == (knobs, which)
            ]

        cells = [str(count) if name not in (TABLE, WIDE) else "all", name]
        for key in COLUMNS:
            mean, half = mean_interval(column(key))
            cells.append(f"{mean:.1f} ± {half:.1f}")
        cells += [str(sum(one > 30 for one in column("soft"))), f"{fmean(column('judged')):.2f}"]
        for key in COLUMNS:
            apart = [a - b for a, b in zip(column(key, PLANNED), column(key), strict=True)]
            mean, half = mean_interval(apart)
            more, less = sum(one > 1 for one in apart), sum(one < -1 for one in apart)
            cells.append("" if name == PLANNED else f"{mean:+.1f} ± {half:.1f} ({more}, {less})")
        lines.append(cells)
    heads = [f"judged, cooled − this: {name}" for name in COLUMNS.values()]
    head = ["k", "reward", *COLUMNS.values(), "above 30", "earned by the judge, a step", *heads]
    return markdown(head, lines)


if __name__ == "__main__":
    sys.exit(study(__file__, __doc__, lambda seed: measured(seed, KNOBS), table, seeds=20))
