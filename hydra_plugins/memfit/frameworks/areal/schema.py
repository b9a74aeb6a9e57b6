"""Which keys each AReaL release has, with their defaults: what tells a misspelt key from one of another release.

The data is written from AReaL's own ``api/cli_args.py`` by ``python tests/support/areal_schema.py`` and never by hand.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.frameworks.areal.versions import ANY, VERSIONS

DATA = Path(__file__).with_name("data")
ALIASES = frozenset({"gradient_checkpointing"})
"""Keys of no release that memfit reads all the same, with a warning: the trainer's setting without its section."""


@cache
def keys(version: str) -> dict[str, Any]:
    """Return dotted key -> default of one of `VERSIONS`; ``None`` where there is none or it is computed."""
    found: dict[str, Any] = json.loads((DATA / f"{version}.json").read_text(encoding="utf-8"))
    return found


@cache
def _branches(version: str) -> frozenset[str]:
    """Keys that are sections with known fields."""
    return frozenset(key.rpartition(".")[0] for key in keys(version))


def known(version: str, key: str) -> bool:
    """Whether the release has ``key``, as a field or inside a field that takes anything (a list, a free mapping)."""
    if version == ANY:
        return any(known(one, key) for one in VERSIONS)
    fields, sections = keys(version), _branches(version)
    if key in fields or key in ALIASES:
        return True
    parts = key.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    return any(prefix in fields and prefix not in sections for prefix in above)


def versions_with(key: str) -> tuple[str, ...]:
    """Return the releases that have ``key``, oldest first; with `ANY` where there is one."""
    found = tuple(version for version in VERSIONS if known(version, key))
    return (*found, ANY) if found else ()
