"""Which devices CUDA would show this process: the rules of ``CUDA_VISIBLE_DEVICES``, without asking CUDA.

The rules are those of the CUDA programming guide and of torch's own parser: the list ends at its first entry that names
no device, an entry that stands twice empties it, numbers are read the way C's ``strtoul`` reads them, UUIDs may be
abbreviated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hydra_plugins.memfit.base.errors import HardwareNotDetected

VARIABLE = "CUDA_VISIBLE_DEVICES"
_NUMBER = re.compile(r"[+-]?\d+")
_T = TypeVar("_T")


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
        return _of_slices(value, usable)
    if value.startswith("GPU-"):
        return _of_boards(_listed(value, lambda entry: _by_uuid(entry, usable)))
    chosen = _listed(value, lambda entry: _by_number(entry, usable))
    return _in_unknown_order(chosen, usable, environ) or _of_boards(chosen)


def _listed(value: str, find: Callable[[str], _T | None]) -> list[_T]:
    """Return what the entries name, up to the first that names nothing; raises where that is nothing at all."""
    chosen: list[_T] = []
    for entry in value.split(","):
        found = find(entry.strip())
        if found is None:
            break
        if found in chosen:
            raise HardwareNotDetected(f"{VARIABLE}={value!r} names one device twice: CUDA then shows none.")
        chosen.append(found)
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


def _by_number(entry: str, boards: Sequence[Board]) -> Board | None:
    match = _NUMBER.match(entry)
    number = int(match.group()) if match else -1
    return boards[number] if 0 <= number < len(boards) else None


def _by_uuid(entry: str, boards: Sequence[Board]) -> Board | None:
    matches = [board for board in boards if entry.startswith("GPU-") and (board.uuid or "").startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _slice_by_name(entry: str, slices: Sequence[Reading]) -> Reading | None:
    def named(reading: Reading) -> bool:
        return entry == reading.mig_path or (entry != "MIG-" and (reading.uuid or "").startswith(entry))

    matches = [reading for reading in slices if named(reading)]
    return matches[0] if len(matches) == 1 else None


def _of_slices(value: str, boards: Sequence[Board]) -> Selection:
    slices = [reading for board in boards for reading in board.slices]
    return _one_slice(_listed(value, lambda entry: _slice_by_name(entry, slices)))


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
