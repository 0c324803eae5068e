"""The rewrite of HPGD's outer step in JAX does what it stands for; what is absent is said."""

from __future__ import annotations

from pathlib import Path

import hpgd_speed
import pytest
import torch
from birl_bench import machine
from birl_bench.rivals import hpgd_jax

from birl_ext import solve
from birl_ext.bilevel.problem import evaluate_at
from birl_ext.problems.four_rooms import FourRooms, Noise, moves

TEMPERATURE, KAPPA = 0.003, 3.0


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.5 * torch.randn(105, generator=generator, dtype=torch.float64)


def test_what_is_absent_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing", lambda *names: f"not installed: {', '.join(names)}")
    monkeypatch.setattr(hpgd_speed, "MANY", (1, 2, 3))
    field = hpgd_speed.contenders(Path("somewhere"))
    assert {one.excuse for one in field if "JAX" in one.name} == {"not installed: jax"}
    assert not any(one.excuse for one in field if "JAX" not in one.name)
    rows = hpgd_speed.measured([one for one in field if "MSoBiRL" in one.name], 1)
    absent = {"name": field[0].name, "starts": 1, "excuse": field[0].excuse}
    head = {"machine": "m", "versions": {"jax": "1", "torch": "2"}, "load_average": 0.5}
    shown = hpgd_speed.table({**head, "rows": [absent, *rows]}).splitlines()
    assert shown[2] == "| HPGD, published JAX code | 1 | not installed: jax |  |  |  |  |"
    assert [row["starts"] for row in rows] == [1, 2, 3]
    assert all(row["errors"][0] < 1e-9 and row["processor_ms"][0] > 0 for row in rows)


def test_a_folder_without_the_published_code_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["hpgd_speed.py", "--published", str(tmp_path)])
    with pytest.raises(SystemExit):
        hpgd_speed.main()
    assert f"no train_stochastic_bilevel_opt.py in {tmp_path}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["planner", "simulator"])
def test_the_rewrite_climbs_along_the_exact_gradient(noise: Noise) -> None:
    """Where walks and plan share their moves; the goal is drawn, so each is given its weight."""
    jax = pytest.importorskip("jax")
    rooms, w = FourRooms(KAPPA, noise), weights().requires_grad_()
    solution = solve(rooms.lower(w.detach()), temperature=TEMPERATURE)
    goals: list[torch.Tensor] = []
    for context in range(2):
        value = rooms._values(w, solve(rooms.lower(w), temperature=TEMPERATURE).policy)
        goals += torch.autograd.grad(-value[context, rooms.start], w)
    (exact,) = torch.autograd.grad(evaluate_at(rooms.problem(), w, TEMPERATURE)[0], w)
    assert torch.allclose(torch.stack(goals).mean(0), exact)

    step = jax.jit(
        hpgd_jax.outer_step(rooms, TEMPERATURE, 0.5, environments=300, walks=noise)  # of many walks
    )
    start = jax.numpy.asarray(w.detach().numpy(), jax.numpy.float32)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for seed in range(12):
        key = jax.random.PRNGKey(seed)
        after, gradient, policy = step(key, start)
        context = int(jax.random.randint(jax.random.split(key)[0], (), 0, 2))
        seen[context].append(torch.tensor(gradient.tolist(), dtype=torch.float64))
        move = 0.5 * gradient / max(1, float(jax.numpy.linalg.norm(gradient)))
        assert abs(start - after - move).max() < 1e-6
        assert torch.allclose(
            torch.tensor(policy.tolist(), dtype=torch.float64), solution.policy, atol=1e-3
        )
    of_goals = [torch.stack(seen[context]).mean(0) for context in range(2)]
    assert (of_goals[0] - goals[0]).norm() < 0.3 * goals[
        0
    ].norm()  # 40 times smaller than the other
    assert (of_goals[1] - goals[1]).norm() < 0.1 * goals[1].norm()
    assert (torch.stack(of_goals).mean(0) - exact).norm() < 0.1 * exact.norm()
    assert moves(noise)[0, 0] == pytest.approx(0.56 if noise == "planner" else 0.67)
