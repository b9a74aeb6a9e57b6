"""The tracer of generate: the short way it takes is the long way, and the stored rows are what it computes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.generation_specs import DATA

# Lists of token ids differ: the short way's prompt is the whole sequence. They are the largest difference there is.
IDS = 0.003

OPTIONS: list[dict[str, Any]] = [
    {},
    {"padded": True},
    {"cache": "static"},
    {"do_sample": False},
    {"beams": 3, "do_sample": False},
    {"attention": "eager", "padded": True, "prompt": 20, "new": 60},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"output_scores": True},
]


@pytest.mark.verl
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3", "tiny-mistral"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)) or "default")
def test_first_and_last_steps_without_data_hold_the_peak_of_the_whole_run(model: str, options: dict[str, Any]) -> None:
    """A real run of every step on real tensors peaks where two short runs without data say that it does."""
    from support.generation_tracer import Case, trace

    case = Case(model=model, **{"rows": 4, "prompt": 40, "new": 24, "dtype": "float32", **options})
    short, real = trace(case), trace(case, fake=False)

    assert short["weights_bytes"] == real["weights_bytes"]
    assert short["peak_bytes"] == pytest.approx(real["peak_bytes"], rel=IDS)
    assert short["peak_bytes"] >= real["peak_bytes"]


@pytest.mark.verl
@pytest.mark.slow
def test_stored_rows_are_what_the_tracer_computes() -> None:
    """Every twelfth stored row is traced again and must be the same to the byte, on the versions that it names."""
    import torch
    import transformers

    from support.generation_tracer import Case, trace

    rows = json.loads((DATA / "generation_traces.json").read_text())
    here = {"torch": torch.__version__, "transformers": transformers.__version__}
    if here != rows[0]["versions"]:
        pytest.skip(f"the rows were traced with {rows[0]['versions']}, here is {here}")
    for row in rows[::12]:
        assert trace(Case(**row["case"]))["peak_bytes"] == row["peak_bytes"], row["case"]
