"""Bytes are ints; GiB is 2**30 and is always printed with its unit."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def gib(num_bytes: int) -> str:
    """Return ``num_bytes`` as text in GiB (2**30 bytes), with the unit.

    >>> gib(85_899_345_920)
    '80.00 GiB'
    """
    return f"{num_bytes / GIB:.2f} GiB"


def ceil_div(numerator: int, denominator: int) -> int:
    """Return ``numerator / denominator`` rounded up: a need for memory is never rounded down."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return ceil_div(value, multiple) * multiple
