"""What the page on Hydra says about versions and variables is what the code and the tests have."""

from __future__ import annotations

import pytest

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.compose import handover, hook
from support.hydra_app import HYDRA, ROOT

PAGE = (ROOT / "docs" / "hydra.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", list(HYDRA))
def test_the_page_names_the_tested_versions(version: str) -> None:
    """Each version of the matrix is named, and the refusal of an unplanned config names the first and the last."""
    assert version in PAGE

    first, *_, last = HYDRA
    with pytest.raises(MemfitError, match=f"{first} to {last}"):
        hook.refuse_unplanned()


@pytest.mark.parametrize("variable", [handover.VARIABLE, hook.REPORTED, "MEMFIT_PLAN", "MEMFIT_HARDWARE"])
def test_the_page_names_the_variables(variable: str) -> None:
    """Every environment variable that the hook reads or sets has its line."""
    assert f"| `{variable}` |" in PAGE
