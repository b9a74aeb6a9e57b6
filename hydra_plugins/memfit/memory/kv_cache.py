"""Keys and values of cached tokens.

Symbols: L layers with a growing cache, K key/value heads, D head dimension, S tokens, b bytes an element.
"""

from __future__ import annotations

from hydra_plugins.memfit.base.units import ceil_div, round_up
from hydra_plugins.memfit.model.spec import ModelSpec

PAGE_TOKENS = 16
"""vLLM's block size on CUDA: a sequence occupies whole blocks."""


def kv_bytes_per_token(model: ModelSpec, *, tensor_parallel: int = 1, element_bytes: int = 2) -> int:
    """
    Return the bytes that one cached token takes on one tensor-parallel rank.

        M = 2 · L · ceil(K / TP) · D · b         (2: one key and one value vector)
        M = L · (kv_lora_rank + rope) · b        multi-head latent attention; every rank holds all of it

    Leaves out: sliding-window layers are counted as full ones (an upper bound), scales of an fp8 cache.
    Source: vLLM v1/kv_cache_interface.py (FullAttentionSpec, MLAAttentionSpec); scaling-book, transformers.md.
    """
    layers = model.num_full_attention_layers
    if layers is None or model.sliding_window:
        layers = model.num_hidden_layers - model.num_linear_attention_layers
    if model.kv_lora_rank:
        return layers * (model.kv_lora_rank + model.qk_rope_head_dim) * element_bytes
    heads = max(1, ceil_div(model.num_key_value_heads, tensor_parallel))
    return 2 * layers * heads * model.head_dim * element_bytes


def paged_kv_bytes(
    model: ModelSpec, *, tokens: int, sequences: int = 1, tensor_parallel: int = 1, element_bytes: int = 2
) -> int:
    """
    Return the bytes of ``sequences`` sequences of ``tokens`` tokens each in a paged cache with `PAGE_TOKENS` blocks.

    Layers with linear attention add one state for each sequence (`state_bytes`), which vLLM takes from the same pool.
    """
    per_token = kv_bytes_per_token(model, tensor_parallel=tensor_parallel, element_bytes=element_bytes)
    state = state_bytes(model, tensor_parallel=tensor_parallel, element_bytes=element_bytes)
    return sequences * (round_up(tokens, PAGE_TOKENS) * per_token + state)


def state_bytes(model: ModelSpec, *, tensor_parallel: int = 1, element_bytes: int = 2) -> int:
    """
    Return the recurrent states of one sequence on one tensor-parallel rank.

        M = L_linear · (4 · H_v · d_k · d_v + b · (k - 1) · (2 · H_k · d_k + H_v · d_v)) / TP

    H and d are heads and head dimensions of the delta net, k its kernel. The recurrent part is counted in fp32, which some
    releases of vLLM use and others halve (an upper bound). Source: vLLM layers/mamba/mamba_utils.py.
    """
    layer = 4 * model.recurrent_state_elements + element_bytes * model.convolution_state_elements
    return model.num_linear_attention_layers * ceil_div(layer, tensor_parallel)
