"""Memory that a run reported, from what it left behind: console logs, jsonl, TensorBoard, `nvidia-smi` samples.

Known are verl's ``perf/max_memory_reserved_gb`` (torch's peak in the trainer's process since it started, in GiB),
AReaL's ``Memory-Usage`` lines, and the column ``memory.used`` of `nvidia-smi --query-gpu=... --format=csv`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import GIB, MIB
from hydra_plugins.memfit.diagnosis.stream import blocks, open_log
from hydra_plugins.memfit.learning.kind import DEVICE, RESERVED

KEY = "perf/max_memory_reserved_gb"
MOST_BYTES = 16 << 40
"""What no accelerator has: a larger reading is none."""
_NUMBER = rb"([0-9]{1,15}(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,2})?)"
_VERL = re.compile(rb"perf/max_memory_reserved_gb\"?[:=]\s{0,4}(?:np\.float\d\d\()?" + _NUMBER)
_AREAL_RESERVED = re.compile(rb"memory reserved \((GB|MB|KB)\): " + _NUMBER)
_AREAL_DEVICE = re.compile(rb"device memory used/total \((GB|MB|KB)\): " + _NUMBER + rb"/")
_AREAL_UNITS = {b"GB": GIB, b"MB": MIB, b"KB": 1024}
_UNITS = {"MIB": MIB, "GIB": GIB, "KIB": 1024, "B": 1}
_NEEDLES = (KEY.encode(), b"memory reserved (")
_EVENTS = "events.out.tfevents"


@dataclass(frozen=True, kw_only=True, slots=True)
class Readings:
    """The largest reading of one file."""

    scope: str
    """`kind.RESERVED` or `kind.DEVICE`."""
    peak_bytes: int
    count: int
    """How many readings there were."""
    source: str


def read(path: Path) -> list[Readings]:
    """Return the readings in a file, by scope; none where it holds none. Raises `ConfigError` for what cannot be read."""
    reader: Callable[[Path], Iterable[tuple[str, int]]]
    if path.name.startswith(_EVENTS):
        reader = _events
    else:
        reader = {".csv": _samples, ".jsonl": _lines, ".json": _lines}.get(path.suffix, _lines)
    found: dict[str, list[int]] = {}
    try:
        for scope, num_bytes in reader(path):
            entry = found.setdefault(scope, [0, 0])
            entry[:] = max(entry[0], num_bytes), entry[1] + 1
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    return [Readings(scope=s, peak_bytes=e[0], count=e[1], source=str(path)) for s, e in found.items() if e[0]]


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    with open_log(str(path)) as file:
        for block in blocks(file, []):
            if any(needle in block.data for needle in _NEEDLES):
                for line in block.data.split(b"\n"):
                    yield from _line(line)


def _line(line: bytes) -> Iterator[tuple[str, int]]:
    if line.lstrip()[:1] == b"{":
        yield from _record(line)
        return
    for match in _VERL.finditer(line):
        yield from _reading(RESERVED, match[1], GIB)
    for scope, pattern in ((RESERVED, _AREAL_RESERVED), (DEVICE, _AREAL_DEVICE)):
        for match in pattern.finditer(line):
            yield from _reading(scope, match[2], _AREAL_UNITS[match[1]])


def _record(line: bytes) -> Iterator[tuple[str, int]]:
    """One line of verl's file logger, ``{"step": 1, "data": {...}}``, or of a logger that writes the metrics flat."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return
    data = record.get("data", record) if isinstance(record, Mapping) else None
    value = data.get(KEY) if isinstance(data, Mapping) else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from _reading(RESERVED, value, GIB)


def _samples(path: Path) -> Iterator[tuple[str, int]]:
    """Rows of nvidia-smi; the unit stands in the head (``memory.used [MiB]``) or behind each number."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        try:
            rows = csv.reader((line.replace("\0", "") for line in file), skipinitialspace=True)
            head = [cell.strip() for cell in next(rows, [])]
            column = next((i for i, cell in enumerate(head) if cell.split(" ")[0] == "memory.used"), None)
            if column is None:
                raise ConfigError(
                    f"{path} has no column memory.used. Sample with: nvidia-smi --query-gpu=index,memory.used --format=csv -l 1"
                )
            unit = head[column].partition("[")[2].rstrip("]") or "MiB"
            for row in rows:
                number, _, own = (row[column].strip() if column < len(row) else "").partition(" ")
                yield from _reading(DEVICE, number, _UNITS.get((own or unit).upper(), 0))
        except csv.Error as error:
            raise ConfigError(f"{path} is not valid csv: {error}.") from None


def _events(path: Path) -> Iterator[tuple[str, int]]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    except ModuleNotFoundError:
        raise ConfigError(
            f"{path} is read with tensorboard, which is not installed here: pip install tensorboard. The console log of the "
            "run holds the same numbers."
        ) from None
    try:
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == KEY:
                    yield from _reading(RESERVED, _scalar(value), GIB)
    except Exception as error:  # the reader's own errors have no common base
        raise ConfigError(f"{path} is no TensorBoard file that can be read: {' '.join(str(error).split())}") from None


def _scalar(value: Any) -> float:
    return float(value.simple_value if value.HasField("simple_value") else value.tensor.float_val[0])


def _reading(scope: str, number: bytes | str | float, unit: int) -> Iterator[tuple[str, int]]:
    """Yield the number in bytes, unless it is none (``[N/A]``) or no size."""
    try:
        num_bytes = int(float(number) * unit)
    except (ValueError, OverflowError):
        return
    if 0 < num_bytes <= MOST_BYTES:
        yield scope, num_bytes
