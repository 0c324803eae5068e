"""The temperature of an entropy target: its value, its derivatives, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import birl_ext
from birl_ext.errors import OptionError, ShapeError
from birl_ext.nn import SoftPlanner

STATES, ACTIONS = 5, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def rows(seed: int = 1) -> Tensor:
    return (1.5 * draw(STATES, ACTIONS, STATES, seed=seed)).softmax(-1)


def mean_entropy(reward: Any, tau: Any, weight: Tensor, **options: Any) -> Tensor:
    """Σ d H by a sum over the actions that are taken, of a policy found by plain iteration."""
    policy = birl_ext.solve(reward, temperature=tau, backend="torch", **options).policy
    each = torch.where(policy > 0, policy * policy.clamp(min=1e-300).log(), 0.0)
    return -(weight / weight.sum(-1, keepdim=True) * each.sum(-1)).sum(-1)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_the_policy_has_the_entropy_asked_for(share: float) -> None:
    reward, weight = draw(4, STATES, ACTIONS), draw(STATES, seed=2).square()
    target = share * math.log(ACTIONS)
    tau = birl_ext.temperature_for(target, reward, rows(), discount=0.9, weight=weight)
    assert tau.shape == (4,)
    mdp = birl_ext.DenseMDP(reward, rows(), 0.9)
    found = mean_entropy(mdp, tau, weight)
    torch.testing.assert_close(
        found, torch.full((4,), target, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_masks_references_ends_and_sparse_rows() -> None:
    mask = torch.ones(STATES, ACTIONS, dtype=torch.bool)
    mask[0, 0] = mask[3, 1:] = False
    ends = torch.tensor([False, False, True, False, False])
    given: dict[str, Any] = {
        "mask": mask,
        "terminal": ends,
        "reference": draw(STATES, ACTIONS, seed=3).exp(),
    }
    mdp = birl_ext.DenseMDP(draw(STATES, ACTIONS), rows(), 0.8, **given)
    tau = birl_ext.temperature_for(0.4, mdp)
    assert float(mean_entropy(mdp, tau, torch.ones(STATES).double())) == pytest.approx(
        0.4, rel=1e-9
    )
    same = birl_ext.temperature_for(0.4, draw(STATES, ACTIONS), rows(), discount=0.8, **given)
    assert float(same) == float(tau)
    sparse = birl_ext.temperature_for(0.4, mdp.to_sparse())
    assert float(sparse) == pytest.approx(float(tau), rel=1e-10)


def test_its_derivatives_are_those_of_differences() -> None:
    """First and second, with respect to all that may move it."""

    def tau(entropy: Tensor, reward: Tensor, logits: Tensor, gamma: Tensor, weight: Tensor) -> Any:
        return birl_ext.temperature_for(
            entropy, reward, logits.softmax(-1), discount=gamma, weight=weight.exp()
        )

    given = (
        torch.tensor([0.3, 0.8]).double(),
        draw(2, STATES, ACTIONS),
        draw(STATES, ACTIONS, STATES, seed=1),
        torch.tensor(0.8).double(),
        draw(STATES, seed=2),
    )
    inputs = tuple(one.requires_grad_() for one in given)
    assert torch.autograd.gradcheck(tau, inputs)
    small = tuple(one[:1] if one.dim() == 1 and len(one) == 2 else one for one in inputs)
    (entropy, reward, *rest) = small
    point = (entropy.detach().requires_grad_(), reward[:1].detach().requires_grad_())
    assert torch.autograd.gradgradcheck(
        lambda e, r: tau(e, r, *(one.detach() for one in rest)), point
    )


def test_a_policy_of_fixed_entropy_has_its_whole_derivative() -> None:
    """Rewards of another size change nothing: τ takes it up. At a fixed τ they would."""
    reward = draw(STATES, ACTIONS)
    size = torch.ones((), dtype=torch.float64, requires_grad=True)
    tau = birl_ext.temperature_for(0.5, size * reward, rows(), discount=0.9)
    whole = birl_ext.solve(size * reward, rows(), discount=0.9, temperature=tau).policy
    fixed = birl_ext.solve(size * reward, rows(), discount=0.9, temperature=tau.detach()).policy
    (moved,) = torch.autograd.grad(whole[0, 0], size, retain_graph=True)
    (at_fixed,) = torch.autograd.grad(fixed[0, 0], size)
    assert abs(float(moved)) < 1e-9 < 1e-3 < abs(float(at_fixed))
    assert float(torch.autograd.grad(tau, size)[0]) == pytest.approx(float(tau.detach()), rel=1e-9)


def test_a_planner_takes_it_for_a_call() -> None:
    planner = SoftPlanner(discount=0.9, temperature=0.1, transition=rows())
    reward = draw(2, STATES, ACTIONS).requires_grad_()
    tau = birl_ext.temperature_for(0.5, reward, rows(), discount=0.9)
    found = planner(reward, temperature=tau)
    want = birl_ext.solve(reward, rows(), discount=0.9, temperature=tau)
    assert torch.equal(found.policy, want.policy)
    assert planner.temperature == pytest.approx(0.1)
    assert not torch.equal(planner(reward).policy, found.policy)


@pytest.mark.parametrize(
    ("entropy", "words"),
    [
        (0.0, r"entropy is 0 \(allowed: above 0 and below 1.09861 nats\)"),
        (-1.0, "entropy is -1 "),
        (1.2, "entropy is 1.2 "),
        (math.nan, "entropy is nan "),
        (torch.tensor([0.5, 1.2]), r"entropy of problem \[1\] is 1.2"),
    ],
)
def test_an_entropy_that_no_policy_has_is_refused(entropy: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        birl_ext.temperature_for(entropy, draw(STATES, ACTIONS), rows(), discount=0.9)


def test_what_has_no_temperature_is_refused() -> None:
    """All actions alike: the policy is uniform at every temperature."""
    nothing = torch.zeros(STATES, ACTIONS, dtype=torch.float64)
    with pytest.raises(OptionError, match=r"entropy is 0.5, and at a temperature of .* it is 1.09"):
        birl_ext.temperature_for(0.5, nothing, rows(), discount=0.9)
    for weight in (torch.zeros(STATES), -torch.ones(STATES), torch.full((STATES,), math.nan)):
        with pytest.raises(OptionError, match="weight has a negative number"):
            birl_ext.temperature_for(
                0.5, draw(STATES, ACTIONS), rows(), discount=0.9, weight=weight
            )
    with pytest.raises(ShapeError, match=r"weight has shape \(4,\)"):
        birl_ext.temperature_for(
            0.5, draw(STATES, ACTIONS), rows(), discount=0.9, weight=torch.ones(4)
        )
    with pytest.raises(ShapeError, match=r"entropy has shape \(3,\)"):
        birl_ext.temperature_for(
            torch.full((3,), 0.5), draw(2, STATES, ACTIONS), rows(), discount=0.9
        )
    with pytest.raises(OptionError, match="beside an MDP object"):
        birl_ext.temperature_for(
            0.5, birl_ext.DenseMDP(draw(STATES, ACTIONS), rows(), 0.9), discount=0.9
        )


def test_a_reference_that_is_nearly_sure_has_its_temperatures_in_between() -> None:
    """The entropy rises with τ to .33 nats, and falls to the reference's .11."""
    reward, rows = draw(STATES, ACTIONS, seed=1), draw(STATES, ACTIONS, STATES, seed=2).softmax(-1)
    reference = torch.full((STATES, ACTIONS), 0.01, dtype=torch.float64)
    reference[:, 0] = 1 - 0.01 * (ACTIONS - 1)

    def mean(tau: float) -> float:
        policy = birl_ext.solve(
            reward, rows, discount=0.9, temperature=tau, reference=reference
        ).policy
        return float(-(policy * policy.log()).sum(-1).mean())

    most = max(mean(10 ** (k / 10)) for k in range(-10, 10))
    assert mean(1e3) < 0.5 * most
    target = torch.tensor([0.3, 0.9], dtype=torch.float64) * most
    found = birl_ext.temperature_for(
        target, reward.expand(2, -1, -1), rows, discount=0.9, reference=reference
    )
    for want, tau in zip(target.tolist(), found.tolist(), strict=True):
        assert abs(mean(tau) - want) < 1e-11
    with pytest.raises(OptionError, match=r"entropy is .*, and at a temperature of"):
        birl_ext.temperature_for(1.2 * most, reward, rows, discount=0.9, reference=reference)
