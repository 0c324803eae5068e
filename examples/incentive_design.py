"""Incentive design: pay a walker to pass where we want it, for less than that is worth to us.

A walker on a 5×5 grid collects 0.3 per step at its home, the upper right corner. We pay it a bonus
x(s) ≥ 0 for every step in a cell, to have it in the lower right corner instead, where a step of its
earns us 2. The cost per step is what it collects less what it earns us. The walker answers every x
with its soft-optimal policy; M-SoBiRL descends through it.
"""

import torch

from birl_ext import DenseMDP, Solution, occupancy
from birl_ext.bilevel import BilevelProblem, MSoBiRL

SIDE = 5
CELLS = SIDE * SIDE
START, HOME, TARGET = 2 * SIDE, SIDE - 1, CELLS - 1
WORTH = 2.0


def walk() -> torch.Tensor:
    """Up, right, down, left; a step against the wall stays."""
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
    return torch.nn.functional.one_hot(targets, CELLS).double()


def bonuses(w: torch.Tensor) -> torch.Tensor:
    """x = log(1 + eʷ): nobody is fined."""
    return torch.nn.functional.softplus(w)


def main() -> None:
    transition, discount = walk(), 0.9
    start = torch.nn.functional.one_hot(torch.tensor(START), CELLS).double()
    home = torch.nn.functional.one_hot(torch.tensor(HOME), CELLS).double()

    def lower(w: torch.Tensor) -> DenseMDP:
        reward = (0.3 * home + bonuses(w)).unsqueeze(-1).expand(CELLS, 4)
        return DenseMDP(reward, transition, discount, initial_distribution=start)

    def split(w: torch.Tensor, solution: Solution) -> tuple[torch.Tensor, torch.Tensor]:
        """Per step, discounted: what the walker collects from us, and what it earns us."""
        time = occupancy(solution.policy, transition, discount=discount, initial_distribution=start)
        return time @ bonuses(w), WORTH * time[TARGET]

    def upper(w: torch.Tensor, solution: Solution) -> torch.Tensor:
        paid, earned = split(w, solution)
        return paid - earned

    problem = BilevelProblem(lower, upper)
    algorithm = MSoBiRL(
        problem,
        torch.full((CELLS,), -3.0, dtype=torch.float64),
        temperature=0.5,
        optimiser=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    )
    costs = []
    for step in range(301):
        if step % 100 == 0:
            w = algorithm.x.detach()
            cost, solution = problem.evaluate(w, 0.5)
            paid, earned = split(w, solution)
            print(f"step {step:3}: paid {paid:.3f}, earned {earned:.3f}, cost {cost:.3f}")
            costs.append(float(cost))
        algorithm.step()
    print("bonuses:")
    for row in bonuses(algorithm.x.detach()).reshape(SIDE, SIDE):
        print("  " + " ".join(f"{float(bonus):6.2f}" for bonus in row))
    assert costs[-1] < costs[0] - 0.1


if __name__ == "__main__":
    main()
