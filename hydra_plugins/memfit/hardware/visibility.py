"""Which devices CUDA would show this process: the rules of ``CUDA_VISIBLE_DEVICES``, without asking CUDA.

The rules are those of the CUDA programming guide and of torch's own parser: the list ends at its first entry that names
no device, an entry that stands twice empties it, numbers are read the way C's ``strtoul`` reads them, UUIDs may be
abbreviated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

from hydra_plugins.memfit.base.errors import HardwareNotDetected

VARIABLE = "CUDA_VISIBLE_DEVICES"
_NUMBER = re.compile(r"[+-]?\d+")
_Entry = TypeVar("_Entry", int, str)
_Device = TypeVar("_Device")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Raw numbers of one GPU or MIG slice, as the driver gave them. Sizes are bytes."""

    index: int
    uuid: str | None
    product: str
    total_bytes: int
    reserved_bytes: int | None
    used_bytes: int
    own_bytes: int
    compute_capability: str | None
    ecc: bool | None
    mig: bool = False
    mig_path: str | None = None
    """Name of a slice in the older form, ``MIG-GPU-<uuid>/<gpu instance>/<compute instance>``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """One physical GPU: whole, cut into slices, or unreadable."""

    index: int
    uuid: str | None
    whole: Reading | None
    slices: tuple[Reading, ...] = ()
    mig: bool = False
    failure: str | None = None
    """Why it could not be read."""
    allowed: bool = True
    """``False`` where this process may not open it; CUDA does not count it then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The devices that CUDA would show."""

    readings: tuple[Reading, ...]
    """One for each device that may be among the visible ones."""
    count: int
    """Number of visible devices; below ``len(readings)`` where it is not certain which ones they are."""
    notes: tuple[str, ...] = ()


def select(boards: Sequence[Board], environ: Mapping[str, str]) -> Selection:
    """Return the devices that a CUDA process with this environment would see; raises `HardwareNotDetected` for none."""
    usable = [board for board in boards if board.allowed]
    if not usable:
        raise HardwareNotDetected("the driver is loaded and lists no GPU that this process may open.")
    value = environ.get(VARIABLE)
    if value is None:
        return _of_boards(usable)
    if value.startswith("MIG-"):
        slices = [reading for board in usable for reading in board.slices]
        return _one_slice(_found(value, _prefixed("MIG-", value), lambda name: _slice_named(name, slices)))
    if value.startswith("GPU-"):
        return _of_boards(_found(value, _prefixed("GPU-", value), lambda name: _by_uuid(name, usable)))
    chosen = _found(value, _numbers(value), lambda number: usable[number] if number < len(usable) else None)
    return _in_unknown_order(chosen, usable, environ) or _of_boards(chosen)


def _prefixed(prefix: str, value: str) -> list[str]:
    """Return the entries up to the first of another form."""
    return list(takewhile(lambda entry: entry.startswith(prefix), map(str.strip, value.split(","))))


def _numbers(value: str) -> list[int]:
    """Return the entries as numbers, up to the first that is none, or negative."""
    matches = (_NUMBER.match(entry.strip()) for entry in value.split(","))
    return list(takewhile(lambda number: number >= 0, (int(match.group()) if match else -1 for match in matches)))


def _found(value: str, entries: Sequence[_Entry], find: Callable[[_Entry], _Device | None]) -> list[_Device]:
    """Return what the entries name, up to the first that names nothing; raises where that is nothing at all."""
    devices = list(takewhile(lambda device: device is not None, map(find, entries)))
    chosen = [device for device in devices if device is not None]
    if len(set(entries)) < len(entries) or len(set(chosen)) < len(chosen):
        raise HardwareNotDetected(f"{VARIABLE}={value!r} names one device twice: CUDA then shows none.")
    if not chosen:
        raise HardwareNotDetected(_nothing_visible(value))
    return chosen


def _nothing_visible(value: str) -> str:
    first = value.split(",")[0].strip()
    if not value.strip():
        return (
            f"{VARIABLE} is set and empty, so no GPU is visible in this process: a Ray task without num_gpus, "
            "a login node, or a launch that hides them on purpose."
        )
    if first == "NoDevFiles":
        return f"{VARIABLE}=NoDevFiles: Slurm gave this job no GPU."
    if first.startswith("-"):
        return f"{VARIABLE}={value!r} hides every GPU."
    return f"{VARIABLE}={value!r}: its first entry {first!r} names no device of this host, so CUDA shows none."


def _by_uuid(entry: str, boards: Sequence[Board]) -> Board | None:
    matches = [board for board in boards if (board.uuid or "").startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _slice_named(entry: str, slices: Sequence[Reading]) -> Reading | None:
    def named(reading: Reading) -> bool:
        return entry == reading.mig_path or (entry != "MIG-" and (reading.uuid or "").startswith(entry))

    matches = [reading for reading in slices if named(reading)]
    return matches[0] if len(matches) == 1 else None


def _one_slice(slices: Sequence[Reading]) -> Selection:
    note = "a MIG slice: bandwidth and FLOP/s of the slice are not known"
    if len(slices) > 1:
        note += f"; CUDA shows a process one slice at a time, the first of {len(slices)} counts"
    return Selection(readings=tuple(slices[:1]), count=1, notes=(note,))


def _of_boards(boards: Sequence[Board]) -> Selection:
    """Return the devices of these boards: one slice where a board is cut, as CUDA does, else every whole GPU."""
    for board in boards:
        if board.failure is not None:
            raise HardwareNotDetected(f"GPU {board.index} is visible and cannot be read: {board.failure}.")
    slices = [reading for board in boards for reading in board.slices]
    if slices:
        return _one_slice(slices)
    cut = [board.index for board in boards if board.mig]
    if cut:
        raise HardwareNotDetected(
            f"MIG is on for GPU {cut[0]} and no MIG device of it is visible here. Create one, or name it in {VARIABLE}."
        )
    whole = tuple(board.whole for board in boards if board.whole is not None)
    return Selection(readings=whole, count=len(whole))


def _in_unknown_order(chosen: list[Board], boards: list[Board], environ: Mapping[str, str]) -> Selection | None:
    """Return every GPU as a candidate where numbers do not tell which are meant, else ``None``.

    CUDA numbers the fastest GPU 0 unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``; the driver numbers by bus. That matters only
    among GPUs that differ.
    """
    if len(chosen) == len(boards) or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return None
    readable = [board for board in boards if board.failure is None]
    kinds = {board.whole and (board.whole.product, board.whole.total_bytes) for board in readable}
    if len(kinds) < 2 or any(board.failure is not None for board in chosen):
        return None
    everything = _of_boards(readable)
    note = (
        f"GPUs of several kinds, and {VARIABLE} names them by number: CUDA's order is not the driver's, so the "
        "smallest of all counts. CUDA_DEVICE_ORDER=PCI_BUS_ID, or UUIDs, would settle it"
    )
    return Selection(readings=everything.readings, count=len(chosen), notes=(*everything.notes, note))
