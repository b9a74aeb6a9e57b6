"""The Markdown summary of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Result = dict[str, Any]
GIB = 1 << 30


def summary(machine: dict[str, Any], results: list[Result]) -> str:
    """Return the page of one machine."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    lines = [
        f"# Measured on {machine['device']}, {machine['date']}",
        "",
        f"`PYTHONPATH=tests:. python -m measure`; {versions}. GiB at the peak of each phase; weights are random.",
        "",
        *_context(results),
        "| case | phase | predicted | allocated | error | reserved | reserved / allocated |",
        "|---|---|---|---|---|---|---|",
        *(
            line
            for result in results
            if "phases" in result and not result.get("limit_bytes")
            for line in _phases(result)
        ),
        "",
        "Steps of varied lengths below a limit, in multiples of what their tensors take:",
        "",
        "| case | lengths | expandable segments | smallest limit that survived |",
        "|---|---|---|---|",
        *_limits(results),
    ]
    failed = [f"- {_name(r)}: `{r['error']}`" for r in results if "error" in r]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def _name(result: Result) -> str:
    return " ".join([result["kind"], *(f"{key}={value}" for key, value in result["options"].items())])


def _context(results: list[Result]) -> Iterator[str]:
    for result in results:
        if result.get("outside_bytes"):
            yield from ["| outside torch's allocator after | MiB |", "|---|---|"]
            yield from (f"| {what} | {num >> 20} |" for what, num in result["outside_bytes"].items())
            yield ""


def _phases(result: Result) -> Iterator[str]:
    for phase, found in result["phases"].items():
        predicted = result.get("predicted", {}).get(phase)
        error = f"{100 * (predicted / found['allocated'] - 1):+.2f} %" if predicted else ""
        first = f"{predicted / GIB:.3f}" if predicted else ""
        ratio = found["reserved"] / found["allocated"] if found["allocated"] else 0
        numbers = f"{found['allocated'] / GIB:.3f} | {error} | {found['reserved'] / GIB:.3f} | {ratio:.3f}"
        yield f"| {_name(result)} | {phase} | {first} | {numbers} |"


def _limits(results: list[Result]) -> Iterator[str]:
    tried: dict[tuple[str, str, bool], list[float]] = {}
    for result in results:
        if result.get("limit_bytes"):
            key = _name(result), result["lengths"], result["expandable"]
            tried.setdefault(key, []).extend([result["multiple"]] if result.get("survived") else [])
    for (name, lengths, expandable), survived in tried.items():
        smallest = f"{min(survived):.2f}" if survived else "none of them"
        yield f"| {name} | {lengths} | {'yes' if expandable else 'no'} | {smallest} |"
