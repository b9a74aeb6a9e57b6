"""A composed config as plain values, whatever in it cannot be resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.memfit.compose.plain import ABSENT, Composed, leaves, plain, read, value_at


def test_resolves_what_can_be_resolved() -> None:
    """Interpolations of values and of whole sections are followed."""
    config = OmegaConf.create({"a": {"b": 4, "c": "${a.b}"}, "d": "${a}", "e": [1, "${a.c}"]})

    assert plain(config) == {"a": {"b": 4, "c": 4}, "d": {"b": 4, "c": 4}, "e": [1, 4]}


def test_keeps_the_text_of_what_cannot_be_resolved() -> None:
    """A missing value, an unknown resolver, an unset variable, a bad key: each stays as text and harms no neighbour."""
    raw = {
        "missing": "???",
        "unknown": "${no.such.resolver:1}",
        "unset": "${oc.env:MEMFIT_TEST_SURELY_UNSET}",
        "nowhere": "${not.there}",
        "late": "${hydra:runtime.output_dir}",
        "listed": ["${no.such.resolver:2}", "???", 3],
    }

    assert plain(OmegaConf.create({"a": raw, "b": 1})) == {"a": raw, "b": 1}


def test_leaves_no_value_in_the_cache_of_a_resolver() -> None:
    """A cached resolver is asked again after the config was read: the run's answer may be another one."""
    answers = iter(range(100))
    OmegaConf.register_new_resolver("memfit_test.cached", lambda: next(answers), use_cache=True, replace=True)
    config = OmegaConf.create({"a": "${memfit_test.cached:}"})

    assert plain(config)["a"] == 0
    assert config.a == 1
    assert config.a == 1


def test_leaves_out_what_it_is_told_to() -> None:
    """Top-level keys that are left out are not even resolved."""
    assert plain(OmegaConf.create({"hydra": {"a": "${b"[:1]}, "b": 1}), leave_out=frozenset({"hydra"})) == {"b": 1}


def test_value_at() -> None:
    """Dotted keys reach into sections and lists; None is a value, and absence is not None."""
    config = {"a": {"b": None, "c": [{"d": 5}]}}

    assert value_at(config, "a.b") is None
    assert value_at(config, "a.c.0.d") == 5
    assert value_at(config, "a.c.1.d") is ABSENT
    assert value_at(config, "a.x") is ABSENT
    assert value_at(config, "a.b.c") is ABSENT


def test_leaves() -> None:
    """An empty section is a leaf, and a list is one value."""
    assert list(leaves({"a": {"b": 1, "c": {}}, "d": [1]})) == ["a.b", "a.c", "d"]
    assert list(leaves(3, "x.y")) == ["x.y"]


def test_read_agrees_with_plain() -> None:
    """One key read alone is what the whole config says there, whatever its neighbours are."""
    config = OmegaConf.create(
        {"a": {"b": "${d.0}", "c": "${no.such.resolver:}"}, "d": [4, "???"], "e": "${a}", "f": None}
    )
    keys = ["a", "a.b", "a.c", "d.0", "d.1", "d.2", "e.b", "e.c", "f", "f.x", "g", "a.b.c"]

    assert [read(config, key) for key in keys] == [value_at(plain(config), key) for key in keys]


def test_sections_that_hold_each_other_end() -> None:
    """Two sections, each an interpolation of the other, would unfold without end: they stay as they were written."""
    config = OmegaConf.create({"a": {"x": 1, "b": "${b}"}, "b": {"a": "${a}", "y": 2}})
    view = Composed.of(config)

    assert plain(config) == {"a": {"x": 1, "b": "${b}"}, "b": {"a": "${a}", "y": 2}}
    assert (view["a"]["x"], view["a"]["b"], view["b"]["y"]) == (1, "${b}", 2)
    assert read(config, "a.b") == "${b}"


def test_the_view_agrees_with_plain() -> None:
    """Read key by key, the same values: sections, lists, interpolations of both, missing values, keys that are numbers."""
    config = OmegaConf.create(
        {"a": {"b": 4, 1: 2}, "d": "${a}", "e": [1, "${a.b}", {"f": "${a.b}"}], "m": "???", "n": None}
    )

    assert unfolded(Composed.of(config)) == plain(config)


def unfolded(node: object) -> object:
    """Return a view with all that is in it as plain values."""
    return {key: unfolded(value) for key, value in node.items()} if isinstance(node, Mapping) else node


SELECTED = [
    "${a.b}", "${a.text}", "${a.none}", "${a.missing}", "${a.nothing}", "${a.section}", "${a.list}", "${a.follows}",
    "${a.section.x}", "${linked.x}", "${lost.x}", "${empty.x}", "${a.b.c}", "${a.list.0}", "${ring.x}", "${p.itself}",
    "${oc.select:a.b,5}", "${oc.select:a.nothing,5}", "${oc.select:a.missing,5}", "${oc.select:a.none,5}",
    "${oc.select:a.nothing,null}", "${oc.select:a.nothing,False}", "${oc.select:a.nothing,true}",
    "${oc.select:nowhere.b,5}", "${oc.select:a.follows,5}", "${oc.select:a.section,5}", "${oc.select:linked.x,5}",
    "${oc.select:linked.y,5}", "${oc.select:lost.x,5}", "${oc.select:empty.x,5}", "${oc.select:a.b.c,5}",
    "${oc.select:.itself2,5}", "${oc.select:a.nothing}", "${oc.select:a.nothing,01}", "${oc.select:a.nothing, 5}",
    "${oc.select:a.nothing,1.5}", "${oc.select:a.nothing,word}", "${oc.select:a.escaped,5}", "${a.b}0", "\\${a.b}",
]  # fmt: skip


@pytest.mark.parametrize("text", SELECTED)
def test_an_interpolation_gives_what_omegaconf_says(text: str) -> None:
    """The forms that are resolved without OmegaConf's grammar, and their neighbours, have its values and types."""
    raw: dict[str, Any] = {
        "a": {
            "b": 4, "text": "4", "none": None, "missing": "???", "section": {"x": 1}, "list": [7], "follows": "${a.b}",
            "escaped": "\\${a.b}",
        },
        "p": {"itself": text},
        "linked": "${a.section}", "lost": "???", "empty": None, "ring": "${ring.x}",
    }  # fmt: skip
    view, config = Composed.of(OmegaConf.create(raw)), OmegaConf.create(raw)

    got, known = unfolded(view["p"]["itself"]), plain(config)["p"]["itself"]

    assert (got, type(got)) == (known, type(known))


@dataclass
class Typed:
    """A section with types of its own, as AReaL's configs have."""

    whole: int = 3
    ratio: float = "${t.whole}"  # type: ignore[assignment]
    either: int | str = 4
    table: dict[str, float] = field(default_factory=lambda: {"k": "${t.whole}"})  # type: ignore[dict-item]


def test_what_a_type_converts_is_converted() -> None:
    """An interpolation in a typed section is the section's: an int becomes its float, in a table as well."""
    config = OmegaConf.create({"t": Typed, "u": {"ratio": "${t.ratio}"}})
    assert isinstance(config, DictConfig)
    view = Composed.of(config)

    assert unfolded(view) == plain(config)
    assert (type(view["t"]["ratio"]), type(view["t"]["table"]["k"]), view["t"]["either"]) == (float, float, 4)
