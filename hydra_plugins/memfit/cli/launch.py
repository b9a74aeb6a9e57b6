"""The launch that a command line describes; no framework needs to be installed.

What Hydra composes of a real launch is put together here from the adapter's embedded defaults, the file of ``--config``
and the ``key=value`` words, in this order. From there on it is read by the code of the hook.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.cli.config_file import ConfigFile, read_config_file
from hydra_plugins.memfit.cli.line import Line, apply, read_line
from hydra_plugins.memfit.compose.launch import Launch
from hydra_plugins.memfit.compose.overrides import Order, read_order
from hydra_plugins.memfit.compose.plain import ABSENT, leaves, plain, value_at
from hydra_plugins.memfit.compose.settings import read_settings
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.adapter import Adapter, HasBackends, KnowsKeys, PicksVersion
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.model import catalog as models
from hydra_plugins.memfit.planning.problem import Problem

_COMPOSED = 2
"""A file that holds one key in so many of the framework's was composed by Hydra, not written by hand."""

_MOST_SAID = 100
"""Characters of the keys of a file that is no config that are printed."""

_COUNTS = {
    "gpus": ("trainer.n_gpus_per_node", "cluster.n_gpus_per_node"),
    "nodes": ("trainer.nnodes", "cluster.n_nodes"),
}
"""Flag -> keys of the frameworks that say the same."""

_MODEL_HINT = (
    "--model takes these names and their hub ids. Any other checkpoint, a hub id or a directory, is the model path of the "
    "launch itself: actor_rollout_ref.model.path=PATH in verl, actor.path=PATH in AReaL."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a command line asks for, read and ready to be judged."""

    problem: Problem
    pinned: frozenset[str]
    absent: frozenset[str]
    """Keys of knobs that the framework's yaml does not have: on its command line they need ``++``."""
    config: Mapping[str, Any]
    """The composed config, plain."""


def read_launch(args: argparse.Namespace, given: ConfigFile | None = None) -> Question:
    """Return what the options of `add_launch_options` ask; raises `MemfitError` for what is wrong in them.

    ``given`` stands in for the file of ``--config``.
    """
    line = read_line(args.overrides)
    file = given or (read_config_file(args.config) if args.config else ConfigFile())
    node = _memfit_node(file, line, args)
    settings = read_settings(node)
    adapter = _adapter(settings.framework, file.values, line)
    asked = settings.framework_version
    version = _version(adapter, asked)
    node |= {"framework": adapter.name, "framework_version": version}
    contradicted = _counts(args, line, file)
    unread = _unread(adapter, version, file, is_strict=settings.strict)
    config = _composed(adapter, version, file.values, line, args.pasted.config_name)
    order = _order(args.overrides, config, file, line)
    launch = Launch(config=config, node=node, order=order, gpus_per_node=args.gpus, nodes=args.nodes)
    problem, pinned = launch.problem()
    stand_in = f"{adapter.name} {asked} is read with the keys and defaults of {version}."
    said = (*([stand_in] if asked not in (None, version) else []), *unread, *contradicted, *_left_out(args))
    assumed = registry.assumes_version(adapter.name, asked)
    problem = replace(problem, warnings=(*problem.warnings, *said), version_assumed=assumed)
    absent = frozenset(knob.key for knob in problem.knobs if value_at(config, knob.key) is ABSENT)
    return Question(problem=problem, pinned=pinned, absent=absent, config=config)


def _left_out(args: argparse.Namespace) -> tuple[str, ...]:
    left = args.pasted.left_out
    return (f"not read in the pasted line: {'; '.join(left)}.",) if left else ()


def _counts(args: argparse.Namespace, line: Line, file: ConfigFile) -> tuple[str, ...]:
    """Refuse a flag that contradicts a word of the launch; return what to say where it wins over the file."""
    said = []
    for flag, keys in _COUNTS.items():
        asked = getattr(args, flag)
        words = {o.key_or_group: o.value() for o in line.values if o.key_or_group in keys and not o.is_delete()}
        for key, value in words.items():
            if asked is not None and value != asked:
                raise ConfigError(f"--{flag} {asked} and {key}={value} contradict each other. Keep one of them.")
        for key in keys:
            value = value_at(file.values, key)
            if asked is not None and value is not ABSENT and value != asked and key not in words:
                said.append(f"--{flag} {asked} wins over {key}: {value} (in --config).")
    return tuple(said)


def _memfit_node(file: ConfigFile, line: Line, args: argparse.Namespace) -> dict[str, Any]:
    """Return the ``memfit`` node: the file's section, then the ``memfit.*`` words, then the flags."""
    given = file.settings
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"the section memfit of --config is {given!r}; it must hold settings, such as margin: 0.05.")
    root = OmegaConf.create({"memfit": dict(given or {})})
    apply(root, line.settings)
    node = plain(root)["memfit"]
    if not isinstance(node, dict):
        raise ConfigError(f"memfit={node!r} is no setting; settings are memfit.KEY=VALUE, such as memfit.margin=0.05.")
    flags = {"framework": args.framework, "framework_version": args.framework_version}
    node.update({key: value for key, value in flags.items() if value is not None})
    for group, flag in (("hardware", args.hardware), ("model", args.model)):
        chosen = line.groups.get(group)
        if flag and chosen and flag != chosen:
            raise ConfigError(f"--{group} {flag} and {group}={chosen} contradict each other. Keep one of them.")
        default = file.hardware if group == "hardware" else None
        node[group] = _facts(group, flag or chosen or default, node.get(group))
    return node


def _facts(group: str, name: str | None, own: Any) -> Any:
    """Return the node of a group: the facts of the file ``name`` below what the user gave himself."""
    if own is not None and not isinstance(own, Mapping):
        raise ConfigError(f"memfit.{group} is {own!r}; it must hold facts. To choose a file: --{group} {own}")
    own = dict(own or {})
    if group == "hardware" and not own.get("name"):
        name = name or "auto"
    if name is None:
        return own or None
    if name == "auto" and group == "hardware":
        return {"name": "auto", **own}
    return {**_file(group, name), **own}


def _file(group: str, name: str) -> dict[str, Any]:
    """Return the facts in ``conf/<group>/<name>.yaml``; a model also by hub id. Raises `UnknownName`."""
    if group == "hardware":
        return catalog.node(name)
    file = conf_dir() / group / f"{models.find(name) or models.find_basename(name) or ''}.yaml"
    if not file.is_file():
        raise UnknownName(group, name, models.names(), _MODEL_HINT)
    content = plain(DictConfig(OmegaConf.load(file)))
    facts = value_at(content, f"memfit.{group}")
    return dict(content if facts is ABSENT else facts)


def _adapter(name: str | None, own: Mapping[str, Any], line: Line) -> Adapter:
    """Return the framework that is named, else the one whose keys these are; raises `ConfigError`."""
    if name is not None:
        return registry.adapter(name)
    asked = OmegaConf.create(dict(own))
    apply(asked, [override for override in line.values if not override.is_delete()])
    content = plain(asked)
    try:
        return registry.recognise(content)
    except ConfigError as error:  # a few words hold less than a composed config: whose sections are they?
        owners = [a for a in map(registry.adapter, registry.names()) if _has_sections(a, content)]
        if len(owners) == 1:
            return owners[0]
        raise ConfigError(f"{error} On the console: --framework NAME.") from None


def _has_sections(adapter: Adapter, content: Mapping[str, Any]) -> bool:
    return bool(content) and set(content) <= set(adapter.defaults(adapter.versions[-1]))


def _version(adapter: Adapter, asked: str | None) -> str:
    """Return the version whose defaults count: the one that is asked for, or the one that stands for it."""
    if isinstance(adapter, PicksVersion):
        return adapter.pick_version(asked)
    if asked is not None and asked not in adapter.versions:
        raise UnknownName(f"{adapter.name} version", asked, adapter.versions)
    return asked or adapter.versions[-1]


def _composed(
    adapter: Adapter, version: str, own: Mapping[str, Any], line: Line, config_name: str | None
) -> dict[str, Any]:
    base = OmegaConf.create(dict(_defaults(adapter, version, own, line, config_name)))
    try:
        config = OmegaConf.merge(base, OmegaConf.create(dict(own)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"--config cannot be merged into the defaults of {adapter.name}: {error}") from None
    assert isinstance(config, DictConfig)
    apply(config, line.values, _refusal(adapter, version))
    return plain(config)


def _defaults(
    adapter: Adapter, version: str, own: Mapping[str, Any], line: Line, config_name: str | None
) -> Mapping[str, Any]:
    """Return the framework's defaults; where it has several, those that the user's keys, or the config's name, mean."""
    if not isinstance(adapter, HasBackends):
        return adapter.defaults(version)
    words = {override.key_or_group: override.value() for override in line.values if not override.is_delete()}
    name = config_name or ""
    named = dict.fromkeys((name, *name.split("_")))  # ppo_megatron_trainer: what is between the lines is the backend
    return adapter.defaults_with(version, {**named, **{key: value_at(own, key) for key in leaves(own) if key}, **words})


def _refusal(adapter: Adapter, version: str) -> Callable[[str], str] | None:
    """Return what says why the framework lacks a key; ``None`` where the adapter cannot tell."""
    if not isinstance(adapter, KnowsKeys):
        return None

    def refusal(key: str) -> str:
        versions = adapter.versions_with(key)
        if version in versions:
            return ""
        known = [name for name in versions if name in adapter.versions]
        others = f" It is a key of {adapter.name} {', '.join(known)}." if known else ""
        return f"{adapter.name} {version} has no key {key}.{others}"

    return refusal


def _unread(adapter: Adapter, version: str, file: ConfigFile, *, is_strict: bool) -> tuple[str, ...]:
    """Refuse a key of the file that the framework does not have, as on the command line.

    A composed config may hold keys that a recipe added with ``+``, and no longer tells which: there it is a warning.
    """
    refusal = _refusal(adapter, version)
    found = [key for key in leaves(file.values) if key and key not in file.added]
    unknown = [key for key in found if refusal is not None and refusal(key)] if file.values else []
    if not unknown or refusal is None:
        return ()
    known = list(leaves(adapter.defaults(version)))
    is_composed = len(known) > 1 and len(known) <= _COMPOSED * len(set(known) & set(found))
    if is_strict and not is_composed:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.8)
        if not near and not set(file.values) & set(adapter.defaults(version)):
            named = shorten(", ".join(sorted(file.values)), _MOST_SAID, placeholder=" ...")
            raise ConfigError(
                f"--config: none of its keys is one of {adapter.name} {version}: it is no config of a launch ({named})."
            )
        guess = f" Did you mean {near[0]}?" if near else ""
        others = f" Nor {', '.join(unknown[1:5])}." if unknown[1:] else ""
        raise ConfigError(
            f"--config: {refusal(unknown[0])}{guess}{others} To add it all the same: +{unknown[0]}; memfit.strict=false "
            "goes on without it."
        )
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return (f"{adapter.name} {version} has no key {', '.join(unknown[:5])}{more} (in --config).",)


def _order(words: list[str], config: Mapping[str, Any], file: ConfigFile, line: Line) -> Order:
    """Return what the user wrote himself; only a hardware group pins: what stands behind it, or every word of the line."""
    order = read_order(words, config)
    explicit = order.explicit | frozenset(leaves(file.values) if file.values else ())
    pinned = order.pinned if "hardware" in line.groups or file.hardware else frozenset()
    return Order(explicit=explicit, pinned=pinned, settings=order.settings)
