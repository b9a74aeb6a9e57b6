"""The page of ``memfit.report=html``: kept for the user at once, and copied beside the record of each job that starts.

Composition knows no output directory (``compose()`` never has one, ``--cfg job`` starts nothing), and a job may start in
another process than the one that planned it. So the page is written to memfit's cache when the plan is made, its path
travels in the ``hydra`` node, and the job copies it to ``.hydra/memfit.html``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, flag_override

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.base.files import cache_dir
from hydra_plugins.memfit.planning.problem import Plan

NODE = "memfit_page"
FILE = "memfit.html"
_MOST_PAGES = 20
"""Pages in the cache, newest last; each has about 2 MB."""


def make_page(plan: Plan, name: str, environ: Mapping[str, str], *, refusal: str = "") -> bool:
    """Write the page on ``plan`` and say where it is; ``False``, with the reason on stderr, where that cannot be done."""
    from hydra_plugins.memfit.report.html import write_page

    path = _path(name, environ)
    try:
        write_page(plan, path, refusal=refusal)
    except MemfitError as error:
        _say(f"no page: {error}")
        return False
    _say(f"the page: {path}")
    _forget_oldest(path.parent)
    return True


def keep_page(config: DictConfig, name: str, environ: Mapping[str, str]) -> None:
    """Put the path of the page ``name``, where there is one, into the ``hydra`` node, for the job that starts."""
    path = _path(name, environ)
    if os.path.isfile(path):  # unlike Path's, false also for a path that no system can have
        with flag_override(config.hydra, ["struct", "readonly"], [False, False]):
            config.hydra[NODE] = str(path)


def copy_page(config: DictConfig, folder: Path) -> None:
    """Copy the page of the job that ``config`` starts, if it has one, beside its record."""
    page = config.hydra.get(NODE)
    if page is None:
        return
    try:
        shutil.copyfile(page, folder / FILE)
    except OSError as error:  # the job runs on a host that does not see the cache: the page is no reason to stop it
        _say(f"the page was not copied: {error.strerror}: {error.filename}")
    else:
        _say(f"the page of this job: {folder / FILE}")


def _path(name: str, environ: Mapping[str, str]) -> Path:
    return cache_dir(environ) / "pages" / f"{name}.html"


def _forget_oldest(folder: Path) -> None:
    with contextlib.suppress(OSError):
        pages = sorted(folder.glob("*.html"), key=lambda page: page.stat().st_mtime)
        for page in pages[:-_MOST_PAGES]:
            os.remove(page)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads stderr
        print(f"memfit: {text}", file=sys.stderr)
