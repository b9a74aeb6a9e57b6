"""One line of a log, without what terminals, Ray, torchrun, Slurm and loggers put around it."""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 1 << 15
"""Bytes of a line that are looked at, around the message where it is longer."""

_IN_FRONT = 1 << 11

_ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|.)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
_REPEATED = re.compile(r"\[repeated (\d{1,6})x across cluster\]")
_PREFIXES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\((?:(?P<actor>[\w.:<>\[\]-]{0,80}) ?pid=(?P<pid>\d{1,10})|raylet)(?:, ip=(?P<ip>[^)\s]{1,64}))?\) ?",
        r"\[(?:rank|Rank |default)(?P<rank>\d{1,6})\]:? ?",
        r"(?P<rank>\d{1,6}): (?=\[|\s|File |torch)",
        r"[\w.-]{1,64}-\d{1,4}\s+\| ",
        r"\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[\d.,Z+:-]{0,16}(?: [A-Z]{1,4}\d{1,4}){0,4}\]? ?",
        r"(?:ERROR|INFO|WARNING|DEBUG|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[?[\w./]{1,80}:\d{1,6}\]? ?",
        r"\[?[EWIF]\d{3,4} [\d:.]{8,18} (?:\d+ )?[\w./-]{1,120}:\d{1,6}\] ?",
    )
)
_MOST_PREFIXES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLine:
    """What one process said."""

    number: int
    text: str
    process: str = ""
    """``WorkerDict pid=118847, ip=10.0.0.1`` or ``rank 3``, as far as the line tells; empty where it does not."""
    repeats: int = 1
    """How many processes said it: Ray shows one of them."""


def clean(raw: bytes, number: int, around: int = 0) -> LogLine:
    """Return the line ``raw``; of a long one only what stands around the offset ``around``."""
    if len(raw) > LONGEST:
        head, start = raw[:256], max(0, around - _IN_FRONT)
        raw = raw[start : start + LONGEST] if start < 256 else head + b" ... " + raw[start : start + LONGEST]
    text = _CONTROL.sub("", _ANSI.sub("", raw.decode("utf-8", errors="replace")))
    text, found = _stripped(text)
    repeated = _REPEATED.search(text)
    return LogLine(
        number=number,
        text=text.rstrip(),
        process=_process(found),
        repeats=max(1, int(repeated[1])) if repeated else 1,
    )


def _stripped(text: str) -> tuple[str, dict[str, str]]:
    """Return ``text`` without its prefixes, and what they say. Indentation behind the last prefix stays."""
    found: dict[str, str] = {}
    for _ in range(_MOST_PREFIXES):
        match = next((m for prefix in _PREFIXES if (m := prefix.match(text))), None)
        if match is None:
            break
        found |= {key: value for key, value in match.groupdict().items() if value}
        text = text[match.end() :]
    return text, found


def _process(found: dict[str, str]) -> str:
    if "pid" in found:
        host = f", ip={found['ip']}" if "ip" in found else ""
        return f"{found.get('actor', '')} pid={found['pid']}{host}".strip()
    return f"rank {found['rank']}" if "rank" in found else ""
