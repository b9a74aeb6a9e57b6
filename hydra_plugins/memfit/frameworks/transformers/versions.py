"""How releases of transformers differ where the memory of ``generate`` is concerned; read in the wheels of the releases."""

from __future__ import annotations

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.frameworks.installed import installed_version
from hydra_plugins.memfit.memory.generation import Software

VERSIONS = (
    "4.40.2",
    "4.44.2",
    "4.45.2",
    "4.46.3",
    "4.48.3",
    "4.51.3",
    "4.53.3",
    "4.54.1",
    "4.56.2",
    "4.57.1",
    "5.0.0",
    "5.10.4",
)
"""Releases whose source was read, oldest first; the ones between behave as the next older one here."""


def pick(asked: str | None) -> str:
    """Return the version to plan for: asked, installed, or the newest that is known. Raises `ConfigError` below 4.40."""
    version = asked or installed_version("transformers") or VERSIONS[-1]
    if numbers(version) < numbers(VERSIONS[0])[:2]:
        raise ConfigError(
            f"transformers {version} is not known; known: {VERSIONS[0]} to {VERSIONS[-1]} and what lies between. "
            f"Set memfit.framework_version={VERSIONS[-1]} if it behaves like that."
        )
    return version


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers: ``5.10.4.dev0`` -> (5, 10, 4). Raises `ConfigError` where there is none."""
    found = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    if not found:
        raise ConfigError(f"memfit.framework_version={version} is no version number; write e.g. {VERSIONS[-1]}.")
    return tuple(found)


def newer_than_known(version: str) -> bool:
    """Whether the release is of a later series than the last one read."""
    return numbers(version)[:2] > numbers(VERSIONS[-1])[:2]


def software(version: str) -> Software:
    """
    Return how a release behaves.

        4.45  the prefill computes logits for the last position alone (``num_logits_to_keep`` in Qwen2ForCausalLM.forward)
        4.46  the model no longer returns fp32 logits (``.float()`` left the forward)
        4.54  SDPA without a mask is given grouped keys (``use_gqa_in_sdpa`` in integrations/sdpa_attention.py)
        4.56  a dynamic cache has sliding layers (``DynamicSlidingWindowLayer``)
        5.0   decode switches to ``batched_mm`` experts (``_optimize_model_for_decode``)
    """
    release = numbers(version)
    return Software(
        all_logits=release < (4, 45),
        upcast_logits=release < (4, 46),
        grouped_query_sdpa=release >= (4, 54),
        sliding_cache=release >= (4, 56),
        batched_experts=release >= (5,),
    )
