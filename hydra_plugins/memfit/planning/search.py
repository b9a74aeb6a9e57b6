"""The planner: spend knobs, cheapest first, until the launch fits; then give back what was not needed.

1. Start from what the launch asks for (``goal=fit``) or from the fastest value of each neutral knob (``goal=fast``). Values
   that are unset and needed start at the fastest.
2. Go through the knobs in the order of their cost. A knob is turned only if that lowers what does not fit, and only as
   far as it helps. As long as something was turned and the launch still does not fit, go through them again.
3. Go back from the most expensive knob to the cheapest and undo as much of each as still fits.

Each step is deterministic: every process of one launch that plans gets the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from hydra_plugins.memfit.base.errors import ConfigError, NoPlanFits
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.planning.problem import SOLVE, Change, Knob, Plan, Problem, Value


def check(problem: Problem) -> Plan:
    """Return the prediction for the launch as it is; what it needs at any size is counted with, and said."""
    estimate = problem.estimate({})
    needed = tuple(f"{c.key}={_literal(c.new)} is needed, and counted with: {c.why}." for c in problem.fixes)
    return Plan(
        problem=problem,
        requested=estimate,
        estimate=estimate,
        warnings=(*problem.warnings, *problem.blockers, *needed, *estimate.refusals, *estimate.notes),
        settings=problem.settings,
    )


def make_plan(problem: Problem, pinned: Iterable[str] = ()) -> Plan:
    """Return a plan that fits; ``pinned`` keys are not touched.

    Raises `ConfigError` for a launch that would die for another reason than its size (``memfit.strict``), and `NoPlanFits`
    with the best attempt and with what would fit.
    """
    settings = problem.settings
    if problem.blockers and settings.strict:
        raise ConfigError("\n".join(problem.blockers))
    pins = frozenset(pinned) | frozenset(settings.pin)
    requested = problem.estimate({})
    search = _Search(problem, pins, semantic=settings.allow_semantic)
    search.run()
    plan = _plan(problem, requested, search, pins)
    if plan.estimate.refusals and settings.strict:
        raise ConfigError("\n".join(plan.estimate.refusals))
    if plan.fits:
        return plan
    plan = replace(plan, proposals=_proposals(problem, requested, pins))
    raise NoPlanFits(_refusal(plan), plan)


class _Search:
    """One descent through the knobs of a problem."""

    def __init__(self, problem: Problem, pins: frozenset[str], *, semantic: bool) -> None:
        self.problem = problem
        kinds = ("neutral", "semantic") if semantic else ("neutral",)
        fixed = {change.key: change.new for change in problem.fixes}
        free = (_fixed(k, fixed) for k in problem.knobs if k.key not in pins and k.kind in kinds)
        knobs = [_within(k, problem, pins) for k in free]
        self.knobs = sorted(knobs, key=lambda k: (k.kind == "semantic", k.cost))
        self.values: dict[str, object] = {}
        self.turned: list[tuple[Knob, object, dict[str, object]]] = []
        """Knobs that were spent: the knob, its value before, and all values before."""
        self.rejected: list[tuple[str, str]] = []
        self.estimate = problem.estimate(self.values)

    def run(self) -> None:
        """Start, spend, give back, and put numbers where the estimate solved for them."""
        self._start()
        while not self.estimate.fits and self._pass():
            pass
        if self.estimate.fits:
            self._give_back()
        self._settle()

    def _pass(self) -> bool:
        """Go through the knobs once; whether any was turned. What helped nothing before may help after another knob."""
        turned = len(self.turned)
        self.rejected = []
        for knob in self.knobs:
            if self.estimate.fits:
                break
            self._spend(knob)
        return len(self.turned) > turned

    def _with(self, knob: Knob, value: object) -> dict[str, object]:
        """The values with one knob set; its companions follow, and leave when it goes back to the request."""
        values = {**self.values, knob.key: value}
        if knob.companions is None:
            return values
        for key, companion in knob.companions(value).items():
            values[key] = companion
        return values

    def _try(self, knob: Knob, value: object) -> Estimate:
        return self.problem.estimate(self._with(knob, value))

    def _set(self, knob: Knob, value: object) -> None:
        self.values = self._with(knob, value)
        self.estimate = self.problem.estimate(self.values)

    def _start(self) -> None:
        for knob in self.knobs:
            wanted = knob.fast if self.problem.settings.goal == "fast" else ()
            if knob.requested is None and knob.required:
                wanted = (*knob.fast, *knob.candidates)
            if wanted and knob.key not in self.values:
                self.values[knob.key] = wanted[0]
        if self.values:
            self.estimate = self.problem.estimate(self.values)

    def _ladder(self, knob: Knob) -> list[object]:
        """The knob's values below the one it has now."""
        ladder = _steps(knob)
        current = self.values.get(knob.key, knob.requested)
        if current in ladder:
            return ladder[ladder.index(current) + 1 :]
        if any(turned.key == knob.key for turned, _, _ in self.turned):  # by another knob of this key, of another cost
            return [v for v in knob.candidates if isinstance(v, int) and isinstance(current, int) and v < current]
        return list(knob.candidates)

    def _spend(self, knob: Knob) -> None:
        ladder = self._ladder(knob)
        if not ladder:
            return
        before = self.values.get(knob.key, knob.requested)
        extreme = self._try(knob, ladder[-1])
        least = extreme.violation_bytes
        if least >= self.estimate.violation_bytes:
            self.rejected.append((knob.key, "relieves no phase that does not fit"))
            return
        if self.estimate.host.fits and not extreme.host.fits:
            self.rejected.append((knob.key, "the host's memory does not hold what it would move there"))
            return
        index = _first(len(ladder), lambda i: self._try(knob, ladder[i]).violation_bytes <= least)
        kept = dict(self.values)
        self._set(knob, ladder[index])
        self.turned.append((knob, before, kept))

    def _give_back(self) -> None:
        """Undo the knobs, most expensive first, as far as the launch still fits."""
        for knob, before, kept in sorted(self.turned, key=lambda turn: (turn[0].kind == "neutral", -turn[0].cost)):
            taken, ladder = self.values.get(knob.key), _steps(knob)
            if taken is SOLVE or taken not in ladder or self._undone(knob, before, kept):
                continue
            start = ladder.index(before) + 1 if before in ladder else len(ladder) - len(knob.candidates)
            steps = ladder[start : ladder.index(taken)]
            index = _first(len(steps) + 1, lambda i, k=knob, s=steps: i == len(s) or self._try(k, s[i]).fits)  # type: ignore[misc]
            if index < len(steps):
                self._set(knob, steps[index])

    def _undone(self, knob: Knob, before: object, kept: Mapping[str, object]) -> bool:
        """Put a knob and its companions back to where they were, if the launch still fits."""
        values = dict(self.values)
        followers = () if knob.companions is None else tuple(knob.companions(self.values[knob.key]))
        for key in (knob.key, *followers):
            values.pop(key, None)
            if key in kept:
                values[key] = kept[key]
        estimate = self.problem.estimate(values)
        if estimate.fits:
            self.values, self.estimate = values, estimate
        return estimate.fits

    def _settle(self) -> None:
        solved = dict(self.estimate.solved)
        for key, value in list(self.values.items()):
            if value is SOLVE:
                self.values[key] = solved[key]
        self.estimate = self.problem.estimate(self.values)


def _steps(knob: Knob) -> list[object]:
    """Return the knob's values, fastest first; between the faster and the slower ones stands the requested one."""
    apart = knob.requested is not None and not set(knob.fast) & set(knob.candidates)  # SOLVE may be both
    asked = (knob.requested,) if knob.fast and apart else ()
    return list(dict.fromkeys((*knob.fast, *asked, *knob.candidates)))


def _fixed(knob: Knob, fixed: Mapping[str, Value]) -> Knob:
    """Return the knob with the value that the framework needs in the place of the requested one: nobody goes back to that."""
    return replace(knob, requested=fixed[knob.key]) if knob.key in fixed else knob


def _within(knob: Knob, problem: Problem, pins: frozenset[str]) -> Knob:
    """Return the knob without the values and companions that would move a pinned key."""
    follow = knob.companions
    if follow is None:
        return knob
    if not knob.companions_required:
        return replace(knob, companions=lambda v: {k: c for k, c in follow(v).items() if k not in pins})

    def free(value: object) -> bool:
        return all(key not in pins or problem.composed(key) == asked for key, asked in follow(value).items())

    return replace(knob, candidates=tuple(filter(free, knob.candidates)), fast=tuple(filter(free, knob.fast)))


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """Return the first index in ``range(count)`` for which ``holds`` is true; it must stay true after, and be true at the end."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _plan(problem: Problem, requested: Estimate, search: _Search, pins: frozenset[str]) -> Plan:
    return Plan(
        problem=problem,
        requested=requested,
        estimate=search.estimate,
        changes=tuple({c.key: c for c in (*problem.fixes, *_changes(problem, search.values))}.values()),
        pinned=tuple(sorted(pins)),
        rejected=tuple(dict.fromkeys(search.rejected)),
        warnings=(*problem.warnings, *problem.blockers, *search.estimate.refusals, *search.estimate.notes),
        settings=problem.settings,
    )


def _changes(problem: Problem, values: Mapping[str, object]) -> tuple[Change, ...]:
    """Return what differs from the request, in the order of the knobs."""
    knobs = {knob.key: knob for knob in reversed(problem.knobs)}
    changes = []
    for key in (*dict.fromkeys(knob.key for knob in problem.knobs), *(key for key in values if key not in knobs)):
        if key not in values:
            continue
        knob = knobs.get(key)
        old = problem.composed(key) if knob is None else knob.requested
        if not _same(values[key], old):
            new: Value = values[key]  # type: ignore[assignment]
            kind, why = ("neutral", "needed by another change") if knob is None else (knob.kind, knob.why)
            if knob is not None and new in knob.fast and problem.settings.goal == "fast":
                why = "faster, and it fits (memfit.goal=fast)"
            changes.append(Change(key=key, old=old, new=new, kind=kind, why=why))
    return tuple(changes)


def _same(new: object, old: object) -> bool:
    """Whether nothing changes: 1 and True, or 1 and 1.0, are different things in a config."""
    return type(new) is type(old) and new == old


def _proposals(problem: Problem, requested: Estimate, pins: frozenset[str]) -> tuple[Change, ...]:
    """Return the smallest change that would fit: one pin released, else all, else changes of what is trained."""
    turnable = sorted({knob.key for knob in problem.knobs} & pins)
    attempts = [pins - {key} for key in turnable]
    if len(turnable) > 1:
        attempts.append(pins - set(turnable))
    for semantic in (False, True):
        found = [
            plan.changes
            for plan in (_attempt(problem, requested, released, semantic=semantic) for released in attempts or [pins])
            if plan.fits
        ]
        if found:
            return min(found, key=len)
        if not semantic and attempts:
            attempts.insert(0, pins)
    return ()


def _attempt(problem: Problem, requested: Estimate, pins: frozenset[str], *, semantic: bool) -> Plan:
    search = _Search(problem, pins, semantic=semantic)
    search.run()
    return _plan(problem, requested, search, pins)


def _refusal(plan: Plan) -> str:
    """Return one paragraph: what does not fit, by how much, its largest term, and the smallest change that would fit."""
    estimate, problem = plan.estimate, plan.problem
    if not estimate.host.fits and all(p.fits for p in estimate.phases):
        head = f"host memory: {gib(estimate.host.peak_bytes)} needed, {gib(estimate.host.budget_bytes)} available on one host"
    elif estimate.shortfalls and all(p.fits for p in estimate.phases):
        head = estimate.shortfalls[0].why
    else:
        phase = plan.binding_phase
        device = "GPU" if problem.hardware.kind == "gpu" else "device"
        largest = max(phase.components.as_dict().items(), key=lambda item: item[1])
        head = (
            f"{phase.name} needs {gib(phase.whole_bytes)} on each {device}, {problem.hardware.name} offers "
            f"{gib(phase.budget_bytes)} (largest term: {largest[0]} {gib(largest[1])})"
        )
    text = f"no plan fits: {head}."
    if plan.proposals:
        overrides = " ".join(f"{c.key}={_literal(c.new)}" for c in plan.proposals)
        allow = " memfit.allow_semantic=true" if any(c.kind == "semantic" for c in plan.proposals) else ""
        verb = "It would fit if training changed" if allow else "It would fit with"
        return f"{text} {verb}: {overrides}{allow}"
    return f"{text} Use more GPUs or a larger one, or memfit.strict=false to launch all the same."


def _literal(value: Value) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
