"""What holds for every plan, on launches drawn at random from what people write."""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.planning.problem import Plan
from support import fuzz
from support import valid_launches as valid
from support.fuzz import Case

FEW = settings(
    max_examples=int(os.environ.get("MEMFIT_PROPERTY_CASES", "20")),
    suppress_health_check=[HealthCheck.filter_too_much],
)  # fmt: skip


def plan_of(case: Case) -> Plan:
    """Return the plan, after `fuzz.planned` has held it against the rules; a launch without a plan is not drawn."""
    try:
        return fuzz.planned(fuzz.launch(case))
    except MemfitError:
        assume(False)
        raise


def asked(case: Case) -> Estimate:
    """Return the prediction for the launch as it is asked for; a launch that is refused is not drawn."""
    try:
        return fuzz.launch(case).problem()[0].estimate({})
    except MemfitError:
        assume(False)
        raise


def needs(estimate: Estimate) -> dict[str, int]:
    """Return what each phase needs, in bytes, also where it would die before."""
    return {phase.name: phase.whole_bytes for phase in estimate.phases}


@FEW
@given(case=valid.cases())
def test_a_plan_fits_touches_no_pin_and_is_the_same_twice(case: Case) -> None:
    """By its own account, applied to the launch anew, whatever the framework, the goal and the size of the GPU."""
    assert plan_of(case).changes == plan_of(case).changes


@FEW
@given(case=valid.cases())
def test_planning_a_plan_changes_nothing_more(case: Case) -> None:
    """The planned values, asked for, fit as they are and stay as they are."""
    plan = plan_of(case)

    again = plan_of(valid.applied(case, plan.changes))

    assert again.changes == ()
    assert again.requested.fits


@FEW
@given(case=valid.cases(), data=st.data())
def test_more_tokens_never_need_less(case: Case, data: st.DataObject) -> None:
    """Twice the sequences, or the tokens, of a piece of work: no phase needs less than before."""
    key = data.draw(st.sampled_from(valid.TOKENS[valid.framework_of(case.base)]))
    few, many = (needs(asked(c)) for c in (case, valid.setting(case, key, 2 * valid.value(case, key))))

    assert {phase: need for phase, need in few.items() if many[phase] < need} == {}


@FEW
@given(case=valid.cases(framework="verl"), gpus=st.sampled_from((2, 4)))
def test_more_shards_never_need_more(case: Case, gpus: int) -> None:
    """Twice the GPUs for the same launch: no phase of a GPU needs more. (One GPU has no buffers to communicate with.)"""
    few, many = (needs(asked(valid.setting(case, "trainer.n_gpus_per_node", count))) for count in (gpus, 2 * gpus))

    assert {phase: need for phase, need in few.items() if many[phase] > need} == {}


@FEW
@given(case=valid.cases(), more_gib=st.integers(1, 64))
def test_a_larger_budget_is_never_planned_slower(case: Case, more_gib: int) -> None:
    """On a larger GPU the same launch has a plan too, and spends no dearer knob than on the smaller one."""
    small = plan_of(case)
    larger = valid.with_capacity(case, small.problem.hardware.capacity_bytes + (more_gib << 30))

    assert valid.slower(fuzz.planned(fuzz.launch(larger)), small) == ""


def test_the_requested_value_is_tried_before_a_slower_one() -> None:
    """Under goal=fast a value that was asked for and fits is not passed over for the next smaller one."""
    batch = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    case = Case(base="verl 0.9.1", settings=(("goal", "fast"), ("hardware.capacity_bytes", 73 << 30)))
    first = valid.applied(case, plan_of(case).changes)

    again = {change.key: change.new for change in plan_of(first).changes}

    assert again.get(batch, valid.value(first, batch)) >= valid.value(first, batch)


def test_a_launch_that_fits_on_no_tpu_is_told_what_would() -> None:
    """A smaller batch that the asked micro-batch does not divide is no error of the user's: the micro-batch follows."""
    case = Case(base="mllm-jax", settings=(("hardware.capacity_bytes", 24 << 30),))

    refusal = fuzz.answer(case)

    assert "It would fit if training changed" in str(refusal)
    assert "train.micro_batch_size_per_device=1 rollout.n=4" in str(refusal)
    fuzz.planned(fuzz.launch(replace(case, settings=(*case.settings, ("allow_semantic", True)))))
