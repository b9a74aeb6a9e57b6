"""The TPU compiler itself, ahead of time on CPU: its limits, its verdicts, and memfit's door to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.exact import assignment, compiler, verdicts
from hydra_plugins.memfit.exact.slices import slice_of
from hydra_plugins.memfit.exact.spec import Architecture, Program, from_json
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.memory import xla_training
from support.tpu_survey import program, rows, step

ROOT = Path(__file__).resolve().parents[1]
SLICES = tuple(name for name in catalog.names() if catalog.load(name).kind == "tpu")
SMALL = Architecture(
    vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=128,
)  # fmt: skip
AGAIN = ("v6e-8-1.5b-1x1536", "v4-8-7b-1x640")
"""Rows of the survey that compile quickly enough to be compiled again."""


def small(hardware: str, **more: Any) -> Program:
    """Return a program that compiles in seconds."""
    facts = catalog.load(hardware)
    devices = (facts.gpus_per_node or 1) * (facts.nodes or 1)
    given: dict[str, Any] = {"kind": "train_step", "mesh": (1, devices, 1), "sequences_per_device": 1, "tokens": 256}
    return Program(slice=slice_of(facts, devices), architecture=SMALL, **given | more)


def test_program_survives_json() -> None:
    """What is sent to the child process is what was asked for."""
    asked = small("v4-16", mesh=(2, 4, 1), accumulate=True)
    assert from_json(asked.as_json()) == asked


def test_assignment_counts_hbm_only() -> None:
    """Arguments, temporaries and the rest of HBM are summed; other memories and thread-local scratch are not."""
    dump = [
        "BufferAssignment:\n",
        "allocation 0: size 100, parameter 1, shape |f32[25]| at ShapeIndex {}, maybe-live-out:\n",
        "allocation 1: size 40, preallocated-temp:\n",
        "allocation 2: size 7, output shape is |f32[1]|, maybe-live-out:\n",
        "allocation 3: size 999, color 3, preallocated-temp:\n",
        "allocation 4: size 999, thread-local:\n",
        " value: <1 x @0> (size=40,offset=0): f32[10]\n",
    ]
    assert assignment.read(dump) is None, "still being written"
    found = assignment.read([*dump, "Total bytes used: 2145 (2.1KiB)\n"])
    assert found is not None
    assert (found.argument_bytes, found.temp_bytes, found.other_bytes, found.used_bytes) == (100, 40, 7, 147)


def test_refusal_is_read_from_the_message() -> None:
    """An out-of-memory message gives its numbers; another error gives none."""
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 30.77G of 30.75G hbm. Exceeded hbm capacity by 26.68M."
    )
    found = assignment.refusal(text)
    assert found is not None
    assert found["capacity_bytes"] == int(30.75 * 2**30)
    assert found["excess_bytes"] == int(26.68 * 2**20)
    assert assignment.refusal("INTERNAL: something else") is None


def test_missing_compiler_is_said_with_the_extra(tmp_path: Path) -> None:
    """Without jax and libtpu the question ends with the command that installs them, exit 2, no traceback."""
    if any((Path(p) / "libtpu").is_dir() for p in sys.path):
        pytest.skip("libtpu is installed here")
    done = check("--compile", cache=tmp_path)
    assert done.returncode == 2
    assert "pip install '.[tpu]'" in done.stderr
    assert "Traceback" not in done.stderr


def check(*words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run ``memfit check`` on a launch that the closed form can judge, 0.5B on v6e-4."""
    launch = ["rollout.batch_size=1", "rollout.n=4", "rollout.global_length=128", "rollout.max_length_sample=128",
              "train.micro_batch_size_per_device=1", "model_path=Qwen/Qwen2.5-0.5B-Instruct"]  # fmt: skip
    command = [sys.executable, "-m", "hydra_plugins.memfit.cli.main", "check", "--framework", "mllm-jax"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MEMFIT_TPU_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, "--hardware", "v6e-4", "--json", *words, *launch],
        capture_output=True, text=True, env=environ, timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.tpu
@pytest.mark.parametrize("name", SLICES)
def test_compiler_names_the_limit_of_conf(name: str) -> None:
    """Each slice of conf/hardware is one that libtpu can describe, and its capacity is the limit that XLA prints."""
    verdict = compiler.ask(small(name, kind="probe"))
    assert not verdict.fits
    assert abs(verdict.capacity_bytes - catalog.load(name).capacity_bytes) < 2**24


@pytest.mark.tpu
@pytest.mark.parametrize(
    "more",
    [
        {"accumulate": True, "optimizer": "adamw"},
        {"optimizer": "sgd", "remat": "nothing_saveable"},
        {"remat": "layer"},
        {"mesh": (2, 4, 1)},
        {"mesh": (1, 4, 2)},
        {"kind": "prefill", "new_tokens": 128},
        {"kind": "decode", "new_tokens": 128},
    ],
    ids=str,
)
def test_every_kind_of_program_compiles(more: dict[str, Any]) -> None:
    """Each optimizer, checkpointing, mesh and rollout program gets a verdict on v4-16."""
    verdict = compiler.ask(small("v4-16", **more))
    assert verdict.fits
    assert 0 < verdict.argument_bytes < verdict.used_bytes < verdict.capacity_bytes


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("name", AGAIN)
def test_survey_is_reproduced(name: str) -> None:
    """A row of the survey compiles to the stored number, and the closed form is within 10 % of it."""
    row = next(row for row in rows() if row["id"] == name)
    verdict = compiler.ask(program(row))
    assert verdict.fits == row["fits"]
    assert verdict.natural_bytes == pytest.approx(row["natural_bytes"], rel=0.01)
    assert xla_training.train_step(step(row)).total_bytes == pytest.approx(verdict.natural_bytes, rel=0.1)


@pytest.mark.tpu
def test_check_compile_asks_once_and_remembers(tmp_path: Path) -> None:
    """`memfit check --compile` shows progress, gives the compiler's number, and takes it from its cache the next time."""
    first, second = check("--compile", cache=tmp_path), check("memfit.exact=true", cache=tmp_path)
    assert first.returncode == second.returncode == 0, first.stderr
    assert "asking the TPU compiler" in first.stderr
    assert "asking the TPU compiler" not in second.stderr
    stored = json.loads(next(tmp_path.glob("*.json")).read_text())["verdict"]
    phase = next(p for p in json.loads(first.stdout)["phases"] if p["name"] == "train_step")
    assert phase["peak_bytes"] == pytest.approx(stored["used_bytes"], rel=0.001)
    assert first.stdout == second.stdout
    assert any("the compiler (jax" in warning for warning in json.loads(first.stdout)["warnings"])


@pytest.mark.tpu
def test_broken_cache_is_asked_again(tmp_path: Path) -> None:
    """A file of the cache that cannot be read costs a compile, and nothing else."""
    asked = small("v4-8")
    path = tmp_path / f"{asked.digest(compiler.versions())}.json"
    path.write_text("{")
    verdict = verdicts.ask(asked, environ={"MEMFIT_TPU_CACHE": str(tmp_path)})
    assert verdict.fits
    assert json.loads(path.read_text())["verdict"]["used_bytes"] == verdict.used_bytes


@pytest.mark.tpu
def test_timeout_ends_the_child() -> None:
    """A compile that runs too long is ended with everything it started, and said."""
    with pytest.raises(compiler.CompileFailed, match="no verdict"):
        compiler.ask(small("v4-8"), timeout_s=0.5)
