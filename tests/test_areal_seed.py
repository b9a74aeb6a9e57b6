"""The AReaL launch that died on one A40, on the console command: what it predicts and what it changes."""

from __future__ import annotations

import pytest

from support.areal_launch import GIB, SEED, memfit, of_seed, phase, planned
from support.contract import inconsistencies, violations

BY_CONFIG = ("unset", "0.4.1", "0.5.3")


@pytest.mark.parametrize("version", BY_CONFIG)
def test_the_failing_launch_is_predicted_with_both_processes(version: str) -> None:
    """It dies in the update, with server and trainer within a tenth of the sizes in the out-of-memory message."""
    answer = of_seed("check", options=[] if version == "unset" else ["--framework-version", version])

    dies = phase(answer)
    assert (answer["fits"], dies["name"]) == (False, SEED["observed"]["phase"])
    for process, seen in SEED["observed"]["process_gib"].items():
        assert dies["processes"][process] / GIB == pytest.approx(seen, rel=0.1)


def test_the_whole_need_is_said_where_the_components_show_the_moment_of_death() -> None:
    """The peak of the phase that dies stands just above the capacity; a warning names what it would need."""
    answer = of_seed("check")

    dies, capacity = phase(answer), answer["hardware"]["capacity_bytes"]
    assert capacity < dies["peak_bytes"] < capacity + GIB
    (warning,) = (w for w in answer["warnings"] if "would need" in w)
    assert warning.startswith("update_actor would need ")
    assert float(warning.split()[3]) * GIB > dies["peak_bytes"] + GIB


def test_the_plan_fits_and_keeps_batch_and_length() -> None:
    """The reported fix halved batch and length; the plan touches neither and changes nothing that is learned."""
    answer = of_seed("plan")

    assert answer["fits"]
    assert {change["kind"] for change in answer["changes"]} == {"neutral"}
    assert not set(planned(answer)) & set(SEED["unchanged"])


def test_the_plan_is_a_fixed_point() -> None:
    """The planned values, asked for, fit as they are and are not changed again."""
    changes = planned(of_seed("plan"))

    again = of_seed("plan", changes)

    assert again["fits"]
    assert again["changes"] == []


def test_the_reported_fix_fits_in_the_range_that_was_seen() -> None:
    """The launch that ran lies where its processes were read off the GPU."""
    answer = of_seed("check", SEED["known_to_fit"])

    low, high = SEED["known_peak_gib"]["engine"]
    assert answer["fits"]
    assert low <= phase(answer, "update_actor")["processes"]["engine"] / GIB <= high
    low, high = SEED["known_peak_gib"]["total"]
    assert low <= phase(answer, "update_actor")["peak_bytes"] / GIB <= high + 1


@pytest.mark.parametrize("command", ["check", "plan"])
def test_answers_keep_the_contract(command: str) -> None:
    """The JSON has the keys of every other framework, and its sums are right, also where the launch dies."""
    answer = of_seed(command)

    assert violations(answer) + inconsistencies(answer) == []


def test_a_pinned_share_is_planned_around() -> None:
    """With the server's share pinned the trainer gives way; the pin stands."""
    key = "sglang.mem_fraction_static"
    values = {**SEED["requested"], "train_dataset.max_length": 512, "memfit.pin": [key]}
    _, answer, err = memfit("plan", SEED["hardware"], values, ["--model", SEED["model"]])

    assert answer["fits"], err
    assert key not in planned(answer)
    assert {"actor.gradient_checkpointing", "actor.mb_spec.max_tokens_per_mb"} & set(planned(answer))


def test_fp32_storage_costs_eight_more_bytes_a_parameter() -> None:
    """actor.optimizer_dtype decides between 8 and 16 bytes a parameter of weights, gradients and moments."""
    sizes = {}
    for dtype in ("bfloat16", "float32"):
        changes = {"actor.optimizer_dtype": dtype, "sglang.mem_fraction_static": 0.3}
        parts = phase(of_seed("check", changes), "rollout")["components"]
        sizes[dtype] = parts["gradients"] + parts["optimizer_states"]
    parameters = of_seed("check")["model"]["parameters"]

    assert sizes["float32"] - sizes["bfloat16"] == 6 * parameters
