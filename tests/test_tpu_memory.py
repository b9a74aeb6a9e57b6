"""The closed form of a GRPO step on TPU, against compiled programs and against runs on record."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.memory import xla_training
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.memory.xla_training import XlaStep
from hydra_plugins.memfit.planning.context import Context
from support.tpu_models import model
from support.tpu_survey import rows, step

RUNS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data/tpu_observed.json").read_text())["runs"]
STEPS = [row for row in rows() if row.get("kind", "train_step") == "train_step" and "natural_bytes" in row]
SAFE_SIDE = {"v4-8-3b-4x1536", "v6e-8-3b-3x2560"}
"""Runs that fit because the compiler squeezed them below their natural size: only it knows, the closed form refuses."""


def error(row: dict[str, Any]) -> float:
    """Return the relative error of the closed form against the compiler's first assignment."""
    return xla_training.train_step(step(row)).total_bytes / row["natural_bytes"] - 1


def predicted(run: dict[str, Any], margin: float) -> Estimate:
    """Return the adapter's prediction for a run on record."""
    context = Context(
        hardware=catalog.load(run["hardware"]),
        settings=Settings(margin=margin),
        resolve_model=lambda _: model(run["model"]),
    )
    return registry.adapter("mllm-jax").problem(run["config"], context).estimate({})


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row["id"])
def test_state_is_what_the_compiler_calls_arguments(row: dict[str, Any]) -> None:
    """Weights, moments and accumulation buffer are exact but for the replicated biases and scales, below 0.2 %."""
    assert xla_training.state(step(row)).total_bytes == pytest.approx(row["argument_bytes"], rel=0.002)


def test_median_error_of_rows_that_set_no_constant() -> None:
    """On compiled steps that no constant was read from, the median error is at most 5 %."""
    checked = [abs(error(row)) for row in STEPS if row["split"] == "check"]
    assert len(checked) >= 5
    assert statistics.median(checked) <= 0.05


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row["id"])
@pytest.mark.parametrize("margin", [0.01, 0.05])
def test_no_refused_step_is_called_fitting(row: dict[str, Any], margin: float) -> None:
    """Whatever the compiler refuses, the closed form refuses too, with any margin of 1 % or more."""
    capacity = catalog.load(row["hardware"]).capacity_bytes
    fits = xla_training.train_step(step(row)).total_bytes <= capacity * (1 - margin)
    assert row["fits"] or not fits


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["id"])
@pytest.mark.parametrize("margin", [0.01, 0.05])
def test_runs_on_record(run: dict[str, Any], margin: float) -> None:
    """No run that failed is called fitting; of those that ran, only the squeezed ones are refused."""
    fits = predicted(run, margin).fits
    assert fits == (run["outcome"] == "fits" and run["id"] not in SAFE_SIDE)


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05, 0.1, 0.2])
def test_boundary_of_the_sweep(margin: float) -> None:
    """Qwen2.5-7B on v4-16 with 2176 tokens: one sequence a device fits, two do not, whatever the margin."""
    four, eight = (predicted(run, margin) for run in RUNS if run["id"].startswith("v4-16-7b-sweep"))
    assert four.fits
    assert not eight.fits
    assert eight.binding_phase.name == "train_step"


def test_rollout_against_a_measured_run() -> None:
    """3B on v6e-8, 16 sequences a device, 512 + 1024 tokens: live arrays alone took 8 840 656 384 bytes."""
    seen = XlaStep(
        model=model("qwen2.5-3b"),
        separate_head=True,
        data_parallel=1,
        shards=8,
        sequences=4,
        tokens=1536,
        accumulates=True,
    )
    peak = xla_training.rollout(seen, sequences=16, prefill_tokens=512, decode_tokens=1024)
    live = peak.total_bytes - peak.logits // 2 - peak.communication_buffers
    assert live == pytest.approx(8_840_656_384, rel=0.02)


def test_rollout_against_the_compiled_prefill() -> None:
    """A prefill program, which holds neither moments nor the decoding cache, needs what is modelled within 10 %."""
    for row in (row for row in rows() if row.get("kind") == "prefill"):
        seen = replace(step(row), optimizer="sgd")
        peak = xla_training.rollout(
            seen, sequences=row["sequences"], prefill_tokens=row["tokens"] - row["new_tokens"], decode_tokens=0
        )
        assert peak.total_bytes == pytest.approx(row["natural_bytes"], rel=0.1)


BASE = XlaStep(model=model("qwen2.5-3b"), separate_head=True, data_parallel=1, shards=8, sequences=2, tokens=1024)


@pytest.mark.parametrize(
    "more",
    [
        {"sequences": 3},
        {"tokens": 1152},
        {"optimizer": "adamw"},
        {"accumulates": True},
        {"reference": True},
        {"shards": 4, "data_parallel": 2},
        {"tensor_parallel": 2},
    ],
    ids=str,
)
def test_more_of_anything_needs_more(more: dict[str, Any]) -> None:
    """More sequences, tokens, moments or copies never need fewer bytes; each need is an int."""
    asked = xla_training.train_step(replace(BASE, **more)).total_bytes
    assert isinstance(asked, int)
    assert asked > xla_training.train_step(BASE).total_bytes


def test_accumulation_costs_one_fp32_copy() -> None:
    """The accumulation buffer is one fp32 array of the size of the parameters, sharded like them."""
    with_buffer = xla_training.state(replace(BASE, accumulates=True))
    assert with_buffer.gradients == with_buffer.weights
    assert with_buffer.gradients / GIB == pytest.approx(3_397_103_616 * 4 / 8 / GIB, abs=0.001)
