"""From residuals to a margin, and from a death to a limit."""

from __future__ import annotations

import math

import pytest

from hydra_plugins.memfit.learning.residuals import CEILING, FLOOR, limit_of, margin_of
from support.learning_rule import PAGE, RESIDUALS, replaced, simulate


@pytest.mark.parametrize(
    ("ratios", "margin"),
    [
        ([], 0.05),
        ([1.0], 0.05),
        ([1.02], 0.069),
        ([1.1], 0.137),
        ([0.8], 0.05),
        ([0.8, 0.8], 0.05),
        ([1.0, 1.0], 0.05),
        ([1.0, 1.0, 1.0], 0.029),
        ([1.0] * 30, FLOOR),
        ([0.8, 0.8, 0.8], 0.029),
        ([0.85, 0.95, 0.9] * 3, 0.05),
        ([1.1] * 30, 0.1),
        ([1.0] * 29 + [1.2], 0.167),
        ([3.0], CEILING),
    ],
)
def test_a_margin_follows_from_residuals(ratios: list[float], margin: float) -> None:
    """One run moves the centre, more replace the default margin by their spread, few never lower it."""
    assert margin_of(ratios, 0.05) == pytest.approx(margin, abs=0.0011)


@pytest.mark.parametrize("default", [0.02, 0.05, 0.1, 0.2])
def test_a_run_that_needed_its_prediction_confirms_the_default(default: float) -> None:
    """The default margin, whatever it is, is what one perfect run leaves."""
    assert margin_of([1.0], default) == pytest.approx(default, abs=0.0011)


def test_a_margin_never_undercuts_what_was_seen() -> None:
    """The largest residual of any run stays within the margin, up to the ceiling."""
    for ratios in ([0.9, 1.3, 1.0], [1.01] * 50, [1.0] * 99 + [1.4]):
        assert max(ratios) * (1 - margin_of(ratios, 0.05)) <= 1


@pytest.mark.parametrize(
    ("predicted", "needed", "capacity", "now", "limit"),
    [
        (70, 0, 80, 80, 69),
        (70, 88, 80, 80, 62),
        (70, 88, 80, 160, 125),
        (100, 90, 80, 80, 88),
    ],
)
def test_a_death_limits_what_may_be_predicted(predicted: int, needed: int, capacity: int, now: int, limit: int) -> None:
    """The same plan is never made again on the same device; on a larger one the error is taken in proportion."""
    assert limit_of(predicted=predicted, needed=needed, capacity=capacity, now=now) == limit


def test_the_page_shows_what_the_simulation_prints() -> None:
    """docs/learning.md has the table of the rule as it is, and normal residuals stay near one in a hundred."""
    text = PAGE.read_text(encoding="utf-8")
    assert replaced(text) == text
    above, margin = simulate(RESIDUALS["normal, formulas right, spread 2 %"], 10)
    assert above < 0.02 and math.isclose(margin, 0.049, abs_tol=0.005)
