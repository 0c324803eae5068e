"""Second derivatives: gradgradcheck of every op, reverse over reverse and forward over reverse, and
the Hessian of a real likelihood against differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from closeness import assert_close
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.func import grad, hessian, jvp

import birl_ext
from birl_ext.model.mdp import SparseMDP
from birl_ext.ops.backends import choice
from birl_ext.problems.bus import bus_problem, load_bus_data

# forward mode makes torch load decompositions that it still scripts
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

BACKENDS = ["torch", *([] if choice.unavailable("cpu") else ["cpu"])]
STATES, ACTIONS = 3, 2
# rows of two entries, one with a duplicate, one empty: there the process ends
CROW = torch.tensor([0, 2, 4, 6, 8, 10, 10])
COL = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2, 0, 2])


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def functions(sparse: bool, backend: str) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Each public function of its differentiable tensors, and those; nothing is validated."""
    reward = uniform(STATES, ACTIONS)
    entries = 0.2 + (uniform(len(COL)) if sparse else uniform(STATES, ACTIONS, STATES))
    discount, temperature = torch.tensor(0.7).double(), torch.tensor(0.6).double()
    reference = 0.2 + uniform(STATES, ACTIONS)
    policy = uniform(STATES, ACTIONS).softmax(-1)
    start = uniform(STATES).softmax(-1)
    options: dict[str, Any] = {"validate": "off", "backend": backend}

    def model(r: Tensor, p: Tensor, gamma: Tensor, mu: Tensor | None = None) -> Any:
        if sparse:
            mdp = SparseMDP(r, p, CROW, COL, gamma, reference=mu, validate="off")
            return (mdp,), options
        extra = {} if mu is None else {"reference": mu}
        return (r, p), {**options, "discount": gamma, **extra}

    def solve(r: Tensor, p: Tensor, gamma: Tensor, tau: Tensor, mu: Tensor) -> Any:
        inputs, extras = model(r, p, gamma, mu)
        got = birl_ext.solve(*inputs, temperature=tau, **extras)
        return got.value, got.q, got.advantage, got.policy, got.log_policy

    def bellman(v: Tensor, r: Tensor, p: Tensor, gamma: Tensor, tau: Tensor, mu: Tensor) -> Any:
        inputs, extras = model(r, p, gamma, mu)
        return birl_ext.bellman(v, *inputs, temperature=tau, **extras)

    def evaluate(pi: Tensor, r: Tensor, p: Tensor, gamma: Tensor) -> Tensor:
        inputs, extras = model(r, p, gamma)
        return birl_ext.evaluate(pi, *inputs, **extras)

    def occupancy(pi: Tensor, p: Tensor, gamma: Tensor, rho: Tensor) -> Tensor:
        inputs, extras = model(torch.zeros(STATES, ACTIONS).double(), p, gamma)
        return birl_ext.occupancy(pi, inputs[-1], initial_distribution=rho, **extras)

    calls: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "solve": (solve, [reward, entries, discount, temperature, reference]),
        "bellman": (
            bellman,
            [uniform(STATES), reward, entries, discount, temperature, reference],
        ),
        "evaluate": (evaluate, [policy, reward, entries, discount]),
        "occupancy": (occupancy, [policy, entries, discount, start]),
    }
    return {
        name: (call, [t.clone().requires_grad_() for t in tensors])
        for name, (call, tensors) in calls.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["solve", "bellman", "evaluate", "occupancy"])
def test_gradgradcheck(name: str, sparse: bool, backend: str) -> None:
    """In every input at once, mixed second derivatives included."""
    call, inputs = functions(sparse, backend)[name]
    gradgradcheck(
        call,
        inputs,
        atol=1e-6,
        rtol=1e-5,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=False,
    )


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["solve", "bellman", "evaluate", "occupancy"])
def test_second_derivatives_through_a_batched_backward(name: str, sparse: bool) -> None:
    """As above through vmap, which is how torch computes whole Hessians."""
    call, inputs = functions(sparse, "auto")[name]
    gradgradcheck(call, inputs, atol=1e-6, rtol=1e-5, check_batched_grad=True, fast_mode=False)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_second_derivatives_are_finite_and_right_behind_a_mask(sparse: bool) -> None:
    """log π is −∞ there: one careless product makes every second derivative NaN."""
    base: Any = Case(mask=True, terminal=True, reference=True, seed=6).mdp()
    if sparse:
        base = base.to_sparse()
    assert base.reward is not None
    assert base.reference is not None

    def solve(r: Tensor, mu: Tensor, tau: Tensor) -> Any:
        got = birl_ext.solve(base.replace(reward=r, reference=mu), temperature=tau)
        return got.value, got.advantage, got.policy, got.q.where(base.mask, 0.0)

    inputs = [base.reward, base.reference, torch.tensor(0.5).double()]
    inputs = [t.clone().requires_grad_() for t in inputs]
    gradgradcheck(solve, inputs, atol=1e-6, rtol=1e-5, check_fwd_over_rev=True)


def softened(reward: Tensor, temperature: float = 0.3) -> Tensor:
    """A scalar with curvature in the value and in the policy."""
    mdp = Case(seed=5).mdp()
    got = birl_ext.solve(reward, mdp.transition, discount=0.9, temperature=temperature)
    return got.policy.square().sum() + got.value.square().mean()


def test_three_ways_to_a_hessian_vector_product_agree() -> None:
    """Reverse over reverse, forward over reverse and differences of the gradient; none is zero."""
    reward = Case(seed=5).mdp().reward
    direction = torch.randn_like(reward)
    leaf = reward.clone().requires_grad_()
    (slope,) = torch.autograd.grad(softened(leaf), leaf, create_graph=True)
    (backward,) = torch.autograd.grad(slope, leaf, direction)
    forward = jvp(grad(softened), (reward,), (direction,))[1]
    h = 1e-5
    up, down = grad(softened)(reward + h * direction), grad(softened)(reward - h * direction)
    difference = (up - down) / (2 * h)
    size = float(difference.abs().max())
    assert size > 0.1
    assert_close(backward, difference, bound=1e-7 * size, label="reverse over reverse")
    assert_close(forward, difference, bound=1e-7 * size, label="forward over reverse")
    assert_close(forward, backward, bound=1e-12 * size, label="one against the other")


def test_a_hessian_is_symmetric_and_third_derivatives_exist() -> None:
    reward = Case(seed=5).mdp().reward
    matrix = hessian(softened)(reward).reshape(reward.numel(), -1)
    assert_close(matrix, matrix.mT.contiguous(), bound=1e-10, label="symmetry")
    direction = torch.randn_like(reward)

    def along(t: Tensor) -> Tensor:
        return softened(reward + t * direction)

    zero = torch.zeros((), dtype=torch.float64)
    third = grad(grad(grad(along)))(zero)
    h = 1e-4
    curve = grad(grad(along))
    difference = (curve(zero + h) - curve(zero - h)) / (2 * h)
    assert_close(third, difference, bound=1e-6 * float(difference.abs()), label="third derivative")


@pytest.mark.parametrize("cost", ["linear", "quadratic"])
def test_the_hessian_of_the_bus_likelihood_equals_differences(cost: str) -> None:
    """γ = .9999: a curvature that goes once through the fixed point would be far off."""
    problem = bus_problem(load_bus_data(), 0.9999, cost)
    x = torch.tensor([10.0, 2.3] if cost == "linear" else [10.0, 2.3, 0.5], dtype=torch.float64)

    def slope(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(problem.objective(at, 1.0), at)[0]

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.objective(leaf, 1.0), leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient]
    got = torch.stack(rows)
    steps = 1e-4 * torch.eye(len(x), dtype=torch.float64)
    want = torch.stack([(slope(x + h) - slope(x - h)) / 2e-4 for h in steps])
    assert_close(got, want, bound=1e-6 * want.abs().clamp(min=1e-3), label=f"{cost} Hessian")
    assert_close(got, got.mT.contiguous(), bound=1e-9 * float(got.abs().max()), label="symmetry")
    assert (torch.linalg.eigvalsh(got) > 0).all()
