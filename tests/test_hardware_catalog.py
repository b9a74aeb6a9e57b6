"""The catalogue: names, overrides by the user, and errors that say what would do."""

from __future__ import annotations

import time
from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.hardware import catalog

GOOD: dict[str, Any] = {"name": "mine", "capacity_bytes": 85899345920}


def test_a_named_product_says_nothing_of_the_node() -> None:
    """`hardware=a40` knows the card; how many there are, and what they hold, is not in its file."""
    found = catalog.load("a40")
    assert (found.gpus_per_node, found.nodes, found.host_memory_bytes, found.held_bytes, found.devices) == (
        None,
        None,
        None,
        0,
        (),
    )
    assert found.source == "conf/hardware/a40.yaml"


def test_a_chip_without_bf16_offers_its_fp16_rate() -> None:
    """The rate is for the dtype that the chip can train in."""
    assert catalog.load("v100-32").bf16_dense_flops == 125 * 10**12


def test_an_assumed_capacity_is_said() -> None:
    """A number that nobody measured carries a warning; an observed one does not."""
    assert "assumed" in catalog.load("gb200").warnings[0]
    assert catalog.load("h200").warnings == ()


def test_a_capacity_that_the_user_set_is_no_assumption() -> None:
    """Who brings his own number is not told that the file's is assumed."""
    node = OmegaConf.load(conf_dir() / "hardware" / "gb200.yaml").memfit.hardware
    node.capacity_bytes = 186 << 30
    assert catalog.from_mapping(node, "the command line").warnings == ()


def test_an_unknown_name_lists_the_known_ones_and_the_way_out() -> None:
    """The error holds every name, the nearest one, and the override for a card without a file."""
    with pytest.raises(UnknownName) as caught:
        catalog.load("rtx4091")
    text = str(caught.value)
    assert all(name in text for name in catalog.names())
    assert "Did you mean 'rtx4090'?" in text and "memfit.hardware.capacity_bytes=" in text


@pytest.mark.parametrize("name", ["", "auto", "../hardware/h100", "H100", "h100.yaml"])
def test_only_listed_names_load(name: str) -> None:
    """No path, no other case, no `auto`: what is not listed is unknown."""
    with pytest.raises(UnknownName):
        catalog.load(name)


@pytest.mark.parametrize(
    "name", ["NVIDIA H100", "NVIDIA A100", "NVIDIA L40", "NVIDIA H2", "NVIDIA RTX A4000", "", "null", '"', "mib"]
)
def test_a_part_of_a_driver_name_is_no_match(name: str) -> None:
    """Driver names are compared whole; the L40 is not the L40S."""
    assert catalog.by_product(name) == ("l40" if name == "NVIDIA L40" else None)


def test_a_composed_node_with_overrides_is_read() -> None:
    """What the user overrides in memfit.hardware wins, and the source is the caller's."""
    node = OmegaConf.load(conf_dir() / "hardware" / "h100.yaml").memfit.hardware
    node.capacity_bytes, node.gpus_per_node, node.nodes = 64 << 30, 4, 2
    found = catalog.from_mapping(node, "the command line")
    assert (found.capacity_bytes, found.gpus_per_node, found.nodes) == (64 << 30, 4, 2)
    assert found.product == "NVIDIA H100 80GB HBM3" and found.source == "the command line"


def test_a_bare_capacity_is_enough() -> None:
    """A card that nobody has a file for needs one number."""
    found = catalog.from_mapping({"capacity_bytes": 85899345920}, "test")
    assert (found.name, found.product, found.kind, found.bf16_dense_flops) == ("custom", "custom", "gpu", None)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "capacity_bytes is missing"),
    ({"capacity_bytes": None}, "capacity_bytes is missing"),
    ({"capacity_bytes": 80}, "80 GiB are 85899345920"),
    ({"capacity_bytes": 80_000_000}, "not the memory of an accelerator"),
    ({"capacity_bytes": 1 << 60}, "not the memory of an accelerator"),
    ({"capacity_bytes": -(80 << 30)}, "must be at least 1"),
    ({"capacity_bytes": "80GiB"}, "not an integer"),
    ({"capacity_bytes": 8.5e10}, "not an integer"),
    ({"capacity_bytes": True}, "not an integer"),
    ({**GOOD, "gpus_per_node": 0}, "gpus_per_node=0 must be at least 1"),
    ({**GOOD, "gpus_per_node": "8"}, "gpus_per_node='8' is not an integer"),
    ({**GOOD, "held_bytes": -1}, "held_bytes=-1 must be at least 0"),
    ({**GOOD, "capacity_byte": 1}, "Did you mean capacity_bytes?"),
    ({**GOOD, "kind": "npu"}, "neither of gpu, tpu"),
    ({**GOOD, "name": 4090}, "is not text"),
    ({**GOOD, "compute_capability": 9.0}, "is not text"),
]


@pytest.mark.parametrize(("node", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_value_is_named(node: dict[str, Any], message: str) -> None:
    """The error names the key, the source, and what would do."""
    with pytest.raises(ConfigError) as caught:
        catalog.from_mapping(node, "my.yaml")
    assert message in str(caught.value) and "my.yaml" in str(caught.value)


def test_finding_a_product_parses_one_file() -> None:
    """A detection parses one file, not the whole catalogue, and stays within 40 ms."""
    for cached in (catalog.names, catalog.load, catalog.facts, catalog.by_product):
        cached.cache_clear()
    begin = time.process_time()
    assert catalog.by_product("NVIDIA RTX PRO 6000 Blackwell Server Edition") == "rtx-pro-6000"
    catalog.load("rtx-pro-6000")
    assert time.process_time() - begin < 0.04
    assert catalog.facts.cache_info().currsize == 1
