"""Where facts (``conf/``) and formulas (``docs/``) lie: in the package of a wheel, at the top of the tree in a checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def conf_dir() -> Path:
    """Return the directory that holds ``hardware/``, ``model/`` and ``memfit/``."""
    return _folder("conf")


@cache
def docs_dir() -> Path:
    """Return the directory that holds the pages with the formulas, ``memory-model.md`` among them."""
    return _folder("docs")


def _folder(name: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parents[1] / name
