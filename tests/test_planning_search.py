"""The planner on small problems whose best answer is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_plugins.memfit.base.errors import ConfigError, NoPlanFits
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.memory.allocator import Margin
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.problem import SOLVE, Knob, Problem
from hydra_plugins.memfit.planning.search import check, make_plan

HARDWARE = Hardware(name="toy", product="Toy", kind="gpu", capacity_bytes=1000, source="this test")
MODEL = ModelSpec(
    name="toy",
    source="this test",
    architecture="Toy",
    model_type="toy",
    hidden_size=1,
    intermediate_size=1,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=1,
    vocab_size=1,
    tie_word_embeddings=False,
    max_position_embeddings=1,
    parameters=1,
    embedding_parameters=1,
    root_parameters=1,
    layer_parameters=1,
    active_parameters=1,
)

TOKENS = Knob(key="tokens", requested=800, candidates=(700, 600, 500, 400), cost=1, why="fewer tokens")
OFFLOAD = Knob(key="offload", requested=False, candidates=(True,), cost=2, why="to the host")
LENGTH = Knob(key="length", requested=100, candidates=(50,), cost=9, kind="semantic", why="shorter")
SHARE = Knob(key="share", requested=0.9, candidates=(SOLVE,), cost=3, why="the engine's share")


def predict(values: Mapping[str, object], budget: int, host: int) -> Estimate:
    """update = tokens + 4 length - 200 [offload]; rollout = 500 + 100 share; the host holds 300 when offloaded."""
    tokens, offload = int(values.get("tokens", 800) or 10_000), bool(values.get("offload", False))  # type: ignore[call-overload]
    share = values.get("share", 0.9)
    solved = () if share is not SOLVE else (("share", 0.1),)
    fraction = 0.1 if share is SOLVE else float(share)  # type: ignore[arg-type]
    update = tokens + 4 * int(values.get("length", 100)) - (200 if offload else 0)  # type: ignore[call-overload]
    return Estimate(
        phases=(
            PhaseEstimate(
                name="rollout", trainer=MemoryBreakdown(weights=500 + int(100 * fraction)), budget_bytes=budget
            ),
            PhaseEstimate(name="update_actor", trainer=MemoryBreakdown(activations=update), budget_bytes=budget),
        ),
        host=HostEstimate(peak_bytes=300 if offload else 0, budget_bytes=host),
        solved=solved,
    )


def problem(*knobs: Knob, budget: int = 1000, host: int = 0, settings: Settings | None = None) -> Problem:
    """A launch with the given knobs and the prediction above."""
    return Problem(
        framework="toy",
        framework_version="1",
        hardware=HARDWARE,
        model=MODEL,
        gpus_per_node=1,
        nodes=1,
        settings=settings or Settings(),
        margin=Margin(share=0.0),
        knobs=knobs,
        estimate=lambda values: predict(values, budget, host),
    )


def changed(
    *knobs: Knob, budget: int = 1000, host: int = 0, pinned: tuple[str, ...] = (), **settings: object
) -> dict[str, object]:
    """The plan's changes by key."""
    plan = make_plan(problem(*knobs, budget=budget, host=host, settings=Settings(**settings)), pinned)  # type: ignore[arg-type]
    assert plan.fits
    return {change.key: change.new for change in plan.changes}


def test_a_launch_that_fits_is_left_alone():
    """What fits is kept: no change at all."""
    assert changed(TOKENS, OFFLOAD, budget=1300) == {}


def test_the_cheapest_knob_is_spent_first_and_only_as_far_as_needed():
    """1200 bytes into 1110: 700 tokens (1100) are enough, offload is not touched."""
    assert changed(OFFLOAD, TOKENS, budget=1110) == {"tokens": 700}


def test_an_expensive_knob_that_is_needed_gives_the_cheap_one_back():
    """Pinned tokens leave offload; with both free and 750 bytes both are needed, tokens only as far as 500."""
    assert changed(TOKENS, OFFLOAD, budget=1000, pinned=("tokens",)) == {"offload": True}
    assert changed(TOKENS, OFFLOAD, budget=750) == {"tokens": 500, "offload": True}


def test_a_knob_that_relieves_nothing_is_not_turned():
    """The engine's share does not help the update: it stays, and the plan says that it was considered."""
    plan = make_plan(problem(SHARE, TOKENS, budget=1110))
    assert [change.key for change in plan.changes] == ["tokens"]
    share_first = Knob(key="share", requested=0.9, candidates=(SOLVE,), cost=0)
    assert ("share", "relieves no phase that does not fit") in make_plan(
        problem(share_first, TOKENS, budget=1110)
    ).rejected


def test_a_solved_value_is_written_as_a_number():
    """A share that is solved for leaves the plan as the number that the estimate chose."""
    tokens = Knob(key="tokens", requested=800, candidates=(100,), cost=1)
    assert changed(SHARE, tokens, budget=520) == {"share": 0.1, "tokens": 100}


def test_offload_that_would_overflow_the_host_is_not_chosen():
    """The host holds 200 bytes, offload needs 300: the launch is refused rather than moved to the host's death."""
    with pytest.raises(NoPlanFits):
        make_plan(problem(OFFLOAD, budget=1000, host=200))
    assert changed(OFFLOAD, budget=1000, host=300) == {"offload": True}


def test_an_unset_value_that_is_needed_starts_at_the_fastest_that_fits():
    """Unset tokens are filled in with 700, the largest value that fits; nothing is filled in where nothing is needed."""
    unset = Knob(key="tokens", requested=None, candidates=(800, 700, 600), cost=1, required=True)
    assert changed(unset, budget=1110) == {"tokens": 700}
    assert changed(unset, budget=5000) == {"tokens": 800}


def test_goal_fast_starts_from_the_fastest_values():
    """goal=fast raises a needlessly small value, as far as it fits; goal=fit keeps it."""
    small = Knob(key="tokens", requested=600, candidates=(500,), cost=1, fast=(800, 700))
    settings = {"goal": "fast"}
    assert changed(small, budget=1110, **settings) == {"tokens": 700}
    assert changed(small, budget=1310, **settings) == {"tokens": 800}
    assert changed(small, budget=1310, goal="fit") == {}


def test_the_fastest_start_brings_its_companions():
    """A larger micro-batch with the accumulation steps of the small one would be another batch."""
    micro = Knob(
        key="tokens",
        requested=200,
        candidates=(100,),
        cost=1,
        fast=(800, 400),
        companions=lambda v: {"steps": 800 // v},
    )
    assert changed(micro, budget=5000, goal="fast") == {"tokens": 800, "steps": 1}
    assert changed(micro, budget=900, goal="fast") == {"tokens": 400, "steps": 2}


def test_training_is_changed_only_when_that_is_allowed():
    """A semantic knob is refused with the change spelled out, and turned, marked, when allowed."""
    with pytest.raises(NoPlanFits, match=r"length=50 .*memfit.allow_semantic=true") as refusal:
        make_plan(problem(LENGTH, budget=1000))
    assert [c.key for c in refusal.value.plan.proposals] == ["length"]
    plan = make_plan(problem(LENGTH, budget=1000, settings=Settings(allow_semantic=True)))
    assert [(c.key, c.new, c.kind) for c in plan.changes] == [("length", 50, "semantic")]
    assert not plan.trains_the_same


def test_pins_that_cannot_fit_name_the_smallest_release():
    """The refusal names the value of one pin that would fit; of two pins that each would do, one is enough."""
    with pytest.raises(NoPlanFits, match=r"It would fit with: tokens=600$"):
        make_plan(problem(TOKENS, budget=1000), pinned=("tokens",))
    with pytest.raises(NoPlanFits) as refusal:
        make_plan(problem(TOKENS, OFFLOAD, budget=1000), pinned=("tokens", "offload"))
    assert len(refusal.value.plan.proposals) == 1


def test_a_blocker_stops_a_strict_launch_and_warns_otherwise():
    """A launch that would die for another reason than its size stops, or says so."""
    blocked = replace(problem(budget=5000), blockers=("unset X",))
    with pytest.raises(ConfigError, match="unset X"):
        make_plan(blocked)
    assert check(blocked).warnings == ("unset X",)


@given(
    budget=st.integers(300, 1500),
    host=st.integers(0, 400),
    pinned=st.sets(st.sampled_from(["tokens", "offload", "share"])),
)
def test_a_plan_fits_leaves_pins_alone_and_is_a_fixed_point(budget: int, host: int, pinned: set[str]):
    """Whatever the budget: a returned plan fits, touches no pin, and planning it again changes nothing."""
    launch = problem(TOKENS, OFFLOAD, SHARE, budget=budget, host=host)
    try:
        plan = make_plan(launch, pinned)
    except NoPlanFits:
        return
    assert plan.estimate.fits and not pinned & {change.key for change in plan.changes}
    values = {change.key: change.new for change in plan.changes}
    assert predict(values, budget, host).fits


def grid(savings: list[list[list[int]]], budget: int, asked: list[int], goal: str) -> Problem:
    """A launch of three knobs; a step of one saves bytes in each of two moments, whose larger one is the peak of a phase."""

    def estimate(values: Mapping[str, object]) -> Estimate:
        places = [int(values.get(f"k{i}", asked[i])) for i in range(len(savings))]  # type: ignore[call-overload]
        spent = [
            [sum(s[moment] for s in steps[:p]) for moment in (0, 1)] for steps, p in zip(savings, places, strict=True)
        ]
        peak = max(100 - sum(knob[moment] for knob in spent) for moment in (0, 1))
        breakdown = MemoryBreakdown(activations=max(peak, 0))
        return Estimate(phases=(PhaseEstimate(name="update_actor", trainer=breakdown, budget_bytes=budget),))

    ladders = [range(len(steps) + 1) for steps in savings]
    knobs = tuple(
        Knob(key=f"k{i}", requested=now, candidates=tuple(ladder[now + 1 :]), cost=i, fast=tuple(ladder[:now]))
        for i, (ladder, now) in enumerate(zip(ladders, asked, strict=True))
    )
    return replace(problem(*knobs, settings=Settings(goal=goal)), estimate=estimate)


@settings(max_examples=120)
@given(data=st.data(), goal=st.sampled_from(("fit", "fast")))
def test_no_plan_is_faster_knob_by_knob(data: st.DataObject, goal: str):
    """Of all assignments that fit the plan is the fastest, the dearest knob first: by trying every one of them."""
    step = st.sampled_from(([0, 10], [0, 20], [10, 0], [20, 0], [10, 20], [20, 10], [10, 10]))
    savings = data.draw(st.lists(st.lists(step, min_size=1, max_size=2), min_size=2, max_size=4))
    asked = [data.draw(st.integers(0, len(steps))) for steps in savings]
    launch = grid(savings, 10 * data.draw(st.integers(5, 9)), asked, goal)
    begin = asked if goal == "fit" else [0] * len(asked)
    ways = product(*(range(first, len(steps) + 1) for first, steps in zip(begin, savings, strict=True)))
    fitting = [way for way in ways if launch.estimate({f"k{i}": place for i, place in enumerate(way)}).fits]

    try:
        new = {change.key: change.new for change in make_plan(launch).changes}
    except NoPlanFits:
        assert not fitting
        return

    assert tuple(new.get(f"k{i}", now) for i, now in enumerate(asked)) == min(fitting, key=lambda way: way[::-1])


@given(budget=st.integers(700, 1500), more=st.integers(0, 500))
def test_a_larger_budget_is_never_planned_slower(budget: int, more: int):
    """With more memory no knob of the plan is spent further."""

    def cost(plan_budget: int) -> tuple[int, int]:
        new = changed(TOKENS, OFFLOAD, budget=plan_budget)
        return int(bool(new.get("offload"))), -int(new.get("tokens", 800))  # type: ignore[call-overload]

    assert cost(budget + more) <= cost(budget)
