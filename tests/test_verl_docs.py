"""docs/verl.md says what the code does: its tables are compared with the data."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from omegaconf import OmegaConf

from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.verl.adapter import WRITABLE_KEYS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "verl.md").read_text(encoding="utf-8")


def table_after(marker: str) -> list[list[str]]:
    """Return the cells of the first table after ``marker``, without its head."""
    rows = re.findall(r"(?:^\|.*\|\n)+", PAGE[PAGE.index(marker) :], re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def test_the_table_of_keys_is_the_frozen_list() -> None:
    """Every key that memfit may write into a verl config stands in the table once, and no other."""
    keys = [row[0].strip("`") for row in table_after("<!-- writable-keys -->")]

    assert sorted(keys) == sorted(WRITABLE_KEYS)


def test_keys_that_are_never_written_are_not_writable() -> None:
    """Batch, samples, learning rate, LoRA rank and sampling are no knobs, with or without permission."""
    never = re.compile(
        r"train_batch_size|rollout\.n$|max_prompt_length|optim\.(?!override_opt)|ppo_epochs|lora_rank|temperature|top_"
    )

    assert [key for key in WRITABLE_KEYS if never.search(key)] == []


def test_writable_keys_exist_in_some_release() -> None:
    """Each key is in the yaml, or among the dataclass fields, of at least one supported release; an override is free to add."""
    known: set[str] = set()
    for version, trainer in product(defaults.VERSIONS, defaults.TRAINERS):
        config = OmegaConf.create(defaults.load(version, trainer=trainer))
        fields = defaults.dataclass_only(version, trainer=trainer)
        for key in WRITABLE_KEYS:
            section, _, name = key.rpartition(".")
            node = OmegaConf.select(config, section)
            free = section.endswith("override_optimizer_config")
            if key in fields or (node is not None and (name in node or free)):
                known.add(key)

    assert sorted(known) == sorted(WRITABLE_KEYS)


def test_the_table_of_engines_is_the_data() -> None:
    """The releases and the engines that they allow are those of engines.yaml."""
    engines = OmegaConf.load(defaults.DATA / "engines.yaml").versions
    rows = table_after("| verl | vLLM in its extras")

    assert {version: (vllm, sglang) for version, vllm, sglang in rows} == {
        version: (engines[version].vllm.requirement, engines[version].sglang.requirement)
        for version in defaults.VERSIONS
    }
