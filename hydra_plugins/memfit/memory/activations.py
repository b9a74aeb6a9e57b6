"""Activations of the transformer body in bf16 with flash attention, in bytes per token of one rank.

Symbols (elements per token): h hidden size, m MLP width (the widths of all active experts together on an MoE layer),
q = heads · d, k = key/value heads · d, d head dimension, H query heads, K key/value heads, e active experts, E experts.

Each term was read off the modules of Hugging Face's decoder layers (Llama, Qwen2, Qwen3, Qwen3-MoE) and agrees with
op-level traces of the same modules (docs/validation/trainer.md). Korthikanti et al. (arXiv 2205.05198), eq. 2, is the
same sum for a GPT layer with dropout; there is none here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.model.spec import ModelSpec

_SANDWICH_NORMS = ("gemma2", "gemma3")
"""Model types (prefixes) with a norm before and after both attention and MLP."""
_REPEATED_KV = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose keys and values verl repeats for every query head before the kernel; their RoPE has three tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Elements that one token has at each point of a decoder layer."""

    h: int
    m: int
    q: int
    k: int
    d: int
    heads: int
    kv_heads: int
    qk_norm: bool
    norms: int
    """RMSNorms on the residual stream of one layer: 2, or 4 in Gemma 2 and 3."""
    fp32_norms: bool
    """The norm's product is fp32 as well (Gemma), so that q/k norm keeps twice as much."""
    active_experts: int
    experts: int
    expert_m: int
    shared_m: int
    moved_output: bool = False
    """Attention's output is put elsewhere before its projection: padded again, or exchanged between sequence-parallel ranks."""

    position_numbers: int = 1
    """Integers that say where a token is: 4 in a model that sees images (text, time, height, width)."""
    rope_tables: int = 1
    """Tables of cos and sin that live through a pass; 3 where the parts of a head look up another one each."""

    @property
    def mlp_rows(self) -> int:
        """Width of the weight gradient that is alive at the layer's activation peak: one MLP matrix of h rows."""
        return 2 * self.experts * self.expert_m if self.experts else self.m

    @classmethod
    def of(cls, model: ModelSpec, *, moved_output: bool = False) -> Widths:
        """Return the widths of the model's widest decoder layer."""
        moe = model.num_experts > 0
        mla = model.kv_lora_rank > 0
        q_head = model.qk_nope_head_dim + model.qk_rope_head_dim if mla else model.head_dim
        repeated = model.model_type.startswith(_REPEATED_KV)
        kv_heads = model.num_attention_heads if mla or repeated else model.num_key_value_heads
        return cls(
            h=model.hidden_size,
            m=model.num_experts_per_tok * model.moe_intermediate_size if moe else model.intermediate_size,
            q=model.num_attention_heads * q_head,
            k=kv_heads * q_head,
            d=q_head,
            heads=model.num_attention_heads,
            kv_heads=kv_heads,
            qk_norm=model.qk_norm,
            norms=4 if model.model_type.startswith(_SANDWICH_NORMS) else 2,
            fp32_norms=model.model_type.startswith("gemma"),
            active_experts=model.num_experts_per_tok,
            experts=model.num_experts,
            expert_m=model.moe_intermediate_size,
            shared_m=model.shared_expert_intermediate_size,
            moved_output=moved_output,
            position_numbers=4 if model.vision_parameters else 1,
            rope_tables=3 if repeated else 1,
        )


def checkpoint_bytes(w: Widths) -> int:
    """Return what a checkpointed layer keeps for its backward pass: its input, 2h."""
    return 2 * w.h


def layer_saved_bytes(w: Widths) -> int:
    """
    Return what one layer saves for its backward pass without checkpointing, per token.

        norms 2 · 8h   each RMSNorm keeps its fp32 input (4h), the normalised bf16 copy (2h) and its output (2h);
                       Gemma 2 and 3 have four
        attention      4q + 4k (q, k, v and the output, bf16) + 4H (fp32 log-sum-exp)
                       + 2q where the output is moved: the kernel's and the projection's are two tensors then
        MLP            8m (gate, up, activation, product, bf16)
        q/k norm       6(q + k) + 4(H + K); Gemma 12(q + k)
        MoE            see `_moe_saved_bytes` in place of 8m
    """
    saved = 8 * w.norms * w.h + (6 if w.moved_output else 4) * w.q + 4 * w.k + 4 * w.heads + 8
    if w.qk_norm:
        saved += (12 if w.fp32_norms else 6) * (w.q + w.k) + 4 * (w.heads + w.kv_heads)
    return saved + (_moe_saved_bytes(w) if w.experts else 8 * w.m)


def _moe_saved_bytes(w: Widths) -> int:
    """Gathered inputs and outputs of the active experts, their MLP, the router's fp32 softmax and indices."""
    rows = w.active_experts
    experts = rows * (4 * w.h + 8 * w.expert_m) + 8 * w.shared_m
    router = 6 * w.experts + 24 * rows
    return experts + router


def layer_backward_bytes(w: Widths, *, checkpointing: bool) -> int:
    """
    Return the workspace at the peak of one layer's backward pass, per token, beside what is saved.

    With checkpointing the layer is recomputed (everything it would have saved) and the MLP's gradients stand on top:
    F + 4m + 2h. Without, the gradients alone: max(24h, 4m + 2h), the first one from the fp32 backward of RMSNorm.
    """
    wide = w.active_experts * w.expert_m + w.shared_m if w.experts else w.m
    gradients = 4 * wide + 2 * w.h + (4 * w.active_experts * w.h if w.experts else 0)
    if checkpointing:
        return layer_saved_bytes(w) + gradients
    return max(24 * w.h, gradients)


def layer_forward_bytes(w: Widths) -> int:
    """Return the workspace of one layer's forward pass without gradients, per token: 6m + 8h (gate, up, product; two norms)."""
    if w.experts:
        return 8 * w.h + 4 * w.active_experts * w.h + 6 * (w.active_experts * w.expert_m + w.shared_m) + 6 * w.experts
    return 6 * w.m + 8 * w.h


def position_bytes(w: Widths) -> int:
    """Return the inputs that live through a whole pass, per token: ids, positions (8 each), labels, and cos/sin of RoPE (4d)."""
    return 4 * w.d * w.rope_tables + 21 + 8 * w.position_numbers
