"""The problems of the arena, as it plays them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from birl_ext.arena.contest import Bout, Contest, Samples
from birl_ext.bilevel import Effort
from birl_ext.model.mdp import SparseMDP
from birl_ext.problems.barriers import barriers
from birl_ext.problems.four_rooms import DISCOUNT, PUBLISHED, FourRooms
from birl_ext.problems.leader_toy import TEMPERATURE, leader_toy
from birl_ext.problems.random_mdp import RandomMDPConfig, random_mdps
from birl_ext.problems.sampled_four_rooms import sampled_four_rooms
from birl_ext.problems.sampled_taxes import sampled_taxes
from birl_ext.problems.taxes import DISCOUNT as TAXED
from birl_ext.problems.taxes import GOODS, START, TaxEconomy

__all__ = ["CONTESTS"]

NEAR = 0.5
"""Standard deviation of the logits of the first taxes, around those of .3."""

SAMPLED = (
    *("estimated-model", "stoc-sobirl", "stoc-sobirl-to-go", "hpgd", "hpgd-uniform", "hpgd-sarsa"),
    *("hpgd-oracle", "bc-hg", "bc-hg-critics", "zero-order-samples"),
)
KNOWN = (
    *("m-sobirl", "m-sobirl-published", "unrolled", "value-penalty", "bellman-penalty"),
    *("zero-order", "zero-order-central", "no-response"),
)
"""Methods for any upper level, of a known model."""

ADDITIVE = (*KNOWN[:2], "amd", *KNOWN[2:])


def _random_mdp(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    config = RandomMDPConfig(**setting)
    problem, start = random_mdps(config, [seed for seed in seeds for _ in range(starts)])
    drawn = torch.Generator().manual_seed(seeds[0])
    others = torch.randn(start.shape, generator=drawn, dtype=torch.float64)
    first = torch.arange(len(start)) % starts == 0
    return Bout(start.where(first.unsqueeze(-1), others), config.temperature, problem)


def _four_rooms(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    rooms = FourRooms(setting["kappa"], setting["noise"])
    rows = [rooms.starts(starts, torch.Generator().manual_seed(seed)) for seed in seeds]
    return Bout(torch.cat(rows), setting["temperature"], rooms.problem(), 1, rooms.additive(), True)


def _four_rooms_samples(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    own = {"kappa": 5.0, **setting}
    learns = own.pop("learns", False)
    rooms = sampled_four_rooms(**own, seed=seeds[0])
    start = rooms.start(starts, torch.Generator().manual_seed(seeds[0]))
    planned = rooms.exact.model(start[0])
    assert isinstance(planned, SparseMDP)
    samples = Samples(
        rooms.problem,
        rooms.simulator,
        DISCOUNT,
        rooms.start,
        follower=None if learns else rooms.follower,
        model=planned.to_dense(),
        effort=Effort(1, 60, 10 if learns else 1),
    )
    return Bout(start, rooms.temperature, rooms.exact, samples=samples)


def _four_rooms_hpgd(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    own = {"moves": "simulator", "goal": "both", **setting}
    made = _four_rooms_samples(own, seeds, starts)
    assert made.samples is not None
    return replace(made, samples=replace(made.samples, effort=Effort(100, 60, 1)))


def _taxes_samples(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    taxes = sampled_taxes(**setting, seed=seeds[0])
    first = taxes.start + NEAR * _normal(seeds, starts, len(taxes.start))

    def spread(count: int, drawn: torch.Generator) -> Tensor:
        return taxes.start + torch.randn(count, 4, generator=drawn, dtype=torch.float64)

    effort = Effort(32, 20, 5)
    samples = Samples(taxes.problem, taxes.simulator, TAXED, spread, effort=effort)
    return Bout(first, setting["temperature"], taxes.exact, samples=samples)


def _barriers(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    problem, start = barriers()
    return Bout(
        start + _normal(seeds, starts, len(start)), setting["temperature"], problem, stacks=True
    )


def _leader_toy(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    problem, start = leader_toy(**setting)
    drawn = _normal(seeds, starts, len(start))
    return Bout(start + drawn, TEMPERATURE, problem, stacks=True)


def _normal(seeds: tuple[int, ...], starts: int, size: int) -> Tensor:
    """N(0, 1) numbers, a row for each start of each seed."""
    rows = []
    for seed in seeds:
        drawn = torch.Generator().manual_seed(seed)
        rows.append(torch.randn(starts, size, generator=drawn, dtype=torch.float64))
    return torch.cat(rows)


def _taxes(setting: Mapping[str, Any], seeds: tuple[int, ...], starts: int) -> Bout:
    economy = TaxEconomy(setting["temperature"], setting["cells"])
    start = economy.logits(torch.full((1 + GOODS,), START, dtype=torch.float64))
    return Bout(
        start + NEAR * _normal(seeds, starts, len(start)),
        setting["temperature"],
        economy.problem(),
    )


def _rows(noise: str) -> dict[str, dict[str, Any]]:
    """The rows of the published table, by their λ and κ."""
    mark = "" if noise == "planner" else f", {noise}"
    return {
        f"λ {t:g}, κ {k:g}{mark}": {"temperature": t, "kappa": k, "noise": noise}
        for t, k in PUBLISHED
    }


ROOMS = {**_rows("planner"), **_rows("simulator")}
PLAYED = ("λ 0.001, κ 5", "λ 0.003, κ 3", "λ 0.005, κ 1")
"""A row of each temperature and of each price."""


WALKS: dict[str, dict[str, Any]] = {
    f"λ {t:g}{', as published' * (moves == 'simulator')}": {"temperature": t, "moves": moves}
    for moves in ("planner", "simulator")
    for t in (0.001, 0.003, 0.005)
}
WALKS["λ 0.005, goal B"] = {"temperature": 0.005, "moves": "planner", "goal": "B"}
WALKS["λ 0.005, the follower learns"] = {"temperature": 0.005, "moves": "planner", "learns": True}
"""By soft Q-learning, from samples that count."""

KUDO = {0.001: {"BC-HG, 1M steps": 0.668}, 0.005: {"BC-HG, 1M steps": 0.971}}
"""λ → upper value after 10,000 outer steps of 100 environment steps: Kudo et al. (2026)."""


def _published(row: Mapping[str, Any]) -> dict[str, float]:
    found = PUBLISHED[row["temperature"], row["kappa"]]
    return {f"published, {name}": value for name, value in found.items()}


CONTESTS: dict[str, Contest] = {
    "random-mdp": Contest(
        "Random MDPs",
        _random_mdp,
        {
            f"τ {tau:g}": {"states": 10, "actions": 5, "dimension": 20, "temperature": tau}
            for tau in (1.0, 0.1)
        },
        unit="seconds",
        budget=2.0,
        methods=KNOWN,
        batched=True,
        value="φ − φ*",
        optimum=1.0,
    ),
    "four-rooms": Contest(
        "Four Rooms",
        _four_rooms,
        ROOMS,
        unit="seconds",
        budget=10.0,
        methods=ADDITIVE,
        batched=True,
        references={
            name: _published(row) for name, row in ROOMS.items() if row["noise"] == "planner"
        },
        full=tuple(name for name in ROOMS if name not in PLAYED),
    ),
    "four-rooms-samples": Contest(
        "Four Rooms from samples, κ = 5",
        _four_rooms_samples,
        WALKS,
        unit="samples",
        budget=60_000,
        methods=SAMPLED,
        references={
            name: {f"published, {who}": value for who, value in KUDO[walk["temperature"]].items()}
            for name, walk in WALKS.items()
            if walk["temperature"] in KUDO and "goal" not in walk
        },
        full=tuple(name for name in WALKS if name not in ("λ 0.001", "λ 0.005")),
        switches=("plain", "cooled", "cooled starts"),
        starts=4,
    ),
    "barriers": Contest(
        "An environment adapted: barriers in four rooms",
        _barriers,
        {f"λ {tau:g}": {"temperature": tau} for tau in (0.01, 0.05)},
        unit="seconds",
        budget=10.0,
        methods=KNOWN,
        batched=True,
        starts=8,
    ),
    "leader-toy": Contest(
        "A leader that is a policy, three states",
        _leader_toy,
        {
            "R1": {"bonus": 1.0},
            "R2": {"bonus": 2.0},
            "R1, undiscounted, 150 steps": {"bonus": 1.0, "leader_discount": 1.0},
        },
        unit="seconds",
        budget=5.0,
        methods=KNOWN,
        batched=True,
        value="leader's return",
        references={"R1": {"published": 27.1}},
    ),
    "hpgd-table": Contest(
        "HPGD's table: Four Rooms, both goals, from the simulator's moves",
        _four_rooms_hpgd,
        {name: row for name, row in ROOMS.items() if row["noise"] == "planner"},
        unit="samples",
        budget=100_000_000,
        methods=tuple(name for name in SAMPLED if name != "estimated-model"),
        references={
            name: _published(row) for name, row in ROOMS.items() if row["noise"] == "planner"
        },
        switches=("plain",),
    ),
    "taxes-samples": Contest(
        "Tax design from samples",
        _taxes_samples,
        {f"λ {tau:g}": {"temperature": tau, "cells": 20} for tau in (0.1, 0.2, 0.3)},
        unit="samples",
        budget=20_000_000,
        methods=("stoc-sobirl-to-go", "zero-order-samples"),
        value="social welfare",
        switches=("plain",),
    ),
    "taxes": Contest(
        "Tax design",
        _taxes,
        {f"λ {tau:g}": {"temperature": tau, "cells": 100} for tau in (0.1, 0.2, 0.3)},
        unit="seconds",
        budget=30.0,
        methods=KNOWN,
        value="social welfare",
        full=("λ 0.2", "λ 0.3"),
    ),
}
