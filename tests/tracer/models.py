"""Architectures of public checkpoints, and their construction from the configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shape = dict[str, Any]


def _shape(kind: str, layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> Shape:
    """Name the numbers as config.json does."""
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": more.pop("tied", False),
        "max_position_embeddings": 131072,
        **more,
    }


def _delta(key_heads: int, value_heads: int, width: int = 128) -> Shape:
    """Gated delta nets in three of four layers."""
    return {
        "full_attention_interval": 4,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
        "linear_conv_kernel_dim": 4,
    }


_Q, _Q7, _L, _Q35 = 151936, 152064, 128256, 248320
_MROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]}
_INTERLEAVED = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
          "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
_MOE = {"norm_topk_prob": True, "decoder_sparse_step": 1, "head_dim": 128}

# Source: config.json of the public checkpoints of these names.
SHAPES: dict[str, Shape] = {
    "qwen2.5-0.5b": _shape("qwen2", 24, 896, 4864, 14, 2, _Q, tied=True),
    "qwen2.5-1.5b": _shape("qwen2", 28, 1536, 8960, 12, 2, _Q, tied=True),
    "qwen2.5-3b": _shape("qwen2", 36, 2048, 11008, 16, 2, _Q, tied=True),
    "qwen2.5-7b": _shape("qwen2", 28, 3584, 18944, 28, 4, _Q7),
    "qwen2.5-14b": _shape("qwen2", 48, 5120, 13824, 40, 8, _Q7),
    "qwen2.5-32b": _shape("qwen2", 64, 5120, 27648, 40, 8, _Q7),
    "qwen3-0.6b": _shape("qwen3", 28, 1024, 3072, 16, 8, _Q, tied=True, head_dim=128),
    "qwen3-1.7b": _shape("qwen3", 28, 2048, 6144, 16, 8, _Q, tied=True, head_dim=128),
    "qwen3-4b": _shape("qwen3", 36, 2560, 9728, 32, 8, _Q, tied=True, head_dim=128),
    "qwen3-8b": _shape("qwen3", 36, 4096, 12288, 32, 8, _Q, head_dim=128),
    "llama-3.2-1b": _shape("llama", 16, 2048, 8192, 32, 8, _L, tied=True, head_dim=64),
    "llama-3.2-3b": _shape("llama", 28, 3072, 8192, 24, 8, _L, tied=True, head_dim=128),
    "llama-3.1-8b": _shape("llama", 32, 4096, 14336, 32, 8, _L, head_dim=128),
    "mistral-7b": _shape("mistral", 32, 4096, 14336, 32, 8, 32768, head_dim=128, sliding_window=None),
    "gemma-3-1b": _shape("gemma3_text", 26, 1152, 6912, 4, 1, 262144, tied=True, head_dim=256),
    "qwen3-30b-a3b": _shape(
        "qwen3_moe", 48, 2048, 6144, 32, 4, _Q,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, **_MOE,
    ),
    "qwen2-vl-2b": _shape(
        "qwen2_vl", 28, 1536, 8960, 12, 2, _Q, tied=True, rope_scaling=_MROPE,
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
    ),
    "qwen2.5-vl-3b": _shape(
        "qwen2_5_vl", 36, 2048, 11008, 16, 2, _Q, tied=True, rope_scaling=_MROPE,
        vision_config={**_TOWER, "out_hidden_size": 2048},
    ),
    "qwen2.5-vl-7b": _shape(
        "qwen2_5_vl", 28, 3584, 18944, 28, 4, _Q7, rope_scaling=_MROPE, vision_config={**_TOWER, "out_hidden_size": 3584},
    ),
    "qwen3-vl-4b": _shape(
        "qwen3_vl", 36, 2560, 9728, 32, 8, _Q, tied=True, head_dim=128, rope_scaling=_INTERLEAVED,
        vision_config={"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
                       "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "qwen3-vl-8b": _shape(
        "qwen3_vl", 36, 4096, 12288, 32, 8, _Q, head_dim=128, rope_scaling=_INTERLEAVED,
        vision_config={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                       "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    "qwen3-vl-30b-a3b": _shape(
        "qwen3_vl_moe", 48, 2048, 6144, 32, 4, _Q, rope_scaling=_INTERLEAVED,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, **_MOE,
        vision_config={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                       "out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    "moonlight-16b-a3b": _shape(
        "deepseek_v3", 27, 2048, 11264, 16, 16, 163840,
        kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
        first_k_dense_replace=1, n_group=1, topk_group=1, num_experts=64,
    ),
    "gpt-oss-20b": _shape(
        "gpt_oss", 24, 2880, 2880, 64, 8, 201088, head_dim=64, sliding_window=128, num_local_experts=32, num_experts_per_tok=4,
        num_experts=32,
    ),
    "qwen3-next-80b-a3b": _shape(
        "qwen3_next", 48, 2048, 5120, 16, 2, _Q,
        num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        **{**_MOE, "head_dim": 256}, **_delta(16, 32),
    ),
    # the language models of these checkpoints, without their vision towers
    "qwen3.5-4b-text": _shape("qwen3_5_text", 32, 2560, 9216, 16, 4, _Q35, tied=True, head_dim=256, **_delta(16, 32)),
    "qwen3.5-35b-a3b-text": _shape(
        "qwen3_5_moe_text", 40, 2048, 0, 16, 2, _Q35,
        num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        **{**_MOE, "head_dim": 256}, **_delta(16, 32),
    ),
    # toys, for runs on real tensors
    "toy-qwen2": _shape("qwen2", 3, 64, 176, 4, 2, 1000, tied=True),
    "toy-qwen2-untied": _shape("qwen2", 3, 64, 176, 4, 2, 1000),
    "toy-qwen3": _shape("qwen3", 3, 64, 192, 4, 2, 1000, tied=True, head_dim=32),
    "toy-llama": _shape("llama", 3, 64, 192, 4, 2, 1000, tied=True, head_dim=16),
    "toy-gemma": _shape("gemma3_text", 3, 64, 192, 4, 1, 1000, tied=True, head_dim=32),
    "toy-delta": _shape("qwen3_5_text", 4, 64, 192, 4, 2, 1000, tied=True, head_dim=32, **_delta(2, 4, 16)),
    "toy-qwen2.5-vl": _shape(
        "qwen2_5_vl", 3, 64, 176, 4, 2, 1000, tied=True, image_token_id=999,
        rope_scaling={**_MROPE, "mrope_section": [2, 3, 3]},
        vision_config={**_TOWER, "depth": 3, "hidden_size": 64, "intermediate_size": 176, "num_heads": 4,
                       "out_hidden_size": 64},
    ),
    "toy-qwen3-vl": _shape(
        "qwen3_vl", 3, 64, 192, 4, 2, 1000, head_dim=16, image_token_id=999,
        rope_scaling={**_INTERLEAVED, "mrope_section": [4, 2, 2]},
        vision_config={"depth": 3, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 64,
                       "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
    "toy-moe": _shape(
        "qwen3_moe", 3, 64, 192, 4, 2, 1000, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        **{**_MOE, "head_dim": 16},
    ),
}  # fmt: skip


def build(name: str, *, dtype: torch.dtype, attention: str, value_head: bool = False) -> torch.nn.Module:
    """Return the Hugging Face model called ``name``, with freshly made (or fake) weights."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForTokenClassification,
    )

    shape = dict(SHAPES[name])
    kind, vision = shape.pop("model_type"), shape.pop("vision_config", None)
    if vision is None:
        config = AutoConfig.for_model(kind, **shape)
    else:
        whole = {key: shape.pop(key) for key in ("image_token_id",) if key in shape}
        whole["tie_word_embeddings"] = shape["tie_word_embeddings"]
        config = AutoConfig.for_model(kind, text_config=shape, vision_config=vision, **whole)
    more: dict[str, Any] = {"attn_implementation": attention, "dtype": dtype}
    if shape.get("num_experts"):
        more["experts_implementation"] = "grouped_mm"  # the only one whose shapes do not depend on the router
    if not value_head:
        kinds = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
        return kinds.from_config(config, **more)
    config.num_labels, config.classifier_dropout, config.hidden_dropout = 1, 0.0, "0"
    return AutoModelForTokenClassification.from_config(config, **more)
