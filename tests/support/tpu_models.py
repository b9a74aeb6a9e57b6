"""Architectures of the TPU tests, written from their shapes: no file of conf/model decides these tests."""

from __future__ import annotations

from hydra_plugins.memfit.model.spec import ModelSpec

_SHAPES = {
    # name: vocabulary, hidden, feed-forward, layers, heads, key/value heads, head size, tied
    "qwen2.5-0.5b": (151936, 896, 4864, 24, 14, 2, 64, True),
    "qwen2.5-1.5b": (151936, 1536, 8960, 28, 12, 2, 128, True),
    "qwen2.5-3b": (151936, 2048, 11008, 36, 16, 2, 128, True),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128, False),
}


def model(name: str) -> ModelSpec:
    """Return a Qwen2.5 architecture with its exact parameter counts."""
    vocabulary, hidden, wide, layers, heads, kv_heads, size, tied = _SHAPES[name]
    query, key = heads * size, kv_heads * size
    layer = hidden * query + query + 2 * (hidden * key + key) + query * hidden + 3 * hidden * wide + 2 * hidden
    root = vocabulary * hidden * (1 if tied else 2) + hidden
    return ModelSpec(
        name=name,
        source="tests/support/tpu_models.py",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        parameters=layers * layer + root,
        embedding_parameters=vocabulary * hidden,
        root_parameters=root,
        layer_parameters=layer,
        active_parameters=layers * layer + root,
    )
