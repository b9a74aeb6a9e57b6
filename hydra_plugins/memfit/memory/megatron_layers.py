"""Activations of a Megatron-Core transformer layer in bf16 with flash attention, in bytes per token of one context-parallel rank.

Symbols (elements per token): h hidden size, m MLP width, q, k, v, o widths of query, key, value and attention output (all
heads), H query heads, t tensor-parallel size, s = t under sequence parallelism, else 1. Experts: E experts, a of them active
for a token, m_e width of one.

    kept by a layer          8h/s + 8/s + (4q + 4k + 2v + 2o + 4H)/t + 6m/t
    with full recomputation  2h/s for each group of layers

8h are the inputs and outputs of both norms; 6m are gate and up (4m) and their product (2m), SwiGLU being fused. The attention
kernel keeps rotated copies of q and k, its output, and v, which is a view of the projection's output: all of that stays, q and
k once more. Korthikanti et al. (arXiv 2205.05198), section 4, is the same sum for a GPT layer with dropout and without rotary
embedding: 34h there, 32h here without its masks. Op-level traces of megatron-core agree (docs/validation/megatron.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.memory.megatron import Layout, Stage
from hydra_plugins.memfit.model.spec import ModelSpec

ROUTING_IMBALANCE = 1.5
"""Rows of the busiest expert-parallel rank in one layer over the mean. Assumed: routing is data; 1 where all experts are on
one rank. What many layers keep together is counted at the mean: no rank is the busiest in all of them."""

ROUTING_BYTES = 10
"""A token and expert: fp32 probabilities and the map of the routing, as they are and transposed for the permutation; the fused
permutation keeps its own map instead of the second pair (8)."""
ROW_BYTES = 28
"""A row of an expert: where it came from (8), the choice of the router (8 + 4), its probability as sent and as sorted (4 + 4)."""

RECOMPUTABLE = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "mla_up_proj", "shared_experts")
"""What selective recomputation can leave out (``recompute_modules``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """Activation recomputation as Megatron is told to do it."""

    granularity: str = "none"
    """``none``, ``selective`` or ``full``."""
    method: str = "uniform"
    """Of ``full``: ``uniform`` groups of `layers`, or ``block``: the first `layers` of a chunk."""
    layers: int = 1
    modules: frozenset[str] = frozenset({"core_attn"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The widths of one layer on one rank, elements per token."""

    h: int
    residual: int
    """s: what divides norms and residuals."""
    tensor: int
    attention: int
    """Rotated q and k, the projection's whole output that v is a view of, and the attention's output, on one rank."""
    output: int
    """The attention's output alone, on one rank."""
    heads: int
    norms: int
    """Inputs of the norms of q and k with a variance for each head, or of the compressed q and kv of latent attention."""
    m: int
    """MLP width of a dense layer, or of the shared expert, on one rank."""
    expert_m: int = 0
    rows: float = 0.0
    """Rows that this rank's experts see for each of its tokens, on average; 0 for a dense layer."""
    most_rows: float = 0.0
    """The same on the busiest rank of one layer."""
    moving_rows: float = 0.0
    """Copies of rows beside the sorted ones that experts read: as sent, as received, as gathered by expert-tensor ranks."""
    experts: int = 0

    @classmethod
    def of(cls, model: ModelSpec, layout: Layout, *, moe: bool, imbalance: float = ROUTING_IMBALANCE) -> Layer:
        """Return the widths of a dense or of a mixture-of-experts layer."""
        t, most = layout.tensor, _rows(model, layout, imbalance) if moe else 0.0
        q, k, projected, o, norms = _attention(model)
        width = model.shared_expert_intermediate_size if moe else model.intermediate_size
        return cls(
            h=model.hidden_size,
            residual=layout.residual,
            tensor=t,
            attention=ceil_div(q + k + projected + o, t),
            output=ceil_div(o, t),
            heads=ceil_div(model.num_attention_heads, t),
            norms=norms if model.kv_lora_rank else ceil_div(norms, t),
            m=ceil_div(width, t),
            expert_m=ceil_div(model.moe_intermediate_size, layout.expert_tensor) if moe else 0,
            rows=_rows(model, layout, 1.0) if moe else 0.0,
            most_rows=most,
            moving_rows=_moving(model, layout, most) if moe else 0.0,
            experts=model.num_experts if moe else 0,
        )


def _attention(model: ModelSpec) -> tuple[int, int, int, int, int]:
    """Widths of q, of k, of the tensor that v is a view of, of the output, and of what norms inside attention keep."""
    heads = model.num_attention_heads
    if model.kv_lora_rank:
        q = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        latent = model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim
        projected = heads * (model.qk_nope_head_dim + model.v_head_dim)
        return q, q, projected, heads * model.v_head_dim, 2 * latent
    q, k = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    normed = q + k + 2 * (heads + model.num_key_value_heads) if model.qk_norm else 0
    return q, k, q + 2 * k, q, normed


def _rows(model: ModelSpec, layout: Layout, imbalance: float) -> float:
    """Rows for each token: its active experts over the ranks that hold them; expert-tensor ranks see each other's rows."""
    local = model.num_experts_per_tok / layout.residual
    most = layout.expert * min(model.num_experts_per_tok, model.num_experts // max(1, layout.expert)) / layout.residual
    return min(local * (imbalance if layout.expert > 1 else 1.0), most) * layout.expert_tensor


def _moving(model: ModelSpec, layout: Layout, most: float) -> float:
    """Rows on their way: those that a rank sends, what arrives from other ranks, and what expert-tensor ranks gather of it."""
    sent = model.num_experts_per_tok / layout.residual
    received = most / layout.expert_tensor if layout.expert > 1 else 0.0
    return sent + received + (most if layout.expert_tensor > 1 else 0.0)


def kept_bytes(layer: Layer, recompute: Recompute | None = None, *, busiest: bool = False) -> int:
    """
    Return what a layer keeps for its backward pass; selective recomputation leaves out what it names.

    ``busiest``: on the rank whose experts have most rows, for one layer at a time.
    """
    dropped = recompute.modules if recompute is not None and recompute.granularity == "selective" else frozenset()
    s = layer.residual
    norms = 0 if "layernorm" in dropped else ceil_div(4 * layer.h, s)
    kept = ceil_div(4 * layer.h + 8, s) + norms
    attention = layer.output if "mla_up_proj" in dropped else layer.attention
    kept += 2 * attention + 4 * layer.heads + 2 * layer.norms
    if layer.rows:
        rows = layer.most_rows if busiest else layer.rows
        return kept + (0 if "moe" in dropped else _experts_keep(layer, rows, dropped))
    return kept + (0 if "mlp" in dropped else 6 * layer.m)


def _experts_keep(layer: Layer, rows: float, dropped: frozenset[str]) -> int:
    """Permuted inputs and outputs of fc1 and the activation, row by row; the routing; the shared expert."""
    act = 0 if "moe_act" in dropped else 2 * layer.expert_m
    each = 2 * layer.h + 4 * layer.expert_m + act + ROW_BYTES
    shared = 0 if "shared_experts" in dropped else 6 * layer.m
    return int(rows * each) + ceil_div(ROUTING_BYTES * layer.experts, layer.residual) + shared


def forward_bytes(layer: Layer) -> int:
    """
    Return the workspace of one layer's forward pass without gradients: the MLP beside the residual.

    4h/s + 6m/t; under sequence parallelism the input is gathered too (2h), and the second product writes a whole output
    before it is divided (2h) while three pieces of the residual's size are alive. Experts: 2h for each row on its way and each
    sorted one, and what fc1, the activation and fc2 write (2h + 6m_e a row), or fc2's output in both orders (4h).
    """
    residual, pieces = ceil_div(4 * layer.h, layer.residual), ceil_div(6 * layer.h, layer.residual)
    gathered = 2 * layer.h if layer.residual > 1 else 0
    if layer.rows:
        written = max(2 * layer.h + 6 * layer.expert_m, 4 * layer.h)
        experts = int(2 * layer.h * layer.moving_rows + layer.most_rows * (2 * layer.h + written + ROW_BYTES))
        experts += gathered + ceil_div(ROUTING_BYTES * layer.experts, layer.residual)
        return max(residual + max(experts, gathered + 6 * layer.m), pieces + 2 * gathered)
    second = pieces + 2 * gathered + 2 * layer.m if gathered else 0
    return max(residual + gathered + max(6 * layer.m, 2 * layer.attention), second)


def update_moments_bytes(layer: Layer) -> tuple[tuple[int, int], ...]:
    """
    Return the moments of one layer's forward and backward pass at which most is alive beside what it keeps.

    Each is (bytes a token, gradients of weight matrices that are written: 0 none, 1 fc2's, 2 fc1's, which is twice as large).
    What a backward pass has used up is no longer kept: after fc2 its input (2m), after the activation its input too (4m).
    """
    residual = ceil_div(2 * layer.h, layer.residual)
    if layer.rows:
        return _experts_moments(layer, residual)
    gathered = 2 * layer.h if layer.residual > 1 else 0
    return (
        (residual + 2 * gathered + 2 * layer.m, 1),
        (residual + gathered + 4 * layer.m, 0),
        (residual + gathered + 2 * layer.h - 2 * layer.m, 2),
    )


def _experts_moments(layer: Layer, residual: int) -> tuple[tuple[int, int], ...]:
    """
    The forward pass, with rows on their way and fc2's output in both orders; then the backward pass of fc2, activation, fc1.

    Under sequence parallelism Megatron holds a buffer for gathered inputs (2h), of which experts use none.
    """
    h, m, rows, most = layer.h, layer.expert_m, layer.rows, layer.most_rows
    held = residual + (2 * h if layer.residual > 1 else 0)
    shared = 2 * layer.m + (2 * h if layer.residual > 1 else 0)
    return (
        (held + int(2 * h * layer.moving_rows + 4 * h * most), 0),
        (held + max(int((2 * h + 2 * m) * most), shared), 1),
        (held + int(6 * m * most - 2 * m * rows), 0),
        (held + int((2 * h + 4 * m) * most - 6 * m * rows), 2),
    )


def in_flight(layout: Layout, stage: Stage, *, micro_batches: int) -> float:
    """
    Return how many micro-batches' worth of the stage's layers are alive at the peak of the pipeline's schedule.

        1F1B          min(M, PP - i)                       for stage i of PP
        interleaved   min(M·v, 2 (PP - i - 1) + (v - 1) PP + 1) / v   for v chunks a rank

    Source: megatron-core ``pipeline_parallel/schedules.py`` (``num_warmup_microbatches``), Narayanan et al., arXiv 2104.04473.

    >>> in_flight(Layout(world=8, pipeline=4), Stage(index=1, layers=8, moe_layers=0, first=False, last=False), micro_batches=16)
    3.0
    """
    pp, v = layout.pipeline, layout.virtual
    if pp == 1:
        return 1.0
    if v == 1:
        return float(min(micro_batches, pp - stage.index))
    chunks = 2 * (pp - stage.index - 1) + (v - 1) * pp + 1
    return min(micro_batches * v, chunks) / v
