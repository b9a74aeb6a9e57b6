"""The checkpoints of ``conf/model``: one YAML file each, read only when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.base.paths import conf_dir

_ABOUT = ("name", "hub_ids", "parameters", "sources")
"""Keys of a file that say something about the checkpoint; all others are keys of config.json."""
_HUB_ID = re.compile(rb'^  - "([^"/]+/[^"/]+)"$', re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file of ``conf/model``."""

    name: str
    hub_ids: tuple[str, ...]
    """Checkpoints of exactly this shape."""
    parameters: int
    """The count that was compared with the model class."""
    config: Mapping[str, object]
    """Keys of config.json; those of a text_config stand at the top."""
    kind: str
    """``read`` from a stored copy, or ``recalled``."""


@cache
def directory() -> Path:
    """Return the folder of the files."""
    return conf_dir() / "model"


@cache
def names() -> list[str]:
    """Return the names for ``+model=``, sorted."""
    return sorted(path.stem for path in directory().glob("*.yaml"))


def read(name: str) -> Entry:
    """Return one file; raises `UnknownName` with the known names."""
    if name not in names():
        raise UnknownName("model", name, names(), "Any other checkpoint: give its directory or hub id as model path.")
    return _entry(name, _parse((directory() / f"{name}.yaml").read_text(encoding="utf-8")))


def find(hub_id: str) -> str | None:
    """
    Return the name of the file for this hub id, whatever its case.

    The files are searched as text, the likeliest first: parsing all of them would take a hundred times longer.
    """
    wanted, last = hub_id.lower(), hub_id.lower().split("/")[-1]
    by_likeliness = sorted(names(), key=lambda name: (not last.startswith(name), -len(name)))
    return next((name for name in by_likeliness if wanted in _hub_ids(name)), None)


def find_basename(basename: str) -> str | None:
    """Return the file whose name, or one of whose hub ids' last part, is this; None where it is not unique."""
    wanted = basename.lower()
    if wanted in names():
        return wanted
    found = {name for name in names() for hub_id in _hub_ids(name) if hub_id.split("/")[1] == wanted}
    return found.pop() if len(found) == 1 else None


def split(node: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Return what a node says about the checkpoint, and its keys of config.json."""
    about = {key: node[key] for key in _ABOUT if key in node}
    return about, {str(key): value for key, value in node.items() if key not in _ABOUT}


@cache
def _hub_ids(name: str) -> frozenset[str]:
    """Return the hub ids of one file, in lower case."""
    with open(
        f"{directory()}/{name}.yaml", "rb", buffering=0
    ) as file:  # a search opens all of them: unbuffered is twice as fast
        return frozenset(hub_id.decode().lower() for hub_id in _HUB_ID.findall(file.read()))


def _parse(text: str) -> Mapping[str, object]:
    node = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return node if isinstance(node, Mapping) else {}


def _entry(name: str, node: Mapping[str, object]) -> Entry:
    about, config = split(node)
    hub_ids, parameters, sources = about.get("hub_ids"), about.get("parameters"), about.get("sources")
    if not isinstance(hub_ids, list) or not isinstance(parameters, int) or not isinstance(sources, Mapping):
        raise ConfigError(f"conf/model/{name}.yaml: hub_ids, parameters and sources are needed.")
    kind = str(sources["architecture"]["kind"])
    return Entry(name=name, hub_ids=tuple(map(str, hub_ids)), parameters=parameters, config=config, kind=kind)
