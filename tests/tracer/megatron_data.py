"""``TORCHDYNAMO_DISABLE=1 PYTHONPATH=tests python -m tracer.megatron_data``: write tests/data/megatron_traces.json.

Needs torch and megatron-core (tests/tiers.sh, environment ``megatron``). Torch's compiler is switched off: what it would fuse is
a stand-in in `tracer.megatron`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tracer.megatron import MegatronCase

PATH = Path(__file__).parents[1] / "data" / "megatron_traces.json"
K = 1024


def cases() -> Iterator[MegatronCase]:
    """Yield the cases: dense models, tensor parallelism with and without sequence parallelism, each kind of stage and head."""
    for model, tensor, tokens in (
        ("qwen2.5-0.5b", 1, 8 * K), ("qwen2.5-3b", 2, 16 * K), ("qwen2.5-7b", 4, 8 * K), ("qwen2.5-32b", 8, 8 * K),
        ("qwen3-8b", 2, 16 * K), ("qwen3-4b", 1, 4 * K), ("llama-3.1-8b", 8, 32 * K), ("llama-3.2-1b", 1, 8 * K),
    ):  # fmt: skip
        for recompute in ("none", "full"):
            yield MegatronCase(model=model, tensor=tensor, tokens=tokens, recompute=recompute)
            for first, last in ((True, False), (False, False), (False, True)):
                stage = {"first": first, "last": last, "in_flight": 1 if last else 4}
                yield MegatronCase(model=model, tensor=tensor, tokens=tokens, recompute=recompute, **stage)  # type: ignore[arg-type]
    for model, tensor in (("qwen2.5-7b", 4), ("llama-3.1-8b", 2)):
        for recompute in ("none", "full"):
            yield MegatronCase(model=model, tensor=tensor, tokens=8 * K, recompute=recompute, sequence_parallel=False)
    for tensor, expert, tokens in ((1, 8, 8 * K), (4, 4, 16 * K), (2, 8, 8 * K)):
        sizes = {"model": "qwen3-30b-a3b", "layers": 2, "tensor": tensor, "expert": expert, "tokens": tokens}
        for recompute in ("none", "full"):
            for fusion in (False, True):
                yield MegatronCase(**sizes, recompute=recompute, permute_fusion=fusion)  # type: ignore[arg-type]
            for first, last in ((True, False), (False, False), (False, True)):
                stage = {"first": first, "last": last, "in_flight": 1 if last else 3}
                yield MegatronCase(**sizes, recompute=recompute, permute_fusion=first, **stage)  # type: ignore[arg-type]
    for fusion in (False, True):
        yield MegatronCase(model="qwen3-30b-a3b", layers=1, tokens=4 * K, permute_fusion=fusion)
    for entropy, temperature in ((True, True), (False, False)):
        yield MegatronCase(
            model="qwen2.5-7b", tensor=4, tokens=16 * K, recompute="full", entropy=entropy, temperature=temperature
        )


def row(case: MegatronCase) -> dict[str, Any]:
    """Trace one case."""
    from tracer.megatron import trace

    phases = {name: {k: v for k, v in asdict(peak).items() if k != "largest"} for name, peak in trace(case).items()}
    made = {name: version(name).split("+")[0] for name in ("torch", "megatron-core")}
    return {"case": asdict(case), "phases": phases, "versions": made, "date": date.today().isoformat()}


def read() -> list[dict[str, Any]]:
    """Return the stored rows."""
    rows: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))["rows"]
    return rows


def main() -> None:
    """Trace and write, one row a line."""
    lines = ",\n".join(json.dumps(row(case)) for case in cases())
    PATH.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
