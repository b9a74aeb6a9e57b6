"""Write ``tests/data/generation_traces.json``: one row a case, with the versions that computed it.

    PYTHONPATH=tests python -m support.generation_traces tests/data/generation_traces.json

Rows of `spread` are ``fit``: the formulas may be read off them. Rows of `drawn` are ``held_out``: drawn at random after the
formulas stood, they only judge them.
"""

from __future__ import annotations

import datetime
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from support.generation_tracer import MODELS, Case, trace

DRAW_SEED = 20261121


def spread() -> list[Case]:
    """Return one case for each thing that can matter: models, lengths, rows, attention, caches, samplers, beams."""
    options: list[Case] = []
    for model in (
        "smollm2-135m",
        "qwen2.5-0.5b",
        "qwen2.5-1.5b",
        "qwen2.5-7b",
        "qwen3-4b",
        "llama-3.1-8b",
        "llama-2-7b",
    ):
        options += [
            Case(model=model, rows=15, prompt=200, new=120),
            Case(model=model, rows=64, prompt=64, new=1024, temperature=0.7),
            Case(model=model, rows=4, prompt=4096, new=512, top_k=50),
            Case(model=model, rows=32, prompt=300, new=700, padded=True, temperature=0.7, top_p=0.9),
        ]
    options += [
        Case(model="qwen2.5-1.5b", rows=256, prompt=128, new=128, top_p=0.95),
        Case(model="qwen2.5-1.5b", rows=1, prompt=16384, new=64),
        Case(model="qwen2.5-1.5b", rows=1, prompt=512, new=8192, top_p=0.95),
        Case(model="qwen2.5-1.5b", rows=128, prompt=16, new=2000),
        Case(model="qwen2.5-1.5b", rows=128, prompt=16, new=2000, padded=True),
        Case(model="qwen2.5-1.5b", rows=16, prompt=1024, new=256, dtype="float32"),
        Case(model="qwen2.5-0.5b", rows=64, prompt=512, new=512, dtype="float16", do_sample=False),
        Case(model="qwen2.5-7b", rows=2, prompt=100, new=50, do_sample=False),
        Case(model="qwen2.5-7b", rows=96, prompt=1000, new=3000, temperature=0.9, top_k=50, top_p=0.9),
        Case(model="llama-3.1-8b", rows=48, prompt=700, new=300, output_scores=True),
        Case(model="smollm2-135m", rows=8, prompt=128, new=256, output_scores=True),
    ]
    for model in ("qwen2.5-0.5b", "qwen3-4b", "llama-2-7b"):
        for padded in (False, True):
            options += [
                Case(model=model, rows=8, prompt=1024, new=256, attention="eager", padded=padded),
                Case(model=model, rows=24, prompt=64, new=2048, attention="eager", padded=padded, temperature=0.7),
                Case(model=model, rows=16, prompt=2048, new=256, attention="flash_attention_2", padded=padded),
                Case(model=model, rows=64, prompt=256, new=2048, attention="flash_attention_2", padded=padded),
            ]
        options += [
            Case(model=model, rows=16, prompt=512, new=512, cache="static"),
            Case(model=model, rows=64, prompt=128, new=4000, cache="static", temperature=0.7, padded=True),
            Case(model=model, rows=4, prompt=256, new=512, beams=4, do_sample=False),
            Case(model=model, rows=16, prompt=64, new=1024, beams=5, do_sample=False, padded=True),
            Case(model=model, rows=8, prompt=64, new=256, beams=3, do_sample=True, temperature=0.7),
        ]
    options += [
        Case(model="mistral-7b-v0.1", rows=4, prompt=1024, new=512),
        Case(model="mistral-7b-v0.1", rows=4, prompt=3000, new=4000),
        Case(model="mistral-7b-v0.1", rows=2, prompt=8192, new=512),
        Case(model="mistral-7b-v0.1", rows=16, prompt=512, new=8000, padded=True, temperature=0.7),
        Case(model="mistral-7b-v0.1", rows=4, prompt=512, new=8000, cache="static"),
        Case(model="qwen3-30b-a3b", rows=15, prompt=200, new=120),
        Case(model="qwen3-30b-a3b", rows=64, prompt=64, new=2048, temperature=0.7),
        Case(model="qwen3-30b-a3b", rows=4, prompt=4096, new=512),
        Case(model="qwen3-30b-a3b", rows=32, prompt=300, new=700, padded=True, top_p=0.9),
    ]
    options += [
        Case(model="gemma-2-2b", rows=15, prompt=200, new=120),
        Case(model="gemma-2-2b", rows=4, prompt=6000, new=300),
        Case(model="gemma-2-2b", rows=32, prompt=300, new=4500, padded=True),
    ]
    return options


def drawn(count: int) -> list[Case]:
    """Return cases drawn at random, which nobody chose for a formula."""
    draw = random.Random(DRAW_SEED)
    models = sorted(name for name in MODELS if not name.startswith("tiny"))
    found = []
    for _ in range(count):
        beams = draw.choice((1, 1, 1, 1, 1, 1, 2, 4))
        cache = draw.choice(("dynamic", "dynamic", "dynamic", "static"))
        prompt = int(2 ** draw.uniform(4, 12))
        attention = draw.choice(("sdpa", "sdpa", "flash_attention_2", "eager" if prompt < 2048 else "sdpa"))
        found.append(
            Case(
                model=draw.choice(models),
                rows=int(2 ** draw.uniform(0, 6.5)),
                prompt=prompt,
                new=int(2 ** draw.uniform(3, 12)),
                attention=attention,
                cache=cache,
                padded=draw.random() < 0.5,
                do_sample=draw.random() < 0.8,
                temperature=draw.choice((1.0, 0.7)),
                top_k=draw.choice((0, 50)),
                top_p=draw.choice((1.0, 0.9)),
                beams=beams,
            )
        )
    return found


def rows(chosen: list[Case], split: str) -> list[dict[str, Any]]:
    """Trace each case."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    today = datetime.date.today().isoformat()
    found = []
    for number, case in enumerate(chosen, 1):
        result = trace(case)
        print(
            f"{number}/{len(chosen)} {case.model} {result['peak_bytes']} {result['peak_op']}",
            file=sys.stderr,
            flush=True,
        )
        found.append({"split": split, "case": asdict(case), "versions": versions, "date": today, **result})
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    table = rows(spread(), "fit") + rows(drawn(60), "held_out")
    Path(sys.argv[1]).write_text("[\n" + ",\n".join(json.dumps(row) for row in table) + "\n]\n")
