"""The survey of compiled GRPO steps in tests/data/tpu_verdicts.json, and how it is made.

    python tests/support/tpu_survey.py               compile the rows that have no verdict of this compiler yet
    python tests/support/tpu_survey.py ROW_ID ...    compile these rows again

A row takes 1-5 minutes and 2-4 GB; one runs at a time. Needs jax and libtpu (``pip install 'memfit[tpu]'``), no TPU.
"""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.exact.slices import slice_of
from hydra_plugins.memfit.exact.spec import Architecture, Program
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.memory.xla_training import XlaStep

DATA = Path(__file__).resolve().parents[1] / "data" / "tpu_verdicts.json"
_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def rows() -> list[dict[str, Any]]:
    """Return the rows of the survey; one without ``natural_bytes`` waits for its compile."""
    content: list[dict[str, Any]] = json.loads(DATA.read_text())["rows"]
    return content


def step(row: dict[str, Any]) -> XlaStep:
    """Return the closed form's view of a row."""
    from support.tpu_models import model

    dp, fsdp, tp = row["mesh"]
    return XlaStep(
        model=model(row["model"]),
        separate_head=True,
        data_parallel=dp,
        shards=fsdp * tp,
        sequences=row["sequences"],
        tokens=row["tokens"],
        optimizer=row.get("optimizer", "lion"),
        accumulates=row.get("accumulates", False),
        remat=row.get("remat", "dots_with_no_batch_dims"),
    )


def program(row: dict[str, Any]) -> Program:
    """Return what is compiled for a row."""
    seen = step(row)
    spec, dp, fsdp, tp = seen.model, *row["mesh"]
    return Program(
        kind=row.get("kind", "train_step"),
        slice=slice_of(catalog.load(row["hardware"]), dp * fsdp * tp),
        mesh=(dp, fsdp, tp),
        architecture=Architecture(
            **{name: getattr(spec, name) for name in (*_SHAPE, "num_key_value_heads", "head_dim")}, tied=False
        ),
        sequences_per_device=seen.sequences,
        tokens=seen.tokens,
        new_tokens=row.get("new_tokens", 0),
        optimizer=seen.optimizer,
        accumulate=seen.accumulates,
        remat=seen.remat,
    )


def main(wanted: list[str]) -> None:
    """Compile, and write each verdict down as soon as it is there."""
    from hydra_plugins.memfit.exact import compiler

    content = json.loads(DATA.read_text())
    for row in content["rows"]:
        if row["id"] in wanted or (not wanted and "natural_bytes" not in row):
            verdict = asdict(compiler.ask(program(row)))
            found = {
                name: verdict[name] for name in ("fits", "used_bytes", "natural_bytes", "argument_bytes", "compiler")
            }
            row |= found | {"date": datetime.date.today().isoformat()}
            DATA.write_text(json.dumps(content, indent=1) + "\n")
            print(row["id"], found, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(sys.argv[1:])
