"""A composed config as plain dicts and lists, whatever in it cannot be resolved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ABSENT = object()
"""What `value_at` returns where the config has no such key."""
_DEEPEST = 64
"""Sections in sections: no config is deeper, unless interpolations unfold without end."""


def plain(config: DictConfig, *, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return ``config`` resolved, without the top-level keys ``leave_out``.

    Resolved leaf by leaf: an interpolation that fails (a resolver that needs the run, an unset environment variable)
    and a missing value (``???``) stay as their own text, so that only a reader who needs that key meets it.
    """
    cache = deepcopy(OmegaConf.get_cache(config))  # a cached resolver must not keep a value from before the run
    try:
        return {str(key): _unfolded(config, key) for key in config if key not in leave_out}
    finally:
        OmegaConf.set_cache(config, cache)


class Composed(Mapping[str, Any]):
    """
    What `plain` returns, resolved key by key when it is read, for a reader of few keys.

    Resolving an interpolation costs OmegaConf about half a millisecond, and a framework's config has a hundred that no
    plan reads. What was read once keeps its value, whatever is written into the config later; ``repr`` resolves nothing.
    """

    __slots__ = ("_names", "_node", "_read")

    def __init__(self, node: DictConfig, leave_out: frozenset[str] = frozenset()) -> None:
        self._node = node
        self._names = {str(name): name for name in node if name not in leave_out}
        self._read: dict[str, Any] = {}

    @classmethod
    def of(cls, config: DictConfig, *, leave_out: frozenset[str] = frozenset()) -> Composed:
        """Return the view of ``config`` without the top-level keys ``leave_out``."""
        return cls(config, leave_out)

    def __getitem__(self, key: str) -> Any:
        if key not in self._read:
            self._read[key] = self._value(self._names[key])
        return self._read[key]

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return repr(self._node)

    def _value(self, name: Any) -> Any:
        if OmegaConf.is_interpolation(self._node, name):
            cache = deepcopy(OmegaConf.get_cache(self._node))
            try:
                return _unfolded(self._node, name)
            finally:
                OmegaConf.set_cache(self._node, cache)
        value = _node(self._node, name)
        if isinstance(value, DictConfig):
            return Composed(value)
        return _list(value) if isinstance(value, ListConfig) else value


def _list(node: ListConfig) -> list[Any]:
    cache = deepcopy(OmegaConf.get_cache(node))
    try:
        return [_unfolded(node, index) for index in range(len(node))]
    finally:
        OmegaConf.set_cache(node, cache)


def _unfolded(parent: DictConfig | ListConfig, key: Any) -> Any:
    """Return the plain child; sections that hold each other by interpolation have no end, and stay as their own text."""
    try:
        return _child(parent, key)
    except RecursionError:
        return _raw(parent, key)


def _child(parent: DictConfig | ListConfig, key: Any, depth: int = 0) -> Any:
    return _value(_node(parent, key), depth)


def _node(parent: DictConfig | ListConfig, key: Any) -> Any:
    """Return the resolved child, or its text where it is missing or cannot be resolved."""
    if OmegaConf.is_missing(parent, key):
        return "???"
    try:
        return parent[key]
    except (OmegaConfBaseException, OSError, ValueError, TypeError):
        return _raw(parent, key)


def _raw(parent: DictConfig | ListConfig, key: Any) -> Any:
    raw = OmegaConf.to_container(parent, resolve=False, throw_on_missing=False)
    return raw[key] if isinstance(raw, (dict, list)) else raw


def _value(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, DictConfig):
        return {str(key): _child(value, key, depth + 1) for key in value}
    if isinstance(value, ListConfig):
        return [_child(value, index, depth + 1) for index in range(len(value))]
    return value


def read(config: DictConfig, key: str) -> Any:
    """Return what `plain` would give at the dotted ``key``, or `ABSENT`; the rest of the config is not resolved."""
    parent: Any = config
    node: Any = config
    name: Any = ""
    for part in key.split("."):
        name = int(part) if isinstance(node, ListConfig) and part.isdecimal() else part
        names = (
            range(len(node)) if isinstance(node, ListConfig) else tuple(node) if isinstance(node, DictConfig) else ()
        )
        if name not in names:
            return ABSENT
        parent, node = node, _node(node, name)
    try:
        return _value(node)
    except RecursionError:
        return _raw(parent, name)


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """Return the value at the dotted ``key`` of a plain config, or `ABSENT`."""
    node: Any = config
    for part in key.split("."):
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return ABSENT
    return node


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys below ``node``; an empty section is a leaf."""
    if not isinstance(node, Mapping) or not node:
        yield prefix
        return
    for key, value in node.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
