"""memfit's groups as Hydra gets them: what the files say, read as one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.compose.groups import load_group
from hydra_plugins.memfit.compose.hook import forget
from hydra_plugins.memfit.searchpath import MemfitConfigSource
from support.hydra_app import LAUNCH, write_app

HARDWARE = sorted((conf_dir() / "hardware").glob("*.yaml"))
OTHERS = [conf_dir() / "memfit" / "launch.yaml", *sorted((conf_dir() / "model").glob("qwen3-[48]*.yaml"))]


def content(config: Any) -> Any:
    """Return a config as plain values, interpolations as their text."""
    return OmegaConf.to_container(config, resolve=False)


def group(path: Path) -> Any:
    """Return what the source gives for a file."""
    return content(load_group(str(conf_dir()), str(path.relative_to(conf_dir())))[0])


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_a_hardware_file_and_what_it_includes_are_one(path: Path) -> None:
    """The merge of both files as OmegaConf reads them; of the sources, the one that a plan needs is left."""
    own, launch = OmegaConf.load(path), OmegaConf.load(conf_dir() / "memfit" / "launch.yaml")
    expected = content(OmegaConf.merge(launch, own))
    del expected["defaults"]
    sources = expected["memfit"]["hardware"].get("sources")
    if sources is not None:
        expected["memfit"]["hardware"]["sources"] = {"capacity_bytes": sources["capacity_bytes"]}

    assert group(path) == expected


def test_any_other_file_is_what_it_says() -> None:
    """A model, and the settings alone, are read as OmegaConf reads them."""
    assert [group(path) for path in OTHERS] == [content(OmegaConf.load(path)) for path in OTHERS]


def test_the_source_lists_what_the_folder_holds() -> None:
    """Groups and configs, as ``--help`` and the completion of words ask for them."""
    source = MemfitConfigSource("memfit", f"memfit://{conf_dir()}")

    assert source.available()
    assert source.list("", ObjectType.GROUP) == ["hardware", "memfit", "model"]
    assert source.list("hardware", ObjectType.CONFIG) == sorted(path.stem for path in HARDWARE)
    assert (source.is_config("hardware/h200"), source.is_config("hardware"), source.is_group("hardware/h200")) == (
        True, False, False,
    )  # fmt: skip


def composed(folder: Path) -> DictConfig:
    """Compose one launch from the configs of a folder, with its plan."""
    GlobalHydra.instance().clear()
    forget()
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("config", [*LAUNCH, "+hardware=h200"])


def test_files_that_hydra_reads_itself_give_the_same_launch(tmp_path: Path) -> None:
    """The groups copied into an application's own folder, where Hydra reads and merges them, lead to the same config."""
    write_app(tmp_path)
    planned = composed(tmp_path / "conf")
    for name in ("hardware", "memfit"):
        shutil.copytree(conf_dir() / name, tmp_path / "conf" / name)

    assert composed(tmp_path / "conf") == planned
