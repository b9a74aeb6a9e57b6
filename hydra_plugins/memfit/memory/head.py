"""The language-model head: logits, token log-probabilities and entropy, in bytes per token and vocabulary entry.

For a small model with a large vocabulary this is the largest term of a step. How many copies of the T x V matrix are
alive depends on how the framework computes the loss. Each row of the table was read from verl's head functions run op
by op (docs/validation/trainer.md) and agrees with a reading of their source.

Symbols: T tokens of the micro-batch on this rank, V vocabulary size, c tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.units import MIB, ceil_div

ENTROPY_CHUNK_TOKENS = 2048
"""Rows that verl's chunked entropy handles at once unless told otherwise."""

SLICE_TOKENS = 1024
"""Rows that AReaL's compiled log-probabilities and entropy handle at once (utils/functional/vocab_parallel.py)."""

FUSED_TORCH_CHUNK_TOKENS = 512
"""Rows of a chunk in verl's FusedLinearForPPO (torch backend)."""

FUSED_TRITON_FORWARD_SPLIT = 1024
FUSED_TRITON_BACKWARD_SPLIT = 9504
"""Vocabulary columns that verl's Triton kernel works on at once (verl/utils/kernel/kernels.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """How one pass computes log-probabilities and entropy from the logits."""

    entropy: str = "none"
    """``none``, ``compiled`` (torch.compile fuses it), ``eager``, ``chunked``, ``slices`` (compiled, by slices of rows)."""
    entropy_checkpointing: bool = False
    chunk_tokens: int = ENTROPY_CHUNK_TOKENS
    log_prob: str = "flash_ce"
    """``flash_ce`` (flash-attn's cross entropy), ``torch`` (log-softmax row by row), or ``autocast_ce``: torch's own cross
    entropy, which autocast runs in fp32, with the caller's logits alive (no entropy)."""
    fused: str = "none"
    """``none``, ``torch``, ``triton``: matrix product and loss in one, no T x V tensor."""
    scaled: str = "no"
    """Division by the temperature: ``no``, ``copy`` (raw and scaled logits live together) or ``in_place``."""
    extra_copies: int = 0
    """bf16 copies of T x V that the caller keeps besides (a padded batch's concatenation)."""
    vocabulary: bool = True
    """False for a value head: one number a token, no logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cost:
    """Bytes per T x V and per c x V: going forward without gradients, saved for backward, and at the update's peak."""

    forward: int
    forward_chunk: int
    saved: int
    update: int
    update_chunk: int


_COSTS = {
    ("none", False): _Cost(forward=2, forward_chunk=0, saved=2, update=2, update_chunk=0),
    ("compiled", False): _Cost(forward=2, forward_chunk=0, saved=2, update=6, update_chunk=0),
    ("compiled", True): _Cost(forward=2, forward_chunk=0, saved=2, update=6, update_chunk=0),
    ("eager", False): _Cost(forward=14, forward_chunk=0, saved=10, update=26, update_chunk=0),
    ("eager", True): _Cost(forward=14, forward_chunk=0, saved=2, update=30, update_chunk=0),
    # AReaL: the slices' gradients are two whole bf16 matrices; without gradients the last micro-batch's logits still live
    ("slices", False): _Cost(forward=4, forward_chunk=0, saved=2, update=6, update_chunk=2),
    ("slices", True): _Cost(forward=4, forward_chunk=0, saved=2, update=6, update_chunk=2),
    ("chunked", False): _Cost(forward=2, forward_chunk=12, saved=10, update=10, update_chunk=20),
    ("chunked", True): _Cost(forward=2, forward_chunk=12, saved=2, update=12, update_chunk=12),
}


def _cost(head: Head) -> _Cost:
    return _COSTS[head.entropy, head.entropy_checkpointing and head.entropy != "none"]


def _copies(head: Head) -> int:
    """
    bf16 copies that come on top of the table: the raw logits beside the scaled ones, a padded batch's concatenation.

    An eager entropy peaks before the concatenation.
    """
    padded = 0 if head.entropy == "eager" else 2 * head.extra_copies
    return padded + (2 if head.scaled == "copy" else 0)


def forward_logits_bytes(head: Head, *, tokens: int, vocabulary: int, hidden: int) -> int:
    """Return what a pass without gradients (old or reference log-probabilities) holds at the head's peak."""
    if not head.vocabulary:
        return 8 * tokens
    if head.fused != "none":
        return _fused_bytes(head, tokens=tokens, vocabulary=vocabulary, hidden=hidden, backward=False)
    if head.log_prob == "autocast_ce":
        return (10 + 2 * head.extra_copies) * tokens * vocabulary
    cost, chunk = _cost(head), min(head.chunk_tokens, tokens)
    return ((cost.forward + _copies(head)) * tokens + cost.forward_chunk * chunk) * vocabulary


def update_logits_bytes(head: Head, *, tokens: int, vocabulary: int, hidden: int) -> int:
    """Return what the forward and backward pass of an update hold at the head's peak."""
    if not head.vocabulary:
        return 16 * tokens
    if head.fused != "none":
        return _fused_bytes(head, tokens=tokens, vocabulary=vocabulary, hidden=hidden, backward=True)
    if head.log_prob == "autocast_ce":  # logits; fp32 log-softmax, its gradient, and the gradient of its input
        return (14 + 2 * head.extra_copies) * tokens * vocabulary
    cost, chunk = _cost(head), min(head.chunk_tokens, tokens)
    per_token = cost.update + (0 if head.entropy == "eager" else 4 * head.extra_copies)  # the copy and its gradient
    divides = head.scaled == "copy" and head.entropy == "none" and not head.extra_copies  # else the copies come later
    if head.scaled == "in_place" or divides:
        per_token += 2  # the division's backward pass writes a second gradient beside the one it reads
    if head.log_prob == "torch" and head.entropy != "eager":
        per_token += 4  # every row's log-softmax is saved, and its gradient stands beside the logits' one
    total = per_token * tokens + cost.update_chunk * chunk
    if head.entropy == "chunked":
        total = max(total, _joined_gradients(head, tokens, chunk))
    return total * vocabulary


def _joined_gradients(head: Head, tokens: int, chunk: int) -> int:
    """Bytes per V when the chunks' gradients (fp32, then bf16) meet the log-probabilities' one, for long micro-batches."""
    scaled = head.scaled == "copy"
    if head.entropy_checkpointing:
        return 14 * tokens + 12 * chunk
    return 12 * tokens + (4 * chunk if scaled else 0)


def lm_head_logits_bytes(head: Head, *, tokens: int, vocabulary: int) -> int:
    """Return the logits that the matrix product of the head writes: one bf16 T x V; nothing for a fused or value head."""
    return 2 * tokens * vocabulary if head.vocabulary and head.fused == "none" else 0


def _fused_bytes(head: Head, *, tokens: int, vocabulary: int, hidden: int, backward: bool) -> int:
    """
    Return the scratch of the fused linear head.

    torch: fp32 chunks of `FUSED_TORCH_CHUNK_TOKENS` rows; backward adds the bf16 gradient of the vocabulary matrix (2VH) and
    each chunk's product of the same size before it is added. triton: forward three fp32 values per token and
    `FUSED_TRITON_FORWARD_SPLIT` columns; backward one bf16 slab of `FUSED_TRITON_BACKWARD_SPLIT` columns.
    """
    matrix = 2 * vocabulary * hidden
    if head.fused == "triton":
        if not backward:
            return tokens * 12 * ceil_div(vocabulary, FUSED_TRITON_FORWARD_SPLIT)
        return tokens * (2 * min(FUSED_TRITON_BACKWARD_SPLIT, vocabulary) + 4 * hidden) + matrix
    rows = min(FUSED_TORCH_CHUNK_TOKENS, tokens) * vocabulary
    if not backward:
        return rows * 12
    return rows * (20 if head.entropy == "none" else 28) + 2 * matrix + tokens * 4 * hidden


CUBLAS_WORKSPACE_BYTES = 32 * MIB
"""Allocated once by a process through torch's allocator on Hopper; 8 MiB before. Source: torch CUDABlas.cpp."""
