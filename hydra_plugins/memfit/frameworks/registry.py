"""The adapters that exist, imported only when one is needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.frameworks.adapter import Adapter
from hydra_plugins.memfit.frameworks.installed import installed_version

_ADAPTERS = {
    "verl": "hydra_plugins.memfit.frameworks.verl.adapter:VerlAdapter",
    "verl-generation": "hydra_plugins.memfit.frameworks.verl.generation:VerlGenerationAdapter",
    "verl-sft": "hydra_plugins.memfit.frameworks.verl.supervised:VerlSupervisedAdapter",
    "areal": "hydra_plugins.memfit.frameworks.areal.adapter:ArealAdapter",
    "mllm-jax": "hydra_plugins.memfit.frameworks.mllm_jax.adapter:MllmJaxAdapter",
    "jax": "hydra_plugins.memfit.frameworks.jax_generic.adapter:JaxAdapter",
    "transformers": "hydra_plugins.memfit.frameworks.transformers.adapter:TransformersAdapter",
}

_PACKAGES = {
    **dict.fromkeys(("verl", "verl-generation", "verl-sft"), "verl"),
    "areal": "areal",
    "transformers": "transformers",
}
"""Distribution by adapter; the runners of the others are no packages."""


def names() -> tuple[str, ...]:
    """Return the names of all adapters."""
    return tuple(_ADAPTERS)


def adapter(name: str) -> Adapter:
    """Return the adapter called ``name``; raises `UnknownName`."""
    if name not in _ADAPTERS:
        raise UnknownName("framework", name, _ADAPTERS, "Set it with memfit.framework=NAME.")
    module, _, attribute = _ADAPTERS[name].partition(":")
    loaded: Adapter = getattr(importlib.import_module(module), attribute)()
    return loaded


def assumes_version(name: str, asked: str | None) -> bool:
    """Whether the version of a framework is neither ``asked`` for nor that of an installed package: it is a guess, and said so."""
    package = _PACKAGES.get(name)
    return asked is None and package is not None and installed_version(package) is None


def recognise(config: Mapping[str, Any]) -> Adapter:
    """Return the adapter whose framework the config belongs to; raises `ConfigError` when none or several claim it."""
    if not config:
        raise ConfigError(
            "there is no launch to read: memfit plan --framework verl --hardware h200 key=value ..., or paste a launch line."
        )
    claims = [a for a in map(adapter, _ADAPTERS) if a.recognises(config)]
    if len(claims) == 1:
        return claims[0]
    found = f"looks like {' and '.join(a.name for a in claims)}" if claims else "is of no framework that memfit knows"
    keys = shorten(", ".join(sorted(map(str, config))[:12]), 200, placeholder=" ...")
    raise ConfigError(
        f"this config {found}. Say which one with memfit.framework=NAME, or leave the hardware group out. "
        f"Known: {', '.join(_ADAPTERS)}. Top-level keys: {keys}."
    )
