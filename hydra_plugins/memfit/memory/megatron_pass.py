"""Peak memory of one pass of a Megatron-Core stage: the moments at which it can be, on top of the model states.

Symbols: T tokens of one micro-batch on one context-parallel rank, V vocabulary, t tensor-parallel size, s as in
``megatron_layers``. The stage keeps what its layers save for every micro-batch in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.head import Head, forward_logits_bytes, update_logits_bytes
from hydra_plugins.memfit.memory.megatron import Layout, Stage
from hydra_plugins.memfit.memory.megatron_layers import (
    ROUTING_IMBALANCE,
    Layer,
    Recompute,
    forward_bytes,
    in_flight,
    kept_bytes,
    update_moments_bytes,
)
from hydra_plugins.memfit.model.spec import ModelSpec

_FUSED = Head(fused="triton")


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyHead:
    """How log-probabilities and entropy are computed from logits that are divided among the tensor-parallel ranks."""

    entropy: str = "none"
    """``none``, ``whole`` or ``chunks`` (of `chunk_tokens` rows)."""
    chunk_tokens: int = 2048
    copied: bool = True
    """The logits are cloned before the entropy, so that the cross entropy may overwrite them."""
    scaled: bool = True
    """They are divided by the temperature, whose backward pass writes a second gradient."""
    fused: bool = False
    """Matrix product and loss in one Triton kernel: no T x V tensor."""
    vocabulary: bool = True
    """False for a value head: one number a token."""


def head_forward_bytes(head: VocabularyHead, *, tokens: int, vocabulary: int, hidden: int) -> int:
    """
    Return what the head holds at its peak without gradients; ``vocabulary``: columns of one rank.

    Per token and column 6 where Megatron turns the bf16 logits into fp32; the cross entropy then works in place. An
    entropy has the fp32 logits (4), their clone (4), and a softmax (4).
    Source: megatron-core ``transformer/module.py`` (Float16Module), ``tensor_parallel/cross_entropy.py``.
    """
    if not head.vocabulary:
        return 8 * tokens
    if head.fused:
        return forward_logits_bytes(_FUSED, tokens=tokens, vocabulary=vocabulary, hidden=hidden)
    rows = min(head.chunk_tokens, tokens) if head.entropy == "chunks" else tokens
    entropy = 0 if head.entropy == "none" else (4 + 4 * head.copied) * tokens + 4 * rows
    return max(6 * tokens, entropy) * vocabulary


def head_update_bytes(head: VocabularyHead, *, tokens: int, vocabulary: int, hidden: int) -> int:
    """
    Return what the head holds at its peak with its backward pass.

    Without entropy the gradient takes the place of the softmax (4), beside the division's own (4), or the cast to bf16 (2).
    Source: as `head_forward_bytes`; verl ``utils/megatron/tensor_parallel.py``.
    """
    if not head.vocabulary:
        return 16 * tokens
    if head.fused:
        return update_logits_bytes(_FUSED, tokens=tokens, vocabulary=vocabulary, hidden=hidden)
    each = {"none": 8 if head.scaled else 6, "whole": 8 + 4 * head.copied, "chunks": 12 + 4 * head.copied}
    return each[head.entropy] * tokens * vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePass:
    """One forward (and backward) pass over micro-batches on one rank of a stage."""

    model: ModelSpec
    layout: Layout
    stage: Stage
    tokens: int
    """T of the largest micro-batch."""
    micro_batches: int = 1
    head: VocabularyHead = field(default_factory=VocabularyHead)
    recompute: Recompute = field(default_factory=Recompute)
    imbalance: float = ROUTING_IMBALANCE
    """Rows of the busiest rank over the mean, in one layer of experts."""

    @property
    def layers(self) -> tuple[tuple[Layer, int], ...]:
        """The kinds of layers of the stage, with how many there are of each."""
        plain = self.stage.layers - self.stage.moe_layers
        kinds = ((False, plain), (True, self.stage.moe_layers))
        return tuple(
            (Layer.of(self.model, self.layout, moe=moe, imbalance=self.imbalance), count)
            for moe, count in kinds
            if count
        )

    @property
    def columns(self) -> int:
        """Columns of the vocabulary on one rank."""
        return ceil_div(self.model.vocab_size, self.layout.tensor)


def forward_moments(p: StagePass) -> tuple[MemoryBreakdown, ...]:
    """Return the moments of a pass without gradients: log-probabilities, values."""
    widest = max((forward_bytes(layer) for layer, _ in p.layers), default=0)
    moments = [MemoryBreakdown(activations=p.tokens * (widest + _carried(p)))]
    if p.stage.last:
        logits = head_forward_bytes(p.head, tokens=p.tokens, vocabulary=p.columns, hidden=p.model.hidden_size)
        moments.append(MemoryBreakdown(activations=p.tokens * _head_input(p), logits=logits))
    return tuple(moments)


def update_moments(p: StagePass) -> tuple[MemoryBreakdown, ...]:
    """Return the moments of forward and backward of the schedule at its fullest; gradients go into a buffer that is a state."""
    kept = _kept_in_flight(p)
    moments = []
    for layer, _ in p.layers:
        body = kept + p.tokens * (_again(p, layer) + _inputs(p))
        for beside, matrices in update_moments_bytes(layer):
            written = matrices * _matrix_gradient(p, layer)
            moments.append(MemoryBreakdown(activations=body + p.tokens * beside, gradients=written))
    if p.stage.first:
        moments.append(_embedding_moment(p, kept))
    if p.stage.last:
        h, body = p.model.hidden_size, kept + p.tokens * _head_input(p)
        logits = head_update_bytes(p.head, tokens=p.tokens, vocabulary=p.columns, hidden=h)
        matrix = 2 * p.columns * h if p.head.vocabulary and not p.head.fused else 0
        product = 2 * p.columns * p.tokens if p.head.vocabulary and not p.head.fused else 0
        moments.append(MemoryBreakdown(activations=body, logits=logits))
        moments.append(MemoryBreakdown(activations=body + 2 * h * p.tokens, logits=product, gradients=matrix))
    return tuple(moments)


def _embedding_moment(p: StagePass, kept: int) -> MemoryBreakdown:
    """The end of a backward pass: the embedding's gradient, when only the other micro-batches in flight keep anything."""
    h, micro_batches = p.model.hidden_size, in_flight(p.layout, p.stage, micro_batches=p.micro_batches)
    others = int(kept * (1 - 1 / micro_batches))
    gradient = ceil_div(2 * h, p.layout.residual) + (4 * h if p.layout.residual > 1 else 0)
    return MemoryBreakdown(activations=others + p.tokens * (_inputs(p) + gradient), gradients=2 * p.columns * h)


def _kept_in_flight(p: StagePass) -> int:
    """What the layers keep, and the stage's output, which the schedule holds until its gradient comes."""
    micro_batches = in_flight(p.layout, p.stage, micro_batches=p.micro_batches)
    output = 0 if p.stage.last else ceil_div(2 * p.model.hidden_size, p.layout.residual)
    return int(micro_batches * p.tokens * (_kept(p) + output))


def _kept(p: StagePass) -> int:
    """Bytes a token that the stage's layers keep for one micro-batch."""
    full = p.recompute.granularity == "full"
    if not full:
        return sum(count * kept_bytes(layer, p.recompute) for layer, count in p.layers)
    entry, total = ceil_div(2 * p.model.hidden_size, p.layout.residual), p.stage.layers
    if p.recompute.method == "uniform":
        return entry * ceil_div(total, max(1, p.recompute.layers))
    recomputed = min(total, p.recompute.layers * p.layout.virtual)
    whole = sum(count * kept_bytes(layer) for layer, count in p.layers)
    return entry * recomputed + ceil_div(whole * (total - recomputed), max(1, total))


def _again(p: StagePass, layer: Layer) -> int:
    """Bytes a token that recomputation brings back inside one layer's backward pass."""
    if p.recompute.granularity == "full":
        group = p.recompute.layers if p.recompute.method == "uniform" else 1
        return kept_bytes(layer, busiest=True) * min(group, p.stage.layers)
    if p.recompute.granularity == "selective":
        return kept_bytes(layer) - kept_bytes(layer, p.recompute)
    return 0


def _matrix_gradient(p: StagePass, layer: Layer) -> int:
    """The bf16 gradient of the MLP's second matrix before it is added to the fp32 buffer; the first is twice as large."""
    if layer.rows:
        return 2 * (p.model.num_experts // p.layout.expert) * layer.expert_m * layer.h
    return 2 * layer.m * layer.h


def _carried(p: StagePass) -> int:
    """Bytes a token beside the layers of a pass without gradients: its inputs; the stage's input and output on their way."""
    sent = ceil_div(2 * p.model.hidden_size, p.layout.residual)
    return _inputs(p) + (2 * sent if p.layout.pipeline > 1 else sent)


def _inputs(p: StagePass) -> int:
    """Ids, positions and labels, and one fp32 angle for each element of the part of a head that rotates."""
    return 40 + 4 * (p.model.qk_rope_head_dim or p.model.head_dim)


def _head_input(p: StagePass) -> int:
    """Bytes a token at the head: the last norm's input and output, gathered under sequence parallelism."""
    h = p.model.hidden_size
    return _inputs(p) + ceil_div(4 * h, p.layout.residual) + (2 * h if p.layout.residual > 1 else 0)
