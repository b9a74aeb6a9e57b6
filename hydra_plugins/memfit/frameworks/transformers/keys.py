"""memfit's names for what a generating app configures, and the keys at which they are looked for.

The first key that the config has is read; ``memfit.mapping.<name>=<dotted key>`` goes before all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.frameworks.view import MISSING, View

SECTION = "generation"

KEYS: dict[str, tuple[str, ...]] = {
    "model": ("model.path", "model.name_or_path", "model.model_name_or_path", "model.name", "generation.model"),
    "dtype": ("model.dtype", "model.torch_dtype", "generation.dtype"),
    "attn_implementation": ("model.attn_implementation", "generation.attn_implementation"),
    "quantization": ("model.quantization_config", "model.load_in_4bit", "model.load_in_8bit"),
    "device_map": ("model.device_map",),
    "num_questions": ("generation.num_questions",),
    "micro_batch_size": ("generation.micro_batch_size",),
    "chunk_size": ("generation.chunk_size",),
    "num_return_sequences": ("generation.num_return_sequences",),
    "max_prompt_length": ("generation.max_prompt_length", "generation.prompt_length"),
    "max_new_tokens": ("generation.max_new_tokens",),
    "num_beams": ("generation.num_beams",),
    "do_sample": ("generation.do_sample",),
    "temperature": ("generation.temperature",),
    "top_k": ("generation.top_k",),
    "top_p": ("generation.top_p",),
    "use_cache": ("generation.use_cache",),
    "cache_implementation": ("generation.cache_implementation",),
    "output_scores": ("generation.output_scores",),
}

# What transformers (and the helper) take where a key is missing or unset.
DEFAULTS: dict[str, Any] = {
    "model": {"path": None, "dtype": None, "attn_implementation": "sdpa"},
    "generation": {
        "num_questions": None,
        "micro_batch_size": None,
        "chunk_size": None,
        "num_return_sequences": 1,
        "max_prompt_length": None,
        "max_new_tokens": None,
        "num_beams": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "use_cache": True,
        "cache_implementation": None,
        "output_scores": False,
    },
}

WRITABLE = ("micro_batch_size", "chunk_size", "max_new_tokens")
"""Every name whose key memfit may write; the last one only with ``memfit.allow_semantic=true``."""

_OTHERS = frozenset(
    {"min_new_tokens", "max_length", "min_length", "prompt", "num_beam_groups", "cache_config", "output_logits"}
)
"""Names of the generation config, close to one that is read, that memfit needs not."""

_DTYPES = {
    "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2, "half": 2, "float32": 4, "fp32": 4, "float": 4,
}  # fmt: skip
_ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "flash_attention_2"}
_CACHES = {
    "dynamic": "dynamic", "dynamic_full": "dynamic", "static": "static", "hybrid": "static", "sliding_window": "static",
    "offloaded": "offloaded",
}  # fmt: skip


def is_misspelt(key: str) -> bool:
    """Whether ``key`` is almost one that is read here: an app's other keys are its own."""
    section, _, name = key.rpartition(".")
    known = [
        place.rpartition(".")[2] for places in KEYS.values() for place in places if place.startswith(f"{section}.")
    ]
    return name not in (*known, *_OTHERS) and bool(difflib.get_close_matches(name, known, n=1, cutoff=0.8))


class Keys:
    """The keys of one app."""

    def __init__(self, view: View, mapping: Mapping[str, str]) -> None:
        unknown = sorted(set(mapping) - set(KEYS))
        if unknown:
            raise ConfigError(
                f"memfit.mapping does not know {', '.join(unknown)}. Names: {', '.join(KEYS)}. "
                "Example: memfit.mapping.micro_batch_size=sampling.batch"
            )
        for name, key in mapping.items():
            if not view.has(key):
                raise ConfigError(f"memfit.mapping.{name} names {key}, and the config has no such key.")
        self._keys = {name: mapping.get(name) or view.first(*places) for name, places in KEYS.items()}

    def __getitem__(self, name: str) -> str:
        """Return the app's key for one of memfit's names."""
        return self._keys[name]


def element_bytes(view: View, key: str, *, major: int) -> tuple[int, str | None]:
    """Return the bytes of one weight, and what had to be assumed; raises `ConfigError` for an unknown dtype."""
    asked = view.text(key, "").removeprefix("torch.")
    if asked in _DTYPES:
        return _DTYPES[asked], None
    if asked == "" and major < 5:
        return 4, f"{key} is not set: transformers before 5 then loads float32; {key}=bfloat16 halves the weights"
    if asked in ("", "auto"):
        said = f"{key} is {asked or 'not set'}: the checkpoint's dtype is taken to have 2 bytes; or say which: {key}=float32"
        return 2, said
    raise ConfigError(f"{key}={asked} is no dtype that memfit knows: {', '.join(_DTYPES)}, auto.")


def attention(view: View, key: str) -> str:
    """Return the kind of attention; raises `NotModelled`."""
    asked = view.text(key, "sdpa")
    if asked in _ATTENTION:
        return _ATTENTION[asked]
    if "flash" in asked and not asked.startswith("paged"):
        return "flash_attention_2"
    raise NotModelled(f"{key}={asked} is not modelled. Modelled: {', '.join(_ATTENTION)}, e.g. {key}=sdpa")


def cache(view: View, key: str, *, use_cache: bool) -> str:
    """Return the kind of cache; raises `NotModelled`."""
    if not use_cache:
        return "none"
    asked = view.text(key, "dynamic")
    if asked in _CACHES:
        return _CACHES[asked]
    raise NotModelled(f"{key}={asked} is not modelled. Modelled: {', '.join(_CACHES)}, e.g. {key}=dynamic")


def refuse_quantization(view: View, key: str) -> None:
    """Raise `NotModelled` for quantised weights."""
    value = view.raw(key)
    if value is not MISSING and value not in (None, False):
        raise NotModelled(
            f"{key}={value!r}: quantised weights are not modelled. Load the model in bfloat16, or leave the hardware "
            "group out."
        )
