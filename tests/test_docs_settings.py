"""The page of all settings says what the code reads."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from hydra_plugins.memfit.base.settings import Settings
from support.documented import ROOT
from support.settings_page import PAGE, table, written

VARIABLE = re.compile(r"MEMFIT_[A-Z_]+[A-Z]")


def test_the_table_of_settings_is_that_of_the_yaml() -> None:
    """Keys, defaults and meanings on the page are those that every hardware group composes."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "PYTHONPATH=tests:. python -m support.settings_page writes it"


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_has_a_row_that_says_something(name: str) -> None:
    """No setting is left out, and none stands there without a sentence."""
    rows = [row for row in table().splitlines() if re.match(rf"\| `memfit\.{name}[.`]", row)]
    assert len(rows) == 1
    assert re.search(r"\| `[^|]+` \| `[^|]+` \| [A-Zft][^|]{20,} \|$", rows[0])


def test_every_environment_variable_is_on_a_page() -> None:
    """What memfit reads from the environment is on the page of settings, or among Hydra's if memfit sets it itself."""
    code = (path.read_text(encoding="utf-8") for path in (ROOT / "hydra_plugins").rglob("*.py"))
    read = {name for text in code for name in VARIABLE.findall(text)}
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("docs/settings.md", "docs/hydra.md"))
    assert read and read <= set(VARIABLE.findall(pages))
