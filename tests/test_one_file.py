"""SoBiRL in one file computes what the library does, from the same pairs."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("gymnasium")

from birl_ext.agents.soft_q import SoftQ
from birl_ext.agents.temperature import Temperature
from birl_ext.bilevel.score import OneStep
from birl_ext.bilevel.score_average import ScoreAverage
from birl_ext.bilevel.sobirl import SoBiRLUpdate
from birl_ext.preferences.fragments import Fragments, Pairs
from birl_ext.preferences.reward_model import RewardNetwork

FILE = Path(__file__).parents[1] / "examples" / "sobirl_one_file.py"


@pytest.fixture(scope="module")
def one() -> Any:
    return SimpleNamespace(**runpy.run_path(str(FILE)))


def stepped(reward: nn.Module, pairs: Pairs, agent: SoftQ, score: OneStep | None) -> Tensor:
    """The gradient that the library's update descends."""
    model = RewardNetwork(reward, actions=2)
    update = SoBiRLUpdate(
        model, optimiser=lambda x: torch.optim.SGD(x, lr=1.0), score=score, average=0.0, limit=3.0
    )
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    update.step(pairs, agent, temperature=agent.temperature)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(before, model.parameters())
    return before - after


def test_its_gradient_is_that_of_the_library(one: Any) -> None:
    torch.manual_seed(0)
    agent = one.SoftQ(4, 2, one.Settings())
    agent.log_tau.data.fill_(-1.0)
    reward = one.mlp(4, 2, 64, nn.Tanh)
    present = torch.arange(9) < torch.randint(1, 10, (6, 2, 1))
    seen = torch.randn(6, 2, 9, 4)
    action = torch.randint(2, (6, 2, 9))
    then = agent.log_policy(seen).gather(-1, action[..., None])[..., 0]
    then = then + 0.2 * torch.randn(6, 2, 9)  # of an earlier policy: some weights are cut
    label = torch.tensor([0.0, 1, 1, 0, 1, 0])
    given = one.Pairs(seen, action, then, present, label)
    direct, indirect, apart = one.gradient_parts(reward, agent, given, 3.0)

    sides = [
        Fragments(
            seen[:, i],
            action[:, i],
            torch.zeros(6, 9),
            present[:, i],
            then[:, i],
            torch.zeros(6, dtype=torch.int64),
        )
        for i in range(2)
    ]
    pairs = Pairs(sides[0], sides[1], label)
    follower = SoftQ(
        agent.q,
        discount=0.99,
        temperature=Temperature(agent.tau),
        optimiser=lambda x: torch.optim.SGD(x, lr=0.1),
    )
    assert float(indirect.norm()) > 0.1 * float(direct.norm())
    halves = [one.Pairs(*(part[at::2] for part in given)) for at in range(2)]
    # the baselines of a half are its own
    rough = [one.gradient_parts(reward, agent, half, 3.0)[1] for half in halves]
    assert 0.2 < float(apart.norm() / ((rough[0] - rough[1]) / 2).norm()) < 5
    for want, score in ((direct, None), (direct + indirect, OneStep(2))):
        found = stepped(reward, pairs, follower, score)
        assert float((found - want).norm()) < 1e-5 * float(want.norm())


@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_its_average_is_that_of_the_library(one: Any, shared: float) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs, own = ScoreAverage(5, 0.8, torch.zeros(())), one.NoiseLimited(5, 0.8)
    kept = []
    for _ in range(20):
        gradient = torch.ones(5) + torch.randn(5, generator=generator)
        variance = float(torch.randn(5, generator=generator).square().sum())
        theirs = theirs.after(gradient, variance, shared=shared)
        used = own.after(gradient, variance, shared)
        kept.append(theirs.kept)
        torch.testing.assert_close(used, theirs.kept * theirs.mean)
    assert 0 <= kept[-1] < 1
    assert max(kept) > 0


def test_it_can_be_read_alone() -> None:
    text = FILE.read_text()
    assert text.count("\n") <= 300
    imported = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not [n for n in imported if "birl_ext" in ast.unparse(n)]
