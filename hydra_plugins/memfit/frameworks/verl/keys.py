"""Which keys verl has: what tells a misspelt key, or one of another version, from one that memfit does not need."""

from __future__ import annotations

from functools import cache

from hydra_plugins.memfit.frameworks.verl import defaults, recipes
from hydra_plugins.memfit.frameworks.view import View

_WITHOUT_BYTES = frozenset({"profiler", "checkpoint", "qat", "prometheus", "trace", "custom_async_server", "_target_"})
"""Names of subtrees that the embedded defaults leave out wherever they stand."""
_OTHER_SECTIONS = frozenset({"custom_reward_function", "sandbox_fusion", "transfer_queue", "global_profiler", "skip"})
"""Top-level sections of verl 0.4.1 to 0.9.1 that the embedded defaults leave out."""


def known(version: str, key: str) -> bool:
    """Whether verl ``version`` (one of `defaults.VERSIONS`) has ``key``, in a yaml or in a dataclass only."""
    parts = key.split(".")
    if parts[0] in _OTHER_SECTIONS or not _WITHOUT_BYTES.isdisjoint(parts):
        return True
    return any(view.has(key) or key in fields for view, fields in _configs(version)) or any(
        View(recipes.additions(version, recipe)).has(key) for recipe in recipes.RECIPES
    )


def versions_with(key: str) -> tuple[str, ...]:
    """Return the versions that have ``key``, oldest first."""
    return tuple(version for version in defaults.VERSIONS if known(version, key))


@cache
def _configs(version: str) -> tuple[tuple[View, frozenset[str]], ...]:
    """Return yaml and dataclass fields of each training backend."""
    return tuple(
        (View(defaults.load(version, trainer=trainer)), frozenset(defaults.dataclass_only(version, trainer=trainer)))
        for trainer in defaults.TRAINERS
    )
