"""Model path, hub id or name -> `ModelSpec`: directory, Hugging Face cache, conf/model, download; in this order."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hydra_plugins.memfit.base.errors import ConfigError, ModelNotFound
from hydra_plugins.memfit.model import catalog
from hydra_plugins.memfit.model.config_json import HOW_TO_SUPPLY, spec_from_config
from hydra_plugins.memfit.model.json_file import parse_json, read_json
from hydra_plugins.memfit.model.spec import ModelSpec

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def names() -> list[str]:
    """Return the names for ``+model=``."""
    return list(catalog.names())


def load(name: str) -> ModelSpec:
    """Return the spec of ``conf/model/<name>.yaml``; raises `UnknownName` with the list."""
    entry = catalog.read(name)
    return spec_from_config(entry.config, name=entry.name, source=f"conf/model/{entry.name}.yaml")


def from_mapping(node: object) -> ModelSpec:
    """
    Return the spec of a composed ``memfit.model`` node.

    The counts are computed from its keys, so that an override like ``memfit.model.num_hidden_layers=2`` tells; a node
    without ``name`` describes an architecture of the user's own. Raises `ModelNotFound` for an unknown model_type and
    `ConfigError` where ``parameters`` was overridden, or where the node is a single value.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"memfit.model is {node!r}; it must come from a model group, e.g. +model=qwen2.5-7b.")
    about, config = catalog.split(node)
    name = str(about.get("name") or "memfit.model")
    entry = catalog.read(name) if name in catalog.names() else None
    if entry is None:
        return spec_from_config(config, name=name, source="memfit.model, as the user described it")
    if about.get("parameters", entry.parameters) != entry.parameters:
        raise ConfigError(
            f"memfit.model.parameters={about['parameters']} cannot be set: it is computed from the architecture. "
            "Override a key of config.json instead, e.g. memfit.model.num_hidden_layers=2."
        )
    changed = sorted(key for key in {*config, *entry.config} if config.get(key) != entry.config.get(key))
    note = f", changed: {', '.join(changed)}" if changed else ""
    return spec_from_config(config, name=name, source=f"conf/model/{name}.yaml{note}")


def resolve_model(path: str, *, environ: Mapping[str, str], allow_download: bool = True) -> ModelSpec:
    """
    Return the architecture of a model path, a hub id or a name of ``conf/model``.

    Raises `ModelNotFound` saying what was tried, in order; also for a directory without config.json and for a
    config.json that cannot be read.
    """
    if not path or path != path.strip() or "\0" in path:
        raise ModelNotFound(f"{path!r} is no model path. {HOW_TO_SUPPLY}")
    tried: list[str] = []
    for step in (_from_directory, _from_hub_cache, _from_catalog, _from_download):
        found = step(path, environ, tried) if step is not _from_download or allow_download else None
        if found is not None:
            return found
    steps = "; ".join(tried)
    raise ModelNotFound(
        f"The architecture of model {path!r} was not found. Tried: {steps}. {_hint(path)}{HOW_TO_SUPPLY}"
    )


_Step = Callable[[str, Mapping[str, str], list[str]], "ModelSpec | None"]


def _from_directory(path: str, environ: Mapping[str, str], tried: list[str]) -> ModelSpec | None:
    local = Path(_expand(path, environ))
    try:
        there = local.exists()
    except OSError as error:
        raise ModelNotFound(f"{path}: {error.strerror or error}.") from error
    if not there:
        tried.append("no such directory on this host" if not local.is_symlink() else "a link that leads nowhere")
        return None
    file = local if local.name == "config.json" else local / "config.json"
    if local.is_dir() and not os.path.lexists(file):
        raise ModelNotFound(f"{path} is a directory without config.json{_contents(local)}. {HOW_TO_SUPPLY}")
    if local.is_file() and file != local:
        raise ModelNotFound(f"{path} is a file; the directory of a checkpoint is needed, with its config.json.")
    return spec_from_config(read_json(file), name=path, source=str(file))


def _from_hub_cache(path: str, environ: Mapping[str, str], tried: list[str]) -> ModelSpec | None:
    if not _HUB_ID.fullmatch(path):
        return None
    for root in _hub_caches(environ):
        file = _snapshot(root / f"models--{path.replace('/', '--')}")
        if file is not None:
            return spec_from_config(read_json(file), name=path, source=str(file))
        tried.append(f"not in the Hugging Face cache {root}")
    return None


def _from_catalog(path: str, environ: Mapping[str, str], tried: list[str]) -> ModelSpec | None:
    hub_id = path if _HUB_ID.fullmatch(path) else _hub_id_in(path)
    name, how = catalog.find(hub_id) if hub_id else None, ""
    if name is None and not _HUB_ID.fullmatch(path):
        last = path.rstrip("/").split("/")[-1]
        name, how = catalog.find_basename(last), f", recognised by its name {last!r}: {path} is not on this host"
    if name is None:
        tried.append("not in conf/model")
        return None
    entry = catalog.read(name)
    how = "" if path in (name, *entry.hub_ids) else how
    return spec_from_config(entry.config, name=path, source=f"conf/model/{name}.yaml{how}")


def _from_download(path: str, environ: Mapping[str, str], tried: list[str]) -> ModelSpec | None:
    if not _HUB_ID.fullmatch(path):
        tried.append("no download: not of the form org/name")
        return None
    # Imported here because the client costs a launch more than all the rest of a resolve, and most never need it.
    from urllib.parse import urlsplit

    from hydra_plugins.memfit.base.progress import slow
    from hydra_plugins.memfit.model.download import cached_path, config_url, download, is_offline, keep

    kept = cached_path(path, environ)
    known = _kept(kept)
    if known is not None:
        return spec_from_config(known, name=path, source=str(kept))
    if is_offline(environ):
        tried.append("no download: HF_HUB_OFFLINE is set")
        return None
    try:
        with slow(f"asking {urlsplit(config_url(path, environ)).hostname} for the config.json of {path}"):
            data = download(path, environ)
        config = parse_json(data, config_url(path, environ))
    except ModelNotFound as error:
        tried.append(f"download: {error}")
        return None
    keep(kept, data)
    return spec_from_config(config, name=path, source=config_url(path, environ))


def _kept(file: Path) -> Mapping[str, object] | None:
    """Return the config.json that an earlier launch kept; one that is damaged or out of reach is fetched anew."""
    try:
        return read_json(file)
    except ModelNotFound:
        return None


def _expand(path: str, environ: Mapping[str, str]) -> str:
    home = environ.get("HOME")
    if home and (path == "~" or path.startswith("~/")):
        return home + path[1:]
    return os.path.expanduser(path)


def _hub_caches(environ: Mapping[str, str]) -> list[Path]:
    """Return the folders that huggingface_hub would use, the most specific variable first."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(key):
            return [Path(_expand(environ[key], environ))]
    if environ.get("HF_HOME"):
        return [Path(_expand(environ["HF_HOME"], environ)) / "hub"]
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [Path(_expand(base, environ)) / "huggingface" / "hub"]


def _snapshot(repository: Path) -> Path | None:
    """Return config.json of the revision main, or of the only one that is there."""
    try:
        reference = repository / "refs" / "main"
        if reference.is_file():
            folders = [repository / "snapshots" / reference.read_text(encoding="utf-8").strip()]
        else:
            folders = list((repository / "snapshots").glob("*"))
        files = [folder / "config.json" for folder in folders if (folder / "config.json").exists()]
    except (OSError, ValueError):
        return None
    return files[0] if len(files) == 1 else None


def _hub_id_in(path: str) -> str | None:
    """Return the hub id that a path ends in: .../models--org--name/snapshots/<sha>, or .../org/name."""
    for part in path.split("/"):
        if part.startswith("models--") and part.count("--") >= 2:
            return part[len("models--") :].replace("--", "/", 1)
    last = "/".join(path.rstrip("/").split("/")[-2:])
    return last if _HUB_ID.fullmatch(last) else None


def _contents(folder: Path) -> str:
    try:
        held = sorted(child.name for child in folder.iterdir())
    except OSError as error:
        return f" ({error.strerror or error})"
    deeper = [str(file.relative_to(folder).parent) for file in folder.glob("*/config.json")]
    if deeper:
        return f"; there is one in {', '.join(sorted(deeper)[:3])}"
    return f"; it holds {', '.join(held[:5])}{', ...' if len(held) > 5 else ''}" if held else "; it is empty"


def _hint(path: str) -> str:
    name = catalog.find_basename(path.rstrip("/").split("/")[-1])
    return f"If it has the shape of {name}, add +model={name}. " if name else ""
