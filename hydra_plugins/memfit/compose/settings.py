"""The ``memfit`` node of a composed config, checked value by value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.settings import GOALS, REPORTS, ROLES, Lengths, Settings

NOT_SETTINGS = ("hardware", "model", "unplanned")
"""What else lies in the node: the facts of the groups, and the mark of a config that was never planned."""


def read_settings(node: Mapping[str, Any]) -> Settings:
    """Return the settings in the plain ``memfit`` node; raises `ConfigError` with key, value and what is valid."""
    given = {key: value for key, value in node.items() if key not in NOT_SETTINGS}
    known = {field.name for field in fields(Settings)}
    for key in given:
        if key not in known:
            raise ConfigError(f"memfit.{key} is not a setting of memfit. Settings: {', '.join(sorted(known))}.")
    return Settings(**{key: _CHECKS[key](f"memfit.{key}", value) for key, value in given.items()})


def is_strict(node: Mapping[str, Any]) -> bool:
    """Whether an error stops the launch, also when the settings themselves are what is wrong."""
    return node.get("strict") is not False


def _refuse(key: str, value: object, valid: str, example: str) -> ConfigError:
    return ConfigError(f"{key} is {value!r}; it must be {valid}. Example: {key}={example}")


def _one_of(names: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise _refuse(key, value, f"one of {', '.join(names)}", names[0])
        return value

    return check


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(key, value, "true or false", "true")
    return value


def _share(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1 or math.isnan(value):
        raise _refuse(key, value, "a number from 0 to below 1 (a share of the capacity), or null", "0.05")
    return float(value)


def _count(key: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
        raise _refuse(key, value, "a whole number above 0, or null", "4096")
    return value


def _number(key: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise _refuse(key, value, "a whole number, or null", "1024")
    return value


def _name(key: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _refuse(key, value, "a text in quotes, or null", f"\"'{value}'\"")
    return value


def _release(key: str, value: Any) -> str | None:
    name = _name(key, value)
    if name is not None and not re.match(r"\d+\.\d+", name):
        raise _refuse(key, value, "the number of a release, or null", "\"'0.11.0'\"")
    return name


def _keys(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise _refuse(key, value, "a list of config keys", "[trainer.n_gpus_per_node]")
    return tuple(value)


def _mapping(key: str, value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(item, str) for pair in value.items() for item in pair):
        raise _refuse(key, value, "a mapping of names to dotted config keys", "{batch_size:trainer.batch}")
    return dict(value)


def _models(key: str, value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or not set(value) <= set(ROLES):
        raise _refuse(key, value, f"a mapping with {', '.join(ROLES)}", "{reward:qwen2.5-7b}")
    named = {role: _name(f"{key}.{role}", name) for role, name in value.items()}
    return {role: name for role, name in named.items() if name is not None}


def _lengths(key: str, value: Any) -> Lengths:
    if not isinstance(value, Mapping) or not set(value) <= {"mean", "max", "image"}:
        raise _refuse(key, value, "a mapping with mean, max and image (tokens)", "{mean:345,max:900}")
    checks = {"image": _number}
    lengths = Lengths(**{name: checks.get(name, _count)(f"{key}.{name}", number) for name, number in value.items()})
    if lengths.mean and lengths.max and lengths.mean > lengths.max:
        raise ConfigError(
            f"{key}.mean is {lengths.mean} and {key}.max is {lengths.max}: the mean cannot be the larger."
        )
    return lengths


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "goal": _one_of(GOALS),
    "margin": _share,
    "learned": _flag,
    "strict": _flag,
    "allow_semantic": _flag,
    "pin": _keys,
    "report": _one_of(REPORTS),
    "lengths": _lengths,
    "models": _models,
    "framework": _name,
    "framework_version": _name,
    "engine_version": _release,
    "host_memory_bytes": _count,
    "exact": _flag,
    "mapping": _mapping,
}
