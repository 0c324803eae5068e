"""A small world whose every expectation is known, as a Gymnasium environment and as an MDP.

::

    . . # . . . G      G  1.0 per step
    . # # . # . .      g  0.3 per step
    . . . . # . #      #  wall: a move against it stays
    . # . . . . .
    . # . # # . .      An episode starts in any cell, each equally likely.
    . . . . # . g
    . . . . . . .
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from birl_ext.errors import MissingDependencyError, OptionError
from birl_ext.model.mdp import DenseMDP

try:
    import gymnasium
except ImportError:
    raise MissingDependencyError(
        "environments need gymnasium", fix='pip install "birl_ext[rl]"'
    ) from None

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CELLS",
    "GRIDWORLD",
    "STEPS",
    "Gridworld",
    "draw_cells",
    "draw_worlds",
    "gridworld_mdp",
    "true_return",
]

GRIDWORLD = "birl_ext/Gridworld-v0"
STEPS = 50
"""Of an episode, which is then cut off."""
THRESHOLD = 30.0
"""Return that counts as learned; the best policy has 40.3."""
SLIP = 0.1
"""Probability that the direction is drawn at random instead."""

_MAP = (
    "..#...G",
    ".##.#..",
    "....#.#",
    ".#.....",
    ".#.##..",
    "....#.g",
    ".......",
)
_REWARDS = {"G": 1.0, "g": 0.3}
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left
CELLS = [
    (row, column)
    for row, line in enumerate(_MAP)
    for column, sign in enumerate(line)
    if sign != "#"
]
"""(row, column) of each state, from the top left."""
_SIDE = 32  # pixels of a cell in a picture
_PAINT = {".": (238, 240, 242), "g": (250, 222, 160), "G": (150, 210, 160)}


def gridworld_mdp(discount: float) -> DenseMDP:
    """The world as an MDP, (S, A) = (38, 4), float64, with the true reward.

    Args:
        discount: γ.
    """
    count = len(CELLS)
    transition = torch.zeros(count, len(_MOVES), count, dtype=torch.float64)
    for state in range(count):
        for action in range(len(_MOVES)):
            for drawn in range(len(_MOVES)):
                share = SLIP / len(_MOVES) + (1 - SLIP) * (drawn == action)
                transition[state, action, _moved(state, drawn)] += share
    signs = [_MAP[row][column] for row, column in CELLS]
    reward = torch.tensor([_REWARDS.get(sign, 0.0) for sign in signs], dtype=torch.float64)
    return DenseMDP(
        reward[:, None].expand(-1, len(_MOVES)),
        transition,
        discount,
        initial_distribution=torch.full((count,), 1 / count, dtype=torch.float64),
    )


class Gridworld(gymnasium.Env[Any, Any]):
    """Walk; the reward is that of the cell one leaves, so r(s, a) depends on s alone.

    Args:
        render_mode: None or "rgb_array".
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's form)

    def __init__(self, render_mode: str | None = None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise OptionError(f"render_mode is {render_mode!r}", allowed="None or 'rgb_array'")
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Discrete(len(CELLS))
        self.action_space = gymnasium.spaces.Discrete(len(_MOVES))
        self._state = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = int(self.np_random.integers(len(CELLS)))
        return self._state, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        row, column = CELLS[self._state]
        reward = _REWARDS.get(_MAP[row][column], 0.0)
        slips = self.np_random.random() < SLIP
        drawn = int(self.np_random.integers(len(_MOVES))) if slips else int(action)
        self._state = _moved(self._state, drawn)
        return self._state, reward, False, False, {}

    def render(self) -> np.ndarray[Any, Any]:
        """(height, width, 3) uint8: the map, and the walker as a dark square."""
        picture = np.full((len(_MAP), len(_MAP[0]), 3), 90, dtype=np.uint8)
        for row, column in CELLS:
            picture[row, column] = _PAINT[_MAP[row][column]]
        large = picture.repeat(_SIDE, 0).repeat(_SIDE, 1)
        row, column = (part * _SIDE for part in CELLS[self._state])
        edge = _SIDE // 4
        large[row + edge : row + _SIDE - edge, column + edge : column + _SIDE - edge] = (0, 60, 120)
        return large


def _moved(state: int, direction: int) -> int:
    row, column = (a + b for a, b in zip(CELLS[state], _MOVES[direction], strict=True))
    return CELLS.index((row, column)) if (row, column) in CELLS else state


def true_return(policy: Tensor) -> float:
    """Expected sum of rewards of an episode, undiscounted, under π, (S, A)."""
    mdp = gridworld_mdp(0.0)
    assert mdp.initial_distribution is not None
    here, total = mdp.initial_distribution, 0.0
    walk = torch.einsum("sa,sat->st", policy.double(), mdp.transition)
    for _ in range(STEPS):
        total += float(here @ mdp.reward[:, 0])
        here = here @ walk
    return total


def draw_cells(
    axes: Axes,
    values: Tensor,
    *,
    policy: Tensor | None = None,
    arrows: str = "white",
    walls: str = "white",
    **shades: Any,
) -> Any:
    """The map with a number per cell as its shade.

    Args:
        values: one per state, (S,).
        policy: π, (S, A); its likeliest moves become arrows.
        arrows, walls: their colours.
        shades: passed to ``Axes.imshow``, such as `vmin`, `vmax`, `cmap`.

    Returns:
        The image, for a colour bar.
    """
    cells = np.full((len(_MAP), len(_MAP[0])), np.nan)
    rows, columns = np.array(CELLS).T
    cells[rows, columns] = values
    axes.set_facecolor(walls)
    image = axes.imshow(cells, **shades)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    if policy is not None:
        up, right = np.array(_MOVES)[policy.argmax(-1).numpy()].T
        axes.quiver(columns, rows, right, -up, color=arrows, scale=14, width=0.008, pivot="middle")
    return image


def draw_worlds(reward: Tensor, policy: Tensor, *, title: str) -> Figure:
    """The true reward beside a learned one, with the likeliest move of a policy as arrows.

    Args:
        reward: learned, (S, A); shown is its mean under the policy, shifted and scaled to [0, 1],
            since answers leave the shift open, and an oracle's the scale too.
        policy: π, (S, A).
    """
    from birl_ext.runs import plots

    figure, axes = plots.new_figure(1, 2, size=(8.2, 4.0))
    found = (reward * policy).sum(-1)
    found = (found - found.min()) / (found.max() - found.min()).clamp(min=1e-12)
    draw_cells(axes[0], gridworld_mdp(0.0).reward[:, 0], vmin=0, vmax=1)
    image = draw_cells(axes[1], found, policy=policy, vmin=0, vmax=1)
    axes[0].set_title("true reward")
    axes[1].set_title("learned reward, and where the policy goes")
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


gymnasium.register(
    GRIDWORLD,
    entry_point=f"{__name__}:Gridworld",
    max_episode_steps=STEPS,
    reward_threshold=THRESHOLD,
)
