"""Sizes as programs print them: bytes, and how far the rounding of the text may be off."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil

SIZE = r"\d[\d,]{0,20}(?:\.\d{1,6})?\s?(?:bytes|[kKMGT]i?B|[KMGT]|B)\b"
"""Pattern of a size with its unit. All units are binary: torch's MiB, vLLM's GiB, XLA's G and Ray's GB alike."""

_PARTS = re.compile(r"(\d[\d,]*)(?:\.(\d+))?\s?(bytes|[kKMGT]i?B|[KMGT]|B)")
_POWERS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """A number of bytes that was read in a text."""

    num_bytes: int
    slack_bytes: int = 0
    """Half a unit of the last printed digit: the true value is at most this far away."""


def parse_amount(text: str) -> Amount:
    """Return the size in ``text``; raises `ValueError` where there is none.

    >>> parse_amount("1.50 KiB")
    Amount(num_bytes=1536, slack_bytes=6)
    """
    match = _PARTS.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size")
    whole, decimals, unit = match[1].replace(",", ""), match[2] or "", match[3]
    scale = 1024 ** _POWERS[unit[0].lower()]
    digits = 10 ** len(decimals)
    slack = 0 if scale == 1 else ceil(scale / (2 * digits))
    return Amount(num_bytes=round(int(whole + decimals) * scale / digits), slack_bytes=slack)
