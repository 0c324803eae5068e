"""Behind a mask nothing flows: a loss whose slope at a probability of zero is NaN or infinite has
the gradient of the same loss without those entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.func import grad, hessian

import birl_ext
from birl_ext.bilevel import BilevelProblem, hypergradient_report

# what torch itself says when it maps or compiles
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]

STATES, ACTIONS, DISCOUNT, TEMPERATURE = 4, 3, 0.3, 0.7
MASK = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) > 0
P = torch.rand(STATES, ACTIONS, STATES, generator=torch.Generator().manual_seed(1)).double()
P = P / P.sum(-1, keepdim=True)
R = torch.linspace(-1, 1, STATES * ACTIONS, dtype=torch.float64).reshape(STATES, ACTIONS).sin()
TARGET = torch.where(MASK, torch.linspace(0.2, 0.9, ACTIONS, dtype=torch.float64), 0.0)

Tables = Callable[[Tensor], tuple[Tensor, ...]]  # Q, π, log π, Q − V

# Each is right on the tables as they are handed out; its derivative there is not a number.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "entr": lambda q, pi, log_pi, adv: torch.special.entr(pi).sum(),
    "xlogy": lambda q, pi, log_pi, adv: torch.xlogy(TARGET, pi).sum(),
    "sqrt": lambda q, pi, log_pi, adv: pi.sqrt().sum(),
    "power": lambda q, pi, log_pi, adv: pi.pow(0.3).sum(),
    "where log": lambda q, pi, log_pi, adv: torch.where(MASK, pi.log(), 0.0).sum(),
    "where p log p": lambda q, pi, log_pi, adv: torch.where(MASK, pi * pi.log(), 0.0).sum(),
    "divergence": lambda q, pi, log_pi, adv: torch.nn.functional.kl_div(
        pi.log(), TARGET, reduction="sum"
    ),
    "log policy": lambda q, pi, log_pi, adv: torch.where(MASK, log_pi.square(), 0.0).sum(),
    "p log policy": lambda q, pi, log_pi, adv: torch.where(MASK, pi * log_pi, 0.0).sum(),
    "q": lambda q, pi, log_pi, adv: torch.where(MASK, q.square(), 0.0).sum(),
    "soft maximum": lambda q, pi, log_pi, adv: torch.logsumexp(q, -1).sum(),
    "advantage": lambda q, pi, log_pi, adv: (-adv).sqrt().sum(),
    "where 1/advantage": lambda q, pi, log_pi, adv: torch.where(MASK, 1 / adv, 0.0).sum(),
}


def unrolled(reward: Tensor) -> tuple[Tensor, ...]:
    """Value iteration; what is masked is a constant at which every loss is smooth."""
    value = torch.zeros(STATES, dtype=reward.dtype)
    for _ in range(32):  # 0.3³² < 1e-16
        q = reward + DISCOUNT * P @ value
        value = TEMPERATURE * torch.logsumexp(q.masked_fill(~MASK, -torch.inf) / TEMPERATURE, -1)
    advantage = q - value.unsqueeze(-1)
    log_pi = advantage / TEMPERATURE
    constants = (-torch.inf, 1.0, 0.0, -1.0)
    return tuple(
        table.where(MASK, constant)
        for table, constant in zip((q, log_pi.exp(), log_pi, advantage), constants, strict=True)
    )


def solved(backend: Any) -> Tables:
    def tables(reward: Tensor) -> tuple[Tensor, ...]:
        found = birl_ext.solve(
            reward,
            P,
            discount=DISCOUNT,
            temperature=TEMPERATURE,
            mask=MASK,
            backend=backend,
        )
        return found.q, found.policy, found.log_policy, found.advantage

    return tables


def swept(reward: Tensor) -> tuple[Tensor, ...]:
    """`bellman` at a value that is itself a function of the reward: the fixed point."""
    model = birl_ext.DenseMDP(reward, P, DISCOUNT, mask=MASK).to_sparse()
    value = birl_ext.solve(model, temperature=TEMPERATURE).value
    image, q, policy = birl_ext.bellman(value, model, temperature=TEMPERATURE)
    advantage = torch.where(MASK, q - image.unsqueeze(-1), 0.0)
    return q, policy, torch.where(MASK, advantage / TEMPERATURE, -torch.inf), advantage


HOW: dict[str, Tables] = {
    "compiled": solved("auto"),
    "torch": solved("torch"),
    "bellman": swept,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how", HOW)
def test_a_gradient_behind_a_mask(how: str, loss: str) -> None:
    """First order by the backward and by the transform; second order in both modes."""
    if how == "bellman" and "advantage" in loss:
        pytest.skip("bellman returns no advantage")

    def ours(reward: Tensor) -> Tensor:
        return LOSSES[loss](*HOW[how](reward))

    def plain(reward: Tensor) -> Tensor:
        return LOSSES[loss](*unrolled(reward))

    want = grad(plain)(R)
    bound = 1e-10 * float(want.abs().max())
    leaf = R.clone().requires_grad_()
    ours(leaf).backward()
    assert leaf.grad is not None
    assert_close(leaf.grad, want, bound=bound, label=f"backward of {loss}")
    assert_close(grad(ours)(R), want, bound=bound, label=f"grad of {loss}")
    if how != "compiled":
        return
    curvature = hessian(plain)(R)
    bound = 1e-9 * float(curvature.abs().max())
    assert_close(hessian(ours)(R), curvature, bound=bound, label=f"hessian of {loss}")
    twice = torch.autograd.functional.hessian(ours, R)
    assert_close(twice, curvature, bound=bound, label=f"double backward of {loss}")


@pytest.mark.parametrize("loss", [name for name in LOSSES if "where" in name or name == "q"])
def test_a_tangent_behind_a_mask(loss: str) -> None:
    """In forward mode the loss itself has to leave the entry out: its tangent there is zero."""
    tables = HOW["compiled"]
    got = torch.func.jvp(lambda r: LOSSES[loss](*tables(r)), (R,), (R.cos(),))[1]
    want = torch.func.jvp(lambda r: LOSSES[loss](*unrolled(r)), (R,), (R.cos(),))[1]
    assert_close(got, want, bound=1e-9 * float(want.abs()), label=loss)


def test_a_batch_whose_axes_are_permuted() -> None:
    """Masks of their own in a batch whose transitions vary along the last axis."""
    masks = torch.stack([MASK, MASK.flip(0), MASK | True])[:, None]
    rows = torch.stack([P, P.flip(0)])

    def entropies(reward: Tensor, which: slice, model: slice) -> Tensor:
        found = birl_ext.solve(
            reward,
            rows[model],
            discount=DISCOUNT,
            temperature=TEMPERATURE,
            mask=masks[which],
        )
        return torch.special.entr(found.policy).sum()

    every = slice(None)
    together = grad(entropies)(R.expand(3, 2, STATES, ACTIONS).clone(), every, every)
    assert together.isfinite().all()
    for i in range(3):
        for j in range(2):
            one, other = slice(i, i + 1), slice(j, j + 1)
            alone = grad(entropies)(R[None, None].clone(), one, other)
            assert_close(together[i, j], alone[0, 0], bound=1e-12, label=f"problem {i}, {j}")


def test_an_evaluation_of_a_masked_policy() -> None:
    """The entropy of what is masked, as a reward of `evaluate` and a weight of `occupancy`."""

    def value(reward: Tensor) -> Tensor:
        policy = HOW["compiled"](reward)[1]
        bonus = torch.where(MASK, -policy.log(), 0.0)
        start = torch.full((STATES,), 1 / STATES, dtype=torch.float64)
        visits = birl_ext.occupancy(policy, P, discount=DISCOUNT, initial_distribution=start)
        value = birl_ext.evaluate(policy, bonus, P, discount=DISCOUNT)
        return value.sum() + (visits * torch.special.entr(policy).sum(-1)).sum()

    def plain(reward: Tensor) -> Tensor:
        policy = unrolled(reward)[1]
        entropy = torch.special.entr(policy).sum(-1)
        chain = DISCOUNT * torch.einsum("sa,sat->st", policy.where(MASK, 0.0), P)
        system = torch.eye(STATES, dtype=torch.float64) - chain
        start = torch.full((STATES,), (1 - DISCOUNT) / STATES, dtype=torch.float64)
        visits = torch.linalg.solve(system.mT, start)
        return torch.linalg.solve(system, entropy).sum() + (visits * entropy).sum()

    want = grad(plain)(R)
    assert_close(grad(value)(R), want, bound=1e-10, label="evaluate and occupancy")


@pytest.mark.parametrize("loss", ["entr", "where log", "sqrt"])
def test_an_upper_level_that_looks_behind_a_mask(loss: str) -> None:
    """An estimate and its certificate, which take the solution apart in their own way."""

    def lower(x: Tensor) -> birl_ext.DenseMDP:
        return birl_ext.DenseMDP(x.reshape(STATES, ACTIONS), P, DISCOUNT, mask=MASK)

    def upper(x: Tensor, found: Any) -> Tensor:
        assert found.kernels in ((), ("CPU_PACKED",), ("CPU_ROWS",), ("TORCH",))
        tables = (found.q, found.policy, found.log_policy, found.advantage)
        return LOSSES[loss](*tables) + (x * found.policy.flatten()).sum()

    report = hypergradient_report(BilevelProblem(lower=lower, upper=upper), R.flatten(), 0.7)
    flat = R.flatten()
    want = grad(
        lambda x: (
            LOSSES[loss](*unrolled(x.reshape(R.shape)))
            + (x * unrolled(x.reshape(R.shape))[1].where(MASK, 0.0).flatten()).sum()
        )
    )(flat)
    for got, label in ((report.exact, "exact"), (report.estimate, "estimate")):
        assert_close(got, want, bound=1e-10, label=label)
    assert not report.bound.isnan()


@pytest.mark.parametrize("loss", ["log1p", "logit"])
def test_the_only_action_of_a_state_has_no_slope(loss: str) -> None:
    """π = 1 there, and nothing moves it: what is infinite at one is not asked."""
    mask = MASK.clone()
    mask[1] = torch.tensor([False, True, False])

    def total(policy: Tensor, log_policy: Tensor) -> Tensor:
        free = mask & (policy < 1)
        if loss == "log1p":
            return torch.log1p(-policy).where(free, 0.0).sum() + log_policy.where(free, 0.0).sum()
        return torch.logit(policy).where(free, 0.0).sum()

    def found(reward: Tensor) -> Tensor:
        got = birl_ext.solve(
            reward, P, discount=DISCOUNT, temperature=TEMPERATURE, mask=mask, validate="cheap"
        )
        return total(got.policy, got.log_policy)

    slope = grad(found)(R)
    step = 1e-6 * torch.linspace(1, 2, R.numel(), dtype=torch.float64).reshape(R.shape)
    want = float(found(R + step) - found(R - step)) / 2
    assert float((slope * step).sum()) == pytest.approx(want, rel=1e-6)
