"""What the observations of one kind of run teach the next plan of that kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hydra_plugins.memfit import __version__
from hydra_plugins.memfit.learning.residuals import limit_of, margin_of

if TYPE_CHECKING:
    from hydra_plugins.memfit.learning.store import Observation

ANY_PHASE = ""
"""Where a run died, when its log does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """The margin and the limits that follow from earlier runs."""

    margin: float | None = None
    """``None`` where no run of this version was observed."""
    runs: int = 0
    limits: Mapping[str, int] = field(default_factory=dict)
    """Phase, or `ANY_PHASE` -> largest prediction in bytes: a run that was predicted to need more died."""
    trouble: str = ""
    """Why the store could not be read."""


def lesson_of(found: Sequence[Observation], capacity: int, *, default: float) -> Lesson:
    """Return what the observations of one kind, of that ``default`` margin, teach a launch on devices of ``capacity`` bytes.

    A residual counts for the version whose formulas left it; that a run died counts for all.
    """
    ratios = [seen.ratio for seen in found if seen.outcome == "ran" and seen.memfit == __version__]
    limits: dict[str, int] = {}
    for seen in found:
        if seen.outcome == "oom":
            limit = limit_of(predicted=seen.predicted, needed=seen.observed, capacity=seen.capacity, now=capacity)
            limits[seen.phase] = min(limit, limits.get(seen.phase, limit))
    margin = margin_of(ratios, default) if ratios else None
    return Lesson(margin=margin, runs=len(ratios), limits=limits)
