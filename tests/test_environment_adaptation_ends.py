"""Environment adaptation of a process that ends: the estimate against ∇φ by differences of dynamic
programming, which shares nothing with it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from birl_ext.bilevel.environment_adaptation import Adaptation, AdaptationProblem, Practice

STATES, ACTIONS, SIZE, STEPS = 4, 3, 3, 12
DISCOUNT, UPPER, TEMPERATURE = 0.8, 0.7, 0.5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE, MOVES = normal(STATES, ACTIONS, STATES, seed=0), normal(SIZE, STATES, ACTIONS, STATES, seed=1)
REWARD, PAYS = normal(STATES, ACTIONS, seed=2), normal(SIZE, STATES, ACTIONS, seed=3)
COST, COSTS = normal(STATES, ACTIONS, seed=4), 0.3 * normal(SIZE, STATES, ACTIONS, seed=5)
ENDS = normal(STATES, ACTIONS, seed=6) < 0.2
AT = torch.tensor([0.3, -0.4, 0.6], dtype=torch.float64)


def law(x: Tensor) -> Tensor:
    return (BASE + torch.einsum("d,dsat->sat", x, MOVES)).softmax(-1)


def table(x: Tensor, own: Tensor, by_x: Tensor) -> Tensor:
    return own + torch.einsum("d,dsa->sa", x, by_x)


def planned(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q and π of the soft-optimal follower, and P without the ends."""
    moves = law(x) * ~ENDS.unsqueeze(-1)
    value = torch.zeros(STATES, dtype=torch.float64)
    for _ in range(200):
        q = table(x, REWARD, PAYS) + DISCOUNT * moves @ value
        value = TEMPERATURE * torch.logsumexp(q / TEMPERATURE, -1)
    return q, (q / TEMPERATURE).softmax(-1), moves


def objective(x: Tensor) -> float:
    _, policy, moves = planned(x)
    here, total = torch.full((STATES,), 1 / STATES, dtype=torch.float64), 0.0
    for t in range(STEPS):
        visits = here.unsqueeze(-1) * policy
        total += UPPER**t * float((visits * table(x, COST, COSTS)).sum())
        here = torch.einsum("sa,sat->t", visits, moves)
    return total


class Process:
    observation_size = 1

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def state_of(self, observation: Tensor) -> Tensor:
        return observation.double()

    def observe(self, state: Tensor) -> Tensor:
        return state.float()

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return state, ENDS[state[:, 0].long(), action]

    def draw(
        self, state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        place = state[:, 0].long()
        rows = law(self.x).detach()[place, action]
        there = torch.multinomial(rows, 1, generator=generator).double()
        return there, ENDS[place, action]

    def log_prob(self, observation: Tensor, action: Tensor, successor: Tensor) -> Tensor:
        place, there = observation[:, 0].long(), successor[:, 0].long()
        return law(self.x)[place, action, there].log()


class Planner:
    """The soft-optimal follower, which has nothing to learn."""

    temperature, version, device = TEMPERATURE, 0, torch.device("cpu")

    def __init__(self, x: Tensor) -> None:
        self._q, self._policy, _ = planned(x)

    def probabilities(self, observation: Tensor) -> Tensor:
        return self._policy[observation[:, 0].long()]

    def log_probs(self, observation: Tensor) -> Tensor:
        return self.probabilities(observation).log()

    def q(self, observation: Tensor) -> Tensor:
        return self._q[observation[:, 0].long()]

    def sample(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.probabilities(observation), 1, generator=generator)[:, 0]

    def update(self, *_: Any) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.zeros(STATES, ACTIONS * (1 + SIZE), dtype=torch.float64))

    def forward(self, observation: Tensor) -> Tensor:
        return self.entries[observation[:, 0].long()]


@pytest.mark.slow
def test_what_ends_is_followed_by_nothing() -> None:
    assert int(ENDS.sum()) == 7

    def paid(own: Tensor, by_x: Tensor) -> Any:
        return lambda x, s, a: table(x, own, by_x)[s[:, 0].long(), a]

    problem = AdaptationProblem(
        Process,
        paid(REWARD, PAYS),
        paid(COST, COSTS),
        lambda count, draws: torch.randint(STATES, (count, 1), generator=draws).float(),
        STEPS,
        UPPER,
    )
    leader = Adaptation(
        problem,
        Planner(AT),  # type: ignore[arg-type]
        AT,
        network=Table(),
        discount=DISCOUNT,
        optimiser=lambda x: torch.optim.SGD(x, lr=0.0),
        learn=lambda x: torch.optim.Adam(x, lr=0.02),
        practice=Practice(environments=400, rounds=12, updates=40, batch=512),
    )
    leader.practise()
    for group in leader.critics.optimiser.param_groups:
        group["lr"] = 0.002
    leader.practise()
    found = torch.stack([leader.estimate(8000)[1] for _ in range(5)]).mean(0)
    aside = 1e-5 * torch.eye(SIZE, dtype=torch.float64)
    want = torch.tensor([(objective(AT + z) - objective(AT - z)) / 2e-5 for z in aside])
    assert float((found - want).norm()) < 0.05 * float(want.norm()), (found, want)
