"""docs/areal.md and docs/validation/areal.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hydra_plugins.memfit.frameworks.areal import versions
from hydra_plugins.memfit.frameworks.areal.knobs import WRITABLE_KEYS
from support.areal_launch import cases, of_case

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "areal.md").read_text(encoding="utf-8")


def test_the_table_of_keys_is_the_frozen_list() -> None:
    """Every key that memfit may write into an AReaL config stands in the table once, and no other."""
    table = re.findall(r"(?:^\|.*\|\n)+", PAGE[PAGE.index("<!-- writable-keys -->") :], re.MULTILINE)[0]
    keys = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)

    assert sorted(keys) == sorted(WRITABLE_KEYS)


def test_keys_that_decide_what_is_learned_are_not_writable() -> None:
    """Batches, samples, prompts, layouts, optimizer, KL and LoRA are no knobs, with or without permission."""
    never = re.compile(
        r"batch_size|n_samples|train_dataset|backend|allocation|optimizer\.|kl_ctl|lora|temperature|minibatch"
    )

    assert [key for key in WRITABLE_KEYS if never.search(key)] == []


def test_the_table_of_releases_is_the_data() -> None:
    """Each known release stands in the table, with the bytes that it stores a parameter in."""
    for version in versions.VERSIONS:
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {version} |")]
        first = "server first" if versions.behaviour(version).launcher else "trainer first"
        assert row.split("|")[2].strip()[0] == str(versions.behaviour(version).storage_bytes)
        assert row.split("|")[3].strip() == first


@pytest.mark.parametrize("case", cases(), ids=lambda case: str(case["id"]))
def test_public_runs_are_judged_right(case: dict[str, object]) -> None:
    """No public run is judged wrong; what is not modelled is refused with its reason."""
    answer, err = of_case(case)

    if answer:
        assert answer["fits"] == (case["outcome"] == "fits")
    else:
        assert "not modelled" in err or "nothing bounds a micro-batch" in err
