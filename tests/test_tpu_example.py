"""The JAX runner of examples/: it trains on CPU, and its training does not change when memfit splits its batches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.tpu


def train(folder: Path, *words: str) -> str:
    """Run the example on CPU and return what it prints."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "train.py", *words, f"hydra.run.dir={folder}"],
        cwd=ROOT / "examples/jax_runner", env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    """Return the loss of each step."""
    return [float(value) for value in re.findall(r"loss ([\d.]+)", text)]


def test_example_learns_with_and_without_memfit(tmp_path: Path) -> None:
    """The example runs alone, and with +hardware= on top, with the same losses."""
    alone = losses(train(tmp_path, "train.steps=6"))
    planned = losses(train(tmp_path, "train.steps=6", "+hardware=v4-16", "memfit.framework=jax"))
    assert alone == planned
    assert alone[-1] < alone[0]


def test_split_batches_train_the_same(tmp_path: Path) -> None:
    """What memfit turns, micro-batch down and accumulation up, changes no loss beyond rounding."""
    whole = losses(train(tmp_path, "train.steps=6"))
    parts = losses(train(tmp_path, "train.steps=6", "train.per_device_batch=1", "train.accumulate=4"))
    assert parts == pytest.approx(whole, rel=1e-3)


def test_launch_for_a_slice_is_planned(tmp_path: Path) -> None:
    """A 7B run of the same app on v4-16 composes with a smaller micro-batch and as many more accumulation steps."""
    shown = train(
        tmp_path, "--cfg", "job", "model.path=Qwen/Qwen2.5-7B-Instruct", "train.per_device_batch=8",
        "train.max_length=2048", "+hardware=v4-16", "memfit.framework=jax",
    )  # fmt: skip
    found = {name: int(value) for name, value in re.findall(r"(per_device_batch|accumulate): (\d+)", shown)}
    assert found["per_device_batch"] < 8
    assert found["per_device_batch"] * found["accumulate"] == 8
    assert "memfit" not in shown
