"""A run as JSON, as a Markdown page, and as lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from birl_bench import machine
from birl_ext.files import replacing

__all__ = ["digits", "lines", "markdown", "store", "table", "verdicts", "write"]


def store(report: Mapping[str, Any], path: Path) -> None:
    """The report as JSON, whole or not at all."""
    _write(json.dumps(report, indent=1, ensure_ascii=False) + "\n", path)


def write(report: Mapping[str, Any], path: Path) -> None:
    """The report as JSON and, beside it, as Markdown; each whole or not at all."""
    store(report, path)
    _write(markdown(report), path.with_suffix(".md"))


def _write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_text(text)


def lines(case: Mapping[str, Any]) -> Iterator[str]:
    """A case for the terminal: who took how long, and by how much that differs from ours."""
    yield f"{case['case']}: {case['question']}"
    width = max((len(row["candidate"]) for row in case["rows"]), default=0)
    for row in case["rows"]:
        yield f"  {row['candidate']:<{width}}  {_brief(case, row)}"


def _brief(case: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if row["status"] != "timed":
        return f"{row['status']}: {row.get('reason', '')}"
    if "columns" in case:
        pairs = list(case["columns"].items())[1:]
        cells = [(heading, _cell(row.get(key, ""))) for heading, key in pairs]
        return "; ".join(f"{heading} {text}" for heading, text in cells if text)
    times = row.get("times_ours")
    parts = [
        f"{digits(row['cold']['median']):>7} ms",
        "" if times is None else f"{digits(times):>7} × ours",
        f"{row['share_of_read']:.0%} of read" if row.get("share_of_read") else "",
        "extrapolated" if row.get("extrapolated") else "",
    ]
    return "  ".join(filter(None, parts))


def verdicts(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line per claim: met, not met, or not measured."""
    for one in found:
        measured = "" if one["measured"] is None else f"{digits(one['measured'])}, "
        detail = f" ({one['detail']})" if one["detail"] else ""
        yield (
            f"{one['verdict']:<12} {one['case']}: {one['claim']}: {measured}"
            f"wanted {one['wanted']}{detail}"
        )


def markdown(report: Mapping[str, Any]) -> str:
    """Claims first, then every case as a table; who is missing or wrong is in it."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"# Benchmarks on {'a CPU' if report['device'] == 'cpu' else report['device']}, "
        f"{report['date']}\n",
    ]
    if report["quick"]:
        parts.append("**A trial on toy sizes: its times mean nothing.**\n")
    if warning := machine.busy(report["load_average"]):
        parts.append(f"**{warning}**\n")
    if report.get("interrupted"):
        parts.append("**Interrupted: the cases below are those that were finished.**\n")
    parts += [
        f"{report['machine']}; {report['threads']} threads; load average "
        f"{report['load_average']} at the start. {versions}.\n",
        f"Made by `{report['command']}`. Medians with cold caches; quartiles in brackets. "
        "† is a rate times a count.\n",
        _ceilings(report["ceilings"]) if "ceilings" in report else "",
        _claims(report["requirements"]) if report.get("requirements") else "",
    ]
    for case in report["cases"]:
        parts.append(f"## {case['case']}\n\n{case['question']}\n")
        parts.append(_facts(case))
        parts.append(_special(case) if "columns" in case else _standard(case))
    return "\n".join(filter(None, parts))


def _ceilings(ceilings: Mapping[str, Mapping[str, float]]) -> str:
    rates = ", ".join(
        f"{level} {rate:.0f} GB/s" for level, rate in ceilings["gigabytes_per_second"].items()
    )
    peaks = ", ".join(
        f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in ceilings["gigaflops"].items()
    )
    return f"Measured ceilings: {rates}; {peaks} (matrix product).\n"


def _claims(found: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in found:
        verdict = one["verdict"] if one["verdict"] == "met" else f"**{one['verdict']}**"
        cells = one["case"], one["claim"], one["wanted"], digits(one["measured"]), verdict
        rows.append((*cells, one["detail"]))
    return f"## Requirements\n\n{table(('case', 'claim', 'wanted', 'measured', '', ''), rows)}\n"


def _facts(case: Mapping[str, Any]) -> str:
    shape = " × ".join(map(str, case["shape"]))
    facts = [
        f"{shape} {case['dtype']}, γ = {case['discount']:g}, τ = {case['temperature']:g}",
        case["accuracy"],
        f"{case['threads']} threads" if case["threads"] > 1 else "1 thread",
    ]
    if bandwidth := case.get("read_gigabytes_per_second"):
        facts.append(
            f"a pass is {case['bytes_of_pass'] / 1e6:.3g} MB and "
            f"{case['operations_of_pass'] / 1e6:.3g} million operations; this machine read "
            f"{bandwidth['memory']:.0f} GB/s from memory and "
            f"{bandwidth['this size again']:.0f} GB/s from a buffer of that size again and again, "
            f"so one cold pass takes at least {digits(case['floor_milliseconds'])} ms"
        )
    if gaps := case.get("disagreement"):
        worst = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
        facts.append(f"largest relative disagreement among the timed: {worst}")
    return "; ".join(facts) + ".\n"


def _standard(case: Mapping[str, Any]) -> str:
    rows = case["rows"]
    errors = list(dict.fromkeys(name for row in rows for name in row.get("errors", {})))
    queued = any("queued" in row for row in rows)
    columns = [
        *("candidate", "ms, cold", "ms, warm"),
        *(["ms, queued"] if queued else []),
        *("× ours", "passes", "GB/s of P", "of read"),
        *(f"error of {name}" for name in errors),
    ]
    found = []
    for row in rows:
        name = row["candidate"] + (" (hard max)" if row["solves"] == "hard" else "")
        if row["status"] != "timed":
            reason = f"{row['status']}: {row['reason']}"
            found.append([name, reason, *[""] * (len(columns) - 2)])
            continue
        cold = row["cold"]
        mark = "†" if row.get("extrapolated") else ""
        cells = [
            name,
            f"{digits(cold['median'])}{mark} ({digits(cold['low'])} to {digits(cold['high'])})",
            digits((row["warm"] or {}).get("median")),
            *([digits((row.get("queued") or {}).get("median"))] if queued else []),
            digits(row["times_ours"]),
            digits(row["passes"]),
            digits(row.get("gigabytes_per_second")),
            f"{row['share_of_read']:.0%}" if "share_of_read" in row else "",
            *(f"{row['errors'][e]:.1e}" if e in row["errors"] else "" for e in errors),
        ]
        found.append(cells)
    return table(columns, found) + "\n"


def _special(case: Mapping[str, Any]) -> str:
    """A case that brings its own columns: heading → key of the row."""
    keys = case["columns"].values()
    rows = ([_cell(row.get(key, "")) for key in keys] for row in case["rows"])
    return table(case["columns"], rows) + "\n"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else digits(value)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    names, *cells = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([names, "|" + "---|" * len([*head]), *cells])


def digits(number: float | None) -> str:
    """Three significant digits, or all before the point."""
    if number is None:
        return ""
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
