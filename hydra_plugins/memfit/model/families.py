"""What the model types have in common and where they differ, as data: one `Family` for each ``model_type``.

Read from the model classes of Hugging Face transformers 5.10 and compared with them parameter by parameter in
``tests/test_model_against_transformers.py``. A flag that is a string names the key of config.json that decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Flag = bool | str
Window = Literal["never", "always", "switch", "pattern"]
Tower = Literal["qwen2", "qwen2_5", "qwen3", "qwen3_5", "siglip", "pixtral"]
Depth = Literal["all", "sparse_step", "first_dense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Softmax attention: grouped queries, or multi-head latent attention (``mla``)."""

    mla: bool = False
    qkv_bias: Flag = False
    out_bias: Flag = False
    packed: bool = False
    """One ``qkv_proj`` module in place of three."""
    qk_norm: Literal["", "head", "full"] = ""
    """``head``: one weight of head_dim for q and k; ``full``: a weight for every channel of every head."""
    qk_norm_key: Flag = True
    output_gate: bool = False
    """``q_proj`` is twice as wide: half of it gates the output."""
    sinks: bool = False
    """One learned logit a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """Feed-forward block of a dense layer."""

    gated: bool = True
    packed: bool = False
    """One ``gate_up_proj`` module in place of two."""
    bias: Flag = False
    activation_parameters: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Feed-forward block of a mixture-of-experts layer."""

    count_key: str
    width_key: str = "moe_intermediate_size"
    depth: Depth = "all"
    shared_width_key: str = ""
    """Width of the shared expert; its output is gated by one more linear."""
    shared_count_key: str = ""
    """Number of shared experts, each ``width_key`` wide, run as one block without a gate."""
    bias: bool = False
    """Biases in the experts and in the router."""
    linear_router: bool = False
    """The router is a linear module in every version of the class."""
    always_fused: bool = False
    """Experts are parameters, not linear modules, in every version of the class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Norms:
    """Norms over the hidden size."""

    per_layer: int = 2
    vectors: int = 1
    """1 for RMSNorm, 2 for LayerNorm with a bias, 0 for a norm without weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one model type is built."""

    architecture: str
    attention: Attention = field(default_factory=Attention)
    mlp: Mlp = field(default_factory=Mlp)
    norms: Norms = field(default_factory=Norms)
    experts: Experts | None = None
    window: Window = "never"
    """Which layers slide: none, all, those that ``use_sliding_window`` says, or all but every n-th."""
    linear_attention: Literal["", "packed", "split"] = ""
    """Gated delta net in the layers that are not full attention; how its input projections are packed."""
    lm_head_bias: bool = False
    vision: Tower | None = None
    """Vision tower of a wrapper whose text model is described by the other fields."""
    text_type: str = ""
    """Model type that the text part of a wrapper has when config.json does not say."""


_BIASED = Attention(qkv_bias="attention_bias", out_bias="attention_bias")
_QWEN2 = Attention(qkv_bias=True)
_QWEN3 = replace(_BIASED, qk_norm="head")
_GATED = replace(_QWEN3, output_gate=True)
_MLA = Attention(mla=True, qkv_bias="attention_bias", out_bias="attention_bias")
_FULL_NORM = replace(_BIASED, qk_norm="full")
_PARALLEL_NORM = replace(_FULL_NORM, qk_norm_key="use_qk_norm")
_PACKED = Mlp(packed=True)
_LLAMA_MLP = Mlp(bias="mlp_bias")
_LAYER_NORM = Norms(vectors=2)
_FOUR_NORMS = Norms(per_layer=4)
_ONE_NORM = Norms(per_layer=1)
_QWEN_EXPERTS = Experts(count_key="num_experts", depth="sparse_step")
_QWEN_SHARED = replace(_QWEN_EXPERTS, shared_width_key="shared_expert_intermediate_size")
_EVERY_LAYER_SHARED = replace(_QWEN_SHARED, depth="all")
_DEEPSEEK_EXPERTS = Experts(count_key="n_routed_experts", depth="first_dense", shared_count_key="n_shared_experts")
_LOCAL = Experts(count_key="num_local_experts", width_key="intermediate_size")
_GLM = Attention(qkv_bias="attention_bias")

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", attention=_BIASED, mlp=_LLAMA_MLP),
    "mistral": Family(architecture="MistralForCausalLM", window="always"),
    "ministral": Family(architecture="MinistralForCausalLM", window="always"),
    "mixtral": Family(architecture="MixtralForCausalLM", experts=_LOCAL, window="always"),
    "qwen2": Family(architecture="Qwen2ForCausalLM", attention=_QWEN2, window="switch"),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        attention=Attention(qkv_bias="qkv_bias"),
        experts=_QWEN_SHARED,
        window="switch",
    ),
    "qwen3": Family(architecture="Qwen3ForCausalLM", attention=_QWEN3, window="switch"),
    "qwen3_moe": Family(architecture="Qwen3MoeForCausalLM", attention=_QWEN3, experts=_QWEN_EXPERTS, window="switch"),
    "qwen3_next": Family(
        architecture="Qwen3NextForCausalLM", attention=_GATED, experts=_QWEN_SHARED, linear_attention="packed"
    ),
    "qwen3_5_text": Family(architecture="Qwen3_5ForCausalLM", attention=_GATED, linear_attention="split"),
    "qwen3_5_moe_text": Family(
        architecture="Qwen3_5MoeForCausalLM",
        attention=_GATED,
        experts=_EVERY_LAYER_SHARED,
        linear_attention="split",
    ),
    "gemma": Family(architecture="GemmaForCausalLM", attention=_BIASED),
    "gemma2": Family(architecture="Gemma2ForCausalLM", attention=_BIASED, norms=_FOUR_NORMS, window="pattern"),
    "gemma3_text": Family(architecture="Gemma3ForCausalLM", attention=_QWEN3, norms=_FOUR_NORMS, window="pattern"),
    "phi": Family(
        architecture="PhiForCausalLM",
        attention=Attention(qkv_bias=True, out_bias=True),
        mlp=Mlp(gated=False, bias=True),
        norms=Norms(per_layer=1, vectors=2),
        lm_head_bias=True,
    ),
    "phi3": Family(architecture="Phi3ForCausalLM", attention=Attention(packed=True), mlp=_PACKED, window="always"),
    "phimoe": Family(
        architecture="PhimoeForCausalLM",
        attention=_BIASED,
        norms=_LAYER_NORM,
        experts=replace(_LOCAL, linear_router=True),
        window="always",
    ),
    "smollm3": Family(architecture="SmolLM3ForCausalLM", attention=_BIASED, mlp=_LLAMA_MLP, window="switch"),
    "olmo": Family(architecture="OlmoForCausalLM", attention=_BIASED, norms=Norms(vectors=0)),
    "olmo2": Family(architecture="Olmo2ForCausalLM", attention=_FULL_NORM),
    "olmo3": Family(architecture="Olmo3ForCausalLM", attention=_FULL_NORM, window="pattern"),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        attention=_FULL_NORM,
        experts=Experts(count_key="num_experts", width_key="intermediate_size"),
    ),
    "glm": Family(architecture="GlmForCausalLM", attention=_GLM, mlp=_PACKED),
    "glm4": Family(architecture="Glm4ForCausalLM", attention=_GLM, mlp=_PACKED, norms=_FOUR_NORMS),
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        attention=replace(_GLM, qk_norm="head", qk_norm_key="use_qk_norm"),
        experts=_DEEPSEEK_EXPERTS,
    ),
    "glm4_moe_lite": Family(architecture="Glm4MoeLiteForCausalLM", attention=_MLA, experts=_DEEPSEEK_EXPERTS),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM", attention=_MLA, experts=replace(_DEEPSEEK_EXPERTS, linear_router=True)
    ),
    "deepseek_v3": Family(architecture="DeepseekV3ForCausalLM", attention=_MLA, experts=_DEEPSEEK_EXPERTS),
    "kimi_k2": Family(architecture="DeepseekV3ForCausalLM", attention=_MLA, experts=_DEEPSEEK_EXPERTS),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        attention=replace(_BIASED, sinks=True),
        experts=replace(_LOCAL, bias=True, always_fused=True),
        window="pattern",
    ),
    "minimax_m2": Family(architecture="MiniMaxM2ForCausalLM", attention=Attention(qk_norm="full"), experts=_LOCAL),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        attention=Attention(qkv_bias="use_bias", out_bias="use_bias"),
        mlp=Mlp(gated=False, bias="use_bias"),
        norms=_LAYER_NORM,
        window="always",
    ),
    "granite": Family(architecture="GraniteForCausalLM", attention=_BIASED, mlp=_LLAMA_MLP),
    "granitemoe": Family(
        architecture="GraniteMoeForCausalLM",
        attention=_BIASED,
        experts=replace(_LOCAL, always_fused=True, linear_router=True),
    ),
    "cohere": Family(architecture="CohereForCausalLM", attention=_PARALLEL_NORM, norms=_ONE_NORM),
    "cohere2": Family(architecture="Cohere2ForCausalLM", attention=_BIASED, norms=_ONE_NORM, window="pattern"),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        attention=Attention(qkv_bias="attention_bias", out_bias="attention_out_bias"),
        mlp=_LLAMA_MLP,
    ),
    "ernie4_5": Family(
        architecture="Ernie4_5ForCausalLM",
        attention=Attention(qkv_bias="use_bias", out_bias="use_bias"),
        mlp=Mlp(bias="use_bias"),
    ),
    "exaone4": Family(architecture="Exaone4ForCausalLM", attention=Attention(qk_norm="head"), window="pattern"),
    "arcee": Family(architecture="ArceeForCausalLM", attention=_BIASED, mlp=Mlp(gated=False, bias="mlp_bias")),
    "apertus": Family(
        architecture="ApertusForCausalLM", attention=_QWEN3, mlp=Mlp(gated=False, activation_parameters=2)
    ),
}
"""Model types of text models."""


def _wrapper(text_type: str, architecture: str, vision: Tower) -> Family:
    return replace(FAMILIES[text_type], architecture=architecture, vision=vision, text_type=text_type)


FAMILIES |= {
    "qwen2_vl": _wrapper("qwen2", "Qwen2VLForConditionalGeneration", "qwen2"),
    "qwen2_5_vl": _wrapper("qwen2", "Qwen2_5_VLForConditionalGeneration", "qwen2_5"),
    "qwen3_vl": _wrapper("qwen3", "Qwen3VLForConditionalGeneration", "qwen3"),
    "qwen3_vl_moe": _wrapper("qwen3_moe", "Qwen3VLMoeForConditionalGeneration", "qwen3"),
    "qwen3_5": _wrapper("qwen3_5_text", "Qwen3_5ForConditionalGeneration", "qwen3_5"),
    "qwen3_5_moe": _wrapper("qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration", "qwen3_5"),
    "gemma3": _wrapper("gemma3_text", "Gemma3ForConditionalGeneration", "siglip"),
    "mistral3": _wrapper("mistral", "Mistral3ForConditionalGeneration", "pixtral"),
}
