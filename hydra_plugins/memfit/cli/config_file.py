"""``--config FILE``: a yaml or json file of nested or dotted keys, as one nested config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError

MAX_BYTES = 10 * 1024 * 1024
"""A launch's config has some kilobytes; what is larger is another file by mistake."""
_MOST_SAID = 300
"""Characters of a parser's message that are printed: it quotes the file."""
MAX_VALUES = 100_000
"""A launch's config has some thousand values."""


_NOT_A_FRAMEWORKS = ("hydra", "memfit", "defaults")
"""Top-level keys of a file that no framework reads."""

_HARDWARE = re.compile(r"(override |optional )*/?hardware(@.*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFile:
    """What a file says, by who reads it."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """The framework's own keys, nested."""
    added: frozenset[str] = frozenset()
    """Of those, the dotted keys that stand there with Hydra's ``+`` or ``++``: the framework need not have them."""
    settings: Any = None
    """The section ``memfit``."""
    hardware: str | None = None
    """The hardware group's choice in the defaults list (``- hardware: h200``)."""


def read_config_file(name: str) -> ConfigFile:
    """Return the config in the file ``name``; raises `ConfigError` that names the file and what is wrong in it.

    Keys may be nested, dotted, or both: ``{"data.train_batch_size": 64, "trainer": {"nnodes": 1}}``. Hydra's prefixes
    ``+`` and ``++`` in front of a key are accepted, as they stand in a launch script.
    """
    path = Path(name).expanduser()
    content = _parse(path, _read(path))
    if not isinstance(content, Mapping):
        held = "a list" if isinstance(content, list) else "text without keys"
        kind = "is empty" if content is None else f"holds {held}"
        raise ConfigError(
            f"--config {name} {kind}: it is no config of a launch, which holds keys and values, such as "
            "data.train_batch_size: 64."
        )
    try:
        values = nested(content)
    except ConfigError as error:
        raise ConfigError(f"--config {name}: {error}") from None
    if isinstance(values.get("hardware"), str):
        chosen = values["hardware"]
        raise ConfigError(
            f"--config {name}: hardware: {chosen} chooses no group there. In Hydra's yaml it stands in the defaults list "
            f"(defaults: [hardware: {chosen}]); on the console: --hardware {chosen}."
        )
    return ConfigFile(
        values={key: value for key, value in values.items() if key not in _NOT_A_FRAMEWORKS},
        added=frozenset(_added(content)),
        settings=values.get("memfit"),
        hardware=_chosen_hardware(values.get("defaults")),
    )


def _added(given: Mapping[Any, Any], prefix: str = "", inside: bool = False) -> Iterator[str]:
    for key, value in given.items():
        dotted = f"{prefix}{str(key).lstrip('+')}"
        is_added = inside or str(key).startswith("+")
        if isinstance(value, Mapping) and value:
            yield from _added(value, f"{dotted}.", is_added)
        elif is_added:
            yield dotted


def _chosen_hardware(defaults: Any) -> str | None:
    entries = [entry for entry in defaults if isinstance(entry, Mapping)] if isinstance(defaults, list) else []
    chosen = [
        str(name) for entry in entries for group, name in entry.items() if _HARDWARE.fullmatch(str(group)) and name
    ]
    return chosen[-1] if chosen else None


def nested(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Return ``given`` with every dotted key unfolded; raises `ConfigError` where two keys contradict each other.

    >>> nested({"a.b": 1, "a": {"c.d": 2}})
    {'a': {'b': 1, 'c': {'d': 2}}}
    """
    unfolded: dict[str, Any] = {}
    for key, value in given.items():
        _put(
            unfolded, str(key).lstrip("+").split("."), nested(value) if isinstance(value, Mapping) else value, str(key)
        )
    return unfolded


def _put(target: dict[str, Any], parts: list[str], value: Any, key: str) -> None:
    head, *rest = parts
    if not head:
        raise ConfigError(f"the key {key!r} has an empty part.")
    if rest:
        _put(_section(target, head, key), rest, value, key)
    elif isinstance(value, Mapping):
        section = _section(target, head, key)
        for name, child in value.items():
            _put(section, [name], child, f"{key}.{name}")
    elif head in target and target[head] != value:
        raise ConfigError(f"the key {key!r} is given twice, with {target[head]!r} and {value!r}. Keep one of them.")
    else:
        target[head] = value


def _section(target: dict[str, Any], head: str, key: str) -> dict[str, Any]:
    section = target.setdefault(head, {})
    if not isinstance(section, dict):
        raise ConfigError(f"the key {key!r} needs a section where {section!r} is given. Keep one of them.")
    return section


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"--config {path} is larger than {MAX_BYTES} bytes: it cannot be a launch's config.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path} is not text in UTF-8; it must be yaml or json.") from None


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text) if path.suffix == ".json" else _yaml(text)
    except Exception as error:  # of the parsers: json, PyYAML and OmegaConf's constructors have no common base
        kind = "json" if path.suffix == ".json" else "yaml"
        said = shorten(str(error), _MOST_SAID, placeholder=" ...")
        raise ConfigError(f"--config {path} is not valid {kind}: {said}") from None


def _yaml(text: str) -> Any:
    """Parse as Hydra would: ``1e-6`` is a float, a date is text, a key that stands twice is an error."""
    import yaml
    from omegaconf import OmegaConf

    if ":" not in text:
        return text.strip() or None
    if "&" in text:
        _refuse_flood(text)
    found = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    if isinstance(found, dict) and [*found.values()] == [None] and isinstance(yaml.compose(text), yaml.ScalarNode):
        return text  # OmegaConf makes the one key of a mapping out of a text without keys
    return found


def _refuse_flood(text: str) -> None:
    """Raise `ConfigError` for aliases that unfold into more values than any config has, or into themselves."""
    import yaml

    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_VALUES + 1  # what an alias in itself meets
            held = node.value if isinstance(node.value, list) else []
            children = [part for child in held for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root) > MAX_VALUES:
        raise ConfigError(f"its aliases unfold into more than {MAX_VALUES} values.")
