"""The JSON of a plan keeps the contract of docs/cli.md."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.memory.breakdown import Estimate, Shortfall
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.report.json import to_dict
from support.contract import inconsistencies, violations
from support.plans import BATCH, DIES, FITS, MICRO_BATCH, OFFLOAD, as_requested, changed, make_problem

PLANS = {
    "as requested": as_requested(),
    "changed": changed(MICRO_BATCH, OFFLOAD, pinned=("trainer.nnodes",), warnings=("gpus_per_node is assumed",)),
    "does not fit": as_requested(DIES),
    "nothing known of the host": as_requested(Estimate(phases=FITS.phases)),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_json_keeps_the_contract(plan: Plan) -> None:
    """Every plan has exactly the keys and types of the contract, survives JSON, and its numbers agree."""
    document = json.loads(json.dumps(to_dict(plan)))
    assert violations(document) == []
    assert inconsistencies(document) == []


def _set(path: str, value: Any) -> Any:
    def edit(document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            document = document[int(name)] if isinstance(document, list) else document[name]
        document[last] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        _set("peak_bytes", 1.5),
        _set("fits", 1),
        _set("budget_bytes", True),
        _set("extra", 1),
        _set("hardware.extra", 1),
        _set("phases.0.components.other", 1),
        lambda document: document.pop("warnings"),
        lambda document: document["phases"][0]["processes"].pop("engine"),
    ],
)
def test_the_guard_of_the_contract_can_fail(edit: Any) -> None:
    """A missing key, an unknown key and a wrong type are each seen."""
    document = copy.deepcopy(to_dict(as_requested()))
    edit(document)
    assert violations(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("phases.0.peak_bytes", 5),
        ("phases.0.fits", False),
        ("peak_bytes", 5),
        ("budget_bytes", 5),
        ("phases.0.name", "x"),
    ],
)
def test_the_guard_of_the_numbers_can_fail(path: str, value: Any) -> None:
    """Numbers that contradict each other are each seen."""
    document = copy.deepcopy(to_dict(as_requested()))
    _set(path, value)(document)
    assert inconsistencies(document)


def test_the_largest_peak_and_the_binding_budget_are_reported() -> None:
    """`peak_bytes` is the largest of all phases; the budget belongs to the phase that decides."""
    narrow = replace(FITS.phases[0], budget_bytes=73 * GIB)  # least headroom, and not the largest peak
    document = to_dict(as_requested(Estimate(phases=(narrow, *FITS.phases[1:]))))
    assert document["binding_phase"] == "rollout"
    assert document["budget_bytes"] == 73 * GIB
    assert document["peak_bytes"] == 91 * GIB


def test_changes_name_both_values() -> None:
    """A change says from and to with their own types, and whether it changes training."""
    document = to_dict(changed(MICRO_BATCH, OFFLOAD, BATCH))
    assert [(c["from"], c["to"], c["kind"]) for c in document["changes"]] == [
        (32, 4, "neutral"),
        (False, True, "neutral"),
        (64, 32, "semantic"),
    ]


def test_every_warning_is_said_once_and_blockers_first() -> None:
    """Blockers, shortfalls, warnings of hardware, problem and plan, and notes are all there, without repetition."""
    estimate = Estimate(
        phases=FITS.phases, shortfalls=(Shortfall(phase="rollout", num_bytes=1, why="too small"),), notes=("a note",)
    )
    problem = make_problem(estimate, blockers=("vLLM refuses it",), warnings=("twice", "problem"))
    plan = Plan(problem=problem, requested=estimate, estimate=estimate, warnings=("twice", "plan"))
    assert to_dict(plan)["warnings"] == ["vLLM refuses it", "rollout: too small", "twice", "problem", "plan", "a note"]
    assert to_dict(plan)["fits"] is False
