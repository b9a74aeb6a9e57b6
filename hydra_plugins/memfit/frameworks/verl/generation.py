"""verl's own generation entries: rollout engines without a trainer's step.

``main_generation`` (up to 0.6.1, its own generation.yaml) builds FSDP workers with the role ``rollout``: they load the model
themselves and start an engine in the same process. Up to 0.5 the engine is put to sleep and gets the worker's weights for each
batch; in 0.6 it loads its own and stays awake. ``main_generation_server`` (0.6.1 and later) reads ppo_trainer's config and
starts stand-alone servers only, so nothing in its config tells it from training: ``memfit.framework=verl-generation`` does.
File and line of each fact: docs/verl.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra_plugins.memfit.frameworks.verl import defaults, keys
from hydra_plugins.memfit.frameworks.verl.generation_knobs import WRITABLE_KEYS, blockers, fixes, knobs
from hydra_plugins.memfit.frameworks.verl.generation_read import (
    PPO_SECTION,
    SERVER_VERSIONS,
    YAML_VERSIONS,
    read_launch,
    read_run,
)
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Problem, remembered
from hydra_plugins.memfit.planning.serving import estimate

__all__ = ["NAME", "SERVER_VERSIONS", "WRITABLE_KEYS", "YAML_VERSIONS", "VerlGenerationAdapter", "load"]

NAME = "verl-generation"


def load(version: str) -> dict[str, Any]:
    """Return generation.yaml of one release in `YAML_VERSIONS`, nested, a fresh copy."""
    text = (defaults.DATA / "generation.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)["versions"][version]
    return config


@dataclass(frozen=True)
class VerlGenerationAdapter(defaults.Releases):
    """Reads verl's ``main_generation`` and, when it is named, ``main_generation_server``."""

    name: str = NAME

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether the config has the sections of generation.yaml; a server's config is one of training, and is not."""
        sections = [config.get(name) for name in ("rollout", "model", "data", "trainer")]
        return (
            PPO_SECTION not in config
            and all(isinstance(s, Mapping) for s in sections)
            and "n_samples" in config["data"]
        )

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return generation.yaml of that release; empty from 0.7 on, which has none (see `defaults_with`)."""
        version = defaults.pick_version(version)
        return load(version) if version in YAML_VERSIONS else {}

    def defaults_with(self, version: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return generation.yaml, or ppo_trainer's config for keys below ``actor_rollout_ref`` and for 0.7 and later."""
        version = defaults.pick_version(version)
        is_server = version not in YAML_VERSIONS or any(key.split(".")[0] == PPO_SECTION for key in asked)
        return defaults.load(version) if is_server else load(version)

    def versions_with(self, key: str) -> tuple[str, ...]:
        """Return the releases in which one of the two entries has ``key``."""
        return tuple(v for v in self.versions if _knows(v, key))

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the resolved config of one launch; raises `ConfigError` and `NotModelled`."""
        launch = read_launch(View(config), context)
        needed = fixes(launch, context.pinned)
        launch = launch.turned({change.key: change.new for change in needed})
        return Problem(
            framework=self.name,
            framework_version=launch.version,
            hardware=context.hardware,
            model=launch.model,
            gpus_per_node=launch.gpus_per_node,
            nodes=launch.nodes,
            settings=context.settings,
            margin=context.margin,
            knobs=tuple(knobs(launch)),
            estimate=remembered(lambda values: estimate(read_run(launch.turned(values)))),
            composed=launch.view.requested,
            fixes=needed,
            warnings=tuple(context.hardware.warnings),
            composed_once=True,
            blockers=blockers(launch),
        )


@cache
def _yaml_view(version: str) -> View:
    return View(load(version))


def _knows(version: str, key: str) -> bool:
    if key.split(".")[0] in (
        "rollout",
        "model",
        "actor",
    ):  # sections of training, without what generation.yaml leaves out
        return version in YAML_VERSIONS and (
            _yaml_view(version).has(key) or keys.known(version, f"{PPO_SECTION}.{key}")
        )
    is_own = version in YAML_VERSIONS and _yaml_view(version).has(key)
    return is_own or (version in SERVER_VERSIONS and keys.known(version, key))
