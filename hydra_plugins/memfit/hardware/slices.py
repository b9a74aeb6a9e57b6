"""Names of TPU slices: ``v4-32``, ``v5litepod-16``. The number counts TensorCores on v4 and v5p (two a chip), else chips."""

from __future__ import annotations

import re
from dataclasses import dataclass

CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
"""What the number in a type counts: TensorCores on v4 and v5p (two a chip, one JAX device a chip), else chips."""
_CHIPS_PER_HOST = 4
"""Of every slice on several hosts. Source: the machine types of cloud.google.com/tpu/docs/v4, v5p, v5e and v6e."""
_ONE_HOST = {"v4": 4, "v5p": 4, "v5e": 8, "v6e": 8}
"""Largest number of chips that one host holds (the same pages)."""
_TYPE = re.compile(r"(?:tpu[ -]?)?(v\d+)(litepod|e|p)?-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceType:
    """An accelerator type, read: ``v5litepod-8`` is generation v5e with 8 chips."""

    generation: str
    chips: int

    @property
    def name(self) -> str:
        """Name of the file in ``conf/hardware``: ``v5e-8``."""
        return f"{self.generation}-{self.chips * CORES_PER_CHIP[self.generation]}"

    @property
    def hosts(self) -> int:
        """Hosts of the slice."""
        return 1 if self.chips <= _ONE_HOST[self.generation] else self.chips // _CHIPS_PER_HOST


def parse_slice(accelerator_type: str) -> SliceType | None:
    """Return the slice that a name means; ``None`` for what is no slice of a known generation, or no size of one."""
    found = _TYPE.fullmatch(accelerator_type.strip().lower())
    generation = found[1] + {"litepod": "e", None: ""}.get(found[2], found[2]) if found else ""
    if not found or generation not in CORES_PER_CHIP:
        return None
    chips, rest = divmod(int(found[3]), CORES_PER_CHIP[generation])
    slice_type = SliceType(generation=generation, chips=chips)
    whole_hosts = chips <= _ONE_HOST[generation] or chips % _CHIPS_PER_HOST == 0
    return slice_type if chips >= 1 and rest == 0 and whole_hosts else None
