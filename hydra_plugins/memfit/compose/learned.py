"""What earlier runs of the same kind teach a plan: their margin instead of the default one, and a limit below their deaths.

The first process of a launch that reads the store hands what it found, or that it found nothing, to its children in
``MEMFIT_LEARNED``: a run that is learned meanwhile must not give two ranks two plans. A process that plans many launches
hands on those that it planned last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, replace
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.learning.kind import digest, kind_of
from hydra_plugins.memfit.learning.lesson import ANY_PHASE, Lesson, lesson_of
from hydra_plugins.memfit.learning.where import store_path
from hydra_plugins.memfit.memory.allocator import DEFAULT_MARGIN
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.planning.problem import Problem

VARIABLE = "MEMFIT_LEARNED"
_MOST = 16
"""Launches that the variable holds, newest last: the C library never frees what a variable was set to before."""


def with_lessons(
    problem: Problem, *, is_own_margin: bool, environ: MutableMapping[str, str], again: Callable[[float], Problem]
) -> Problem:
    """Return the problem as earlier runs of its kind correct it; ``again`` reads the launch with another margin.

    A margin that the user gave himself stays, and so does everything with ``memfit.learned=false``. On several nodes
    that compose for themselves, and may have a store each, the lesson is said and not used.
    """
    if not problem.settings.learned or problem.hardware.kind != "gpu":
        return problem
    lesson = _lesson(problem, environ)
    if lesson.trouble:
        return _saying(problem, f"{lesson.trouble} The default margin counts.")
    if problem.nodes > 1 and not problem.composed_once:
        return _saying(problem, _unused(lesson)) if lesson.runs or lesson.limits else problem
    taught = problem
    if lesson.margin is not None and not is_own_margin:
        taught = again(lesson.margin) if lesson.margin != problem.margin.share else problem
        taught = _saying(taught, _said(lesson))
    if lesson.limits:
        taught = replace(_saying(taught, _limits_said(lesson)), estimate=_limited(taught.estimate, lesson.limits))
    return taught


def _lesson(problem: Problem, environ: MutableMapping[str, str]) -> Lesson:
    kind = digest(kind_of(problem))
    name = f"{kind}:{problem.hardware.capacity_bytes}"
    known = _handed_down(environ)
    if name not in known:
        known = dict(list(known.items())[1 - _MOST :])
        known[name] = asdict(_read(kind, problem, environ))
        environ[VARIABLE] = json.dumps(known)
    try:
        return Lesson(**known[name])
    except TypeError:
        raise _unreadable() from None


def _handed_down(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(environ.get(VARIABLE) or "{}")
    except ValueError:
        raise _unreadable() from None
    if not isinstance(known, dict) or not all(isinstance(value, dict) for value in known.values()):
        raise _unreadable()
    return known


def _unreadable() -> ConfigError:
    return ConfigError(f"{VARIABLE} cannot be read. memfit sets it for the processes of one launch: unset {VARIABLE}.")


def _read(kind: str, problem: Problem, environ: Mapping[str, str]) -> Lesson:
    file = store_path(environ)
    try:
        if not file.exists():
            return Lesson()
    except OSError as error:
        return Lesson(trouble=f"the store of learned runs {file} cannot be reached: {error.strerror or error}.")
    from hydra_plugins.memfit.learning import store  # lazy: sqlite3 costs milliseconds, and most launches have no store

    try:
        found = store.read(file, kind)
    except store.StoreError as error:
        return Lesson(trouble=str(error))
    return lesson_of(found, problem.hardware.capacity_bytes, default=DEFAULT_MARGIN[problem.margin.segments])


def _limited(
    estimate: Callable[[Mapping[str, object]], Estimate], limits: Mapping[str, int]
) -> Callable[[Mapping[str, object]], Estimate]:
    def limited(values: Mapping[str, object]) -> Estimate:
        found = estimate(values)
        phases = (replace(p, budget_bytes=min((p.budget_bytes, *_of(limits, p.name)))) for p in found.phases)
        return replace(found, phases=tuple(phases))

    return limited


def _of(limits: Mapping[str, int], phase: str) -> list[int]:
    return [limits[name] for name in (phase, ANY_PHASE) if name in limits]


def _saying(problem: Problem, sentence: str) -> Problem:
    return replace(problem, warnings=(*problem.warnings, sentence))


def _said(lesson: Lesson) -> str:
    runs = f"{lesson.runs} run{'s' * (lesson.runs > 1)} of this kind"
    return f"memfit.margin={lesson.margin:g} was learned from {runs} (memfit learn --list; memfit.learned=false: the default)."


def _limits_said(lesson: Lesson) -> str:
    parts = [f"{name or 'any phase'} at most {gib(size)}" for name, size in sorted(lesson.limits.items())]
    return f"a run of this kind ran out of memory: {', '.join(parts)} may be predicted (memfit learn --list)."


def _unused(lesson: Lesson) -> str:
    margin = f" memfit.margin={lesson.margin:g} would say the same to all of them." if lesson.margin is not None else ""
    limits = f" {_limits_said(lesson)}" if lesson.limits else ""
    return f"what was learned is not used where several nodes plan, each with a store of its own.{margin}{limits}"
