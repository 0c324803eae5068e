"""Adaptive model design: the gradient carried along by the sweeps of value iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from birl_ext.bilevel import variables
from birl_ext.bilevel.additive_problem import AdditiveProblem, table_slopes
from birl_ext.bilevel.algorithm import Maker
from birl_ext.bilevel.follower import Follower
from birl_ext.bilevel.guards import check_count, check_objective
from birl_ext.bilevel.hypergradient import known
from birl_ext.bilevel.model_descent import ModelDescent, RivalOutcome
from birl_ext.bilevel.problem import Temperature
from birl_ext.errors import GradientError, ShapeError
from birl_ext.ops.rows import Rows

__all__ = ["AMD"]


class AMD(ModelDescent[RivalOutcome]):
    """Synchronous sweeps of four tables, carried over from step to step.

        Q ← r + γPV,       V = τ log Σ_a μ exp(Q/τ),   π its softmax
        ∇Q ← ∇r + γP∇V,    ∇V = Σ_a π ∇Q
        U ← g + γ_u P J,   J = Σ_a π U
        W ← ∇g + (U − J)(∇Q − ∇V)/τ + γ_u P Σ_a π W,   ∇φ̂ = −mean over s_0 of Σ_a π W

    All from the tables before. A sweep costs S·A·S numbers of P times 2 + 2d, and the tables are
    S·A·(2 + 2d) numbers, where the adjoint of (M12) does without the factor of d.

    Args:
        problem: an AdditiveProblem; x may shape its rewards r and g, nothing else.
        x, temperature, optimiser, noise, seed: as those of `MSoBiRL`.
        sweeps: per outer step.
        follower: one of a model that had to be fitted; the sweeps are the method's own.

    Raises:
        OptionError: a number out of its range, a follower of sweeps, or another problem.
        GradientError (`step`): x shapes the transition, discount, reference or start.

    Source: Chen et al. (2022), as Thoma et al. (2024) compare with it; (M15) at its fixed point.
    """

    STATE = ("_tables",)
    OPTIONAL = (*ModelDescent.OPTIONAL, "_tables")
    FORM = AdditiveProblem
    OWN_SWEEPS = True

    def __init__(
        self,
        problem: AdditiveProblem,
        x: variables.Variables,
        *,
        temperature: Temperature,
        optimiser: Maker,
        sweeps: int = 100,
        noise: float = 0.0,
        seed: int = 0,
        follower: Follower | None = None,
    ) -> None:
        self.sweeps = check_count("sweeps", sweeps)
        super().__init__(
            problem,
            x,
            temperature=temperature,
            optimiser=optimiser,
            noise=noise,
            seed=seed,
            follower=follower,
        )
        self._tables: Tensor | None = None  # Q, U, ∇Q and W, (N, S, A, G, 2 + 2d)

    def _estimate(self, tau: float | Tensor) -> tuple[Tensor, list[Tensor]]:
        mdp = self._model()
        gain = self.problem.gain(self.x, mdp)
        start = self.problem.first(mdp)
        flat = mdp.flatten(tau)
        data, layout = flat.data, flat.layout
        fixed = {
            "transition": data.transition,
            "discount": data.discount,
            "reference": data.log_reference,
            "initial_distribution": start,
        }
        for name, part in fixed.items():
            if part.requires_grad:
                raise GradientError(
                    f"the {name} depends on x, and AMD differentiates the rewards alone",
                    allowed="an x that shapes r and g",
                    fix="use MSoBiRL, or AdditiveProblem.bilevel() with another method",
                )
        own = variables.leaves(self.x)

        def inside(table: Tensor) -> Tensor:
            """(*B, S, A, k) to (N, S, A, G, k)."""
            return layout.grouped(table.double(), 3).permute(0, 2, 3, 1, 4)

        batch, given = layout.batch_shape, gain.shape[:-2]
        pairs = zip(reversed(given), reversed(batch), strict=False)
        if len(given) > len(batch) or any(ours not in (1, whole) for ours, whole in pairs):
            raise ShapeError(
                f"reward returned shape {tuple(gain.shape)}",
                allowed=f"what broadcasts to {(*batch, *gain.shape[-2:])}",
            )
        paid = [inside(table.detach().unsqueeze(-1)) for table in (mdp.reward, gain)] + [
            inside(table_slopes(table, self.x, own)) for table in (mdp.reward, gain)
        ]
        base = torch.cat(paid, -1)
        d = paid[2].shape[-1]  # numbers of x, of each start
        if self._tables is None:
            tables = torch.zeros_like(base)
        elif self._tables.shape == base.shape:
            tables = self._tables
        else:
            raise ShapeError(
                f"the tables that the last step left are of shape {tuple(self._tables.shape)}",
                allowed=f"{tuple(base.shape)}, by the MDP of `lower`",
                fix="keep the shape of the MDP, or begin with a new AMD",
            )
        rows = Rows(data.transition, *data.pattern, mdp.states, mdp.actions)
        ahead = _Ahead(rows)
        temperature = data.temperature[:, None, None, :]  # (N, 1, 1, G)
        ours, theirs = data.discount, data.discount
        if self.problem.discount is not None:
            theirs = torch.full_like(ours, self.problem.discount)
        discounts = torch.stack([ours, theirs], -1)[..., [0, 1, *[0] * d, *[1] * d]]
        discounts = discounts[:, None, None]  # (N, 1, 1, G, 2 + 2d)
        prior = None
        if data.log_reference.dim() > 1:
            prior = data.log_reference.permute(0, 2, 3, 1)
        with torch.no_grad():
            for _ in range(self.sweeps):
                means, _ = _means(tables, temperature, prior)
                rise = tables[..., 1 : 2 + d] - means[:, :, None, :, 1 : 2 + d]
                rise = rise[..., :1] * rise[..., 1:] / temperature.unsqueeze(-1)
                tables = ahead(means).mul_(discounts).add_(base)
                tables[..., 2 + d :] += rise
            means, _ = _means(tables, temperature, prior)
            found = layout.restore(means.permute(0, 2, 1, 3))  # (*B, S, 2 + 2d)
            found = (found * start.double().unsqueeze(-1)).sum(-2)
            at_start = found.reshape(*variables.starts(self.x), -1, 2 + 2 * d).mean(-2)
        self._tables = tables
        phi = -at_start[..., 1].to(mdp.dtype)
        check_objective(phi, self.steps, "reward")
        slopes = variables.split(-at_start[..., 2 + d :], self.x)
        gradient = [part.to(leaf) for part, leaf in zip(slopes, own, strict=True)]
        return phi, known(gradient, variables.named(self.x), self.steps)

    def _outcome(self, phi: Tensor, norm: Tensor, tau: float | Tensor) -> RivalOutcome:
        return RivalOutcome(phi, norm, tau)


class _Ahead:
    """v (N, S, G, k) → Σ_t P(t|s,a) v(t), (N, S, A, G, k)."""

    def __init__(self, rows: Rows) -> None:
        data, shape = rows.data.double(), (rows.states * rows.actions, rows.states)
        scale = rows.scale().squeeze(1).flatten(1)  # (N, S·A)
        self.rows = rows
        self.matrices: list[Tensor]
        if rows.dense:
            self.matrices = list((data.reshape(-1, *shape) * scale.unsqueeze(-1)).unbind())
        else:
            entries = data * scale[:, rows.entry_rows]
            places = torch.stack([rows.entry_rows, rows.col])
            self.matrices = [
                torch.sparse_coo_tensor(
                    places, one, shape, is_coalesced=True, check_invariants=False
                )
                for one in entries.unbind()
            ]

    def __call__(self, values: Tensor) -> Tensor:
        flat = values.reshape(*values.shape[:2], -1)
        found = torch.stack([m @ v for m, v in zip(self.matrices, flat, strict=True)])
        return found.reshape(-1, self.rows.states, self.rows.actions, *values.shape[2:])


def _means(tables: Tensor, temperature: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """V and the means of the other tables under π, (N, S, G, 2 + 2d); and π, (N, S, A, G)."""
    scaled = tables[..., 0] / temperature
    if prior is not None:
        scaled = scaled + prior
    log_sum = scaled.logsumexp(2)
    policy = (scaled - log_sum.unsqueeze(2)).exp()
    means = torch.einsum("nsag,nsagk->nsgk", policy, tables)
    means[..., 0] = temperature.squeeze(2) * log_sum
    return means, policy
