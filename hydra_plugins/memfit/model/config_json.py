"""A Hugging Face ``config.json`` -> `ModelSpec` with exact parameter counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from hydra_plugins.memfit.base.errors import ModelNotFound
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.model.class_defaults import CLASS_DEFAULTS, VISION_DEFAULTS
from hydra_plugins.memfit.model.decoder import Decoder
from hydra_plugins.memfit.model.families import FAMILIES, Family
from hydra_plugins.memfit.model.layers import (
    Linear,
    head_dim,
    num_key_value_heads,
    shared_expert_width,
)
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.model.values import Values
from hydra_plugins.memfit.model.vision import vision_parameters, vision_spec

HOW_TO_SUPPLY = (
    "Choose a known checkpoint with +model=NAME, or describe the architecture yourself: "
    "+memfit.model.model_type=llama and the keys of config.json as memfit.model.<key>=<value>."
)


def spec_from_config(config: Mapping[str, object], *, name: str, source: str) -> ModelSpec:
    """Return the architecture that ``config`` describes; ``source`` says where it was read.

    Keys that are missing have the default of the model's class. Raises `ModelNotFound` for a model type that is not
    known and for values that no model can have.
    """
    family, values, vision = _parts(config, name)
    decoder = Decoder(family=family, values=values)
    tower = vision_parameters(family.vision, vision, values) if family.vision else 0
    spec = _spec(config, family, values, decoder, tower, name, source + _quantised(config))
    return replace(spec, vision=vision_spec(family.vision, vision)) if family.vision else spec


def _parts(config: Mapping[str, object], name: str) -> tuple[Family, Values, Values]:
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelNotFound(f"{name}: unknown model_type {model_type!r}. Known: {known}. {HOW_TO_SUPPLY}")
    given = dict(config)
    if family.text_type:
        given = {**given, **_part(config, "text_config", name)}
        if config.get("tie_word_embeddings") is not None:
            given["tie_word_embeddings"] = config["tie_word_embeddings"]
    values = Values(given=given, defaults=CLASS_DEFAULTS[str(model_type)], owner=name)
    tower = VISION_DEFAULTS[family.vision] if family.vision else {}
    return family, values, Values(given=_part(config, "vision_config", name), defaults=tower, owner=f"{name} (vision)")


def _part(config: Mapping[str, object], key: str, name: str) -> Mapping[str, object]:
    part = config.get(key)
    if part is not None and not isinstance(part, Mapping):
        raise ModelNotFound(f"{name}: {key} is {part!r}, which is not a mapping.")
    return part or {}


def _quantised(config: Mapping[str, object]) -> str:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return ""
    method = quantization.get("quant_method", "unknown method")
    return f" (quantised checkpoint, {method}; counts are of the plain model)"


def _spec(
    config: Mapping[str, object], family: Family, values: Values, decoder: Decoder, tower: int, name: str, source: str
) -> ModelSpec:
    layers, root, moe = decoder.layer_parameters(), _root_parameters(values, family), decoder.count("mixture")
    total = root + tower + sum(layers[kinds] * number for kinds, number in decoder.layers.items())
    experts = decoder.blocks["mixture"].expert_parameters * moe if moe else 0
    chosen, routed = _experts(values, family) if moe else (0, 0)
    latent = values.count if family.attention.mla else _nothing
    linear = values.size if decoder.count("linear") else _nothing
    mixed = family.experts if moe else None
    return ModelSpec(
        name=name,
        source=source,
        architecture=_architecture(config, family),
        model_type=str(config["model_type"]),
        hidden_size=values.size("hidden_size"),
        intermediate_size=values.count("intermediate_size"),
        num_hidden_layers=values.size("num_hidden_layers"),
        num_attention_heads=values.size("num_attention_heads"),
        num_key_value_heads=num_key_value_heads(values),
        head_dim=head_dim(values),
        vocab_size=values.size("vocab_size"),
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        max_position_embeddings=values.count("max_position_embeddings"),
        qk_norm=family.attention.qk_norm == "head" and values.flag(family.attention.qk_norm_key),
        sliding_window=values.optional("sliding_window") if decoder.has_attention("sliding_attention") else None,
        num_full_attention_layers=decoder.num_full_attention_layers,
        num_linear_attention_layers=decoder.count("linear"),
        linear_num_key_heads=linear("linear_num_key_heads"),
        linear_num_value_heads=linear("linear_num_value_heads"),
        linear_key_head_dim=linear("linear_key_head_dim"),
        linear_value_head_dim=linear("linear_value_head_dim"),
        linear_conv_kernel_dim=linear("linear_conv_kernel_dim"),
        attention_output_gate=family.attention.output_gate,
        num_experts=routed,
        num_experts_per_tok=chosen,
        moe_intermediate_size=values.size(mixed.width_key) if mixed else 0,
        shared_expert_intermediate_size=shared_expert_width(values, mixed) if mixed else 0,
        num_moe_layers=moe,
        kv_lora_rank=latent("kv_lora_rank"),
        q_lora_rank=latent("q_lora_rank"),
        qk_rope_head_dim=latent("qk_rope_head_dim"),
        qk_nope_head_dim=latent("qk_nope_head_dim"),
        v_head_dim=latent("v_head_dim"),
        parameters=total,
        embedding_parameters=values.size("vocab_size") * values.size("hidden_size"),
        root_parameters=root,
        layer_parameters=max(layers.values()),
        expert_parameters=experts,
        active_parameters=total - experts + (ceil_div(experts * chosen, routed) if routed else 0),
        vision_parameters=tower,
        lora_sites=_sites(decoder.linears()),
        expert_lora_sites=_sites(decoder.expert_linears()),
    )


def _architecture(config: Mapping[str, object], family: Family) -> str:
    given = config.get("architectures")
    return str(given[0]) if isinstance(given, (list, tuple)) and given else family.architecture


def _nothing(key: str) -> int:
    return 0


def _experts(values: Values, family: Family) -> tuple[int, int]:
    """Return how many experts a token uses, and how many there are."""
    assert family.experts is not None
    chosen, routed = values.size("num_experts_per_tok"), values.size(family.experts.count_key)
    if chosen > routed:
        raise ModelNotFound(f"{values.owner}: num_experts_per_tok is {chosen}, but there are {routed} experts.")
    return chosen, routed


def _root_parameters(values: Values, family: Family) -> int:
    """Embedding, lm_head unless it is tied, last norm."""
    vocab, h = values.size("vocab_size"), values.size("hidden_size")
    tables = 1 if values.flag("tie_word_embeddings") else 2
    return tables * vocab * h + family.norms.vectors * h + (vocab if family.lm_head_bias else 0)


def _sites(linears: Iterable[Linear]) -> tuple[tuple[int, int, int], ...]:
    total: Counter[tuple[int, int]] = Counter()
    for one in linears:
        total[one.fan_in, one.fan_out] += one.count
    return tuple((fan_in, fan_out, count) for (fan_in, fan_out), count in total.items() if count)
