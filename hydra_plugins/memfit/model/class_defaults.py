"""The values that the configuration classes of transformers 5.10 give to keys that config.json leaves out.

Only the keys that are read. ``None`` means that the class derives the value (`config_json`). Compared with the classes
themselves in ``tests/test_model_against_transformers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

_COLUMNS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
"""What every class has, in the order of the table's rows; the other keys stand behind them by name."""


def _sizes(*row: int | bool | None, **others: object) -> Mapping[str, object]:
    return {**dict(zip(_COLUMNS, row, strict=True)), **others}


# fmt: off
CLASS_DEFAULTS: dict[str, Mapping[str, object]] = {
    "llama": _sizes(4096, 11008, 32, 32, None, None, 32000, False, 2048, attention_bias=False, mlp_bias=False),
    "mistral": _sizes(4096, 14336, 32, 32, 8, None, 32000, False, 131072, sliding_window=4096),
    "mixtral": _sizes(4096, 14336, 32, 32, 8, None, 32000, False, 131072, sliding_window=None, num_local_experts=8,
        num_experts_per_tok=2),
    "qwen2": _sizes(4096, 22016, 32, 32, 32, None, 151936, False, 32768, sliding_window=4096, use_sliding_window=False,
        max_window_layers=28),
    "qwen2_moe": _sizes(2048, 5632, 24, 16, 16, None, 151936, False, 32768, qkv_bias=True, sliding_window=4096,
        use_sliding_window=False, max_window_layers=28, num_experts=60, moe_intermediate_size=1408,
        num_experts_per_tok=4, shared_expert_intermediate_size=5632, decoder_sparse_step=1, mlp_only_layers=[]),
    "qwen3": _sizes(4096, 22016, 32, 32, 32, 128, 151936, False, 32768, attention_bias=False, sliding_window=4096,
        use_sliding_window=False, max_window_layers=28),
    "qwen3_moe": _sizes(2048, 6144, 24, 32, 4, None, 151936, False, 32768, attention_bias=False, sliding_window=4096,
        use_sliding_window=False, max_window_layers=28, num_experts=128, moe_intermediate_size=768,
        num_experts_per_tok=8, decoder_sparse_step=1, mlp_only_layers=[]),
    "qwen3_next": _sizes(2048, 5632, 48, 16, 2, 256, 151936, False, 32768, attention_bias=False,
        full_attention_interval=4, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4, num_experts=512, moe_intermediate_size=512,
        num_experts_per_tok=10, shared_expert_intermediate_size=512, decoder_sparse_step=1, mlp_only_layers=[]),
    "qwen3_5_text": _sizes(4096, 12288, 32, 16, 4, 256, 248320, False, 32768, attention_bias=False,
        full_attention_interval=4, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4),
    "qwen3_5_moe_text": _sizes(2048, None, 40, 16, 2, 256, 248320, False, 32768, attention_bias=False,
        full_attention_interval=4, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4, num_experts=256, moe_intermediate_size=512,
        num_experts_per_tok=8, shared_expert_intermediate_size=512),
    "gemma": _sizes(3072, 24576, 28, 16, 16, 256, 256000, True, 8192, attention_bias=False),
    "gemma2": _sizes(2304, 9216, 26, 8, 4, 256, 256000, True, 8192, attention_bias=False, sliding_window=4096,
        sliding_window_pattern=2),
    "gemma3_text": _sizes(2304, 9216, 26, 8, 4, 256, 262208, True, 131072, attention_bias=False, sliding_window=4096,
        sliding_window_pattern=6),
    "phi": _sizes(2048, 8192, 24, 32, None, None, 51200, False, 2048),
    "phi3": _sizes(3072, 8192, 32, 32, None, None, 32064, False, 4096, sliding_window=None),
    "phimoe": _sizes(4096, 6400, 32, 32, 8, None, 32064, False, 131072, attention_bias=False, sliding_window=None,
        num_local_experts=16, num_experts_per_tok=2),
    "smollm3": _sizes(2048, 11008, 36, 16, 4, None, 128256, True, 32768, attention_bias=False, mlp_bias=False,
        sliding_window=None, use_sliding_window=False, max_window_layers=28),
    "olmo": _sizes(4096, 11008, 32, 32, None, None, 50304, False, 2048, attention_bias=False),
    "olmo3": _sizes(4096, 11008, 32, 32, None, None, 50304, False, 2048, attention_bias=False, sliding_window=4096,
        sliding_window_pattern=4),
    "olmoe": _sizes(2048, 2048, 16, 16, None, None, 50304, False, 4096, attention_bias=False, num_experts=64,
        num_experts_per_tok=8),
    "glm": _sizes(4096, 13696, 40, 32, 2, 128, 151552, False, 131072, attention_bias=True),
    "glm4_moe": _sizes(4096, 10944, 46, 96, 8, None, 151552, False, 131072, attention_bias=False, use_qk_norm=False,
        n_routed_experts=128, moe_intermediate_size=1408, num_experts_per_tok=8, n_shared_experts=1,
        first_k_dense_replace=1),
    "glm4_moe_lite": _sizes(2048, 10240, 47, 20, 20, None, 154880, False, 202752, attention_bias=False,
        kv_lora_rank=512, q_lora_rank=768, qk_rope_head_dim=64, qk_nope_head_dim=192, v_head_dim=256,
        n_routed_experts=64, moe_intermediate_size=1536, num_experts_per_tok=4, n_shared_experts=1,
        first_k_dense_replace=1),
    "deepseek_v2": _sizes(4096, 11008, 32, 32, None, None, 32000, False, 2048, attention_bias=False, kv_lora_rank=512,
        q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=64,
        moe_intermediate_size=1407, num_experts_per_tok=None, n_shared_experts=2, first_k_dense_replace=0),
    "deepseek_v3": _sizes(7168, 18432, 61, 128, 128, None, 129280, False, 4096, attention_bias=False, kv_lora_rank=512,
        q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=256,
        moe_intermediate_size=2048, num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=3),
    "gpt_oss": _sizes(2880, 2880, 36, 64, 8, 64, 201088, False, 131072, attention_bias=True, sliding_window=128,
        num_local_experts=128, num_experts_per_tok=4, sliding_window_pattern=2),
    "minimax_m2": _sizes(3072, 1536, 62, 48, 8, 128, 200064, False, 196608, num_local_experts=256,
        num_experts_per_tok=8),
    "starcoder2": _sizes(3072, 12288, 30, 24, 2, None, 49152, True, 4096, use_bias=True, sliding_window=None),
    "granitemoe": _sizes(4096, 11008, 32, 32, None, None, 32000, False, 2048, attention_bias=False,
        num_local_experts=8, num_experts_per_tok=2),
    "cohere": _sizes(8192, 22528, 40, 64, None, None, 256000, True, 8192, attention_bias=False, use_qk_norm=False),
    "cohere2": _sizes(8192, 22528, 40, 64, None, None, 256000, True, 8192, attention_bias=False, sliding_window=4096,
        sliding_window_pattern=4),
    "seed_oss": _sizes(4096, 27648, 64, 80, 8, 128, 155136, False, 524288, attention_bias=True,
        attention_out_bias=False, mlp_bias=False),
    "ernie4_5": _sizes(1024, 3072, 18, 16, 2, 128, 103424, True, 131072, use_bias=False),
    "exaone4": _sizes(4096, 16384, 32, 32, 32, None, 102400, False, 2048, sliding_window=4096,
        sliding_window_pattern=4),
    "arcee": _sizes(2560, 18432, 32, 32, None, None, 32000, False, 4096, attention_bias=False, mlp_bias=False),
    "apertus": _sizes(4096, 14336, 32, 32, None, None, 131072, False, 65536, attention_bias=False),
    "qwen2_vl": _sizes(8192, 29568, 80, 64, 8, None, 152064, False, 32768, sliding_window=4096,
        use_sliding_window=False, max_window_layers=80),
    "qwen3_vl": _sizes(4096, 22016, 32, 32, 32, 128, 151936, False, 128000, attention_bias=False, sliding_window=None,
        use_sliding_window=None, max_window_layers=28),
    "qwen3_vl_moe": _sizes(2048, 5632, 24, 16, 16, None, 151936, False, 128000, attention_bias=False,
        sliding_window=None, use_sliding_window=None, max_window_layers=28, num_experts=60, moe_intermediate_size=1408,
        num_experts_per_tok=4, decoder_sparse_step=1, mlp_only_layers=[]),
}
_SAME = {
    "ministral": "mistral", "olmo2": "olmo", "glm4": "glm", "kimi_k2": "deepseek_v3", "granite": "llama",
    "qwen2_5_vl": "qwen2_vl", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "gemma3": "gemma3_text",
    "mistral3": "mistral",
}
"""Classes whose values are those of another one."""
CLASS_DEFAULTS.update({name: CLASS_DEFAULTS[other] for name, other in _SAME.items()})

VISION_DEFAULTS: dict[str, Mapping[str, object]] = {
    "qwen2": {
        "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "in_channels": 3, "patch_size": 14,
        "mlp_ratio": 4, "temporal_patch_size": 2, "spatial_merge_size": 2,
    },
    "qwen2_5": {
        "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "in_channels": 3,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584,
    },
    "qwen3": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "in_channels": 3,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    },
    "qwen3_5": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "in_channels": 3,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
    },
    "siglip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_channels": 3, "image_size": 224,
        "patch_size": 16, "vision_use_head": True,
    },
    "pixtral": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_channels": 3, "patch_size": 14, "head_dim": 64,
    },
}
# fmt: on
