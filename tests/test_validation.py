"""What is claimed about accuracy: the pages are what their data give, and the figures are within their bounds."""

from __future__ import annotations

import pytest

from support import validate


@pytest.mark.parametrize("page", validate.PAGES, ids=lambda page: page.path)
def test_a_page_is_what_its_data_give(page: validate.Page) -> None:
    """`python -m support.validate --write` would change nothing."""
    assert page.current() == page.text()


def test_every_figure_is_within_its_bound() -> None:
    """No claim of `make validate` is broken, and each kind of prediction has claims."""
    figures = list(validate.figures())

    assert [str(figure) for figure in figures if not figure.holds] == []
    assert {figure.claim.split()[0] for figure in figures} == {"trainer", "generation", "TPU", "public"}


def test_a_broken_bound_is_said() -> None:
    """A figure above its bound is marked, with both numbers."""
    figure = validate.Figure(claim="median error", value=0.011, bound=0.01)

    assert (figure.holds, str(figure)) == (False, "FAILED median error: 1.10% (at most 1.00%)")
