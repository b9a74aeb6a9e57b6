"""What is measured: the CUDA context, phases of training, offload and hand-over, steps of varied lengths, generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KINDS = ("context", "training", "moving", "lengths", "generation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One process: what it measures, and on which case."""

    kind: str
    """A name of `KINDS`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the tracer's `Case`, or of the generation tracer's."""
    lengths: str = ""
    """``lengths`` jobs: how micro-batches vary."""
    expandable: bool = False
    limit_bytes: int | None = None


K = 1024
TRAINING: tuple[dict[str, Any], ...] = (
    {"model": "qwen2.5-0.5b", "tokens": 8 * K},
    {"model": "qwen2.5-0.5b", "tokens": 8 * K, "strategy": "fsdp2"},
    {"model": "qwen2.5-0.5b", "tokens": 8 * K, "entropy": "eager", "update_entropy": True, "temperature": 0.7},
    {"model": "llama-3.2-1b", "tokens": 8 * K, "strategy": "fsdp2", "update_entropy": True},
    {"model": "llama-3.2-1b", "tokens": 8 * K, "lora_rank": 32},
    {"model": "llama-3.2-1b", "tokens": 4 * K, "checkpointing": False},
    {"model": "llama-3.2-1b", "tokens": 8 * K, "role": "critic"},
    {"model": "llama-3.2-1b", "tokens": 8 * K, "sequences": 4, "padded": True},
    {"model": "qwen2.5-3b", "tokens": 16 * K, "ranks": 4, "micro_batches": 2},
    {"model": "qwen3-8b", "tokens": 8 * K, "ranks": 8, "strategy": "fsdp2", "micro_batches": 2},
)
"""More ranks than one: this rank's share on one GPU, with collectives that return at once and move nothing."""

VARIED: tuple[dict[str, Any], ...] = (
    {"model": "qwen2.5-0.5b", "tokens": 16 * K},
    {"model": "llama-3.2-1b", "tokens": 16 * K, "strategy": "fsdp2", "ranks": 4},
)
GENERATION: tuple[dict[str, Any], ...] = (
    {"model": "qwen2.5-0.5b", "rows": 64, "prompt": 256, "new": 128},
    {"model": "qwen2.5-1.5b", "rows": 16, "prompt": 1024, "new": 64, "top_p": 0.9},
)
TINY: dict[str, Any] = {"model": "toy-qwen2", "tokens": 256, "compute_dtype": "fp32", "entropy": "eager"}
"""A dry run: the same jobs on models of a few kilobytes, in fp32 since a CPU's bf16 products take scratch of their own."""


def table(*, dry: bool) -> list[Job]:
    """Return every job but the searches for a limit, which follow from what the others find."""
    if dry:
        tiny = [TINY, {**TINY, "strategy": "fsdp2", "ranks": 2, "micro_batches": 2}]
        varied, generation = [TINY], [{"model": "tiny-llama", "rows": 2, "prompt": 8, "new": 4, "dtype": "float32"}]
        training = [*tiny, {**TINY, "lora_rank": 4}, {**TINY, "role": "critic"}]
    else:
        training, varied, generation = list(TRAINING), list(VARIED), list(GENERATION)
    return [
        Job(kind="context"),
        *(Job(kind="training", options=o) for o in training),
        *(Job(kind="moving", options=o) for o in training[:2]),
        *(Job(kind="lengths", options=o, lengths="dynamic", expandable=e) for o in varied for e in (False, True)),
        *(Job(kind="generation", options=o) for o in generation),
    ]
