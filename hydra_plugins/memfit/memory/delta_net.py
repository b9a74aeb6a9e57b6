"""Activations of a gated delta net (Qwen3-Next, Qwen3.5) in bf16, in bytes per token of one rank.

Symbols (elements per token): V = value heads · d_v, Q = value heads · d_k (keys are repeated for every value head),
C = 2 · key heads · d_k + V, the channels of the convolution, H value heads, S = V · d_k / 64: one state for each chunk.

The kernels are those of flash-linear-attention and causal-conv1d, which transformers calls where both are installed. Each
term was read off transformers' module and the kernels' wrappers (``fla/ops/gated_delta_rule/chunk.py``, ``wy_fast.py``,
``fla/ops/common/chunk_delta_h.py``, ``chunk_o.py``, ``fla/modules/fused_norm_gate.py``) and agrees with op-level traces
(docs/validation/trainer.md). Left out: the last chunk of each sequence, which may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.model.spec import ModelSpec

CHUNK_TOKENS = 64
"""Tokens between two states that the kernels write down; also the width of one row of their triangular matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNet:
    """Elements that one token has inside a gated delta net."""

    heads: int
    q: int
    v: int
    channels: int
    states: int
    packed: bool
    """One projection for all inputs (Qwen3-Next): its output lives until the layer ends, beside copies of its parts."""

    @classmethod
    def of(cls, model: ModelSpec) -> DeltaNet:
        """Return the widths in a model that has layers of this kind."""
        heads, key = model.linear_num_value_heads, model.linear_key_head_dim
        v = heads * model.linear_value_head_dim
        return cls(
            heads=heads,
            q=heads * key,
            v=v,
            channels=2 * model.linear_num_key_heads * key + v,
            states=ceil_div(v * key, CHUNK_TOKENS),
            packed=model.model_type == "qwen3_next",
        )


def saved_bytes(d: DeltaNet) -> int:
    """
    Return what the mixer saves for its backward pass.

    2C convolution's input, 4Q normalised q and k, 8V (v, gate, output, its gated norm), 128H the triangular matrix of a
    chunk, 26H (gates and norms in fp32, beta).
    """
    return 2 * d.channels + 4 * d.q + 8 * d.v + (2 * CHUNK_TOKENS + 26) * d.heads


def forward_bytes(d: DeltaNet, *, hidden: int) -> int:
    """
    Return what is alive at the kernel's peak without gradients: the embeddings, the layer's input and its norm included.

    6h + 2C + 10V + 10Q + 2S + 150H: the convolution's output, q and k before and after their norm, and w, u, v, states and
    output of the chunks; 2(C + V) more where one projection makes all inputs.
    """
    inside = 2 * d.channels + 10 * d.v + 10 * d.q + 2 * d.states + (2 * CHUNK_TOKENS + 22) * d.heads
    return 6 * hidden + inside + (2 * (d.channels + d.v) if d.packed else 0)


def backward_bytes(d: DeltaNet, *, hidden: int) -> int:
    """
    Return what is alive at the peak of the kernel's backward pass, what the mixer saved included.

    12h (first norm and residual), 2C, 14V, 14Q, 4S and 170H: the kernel computes its states again and keeps them beside
    their gradients until it returns.
    """
    return 12 * hidden + 2 * d.channels + 14 * (d.v + d.q) + 4 * d.states + (2 * CHUNK_TOKENS + 42) * d.heads


def fallback_saved_bytes(d: DeltaNet) -> int:
    """
    Return what the mixer saves where the kernels are not installed and transformers computes the rule in torch.

    6C + 29.5Q + 28.5V + 4S + 7065H: fp32 copies of everything, and the rows of each chunk's triangular matrix, of which
    every step of a loop keeps two. Counted on a trace of ``torch_chunk_gated_delta_rule`` (transformers 5.10).
    """
    return 6 * d.channels + (59 * d.q + 57 * d.v) // 2 + 4 * d.states + 7065 * d.heads
