"""config.json -> spec: counts, fields, class defaults, and errors that name the key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_plugins.memfit.base.errors import ModelNotFound
from hydra_plugins.memfit.model import catalog
from hydra_plugins.memfit.model.config_json import spec_from_config
from hydra_plugins.memfit.model.families import FAMILIES
from hydra_plugins.memfit.model.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": False,
}  # fmt: skip


def spec(config: dict[str, Any], **changes: Any) -> ModelSpec:
    """Return the spec of a config with some keys changed."""
    return spec_from_config({**config, **changes}, name="some/model", source="test")


def named(name: str) -> ModelSpec:
    """Return the spec of a file of conf/model."""
    return spec_from_config(catalog.read(name).config, name=name, source="test")


@pytest.mark.parametrize("name", catalog.names())
def test_each_checkpoint_counts_what_was_checked_against_its_class(name: str) -> None:
    """The count from the formulas is the stored one, which the verl tier compares with the real class."""
    assert named(name).parameters == catalog.read(name).parameters


PUBLISHED = [
    # Totals that the checkpoints are published with: an anchor that is neither our formula nor the class.
    ("qwen2.5-0.5b", 494_032_768),
    ("qwen2.5-3b", 3_085_938_688),
    ("qwen2.5-7b", 7_615_616_512),
    ("deepseek-r1-distill-qwen-1.5b", 1_777_088_000),
    ("llama-3.1-8b", 8_030_261_248),
    ("llama-3.2-1b", 1_235_814_400),
    ("mixtral-8x7b", 46_702_792_704),
    ("qwen3-30b-a3b", 30_532_122_624),
    ("qwen2.5-vl-7b", 8_292_166_656),
    ("gemma-2-2b", 2_614_341_888),
    ("gemma-3-4b", 4_300_079_472),
    ("gpt-oss-20b", 20_914_757_184),
    ("deepseek-v2-lite", 15_706_484_224),
]


@pytest.mark.parametrize(("name", "total"), PUBLISHED)
def test_totals_are_the_published_ones(name: str, total: int) -> None:
    """A total that is public comes out to the last parameter."""
    assert named(name).parameters == total


@pytest.mark.parametrize("name", catalog.names())
def test_parts_make_up_the_whole(name: str) -> None:
    """Root, tower and layers never exceed the total, and the largest layer is at least the mean one."""
    found = named(name)
    layers = found.parameters - found.root_parameters - found.vision_parameters
    assert found.layer_parameters * found.num_hidden_layers >= layers > 0
    assert found.active_parameters <= found.parameters
    assert (found.active_parameters == found.parameters) == (found.num_experts == 0)
    assert found.expert_parameters < layers
    assert found.root_parameters >= found.embedding_parameters


FIELDS = [
    ("qwen3-8b", {"qk_norm": True, "head_dim": 128, "sliding_window": None, "num_full_attention_layers": None}),
    ("qwen2.5-7b", {"qk_norm": False, "head_dim": 128, "num_key_value_heads": 4, "vision_parameters": 0}),
    ("gemma-2-9b", {"sliding_window": 4096, "num_full_attention_layers": 21, "tie_word_embeddings": True}),
    ("gemma-3-1b", {"sliding_window": 512, "num_full_attention_layers": 4, "qk_norm": True}),
    ("mistral-7b-v0.1", {"sliding_window": 4096, "num_full_attention_layers": 0}),
    ("gpt-oss-20b", {"sliding_window": 128, "num_full_attention_layers": 12, "num_experts": 32}),
    ("qwen3.5-35b-a3b", {"num_linear_attention_layers": 30, "num_full_attention_layers": 10, "num_moe_layers": 40}),
    ("deepseek-v3", {"kv_lora_rank": 512, "q_lora_rank": 1536, "v_head_dim": 128, "num_moe_layers": 58}),
    ("deepseek-v2-lite", {"q_lora_rank": 0, "shared_expert_intermediate_size": 2816, "num_experts_per_tok": 6}),
    ("mixtral-8x7b", {"num_experts": 8, "moe_intermediate_size": 14336, "num_moe_layers": 32}),
    ("qwen3-30b-a3b", {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
]


@pytest.mark.parametrize(("name", "fields"), FIELDS)
def test_fields_describe_the_architecture(name: str, fields: dict[str, object]) -> None:
    """Attention, window, experts and latent ranks stand in the fields that the formulas read."""
    found = named(name)
    assert {key: getattr(found, key) for key in fields} == fields


def test_lora_sites_are_the_linear_modules_of_the_decoder() -> None:
    """q, k, v, o, gate, up, down of each layer, equal shapes together, without lm_head and embedding."""
    sites = {(fan_in, fan_out): count for fan_in, fan_out, count in spec(LLAMA).lora_sites}
    assert sites == {(64, 64): 6, (64, 32): 6, (64, 160): 6, (160, 64): 3}


def test_experts_are_apart_from_the_other_lora_sites() -> None:
    """Routed experts are linear modules in older classes only, so they have a field of their own."""
    found = named("qwen3-30b-a3b")
    assert (2048, 768, 2 * 128 * 48) in found.expert_lora_sites
    assert all(768 not in site[:2] for site in found.lora_sites)
    assert named("gpt-oss-20b").expert_lora_sites == ()


CHANGES = [
    ({"tie_word_embeddings": True}, -100 * 64),
    ({"attention_bias": True}, 3 * (64 + 32 + 32 + 64)),
    ({"mlp_bias": True}, 3 * (160 + 160 + 64)),
    ({"head_dim": 32}, 3 * 2 * 64 * (128 - 64 + 64 - 32)),
    ({"num_key_value_heads": None}, 3 * 2 * 64 * 32),
    ({"num_hidden_layers": 2}, -(2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64)),
]


@pytest.mark.parametrize(("change", "difference"), CHANGES)
def test_one_key_changes_the_count_by_what_it_adds(change: dict[str, object], difference: int) -> None:
    """The count follows each key by the parameters that it adds or takes away."""
    assert spec(LLAMA, **change).parameters - spec(LLAMA).parameters == difference


DEPTHS = [
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, 2),
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]}, 1),
    ({"model_type": "qwen3_moe", "num_experts": 0}, 0),
    ({"model_type": "deepseek_v3", "first_k_dense_replace": 2}, 3),
    ({"model_type": "mixtral", "num_local_experts": 4}, 5),
    ({"model_type": "llama"}, 0),
]


@pytest.mark.parametrize(("change", "layers"), DEPTHS)
def test_layers_with_experts_are_those_that_the_config_names(change: dict[str, object], layers: int) -> None:
    """Every n-th layer, all after the first, or all: of five layers, as the model type has it."""
    assert spec(LLAMA, num_hidden_layers=5, **change).num_moe_layers == layers


def test_missing_keys_take_the_class_defaults() -> None:
    """A bare model type is the model that its class builds without arguments: Llama-2-7B for llama."""
    assert spec({"model_type": "llama"}).parameters == 6_738_415_616


def test_text_part_of_a_wrapper_is_read_nested_and_flat() -> None:
    """Older files keep the text keys at the top, newer ones in text_config; both mean the same."""
    flat = dict(catalog.read("qwen2.5-vl-3b").config)
    vision, tied = flat.pop("vision_config"), flat["tie_word_embeddings"]
    model_type = flat.pop("model_type")
    nested = {"model_type": model_type, "text_config": flat, "vision_config": vision, "tie_word_embeddings": tied}
    assert spec(nested).parameters == named("qwen2.5-vl-3b").parameters


def test_quantised_checkpoint_is_counted_plain_and_said() -> None:
    """A quantization_config does not change the counts, but the source says so."""
    found = spec(LLAMA, quantization_config={"quant_method": "gptq", "bits": 4})
    assert found.parameters == spec(LLAMA).parameters
    assert "gptq" in found.source


ERRORS = [
    ({"model_type": "bert"}, "unknown model_type 'bert'", "qwen3_moe"),
    ({"model_type": None}, "unknown model_type None", "+model="),
    ({"hidden_size": "64"}, "hidden_size is '64'", "whole number"),
    ({"hidden_size": 0}, "hidden_size is 0", "size > 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1", "whole number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000", "no model has more"),
    ({"vocab_size": True}, "vocab_size is True", "whole number"),
    ({"vocab_size": 1.5}, "vocab_size is 1.5", "whole number"),
    ({"intermediate_size": None}, "intermediate_size is None", "size > 0"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'", "true or false"),
    ({"num_attention_heads": 128}, "128 num_attention_heads", "hidden_size of 64"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types names 1 layers", "num_hidden_layers 3"),
    ({"model_type": "qwen2", "layer_types": "full"}, "layer_types is 'full'", "not a list"),
    ({"model_type": "qwen2", "layer_types": ["mamba"] * 3}, "layer_types has 'mamba'", "Qwen2ForCausalLM"),
    ({"model_type": "qwen3_vl", "text_config": [1]}, "text_config is [1]", "not a mapping"),
    ({"model_type": "qwen3_vl", "vision_config": {"depth": "many"}}, "depth is 'many'", "vision"),
    ({"model_type": "qwen2_vl", "vision_config": {"mlp_ratio": "4"}}, "mlp_ratio is '4'", "number > 0"),
    ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok is 9", "8 experts"),
]


@pytest.mark.parametrize(("change", "said", "help_"), ERRORS, ids=[said for _, said, _ in ERRORS])
def test_unusable_values_are_named(change: dict[str, object], said: str, help_: str) -> None:
    """An error names the model, the key and its value, and what would be valid."""
    with pytest.raises(ModelNotFound) as error:
        spec(LLAMA, **change)
    assert "some/model" in str(error.value)
    assert said in str(error.value)
    assert help_ in str(error.value)


JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.floats(0, 9),
    st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=3),
)


@settings(max_examples=100)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from([*LLAMA, "head_dim", "num_experts", "layer_types", "vision_config"]), JSON),
)
def test_any_config_gives_a_spec_or_one_clear_error(model_type: str, keys: dict[str, object]) -> None:
    """Whatever stands in a config.json, the answer is a consistent spec or a ModelNotFound, never a traceback."""
    try:
        found = spec({**keys, "model_type": model_type})
    except ModelNotFound as error:
        assert "some/model" in str(error)
    else:
        assert found.parameters >= found.root_parameters + found.layer_parameters + found.vision_parameters > 0
