"""What a trainer with ordinary segments risks, and what expandable ones would give back to it."""

from __future__ import annotations

from dataclasses import replace

from hydra_plugins.memfit.base.units import MIB, gib
from hydra_plugins.memfit.memory.allocator import (
    CAUTIOUS_MARGIN,
    DEFAULT_MARGIN,
    EXPANDABLE,
    FRAGMENTATION_SHARE,
    ORDINARY,
    Margin,
)
from hydra_plugins.memfit.memory.breakdown import Estimate

_WORTH_SAYING = 256 * MIB


def spared_bytes(estimate: Estimate, margin: Margin, *, capacity: int) -> int:
    """Return the bytes that the deciding phase would have more: a smaller term, and a smaller default margin."""
    if margin.segments != ORDINARY:
        return 0
    held = estimate.binding_phase.components.fragmentation
    spared = int(held * (1 - FRAGMENTATION_SHARE[True] / FRAGMENTATION_SHARE[False]))
    return spared + (0 if margin.given else int(capacity * (DEFAULT_MARGIN[ORDINARY] - DEFAULT_MARGIN[EXPANDABLE])))


def advice(estimate: Estimate, margin: Margin, *, capacity: int, how: str) -> tuple[str, ...]:
    """Return what a launch that does not fit would win; ``how`` says what has to be done for it. memfit sets no variable."""
    spared = spared_bytes(estimate, margin, capacity=capacity)
    if estimate.fits or spared < _WORTH_SAYING:
        return ()
    phase = estimate.binding_phase.name
    return (
        f"torch's allocator has ordinary segments here; expandable ones would give {gib(spared)} back to {phase}: {how}.",
    )


def cautioned(estimate: Estimate, margin: Margin, *, capacity: int, held: int) -> Estimate:
    """Return the estimate with a note where it fits by the default margin alone, which ordinary segments may exceed."""
    if margin.segments != ORDINARY or margin.given or not estimate.fits:
        return estimate
    safe = int(capacity * (1 - CAUTIOUS_MARGIN)) - held
    close = [phase.name for phase in estimate.phases if phase.components.fragmentation and phase.peak_bytes > safe]
    if not close:
        return estimate
    note = (
        f"{close[0]} is close to the limit, and the trainer's allocator has ordinary segments: about one in six such steps "
        f"needs more than is kept free. memfit.margin={CAUTIOUS_MARGIN:g} covers 95 % of them."
    )
    return replace(estimate, notes=(*estimate.notes, note))
