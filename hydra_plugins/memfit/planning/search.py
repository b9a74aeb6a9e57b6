"""The planner: spend knobs, cheapest first, until the launch fits; then give back what was not needed.

1. Start from what the launch asks for (``goal=fit``) or from the fastest value of each neutral knob (``goal=fast``). Values
   that are unset and needed start at the fastest.
2. Go through the knobs in the order of their cost. A knob is turned only if that lowers what does not fit, and only as
   far as it helps. As long as something was turned and the launch still does not fit, go through them again; at last, spend all.
3. Go back from the most expensive knob to the cheapest and undo as much of each as still fits, if need be with cheaper ones
   spent in its place: they are given back after it.

Each step is deterministic: every process of one launch that plans gets the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError, NoPlanFits
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


@dataclass(frozen=True, slots=True)
class _Ladder:
    """The values that one knob can take in a search."""

    knob: Knob
    begin: object
    """Where the search begins: the requested value, or the fastest."""
    rungs: list[object]
    """The values of the key from ``begin`` to its slowest, through all the knobs that it has."""
    first: int
    """The rung that this knob starts from; the ones above are cheaper knobs'."""
    last: int
    """Its slowest rung."""

    def now(self, values: Mapping[str, object]) -> object:
        """Return the value of the key."""
        return values.get(self.knob.key, self.knob.requested)

    def slower(self, values: Mapping[str, object]) -> list[object]:
        """Return this knob's values below the present one, fastest first."""
        now = self.now(values)
        if now in self.rungs:
            return self.rungs[max(self.first, self.rungs.index(now)) + 1 : self.last + 1]
        if not isinstance(now, int):
            return []
        return [v for v in self.knob.candidates if isinstance(v, int) and v < now]  # a companion of another knob set it

    def faster(self, values: Mapping[str, object]) -> list[object]:
        """Return the values to which this knob can be taken back, fastest first; none where it is not turned."""
        now = self.now(values)
        place = self.rungs.index(now) if now in self.rungs else 0
        return self.rungs[self.first : place] if self.first < place <= self.last else []


def _ladders(knobs: Iterable[Knob], start: Mapping[str, object]) -> list[_Ladder]:
    rungs: dict[str, list[object]] = {}
    spans = []
    for knob in knobs:
        begin = start.get(knob.key, knob.requested)
        known = rungs.setdefault(knob.key, [begin])
        steps = _steps(knob)
        below = steps[steps.index(begin) :] if begin in steps else knob.candidates
        first = len(known) - 1
        known += [value for value in below if value not in known]
        spans.append((knob, begin, known, first, len(known) - 1))
    return [_Ladder(*span) for span in spans]


class _Search:
    """One descent through the knobs of a problem, and the way back."""

    def __init__(self, problem: Problem, pins: frozenset[str], *, semantic: bool) -> None:
        self.problem = problem
        kinds = ("neutral", "semantic") if semantic else ("neutral",)
        fixed = {change.key: change.new for change in problem.fixes}
        free = (_fixed(k, fixed) for k in problem.knobs if k.key not in pins and k.kind in kinds)
        knobs = sorted((_within(k, problem, pins) for k in free), key=lambda k: (k.kind == "semantic", k.cost))
        self.values = _start(knobs, fast=problem.settings.goal == "fast")
        self.start = dict(self.values)
        self.ladders = _ladders(knobs, self.start)
        """Of each knob, the cheapest in speed first."""
        self.rejected: list[tuple[str, str]] = []
        self.estimate = problem.estimate(self.values)

    def run(self) -> None:
        """Spend, give back, and put numbers where the estimate solved for them."""
        while not self.estimate.fits and self._pass():
            pass
        if not self.estimate.fits:  # what no knob relieves alone: two moments of one phase
            everything = self._spent(self.values, self.ladders)
            if self._fits(everything):
                self._take(everything)
        if self.estimate.fits:
            self._give_back()
        solved = dict(self.estimate.solved)
        self._take({key: solved[key] if value is SOLVE else value for key, value in self.values.items()})

    def _take(self, values: dict[str, object]) -> None:
        self.values, self.estimate = values, self.problem.estimate(values)

    def _moved(self, values: Mapping[str, object], ladder: _Ladder, value: object) -> dict[str, object]:
        """Return ``values`` with one knob at another value; the companions of the old one leave, those of the new one come."""
        knob, now = ladder.knob, ladder.now(values)
        left = (knob.key, *(_companions(knob, now) if now != ladder.begin else ()))
        moved = {key: other for key, other in values.items() if key not in left}
        moved |= {key: self.start[key] for key in left if key in self.start}
        return moved if value == ladder.begin else {**moved, **_companions(knob, value), knob.key: value}

    # -- down ---------------------------------------------------------------------------------------------------------
    def _pass(self) -> bool:
        """Go through the knobs once; whether any was turned. What helped nothing before may help after another knob."""
        self.rejected = []
        turned = False
        for ladder in self.ladders:
            if self.estimate.fits:
                break
            turned = self._spend(ladder) or turned
        return turned

    def _spend(self, ladder: _Ladder) -> bool:
        """Turn a knob as far as that lowers what does not fit; whether it did."""
        slower = [self._moved(self.values, ladder, value) for value in ladder.slower(self.values)]
        if not slower:
            return False
        extreme = self.problem.estimate(slower[-1])
        least = extreme.violation_bytes
        if least >= self.estimate.violation_bytes:
            self.rejected.append((ladder.knob.key, "relieves no phase that does not fit"))
            return False
        if self.estimate.host.fits and not extreme.host.fits:
            self.rejected.append((ladder.knob.key, "the host's memory does not hold what it would move there"))
            return False
        index = _first(len(slower), lambda i: self.problem.estimate(slower[i]).violation_bytes <= least)
        self._take(slower[index])
        return True

    # -- and back -----------------------------------------------------------------------------------------------------
    def _give_back(self) -> None:
        """Take each knob back as far as the launch still fits, the most expensive first, and spend cheaper ones for it.

        Where a slower value never needs more memory, no plan is faster then in the order of the knobs.
        """
        for place, ladder in reversed(list(enumerate(self.ladders))):
            self._raise(ladder, [])
            self._raise(ladder, self.ladders[:place])

    def _raise(self, ladder: _Ladder, spent: list[_Ladder]) -> None:
        """Set a knob to its fastest value that fits while the knobs of ``spent`` are at their slowest."""
        faster = [self._spent(self._moved(self.values, ladder, v), spent) for v in ladder.faster(self.values)]
        if faster and self._fits(faster[-1]):
            self._take(faster[_first(len(faster), lambda i: self._fits(faster[i]))])

    def _fits(self, values: Mapping[str, object]) -> bool:
        """Whether values fit that nobody asked for together; those that do not go together do not."""
        try:
            return self.problem.estimate(values).fits
        except MemfitError:
            return False

    def _spent(self, values: dict[str, object], ladders: list[_Ladder]) -> dict[str, object]:
        """Return ``values`` with each knob at its slowest, where it is not slower already."""
        for ladder in ladders:
            if ladder.now(values) in ladder.rungs:
                for value in ladder.slower(values)[-1:]:
                    values = self._moved(values, ladder, value)
        return values


def _start(knobs: Iterable[Knob], *, fast: bool) -> dict[str, object]:
    """Return what differs from the request before anything is spent: the fastest values, or those that are needed and unset."""
    values: dict[str, object] = {}
    for knob in knobs:
        wanted = knob.fast if fast else ()
        if knob.requested is None and knob.required:
            wanted = (*knob.fast, *knob.candidates)
        if wanted and knob.key not in values:
            values |= {**_companions(knob, wanted[0]), knob.key: wanted[0]}
    return values


def _companions(knob: Knob, value: object) -> Mapping[str, object]:
    return {} if knob.companions is None else knob.companions(value)


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
