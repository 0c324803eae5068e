"""How often does what is promised not hold? Random problems, damaged files and killed runs.

    python benchmarks/reliability.py [--seeds 0:11000 | --problems FILE] [--changes 4000] --out FILE

Runs tests/properties/run.py, tests/test_damage.py and tests/test_kill.py, one after the other, and
keeps their figures; docs/reliability.md shows them. --problems takes the first, which are most of
the time, from an earlier report, with the date and the commit that they are of.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from birl_bench import machine
from birl_bench.report import store
from birl_bench.report import table as markdown

TESTS = Path(__file__).resolve().parents[1] / "tests"
COLUMNS = {
    "compiled, float32": "cpu f32",
    "compiled, float64": "cpu f64",
    "PyTorch, float32": "torch f32",
    "PyTorch, float64": "torch f64",
}
BOUNDS = {
    "value, to `error_bound`": ["value"],
    "value of each state, to `error_bounds`": ["value of a state"],
    "log policy, to `log_policy_error_bound`": ["log policy"],
    "policy, advantage and Q, to what follows from these": ["policy", "advantage", "q"],
    "`error_bound`, to the `tol` asked for": ["tol"],
    "`error_bound`, to a thousand roundings of the largest number": ["tightness"],
    "beside walls: errors, to ten times those of value iteration in NumPy": [
        "bar of value",
        "bar of policy",
    ],
    "first derivatives of policy, log policy, advantage": [
        f"order 1 of {name}" for name in ("policy", "log_policy", "advantage")
    ],
    "first derivatives of value and Q": ["order 1 of value", "order 1 of q"],
    "first derivatives of occupancy and evaluation": [
        "order 1 of occupancy",
        "order 1 of evaluate",
    ],
    "second derivatives of policy, log policy, advantage": [
        f"order 2 of {name}" for name in ("policy", "log_policy", "advantage")
    ],
    "second derivatives of value and Q": ["order 2 of value", "order 2 of q"],
    "second derivatives of occupancy and evaluation": [
        "order 2 of occupancy",
        "order 2 of evaluate",
    ],
}
SAME = {
    "compiled code: an element of a batch has the bits it has alone, gradients included": [
        "company cpu"
    ],
    "PyTorch: an element of a batch has its status and passes alone, its value in the bounds": [
        "company torch"
    ],
    "NaN and infinite cotangents behind a mask change no bit": ["masks cpu", "masks torch"],
    "the number of threads changes no bit": ["threads"],
    "`on_fail` changes no bit, and raises where a status says so": ["raising cpu", "raising torch"],
    "a status says how a solve ended": [f"status {where}" for where in COLUMNS.values()],
    "the backends certify one sweep alike, to 1 %": ["certificates"],
    "what is ill-conditioned is said to be so, and nothing else": [
        "conditions cpu",
        "conditions torch",
    ],
}


SOURCE = ("date", "machine", "versions", "commit")


def table(report: dict[str, Any]) -> str:
    """What docs/reliability.md shows."""
    found = report["properties"]
    promises, counts = found["promises"], found["counts"]

    def totals(kinds: list[str]) -> list[str]:
        some = [promises[kind] for kind in kinds if kind in promises]
        return [f"{sum(one[key] for one in some):,}" for key in ("tried", "failed")]

    bounds = []
    for words, names in BOUNDS.items():
        kinds = [f"{name} {where}" for name in names for where in COLUMNS.values()]
        cells = []
        for where in COLUMNS.values():
            worst = [promises[f"{n} {where}"]["worst"] for n in names if f"{n} {where}" in promises]
            cells.append(f"{max(worst):.2g}" if worst else "–")
        bounds.append([words, *totals(kinds), *cells])
    derivatives = [f"derivatives {where}" for where in COLUMNS.values()]
    shares = [
        sum(counts.get(f"{name}{why}", 0) for name in derivatives)
        for why in ("", ", by rounding", ", ill-conditioned")
    ]
    head = ["files", "changed", "refused", "read as written", "read as anything else"]
    keys = "changes", "refused", "equal", "different", "raw errors"
    damage = ([kind, *(f"{one[key]:,}" for key in keys)] for kind, one in report["damage"].items())
    kills = report["kills"]
    parts = [
        f"{found['seeds']:,} seeds, {counts['problems']:,} problems, on {found['date']}. "
        "Worst error over what is allowed:",
        markdown(["", "compared", "broken", *COLUMNS], bounds),
        markdown(
            ["", "compared", "broken"], ([words, *totals(kinds)] for words, kinds in SAME.items())
        ),
        f"Of {shares[0]:,} derivatives compared, {shares[1] / shares[0]:.0%} were judged by "
        f"rounding and {shares[2] / shares[0]:.1%} were of ill-conditioned problems.",
        f"Files and kills, on {report['date']}:",
        markdown([*head, "unnamed errors"], damage),
        f"{kills['kills']} kills of preference runs ({kills['start-up']} at the start, "
        f"{kills['step']} in a step, {kills['save']} in a save, {kills['half a checkpoint']} of "
        f"them with half a checkpoint written): {kills['runs']} runs, each ended with the bits of "
        "one that never was killed.",
    ]
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:11000")
    parser.add_argument("--problems", type=Path, metavar="FILE")
    parser.add_argument("--changes", type=int, default=4000)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()

    def figures(*command: str) -> Any:
        words = [sys.executable, str(TESTS / command[0]), *command[1:]]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    failed = 0
    if chosen.problems:
        old = json.loads(chosen.problems.read_text())
        properties = {**{key: old[key] for key in SOURCE}, **old["properties"]}
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "properties.json"
            script = str(TESTS / "properties" / "run.py")
            options = ["--seeds", chosen.seeds, "--out", str(file)]
            failed = subprocess.run([sys.executable, script, *options], check=False).returncode
            properties = json.loads(file.read_text())
        del properties["command"]  # names the temporary folder
    head = ["git", "-C", str(TESTS), "rev-parse", "HEAD"]
    report = {
        **machine.header(f"python benchmarks/reliability.py {' '.join(sys.argv[1:])}"),
        "commit": subprocess.check_output(head, text=True).strip(),
        "damage": figures("test_damage.py", "--changes", str(chosen.changes)),
        "kills": figures("test_kill.py"),
        "properties": properties,
    }
    store(report, chosen.out)
    print(table(report))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
