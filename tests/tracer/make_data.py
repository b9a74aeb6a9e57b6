"""
``PYTHONPATH=tests python -m tracer.make_data``: trace every case of tracer.rows and write tests/data/traces.json.

Rows that are already there and were made with the same versions are kept; ``--force`` traces them again.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tracer.case import Case
from tracer.rows import cases

PATH = Path(__file__).parents[1] / "data" / "traces.json"
SEED = "2026-11-21"
Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Return the versions that decide what is allocated."""
    return {name: version(name).split("+")[0] for name in ("torch", "transformers", "verl", "peft")}


def split(case: Case) -> str:
    """Return ``fit`` or ``held_out``: drawn once for a case, whatever other cases there are."""
    draw = hashlib.sha256((SEED + json.dumps(case.stored(), sort_keys=True)).encode()).digest()[0]
    return "fit" if draw % 2 else "held_out"


def row(case: Case) -> Row:
    """Trace one case."""
    from tracer.report import trace

    parameters, phases = trace(case)
    result: Row = {"case": case.stored(), "split": split(case), "parameters": parameters, "phases": {}}
    for name, peak in phases.items():
        result["phases"][name] = {k: v for k, v in asdict(peak).items() if k != "largest"}
    return {**result, "versions": versions(), "date": date.today().isoformat()}


def read(path: Path = PATH) -> list[Row]:
    """Return the stored rows."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def write(rows: Iterable[Row], path: Path = PATH) -> None:
    """Store rows, one a line, so that a change of one case is a change of one line."""
    lines = ",\n".join(json.dumps(r) for r in rows)
    part = path.with_suffix(".part")
    part.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    os.replace(part, path)


def main() -> None:
    """Trace what is missing and store after every row."""
    cli = argparse.ArgumentParser(prog="tracer.make_data", description=__doc__)
    cli.add_argument("--force", action="store_true", help="trace every case again")
    force = cli.parse_args().force
    wanted = {json.dumps(c.stored()): c for c in cases()}
    stored = {json.dumps(r["case"]): r for r in read() if not force and r["versions"] == versions()}
    stored = {key: r for key, r in stored.items() if key in wanted}
    missing = [(key, case) for key, case in wanted.items() if key not in stored]
    random.Random(SEED).shuffle(missing)  # whatever is stored when it stops is a spread over all kinds
    for key, case in missing:
        started = time.perf_counter()
        try:
            stored[key] = row(case)
        except Exception as error:
            raise SystemExit(f"{case.changed()}: {error!r}") from error
        write(stored[k] for k in wanted if k in stored)
        print(f"{len(stored)}/{len(wanted)} {time.perf_counter() - started:.0f} s {case.changed()}", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
