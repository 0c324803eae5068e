"""Linear systems with M = I − γP_π and its transpose, the constant mode kept apart from the rest.

M maps the constant 1 to d = 1 − γ + γ·(what ends), which is tiny near γ = 1: a solution then is a
large constant and a small remainder, and one number for both would round the remainder away. So x
= M⁻¹b is handed out as x = W + g/D with Mw + κg = b (M19), and the transposed system is told Σκλ,
which a sum over its right-hand side only has up to rounding (M20). D is the largest entry of d and
κ = d/D: where every row continues D = 1 − γ and κ = 1, and no derivative of κ is left.

Each derivative of either system is again a system of the two kinds. With P for P/σ, `push` has

    MW + κg = b,   M dW + κ dg = db − dM W − dκ g,   dM = −Σ_a (dγ πP + γ dπ P + γπ dP),
    b̄ = λ with Mᵀλ = W̄ and Σκλ = ḡ,   P̄ = γπλ (W − PW)/σ,
    π̄ = γλ PW − gλ ∂κ/∂π,   γ̄ = Σ λ P_π W − Σ gλ ∂κ/∂γ,

and `flow`, whose unknown is that λ, has b̄ = W and m̄ = g with MW + κg = λ̄, and
the other cotangents as there. π sums to one, and its tangents to zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from birl_ext.ops.backends import choice
from birl_ext.ops.backends.native import LARGEST_CONDITION, check_condition
from birl_ext.ops.request import AUTO, PolicySystem
from birl_ext.ops.rows import Rows
from birl_ext.ops.transforms import (
    Function,
    define,
    in_graph,
    join_mapped_axis,
    split_mapped_axis,
)

__all__ = ["Exits", "Flow", "Push", "System", "discounted_sum", "discounted_visits"]


class Exits(NamedTuple):
    """Where the process leaves, in units of D = 1 − γ + γ·most.

    `most` is a constant to derivatives: solutions do not depend on D. Each quantity is written so
    that nothing cancels, neither in it nor in its derivatives, whether `most` is zero or one.
    """

    ends: Tensor  # (N, 1, S, A) bool: nothing follows
    stopping: Tensor  # (N, G, S), probability of an end
    most: Tensor  # (N, G), its largest
    discount: Tensor  # (N, G)

    @classmethod
    def of(cls, scale: Tensor, policy: Tensor, discount: Tensor) -> Exits:
        """From 1/σ and π, which sums to one."""
        ends = scale == 0
        stopping = (policy * ends).sum(-1)
        return cls(ends, stopping, stopping.detach().amax(-1), discount)

    @property
    def largest(self) -> Tensor:
        """D, (N, G)."""
        return (1 - self.discount) + self.discount * self.most

    def share(self) -> Tensor:
        """κ = d/D, (N, G, S)."""
        gamma = self.discount.unsqueeze(-1)
        return ((1 - gamma) + gamma * self.stopping) / self.largest.unsqueeze(-1)

    def rest(self) -> Tensor:
        """(1 − γ)/D, (N, G): one where every row continues."""
        largest = self.largest
        near = 1 - self.discount * self.most / largest
        return torch.where(self.most <= 1 - self.discount, near, (1 - self.discount) / largest)

    def leave(self) -> Tensor:
        """(1 − γσ)/D with σ = 0 where the process ends, else 1: (N, G, S, A)."""
        ending = (1 / self.largest)[..., None, None]
        return torch.where(self.ends, ending, self.rest()[..., None, None])

    def relief(self) -> Tensor:
        """σ − (1 − γσ)/D, (N, G, S, A): zero where every row continues."""
        largest = self.largest
        ending = (-1 / largest)[..., None, None]
        return torch.where(
            self.ends, ending, (self.discount * self.most / largest)[..., None, None]
        )


class System(PolicySystem):
    """M, with what its derivatives take."""

    __slots__ = ()

    @property
    def rows(self) -> Rows:
        return Rows(*self[:3], *self.policy.shape[-2:])

    def exits(self) -> Exits:
        return Exits.of(self.rows.scale(), self.policy, self.discount)

    def solve(self, rhs: Tensor, transpose: bool, backend: int = AUTO) -> tuple[Tensor, Tensor]:
        """M⁻¹b or M⁻ᵀb in one number each, and its residual."""
        return choice.policy_solve(self, rhs, transpose, backend)

    def moves(self) -> tuple[Tensor, Tensor, Tensor]:
        """1/σ, and of κ the derivatives with respect to γ (N, G, S) and to π (N, G, S, A)."""
        scale = self.rows.scale()
        exits = Exits.of(scale, self.policy, self.discount)
        largest = exits.largest
        by_discount = (exits.stopping - exits.most.unsqueeze(-1)) / largest.square().unsqueeze(-1)
        slope = (self.discount / largest)[..., None, None]
        by_policy = torch.where(exits.ends, slope, 0.0)  # as Σπ stays one
        return scale, by_discount, by_policy

    def cotangents(
        self, u: Tensor, w: Tensor, gain: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Cotangents of P, π and γ in −uᵀ(dM w + dκ g)."""
        transition_bar = policy_bar = discount_bar = None
        if not any(needs):
            return None, None, None
        scale, by_discount, by_policy = self.moves()
        expected = self.apply(scale, w)  # (N, G, K, S, A)
        visits = u.unsqueeze(-1) * expected
        drift = (gain.unsqueeze(-1) * u).sum(2)
        gamma = self.discount[..., None, None]
        if needs[0]:
            weight = (gamma * self.policy * scale).unsqueeze(2) * u.unsqueeze(-1)
            transition_bar = self.rows.outer(
                _as_group(weight), _as_group(w), (weight * expected).sum((1, 2))
            )
        if needs[1]:
            policy_bar = gamma * visits.sum(2) - drift.unsqueeze(-1) * by_policy
        if needs[2]:
            discount_bar = (self.policy.unsqueeze(2) * visits).sum((2, 3, 4))
            discount_bar = discount_bar - (drift * by_discount).sum(-1)
        return transition_bar, policy_bar, discount_bar

    def tangents(
        self, dots: tuple[Any, ...], x: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor] | None:
        """−dM x, or −dMᵀx, and dκ (N, G, S)."""
        transition_dot, _, _, policy_dot, discount_dot = dots
        if transition_dot is None and policy_dot is None and discount_dot is None:
            return None
        scale, by_discount, by_policy = self.moves()
        gamma, pi = self.discount[..., None, None], self.policy.unsqueeze(2)
        weight_dot = torch.zeros_like(pi)
        share_dot = torch.zeros_like(self.policy[..., 0])
        if policy_dot is not None:
            weight_dot = weight_dot + gamma.unsqueeze(2) * policy_dot.unsqueeze(2)
            share_dot = share_dot + (by_policy * policy_dot).sum(-1)
        if discount_dot is not None:
            weight_dot = weight_dot + discount_dot[..., None, None, None] * pi
            share_dot = share_dot + by_discount * discount_dot.unsqueeze(-1)
        if transpose:
            visits = x.unsqueeze(-1)
            moved = self.pull(scale, visits * weight_dot)
        else:
            expected = self.apply(scale, x)
            moved = (weight_dot * expected).sum(-1)
        if transition_dot is not None:
            rows_dot = self.rows.with_data(transition_dot)
            drift = (rows_dot.sums() * scale).unsqueeze(2)
            going = self._replace(transition=transition_dot)
            if transpose:
                weight = gamma.unsqueeze(2) * pi * visits
                moved = moved + going.pull(scale, weight) - self.pull(scale, weight * drift)
            else:
                change = going.apply(scale, x) - expected * drift
                moved = moved + gamma * (pi * change).sum(-1)
        return moved, share_dot

    def apply(self, scale: Tensor, vector: Tensor) -> Tensor:
        """Σ_t P v / σ for K vectors per problem: (N, G, K, S) → (N, G, K, S, A)."""
        ahead = self.rows.apply(_as_group(vector))
        return ahead.reshape(*vector.shape, self.rows.actions) * scale.unsqueeze(2)

    def pull(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Σ_{s,a} w P(t|s,a) / σ for K weights per problem: (N, G, K, S, A) → (N, G, K, S)."""
        return self.rows.pull(_as_group(weight * scale.unsqueeze(2))).reshape(weight.shape[:-1])


def _as_group(columns: Tensor) -> Tensor:
    """(N, G, K, …) → (N, G·K, …): to the transition, K vectors are K problems."""
    shape = columns.shape
    return columns.reshape(shape[0], shape[1] * shape[2], *shape[3:])


def _ones(rhs: Tensor) -> Tensor:
    return rhs.new_ones((*rhs.shape[:2], 1, rhs.shape[3]))


def _why(slow: Tensor, slow_residual: Tensor, residual: Tensor) -> Tensor:
    """The residual that tells why a solution is NaN: the slow mode's if that was not solved."""
    return torch.where(slow.isnan().any(-1), slow_residual, residual)


# By the order of the derivative: the condition that is too large, where the process ends and where
# it goes on for ever, and the 1 − γ above which none is looked for. At second order rounding is
# magnified by its square, and where the process ends once more: no mass is known beforehand there.
LIMITS = {1: (LARGEST_CONDITION, LARGEST_CONDITION, 1e-6), 2: (1e2, 1e3, 1e-3)}
PROBES = torch.tensor([12.9898, 78.233, 37.719, 4.581], dtype=torch.float64)  # incommensurable


def _push(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, rhs, order, backend = args
    system = System(*tensors)
    exits = system.exits()
    share = exits.share().unsqueeze(2)
    slow, slow_residual = system.solve(_ones(rhs), True, backend)
    _check_condition(system, slow, share, order, backend)
    level = (slow * rhs).sum(-1) / (slow * share).sum(-1)
    x, residual = system.solve(rhs - level.unsqueeze(-1) * share, False, backend)
    # where the process is most, W is zero: at a state that matters to the others
    busiest = slow.abs().argmax(-1, keepdim=True).expand(*x.shape[:-1], 1)
    middle = x.gather(-1, busiest)
    gain = level + middle.squeeze(-1) * exits.largest.unsqueeze(-1)
    return x - middle, gain, _why(slow, slow_residual, residual)


def _check_condition(system: System, slow: Tensor, share: Tensor, order: int, backend: int) -> None:
    """Warn where arbitrary right-hand sides without mass have an answer out of all proportion."""
    if order not in LIMITS or slow.is_cuda:
        return
    ends, lasts, gap = LIMITS[order]
    if not bool((1 - system.discount < gap).any()):
        return
    # several, for one may happen to have no mass in either of two parts that are hardly ever left
    place = torch.arange(1, slow.shape[-1] + 1, dtype=torch.float64)
    probe = (PROBES.unsqueeze(-1) * place).sin()
    probe = (probe - probe.mean(-1, keepdim=True)).expand(*slow.shape[:2], -1, -1)
    x, _ = system.solve(probe, True, backend)
    x = x - (share * x).sum(-1, keepdim=True) / (share * slow).sum(-1, keepdim=True) * slow
    condition = (x.abs().sum(3) / probe.abs().sum(3).clamp(min=1e-300)).amax(2)
    ending = system.exits().most > 0
    largest = torch.where(ending, ends, lasts).flatten()
    condition = condition.nan_to_num(0.0).flatten()
    worst = int((condition / largest).argmax())
    check_condition(float(condition[worst]), worst, float(largest[worst]))


def _flow(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, rhs, mass, order, backend = args
    system = System(*tensors)
    share = system.exits().share().unsqueeze(2)
    both, residual = system.solve(torch.cat([rhs, _ones(rhs)], 2), True, backend)
    x, slow = both[:, :, :-1], both[:, :, -1:]
    _check_condition(system, slow, share, order, backend)
    # What is nowhere negative has its digits entry by entry, zeros too: only its size is set.
    total = (share * x).sum(-1)
    positive = (rhs >= 0).all(-1) & (mass > 0) & (total > 0)
    along = torch.where(positive.unsqueeze(-1), x, slow)
    left = mass - total
    step = left / (share * along).sum(-1)
    return x + step.unsqueeze(-1) * along, _why(slow, residual[:, :, -1:], residual[:, :, :-1])


class Push(Function):
    """(W, g) and a residual: MW + κg = b, so that x = W + g/D is M⁻¹b.

    Shapes: transition as in Rows; policy (N, G, S, A); discount (N, G); b and W (N, G, K, S); g
    and the residual (N, G, K). `order` is that of the derivative of which this is part, 0 if of
    none: what its condition may be depends on it. W + k with g − kD is the same solution: what is
    made of the two must not tell them apart. π sums to one, and its tangents to zero.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.order, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, *output[:2])
        ctx.save_for_forward(*tensors, *output[:2])

    @staticmethod
    def backward(
        ctx: Any, x_bar: Tensor | None, gain_bar: Tensor | None, _: Tensor | None
    ) -> tuple[Any, ...]:
        *tensors, x, gain = ctx.saved_tensors
        if x_bar is None and gain_bar is None:
            return (None,) * 8
        x_bar = torch.zeros_like(x) if x_bar is None else x_bar
        gain_bar = torch.zeros_like(gain) if gain_bar is None else gain_bar
        system = System(*tensors)
        rhs_bar, _ = Flow.apply(*tensors, x_bar, gain_bar, ctx.order + 1, ctx.backend)
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4))
        transition_bar, policy_bar, discount_bar = system.cotangents(rhs_bar, x, gain, needs)
        return transition_bar, None, None, policy_bar, discount_bar, rhs_bar, None, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Tensor, Tensor, None]:
        *tensors, x, gain = ctx.saved_tensors
        rhs = torch.zeros_like(x) if dots[5] is None else dots[5]
        system = System(*tensors)
        moved = system.tangents(dots[:5], x, False)
        if moved is not None:
            rhs = rhs + moved[0] - gain.unsqueeze(-1) * moved[1].unsqueeze(2)
        x_dot, gain_dot, _ = Push.apply(*tensors, rhs, ctx.order + 1, ctx.backend)
        return x_dot, gain_dot, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _mapped(Push, info.batch_size, in_dims, args, sides=1)


class Flow(Function):
    """λ and a residual: Mᵀλ = b and Σ_s κ(s)λ(s) = m, one and the same where m = Σb/D exactly.

    Shapes as for `Push`, m (N, G, K). Rounding leaves in M⁻ᵀb an error along the slow mode, which
    m takes off.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, _, ctx.order, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[0])
        ctx.save_for_forward(*tensors, output[0])

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        *tensors, x = ctx.saved_tensors
        if x_bar is None:
            return (None,) * 9
        system = System(*tensors)
        rhs_bar, gain, _ = Push.apply(*tensors, x_bar, ctx.order + 1, ctx.backend)
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4))
        transition_bar, policy_bar, discount_bar = system.cotangents(x, rhs_bar, gain, needs)
        return transition_bar, None, None, policy_bar, discount_bar, rhs_bar, gain, None, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Tensor, None]:
        *tensors, x = ctx.saved_tensors
        rhs = torch.zeros_like(x) if dots[5] is None else dots[5]
        mass = torch.zeros_like(x[..., 0]) if dots[6] is None else dots[6]
        system = System(*tensors)
        moved = system.tangents(dots[:5], x, True)
        if moved is not None:
            rhs = rhs + moved[0]
            mass = mass - (moved[1].unsqueeze(2) * x).sum(-1)
        x_dot, _ = Flow.apply(*tensors, rhs, mass, ctx.order + 1, ctx.backend)
        return x_dot, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _mapped(Flow, info.batch_size, in_dims, args, sides=2)


def _mapped(
    rule: type[Function], size: int, dims: tuple[int | None, ...], args: tuple[Any, ...], sides: int
) -> tuple[Any, Any]:
    tensors, options = args[: 5 + sides], args[5 + sides :]
    if dims[0] is None and dims[3] is None and dims[4] is None:  # right-hand sides: more columns
        columns = [
            (
                side.unsqueeze(2).expand(*side.shape[:2], size, *side.shape[2:])
                if dim is None
                else side.movedim(dim, 2)
            ).flatten(2, 3)
            for side, dim in zip(tensors[5:], dims[5:], strict=False)
        ]
        outputs = rule.apply(*tensors[:5], *columns, *options)
        return tuple(x.unflatten(2, (size, x.shape[2] // size)) for x in outputs), (2,) * len(
            outputs
        )
    mapped, axis = join_mapped_axis(tensors, dims[: 5 + sides], size)
    return split_mapped_axis(rule.apply(*mapped, *options), axis, size)


def _like_push(*args: Any) -> tuple[Tensor, ...]:
    rhs = args[5]
    return rhs.new_empty(rhs.shape), *(rhs.new_empty(rhs.shape[:-1]) for _ in range(2))


def _like_flow(*args: Any) -> tuple[Tensor, ...]:
    return _like_push(*args)[:2]


_OPTIONS: dict[str, type] = {"order": int, "backend": int}
define(Push, _push, _like_push, System, {"rhs": Tensor}, _OPTIONS, results=3)
define(Flow, _flow, _like_flow, System, {"rhs": Tensor, "mass": Tensor}, _OPTIONS, results=2)


@in_graph
def discounted_sum(system: System, rhs: Tensor, backend: int = AUTO) -> tuple[Tensor, Tensor]:
    """M⁻¹b (N, G, K, S) and its residual (N, G, K)."""
    x, gain, residual = Push.apply(*system, rhs, 0, backend)
    return x + (gain / system.exits().largest.unsqueeze(-1)).unsqueeze(-1), residual


@in_graph
def discounted_visits(system: System, start: Tensor, backend: int = AUTO) -> tuple[Tensor, Tensor]:
    """(1 − γ)M⁻ᵀρ (N, G, K, S) and its residual (N, G, K)."""
    rhs = (1 - system.discount)[..., None, None] * start
    mass = system.exits().rest().unsqueeze(-1) * start.sum(-1)
    return Flow.apply(*system, rhs, mass, 0, backend)
