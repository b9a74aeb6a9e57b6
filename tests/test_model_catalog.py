"""The files of conf/model: form, sources, names, and composition by the real Hydra."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.model import catalog, table
from hydra_plugins.memfit.model.resolve import from_mapping, load, names

KINDS = {"read", "recalled"}


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    """Return every file as PyYAML reads it."""
    return {name: yaml.safe_load((catalog.directory() / f"{name}.yaml").read_text()) for name in names()}


def test_there_are_files() -> None:
    """The table is where the code looks for it."""
    assert len(names()) > 100


def test_each_file_has_the_package_header() -> None:
    """`+model=NAME` puts the file below memfit.model, whoever includes it."""
    for name in names():
        assert (catalog.directory() / f"{name}.yaml").read_text().startswith("# @package memfit.model\n"), name


def test_both_yaml_readers_agree(nodes: dict[str, Any]) -> None:
    """PyYAML and OmegaConf read the same values: no number is text for one of them."""
    for name in names()[::6]:
        assert OmegaConf.to_container(OmegaConf.load(catalog.directory() / f"{name}.yaml")) == nodes[name]


def test_names_are_those_of_the_files(nodes: dict[str, Any]) -> None:
    """The name in a file is its own, in lower case."""
    assert all(node["name"] == name == name.lower() for name, node in nodes.items())


def test_no_hub_id_is_in_two_files(nodes: dict[str, Any]) -> None:
    """A hub id has one architecture, whatever its case; and the search by text finds it."""
    ids = Counter(hub_id.lower() for node in nodes.values() for hub_id in node["hub_ids"])
    assert [hub_id for hub_id, count in ids.items() if count > 1] == []
    for name, node in nodes.items():
        assert {catalog.find(hub_id) for hub_id in node["hub_ids"]} == {name}


def test_a_name_in_two_files_is_not_chosen_from(tmp_path: Path) -> None:
    """Where two organisations have a checkpoint of one name, a path that ends in it is not recognised."""
    copy = tmp_path / "hydra_plugins" / "memfit"
    for room in ("base", "model"):
        shutil.copytree(Path(catalog.__file__).parents[1] / room, copy / room)
    (copy / "__init__.py").touch()
    shutil.copytree(catalog.directory(), copy / "conf" / "model")
    twin = (catalog.directory() / "qwen3-8b.yaml").read_text().replace("Qwen/Qwen3", "Other/Qwen3")
    (copy / "conf" / "model" / "twin.yaml").write_text(twin)
    code = (
        "from hydra_plugins.memfit.model.catalog import find_basename as f; print(f('Qwen3-8B-Base'), f('Qwen3-14B'))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert run.stdout == "None qwen3-14b\n"


def test_each_file_says_where_its_numbers_are_from(nodes: dict[str, Any]) -> None:
    """Every file has an address and a kind, and the day for what was read."""
    for name, node in nodes.items():
        source = node["sources"]["architecture"]
        assert source["kind"] in KINDS, name
        assert source["url"].startswith("https://"), name
        assert source["kind"] == "recalled" or source["read_on"], name
        assert node["sources"]["parameters"]["kind"] == "computed", name


def test_unknown_name_lists_the_known_ones() -> None:
    """A misspelt name is an error with the nearest known one."""
    with pytest.raises(UnknownName, match=r"Did you mean 'qwen2.5-3b'.*llama-3.1-8b"):
        load("qwen2.5-3bb")


def test_load_says_its_source() -> None:
    """The spec names the file that it was read from."""
    found = load("qwen2.5-3b")
    assert (found.name, found.source, found.parameters) == ("qwen2.5-3b", "conf/model/qwen2.5-3b.yaml", 3_085_938_688)


def composed(*overrides: str) -> Any:
    """Return the memfit.model node that the real Hydra composes from conf/ and these overrides."""
    with initialize_config_dir(str(catalog.directory().parent), version_base=None):
        return compose(overrides=list(overrides)).memfit.model


def test_hydra_composes_a_file_below_memfit_model() -> None:
    """`+model=qwen2.5-3b` is the file, and its spec that of the table."""
    assert from_mapping(composed("+model=qwen2.5-3b")) == load("qwen2.5-3b")


def test_an_override_changes_the_counts() -> None:
    """A key overridden on the command line is counted, and the source says which."""
    found = from_mapping(composed("+model=qwen2.5-vl-3b", "memfit.model.num_hidden_layers=2"))
    full = load("qwen2.5-vl-3b")
    assert found.parameters == full.parameters - 34 * full.layer_parameters
    assert found.source == "conf/model/qwen2.5-vl-3b.yaml, changed: num_hidden_layers"


def test_a_user_describes_his_own_architecture() -> None:
    """Keys of config.json under memfit.model are enough, without any file."""
    keys = ("model_type=llama", "hidden_size=64", "intermediate_size=160", "num_hidden_layers=3", "vocab_size=100",
            "num_attention_heads=4")  # fmt: skip
    found = from_mapping(composed(*(f"+memfit.model.{key}" for key in keys)))
    assert found.parameters == 2 * 6400 + 64 + 3 * (4 * 4096 + 3 * 64 * 160 + 128)
    assert "user" in found.source


def test_the_count_itself_cannot_be_set() -> None:
    """`memfit.model.parameters=...` would be a guess: the error says which key to set instead."""
    with pytest.raises(ConfigError, match=r"memfit\.model\.parameters=5 .*num_hidden_layers"):
        from_mapping(composed("+model=qwen2.5-3b", "memfit.model.parameters=5"))


def test_the_table_in_the_docs_is_current() -> None:
    """docs/models.md holds the table that `python -m hydra_plugins.memfit.model.table` prints."""
    page = Path(__file__).parents[1] / "docs" / "models.md"
    assert table.render() in page.read_text(), "run: python -m hydra_plugins.memfit.model.table --write docs/models.md"
