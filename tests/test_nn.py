"""SoftPlanner in other dtypes: its temperature and its transition stay what they were."""

from __future__ import annotations

import math

import pytest
import torch

import birl_ext
from birl_ext.nn import SoftPlanner


def planner(dtype: torch.dtype, **options: bool) -> SoftPlanner:
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


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_narrowed_planner_keeps_its_temperature(dtype: torch.dtype, learn: bool) -> None:
    layer = planner(torch.float64, learn_temperature=learn)
    if learn:
        layer(REWARD).value.sum().backward()
    layer = layer.to(dtype)
    assert layer.log_temperature.item() == math.log(0.1)
    assert isinstance(layer.log_temperature, torch.nn.Parameter) == learn
    assert layer.transition is not None
    assert layer.transition.dtype == torch.float32
    layer(REWARD.to(dtype)).value.sum().backward() if learn else layer(REWARD.to(dtype))
    assert not learn or layer.log_temperature.grad.dtype == torch.float64
