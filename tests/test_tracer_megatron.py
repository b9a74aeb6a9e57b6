"""A sample of the stored traces of megatron-core, made again."""

from __future__ import annotations

import gc
from importlib.metadata import version
from typing import Any

import pytest

from support.megatron_validation import rows

MIXTURE = "qwen3-30b-a3b"
SAMPLE = [row for row in rows() if row["case"]["model"] == "qwen2.5-0.5b"]
SAMPLE += [row for row in rows() if row["case"]["model"] == MIXTURE and row["case"]["tensor"] == 4][:2]


@pytest.mark.megatron
@pytest.mark.slow
@pytest.mark.parametrize("stored", SAMPLE, ids=lambda row: ",".join(f"{k}={v}" for k, v in row["case"].items()))
def test_a_trace_is_reproduced_to_the_byte(stored: dict[str, Any]) -> None:
    """With the versions of the file every number comes out again."""
    from tracer.megatron import MegatronCase
    from tracer.megatron_data import row

    made = {name: version(name).split("+")[0] for name in stored["versions"]}
    if made != stored["versions"]:
        pytest.skip(f"the file was made with {stored['versions']}, here is {made}")
    gc.collect()
    assert row(MegatronCase(**stored["case"]))["phases"] == stored["phases"]


def test_every_kind_of_stage_is_traced() -> None:
    """The rows have stages with the embedding, the head, both and neither, with and without recomputation."""
    kinds = {(c["first"], c["last"], c["recompute"]) for c in (row["case"] for row in rows())}

    assert kinds == {
        (first, last, how) for first in (True, False) for last in (True, False) for how in ("none", "full")
    }


def test_mixtures_are_traced_over_expert_and_tensor_ranks() -> None:
    """Experts on one rank and on several, behind tensor parallelism and without, with both kinds of permutation."""
    kinds = {
        (c["expert"] > 1, c["tensor"] > 1, c["permute_fusion"])
        for c in (row["case"] for row in rows())
        if c["model"] == MIXTURE
    }

    assert kinds == {
        (ranks, tensor, fusion)
        for ranks, tensor in ((True, True), (True, False), (False, False))
        for fusion in (True, False)
    }
