"""The launches that died, on the console command: what it predicts, and what it changes, without verl installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.frameworks.verl import defaults
from support.verl_launch import seed, words

GIB = 1 << 30
OFFLOADS = (
    "actor_rollout_ref.actor.fsdp_config.param_offload",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
)
LAUNCHES = [
    ("gspo-3b-h200", "micro-batch-32"),
    ("gspo-3b-h200", "micro-batch-unset"),
    ("grpo-4x80gb", "7b"),
    ("grpo-4x80gb", "3b"),
]
every_version = pytest.mark.parametrize("version", defaults.VERSIONS)
every_launch = pytest.mark.parametrize(("name", "reading"), LAUNCHES)


def memfit(
    capsys: pytest.CaptureFixture[str], command: str, hardware: str, values: dict[str, Any], options: Sequence[str] = ()
) -> tuple[int, dict[str, Any]]:
    """Return (exit status, JSON answer) of ``memfit COMMAND`` for one launch."""
    status = main([command, "--framework", "verl", "--hardware", hardware, "--json", *options, *words(values)])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    answer: dict[str, Any] = json.loads(printed.out)
    return status, answer


@every_launch
def test_the_launch_that_died_is_predicted_to_die(name: str, reading: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The launch as it was asked for does not fit, and dies where the report says, in each release that explains it."""
    origin = seed(name)

    for version in origin.explained_by["failure"]:
        options = ["--framework-version", version]
        status, answer = memfit(capsys, "check", origin.hardware, origin.values(reading), options)

        assert (status, answer["fits"]) == (3, False)
        assert answer["binding_phase"] == origin.observed.get("phase", answer["binding_phase"])


@every_version
def test_an_unset_micro_batch_is_predicted_to_die(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any micro-batch the log-probabilities of the whole batch are one piece: no release survives that."""
    origin = seed("gspo-3b-h200")

    status, answer = memfit(
        capsys, "check", origin.hardware, origin.values("micro-batch-unset"), ["--framework-version", version]
    )

    assert (status, answer["binding_phase"]) == (3, "old_log_prob")


@every_version
@every_launch
def test_a_plan_fits_and_changes_nothing_that_is_learned(
    name: str, reading: str, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every version has a plan that fits; all of its changes are neutral and none is to a key that must stand."""
    origin = seed(name)

    status, answer = memfit(
        capsys, "plan", origin.hardware, origin.values(reading), ["--framework-version", version]
    )  # fmt: skip

    assert (status, answer["fits"]) == (0, True)
    assert {change["kind"] for change in answer["changes"]} <= {"neutral"}
    assert not {change["key"] for change in answer["changes"]} & set(origin.unchanged)
    assert all(phase["peak_bytes"] <= phase["budget_bytes"] for phase in answer["phases"])


def test_the_reported_fix_peaks_where_it_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """The predicted peak of the launch that ran lies in the range that was read off the GPU."""
    origin = seed("gspo-3b-h200")
    assert origin.reported_peak_gb is not None
    low, high = origin.reported_peak_gb

    for version in origin.explained_by["reported_fix"]:
        values = origin.values("micro-batch-32") | origin.reported_fix
        status, answer = memfit(capsys, "check", origin.hardware, values, ["--framework-version", version])

        assert status == 0
        # Decimal or binary was not said: the lower end decimal, the upper end binary.
        assert low * 10**9 <= max(phase["peak_bytes"] for phase in answer["phases"]) <= high * GIB


def test_offload_only_where_the_plan_needs_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Each offload that a plan switches on is needed: with that one off, the rest of the plan does not fit."""
    origin = seed("grpo-4x80gb")
    share = "actor_rollout_ref.rollout.gpu_memory_utilization"
    values = origin.values("7b") | {"trainer.n_gpus_per_node": 2, "memfit.pin": f"[{share}]"}
    _, answer = memfit(capsys, "plan", origin.hardware, values)
    planned = {change["key"]: change["to"] for change in answer["changes"]}

    switched_on = [key for key in OFFLOADS if planned.get(key) is True]
    assert switched_on
    for key in switched_on:
        _, without = memfit(capsys, "check", origin.hardware, values | planned | {key: False})
        assert not without["fits"], f"{key} is switched on and not needed"


def test_four_gpus_need_no_offload(capsys: pytest.CaptureFixture[str]) -> None:
    """The launch that died needs smaller micro-batches in every release that explains it, and no offload."""
    origin = seed("grpo-4x80gb")

    for version in origin.explained_by["failure"]:
        _, answer = memfit(capsys, "plan", origin.hardware, origin.values("7b"), ["--framework-version", version])

        assert not {change["key"] for change in answer["changes"]} & set(OFFLOADS)


def test_offload_does_not_lower_the_update(capsys: pytest.CaptureFixture[str]) -> None:
    """Offloading moves memory between phases: the peak of the actor update is the same with and without."""
    origin = seed("grpo-4x80gb")
    values = origin.values("7b")

    peaks = []
    for offload in (False, True):
        _, answer = memfit(capsys, "check", origin.hardware, values | dict.fromkeys(OFFLOADS, offload))
        [update] = [phase for phase in answer["phases"] if phase["name"] == "update_actor"]
        peaks.append(update["processes"]["trainer"])

    assert peaks[1] >= peaks[0]


@every_launch
def test_a_plan_is_its_own_plan(name: str, reading: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Planning the planned launch changes nothing more."""
    origin = seed(name)
    values = origin.values(reading)
    _, first = memfit(capsys, "plan", origin.hardware, values)
    planned = {change["key"]: change["to"] for change in first["changes"]}

    status, second = memfit(capsys, "plan", origin.hardware, values | planned)

    assert status == 0
    assert second["changes"] == []
