"""SoftPlanner as a module: dtypes, parameters, buffers, state dicts."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from cases import untyped
from closeness import assert_same_bits

import birl_ext
from birl_ext.nn import SoftPlanner


def planner(dtype: torch.dtype, **options: Any) -> SoftPlanner:
    rows = torch.rand(5, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    transition = (rows / rows.sum(-1, keepdim=True)).to(dtype)
    return SoftPlanner(discount=0.9, temperature=0.1, transition=transition, **options)


REWARD = torch.linspace(0, 1, 10, dtype=torch.float64).reshape(5, 2)


def test_a_widened_planner_solves() -> None:
    layer = planner(torch.float32)
    wide = layer.transition
    assert wide is not None
    wide = wide.double() / wide.double().sum(-1, keepdim=True)
    solution = layer.double()(REWARD)
    want = birl_ext.solve(REWARD, wide, discount=0.9, temperature=math.exp(math.log(0.1)))
    torch.testing.assert_close(solution.value, want.value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_narrowed_planner_keeps_its_temperature(dtype: torch.dtype) -> None:
    layer = planner(torch.float64).to(dtype)
    assert layer.log_temperature.item() == math.log(0.1)
    assert layer.transition is not None
    assert layer.transition.dtype == torch.float32
    assert layer(REWARD.to(dtype)).value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_temperature_is_a_parameter_like_any_other(dtype: torch.dtype) -> None:
    """One axis, and the dtype of its module: sharded and compiled optimisers take nothing else."""
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 2, dtype=dtype), planner(dtype, learn_temperature=True)
    )
    features = torch.linspace(-1, 1, 15, dtype=dtype).reshape(5, 3)
    network(features).value.sum().backward()
    for parameter in network.parameters():
        assert parameter.dim() >= 1
        assert parameter.dtype == dtype
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype
        assert parameter.grad.abs().sum() > 0
    flat = torch.nn.utils.parameters_to_vector(network.parameters())
    assert flat.dtype == dtype
    torch.nn.utils.vector_to_parameters(1.1 * flat, network.parameters())
    assert network(features).value.dtype == dtype
    narrow = network.to(torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert narrow[1](REWARD.bfloat16()).value.isfinite().all()


def restricted(**options: Any) -> SoftPlanner:
    transition = planner(torch.float64).transition
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[0, 1] = mask[4, 0] = False
    return SoftPlanner(
        discount=0.9,
        temperature=0.1,
        transition=transition,
        mask=mask,
        terminal=torch.arange(5) == 4,
        reference=torch.linspace(0.5, 1, 10, dtype=torch.float64).reshape(5, 2),
        initial=torch.zeros(5, dtype=torch.float64),
        **options,
    )


def test_what_restricts_a_planner_moves_and_is_stored_with_it() -> None:
    layer = restricted()
    names = {"transition", "mask", "terminal", "reference", "initial", "log_temperature"}
    assert set(layer.state_dict()) == names
    other = restricted()
    with torch.no_grad():
        for buffer in other.buffers():
            buffer.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(REWARD).policy, layer(REWARD).policy)
    assert all(buffer.is_meta for buffer in restricted().to("meta").buffers())
    single = layer.float()
    assert single.mask is not None
    assert single.mask.dtype == torch.bool
    assert single(REWARD.float()).policy.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("learn", [False, True])
def test_former_state_dicts_are_read(learn: bool, assign: bool) -> None:
    """Those in which log τ has no axis and is float64, and which hold no mask and the like."""
    layer = torch.nn.Sequential(restricted(learn_temperature=learn))
    state = {"0.log_temperature": torch.tensor(math.log(0.3), dtype=torch.float64)}
    state["0.transition"] = untyped(layer[0].transition).flip(0)
    layer.load_state_dict(state, assign=assign)
    assert layer[0].log_temperature.shape == (1,)
    want = restricted()
    want.log_temperature.fill_(math.log(0.3))
    want.transition = state["0.transition"]
    torch.testing.assert_close(layer(REWARD).value, want(REWARD).value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["transition", "mask", "terminal", "reference", "initial"])
def test_what_is_no_tensor_is_refused(name: str) -> None:
    with pytest.raises(birl_ext.errors.DtypeError, match=f"E302 {name} is"):
        SoftPlanner(discount=0.9, temperature=0.1, **untyped({name: [1.0, 0.0]}))


def test_discount_and_temperature_are_scheduled() -> None:
    layer = planner(torch.float64)
    for discount, temperature in ((0.9, 0.1), (0.5, 1.0), (0.99, 0.03)):
        layer.discount, layer.temperature = discount, temperature
        assert layer.transition is not None
        want = birl_ext.solve(
            REWARD, layer.transition, discount=discount, temperature=layer.temperature
        )
        assert layer.temperature == pytest.approx(temperature, rel=1e-15)
        torch.testing.assert_close(layer(REWARD).policy, want.policy, rtol=1e-12, atol=0)
    learned = planner(torch.float64, learn_temperature=True)
    kept = learned.log_temperature
    learned.temperature = 0.5
    assert learned.log_temperature is kept
    with pytest.raises(birl_ext.errors.TemperatureError):
        layer.temperature = 0.0
    with pytest.raises(birl_ext.errors.DiscountError):
        layer.discount = 1.0
    assert (layer.discount, repr(layer)[:25]) == (0.99, "SoftPlanner(discount=0.99")


def test_what_restricts_a_problem_may_differ_by_call() -> None:
    layer = restricted()
    masks = torch.ones(2, 5, 2, dtype=torch.bool)
    masks[1, 2, 0] = False
    ends = torch.zeros(2, 5, dtype=torch.bool)
    reference = torch.full((5, 2), 0.5, dtype=torch.float64)
    rewards = torch.stack([REWARD, 2 * REWARD])
    found = layer(rewards, mask=masks, terminal=ends, reference=reference)
    assert layer.transition is not None
    for i in range(2):
        want = birl_ext.solve(
            rewards[i],
            layer.transition,
            discount=0.9,
            temperature=layer.temperature,
            mask=masks[i],
            terminal=ends[i],
            reference=reference,
        )
        torch.testing.assert_close(found.problem(i).policy, want.policy, rtol=1e-12, atol=0)


def test_a_sparse_transition() -> None:
    dense = planner(torch.float64)
    assert dense.transition is not None
    rows = dense.transition.reshape(10, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's CSR tensors are in beta
        layer = SoftPlanner(discount=0.9, temperature=0.1, transition=rows.to_sparse_csr())
    reward = REWARD.clone().requires_grad_()
    found, want = layer(reward), dense(REWARD)
    torch.testing.assert_close(found.policy, want.policy, rtol=1e-12, atol=0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(REWARD).policy, found.policy, label="compiled")
    found.policy[:, 0].sum().backward()
    assert reward.grad is not None
    assert reward.grad.abs().sum() > 0
    assert {"transition", "crow", "col"} <= layer.state_dict().keys()
    wide = layer.float().double()
    assert wide.transition is not None
    sums = torch.stack([wide.transition[5 * i : 5 * i + 5].sum() for i in range(10)])
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-15, atol=0)
    assert wide(REWARD).status == 0


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_coo])
@pytest.mark.parametrize("own", [None, "dense", "sparse"])
@pytest.mark.filterwarnings("ignore:Sparse CS")  # in beta
def test_a_sparse_transition_may_differ_by_call(layout: Any, own: str | None) -> None:
    """With what else is given by call; its derivatives too."""
    other = planner(torch.float64)
    assert other.transition is not None
    rows = other.transition.flip(0).reshape(10, 5).clone().requires_grad_()
    first = {"dense": other.transition, "sparse": other.transition.reshape(10, 5).to_sparse()}
    layer = SoftPlanner(discount=0.9, temperature=0.1, transition=first.get(str(own)))
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[2, 0] = False
    found = layer(REWARD, rows.to_sparse(layout=layout), mask=mask)
    (grad,) = torch.autograd.grad(found.policy[0, 0], rows)
    dense = rows.reshape(5, 2, 5)
    want = birl_ext.solve(REWARD, dense, discount=0.9, temperature=layer.temperature, mask=mask)
    (expected,) = torch.autograd.grad(want.policy[0, 0], rows)
    torch.testing.assert_close(found.policy, want.policy, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)
    with pytest.raises(birl_ext.errors.ShapeError, match=r"transition has shape \(9, 5\)"):
        layer(REWARD, rows[:9].to_sparse(layout=layout))


@pytest.mark.parametrize("learn", [False, True])
def test_a_temperature_that_is_not_one_number_is_refused_at_once(learn: bool) -> None:
    layer = planner(torch.float64, learn_temperature=learn)
    for several in (torch.tensor([0.1, 0.2]), torch.tensor([])):
        with pytest.raises(birl_ext.errors.ShapeError, match=r"temperature has shape .*one number"):
            layer.temperature = untyped(several)
        with pytest.raises(birl_ext.errors.ShapeError, match=r"temperature has shape .*one number"):
            SoftPlanner(discount=0.9, temperature=untyped(several))
    assert layer.temperature == pytest.approx(0.1, rel=1e-6)
    layer.temperature = untyped(torch.tensor([0.2]))
    assert layer.temperature == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize(("name", "near"), [("max_iteration", "use max_iterations"), ("xyz", "")])
def test_an_unknown_option_is_refused_at_once(name: str, near: str) -> None:
    with pytest.raises(birl_ext.errors.OptionError, match=f"no option '{name}'.*{near}"):
        SoftPlanner(discount=0.9, temperature=0.1, **untyped({name: 3}))
