"""Activations of the transformer body in bf16 with flash attention, in bytes per token of one rank.

Symbols (elements per token): h hidden size, m MLP width (the widths of all active experts together on an MoE layer),
q = heads · d, k = key/value heads · d, d head dimension, H query heads, K key/value heads, e active experts, E experts.

Each term was read off the modules of Hugging Face's decoder layers (Llama, Qwen2, Qwen3, Qwen3-MoE) and agrees with
op-level traces of the same modules (docs/validation/trainer.md). Korthikanti et al. (arXiv 2205.05198), eq. 2, is the
same sum for a GPT layer with dropout; there is none here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra_plugins.memfit.memory import delta_net
from hydra_plugins.memfit.memory.delta_net import DeltaNet
from hydra_plugins.memfit.model.spec import ModelSpec

_SANDWICH_NORMS = ("gemma2", "gemma3")
"""Model types (prefixes) with a norm before and after both attention and MLP."""
_REPEATED_KV = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose keys and values verl repeats for every query head before the kernel; their RoPE has three tables."""
_FP32_SCALED = ("qwen3_next", "qwen3_5", "gpt_oss")
"""Model types (prefixes) whose norms multiply by their weight in fp32, as Gemma's do."""
_CLAMPED = ("gpt_oss",)
"""Model types (prefixes) whose experts add biases, clamp both halves and apply a sigmoid of their own, each a tensor."""
_GATED_SHARED = ("qwen",)
"""Model types (prefixes) that multiply the shared expert's output by a gate."""
_FP32_ROUTED = ("deepseek", "kimi", "glm4_moe")
"""Model types (prefixes) whose router computes in fp32 and multiplies the experts' rows by fp32 weights."""


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
    shared_gate: bool = False
    """The shared expert's output is multiplied by a gate, so that it is saved."""
    clamped: bool = False
    """Experts keep biases, clamps and a sigmoid as tensors of their own (gpt-oss)."""
    fp32_routed: bool = False
    """The router keeps its input in fp32, and the experts' rows are multiplied by fp32 weights (DeepSeek)."""
    latent: int = 0
    """Ranks of the compressed q and kv together (latent attention): the inputs of two more norms."""
    values: int = 0
    """Width of attention's output where it is narrower than q (latent attention): cut out of the padded one."""
    output_gate: bool = False
    """Attention's output is multiplied by a gate, which the query's projection makes too."""
    fp32_scaled: bool = False
    """Norms multiply by their weight in fp32: their normalised input is kept in 4 bytes (Qwen3-Next, Qwen3.5, gpt-oss)."""
    delta: DeltaNet | None = None
    """The layer has a gated delta net in place of attention."""
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

    @property
    def norm(self) -> int:
        """Bytes that one norm over the residual stream saves, for each element."""
        return 10 if self.fp32_scaled else 8

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
            shared_gate=model.model_type.startswith(_GATED_SHARED),
            clamped=model.model_type.startswith(_CLAMPED),
            fp32_routed=model.model_type.startswith(_FP32_ROUTED),
            latent=model.kv_lora_rank + model.q_lora_rank,
            values=model.num_attention_heads * model.v_head_dim if mla and model.v_head_dim != q_head else 0,
            output_gate=model.attention_output_gate,
            fp32_scaled=model.model_type.startswith(_FP32_SCALED),
            moved_output=moved_output,
            position_numbers=4 if model.vision_parameters else 1,
            rope_tables=3 if repeated else 1,
        )

    @classmethod
    def of_linear(cls, model: ModelSpec) -> Widths | None:
        """Return the widths of the layers with linear attention; None where there are none."""
        return replace(cls.of(model), delta=DeltaNet.of(model)) if model.num_linear_attention_layers else None


def checkpoint_bytes(w: Widths) -> int:
    """Return what a checkpointed layer keeps for its backward pass: its input, 2h."""
    return 2 * w.h


def layer_saved_bytes(w: Widths) -> int:
    """
    Return what one layer saves for its backward pass without checkpointing, per token.

        norms 2 · 8h   each RMSNorm keeps its fp32 input (4h), the normalised bf16 copy (2h) and its output (2h);
                       Gemma 2 and 3 have four; Qwen3-Next and Qwen3.5 2 · 10h, the copy is fp32
        attention      4q + 4k (q, k, v and the output, bf16) + 4H (fp32 log-sum-exp)
                       + 2q where the output is moved: the kernel's and the projection's are two tensors then
        MLP            8m (gate, up, activation, product, bf16)
        q/k norm       6(q + k) + 4(H + K); Gemma 12(q + k); Qwen3-Next and Qwen3.5 8(q + k)
        output gate    4q (the gate and the product)
        latent         8 for each rank of the compressed q and kv, and 2o where v is padded to the width of q
        delta net      see `delta_net.saved_bytes` in place of attention
        MoE            see `_moe_saved_bytes` in place of 8m
    """
    mixer = delta_net.saved_bytes(w.delta) if w.delta else _attention_saved_bytes(w)
    return w.norm * w.norms * w.h + mixer + 8 + (_moe_saved_bytes(w) if w.experts else 8 * w.m)


def _attention_saved_bytes(w: Widths) -> int:
    saved = (6 if w.moved_output else 4) * w.q + 4 * w.k + 4 * w.heads + (4 * w.q if w.output_gate else 0)
    saved += 8 * w.latent + 2 * w.values
    if w.qk_norm:
        normed = 12 if w.fp32_norms else 8 if w.fp32_scaled else 6
        saved += normed * (w.q + w.k) + 4 * (w.heads + w.kv_heads)
    return saved


def _moe_saved_bytes(w: Widths) -> int:
    """Gathered inputs and outputs of the active experts, their MLP, the router's fp32 softmax and indices."""
    rows = w.active_experts
    experts = (
        rows * (4 * w.h + (14 if w.clamped else 8) * w.expert_m)
        + 8 * w.shared_m
        + (2 * w.h if w.shared_m and w.shared_gate else 0)
    )
    router = 6 * w.experts + 24 * rows + (4 * w.h if w.fp32_routed else 0)
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


def expert_backward_bytes(w: Widths, *, checkpointing: bool) -> int:
    """
    Return the workspace where the backward pass of a layer of experts begins, per token; 0 for a dense layer.

    The rows of e experts and their products with the routing weights: 6eh; 14eh where those are fp32, by when the shared
    expert's backward pass is over.
    """
    if not w.experts:
        return 0
    rows = w.active_experts * w.h
    shared = -8 * w.shared_m if w.fp32_routed else 2 * w.h if w.shared_m else 0
    return (layer_saved_bytes(w) if checkpointing else 0) + (14 if w.fp32_routed else 6) * rows + 2 * w.h + shared


def layer_forward_bytes(w: Widths) -> int:
    """
    Return the workspace of one layer's forward pass without gradients, per token.

    MLP 6m + 8h (gate, up, product; two norms); e experts of a token at least 8eh + 8h, when their rows are put back into
    order (12eh after fp32 weights; gpt-oss e (18m + 2h) + 8h); a delta net `delta_net.forward_bytes`.
    """
    mixer = delta_net.forward_bytes(w.delta, hidden=w.h) if w.delta else 0
    return max(mixer, _feed_forward_bytes(w))


def _feed_forward_bytes(w: Widths) -> int:
    if not w.experts:
        return 6 * w.m + 8 * w.h
    rows = w.active_experts
    if w.clamped:
        return rows * (18 * w.expert_m + 2 * w.h) + 8 * w.h
    inside = 8 * w.h + 4 * rows * w.h + 6 * (rows * w.expert_m + w.shared_m) + 6 * w.experts
    return max(inside, (12 if w.fp32_routed else 8) * rows * w.h + 8 * w.h + 2 * w.experts + 40 * rows)


def position_bytes(w: Widths) -> int:
    """Return the inputs that live through a whole pass, per token: ids, positions (8 each), labels, and cos/sin of RoPE (4d)."""
    return 4 * w.d * w.rope_tables + 21 + 8 * w.position_numbers
