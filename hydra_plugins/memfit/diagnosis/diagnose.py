"""From a scanned log, and a launch where one is known, to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydra_plugins.memfit.diagnosis.amount import Amount
from hydra_plugins.memfit.diagnosis.devices import by_capacity
from hydra_plugins.memfit.diagnosis.finding import Finding
from hydra_plugins.memfit.diagnosis.remedy import Remedy, engine_arithmetic
from hydra_plugins.memfit.diagnosis.scan import Scan
from hydra_plugins.memfit.diagnosis.terms import LOSS_FUNCTIONS, SMALL_BLOCKS, Term, readings
from hydra_plugins.memfit.model import catalog
from hydra_plugins.memfit.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """The answer for one log."""

    log: str
    scan: Scan
    cause: Finding | None
    devices: tuple[str, ...] = ()
    """Products with the capacity that the message names."""
    terms: tuple[Term, ...] = ()
    """Readings of the size that was asked for."""
    remarks: tuple[str, ...] = ()
    """What the numbers say by themselves."""
    launch_source: str = ""
    """Where the launch was read; empty where none is known."""
    hardware: str = ""
    """What the plan is for."""
    remedy: Remedy | None = None
    overrides: tuple[str, ...] = ()
    """The plan, as words to paste behind ``+hardware=``."""
    notes: tuple[str, ...] = ()


def devices_of(cause: Finding | None) -> tuple[str, ...]:
    """Return the products whose capacity the message names."""
    capacity = cause.amounts.get("capacity") if cause is not None else None
    return () if capacity is None or cause is None or cause.kind.name.startswith("xla") else by_capacity(capacity)


def terms_of(
    cause: Finding,
    *,
    model: ModelSpec | None,
    ranks: int = 1,
    tokens: Mapping[int, str] | None = None,
    lengths: Sequence[int] = (),
) -> tuple[Term, ...]:
    """Return the readings of the size that was asked for."""
    asked = cause.amounts.get("asked")
    if asked is None or cause.kind.name != "gpu_oom":
        return ()
    in_loss = any(part in function for function in cause.functions for part in LOSS_FUNCTIONS)
    vocabularies = () if model is not None or not in_loss else _vocabularies()
    return readings(
        asked, model=model, ranks=ranks, tokens=tokens, lengths=lengths, vocabularies=vocabularies, in_loss=in_loss
    )


def _vocabularies() -> tuple[int, ...]:
    """The vocabularies of conf/model, the most common first."""
    counts: dict[int, int] = {}
    for name in catalog.names():
        size = catalog.read(name).config.get("vocab_size")
        if isinstance(size, int):
            counts[size] = counts.get(size, 0) + 1
    return tuple(sorted(counts, key=lambda size: (-counts[size], size)))


def remarks_of(cause: Finding) -> tuple[str, ...]:
    """Return sentences about the numbers of the message."""
    said = [engine_arithmetic(cause), _fragmented(cause.amounts), _small(cause.amounts.get("asked")), *_crowded(cause)]
    return tuple(sentence for sentence in said if sentence)


def _fragmented(amounts: Mapping[str, Amount]) -> str:
    asked, unused = amounts.get("asked"), amounts.get("reserved")
    if asked is None or unused is None or unused.num_bytes < asked.num_bytes:
        return ""
    return (
        "torch's pool holds more unused memory than was asked for, in pieces that are too small: fragmentation. "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True avoids most of it (older vLLM refuses it with sleep mode)."
    )


def _small(asked: Amount | None) -> str:
    if asked is None or asked.num_bytes not in SMALL_BLOCKS:
        return ""
    return (
        f"torch takes a block of {asked.num_bytes >> 20} MiB for many small tensors: the size does not tell which one it was. "
        "The memory was full before."
    )


def _crowded(cause: Finding) -> list[str]:
    own, others = cause.amounts.get("process"), sum(size.num_bytes for _, size in cause.others)
    if own is None or others <= own.num_bytes:
        return []
    return [
        "Other processes hold more of this GPU than the one that failed: an engine or another rank shares it, or a process of "
        "another run is still alive."
    ]
