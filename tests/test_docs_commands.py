"""README and docs show what the commands print, and name only what exists."""

from __future__ import annotations

import re

import pytest

from support.documented import PAGES, ROOT, Block, blocks, run

BLOCKS = [
    pytest.param(block, marks=() if page == "README.md" else pytest.mark.slow, id=f"{page}:{block.line}")
    for page in PAGES
    for block in blocks(page)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_documented_commands_print_what_is_shown(block: Block) -> None:
    """Each console block is what its commands print today, and the exit status is the one that is said."""
    assert block.commands, "a console block without a command"
    assert run(block) == (block.body, block.exit_status)


def test_readme_is_short_and_shows_the_main_job() -> None:
    """The README has at most 100 lines and runs `memfit plan` on verl."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
    assert any("memfit plan --framework verl" in command for block in blocks("README.md") for command in block.commands)


def test_named_make_targets_exist() -> None:
    """A page that says `make x` is right about it."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"^make ([\w-]+)", (ROOT / page).read_text(), re.MULTILINE)}
    assert named and named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    """Relative links, and files of the repository that a page names, exist."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [(ROOT / page).parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    paths = [ROOT / path for path in re.findall(r"`((?:conf|docs|tests|hydra_plugins)/[\w./-]+)`", text)]
    assert [str(path) for path in (*links, *paths) if not path.exists() and path.stem != "NAME"] == []


def test_every_page_is_in_the_index() -> None:
    """A page that the index does not name is a page that nobody finds."""
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md") if path.name != "index.md"]
    assert [str(page) for page in pages if f"]({page})" not in index] == []
