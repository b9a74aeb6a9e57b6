"""What was learned, kind by kind: the runs, and the margin and the limits that follow from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra_plugins.memfit import __version__
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.learning.lesson import ANY_PHASE, Lesson, lesson_of
from hydra_plugins.memfit.learning.residuals import MIN_RUNS
from hydra_plugins.memfit.learning.store import Observation
from hydra_plugins.memfit.memory.allocator import DEFAULT_MARGIN


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """The runs of one kind, oldest first, and what they teach."""

    name: str
    runs: tuple[Observation, ...]
    lesson: Lesson
    default_margin: float
    """What runs of this kind keep free unless somebody, or the lesson, says another."""


def kinds(found: Sequence[Observation]) -> list[Kind]:
    """Return the observations by kind, in the order in which the kinds were first seen."""
    names = dict.fromkeys(seen.kind for seen in found)
    groups = {name: [seen for seen in found if seen.kind == name] for name in names}
    return [_kind(name, tuple(runs)) for name, runs in groups.items()]


def _kind(name: str, runs: tuple[Observation, ...]) -> Kind:
    default = DEFAULT_MARGIN[runs[-1].alike.get("allocator", "")]
    return Kind(
        name=name, runs=runs, lesson=lesson_of(runs, runs[-1].capacity, default=default), default_margin=default
    )


def as_dict(kind: Kind) -> dict[str, Any]:
    """Return one kind as plain values; sizes are bytes of one device."""
    fields = ("run", "memfit", "outcome", "scope", "phase", "predicted", "observed", "capacity")
    return {
        "kind": kind.name,
        "alike": dict(kind.runs[0].alike),
        "margin": kind.lesson.margin,
        "limits": {name or "any": size for name, size in kind.lesson.limits.items()},
        "runs": [{name: getattr(seen, name) for name in fields} for seen in kind.runs],
    }


def lines(found: Sequence[Kind]) -> list[str]:
    """Return the report for people."""
    return [line for kind in found for line in _lines(kind)]


def _lines(kind: Kind) -> list[str]:
    title = ", ".join(
        value if key != "ranks" else f"{value} rank{'s' * (value != 'one')}"
        for key, value in kind.runs[0].alike.items()
    )
    return [
        f"{kind.name}  {title}",
        *(f"  {_run(seen)}" for seen in kind.runs),
        *(f"  -> {said}" for said in _taught(kind)),
    ]


def _run(seen: Observation) -> str:
    predicted = f"predicted {gib(seen.predicted)}"
    if seen.outcome == "oom":
        need = f"needed at least {gib(seen.observed)}" if seen.observed else "needed more"
        return f"died  {predicted} in {seen.phase or 'any phase'}, {need}  {_place(seen)}"
    stale = "" if seen.memfit == __version__ else f" (memfit {seen.memfit}: other formulas, not counted)"
    return f"ran   {predicted}, seen {gib(seen.observed)} ({seen.ratio - 1:+.1%}, {seen.scope})  {_place(seen)}{stale}"


def _place(seen: Observation) -> str:
    here = os.path.relpath(seen.run)
    return seen.run if here.startswith("..") else here


def _taught(kind: Kind) -> list[str]:
    lesson, default = kind.lesson, kind.default_margin
    taught = []
    if lesson.margin is not None:
        few = f"; fewer than {MIN_RUNS} runs do not lower it" if lesson.runs < MIN_RUNS else ""
        taught.append(f"memfit.margin={lesson.margin:g} instead of {default:g} ({lesson.runs} counted{few})")
    for phase, size in sorted(lesson.limits.items()):
        taught.append(
            f"{'any phase' if phase == ANY_PHASE else phase} may be predicted at most {gib(size)} on this device"
        )
    return taught
