"""verl's own configs: the defaults of each supported version, for use where verl is not installed.

The data is written from verl's wheels by ``python -m support.verl_defaults`` (tests/support) and never by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.frameworks import installed

VERSIONS = ("0.4.1", "0.5.0", "0.6.1", "0.7.1", "0.8.0", "0.9.1")
"""Versions whose configs are known, oldest first."""
TRAINERS: Mapping[str, str] = MappingProxyType({"fsdp": "ppo_trainer", "megatron": "ppo_megatron_trainer"})
"""Training backend -> name of verl's config (0.8 and newer also reach Megatron by ``model_engine=megatron``)."""
ENGINES = ("vllm", "sglang")
DATA = Path(__file__).with_name("data")

_SERIES = re.compile(r"v?(\d+)\.(\d+)(?:\D|$)")


def load(version: str, *, trainer: str = "fsdp") -> dict[str, Any]:
    """Return the composed default config of one version: nested, interpolations unresolved, a fresh copy.

    Sections that cannot matter for memory or for verl's own checks (profilers, checkpoint contents) are left out.
    Raises `UnknownName` for a version that is not in `VERSIONS` (see `pick_version`) or a trainer not in `TRAINERS`.
    """
    defaults: dict[str, Any] = _record(version, trainer)["defaults"]
    return defaults


def dataclass_only(version: str, *, trainer: str = "fsdp") -> dict[str, Any]:
    """Return dotted key -> default of the fields that only verl's dataclasses know.

    The yaml lacks them, so they are set with ``+key=value``. Covers ``actor_rollout_ref`` and ``critic``.
    Raises as `load`.
    """
    fields: dict[str, Any] = _record(version, trainer)["dataclass_only"]
    return fields


def pick_version(version: str | None) -> str:
    """Return the known version that stands for ``version``: itself, or the known one of the same minor series.

    ``None`` (nothing asked, nothing installed) gives the newest. Raises `ConfigError` for any other series: keys and
    defaults differ too much between series to guess.
    """
    if version is None:
        return VERSIONS[-1]
    asked = _SERIES.match(version.strip())
    for known in VERSIONS:
        if asked and known.startswith(f"{int(asked[1])}.{int(asked[2])}."):
            return known
    newest = VERSIONS[-1]
    raise ConfigError(
        f"verl {version} is not a version whose config memfit knows. Known: {', '.join(VERSIONS)} "
        "(and other releases of the same minor series). "
        f"Name the closest one with memfit.framework_version={newest} (console: --framework-version {newest})."
    )


def installed_version() -> str | None:
    """Return the version of the installed verl, or ``None``. Reads the metadata: verl itself is not imported."""
    return installed.installed_version("verl")


def installed_engine_version(name: str) -> str | None:
    """Return the version of the installed rollout engine (``vllm``, ``sglang``), or ``None``. Nothing is imported."""
    if name not in ENGINES:
        raise UnknownName("rollout engine", name, ENGINES)
    return installed.installed_version(name)


def engine_in_use(version: str, engine: str, *, asked: str | None) -> str:
    """Return the engine's version: the one ``asked`` for, else the installed one, else the newest that verl allows."""
    return asked or installed_engine_version(engine) or engine_pin(version, engine)


def engine_pin(version: str, engine: str) -> str:
    """Return the newest release of ``engine`` that verl ``version`` (one of `VERSIONS`) allows in its extras."""
    if engine not in ENGINES:
        raise UnknownName("rollout engine", engine, ENGINES)
    if version not in VERSIONS:
        raise UnknownName("verl version", version, VERSIONS)
    newest: str = _engines()[version][engine]["newest"]
    return newest


@dataclass(frozen=True)
class Releases:
    """What verl's adapters share: each knows the same releases."""

    versions: tuple[str, ...] = VERSIONS

    def pick_version(self, asked: str | None) -> str:
        """Return the known release that stands for ``asked``, else for the installed one, else the newest."""
        return pick_version(asked or installed_version())


def _record(version: str, trainer: str) -> dict[str, Any]:
    if version not in VERSIONS:
        raise UnknownName("verl version", version, VERSIONS)
    if trainer not in TRAINERS:
        raise UnknownName("verl training backend", trainer, TRAINERS)
    text = (DATA / f"{version}.json").read_text(encoding="utf-8")
    record: dict[str, Any] = json.loads(text)[trainer]
    return record


@cache
def _engines() -> dict[str, Any]:
    from omegaconf import OmegaConf  # lazy: this file is read only when no engine is installed

    table = OmegaConf.to_container(OmegaConf.load(DATA / "engines.yaml"))
    assert isinstance(table, dict)
    versions: dict[str, Any] = table["versions"]
    return versions
