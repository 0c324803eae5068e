"""The pure-PyTorch backend of the ops: any device, no compiler, the same answers as the compiled
modules.

Everything is batched over (N, G); an element that has finished is frozen, so no element can change
another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from birl_ext.model import checks
from birl_ext.ops.backends.problem import EPS, LEAST, Problem, Sweep, one_by_one
from birl_ext.ops.backends.refinement import drowns, refine
from birl_ext.ops.request import Data, PolicySystem, Settings
from birl_ext.ops.rows import Rows
from birl_ext.solution import INFO, Info, Kernel, Method, Rigour, Status, info_table

__all__ = ["bellman", "policy_solve", "settle", "solve"]

TINY = torch.finfo(torch.float64).tiny  # below, numbers have fewer digits
SPARSE_DIRECT_STATES = 200  # above, products with few entries per row beat a dense LU
DIRECT_STATES = 1500  # above, an LU of (I − γP_π) costs more than the Krylov products it saves
RETRY_STATES = 8192  # above, the S² numbers of an LU, a GiB with its copies, are too many to try
REFINED_STATES = 512  # above, the last sweeps of values that differ much in size take products
GIVE_UP = 30  # passes after which Newton's method has no use for Krylov methods
HAND_OVER = 150  # passes after which modified policy iteration has met slow mixing
SWEEPS_PER_POLICY = 40  # of modified policy iteration: between the 20 and 60 that suit grids


def bellman(data: Data, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sweep = Problem.of(data).sweep(value, torch.zeros_like(data.discount))
    return tuple(sweep)  # type: ignore[return-value]


def solve(data: Data, initial: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    iteration = _Iteration(data, initial, settings)
    iteration.run()
    iteration.refine()
    return iteration.outputs()


class _Pass(NamedTuple):
    """What one sweep of all problems proves, (N, G); (M6)."""

    step: Sweep
    delta: Tensor  # TV − V, (N, G, S)
    middle: Tensor  # of δ, where the constant mode is neutral
    half: Tensor  # half-span of δ
    bound: Tensor  # on the error, rounding included
    unit: Tensor  # of what rounding makes of δ
    magnitude: Tensor  # of the numbers behind it
    anchor: Tensor  # middle of the image
    constant: Tensor  # the image less its anchor, and this, is what the pass hands out
    size: Tensor  # max(‖V‖∞, τ) of that
    drowned: Tensor  # in a start far off: what looks converged is not

    @property
    def finite(self) -> Tensor:
        return torch.isfinite(self.half) & torch.isfinite(self.size) & torch.isfinite(self.constant)


class _Iteration:
    """Sweeps and Newton's steps of a whole batch, each problem until it has ended: what
    csrc/core/control.h decides for one.
    """

    def __init__(self, data: Data, initial: Tensor, settings: Settings) -> None:
        self.settings, self.tol, self.dtype = settings, settings.tol, data.reward.dtype
        self.problem = problem = Problem.of(data)
        self.status, place, culprit = _inspect(problem, data.transition, settings.validate)
        self.states, actions = data.reward.shape[-2:]
        self.automatic = settings.method == Method.AUTO
        method = Method(_choose(problem) if self.automatic else settings.method)
        newton = method in (Method.NEWTON, Method.KRYLOV)
        self.limit = settings.max_iterations or (1000 if newton else 1_000_000)

        self.gamma = gamma = data.discount
        self.one_minus = 1 - gamma
        self.nothing = torch.zeros_like(gamma)
        self._become(method)
        available = problem.available
        rows_go_on, seen = problem.continues, problem.reward.abs()
        largest_reference = torch.zeros_like(gamma)
        if available is not None and problem.log_reference is not None:
            rows_go_on, seen = rows_go_on | ~available, torch.where(available, seen, 0.0)
            weights = torch.where(available, problem.log_reference.abs(), 0.0)
            largest_reference = weights.amax((-1, -2))
        self.continuing = rows_go_on.flatten(2).all(-1).expand_as(gamma)
        self.some_end = not bool(self.continuing.all())
        self.horizon = torch.where(gamma > 0, gamma / self.one_minus, 0.0)
        self.top_reward = seen.amax((-1, -2))
        entropy = problem.temperature * (math.log(actions) + largest_reference)
        self.soft = problem.temperature + entropy
        # what a product of S terms and a soft maximum are off by
        self.rounding = 8 + math.log2(self.states + 1)
        # and what they can be off by: half an ulp for each addition
        self.certain = 8 + problem.rows.longest / 2 + actions / 2
        # what a value below the normal numbers loses where it is handed out
        self.underflow = 2.0**-150 if self.dtype == torch.float32 else 0.0
        self._start(initial, (self.top_reward + entropy) / self.one_minus)

        self.active = self.status == 0
        self.done_value, self.done_offset = self.value.clone(), self.offset.clone()
        self.table = [torch.full_like(problem.reward, torch.nan) for _ in range(3)]
        self.info = info_table(
            gamma.shape,
            self.states,
            gamma.device,
            place=place,
            culprit=culprit,
            temperature=problem.temperature,
            kernel=Kernel.TORCH,
        )
        self.best = torch.full_like(gamma, math.inf)
        self.stalled, self.sizes = torch.zeros_like(self.status), torch.zeros_like(gamma)
        self.products = torch.zeros_like(gamma)
        # Where Krylov's method is stuck, or would be: ends that may be never reached, near γ = 1.
        self.eliminated = (
            ~self.continuing & (self.one_minus < 1e-6) & (self.states <= DIRECT_STATES)
        )

    def _start(self, initial: Tensor, most: Tensor) -> None:
        """V = c + W: a start that V* cannot be as large as is no nearer to it."""
        reward = self.problem.reward
        self.value = torch.zeros(reward.shape[:-1], dtype=torch.float64, device=reward.device)
        self.offset = torch.zeros_like(self.gamma)
        if initial.dim() > 1:
            most = most.unsqueeze(-1)
            initial = torch.where(initial.isfinite(), initial.clamp(-most, most), initial)
            self.offset = initial.amax(-1) / 2 + initial.amin(-1) / 2
            self.value = initial - self.offset.unsqueeze(-1)

    def run(self) -> None:
        for passes in range(1, self.limit + 1):
            found = self._sweep()
            ended, hopeless = self._judge(found)
            finished = self.active & ended if passes < self.limit else self.active
            if bool(finished.any()):
                self._keep(found, finished, passes)
                reason = torch.where(hopeless, int(Status.STAGNATED), int(Status.CONVERGED))
                reason = torch.where(found.finite, reason, int(Status.NON_FINITE))
                reason = torch.where(ended, reason, int(Status.MAX_ITERATIONS))
                self.status = torch.where(finished, reason, self.status)
                self.active = self.active & ~finished
            if not bool(self.active.any()):
                return
            self._advance(found, passes)

    def _scale(self, span: Tensor, value: Tensor, constant: Tensor, change: Tensor) -> Tensor:
        """Size of the numbers whose rounding enters δ; a reward counts where it is taken."""
        base = span + self.one_minus * constant
        if self.some_end:
            base = base + torch.where(self.continuing, 0.0, value)
        base = base + self.soft
        return base + torch.minimum(self.top_reward, base + change)

    def _sweep(self) -> _Pass:
        gamma, one_minus, offset = self.gamma, self.one_minus, self.offset
        step = self.problem.sweep(self.value, offset)
        delta = step.image - self.value - (one_minus * offset).unsqueeze(-1)
        low, high = delta.amin(-1), delta.amax(-1)
        middle, half = (low + high) / 2, (high - low) / 2
        if self.some_end:
            # the constant mode is not neutral there: the bracket of (M6) must contain 0
            low = torch.where(self.continuing, low, low.clamp(max=0))
            high = torch.where(self.continuing, high, high.clamp(min=0))
            middle = torch.where(self.continuing, middle, 0.0)
            half = torch.where(self.continuing, half, torch.maximum(-low, high))
        span = self.value.amax(-1) - self.value.amin(-1)
        change = torch.maximum(low.abs(), high.abs())
        magnitude = self._scale(span, offset.abs(), offset.abs(), change)
        unit = self.rounding * (EPS * magnitude).clamp(min=LEAST)
        bound = (gamma * half + self.certain / self.rounding * unit) / one_minus
        least, most = step.image.amin(-1), step.image.amax(-1)
        anchor = (most + least) / 2
        constant = gamma * offset + anchor + self.horizon * middle
        # of the value that this pass hands out, not of the one it started from
        largest = constant.abs() + (most - least) / 2
        after = self._scale(most - least, largest, largest, self.nothing)
        return _Pass(
            step,
            delta,
            middle,
            half,
            bound,
            unit,
            magnitude,
            anchor,
            constant,
            size=torch.maximum(largest, self.problem.temperature),
            drowned=magnitude > 8 * after,
        )

    def _become(self, method: Method) -> None:
        self.method = method
        by_sweeps = {Method.VALUE_ITERATION: 1, Method.POLICY_ITERATION: SWEEPS_PER_POLICY}
        sweeps = by_sweeps.get(method)
        self.fast = 0.9 if sweeps else 0.5  # what a residual falls to
        # a sweep's falls by a tenth within some sweeps unless rounding keeps it up
        self.patience = 2 + torch.floor(0.11 / self.one_minus / sweeps) if sweeps else 3

    def _judge(self, found: _Pass) -> tuple[Tensor, Tensor]:
        """Which problems end by themselves with this pass, and those of them that will get no
        nearer to the tolerance.
        """
        half, unit = found.half, found.unit
        slow = half > self.fast * self.best
        self.stalled = torch.where(slow, self.stalled + 1, 0)
        at_floor = (half <= unit / 2) | ((half <= 100 * unit) & (self.stalled >= self.patience))
        at_floor &= ~found.drowned
        self.best = torch.where(found.drowned, math.inf, torch.where(slow, self.best, half))
        within = found.bound + self.underflow <= self.tol * found.size
        reached = within if self.tol > 0 else at_floor
        hopeless = at_floor & ~reached
        return reached | hopeless | ~found.finite, hopeless

    def _keep(self, found: _Pass, finished: Tensor, passes: int) -> None:
        """What the problems that have ended are handed out."""
        keep, info = finished.unsqueeze(-1), self.info
        image = found.step.image - found.anchor.unsqueeze(-1)
        self.done_value = torch.where(keep, image, self.done_value)
        self.done_offset = torch.where(finished, found.constant, self.done_offset)
        tables = (found.step.advantage, found.step.policy, found.step.log_policy)
        self.table = [
            torch.where(keep.unsqueeze(-1), new, old)
            for new, old in zip(tables, self.table, strict=True)
        ]
        for column, number in (
            (Info.RESIDUAL, found.half),
            (Info.ERROR_BOUND, found.bound),
            (Info.PRODUCTS, self.products),
        ):
            info[..., column] = number.where(finished, info[..., column])
        info[..., Info.PASSES].masked_fill_(finished, passes)
        self.sizes = torch.where(finished, found.magnitude, self.sizes)

    def _advance(self, found: _Pass, passes: int) -> None:
        direct = self.states <= DIRECT_STATES
        if self.automatic and self.method == Method.POLICY_ITERATION and passes >= HAND_OVER:
            self._become(Method.NEWTON if direct else Method.KRYLOV)
        if self.method == Method.KRYLOV and passes >= GIVE_UP and direct:
            self._become(Method.NEWTON)
        if self.method == Method.VALUE_ITERATION:
            move = _deflated(found.delta, found.middle, self.gamma, self.one_minus)
            shift = inner = self.nothing
        else:
            weight = found.step.policy * self.problem.scale
            system = _PolicySystem(self.problem.rows, weight, self.gamma, transpose=False)
            move, shift, inner = system.improve(
                found.delta, self.continuing, self.method, passes, self.eliminated
            )
        self.products += inner
        value = self.value + torch.where(self.active.unsqueeze(-1), move, 0.0)
        recentre = (value.amax(-1) + value.amin(-1)) / 2
        self.value = value - recentre.unsqueeze(-1)
        self.offset = self.offset + recentre + torch.where(self.active, shift, 0.0)

    def refine(self) -> None:
        """Solve those again whose small values drowned in large ones, each state by itself."""
        info, status = self.info, self.status
        info[..., INFO:] = info[..., Info.ERROR_BOUND].unsqueeze(-1)
        absolute, temperature = self._absolute(), self.problem.temperature
        ended = (status == int(Status.CONVERGED)) | (status == int(Status.STAGNATED))
        bound = info[..., Info.ERROR_BOUND]
        most = torch.maximum(absolute.abs().amax(-1), temperature)
        met = (bound + self.underflow <= self.tol * most) & (self.tol > 0)
        lost = ended & drowns(absolute, temperature, self.soft, self.sizes, bound, met)
        stuck = (status == int(Status.STAGNATED)) & (self.states <= REFINED_STATES)
        lost |= stuck  # of which an elimination may make more than the method at hand
        for n, g in lost.nonzero().tolist():
            self._refine_one(n, g, stuck=bool(stuck[n, g]))

    def _refine_one(self, n: int, g: int, *, stuck: bool) -> None:
        info, at = self.info, (slice(n, n + 1), slice(g, g + 1))
        used, asked = int(info[n, g, Info.PASSES]), self.settings.max_iterations
        if asked and used >= self.limit:
            if not stuck:
                self.status[n, g] = int(Status.MAX_ITERATIONS)
            return
        fine = refine(
            self.problem.one(n, g),
            self.done_value[at],
            self.done_offset[at],
            soft=self.soft[at],
            units=4 + self.certain,
            continuing=bool(self.continuing[n, g]),
            coarse=math.inf if stuck else float(self.certain * EPS * self.sizes[n, g]),
            eliminates=self.states <= REFINED_STATES,
            tol=self.tol,
            underflow=self.underflow,
            budget=self.limit - used if asked else 1000,
        )
        if fine is None:
            return
        self.done_value[at], self.done_offset[at] = fine.sweep.image, fine.offset
        for entry, new in zip(self.table, fine.sweep[1:], strict=True):
            entry[at] = new
        info[n, g, Info.RESIDUAL], info[n, g, INFO:] = fine.residual[0, 0], fine.bounds[0, 0]
        info[n, g, Info.ERROR_BOUND] = fine.bounds.amax()
        info[n, g, Info.PASSES] = used + fine.passes
        self.status[n, g] = int(fine.status)

    def _absolute(self) -> Tensor:
        return self.done_value + self.done_offset.unsqueeze(-1)

    def outputs(self) -> tuple[Tensor, ...]:
        """What `native.solve` returns; NaN where there is no solution."""
        info, absolute = self.info, self._absolute()
        q = self.table[0] + absolute.unsqueeze(-1)
        seen = torch.maximum(q.abs(), self.table[0].abs())
        if (available := self.problem.available) is not None:
            seen = torch.where(available, seen, 0.0)
        largest = torch.maximum(absolute.abs().amax(-1), seen.amax((-1, -2)))
        held = largest <= torch.finfo(self.dtype).max  # in the dtype handed out
        status = torch.where((self.status < 10) & ~held, int(Status.NON_FINITE), self.status)
        bad = (status >= 10) | (status == int(Status.NON_FINITE))
        absolute = torch.where(bad.unsqueeze(-1), torch.nan, absolute)
        value = torch.where(bad.unsqueeze(-1), torch.nan, self.done_value)
        tables = (
            torch.where(bad[..., None, None], torch.nan, entry).to(self.dtype)
            for entry in (q, *self.table)
        )
        for columns in (info[..., :3], info[..., INFO:]):
            columns.masked_fill_(bad.unsqueeze(-1), torch.nan)
        info[..., Info.OFFSET] = torch.where(bad, torch.nan, self.done_offset)
        found = (absolute, *tables, info, status, value)
        # cloned, so that the caller owns what it gets and may write to it
        return tuple(x.reshape((*self.settings.batch, *x.shape[2:])).clone() for x in found)


def policy_solve(given: PolicySystem, rhs: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    system = _PolicySystem.of(given, transpose)
    direct = system.rows.states <= DIRECT_STATES
    x = system.eliminate(rhs) if direct else system.iterate(rhs)
    return _settled(system, rhs, x, again=not direct)


def settle(given: PolicySystem, rhs: Tensor, transpose: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    """x of a policy system of which some columns may be unsolved, and its residual: those are
    tried again by elimination where it fits, and are NaN where that fails too.
    """
    return _settled(_PolicySystem.of(given, transpose), rhs, x, again=True)


class _PolicySystem(NamedTuple):
    """I − γP_π of N·G problems, or its transpose, applied to (N, G, K, S)."""

    rows: Rows
    weight: Tensor  # π/σ
    discount: Tensor
    transpose: bool

    @classmethod
    def of(cls, given: PolicySystem, transpose: bool) -> _PolicySystem:
        transition, crow, col, policy, discount = given
        rows = Rows(transition.double(), crow, col, *policy.shape[-2:])
        return cls(rows, policy * rows.scale(), discount, transpose)

    def moved(self, x: Tensor) -> Tensor:
        """γP_π x, or its transpose."""
        weight = self.weight.unsqueeze(2)
        if self.transpose:
            found = _columns(self.rows.pull, weight * x.unsqueeze(-1))
        else:
            found = (weight * _columns(self.rows.apply, x)).sum(-1)
        return self.discount[..., None, None] * found

    def product(self, x: Tensor) -> Tensor:
        return x - self.moved(x)

    def improve(
        self, delta: Tensor, continuing: Tensor, method: int, passes: int, stuck: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Newton's step (I − γP_π)⁻¹ δ (M9), exactly or by the products that `method` allows: a
        part that differs by state, a constant, and how many products. Problems (N, G) that Krylov's
        method has left `stuck`, which this marks, are eliminated from then on where that fits.
        """
        rhs, none = delta.unsqueeze(2), torch.zeros_like(self.discount)
        if method == Method.NEWTON:
            x, level, products = *self._split(rhs, continuing), none + 1
        elif method == Method.KRYLOV:
            x, level, products = self._inexact(rhs, continuing, passes, stuck)
        else:
            x, term, gamma = delta, delta, self.discount.unsqueeze(-1)
            for _ in range(SWEEPS_PER_POLICY):
                term = gamma * (self.weight * one_by_one(self.rows.apply, term)).sum(-1)
                x = x + term
            tail = (term.amax(-1) + term.amin(-1)) / 2 * self.discount
            x = x + (tail / (1 - self.discount)).where(continuing, 0.0).unsqueeze(-1)
            return x, none, none + SWEEPS_PER_POLICY
        return x.squeeze(2), level, products

    def _split(self, rhs: Tensor, continuing: Tensor) -> tuple[Tensor, Tensor]:
        """x with x_0 = 0, and g/(1 − γ), of (I − γP_π)x + g = δ: as well conditioned as the chain,
        however close γ is to one. Where the process may end, x with no constant.
        """
        x = _back_substitute(self._factors(continuing), rhs, self.transpose)
        level = x[..., 0, 0].where(continuing, 0.0) / (1 - self.discount)
        x[..., 0].masked_fill_(continuing.unsqueeze(-1), 0.0)
        return x, level

    def _inexact(
        self, rhs: Tensor, continuing: Tensor, passes: int, stuck: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        pinned, held = continuing[..., None, None], stuck[..., None, None]

        def apart(y: Tensor) -> Tensor:
            """Without g, as x_0 = 0."""
            return y - torch.where(pinned, y[..., :1], 0.0)

        # tighten with the passes: exact steps converge from anywhere, loose ones need not
        forcing = max(10.0 ** -(1 + passes / 2), 1e-13)
        side = apart(rhs).masked_fill(held, 0.0)
        start = _start(rhs, self.discount, self.transpose).masked_fill(held | pinned, 0.0)
        x, products = _bicgstab(lambda y: apart(self.product(y)), side, start, forcing, 400)
        reached = self.product(x)
        level = (rhs - reached)[..., 0, 0].where(continuing, 0.0) / (1 - self.discount)
        if self.rows.states <= DIRECT_STATES:
            left = (side - apart(reached)).norm(dim=-1)
            stuck |= ~(left <= 0.5 * side.norm(dim=-1)).squeeze(2)  # NaN too
            if bool(stuck.any()):
                exact, exact_level = self._split(rhs, continuing)
                x = torch.where(stuck[..., None, None], exact, x)
                level = torch.where(stuck, exact_level, level)
        return x, level, products.squeeze(2)

    def eliminate(self, rhs: Tensor) -> Tensor:
        factors = self._factors()
        if rhs.shape[2] <= 4:  # one by one: then no bit depends on how many threads there are
            return torch.cat([self._refined(factors, one) for one in rhs.split(1, 2)], 2)
        return self._refined(factors, rhs)

    def _factors(self, bordered: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of I − γP_π, with ones in the first column of those `bordered`."""
        matrix = -self.discount[..., None, None] * one_by_one(self.rows.policy_matrix, self.weight)
        matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
        if bordered is not None:
            matrix[..., 0].masked_fill_(bordered.unsqueeze(-1), 1.0)
        # an invalid element must not stop the batch: its NaN would make LAPACK refuse
        usable = torch.isfinite(matrix).all(-1).all(-1)[..., None, None]
        eye = torch.eye(self.rows.states, dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(usable, matrix, eye)
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
        # nor a singular one: where 1 − γ is gone in rounding, so may as much again
        singular = (info > 0) & (self.discount < 1)
        if bool(singular.any()):
            lu, pivots, _ = torch.linalg.lu_factor_ex(
                matrix + EPS * singular[..., None, None] * eye
            )
        return lu, pivots

    def _refined(self, factors: tuple[Tensor, Tensor], rhs: Tensor) -> Tensor:
        x = _back_substitute(factors, rhs, self.transpose)
        return x + _back_substitute(factors, rhs - self.product(x), self.transpose)

    def iterate(self, rhs: Tensor) -> Tensor:
        """By products. The recursion of BiCGStab loses the true residual: what it has nearly solved
        gets corrections.
        """
        x = self._products(rhs, 1e-14, 2000)
        for _ in range(3):
            left = rhs - self.product(x)
            residual = self.size(left)
            near = self.unsolved(rhs, x, residual) & (residual <= 1e-6 * self.size(rhs))
            if not bool(near.any()):
                break
            trial = x + self._products(left.where(near.unsqueeze(-1), 0.0), 1e-6, 500)
            better = near & (self.residual(rhs, trial) < residual)
            x = torch.where(better.unsqueeze(-1), trial, x)
        return x

    def _products(self, rhs: Tensor, tol: float, limit: int) -> Tensor:
        start = _start(rhs, self.discount, self.transpose)
        return _bicgstab(self.product, rhs, start, tol, limit)[0]

    def size(self, vector: Tensor) -> Tensor:
        return vector.abs().sum(-1) if self.transpose else vector.abs().amax(-1)

    def residual(self, rhs: Tensor, x: Tensor) -> Tensor:
        return self.size(rhs - self.product(x))

    def unsolved(self, rhs: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """(N, G, K), whether the residual is above what rounding leaves."""
        units = 128 + self.rows.longest / 4 + self.rows.actions
        floor = units * EPS * (self.size(rhs) + 2 * self.size(x)) + TINY
        return ~((residual <= floor) & torch.isfinite(residual))

    def one(self, n: int, g: int) -> _PolicySystem:
        own = slice(n, n + 1), slice(g, g + 1)
        rows = self.rows.with_data(self.rows.data[own[0]])
        return self._replace(rows=rows, weight=self.weight[own], discount=self.discount[own])


def _settled(
    system: _PolicySystem, rhs: Tensor, x: Tensor, *, again: bool
) -> tuple[Tensor, Tensor]:
    """x and its residual; NaN, but a true residual, in the columns that are not solved."""
    residual = system.residual(rhs, x)
    unsolved = system.unsolved(rhs, x, residual)
    if again and system.rows.states <= RETRY_STATES:
        # NaN on the right is not for want of trying; one matrix at a time, for its size
        hopeful = (unsolved & torch.isfinite(rhs).all(-1)).any(-1)
        x = x.clone()
        for n, g in hopeful.nonzero().tolist():
            alone, side = system.one(n, g), rhs[n : n + 1, g : g + 1]
            found = alone.eliminate(side)
            left = alone.residual(side, found)[0, 0]
            better = left < residual[n, g].nan_to_num(torch.inf)
            x[n, g] = torch.where(better.unsqueeze(-1), found[0, 0], x[n, g])
            residual[n, g] = torch.where(better, left, residual[n, g])
        unsolved = system.unsolved(rhs, x, residual)
    return x.masked_fill(unsolved.unsqueeze(-1), torch.nan), residual


def _choose(problem: Problem) -> int:
    states = problem.rows.states
    if not problem.rows.dense:
        return Method.NEWTON if states <= SPARSE_DIRECT_STATES else Method.POLICY_ITERATION
    return Method.NEWTON if states <= DIRECT_STATES else Method.KRYLOV


def _deflated(delta: Tensor, middle: Tensor, gamma: Tensor, one_minus: Tensor) -> Tensor:
    """A sweep and the M6 midpoint: the constant mode at once, the rest by contraction."""
    return delta + (gamma / one_minus * middle).unsqueeze(-1)


def _columns(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Of `Rows`, for K columns of each problem."""
    if batch.shape[2] == 1:
        return one_by_one(function, batch.squeeze(2)).unsqueeze(2)

    def together(one: Tensor) -> Tensor:
        return function(one.flatten(1, 2)).unflatten(1, one.shape[1:3])

    return one_by_one(together, batch)


def _back_substitute(factors: tuple[Tensor, Tensor], rhs: Tensor, transpose: bool) -> Tensor:
    """rhs (N, G, K, S) → x (N, G, K, S)."""
    lu, pivots = factors
    return torch.linalg.lu_solve(lu, pivots, rhs.mT, adjoint=transpose).mT


def _start(rhs: Tensor, discount: Tensor, transpose: bool) -> Tensor:
    """A guess that is exact in the constant mode: there A multiplies by 1 − γ."""
    gap = (1 - discount)[..., None, None]
    if not transpose:
        return ((rhs.amax(-1, keepdim=True) + rhs.amin(-1, keepdim=True)) / 2 / gap).expand_as(rhs)
    return rhs + discount[..., None, None] / gap * rhs.mean(-1, keepdim=True)


def _bicgstab(
    product: Callable[[Tensor], Tensor], rhs: Tensor, start: Tensor, tol: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Batched BiCGStab on the last axis, and the products of each column; one that has converged
    keeps its best iterate, whatever the others still need.
    """
    # squares of very small and very large numbers have no place among doubles
    power = torch.frexp(rhs.abs().amax(-1, keepdim=True)).exponent
    unit = torch.ldexp(torch.ones_like(rhs[..., :1]), power)
    unit = torch.where((unit > 0) & torch.isfinite(unit), unit, 1.0)
    rhs, start = rhs / unit, start / unit
    x = start
    residual = rhs - product(x)
    shadow, direction = residual, residual
    rho = (shadow * residual).sum(-1, keepdim=True)
    goal = tol * rhs.norm(dim=-1, keepdim=True)
    best, best_norm = x, residual.norm(dim=-1, keepdim=True)
    products = torch.ones_like(best_norm)
    active = best_norm > goal
    for _ in range(limit):
        if not bool(active.any()):
            break
        image = product(direction)
        alpha = _ratio(rho, (shadow * image).sum(-1, keepdim=True))
        half = residual - alpha * image
        half_image = product(half)
        omega = _ratio(
            (half_image * half).sum(-1, keepdim=True), half_image.square().sum(-1, keepdim=True)
        )
        x = x + alpha * direction + omega * half
        residual = half - omega * half_image
        norm = residual.norm(dim=-1, keepdim=True)
        better = active & (norm < best_norm)
        best, best_norm = torch.where(better, x, best), torch.where(better, norm, best_norm)
        products = products + 2 * active
        active = active & (best_norm > goal)
        rho_next = (shadow * residual).sum(-1, keepdim=True)
        beta = _ratio(rho_next, rho) * _ratio(alpha, omega)
        direction = residual + beta * (direction - omega * image)
        rho = rho_next
    return best * unit, products.squeeze(-1)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom.abs() > 1e-300, top / torch.where(bottom == 0, 1.0, bottom), 0.0)


def _inspect(problem: Problem, transition: Tensor, validate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Status ≥ 10, flat place and value of the first bad entry of each element; 0 where there is
    none.
    """
    shape = problem.discount.shape
    status = torch.zeros(shape, dtype=torch.int64, device=problem.reward.device)
    place, culprit = torch.zeros_like(problem.discount), torch.zeros_like(problem.discount)

    def found() -> Iterator[checks.Defects]:
        yield from checks.scalar_defects(Status.BAD_DISCOUNT, problem.discount)
        yield from checks.scalar_defects(Status.BAD_TEMPERATURE, problem.temperature)
        if validate == Rigour.OFF:
            return
        if problem.log_reference is not None:
            yield from checks.reference_defects(problem.log_reference)
        yield from checks.reward_defects(problem.reward)
        sums, data = problem.rows.sums(), problem.rows.data
        ends = sums == 0 if validate == Rigour.OR_ENDING else None
        event, dtype = data.dim() - 1, transition.dtype
        yield from checks.transition_defects(data.unsqueeze(1), sums, ends, event, dtype)

    for code, bad, values in found():
        bad = bad.expand(*shape, bad.shape[-1])
        if not bool(bad.any()):
            continue
        where = bad.to(torch.uint8).argmax(-1)
        hit = bad.any(-1) & (status == 0)
        number = values.expand_as(bad).gather(-1, where.unsqueeze(-1)).squeeze(-1)
        status = torch.where(hit, int(code), status)
        place = torch.where(hit, where.double(), place)
        culprit = torch.where(hit, number.double(), culprit)
    return status, place, culprit
