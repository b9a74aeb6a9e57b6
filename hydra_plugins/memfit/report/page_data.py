"""What the page of `memfit explain` shows, as plain data: the plan, the launch as asked, and what each knob does alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_plugins.memfit.base.units import MIB
from hydra_plugins.memfit.memory.breakdown import Estimate, PhaseEstimate
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.planning.what_if import Choice, WhatIf, what_if
from hydra_plugins.memfit.report import words
from hydra_plugins.memfit.report.json import change_dict, phase_dict, to_dict

_NOTHING_BYTES = MIB
"""A knob that moves no phase by as much is said to do nothing here."""


def page_data(plan: Plan) -> dict[str, Any]:
    """Return the JSON contract of ``plan`` under ``plan``, and beside it what only the page shows. Bytes are ints."""
    return {
        "plan": to_dict(plan),
        "asked": {"fits": plan.requested.fits, "phases": [_phase(phase) for phase in plan.requested.phases]},
        "planned": {"fits": plan.estimate.fits, "phases": [_phase(phase) for phase in plan.estimate.phases]},
        "what_if": sorted((_knob(plan, knob) for knob in what_if(plan)), key=_importance),
        "rejected": [{"key": key, "reason": reason} for key, reason in plan.rejected],
        "proposals": [change_dict(change) for change in plan.proposals],
    }


def _phase(phase: PhaseEstimate) -> dict[str, Any]:
    """Return a phase with what it needs in all, where its components stop at the moment at which the run dies."""
    return {**phase_dict(phase), "needed_bytes": phase.whole_bytes}


def _knob(plan: Plan, knob: WhatIf) -> dict[str, Any]:
    return {
        "key": knob.key,
        "kind": knob.kind,
        "why": knob.why,
        "asked": words.shown(knob.asked),
        "pinned": knob.pinned,
        "now": next(i for i, choice in enumerate(knob.choices) if choice.value == knob.planned),
        "is_slider": _is_slider(knob.choices),
        "moves": _largest_move(plan.estimate, knob),
        "choices": [_choice(plan.estimate, choice) for choice in knob.choices],
    }


def _importance(knob: Mapping[str, Any]) -> tuple[bool, bool, int]:
    """Order knobs: those that move nothing last, what the plan changed first, then by how far they move a phase."""
    changed = knob["choices"][knob["now"]]["value"] != knob["asked"]
    num_bytes = abs(knob["moves"]["bytes"])
    return (num_bytes == 0, not changed, -num_bytes)


def _is_slider(choices: Sequence[Choice]) -> bool:
    """Whether the values are numbers, or unset, and many enough for a slider."""
    numbers = [
        isinstance(c.value, (int, float)) and not isinstance(c.value, bool) for c in choices if c.value is not None
    ]
    return all(numbers) and len(numbers) > 2


def _choice(planned: Estimate, choice: Choice) -> dict[str, Any]:
    estimate = choice.estimate
    return {
        "value": words.shown(choice.value),
        "with": {key: words.shown(value) for key, value in choice.companions.items()},
        "fits": estimate.fits and not estimate.refusals,
        "verdict": words.state(estimate),
        "phases": [_phase(phase) for phase in estimate.phases],
        "difference_bytes": _differences(planned, estimate),
    }


def _needs(estimate: Estimate) -> Mapping[str, int]:
    return {phase.name: phase.whole_bytes for phase in estimate.phases}


def _differences(planned: Estimate, other: Estimate) -> dict[str, int]:
    """Return by phase how many bytes more than the plan ``other`` needs."""
    now, then = _needs(planned), _needs(other)
    return {name: then.get(name, 0) - num_bytes for name, num_bytes in now.items()}


def _largest_move(planned: Estimate, knob: WhatIf) -> dict[str, Any]:
    """Return the phase that the knob can move furthest, and by how much; 0 bytes: nothing worth a word."""
    moves = [item for choice in knob.choices for item in _differences(planned, choice.estimate).items()]
    name, num_bytes = max(moves, key=lambda move: abs(move[1]))
    return {"phase": name, "bytes": num_bytes if abs(num_bytes) >= _NOTHING_BYTES else 0}
