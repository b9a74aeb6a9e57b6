"""Reads what XLA:TPU writes down about memory: its buffer assignment, and its refusal when a program does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*)")
_END = "Total bytes used:"
_QUANTITY = re.compile(r"([\d.]+)([BKMG])")
_UNIT = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_REFUSAL = {
    "used_bytes": re.compile(r"Used ([\d.]+[BKMG]) of"),
    "capacity_bytes": re.compile(r"of ([\d.]+[BKMG]) hbm"),
    "excess_bytes": re.compile(r"capacity by ([\d.]+[BKMG])"),
    "argument_bytes": re.compile(r"arguments\s+([\d.]+[BKMG])"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """HBM of one device in one buffer assignment, in bytes."""

    argument_bytes: int = 0
    """Parameters of the program: the training state (donated: outputs live in the same bytes) and the batch."""
    temp_bytes: int = 0
    other_bytes: int = 0
    """Outputs that alias no argument, and constants."""

    @property
    def used_bytes(self) -> int:
        """Everything together: what the compiler holds against its limit, short of small code overlays."""
        return self.argument_bytes + self.temp_bytes + self.other_bytes


def read(lines: Iterable[str]) -> Assignment | None:
    """Sum the allocations of a ``*-buffer-assignment.txt`` dump; colours are memories other than HBM and do not count.

    Returns ``None`` for a dump that is still being written: the line with the sum follows the last allocation.
    """
    total = {"argument_bytes": 0, "temp_bytes": 0, "other_bytes": 0}
    for line in lines:
        if line.startswith(_END):
            return Assignment(**total)
        found = _ALLOCATION.match(line)
        if found and "thread-local" not in line and "color" not in line:
            total[_holder(found.group(2))] += int(found.group(1))
    return None


def _holder(description: str) -> str:
    if description.startswith("parameter"):
        return "argument_bytes"
    return "temp_bytes" if "preallocated-temp" in description else "other_bytes"


def refusal(message: str) -> dict[str, int] | None:
    """Return the numbers of an out-of-memory message, or ``None`` when the message is another error."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message:
        return None
    found = {name: pattern.search(message) for name, pattern in _REFUSAL.items()}
    return {name: _bytes(match.group(1)) for name, match in found.items() if match}


def _bytes(text: str) -> int:
    match = _QUANTITY.match(text)
    assert match is not None  # the patterns above only capture this form
    return int(float(match.group(1)) * _UNIT[match.group(2)])
