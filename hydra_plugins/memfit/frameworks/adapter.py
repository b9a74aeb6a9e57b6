"""The contract between a framework and the planner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Problem


class Adapter(Protocol):
    """Reads one framework's config into a `Problem`; holds the framework's keys, and no formula."""

    name: str
    """Name for ``--framework`` and ``memfit.framework``."""
    versions: tuple[str, ...]
    """Versions whose keys and defaults are known, oldest first."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether the composed config looks like a launch of this framework."""

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return the framework's own default config, nested, interpolations unresolved, for use without the framework."""

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the resolved config; raises `ConfigError` or `NotModelled` with the key, the value and the fix."""


@runtime_checkable
class PicksVersion(Protocol):
    """An adapter that knows which of its versions stands for another one. Without it only `Adapter.versions` are valid."""

    def pick_version(self, asked: str | None) -> str:
        """Return the known version for ``asked``; ``None``: for the installed one, else the newest. Raises `ConfigError`."""


@runtime_checkable
class KnowsKeys(Protocol):
    """An adapter that knows every key of its framework, so that the console can refuse a misspelt one."""

    def versions_with(self, key: str) -> tuple[str, ...]:
        """Return the versions that have the dotted ``key``, oldest first; empty: it is no key of the framework."""


@runtime_checkable
class HasBackends(Protocol):
    """An adapter whose framework has several default configs for one version."""

    def defaults_with(self, version: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the default config that the dotted keys in ``asked`` belong to; raises `NotModelled`."""
