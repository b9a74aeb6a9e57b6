"""The values that the configuration classes of transformers 5.10 give to keys that config.json leaves out.

Only the keys that are read. ``None`` means that the class derives the value (`config_json`). Compared with the classes
themselves in ``tests/test_model_against_transformers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

# fmt: off
CLASS_DEFAULTS: dict[str, Mapping[str, object]] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "ministral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "mixtral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen2": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": None, "vocab_size": 151936, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "qwen2_moe": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": None, "vocab_size": 151936, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "qkv_bias": True, "sliding_window": 4096, "use_sliding_window": False,
        "max_window_layers": 28, "num_experts": 60, "moe_intermediate_size": 1408, "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "qwen3": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "attention_bias": False, "sliding_window": 4096,
        "use_sliding_window": False, "max_window_layers": 28,
    },
    "qwen3_moe": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": None, "vocab_size": 151936, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "attention_bias": False, "sliding_window": 4096,
        "use_sliding_window": False, "max_window_layers": 28, "num_experts": 128, "moe_intermediate_size": 768,
        "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "qwen3_next": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "attention_bias": False, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 512, "moe_intermediate_size": 512,
        "num_experts_per_tok": 10, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3_5_text": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "attention_bias": False, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    },
    "qwen3_5_moe_text": {
        "hidden_size": 2048, "intermediate_size": None, "num_hidden_layers": 40, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "attention_bias": False, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 256, "moe_intermediate_size": 512,
        "num_experts_per_tok": 8, "shared_expert_intermediate_size": 512,
    },
    "gemma": {
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "attention_bias": False,
    },
    "gemma2": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "attention_bias": False, "sliding_window": 4096, "sliding_window_pattern": 2,
    },
    "gemma3_text": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "attention_bias": False, "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "phi": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 51200, "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
    "phi3": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 32064, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "sliding_window": None,
    },
    "phimoe": {
        "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": None, "vocab_size": 32064, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "attention_bias": False, "sliding_window": None, "num_local_experts": 16,
        "num_experts_per_tok": 2,
    },
    "smollm3": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": None, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 32768, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
        "use_sliding_window": False, "max_window_layers": 28,
    },
    "olmo": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 50304, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "attention_bias": False,
    },
    "olmo2": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 50304, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "attention_bias": False,
    },
    "olmo3": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 50304, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "attention_bias": False, "sliding_window": 4096, "sliding_window_pattern": 4,
    },
    "olmoe": {
        "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 50304, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "attention_bias": False, "num_experts": 64, "num_experts_per_tok": 8,
    },
    "glm": {
        "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "attention_bias": True,
    },
    "glm4": {
        "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "attention_bias": True,
    },
    "glm4_moe": {
        "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": None, "vocab_size": 151552, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "attention_bias": False, "use_qk_norm": False, "n_routed_experts": 128,
        "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {
        "hidden_size": 2048, "intermediate_size": 10240, "num_hidden_layers": 47, "num_attention_heads": 20,
        "num_key_value_heads": 20, "head_dim": None, "vocab_size": 154880, "tie_word_embeddings": False,
        "max_position_embeddings": 202752, "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 768,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256, "n_routed_experts": 64,
        "moe_intermediate_size": 1536, "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "deepseek_v2": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 64,
        "moe_intermediate_size": 1407, "num_experts_per_tok": None, "n_shared_experts": 2, "first_k_dense_replace": 0,
    },
    "deepseek_v3": {
        "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "head_dim": None, "vocab_size": 129280, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
        "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
    },
    "kimi_k2": {
        "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "head_dim": None, "vocab_size": 129280, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
        "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
    },
    "gpt_oss": {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "attention_bias": True, "sliding_window": 128, "num_local_experts": 128,
        "num_experts_per_tok": 4, "sliding_window_pattern": 2,
    },
    "minimax_m2": {
        "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62, "num_attention_heads": 48,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 200064, "tie_word_embeddings": False,
        "max_position_embeddings": 196608, "num_local_experts": 256, "num_experts_per_tok": 8,
    },
    "starcoder2": {
        "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30, "num_attention_heads": 24,
        "num_key_value_heads": 2, "head_dim": None, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 4096, "use_bias": True, "sliding_window": None,
    },
    "granite": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
    },
    "granitemoe": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "attention_bias": False, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "cohere": {
        "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40, "num_attention_heads": 64,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 256000, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "attention_bias": False, "use_qk_norm": False,
    },
    "cohere2": {
        "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40, "num_attention_heads": 64,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 256000, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "attention_bias": False, "sliding_window": 4096, "sliding_window_pattern": 4,
    },
    "seed_oss": {
        "hidden_size": 4096, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 80,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 155136, "tie_word_embeddings": False,
        "max_position_embeddings": 524288, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False,
    },
    "ernie4_5": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 103424, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "use_bias": False,
    },
    "exaone4": {
        "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": None, "vocab_size": 102400, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "sliding_window": 4096, "sliding_window_pattern": 4,
    },
    "arcee": {
        "hidden_size": 2560, "intermediate_size": 18432, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "attention_bias": False, "mlp_bias": False,
    },
    "apertus": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "vocab_size": 131072, "tie_word_embeddings": False,
        "max_position_embeddings": 65536, "attention_bias": False,
    },
    "qwen2_vl": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": None, "vocab_size": 152064, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False,
        "max_window_layers": 80,
    },
    "qwen2_5_vl": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": None, "vocab_size": 152064, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False,
        "max_window_layers": 80,
    },
    "qwen3_vl": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
        "max_position_embeddings": 128000, "attention_bias": False, "sliding_window": None,
        "use_sliding_window": None, "max_window_layers": 28,
    },
    "qwen3_vl_moe": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": None, "vocab_size": 151936, "tie_word_embeddings": False,
        "max_position_embeddings": 128000, "attention_bias": False, "sliding_window": None,
        "use_sliding_window": None, "max_window_layers": 28, "num_experts": 60, "moe_intermediate_size": 1408,
        "num_experts_per_tok": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "qwen3_5": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "attention_bias": False, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    },
    "qwen3_5_moe": {
        "hidden_size": 2048, "intermediate_size": None, "num_hidden_layers": 40, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "attention_bias": False, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 256, "moe_intermediate_size": 512,
        "num_experts_per_tok": 8, "shared_expert_intermediate_size": 512,
    },
    "gemma3": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "attention_bias": False, "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "mistral3": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": None, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "sliding_window": 4096,
    },
}

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
