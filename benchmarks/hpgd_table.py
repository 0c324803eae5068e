"""Do our runs of AMD, zero order and HPGD agree with the table that HPGD's authors published?

Configurable Four Rooms by their protocol (Thoma et al., NeurIPS 2024, Table 1): stochastic gradient
descent with the gradient's norm cut to 1, 10,000 outer steps, the value in the planner's model
averaged over the last tenth, the best rate by that same number; of their rates .5, .1, .05 and .01
the first two.

* AMD carries 100 sweeps over from step to step and so follows the exact gradient: it is played by
  the exact gradient, and checked against AMD itself along the first steps of each row. As theirs,
  it is that of one of the two goals, drawn anew in each step; "AMD, both goals" has the mean.
* Zero order: one Gaussian direction, radius C/t, C of .1 and 1, of their .01, .1, .5 and 1.
* HPGD: as many paths of at most 200 steps of the simulator's moves as take 10,000 steps together,
  all for one goal that is drawn: their tables are means over what is visited, and fewer visits are
  another method, with more bias. Rows and steps by --hpgd and --hpgd-steps: a step takes ten times
  as long as an exact one. "HPGD, lean JAX" (--lean, needs JAX) is its step rewritten, in a seventh
  of the time.

    python benchmarks/hpgd_table.py [--rows 0.003/3 …] [--methods AMD …] [--steps N] [--seeds N]
        [--hpgd 0.003/3 …] [--hpgd-steps N] [--lean 0.003/3 …] [--out FILE]

Every finished row of a method is written at once, and one that the file holds is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from birl_bench.machine import header, today
from birl_bench.report import store
from birl_bench.report import table as markdown
from birl_bench.rivals import hpgd_jax
from torch import Tensor

from birl_ext import Solution
from birl_ext.bilevel import AMD, HPGD, BilevelProblem, MSoBiRL, ZeroOrder
from birl_ext.bilevel.algorithm import Descent
from birl_ext.problems.four_rooms import DISCOUNT, FLAT, PUBLISHED, FourRooms
from birl_ext.problems.sampled_four_rooms import sampled_four_rooms
from birl_ext.progress import progress

RATES = (0.5, 0.1)
RADII = (0.1, 1.0)
ERRORS = {
    (0.001, 1.0): {"HPGD": 0.088, "AMD": 0.0, "zero order": 0.059},
    (0.001, 3.0): {"HPGD": 0.006, "AMD": 0.0, "zero order": 0.005},
    (0.001, 5.0): {"HPGD": 0.006, "AMD": 0.003, "zero order": 0.007},
    (0.003, 1.0): {"HPGD": 0.002, "AMD": 0.0, "zero order": 0.048},
    (0.003, 3.0): {"HPGD": 0.001, "AMD": 0.0, "zero order": 0.028},
    (0.003, 5.0): {"HPGD": 0.003, "AMD": 0.0, "zero order": 0.002},
    (0.005, 1.0): {"HPGD": 0.011, "AMD": 0.003, "zero order": 0.026},
    (0.005, 3.0): {"HPGD": 0.002, "AMD": 0.004, "zero order": 0.027},
    (0.005, 5.0): {"HPGD": 0.003, "AMD": 0.009, "zero order": 0.027},
}
"""Standard errors of the published means, of ten seeds."""
METHODS = ("AMD", "zero order", "HPGD")
MEAN = "AMD, both goals"
LEAN = "HPGD, lean JAX"
TOLD = 50
"""Values of a run of it, evenly spread."""
CLOSE = 0.015
DRAWN = 10_000
"""Environment steps of an outer step: 5 environments × 2,000."""


class ClippedSGD(torch.optim.Optimizer):
    """x ← x − β g/max(1, ‖g‖), row by row, each row with a rate of its own."""

    def __init__(self, params: Iterable[Tensor], rates: Tensor) -> None:
        super().__init__(params, {})
        self.rates = rates

    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        assert closure is not None
        with torch.enable_grad():
            objective = closure()
        (x,) = self.param_groups[0]["params"]
        with torch.no_grad():
            norm = x.grad.norm(dim=-1, keepdim=True).clamp(min=1)
            x.sub_(self.rates * x.grad / norm)
        return objective


def starts(seeds: int) -> Tensor:
    """w ~ N(0, .01²), (seeds, 105)."""
    drawn = [
        torch.randn(105, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in range(seeds)
    ]
    return FLAT * torch.stack(drawn)


def climbed(
    algorithm: Descent[Any],
    steps: int,
    name: str,
    values: Callable[[Any], Tensor],
    every: int = 1,
    before: Callable[[], None] = lambda: None,
) -> Tensor:
    """The values of the last tenth of the steps, mean, by rows."""
    found = []
    with progress(name, total=steps, lines=30.0) as show:
        for step in range(1, steps + 1):
            before()
            outcome = algorithm.step()
            if step > 0.9 * steps and step % every == 0:
                found.append(values(outcome))
            show({"step": step, "value": float(-torch.as_tensor(outcome.objective).mean())})
    return torch.stack(found).mean(0)


def best(values: Tensor, chosen: list[Any]) -> dict[str, Any]:
    """(choices, seeds) → mean and standard error at the best choice."""
    lead = int(values.mean(-1).argmax())
    own = values[lead]
    error = float(own.std() / math.sqrt(len(own))) if len(own) > 1 else math.nan
    return {"mean": float(own.mean()), "error": error, "chosen": chosen[lead]}


def amd(
    temperature: float, kappa: float, steps: int, seeds: int, drawn: bool = True
) -> dict[str, Any]:
    rooms = FourRooms(kappa)
    x = starts(seeds).repeat(len(RATES), 1)
    rates = torch.tensor(RATES, dtype=torch.float64).repeat_interleave(seeds).unsqueeze(-1)
    draws = torch.Generator().manual_seed(0)
    values_of: list[Tensor] = []

    def upper(w: Tensor, solution: Solution) -> Tensor:
        """φ of a goal for each row; its mean over the goals is kept."""
        each = rooms._values(w, solution.policy)[..., rooms.start]
        values_of[:] = [each.detach().mean(-1)]
        goal = torch.randint(2, (len(each), 1), generator=draws)
        return -each.gather(-1, goal).squeeze(-1) if drawn else -each.mean(-1)

    algorithm = MSoBiRL(
        BilevelProblem(rooms.lower, upper),
        x,
        temperature=temperature,
        optimiser=lambda p: ClippedSGD(p, rates),
    )
    name = f"AMD {temperature:g}/{kappa:g}" + ", both goals" * (not drawn)
    values = climbed(algorithm, steps, name, lambda _: values_of[0])
    return {**best(values.view(len(RATES), seeds), list(RATES)), "apart": apart(rooms, temperature)}


def apart(rooms: FourRooms, temperature: float, steps: int = 20) -> float:
    """Relative distance of AMD's own gradient from the exact one, the largest of some steps after
    its tables have settled.
    """
    x = starts(1)[0]
    theirs = AMD(rooms.additive(), x, temperature=temperature, optimiser=_still)
    ours = MSoBiRL(rooms.problem(), x, temperature=temperature, optimiser=_still)
    worst = 0.0
    for step in range(steps):
        ours.step(), theirs.step()
        exact, found = ours.x.grad.clone(), theirs.x.grad.clone()
        if step >= steps // 2:
            worst = max(worst, float((found - exact).norm() / exact.norm()))
        with torch.no_grad():
            for own in (ours.x, theirs.x):
                own.sub_(0.1 * exact / max(1.0, float(exact.norm())))
    return worst


def _still(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def zero_order(temperature: float, kappa: float, steps: int, seeds: int) -> dict[str, Any]:
    rooms = FourRooms(kappa)
    rates = torch.tensor(RATES, dtype=torch.float64).repeat_interleave(seeds).unsqueeze(-1)
    found, chosen = [], []
    for radius in RADII:
        algorithm = ZeroOrder(
            rooms.problem(),
            starts(seeds).repeat(len(RATES), 1),
            temperature=temperature,
            optimiser=lambda p: ClippedSGD(p, rates),
            radius=lambda step, c=radius: max(c / (step + 1), 1e-7),  # type: ignore[misc]
        )
        name = f"zero order {temperature:g}/{kappa:g}, C = {radius:g}"
        values = climbed(algorithm, steps, name, lambda o: -o.objective)
        found.append(values.view(len(RATES), seeds))
        chosen += [[rate, radius] for rate in RATES]
    return best(torch.cat(found), chosen)


def hpgd(temperature: float, kappa: float, steps: int, seeds: int) -> dict[str, Any]:
    values = []
    for rate, seed in itertools.product(RATES, range(seeds)):
        rooms = sampled_four_rooms(temperature, kappa, goal="both", moves="simulator", seed=seed)
        algorithm = HPGD(
            rooms.problem,
            rooms.simulator,
            starts(seed + 1)[seed],
            discount=DISCOUNT,
            temperature=temperature,
            optimiser=lambda p, r=rate: ClippedSGD(p, torch.tensor(r)),  # type: ignore[misc]
            batch=100,
            follower=rooms.follower,
        )
        name = f"HPGD {temperature:g}/{kappa:g}, rate {rate:g}, seed {seed}"
        judge, draw = _judge(rooms, algorithm), Walks(algorithm)
        values.append(climbed(algorithm, steps, name, judge, max(1, steps // 200), draw))
    return best(torch.stack(values).view(len(RATES), seeds), list(RATES))


def lean(temperature: float, kappa: float, steps: int, seeds: int) -> dict[str, Any]:
    import jax

    rooms, every = FourRooms(kappa), max(1, steps // TOLD)
    found, curves = [], []
    for rate, seed in itertools.product(RATES, range(seeds)):
        step = hpgd_jax.outer_step(rooms, temperature, rate)

        @jax.jit
        def some(key: Any, w: Any, step: Any = step) -> Any:
            def one(carry: Any, _: None) -> Any:
                key, now = jax.random.split(carry[0])
                return (key, step(now, carry[1])[0]), None

            return jax.lax.scan(one, (key, w), None, every)[0]

        key, w = jax.random.PRNGKey(seed), jax.numpy.asarray(starts(seed + 1)[seed].numpy(), "f4")
        curve = []
        name = f"{LEAN} {temperature:g}/{kappa:g}, rate {rate:g}, seed {seed}"
        with progress(name, total=TOLD, lines=30.0) as show:
            for k in range(TOLD):
                key, w = some(key, w)
                x = torch.tensor(w.tolist(), dtype=torch.float64)
                curve.append(-float(rooms.problem().objective(x, temperature)))
                show({"step": k + 1, "value": curve[-1]})
        curves.append([round(value, 4) for value in curve])
        found.append(sum(curve[-TOLD // 10 :]) / (TOLD // 10))
    values = torch.tensor(found, dtype=torch.float64).view(len(RATES), seeds)
    return {**best(values, list(RATES)), "curves": curves}


class Walks:
    """Before an outer step: a goal is drawn for all its paths, and so many paths are asked for as
    take about `DRAWN` steps, by the last ones to that goal.
    """

    def __init__(self, algorithm: HPGD) -> None:
        self.algorithm, self.simulator = algorithm, algorithm.simulator
        self.seen, self.goal = 0, 0
        self.length = [100.0, 100.0]

    def __call__(self) -> None:
        drawn = self.simulator.samples - self.seen
        if drawn:
            self.length[self.goal] = max(1.0, drawn / self.algorithm.batch)
        self.seen = self.simulator.samples
        begins = self.simulator.start.nonzero().flatten()
        self.goal = int(torch.randint(2, (), generator=self.simulator.generator))
        here = torch.zeros_like(self.simulator.start)
        here[begins[self.goal]] = 1
        self.simulator._start = here.cumsum(-1)
        self.algorithm.batch = max(1, round(DRAWN / self.length[self.goal]))


def _judge(rooms: Any, algorithm: Descent[Any]) -> Callable[[Any], Tensor]:
    return lambda _: rooms.value(algorithm.x)


def agrees(row: dict[str, Any]) -> bool:
    """Within three standard errors of both means, or .015; published numbers have two digits."""
    key, name = (row["temperature"], row["kappa"]), row["method"].partition(",")[0]
    own = 0.0 if math.isnan(row["error"]) else row["error"]
    reach = 3 * math.hypot(own, ERRORS[key][name])
    return abs(row["mean"] - PUBLISHED[key][name]) <= max(CLOSE, reach) + 0.005  # two digits there


def table(report: dict[str, Any]) -> str:
    """Markdown: each published entry beside ours; what does not agree is marked."""
    ours = {"AMD": ("AMD", MEAN), "zero order": ("zero order",), "HPGD": (LEAN,)}
    titles = {"AMD": "ours", MEAN: "of both goals", "zero order": "ours", LEAN: "lean JAX"}
    head = ["λ", "κ"]
    for method in METHODS:
        head += [f"{method}, published", *(titles[own] for own in ours[method])]
    held = {(r["temperature"], r["kappa"], r["method"]): r for r in report["rows"]}
    lines = []
    for key in PUBLISHED:
        row = [f"{number:g}" for number in key]
        for method in METHODS:
            row.append(f"{PUBLISHED[key][method]:.2f} ± {ERRORS[key][method]:.3f}")
            found = [held.get((*key, own)) for own in ours[method]]
            row += [_cell(own) if own else "–" for own in found]
        lines.append(row)
    return markdown(head, lines)


def _cell(row: dict[str, Any]) -> str:
    error = "" if math.isnan(row["error"]) else f" ± {row['error']:.3f}"
    return f"{row['mean']:.3f}{error}" + ("" if agrees(row) else " *")


def work(options: argparse.Namespace) -> Iterator[tuple[str, float, float]]:
    for row in options.rows:
        for method in options.methods:
            yield (method, *map(float, row.split("/")))
    for row in options.lean:
        yield (LEAN, *map(float, row.split("/")))  # type: ignore[misc]
    for row in options.hpgd:
        yield ("HPGD", *map(float, row.split("/")))  # type: ignore[misc]


def main() -> None:
    torch.set_num_threads(1)
    rows = [f"{temperature:g}/{kappa:g}" for temperature, kappa in PUBLISHED]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", choices=rows, default=rows, metavar="λ/κ")
    exact = METHODS[:2]
    parser.add_argument(
        "--methods", nargs="*", choices=(*exact, MEAN), default=exact, help="of --rows"
    )
    parser.add_argument("--hpgd", nargs="*", choices=rows, default=[], metavar="λ/κ")
    parser.add_argument("--lean", nargs="*", choices=rows, default=[], metavar="λ/κ")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--hpgd-steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, …")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / f"hpgd_table_{today()}.json")
    options = parser.parse_args()
    words = [word for word in sys.argv[1:] if word not in ("--out", str(options.out))]
    command = shlex.join(["python", "benchmarks/hpgd_table.py", *words])
    report: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        **header(command, threads=1),
        "commands": [],
        "rows": [],
    }
    if options.out.exists():
        report = json.loads(options.out.read_text())
    report["commands"].append(command)
    plays: dict[str, Callable[..., dict[str, Any]]] = {
        "AMD": amd,
        MEAN: partial(amd, drawn=False),
        "zero order": zero_order,
        "HPGD": hpgd,
        LEAN: lean,
    }
    held = {(r["method"], r["temperature"], r["kappa"]) for r in report["rows"]}
    for method, temperature, kappa in work(options):
        if (method, temperature, kappa) in held:
            continue
        steps = options.hpgd_steps if method == "HPGD" else options.steps
        began = time.process_time()
        found = plays[method](temperature, kappa, steps, options.seeds)
        found |= {"method": method, "temperature": temperature, "kappa": kappa}
        found |= {"steps": steps, "seeds": options.seeds}
        found["processor_seconds"] = round(time.process_time() - began, 1)
        report["rows"].append(found)
        store(report, options.out)
        print(method, temperature, kappa, _cell(found), found["chosen"], flush=True)
    print(table(report))


if __name__ == "__main__":
    main()
