"""A planner inside a network: learn to read a map from examples of good walks only.

Each input is a picture of an 8×8 terrain whose colours a network does not understand at first. It
turns the picture into rewards, the planner turns the rewards into a policy, and the loss compares
the policy with an expert's moves. The gradient passes through the planner into the network.
"""

import torch
from torch import nn

import birl_ext

SIDE = 8
CELLS = SIDE * SIDE


def walk() -> torch.Tensor:
    """P of shape (64, 4, 64): up, right, down, left; a step against the wall stays."""
    row, column = torch.arange(CELLS) // SIDE, torch.arange(CELLS) % SIDE
    targets = torch.stack(
        [
            (row - 1).clamp(min=0) * SIDE + column,
            row * SIDE + (column + 1).clamp(max=SIDE - 1),
            (row + 1).clamp(max=SIDE - 1) * SIDE + column,
            row * SIDE + (column - 1).clamp(min=0),
        ],
        dim=1,
    )
    return nn.functional.one_hot(targets, CELLS).float()


class MapReader(nn.Module):
    """Pictures (B, 3, 8, 8) → log policies (B, 64, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.reward = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 1, 1))
        self.planner = birl_ext.nn.SoftPlanner(discount=0.95, temperature=0.3, transition=walk())

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        per_cell = self.reward(pictures).flatten(1).unsqueeze(-1)
        return self.planner(per_cell.expand(-1, CELLS, 4)).log_policy


def main() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(32, 3, SIDE, SIDE)
    cost = (pictures * torch.tensor([1.0, -2.0, 0.5]).reshape(3, 1, 1)).sum(1)  # hidden from us
    reward = -cost.flatten(1).unsqueeze(-1).expand(-1, CELLS, 4)
    expert = birl_ext.solve(reward, walk(), discount=0.95, temperature=0.3).policy

    network = MapReader()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (expert * (expert.log() - network(pictures))).sum(-1).mean()  # KL per state
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    print(f"KL to the expert per state: {losses[0]:.3f} -> {losses[-1]:.3f} in 20 steps")
    assert losses[-1] < 0.2 * losses[0]


if __name__ == "__main__":
    main()
