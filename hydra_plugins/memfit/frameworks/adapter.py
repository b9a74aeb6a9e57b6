"""The contract between a framework and the planner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

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
