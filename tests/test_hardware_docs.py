"""docs/hardware.md: its table is the files'."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.hardware import catalog, table

PAGE = Path(__file__).parents[1] / "docs" / "hardware.md"


def test_the_table_in_the_documentation_is_current() -> None:
    """Whoever changes a file writes the table again."""
    text = PAGE.read_text(encoding="utf-8")
    assert table.replaced(text) == text, "run: python -m hydra_plugins.memfit.hardware.table --write docs/hardware.md"


def test_every_file_has_its_row() -> None:
    """One row a file, with its unit, and the assumed ones marked."""
    rows = table.markdown().splitlines()[2:]
    assert len(rows) == len(catalog.names())
    assert "| `h200` | NVIDIA H200 | 139.70 GiB | 4.8 | 989 | observed |" in rows
    assert next(row for row in rows if row.startswith("| `gb200`")).endswith("assumed |")


def test_the_command_of_the_page_works(tmp_path: Path) -> None:
    """The documented command writes the table between the markers and leaves the rest alone."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    command = [sys.executable, "-m", "hydra_plugins.memfit.hardware.table", "--write", str(page)]
    subprocess.run(command, check=True, timeout=60, cwd=PAGE.parents[1])
    assert page.read_text() == f"before\n{table.BEGIN}\n{table.markdown()}\n{table.END}\nafter\n"


def test_a_page_without_markers_is_refused() -> None:
    """A page that has no place for the table is not overwritten."""
    with pytest.raises(ConfigError, match="no pair of lines"):
        table.replaced("nothing here")
