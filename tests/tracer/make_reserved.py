"""
``PYTHONPATH=tests python -m tracer.make_reserved``: what training steps need of a device, above what their tensors take.

One case of each kind in tracer.rows, drawn by a hash, is replayed through the model of the caching allocator below smaller and
smaller limits; tests/data/reserved.json keeps the smallest one that each survived. Rows that are there are kept, unless
``--force`` makes all again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracer.case import Case
from tracer.make_data import SEED, versions
from tracer.models import SHAPES
from tracer.rows import cases

if TYPE_CHECKING:
    from tracer.process import Script

PATH = Path(__file__).parents[1] / "data" / "reserved.json"
Row = dict[str, Any]
AS_TRACED = "as traced"
LIVE_BYTES = {"24 GB": 20 << 30, "80 GB": 70 << 30}
"""What the tensors of a replayed step take: most of a device, because only a full one runs out of memory."""


OTHER_LAYERS = ("linear_num_value_heads", "kv_lora_rank", "num_local_experts")
"""Keys of models whose layers are neither plain attention nor the usual experts: not replayed."""


def eligible() -> list[Case]:
    """Return the cases that train, whose requests are the same for every length, in an order that a hash draws."""
    usual = [case for case in cases() if not any(key in SHAPES[case.model] for key in OTHER_LAYERS)]
    trains = [replace(case, micro_batches=2) for case in usual if case.trains]
    same = [c for c in trains if c.entropy != "chunked" and c.fused != "torch"]
    drawn = {hashlib.sha256(f"{SEED} {sorted(c.changed().items())}".encode()).digest(): c for c in same}
    return [drawn[key] for key in sorted(drawn)]


def kind(case: Case) -> tuple[object, ...]:
    """What decides which tensors come and go, beside their sizes."""
    experts = bool(SHAPES[case.model].get("num_experts"))
    batch = case.padded, case.ulysses > 1
    return case.role, case.strategy, case.checkpointing, case.lora_rank > 0, *batch, experts


def drawn() -> list[Case]:
    """Return the first case of each kind."""
    first: dict[tuple[object, ...], Case] = {}
    for case in eligible():
        first.setdefault(kind(case), case)
    return list(first.values())


def rows(case: Case) -> list[Row]:
    """Replay one case: kinds of lengths, with and without offload, ordinary and expandable segments."""
    from tracer import process

    script = process.script(case)
    return [row for device in (AS_TRACED, *LIVE_BYTES) for row in on_device(case, script, device)]


def on_device(case: Case, script: Script, device: str) -> Iterator[Row]:
    """Replay one case as it was traced, or with as many tokens as fill a device; nothing where its states alone do."""
    from tracer import process

    tokens = case.tokens if device == AS_TRACED else process.filling(case, script, LIVE_BYTES[device])
    for lengths, offload in product(("padded",) if case.padded else ("dynamic", "static"), (False, True)):
        if tokens is None:
            return
        plan = list(process.acts(case, tokens, kind=lengths, offload=offload))
        for expandable in (False, True):
            live, needed = process.needed(script, plan, expandable=expandable)
            yield {
                "case": case.changed(), "device": device, "tokens": tokens, "lengths": lengths, "offload": offload,
                "expandable": expandable, "live_bytes": live, "needed_bytes": needed, "versions": versions(),
                "date": date.today().isoformat(),
            }  # fmt: skip


def read(path: Path = PATH) -> list[Row]:
    """Return the stored rows."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def _write(stored: dict[str, list[Row]], path: Path = PATH) -> None:
    order = [json.dumps(case.changed()) for case in drawn()]
    lines = ",\n".join(json.dumps(row) for key in order for row in stored.get(key, []))
    part = path.with_suffix(".part")
    part.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    os.replace(part, path)


def _is_whole(rows: list[Row]) -> bool:
    """Whether a case has been replayed on a full device, too."""
    return any(row["device"] != AS_TRACED for row in rows)


def main() -> None:
    """Replay what is missing and store after every case."""
    cli = argparse.ArgumentParser(prog="tracer.make_reserved", description=__doc__)
    cli.add_argument("--force", action="store_true", help="replay every case again")
    cli.add_argument("--jobs", type=int, default=1, help="processes")
    options = cli.parse_args()
    stored: dict[str, list[Row]] = {}
    for row in [] if options.force else read():
        stored.setdefault(json.dumps(row["case"]), []).append(row)
    missing = [case for case in drawn() if not _is_whole(stored.get(json.dumps(case.changed()), []))]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(rows, case): case for case in missing}
        for done in as_completed(waiting):
            case = waiting[done]
            stored[json.dumps(case.changed())] = done.result()
            _write(stored)
            print(f"{len(stored)}/{len(drawn())} {case.changed()}", flush=True)


if __name__ == "__main__":
    main()
