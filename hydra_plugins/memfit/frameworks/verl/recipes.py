"""verl's entries with a rollout pool of its own: what their yaml files put on top of ppo_trainer's config.

The data is written from verl's wheels by ``python -m support.verl_defaults`` (tests/support) and never by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from hydra_plugins.memfit.frameworks.verl.defaults import DATA

FULLY_ASYNC, ONE_STEP_OFF = "fully_async", "one_step_off"
RECIPES = (FULLY_ASYNC, ONE_STEP_OFF)
"""``verl.experimental.<recipe>_policy``, each with a ``<recipe>_ppo_trainer.yaml``, the same for FSDP and Megatron."""
_MARKS = ((FULLY_ASYNC, "async_training"), (ONE_STEP_OFF, "rollout"))
"""Top-level sections that only the recipe's yaml has; the first match counts."""


def versions(recipe: str) -> tuple[str, ...]:
    """Return the releases whose wheel has the recipe's yaml, oldest first."""
    return tuple(_data()[recipe])


def additions(version: str, recipe: str) -> Mapping[str, Any]:
    """Return what the recipe's yaml of one release sets; empty where the release does not have it."""
    found: Mapping[str, Any] = _data()[recipe].get(version, {})
    return found


def recipe_of(names: Iterable[str]) -> str | None:
    """Return the recipe that top-level sections, or the name of the config, are of; ``None`` for ppo_trainer's own."""
    present = set(names)
    for recipe, section in _MARKS:
        if section in present or any(name.startswith(f"{recipe}_ppo") for name in present):
            return recipe
    return None


def with_recipe(config: dict[str, Any], version: str, recipe: str | None) -> dict[str, Any]:
    """Return ``config``, changed in place to what the recipe's yaml makes of it."""
    return config if recipe is None else _merged(config, additions(version, recipe))


def _merged(config: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in above.items():
        section = config.get(key)
        is_section = isinstance(value, Mapping) and isinstance(section, dict)
        config[key] = _merged(section, value) if is_section and section is not None else value
    return config


@cache
def _data() -> dict[str, dict[str, Any]]:
    record: dict[str, dict[str, Any]] = json.loads((DATA / "recipes.json").read_text(encoding="utf-8"))["recipes"]
    return record
