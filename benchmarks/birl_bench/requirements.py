"""What birl_ext claims about its speed and accuracy, as data; each run judges it.

A ratio is rival's time / our time, medians with cold caches from the same run. Where several rivals
are named, the fastest that was measured counts. What could not be measured is neither met nor not
met.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["REQUIREMENTS", "Requirement", "judge"]

Device = Literal["cpu", "cuda", "any"]


@dataclass(frozen=True)
class Requirement:
    """One claim.

    Attributes:
        case: name of a measured case.
        rivals: keys of rows; none: the claim is about a number of our own row.
        number: key of that number, dotted for a nested one.
        at_least, at_most: what is claimed; one of them.
        unit: of the number, for the report; "×" for a ratio.
        row: key of our row.
    """

    case: str
    text: str
    rivals: tuple[str, ...] = ()
    number: str = ""
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"
    device: Device = "cpu"
    row: str = "ours"


def _faster(
    case: str, than: str, rivals: str | tuple[str, ...], times: float, device: Device = "cpu"
) -> Requirement:
    keys = (rivals,) if isinstance(rivals, str) else rivals
    return Requirement(case, f"faster than {than}", keys, at_least=times, device=device)


def _overhead(most: float, device: Device) -> Requirement:
    return Requirement(
        "tiny call",
        "what a differentiable call adds to its kernel",
        number="over_the_arithmetic",
        at_most=most,
        unit="µs",
        device=device,
    )


SOFT = ("eager", "newton", "jax", "optimistix", "jaxopt")
"""Existing ways to solve a soft MDP: not the expert's loop, and not value iteration compiled."""
IMPLICIT = ("unrolled", "eager", "newton", "optimistix", "jaxopt")

REQUIREMENTS: tuple[Requirement, ...] = (
    # 256 × 32 × 8; of batches, about two thirds of what was measured in November 2026
    _faster("small batch, forward", "the expert's compiled loop", "expert", 1),
    _faster("small batch, forward", "compiled value iteration", "compiled", 12),
    _faster("small batch, forward", "the best existing soft solver", SOFT, 3.5),
    _faster("small batch, gradient", "optimistix' Newton and its adjoint", "optimistix", 3),
    # 4096 × 16 × 4
    _faster("micro batch, forward", "the expert's compiled loop", "expert", 2),
    _faster("micro batch, forward", "compiled value iteration", "compiled", 20),
    _faster("micro batch, gradient", "the best existing way", IMPLICIT, 3),
    # 1 × 1000 × 10: a tie by physics
    *(
        requirement
        for dtype in ("float32", "float64")
        for requirement in (
            _faster(f"dense mid, {dtype}, forward", "the expert's compiled loop", "expert", 1),
            Requirement(
                f"dense mid, {dtype}, forward",
                "reads P as fast as this machine reads memory",
                number="share_of_read",
                at_least=0.7,
                unit="of its rate",
            ),
        )
    ),
    # two clusters
    *(
        requirement
        for discount in ("0.99", "0.9999")
        for requirement in (
            _faster(f"dense slow, γ = {discount}", "Newton with a library's solve", "newton", 4),
            Requirement(
                f"dense slow, γ = {discount}",
                "time to a certified solution",
                number="cold.median",
                at_most=16,
                unit="ms",
            ),
        )
    ),
    # sweeps alone
    _faster("kernel only, small", "torch.compile at equal sweeps", "compiled", 2.5),
    _faster("kernel only, micro", "torch.compile at equal sweeps", "compiled", 2),
    _faster("kernel only, dense", "torch.compile at equal sweeps", "compiled", 1),
    # accuracy
    *(
        Requirement(
            "float32 truth",
            text + by,
            number=number,
            at_most=most,
            unit=unit,
            device="any",
            row=row,
        )
        for row, by in (("ours", ""), ("ours newton", ", Newton's method"))
        for text, number, most, unit in (
            ("error of the policy", "policy_error", 1e-4, "absolute"),
            ("error of the gradient", "grad_error", 1e-5, "relative"),
            ("bounds below the error they bound", "dishonest", 0, "MDPs"),
            ("passes over P", "passes", 10, "passes"),
        )
        if row != "ours" or number != "passes"  # there passes are cheap
    ),
    # overhead
    _overhead(25, "cpu"),
    _overhead(40, "cuda"),
    # a GPU
    _faster("small batch, forward", "eager value iteration", "eager", 400, "cuda"),
    _faster("small batch, forward", "a graph of sweeps", ("graph", "compiled graph"), 60, "cuda"),
    _faster(
        "small batch, forward",
        "the expert's graph",
        ("graph expert", "compiled graph expert"),
        5,
        "cuda",
    ),
    _faster("small batch, forward", "Newton with a library's solve", "newton", 30, "cuda"),
    _faster(
        "micro batch, forward",
        "the expert's graph",
        ("graph expert", "compiled graph expert"),
        15,
        "cuda",
    ),
    _faster(
        "micro batch of 1e5, forward",
        "the expert's graph",
        ("graph expert", "compiled graph expert"),
        20,
        "cuda",
    ),
    _faster(
        "dense mid, float32, forward",
        "the expert's graph",
        ("graph expert", "compiled graph expert"),
        1,
        "cuda",
    ),
    _faster(
        "dense big", "the expert's graph", ("graph expert", "compiled graph expert"), 1.1, "cuda"
    ),
    _faster("dense big", "Newton with a library's solve", "newton", 12, "cuda"),
)


def judge(cases: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Each claim about a case that was run, with what was measured and whether it is met."""
    rows = {(case["case"], row["key"]): row for case in cases for row in case["rows"]}
    measured = {case["case"] for case in cases}
    return [
        dict(_verdict(requirement, rows))
        for requirement in REQUIREMENTS
        if requirement.case in measured and requirement.device in (device, "any")
    ]


def _verdict(
    requirement: Requirement, rows: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Iterator[tuple[str, Any]]:
    yield "case", requirement.case
    yield "claim", requirement.text
    lower = requirement.at_least is not None
    wanted = requirement.at_least if lower else requirement.at_most
    yield "wanted", f"{'≥' if lower else '≤'} {wanted:g} {requirement.unit}"
    ours = rows.get((requirement.case, requirement.row), {})
    if ours.get("status") != "timed":
        yield from _open(f"no time of ours: {ours.get('reason', 'not run')}")
        return
    found, detail = _number(ours, requirement.number), ""
    if requirement.rivals:
        found, detail = _fastest(requirement, rows)
    if found is None:
        yield from _open(detail or f"{requirement.number} was not measured")
        return
    met = found >= wanted if lower else found <= wanted  # type: ignore[operator]
    yield "measured", found
    yield "verdict", "met" if met else "not met"
    yield "detail", detail


def _open(reason: str) -> Iterator[tuple[str, Any]]:
    yield "measured", None
    yield "verdict", "not measured"
    yield "detail", reason


def _number(row: Mapping[str, Any], path: str) -> float | None:
    found: Any = row
    for key in filter(None, path.split(".")):
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, (int, float)) else None


def _fastest(
    requirement: Requirement, rows: Mapping[tuple[str, str], Mapping[str, Any]]
) -> tuple[float | None, str]:
    """times_ours of the fastest rival that was timed, and who is missing."""
    times, absent = {}, []
    for key in requirement.rivals:
        row = rows.get((requirement.case, key), {"status": "missing", "reason": "no such row"})
        if row["status"] == "timed" and row.get("times_ours") is not None:
            times[row["candidate"]] = float(row["times_ours"])
        else:
            absent.append(f"{row.get('candidate', key)}: {row.get('reason', 'no time of ours')}")
    if not times:
        return None, "; ".join(absent)
    best = min(times, key=times.__getitem__)
    without = f", without {len(absent)} not measured" if absent else ""
    return times[best], f"{best}{without}" if len(requirement.rivals) > 1 else ""
