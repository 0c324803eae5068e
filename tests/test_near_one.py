"""Derivatives near a discount of one, where the value is a large constant and little else: against
512-bit differences, and against what an added constant must do.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from oracle import exact
from torch import Tensor

import birl_ext
from birl_ext.errors import IllConditionedWarning
from birl_ext.options import BackendName

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
BACKENDS: list[BackendName] = (
    ["cpu", "torch"] if birl_ext.ops.backends.choice.unavailable("cpu") == "" else ["torch"]
)
NAMES = ("reward", "transition", "reference", "discount", "temperature")


def chain(states: int, actions: int = 2, seed: int = 0, link: float = 1.0) -> Tensor:
    """Two halves of states; what leads from one to the other counts `link` times."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(states, actions, states, generator=generator, dtype=torch.float64) ** 3
    half = states // 2
    rows[:half, :, half:] *= link
    rows[half:, :, :half] *= link
    return rows / rows.sum(-1, keepdim=True)


def ring(states: int) -> Tensor:
    """A step on or back: other modes are slow too, but none as slow as a discount near one."""
    rows = torch.zeros(states, 2, states, dtype=torch.float64)
    for s in range(states):
        rows[s, 0, (s + 1) % states] = rows[s, 1, s - 1] = 1.0
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graph", [False, True], ids=["first order", "create_graph"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("states", [1, 2, 9, 33, 300])
def test_a_constant_added_to_the_reward_moves_no_policy(
    states: int, sparse: bool, graph: bool, backend: BackendName
) -> None:
    if (states, sparse, backend) == (300, True, "torch"):
        pytest.skip("takes seconds")
    rows = chain(states)
    reward = torch.rand(states, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for gap in (1e-4, 1e-8, 1e-12, 2.0**-53):
        x = reward.clone().requires_grad_()
        mdp = birl_ext.DenseMDP(x, rows, 1 - gap)
        got = birl_ext.solve(mdp.to_sparse() if sparse else mdp, temperature=0.1, backend=backend)
        (slope,) = torch.autograd.grad(got.policy[0, 0], x, create_graph=graph)
        total = float(slope.detach().sum())
        assert abs(total) < 1e-10, f"1 − γ = {gap}: {total}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("states", [3, 12, 40])
def test_first_and_second_derivatives(states: int, backend: BackendName) -> None:
    rng = np.random.default_rng(states)
    rows = chain(states, 2, states)
    for gap, tau, name in zip(
        (1e-3, 1e-6, 1e-9, 1e-12, 1e-12), (0.01, 1.0, 0.1, 0.03, 0.3), NAMES, strict=True
    ):
        data: dict[str, Any] = {
            "reward": torch.from_numpy(rng.random((states, 2))),
            "transition": rows,
            "reference": torch.from_numpy(rng.random((states, 2)) + 0.5),
            "discount": torch.tensor(1 - gap, dtype=torch.float64),
            "temperature": torch.tensor(tau, dtype=torch.float64),
        }
        shape = data[name].shape
        shift = torch.from_numpy(np.asarray(rng.normal(size=shape))) * data[name]
        weight = torch.from_numpy(rng.normal(size=(states, 2)))

        def policy(t: Tensor, data: Any = data, name: str = name, shift: Tensor = shift) -> Tensor:
            moved = {**data, name: data[name] + t * shift}
            found: Tensor = birl_ext.solve(
                moved.pop("reward"), moved.pop("transition"), backend=backend, **moved
            ).policy
            return found

        def truth(model: exact.Model, answer: exact.Answer) -> exact.Outputs:
            return {"policy": answer.policy, "advantage": answer.advantage}

        numbers = {
            key: float(value) if value.dim() == 0 else value.numpy() for key, value in data.items()
        }
        model = exact.Model.of(numbers.pop("reward"), numbers.pop("transition"), **numbers)
        wanted = exact.slopes(model, {name: shift.numpy()}, truth)
        unit = np.abs(wanted.first["advantage"]).max() / tau
        if name in ("temperature", "reference"):  # they move the policy by themselves too
            unit = max(unit, np.abs(wanted.first["policy"]).max())
        first = torch.from_numpy(wanted.first["policy"]).reshape(states, 2)
        second = torch.from_numpy(wanted.second["policy"]).reshape(states, 2)

        zero = torch.zeros((), dtype=torch.float64)

        def forward(t: Tensor, policy: Any = policy) -> Tensor:
            slope: Tensor = torch.func.jvp(policy, (t,), (torch.ones_like(t),))[1]
            return slope

        ahead = forward(zero)
        assert float((ahead - first).abs().max()) <= 1e-9 * unit, name
        curve = torch.func.jvp(forward, (zero,), (torch.ones_like(zero),))[1]
        assert float((curve - second).abs().max()) <= 1e-6 * unit**2, name
        t = zero.clone().requires_grad_()
        loss = (weight * policy(t)).sum()
        (plain,) = torch.autograd.grad(loss, t, retain_graph=True)
        (slope,) = torch.autograd.grad(loss, t, create_graph=True)
        (back,) = torch.autograd.grad(slope, t)
        size = float(weight.abs().sum())
        for got in (plain, slope.detach()):
            assert abs(float(got - (weight * first).sum())) <= 1e-9 * unit * size, name
        assert abs(float(back - (weight * second).sum())) <= 1e-6 * unit**2 * size, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_occupancy_by_the_discount(backend: BackendName) -> None:
    states, rows = 5, chain(5)
    policy = torch.full((states, 2), 0.5, dtype=torch.float64)
    start = torch.zeros(states, dtype=torch.float64)
    start[0] = 1.0
    for gap in (1e-4, 1e-8, 1e-12):
        gamma = torch.tensor(1 - gap, dtype=torch.float64)

        def share(gamma: Tensor) -> Tensor:
            return birl_ext.occupancy(
                policy, rows, discount=gamma, initial_distribution=start, backend=backend
            )

        slope = torch.func.jvp(share, (gamma,), (torch.ones_like(gamma),))[1]
        # d = (1 − γ)ρ + γ P_πᵀd, derived: the remainder mixes, and its sum is zero
        moves = (policy.unsqueeze(-1) * rows).sum(1)
        found = share(gamma)
        system = torch.eye(states, dtype=torch.float64) - gamma * moves.mT
        system[0] = 1.0  # one equation follows from the others; the slope sums to zero
        right = moves.mT @ found - start
        right[0] = 0.0
        wanted = torch.linalg.solve(system, right)
        torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graph", [False, True], ids=["first order", "create_graph"])
@pytest.mark.parametrize("states", [6, 33, 300])
def test_parts_that_are_hardly_ever_left_are_said_to_be_ill_conditioned(
    states: int, graph: bool, backend: BackendName
) -> None:
    def conditions(rows: Tensor) -> list[float]:
        reward = torch.rand(
            states, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        # in a batch, whose other problem is well-conditioned
        both = torch.stack([chain(states), rows])
        got = birl_ext.solve(
            reward.expand(2, states, 2), both, discount=1 - 1e-11, temperature=0.1, backend=backend
        )
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.autograd.grad(got.policy[1, 0, 0], reward, create_graph=graph)
        found = [w.message for w in seen if isinstance(w.message, IllConditionedWarning)]
        assert len(found) == len(seen)
        assert all(warning.problem == 1 for warning in found)
        return [warning.condition for warning in found]

    for sound in (chain(states, seed=2), chain(states, link=1e-3), ring(states)):
        assert conditions(sound) == []
    (some,) = conditions(chain(states, link=1e-10))
    (most,) = conditions(chain(states, link=0.0))
    assert 1e7 < some < 1e11
    assert some < most < 1e13


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled code")
def test_a_problem_does_not_know_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(3)
    for states in (5, 40):
        rows = torch.stack([chain(states, seed=seed) for seed in range(6)])
        reward = torch.rand(6, states, 2, generator=generator, dtype=torch.float64)
        gaps = torch.tensor([1e-2, 1e-12, 0.5, 1e-7, 1e-4, 2.0**-53], dtype=torch.float64)

        def slope(r: Tensor, p: Tensor, gap: Tensor) -> Tensor:
            r = r.clone().requires_grad_()
            got = birl_ext.solve(r, p, discount=1 - gap, temperature=0.1)
            (found,) = torch.autograd.grad(got.policy.square().sum() + got.value.sum(), r)
            return found

        whole = slope(reward, rows, gaps)
        for i in range(6):
            alone = slope(reward[i].clone(), rows[i].clone(), gaps[i])
            assert torch.equal(alone, whole[i]), f"{states} states, problem {i}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_process_that_ends_slowly_has_few_digits_at_second_order_and_says_so(
    backend: BackendName,
) -> None:
    """No mass is known beforehand where a process ends: what 1/p magnifies is magnified again."""

    def derivatives(pace: float) -> tuple[float, float, list[float]]:
        keep, move = [1 - 2 * pace, pace, pace], [pace, 1 - 2 * pace, pace]
        rows = torch.tensor(
            [[keep, move], [move, keep], [[pace, pace, 1 - 2 * pace]] * 2], dtype=torch.float64
        )
        reward = torch.tensor([[0.1, 0.5], [0.8, 0.9], [0.7, 0.2]], dtype=torch.float64)
        weight = torch.tensor([[-0.3, 0], [0.3, 1.2], [-0.2, -0.1]], dtype=torch.float64)
        end = torch.tensor([False, False, True])
        discount = torch.tensor(1 - 1e-8, dtype=torch.float64, requires_grad=True)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            got = birl_ext.solve(
                reward, rows, discount=discount, temperature=1.0, terminal=end, backend=backend
            )
            total = (weight * got.advantage).sum()
            (first,) = torch.autograd.grad(total, discount, create_graph=True)
            early = [w.message for w in seen if isinstance(w.message, IllConditionedWarning)]
            assert not early, "the first derivative has its digits"
            (second,) = torch.autograd.grad(first, discount)
        told = [w.message for w in seen if isinstance(w.message, IllConditionedWarning)]
        return first.item(), second.item(), [warning.condition for warning in told]

    first, second, told = derivatives(1e-2)
    assert told == []
    # differences in 110 digits
    assert first == pytest.approx(-0.15532362801606, rel=1e-9)
    assert second == pytest.approx(-0.0230441150, rel=1e-6)
    first, _, told = derivatives(3e-4)
    assert first == pytest.approx(-0.16068725049, rel=1e-7)
    assert len(told) == 1
    assert 1e3 < told[0] < 1e4
