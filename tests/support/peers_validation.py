"""Published estimators beside memfit on the same traced steps: the page docs/validation/peers.md (support.validate writes it).

The answers are tests/data/peers.json; `support.peers` asks for them.
"""

from __future__ import annotations

import statistics
from typing import Any

from support import peers

_HEAD = """# memfit and its peers

Written by `python -m support.validate --write` from `tests/data/peers.json`; `python -m support.peers`, in the environment of
`tests/tiers.sh peers`, asks the estimators again. Truth is the op-level trace of verl's own update and optimizer step
([tracer.md](tracer.md)): the higher of the two peaks of one rank, allocated bytes. Each estimator is asked for a full
fine-tuning step with FSDP2 (ZeRO-3), Adam, fp32 states and bf16 compute, as far as it can be told. 2 shared cores, no GPU,
2026-11-21. An error is estimate over trace, minus one.

The race is on memfit's ground: its formulas were checked on these traces, and the others were built for other programs (a
whole model on one device, fp16 states, tensor parallelism, the loss of a language model). The table says how far each is
from this step, not how good it is.

"""


def page() -> str:
    """Return the page: the estimators and their errors, then one row a case."""
    return _HEAD + "\n".join([*_summary(), "", *_cases()]) + "\n"


def stale() -> list[str]:
    """Return the steps for which memfit's stored answer is not today's."""
    rows = [row for row in peers.stored() if row["peer"] == "memfit"]
    return [_named(row["case"]) for row in rows if row["bytes"] != peers.memfit_estimate(row["case"])]


def _errors(name: str) -> list[float]:
    answers = [row for row in peers.stored() if row["peer"] == name and "bytes" in row]
    return [row["bytes"] / peers.traced_bytes(peers.trace_of(row["case"])) - 1 for row in answers]


def _summary() -> list[str]:
    lines = ["| estimator | steps | median error | worst | time | leaves out |", "|---|---|---|---|---|---|"]
    for peer in peers.PEERS:
        rows = [row for row in peers.stored() if row["peer"] == peer.name]
        errors = _errors(peer.name)
        median, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
        took = _duration(statistics.median(row["seconds"] for row in rows if "bytes" in row))
        label = f"[{peer.name}]({peer.source}) {rows[0]['version']}".strip()
        lines.append(f"| {label} | {len(errors)} | {median:.1%} | {worst:+.1%} | {took} | {peer.leaves_out} |")
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _cases() -> list[str]:
    answers = {(row["peer"], _named(row["case"])): row for row in peers.stored()}
    names = [peer.name for peer in peers.PEERS]
    lines = [f"| step | trace | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for wanted in peers.TRACED:
        truth = peers.traced_bytes(peers.trace_of(wanted))
        cells = [_cell(answers[name, _named(wanted)], truth) for name in names]
        lines.append(f"| {_named(wanted)} | {truth / 2**30:.2f} GiB | {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, Any], truth: int) -> str:
    return f"{row['bytes'] / 2**30:.2f} GiB, {row['bytes'] / truth - 1:+.1%}" if "bytes" in row else str(row["error"])


def _named(wanted: dict[str, Any]) -> str:
    kept = "" if wanted["checkpointing"] else ", no checkpointing"
    return f"{wanted['model']} x{wanted['ranks']}, {wanted['tokens']} tokens{kept}"
