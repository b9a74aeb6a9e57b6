"""``key=value`` words of the command line, applied to a framework's config as Hydra would apply them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.compose.plain import ABSENT, leaves, value_at

GROUPS = ("hardware", "model")
"""``+hardware=NAME`` and ``+model=NAME`` stand for ``--hardware NAME`` and ``--model NAME``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The words of one command line, by what they are for."""

    values: tuple[Override, ...] = ()
    """What they set in the framework's config."""
    settings: tuple[Override, ...] = ()
    """``memfit.*``."""
    groups: Mapping[str, str]
    """Chosen file by name of the group (`GROUPS`)."""


def read_line(words: Sequence[str]) -> Line:
    """Return the parsed ``words``; Hydra's own (``hydra.run.dir=...``) are left out.

    Raises `ConfigError` for what Hydra's grammar refuses, for a sweep, for a group that is
    chosen twice and for the groups of a framework.
    """
    values: list[Override] = []
    settings: list[Override] = []
    groups: dict[str, str] = {}
    for override in _parse(words):
        if not override.key_or_group:
            raise ConfigError(f"{override.input_line} has no key. Values are given as key=value.")
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line} is a sweep; memfit judges one launch at a time. Give one value.")
        if override.key_or_group in GROUPS and isinstance(override.value(), str):
            _choose(groups, override)
        elif override.key_or_group.split(".")[0] == "memfit":
            settings.append(override)
        elif override.key_or_group.split(".")[0].split("/")[0] != "hydra":
            _refuse_group(override)
            values.append(override)
    return Line(values=tuple(values), settings=tuple(settings), groups=groups)


def apply(config: DictConfig, overrides: Sequence[Override], refusal: Callable[[str], str] | None = None) -> None:
    """Set ``overrides`` in ``config``, in their order.

    ``refusal`` says why the framework has no key that is not in ``config`` (an empty text: it has it); without it every
    key is accepted. Raises `ConfigError` where Hydra would refuse: a new key without ``+``, a deletion of what is not
    there, a value that the section cannot hold.
    """
    for override in overrides:
        key = override.key_or_group
        if override.type in (OverrideType.CHANGE, OverrideType.DEL):
            _refuse_unknown(config, override, refusal)
        try:
            if override.type == OverrideType.DEL:
                _delete(config, key)
            else:
                OmegaConf.update(config, key, override.value(), merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(f"{override.input_line} cannot be set: {str(error).splitlines()[0]}") from None


def _parse(words: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides=list(words))
    except HydraException as error:
        said = str(error).strip().splitlines()
        raise ConfigError(
            f"{said[0]} Values are given as in Hydra: key=value, quotes around special characters."
        ) from None


def _choose(groups: dict[str, str], override: Override) -> None:
    group, name = override.key_or_group, str(override.value())
    if groups.setdefault(group, name) != name:
        raise ConfigError(f"{group} is chosen twice, {groups[group]} and {name}. Keep one of them.")


def _refuse_group(override: Override) -> None:
    if override.package is not None or "/" in override.key_or_group:
        raise ConfigError(
            f"{override.input_line} chooses a file of a config group, which only Hydra can compose. Give its values as "
            "key=value, or compose first (COMMAND --cfg job > FILE) and use --config FILE."
        )


def _refuse_unknown(config: DictConfig, override: Override, refusal: Callable[[str], str] | None) -> None:
    key = override.key_or_group
    content = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))
    if value_at(content, key) is not ABSENT:
        return
    if override.type == OverrideType.DEL:
        raise ConfigError(f"{override.input_line}: the config has no key {key}.{_guess(key, content)}")
    reason = refusal(key) if refusal else ""
    if reason:
        raise ConfigError(f"{reason}{_guess(key, content)} To add it all the same: +{override.input_line}")


def _guess(key: str, content: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, leaves(content), n=1, cutoff=0.8)
    return f" Did you mean {close[0]}?" if close else ""


def _delete(config: DictConfig, key: str) -> None:
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, section) if section else config
    del parent[name]
