"""Handing the trained weights to the inference engine, on the same GPU or on others.

Symbols: P parameters, N ranks, n and R decoder layer and root unit, E one vocabulary matrix.
"""

from __future__ import annotations

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.model.spec import ModelSpec


def adapter_moments(
    s: Sharding, *, parameters: int, adapters: int, master_bytes: int, bucket_bytes: int, layered: bool
) -> tuple[MemoryBreakdown, ...]:
    """
    Return the same for LoRA, where the engine has loaded the base model itself and only adapters travel.

    ``layered``: one decoder layer is gathered at a time, in the master dtype; otherwise FSDP gathers the whole base model
    on every rank to reach the adapters. A single rank has nothing to gather.

    Source: verl utils/fsdp_utils.py (collect_lora_params, layered_summon_lora_params).
    """
    gathered = 0 if s.single else master_bytes * (s.layer if layered else parameters)
    return (MemoryBreakdown(communication_buffers=gathered + master_bytes * adapters + bucket_bytes),)


def sync_moments(s: Sharding, *, parameters: int, master_bytes: int, bucket_bytes: int) -> tuple[MemoryBreakdown, ...]:
    """
    Return what the sender holds beside its resident state, at the two points where it can peak.

    FSDP1 builds a sharded state dict: one unit after the other is gathered in the master dtype (the root is held
    meanwhile) and every shard is cloned, b·P/N until the end. A single rank references its parameters instead. FSDP2
    keeps references and gathers one parameter at a time, the largest being the vocabulary matrix.
    While sending there is a bucket on the trainer's side; a tensor above the bucket goes as it is.

    Source: verl workers/engine/fsdp/transformer_impl.py (get_per_tensor_param), bucketed_weight_transfer.py.
    """
    largest = master_bytes * s.embedding
    if s.version == 2 or s.single:
        gathered = 0 if s.single else 2 * largest
        return (MemoryBreakdown(communication_buffers=gathered + bucket_bytes),)
    clone = ceil_div(master_bytes * parameters, s.ranks)
    return (
        MemoryBreakdown(communication_buffers=clone + master_bytes * (s.root + s.layer)),
        MemoryBreakdown(communication_buffers=clone + bucket_bytes + largest),
    )


def broadcast_sender_bytes(*, bucket_bytes: int) -> int:
    """
    Return what a trainer's rank holds beside what it gathers while weights go to engines on other GPUs.

        M = 2 · bucket

    Every rank has both buckets, also those that send nothing; on rank 0 they lie outside torch's allocator.

    Source: verl checkpoint_engine/nccl_checkpoint_engine.py (prepare).
    """
    return 2 * bucket_bytes


def broadcast_receiver_bytes(*, embedding: int, sent_bytes: int, bucket_bytes: int) -> int:
    """
    Return what the worker beside an engine holds while weights arrive from other GPUs.

        M = 3 · bucket + b · E   (the last term where the tensor is larger than a bucket, and is put together)

    Two buckets of the broadcast and one that is shared with the engine's process; b: bytes of an element on its way.

    Source: verl checkpoint_engine/base.py (merge_weight_chunks), bucketed_weight_transfer.py.
    """
    tensor = sent_bytes * embedding
    return 3 * bucket_bytes + (tensor if tensor > bucket_bytes else 0)


def whole_tensor_bytes(s: Sharding, *, master_bytes: int) -> int:
    """
    Return the largest tensor, gathered in the stored type on its way to a file; a single rank has it already.

        M = b · E

    Source: AReaL engine/fsdp_engine.py (full state dict with CPU offload, tensor by tensor).
    """
    return 0 if s.single else master_bytes * s.embedding


def streamed_bytes(s: Sharding, *, master_bytes: int, bucket_bytes: int) -> int:
    """
    Return what rank 0 holds while it broadcasts weights to servers: two buckets, the largest tensor and its bf16 copy.

        M = 2 · bucket + (b + 2) · E

    Leaves out: the receiver, whose bucket is beside its pool.
    Source: AReaL engine/fsdp_engine.py (pipelined buckets; weight_chunked_mem_mb of io_struct.py).
    """
    return 2 * bucket_bytes + whole_tensor_bytes(s, master_bytes=master_bytes) + 2 * s.embedding


def exported_bytes(model: ModelSpec, *, tensor_parallel: int, pipeline: int) -> int:
    """
    Return what Megatron gathers to hand over one tensor in bf16: the shards of all tensor-parallel ranks and their whole.

        M = 2 · E + 2 · E       E the larger of the vocabulary matrix and one fused MLP matrix (gate and up)

    One rank alone has it already; other pipeline stages receive a copy.
    Leaves out: experts, which are handed over one by one and are smaller.
    Source: mbridge ``core/bridge.py`` (export_weights), verl ``utils/megatron_utils.py`` (per_tensor_generator).
    """
    gate_and_up = (
        2 * model.hidden_size * model.intermediate_size if model.num_moe_layers < model.num_hidden_layers else 0
    )
    largest = 2 * max(model.embedding_parameters, gate_and_up)
    if tensor_parallel == 1:
        return largest if pipeline > 1 else 0
    return 2 * largest
