"""Incentive design: pay a walker as little as possible to make it pass where we want it.

A walker on a 5×5 grid collects 0.3 per step at its home, the upper right corner. We pay bonuses
x(s) for being in a cell, to have it in the lower right corner instead, and mind the square of what
we promise. The walker answers every x with its soft-optimal policy; M-SoBiRL descends through it.
"""

import torch

from birl_ext import DenseMDP, Solution, occupancy
from birl_ext.bilevel import BilevelProblem, MSoBiRL

SIDE = 5
CELLS = SIDE * SIDE
START, HOME, TARGET = 2 * SIDE, SIDE - 1, CELLS - 1


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


def main() -> None:
    transition, discount = walk(), 0.9
    start = torch.nn.functional.one_hot(torch.tensor(START), CELLS).double()
    home = torch.nn.functional.one_hot(torch.tensor(HOME), CELLS).double()

    def lower(x: torch.Tensor) -> DenseMDP:
        reward = (0.3 * home + x).unsqueeze(-1).expand(CELLS, 4)
        return DenseMDP(reward, transition, discount, initial_distribution=start)

    def upper(x: torch.Tensor, solution: Solution) -> torch.Tensor:
        time = occupancy(solution.policy, transition, discount=discount, initial_distribution=start)
        return 0.1 * x.square().sum() - time[TARGET]

    algorithm = MSoBiRL(
        BilevelProblem(lower, upper),
        torch.zeros(CELLS, dtype=torch.float64),
        temperature=0.5,
        optimiser=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    )
    outcomes = [algorithm.step() for _ in range(100)]
    report = algorithm.hypergradient_report()
    first, last = float(outcomes[0].objective), float(report.objective)
    start_norm = float(outcomes[0].gradient_norm)
    miss = float((report.estimate - report.exact).norm())
    print(f"objective {first:.4f} -> {last:.4f} in {algorithm.steps} outer steps")
    print(f"norm of the hyper-gradient {start_norm:.1e} -> {float(report.exact.norm()):.1e}")
    print(f"error of its estimate {miss:.1e}")
    print("bonuses:")
    for row in algorithm.x.detach().reshape(SIDE, SIDE):
        print("  " + " ".join(f"{float(bonus):6.2f}" for bonus in row))
    assert last < first - 0.1
    assert miss < 0.05 * start_norm


if __name__ == "__main__":
    main()
