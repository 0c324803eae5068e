"""The public functions: solve, bellman, evaluate, occupancy. Pure, differentiable, on tensors or on
MDP objects.

*B are batch axes that broadcast; a transition without them is shared by the whole batch and read
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, overload

import torch
from torch import Tensor

from birl_ext.errors import (
    BackendUnavailableError,
    BirlError,
    NonFiniteResultError,
    NotConvergedError,
    OptionError,
    ShapeError,
    SolveError,
    StagnatedError,
    TerminalChoiceWarning,
    warn,
)
from birl_ext.model import checks
from birl_ext.model.layout import Data, Flat, Layout, absent, flatten, layout
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.ops import bellman as ops_bellman
from birl_ext.ops import fast, policy_solve
from birl_ext.ops import solve as ops_solve
from birl_ext.ops.backends import choice
from birl_ext.ops.backends.pytorch import RETRY_STATES
from birl_ext.ops.request import AUTO, NATIVE, TORCH, Settings
from birl_ext.options import (
    BACKENDS,
    METHODS,
    USUAL,
    BackendName,
    MethodName,
    OnFail,
    Options,
    check_one_of,
)
from birl_ext.solution import Rigour, Solution, Status
from birl_ext.torch_internals import is_concrete

__all__ = ["bellman", "evaluate", "occupancy", "solve"]

MDP = DenseMDP | SparseMDP


@overload
def solve(
    reward: Tensor,
    transition: Tensor,
    *,
    discount: float | Tensor,
    temperature: float | Tensor,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    terminal: Tensor | None = None,
    initial: Tensor | None = None,
    method: MethodName = "auto",
    tol: float | None = None,
    max_iterations: int | None = None,
    on_fail: OnFail = "raise",
    validate: checks.Level = "full",
    backend: BackendName = "auto",
) -> Solution: ...


@overload
def solve(
    reward: MDP,
    *,
    temperature: float | Tensor,
    initial: Tensor | None = None,
    method: MethodName = "auto",
    tol: float | None = None,
    max_iterations: int | None = None,
    on_fail: OnFail = "raise",
    backend: BackendName = "auto",
) -> Solution: ...


def solve(
    reward: Tensor | MDP,
    transition: Tensor | None = None,
    *,
    discount: float | Tensor | None = None,
    temperature: float | Tensor,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    terminal: Tensor | None = None,
    initial: Tensor | None = None,
    method: MethodName = "auto",
    tol: float | None = None,
    max_iterations: int | None = None,
    on_fail: OnFail = "raise",
    validate: checks.Level = "full",
    backend: BackendName = "auto",
) -> Solution:
    """The soft-optimal value, policy and Q of a batch of regularised MDPs, to a certified error.

        V(s) = τ log Σ_a μ(a|s) exp(Q(s,a)/τ),   Q(s,a) = r(s,a) + γ Σ_t P(t|s,a) V(t),
        π(a|s) = μ(a|s) exp((Q(s,a) − V(s))/τ)

    Args:
        reward: r, (*B, S, A), reward per step, float32 or float64; or a DenseMDP or SparseMDP,
            which brings transition, discount, reference, mask and terminal along.
        transition: P, (*B, S, A, S), probabilities of the next state, same dtype. Rows are read as
            P/ΣP.
        discount: γ in [0, 1), per step; a number or (*B).
        temperature: τ > 0, units of reward; a number or (*B).
        reference: μ, (*B, S, A), positive weights; None is μ ≡ 1 (plain entropy). Normalised: KL to
            a reference.
        mask: (*B, S, A) bool, True where the action is available; None is everywhere.
        terminal: (*B, S) bool, True where the process ends: r is paid, nothing follows. Its choice
            of an action still has an entropy: without a mask V = r + τ log A there, for r the same
            for all actions. Where all actions are masked, V = 0.
        initial: V₀, (*B, S), a warm start. No gradient.
        method: "auto" chooses per shape and discount; see docs/solvers.md.
        tol: certified relative error asked of the value, in units of max(‖V‖∞, τ), to which values
            far beyond the others do not belong; None: as far as rounding allows.
        max_iterations: most passes over P; None: enough for the method.
        on_fail: "raise", or "status": return the best iterate; where status ≠ 0 its gradient is
            NaN.
        validate: "full", "cheap" (shapes, dtypes, scalars) or "off", for tensors; an MDP object has
            been validated.
        backend: "auto", "torch", "cpu" or "cuda".

    Returns:
        Solution. Its `error_bound` is never below ‖value − V*‖∞, nor its `error_bounds` below any
            state's error.

    Raises:
        InvalidMDPError, ParameterError, ShapeError, DtypeError, DeviceError: the input, with its
            place.
        SolveError: not converged; the best iterate is the error's `solution`.

    Gradients: reward, transition, discount, temperature, reference; reverse and forward mode, any
    order, by the implicit function theorem (M10)-(M12). That of P is the one of P ↦
    solve(P/ΣP): Σ P·P̄ = 0 in each row.

    Source: Yang, Gao and Yuan, AISTATS 2025; (M1)-(M9).
    """
    options = Options.of(method, tol, max_iterations, on_fail, validate, backend)
    if reference is None and mask is None and terminal is None and initial is None:
        found = _solve_fast(reward, transition, discount, temperature, options)
        if found is not None:
            return found
    given = Given(reward, transition, discount, temperature, reference, mask, terminal, validate)
    return _solve_in_normal_form(given, initial, options)


@checks.within_memory
def bellman(
    value: Tensor,
    reward: Tensor | MDP,
    transition: Tensor | None = None,
    *,
    discount: float | Tensor | None = None,
    temperature: float | Tensor,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    terminal: Tensor | None = None,
    validate: checks.Level = "full",
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One application of the soft Bellman operator.

        (TV)(s) = τ log Σ_a μ(a|s) exp(Q(s,a)/τ),   Q(s,a) = r(s,a) + γ Σ_t P(t|s,a) V(t)

    Args:
        value: V, (*B, S), units of reward.
        reward, transition, discount, temperature, reference, mask, terminal, validate, backend:
            as in `solve`.

    Returns:
        TV (*B, S); Q (*B, S, A), −inf where masked; and π_V (*B, S, A), the softmax policy at V.

    Raises:
        InvalidMDPError, ParameterError, ShapeError, DtypeError, DeviceError: the input, with its
            place.

    Gradients: value, reward, transition, discount, temperature, reference; any order and mode.

    Source: (M1), (M2), (M3).
    """
    value = checks.as_floating("value", value)
    given = Given(reward, transition, discount, temperature, reference, mask, terminal, validate)
    flat = _flat(given, value.shape[:-1], read=True, tell=True)
    checks.check_devices({"reward": flat.data.reward, "value": value})
    _require_shape("value", value, (flat.data.reward.shape[-2],))
    dtype = flat.data.reward.dtype
    trust = _trust(flat.data.discount, flat.data.temperature, validate=validate)
    image, advantage, policy, _ = ops_bellman.bellman(
        flat.data,
        flat.layout.grouped(value.double(), 1),
        _backend(backend, flat.data.reward.device),
    )
    if trust is not None:
        image, policy = image * trust[..., None], policy * trust[..., None, None]
    q = advantage + image.unsqueeze(-1)
    if (available := flat.data.available) is not None:
        q, policy = q.where(available, -torch.inf), policy.where(available, 0.0)
    restore = flat.layout.restore
    return restore(image.to(dtype)), restore(q.to(dtype)), restore(policy.to(dtype))


@checks.within_memory
def evaluate(
    policy: Tensor,
    reward: Tensor | MDP,
    transition: Tensor | None = None,
    *,
    discount: float | Tensor | None = None,
    terminal: Tensor | None = None,
    validate: checks.Level = "full",
    backend: BackendName = "auto",
) -> Tensor:
    """The value of a policy under a reward, which need not be the one it was made for.

        J(s) = Σ_a π(a|s) [ g(s,a) + γ Σ_t P(t|s,a) J(t) ]

    Args:
        policy: π, (*B, S, A), probabilities; nothing behind the mask of an MDP object. Read as
            π/Σπ, by derivatives too: they are those along the simplex.
        reward: g, (*B, S, A); or an MDP object, whose reward, transition, discount and terminal are
            used.
        transition: P, (*B, S, A, S).
        discount: γ in [0, 1).
        terminal: (*B, S) bool, as in `solve`.
        validate, backend: as in `solve`.

    Returns:
        J, (*B, S), units of reward. The regularisation is not part of it.

    Raises:
        InvalidMDPError, ParameterError, ShapeError, DtypeError, DeviceError: the input, with its
            place.
        NotConvergedError: the linear system was not solved to rounding. Where nothing can be read
            (in a transform, say) the result is NaN instead; a derivative of it is NaN always.

    Gradients: policy, reward, transition, discount; any order and mode.

    Source: maths section 4, "Evaluation".
    """
    policy = checks.as_floating("policy", policy)
    batch = tuple(policy.shape[:-2])
    given = Given(reward, transition, discount, 1.0, terminal=terminal, validate=validate)
    flat = _flat(given, batch, read=True)
    checks.check_devices({"transition": flat.data.transition, "policy": policy})
    pi = _checked(policy, flat, reward, validate)
    gain = (pi * flat.data.reward.double()).sum(-1)
    value = _policy_system(policy_solve.discounted_sum, flat, pi, gain, validate, backend)
    return flat.layout.restore(value.to(flat.data.reward.dtype))


@checks.within_memory
def occupancy(
    policy: Tensor,
    transition: Tensor | MDP,
    *,
    discount: float | Tensor | None = None,
    initial_distribution: Tensor | None = None,
    terminal: Tensor | None = None,
    validate: checks.Level = "full",
    backend: BackendName = "auto",
) -> Tensor:
    """The discounted share of time that a policy spends in each state.

        d(t) = (1 − γ) ρ(t) + γ Σ_s d(s) Σ_a π(a|s) P(t|s,a)

    Args:
        policy: π, (*B, S, A), probabilities; nothing behind the mask of an MDP object. Read as
            π/Σπ, by derivatives too: they are those along the simplex.
        transition: P, (*B, S, A, S); or an MDP object.
        discount: γ in [0, 1).
        initial_distribution: ρ, (*B, S); may be left out if an MDP object has one.
        terminal: (*B, S) bool, as in `solve`.
        validate, backend: as in `solve`.

    Returns:
        d, (*B, S), probabilities: they sum to one unless the process ends.

    Raises:
        InvalidMDPError, ParameterError, ShapeError, DtypeError, DeviceError: the input, with its
            place.
        NotConvergedError: the linear system was not solved to rounding. Where nothing can be read
            (in a transform, say) the result is NaN instead; a derivative of it is NaN always.

    Gradients: policy, transition, discount, initial_distribution; any order and mode.

    Source: maths section 4, "Occupancy".
    """
    if isinstance(transition, (DenseMDP, SparseMDP)) and initial_distribution is None:
        initial_distribution = transition.initial_distribution
    if initial_distribution is None:
        raise OptionError(
            "initial_distribution is None",
            allowed="a probability vector (*B, S)",
            fix="pass initial_distribution, or an MDP object that has one",
        )
    policy = checks.as_floating("policy", policy)
    initial_distribution = checks.as_floating("initial_distribution", initial_distribution)
    batch = checks.broadcast_batches(
        {
            "policy": tuple(policy.shape[:-2]),
            "initial_distribution": tuple(initial_distribution.shape[:-1]),
        }
    )
    reward: Tensor | MDP
    rows = None
    if isinstance(transition, (DenseMDP, SparseMDP)):
        reward = transition
    else:
        rows = checks.as_floating("transition", transition)
        reward = rows.new_zeros(()).expand(*checks.states_and_actions("policy", policy))
    given = Given(reward, rows, discount, 1.0, terminal=terminal, validate=validate)
    flat = _flat(given, batch, read=rows is not None)
    tensors = {"policy": policy, "initial_distribution": initial_distribution}
    checks.check_devices({"transition": flat.data.transition, **tensors})
    pi = _checked(policy, flat, transition, validate)
    _require_shape("initial_distribution", initial_distribution, (flat.data.reward.shape[-2],))
    if validate == "full" and is_concrete(initial_distribution):
        checks.check_initial_distribution(initial_distribution)
    start = flat.layout.grouped(initial_distribution.double(), 1)
    share = _policy_system(policy_solve.discounted_visits, flat, pi, start, validate, backend)
    return flat.layout.restore(share.to(flat.data.reward.dtype))


def _checked(policy: Tensor, flat: Flat, model: Tensor | MDP, validate: checks.Level) -> Tensor:
    """π/Σπ in float64, (N, G, …)."""
    _require_shape("policy", policy, tuple(flat.data.reward.shape[-2:]))
    if validate == "full" and is_concrete(policy):
        forbidden = None
        if not isinstance(model, Tensor) and is_concrete(model.mask, model.terminal):
            forbidden = model.forbidden()
        checks.check_policy(policy.detach(), forbidden)
    wide = policy.double().contiguous()  # the bits of a sum depend on the layout
    return flat.layout.grouped(wide / wide.sum(-1, keepdim=True), 2)


def _policy_system(
    system: Callable[..., tuple[Tensor, Tensor]],
    flat: Flat,
    policy: Tensor,
    rhs: Tensor,
    validate: checks.Level,
    backend: BackendName,
) -> Tensor:
    """A system of `ops.policy_solve` for one right-hand side (N, G, S)."""
    solution, residual = system(
        policy_solve.System(*flat.data[:3], policy, flat.data.discount),
        rhs.contiguous().unsqueeze(2),
        _backend(backend, flat.data.reward.device),
    )
    # on a GPU the look would make the host wait
    if is_concrete(solution) and not (validate == "off" and solution.is_cuda):
        _require_solved(solution.detach(), residual, flat)
    trust = _trust(flat.data.discount, validate=validate)
    if trust is not None:
        solution = solution * trust[..., None, None]
    return solution.squeeze(2)


def _trust(
    discount: Tensor, temperature: Tensor | None = None, *, validate: checks.Level
) -> Tensor | None:
    """(N, G), 1 where γ and τ lie in their range and NaN elsewhere; None where the border has read
    them.
    """
    if validate != "off" and is_concrete(discount, temperature):
        return None
    fine = (discount >= 0) & (discount < 1)
    if temperature is not None:
        fine = fine & (temperature > 0) & temperature.isfinite()
    return torch.where(fine, 1.0, torch.nan).double()


def _require_solved(solution: Tensor, residual: Tensor, flat: Flat) -> None:
    """Raise NotConvergedError at the first problem that is NaN though its residual is a number."""
    if not math.isnan(solution.sum().item()):
        return
    unsolved = (solution.isnan().any(-1) & residual.isfinite()).squeeze(-1)
    if not bool(unsolved.any()):
        return
    first, states = int(unsolved.flatten().to(torch.uint8).argmax()), flat.data.reward.shape[-2]
    batch = flat.layout.locate(first)
    raise NotConvergedError(
        f"policy system not solved: its residual is {float(residual.flatten()[first]):.3g}",
        where=f"batch {batch}" if batch else "",
        fix="use a smaller discount: the policy mixes too slowly for products, and "
        f"{states} states are too many to eliminate"
        if states > RETRY_STATES
        else "use a discount below one, and a policy and a transition that sum to one: the system "
        "is singular",
    )


class Given(NamedTuple):
    """A problem as a caller gives it: tensors, or an MDP object in the place of the reward."""

    reward: Tensor | MDP
    transition: Tensor | None
    discount: float | Tensor | None
    temperature: float | Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    terminal: Tensor | None = None
    validate: checks.Level = "full"

    @property
    def ending(self) -> bool:
        """Whether rows of zeros may be meant."""
        if isinstance(self.reward, Tensor):
            return not (self.mask is None and self.terminal is None)
        return self.reward.ending

    def mdp(self) -> MDP | None:
        """As an object, if it is one or has what only an object can hold."""
        beside = ("transition", "discount", "reference", "mask", "terminal")
        if isinstance(self.reward, (DenseMDP, SparseMDP)):
            given = [name for name in beside if getattr(self, name) is not None]
            if given:
                raise OptionError(
                    f"{given[0]} was given beside an MDP object",
                    fix=f"use mdp.replace({given[0]}=…)",
                )
            return self.reward
        for name in beside[:2]:
            if getattr(self, name) is None:
                raise OptionError(
                    f"{name} is missing",
                    allowed="reward, transition and discount, or an MDP object",
                    fix="pass it, or wrap the problem in DenseMDP(reward, transition, discount)",
                )
        if self.reference is None and self.mask is None and self.terminal is None:
            return None
        assert self.transition is not None
        assert self.discount is not None
        return DenseMDP(
            self.reward,
            self.transition,
            self.discount,
            mask=self.mask,
            terminal=self.terminal,
            reference=self.reference,
            validate=self.validate,
        )


def _flat(
    given: Given, batch: tuple[int, ...] = (), *, read: bool = False, tell: bool = False
) -> Flat:
    """A problem, checked once, in the normal form of the ops.

    `read` is for ops that do not check the numbers themselves in their first pass. Where a choice
    has an entropy, `tell` says so, once. A tensor that a
    transform has wrapped keeps nobody from reading the others.
    """
    mdp, full = given.mdp(), given.validate != "off"
    if mdp is not None:
        temperature = checks.check_temperature(given.temperature, data=read and full)
        checks.check_devices({"reward": mdp.reward, "temperature": temperature})
        if tell:
            _tell_of_ends(mdp)
        return mdp.flatten(temperature, batch)
    checks.check_level(given.validate)
    reward, transition = (
        checks.as_floating(name, getattr(given, name)) for name in ("reward", "transition")
    )
    assert given.discount is not None
    discount = checks.check_discount(given.discount, data=read and full)
    temperature = checks.check_temperature(given.temperature, data=read and full)
    if full:
        tables = {"reward": reward, "transition": transition}
        checks.check_dense_shapes(reward, transition)
        checks.check_same_dtype(tables)
        numbers = {"discount": discount, "temperature": temperature}
        checks.check_devices({**tables, **numbers})
    if read and given.validate == "full":
        if is_concrete(reward):
            checks.check_reward(reward)
        if is_concrete(transition):
            checks.check_rows(transition, None)
    if tell and full and not torch.compiler.is_compiling() and _looked < _LOOKS:
        _look_at(reward, transition)
    no_reference = absent(torch.float64, reward)
    return flatten(reward, transition, no_reference, discount, temperature, batch=batch)


_told: set[str] = set()


def _tell_of_ends(mdp: MDP) -> None:
    """Warn, once each, of a terminal state and of an absorbing one with a choice."""
    if mdp.idle_ends and not torch.compiler.is_compiling():
        _tell_of_standing()
    if mdp.free_ends and not torch.compiler.is_compiling():
        _tell_once(
            "a terminal state has a choice of actions and keeps its entropy: without a reward it "
            "is worth τ log A, not 0. Fix: where its end is worth nothing, set `mask` to False for "
            "all its actions; where its reward is meant, for all but one",
        )


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        warn(text, TerminalChoiceWarning)


_looked = 0
_LOOKS = 16
"""Transitions given as tensors that are looked at: enough to find the mistake, and free later."""


def _look_at(reward: Tensor, transition: Tensor) -> None:
    """Warn, once, of an absorbing state with a choice among tensors."""
    global _looked
    _looked += 1
    if reward.shape[-1] > 1 and is_concrete(reward, transition):
        stays = transition.detach().diagonal(dim1=-3, dim2=-1) == 1  # (*B, A, S)
        standing = stays.all(-2)
        if bool(standing.any()) and checks.pays_alike(reward, None, standing):
            _tell_of_standing()


def _tell_of_standing() -> None:
    _tell_once(
        "a state that no action leaves, and in which all pay the same, has a choice of actions "
        "and keeps its entropy forever: without a reward it is worth τ log A / (1 − γ), not 0. "
        "Fix: pass birl_ext.convert.mask_ends(mdp); or set `mask` to False there for all "
        "actions but one"
    )


def _assemble(flat: Flat, outputs: tuple[Tensor, ...]) -> Solution:
    solution = _solution(outputs)
    if (available := flat.data.available) is not None:
        solution = solution.closed(available.reshape(solution.q.shape))
    if flat.layout.order is None:  # the op has put its outputs into the caller's axes
        return solution
    return Solution._make(map(flat.layout.restore, solution))


def _solve_fast(
    reward: Tensor | MDP,
    transition: Tensor | None,
    discount: float | Tensor | None,
    temperature: float | Tensor,
    options: Options,
) -> Solution | None:
    """`solve` the short way; None if it has to take the general one."""
    if options is not USUAL[options.on_fail]:
        return None
    rigour, mdp = Rigour.STOCHASTIC, None
    if isinstance(reward, DenseMDP):
        mdp = reward
        if not (transition is discount is mdp.mask is mdp.reference is None):
            return None
        _tell_of_ends(mdp)
        reward, transition, discount = mdp.reward, mdp.transition, mdp.discount
        if mdp.terminal is not None:  # rows may be zero where the process ends
            rigour = Rigour.OR_ENDING
    found = fast.solve(reward, transition, discount, temperature, rigour)
    if found is None:
        return None
    outputs, failed = found
    solution = _solution(outputs)
    if _looked < _LOOKS and mdp is None:
        assert isinstance(reward, Tensor)
        assert transition is not None
        _look_at(reward, transition)
    if failed and options.on_fail == "raise":
        assert isinstance(reward, Tensor)
        assert transition is not None
        nothing = absent(torch.int64, transition)
        data = Data(transition, nothing, nothing, reward, nothing, nothing, nothing)
        raise _failure(solution, outputs, data, layout(tuple(transition.shape[:-3])))
    return solution


@checks.within_memory
def _solve_in_normal_form(given: Given, initial: Tensor | None, options: Options) -> Solution:
    flat = _flat(given, tell=True)
    start = _start(initial, flat)
    settings, too_tight = _settings(options, flat, given.ending)
    outputs = ops_solve.solve(flat.data, start, settings)
    if too_tight is not None:
        status = outputs[-1]
        outputs = (*outputs[:-1], status.masked_fill(status == 0, int(Status.STAGNATED)))
    solution = _assemble(flat, outputs)
    if options.on_fail == "raise" and not settings.strict and _any(outputs[-1]):
        raise _failure(solution, outputs, flat.data, flat.layout, initial, too_tight)
    return solution


def _start(initial: Tensor | None, flat: Flat) -> Tensor:
    """V₀ (N, G, S) float64, or absent."""
    if initial is None:
        return absent(torch.float64, flat.data.reward)
    initial = checks.as_floating("initial", initial)
    checks.check_devices({"reward": flat.data.reward, "initial": initial})
    _require_shape("initial", initial, (flat.data.reward.shape[-2],))
    _require_batch("initial", tuple(initial.shape[:-1]), flat.layout.batch_shape)
    return flat.layout.grouped(initial.detach().double(), 1)


def _settings(options: Options, flat: Flat, ending: bool) -> tuple[Settings, StagnatedError | None]:
    """What the op is asked, and what there is to say if `tol` is out of reach: then it goes as far
    as it can.
    """
    states = flat.data.reward.shape[-2]
    if options.method == "newton":
        checks.check_memory(
            f'method="newton" with {states} states', states * states, fix='use method="auto"'
        )
    # where nothing can be read here, the op itself raises
    strict = options.on_fail == "raise" and not is_concrete(*flat.data)
    # what is handed out in float32 is known to half a unit in its last place, and no better
    dtype, tol, too_tight = flat.data.reward.dtype, options.tol or 0.0, None
    rounded = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    if 0 < tol <= rounded:
        too_tight = StagnatedError(
            f"tol is {tol!r}, but values handed out in float32 are known no better than "
            f"{rounded:.2g}",
            allowed=f"above {rounded:.2g}",
            fix="loosen `tol`, or pass float64 tensors",
        )
        if strict:
            raise too_tight
    rigour = Rigour.OR_ENDING if ending else Rigour.STOCHASTIC
    settings = Settings(
        batch=flat.layout.output_shape,
        method=int(METHODS[options.method]),
        tol=max(tol - rounded, 0.0),
        max_iterations=options.max_iterations,
        validate=int(rigour if options.validate == "full" else Rigour.OFF),
        strict=strict,
        backend=_backend(options.backend, flat.data.reward.device),
    )
    return settings, too_tight


def _solution(outputs: tuple[Tensor, ...]) -> Solution:
    value, q, advantage, policy, log_policy, info, status = outputs
    if value.dtype is not q.dtype:
        value = value.to(q.dtype)
    return Solution(value, q, policy, log_policy, advantage, info, status)


def _failure(
    solution: Solution,
    outputs: tuple[Tensor, ...],
    data: Data,
    axes: Layout,
    initial: Tensor | None = None,
    too_tight: StagnatedError | None = None,
) -> BirlError:
    """The error of the first problem that failed; one of the solver holds the best iterate."""
    error = choice.failure(outputs, data, axes.locate)
    if initial is not None and isinstance(error, NonFiniteResultError):
        checks.check_initial(initial)
    if too_tight is not None and isinstance(error, StagnatedError):
        error = too_tight
    if isinstance(error, SolveError):
        error.solution = solution
    return error


def _any(status: Tensor) -> bool:
    return bool(status.item() if status.numel() == 1 else status.any())


def _backend(name: str, device: torch.device) -> int:
    if name in ("auto", "torch"):
        return AUTO if name == "auto" else TORCH
    check_one_of("backend", name, BACKENDS)
    if device.type != name:
        raise BackendUnavailableError(
            f'backend="{name}" for tensors on {device}', allowed=f'tensors on "{name}"'
        )
    reason = choice.unavailable(name)
    if reason:
        raise BackendUnavailableError(f'backend="{name}" is not available: {reason}')
    return NATIVE


def _require_shape(name: str, tensor: Tensor, event: tuple[int, ...]) -> None:
    if tuple(tensor.shape[-len(event) :]) != event:
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}",
            allowed=f"(*B, {', '.join(map(str, event))})",
            fix=f"let the last axes of {name} agree with the reward",
        )


def _require_batch(name: str, own: tuple[int, ...], batch: tuple[int, ...]) -> None:
    """Raise ShapeError unless `own` batch axes broadcast to those of the problem."""
    spare = len(own) - len(batch)
    shared = zip(own[max(spare, 0) :], batch[max(-spare, 0) :], strict=True)
    if any(size != 1 for size in own[: max(spare, 0)]) or any(a not in (1, b) for a, b in shared):
        raise ShapeError(
            f"{name} has batch axes {own}",
            allowed=f"axes that broadcast to {batch} of the problem",
            fix=f"let the batch axes of {name} agree with the problem's, or be one",
        )
