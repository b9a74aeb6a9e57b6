"""What is claimed about accuracy: the pages are what their data give, and the figures are within their bounds."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from support import peers, peers_validation, published_validation, validate


@pytest.mark.parametrize("page", validate.PAGES, ids=lambda page: page.path)
def test_a_page_is_what_its_data_give(page: validate.Page) -> None:
    """`python -m support.validate --write` would change nothing."""
    assert page.current() == page.text()


def test_every_figure_is_within_its_bound() -> None:
    """No claim of `make validate` is broken, and each kind of prediction has claims."""
    figures = list(validate.figures())

    assert [str(figure) for figure in figures if not figure.holds] == []
    kinds = {"trainer", "Megatron", "replayed", "generation", "published", "TPU", "public"}
    assert {figure.claim.split()[0] for figure in figures} == kinds


def test_a_broken_bound_is_said() -> None:
    """A figure above its bound is marked, with both numbers."""
    figure = validate.Figure(claim="median error", value=0.011, bound=0.01)

    assert (figure.holds, str(figure)) == (False, "FAILED median error: 1.10% (at most 1.00%)")


def test_a_published_number_has_an_address_and_a_large_error_its_reason() -> None:
    """Each has a source; what is not known of an incomplete one is said; an error of more than 10 % is explained."""
    found = published_validation.measurements()

    assert [m.row for m in found if not m.group["source"].startswith("https://")] == []
    assert [m.row for m in found if not m.complete and not m.group.get("unknown")] == []
    assert [m.row for m in found if abs(m.error) > published_validation.LARGE and not m.why] == []


def test_memfit_has_no_better_answers_in_the_race_than_today() -> None:
    """What docs/validation/peers.md shows for memfit is what it predicts now."""
    assert peers_validation.stale() == []


@pytest.mark.parametrize("name", ["accelerate", "DeepSpeed ZeRO-3", "Megatron formula"])
@pytest.mark.peers
def test_an_estimator_still_answers_what_is_stored(name: str) -> None:
    """Asked again, with the stored version of its package, it gives the stored bytes."""
    (peer,) = (peer for peer in peers.PEERS if peer.name == name)
    rows = [row for row in peers.stored() if row["peer"] == name]
    if peer.package and version(peer.package) != rows[0]["version"]:
        pytest.skip(f"{peer.package} {version(peer.package)} is not the stored {rows[0]['version']}")

    assert {json.dumps(r["case"]): peer.estimate(r["case"]) for r in rows} == {
        json.dumps(r["case"]): r["bytes"] for r in rows
    }
