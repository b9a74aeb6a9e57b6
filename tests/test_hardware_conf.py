"""conf/hardware: every file is well formed, sourced, and composes alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.base.units import GIB, MIB
from hydra_plugins.memfit.hardware import capacity, catalog

FILES = sorted(path for path in (conf_dir() / "hardware").glob("*.yaml") if path.stem != catalog.AUTO)
ASKED_FOR = [
    "a10",
    "a10g",
    "a30",
    "a40",
    "a100-40",
    "a100-80",
    "a800",
    "h20",
    "h100",
    "h100-nvl",
    "h200",
    "h800",
    "b200",
    "gb200",
    "gh200",
    "b300",
    "l4",
    "l20",
    "l40",
    "l40s",
    "rtx3090",
    "rtx4090",
    "rtx5090",
    "rtx-a6000",
    "rtx-pro-6000",
    "v100-16",
    "v100-32",
    "t4",
    "v4-8",
    "v4-16",
    "v5e-4",
    "v5e-8",
    "v5p-8",
    "v6e-4",
    "v6e-8",
    "v6e-16",
]
KINDS = {"measured", "observed", "datasheet", "derived", "assumed"}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@cache
def node(path: Path) -> dict[str, Any]:
    """Return the facts of one file as PyYAML reads them."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    facts: dict[str, Any] = content["memfit"]["hardware"]
    return facts


def numbers(facts: dict[str, Any]) -> set[str]:
    """Return the keys whose value is a number, a list of numbers or a version number."""
    found = {key for key, value in facts.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return found | {"capacity_range_bytes"} | ({"compute_capability"} & set(facts))


def test_every_promised_name_has_a_file() -> None:
    """The names that the documentation promises are all there."""
    assert set(ASKED_FOR) <= set(catalog.names())


@each_file
def test_both_yaml_readers_agree(path: Path) -> None:
    """No number, date or name that PyYAML and OmegaConf read differently."""
    assert OmegaConf.to_container(OmegaConf.load(path)) == yaml.safe_load(path.read_text(encoding="utf-8"))


@each_file
def test_the_name_is_the_name_of_the_file(path: Path) -> None:
    """What a user types is what the facts call themselves."""
    assert node(path)["name"] == path.stem


@each_file
def test_every_number_has_a_source(path: Path) -> None:
    """A source of a known kind stands beside each number, and none without its number."""
    facts = node(path)
    assert set(facts["sources"]) == numbers(facts)
    for key, source in facts["sources"].items():
        assert source["kind"] in KINDS, key
        assert source.get("url") or source.get("quote") or source.get("note"), key
        assert source["kind"] != "assumed" or source.get("note"), f"{key}: an assumption must say what it rests on"


@each_file
def test_numbers_are_plain_integers(path: Path) -> None:
    """A size is never a float, nor text."""
    assert all(
        isinstance(node(path)[key], int) for key in numbers(node(path)) - {"capacity_range_bytes", "compute_capability"}
    )


@each_file
def test_the_capacity_is_the_safe_end_of_what_was_seen(path: Path) -> None:
    """The smallest capacity seen counts, and it is below the driver's total."""
    facts = node(path)
    low, high = facts["capacity_range_bytes"]
    assert facts["capacity_bytes"] == low <= high
    assert low < (facts.get("nvml_total_bytes") or low + 1)


COMPOSED_QUICKLY = {"a100-80", "rtx-pro-6000", "v4-16"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in COMPOSED_QUICKLY else pytest.mark.slow)
        for path in FILES
    ],
)
def test_a_file_composes_alone(path: Path, tmp_path: Path) -> None:
    """In another's folder it is an ordinary file of Hydra: its facts at memfit.hardware, the settings beside them."""
    (tmp_path / "memfit").mkdir()
    (tmp_path / "memfit" / "launch.yaml").write_text("memfit: {margin: 0.05}\n")  # the real one starts the planner
    (tmp_path / "hardware").symlink_to(path.parent)
    (tmp_path / "app.yaml").write_text("mine: 1\n")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        config = OmegaConf.to_container(compose("app", overrides=[f"+hardware={path.stem}"]))
    assert config == {"mine": 1, "memfit": {"margin": 0.05, "hardware": node(path)}}


@each_file
def test_a_file_is_a_global_group_option(path: Path) -> None:
    """The head is the same everywhere: package _global_, the launch first, the facts over it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"] == [{"/memfit@_global_": "launch"}, "_self_"]


def test_no_driver_name_stands_in_two_files() -> None:
    """A product name of the driver decides one file."""
    listed = [name for path in FILES for name in node(path).get("nvml_names", ())]
    assert len(listed) == len(set(listed))


def test_a_name_is_never_found_inside_another() -> None:
    """Each listed driver name leads to its own file, also where one name begins another (A10, A10G, A100)."""
    for path in FILES:
        for name in node(path).get("nvml_names", ()):
            assert catalog.by_product(name) == path.stem


@pytest.mark.parametrize(
    ("name", "gib", "tolerance"),
    [
        ("a40", 44.42, 0.01),
        ("a100-80", 79.18, 0.05),
        ("h100", 79.11, 0.02),
        ("h200", 139.75, 0.06),
        ("h20", 95.0, 0.01),
        ("b200", 178.35, 0.01),
        ("rtx4090", 23.52, 0.02),
        ("l40s", 44.40, 0.02),
        ("v4-16", 30.75, 0.0),
    ],
)
def test_capacities_that_processes_printed(name: str, gib: float, tolerance: float) -> None:
    """The capacity is what torch or XLA prints in its out-of-memory message, in GiB."""
    assert catalog.load(name).capacity_bytes / GIB == pytest.approx(gib, abs=tolerance + 1e-6)


@pytest.mark.parametrize("name", [name for name in catalog.names() if catalog.facts(name).nvml_total_bytes])
def test_the_assumed_reserve_covers_every_known_board(name: str) -> None:
    """Without the driver's word on its reserve, the estimate promises no more than was seen and wastes under 3 %."""
    facts = catalog.facts(name)
    assert facts.nvml_total_bytes is not None
    left = facts.nvml_total_bytes - capacity.assumed_reserved_bytes(facts.nvml_total_bytes)
    low, _ = facts.capacity_range_bytes
    assert low * 0.97 <= left <= low + 8 * MIB


TPU_SLICES = {"v4-8": (1, 4), "v4-16": (2, 4), "v5e-4": (1, 4), "v5e-8": (1, 8)}
TPU_SLICES |= {"v5p-8": (1, 4), "v6e-4": (1, 4), "v6e-8": (1, 8), "v6e-16": (4, 4)}


@pytest.mark.parametrize(("name", "shape"), TPU_SLICES.items())
def test_tpu_slices_count_devices_as_jax_does(name: str, shape: tuple[int, int]) -> None:
    """The number in v4 and v5p names counts cores, two a device; in v5e and v6e names it counts devices."""
    found = catalog.load(name)
    assert (found.nodes, found.gpus_per_node) == shape
    devices = int(name.rpartition("-")[2]) // (2 if name.startswith(("v4", "v5p")) else 1)
    assert shape[0] * shape[1] == devices == node(conf_dir() / "hardware" / f"{name}.yaml")["chips"]
