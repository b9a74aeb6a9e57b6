"""What each knob of a plan does on its own: the prediction for its other values, with everything else as planned.

One knob moves at a time. Effects of two knobs do not add up (the peak of a phase moves to another moment), so no sum of
them is offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.planning.problem import SOLVE, Knob, Plan, Value

MOST_VALUES = 9
"""Values of one knob that are tried; a ladder of fifty budgets tells no more than its ends and some between."""

_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Tried for a knob whose value the estimate solves for: the share of an inference engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One value of a knob, and what the launch would need with it."""

    value: Value
    companions: Mapping[str, object] = field(default_factory=dict)
    """Other keys that move with this value."""
    estimate: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf:
    """One knob with all its choices, in the order of its values."""

    key: str
    asked: Value
    planned: Value
    kind: str
    """``neutral`` or ``semantic``, as of a `Knob`."""
    why: str
    pinned: bool
    choices: tuple[Choice, ...]


def what_if(plan: Plan) -> tuple[WhatIf, ...]:
    """Return every knob of ``plan`` that has another value, pinned ones too, in the order in which they are spent.

    Nothing with ``memfit.exact``: the compiler would take minutes for each value.
    """
    if plan.problem.settings.exact:
        return ()
    planned = {change.key: change.new for change in plan.changes}
    knobs = sorted(plan.problem.knobs, key=lambda knob: (knob.kind == "semantic", knob.cost))
    by_key: dict[str, list[Knob]] = {}
    for knob in knobs:
        by_key.setdefault(knob.key, []).append(knob)
    found = (_effects(plan, same, planned) for same in by_key.values())
    return tuple(effects for effects in found if len(effects.choices) > 1)


def _effects(plan: Plan, knobs: list[Knob], planned: Mapping[str, Value]) -> WhatIf:
    knob = knobs[0]
    now = planned.get(knob.key, knob.requested)
    return WhatIf(
        key=knob.key,
        asked=knob.requested,
        planned=now,
        kind=knob.kind,
        why=knob.why,
        pinned=knob.key in plan.pinned,
        choices=tuple(_choices(plan, knobs, planned, now)),
    )


def _choices(plan: Plan, knobs: list[Knob], planned: Mapping[str, Value], now: Value) -> Iterator[Choice]:
    for value in _values(knobs, now):
        if value == now:
            yield Choice(value=value, estimate=plan.estimate)
            continue
        owner = next((k for k in knobs if value in k.candidates or value in k.fast), knobs[0])
        follow = dict(owner.companions(value)) if owner.companions is not None else {}
        try:
            estimate = plan.problem.estimate({**planned, owner.key: value, **follow})
        except MemfitError:  # a value that does not go with the others, such as a batch that no longer divides
            continue
        yield Choice(value=value, companions=follow, estimate=estimate)


def _values(knobs: list[Knob], now: Value) -> list[Value]:
    """Return the values to try, sorted where they are numbers; what is asked and what is planned is among them."""
    ladder = [value for knob in knobs for value in (*knob.fast, *knob.candidates)]
    if SOLVE in ladder:
        ladder = [*(value for value in ladder if value is not SOLVE), *_SHARES]
    asked = knobs[0].requested
    kept: list[Value] = [now]
    if asked is not None and asked != now:
        kept.append(asked)
    if isinstance(now, bool) or asked is False:
        ladder += [False, True]
    others: list[Value] = [v for v in dict.fromkeys(ladder) if v not in kept]  # type: ignore[misc]
    numbers = sorted(v for v in others if isinstance(v, (int, float)) and not isinstance(v, bool))
    rest = [v for v in others if v not in numbers or isinstance(v, bool)]
    return sorted([*kept, *_spread(numbers, MOST_VALUES - len(kept) - len(rest)), *rest], key=_rank)


def _spread(values: list[int | float], number: int) -> Iterable[int | float]:
    """Return at most ``number`` of the sorted ``values``: both ends, and evenly many between them."""
    if len(values) <= number or number < 2:
        return values[: max(number, 0)]
    return [values[round(i * (len(values) - 1) / (number - 1))] for i in range(number)]


def _rank(value: Value) -> tuple[int, float, str]:
    """Order values: unset first, then off and on, then numbers, then names."""
    if value is None:
        return (0, 0, "")
    if isinstance(value, (bool, int, float)):
        return (1 if isinstance(value, bool) else 2, float(value), "")
    return (3, 0, value)
