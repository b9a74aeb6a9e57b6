"""From a log to numbers: the peak of each phase, what was alive at it, and what the caching allocator held."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tracer.allocator import CachingAllocator, rounded
from tracer.case import Case
from tracer.engine import session
from tracer.ledger import Block, Ledger

STREAMS = {"gather": "gather", "reduce": "reduce"}
"""FSDP gathers and reduces on streams of their own; the caching allocator keeps a pool for each."""


class Recording(Ledger):
    """A ledger with the marks of the phases, and with the parts of FSDP named."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[str, int]] = []
        self.backward_starts: list[int] = []
        self.micro_batch_ends: list[int] = []

    def mark(self, phase: str) -> None:
        """Begin a phase."""
        self.phase = phase
        self.marks.append((phase, len(self.log)))

    def backward_pass(self) -> Any:
        """Remember where the forward pass ended."""
        self.backward_starts.append(len(self.log))
        return super().backward_pass()

    def micro_batch_done(self) -> None:
        """Remember where a micro-batch of the update ended."""
        self.micro_batch_ends.append(len(self.log))

    def __enter__(self) -> Recording:
        from torch.distributed.fsdp import _runtime_utils as fsdp1
        from torch.distributed.fsdp._flat_param import FlatParamHandle
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

        super().__enter__()
        for owner, name, scope in (
            (FlatParamHandle, "pre_unshard", "gather"),
            (FlatParamHandle, "unshard", "gather"),
            (FSDPParamGroup, "unshard", "gather"),
            (FSDPParamGroup, "wait_for_unshard", "copy_out"),
            (fsdp1, "_reduce_grad", "reduce"),
            (fsdp1, "_reduce_grad_no_shard", "reduce"),
            (FSDPParamGroup, "post_backward", "reduce2"),
        ):
            self.patch(owner, name, self.scoped(scope))
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasePeak:
    """One phase of a trace. Bytes are rounded to 512, as ``torch.cuda.memory_allocated`` counts them."""

    start_allocated_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    """Reserved by a caching allocator that starts the phase without holes."""
    peak_op: str
    breakdown: dict[str, int]
    """What was alive at the peak, by purpose; sums to the peak."""
    largest: list[tuple[int, str, tuple[int, ...], str]]
    """The largest blocks at the peak: bytes, operator, shape, purpose."""


def purpose(block: Block, recording: Recording, vocab_size: int, shapes: set[tuple[int, ...]]) -> str:
    """Return what a block is for."""
    if block.label:
        return block.label
    if block.scope in ("gather", "copy_out") or block.op == "resize_":
        return "gathered_weights"
    if block.scope.startswith("reduce") or (block.backward and (block.shape in shapes or block.shape[::-1] in shapes)):
        return "unsharded_gradients"
    if vocab_size in block.shape or (block.op.startswith("aten.logsumexp") and not block.shape):
        return "logits"
    starts = [s for s in recording.backward_starts if s >= block.born]
    if not block.backward and starts and (block.died is None or block.died > starts[0]):
        return "saved_activations"
    return "recomputed_activations" if block.recomputed else "temporaries"


def peaks(recording: Recording, vocab_size: int, shapes: set[tuple[int, ...]]) -> dict[str, PhasePeak]:
    """Return the peak of every phase but the setup."""
    result = {}
    for (phase, start), (_, end) in zip(recording.marks, recording.marks[1:], strict=False):
        if phase != "setup":
            result[phase] = _phase_peak(recording, start, end, vocab_size, shapes)
    return result


def _alive(recording: Recording, position: int) -> dict[int, int]:
    alive: dict[int, int] = {}
    for index, change in recording.log[:position]:
        if change > 0:
            alive[index] = rounded(recording.blocks[index].num_bytes)
        else:
            del alive[index]
    return alive


def _phase_peak(recording: Recording, start: int, end: int, vocab_size: int, shapes: set[tuple[int, ...]]) -> PhasePeak:
    before = _alive(recording, start)
    allocator = CachingAllocator()
    for index in before:
        allocator.allocate(index, recording.blocks[index].num_bytes)
    current = peak = sum(before.values())
    position = start
    for at, (index, change) in enumerate(recording.log[start:end], start):
        block = recording.blocks[index]
        if change > 0:
            allocator.allocate(index, block.num_bytes, STREAMS.get(block.scope, "compute"))
        else:
            allocator.release(index)
        current += change * rounded(block.num_bytes)
        if current > peak:
            peak, position = current, at + 1
    alive = _alive(recording, position)
    purposes = {i: purpose(recording.blocks[i], recording, vocab_size, shapes) for i in alive}
    breakdown: Counter[str] = Counter()
    for index, num_bytes in alive.items():
        breakdown[purposes[index]] += num_bytes
    top = sorted(alive, key=lambda i: -alive[i])[:12]
    return PhasePeak(
        start_allocated_bytes=sum(before.values()),
        peak_allocated_bytes=peak,
        peak_reserved_bytes=allocator.peak_reserved,
        peak_op=recording.blocks[recording.log[position - 1][0]].op,
        breakdown=dict(sorted(breakdown.items())),
        largest=[(alive[i], recording.blocks[i].op, recording.blocks[i].shape, purposes[i]) for i in top],
    )


def trace(case: Case) -> tuple[int, dict[str, PhasePeak]]:
    """Run one case on tensors without data; return its number of parameters and the peak of each phase."""
    recording = Recording()
    with session(case, recording) as engine:
        with recording:
            engine.run()
        return engine.parameters, peaks(recording, engine.vocab_size, engine.parameter_shapes)
