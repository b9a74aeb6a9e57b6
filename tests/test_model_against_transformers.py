"""The parameter counts are those of the real model classes, built without memory (meta device)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from hydra_plugins.memfit.model import catalog
from hydra_plugins.memfit.model.class_defaults import CLASS_DEFAULTS, VISION_DEFAULTS
from hydra_plugins.memfit.model.config_json import spec_from_config
from hydra_plugins.memfit.model.families import FAMILIES
from hydra_plugins.memfit.model.spec import ModelSpec

pytestmark = pytest.mark.verl

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types of remote code that is a renamed class of transformers."""
DERIVED = {
    "num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern", "full_attention_interval",
    "max_window_layers",
}  # fmt: skip
"""Defaults that the classes compute, or read as a keyword without a field."""
OWN_DEFAULTS = {"kimi_k2", "mistral3"}
"""No class of that name; and a wrapper whose class fills a missing text_config with the sizes of one checkpoint."""


IGNORE_HEAD_DIM = {"olmoe", "qwen2_vl", "qwen2_5_vl", "glm4_moe_lite"}
"""Their classes do not read head_dim, only in part, or as another key; no checkpoint has it."""


def build(config: Mapping[str, Any]) -> Any:
    """Return the model of ``config`` with no memory behind its parameters."""
    import torch
    import transformers

    model_type = ALIASES.get(config["model_type"], config["model_type"])
    keys = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    made = transformers.AutoConfig.for_model(model_type, **_nested(keys) if FAMILIES[model_type].vision else keys)
    auto = (
        transformers.AutoModelForImageTextToText if FAMILIES[model_type].vision else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"):
        return auto.from_config(made)


def _nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a wrapper as its class takes them; conf/model has those of the text part at the top."""
    if "text_config" in keys:
        return keys
    text = {key: value for key, value in keys.items() if key not in ("vision_config", "architectures")}
    return {
        "text_config": text,
        "vision_config": keys["vision_config"],
        "tie_word_embeddings": keys["tie_word_embeddings"],
    }


def counted(model: Any) -> dict[str, Any]:
    """Return the counts of the real model under the names of `ModelSpec`."""
    total, root, vision = 0, 0, 0
    layers: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        size, path = parameter.numel(), name.split(".")
        total += size
        if any(part in ("visual", "vision_tower", "multi_modal_projector") for part in path):
            vision += size
        elif "layers" in path:
            layers[path[path.index("layers") + 1]] += size
        else:
            root += size
    return {
        "parameters": total,
        "root_parameters": root,
        "vision_parameters": vision,
        "layer_parameters": max(layers.values()),
        "embedding_parameters": model.get_input_embeddings().weight.numel(),
        "lora_sites": Counter(dict(_linear_sites(model))),
    }


def _linear_sites(model: Any) -> Iterator[tuple[tuple[int, int], int]]:
    import torch

    sites: Counter[tuple[int, int]] = Counter()
    for name, module in model.named_modules():
        inside = "layers" in name.split(".") and "vision" not in name
        if inside and isinstance(module, torch.nn.Linear):
            sites[module.in_features, module.out_features] += 1
    yield from sites.items()


def stated(spec: ModelSpec) -> dict[str, Any]:
    """Return what the spec says, in the same form."""
    names = ("parameters", "root_parameters", "vision_parameters", "layer_parameters", "embedding_parameters")
    sites = Counter({(fan_in, fan_out): count for fan_in, fan_out, count in spec.lora_sites})
    return {name: getattr(spec, name) for name in names} | {"lora_sites": sites}


def small_config(model_type: str, rng: random.Random) -> dict[str, Any]:
    """Return a random small config of this type: every flag and every size that the family reads is drawn."""
    drawn = _draw(CLASS_DEFAULTS[model_type], rng)
    heads = drawn["num_attention_heads"] = 2 * rng.choice([1, 2, 3])
    drawn["num_key_value_heads"] = rng.choice([one for one in (1, 2, heads) if heads % one == 0])
    drawn["hidden_size"] = heads * 8 * rng.choice([1, 2])
    if model_type in IGNORE_HEAD_DIM:
        drawn.pop("head_dim", None)
    elif "head_dim" in drawn or model_type == "ministral" or rng.random() < 0.5:
        drawn["head_dim"] = rng.choice([8, 16])
    if model_type == "glm4_moe_lite":
        drawn["first_k_dense_replace"] = 1
    drawn["num_hidden_layers"] = rng.randint(2, 9)
    drawn = {key: value for key, value in drawn.items() if value is not None}
    return _with_tower(model_type, drawn, rng)


def _draw(defaults: Mapping[str, object], rng: random.Random) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    for key, value in defaults.items():
        if isinstance(value, bool):
            drawn[key] = rng.random() < 0.5
        elif isinstance(value, int):
            drawn[key] = 8 * rng.randint(1, 5)
    small = {
        "num_experts_per_tok": 2, "decoder_sparse_step": rng.randint(1, 3), "max_window_layers": rng.randint(0, 5),
        "first_k_dense_replace": rng.randint(0, 3), "n_shared_experts": rng.randint(1, 2),
        "sliding_window_pattern": rng.randint(2, 4), "full_attention_interval": rng.randint(2, 4),
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    drawn |= {key: value for key, value in small.items() if key in defaults}
    if "mlp_only_layers" in defaults:
        drawn["mlp_only_layers"] = rng.choice([[], [0]])
    return drawn


def _with_tower(model_type: str, text: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    tower = FAMILIES[model_type].vision
    if tower is None:
        return {"model_type": model_type, "pad_token_id": 0, **text}
    h = 16 * rng.choice([1, 2, 3])
    sizes = {
        "depth": 3, "num_hidden_layers": 3, "num_heads": 2, "num_attention_heads": 2, "embed_dim": h, "hidden_size": h,
        "intermediate_size": rng.choice([24, 40]), "out_hidden_size": text["hidden_size"], "mlp_ratio": 4,
        "patch_size": 4, "image_size": 16, "head_dim": h // 2, "num_position_embeddings": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "vision_use_head": rng.random() < 0.5,
        "deepstack_visual_indexes": [0, 2],
    }  # fmt: skip
    vision = {key: value for key, value in sizes.items() if key in VISION_DEFAULTS[tower]}
    if tower == "siglip":
        vision["num_attention_heads"] = 2
    if tower == "qwen2":
        vision["hidden_size"] = text["hidden_size"]
    tied = text.pop("tie_word_embeddings")
    return {"model_type": model_type, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_random_architectures_have_the_parameters_of_the_real_class(model_type: str) -> None:
    """Whatever the sizes and flags, total, root, layer, vision and linear modules are those of the class."""
    rng = random.Random(model_type)
    for _ in range(8):
        config = small_config(model_type, rng)
        assert stated(spec_from_config(config, name="drawn", source="test")) == counted(build(config)), config


@pytest.mark.parametrize("name", catalog.names())
def test_each_checkpoint_has_the_parameters_of_the_real_class(name: str) -> None:
    """The counts stored in conf/model are those of the class built from the same keys."""
    entry = catalog.read(name)
    real = counted(build(entry.config))
    assert stated(spec_from_config(entry.config, name=name, source="test")) == real
    assert entry.parameters == real["parameters"]


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - OWN_DEFAULTS))
def test_missing_keys_take_the_defaults_of_the_class(model_type: str) -> None:
    """A key that config.json leaves out has the value that the installed transformers gives it."""
    import transformers

    made = transformers.AutoConfig.for_model(model_type)
    text = made.get_text_config()
    ours = {k: v for k, v in CLASS_DEFAULTS[model_type].items() if k not in DERIVED and v is not None}
    owner = {key: made if key == "tie_word_embeddings" else text for key in ours}
    theirs = {key: getattr(owner[key], key) for key in ours if hasattr(owner[key], key)}
    assert {key: ours[key] for key in theirs} == theirs
