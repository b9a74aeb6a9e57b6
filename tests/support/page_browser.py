"""Pages of `memfit explain` in a real Chromium, and the picture of one in docs/explain.md.

``python -m support.page_browser`` (with ``tests`` on the path) writes the picture. Needs memfit[explain], playwright and
Chromium from the distribution: nothing is downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.documented import blocks
from support.hydra_app import ROOT

PICTURE = ROOT / "docs" / "explain.png"
_HEIGHT = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class Tab:
    """One page that is open, and what the browser said about it."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    """Warnings and errors of the console, exceptions, dialogs."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, but the file itself."""


def chromium() -> str:
    """Return the installed browser; raises `FileNotFoundError` with the way to get one."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        raise FileNotFoundError("no Chromium: apt-get install chromium")
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a running Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


def open_page(
    running: Any, file: Path, *, width: int = 1280, scheme: str = "light", drawn: bool = True, **options: Any
) -> Tab:
    """Return ``file`` in a fresh tab, once its chart is drawn; ``options`` are playwright's for a page."""
    page = running.new_page(viewport={"width": width, "height": _HEIGHT}, color_scheme=scheme, **options)
    tab = Tab(page=page)
    page.on("console", lambda said: tab.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: tab.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (tab.complaints.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda asked: tab.requests.append(asked.url) if asked.url != file.as_uri() else None)
    page.goto(file.as_uri())
    if drawn:
        page.wait_for_selector("html[data-drawn]", timeout=60_000)
    return tab


def explain(folder: Path, *words: str) -> Path:
    """Return the page that `memfit explain` writes to ``folder`` for a command line; its exit status is 0 or 3."""
    file = folder / "memfit.html"
    command = [sys.executable, "-m", "hydra_plugins.memfit.cli.main", "explain", *words, "-o", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode not in (0, 3):
        raise RuntimeError(done.stderr)
    return file


def documented_words() -> list[str]:
    """Return the command line that docs/explain.md shows, without the program and where it writes."""
    import shlex

    (block,) = blocks("docs/explain.md", kind="shell")
    words = shlex.split(block.commands[0].replace("\\\n", " "))
    return [word for word in words[2:] if word not in ("-o", "memfit.html")]


def main() -> None:
    """Write the picture: the first screen of the page, in few colours."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder, browser() as running:
        tab = open_page(running, explain(Path(folder), *documented_words()))
        shot = Path(folder) / "shot.png"
        tab.page.screenshot(path=str(shot), clip={"x": 0, "y": 0, "width": 1280, "height": 1180}, full_page=True)
        with Image.open(shot) as image:
            image.convert("RGB").resize((960, 885), Image.Resampling.LANCZOS).quantize(160).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
