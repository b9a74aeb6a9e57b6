"""memfit's trainer formulas against the stored op-level traces (tests/data/traces.json)."""

from __future__ import annotations

import pytest

from support.trainer_validation import comparisons, summary

BOUNDS = {"median": 0.01, "p95": 0.04, "worst": 0.08}


@pytest.mark.parametrize("split", ["fit", "held_out"])
def test_the_formulas_agree_with_the_traces(split: str):
    """Median error at most 1 %, 95th percentile 4 %, worst 8 %, and never more than 2 % too low, in either half."""
    found = summary(list(comparisons(split)))

    assert found["phases"] > 50
    for figure, bound in BOUNDS.items():
        assert found[figure] <= bound, (figure, found)
    assert found["lowest"] >= -0.02
