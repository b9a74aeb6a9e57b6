"""How many bytes a phase holds: torch's own counters on a GPU, an account of every storage on a CPU."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from tracer.allocator import CachingAllocator, rounded
from tracer.report import STREAMS, Recording

Phases = dict[str, dict[str, int]]
"""Of each phase: bytes ``allocated`` and ``reserved`` at their peaks, and ``end``, what is allocated when it is over."""


class CudaMeter:
    """A recorder of the engine that reads torch.cuda's counters; every phase starts with an empty cache."""

    def __init__(self) -> None:
        self.phases: Phases = {}
        self._phase = ""

    def mark(self, phase: str) -> None:
        """End the phase that runs and begin another."""
        torch.cuda.synchronize()
        if self._phase:
            self.phases[self._phase] = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                "end": torch.cuda.memory_allocated(),
            }
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._phase = phase

    def label(self, tensor: torch.Tensor, label: str) -> None:
        """Purposes do not matter here."""

    def backward_pass(self) -> contextlib.AbstractContextManager[None]:
        """The counters need no help to see autograd."""
        return contextlib.nullcontext()

    def micro_batch_done(self) -> None:
        """Only phases are measured."""

    def read(self) -> Phases:
        """Return what was measured."""
        return {name: found for name, found in self.phases.items() if name not in ("setup", "end")}

    def __enter__(self) -> CudaMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.mark("end")


class LedgerMeter(Recording):
    """The same from the tracer's account of storages, for a machine without a GPU."""

    def read(self) -> Phases:
        """Return what was accounted for."""
        result: Phases = {}
        for (name, start), (_, end) in zip(self.marks, [*self.marks[1:], ("", len(self.log))], strict=True):
            if name not in ("setup", "end"):
                result[name] = self._phase(start, end)
        return result

    def _phase(self, start: int, end: int) -> dict[str, int]:
        allocator, current, peak = CachingAllocator(), 0, 0
        for position, (index, change) in enumerate([*self.log[:end], (-1, 0)]):
            if position == start:
                allocator.empty_cache()
                allocator.peak_reserved, peak = allocator.reserved, current
            if change > 0:
                block = self.blocks[index]
                allocator.allocate(index, block.num_bytes, STREAMS.get(block.scope, "compute"))
            elif change < 0:
                allocator.release(index)
            current += change * rounded(self.blocks[index].num_bytes)
            peak = max(peak, current)
        return {"allocated": peak, "reserved": allocator.peak_reserved, "end": current}


def meter(device: str) -> Any:
    """Return the meter of a device."""
    return CudaMeter() if device == "cuda" else LedgerMeter()


@contextlib.contextmanager
def limited(device: str, limit: int | None) -> Iterator[None]:
    """Let torch's allocator fail above ``limit`` bytes reserved, as it does on a device that is full."""
    if limit is not None and device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    yield
