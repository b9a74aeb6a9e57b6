"""No prediction moves unnoticed: named launches are pinned, and the changelog says what moved."""

from __future__ import annotations

from support import estimates


def test_the_pinned_predictions_are_todays() -> None:
    """A formula or fact that moves a figure fails here until `python -m support.estimates` has stored the new one."""
    assert estimates.stored()["now"] == estimates.predict()


def test_the_changelog_names_what_moved() -> None:
    """Every launch that differs from the last release has its line, before -> after, under Unreleased, Estimates."""
    section = estimates.unreleased_estimates()

    missing = [line for line in estimates.moved(**estimates.stored()).values() if line not in section]
    assert not missing, "add to CHANGELOG.md, Unreleased, Estimates:\n" + "\n".join(missing)


def test_a_move_is_told_in_gib_by_phase() -> None:
    """Before and after stand on one line with the launch; what stayed is not listed."""
    before = {"run": {"update_actor": 10 * 2**30, "rollout": 2**30}, "gone": {"rollout": 1}}
    after = {"run": {"update_actor": 11 * 2**30, "rollout": 2**30}, "new": {"rollout": 1}}

    assert estimates.moved(before, after) == {"run": "- `run`: update_actor 10.00 GiB -> 11.00 GiB"}
