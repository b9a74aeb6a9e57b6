"""Overrides to paste: the same value comes back, through a shell and Hydra's grammar."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from hydra_plugins.memfit.cli.config_file import nested
from hydra_plugins.memfit.report.overrides import override, overrides
from support.plans import MICRO_BATCH, OFFLOAD

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12).filter(lambda text: "${" not in text)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT)
KEYS = st.text("abc_", min_size=1, max_size=3)


@given(VALUES)
def test_any_value_reads_back(value: Any) -> None:
    """A pasted override gives the same value with the same type."""
    (word,) = shlex.split(override("a.b", value))
    parsed = OverridesParser.create().parse_override(word)
    assert (type(parsed.value()), parsed.value()) == (type(value), value)


def test_keys_that_the_yaml_lacks_are_added() -> None:
    """A key that stands in no yaml needs Hydra's `++`."""
    assert overrides((MICRO_BATCH, OFFLOAD), absent=frozenset({OFFLOAD.key})) == [
        f"{MICRO_BATCH.key}=4",
        f"++{OFFLOAD.key}=true",
    ]


@pytest.mark.parametrize("separator", [".", None], ids=["dotted", "nested"])
@given(tree=st.recursive(st.integers(), lambda child: st.dictionaries(KEYS, child, min_size=1), max_leaves=8))
def test_dotted_and_nested_configs_are_the_same(tree: Any, separator: str | None) -> None:
    """Whatever the tree, its dotted form unfolds to it, and a nested one is left as it is."""
    if isinstance(tree, dict):
        assert nested(dict(_flat(tree)) if separator else tree) == tree


def _flat(tree: dict[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
