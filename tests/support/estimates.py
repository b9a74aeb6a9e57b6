"""Predictions that are pinned: ``python -m support.estimates`` predicts the named launches again and says what moved.

Run from the top of the repository with ``PYTHONPATH=tests``. The launches are tests/data/estimates.yaml. tests/data/estimates.json
holds two tables of peaks by phase, in bytes: ``released``, those of the last release, and ``now``. A line of the section
*Estimates* in CHANGELOG.md goes with every launch whose peak differs between the two; the command prints those lines.
``--release`` makes today's table that of the release.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path

from omegaconf import OmegaConf

from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.cli.main import DOES_NOT_FIT, FITS, main

ROOT = Path(__file__).resolve().parents[2]
LAUNCHES = ROOT / "tests" / "data" / "estimates.yaml"
TABLES = ROOT / "tests" / "data" / "estimates.json"
CHANGELOG = ROOT / "CHANGELOG.md"

Table = dict[str, dict[str, int]]
"""Peak of every phase, in bytes, by launch."""


def predict() -> Table:
    """Return what memfit predicts today, on its console command."""
    launches = OmegaConf.to_container(OmegaConf.load(LAUNCHES))
    assert isinstance(launches, dict)
    return {str(name): _peaks(shlex.split(words)) for name, words in launches.items()}


def _peaks(words: list[str]) -> dict[str, int]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["check", "--json", *words])
    assert status in (FITS, DOES_NOT_FIT), words
    return {phase["name"]: phase["peak_bytes"] for phase in json.loads(printed.getvalue())["phases"]}


def stored() -> dict[str, Table]:
    """Return the two tables that the repository holds."""
    tables: dict[str, Table] = json.loads(TABLES.read_text(encoding="utf-8"))
    return tables


def moved(released: Table, now: Table) -> dict[str, str]:
    """Return, by launch, the changelog's line on the phases whose peak is another than in the release."""
    lines = {}
    for name, peaks in now.items():
        old = released.get(name, {})
        phases = [
            f"{p} {_peak(old.get(p))} -> {_peak(peaks.get(p))}" for p in {**old, **peaks} if old.get(p) != peaks.get(p)
        ]
        if old and phases:
            lines[name] = f"- `{name}`: {', '.join(phases)}"
    return lines


def _peak(peak_bytes: int | None) -> str:
    return "none" if peak_bytes is None else gib(peak_bytes)


def unreleased_estimates() -> str:
    """Return the section *Estimates* of what is not released yet."""
    unreleased = CHANGELOG.read_text(encoding="utf-8").split("\n## ")[1]
    return unreleased.partition("### Estimates")[2].partition("\n### ")[0]


def write(*, release: bool) -> None:
    """Store today's predictions; print the lines that the changelog needs."""
    now = predict()
    released = now if release or not TABLES.exists() else stored()["released"]
    released = {name: peaks for name, peaks in {**now, **released}.items() if name in now}
    TABLES.write_text(json.dumps({"released": released, "now": now}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(moved(released, now).values()) or "nothing moved since the release")


if __name__ == "__main__":
    write(release="--release" in sys.argv[1:])
