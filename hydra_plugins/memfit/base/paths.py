"""Where the facts (``conf/``) lie: beside the package in a wheel, at the top of the tree in a checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def conf_dir() -> Path:
    """Return the directory that holds ``hardware/``, ``model/`` and ``memfit/``."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parents[1] / "conf"
