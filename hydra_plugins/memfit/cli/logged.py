"""Where a launch that has already run is read: the command line, its log, or the config that AReaL saved beside the log."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.cli.config_file import ConfigFile, nested, read_config_file
from hydra_plugins.memfit.cli.launch import Question, read_launch
from hydra_plugins.memfit.cli.main import surroundings
from hydra_plugins.memfit.cli.pasted import Pasted, read_pasted
from hydra_plugins.memfit.compose.plain import leaves
from hydra_plugins.memfit.diagnosis.logged import LoggedLaunch
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.adapter import KnowsKeys
from hydra_plugins.memfit.hardware import catalog

SAVED = "config.yaml"
"""What AReaL writes into the folder of its logs: the config as it ran, memfit's plan in it."""
_VARIABLES = ("PYTORCH_", "VERL_", "VLLM_", "SGLANG_", "CUDA_", "NCCL_")
"""Beginnings of the variables that are taken from a log: those of the launch, none that says where memfit looks something up."""
_GROUP = "hardware="


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a launch is read."""

    name: str
    own: bool = False
    """The user gave it; what is wrong in it is his to correct."""
    config: ConfigFile = field(default_factory=ConfigFile)
    pasted: Pasted = field(default_factory=lambda: Pasted(words=()))
    """What a command line in the log holds."""
    framework: str | None = None
    versions: tuple[str, ...] = ()
    """Releases that have the most of a printed config's keys, newest first; empty where no config was printed."""

    @property
    def group(self) -> str | None:
        """What the hardware group of the launch chose, ``auto`` or a name; ``None`` without one."""
        return next((word.split("=", 1)[1] for word in self.pasted.words if word.lstrip("+").startswith(_GROUP)), None)

    @property
    def was_planned(self) -> bool:
        """Whether memfit changed what the words ask for: they name a hardware group, and the config that ran is not known."""
        return self.group is not None and not self.config.values


def source_of(args: argparse.Namespace, logged: LoggedLaunch | None, log: str) -> Source | None:
    """Return the launch of the command line, else the one that the log shows, or the one saved beside it; ``None``: none."""
    words = [word for word in args.overrides if not word.lstrip("+").startswith("memfit.")]
    if args.config or words:
        given = read_config_file(args.config) if args.config else ConfigFile()
        return Source(name=f"--config {args.config}" if args.config else "the command line", own=True, config=given)
    saved = _saved(Path(log)) if logged is None or logged.framework == "areal" else None
    return saved or (None if logged is None else _shown(args, logged))


def read_source(args: argparse.Namespace, source: Source, hardware: str | None, *words: str) -> Question:
    """Return the launch on ``hardware`` (``None``: as the launch says) with more ``words``; raises `MemfitError`.

    A launch that named a hardware group keeps its pins: the name stands in the group's place.
    """
    asked = argparse.Namespace(**vars(args))
    asked.framework = args.framework or source.framework
    asked.framework_version = args.framework_version or next(iter(source.versions), None)
    asked.hardware = hardware
    shown = [_named(word, hardware) for word in source.pasted.words]
    asked.overrides = [*shown, *args.overrides, *words]
    if source.own:
        return read_launch(asked, source.config)
    asked.pasted = source.pasted
    with surroundings(source.pasted.environ):
        return read_launch(asked, source.config)


def _named(word: str, hardware: str | None) -> str:
    if hardware is None or not word.lstrip("+").startswith(_GROUP):
        return word
    return f"{word.split('=', 1)[0]}={hardware}"


def _saved(log: Path) -> Source | None:
    """Return the config beside a log, where it is one of AReaL's."""
    path = log.parent / SAVED
    if not log.is_file() or not path.is_file():
        return None
    try:
        found = read_config_file(str(path))
        framework = registry.recognise(found.values).name
    except ConfigError:  # somebody else's file
        return None
    return Source(name=f"{SAVED} beside the log", config=found, framework="areal") if framework == "areal" else None


def _shown(args: argparse.Namespace, logged: LoggedLaunch) -> Source:
    values = nested(logged.config or {})
    return Source(
        name=logged.where,
        config=ConfigFile(values=values),
        pasted=_pasted(logged),
        framework=args.framework or (None if values else logged.framework),
        versions=_likeliest_versions(values),
    )


def _pasted(logged: LoggedLaunch) -> Pasted:
    """Return the words of the launch in a log; raises `ConfigError` where they choose a config that the log does not show."""
    if not logged.command:
        return Pasted(words=logged.words)
    pasted = read_pasted([logged.command])
    if any(word.split("=")[0] == "--config" for word in pasted.words):
        raise ConfigError("it names a config file: give it by --config FILE, and the line's key=value words behind it.")
    return replace(pasted, environ={k: v for k, v in pasted.environ.items() if k.startswith(_VARIABLES)})


def _likeliest_versions(config: Mapping[str, Any]) -> tuple[str, ...]:
    if not config:
        return ()
    adapter = registry.recognise(config)
    if not isinstance(adapter, KnowsKeys):
        return ()
    counts = dict.fromkeys(adapter.versions, 0)
    for key in leaves(config):
        for version in adapter.versions_with(key):
            counts[version] = counts.get(version, 0) + 1
    return tuple(v for v in reversed(adapter.versions) if counts[v] == max(counts.values()))


def named_hardware(args: argparse.Namespace, source: Source) -> str | None:
    """Return the accelerator that the user or the launch names; ``None`` where neither does, or the launch says ``auto``."""
    if args.hardware is not None:
        return str(args.hardware)
    return source.group if source.group != catalog.AUTO else None
