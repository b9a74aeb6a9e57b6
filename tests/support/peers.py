"""Published estimators on the cases that memfit is judged by: ``PYTHONPATH=tests python -m support.peers`` runs them all.

Run from the top of the repository, in an environment with torch, transformers, accelerate and deepspeed (``tests/tiers.sh``
calls it ``peers``); no GPU. A row of tests/data/peers.json is one estimator's answer for one traced training step: bytes on
one rank, seconds, its version. ``python -m support.peers NAME ...`` runs the named ones alone and keeps the other rows.
Each is asked for what it can be asked for; what it leaves out stands in `PEERS`.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.model.resolve import load
from support.trainer_validation import predict

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "tests" / "data" / "peers.json"
TRACES = ROOT / "tests" / "data" / "traces.json"
TRACED = (
    {"model": "qwen2.5-0.5b", "ranks": 1, "tokens": 4096, "checkpointing": True},
    {"model": "qwen2.5-3b", "ranks": 4, "tokens": 16384, "checkpointing": True},
    {"model": "qwen2.5-7b", "ranks": 8, "tokens": 16384, "checkpointing": True},
    {"model": "llama-3.1-8b", "ranks": 8, "tokens": 8192, "checkpointing": True},
    {"model": "qwen2.5-1.5b", "ranks": 4, "tokens": 4096, "checkpointing": False},
    {"model": "qwen3-30b-a3b", "ranks": 8, "tokens": 16384, "checkpointing": True},
)
"""Full fine-tuning with FSDP2 and Adam, fp32 states, bf16 compute, one packed row of ``tokens``: what every peer can be asked."""
_SLOW = 20.0
_USUAL = {"role": "actor", "strategy": "fsdp2", "master_dtype": "fp32", "lora_rank": 0, "padded": False, "ulysses": 1}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A published estimator."""

    name: str
    source: str
    """Where it is published."""
    leaves_out: str
    """What its answer does not hold, by its own account or its code."""
    estimate: Callable[[dict[str, Any]], int]
    """Bytes on one rank for a case of a trace."""
    package: str | None = None
    """The distribution whose version goes with the row; ``None``: a formula that is written here."""


def trace_of(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the stored row of the traced step that ``wanted`` describes."""
    rows = json.loads(TRACES.read_text(encoding="utf-8"))["rows"]
    full = _USUAL | wanted
    (row,) = (row for row in rows if all(row["case"][k] == v for k, v in full.items()) and _plain(row["case"]))
    found: dict[str, Any] = row
    return found


def _plain(case: dict[str, Any]) -> bool:
    return not case["update_entropy"] and case["micro_batches"] == 1 and case["fused"] == "none"


def traced_bytes(row: dict[str, Any]) -> int:
    """Return the peak of the whole training step: the update or the optimizer step, whichever is higher."""
    return max(row["phases"][phase]["peak_allocated_bytes"] for phase in ("update", "optimizer_step"))


def accelerate_estimate(case: dict[str, Any]) -> int:
    """`accelerate estimate-memory`, its line *training with Adam* in float32, on a model from config."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    from tracer.models import build

    with init_empty_weights():
        model = build(case["model"], dtype=torch.float32, attention="sdpa")
    total, _ = calculate_maximum_sizes(model)
    return int(max(estimate_training_usage(total, "float32").values()))


def deepspeed_estimate(case: dict[str, Any]) -> int:
    """`deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs` without offload."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    model = load(case["model"])
    largest = max(model.layer_parameters, model.embedding_parameters)
    _, gpu, _ = estimate_zero3_model_states_mem_needs(
        model.parameters, largest, num_gpus_per_node=case["ranks"], cpu_offload=False, cpu_offload_params=False
    )
    return int(gpu)


def megatron_estimate(case: dict[str, Any]) -> int:
    """The theoretical footprint that Megatron-LM reports: distributed optimizer, selective recomputation, no tensor parallelism.

    States take 6 + 12 / dp bytes a parameter; a layer keeps s b h (18 + 4 ffn / h) bytes of activations, the embedding's
    dropout 8 s b, and the output layer 4 s b h (1 + v / h) (Korthikanti et al. 2022, sections 4 and 5).
    """
    model, tokens = load(case["model"]), case["tokens"]
    hidden, ffn = model.hidden_size, model.intermediate_size
    states = model.parameters * (6 + 12 / case["ranks"])
    layers = tokens * hidden * (18 + 4 * ffn / hidden) * model.num_hidden_layers
    head = 8 * tokens + 4 * tokens * hidden * (1 + model.vocab_size / hidden)
    return int(states + layers + head)


def fsdp_mem_tracker_estimate(case: dict[str, Any]) -> int:
    """torch's `FSDPMemTracker` over one step of the Hugging Face model on fake tensors, in a fake process group."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case["ranks"])
    try:
        mesh = init_device_mesh("cpu", (case["ranks"],))
        with FakeTensorMode():
            model, ids = _sharded(case, mesh)
            # foreach kernels keep their temporaries in one list, which the tracker counts as unsharded states
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((ids,))
            with tracker:
                for _ in range(2):
                    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    tracker.reset_mod_stats()  # it follows one iteration at a time; the peak stays
            peaks = tracker.get_tracker_snapshot("peak")
            return int(next(iter(peaks.values()))["Total"])
    finally:
        dist.destroy_process_group()


def _sharded(case: dict[str, Any], mesh: Any) -> tuple[Any, Any]:
    """Return the model under FSDP2 as a trainer would wrap it, and one row of token ids."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from tracer.models import build

    model: Any = build(case["model"], dtype=torch.float32, attention="sdpa")
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    model.train()
    return model, torch.zeros((1, case["tokens"]), dtype=torch.int64)


def memfit_estimate(case: dict[str, Any]) -> int:
    """memfit's own formulas: the higher of update and optimizer step."""
    predicted = predict(trace_of(case)["case"])
    return max(predicted["update"], predicted["optimizer_step"])


PEERS = (
    Peer(
        name="memfit",
        package="memfit",
        source="../memory-model.md",
        leaves_out="what a trace cannot see: context, communication library, allocator",
        estimate=memfit_estimate,
    ),
    Peer(
        name="accelerate",
        package="accelerate",
        source="https://huggingface.co/docs/accelerate/usage_guides/model_size_estimator",
        leaves_out="activations and logits; sharding (one device holds all)",
        estimate=accelerate_estimate,
    ),
    Peer(
        name="DeepSpeed ZeRO-3",
        package="deepspeed",
        source="https://deepspeed.readthedocs.io/en/latest/memory.html",
        leaves_out="activations, logits and buffers; fp16 weights and gradients are assumed",
        estimate=deepspeed_estimate,
    ),
    Peer(
        name="Megatron formula",
        source="https://arxiv.org/abs/2205.05198",
        leaves_out="full recomputation, grouped-query attention, gathered layers",
        estimate=megatron_estimate,
    ),
    Peer(
        name="FSDPMemTracker",
        package="torch",
        source="https://github.com/pytorch/pytorch/pull/125323",
        leaves_out="temporaries of foreach optimizers; the loss is the model's own, not that of reinforcement learning",
        estimate=fsdp_mem_tracker_estimate,
    ),
)


def run(peers: tuple[Peer, ...]) -> Iterator[dict[str, Any]]:
    """Yield a row for each case and peer; one that cannot answer gives its error."""
    for peer in peers:
        for wanted in TRACED:
            yield _row(peer, wanted)


def _row(peer: Peer, wanted: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        try:
            answer["bytes"], seconds = _timed(peer, wanted)
            if seconds < _SLOW:  # a first call pays for the imports
                answer["bytes"], seconds = _timed(peer, wanted)
            answer["seconds"] = round(seconds, 6)
        except Exception as error:  # another project's code: its failure is a finding
            answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    version = importlib.metadata.version(peer.package) if peer.package else ""
    return {"peer": peer.name, "version": version, "case": wanted, **answer, "date": datetime.date.today().isoformat()}


def _timed(peer: Peer, wanted: dict[str, Any]) -> tuple[int, float]:
    start = time.perf_counter()
    return peer.estimate(wanted), time.perf_counter() - start


def main(names: list[str]) -> None:
    """Run the peers and store their rows beside those of the others."""
    chosen = tuple(peer for peer in PEERS if not names or peer.name in names)
    kept = [row for row in stored() if row["peer"] not in {peer.name for peer in chosen}]
    for row in run(chosen):
        print(json.dumps(row), flush=True)
        kept.append(row)
        order = [peer.name for peer in PEERS]
        kept.sort(key=lambda r: order.index(r["peer"]))
        ROWS.write_text(json.dumps({"rows": kept}, indent=1) + "\n", encoding="utf-8")


def stored() -> list[dict[str, Any]]:
    """Return the rows that the repository holds."""
    rows: list[dict[str, Any]] = json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.exists() else []
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
