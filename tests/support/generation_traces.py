"""Write ``tests/data/generation_traces.json``: one row a case, with the versions that computed it.

    PYTHONPATH=tests python -m support.generation_traces tests/data/generation_traces.json

A row is ``fit`` (formulas may be read off it) or ``held_out`` (it only judges them), drawn once with a fixed seed.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from support.generation_tracer import Case, trace

SPLIT_SEED = 5


def cases() -> list[Case]:
    """Return the spread: models, lengths, rows, attention, caches, samplers, beams."""
    options: list[dict[str, Any]] = []
    for model in ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-4b", "llama-3.1-8b", "llama-2-7b"):
        options += [
            dict(model=model, rows=15, prompt=200, new=120),
            dict(model=model, rows=64, prompt=64, new=1024, temperature=0.7),
            dict(model=model, rows=4, prompt=4096, new=512, top_k=50),
            dict(model=model, rows=32, prompt=300, new=700, padded=True, temperature=0.7, top_p=0.9),
        ]
    options += [
        dict(model="qwen2.5-1.5b", rows=256, prompt=128, new=128, top_p=0.95),
        dict(model="qwen2.5-1.5b", rows=1, prompt=16384, new=64),
        dict(model="qwen2.5-1.5b", rows=1, prompt=512, new=8192, top_p=0.95),
        dict(model="qwen2.5-1.5b", rows=128, prompt=16, new=2000),
        dict(model="qwen2.5-1.5b", rows=128, prompt=16, new=2000, padded=True),
        dict(model="qwen2.5-1.5b", rows=16, prompt=1024, new=256, dtype="float32"),
        dict(model="qwen2.5-0.5b", rows=64, prompt=512, new=512, dtype="float16", do_sample=False),
        dict(model="qwen2.5-7b", rows=2, prompt=100, new=50, do_sample=False),
        dict(model="qwen2.5-7b", rows=96, prompt=1000, new=3000, temperature=0.9, top_k=50, top_p=0.9),
        dict(model="llama-3.1-8b", rows=48, prompt=700, new=300, output_scores=True),
        dict(model="smollm2-135m", rows=8, prompt=128, new=256, output_scores=True),
    ]
    for model in ("qwen2.5-0.5b", "qwen3-4b", "llama-2-7b"):
        for padded in (False, True):
            options += [
                dict(model=model, rows=8, prompt=1024, new=256, attention="eager", padded=padded),
                dict(model=model, rows=24, prompt=64, new=2048, attention="eager", padded=padded, temperature=0.7),
                dict(model=model, rows=16, prompt=2048, new=256, attention="flash_attention_2", padded=padded),
                dict(model=model, rows=64, prompt=256, new=2048, attention="flash_attention_2", padded=padded),
            ]
        options += [
            dict(model=model, rows=16, prompt=512, new=512, cache="static"),
            dict(model=model, rows=64, prompt=128, new=4000, cache="static", temperature=0.7, padded=True),
            dict(model=model, rows=4, prompt=256, new=512, beams=4, do_sample=False),
            dict(model=model, rows=16, prompt=64, new=1024, beams=5, do_sample=False, padded=True),
            dict(model=model, rows=8, prompt=64, new=256, beams=3, do_sample=True, temperature=0.7),
        ]
    options += [
        dict(model="mistral-7b-v0.1", rows=4, prompt=1024, new=512),
        dict(model="mistral-7b-v0.1", rows=4, prompt=3000, new=4000),
        dict(model="mistral-7b-v0.1", rows=2, prompt=8192, new=512),
        dict(model="mistral-7b-v0.1", rows=16, prompt=512, new=8000, padded=True, temperature=0.7),
        dict(model="mistral-7b-v0.1", rows=4, prompt=512, new=8000, cache="static"),
        dict(model="qwen3-30b-a3b", rows=15, prompt=200, new=120),
        dict(model="qwen3-30b-a3b", rows=64, prompt=64, new=2048, temperature=0.7),
        dict(model="qwen3-30b-a3b", rows=4, prompt=4096, new=512),
        dict(model="qwen3-30b-a3b", rows=32, prompt=300, new=700, padded=True, top_p=0.9),
    ]
    return [Case(**o) for o in options]


def rows(chosen: list[Case]) -> list[dict[str, Any]]:
    """Trace each case; the split depends on the place in the list alone."""
    draw = random.Random(SPLIT_SEED)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    found = []
    for number, case in enumerate(chosen, 1):
        split = draw.choice(("fit", "held_out"))
        result = trace(case)
        print(f"{number}/{len(chosen)} {case.model} {result['peak_bytes']} {result['peak_op']}", file=sys.stderr, flush=True)
        found.append({"split": split, "case": asdict(case), "versions": versions, **result})
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    Path(sys.argv[1]).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows(cases())) + "\n]\n")
