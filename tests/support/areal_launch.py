"""AReaL launches on the console command, and its example configs in the shape of each era."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hydra_plugins.memfit.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
GIB = 1 << 30
SEED: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(DATA / "areal_seed.yaml"))  # type: ignore[assignment]


def cases() -> list[dict[str, Any]]:
    """Return the public runs."""
    rows: list[dict[str, Any]] = json.loads((DATA / "areal_cases.json").read_text(encoding="utf-8"))["rows"]
    return rows


def words(values: Mapping[str, Any]) -> list[str]:
    """Return ``key=value`` words that Hydra's grammar reads back as ``values``."""
    return [f"{key}={_word(value)}" for key, value in values.items()]


def _word(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"'{value}'" if isinstance(value, str) else str(value)


def memfit(
    command: str, hardware: str, values: Mapping[str, Any], options: Sequence[str] = ()
) -> tuple[int, dict[str, Any], str]:
    """Return (exit status, JSON answer or nothing, stderr) of ``memfit COMMAND --framework areal``."""
    out, err = io.StringIO(), io.StringIO()
    argv = [command, "--framework", "areal", "--hardware", hardware, "--json", *options, *words(values)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    return status, json.loads(out.getvalue() or "{}"), err.getvalue()


def of_seed(command: str, changes: Mapping[str, Any] | None = None, options: Sequence[str] = ()) -> dict[str, Any]:
    """Return the answer for the launch that died, with some values changed."""
    values = {**SEED["requested"], **(changes or {})}
    _, answer, err = memfit(command, SEED["hardware"], values, ["--model", SEED["model"], *options])
    assert answer, err
    return answer


def of_case(case: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return (answer or nothing, stderr) for a public run as published."""
    values = {**case["config"], "memfit.hardware.capacity_bytes": int(case["capacity_gib"] * GIB)}
    options = ["--framework-version", case["version"]] if case["version"] else []
    _, answer, err = memfit("check", case["hardware"], values, options)
    return answer, err


def phase(answer: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """Return one phase, by default the one that decides."""
    wanted = name or answer["binding_phase"]
    found: dict[str, Any] = next(p for p in answer["phases"] if p["name"] == wanted)
    return found


def planned(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return key -> value of the changes."""
    return {change["key"]: change["to"] for change in answer["changes"]}


MODEL = "Qwen/Qwen2.5-1.5B-Instruct"


def grpo(**changes: Any) -> dict[str, Any]:
    """Return the values of a GRPO launch that are the same in every era, with some changed (``__`` stands for a dot)."""
    values = {
        "actor.path": MODEL,
        "actor.gradient_checkpointing": True,
        "actor.mb_spec.max_tokens_per_mb": 10240,
        "actor.kl_ctl": 0.0,
        "actor.recompute_logprob": True,
        "gconfig.n_samples": 4,
        "gconfig.max_new_tokens": 1024,
        "rollout.max_concurrent_rollouts": 256,
        "sglang.mem_fraction_static": 0.8,
        "train_dataset.batch_size": 256,
        "train_dataset.max_length": 1024,
        "cluster.n_nodes": 1,
        "cluster.n_gpus_per_node": 8,
    }
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**values, **given}.items() if value is not None}
