"""The rule of order: what stands after the hardware group on the command line is pinned.

A value in front of the group is requested; a value behind it is pinned. With the group in a defaults list, and not on
the command line, every value of the command line is pinned. A config *group* chosen behind it pins nothing: it selects
a file of defaults, and a default is requested (``memfit.pin=[section]`` pins what it sets). ``memfit.*`` are settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.compose.plain import ABSENT, leaves, value_at

GROUP = "hardware"
_WORD = re.compile(r"(\+{0,2})([A-Za-z_]\w*(?:\.\w+)*)=([A-Za-z_][\w./-]*|[1-9]\d*)", re.ASCII)
"""``key=value``, ``+key=value``: the value one word, path or number; no sweep, package, quotes, nothing to interpolate."""
_NO_TEXTS = frozenset(("null", "true", "false", "inf", "nan"))
_TYPES = {"": OverrideType.CHANGE, "+": OverrideType.ADD, "++": OverrideType.FORCE_ADD}


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What the command line says about single keys."""

    explicit: frozenset[str] = frozenset()
    """Keys that it sets, adds or deletes."""
    pinned: frozenset[str] = frozenset()
    """Of those, the ones behind the hardware group."""
    settings: frozenset[str] = frozenset()
    """Keys of memfit's own (``memfit.margin``, ``memfit.hardware.capacity_bytes``) that it sets."""
    named: frozenset[str] = frozenset()
    """Every key and every group that it names, as Hydra calls them."""
    sweeps: bool = False
    """It holds a sweep (``a=1,2``): this is the config from which Hydra starts the jobs, and not a job."""


def read_order(lines: Sequence[str], composed: Mapping[str, Any]) -> Order:
    """Return what the overrides ``lines`` (``hydra.overrides.task``) set, against the plain ``composed`` config.

    Raises `ConfigError` when the hardware group stands there twice.
    """
    parsed = [_simple(line) or _parsed(line) for line in lines]
    marks = [index for index, override in enumerate(parsed) if _is_hardware(override)]
    if len(marks) > 1:
        both = " and ".join(str(parsed[index].input_line) for index in marks)
        raise ConfigError(f"the hardware group stands twice on the command line ({both}). Keep one of them.")
    first_pinned = marks[0] + 1 if marks else 0
    explicit = frozenset(key for override in parsed for key in _keys(override, composed))
    pinned = frozenset(key for override in parsed[first_pinned:] for key in _keys(override, composed))
    return Order(
        explicit=frozenset(key for key in explicit if not _is_setting(key)),
        pinned=frozenset(key for key in pinned if not _is_setting(key)),
        settings=frozenset(key for key in explicit if _is_setting(key)),
        named=frozenset(override.key_or_group for override in parsed),
        sweeps=any(override.is_sweep_override() for override in parsed),
    )


def _simple(line: str) -> Override | None:
    """Return a plain ``key=word`` without asking Hydra's grammar, which takes a third of a millisecond for each."""
    found = _WORD.fullmatch(line)
    if found is None or found[3].lower() in _NO_TEXTS:
        return None
    sign, key, word = found.groups()
    value = int(word) if word.isdecimal() else word
    return Override(type=_TYPES[sign], key_or_group=key, value_type=ValueType.ELEMENT, _value=value, input_line=line)


def _parsed(line: str) -> Override:
    return OverridesParser.create().parse_override(line)


def _is_setting(key: str) -> bool:
    return key.split(".")[0] == "memfit"


def _is_hardware(override: Override) -> bool:
    return override.key_or_group == GROUP and not override.is_delete()


def _keys(override: Override, composed: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys whose value the override gives; nothing for a config group and for a sweep."""
    key = override.key_or_group
    if override.package is not None or "/" in key or key == GROUP:
        return
    if override.is_sweep_override():
        return
    if override.is_delete():
        yield key
        return
    value, found = override.value(), value_at(composed, key)
    is_choice = found is ABSENT or (isinstance(value, (str, list)) and isinstance(found, Mapping))
    if is_choice and not _is_setting(key):
        return  # a group: its choice is a name, and what was composed is a section, there or elsewhere
    yield from leaves(value, key)
