"""A sample of the stored traces, made again."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest

from tracer.case import Case
from tracer.make_data import SEED, read, versions

SAMPLE = random.Random(SEED).sample(read(), 12)


@pytest.mark.verl
@pytest.mark.slow
@pytest.mark.parametrize(
    "stored", SAMPLE, ids=lambda row: ",".join(f"{k}={v}" for k, v in Case(**row["case"]).changed().items())
)
def test_a_trace_is_reproduced_to_the_byte(stored: dict[str, Any]) -> None:
    """Nothing in a trace is random: with the versions of the file, every number comes out again."""
    from tracer.make_data import row

    if stored["versions"] != versions():
        pytest.skip(f"the file was made with {stored['versions']}, here is {versions()}")
    gc.collect()
    assert row(Case(**stored["case"]))["phases"] == stored["phases"]


@pytest.mark.verl
@pytest.mark.slow
@pytest.mark.parametrize("expandable", [False, True])
def test_a_replay_is_reproduced_to_the_byte(expandable: bool) -> None:
    """Lengths are drawn by a seed of the case: the live peak and the smallest limit of a stored replay come out again."""
    from tracer import make_reserved, process

    wanted = {"expandable": expandable, "offload": False, "lengths": "dynamic"}
    stored = next(r for r in make_reserved.read() if r["case"].get("lora_rank") and wanted.items() <= r.items())
    if stored["versions"] != versions():
        pytest.skip(f"the file was made with {stored['versions']}, here is {versions()}")
    case = Case(**stored["case"])
    plan = list(process.acts(case, case.tokens, kind="dynamic", offload=False))
    live, limit = process.needed(process.script(case), plan, expandable=expandable)
    assert (live, limit) == (stored["live_bytes"], stored["needed_bytes"])
