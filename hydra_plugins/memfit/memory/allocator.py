"""torch's caching allocator: what it holds and no tensor uses, and the margin that the spread of this asks for.

Every constant here is read off training steps that were replayed through a model of that allocator (no GPU); how, and the
whole distributions, are in docs/validation/reserved.md. ``make validate`` holds the constants against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

EXPANDABLE, ORDINARY = "expandable segments", "ordinary segments"

FRAGMENTATION_SHARE = {True: 0.01, False: 0.06}
"""Reserved above allocated, as a share of what a pass allocates and frees, with expandable segments and without: the median of
replayed steps that fill a GPU of 80 GB, in whole percents and at least one. The spread around it belongs to the margin."""

DEFAULT_MARGIN: Mapping[str, float] = {EXPANDABLE: 0.05, ORDINARY: 0.05, "": 0.05}
"""Share of the usable memory that is kept free unless somebody says another, by kind of segments; empty where no trainer of
torch runs. Expandable: every combination of the allocator's spread, the formulas' errors and the posted process sizes stays
within it on 80 GB. Ordinary: 95 % of them would take `CAUTIOUS_MARGIN`; this is the largest whole percent that refuses no
public run that is known to have trained."""

CAUTIOUS_MARGIN = 0.08
"""What covers 95 % of the combinations with ordinary segments on 80 GB."""

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass(frozen=True, kw_only=True, slots=True)
class Margin:
    """The share of the usable memory that a plan keeps free, and why."""

    share: float
    segments: str = ""
    """A key of `DEFAULT_MARGIN`."""
    given: bool = False
    """Somebody named the share: it is not the default."""

    @property
    def expandable_segments(self) -> bool:
        """Whether the trainer's allocator has expandable segments."""
        return self.segments == EXPANDABLE


def margin_for(asked: float | None, *, expandable_segments: bool | None) -> Margin:
    """Return the margin that was asked for, or else the default of the allocator (``None``: no trainer of torch)."""
    segments = "" if expandable_segments is None else EXPANDABLE if expandable_segments else ORDINARY
    share = DEFAULT_MARGIN[segments] if asked is None else asked
    return Margin(share=share, segments=segments, given=asked is not None)


def asks_for_expandable(environ: Mapping[str, str]) -> bool:
    """Whether an environment switches expandable segments on for every process that inherits it."""
    return any(says_expandable(environ.get(name)) for name in ALLOCATOR_VARIABLES)


def says_expandable(setting: object) -> bool:
    """Whether the value of one of `ALLOCATOR_VARIABLES` switches expandable segments on."""
    return "expandable_segments:True" in str(setting or "").replace(" ", "")


def fragmentation_bytes(transient: int, *, expandable_segments: bool) -> int:
    """Return the reserved bytes that no tensor uses at the peak of a pass that allocates ``transient`` bytes."""
    return int(transient * FRAGMENTATION_SHARE[expandable_segments])
