"""The command: run every job in a process of its own, search the limits, write raw JSON and a Markdown summary."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measure.page import Result, summary
from measure.table import KINDS, Job, table

OUT = Path(__file__).parents[2] / "docs" / "validation" / "gpu"
LIMITS = (1.0, 1.02, 1.04, 1.06, 1.08, 1.1, 1.13, 1.17, 1.22, 1.3)
"""Multiples of the tensors' own peak below which steps of varied lengths are tried; searched by halves."""
PACKAGES = ("torch", "transformers", "verl", "flash-attn", "peft")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 where there is no GPU and none was waived."""
    cli = argparse.ArgumentParser(prog="measure", description="Measure on one CUDA GPU what memfit predicts.")
    cli.add_argument("--dry-run", action="store_true", help="tiny models on the CPU: shows that the script works")
    cli.add_argument("--out", type=Path, default=OUT, help="folder of the JSON and the summary (default: %(default)s)")
    cli.add_argument("--only", nargs="+", choices=KINDS, help="kinds of measurements (default: all)")
    cli.add_argument("--job", help=argparse.SUPPRESS)
    options = cli.parse_args(argv)
    device = "cpu" if options.dry_run else "cuda"
    if options.job:
        from measure.jobs import run

        print(json.dumps(run(Job(**json.loads(options.job)), device)))
        return 0
    if device == "cuda" and (problem := _no_gpu()):
        print(f"{problem} Run this where a CUDA GPU is, or with --dry-run.", file=sys.stderr)
        return 2
    results = [_apart(job, device) for job in table(dry=options.dry_run) if job.kind in (options.only or KINDS)]
    results += [found for base in results if base["kind"] == "lengths" for found in _search(base, device)]
    machine = _machine(device)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{machine['device'].lower().replace(' ', '-')}-{machine['date']}"
    (options.out / f"{name}.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(summary(machine, results))
    print(f"wrote {options.out / name}.json and .md")
    return 1 if any("error" in r for r in results) else 0


def _no_gpu() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed."
    return "" if torch.cuda.is_available() else "torch sees no CUDA device."


def _machine(device: str) -> dict[str, Any]:
    import torch

    found = {name: _version(name) for name in PACKAGES}
    if device == "cpu":
        return {"device": "dry run", "total_bytes": 0, "versions": found, "date": date.today().isoformat()}
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[0]
    found |= {"cuda": str(torch.version.cuda), "driver": driver}
    return {
        "device": properties.name, "total_bytes": properties.total_memory, "versions": found,
        "date": date.today().isoformat(),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _apart(job: Job, device: str) -> Result:
    """Run a job in a fresh process, whose allocator nobody has used."""
    command = [sys.executable, "-m", "measure", "--job", json.dumps(asdict(job))]
    command += ["--dry-run"] if device == "cpu" else []
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(tests), str(tests.parent), os.environ.get("PYTHONPATH"))))
    setting = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{job.expandable}", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **setting})
    print(
        job.kind,
        job.options,
        "limit" if job.limit_bytes else "",
        "ok" if done.returncode == 0 else "failed",
        flush=True,
    )
    lines = done.stdout.strip().split("\n")
    if done.returncode == 0:
        return dict(json.loads(lines[-1]))
    return {**asdict(job), "error": "\n".join(done.stderr.strip().split("\n")[-3:])}


def _search(base: Result, device: str) -> list[Result]:
    """Halve the list of limits until the smallest one that survives is known."""
    if "error" in base:
        return []
    job = Job(**{name: base[name] for name in ("kind", "options", "lengths", "expandable")})
    live, low, high, found = base["phases"]["steps"]["allocated"], -1, len(LIMITS), []
    while high - low > 1:
        middle = (low + high) // 2
        tried = _apart(replace(job, limit_bytes=int(live * LIMITS[middle])), device)
        found.append({**tried, "multiple": LIMITS[middle]})
        low, high = (low, middle) if tried.get("survived") else (middle, high)
    return found


if __name__ == "__main__":
    sys.exit(main())
