"""From the driver's total to what one process can use.

The driver's total is 0.4 to 3 % above what torch reports as ``total_memory``, because the driver keeps a part for
itself. Where the driver says how much (``reserved``, since driver 510), total less reserved is torch's number: an H100
with 81559 MiB and 551 MiB reserved has 81008 MiB = 79.11 GiB, an H200 with 143771 and 700 has 143071 MiB = 139.72 GiB,
both as printed by torch. Sources of these and of the constants below: ``conf/hardware``.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.units import MIB, ceil_div
from hydra_plugins.memfit.hardware.catalog import Facts

SAFETY_PER_MILLE = 1
"""Taken off total - reserved: torch prints two decimals, so the readings above bear the rule out to about 0.01 %."""
RESERVED_AT_LEAST_BYTES = 600 * MIB
RESERVED_PER_MILLE = 15
"""Assumed reserved where the driver does not say: the larger of the two covers every total in ``conf/hardware``."""
SAME_BOARD_PER_MILLE = 25
"""Drivers move the capacity of a board by up to 2 % (A10G, 22.49 to 22.06 GiB); ECC or other memory, by 6 % or more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usable:
    """What one process can use, and whether the board is the one that its name promises."""

    usable_bytes: int
    contradicts_name: bool = False


def usable(*, total_bytes: int, reserved_bytes: int | None, facts: Facts | None) -> Usable:
    """Return the capacity of one device.

    Where a file lists the product and the reading agrees with it, the file's capacity counts (so that ``auto`` and the
    name give one answer), unless this driver leaves less. Otherwise the reading counts, not the name.
    """
    now = total_bytes - (assumed_reserved_bytes(total_bytes) if reserved_bytes is None else reserved_bytes)
    careful = max(0, now - ceil_div(now * SAFETY_PER_MILLE, 1000))
    if facts is None:
        return Usable(usable_bytes=careful)
    low, high = facts.capacity_range_bytes
    slack = low * SAME_BOARD_PER_MILLE // 1000
    if not low - slack <= now <= high + slack:
        return Usable(usable_bytes=careful, contradicts_name=True)
    exact = reserved_bytes is not None
    return Usable(usable_bytes=careful if exact and now < low else low)


def assumed_reserved_bytes(total_bytes: int) -> int:
    """Return what a driver keeps that does not say so, rounded up."""
    return max(RESERVED_AT_LEAST_BYTES, ceil_div(total_bytes * RESERVED_PER_MILLE, 1000))
