"""Peak memory of Hugging Face ``generate`` on one GPU: the moments of prefill and decode at which the peak can be.

Symbols: B sequences in the batch (beams included), P prompt tokens, N new tokens, s cached tokens, S = s + t tokens after
a forward over t new ones (t = P in prefill, 1 in decode), b bytes an element; h hidden, m MLP width, q = heads · d, k =
key/value heads · d, H heads, d head dimension, V vocabulary, e active experts, x expert width.

Each term is a tensor that transformers' own code keeps alive at that moment; docs/generation.md has
the whole. Checked against op-level traces of the real ``generate`` (tests/data/generation_traces.json).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hydra_plugins.memfit.memory.allocator import FRAGMENTATION_SHARE
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.overheads import trainer_context_bytes
from hydra_plugins.memfit.memory.sampling import FP32, INT64, Sampler, held_scores, sampler_bytes
from hydra_plugins.memfit.model.spec import ModelSpec

ATTENTION = ("sdpa", "eager", "flash_attention_2")
CACHES = ("dynamic", "static", "offloaded", "none")

CUBLAS_WORKSPACE_BYTES = 32 << 20
"""What torch takes for cuBLAS on first use: 32 MiB on Hopper, 8 MiB before (torch ``CUBLAS_WORKSPACE_CONFIG`` defaults)."""


GROWTH_FRAGMENTATION = {True: 0.23, False: 0.26}
"""Share of what moves (all but the weights) that a growing cache leaves unusable, with expandable segments and without.

Each step asks for blocks a little larger than those that it frees. Replaying prefill and every step through a model of
torch's allocator on a full GPU (tests/support/generation_fragmentation.py), 14 cases needed 5 to 40 % more than the
tensors at their peak, median 19 %. 26 % covers 12 of them; the loop that halves a failed chunk covers the rest. With expandable
segments: 5 to 31 %, median 13 %; 23 % covers 12."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """What differs between versions of transformers. Defaults: 5.x."""

    all_logits: bool = False
    """The prefill computes logits of every position (before 4.45)."""
    upcast_logits: bool = False
    """The model returns fp32 logits (before 4.46)."""
    grouped_query_sdpa: bool = True
    """Without a mask, SDPA reads grouped keys and values as they are (since 4.54); before, they are repeated for each head."""
    sliding_cache: bool = True
    """A dynamic cache drops what a sliding window no longer sees (since 4.56)."""
    batched_experts: bool = True
    """Decode copies the weights of the experts that each row chose (since 5.0, on an accelerator)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of ``generate``."""

    rows: int
    """Sequences in the batch: questions at once x sequences at once, x beams."""
    prompt_tokens: int
    """Length of the padded prompts."""
    new_tokens: int
    element_bytes: int = 2
    attention: str = "sdpa"
    cache: str = "dynamic"
    padded: bool = False
    """Prompts of different lengths stand in one batch, so that a mask is needed."""
    sampler: Sampler = field(default_factory=Sampler)
    software: Software = field(default_factory=Software)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """One forward: t new tokens in each row on top of s cached ones."""

    new: int
    cached: int
    held_scores: int
    """fp32 (B, V) tensors of the step before that are still alive."""
    kept_scores: int = 0
    """fp32 (B, V) tensors that ``output_scores`` has collected so far."""

    @property
    def total(self) -> int:
        return self.new + self.cached


def cached_elements(model: ModelSpec) -> tuple[int, int]:
    """
    Return the elements that one token adds to the keys and to the values of one layer.

        k = K · d each; with latent attention H · (nope + rope) and H · v: transformers caches the expanded heads.

    Source: ``cache_utils.DynamicLayer.update``; ``DeepseekV3Attention.forward``.
    """
    if model.kv_lora_rank:
        heads = model.num_attention_heads
        return heads * (model.qk_nope_head_dim + model.qk_rope_head_dim), heads * model.v_head_dim
    return (model.num_key_value_heads * model.head_dim,) * 2


def cache_layers(model: ModelSpec, software: Software) -> tuple[int, int]:
    """Return how many layers keep the whole sequence, and how many only a sliding window."""
    attention = model.num_hidden_layers - model.num_linear_attention_layers
    full = model.num_full_attention_layers
    if model.sliding_window is None or full is None or not software.sliding_cache:
        return attention, 0
    return full, attention - full


def kv_cache_bytes(model: ModelSpec, call: Call, *, tokens: int, prefill: bool = False) -> int:
    """
    Return the bytes of keys and values once ``tokens`` tokens have been seen.

        M = (k + v) · b · B · Σ_layers S_layer
        S_layer = S; min(S, window) on a sliding layer, except after the prefill, whose whole prompt stays alive behind
        the slice until the next step; P + N - 1 in a static cache (a sliding layer: at most its window)

    Leaves out: the states of linear-attention layers; ``offloaded`` keeps two layers on the GPU.
    Source: ``DynamicLayer.update``, ``DynamicSlidingWindowLayer.update``, ``StaticLayer.lazy_initialization``.
    """
    if call.cache == "none":
        return 0
    full, sliding = cache_layers(model, call.software)
    static = call.cache == "static"
    length = call.prompt_tokens + call.new_tokens - 1 if static else tokens
    window = min(length, model.sliding_window or length)
    seen = full * length + sliding * (length if prefill and not static else window)
    if call.cache == "offloaded":
        seen = min(2, full + sliding) * length
    return sum(cached_elements(model)) * call.element_bytes * call.rows * seen


def peak(model: ModelSpec, call: Call) -> MemoryBreakdown:
    """Return the largest moment of the whole call, weights included; CUDA context and workspaces are not in it."""
    return max(moments(model, call), key=lambda moment: moment.total_bytes)


def process(model: ModelSpec, call: Call, *, expandable_segments: bool) -> MemoryBreakdown:
    """Return the peak of the process: `peak`, CUDA context, cuBLAS workspace, and what the allocator cannot use."""
    tensors = peak(model, call)
    moving = tensors.total_bytes - tensors.weights
    shares = GROWTH_FRAGMENTATION if call.cache == "dynamic" else FRAGMENTATION_SHARE
    return tensors + MemoryBreakdown(
        context=trainer_context_bytes(world_size=1) + CUBLAS_WORKSPACE_BYTES,
        fragmentation=int(moving * shares[expandable_segments]),
    )


def moments(model: ModelSpec, call: Call) -> Iterator[MemoryBreakdown]:
    """Yield every moment that can be the peak: within the prefill, the first decode step and the last one."""
    weights = MemoryBreakdown(weights=model.parameters * call.element_bytes)
    for step in _steps(call):
        for moment in (*_layer_moments(model, call, step), _head_moment(model, call, step)):
            yield weights + moment


def _steps(call: Call) -> tuple[_Step, ...]:
    held, kept = held_scores(call.sampler), call.new_tokens - 1 if call.sampler.keeps_scores else 0
    first = _Step(new=call.prompt_tokens, cached=0, held_scores=0)
    if call.new_tokens < 2:
        return (first,)
    if call.cache == "none":
        whole = call.prompt_tokens + call.new_tokens - 1
        return first, _Step(new=whole, cached=0, held_scores=held, kept_scores=kept)
    return (
        first,
        _Step(new=1, cached=call.prompt_tokens, held_scores=held),
        _Step(new=1, cached=call.prompt_tokens + call.new_tokens - 2, held_scores=held, kept_scores=kept),
    )


# One decoder layer ----------------------------------------------------------------------------------------------------


def _layer_moments(model: ModelSpec, call: Call, step: _Step) -> Iterator[MemoryBreakdown]:
    """Yield the moments of the last decoder layer, when the cache of all others has grown."""
    tokens = call.rows * step.new
    prefill = step.cached == 0
    grouped = prefill or call.sampler.beams
    cache = kv_cache_bytes(model, call, tokens=step.total, prefill=prefill)
    logits = _scores_bytes(model, call) * (step.held_scores + step.kept_scores)
    around = _inputs_bytes(model, call, step) + _mask_bytes(model, call, step)
    attention = MemoryBreakdown(
        kv_cache=cache,
        logits=logits,
        activations=around + _attention_bytes(model, call, step),
    )
    mlp = MemoryBreakdown(kv_cache=cache, logits=logits, activations=around + _mlp_bytes(model, call, tokens, grouped))
    norm = MemoryBreakdown(kv_cache=cache, logits=logits, activations=around + _norm_bytes(model, call) * tokens)
    grow = MemoryBreakdown(
        kv_cache=cache + _growth_bytes(model, call, step),
        logits=logits,
        activations=around + _projections(model, call) * tokens,
    )
    yield from (attention, mlp, norm, grow)


def _inputs_bytes(model: ModelSpec, call: Call, step: _Step) -> int:
    """
    Return what surrounds a layer: the embeddings and the layer's input (2 · h), cos and sin (2 · d), three int64 lists.

    Source: the ``inputs_embeds`` and ``hidden_states`` names of the model's forward; ids, mask and positions.
    """
    per_token = (2 * model.hidden_size + 2 * model.head_dim) * call.element_bytes
    return call.rows * (step.new * per_token + step.total * 3 * INT64)


def _mask_bytes(model: ModelSpec, call: Call, step: _Step) -> int:
    """
    Return the bytes of the attention mask that all layers share: (B, 1, t, S), boolean for SDPA, additive for eager.

    Flash attention keeps (B, S) alone, and so does SDPA where it needs no mask (`_masked`).
    """
    cells = call.rows * step.new * _attended(model, call, step)
    if call.attention == "eager":
        return cells * call.element_bytes
    return cells if call.attention == "sdpa" and _masked(model, call, step) else 0


def _masked(model: ModelSpec, call: Call, step: _Step) -> bool:
    """Whether SDPA needs a mask: padding, a static cache (longer than the query), or a window that has been outgrown."""
    sliding = cache_layers(model, call.software)[1] > 0
    outgrown = sliding and step.total >= (model.sliding_window or step.total + 1)
    return call.padded or call.cache == "static" or outgrown


def _attended(model: ModelSpec, call: Call, step: _Step) -> int:
    """Keys that one query of the last layer is compared with; a sliding layer's decode step sees its window alone."""
    length = call.prompt_tokens + call.new_tokens - 1 if call.cache == "static" else step.total
    full, sliding = cache_layers(model, call.software)
    only_sliding = sliding > 0 and full == 0
    prefill = step.cached == 0 and call.cache != "static"
    return min(length, model.sliding_window or length) if only_sliding and not prefill else length


def _projections(model: ModelSpec, call: Call) -> int:
    """Bytes a token of the normalised input, the query, and the new key and value."""
    query = model.num_attention_heads * (cached_elements(model)[0] // _key_heads(model))
    return call.element_bytes * (model.hidden_size + query + sum(cached_elements(model)))


def _key_heads(model: ModelSpec) -> int:
    return model.num_attention_heads if model.kv_lora_rank else model.num_key_value_heads


def _growth_bytes(model: ModelSpec, call: Call, step: _Step) -> int:
    """
    Return what growing the last layer's cache needs beside the cache: the old values next to the new ones.

        dynamic   v · b · B · s          ``torch.cat`` writes a new tensor while the old one is alive; keys were done before
        static    0                      written in place
        beams     (as dynamic)           picking the surviving beams copies one tensor of one layer as well

    Source: ``DynamicLayer.update``, ``reorder_cache``.
    """
    if call.cache in ("static", "none"):
        return 0
    length = _attended(model, call, step)
    old = length if call.sampler.beams else length - step.new
    return cached_elements(model)[1] * call.element_bytes * call.rows * old


def _attention_bytes(model: ModelSpec, call: Call, step: _Step) -> int:
    """
    Return the bytes of the attention itself, beside the cache.

        every kind   b · (h + 2q) a new token: normalised input, query, output
        rotary       b · (h + 4q + 2k): the query, three rotated parts of it, key, value
        repeated     2 · b · q · S a row: keys and values once for each head (SDPA with a mask, eager, old versions)
        SDPA + mask  2 · b · t · S a row: the additive mask that ATen makes of the boolean one, and its padded copy
        eager        H · t · S · (b + 8) a row: scores, their fp32 copy and the fp32 softmax
        flash        4H a new token (log-sum-exp); with padding the unpadded copies of q, k and v, b · (q + 2k) each

    Source: ``sdpa_attention_forward``, ``eager_attention_forward``, ``_upad_input``;
    ATen/native/transformers/attention.cpp (``pad_bias``).
    """
    b, heads = call.element_bytes, model.num_attention_heads
    key, value = (width // _key_heads(model) * heads for width in cached_elements(model))
    new, length = call.rows * step.new, call.rows * _attended(model, call, step)
    cells = length * step.new
    rotary = b * new * (model.hidden_size + 4 * key + sum(cached_elements(model)))
    repeated = b * length * (key + value) if heads > _key_heads(model) else 0
    own = b * new * (model.hidden_size + key + value) + FP32 * heads * new
    if call.attention == "eager":
        own = b * new * (model.hidden_size + key) + repeated + heads * cells * (b + 2 * FP32)
    elif call.attention == "sdpa":
        masked = _masked(model, call, step)
        own += 2 * b * cells if masked else 0
        own += repeated if masked or not call.software.grouped_query_sdpa else 0
    elif call.padded:
        own += b * (length * sum(cached_elements(model)) + new * (key + value))
    return max(rotary, own)


def _norm_bytes(model: ModelSpec, call: Call) -> int:
    """Bytes a token of an RMSNorm after the attention: the residual and two fp32 tensors."""
    return model.hidden_size * (call.element_bytes + 2 * FP32)


def _mlp_bytes(model: ModelSpec, call: Call, tokens: int, grouped: bool) -> int:
    """
    Return the bytes of the MLP of one layer.

        dense          b · (2h + 3m) a token: residual and normalised input; activation, up and their product
        experts        b · (2h + 4 e h) a token (grouped: the rows of all chosen experts, in, out, weighted, reordered), or
                       b · (2h + e (h + 4x)) where that is more
        decode         b · e · 3 h x a row: the chosen experts' own weights are copied for each row (transformers >= 5; a
                       beam search stays with the grouped kernel)

    Leaves out: shared experts next to routed ones (smaller). Before 5.0 experts ran one after another: the dense formula
    for one expert, and the int64 one-hot of the choice, 8 e E a token.
    Source: ``Qwen2MLP.forward``; ``integrations/moe.py``, ``grouped_mm_experts_forward`` and ``batched_mm_experts_forward``.
    """
    b, h, x, active = call.element_bytes, model.hidden_size, model.moe_intermediate_size, model.num_experts_per_tok
    if not model.num_experts:
        return tokens * b * (2 * h + 3 * model.intermediate_size)
    if not call.software.batched_experts:
        return tokens * (b * (4 * h + 3 * x) + INT64 * active * model.num_experts)
    if grouped:
        return tokens * (b * (2 * h + active * max(4 * h, h + 4 * x)) + 4 * INT64 * active)
    return tokens * b * (2 * h + active * (h + 3 * h * x))


# The head and the sampler ---------------------------------------------------------------------------------------------


def _scores_bytes(model: ModelSpec, call: Call) -> int:
    return FP32 * call.rows * model.vocab_size


def _head_moment(model: ModelSpec, call: Call, step: _Step) -> MemoryBreakdown:
    """Return the moment of choosing the next token, after the last layer."""
    prefill = step.cached == 0
    cells = call.rows * model.vocab_size
    logits = FP32 if call.software.upcast_logits else call.element_bytes
    sampling = cells * sampler_bytes(call.sampler, rows=call.rows, held=step.held_scores, logits=logits)
    if prefill and call.software.all_logits:
        everywhere = cells * step.new * (call.element_bytes + FP32)
        sampling = max(sampling + cells * FP32 * (step.new - 1), everywhere)
    return MemoryBreakdown(
        kv_cache=kv_cache_bytes(model, call, tokens=step.total, prefill=prefill),
        logits=sampling + _scores_bytes(model, call) * step.kept_scores,
        activations=call.rows * step.total * 3 * INT64,
    )
