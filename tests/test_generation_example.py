"""examples/rft_dataset, end to end: a real model is sampled, in the chunks that memfit planned."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.frameworks.transformers.adapter import TransformersAdapter
from hydra_plugins.memfit.hardware.catalog import load
from hydra_plugins.memfit.model.resolve import resolve_model
from hydra_plugins.memfit.planning.context import Context

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "rft_dataset"
GENERATION = {"num_questions": 6, "num_return_sequences": 15, "max_prompt_length": 8, "max_new_tokens": 120}


def _run(tmp_path: Path, *words: str) -> tuple[str, list[dict[str, str]]]:
    """Run the app as a user does; return what it said and the data set."""
    output = tmp_path / "rft.jsonl"
    command = [
        sys.executable,
        "app.py",
        f"output={output}",
        f"hydra.run.dir={tmp_path / 'run'}",
        "model.practice_steps=150",
        f"generation.num_questions={GENERATION['num_questions']}",
        *words,
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=EXAMPLE, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, [json.loads(line) for line in output.read_text().splitlines()]


def _held(micro_batch_size: int, chunk_size: int) -> int:
    """Bytes that strangers must hold on an A40 for exactly these chunks to fit."""
    context = Context(
        hardware=load("a40"),
        settings=Settings(),
        resolve_model=lambda path: resolve_model(path, environ=os.environ),
    )
    config = {
        "model": {"path": str(EXAMPLE / "tiny"), "dtype": "float32"},
        "generation": {
            **GENERATION,
            "micro_batch_size": micro_batch_size,
            "chunk_size": chunk_size,
            "top_k": 0,
        },
    }
    phase = TransformersAdapter().problem(config, context).estimate({}).phases[0]
    return phase.budget_bytes - phase.peak_bytes


@pytest.mark.verl
def test_data_set_is_the_same_in_the_planned_chunks(tmp_path: Path) -> None:
    """Without memfit all at once; with other processes on the GPU one question and five answers at once: one data set."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    said, whole = _run(tmp_path / "whole")
    planned, parts = _run(tmp_path / "parts", "+hardware=a40", f"+memfit.hardware.held_bytes={_held(1, 5)}")

    assert "90 answers to 6 questions, None questions and None answers at once" in said
    assert "90 answers to 6 questions, 1 questions and 5 answers at once" in planned
    assert parts == whole
    assert whole
    for row in whole:
        a, b = map(int, re.fullmatch(r"(\d)\+(\d)=", row["question"]).groups())  # type: ignore[union-attr]
        assert int(row["answer"]) == a + b
