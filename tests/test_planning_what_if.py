"""What each knob does alone: the same predictions that the planner would get, for values around the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, NoPlanFits
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.cli.launch import read_launch
from hydra_plugins.memfit.cli.main import parse
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.planning.problem import Knob, Plan
from hydra_plugins.memfit.planning.search import check, make_plan
from hydra_plugins.memfit.planning.what_if import MOST_VALUES, WhatIf, what_if
from support.hydra_app import BATCH, LAUNCH
from support.plans import FITS, make_problem

FRACTION = "actor_rollout_ref.rollout.gpu_memory_utilization"
CHECKPOINTING = "actor_rollout_ref.model.enable_gradient_checkpointing"
AREAL = (
    *("--framework", "areal", "--hardware", "a40", "--gpus", "1"),
    *(
        "actor.path=Qwen/Qwen2.5-0.5B-Instruct",
        "train_dataset.batch_size=64",
        "gconfig.max_new_tokens=1024",
        "actor.mb_spec.max_tokens_per_mb=8192",
    ),
)


LAUNCHES = {
    "fits when changed": ("--framework", "verl", "--hardware", "h200", *LAUNCH),
    "pinned": ("--framework", "verl", *LAUNCH, "+hardware=h200", f"{FRACTION}=0.5"),
    "fits nowhere": ("--framework", "verl", "--hardware", "l4", *LAUNCH, "memfit.margin=0.6"),
    "another framework": AREAL,
}


@cache
def planned(name: str) -> Plan:
    """Return the plan for one of `LAUNCHES`, or the best attempt at it."""
    question = read_launch(parse(["plan", *LAUNCHES[name]]))
    try:
        return make_plan(question.problem, pinned=question.pinned)
    except NoPlanFits as error:
        assert isinstance(error.plan, Plan)
        return error.plan


@pytest.mark.parametrize("name", LAUNCHES)
def test_each_choice_is_the_prediction_for_that_value(name: str) -> None:
    """A choice is what the problem predicts for the plan with this value, and the plan itself is among the choices."""
    plan = planned(name)
    values = {change.key: change.new for change in plan.changes}
    knobs = what_if(plan)
    assert knobs
    for knob in knobs:
        assert [choice.estimate for choice in knob.choices if choice.value == knob.planned] == [plan.estimate]
        for choice in knob.choices:
            moved = {**values, knob.key: choice.value, **choice.companions}
            assert choice.estimate == plan.problem.estimate(moved)


@pytest.mark.parametrize("name", LAUNCHES)
def test_choices_are_few_sorted_and_hold_what_was_asked(name: str) -> None:
    """A knob shows a handful of values in order; what was asked for is one of them, and no key comes twice."""
    knobs = what_if(planned(name))
    assert len({knob.key for knob in knobs}) == len(knobs)
    for knob in knobs:
        values = [choice.value for choice in knob.choices]
        numbers = [value for value in values if isinstance(value, (int, float))]
        assert numbers == sorted(numbers) and 2 <= len(values) <= MOST_VALUES
        assert knob.asked in (*values, None)


def test_a_knob_is_tried_on_both_sides_of_the_plan() -> None:
    """Larger micro-batches are shown with smaller ones, both states of a switch, and shares in place of a solved one."""
    knobs = {knob.key: knob for knob in what_if(planned("fits when changed"))}
    assert _fitting(knobs[BATCH]) == {
        1: True,
        2: True,
        4: True,
        8: True,
        16: True,
        32: False,
        64: False,
        128: False,
        256: False,
    }
    assert _fitting(knobs[CHECKPOINTING]) == {False: False, True: True}
    assert {0.2, 0.5, 0.9} <= set(_fitting(knobs[FRACTION]))
    assert knobs["data.max_response_length"].kind == "semantic"


def _fitting(knob: WhatIf) -> dict[object, bool]:
    return {choice.value: choice.estimate.fits for choice in knob.choices}


def test_pinned_knobs_are_shown_as_pinned() -> None:
    """What a pin costs can be seen: the pinned knob is there, and marked."""
    knobs = {knob.key: knob.pinned for knob in what_if(planned("pinned"))}
    assert knobs[FRACTION] and not knobs[BATCH]


def test_a_value_that_goes_not_with_the_others_is_left_out() -> None:
    """A value that the framework's adapter refuses is no choice; a knob without a second value is none."""

    def estimate(values: Mapping[str, object]) -> Estimate:
        if values == {"a": 3}:
            raise ConfigError("3 does not divide")
        return FITS

    knob = Knob(key="a", requested=4, candidates=(3, 2, 1), cost=1)
    problem = replace(make_problem(), knobs=(knob,), estimate=estimate)
    assert [choice.value for choice in what_if(check(problem))[0].choices] == [1, 2, 4]
    assert what_if(check(replace(problem, knobs=(replace(knob, candidates=()),)))) == ()


def test_the_compiler_is_not_asked_for_every_value() -> None:
    """With `memfit.exact` a prediction takes minutes: no value is tried besides the plan."""
    knob = Knob(key="a", requested=4, candidates=(3, 2, 1), cost=1)
    asked: list[object] = []

    def estimate(values: Mapping[str, object]) -> Estimate:
        asked.append(values)
        return FITS

    plan = check(replace(make_problem(), knobs=(knob,), estimate=estimate, settings=Settings(exact=True)))
    assert (what_if(plan), len(asked)) == ((), 1)
