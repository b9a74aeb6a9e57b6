"""A composed config as plain dicts and lists, whatever in it cannot be resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

ABSENT = object()
"""What `value_at` returns where the config has no such key."""
_DEEPEST = 64
"""Sections in sections: no config is deeper, unless interpolations unfold without end."""


def plain(config: DictConfig, *, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return ``config`` resolved, without the top-level keys ``leave_out``.

    Resolved leaf by leaf: an interpolation that fails (a resolver that needs the run, an unset environment variable)
    and a missing value (``???``) stay as their own text, so that only a reader who needs that key meets it.
    """
    with _cache_kept(config):
        return {
            str(key): raw if _is_plain(raw) else _unfolded(config, key)
            for key, raw in config.items_ex(resolve=False)
            if key not in leave_out
        }


class Composed(Mapping[str, Any]):
    """
    What `plain` returns, resolved key by key when it is read, for a reader of few keys.

    Resolving an interpolation costs OmegaConf about half a millisecond, and a framework's config has a hundred that no
    plan reads. What was read once keeps its value, whatever is written into the config later; ``repr`` resolves nothing.
    """

    __slots__ = ("_is_untyped", "_node", "_raw", "_read", "_root")

    def __init__(
        self, node: DictConfig, leave_out: frozenset[str] = frozenset(), *, parent: Composed | None = None
    ) -> None:
        self._node = node
        self._root: Composed = parent._root if parent else self
        self._is_untyped: bool = OmegaConf.get_type(node) is dict and (parent is None or parent._is_untyped)
        self._raw = {str(name): (name, raw) for name, raw in node.items_ex(resolve=False) if name not in leave_out}
        self._read: dict[str, Any] = {}

    @classmethod
    def of(cls, config: DictConfig, *, leave_out: frozenset[str] = frozenset()) -> Composed:
        """Return the view of the whole ``config`` without the top-level keys ``leave_out``."""
        return cls(config, leave_out)

    def __getitem__(self, key: str) -> Any:
        if key not in self._read:
            self._read[key] = self._value(*self._raw[key])
        return self._read[key]

    def __contains__(self, key: object) -> bool:
        return key in self._raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __repr__(self) -> str:
        return repr(self._node)

    def _value(self, name: Any, raw: Any) -> Any:
        if _is_plain(raw):
            return raw
        selected = self._root._selected(raw) if isinstance(raw, str) and self._is_untyped else ABSENT
        if selected is not ABSENT:
            return selected
        if OmegaConf.is_interpolation(self._node, name):
            with _cache_kept(self._node):
                return _unfolded(self._node, name)
        value = _node(self._node, name)
        if isinstance(value, DictConfig):
            return Composed(value, parent=self)
        return _list(value) if isinstance(value, ListConfig) else value

    def _selected(self, text: str) -> Any:
        """Return what the interpolation ``text`` gives where it is a plain value of another key, or that key's default.

        `ABSENT` for everything else, which is OmegaConf's to resolve: what a type of the section would convert, too.
        """
        match = _SELECT.fullmatch(text)
        if match is None:
            return ABSENT
        *sections, name = (match["selected"] or match["key"]).split(".")
        node = self
        for part in sections:
            section = node[part] if isinstance(node._as_it_stands(part), DictConfig) else None
            if not isinstance(section, Composed):
                return ABSENT
            node = section
        raw = node._as_it_stands(name)
        if not _is_plain(raw):
            return ABSENT
        return raw if raw != "???" else _default(match["default"])

    def _as_it_stands(self, name: str) -> Any:
        return self._raw.get(name, (name, "???"))[1]


_KEY = r"[A-Za-z_]\w*(?:\.\w+)+"
_SELECT = re.compile(
    rf"\$\{{(?:(?P<key>{_KEY})|oc\.select:(?P<selected>{_KEY}),(?P<default>null|[Tt]rue|[Ff]alse|0|[1-9]\d*))\}}",
    re.ASCII,
)
"""``${a.b}`` and ``${oc.select:a.b,default}``, which verl writes a hundred times: a key from the root, a plain default."""


def _default(word: str | None) -> Any:
    if word is None:
        return ABSENT
    return int(word) if word.isdecimal() else {"null": None, "true": True, "false": False}[word.lower()]


def _is_plain(raw: Any) -> bool:
    """Whether a child, as it stands in its section, is its own value: no section, no list, nothing to interpolate."""
    return not isinstance(raw, Node) and not (isinstance(raw, str) and "${" in raw)


@contextmanager
def _cache_kept(node: DictConfig | ListConfig) -> Iterator[None]:
    """Leave no value in the cache of the resolvers: one that was cached must not keep a value from before the run."""
    cache = deepcopy(OmegaConf.get_cache(node))
    try:
        yield
    finally:
        OmegaConf.set_cache(node, cache)


def _list(node: ListConfig) -> list[Any]:
    with _cache_kept(node):
        return [_unfolded(node, index) for index in range(len(node))]


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
    try:
        return parent[key]
    except MissingMandatoryValue:
        return "???" if OmegaConf.is_missing(parent, key) else _raw(parent, key)
    except (OmegaConfBaseException, OSError, ValueError, TypeError):
        return _raw(parent, key)


def _raw(parent: DictConfig | ListConfig, key: Any) -> Any:
    raw = OmegaConf.to_container(parent, resolve=False, throw_on_missing=False)
    return raw[key] if isinstance(raw, (dict, list)) else raw


def _value(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, DictConfig):
        return {
            str(key): raw if _is_plain(raw) else _child(value, key, depth + 1)
            for key, raw in value.items_ex(resolve=False)
        }
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
            range(len(node)) if isinstance(node, ListConfig) else node.keys() if isinstance(node, DictConfig) else ()
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
