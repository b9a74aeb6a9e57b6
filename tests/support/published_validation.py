"""Published measurements beside memfit's predictions: the page docs/validation/published.md (support.validate writes it).

tests/data/published.yaml has what people measured and posted, with addresses, and the settings that a prediction needs. Each
kind of measurement is predicted by the formula that memfit uses for it; nothing is adapted to a row.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hydra_plugins.memfit.base.units import GIB, MIB
from hydra_plugins.memfit.frameworks.transformers.versions import software
from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory import generation
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import Head
from hydra_plugins.memfit.memory.kv_cache import kv_bytes_per_token
from hydra_plugins.memfit.model.resolve import load
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.roles import Role

DATA = Path(__file__).parents[1] / "data" / "published.yaml"
UNITS = {"GiB": GIB, "MiB": MIB, "GB": 10**9}
LARGE = 0.1
"""Errors above this are explained, each row or its group by ``why``."""
HEADS = {
    "torch": Head(log_prob="torch"),
    "autocast_ce": Head(log_prob="autocast_ce"),
    "fused": Head(fused="torch"),
}


@dataclass(frozen=True)
class Measurement:
    """One posted number, its settings, and what memfit predicts for it."""

    group: dict[str, Any]
    row: dict[str, Any]
    predicted_bytes: int

    @property
    def measured_bytes(self) -> float:
        """The posted number in bytes."""
        return float(self.row["posted"] * UNITS[self.group["unit"]])

    @property
    def error(self) -> float:
        """Predicted over measured, minus one."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def complete(self) -> bool:
        """Whether everything that the formula needs was published."""
        return bool(self.group["complete"])

    @property
    def why(self) -> str:
        """What explains a large error."""
        return str(self.row.get("why", self.group.get("why", "")))


@cache
def measurements() -> tuple[Measurement, ...]:
    """Return every posted number beside its prediction."""
    groups = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return tuple(
        Measurement(group, row, KINDS[group["kind"]].predict(group.get("settings", {}) | row, group))
        for group in groups
        for row in group["rows"]
    )


# -- one prediction for each kind ------------------------------------------------------------------------------------
def _generation(s: dict[str, Any], group: dict[str, Any]) -> int:
    call = generation.Call(
        rows=1,
        prompt_tokens=s["prompt_tokens"],
        new_tokens=s["new_tokens"],
        attention="flash_attention_2",
        software=software(group["versions"]["transformers"]),
    )
    return generation.peak(load(s["model"]), call).total_bytes


def _engine(s: dict[str, Any]) -> Engine:
    tokens = s.get("tokens", 8192)
    return Engine(
        model=load(s["model"]),
        share_of=s.get("share_of", "own"),
        fraction=s.get("fraction"),
        tensor_parallel=s["tensor_parallel"],
        max_model_len=tokens,
        max_num_seqs=s.get("sequences", 256),
        max_num_batched_tokens=tokens,
        concurrent_sequences=1,
        tokens_per_sequence=tokens,
        graphs=True,
    )


def _weights(s: dict[str, Any], _: dict[str, Any]) -> int:
    return engines.weight_bytes(_engine(s))


def _kv(s: dict[str, Any], _: dict[str, Any]) -> int:
    return int(s["tokens"] * kv_bytes_per_token(load(s["model"]), tensor_parallel=s["tensor_parallel"]))


def _workspace(s: dict[str, Any], _: dict[str, Any]) -> int:
    return engines.workspace_bytes(_engine(s))


def _pool(s: dict[str, Any], _: dict[str, Any]) -> int:
    capacity = int(s["capacity_gib"] * GIB)
    return engines.pool(_engine(s), capacity=capacity, trainer_at_launch=0).kv_bytes(s["fraction"])


def _training(s: dict[str, Any], _: dict[str, Any]) -> int:
    role = _role(s)
    states = role.loaded(optimizer=True).total_bytes
    return states + max(role.update_pass().total_bytes, role.step().total_bytes)


def _role(s: dict[str, Any]) -> Role:
    model = _untied(load(s["model"])) if s.get("unties") else load(s["model"])
    adapters = _query_value_adapters(model, s["lora_rank"])
    return Role(
        model=model,
        sharding=_sharding(model, s),
        trainable_parameters=adapters or model.parameters,
        master_bytes=2 if s["states"] == "bf16" else 4,
        step_copy=s.get("step_copy", True),
        checkpointing=s["checkpointing"],
        update_head=HEADS[s["head"]],
        forward_tokens=s["tokens"],
        update_tokens=s["tokens"],
        accumulates=s["accumulates"],
    )


def _sharding(model: ModelSpec, s: dict[str, Any]) -> Sharding:
    if "fsdp" in s:
        return Sharding.of(model, version=s["fsdp"], ranks=s["ranks"])
    return Sharding(  # one GPU without FSDP: nothing is gathered, cast or reduced
        version=1,
        ranks=1,
        layer=0,
        root=0,
        embedding=0,
        layers=model.num_hidden_layers,
        tied=model.tie_word_embeddings,
        trainable=not s["lora_rank"],
    )


def _query_value_adapters(model: ModelSpec, rank: int) -> int:
    query, value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    return rank * model.num_hidden_layers * (2 * model.hidden_size + query + value)


def _untied(model: ModelSpec) -> ModelSpec:
    """Return the model as a program holds it that gives the head a matrix of its own."""
    return replace(model, parameters=model.parameters + model.embedding_parameters, tie_word_embeddings=False)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of measurement: its title on the page, what describes a row, and its formula."""

    title: str
    text: str
    shown: tuple[str, ...]
    predict: Callable[[dict[str, Any], dict[str, Any]], int]


KINDS = {
    "generation": Kind(
        title="Hugging Face generation",
        text="`torch.cuda.max_memory_allocated` of one `generate`, by a script that is published beside the table.",
        shown=("prompt_tokens",),
        predict=_generation,
    ),
    "weights": Kind(
        title="Weights of an engine",
        text="What the engine says that loading the model took, on one rank.",
        shown=("tensor_parallel",),
        predict=_weights,
    ),
    "kv": Kind(
        title="Keys and values",
        text="The size of a KV pool beside the tokens that it holds, on one rank.",
        shown=("tensor_parallel", "tokens"),
        predict=_kv,
    ),
    "workspace": Kind(
        title="Profile run of an engine",
        text="Peak of the forward pass and the sampler that vLLM runs before it sizes its cache.",
        shown=("tensor_parallel", "tokens", "sequences"),
        predict=_workspace,
    ),
    "pool": Kind(
        title="What an engine's share leaves for keys and values",
        text="The pool that vLLM gives itself, of a share of the GPU. The largest of what the vLLM 0.11.0 page posts outside torch "
        "(0.14 GiB, at tensor parallel 2 0.55 GiB) is memfit's constant, so that this part of its rows is no test.",
        shown=("tensor_parallel",),
        predict=_pool,
    ),
    "training": Kind(
        title="Training steps",
        text="`torch.cuda.max_memory_allocated` of whole steps, by trainers that memfit has no adapter for. The formulas "
        "are those of the layers of transformers; LitGPT's and torchtune's are their own.",
        shown=("tokens", "checkpointing"),
        predict=_training,
    ),
}


# -- the page ----------------------------------------------------------------------------------------------------------
def errors(kind: str, *, complete: bool) -> list[float]:
    """Return the errors of one kind, of the complete rows or of the others."""
    return [m.error for m in measurements() if m.group["kind"] == kind and m.complete == complete]


def page() -> str:
    """Return docs/validation/published.md."""
    return "\n".join([*_introduction(), *(line for kind in KINDS for line in _section(kind))]) + "\n"


def _introduction() -> Iterator[str]:
    sources = {m.group["source"] for m in measurements()}
    yield from (
        "# Published measurements",
        "",
        "Written by `python -m support.validate --write` from `tests/data/published.yaml`. "
        f"{len(measurements())} numbers that others measured on GPUs and published, at {len(sources)} addresses (read on "
        "2026-11-21), beside what memfit predicts for the same settings. None is this project's own. One constant was taken from "
        "them: what of a vLLM process lies outside torch when it is profiled (below, under the pool). No other was, and no formula "
        "was fitted to them. [areal.md](areal.md) and [megatron.md](megatron.md) have a few more.",
        "",
        "*Complete*: everything that the formula needs was published; `make validate` holds these. Errors are predicted "
        f"over measured, minus one; one of more than {LARGE:.0%} is explained.",
        "",
        "| kind | rows | median of the absolute error | lowest | highest | incomplete rows | their median |",
        "|---|---|---|---|---|---|---|",
    )
    for kind in KINDS:
        yield _summary(kind)
    yield ""


def _summary(kind: str) -> str:
    found, others = errors(kind, complete=True), errors(kind, complete=False)
    figures = f"{_median(found):.2%} | {min(found):+.2%} | {max(found):+.2%}"
    rest = f"{len(others)} | {_median(others):.2%}" if others else "0 | "
    return f"| {KINDS[kind].title} | {len(found)} | {figures} | {rest} |"


def _median(found: list[float]) -> float:
    return statistics.median(map(abs, found))


def _section(kind: str) -> Iterator[str]:
    shape = KINDS[kind]
    yield from (f"## {shape.title}", "", shape.text, "")
    found = [m for m in measurements() if m.group["kind"] == kind]
    for _, group in itertools.groupby(found, key=lambda m: id(m.group)):
        yield from _group(list(group), shape)


def _group(found: list[Measurement], shape: Kind) -> Iterator[str]:
    group = found[0].group
    versions = "".join(f", {name} {version}" for name, version in group.get("versions", {}).items())
    unknown = f" Not known: {group['unknown']}." if "unknown" in group else ""
    heads = " | ".join(name.replace("_", " ") for name in shape.shown)
    yield from (f"[{group['what']}]({group['source']}); {group['hardware']}{versions}.{unknown}", "")
    yield f"| model | {heads} | measured | predicted | error | |"
    yield "|---" * (5 + len(shape.shown)) + "|"
    yield from (_row(m, shape) for m in found)
    yield ""


def _row(m: Measurement, shape: Kind) -> str:
    settings = m.group.get("settings", {}) | m.row
    values = " | ".join(str(settings[name]) for name in shape.shown)
    sizes = f"{m.measured_bytes / GIB:.2f} GiB | {m.predicted_bytes / GIB:.2f} GiB | {m.error:+.1%}"
    notes = "; ".join(part for part in (m.row.get("note", ""), m.why if abs(m.error) > LARGE else "") if part)
    return f"| {m.row['model']} | {values} | {sizes} | {notes} |"
