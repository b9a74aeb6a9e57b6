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
