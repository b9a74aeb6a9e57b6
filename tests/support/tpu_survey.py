"""The survey of compiled GRPO steps in tests/data/tpu_verdicts.json, and how it is made.

    python tests/support/tpu_survey.py               compile the rows that have no verdict of this compiler yet
    python tests/support/tpu_survey.py ROW_ID ...    compile these rows again

A row takes 1-5 minutes and 2-4 GB; one runs at a time. Needs jax and libtpu (``pip install '.[tpu]'``), no TPU.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.exact.slices import slice_of
from hydra_plugins.memfit.exact.spec import Architecture, Program
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.memory import xla_training
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
        tensor_parallel=tp,
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


def table() -> str:
    """Return the survey as the table of docs/tpu.md."""
    lines = ["| slice | model | b x tokens | | memfit | compiler | error | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows():
        if row.get("kind", "train_step") != "train_step" or "natural_bytes" not in row:
            continue
        ours = xla_training.train_step(step(row)).total_bytes
        more = [row[name] for name in ("optimizer", "remat") if name in row]
        more += ["accumulates"] * row.get("accumulates", False)
        more += [f"mesh {','.join(map(str, row['mesh']))}"] * (row["mesh"][0] > 1 or row["mesh"][2] > 1)
        verdict = "" if row["fits"] else "refused, "
        lines.append(
            f"| {row['hardware']} | {row['model']} | {row['sequences']} x {row['tokens']} | {', '.join(more)} "
            f"| {ours / GIB:.2f} | {row['natural_bytes'] / GIB:.2f} | {ours / row['natural_bytes'] - 1:+.1%} "
            f"| {verdict}{row['split']} |"
        )
    checked = [row for row in rows() if row["split"] == "check" and row.get("kind", "train_step") == "train_step"]
    errors = [abs(xla_training.train_step(step(row)).total_bytes / row["natural_bytes"] - 1) for row in checked]
    said = f"Median error of the {len(errors)} rows marked *check*: {statistics.median(errors):.1%}"
    return "\n".join([*lines, "", f"{said} ({rows()[0]['compiler']}, {rows()[-1]['date']}).", ""])


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
