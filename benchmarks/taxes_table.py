"""How much welfare do taxes found by the exact hyper-gradient bring, and how fast?

    python benchmarks/taxes_table.py [--seeds 3] [--steps 100] [--out FILE]

Three temperatures λ; from taxes of .3. The gradient costs one solve and one adjoint solve per outer
step, zero order two solves: both are shown after equal numbers of steps, each at the best of three
learning rates for that number. The welfare is exact in the discretised model. Beside that: three
random starts, finer and coarser grids at the taxes found, and the gradient at the start where the
transitions are taken as given.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from birl_bench import machine
from birl_bench.report import store
from birl_bench.report import table as markdown
from torch import Tensor

from birl_ext.bilevel import MSoBiRL
from birl_ext.problems.taxes import TaxEconomy, TaxesConfig, TaxesJob

TEMPERATURES = (0.1, 0.2, 0.3)
RATES = (0.03, 0.1, 0.3)
EARLY = 20
GRIDS = (50, 100, 200)


class Given(TaxEconomy):
    """The economy as one sees it who forgets that taxes move the assets."""

    def transition(self, x: Tensor) -> Tensor:
        return super().transition(x.detach())


def run(config: TaxesConfig) -> dict[str, Any]:
    """Welfare on the way and at the end."""
    began = time.process_time()
    job = TaxesJob(config)
    history = []
    while not job.done:
        history.append(job.step()["objective"])
    seconds = time.process_time() - began
    summary = job.summary()
    return {
        "temperature": config.temperature,
        "method": config.method,
        "rate": config.learning_rate,
        "seed": config.seed,
        "start": history[0],
        "early": history[EARLY],
        "end": summary["objective"],
        "error_bound": summary["error_bound"],
        "contexts": summary["welfare"].tolist(),
        "taxes": list(summary["taxes"].values()),
        "processor_seconds": round(seconds, 2),
        "history": [round(value, 5) for value in history],
    }


def from_random_starts(temperature: float, count: int, steps: int) -> list[float]:
    """Welfare after as many steps from logits ~ N(0, 2²)."""
    economy = TaxEconomy(temperature, TaxesConfig.cells)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        algorithm = MSoBiRL(
            economy.problem(),
            2 * torch.randn(4, generator=generator, dtype=torch.float64),
            temperature=temperature,
            optimiser=lambda parameters: torch.optim.Adam(parameters, lr=RATES[-1]),
            mode="exact",
        )
        for _ in range(steps):
            algorithm.step()
        found.append(-float(economy.problem().objective(algorithm.x.detach(), temperature)))
    return found


def at_the_start(temperature: float) -> dict[str, list[float]]:
    """The hyper-gradient in the logits of the four taxes, whole and with P taken as given."""
    found = {}
    for name, kind in (("whole", TaxEconomy), ("transitions given", Given)):
        economy = kind(temperature, TaxesConfig.cells)
        w = economy.logits(torch.full((4,), 0.3, dtype=torch.float64)).requires_grad_()
        (gradient,) = torch.autograd.grad(-economy.problem().objective(w, temperature), w)
        found[name] = gradient.tolist()
    return found


def best(rows: list[dict[str, Any]], method: str, when: str = "end") -> list[dict[str, Any]]:
    """The runs of a method at the rate whose mean is highest then."""
    own = [row for row in rows if row["method"] == method]
    at = {rate: [row for row in own if row["rate"] == rate] for rate in RATES}
    return max(at.values(), key=lambda some: fmean(row[when] for row in some))


def table(report: dict[str, Any]) -> str:
    """Markdown, one row per temperature."""
    steps = report["steps"]
    head = ["λ", "all taxes 0.3"]
    for method in ("gradient", "zero order"):
        head += [f"{method}, {count} steps" for count in (EARLY, steps)]
    lines = []
    for temperature in TEMPERATURES:
        rows = [row for row in report["rows"] if row["temperature"] == temperature]
        (gradient,) = best(rows, "gradient")
        cells = [f"{temperature:g}", f"{gradient['start']:.2f}"]
        (early,) = best(rows, "gradient", "early")
        cells += [f"{early['early']:.2f}", f"**{gradient['end']:.2f}**"]
        for when in ("early", "end"):
            values = [row[when] for row in best(rows, "zero-order", when)]
            cells.append(f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        income, *goods = (f"{tax:.2f}" for tax in gradient["taxes"])
        lines.append([*cells, income, ", ".join(goods)])
    return markdown([*head, "income tax", "taxes on the goods"], lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of zero order")
    parser.add_argument("--steps", type=int, default=100)
    results = Path(__file__).parent / "results"
    default = results / f"taxes_{machine.today()}.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    if options.steps <= EARLY:
        parser.error(f"--steps is {options.steps}; the table shows step {EARLY}")
    torch.set_num_threads(1)
    began = time.perf_counter()
    report: dict[str, Any] = {
        **machine.header(
            f"python benchmarks/taxes_table.py --seeds {options.seeds} --steps {options.steps}",
        ),
        "steps": options.steps,
        "rows": [],
        "random_starts": {},
        "grids": {},
        "gradient_at_the_start": {},
    }
    for temperature in TEMPERATURES:
        for rate in RATES:
            configs = [TaxesConfig(temperature, "gradient", options.steps, rate)]
            configs += [
                TaxesConfig(temperature, "zero-order", options.steps, rate, seed=seed)
                for seed in range(options.seeds)
            ]
            for config in configs:
                row = run(config)
                report["rows"].append(row)
                print(
                    f"λ {temperature:g}  {config.method:10}  rate {rate:g}  seed {config.seed}  "
                    f"welfare {row['start']:.3f}, {row['early']:.3f}, {row['end']:.3f}  "
                    f"{row['processor_seconds']:.1f} s",
                    flush=True,
                )
        (gradient,) = best(
            [row for row in report["rows"] if row["temperature"] == temperature], "gradient"
        )
        w = TaxEconomy.logits(torch.tensor(gradient["taxes"], dtype=torch.float64))
        report["grids"][temperature] = {
            cells: -float(TaxEconomy(temperature, cells).problem().objective(w, temperature))
            for cells in GRIDS
        }
        report["random_starts"][temperature] = from_random_starts(
            temperature, options.seeds, options.steps
        )
        report["gradient_at_the_start"][temperature] = at_the_start(temperature)
        for name in ("grids", "random_starts", "gradient_at_the_start"):
            print(f"λ {temperature:g}  {name}: {report[name][temperature]}", flush=True)
    report["seconds"] = round(time.perf_counter() - began, 1)
    store(report, options.out)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
