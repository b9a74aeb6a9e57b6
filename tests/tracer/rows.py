"""The cases of tests/data/traces.json: a spread over everything that the formulas distinguish."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tracer.case import Case

K = 1024
Options = dict[str, Any]


def _dense() -> Iterator[Options]:
    """verl's defaults: no entropy in the update, flash-attn's cross entropy, checkpointing."""
    for model, ranks, tokens in (
        ("qwen2.5-0.5b", 1, 4 * K), ("qwen2.5-0.5b", 2, 32 * K), ("qwen2.5-0.5b", 8, 2 * K),
        ("qwen2.5-1.5b", 1, 8 * K), ("qwen2.5-1.5b", 4, 16 * K), ("qwen2.5-3b", 1, 4 * K),
        ("qwen2.5-3b", 2, 8 * K), ("qwen2.5-3b", 4, 16 * K), ("qwen2.5-7b", 4, 2 * K),
        ("qwen2.5-7b", 8, 16 * K), ("qwen2.5-14b", 8, 4 * K), ("qwen2.5-32b", 8, 2 * K),
        ("qwen3-0.6b", 2, 8 * K), ("qwen3-1.7b", 1, 16 * K), ("qwen3-4b", 4, 8 * K),
        ("qwen3-8b", 8, 16 * K), ("llama-3.2-1b", 1, 8 * K), ("llama-3.2-3b", 2, 4 * K),
        ("llama-3.1-8b", 8, 8 * K), ("mistral-7b", 4, 8 * K), ("gemma-3-1b", 2, 4 * K),
    ):  # fmt: skip
        for strategy in ("fsdp", "fsdp2"):
            yield {"model": model, "ranks": ranks, "tokens": tokens, "strategy": strategy}


def _accumulating() -> Iterator[Options]:
    """Two micro-batches: gradients are resident during the second."""
    for model, ranks, tokens in (("qwen2.5-3b", 4, 16 * K), ("qwen2.5-7b", 8, 4 * K), ("llama-3.2-1b", 2, 4 * K)):
        for strategy, no_sync in itertools.product(("fsdp", "fsdp2"), (False, True)):
            yield {"model": model, "ranks": ranks, "tokens": tokens, "strategy": strategy, "micro_batches": 2,
                   "no_sync": no_sync}  # fmt: skip
    yield {"model": "qwen2.5-1.5b", "tokens": 8 * K, "micro_batches": 2}


def _heads() -> Iterator[Options]:
    """Every variant of the loss head, at both kinds of temperature."""
    base: Options = {"model": "llama-3.2-1b", "ranks": 2, "tokens": 8 * K}
    for entropy, temperature, again in itertools.product(("compiled", "eager", "chunked"), (1.0, 0.7), (False, True)):
        yield {**base, "entropy": entropy, "update_entropy": True, "temperature": temperature,
               "entropy_checkpointing": again}  # fmt: skip
    for kind in ("eager", "chunked"):
        yield {**base, "entropy": kind}  # in the log-prob phase only
    yield {**base, "temperature": 0.7}
    yield {**base, "temperature": 0.7, "kl_loss": True}
    yield {**base, "entropy": "chunked", "update_entropy": True, "entropy_chunk": 512}
    for fused, temperature, asked in itertools.product(("torch", "triton"), (1.0, 0.7), (False, True)):
        yield {**base, "fused": fused, "temperature": temperature, "update_entropy": asked}
    for temperature, kind in ((1.0, "compiled"), (0.7, "eager")):
        yield {**base, "tokens": K, "log_prob": "torch_v2", "temperature": temperature, "entropy": kind}
    yield {**base, "model": "qwen2.5-3b", "ranks": 1, "tokens": 18 * K, "entropy": "eager", "update_entropy": True,
           "temperature": 0.7}  # fmt: skip
    yield {**base, "model": "qwen2.5-7b", "ranks": 8, "strategy": "fsdp2", "entropy": "eager", "update_entropy": True}
    yield {**base, "model": "qwen3-8b", "ranks": 8, "tokens": 4 * K, "update_entropy": True, "temperature": 0.7}
    yield {**base, "model": "llama-3.1-8b", "ranks": 8, "tokens": 8 * K, "entropy": "chunked", "update_entropy": True}
    yield {**base, "model": "qwen2.5-14b", "ranks": 8, "tokens": 16 * K, "fused": "triton"}
    yield {**base, "model": "qwen2.5-7b", "ranks": 4, "fused": "torch", "update_entropy": True}
    yield {**base, "model": "gemma-3-1b", "tokens": 8 * K, "entropy": "eager", "update_entropy": True}


def _without_checkpointing() -> Iterator[Options]:
    for model, ranks, tokens in (
        ("llama-3.2-1b", 1, 8 * K), ("qwen2.5-1.5b", 4, 4 * K), ("qwen2.5-7b", 8, 8 * K), ("qwen3-1.7b", 2, 4 * K),
        ("gemma-3-1b", 2, 4 * K),
    ):  # fmt: skip
        for strategy in ("fsdp", "fsdp2"):
            yield {"model": model, "ranks": ranks, "tokens": tokens, "strategy": strategy, "checkpointing": False}
    yield {"model": "llama-3.2-1b", "ranks": 2, "tokens": 8 * K, "checkpointing": False, "entropy": "eager",
           "update_entropy": True}  # fmt: skip


def _experts() -> Iterator[Options]:
    model = "qwen3-30b-a3b"
    for strategy in ("fsdp", "fsdp2"):
        base: Options = {"model": model, "ranks": 8, "strategy": strategy}
        yield {**base, "tokens": 2 * K}
        yield {**base, "tokens": 16 * K}
        yield {**base, "tokens": 8 * K, "checkpointing": False}
        yield {**base, "tokens": 32 * K, "update_entropy": True}
    yield {"model": model, "ranks": 4, "tokens": 8 * K, "micro_batches": 2}
    yield {"model": model, "ranks": 8, "tokens": 8 * K, "reshard_after_forward": False}
    yield {"model": model, "role": "ref", "ranks": 8, "tokens": 16 * K, "master_dtype": "bf16"}


def _adapters() -> Iterator[Options]:
    for model, ranks, tokens, rank in (("llama-3.2-1b", 1, 4 * K, 32), ("qwen2.5-0.5b", 2, 8 * K, 64)):
        for strategy in ("fsdp", "fsdp2"):
            yield {"model": model, "ranks": ranks, "tokens": tokens, "lora_rank": rank, "strategy": strategy}
    yield {"model": "llama-3.2-1b", "ranks": 2, "tokens": 8 * K, "lora_rank": 64, "checkpointing": False}
    yield {"model": "llama-3.2-1b", "ranks": 4, "tokens": 8 * K, "lora_rank": 128, "master_dtype": "bf16"}
    yield {"model": "qwen2.5-7b", "ranks": 4, "tokens": 8 * K, "lora_rank": 32}
    yield {"model": "llama-3.1-8b", "ranks": 8, "tokens": 4 * K, "lora_rank": 16, "strategy": "fsdp2"}


def _other_roles() -> Iterator[Options]:
    for model, ranks, tokens in (("qwen2.5-0.5b", 1, 8 * K), ("llama-3.2-1b", 4, 16 * K), ("qwen3-8b", 8, 8 * K)):
        for strategy in ("fsdp", "fsdp2"):
            case: Options = {"model": model, "ranks": ranks, "tokens": tokens, "strategy": strategy}
            yield {**case, "role": "ref", "master_dtype": "bf16"}
            yield {**case, "role": "critic"}
    yield {"model": "llama-3.2-1b", "ranks": 2, "tokens": 8 * K, "role": "critic", "checkpointing": False}
    yield {"model": "qwen2.5-7b", "ranks": 8, "tokens": 16 * K, "role": "critic", "micro_batches": 2}
    yield {"model": "qwen2.5-7b", "ranks": 4, "tokens": 8 * K, "role": "ref", "master_dtype": "bf16",
           "temperature": 0.7}  # fmt: skip


def _shapes_of_batches() -> Iterator[Options]:
    """Padded batches, sequence parallelism, many sequences in a pack."""
    for sequences, tokens, entropy in ((4, 4 * K, False), (8, 8 * K, False), (8, 8 * K, True)):
        yield {"model": "llama-3.2-1b", "ranks": 2, "padded": True, "sequences": sequences, "tokens": tokens,
               "update_entropy": entropy, "log_prob_entropy": entropy}  # fmt: skip
    yield {"model": "qwen2.5-7b", "ranks": 8, "padded": True, "sequences": 4, "tokens": 4 * K, "strategy": "fsdp2"}
    yield {"model": "qwen2.5-0.5b", "ranks": 4, "padded": True, "sequences": 8, "tokens": 8 * K, "temperature": 0.7}
    for model, ranks, ulysses, tokens in (
        ("llama-3.2-1b", 4, 2, 32 * K), ("qwen2.5-7b", 8, 4, 64 * K), ("qwen3-8b", 8, 8, 64 * K),
    ):  # fmt: skip
        for strategy in ("fsdp", "fsdp2"):
            yield {"model": model, "ranks": ranks, "ulysses": ulysses, "tokens": tokens, "strategy": strategy}
    for sequences in (16, 64):
        yield {"model": "qwen2.5-3b", "ranks": 4, "tokens": 16 * K, "sequences": sequences}


def _shapes_of_other_passes() -> Iterator[Options]:
    """Padding and sequence parallelism where the pass is not the plain one: roles, adapters, experts, heads."""
    padded: Options = {"model": "llama-3.2-1b", "ranks": 2, "padded": True, "sequences": 4, "tokens": 4 * K}
    yield {**padded, "role": "critic"}
    yield {**padded, "role": "ref", "master_dtype": "bf16"}
    yield {**padded, "checkpointing": False}
    yield {**padded, "lora_rank": 32}
    split: Options = {"model": "llama-3.2-1b", "ranks": 4, "ulysses": 2, "tokens": 16 * K}
    yield {**split, "role": "critic"}
    yield {**split, "role": "ref", "master_dtype": "bf16"}
    yield {**split, "checkpointing": False, "strategy": "fsdp2"}
    yield {**split, "lora_rank": 32}
    yield {**split, "entropy": "eager", "update_entropy": True}
    yield {**split, "entropy": "chunked", "update_entropy": True, "temperature": 0.7}
    yield {**split, "fused": "torch"}
    yield {"model": "qwen3-30b-a3b", "ranks": 8, "ulysses": 4, "tokens": 32 * K}


def _linear_attention() -> Iterator[Options]:
    """Gated delta nets in three of four layers, with dense layers and with experts."""
    small: Options = {"model": "qwen3.5-4b-text", "ranks": 4}
    yield {**small, "strategy": "fsdp2", "tokens": 4 * K, "checkpointing": False}
    yield {**small, "tokens": 16 * K, "fused": "triton"}
    yield {**small, "tokens": 16 * K, "micro_batches": 2, "fused": "torch"}
    yield {**small, "tokens": 8 * K, "lora_rank": 32}
    experts: Options = {"model": "qwen3.5-35b-a3b-text", "tokens": 16 * K}
    yield {**experts, "tokens": 8 * K, "ranks": 16, "strategy": "fsdp2"}
    yield {**experts, "role": "ref", "ranks": 8, "master_dtype": "bf16"}
    packed: Options = {"model": "qwen3-next-80b-a3b", "ranks": 64}
    yield {**packed, "tokens": 8 * K, "role": "critic", "strategy": "fsdp2"}
    for strategy, tokens, again in (("fsdp", 4 * K, True), ("fsdp2", 32 * K, True), ("fsdp2", 4 * K, False)):
        yield {**packed, "tokens": tokens, "strategy": strategy, "checkpointing": again}


def _latent_attention() -> Iterator[Options]:
    """Multi-head latent attention, and experts whose weights are fp32."""
    base: Options = {"model": "moonlight-16b-a3b", "ranks": 8}
    yield {**base, "tokens": 16 * K, "fused": "triton"}
    yield {**base, "tokens": 4 * K, "strategy": "fsdp2", "checkpointing": False}


def _clamped_experts() -> Iterator[Options]:
    """gpt-oss: experts with biases, a clamp and a sigmoid of their own."""
    yield {"model": "gpt-oss-20b", "ranks": 8, "tokens": 16 * K, "fused": "triton"}
    yield {"model": "gpt-oss-20b", "ranks": 8, "tokens": 4 * K, "strategy": "fsdp2", "checkpointing": False}


def _sharding() -> Iterator[Options]:
    for model, ranks, tokens in (("llama-3.2-1b", 4, 8 * K), ("qwen2.5-7b", 8, 8 * K)):
        for strategy in ("fsdp", "fsdp2"):
            case: Options = {"model": model, "ranks": ranks, "tokens": tokens, "strategy": strategy}
            yield {**case, "reshard_after_forward": False}
            yield {**case, "master_dtype": "bf16"}
    yield {"model": "qwen2.5-7b", "ranks": 8, "tokens": 32 * K, "temperature": 0.7}
    yield {"model": "llama-3.1-8b", "ranks": 4, "tokens": 32 * K, "temperature": 0.7, "strategy": "fsdp2"}


def _images() -> Iterator[Options]:
    """Vision towers: from no images at all to nothing but images."""
    small: Options = {"model": "qwen2.5-vl-3b", "ranks": 4, "tokens": 8 * K, "image_tokens": 4 * K}
    yield small
    yield {**small, "strategy": "fsdp2"}
    yield {**small, "tokens": 16 * K, "image_tokens": 16 * K, "micro_batches": 2}
    yield {**small, "checkpointing": False}
    yield {**small, "role": "ref", "master_dtype": "bf16"}
    yield {**small, "ranks": 1, "frozen_vision": True}
    yield {**small, "strategy": "fsdp2", "frozen_vision": True}
    yield {**small, "lora_rank": 32}
    large: Options = {**small, "model": "qwen2.5-vl-7b", "ranks": 8}
    yield {**large, "strategy": "fsdp2"}
    yield {**large, "image_tokens": 8 * K, "fused": "triton"}
    old: Options = {**small, "model": "qwen2-vl-2b", "ranks": 2}
    yield old
    yield {**old, "strategy": "fsdp2", "image_tokens": 8 * K}
    new: Options = {**small, "model": "qwen3-vl-4b"}
    yield {**new, "image_tokens": 0}
    yield {**new, "fused": "torch"}
    yield {**new, "checkpointing": False, "strategy": "fsdp2"}
    yield {**new, "ulysses": 2, "tokens": 16 * K, "image_tokens": 8 * K}
    yield {**new, "model": "qwen3-vl-8b", "ranks": 8, "strategy": "fsdp2"}
    yield {**new, "model": "qwen3-vl-8b", "ranks": 8, "tokens": 16 * K, "image_tokens": 8 * K}
    yield {**new, "model": "qwen3-vl-30b-a3b", "ranks": 8}


def cases() -> list[Case]:
    """Return every case, in a fixed order, without repetition."""
    groups = (
        _dense(), _accumulating(), _heads(), _without_checkpointing(), _experts(), _adapters(), _other_roles(),
        _shapes_of_batches(), _sharding(), _shapes_of_other_passes(), _linear_attention(), _latent_attention(), _clamped_experts(),
        _images(),
    )  # fmt: skip
    return list(dict.fromkeys(Case(**options) for group in groups for options in group))
