"""Typed reading of a framework's config by dotted key, with an error that names the key, the value and the fix."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, guess
from hydra_plugins.memfit.planning.problem import Change, Value

LARGEST = 10**9
"""No count in a launch (sequences, tokens, GPUs) is larger; what is derived from it stays computable."""

MOST_SEQUENCES = 10**6
"""No batch has more sequences; its divisors, which are the micro-batches to choose from, can be listed."""

MISSING = object()
"""What `View.raw` returns for a key that the config does not have."""


def listable(sequences: int, key: str) -> int:
    """Return ``sequences``, the size of a batch that ``key`` asks for; raises `ConfigError` where no batch is so large."""
    if sequences > MOST_SEQUENCES:
        raise ConfigError(
            f"{key} makes a batch of {sequences} sequences; memfit reads up to {MOST_SEQUENCES}. Lower {key}."
        )
    return sequences


class View:
    """A config as the planner wants to see it: the composed values, with some keys set to other values."""

    __slots__ = ("_cache", "_config", "_overrides")

    def __init__(self, config: Mapping[str, Any], overrides: Mapping[str, object] | None = None) -> None:
        self._config = config
        self._overrides = overrides or {}
        self._cache: dict[str, object] = {}

    def with_values(self, overrides: Mapping[str, object]) -> View:
        """Return the same config with other values; what was looked up before is not looked up again."""
        view = View(self._config, overrides)
        view._cache = self._cache
        return view

    @property
    def overrides(self) -> Mapping[str, object]:
        """The values that stand in place of composed ones."""
        return self._overrides

    def raw(self, key: str) -> Any:
        """Return the value as it stands, or `MISSING`."""
        return self._overrides[key] if key in self._overrides else self.composed(key)

    def composed(self, key: str) -> Any:
        """Return the composed value, whatever the planner has set, or `MISSING`."""
        if key not in self._cache:
            self._cache[key] = _lookup(self._config, key)
        return self._cache[key]

    def requested(self, key: str) -> Value:
        """Return the composed value for a `Knob` or `Change`; ``None`` where the key is unset or missing."""
        value: Value = self.composed(key)
        return None if value is MISSING else value

    def has(self, key: str) -> bool:
        """Whether the config has the key, set or unset."""
        return self.raw(key) is not MISSING

    def section(self, key: str) -> bool:
        """Whether the config has a mapping at ``key``."""
        return isinstance(self.raw(key), Mapping)

    def first(self, *keys: str) -> str:
        """Return the first of ``keys`` that the config has, else the first."""
        return next((key for key in keys if self.has(key)), keys[0])

    def integer(self, key: str, default: int, *, minimum: int = 1) -> int:
        """Return an int; unset and missing keys take ``default``. Raises `ConfigError` below ``minimum``."""
        value = self.optional_integer(key, minimum=minimum)
        return default if value is None else value

    def optional_integer(self, key: str, *, minimum: int = 1, largest: int | None = LARGEST) -> int | None:
        """Return an int or ``None`` where the key is unset or missing; ``largest=None``: a number of bytes, not a count."""
        value = self.raw(key)
        if value is MISSING or value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{key}={value!r} is not a whole number. Write e.g. {key}={max(1, minimum)}.")
        if value < minimum:
            raise ConfigError(
                f"{key}={value} is below {minimum}, the smallest valid value. Write e.g. {key}={minimum}."
            )
        if largest is not None and value > largest:
            raise ConfigError(f"{key}={value} is above {largest}, the largest value that memfit reads. Is it a slip?")
        return value

    def number(self, key: str, default: float, *, low: float, high: float) -> float:
        """Return a number within ``low`` and ``high`` (both included)."""
        value = self.raw(key)
        if value is MISSING or value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{key}={value!r} is not a number between {low} and {high}. Write e.g. {key}={default}.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a bool; unset and missing keys take ``default``."""
        value = self.raw(key)
        if value is MISSING or value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{key}={value!r} is not true or false. Write {key}={str(default).lower()}.")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a string; unset and missing keys (and OmegaConf's ???) take ``default``."""
        value = self.raw(key)
        if value is MISSING or value is None or value == "???":
            return default
        if not isinstance(value, str):
            raise ConfigError(f"{key}={value!r} is not a string. Write e.g. {key}={default}.")
        return value

    def choice(self, key: str, default: str, valid: Collection[str]) -> str:
        """Return a string that is one of ``valid``; unset and missing keys take ``default``. Raises `ConfigError`."""
        value = self.text(key, default)
        if value not in valid:
            near = guess(value, valid) or f" Write e.g. {key}={default if default in valid else min(valid)}."
            raise ConfigError(f"{key}={value} is not one of {', '.join(valid)}.{near}")
        return value


def unpinned(changes: Sequence[Change], pinned: Collection[str]) -> tuple[Change, ...]:
    """Return changes that a launch needs at any size; raises `ConfigError` where the user pinned such a value."""
    for change in changes:
        if change.key in pinned:
            raise ConfigError(
                f"{change.key}={change.old} is pinned, but {change.why}. Pin {change.key}={change.new} instead, "
                "or leave it to memfit."
            )
    return tuple(changes)


def _lookup(config: Mapping[str, Any], key: str) -> object:
    node: object = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return MISSING
        node = node[part]
    return node
