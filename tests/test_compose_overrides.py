"""The rule of order: what stands behind the hardware group is pinned."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.compose import overrides
from hydra_plugins.memfit.compose.overrides import read_order

CONFIG = {"trainer": {"batch": 8, "names": ["a"], "more": {"x": 1}}, "model": {"path": "p"}, "top": 1, "name": "n"}

ROWS = [
    ("nothing behind", ["trainer.batch=8", "+hardware=h200"], {"trainer.batch"}, set()),
    ("before and behind", ["top=1", "+hardware=auto", "trainer.batch=8"], {"top", "trainer.batch"}, {"trainer.batch"}),
    ("with a package", ["top=1", "+hardware@_global_=auto", "name=x"], {"top", "name"}, {"name"}),
    ("in the defaults list", ["top=1", "trainer.batch=8"], {"top", "trainer.batch"}, {"top", "trainer.batch"}),
    ("the list's choice changed", ["top=1", "hardware=a40", "name=x"], {"top", "name"}, {"name"}),
    ("added", ["+hardware=h200", "+trainer.more.x=1"], {"trainer.more.x"}, {"trainer.more.x"}),
    ("forced", ["+hardware=h200", "++trainer.batch=2"], {"trainer.batch"}, {"trainer.batch"}),
    ("deleted", ["+hardware=h200", "~trainer.batch"], {"trainer.batch"}, {"trainer.batch"}),
    (
        "a section of values",
        ["+hardware=h200", "trainer={batch:4,more:{x:2}}"],
        *[{"trainer.batch", "trainer.more.x"}] * 2,
    ),
    ("a list", ["+hardware=h200", "trainer.names=[b,c]"], {"trainer.names"}, {"trainer.names"}),
    ("null", ["+hardware=h200", "trainer.batch=null"], {"trainer.batch"}, {"trainer.batch"}),
    ("quoted", ["+hardware=h200", "name='x=1, y'"], {"name"}, {"name"}),
    ("a group's file is no value", ["+hardware=h200", "model=qwen"], set(), set()),
    ("a nested group", ["+hardware=h200", "trainer/optim=adam", "actor@trainer.more=big"], set(), set()),
    ("a group that fills other sections", ["+hardware=h200", "+experiment=small"], set(), set()),
    ("two groups at once", ["+hardware=h200", "model=[a,b]"], set(), set()),
    ("settings are no pins", ["+hardware=h200", "memfit.margin=0.1", "memfit.hardware.nodes=2"], set(), set()),
    ("repeated on both sides", ["top=1", "+hardware=h200", "top=2"], {"top"}, {"top"}),
]


@pytest.mark.parametrize(("lines", "explicit", "pinned"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_order(lines: list[str], explicit: set[str], pinned: set[str]) -> None:
    """Each kind of override says which keys it sets, and the place of the group which of them are pinned."""
    order = read_order(lines, CONFIG)

    assert (order.explicit, order.pinned) == (explicit, pinned)
    assert not order.sweeps


def test_settings_are_told_apart() -> None:
    """What the user sets below memfit is known, wherever it stands."""
    order = read_order(["memfit.margin=0.1", "+hardware=h200", "memfit.hardware.capacity_bytes=1"], CONFIG)

    assert order.settings == {"memfit.margin", "memfit.hardware.capacity_bytes"}


@pytest.mark.parametrize("sweep", ["trainer.batch=1,2", "+hardware=a40,h200", "top=range(1,4)", "name=glob(*)"])
def test_a_sweep_is_no_job(sweep: str) -> None:
    """The config from which Hydra starts a sweep is recognised by its overrides."""
    assert read_order(["top=1", sweep], CONFIG).sweeps


def test_the_group_stands_once() -> None:
    """Two hardware groups are one clear error that shows both."""
    with pytest.raises(ConfigError, match=r"twice.*\+hardware=h200 and hardware=a40"):
        read_order(["+hardware=h200", "hardware=a40"], CONFIG)


@pytest.mark.parametrize(
    "line",
    [
        "a=1",
        "a.b=12",
        "a.b=word",
        "a=two-words",
        "a=b.c",
        "a.b_c=d_e",
        "a.b=10000000000",
        "name=x",
        "model=auto",
        "a.1=b",
        "+hardware=h200",
        "++a.b=10",
        "a.path=Qwen/Qwen2.5-3B-Instruct",
        "a=e5",
        "a=infinity",
    ],
)
def test_a_plain_word_is_read_as_hydra_reads_it(line: str) -> None:
    """What is read without Hydra's grammar has the key, the kind and the value that the grammar finds."""
    simple, hydras = overrides._simple(line), OverridesParser.create().parse_override(line)

    assert simple is not None
    for name in ("type", "key_or_group", "package", "value_type"):
        assert getattr(simple, name) == getattr(hydras, name)
    assert (simple.value(), type(simple.value())) == (hydras.value(), type(hydras.value()))
    assert simple.is_sweep_override() == hydras.is_sweep_override()


@pytest.mark.parametrize(
    "line",
    [
        "a=null",
        "a=True",
        "a=1,2",
        "a=[b]",
        "a={b:1}",
        "a='b'",
        "a=${b}",
        "a=nan",
        "a=/data",
        "+++a=b",
        "~a",
        "a@b=c",
        "a/b=c",
        "a=",
        "a=f(1)",
        "a=0x1",
        "a=1.5",
    ],
)
def test_anything_else_is_left_to_hydras_grammar(line: str) -> None:
    """A constant, a sweep, a list, a quote or a package is no plain word."""
    assert overrides._simple(line) is None
