"""The architecture of one checkpoint: names follow Hugging Face's ``config.json``; parameter counts are exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """A vision tower: what its activations depend on. Sizes are elements of one patch, counts numbers of parameters."""

    hidden_size: int
    intermediate_size: int
    """Width of a block's feed-forward part."""
    num_layers: int
    num_attention_heads: int
    pixels: int
    """Values of one patch: channels, frames and area."""
    patches_per_token: int
    """Patches that the merger makes one image token of."""
    num_deepstack: int = 0
    """Blocks whose output goes to the first decoder layers as well (Qwen3-VL); each has a merger of its own."""
    feed_forward: Literal["gated", "gelu", "quick_gelu"]
    rms_norm: bool
    """RMSNorm; otherwise LayerNorm, which autocast computes in fp32."""
    learned_positions: bool = False
    """Positions are interpolated from a table and added in fp32."""
    layer_parameters: int
    """Parameters of one block: an FSDP unit."""
    root_parameters: int
    """Parameters outside the blocks, mergers included: they belong to the root unit."""
    lora_sites: tuple[tuple[int, int, int], ...]
    """Linear modules of the tower that ``target_modules=all-linear`` adapts: (in_features, out_features, count)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One decoder-only language model. Counts are numbers of parameters, not bytes."""

    name: str
    """Hub id (``Qwen/Qwen2.5-3B-Instruct``), directory, or the name of the file in ``conf/model``."""
    source: str
    """Where the architecture was read."""
    architecture: str
    """``architectures[0]`` of config.json, e.g. ``Qwen2ForCausalLM``."""
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    qk_norm: bool = False
    """Per-head RMSNorm of q and k (Qwen3, Gemma 3): its fp32 upcasts are saved for the backward pass."""
    sliding_window: int | None = None
    num_full_attention_layers: int | None = None
    """Layers whose KV cache grows with the whole sequence; ``None``: all of them."""
    num_linear_attention_layers: int = 0
    """Layers with a recurrent state instead of a KV cache (Qwen3-Next, Qwen3.5)."""
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    attention_output_gate: bool = False
    """The other layers multiply attention's output by a gate that the query's projection makes too."""
    # Mixture of experts; 0 on a dense model
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    num_moe_layers: int = 0
    # Multi-head latent attention (DeepSeek-V2/V3); 0 elsewhere
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
    # Exact parameter counts
    parameters: int
    """All parameters of the class that the framework trains, tied weights counted once, vision tower included."""
    embedding_parameters: int
    """``vocab_size * hidden_size`` (with per-arch padding): one copy."""
    root_parameters: int
    """Parameters outside the decoder layers (and outside a vision tower): embedding, lm_head if untied, last norm."""
    layer_parameters: int
    """Parameters of the largest decoder layer: the largest FSDP unit."""
    expert_parameters: int = 0
    """Parameters of all routed experts of all layers together; what expert parallelism divides."""
    active_parameters: int
    """Parameters that one token uses; equals ``parameters`` on a dense model."""
    vision_parameters: int = 0
    """Parameters of the vision tower and its projector; 0 on a text model."""
    vision: VisionSpec | None = None
    """The tower where its activations are modelled; ``None`` on a text model, and for towers that are only counted."""
    lora_sites: tuple[tuple[int, int, int], ...] = ()
    """Linear modules of the decoder that ``target_modules=all-linear`` adapts: (in_features, out_features, count)."""
    expert_lora_sites: tuple[tuple[int, int, int], ...] = ()
    """The same for routers and routed experts, which are linear modules before transformers 5 and parameters since."""

    @property
    def recurrent_state_elements(self) -> int:
        """Elements of the state that one layer with linear attention keeps for a sequence, whatever its length."""
        return self.linear_num_value_heads * self.linear_value_head_dim * self.linear_key_head_dim

    @property
    def convolution_state_elements(self) -> int:
        """The same for the inputs that its convolution looks back on."""
        keys = 2 * self.linear_num_key_heads * self.linear_key_head_dim
        channels = keys + self.linear_num_value_heads * self.linear_value_head_dim
        return channels * max(0, self.linear_conv_kernel_dim - 1)

    @property
    def root_unit_parameters(self) -> int:
        """Parameters of FSDP's root unit: those of a vision tower outside its blocks are in it."""
        return self.root_parameters + (self.vision.root_parameters if self.vision else 0)


def value_model(model: ModelSpec) -> ModelSpec:
    """Return the same body with one output a token, as a critic has it: no lm_head, the embedding stays."""
    head = 0 if model.tie_word_embeddings else model.embedding_parameters
    return replace(
        model,
        parameters=model.parameters - head + model.hidden_size,
        root_parameters=model.root_parameters - head + model.hidden_size,
        active_parameters=model.active_parameters - head + model.hidden_size,
    )
