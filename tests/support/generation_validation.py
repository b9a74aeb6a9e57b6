"""How far the formulas for generate are from the traces: a table in docs/generation.md (support.validate writes it)."""

from __future__ import annotations

import json
import statistics
from typing import Any

from hydra_plugins.memfit.memory.generation import peak
from support.generation_specs import DATA, ELEMENT_BYTES, call, spec


def traces() -> list[dict[str, Any]]:
    """Return the stored rows."""
    rows: list[dict[str, Any]] = json.loads((DATA / "generation_traces.json").read_text())
    return rows


def error(row: dict[str, Any], *, without_weights: bool) -> float:
    """Return predicted / traced - 1 of the peak, with or without the weights on both sides."""
    parameters = row["weights_bytes"] // ELEMENT_BYTES[row["case"]["dtype"]]
    predicted = peak(spec(row["case"]["model"], parameters), call(row["case"])).total_bytes
    weights = row["weights_bytes"] if without_weights else 0
    return float((predicted - weights) / (row["peak_bytes"] - weights) - 1)


def table() -> str:
    """Return the table of docs/generation.md."""
    lines = ["| rows | of what | cases | median | worst below | worst above |", "|---|---|---|---|---|---|"]
    for split in ("fit", "held_out"):
        for without_weights, name in ((False, "whole peak"), (True, "peak less weights")):
            errors = [error(row, without_weights=without_weights) for row in traces() if row["split"] == split]
            median = statistics.median(map(abs, errors))
            lines.append(
                f"| {split} | {name} | {len(errors)} | {median:.2%} | {-min(0.0, *errors):.2%} | {max(0.0, *errors):.2%} |"
            )
    return "\n".join(lines) + "\n"
