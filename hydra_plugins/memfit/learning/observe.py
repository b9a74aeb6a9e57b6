"""From what a run left behind to an observation: the plan that was made, and what really happened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.learning import readings
from hydra_plugins.memfit.learning.kind import DEVICE, digest
from hydra_plugins.memfit.learning.readings import Readings
from hydra_plugins.memfit.learning.store import Observation

RECORD = "memfit.json"
FEWEST = 2
"""Readings below which a run has proved nothing: the optimizer's states exist from its first step on."""
WIDEST = 4.0
"""Observed by predicted bytes, or the other way round, beyond which plan and reading do not belong together."""
_SAME_DEVICE = 0.1
"""Capacities of one product differ by less, over drivers."""
_NAMES = ("*.log", "*.out", "*.txt", "*.jsonl", "*.csv", "events.out.tfevents.*")
_DEPTH = 3
_MOST_FILES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """What an out-of-memory message says."""

    phase: str | None
    needed_bytes: int
    """In use and asked for together; 0 where the message does not say."""
    capacity_bytes: int = 0
    """Of the device; 0 where the message does not say."""


def files_of(paths: Sequence[Path]) -> tuple[Path | None, list[Path]]:
    """Return the record of the plan among ``paths`` and the folders in them, and the files that may hold readings."""
    records: list[Path] = []
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path} does not exist.")
        for file in _below(path) if path.is_dir() else (path,):
            (records if file.name == RECORD else files).append(file)
    if len(set(records)) > 1:
        raise ConfigError(
            f"{len(records)} plans are there ({records[0]}, {records[1]}, ...): learn from one run at a time."
        )
    return (records[0] if records else None), list(dict.fromkeys(files))


def _below(folder: Path) -> list[Path]:
    """Return the files that may hold readings; not deeper, where checkpoints lie."""
    patterns = (f"{'*/' * depth}{name}" for depth in range(_DEPTH) for name in (RECORD, *_NAMES))
    found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if len(found) > _MOST_FILES:
        raise ConfigError(f"{folder} holds more than {_MOST_FILES} logs: name the run's own folder, or its files.")
    return found


def expectation_in(record: Path) -> Mapping[str, Any]:
    """Return what the plan expected (`kind.expectation`); raises `ConfigError` for a record that does not say."""
    try:
        document = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{record} cannot be read: {error}.") from None
    if isinstance(document, Mapping) and document.get("planned") is False:
        raise ConfigError(
            f"{record}: this launch was not planned ({document.get('reason')}), so nothing was expected of it."
        )
    found = document.get("learning") if isinstance(document, Mapping) else None
    if not isinstance(found, Mapping) or not _is_whole(found):
        raise ConfigError(
            f"{record} does not say what the plan expected: it is of an older memfit. Give the launch itself: "
            "memfit learn LOG --hardware NAME key=value ..."
        )
    return found


def _is_whole(found: Mapping[str, Any]) -> bool:
    predicted, phases = found.get("predicted"), found.get("phases")
    return (
        isinstance(found.get("kind"), Mapping)
        and isinstance(found.get("memfit"), str)
        and isinstance(predicted, Mapping)
        and isinstance(phases, Mapping)
        and all(_is_size(size) for size in (found.get("capacity_bytes"), predicted.get(DEVICE), *phases.values()))
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def observe(run: str, expected: Mapping[str, Any], files: Sequence[Path], death: Death | None) -> Observation:
    """Return what the run showed: its peak, or that it died. Raises `ConfigError` where the files do not tell."""
    if death is not None:
        return _died(run, expected, death)
    found = [reading for file in files for reading in readings.read(file)]
    comparable = [reading for reading in found if expected["predicted"].get(reading.scope)]
    if not comparable:
        raise ConfigError(_nothing(found, files))
    few = [reading for reading in comparable if reading.count >= FEWEST]
    if not few:
        raise ConfigError(
            f"{comparable[0].source} holds {comparable[0].count} reading: a run proves something from its second step on."
        )
    worst = max(few, key=lambda reading: reading.peak_bytes / expected["predicted"][reading.scope])
    return ran(run, expected, worst)


def ran(run: str, expected: Mapping[str, Any], reading: Readings) -> Observation:
    """Return what one reading shows of a run that trained; raises `ConfigError` for one that cannot be its own."""
    predicted = int(expected["predicted"][reading.scope])
    ratio = reading.peak_bytes / predicted
    if not 1 / WIDEST <= ratio <= WIDEST:
        raise ConfigError(
            f"{reading.source} shows {gib(reading.peak_bytes)} where the plan predicted {gib(predicted)}: this is not the run of "
            "this plan, or memfit is badly wrong about it; please report it."
        )
    return Observation(
        **_common(run, expected),
        outcome="ran",
        scope=reading.scope,
        predicted=predicted,
        observed=reading.peak_bytes,
    )


def _died(run: str, expected: Mapping[str, Any], death: Death) -> Observation:
    capacity = int(expected["capacity_bytes"])
    if death.capacity_bytes and abs(death.capacity_bytes - capacity) > _SAME_DEVICE * capacity:
        raise ConfigError(
            f"the run died on a device of {gib(death.capacity_bytes)}, and the plan is for one of {gib(capacity)}: this is not "
            "the run of this plan."
        )
    phase = death.phase if death.phase is not None and death.phase in expected["phases"] else ""
    predicted = int(expected["phases"][phase] if phase else max(expected["phases"].values()))
    return Observation(
        **_common(run, expected),
        outcome="oom",
        scope=DEVICE,
        phase=phase,
        predicted=predicted,
        observed=death.needed_bytes,
    )


def _common(run: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    kind = {str(key): str(value) for key, value in expected["kind"].items()}
    capacity = int(expected["capacity_bytes"])
    return {"run": run, "kind": digest(kind), "alike": kind, "memfit": expected["memfit"], "capacity": capacity}


def _nothing(found: Sequence[Readings], files: Sequence[Path]) -> str:
    if found:
        return (
            "the readings are of torch's pool in a process that trainer and engine share: they count a sleeping engine and cannot "
            "be compared. Sample the device: nvidia-smi --query-gpu=index,memory.used --format=csv -l 1 > samples.csv"
        )
    named = ", ".join(str(file) for file in files[:3]) or "no file"
    return (
        f"no memory readings in {named}. memfit reads verl's {readings.KEY} (console, jsonl, TensorBoard), AReaL's Memory-Usage "
        "lines, nvidia-smi's csv with memory.used, and out-of-memory messages."
    )
