"""memfit's trainer formulas against the op-level traces: the page docs/validation/trainer.md (support.validate writes it).

The traces are tests/data/traces.json (docs/validation/tracer.md says how they are made). The split into ``fit`` and
``held_out`` is a random half by a fixed seed. The formulas came from reading the source and were corrected where either half
showed a term that had been forgotten, so the split says how even the figures are, not how they generalise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import Head
from hydra_plugins.memfit.memory.states import lora_parameters
from hydra_plugins.memfit.model.config_json import spec_from_config
from hydra_plugins.memfit.model.resolve import load
from hydra_plugins.memfit.model.spec import ModelSpec, value_model
from hydra_plugins.memfit.planning.colocated import Role
from tracer.models import SHAPES

ROOT = Path(__file__).resolve().parents[2]
TRACES = ROOT / "tests" / "data" / "traces.json"
NAMES = {"mistral-7b": "mistral-7b-v0.1"}
"""The tracer's names of checkpoints that have several releases of one shape."""
FORWARD = {"actor": "log_prob", "ref": "ref_log_prob", "critic": "values"}
"""What the tracer calls the pass without gradients of each role."""
MASTER = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Comparison:
    """One phase of one traced case."""

    case: dict[str, Any]
    split: str
    phase: str
    traced_bytes: int
    predicted_bytes: int

    @property
    def error(self) -> float:
        """Predicted over traced, minus one."""
        return self.predicted_bytes / self.traced_bytes - 1


def rows() -> list[dict[str, Any]]:
    """Return the traced rows."""
    data: list[dict[str, Any]] = json.loads(TRACES.read_text(encoding="utf-8"))["rows"]
    return data


def comparisons(split: str | None = None) -> Iterator[Comparison]:
    """Yield every phase of every row (of one split), predicted and traced."""
    for row in rows():
        if split is None or row["split"] == split:
            predicted = predict(row["case"])
            for phase, traced in row["phases"].items():
                yield Comparison(row["case"], row["split"], phase, traced["peak_allocated_bytes"], predicted[phase])


def predict(case: dict[str, Any]) -> dict[str, int]:
    """Return the predicted peak of each phase, in bytes allocated by tensors of one rank."""
    role = role_of(case)
    trains = case["role"] != "ref"
    states = role.loaded(optimizer=trains).total_bytes
    predicted = {FORWARD[case["role"]]: states + role.forward_pass().total_bytes}
    if trains:
        predicted["update"] = states + role.update_pass().total_bytes
        predicted["optimizer_step"] = states + role.step().total_bytes
    return predicted


def role_of(case: dict[str, Any]) -> Role:
    """Return the role that a traced case describes."""
    model = _spec(case["model"])
    if case["role"] == "critic":
        model = value_model(model)
    trainable = _trainable(case, model)
    tokens = case["tokens"] // case["ulysses"]
    return Role(
        model=model,
        sharding=_sharding(case, model),
        trainable_parameters=trainable,
        master_bytes=MASTER[case["master_dtype"]],
        checkpointing=case["checkpointing"],
        forward_head=_head(case, entropy=case["log_prob_entropy"] and case["role"] == "actor"),
        update_head=_head(case, entropy=case["update_entropy"]),
        forward_tokens=tokens,
        update_tokens=tokens,
        sequence_parallel=case["ulysses"],
        forward_image_tokens=case.get("image_tokens", 0),
        update_image_tokens=case.get("image_tokens", 0),
        trains_vision=case["strategy"] == "fsdp" or not case.get("frozen_vision", False),
        accumulates=case["micro_batches"] > 1,
        moved_output=case["padded"] or case["ulysses"] > 1,
        unsharded_gradients=case["no_sync"],
    )


def _spec(name: str) -> ModelSpec:
    """The checkpoint's facts, or the tracer's own where it has a part of a checkpoint."""
    if name.endswith("-text"):
        return spec_from_config(SHAPES[name], name=name, source="tests/tracer/models.py")
    return load(NAMES.get(name, name))


def _trainable(case: dict[str, Any], model: ModelSpec) -> int:
    if case["role"] == "ref":
        return 0
    rank = case["lora_rank"]
    frozen = _frozen(model, case["strategy"]) if model.vision and case.get("frozen_vision") else 0
    sites = (*model.lora_sites, *(model.vision.lora_sites if model.vision else ()))
    return lora_parameters(sites=sites, rank=rank) if rank else model.parameters - frozen


def _frozen(model: ModelSpec, strategy: str) -> int:
    """Parameters of a frozen tower without gradients: under FSDP1 those of its blocks, under FSDP2 all."""
    assert model.vision is not None
    blocks = model.vision.num_layers * model.vision.layer_parameters
    return blocks if strategy == "fsdp" else model.vision_parameters


def _sharding(case: dict[str, Any], model: ModelSpec) -> Sharding:
    sharding = Sharding.of(
        model,
        version=2 if case["strategy"] == "fsdp2" else 1,
        ranks=case["ranks"],
        trainable=not case["lora_rank"],
        vocabulary_head=case["role"] != "critic",
    )
    return replace(sharding, reshard_after_forward=case["reshard_after_forward"])


def _head(case: dict[str, Any], *, entropy: bool) -> Head:
    kind = "eager" if case["padded"] else case["entropy"]  # verl computes the entropy of padded batches eagerly
    return Head(
        entropy=kind if entropy else "none",
        entropy_checkpointing=case["entropy_checkpointing"],
        chunk_tokens=case["entropy_chunk"],
        log_prob="flash_ce" if case["log_prob"] == "flash_ce" else "torch",
        fused=case["fused"],
        scaled="no" if case["temperature"] == 1.0 else "copy",
        extra_copies=int(case["padded"]),
        vocabulary=case["role"] != "critic",
    )


def summary(found: list[Comparison]) -> dict[str, float]:
    """Return the number of phases, the median and the worst error, and the lowest one, as fractions."""
    errors = sorted(abs(c.error) for c in found)
    return {
        "phases": len(errors),
        "median": statistics.median(errors),
        "p95": errors[int(0.95 * (len(errors) - 1))],
        "worst": errors[-1],
        "lowest": min(c.error for c in found),
        "highest": max(c.error for c in found),
    }


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "model states": ("full fine-tuning, optimizer step", lambda case: not case["lora_rank"]),
    "LoRA": ("adapters alone have gradients", lambda case: bool(case["lora_rank"])),
    "layers, checkpointed": ("", lambda case: case["checkpointing"]),
    "layers, all kept": ("", lambda case: not case["checkpointing"]),
    "experts": ("", lambda case: "a3b" in case["model"]),
    "linear attention": ("gated delta nets", lambda case: case["model"].startswith(("qwen3-next", "qwen3.5"))),
    "latent attention": ("", lambda case: case["model"].startswith("moonlight")),
    "images": ("", lambda case: bool(case.get("image_tokens"))),
    "gpt-oss": ("", lambda case: case["model"].startswith("gpt-oss")),
    "loss head, entropy trained": ("", lambda case: case["update_entropy"]),
    "loss head, fused": ("", lambda case: case["fused"] != "none"),
    "padded batch": ("", lambda case: case["padded"]),
    "Ulysses": ("", lambda case: case["ulysses"] > 1),
    "critic": ("", lambda case: case["role"] == "critic"),
    "FSDP1": ("", lambda case: case["strategy"] == "fsdp"),
    "FSDP2": ("", lambda case: case["strategy"] == "fsdp2"),
}
"""What the terms of docs/memory-model.md are seen in: a remark, and which traced cases have it."""


def error_bars() -> str:
    """Return the table of docs/memory-model.md: how far the cases that have a part of the model are from their traces."""
    found = list(comparisons())
    lines = ["| cases with | phases | median | p95 | lowest | highest |", "|---|---|---|---|---|---|"]
    for part, (remark, has) in PARTS.items():
        step = "optimizer step" in remark
        s = summary([c for c in found if has(c.case) and (not step or c.phase == "optimizer_step")])
        figures = " | ".join(f"{100 * s[k]:+.2f} %" for k in ("median", "p95", "lowest", "highest"))
        lines.append(f"| {part}{f' ({remark})' if remark else ''} | {s['phases']} | {figures} |")
    return "\n".join(lines) + "\n"


def table() -> str:
    """Return the page: the figures by split and phase, then the cases with the largest errors."""
    found = list(comparisons())
    versions = rows()[0]["versions"]
    lines = [
        "# Trainer phases against op-level traces",
        "",
        "Written by `python -m support.validate --write` from `tests/data/traces.json`; "
        f"traced with {', '.join(f'{k} {v}' for k, v in versions.items())} on {rows()[0]['date']}, CPU, no GPU. What a trace "
        "is, and what it cannot see: [tracer.md](tracer.md). Errors are predicted over traced peak, minus one.",
        "",
        "The rows are split into random halves by a fixed seed. The formulas come from reading the source; where either half "
        "showed a forgotten term it was added, so the split says how even the figures are, not how they generalise.",
        "",
        "| rows | phase | n | median | p95 | worst | lowest | highest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for split in ("fit", "held_out", None):
        for phase in ("log_prob", "ref_log_prob", "values", "update", "optimizer_step", None):
            chosen = [c for c in found if split in (None, c.split) and phase in (None, c.phase)]
            if chosen:
                s = summary(chosen)
                figures = " | ".join(f"{100 * s[k]:+.2f} %" for k in ("median", "p95", "worst", "lowest", "highest"))
                lines.append(f"| {split or 'all'} | {phase or 'all'} | {s['phases']:.0f} | {figures} |")
    lines += ["", "The largest errors:", "", "| error | phase | case | traced | predicted |", "|---|---|---|---|---|"]
    for c in sorted(found, key=lambda c: -abs(c.error))[:20]:
        lines.append(
            f"| {100 * c.error:+.2f} % | {c.phase} | {_named(c.case)} | {c.traced_bytes / 2**30:.2f} GiB "
            f"| {c.predicted_bytes / 2**30:.2f} GiB |"
        )
    return "\n".join(lines) + "\n"


def _named(case: dict[str, Any]) -> str:
    """The model and what is not usual about the case."""
    usual = {
        "role": "actor", "padded": False, "ulysses": 1, "sequences": 1, "reshard_after_forward": True, "no_sync": False,
        "checkpointing": True, "master_dtype": "fp32", "compute_dtype": "bf16", "lora_rank": 0, "temperature": 1.0,
        "log_prob": "flash_ce", "entropy": "compiled", "update_entropy": False, "log_prob_entropy": True, "kl_loss": False,
        "entropy_chunk": 2048, "entropy_checkpointing": False, "fused": "none", "micro_batches": 1, "model": None,
        "image_tokens": 0, "frozen_vision": False,
    }  # fmt: skip
    special = [f"{k}={v}" for k, v in case.items() if k in usual and v != usual[k] and k != "model"]
    return f"{case['model']} {case['strategy']} x{case['ranks']} {case['tokens']} tokens " + " ".join(special)
