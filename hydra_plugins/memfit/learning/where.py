"""Where the store of learned runs is; apart from `store`, so that a launch without one loads no database."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

VARIABLE = "MEMFIT_STORE"


def store_path(environ: Mapping[str, str]) -> Path:
    """Return ``MEMFIT_STORE``, else ``$XDG_DATA_HOME/memfit/learned.sqlite3``, whether or not it exists."""
    if environ.get(VARIABLE):
        return Path(environ[VARIABLE]).expanduser()
    data = environ.get("XDG_DATA_HOME") or f"{environ.get('HOME') or '~'}/.local/share"
    return Path(data).expanduser() / "memfit" / "learned.sqlite3"
