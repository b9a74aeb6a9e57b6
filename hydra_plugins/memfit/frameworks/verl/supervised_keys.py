"""The two entries of verl's supervised fine-tuning: which keys each one reads, and its own defaults.

``fsdp_sft_trainer`` (0.4 to 0.6, sft_trainer.yaml) and ``sft_trainer`` (0.6 and later, sft_trainer_engine.yaml) share the
section ``data`` and little else. File and line of each fact: docs/verl.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.view import View

LEGACY, ENGINE = "fsdp_sft_trainer", "sft_trainer"
ENTRIES: Mapping[str, str] = MappingProxyType({LEGACY: "sft_trainer", ENGINE: "sft_trainer_engine"})
"""Entry -> name of its config."""
VERSIONS_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {LEGACY: ("0.4.1", "0.5.0", "0.6.1"), ENGINE: ("0.6.1", "0.7.1", "0.8.0", "0.9.1")}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """Where one entry reads what memory depends on."""

    path: str
    strategy: str
    section: str
    """The FSDP section."""
    sequence_parallel: str
    remove_padding: str
    host_policy: str
    """The switch that keeps parameters, gradients and optimizer on the host."""
    strategy_default: str


_KEYS = {
    LEGACY: Keys(
        path="model.partial_pretrain",
        strategy="model.strategy",
        section="model.fsdp_config",
        sequence_parallel="ulysses_sequence_parallel_size",
        remove_padding="use_remove_padding",
        host_policy="model.fsdp_config.cpu_offload",
        strategy_default="fsdp2",
    ),
    ENGINE: Keys(
        path="model.path",
        strategy="engine.strategy",
        section="engine",
        sequence_parallel="engine.ulysses_sequence_parallel_size",
        remove_padding="model.use_remove_padding",
        host_policy="engine.offload_policy",
        strategy_default="fsdp",
    ),
}


def keys_of(entry: str) -> Keys:
    """Return the keys of one of `ENTRIES`."""
    return _KEYS[entry]


def entry_of(view: View) -> str:
    """Return the entry that a config is for."""
    return ENGINE if view.section("engine") else LEGACY


def entry_for(version: str, asked: Mapping[str, Any]) -> str:
    """Return the entry that the dotted keys in ``asked`` are for; the newer one where nothing tells, if there is one."""
    older = {"model.partial_pretrain", "ulysses_sequence_parallel_size", "use_remove_padding", "model.strategy"}
    is_legacy = bool(older & set(asked)) or any(key.startswith("model.fsdp_config.") for key in asked)
    entry = LEGACY if is_legacy or version not in VERSIONS_OF[ENGINE] else ENGINE
    return require(version, entry)


def require(version: str, entry: str) -> str:
    """Return ``entry``; raises `ConfigError` where the release has none of that name."""
    if version not in VERSIONS_OF[entry]:
        raise ConfigError(
            f"verl {version} has no {entry} that memfit knows; releases that have one: {', '.join(VERSIONS_OF[entry])}. "
            f"Name yours with memfit.framework_version={VERSIONS_OF[entry][-1]}."
        )
    return entry


def load(version: str, entry: str) -> dict[str, Any]:
    """Return the composed config of one entry, nested, a fresh copy."""
    text = (defaults.DATA / "supervised.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)["entries"][entry][version]
    return config


def versions_with(key: str) -> tuple[str, ...]:
    """Return the releases in which one of the entries has ``key``, oldest first."""
    return tuple(version for version in defaults.VERSIONS if any(_has(version, entry, key) for entry in ENTRIES))


def _has(version: str, entry: str, key: str) -> bool:
    return version in VERSIONS_OF[entry] and (key.startswith("checkpoint.") or _view(version, entry).has(key))


@cache
def _view(version: str, entry: str) -> View:
    return View(load(version, entry))
