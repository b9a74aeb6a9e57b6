"""The margin that follows from torch's allocator, and what is said where its segments are ordinary."""

from __future__ import annotations

import json

import pytest

from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.cli import main as console
from hydra_plugins.memfit.memory.allocator import (
    CAUTIOUS_MARGIN,
    DEFAULT_MARGIN,
    EXPANDABLE,
    ORDINARY,
    Margin,
    asks_for_expandable,
    margin_for,
)
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.planning.segments import advice, cautioned, spared_bytes

NO_HOST = HostEstimate(peak_bytes=0, budget_bytes=0)
DEFAULT = margin_for(None, expandable_segments=False)


@pytest.mark.parametrize(
    ("asked", "expandable", "margin"),
    [
        (None, True, Margin(share=DEFAULT_MARGIN[EXPANDABLE], segments=EXPANDABLE)),
        (None, False, Margin(share=DEFAULT_MARGIN[ORDINARY], segments=ORDINARY)),
        (None, None, Margin(share=0.05)),
        (0.0, False, Margin(share=0.0, segments=ORDINARY, given=True)),
        (0.12, True, Margin(share=0.12, segments=EXPANDABLE, given=True)),
    ],
)
def test_margin_follows_from_the_allocator_unless_given(
    asked: float | None, expandable: bool | None, margin: Margin
) -> None:
    """A share that somebody names stands, 0 too; else the kind of segments decides."""
    assert margin_for(asked, expandable_segments=expandable) == margin


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128, expandable_segments: True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
    ],
)
def test_the_environment_switches_expandable_segments_on(environ: dict[str, str], asked: bool) -> None:
    """Both names of torch's variable are read, whatever else they set."""
    assert asks_for_expandable(environ) == asked


def estimate(*, peak: int, budget: int, fragmentation: int = 6 * GIB) -> Estimate:
    """An update of one process."""
    parts = MemoryBreakdown(activations=peak - fragmentation, fragmentation=fragmentation)
    return Estimate(phases=(PhaseEstimate(name="update_actor", trainer=parts, budget_bytes=budget),), host=NO_HOST)


def test_a_launch_that_does_not_fit_is_told_what_expandable_segments_give_back() -> None:
    """The smaller term, in the phase that decides; nothing where segments are expandable, or where it fits."""
    dies = estimate(peak=120 * GIB, budget=95 * GIB)
    assert spared_bytes(dies, DEFAULT, capacity=100 * GIB) == 5 * GIB
    said = advice(dies, DEFAULT, capacity=100 * GIB, how="do so")
    assert said == (
        "torch's allocator has ordinary segments here; expandable ones would give 5.00 GiB back to update_actor: do so.",
    )
    assert not advice(dies, margin_for(None, expandable_segments=True), capacity=100 * GIB, how="")
    assert not advice(estimate(peak=90 * GIB, budget=95 * GIB), DEFAULT, capacity=100 * GIB, how="")
    assert not advice(estimate(peak=120 * GIB, budget=95 * GIB, fragmentation=0), DEFAULT, capacity=100 * GIB, how="")


@pytest.mark.parametrize(
    ("margin", "peak", "is_said"),
    [
        (DEFAULT, 94, True),
        (DEFAULT, 91, False),
        (DEFAULT, 96, False),
        (margin_for(0.05, expandable_segments=False), 94, False),
        (margin_for(None, expandable_segments=True), 94, False),
    ],
)
def test_a_plan_between_the_two_margins_says_so(margin: Margin, peak: int, is_said: bool) -> None:
    """It fits by the default margin, and the larger one that covers 95 % of replayed steps would refuse it."""
    noted = cautioned(estimate(peak=peak * GIB, budget=95 * GIB), margin, capacity=100 * GIB, held=0).notes
    assert bool(noted) == is_said
    assert all(f"memfit.margin={CAUTIOUS_MARGIN:g}" in note for note in noted)


LAUNCH = (
    *("--hardware", "h100", "--gpus", "8", "--model", "qwen2.5-7b", "algorithm.adv_estimator=grpo"),
    *("actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"),
    *(
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
    ),
)


@pytest.mark.parametrize(
    ("version", "more", "kept"),
    [
        ("0.9.1", (), "5% kept free (memfit.margin=0.05, expandable segments)"),
        ("0.5.0", (), "5% kept free (memfit.margin=0.05, ordinary segments)"),
        ("0.5.0", ("memfit.margin=0.08",), "8% kept free (memfit.margin=0.08)"),
        ("0.5.0", ("memfit.margin=null",), "5% kept free (memfit.margin=0.05, ordinary segments)"),
    ],
)
def test_the_report_names_the_segments(
    capsys: pytest.CaptureFixture[str], version: str, more: tuple[str, ...], kept: str
) -> None:
    """A derived margin is said with the allocator that it is for, your own without."""
    console.main(["check", "--framework", "verl", "--framework-version", version, *LAUNCH, *more])
    assert kept in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_launch_that_is_too_large_says_it_in_its_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    """verl 0.5 cannot switch expandable segments on beside vLLM's pool; the warning names the release that does."""
    words = [*LAUNCH[2:], "--hardware", "l20", "data.max_response_length=8192", "--json"]
    assert console.main(["check", "--framework", "verl", "--framework-version", "0.5.0", *words]) == 3
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("expandable ones would give" in said and "verl 0.6 and later" in said for said in warnings)
