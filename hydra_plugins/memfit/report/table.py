"""Several plans of one launch side by side: for a terminal, as CSV, as Markdown, as plain values."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.report import words
from hydra_plugins.memfit.report.overrides import overrides

WIDTH = 100
"""Columns of a table that no terminal reads."""
_FIELDS = ("hardware", "nodes", "gpus", "fits", "binding_phase", "peak_bytes", "budget_bytes", "overrides", "reason")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One combination of the table."""

    hardware: str
    gpus: int
    """Of one node."""
    nodes: int
    fits: bool = False
    binding_phase: str = ""
    peak_bytes: int = 0
    """Of the binding phase on the worst GPU."""
    budget_bytes: int = 0
    overrides: tuple[str, ...] = ()
    """What memfit changes, ready for a shell."""
    reason: str = ""
    """Why it does not fit, or why it cannot be judged."""
    error: MemfitError | None = None
    """Why it cannot be judged."""

    @classmethod
    def of(cls, plan: Plan, *, absent: frozenset[str] = frozenset()) -> Row:
        """Return the row of a plan; one that does not fit has no overrides: they would not help."""
        phase, problem = plan.binding_phase, plan.problem
        return cls(
            hardware=problem.hardware.name,
            gpus=problem.gpus_per_node,
            nodes=problem.nodes,
            fits=plan.fits,
            binding_phase=phase.name,
            peak_bytes=phase.whole_bytes,
            budget_bytes=phase.budget_bytes,
            overrides=tuple(overrides(plan.changes, absent=absent)) if plan.fits else (),
            reason="" if plan.fits else words.obstacle(plan.estimate),
        )


def as_dict(row: Row) -> dict[str, Any]:
    """Return the row as plain values; sizes are bytes of one GPU."""
    return {name: list(value) if isinstance(value := getattr(row, name), tuple) else value for name in _FIELDS}


def as_csv(rows: Sequence[Row]) -> str:
    """Return a head and a line for each row; overrides are separated by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_FIELDS)
    for row in rows:
        writer.writerow(" ".join(v) if isinstance(v, list) else v for v in as_dict(row).values())
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """Return a table of Markdown."""
    lines = ["| accelerators | fits | tightest | GiB of budget | values, or why not |", "|---|---|---|---|---|"]
    short = _short_names(rows)
    for row in rows:
        cells = (_devices(row), _verdict(row), row.binding_phase, _sizes(row), _said(row, short, mark="`"))
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A cell of Markdown is one line, and a bar ends it."""
    return " ".join(text.split()).replace("|", "\\|")


def as_text(rows: Sequence[Row]) -> str:
    """Return a table for people; the full keys stand below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    short = _short_names(rows)
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for head in ("accelerators", "fits", "tightest", "GiB of budget", "values, or why not"):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(_devices(row), _verdict(row), row.binding_phase, _sizes(row), _said(row, short))
    out = io.StringIO()
    Console(file=out, width=WIDTH, highlight=False, markup=False).print(table)
    body = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip() + "\n"
    keys = "".join(f"  {name} = {key}\n" for key, name in short.items() if key != name)
    return f"{body}\n{keys}" if keys else body


FORMATS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "terminal": as_text,
    "csv": as_csv,
    "markdown": as_markdown,
}


def _devices(row: Row) -> str:
    nodes = f"{row.nodes} x " if row.nodes > 1 else ""
    return f"{nodes}{row.gpus} x {row.hardware}" if row.gpus else row.hardware


def _verdict(row: Row) -> str:
    return "yes" if row.fits else "?" if row.error else "no"


def _sizes(row: Row) -> str:
    return "" if row.error else f"{gib(row.peak_bytes).split()[0]} of {gib(row.budget_bytes).split()[0]}"


def _said(row: Row, short: Mapping[str, str], mark: str = "") -> str:
    if row.reason:
        return row.reason
    shown = []
    for text in row.overrides:
        key, sign, value = text.partition("=")
        shown.append(f"{mark}{short.get(key, key)}{sign}{value}{mark}")
    return ", ".join(shown) or "as requested"


def _short_names(rows: Sequence[Row]) -> dict[str, str]:
    """Return the shortest ending of each key that no other key of the table has."""
    keys = dict.fromkeys(text.partition("=")[0] for row in rows for text in row.overrides)
    return {key: _shortest(key, [other for other in keys if other != key]) for key in keys}


def _shortest(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    endings = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next((end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others)), key)
