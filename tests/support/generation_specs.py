"""Model specs and calls of ``generate`` for tests, without torch and without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hydra_plugins.memfit.memory.generation import Call
from hydra_plugins.memfit.memory.sampling import Sampler
from hydra_plugins.memfit.model.spec import ModelSpec

DATA = Path(__file__).parents[1] / "data"
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Layers that see the whole sequence, where a model has a sliding window.
FULL_LAYERS = {"mistral-7b-v0.1": 0, "gemma-2-2b": 13, "tiny-mistral": 0}


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """Return the shapes in tests/data/generation_models.yaml by name."""
    loaded: dict[str, dict[str, Any]] = yaml.safe_load((DATA / "generation_models.yaml").read_text())
    return loaded


def spec(name: str, parameters: int) -> ModelSpec:
    """Return the spec of a model in generation_models.yaml with that many parameters."""
    shape = shapes()[name]
    heads = shape["num_attention_heads"]
    fields = {key: value for key, value in shape.items() if key not in ("model_type", "head_dim")}
    return ModelSpec(
        name=name,
        source="tests/data/generation_models.yaml",
        architecture="",
        model_type=shape["model_type"],
        head_dim=shape.get("head_dim") or shape["hidden_size"] // heads,
        max_position_embeddings=32768,
        num_full_attention_layers=FULL_LAYERS.get(name),
        parameters=parameters,
        embedding_parameters=shape["vocab_size"] * shape["hidden_size"],
        root_parameters=0,
        layer_parameters=0,
        active_parameters=parameters,
        **fields,
    )


def call(case: Mapping[str, Any]) -> Call:
    """Return the call that a traced case makes."""
    return Call(
        rows=case["rows"] * case["beams"],
        prompt_tokens=case["prompt"],
        new_tokens=case["new"],
        element_bytes=ELEMENT_BYTES[case["dtype"]],
        attention=case["attention"],
        cache=case["cache"],
        padded=case["padded"],
        sampler=Sampler(
            do_sample=case["do_sample"],
            temperature=case["temperature"] != 1.0,
            top_k=case["top_k"] > 0,
            top_p=case["top_p"] < 1.0,
            beams=case["beams"] > 1,
            keeps_scores=case["output_scores"],
        ),
    )
